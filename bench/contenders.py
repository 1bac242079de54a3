"""
Who takes part in the training benches: this project, nanoGPT and nanochat, with one face.

    arm = Ours(shape, max_steps=100)
    arm.gradients(x, y, share=1.0)      # forward and backward of a micro-batch, its share of a step
    arm.update(step)                    # the rest of a training step: schedules, optimizer
    arm.losses(x, y)                    # (B, T), to evaluate

Each brings its model, its optimizer, its schedules and its precision: fp32 on a CPU; on a GPU bf16,
compiled. Peers are checkouts of karpathy's repositories in .peers/nanoGPT and .peers/nanochat.
"""
import contextlib
import importlib.util
import io
import math
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
sys.path[:0] = [str(ROOT), str(PEERS / "nanochat")]

import torch

from model import GPT, GPTConfig, find_kernel, sdpa
from training import Ranks, make_optimizer
from train_gpt2 import most_rows, schedule

@dataclass(frozen=True)
class Shape:
    """What contenders have in common: layers, channels, heads, vocabulary, positions, and the
    tokens of a step. modern: dN, the opponent is nanochat; else GPT-2, and it is nanoGPT."""
    modern: bool
    L: int
    C: int
    NH: int
    V: int
    T: int
    step_tokens: int

    def config(self, windows="L"):
        sizes = dict(n_layer=self.L, n_embd=self.C, n_head=self.NH, vocab_size=self.V,
                     block_size=self.T)
        if self.modern:
            return GPTConfig.preset(f"d{self.L}", **sizes, windows=windows)
        return GPTConfig(**sizes)

    def flops_per_token(self, windows="L"):
        with torch.device("meta"):
            return GPT(self.config(windows)).flops_per_token()

def gpt2_lr(shape):
    """Of AdamW, for whoever trains GPT-2: 3e-3 is the best of 1e-3 and 3e-3 at 4096 tokens a step;
    at large batches 1.8e-3 is what tuning found."""
    return 1.8e-3 if shape.step_tokens > 2 ** 15 else 3e-3

class Ours:
    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False):
        self.shape, self.max_steps, self.device = shape, max_steps, device
        with torch.device(device):
            self.model = GPT(shape.config(windows)).use(device, fp8=fp8)
        self.optimizer = make_optimizer(self.model, Ranks(device=str(device)),
                                        None if shape.modern else gpt2_lr(shape),
                                        shape.step_tokens)
        compiled = "cuda" in str(device)
        self.hidden = torch.compile(self.model.hidden, dynamic=False) if compiled else (
            self.model.hidden)

    @property
    def rows(self):
        """A micro-batch is as long as train_gpt2.py makes it."""
        return most_rows(self.model, self.shape.T, 1, str(self.device))

    def gradients(self, x, y, share=1.0):
        (self.model.loss(self.hidden(x), y) * share).backward()

    def update(self, step):
        norm, modern = self.optimizer.average_grads(), self.shape.modern
        lr_scale, momentum, decay_scale = schedule(step, self.max_steps, modern)
        self.optimizer.step(lr_scale, 1.0 if modern else min(1.0, 1 / (norm + 1e-6)), momentum,
                            decay_scale)

    def losses(self, x, y):
        return self.model(x, y, reduction="none")

