"""
GPT-2 training in CUDA C: train_gpt2cu beside llm.c, as whole programs on the same random tokens.

    python bench/trainers.py                    # 1 GPU: 124M and 1558M
    python bench/trainers.py --sanitize         # is a tiny run clean under compute-sanitizer?

in:  train_gpt2.cu and .peers/llm.c, a checkout of karpathy's repository; both are built here
out: a table, and the same as one line of JSON

Both programs print the milliseconds of each step. The bench reads them, leaves out the first steps,
and asks for the GPU's memory. It kills a program after its last timed step, so nothing is saved.
"""
import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from measure import PEERS, finish, missing, ratio, spread, table
from train import SHAPES, mfu, percent

WORK = ROOT / "data" / "bench"
STEP = re.compile(r"step +\d+/\d+ \| loss .*?([\d.]+) ms \|")
TRAINED = {name: SHAPES["cuda"][name] for name in ("gpt2", "gpt2-xl")}
LLMC_ROWS = {"gpt2": 64, "gpt2-xl": 16}     # -b in the scripts of llm.c, for 80 GB

def random_shards(folder, V, n_tokens):
    """Shards of random tokens below V, with the index that tells train_gpt2cu the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, n_tokens      # magic, version, tokens
    for split in ("train", "val"):
        tokens = rng.integers(0, V, n_tokens).astype(np.uint16)
        (folder / f"random_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (folder / "index.json").write_text(json.dumps({"tokenizer": {"n_vocab": V}}))
    np.save(folder / "token_bytes.npy", np.full(V, 4, np.int32))
    return folder

def make(target, **variables):
    """Runs make, which takes libraries from this Python's wheels if CUDA is not installed → what it
    prints."""
    variables["WHEEL"] = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    words = [f"{key}={value}" for key, value in variables.items()]
    done = subprocess.run(["make", "-s", "-C", ROOT, target, *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"make {target} failed:\n{done.stdout[-2000:]}")
    return done.stdout

LLMC_CHANGES = (    # (file, text, replacement)
    # CUDA 13 takes a struct where one call of llm.c gives an integer
    ("cuda_utils.cuh", "cudaMemAdviseSetPreferredLocation, cudaCpuDeviceId",
     "cudaMemAdviseSetPreferredLocation, cudaMemLocation{cudaMemLocationTypeHost, 0}"),
    ("mfu.h", "__has_include(<nvml.h>)", "0"))

def build_llmc(arch="native"):
    """Builds a changed copy of llm.c for this GPU, in bf16, without cuDNN and NVML → the binary, or
    None without a checkout."""
    if not (PEERS / "llm.c").is_dir():
        return None
    copy = WORK / "llm.c"
    binary = copy / "train_gpt2cu"
    if binary.exists():
        return binary
    shutil.copytree(PEERS / "llm.c", copy, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(".git"))
    for file, before, after in LLMC_CHANGES:
        path = copy / "llmc" / file
        path.write_text(path.read_text().replace(before, after))
    found = dict(line.split(maxsplit=1) for line in make("check").splitlines() if " " in line)
    cublas_lt = Path(found["cublasLt"])
    cublas = cublas_lt.with_name(cublas_lt.name.replace("Lt", ""))
    subprocess.run([found["nvcc"], "-O3", "-std=c++17", "--use_fast_math", "-arch", arch,
                    "-DENABLE_BF16", "-isystem", cublas_lt.parent.parent / "include",
                    "train_gpt2.cu", "-o", "train_gpt2cu", "-L", cublas_lt.parent,
                    f"-l:{cublas.name}", f"-l:{cublas_lt.name}", "-Xlinker",
                    f"-rpath={cublas_lt.parent}"], cwd=copy, check=True)
    return binary

def our_command(name, shape, binary, data):
    """train_gpt2cu, for more steps than are timed."""
    return [binary, "--data", data, "--out", WORK / "runs" / name, "--max_steps", 100_000,
            "--total_batch_size", shape.step_tokens, "--eval_every", 100_000, "--config",
            f"n_layer={shape.L}", f"n_head={shape.NH}", f"n_embd={shape.C}",
            f"block_size={shape.T}"]

def llmc_command(name, shape, binary, data):
    """llm.c with the same batch, for more steps than are timed, without evaluation and samples."""
    return [binary, "-i", data / "*train*.bin", "-j", data / "*val*.bin", "-e", f"d{shape.L}",
            "-b", LLMC_ROWS.get(name, 1), "-t", shape.T, "-d", shape.step_tokens, "-x", 100_000,
            "-l", 6e-4, "-u", 700, "-c", 0.1, "-v", 0, "-s", 0, "-h", 0]

def run(command, steps):
    """Runs a trainer for so many steps → (milliseconds of each, GB in use on the GPU or None)."""
    ms = []
    last_lines = []
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last_lines = [*last_lines[-5:], line.strip()]
            ms += map(float, STEP.findall(line))
            if len(ms) == steps:
                break
        used = subprocess.run("nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits",
                              shell=True, capture_output=True, text=True).stdout.strip()
        process.kill()
    if len(ms) < steps:
        raise RuntimeError(" / ".join(last_lines)[-200:] or "it printed nothing")
    if not used:
        return ms, None
    return ms, float(used.splitlines()[0]) / 1000

def timed(label, name, shape, command, args):
    """Runs a trainer → its row of the table. The row of one that fails says why."""
    shutil.rmtree(WORK / "runs" / name, ignore_errors=True)
    try:
        ms, memory_gb = run(command, args.warmup + args.repeats)
    except (OSError, RuntimeError) as error:
        return dict(contender=label, missing=f"failed: {error}")
    ms = ms[args.warmup:]
    tok_s = 1000 * shape.step_tokens / statistics.median(ms)
    return dict(contender=label, step_tokens=shape.step_tokens, spread=spread(ms),
                ms=statistics.median(ms), all_ms=ms, tok_s=tok_s,
                mfu=mfu(shape.flops_per_token() * tok_s, args.device), memory_gb=memory_gb)

def measure(name, shape, args, llmc):
    """→ the rows of both trainers at one shape."""
    n_tokens = max(2 ** 17, 4 * shape.step_tokens)
    if args.quick:
        n_tokens = 4096
    data = random_shards(WORK / f"random-{shape.V}", shape.V, n_tokens)
    ours = dict(contender="ours, CUDA",
                missing=f"not measured: no {args.binary}; run make train_gpt2cu")
    if Path(args.binary).exists():
        ours = timed("ours, CUDA", name, shape, our_command(name, shape, args.binary, data), args)
    theirs = dict(contender="llm.c", missing=missing("llm.c"))
    if llmc:
        theirs = timed("llm.c", name, shape, llmc_command(name, shape, llmc, data), args)
    for row in (ours, theirs):
        row["ours_faster_by"] = None
        if "all_ms" in ours and "all_ms" in row:
            row["ours_faster_by"] = ratio(row["all_ms"], ours["all_ms"])
    return [ours, theirs]

def show(name, shape, rows):
    cells = []
    for row in rows:
        if "missing" in row:
            cells.append([row["contender"], row["missing"], *[None] * 5])
            continue
        cells.append([row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
                      percent(row["mfu"], 1), row["memory_gb"], row["ours_faster_by"]])
    table([f"{name}: {shape.step_tokens:,} tokens a step", "ms", "spread", "tok/s", "MFU",
           "GB in use", "ours is faster by"], cells)

def sanitize(args, shape):
    """Runs two steps and an evaluation of a tiny model under each tool of compute-sanitizer →
    {tool: "clean", or what it found}."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    data = random_shards(WORK / f"random-{shape.V}", shape.V, 4096)
    command = [*our_command("tiny", shape, args.binary, data), "--max_steps", 2]
    found = {}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        shutil.rmtree(WORK / "runs" / "tiny", ignore_errors=True)
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
        try:
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                                  timeout=args.limit)
        except (OSError, subprocess.TimeoutExpired) as error:
            found[tool] = f"not measured: {str(error)[-80:]}"
            continue
        last = (done.stdout + done.stderr).strip().splitlines()[-1][:120]
        found[tool] = "clean"
        if done.returncode:
            found[tool] = f"status {done.returncode}: {last}"
    table(["compute-sanitizer", "says"], found.items())
    return found

def main():
    parser = argparse.ArgumentParser(description="training GPT-2 in CUDA C, beside llm.c")
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "gpt2-xl"], choices=list(TRAINED))
    parser.add_argument("--binary", default=ROOT / "train_gpt2cu", help="our trainer")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer instead")
    parser.add_argument("--limit", type=int, default=60, help="seconds per tool of --sanitize")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--device", default="cuda", help="cuda; cpu: an emulation, without MFU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    args = parser.parse_args()
    tiny = replace(TRAINED["gpt2"], L=2, C=128, NH=2, V=300, T=80, step_tokens=160)
    if args.sanitize:
        return finish("sanitizer", sanitizer=sanitize(args, tiny))
    if not args.quick and args.binary == ROOT / "train_gpt2cu":
        print(make("train_gpt2cu"))
    llmc = None
    if not args.quick:
        llmc = build_llmc()
    report = {}
    for name in args.shapes:
        shape = TRAINED[name]
        if args.quick:
            shape = tiny
        report[name] = measure(name, shape, args, llmc)
        show(name, shape, report[name])
    finish("trainers", device=args.device, speed=report)

if __name__ == "__main__":
    main()
