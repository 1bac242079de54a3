"""
Training in CUDA C: train_gpt2cu beside llm.c, as whole programs on the same random tokens.

    python bench/trainers.py --build            # compiles both, and counts registers that spill
    python bench/trainers.py                    # 1 GPU: GPT-2 of 124M and 1558M, d12 and d24
    python bench/trainers.py --shapes d24 --ranks 8     # 8 GPUs: ours alone, 8 times the tokens
    python bench/trainers.py --attention wgmma mma      # ours twice: each kind of attention kernels
    python bench/trainers.py --sanitize         # is a tiny run clean under compute-sanitizer?

in:  train_gpt2.cu and .peers/llm.c, a checkout of karpathy's repository; both are built here
out: a table of times, one of our kernels, and the same as one line of JSON

Both programs print the milliseconds of each step. The bench reads them, leaves out the first steps,
three of which ours profiles, and asks for the GPU's memory. It kills a program after its last timed
step, so nothing is saved. llm.c has no dN. Without cuDNN, which its build here lacks, llm.c keeps
the scores of attention in memory; its published speed is with cuDNN, so the table names both.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from measure import PEERS, finish, missing, ratio, spread, table
from project import PUBLISHED
from train import SHAPES, mfu, percent

WORK = ROOT / "data" / "bench"
STEP = re.compile(r"step +\d+/\d+ \| loss .*?([\d.]+) ms \|")
TRAINED = {name: SHAPES["cuda"][name] for name in ("gpt2", "d12", "d24", "gpt2-xl")}
# Rows at a time. 64 and 16 stand in llm.c's scripts, but without cuDNN 16 rows of the 1558M need
# more than the 80 GB of an H100.
LLMC_ROWS = {"gpt2": 64, "gpt2-xl": 8}
NEVER = 1_000_000               # steps; llm.c divides by its intervals, so 0 would end it

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

# ---- Building ------------------------------------------------------------------------------------

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

def build():
    """Compiles ours and llm.c → {name: [seconds, kernels, most registers, bytes that spill]}. What
    the compiler says about each of our kernels is printed."""
    found = {}

    def rows():
        started = time.time()
        (ROOT / "train_gpt2cu").unlink(missing_ok=True)
        printed = make("train_gpt2cu")
        print(printed, file=sys.stderr)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", printed)]
        found["ours"] = [time.time() - started, len(registers), max(registers), sum(spilled)]
        yield "ours", *found["ours"]
        started = time.time()
        if build_llmc() is None:
            yield missing("llm.c"), None, None, None, None
            return
        found["llm.c"] = [time.time() - started]
        yield "llm.c", *found["llm.c"], None, None, None

    table(["built", "s", "kernels", "most registers a thread", "bytes that spill"], rows())
    return found

# ---- Timing --------------------------------------------------------------------------------------

def our_command(name, shape, binary, data, attention=None):
    """train_gpt2cu, for more steps than are timed. Without a kind of attention kernels it chooses."""
    chosen = [] if attention is None else ["--attention", attention]
    return [binary, "--model", name, "--data", data, "--out", WORK / "runs" / name, "--max_steps",
            NEVER, "--total_batch_size", shape.step_tokens, "--eval_every", NEVER, "--profile",
            "--config", f"n_layer={shape.L}", f"n_head={shape.NH}", f"n_embd={shape.C}",
            f"block_size={shape.T}", *chosen]

def llmc_command(name, shape, binary, data):
    """llm.c with the same batch, for more steps than are timed, without samples; one batch is
    evaluated before the first step."""
    return [binary, "-i", data / "*train*.bin", "-j", data / "*val*.bin", "-e", f"d{shape.L}",
            "-b", LLMC_ROWS.get(name, 1), "-t", shape.T, "-d", shape.step_tokens, "-x", NEVER,
            "-l", 6e-4, "-u", 700, "-c", 0.1, "-v", NEVER, "-m", 1, "-s", 0, "-h", 0]

def read_profile(lines):
    """The rows of a --profile among what train_gpt2cu printed → [(kernel, calls, ms, share of the
    step, GB/s, TFLOP/s, share of the bound)], the longest first."""
    rows = []
    is_within = False
    for line in lines:
        if re.match(r"kernel +calls ", line):
            is_within = True
        elif line.startswith(("a step ", "the rest")):
            is_within = False
        elif is_within:
            *_, calls, ms, share, _, gb_s, tflop_s, bound = line.split()
            name = line[:44].strip()
            rows.append((name, int(calls), float(ms), share, float(gb_s), float(tflop_s), bound))
    return rows

def gpu_memory_gb():
    """GB in use on the first GPU; None without nvidia-smi."""
    used = subprocess.run("nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits",
                          shell=True, capture_output=True, text=True).stdout.strip()
    if not used:
        return None
    return float(used.splitlines()[0]) / 1000

def run(command, steps, ranks=1):
    """Runs a trainer for so many steps, on one GPU a rank → (milliseconds of each step, GB in use
    on the first GPU, seconds before the first step, what the first rank printed)."""
    words = [str(word) for word in command]
    environment = dict(os.environ, WORLD_SIZE=str(ranks))
    started = time.time()
    first_step = None
    ms = []
    lines = []
    # the ranks are started here and not by torchrun, which would outlive being killed
    processes = [subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(ranks)]
    try:
        for line in processes[0].stdout:
            lines.append(line.rstrip())
            ms += map(float, STEP.findall(line))
            if ms and first_step is None:
                first_step = time.time() - started - ms[0] / 1000
            if len(ms) == steps:
                break
        memory_gb = gpu_memory_gb()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if len(ms) < steps:
        raise RuntimeError(" / ".join(lines[-6:])[-200:] or "it printed nothing")
    return ms, memory_gb, first_step, lines

def timed(label, name, shape, command, args):
    """Runs a trainer → its row of the table. The row of one that fails says why."""
    shutil.rmtree(WORK / "runs" / name, ignore_errors=True)
    try:
        ms, memory_gb, start_s, lines = run(command, args.warmup + args.repeats, args.ranks)
    except (OSError, RuntimeError) as error:
        return dict(contender=label, missing=f"failed: {error}")
    ms = ms[args.warmup:]
    tok_s = 1000 * shape.step_tokens / statistics.median(ms)
    windows = "SSSL" if shape.modern else "L"
    flops = shape.flops_per_token(windows) * tok_s / args.ranks
    return dict(contender=label, step_tokens=shape.step_tokens, spread=spread(ms),
                ms=statistics.median(ms), all_ms=ms, tok_s=tok_s, mfu=mfu(flops, args.device),
                memory_gb=memory_gb, start_s=start_s, ranks=args.ranks,
                kernels=read_profile(lines))

def measure(name, shape, args, llmc):
    """The rows of both trainers at one shape, each when it is there. All are compared with the first
    of ours."""
    n_tokens = max(2 ** 17, 4 * shape.step_tokens)
    if args.quick:
        n_tokens = 4096
    data = random_shards(WORK / f"random-{shape.V}", shape.V, n_tokens)
    ours = None
    for attention in args.attention or [None]:
        label = f"ours, CUDA, {attention}" if attention else "ours, CUDA"
        row = dict(contender=label,
                   missing=f"not measured: no {args.binary}; run make train_gpt2cu")
        if Path(args.binary).exists():
            command = our_command(name, shape, args.binary, data, attention)
            row = timed(label, name, shape, command, args)
        if ours is None:
            ours = row
        elif "all_ms" in ours and "all_ms" in row:
            row["ours_faster_by"] = ratio(row["all_ms"], ours["all_ms"])
        yield row
    if shape.modern or args.ranks > 1:      # it needs MPI for several ranks
        return
    theirs = dict(contender="llm.c", missing=missing("llm.c"))
    if llmc:
        theirs = timed("llm.c without cuDNN", name, shape, llmc_command(name, shape, llmc, data),
                       args)
    if "all_ms" in ours and "all_ms" in theirs:
        theirs["ours_faster_by"] = ratio(theirs["all_ms"], ours["all_ms"])
    yield theirs

def cells(row):
    """A row of the table of times"""
    if "missing" in row:
        return [row["contender"], row["missing"], *[None] * 6]
    return [row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
            percent(row["mfu"], 1), row["memory_gb"], row["start_s"], row.get("ours_faster_by")]

def show(name, shape, rows):
    """Prints each row when it is there, then the longest of our kernels → the rows."""
    kept = []

    def lines():
        for row in rows:
            kept.append(row)
            yield cells(row)
        for run in PUBLISHED:
            if run.preset == name and run.run.startswith("llm.c"):
                yield [f"llm.c with cuDNN, published: {run.source}", None, None,
                       f"{run.tok_s:,.0f}", *[None] * 4]

    table([f"{name}: {shape.step_tokens:,} tokens a step", "ms", "spread", "tok/s", "MFU",
           "GB in use", "s to start", "ours is faster by"], lines())
    kernels = kept[0].get("kernels")
    if kernels:
        table([f"{name}: our kernels", "calls", "ms a step", "share", "GB/s", "TFLOP/s",
               "of its bound"], kernels[:20])
    return kept

# ---- compute-sanitizer ---------------------------------------------------------------------------

def small(name):
    """A shape for compute-sanitizer: GPT-2 with heads of 64 channels, dN with heads of 128. T is no
    multiple of attention's tile."""
    shape = replace(TRAINED[name], L=2, C=128, NH=2, V=300, T=80, step_tokens=160)
    if shape.modern:
        shape = replace(shape, NH=1)
    return shape

