"""
All benches and tests that need a GPU, in resumable nine-minute runs. bench/GPU.md is the short way.

    bash bench/gpu.sh --copy_to results         # 1 GPU: as many parts as nine minutes hold
    bash bench/gpu.sh --copy_to results         # again: the parts that are left
    bash bench/gpu.sh --parts quality_ours      # run only these parts, even if they are done
    python bench/gpu.py --dry_run               # CPU: the plan, and every part at tiny size
    python bench/gpu.py --report                # show the tables, and put them into RESULTS.md

in:  checkouts of peers, .peers/{nanoGPT,nanochat,llm.c}; English text for quality, data/proxy
out: data/bench/gpu/PART.json and PART.log of each part; then all tables. --copy_to FOLDER also
     writes all of it to FOLDER/gpu.json and FOLDER/gpu.log after each part, for a rented machine
     of which only a few files come back. A later run takes up from a gpu.json in either folder

Each part is a command with its own time limit. A part begins only if its whole limit is left. One
that is stopped at its limit keeps the rows it has printed, and is not begun again unless --parts
names it. One that fails is tried again by a later call, after the parts that never ran; no part
depends on it.
"""
import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import RESULTS, ROOT, commit, machine, put_section, show

PROXY_SHARDS = "data/bench/proxy-32768"
QUALITY = (f"bench/train.py --shapes d12 --quality 1 --data {PROXY_SHARDS} --max_steps 610 "
           "--val_tokens 1048576 --arms")
PYTEST = "-m pytest -q --tb=line --timeout 100"
# What a CPU cannot know of the CUDA trainer; mistakes and damaged files end alike on a GPU.
ON_GPU = "-k 'gradient or steps or ranks or bits or profile or hellaswag or begins or guess'"
PARTS = {       # name: (seconds at most, command after `python`), in order of importance
    "ceilings": (45, "bench/kernels.py ceilings"),
    "build": (150, "bench/trainers.py --build"),
    "cuda_gpt2": (110, "bench/trainers.py --shapes gpt2"),
    "cuda_d12": (90, "bench/trainers.py --shapes d12"),
    "cuda_d24": (140, "bench/trainers.py --shapes d24"),
    "tests_attention": (150, f"{PYTEST} tests/test_train_gpt2cu_attention.py {ON_GPU}"),
    "cuda_attention": (300, "bench/trainers.py --shapes gpt2 d24 --attention wgmma mma"),
    "tests_cuda": (240, f"{PYTEST} tests/test_train_gpt2cu.py {ON_GPU}"),
    "tests_dn": (200, f"{PYTEST} tests/test_train_gpt2cu_dn.py {ON_GPU}"),
    "tests_python": (200, f"{PYTEST} tests/test_device.py"),
    "tests_fp8": (300, f"{PYTEST} tests/test_train_gpt2cu_fp8.py"),
    "attention": (60, "bench/kernels.py attention"),
    "d24_ours": (160, "bench/train.py --shapes d24 --arms ours"),
    "d24_nanochat": (160, "bench/train.py --shapes d24 --arms nanochat"),
    "d24_windows": (160, "bench/train.py --shapes d24 --arms 'ours, windows'"),
    "d24_fp8": (180, "bench/train.py --shapes d24 --arms 'ours, fp8'"),
    "d24_nanochat_fp8": (180, "bench/train.py --shapes d24 --arms 'nanochat, fp8'"),
    "pack": (90, f"bench/pack.py --out {PROXY_SHARDS}"),
    "quality_ours": (260, f"{QUALITY} ours"),
    "quality_nanochat": (300, f"{QUALITY} nanochat"),
    "profile": (180, "bench/kernels.py profile --shapes gpt2 d24"),
    "sanitizer_gpt2": (260, "bench/trainers.py --sanitize --shapes gpt2"),
    "sanitizer_dn": (260, "bench/trainers.py --sanitize --shapes d12"),
    "gpt2": (240, "bench/train.py --shapes gpt2"),
    "d12": (400, "bench/train.py --shapes d12"),
    "cuda_gpt2-xl": (200, "bench/trainers.py --shapes gpt2-xl"),
    "gpt2-xl": (240, "bench/train.py --shapes gpt2-xl"),
    "sample": (150, "bench/sample.py"),
    "rl": (90, "bench/rl.py"),
    "growth": (300, "bench/growth.py --plot data/bench/gpu/growth-cuda.svg"),
    "project": (30, "bench/project.py --measured data/bench/gpu")}
