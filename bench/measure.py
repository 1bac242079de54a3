"""
What the benches share: contenders take turns, and the median and the spread of their times become
one table and one line of JSON.

    python bench/measure.py train python bench/train.py     # and put the tables into RESULTS.md

    in:  a bench's name and its command
    out: what the command prints; its section of bench/RESULTS.md, with date, commit, machine and
         command; its line of JSON in data/bench/train.json

A busy machine slows whoever runs at the moment. Therefore contenders run one after the other within
each repeat, and what counts is the median of the ratios of one repeat, not a ratio of two medians.
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
PEERS, RESULTS = ROOT / ".peers", ROOT / "bench" / "RESULTS.md"
PROXY = next((folder for folder in (ROOT / "data" / "proxy",
                                    ROOT.parent / "shared" / "data" / "proxy") if folder.is_dir()),
             None)      # English Wikipedia, .jsonl.xz

# ---- Time ----------------------------------------------------------------------------------------

class Clock:
    """clock.mark() … clock.ms(): milliseconds between marks. On a GPU marks are CUDA events, which
    lie between kernels and make nobody wait; only ms() does."""

    def __init__(self, device="cpu"):
        self.cuda, self.marks = "cuda" in str(device), []

    def mark(self):
        if self.cuda:
            import torch
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self):
        marks, self.marks = self.marks, []
        if self.cuda:
            marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
        return [1000 * (b - a) for a, b in zip(marks, marks[1:])]

def in_turns(contenders, repeats, warmup=1, device="cpu"):
    """Calls {name: function} in turns → {name: [ms]}; the first `warmup` rounds are left out."""
    clock, ms = Clock(device), {name: [] for name in contenders}
    for repeat in range(warmup + repeats):
        for name, function in contenders.items():
            clock.mark()
            function()
            clock.mark()
            ms[name] += clock.ms()
    return {name: values[warmup:] for name, values in ms.items()}

def ratio(theirs, ours):
    """Medians and extremes of the ratios of one repeat: "1.21 x (1.15 … 1.30)"."""
    pairs = sorted(b / a for a, b in zip(ours, theirs))
    return f"{statistics.median(pairs):.2f} x ({pairs[0]:.2f} … {pairs[-1]:.2f})"

def spread(values):
    """The range of the middle half, as a share of the median: "±3 %"."""
    if len(values) < 2:
        return "one run"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"±{50 * (high - low) / middle:.0f} %"

def peak_mb():
    """The most memory this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

# ---- Flags ---------------------------------------------------------------------------------------

def shape_flags(parser, repeats, timed):
    """Of the benches that measure models of several shapes."""
    parser.add_argument("--shapes", nargs="+", help="which of the shapes; default: all")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed {timed} of each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")

def chosen_shapes(args, shapes):
    """shapes: {"cpu", "cuda" or "quick": {name: shape}} → which of these keys, {name: shape}."""
    where = "quick" if args.quick else args.device
    known = shapes[where]
    unknown = [name for name in args.shapes or () if name not in known]
    if unknown:
        raise SystemExit(f"--shapes {unknown[0]}: no such shape; on this device they are "
                         f"{', '.join(known)}; try --shapes {next(iter(known))}")
    return where, {name: known[name] for name in args.shapes or known}

# ---- Tables --------------------------------------------------------------------------------------

def show(value):
    """Three digits of a number, all of an integer; thousands are grouped."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if value == 0 or not math.isfinite(value):
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
    """Why a contender is not measured: .peers/NAME holds a checkout of a peer."""
    return f"not measured: no .peers/{name}"

def finish(bench, **report):
    """The last line: all that was measured, for programs."""
    print("\n" + json.dumps({"bench": bench, **report}), flush=True)

# ---- A plot --------------------------------------------------------------------------------------

def plot(path, panels, W=300, H=220):
    """panels: {title: (x label, [(x, y)])} → an SVG of curves, side by side, both axes in powers
    of two, in which a law of growth is a straight line."""
    svg = []
    for i, (title, (label, points)) in enumerate(panels.items()):
        xs, ys = ([math.log2(point[k]) for point in points] for k in (0, 1))
        x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), math.floor(min(ys)), math.ceil(max(ys))
        X = lambda x: round(i * W + 60 + (x - x0) / (x1 - x0) * (W - 90), 1)
        Y = lambda y: round(30 + (y1 - y) / max(1, y1 - y0) * (H - 80), 1)
        svg.append(f"<text x='{i * W + 60}' y='18'>{title}</text>")
        for y in range(y0, y1 + 1, max(1, (y1 - y0) // 5)):
            svg.append(f"<text x='{i * W + 54}' y='{Y(y) + 4}' text-anchor='end'>{show(2 ** y)}"
                       f"</text><path d='M{i * W + 60} {Y(y)}h{W - 90}' stroke='#8884'/>")
        line = " ".join(f"{X(x)},{Y(y)}" for x, y in zip(xs, ys))
        svg.append(f"<polyline points='{line}' fill='none' stroke='#0b62c4' stroke-width='2'/>")
        svg += [f"<circle cx='{X(x)}' cy='{Y(y)}' r='3' fill='#0b62c4'/><text x='{X(x)}' "
                f"y='{H - 34}' text-anchor='middle'>{point[0]:g}</text>"
                for x, y, point in zip(xs, ys, points)]
        svg.append(f"<text x='{i * W + W // 2}' y='{H - 14}' text-anchor='middle'>{label}</text>")
    Path(path).write_text(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {W * len(panels)} "
                          f"{H}' font-family='sans-serif' font-size='11' fill='#888'>\n"
                          + "\n".join(svg) + "\n</svg>\n")

# ---- RESULTS.md ----------------------------------------------------------------------------------

def machine():
    """The GPU's name, or the CPU's and how many cores this process may use."""
    gpu = subprocess.run("nvidia-smi --query-gpu=name --format=csv,noheader", shell=True,
                         capture_output=True, text=True)
    if gpu.returncode == 0 and gpu.stdout.strip():
        return ", ".join(gpu.stdout.strip().splitlines())
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else 'a CPU'}"

def commit():
    """The commit that is measured; a `-dirty` behind it says that files were changed since, other
    than the results."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], text=True,
                                        capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", ":!bench/RESULTS.md", ":!bench/*.svg")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")

def put_section(text, name, body):
    """RESULTS.md with the section `## name` replaced, or added at the end."""
    section = f"## {name}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.M | re.S)
    if old.search(text):
        return old.sub(lambda _: section + "\n", text, count=1).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{section}"

def main():
    if len(sys.argv) < 3:
        raise SystemExit("a bench's name and command are missing; both are recorded; try "
                         "python bench/measure.py train python bench/train.py")
    name, command = sys.argv[1], sys.argv[2:]
    load, started, lines = os.getloadavg()[0], time.time(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    *text, last = "".join(lines).strip().split("\n")
    kept = ROOT / "data" / "bench" / f"{re.sub(r'[^a-z0-9]+', '-', name)}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(last + "\n")
    shown = " ".join([Path(command[0]).name, *command[1:]])
    text = "\n".join(text).strip()
    text = text if "|---|" in text else f"```\n{text}\n```"
    body = (f"{datetime.date.today()} · commit {commit()} · {machine()} · load {load:.1f} before · "
            f"{time.time() - started:.0f} s\n\n`{shown}`\n\n{text}")
    RESULTS.write_text(put_section(RESULTS.read_text(encoding="utf-8"), name, body),
                       encoding="utf-8")

if __name__ == "__main__":
    main()