def sanitize(name, shape, args):
    """Runs two steps and an evaluation of a tiny model under each tool of compute-sanitizer →
    {tool: "clean", or what it found}."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    data = random_shards(WORK / f"random-{shape.V}", shape.V, 4096)
    out = WORK / "runs" / "tiny"
    command = [*our_command(name, shape, args.binary, data), "--max_steps", 2, "--out", out]
    found = {}

    def rows():
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            shutil.rmtree(out, ignore_errors=True)
            found[tool] = outcome([sanitizer, "--tool", tool, "--error-exitcode", 9, *command],
                                  args.limit)
            yield tool, found[tool]

    heads = f"{name}, heads of {shape.C // shape.NH}"
    table([f"compute-sanitizer: {heads}", "says"], rows())
    return found

def outcome(command, limit):
    """What a tool of compute-sanitizer says"""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              timeout=limit)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not measured: {str(error)[-80:]}"
    if done.returncode == 0:
        return "clean"
    last = (done.stdout + done.stderr).strip().splitlines()[-1][:120]
    return f"status {done.returncode}: {last}"

def main():
    parser = argparse.ArgumentParser(description="training in CUDA C, beside llm.c")
    parser.add_argument("--shapes", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--binary", default=ROOT / "train_gpt2cu", help="our trainer")
    parser.add_argument("--build", action="store_true", help="only compile both trainers")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer instead")
    parser.add_argument("--limit", type=int, default=60, help="seconds per tool of --sanitize")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs; a step grows with them")
    parser.add_argument("--attention", nargs="+", choices=("wgmma", "mma"),
                        help="measure ours with each of these kinds of attention kernels")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=12,
                        help="steps before them; ours profiles the last three of 12")
    parser.add_argument("--device", default="cuda", help="cuda; cpu: an emulation, without MFU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    args = parser.parse_args()
    if args.build:
        return finish("build", built=build())
    if args.sanitize:
        found = {name: sanitize(name, small(name), args) for name in args.shapes}
        return finish("sanitizer", sanitizer=found)
    if not args.quick and args.binary == ROOT / "train_gpt2cu":
        make("train_gpt2cu")
    llmc = None
    if not args.quick and args.ranks == 1:
        llmc = build_llmc()
    report = {}
    for name in args.shapes:
        shape = TRAINED[name]
        if args.quick:
            shape = replace(shape, L=1, C=64, NH=1, V=300, T=24, step_tokens=48)
        shape = replace(shape, step_tokens=shape.step_tokens * args.ranks)
        report[name] = show(name, shape, measure(name, shape, args, llmc))
    finish("trainers", device=args.device, speed=report)

if __name__ == "__main__":
    main()
