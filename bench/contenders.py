"""
Who takes part in the training benches: this project, nanoGPT and nanochat, all with one interface.

    arm = Ours(shape, max_steps=100)
    arm.gradients(x, y, share=1.0)      # forward and backward of a micro-batch, its share of a step
    arm.update(step)                    # the rest of a training step: schedules, optimizer
    arm.losses(x, y)                    # (B, T), to evaluate

Each has its own model, optimizer, schedules and precision: fp32 on a CPU, where ours also runs in
bf16 if train_gpt2.py would; on a GPU bf16, compiled.
Peers are checkouts of karpathy's repositories in .peers/nanoGPT and .peers/nanochat.
"""
import contextlib
import functools
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
from precision import find_bf16
from recipe import most_rows, schedule
from train_gpt2 import training_hidden
from training import Ranks, make_optimizer

@dataclass(frozen=True)
class Shape:
    """What contenders have in common: layers, channels, heads, vocabulary, positions, and the
    tokens of a step. modern=True is dN against nanochat; False is GPT-2 against nanoGPT."""
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
    """AdamW's learning rate for all who train GPT-2. At 4096 tokens a step 3e-3 is better than
    1e-3; at large batches tuning found 1.8e-3."""
    if shape.step_tokens > 2 ** 15:
        return 1.8e-3
    return 3e-3

def quiet():
    """Hides what a peer prints while it builds its model."""
    return contextlib.redirect_stdout(io.StringIO())

# ---- This project --------------------------------------------------------------------------------

