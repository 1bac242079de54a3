"""
What each part of the modern recipe buys: the same training with one part left out, over some seeds.

    python bench/ablate.py --data data/wiki --out runs/ablate                       # CPU: d4
    python bench/ablate.py --data data/wiki --out runs/ablate --model d12 --config \
        --total_batch_size 65536 --max_steps 610                                    # 1 GPU

    in:  token shards and their tokenizer, as prepare_fineweb.py leaves them
    out: a run folder for each arm and seed; a table: val bits per byte, and how much worse than all

Runs that are done are not repeated, so that a killed bench goes on, and seeds can be added.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training
import train_gpt2
from training import read_log

ARMS = {    # what is left out: fields of GPTConfig, or what takes the part's place
    "nothing": [],
    "Muon: AdamW instead, lr 1e-3": ["adamw", 1e-3],
    "RoPE: learned positions": ["rope=0"],
    "QK norm": ["qk_norm=0"],
    "ReLU²: GELU instead": ["relu2=0"],
    "untied head: tied": ["tied_head=1"],
    "value embeddings": ["value_embeds=0"],
    "residual scalars": ["residual_scalars=0"],
    "backout": ["backout=0"],
    "soft-cap": ["softcap=0"],
    "full windows: SSSL": ["windows=SSSL"]}

def adamw_for_muon(make_optimizer, lr):
    """The recipe with AdamW for the blocks' matrices."""
    def make(*args, **kwargs):
        optimizer = make_optimizer(*args, **kwargs)
        optimizer.groups[0].update(kind="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-10,
                                   weight_decay=0.1)
        return optimizer
    return make

def run_arm(args, name, changes, seed):
    """Trains, unless it is done → the last val_bpb."""
    run = Path(args.out) / f"{name.replace(' ', '_').replace(':', '')}-{seed}"
    done = [row for row in read_log(run) if "gzip" in row]
    if not done:
        fields = [*args.config, *(change for change in changes if "=" in str(change))]
        sys.argv = ["train_gpt2.py", "--model", args.model, "--config", *fields, "--data", args.data,
                    "--out", str(run), "--resume", "--seed", str(seed), "--eval_every", "1000000",
                    "--total_batch_size", str(args.total_batch_size),
                    "--max_steps", str(args.max_steps)]
        make_optimizer = training.make_optimizer
        train_gpt2.make_optimizer = (adamw_for_muon(make_optimizer, changes[1])
                                     if "adamw" in changes else make_optimizer)
        train_gpt2.main()
        done = [row for row in read_log(run) if "gzip" in row]
    return done[-1]["val_bpb"]

def main():
    parser = argparse.ArgumentParser(description="leave out one part of the recipe at a time")
    parser.add_argument("--data", required=True, help="folder of token shards")
    parser.add_argument("--out", default="runs/ablate", help="folder of the runs")
    parser.add_argument("--model", default="d4", help="dN")
    parser.add_argument("--config", nargs="*", default=["n_embd=128", "n_head=4", "block_size=256"],
                        help="fields of GPTConfig that all arms share")
    parser.add_argument("--total_batch_size", type=int, default=4096, help="tokens a step")
    parser.add_argument("--max_steps", type=int, default=150, help="steps of a run")
    parser.add_argument("--seeds", type=int, default=2, help="runs an arm")
    args = parser.parse_args()
    found, started = {name: [] for name in ARMS}, time.time()
    for seed in range(1, args.seeds + 1):
        for name, changes in ARMS.items():
            found[name].append(run_arm(args, name, changes, seed))
            print(f"---- {name}, seed {seed}: {found[name][-1]:.4f} bits a byte, "
                  f"{time.time() - started:.0f} s", flush=True)
    print(f"\n| left out | val bits per byte, mean of {args.seeds} seeds | spread | worse by |\n"
          "|---|---|---|---|")
    for name, values in found.items():
        worse = statistics.mean(values) - statistics.mean(found["nothing"])
        print(f"| {name} | {statistics.mean(values):.4f} | {max(values) - min(values):.4f} | "
              f"{worse:+.4f} |")

if __name__ == "__main__":
    main()
