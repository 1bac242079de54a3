"""
From the measured speed of one GPU to hours and dollars on 8×H100.

    python bench/project.py                                     # published runs: a check on itself
    python bench/project.py --measured data/bench/gpu           # and what bench/gpu.sh measured

in:  d24.json, gpt2.json, trainers.json, profile.json, as bench/gpu.sh leaves them
out: a table, and the same as one line of JSON

A step of a run on 8 GPUs is computed from parts, each with its assumption:
    passes       ms a token on one GPU, less the optimizer, times an eighth of the batch
    slower HBM   the share of the passes that waits for memory takes 4.8/3.35 of the time an H200
                 needs on an H100; without a profile that share is taken as --memory_bound
    optimizer    an eighth of one GPU's: states are sharded; all of it waits for memory
    network      gradients to their owner and parameters back, 4 bytes each, at --network GB/s,
                 nothing of it hidden behind the passes
Published runs give their rate on 8×H100; their hours must come out of it within 10 %, with the
tokens that train_gpt2.py would train on and its count of FLOP. Hours are of training alone, as
theirs are: without evaluation and compiling. Beside them stands the speed at which the same tokens
would take one hour of the node: our goal for d24.
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

H100_FLOPS, H200_TB_S, H100_TB_S = 989e12, 4.8, 3.35     # data sheets; bf16, dense

def plan(name, **overrides):
    """What train_gpt2.py would do with --model NAME: steps, tokens a step, and the model's size."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name, **overrides))
    args = SimpleNamespace(max_steps=None, total_batch_size=None, batch_size=1, seq_len=None)
    plan_batch(model, args, world_size=8, most_rows=1)
    return SimpleNamespace(steps=args.max_steps, batch=args.total_batch_size,
                           params=model.num_params(), flops=model.flops_per_token(),
                           tokens=args.max_steps * args.total_batch_size)

PUBLISHED = (   # run, preset, tok/s a GPU, hours, source; of 8×H100
    ("llm.c 124M", "gpt2", 2 ** 19 / 8 / 0.140, 45 / 60,
     "140 ms a step: modded-nanogpt, records/track_1_short/2024-10-13_llmc"),
    ("llm.c 1558M", "gpt2-xl", 2 ** 20 / 8 / 2.80, 24.0,
     "2.80 s a step: llm.c, scripts/run_gpt2_1558M.sh and discussion 677"),
    ("nanochat d24, run 6, fp8", "d24", 122_900, 1.65, "nanochat, dev/LEADERBOARD.md and its log"))

def node_step_ms(row, run, args):
    """ms of a step of `run` on 8×H100, from a row of bench/train.py or bench/trainers.py."""
    share = row.get("optimizer_share") or 0.0
    per_token = row["ms"] * (1 - share) / row["step_tokens"]
    slower = H200_TB_S / H100_TB_S if args.on == "H200" else 1.0
    passes = per_token * run.batch / 8 * (1 + args.memory_bound * (slower - 1))
    optimizer = row["ms"] * share / 8 * slower
    network = 2 * 4 * run.params * 7 / 8 / args.network / 1e9 * 1000
    return passes + optimizer + network

def measured_rows(folder):
    """(what is run, row) of each contender that bench/gpu.sh measured at a shape of a known run."""
    for part in ("gpt2", "d24", "gpt2-xl", "trainers"):
        path = Path(folder) / f"{part}.json"
        speed = json.loads(path.read_text()).get("speed", {}) if path.exists() else {}
        for name, rows in speed.items():
            yield from ((name, row) for row in rows if "ms" in row)

def memory_bound_share(folder):
    """Of the busy time of a step: kernels that are neither matmul nor attention."""
    path = Path(folder or "") / "profile.json"
    shapes = json.loads(path.read_text()).get("profile", {}) if folder and path.exists() else {}
    if not shapes:
        return None
    shape = shapes.get("d24") or list(shapes.values())[-1]
    dense = sum(ms for kernel, _, ms in shape["kernels"]
                if any(word in kernel.lower() for word in ("gemm", "nvjet", "cutlass", "flash",
                                                           "fmha", "attention", "xmma")))
    return 1 - dense / shape["busy_ms"]

def main():
    parser = argparse.ArgumentParser(description="hours and dollars on 8×H100")
    parser.add_argument("--measured", help="folder of bench/gpu.sh's reports")
    parser.add_argument("--on", default="H200", choices=("H100", "H200"), help="where it was")
    parser.add_argument("--gpu_hour_usd", type=float, default=3.0, help="price of one GPU hour")
    parser.add_argument("--memory_bound", type=float, help="share of the passes; default: the "
                        "profile's, or 0.2")
    parser.add_argument("--network", type=float, default=300, help="GB/s of NVLink that arrive")
    args = parser.parse_args()
    node_usd, report = 8 * args.gpu_hour_usd, dict(published=[], measured=[])
    for name, preset, tok_s, hours, source in PUBLISHED:
        run = plan(preset)
        report["published"].append(dict(
            run=name, tokens=run.tokens, tok_s=tok_s, mfu=run.flops * tok_s / H100_FLOPS,
            computed=run.tokens / (8 * tok_s) / 3600, hours=hours, source=source,
            usd=hours * node_usd, hour_tok_s=run.tokens / 8 / 3600,
            hour_mfu=run.flops * run.tokens / 8 / 3600 / H100_FLOPS))
    table(["published run on 8×H100", "tokens", "tok/s a GPU", "MFU", "hours", "published",
           "off by", "$", "tok/s for one hour", "MFU", "from"],
          [[row["run"], f"{row['tokens']:.3g}", round(row["tok_s"]), f"{row['mfu']:.1%}",
            row["computed"], row["hours"], f"{row['computed'] / row['hours'] - 1:+.1%}",
            row["usd"], round(row["hour_tok_s"]), f"{row['hour_mfu']:.0%}", row["source"]]
           for row in report["published"]])
    args.memory_bound = args.memory_bound or memory_bound_share(args.measured) or 0.2
    for name, row in measured_rows(args.measured) if args.measured else ():
        run = plan(name)
        ms = node_step_ms(row, run, args)
        hours = run.steps * ms / 3.6e6
        report["measured"].append(dict(
            run=name, contender=row["contender"], tokens=run.tokens, step_ms=ms, hours=hours,
            usd=hours * node_usd, mfu=run.flops * run.batch / (8 * H100_FLOPS * ms / 1000)))
    if report["measured"]:
        print(f"\nOn 8×H100 at ${node_usd:.0f} an hour; {args.memory_bound:.0%} of the passes wait "
              f"for memory; network {args.network:.0f} GB/s, not hidden.")
        table(["run", "who", "tokens", "ms a step", "MFU", "hours", "$"],
              [[row["run"], row["contender"], f"{row['tokens']:.3g}", row["step_ms"],
                f"{row['mfu']:.0%}", row["hours"], row["usd"]] for row in report["measured"]])
    finish("project", **report)

if __name__ == "__main__":
    main()