class NanoGPT:
    """Its model and optimizer, with the schedule and the precision of its train.py."""
    rows = None         # as many as are given

    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False):
        assert windows == "L" and not fp8, "it has neither"
        spec = importlib.util.spec_from_file_location("nanogpt", PEERS / "nanoGPT" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cuda = "cuda" in str(device)
        with torch.device(device), contextlib.redirect_stdout(io.StringIO()):
            self.model = module.GPT(module.GPTConfig(
                block_size=shape.T, vocab_size=-(-shape.V // 64) * 64 if cuda else shape.V,
                n_layer=shape.L, n_head=shape.NH, n_embd=shape.C, dropout=0.0,
                bias=not cuda))
            self.lr = gpt2_lr(shape)
            self.optimizer = self.model.configure_optimizers(0.1, self.lr, (0.9, 0.95),
                                                             "cuda" if cuda else "cpu")
        self.max_steps = max_steps
        self.forward = torch.compile(self.model) if cuda else self.model
        self.precision = lambda: (torch.autocast("cuda", torch.bfloat16) if cuda
                                  else contextlib.nullcontext())

    def gradients(self, x, y, share=1.0):
        with self.precision():
            loss = self.forward(x, y)[1] * share
        loss.backward()

    def update(self, step):
        warmup = self.max_steps // 10       # its train.py: linear warm-up, cosine to a tenth
        along = (step - warmup) / max(1, self.max_steps - warmup)
        scale = ((step + 1) / (warmup + 1) if step < warmup
                 else 0.1 + 0.45 * (1 + math.cos(math.pi * along)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, x, y):
        with self.precision():
            logits = self.model(x, y)[0].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=-1,
                                                 reduction="none").view_as(y)

def nanochat_modules(device="cpu"):
    """(gpt, engine) of its package, without what a model does not need: the dashboard and the
    trainer of tokenizers. On a CPU nothing is compiled: its optimizer alone would take minutes."""
    if "cuda" not in str(device):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    for name in ("wandb", "rustbpe"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    from nanochat import engine, gpt
    return gpt, engine

def nanochat_model(shape, device="cpu", windows="L"):
    gpt, _ = nanochat_modules(device)
    with torch.device(device), contextlib.redirect_stdout(io.StringIO()):
        model = gpt.GPT(gpt.GPTConfig(
            sequence_len=shape.T, vocab_size=shape.V, n_layer=shape.L, n_head=shape.NH,
            n_kv_head=shape.NH, n_embd=shape.C, window_pattern=windows))
        model.init_weights()
    return model

class Nanochat:
    """Its model and optimizer, with the schedules and the scaling of its base_train.py. Without
    FlashAttention-3 its windows are dense masks, which cost more than they save: "L" is faster."""
    rows = None

    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False):
        self.model, self.max_steps = nanochat_model(shape, device, windows), max_steps
        ratio = shape.step_tokens / 2 ** 19
        matmul = sum(p.numel() for p in self.model.transformer.h.parameters()) + shape.V * shape.C
        self.decay = 0.28 * math.sqrt(ratio) * 110.1e6 / matmul
        rates = dict(unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02)
        rates = {key: lr * math.sqrt(ratio) for key, lr in rates.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            if fp8:
                from nanochat.fp8 import convert_to_float8_training
                convert_to_float8_training(self.model, module_filter_fn=lambda module, name: (
                    min(module.weight.shape) >= 128
                    and all(n % 16 == 0 for n in module.weight.shape)))
            self.optimizer = self.model.setup_optimizer(**rates, weight_decay=self.decay)
        self.forward = torch.compile(self.model, dynamic=False) if "cuda" in str(device) else (
            self.model)

    def gradients(self, x, y, share=1.0):
        (self.forward(x, y) * share).backward()

    def update(self, step):
        warmdown = round(0.65 * self.max_steps)
        left = min(1.0, (self.max_steps - step) / max(1, warmdown))
        scale = min(1.0, (step + 1) / 40) if left == 1 else left + (1 - left) * 0.05
        momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 - 0.07 * (1 - left)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = self.decay * 0.5 * (1 + math.cos(
                    math.pi * step / self.max_steps))
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def losses(self, x, y):
        return self.model(x, y, loss_reduction="none").view_as(y)

def best_windows(shape, device):
    """As train_gpt2.py chooses: without a kernel that skips what lies outside, windows only cost."""
    return "SSSL" if shape.modern and find_kernel(device)[0] is not sdpa else "L"

def arms(shape, max_steps, device="cpu"):
    """{label: constructor} of who is measured at a shape; None for a peer that is not there. Whole
    windows for all, which every attention kernel knows; ours also as train_gpt2.py would choose."""
    make = lambda contender, **options: lambda: contender(shape, max_steps, device, **options)
    label, peer = ("nanochat", Nanochat) if shape.modern else ("nanoGPT", NanoGPT)
    here = (PEERS / label).is_dir()
    found = {"ours": make(Ours), label: make(peer) if here else None}
    if "cuda" in str(device):
        windows = best_windows(shape, device)
        if windows != "L":
            found["ours, windows"] = make(Ours, windows=windows)
        found["ours, fp8"] = make(Ours, windows=windows, fp8=True)
        if shape.modern:
            found["nanochat, fp8"] = make(peer, fp8=True) if here else None
    return found
