"""
Pretraining, beside what people would take instead: how many tokens a second, and what is learnt of
the same tokens.

    python bench/train.py                                       # speed, two minutes on a quiet CPU
    python bench/train.py --quality 3 --data data/wiki          # and val bits per byte of 3 seeds
    python bench/train.py --device cuda --shapes d24            # 1 GPU
    python bench/train.py --device cuda --shapes d12 --quality 1 --data data/bench/proxy-32768 \
        --max_steps 610

in:  .peers/nanoGPT and .peers/nanochat, checkouts of karpathy's repositories; a peer that is not
     there is reported as not measured. --quality reads token shards and their tokenizer
out: a table, and the same as one line of JSON

All run in this process on the same rows; see contenders.py for what each brings. On a CPU steps
take turns, so that a busy machine slows all alike. On a GPU, which nobody shares, one contender
after the other has all the memory; a step is what one GPU of eight would do of the recipe's batch,
but for the optimizer, which eight would share. MFU is of the bf16 peak of the data sheet.
"""
import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bpe import Tokenizer
from contenders import PEERS, Shape, arms
from measure import (Clock, chosen_shapes, finish, missing, ratio, shape_flags, spread,
                     table)
from train_gpt2 import Loader, Shards, evaluate, peak_flops
from training import Ranks

SHAPES = {      # where: {name: modern, L, C, NH, V, T, tokens of a step}
    "cpu": {"gpt2-2k": Shape(False, 4, 128, 4, 2048, 256, 4096),
            "gpt2-50k": Shape(False, 4, 256, 4, 50257, 256, 4096),
            "d4-2k": Shape(True, 4, 128, 4, 2048, 256, 4096)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 1024, 2 ** 16),
             "gpt2-xl": Shape(False, 48, 1600, 25, 50257, 1024, 2 ** 17),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 2 ** 16),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 2 ** 17)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 512, 32, 128),
              "gpt2-xl": Shape(False, 3, 64, 2, 512, 32, 128),
              "d12": Shape(True, 2, 64, 2, 512, 32, 128),
              "d24": Shape(True, 3, 64, 2, 512, 32, 128)}}

# ---- Speed ---------------------------------------------------------------------------------------

def micro_batch(arm, shape, device):
    """Rows at a time: what the contender chooses, else all on a CPU, and nanochat's 32 or, above
    d12, 16 on a GPU; always a divisor of the step's rows."""
    rows = shape.step_tokens // shape.T
    most = arm.rows or (rows if "cuda" not in str(device) else 32 if shape.C <= 768 else 16)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, most))

def train_step(arm, step, x, y, rows, clock=None):
    """clock gets three marks: begin, gradients done, optimizer done."""
    mark = clock.mark if clock else lambda: None
    mark()
    for a, b in zip(x.split(rows), y.split(rows)):
        arm.gradients(a, b, len(a) / len(x))
    mark()
    arm.update(step)
    mark()

