"""
GPT-2 training in CUDA C: train_gpt2cu beside llm.c's, as whole programs on the same random tokens.

    python bench/trainers.py                    # 1 GPU: 124M and 1558M
    python bench/trainers.py --sanitize         # is a tiny run clean under compute-sanitizer?

in:  train_gpt2.cu, which is built; .peers/llm.c, a checkout of karpathy's repository, which is built here
out: a table, and the same as one line of JSON

Both print a line a step; what is taken are the milliseconds there, without the first steps, and the
GPU's memory. A program is killed when it has done its steps: what it would save is not wanted.
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
from train import SHAPES, peak_flops

WORK = ROOT / "data" / "bench"
STEP = re.compile(r"step +\d+/\d+ \| loss .*?([\d.]+) ms \|")
TRAINED = {name: SHAPES["cuda"][name] for name in ("gpt2", "gpt2-xl")}
LLMC_ROWS = {"gpt2": 64, "gpt2-xl": 16}     # its scripts' -b, for 80 GB

def random_shards(folder, V, n_tokens):
    """Shards of random tokens, and what says how many tokens there are to choose from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, header = np.random.default_rng(0), np.zeros(256, np.int32)
    header[:3] = 20240520, 1, n_tokens
    for split in ("train", "val"):
        tokens = rng.integers(0, V, n_tokens).astype(np.uint16)
        (folder / f"random_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (folder / "index.json").write_text(json.dumps({"tokenizer": {"n_vocab": V}}))
    np.save(folder / "token_bytes.npy", np.full(V, 4, np.int32))
    return folder

def make(target, **variables):
    """Runs make with the libraries of this Python's wheels as the second choice → what it says."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    words = [f"{key}={value}" for key, value in dict(WHEEL=wheels, **variables).items()]
    done = subprocess.run(["make", "-s", "-C", ROOT, target, *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"make {target} failed:\n{done.stdout[-2000:]}")
    return done.stdout

def build_llmc(arch=None):
    """→ its binary, or None without a checkout: for this GPU, in bf16, without cuDNN and NVML.
    CUDA 13 takes a struct where one call of it gives an integer; a copy is told so."""
    if not (PEERS / "llm.c").is_dir():
        return None
    copy = WORK / "llm.c"
    if (copy / "train_gpt2cu").exists():
        return copy / "train_gpt2cu"
    shutil.copytree(PEERS / "llm.c", copy, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(".git"))
    for file, before, after in (
            ("cuda_utils.cuh", "cudaMemAdviseSetPreferredLocation, cudaCpuDeviceId",
             "cudaMemAdviseSetPreferredLocation, cudaMemLocation{cudaMemLocationTypeHost, 0}"),
            ("mfu.h", "__has_include(<nvml.h>)", "0")):
        path = copy / "llmc" / file
        path.write_text(path.read_text().replace(before, after))
    found = dict(line.split(maxsplit=1) for line in make("check").splitlines() if " " in line)
    library = Path(found["cublasLt"])
    blas = library.with_name(library.name.replace("Lt", ""))
    subprocess.run([found["nvcc"], "-O3", "-std=c++17", "--use_fast_math", "-arch",
                    arch or "native", "-DENABLE_BF16", "-isystem", library.parent.parent / "include",
                    "train_gpt2.cu", "-o", "train_gpt2cu", "-L", library.parent,
                    f"-l:{blas.name}", f"-l:{library.name}", "-Xlinker",
                    f"-rpath={library.parent}"], cwd=copy, check=True)
    return copy / "train_gpt2cu"

def commands(name, shape, binary, llmc, data):
    """{label: command or None}: each goes on for more steps than are waited for."""
    T, B = shape.T, LLMC_ROWS.get(name, 1)
    ours = [binary, "--data", data, "--out", WORK / "runs" / name, "--max_steps", 100_000,
            "--total_batch_size", shape.step_tokens, "--eval_every", 100_000, "--config",
            f"n_layer={shape.L}", f"n_head={shape.NH}", f"n_embd={shape.C}", f"block_size={T}"]
    theirs = llmc and [llmc, "-i", data / "*train*.bin", "-j", data / "*val*.bin", "-e",
                       f"d{shape.L}", "-b", B, "-t", T, "-d", shape.step_tokens, "-x", 100_000,
                       "-l", 6e-4, "-u", 700, "-c", 0.1, "-v", 0, "-s", 0, "-h", 0]
    return {"ours, CUDA": ours if Path(binary).exists() else None, "llm.c": theirs}

def run(command, steps):
    """→ (milliseconds of each of so many steps, GB in use on the GPU, or None)."""
    ms, tail = [], []
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            tail = [*tail[-5:], line.strip()]
            ms += map(float, STEP.findall(line))
            if len(ms) == steps:
                break
        used = subprocess.run("nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits",
                              shell=True, capture_output=True, text=True).stdout.strip()
        process.kill()
    if len(ms) < steps:
        raise RuntimeError(" / ".join(tail)[-200:] or "it printed nothing")
    return ms, float(used.splitlines()[0]) / 1000 if used else None

def measure(name, shape, args, llmc):
    data = random_shards(WORK / f"random-{shape.V}", shape.V, max(2 ** 17, 4 * shape.step_tokens)
                         if not args.quick else 4096)
    rows = {}
    for label, command in commands(name, shape, args.binary, llmc, data).items():
        if command is None:
            rows[label] = dict(contender=label, missing=missing(label) if label == "llm.c" else
                               f"not measured: no {args.binary}; run make train_gpt2cu")
            continue
        shutil.rmtree(WORK / "runs" / name, ignore_errors=True)
        try:
            ms, gb = run(command, args.warmup + args.repeats)
        except (OSError, RuntimeError) as error:
            rows[label] = dict(contender=label, missing=f"failed: {error}")
            continue
        ms = ms[args.warmup:]
        tok_s, peak = 1000 * shape.step_tokens / statistics.median(ms), peak_flops(args.device)
        rows[label] = dict(contender=label, step_tokens=shape.step_tokens, spread=spread(ms),
                           ms=statistics.median(ms), all_ms=ms, tok_s=tok_s, mfu=peak and shape.flops_per_token() * tok_s / peak,
                           memory_gb=gb)
    ours = rows["ours, CUDA"].get("all_ms")
    for row in rows.values():
        row["ours_faster_by"] = ratio(row["all_ms"], ours) if ours and "all_ms" in row else None
    return list(rows.values())

def sanitize(args, shape):
    """Two steps and an evaluation of a tiny model under each tool → {tool: what it says}."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    data, found = random_shards(WORK / f"random-{shape.V}", shape.V, 4096), {}
    command = commands("tiny", shape, args.binary, None, data)["ours, CUDA"]
    for check in ("memcheck", "racecheck", "synccheck", "initcheck"):
        shutil.rmtree(WORK / "runs" / "tiny", ignore_errors=True)
        words = [tool, "--tool", check, "--error-exitcode", "9", *command, "--max_steps", 2]
        try:
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                                  timeout=args.limit)
            last = (done.stdout + done.stderr).strip().splitlines()[-1][:120]
            found[check] = "clean" if done.returncode == 0 else f"status {done.returncode}: {last}"
        except (OSError, subprocess.TimeoutExpired) as error:
            found[check] = f"not measured: {str(error)[-80:]}"
    table(["compute-sanitizer", "says"], found.items())
    return found

