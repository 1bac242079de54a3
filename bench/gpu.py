"""
All benches and tests that need a GPU, in resumable nine-minute runs.

    bash bench/gpu.sh                           # 1 GPU: as many parts as nine minutes hold
    bash bench/gpu.sh                           # again: the parts that are left
    bash bench/gpu.sh --parts quality d24       # run only these parts, even if they are done
    python bench/gpu.py --dry_run               # CPU: every part at tiny size
    python bench/gpu.py --report                # show the tables, and put them into RESULTS.md

in:  checkouts of peers, .peers/{nanoGPT,nanochat,llm.c}; English text for quality, data/proxy
out: data/bench/gpu/PART.json and PART.log of each part; then all tables

Each part is a command with its own time limit. The table says which parts failed or ran out of
time; the next call tries them again, and the other parts do not depend on them.
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
PARTS = {       # name: (seconds at most, command after `python`), in order of importance
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
TINY = {        # flags of a dry run: tiny sizes, and other files where a GPU would be needed
    "trainers": "--shapes gpt2 --binary {out}/train_gpt2cu",
    "device_tests": "--collect-only", "sanitizer": "--binary {out}/train_gpt2cu",
    "pack": "--vocab_size 512 --train_mb 0.1 --shard_tokens 20000 --input {text}",
    "quality": "--max_steps 4 --eval_every 2 --val_tokens 2000",
    "project": ""}

NO_DEVICE = ("trainers", "device_tests", "sanitizer", "pack", "project")    # without --device
NO_QUICK = ("device_tests", "sanitizer", "pack", "project")                 # without --quick

def command(part, args):
    """The words of a part's command."""
    text = PARTS[part][1].replace("data/bench/gpu", args.out)
    if not args.dry_run:
        words = text.split()
        if part not in NO_DEVICE:
            words += ["--device", "cuda"]
        return [sys.executable, *words]
    words = text.replace(PROXY_SHARDS, f"{args.out}/proxy").split()
    words += TINY.get(part, "").format(text=args.text, out=args.out).split()
    if part not in NO_QUICK:
        words += ["--quick", "--device", "cpu"]
        if part != "growth":
            words += ["--repeats", "2"]
    return [sys.executable, *words]

def run(part, limit, args):
    """Runs a part for at most `limit` seconds → its report, and PART.log with what it printed."""
    log = Path(args.out) / f"{part}.log"
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.dry_run:
        environment["OMP_NUM_THREADS"] = "1"        # a second thread slows tiny tensors down
    elif part == "device_tests":
        environment["DEVICE"] = "1"
    started = time.time()
    with open(log, "w") as file, subprocess.Popen(
            command(part, args), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)      # with all that it started
    report = dict(part=part, seconds=round(time.time() - started), command=PARTS[part][1],
                  date=str(datetime.date.today()), commit=commit(), machine=machine())
    return report | outcome(process.returncode, log.read_text(errors="replace"), limit)

def outcome(returncode, output, limit):
    """What a part's output says: its tables and its JSON, or why there are none."""
    lines = output.strip().splitlines() or ["it printed nothing"]
    last = lines[-1]
    if returncode == -signal.SIGKILL:
        return {"failed": f"over {limit:.0f} s: {last[:150]}"}
    if returncode:
        return {"failed": f"status {returncode}: {last[:150]}"}
    if not last.startswith("{"):
        return {"tables": f"`{last[:150]}`"}
    tables = [line for line in lines[:-1] if line.startswith(("|", "!"))]
    return {"tables": "\n".join(tables), **json.loads(last)}

def all_tables(out):
    """The tables of every part that has a report, and a table of these parts."""
    sections = []
    rows = []
    for part in PARTS:
        path = Path(out) / f"{part}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text())
        failed = report.get("failed", "")
        sections.append(f"#### {part}\n\n{report['date']} · commit {report['commit']} · "
                        f"{report['machine']}\n\n`python {report['command']}`\n\n"
                        f"{report.get('tables', '').strip() or failed}\n")
        rows.append(f"| {part} | {report['seconds']} | {failed or 'done'} |")
    return "\n".join([*sections, "| part | seconds | outcome |", "|---|---|---|", *rows])

def run_parts(args):
    """Runs the parts that are chosen, or that are not done yet, until the time is over."""
    deadline = time.time() + args.seconds
    for part in args.parts or PARTS:
        path = Path(args.out) / f"{part}.json"
        if not args.parts and path.exists() and "failed" not in json.loads(path.read_text()):
            continue
        left = deadline - time.time()
        most = PARTS[part][0]
        if left < most / 3:
            print(f"{part}: it may take {most} s, and {left:.0f} s are left; call again to run it",
                  flush=True)
            continue
        print(f"{part} …", flush=True)
        report = run(part, min(left, most), args)
        path.write_text(json.dumps(report))
        print(f"{part}: {report['seconds']} s, {report.get('failed', 'done')}", flush=True)

def build_emulated_trainer(folder):
    """train_gpt2cu for a CPU, if there is a compiler, so that a dry run has something to run."""
    if shutil.which("g++"):
        sys.path.insert(0, str(ROOT / "tests"))
        from cuda_emulator.rewrite import build
        source = (ROOT / "train_gpt2.cu").read_text(encoding="utf-8")
        build(source, folder / "train_gpt2cu", "-O1")

def main():
    parser = argparse.ArgumentParser(description="all benches of a GPU, in parts")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="only these, and again")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts of this call")
    parser.add_argument("--out", default="data/bench/gpu", help="folder of reports and logs")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--text", default="README.md", help="the .jsonl that --dry_run packs")
    parser.add_argument("--report", action="store_true", help="run nothing, show the tables")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.dry_run and args.out == "data/bench/gpu":
        args.out = "data/bench/dry"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        build_emulated_trainer(Path(args.out))
    if not args.report:
        run_parts(args)
    tables = all_tables(args.out)
    print(tables)
    if args.report:
        for picture in Path(args.out).glob("*.svg"):
            shutil.copy(picture, RESULTS.parent)
        RESULTS.write_text(put_section(RESULTS.read_text(encoding="utf-8"), "One GPU", tables),
                           encoding="utf-8")

if __name__ == "__main__":
    main()
