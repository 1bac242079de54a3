"""
What the benches share: how contenders are timed and compared, tables, and the file of results.

    python bench/measure.py train python bench/train.py     # run a bench and record its tables

    in:  the name of a bench, and its command
    out: what the command prints; its section of bench/RESULTS.md, with date, commit, machine and
         command; its line of JSON in data/bench/train.json

A machine that is busy slows down whatever runs at that moment. Within each repeat, contenders
therefore run one after another, and two contenders are compared within a repeat: the result is the
median over the repeats of the ratio of their times, not the ratio of their median times.
"""
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
RESULTS = ROOT / "bench" / "RESULTS.md"

def find_proxy():
    """The folder with English Wikipedia as .jsonl.xz, or None."""
    for folder in (ROOT / "data" / "proxy", ROOT.parent / "shared" / "data" / "proxy"):
        if folder.is_dir():
            return folder
    return None

PROXY = find_proxy()

# ---- Time ----------------------------------------------------------------------------------------

class Clock:
    """clock.mark() … clock.ms(): the milliseconds between marks. On a GPU, marks are CUDA events in
    the queue of kernels; only ms() waits for them."""

    def __init__(self, device="cpu"):
        self.cuda = "cuda" in str(device)
        self.marks = []

    def mark(self):
        if self.cuda:
            import torch
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self):
        marks = self.marks
        self.marks = []
        if self.cuda:
            marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
        return [1000 * (b - a) for a, b in zip(marks, marks[1:])]

def in_turns(contenders, repeats, warmup=1, device="cpu"):
    """Calls the functions {name: function} in turns → {name: [ms of each repeat]}. The first
    `warmup` rounds do not count."""
    clock = Clock(device)
    ms = {name: [] for name in contenders}
    for _ in range(warmup + repeats):
        for name, function in contenders.items():
            clock.mark()
            function()
            clock.mark()
            ms[name] += clock.ms()
    return {name: values[warmup:] for name, values in ms.items()}

def ratio(theirs, ours):
    """How many times as long theirs takes, from the times of each repeat: the median of the ratios,
    the smallest and the largest, as "1.21 x (1.15 … 1.30)"."""
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} … {ratios[-1]:.2f})"

def spread(values):
    """Half the range between the quartiles, as a share of the median: "±3 %"."""
    if len(values) < 2:
        return "one run"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"±{50 * (high - low) / middle:.0f} %"

def peak_mb():
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

# ---- Flags ---------------------------------------------------------------------------------------

def shape_flags(parser, repeats, timed):
    """The flags of the benches that measure models of several shapes."""
    parser.add_argument("--shapes", nargs="+", help="names of shapes; default: all")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed {timed} of each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")

def chosen_shapes(args, shapes):
    """shapes: {"cpu", "cuda" or "quick": {name: shape}} → which of these keys, {name: shape}."""
    where = args.device
    if args.quick:
        where = "quick"
    known = shapes[where]
    chosen = args.shapes or list(known)
    for name in chosen:
        if name not in known:
            raise SystemExit(f"--shapes {name} is not a shape for this device; choose from "
                             f"{', '.join(known)}")
    return where, {name: known[name] for name in chosen}

# ---- Tables --------------------------------------------------------------------------------------

def show(value):
    """A cell: three digits of a float, all digits of an integer, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"

def table(head, rows):
    """Prints a table in Markdown."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(show, row))} |")
    sys.stdout.flush()

def missing(name):
    """The cell of a peer whose checkout, .peers/NAME, is not there."""
    return f"not measured: no .peers/{name}"

def finish(bench, **report):
    """Prints the last line of a bench: everything that was measured, as JSON."""
    print("\n" + json.dumps({"bench": bench, **report}), flush=True)

# ---- A plot --------------------------------------------------------------------------------------

def plot(path, panels, W=300, H=220):
    """Draws curves side by side → an SVG file. panels: {title: (x label, [(x, y)])}. Both axes are
    in powers of two, so that a power law is a straight line."""
    svg = []
    for i, (title, (label, points)) in enumerate(panels.items()):
        svg += panel(title, label, points, left=i * W, W=W, H=H)
    text = "\n".join(svg)
    Path(path).write_text(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {W * len(panels)} "
                          f"{H}' font-family='sans-serif' font-size='11' fill='#888'>\n{text}\n"
                          "</svg>\n")