def main():
    parser = argparse.ArgumentParser(description="training GPT-2 in CUDA C, beside llm.c")
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "gpt2-xl"], choices=list(TRAINED))
    parser.add_argument("--binary", default=ROOT / "train_gpt2cu", help="our trainer")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer instead")
    parser.add_argument("--limit", type=int, default=60, help="of --sanitize: seconds a tool")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--device", default="cuda", help="cuda; cpu: an emulation, no MFU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    args = parser.parse_args()
    tiny = replace(TRAINED["gpt2"], L=2, C=128, NH=2, V=300, T=80, step_tokens=160)
    if args.sanitize:
        return finish("sanitizer", sanitizer=sanitize(args, tiny))
    if not args.quick and args.binary == ROOT / "train_gpt2cu":
        print(make("train_gpt2cu"))
    llmc, report = None if args.quick else build_llmc(), {}
    for name in args.shapes:
        shape = tiny if args.quick else TRAINED[name]
        report[name] = measure(name, shape, args, llmc)
        table([f"{name}: {shape.step_tokens:,} tokens a step", "ms", "spread", "tok/s", "MFU",
               "GB in use", "ours is faster by"],
              [[row["contender"], row["missing"], *[None] * 5] if "missing" in row else
               [row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
                row["mfu"] and f"{row['mfu']:.1%}", row["memory_gb"], row["ours_faster_by"]]
               for row in report[name]])
    finish("trainers", device=args.device, speed=report)

if __name__ == "__main__":
    main()