class Timed:
    """A contender at work on one batch of random tokens: ms and the optimizer's ms of each step."""

    def __init__(self, make, shape, device, warmup):
        cuda = "cuda" in str(device)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.arm, self.device, self.ms, self.optimizer_ms = make(), device, [], []
        self.batch = torch.randint(0, shape.V, (2, shape.step_tokens // shape.T, shape.T),
                                   device=device)
        self.rows, self.steps = micro_batch(self.arm, shape, device), 0
        for _ in range(warmup):
            self.step()
        self.ms, self.optimizer_ms = [], []

    def step(self):
        clock = Clock(self.device)
        train_step(self.arm, self.steps, *self.batch, self.rows, clock)
        gradients, optimizer = clock.ms()
        self.ms.append(gradients + optimizer)
        self.optimizer_ms.append(optimizer)
        self.steps += 1

    def row(self, shape, label):
        """What is kept of it, once it is done; its model may go."""
        median, cuda = statistics.median(self.ms), "cuda" in str(self.device)
        tok_s = 1000 * shape.step_tokens / median
        windows = self.arm.model.config.windows if "ours" in label else "L"
        peak = peak_flops(str(self.device))
        return dict(
            contender=label, step_tokens=shape.step_tokens, ms=median, spread=spread(self.ms), tok_s=tok_s, all_ms=self.ms,
            mfu=peak and shape.flops_per_token(windows) * tok_s / peak, rows=self.rows,
            optimizer_share=statistics.median(self.optimizer_ms) / median,
            memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None)

def alone(make, shape, label, repeats, device, warmup):
    """A contender with all of a GPU's memory → its row. One that fails says why: the others go on."""
    try:
        timed = Timed(make, shape, device, warmup)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(repeats):
            timed.step()
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        return dict(timed.row(shape, label), recompiled=again)
    except Exception as error:
        return dict(contender=label, missing=f"failed: {str(error).strip().splitlines()[0][:90]}")
    finally:
        timed = None
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()

def speed(shape, contenders, repeats, device):
    """→ rows, ours first; those of missing peers say so."""
    warmup = 5 if "cuda" in str(device) else 2      # compiling; the allocator's first blocks
    steps, rows = warmup + repeats, {}
    built = {}
    for label, make in contenders.items():
        if make is None:
            rows[label] = dict(contender=label, missing=missing(label.split(",")[0]))
        elif "cuda" in str(device):
            rows[label] = alone(make, shape, label, repeats, device, warmup)
        else:
            built[label] = Timed(make, shape, device, warmup)
        print(f"\r{label}: {steps} steps", end="", file=sys.stderr)
    for _ in range(repeats if built else 0):
        for timed in built.values():
            timed.step()
    rows |= {label: timed.row(shape, label) for label, timed in built.items()}
    ours = rows.get("ours", {}).get("all_ms")
    for row in rows.values():
        row["ours_faster_by"] = ratio(row["all_ms"], ours) if ours and "all_ms" in row else None
    return [rows[label] for label in contenders]

def show_speed(name, shape, rows):
    table([f"{name}: {shape.L} layers, {shape.C} channels, T {shape.T}, "
           f"{shape.step_tokens:,} tokens a step", "ms", "spread", "tok/s", "MFU", "peak GB",
           "optimizer", "recompiled", "ours is faster by"],
          [[row["contender"], row["missing"], *[None] * 7] if "missing" in row else
           [row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
            row["mfu"] and f"{row['mfu']:.1%}", row["memory_gb"], f"{row['optimizer_share']:.0%}",
            row.get("recompiled"), row["ours_faster_by"]] for row in rows])

# ---- Quality -------------------------------------------------------------------------------------

class Scored:
    """What train_gpt2.evaluate() asks of a model."""

    def __init__(self, arm):
        self.arm = arm
        self.eval, self.train = arm.model.eval, arm.model.train

    def __call__(self, x, y, reduction):
        return self.arm.losses(x, y)

def learn(data, shape, make, seed, args):
    """Trains on the rows of a folder of shards → (val bits per byte of text at the end, the curve
    [(step, seconds of training, bpb)], tokens a second after the first 10 steps)."""
    torch.manual_seed(seed)
    arm = make()
    loader, device = Loader(Shards(data, "train"), shape.T, seed), args.device
    n_rows, rows = shape.step_tokens // shape.T, micro_batch(arm, shape, device)
    n_bytes = torch.from_numpy(Tokenizer.load(Path(data) / "tokenizer").token_bytes()).long()
    ranks, clock, seconds, curve, settled = Ranks(device=device), Clock(device), 0.0, [], 0.0
    for step in range(args.max_steps):
        clock.mark()
        train_step(arm, step, *loader.batch(step * n_rows, n_rows, device), rows)
        clock.mark()
        seconds += clock.ms()[0] / 1000
        settled = seconds if step == min(9, args.max_steps - 2) else settled
        last = step + 1 == args.max_steps
        if last or (step + 1) % args.eval_every == 0:
            bpb = evaluate(Scored(arm), Shards(data, "val"), n_bytes.to(device), shape.T,
                           min(n_rows, 32), ranks, args.val_tokens)[1]
            curve.append((step + 1, round(seconds, 2), bpb))
        if step % 10 == 9:
            print(f"\rseed {seed}: step {step + 1}/{args.max_steps}", end="", file=sys.stderr)
    after = args.max_steps - min(10, args.max_steps - 1)
    return curve[-1][2], curve, after * shape.step_tokens / (seconds - settled)

def time_to_match(ours, theirs):
    """When our curve [(step, seconds, bpb)] comes down to their last bpb, as a share of their time;
    None if it does not."""
    (_, total, goal), before = theirs[-1], None
    for _, seconds, bpb in ours:
        if bpb <= goal:
            if before:      # on the line between two evaluations
                seconds -= (seconds - before[0]) * (goal - bpb) / (before[1] - bpb)
            return seconds / total
        before = seconds, bpb
    return None

def quality(name, shape, args):
    """Each contender, seed after seed, on the same rows → rows of the table."""
    data, rows = args.data, []
    shape = replace(shape, V=Tokenizer.load(Path(data) / "tokenizer").n_vocab)
    for label, make in arms(shape, args.max_steps, args.device).items():
        if args.arms and label not in args.arms:
            continue
        if make is None:
            rows.append(dict(shape=name, contender=label, missing=missing(label.split(",")[0])))
            continue
        runs = [learn(data, shape, make, seed, args) for seed in range(1, args.quality + 1)]
        rows.append(dict(shape=name, contender=label, val_bpb=[bpb for bpb, _, _ in runs],
                         mean=statistics.mean(bpb for bpb, _, _ in runs), curve=runs[0][1],
                         tok_s=statistics.median(tok_s for _, _, tok_s in runs)))
        if "cuda" in args.device:
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    curves = {row["contender"].split(",")[0]: row["curve"] for row in rows if "curve" in row}
    for row in rows:
        if "curve" in row and "ours" not in row["contender"] and "ours" in curves:
            row["matched_in"] = time_to_match(curves["ours"], row["curve"])
    return rows

def show_quality(rows, args):
    table([f"{args.max_steps} steps", "val bits per byte, a seed each", "mean", "tok/s",
           "ours is as good after", "seconds: bits per byte"],
          [[f"{row['contender']} ({row['shape']})", row["missing"], *[None] * 4]
           if "missing" in row else
           [f"{row['contender']} ({row['shape']})",
            ", ".join(f"{bpb:.4f}" for bpb in row["val_bpb"]), f"{row['mean']:.4f}",
            f"{row['tok_s']:,.0f}",
            f"{row['matched_in']:.0%} of its time" if row.get("matched_in") else None,
            ", ".join(f"{s:.0f}: {bpb:.4f}" for _, s, bpb in row["curve"])] for row in rows])

def parse_args():
    parser = argparse.ArgumentParser(description="training speed and quality, beside peers")
    shape_flags(parser, repeats=12, timed="steps")
    parser.add_argument("--arms", nargs="+", help="which contenders; default: all")
    parser.add_argument("--quality", type=int, default=0, help="seeds to train; 0: speed only")
    parser.add_argument("--data", help="folder of shards, for --quality")
    parser.add_argument("--max_steps", type=int, default=150, help="steps of --quality")
    parser.add_argument("--eval_every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--val_tokens", type=int, default=2 ** 18, help="tokens of an evaluation")
    args = parser.parse_args()
    if args.quality and not args.shapes:        # 50,257 tokens are not the data's
        args.shapes = [name for name in SHAPES["quick" if args.quick else args.device]
                       if name != "gpt2-50k"]
    shapes = chosen_shapes(args, SHAPES)[1]
    if args.quality and not args.data:
        raise SystemExit("--quality has no --data; it trains on token shards and their tokenizer; "
                         "make some with python bench/pack.py, or try --data data/wiki")
    return args, shapes

def main():
    args, shapes = parse_args()
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")
    report, learnt = {}, []
    for name, shape in shapes.items():
        if args.quality:
            learnt += quality(name, shape, args)
            continue
        contenders = {label: make for label, make in
                      arms(shape, args.repeats + 5, args.device).items()
                      if not args.arms or label in args.arms}
        report[name] = speed(shape, contenders, args.repeats, args.device)
        print("\r", end="", file=sys.stderr)
        show_speed(name, shape, report[name])
    if args.quality:
        show_quality(learnt, args)
    finish("train", device=args.device, speed=report, quality=learnt)

if __name__ == "__main__":
    main()
