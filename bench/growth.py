"""
What training costs as it grows: tokens a second and memory against depth, text length and batch.

    python bench/growth.py                          # CPU: d1 … d8
    python bench/growth.py --device cuda            # 1 GPU: d4 … d26

out: three tables, a plot (SVG), and the same as one line of JSON

Each point runs in a process of its own, so that its memory can be measured. The time of a token
should grow as its FLOP do. The last column, with depth, is d log(time of a token) / d log(FLOP of a
token) since the point before; above 1 the machine is used less well than there.
"""
import argparse
import functools
import math
import multiprocessing
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from contenders import Ours, Shape, best_windows
from measure import finish, peak_mb, plot, table
from model import GPTConfig
from train import Timed, peak_flops

def dn(depth, T, rows, V):
    config = GPTConfig.preset(f"d{depth}")
    return Shape(True, depth, config.n_embd, config.n_head, V, T, rows * T)

SERIES = {  # {where: {what grows: [(its value, shape)]}}
    "cpu": {"depth": [(d, dn(d, 256, 8, 2048)) for d in (1, 2, 4, 6, 8)],
            "T": [(T, dn(2, T, 4096 // T, 2048)) for T in (128, 256, 512, 1024, 2048, 4096)],
            "rows": [(rows, dn(2, 256, rows, 2048)) for rows in (1, 2, 4, 8, 16, 32)]},
    "cuda": {"depth": [(d, dn(d, 2048, 8, 32768)) for d in (4, 8, 12, 16, 20, 24, 26)],
             "T": [(T, dn(12, T, 2 ** 16 // T, 32768)) for T in (512, 1024, 2048, 4096, 8192)],
             "rows": [(rows, dn(12, 2048, rows, 32768)) for rows in (1, 4, 16, 32)]},
    "quick": {"depth": [(d, Shape(True, d, 32, 2, 256, 16, 32)) for d in (1, 2)],
              "T": [(16, Shape(True, 1, 32, 2, 256, 16, 32))],
              "rows": [(2, Shape(True, 1, 32, 2, 256, 16, 32))]}}

def measure_point(shape, device, repeats):
    """The row of one point; it runs in a process of its own."""
    warmup = 1
    if "cuda" in device:
        warmup = 5
        torch.set_float32_matmul_precision("high")
    windows = best_windows(shape, device)
    timed = Timed(functools.partial(Ours, shape, 100, device, windows), shape, device, warmup)
    for _ in range(repeats):
        timed.step()
    row = timed.row(shape, "ours")
    peak = peak_flops(device)
    flops = shape.flops_per_token(windows)
    return dict(ms=row["ms"], tok_s=row["tok_s"], flops_per_token=flops, rows=row["rows"],
                mfu=peak and flops * row["tok_s"] / peak,
                memory_gb=row["memory_gb"] or peak_mb() / 1000)

def exponent(before, now):
    """How the time of a token grew with its FLOP between two points: 1 is in proportion."""
    return (math.log(before["tok_s"] / now["tok_s"])
            / math.log(now["flops_per_token"] / before["flops_per_token"]))

def measure_series(name, points, args, pool):
    """The rows of the points that could be measured."""
    rows = []
    for value, shape in points:
        print(f"\r{name} {value}", end="", file=sys.stderr, flush=True)
        try:
            row = pool.apply(measure_point, (shape, args.device, args.repeats))
        except Exception as error:      # running out of memory at one point is a result too
            print(f"{name} {value}: {str(error).splitlines()[0][:90]}", file=sys.stderr)
            continue
        row |= dict(value=value, exponent=None)
        if name == "depth" and rows:
            row["exponent"] = exponent(rows[-1], row)
        rows.append(row)
    return rows

def main():
    parser = argparse.ArgumentParser(description="the cost of training as it grows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a point")
    parser.add_argument("--plot", type=Path, help="SVG; default: bench/growth-DEVICE.svg")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    args = parser.parse_args()
    series = SERIES["quick" if args.quick else args.device]
    report, panels = {}, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, points in series.items():
            rows = report[name] = measure_series(name, points, args, pool)
            table([name, "FLOP a token", "tok/s", "MFU", "GB", "exponent"],
                  [[row["value"], f"{row['flops_per_token']:.3g}", f"{row['tok_s']:,.0f}",
                    row["mfu"] and f"{row['mfu']:.1%}", row["memory_gb"], row["exponent"]]
                   for row in rows])
            panels[f"tok/s against {name}"] = name, [(row["value"], row["tok_s"]) for row in rows]
            panels[f"GB against {name}"] = name, [(row["value"], row["memory_gb"]) for row in rows]
    drawn = args.plot or ROOT / "bench" / f"growth-{args.device}.svg"
    plot(drawn, panels)
    print(f"\n![what training costs as it grows]({drawn.name})")
    finish("growth", device=args.device, growth=report)

if __name__ == "__main__":
    main()
