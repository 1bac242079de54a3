"""
Everything a GPU has to say about this project, in parts that go on where they were.

    bash bench/gpu.sh                           # 1 GPU: until done, or nine minutes are over
    bash bench/gpu.sh                           # again: the parts that are left
    bash bench/gpu.sh --parts quality d24       # only these, again
    python bench/gpu.py --dry_run               # CPU: every part at tiny size
    python bench/gpu.py --report                # the tables again, and into bench/RESULTS.md

in:  .peers/{nanoGPT,nanochat,llm.c} where they are; data/proxy, English text, for quality
out: data/bench/gpu/PART.json and PART.log; all tables last

Each part is a command with its own time limit. One that fails or runs out of time says so in the
table, and is tried again by the next call; no other part waits for it.
"""
import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import RESULTS, ROOT, commit, machine, put_section

PROXY_SHARDS = "data/bench/proxy-32768"
PARTS = {       # name: (seconds at most, command after `python`), the most telling first
    "ceilings": (30, "bench/kernels.py ceilings"),
    "trainers": (150, "bench/trainers.py"),
    "device_tests": (150, "-m pytest -q --timeout 100 tests/test_device.py "
                     "tests/test_train_gpt2cu.py"),
    "sanitizer": (90, "bench/trainers.py --sanitize --limit 20"),
    "attention": (40, "bench/kernels.py attention"),
    "gpt2": (150, "bench/train.py --shapes gpt2"),
    "d24": (330, "bench/train.py --shapes d24"),
    "pack": (90, f"bench/pack.py --out {PROXY_SHARDS}"),
    "quality": (400, f"bench/train.py --shapes d12 --quality 1 --data {PROXY_SHARDS} --max_steps "
                     "610 --val_tokens 1048576 --arms ours nanochat"),
    "d12": (200, "bench/train.py --shapes d12"),
    "profile": (150, "bench/kernels.py profile --shapes gpt2 d12"),
    "sample": (100, "bench/sample.py"),
    "gpt2-xl": (180, "bench/train.py --shapes gpt2-xl"),
    "rl": (60, "bench/rl.py"),
    "growth": (240, "bench/growth.py --plot data/bench/gpu/growth-cuda.svg"),
    "project": (20, "bench/project.py --measured data/bench/gpu")}
TINY = {        # in a dry run: what takes the place of sizes, and of what only a GPU can do
    "trainers": "--shapes gpt2 --binary {out}/train_gpt2cu",
    "device_tests": "--collect-only", "sanitizer": "--binary {out}/train_gpt2cu",
    "pack": "--vocab_size 512 --train_mb 0.1 --shard_tokens 20000 --input {text}",
    "quality": "--max_steps 4 --eval_every 2 --val_tokens 2000",
    "project": ""}

def command(part, args):
    words = [sys.executable, *PARTS[part][1].replace("data/bench/gpu", args.out).split()]
    if args.dry_run:
        words = " ".join(words).replace(PROXY_SHARDS, f"{args.out}/proxy").split()
        words += TINY.get(part, "").format(text=args.text, out=args.out).split()
        quick = part not in ("device_tests", "pack", "project", "sanitizer")
        words += ["--quick", "--device", "cpu", *(["--repeats", "2"] if part != "growth" else [])
                  ] if quick else []
    elif part not in ("trainers", "device_tests", "sanitizer", "pack", "project"):
        words += ["--device", "cuda"]
    return words

def run(part, limit, args):
    """→ the part's report: its last line of JSON, or why there is none; its log lies beside it."""
    log = Path(args.out) / f"{part}.log"
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.dry_run:
        environment["OMP_NUM_THREADS"] = "1"        # tiny tensors are not worth a second thread
    if part == "device_tests" and not args.dry_run:
        environment["DEVICE"] = "1"
    started = time.time()
    with open(log, "w") as file, subprocess.Popen(
            command(part, args), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:            # and whatever it started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    report = dict(part=part, seconds=round(time.time() - started), command=PARTS[part][1],
                  date=str(datetime.date.today()), commit=commit(), machine=machine())
    if process.returncode:
        says = next((line for line in reversed(lines) if line.strip()), "")[:150]
        report["failed"] = (f"over {limit:.0f} s" if process.returncode == -signal.SIGKILL else
                            f"status {process.returncode}") + f": {says}"
    elif lines[-1].startswith("{"):
        report["tables"] = "\n".join(line for line in lines[:-1] if line[:1] in "|!")
        report |= json.loads(lines[-1])
    else:
        report["tables"] = f"`{lines[-1][:150]}`"
    return report

def all_tables(out):
    """Each part's tables, and one of all parts."""
    reports = [json.loads(path.read_text()) for part in PARTS
               if (path := Path(out) / f"{part}.json").exists()]
    text = [f"#### {report['part']}\n\n{report['date']} · commit {report['commit']} · "
            f"{report['machine']}\n\n`python {report['command']}`\n\n"
            f"{report.get('tables', '').strip() or report.get('failed', '')}\n" for report in reports]
    rows = [f"| {report['part']} | {report['seconds']} | {report.get('failed', 'done')} |"
            for report in reports]
    return "\n".join([*text, "| part | seconds | outcome |", "|---|---|---|", *rows])

def main():
    parser = argparse.ArgumentParser(description="all benches of a GPU, in parts")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="only these, and again")
    parser.add_argument("--seconds", type=float, default=540, help="all parts of a call together")
    parser.add_argument("--out", default="data/bench/gpu", help="folder of reports and logs")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--text", default="README.md", help="of --dry_run: .jsonl to pack")
    parser.add_argument("--report", action="store_true", help="only show what was measured")
    args = parser.parse_args()
    os.chdir(ROOT)
    args.out = "data/bench/dry" if args.dry_run and args.out == "data/bench/gpu" else args.out
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.dry_run and shutil.which("g++"):
        sys.path.insert(0, str(ROOT / "tests"))
        from cuda_emulator.rewrite import build
        build((ROOT / "train_gpt2.cu").read_text(encoding="utf-8"),
              Path(args.out) / "train_gpt2cu", "-O1")
    deadline = time.time() + args.seconds
    for part in [] if args.report else args.parts or PARTS:
        path = Path(args.out) / f"{part}.json"
        if path.exists() and not args.parts and "failed" not in json.loads(path.read_text()):
            continue
        left = deadline - time.time()
        if left < PARTS[part][0] / 3:
            print(f"{part}: {left:.0f} s are left, it may take {PARTS[part][0]}; the next call "
                  "does it", flush=True)
            continue
        print(f"{part} …", flush=True)
        report = run(part, min(left, PARTS[part][0]), args)
        path.write_text(json.dumps(report))
        print(f"{part}: {report['seconds']} s, {report.get('failed', 'done')}", flush=True)
    tables = all_tables(args.out)
    print(tables)
    if args.report:
        for picture in Path(args.out).glob("*.svg"):
            shutil.copy(picture, RESULTS.parent)
        RESULTS.write_text(put_section(RESULTS.read_text(encoding="utf-8"), "One GPU", tables),
                           encoding="utf-8")

if __name__ == "__main__":
    main()