def panel(title, label, points, left, W, H):
    """One curve with its axes → elements of an SVG."""
    xs = [math.log2(x) for x, _ in points]
    ys = [math.log2(y) for _, y in points]
    x_range = max(1, max(xs) - min(xs))
    low = math.floor(min(ys))
    high = math.ceil(max(ys))

    def across(x):
        return round(left + 60 + (x - min(xs)) / x_range * (W - 90), 1)

    def down(y):
        return round(30 + (high - y) / max(1, high - low) * (H - 80), 1)

    svg = [f"<text x='{left + 60}' y='18'>{title}</text>"]
    for y in range(low, high + 1, max(1, (high - low) // 5)):
        svg.append(f"<text x='{left + 54}' y='{down(y) + 4}' text-anchor='end'>{show(2 ** y)}"
                   f"</text><path d='M{left + 60} {down(y)}h{W - 90}' stroke='#8884'/>")
    line = " ".join(f"{across(x)},{down(y)}" for x, y in zip(xs, ys))
    svg.append(f"<polyline points='{line}' fill='none' stroke='#0b62c4' stroke-width='2'/>")
    for x, y, point in zip(xs, ys, points):
        svg.append(f"<circle cx='{across(x)}' cy='{down(y)}' r='3' fill='#0b62c4'/><text "
                   f"x='{across(x)}' y='{H - 34}' text-anchor='middle'>{point[0]:g}</text>")
    svg.append(f"<text x='{left + W // 2}' y='{H - 14}' text-anchor='middle'>{label}</text>")
    return svg

# ---- RESULTS.md ----------------------------------------------------------------------------------

def machine():
    """The names of the GPUs, or the CPU's name and how many cores this process may use."""
    gpu = subprocess.run("nvidia-smi --query-gpu=name --format=csv,noheader", shell=True,
                         capture_output=True, text=True)
    if gpu.returncode == 0 and gpu.stdout.strip():
        return ", ".join(gpu.stdout.strip().splitlines())
    cpu = "a CPU"
    model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    if model_name:
        cpu = model_name[1]
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}"

def git(*words):
    done = subprocess.run(["git", "-C", ROOT, *words], text=True, capture_output=True)
    return done.stdout.strip()

def commit():
    """The commit that is measured, with "-dirty" after it if files other than the results have
    changed since."""
    name = git("describe", "--always") or "unknown"
    if git("status", "--porcelain", "-uno", "--", ":!bench/RESULTS.md", ":!bench/*.svg"):
        name += "-dirty"
    return name

def put_section(text, name, body):
    """The text of RESULTS.md with its section `## name` replaced, or added at the end."""
    section = f"## {name}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.M | re.S)
    if old.search(text):
        return old.sub(lambda _: section + "\n", text, count=1).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{section}"

def run_bench(command):
    """Runs a bench and shows what it prints → (its lines but the last, the last: its JSON)."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    *tables, report = "".join(lines).strip().split("\n")
    return "\n".join(tables).strip(), report

def main():
    if len(sys.argv) < 3:
        raise SystemExit("the name of a bench and its command are missing; try "
                         "python bench/measure.py train python bench/train.py")
    name = sys.argv[1]
    command = sys.argv[2:]
    load = os.getloadavg()[0]
    started = time.time()
    tables, report = run_bench(command)
    seconds = time.time() - started
    kept = ROOT / "data" / "bench" / f"{re.sub(r'[^a-z0-9]+', '-', name)}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(report + "\n")
    if "|---|" not in tables:
        tables = f"```\n{tables}\n```"
    shown = " ".join([Path(command[0]).name, *command[1:]])
    body = (f"{datetime.date.today()} · commit {commit()} · {machine()} · load {load:.1f} before · "
            f"{seconds:.0f} s\n\n`{shown}`\n\n{tables}")
    RESULTS.write_text(put_section(RESULTS.read_text(encoding="utf-8"), name, body),
                       encoding="utf-8")

if __name__ == "__main__":
    main()
