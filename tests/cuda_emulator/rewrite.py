"""
A .cu file → C++ that g++ compiles against cuemu.h.

    python tests/cuda_emulator/rewrite.py train_gpt2.cu > build/train_gpt2.cpp

Two pieces of CUDA's syntax are no C++:
    kernel<<<grid, block, bytes, stream>>>(a, b)   becomes a cuemu::launch of a lambda
    extern __shared__ float x[];                   becomes a pointer to the block's shared memory
"""
import re
import subprocess
import sys
from pathlib import Path

NOT_CODE = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
SHARED = r"extern\s+__shared__\s+([\w\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;"

def closing(code, i):
    """Just past the parenthesis that closes the one at i."""
    depth = 0
    while True:
        depth += (code[i] == "(") - (code[i] == ")")
        i += 1
        if depth == 0:
            return i

def kernel_start(code, end):
    """Where the name or name<…> begins that ends at `end`."""
    start = end
    if code[start - 1] == ">":
        start = code.rindex("<", 0, start)
    while re.match(r"\w", code[start - 1]):
        start -= 1
    return start

def rewrite(source):
    # comments and strings blanked, every other character in its place
    code = re.sub(NOT_CODE, lambda m: re.sub(r"[^\n]", " ", m[0]), source, flags=re.S)
    edits = []
    for launch in re.finditer("<<<(.*?)>>>", code, re.S):
        start, begin = kernel_start(code, launch.start()), code.index("(", launch.end())
        end = closing(code, begin)
        configuration = source[launch.start() + 3:launch.end() - 3]
        kernel, arguments = source[start:launch.start()], source[begin:end]
        edits.append((start, end, f"cuemu::launch(cuemu::Launch({configuration}), "
                                  f"[&]{{ {kernel}{arguments}; }})"))
    for shared in re.finditer(SHARED, code):
        edits.append((*shared.span(), f"{shared[1]}* {shared[2]} = "
                                      f"({shared[1]}*)cuemu::shared_memory();"))
    for start, end, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[end:]
    return source

def build(source, binary, *options):
    """The text of a .cu file → a program for this CPU; its C++ stays beside it."""
    path = Path(binary).with_suffix(".cpp")
    path.write_text(rewrite(source), encoding="utf-8")
    subprocess.run(["g++", "-std=c++20", "-march=native", "-w", f"-I{Path(__file__).parent}/shim",
                    "-DMULTI_GPU", *options, path, "-o", binary], check=True)

if __name__ == "__main__":
    path = sys.argv[1]
    with open(path, encoding="utf-8") as file:
        print(f'#line 1 "{path}"\n{rewrite(file.read())}', end="")
