"""
From the measured speed of one GPU to hours and dollars on 8×H100.

    python bench/project.py                                     # published runs: a check on itself
    python bench/project.py --measured data/bench/gpu           # and what bench/gpu.sh measured

in:  d24.json, gpt2.json, gpt2-xl.json, trainers.json, profile.json, as bench/gpu.sh leaves them
out: tables, and the same as one line of JSON

A step of a run on 8 GPUs is the sum of three parts, each with its assumption:
    passes       ms per token on one GPU, without the optimizer, times an eighth of the batch. On an
                 H100 the share of them that waits for memory takes 4.8/3.35 times as long as on an
                 H200; without a profile that share is --memory_bound
    optimizer    an eighth of one GPU's, because states are sharded; all of it waits for memory
    network      gradients to their owner and parameters back, 4 bytes each, at --network GB/s; no
                 part of it is hidden behind the passes
For published runs the speed on 8×H100 is known. The hours computed from it, for the tokens and FLOP
that train_gpt2.py would take, must be within 10 % of the published hours. Hours are of training
alone, as theirs are: without evaluation and compiling. The table also has the speed at which the
same tokens would take one hour of the node, which is our goal for d24.
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from measure import finish, table
from model import GPT, GPTConfig
from train_gpt2 import plan_batch

H100_FLOPS = 989e12             # dense bf16, from the data sheets, as are the memories' speeds
H200_TB_S = 4.8
H100_TB_S = 3.35
DENSE_KERNELS = ("gemm", "nvjet", "cutlass", "flash", "fmha", "attention", "xmma")

def plan(name, **overrides):
    """What train_gpt2.py would do with --model NAME: steps, tokens a step, and the model's size."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name, **overrides))
    args = SimpleNamespace(max_steps=None, total_batch_size=None, batch_size=1, seq_len=None)
    plan_batch(model, args, world_size=8, most_rows=1)
    return SimpleNamespace(steps=args.max_steps, batch=args.total_batch_size,
                           params=model.num_params(), flops=model.flops_per_token(),
                           tokens=args.max_steps * args.total_batch_size)

PUBLISHED = (   # on 8×H100: run, preset, tok/s a GPU, hours, source
    ("llm.c 124M", "gpt2", 2 ** 19 / 8 / 0.140, 45 / 60,
     "140 ms a step: modded-nanogpt, records/track_1_short/2024-10-13_llmc"),
    ("llm.c 1558M", "gpt2-xl", 2 ** 20 / 8 / 2.80, 24.0,
     "2.80 s a step: llm.c, scripts/run_gpt2_1558M.sh and discussion 677"),
    ("nanochat d24, run 6, fp8", "d24", 122_900, 1.65, "nanochat, dev/LEADERBOARD.md and its log"))

def node_step_ms(row, run, args):
    """ms of a step of `run` on 8×H100, from a row of bench/train.py or bench/trainers.py."""
    share = row.get("optimizer_share") or 0.0
    per_token = row["ms"] * (1 - share) / row["step_tokens"]
    slower = 1.0
    if args.on == "H200":
        slower = H200_TB_S / H100_TB_S
    passes = per_token * run.batch / 8 * (1 + args.memory_bound * (slower - 1))
    optimizer = row["ms"] * share / 8 * slower
    network = 2 * 4 * run.params * 7 / 8 / args.network / 1e9 * 1000
    return passes + optimizer + network

def read_part(folder, part):
    """What bench/gpu.sh measured in one of its parts, {} if it did not."""
    path = Path(folder) / f"{part}.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text())

def measured_rows(folder):
    """(run, row) of each contender that bench/gpu.sh measured at the shape of a known run."""
    for part in ("gpt2", "d24", "gpt2-xl", "trainers"):
        for name, rows in read_part(folder, part).get("speed", {}).items():
            for row in rows:
                if "ms" in row:
                    yield name, row

def memory_bound_share(folder):
    """The share of a step's busy time in kernels that are neither matmul nor attention, or None."""
    shapes = read_part(folder, "profile").get("profile", {})
    if not shapes:
        return None
    shape = shapes.get("d24") or list(shapes.values())[-1]
    dense = 0.0
    for kernel, _, ms in shape["kernels"]:
        if any(word in kernel.lower() for word in DENSE_KERNELS):
            dense += ms
    return 1 - dense / shape["busy_ms"]

def published(node_usd):
    """A row for each published run: the hours we compute beside its own."""
    rows = []
    for name, preset, tok_s, hours, source in PUBLISHED:
        run = plan(preset)
        hour_tok_s = run.tokens / 8 / 3600
        rows.append(dict(
            run=name, tokens=run.tokens, tok_s=tok_s, mfu=run.flops * tok_s / H100_FLOPS,
            computed=run.tokens / (8 * tok_s) / 3600, hours=hours, source=source,
            usd=hours * node_usd, hour_tok_s=hour_tok_s,
            hour_mfu=run.flops * hour_tok_s / H100_FLOPS))
    table(["published run on 8×H100", "tokens", "tok/s a GPU", "MFU", "hours", "published",
           "off by", "$", "tok/s for one hour", "MFU", "from"],
          [[row["run"], f"{row['tokens']:.3g}", round(row["tok_s"]), f"{row['mfu']:.1%}",
            row["computed"], row["hours"], f"{row['computed'] / row['hours'] - 1:+.1%}",
            row["usd"], round(row["hour_tok_s"]), f"{row['hour_mfu']:.0%}", row["source"]]
           for row in rows])
    return rows

def measured(node_usd, args):
    """A row for each contender that was measured on one GPU: its run on 8×H100."""
    rows = []
    for name, row in measured_rows(args.measured):
        run = plan(name)
        ms = node_step_ms(row, run, args)
        hours = run.steps * ms / 3.6e6
        rows.append(dict(
            run=name, contender=row["contender"], tokens=run.tokens, step_ms=ms, hours=hours,
            usd=hours * node_usd, mfu=run.flops * run.batch / (8 * H100_FLOPS * ms / 1000)))
    if rows:
        print(f"\nOn 8×H100 at ${node_usd:.0f} an hour; {args.memory_bound:.0%} of the passes wait "
              f"for memory; the network moves {args.network:.0f} GB/s, and nothing hides it.")
        table(["run", "who", "tokens", "ms a step", "MFU", "hours", "$"],
              [[row["run"], row["contender"], f"{row['tokens']:.3g}", row["step_ms"],
                f"{row['mfu']:.0%}", row["hours"], row["usd"]] for row in rows])
    return rows

def main():
    parser = argparse.ArgumentParser(description="hours and dollars on 8×H100")
    parser.add_argument("--measured", help="folder of bench/gpu.sh's reports")
    parser.add_argument("--on", default="H200", choices=("H100", "H200"),
                        help="the GPU it was measured on")
    parser.add_argument("--gpu_hour_usd", type=float, default=3.0, help="price of one GPU hour")
    parser.add_argument("--memory_bound", type=float, help="share of the passes that waits for "
                        "memory (default: the profile's, or 0.2)")
    parser.add_argument("--network", type=float, default=300, help="GB/s of NVLink that arrive")
    args = parser.parse_args()
    node_usd = 8 * args.gpu_hour_usd
    report = dict(published=published(node_usd), measured=[])
    if args.measured:
        args.memory_bound = args.memory_bound or memory_bound_share(args.measured) or 0.2
        report["measured"] = measured(node_usd, args)
    finish("project", **report)

if __name__ == "__main__":
    main()