CUDA_TRAINER = "--warmup 12 --binary {out}/train_gpt2cu"        # --profile is of steps 10 … 12
TINY = {        # flags of a dry run: tiny sizes, and other files where a GPU would be needed
    **dict.fromkeys(("cuda_gpt2", "cuda_d12", "cuda_d24", "cuda_attention", "cuda_gpt2-xl"),
                    CUDA_TRAINER),
    **dict.fromkeys(("sanitizer_gpt2", "sanitizer_dn"), "--binary {out}/train_gpt2cu"),
    **dict.fromkeys(("tests_attention", "tests_cuda", "tests_dn", "tests_python"),
                    "--collect-only"),
    "build": "--help",
    "pack": "--vocab_size 512 --train_mb 0.1 --shard_tokens 20000 --input {text}",
    **dict.fromkeys(("quality_ours", "quality_nanochat"),
                    "--max_steps 4 --eval_every 2 --val_tokens 2000")}

def script_of(part):
    return shlex.split(PARTS[part][1])[0]

def knows_device(part):
    """Whether --device and --quick are flags of the part's script"""
    return script_of(part) not in ("-m", "-c", "bench/pack.py", "bench/project.py",
                                   "bench/trainers.py")

def command(part, args):
    """The words of a part's command. A dry run has the same, then flags that make it tiny."""
    text = PARTS[part][1].replace("data/bench/gpu", args.out)
    if args.dry_run:
        text = text.replace(PROXY_SHARDS, f"{args.out}/proxy")
    words = [sys.executable, *shlex.split(text)]
    if not args.dry_run:
        if knows_device(part):
            words += ["--device", "cuda"]
        return words
    words += TINY.get(part, "").format(text=args.text, out=args.out).split()
    if knows_device(part) or part.startswith("cuda_"):
        words += ["--quick", "--device", "cpu"]
        if part != "growth":
            words += ["--repeats", "2"]
    return words

# ---- A part --------------------------------------------------------------------------------------

def run(part, limit, args):
    """Runs a part for at most `limit` seconds → its report, and PART.log with what it printed."""
    log = Path(args.out) / f"{part}.log"
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.dry_run:
        environment["OMP_NUM_THREADS"] = "1"        # a second thread slows tiny tensors down
    elif part.startswith("tests_"):
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
    """What a part's output says: its tables, even if it was stopped; its JSON, or why it failed."""
    lines = output.strip().splitlines() or ["it printed nothing"]
    last = lines[-1]
    rows = [line for line in lines if line.startswith(("|", "!", "FAILED", "ERROR"))]
    found = {"tables": "\n".join(rows)}
    if returncode == -signal.SIGKILL:
        return {**found, "failed": f"over {limit:.0f} s: {last[:150]}"}
    if returncode:
        return {**found, "failed": f"status {returncode}: {last[:150]}"}
    if not last.startswith("{"):
        return {"tables": "\n".join([*rows, f"`{last[:150]}`"])}
    return {**found, **json.loads(last)}

def is_settled(report):
    """Whether a later call leaves a part alone: it is done, or its whole time was too short."""
    return report.get("failed", "over").startswith("over")

# ---- Results -------------------------------------------------------------------------------------

def read_reports(out):
    """{part: its report} of the parts that have one, in the order of PARTS"""
    paths = {part: Path(out) / f"{part}.json" for part in PARTS}
    return {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}

def copy_results(out, folder):
    """Writes all reports to gpu.json and all logs to gpu.log in a folder, and copies pictures."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reports = read_reports(out)
    (folder / "gpu.json").write_text(json.dumps(reports))
    logs = []
    for part in reports:
        log = Path(out) / f"{part}.log"
        if log.exists():
            logs.append(f"==== {part}\n{log.read_text(errors='replace')}")
    (folder / "gpu.log").write_text("\n".join(logs))
    for picture in Path(out).glob("*.svg"):
        shutil.copy(picture, folder)

def take_up(out, folders):
    """Takes the reports of an earlier machine from gpu.json, for parts that have none here."""
    for folder in folders:
        path = Path(folder) / "gpu.json"
        if not path.exists():
            continue
        for part, report in json.loads(path.read_text()).items():
            kept = Path(out) / f"{part}.json"
            if not kept.exists():
                kept.write_text(json.dumps(report))

def rows_by_shape(reports, key):
    """{(shape, machine): rows of all parts that measured it}; key is "speed" or "quality"."""
    found = {}
    for report in reports.values():
        rows = report.get(key) or {}
        if key == "speed":
            rows = [dict(row, shape=shape) for shape in rows for row in rows[shape]]
        for row in rows:
            found.setdefault((row["shape"], report["machine"]), []).append(row)
    return found

def markdown(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(map(show, row))} |" for row in rows])

def speed_tables(reports):
    """A table a shape of all contenders, which ran in parts of their own, the fastest first."""
    tables = []
    for (shape, where), rows in rows_by_shape(reports, "speed").items():
        rows = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
        if len(rows) < 2:
            continue
        fastest = rows[0]["ms"]
        tables.append(markdown(
            [f"{shape} on {where}", "ms", "tok/s", "GB", "time, the fastest's = 1"],
            [[row["contender"], row["ms"], f"{row['tok_s']:,.0f}", row["memory_gb"],
              row["ms"] / fastest] for row in rows]))
    return tables

def quality_tables(reports):
    """When our curve reaches the last bits per byte of a peer, as a share of the peer's time."""
    from train import time_to_match

    tables = []
    for (shape, where), rows in rows_by_shape(reports, "quality").items():
        curves = {row["contender"]: row["curve"] for row in rows if "curve" in row}
        ours = curves.pop("ours", None)
        if not ours or not curves:
            continue
        cells = []
        for peer, curve in curves.items():
            cells.append([peer, f"{curve[-1][2]:.4f}", f"{ours[-1][2]:.4f}",
                          time_to_match(ours, curve)])
        tables.append(markdown([f"{shape} on {where}", "its bits per byte", "ours",
                                "share of its time after which ours is as good"], cells))
    return tables