class Ours:
    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False, bf16=None):
        self.shape = shape
        self.max_steps = max_steps
        self.device = str(device)
        with torch.device(device):
            self.model = GPT(shape.config(windows)).use(device, fp8=fp8, bf16=bf16)
        lr = None if shape.modern else gpt2_lr(shape)
        ranks = Ranks(device=self.device)
        self.optimizer = make_optimizer(self.model, ranks, lr, shape.step_tokens)
        self.hidden = training_hidden(self.model, self.optimizer.exchange, ranks)

    @property
    def rows(self):
        """Rows of a micro-batch, as train_gpt2.py chooses them."""
        return most_rows(self.model, self.shape.T, 1, self.device)

    def gradients(self, x, y, share=1.0):
        (self.model.loss(self.hidden(x), y) * share).backward()

    def update(self, step):
        norm = self.optimizer.reduce_grads().sqrt()
        lr_scale, momentum, decay_scale = schedule(step, self.max_steps, self.shape.modern)
        grad_scale = 1.0
        if not self.shape.modern:
            grad_scale = (1 / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(lr_scale, grad_scale, momentum, decay_scale, ~norm.isfinite())

    def losses(self, x, y):
        return self.model(x, y, reduction="none")

# ---- nanoGPT -------------------------------------------------------------------------------------

class NanoGPT:
    """nanoGPT's model and optimizer, with the schedule and the precision of its train.py."""
    rows = None         # it runs the rows it is given in one micro-batch

    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False):
        assert windows == "L" and not fp8, "nanoGPT has neither windows nor fp8"
        spec = importlib.util.spec_from_file_location("nanogpt", PEERS / "nanoGPT" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.cuda = "cuda" in str(device)
        self.max_steps = max_steps
        self.lr = gpt2_lr(shape)
        vocab_size = shape.V
        if self.cuda:
            vocab_size = math.ceil(shape.V / 64) * 64
        with torch.device(device), quiet():
            self.model = module.GPT(module.GPTConfig(
                block_size=shape.T, vocab_size=vocab_size, n_layer=shape.L, n_head=shape.NH,
                n_embd=shape.C, dropout=0.0, bias=not self.cuda))
            self.optimizer = self.model.configure_optimizers(
                0.1, self.lr, (0.9, 0.95), torch.device(device).type)
        self.forward = self.model
        if self.cuda:
            self.forward = torch.compile(self.model)

    def precision(self):
        return torch.autocast("cuda", torch.bfloat16, enabled=self.cuda)

    def gradients(self, x, y, share=1.0):
        with self.precision():
            loss = self.forward(x, y)[1] * share
        loss.backward()

    def update(self, step):
        """The schedule of its train.py: linear warm-up, then a cosine down to a tenth."""
        warmup = self.max_steps // 10
        if step < warmup:
            scale = (step + 1) / (warmup + 1)
        else:
            along = (step - warmup) / max(1, self.max_steps - warmup)
            scale = 0.1 + 0.45 * (1 + math.cos(math.pi * along))
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

# ---- nanochat ------------------------------------------------------------------------------------

def nanochat_modules(device="cpu"):
    """(gpt, engine) of its package, with empty stand-ins for what a model does not need: the
    dashboard and the tokenizer's trainer. On a CPU nothing is compiled: the optimizer alone would
    take minutes."""
    if "cuda" not in str(device):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    for name in ("wandb", "rustbpe"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    from nanochat import engine, gpt
    return gpt, engine

def nanochat_model(shape, device="cpu", windows="L"):
    gpt, _ = nanochat_modules(device)
    with torch.device(device), quiet():
        model = gpt.GPT(gpt.GPTConfig(
            sequence_len=shape.T, vocab_size=shape.V, n_layer=shape.L, n_head=shape.NH,
            n_kv_head=shape.NH, n_embd=shape.C, window_pattern=windows))
        model.init_weights()
    return model

def nanochat_weights(model):
    """Our parameters under nanochat's names: c_attn is three matrices there."""
    weights = {}
    for name, p in model.state_dict().items():
        name = name.replace("value_gate", "ve_gate").replace("_scalar", "_lambda")
        if name.startswith(("wte", "h.")):
            name = f"transformer.{name}"
        if name.endswith("c_attn.weight"):
            for key, part in zip("qkv", p.chunk(3)):
                weights[name.replace("c_attn", f"c_{key}")] = part
        else:
            weights[name] = p
    return weights

def nanochat_engine(model, tokenizer):
    """nanochat's engine with our weights; None if its checkout is not there."""
    if not (PEERS / "nanochat").is_dir():
        return None
    config = model.config
    shape = Shape(True, config.n_layer, config.n_embd, config.n_head, config.vocab_size,
                  config.block_size, 1)
    theirs = nanochat_model(shape).eval()
    from nanochat.engine import Engine
    theirs.load_state_dict(theirs.state_dict() | nanochat_weights(model))
    names = {"<|assistant_end|>": tokenizer.special["<|im_end|>"]}
    special = types.SimpleNamespace(encode_special=lambda name: names.get(name, -1),
                                    get_bos_token_id=lambda: tokenizer.eot)
    return Engine(theirs, special)

def convert_to_fp8(model):
    """As its base_train.py does: layers of at least 128 x 128 with sides divisible by 16."""
    from nanochat.fp8 import convert_to_float8_training

    def is_large(module, name):
        shape = module.weight.shape
        return min(shape) >= 128 and all(n % 16 == 0 for n in shape)

    convert_to_float8_training(model, module_filter_fn=is_large)

class Nanochat:
    """nanochat's model and optimizer, with the schedules and the scaling of its base_train.py.
    Without FlashAttention-3 its windows are dense masks, which cost more than they save, so "L" is
    faster."""
    rows = None

    def __init__(self, shape, max_steps, device="cpu", windows="L", fp8=False):
        self.model = nanochat_model(shape, device, windows)
        self.max_steps = max_steps
        batch_ratio = shape.step_tokens / 2 ** 19
        matmul = sum(p.numel() for p in self.model.transformer.h.parameters()) + shape.V * shape.C
        self.decay = 0.28 * math.sqrt(batch_ratio) * 110.1e6 / matmul
        rates = dict(unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02)
        rates = {key: lr * math.sqrt(batch_ratio) for key, lr in rates.items()}
        with quiet():
            if fp8:
                convert_to_fp8(self.model)
            self.optimizer = self.model.setup_optimizer(**rates, weight_decay=self.decay)
        self.forward = self.model
        if "cuda" in str(device):
            self.forward = torch.compile(self.model, dynamic=False)

    def gradients(self, x, y, share=1.0):
        (self.forward(x, y) * share).backward()

    def update(self, step):
        warmdown = round(0.65 * self.max_steps)
        left = min(1.0, (self.max_steps - step) / max(1, warmdown))
        if left == 1:
            scale = min(1.0, (step + 1) / 40)
        else:
            scale = left + (1 - left) * 0.05
        if step < 400:
            momentum = 0.85 + 0.12 * step / 400
        else:
            momentum = 0.97 - 0.07 * (1 - left)
        decay = self.decay * 0.5 * (1 + math.cos(math.pi * step / self.max_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def losses(self, x, y):
        return self.model(x, y, loss_reduction="none").view_as(y)

# ---- Who is measured -----------------------------------------------------------------------------

def best_windows(shape, device):
    """Windows as train_gpt2.py chooses them: they save time only with a kernel that skips the keys
    outside of them."""
    if shape.modern and find_kernel(device)[0] is not sdpa:
        return "SSSL"
    return "L"

def arms(shape, max_steps, device="cpu"):
    """{label: constructor} of who is measured at a shape; None for a peer that is not there. All
    run without windows, which every attention kernel can; ours also runs as train_gpt2.py would."""
    label, peer = "nanoGPT", NanoGPT
    if shape.modern:
        label, peer = "nanochat", Nanochat
    if not (PEERS / label).is_dir():
        peer = None

    def make(contender, **options):
        if contender is None:
            return None
        return functools.partial(contender, shape, max_steps, device, **options)

    found = {"ours": make(Ours), label: make(peer)}
    if "cuda" not in str(device):
        found["ours"] = make(Ours, bf16=False)
        if find_bf16(str(device))[0]:
            found["ours, bf16"] = make(Ours, bf16=True)
    else:
        windows = best_windows(shape, device)
        if windows != "L":
            found["ours, windows"] = make(Ours, windows=windows)
        found["ours, fp8"] = make(Ours, windows=windows, fp8=True)
        if shape.modern:
            found["nanochat, fp8"] = make(peer, fp8=True)
    return found
