"""
Pretraining, beside what people would take instead: how many tokens a second, and what is learnt of
the same tokens.

    python bench/train.py                                       # speed, two minutes on a quiet CPU
    python bench/train.py --quality 3 --data data/wiki          # and val bits per byte of 3 seeds

in:  .peers/nanoGPT and .peers/nanochat, checkouts of karpathy's repositories; a peer that is not
     there is reported as not measured. --quality reads token shards and their tokenizer
out: one table, and the same as one line of JSON

All run in this process, eager, in fp32, on the same rows: each brings its model, its optimizer, its
schedule, and the rest of a training step. Steps take turns, so that a busy machine slows all alike;
a ratio is the median over pairs of steps. nanoGPT is given lr 3e-3, the best of 1e-3 and 3e-3 that
RECIPE.md's proxy knows; nanochat and we run on our defaults for this batch size.
"""
import argparse
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import time
import types
from contextlib import redirect_stdout
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"         # nanochat compiles its optimizer, which takes minutes
ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
sys.path[:0] = [str(ROOT), str(PEERS / "nanochat")]

import torch

from bpe import Tokenizer
from model import GPT, GPTConfig, Ranks
from optim import make_optimizer
from train_gpt2 import Loader, Shards, evaluate, most_rows, schedule

T, BATCH_ROWS = 256, 16         # 4096 tokens a step
SHAPES = {                      # name: vocabulary, channels, heads; 4 layers
    "GPT-2, 2,048 tokens": (2048, 128, 4), "GPT-2, 50,257 tokens": (50257, 256, 4),
    "dN, 2,048 tokens": (2048, 128, 4)}

class Ours:
    def __init__(self, shape, modern, max_steps, lr=None):
        V, C, NH = shape
        sizes = dict(n_layer=4, n_embd=C, n_head=NH, block_size=T, vocab_size=V)
        config = GPTConfig.preset("d4", **sizes, windows="L") if modern else GPTConfig(**sizes)
        self.model, self.max_steps = GPT(config), max_steps
        self.optimizer = make_optimizer(self.model, Ranks(), lr, BATCH_ROWS * T)

    def step(self, step, x, y):
        rows = most_rows(self.model, 1, "cpu")
        for a, b in zip(x.split(rows), y.split(rows)):
            (self.model(a, b) * len(a) / len(x)).backward()
        norm = self.optimizer.average_grads()
        modern = self.model.config.rms_norm
        lr_scale, momentum, decay_scale = schedule(step, self.max_steps, modern)
        self.optimizer.step(lr_scale, 1.0 if modern else min(1.0, 1 / (norm + 1e-6)), momentum,
                            decay_scale)

    def losses(self, x, y):
        return self.model(x, y, reduction="none")

class NanoGPT:
    def __init__(self, shape, max_steps):
        spec = importlib.util.spec_from_file_location("nanogpt", PEERS / "nanoGPT" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        V, C, NH = shape
        self.model = module.GPT(module.GPTConfig(block_size=T, vocab_size=V, n_layer=4, n_head=NH,
                                                 n_embd=C, dropout=0.0, bias=True))
        self.optimizer = self.model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
        self.max_steps = max_steps

    def step(self, step, x, y):
        warmup = self.max_steps // 10       # its train.py: linear warm-up, cosine to a tenth
        along = (step - warmup) / max(1, self.max_steps - warmup)
        scale = ((step + 1) / (warmup + 1) if step < warmup
                 else 0.1 + 0.45 * (1 + math.cos(math.pi * along)))
        for group in self.optimizer.param_groups:
            group["lr"] = 3e-3 * scale
        self.model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, x, y):
        logits = self.model(x, y)[0].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=-1,
                                                 reduction="none").view_as(y)

class Nanochat:
    """Its model and optimizer, with the schedules and the scaling of its base_train.py."""

    def __init__(self, shape, max_steps):
        sys.modules.setdefault("wandb", types.ModuleType("wandb"))
        from nanochat.gpt import GPT as Model, GPTConfig as Config
        V, C, NH = shape
        self.model = Model(Config(sequence_len=T, vocab_size=V, n_layer=4, n_head=NH, n_kv_head=NH,
                                  n_embd=C, window_pattern="L"))
        self.model.init_weights()
        ratio = BATCH_ROWS * T / 2 ** 19
        matmul = sum(p.numel() for p in self.model.transformer.h.parameters()) + V * C
        self.decay = 0.28 * math.sqrt(ratio) * 110.1e6 / matmul
        rates = dict(unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02)
        rates = {key: lr * math.sqrt(ratio) for key, lr in rates.items()}
        self.optimizer = self.model.setup_optimizer(**rates, weight_decay=self.decay)
        self.max_steps = max_steps

    def step(self, step, x, y):
        warmdown = round(0.65 * self.max_steps)
        left = min(1.0, (self.max_steps - step) / warmdown)
        scale = min(1.0, (step + 1) / 40) if left == 1 else left + (1 - left) * 0.05
        momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 - 0.07 * (1 - left)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = self.decay * 0.5 * (1 + math.cos(math.pi * step
                                                                         / self.max_steps))
        self.model(x, y).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def losses(self, x, y):
        return self.model(x, y, loss_reduction="none").view_as(y)