def all_tables(out):
    """The tables of every part that has a report, those of several parts together, and a table of
    the parts."""
    sections = []
    rows = []
    reports = read_reports(out)
    for part, report in reports.items():
        failed = report.get("failed", "")
        sections.append(f"#### {part}\n\n{report['date']} · commit {report['commit']} · "
                        f"{report['machine']}\n\n`python {report['command']}`\n\n"
                        f"{report.get('tables', '').strip()}\n{failed}".rstrip() + "\n")
        rows.append([part, report["seconds"], failed or "done"])
    together = [*speed_tables(reports), *quality_tables(reports),
                markdown(["part", "seconds", "outcome"], rows)]
    return "\n".join(sections) + "\n" + "\n\n".join(together)

# ---- Calls ---------------------------------------------------------------------------------------

CALL_SECONDS = 540      # a little less than the ten minutes of a command on many rented machines

def plan(parts, seconds):
    """Which parts a call of so many seconds runs if each takes all of its time → [[part]]."""
    waiting = [part for part in parts if PARTS[part][0] <= seconds]
    calls = []
    while waiting:
        left = seconds
        calls.append([])
        for part in waiting:
            if PARTS[part][0] <= left:
                left -= PARTS[part][0]
                calls[-1].append(part)
        waiting = [part for part in waiting if part not in calls[-1]]
    return calls

def show_plan(args):
    for number, call in enumerate(plan(args.parts or PARTS, args.seconds or CALL_SECONDS), 1):
        print(f"call {number}, at most {sum(PARTS[part][0] for part in call)} s")
        for part in call:
            print(f"  {part}: at most {PARTS[part][0]} s: python {PARTS[part][1]}", flush=True)

def parts_left(out):
    """The parts that never ran, then those that failed, in the order of PARTS"""
    reports = read_reports(out)
    fresh = [part for part in PARTS if part not in reports]
    return fresh + [part for part, report in reports.items() if not is_settled(report)]

def run_parts(args):
    """Runs the parts that are chosen, or that are left, until the time is over."""
    seconds = args.seconds or CALL_SECONDS
    if args.dry_run and not args.seconds:
        seconds = sum(limit for limit, _ in PARTS.values())
    deadline = time.time() + seconds
    for part in args.parts or parts_left(args.out):
        left = deadline - time.time()
        most = PARTS[part][0]
        if left < most:
            remedy = "call again to run it"
            if seconds < most:
                remedy = f"give --seconds {most} to run it"
            print(f"{part}: it may take {most} s, and {left:.0f} s are left; {remedy}", flush=True)
            continue
        print(f"{part} …", flush=True)
        report = run(part, most, args)
        (Path(args.out) / f"{part}.json").write_text(json.dumps(report))
        if args.copy_to:
            copy_results(args.out, args.copy_to)
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
    parser.add_argument("--seconds", type=float,
                        help=f"for all parts of this call (default: {CALL_SECONDS})")
    parser.add_argument("--out", default="data/bench/gpu", help="folder of reports and logs")
    parser.add_argument("--copy_to", help="a folder that also gets all results, in two files")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--text", default="README.md", help="the .jsonl that --dry_run packs")
    parser.add_argument("--report", action="store_true", help="run nothing, show the tables")
    args = parser.parse_args()
    args.copy_to = args.copy_to and Path(args.copy_to).resolve()
    os.chdir(ROOT)
    if args.dry_run and args.out == "data/bench/gpu":
        args.out = "data/bench/dry"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    take_up(args.out, [folder for folder in (args.copy_to, args.out) if folder])
    if args.dry_run:
        show_plan(args)
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