def arms(name, max_steps):
    """Contenders of a shape: {name: constructor}; None for a peer that is not there."""
    shape, modern = SHAPES[name], name.startswith("dN")
    peer, label = (Nanochat, "nanochat") if modern else (NanoGPT, "nanoGPT")
    here = (PEERS / label).is_dir()
    return {"ours": lambda: Ours(shape, modern, max_steps),
            label: (lambda: peer(shape, max_steps)) if here else None}

def speed(name, repeats):
    """→ {contender: median ms a step} and the ratios of theirs to ours, a pair each."""
    V = SHAPES[name][0]
    x, y = torch.randint(0, V, (2, BATCH_ROWS, T))
    with redirect_stdout(io.StringIO()):        # peers say what they build
        built = {label: make() for label, make in arms(name, repeats + 2).items() if make}
    ms = {label: [] for label in built}
    for step in range(repeats + 2):         # two to warm up
        for label, arm in built.items():
            tick = time.perf_counter()
            arm.step(step, x, y)
            ms[label].append(1000 * (time.perf_counter() - tick))
    ours, *peer = (values[2:] for values in ms.values())
    return ({label: statistics.median(values[2:]) for label, values in ms.items()},
            [b / a for a, b in zip(ours, peer[0])] if peer else None)

def quality(data, label, make, seed, max_steps):
    """Trains on the rows of a folder of shards → val bits per byte of text."""
    torch.manual_seed(seed)
    with redirect_stdout(io.StringIO()):
        arm = make()
    loader = Loader(Shards(data, "train"), T, seed)
    for step in range(max_steps):
        arm.step(step, *loader.batch(step * BATCH_ROWS, BATCH_ROWS, "cpu"))
        if step % 10 == 9:
            print(f"\r{label}, seed {seed}: step {step + 1}/{max_steps}", end="", file=sys.stderr)
    n_bytes = torch.from_numpy(Tokenizer.load(Path(data) / "tokenizer").token_bytes()).long()

    class Model:                            # what evaluate() asks of a model
        eval = train = staticmethod(lambda: None)

        def __call__(self, x, y, reduction):
            return arm.losses(x, y)

    return evaluate(Model(), Shards(data, "val"), n_bytes, T, BATCH_ROWS, Ranks(), 2 ** 18)[1]

def main():
    parser = argparse.ArgumentParser(description="training speed and quality, beside peers")
    parser.add_argument("--repeats", type=int, default=12, help="timed steps of each")
    parser.add_argument("--quality", type=int, default=0, help="seeds to train; 0: speed only")
    parser.add_argument("--data", help="folder of shards with 2,048 tokens, for --quality")
    parser.add_argument("--max_steps", type=int, default=150, help="steps of --quality")
    args = parser.parse_args()
    results = {}
    print("| 4 layers, 16 rows of 256 | ours, ms a step | peer | theirs, ms | ours is faster by |\n"
          "|---|---|---|---|---|")
    for name in SHAPES:
        ms, ratios = speed(name, args.repeats)
        peer = list(arms(name, 1))[1]
        results[name] = dict(ms=ms, ratios=ratios)
        print(f"| {name} | {ms['ours']:.0f} | {peer} | " + (
            f"{ms[peer]:.0f} | {statistics.median(ratios):.2f} x "
            f"({min(ratios):.2f} … {max(ratios):.2f}) |" if ratios else "not measured | |"))
    if args.quality:
        print(f"\n| {args.max_steps} steps of 4096 tokens | val bits per byte, a seed each | mean |\n"
              "|---|---|---|")
        contenders = {f"{label} ({name.split(',')[0]})": make for name in list(SHAPES)[::2]
                      for label, make in arms(name, args.max_steps).items()}
        for label, make in contenders.items():
            found = make and [quality(args.data, label, make, seed, args.max_steps)
                              for seed in range(1, args.quality + 1)]
            results[label] = found
            print(f"\r| {label} | " + (f"{', '.join(f'{bpb:.4f}' for bpb in found)} | "
                                       f"{statistics.mean(found):.4f} |" if found else
                                       "not measured | |"), flush=True)
    print(json.dumps(results))

if __name__ == "__main__":
    main()
