"""
The Transformer, and what more than one stage needs around it.

GPTConfig.preset("gpt2" … "gpt2-xl") is OpenAI's GPT-2, exactly; preset("d12"), preset("d24") … is
a modern recipe where depth is the only dial. Behind it: optimizer, checkpoints, ranks, run log.

    >>> model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    >>> idx = torch.zeros(1, 8, dtype=torch.long)
    >>> model(idx).shape                                   # logits
    torch.Size([1, 8, 65])

Sizes, in every file: B rows, T positions (block_size), C channels (n_embd), V vocabulary,
L layers, NH heads, HS channels a head (C = NH * HS).

Papers: GPT-2 (Radford et al. 2019), RoPE (arXiv 2104.09864), RMSNorm (1910.07467), QK norm
(2010.04245), ReLU² (2109.08668), value residuals (2410.17897), soft-cap (2408.00118), Muon
(kellerjordan.github.io/posts/muon), NorMuon (2510.05491), ZeRO (1910.02054).
Differs from the papers: value embeddings are looked up by token, not taken from layer 0, and gated.
"""
import atexit
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# ---- The model -----------------------------------------------------------------------------------

GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),        # L, NH, C
              "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}

@dataclass(frozen=True)
class GPTConfig:
    """The defaults are GPT-2's 124M; each field below `bias` switches on a modern part."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    rope: bool = False              # rotary positions instead of learned ones
    rms_norm: bool = False          # RMSNorm without parameters; also after the embedding
    qk_norm: bool = False           # normalise queries and keys
    relu2: bool = False             # relu(x)² instead of GELU
    tied_head: bool = True          # lm_head shares wte's weights
    value_embeds: bool = False      # every second layer adds a gated per-token vector to its values
    residual_scalars: bool = False  # x = λx + μx₀ before each block, x₀ the normed embedding
    backout: bool = False           # subtract a share of the middle layer's stream before the head
    softcap: float = 0.0            # logits = s tanh(logits / s); 0: off
    windows: str = "L"              # by layer, repeated: L sees all before it, S a quarter of T

    @classmethod
    def preset(cls, name, **overrides):
        """"gpt2" … "gpt2-xl", or "dN": N layers, 64·N channels rounded up to heads of 128."""
        if name in GPT2_SIZES:
            fields = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[name]))
        elif re.fullmatch("d[1-9][0-9]*", name):
            depth = int(name[1:])
            NH = -(-64 * depth // 128)
            fields = dict(n_layer=depth, n_head=NH, n_embd=128 * NH, block_size=2048,
                          vocab_size=32768, bias=False, rope=True, rms_norm=True, qk_norm=True,
                          relu2=True, tied_head=False, value_embeds=True, residual_scalars=True,
                          backout=True, softcap=15.0, windows="SSSL")
        else:
            raise SystemExit(f"model {name!r} is not a preset; they are {', '.join(GPT2_SIZES)} "
                             "and d1, d2 …; try --model d12")
        return cls(**{**fields, **overrides})

    @property
    def padded_vocab(self):
        """Rows of the embedding and the head: V rounded up to 64, which matrix units like."""
        return -(-self.vocab_size // 64) * 64

    def has_value_embed(self, layer):
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer):
        """How many earlier positions this layer's queries see; the last layer sees all."""
        short = self.windows[layer % len(self.windows)] == "S" and layer < self.n_layer - 1
        return self.block_size // 4 if short else self.block_size

class Linear(nn.Linear):
    """fp32 master weights, computed in the dtype of the input (bf16 on a GPU)."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype),
                        None if self.bias is None else self.bias.to(x.dtype))

def rms_norm(x):
    # one epsilon for every dtype, so that bf16 and fp32 models compute the same function
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)

class Norm(nn.Module):
    """LayerNorm as GPT-2 has it, or RMSNorm without parameters."""

    def __init__(self, config):
        super().__init__()
        C, rms = config.n_embd, config.rms_norm
        self.weight = None if rms else nn.Parameter(torch.empty(C))
        self.bias = None if rms or not config.bias else nn.Parameter(torch.empty(C))

    def forward(self, x):
        if self.weight is None:
            return rms_norm(x)
        parameters = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], *parameters, eps=1e-5)

def rotary_table(config, base=100_000):
    """cos and sin of RoPE's angles, each (block_size, 1, HS/2)."""
    HS = config.n_embd // config.n_head
    inv_freq = base ** (-torch.arange(0, HS, 2, dtype=torch.float32) / HS)
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None, None] * inv_freq
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Turns channel pairs (i, i + HS/2) of x (B, T, NH, HS) by angles (B or 1, T, 1, HS/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)

def attention(q, k, v, pos, window, cache, dropout):
    """Causal, q (B, NH, T, HS), k and v (B, NH, S, HS) → (B, NH, T, HS). The query at pos t (B or
    1, T) sees key s where s ≤ t and, in a windowed layer, t - s ≤ window."""
    # a mask is built only for windows shorter than the text, and in a cache
    if (cache is None or cache.used == 0) and window >= q.shape[2] - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    t, s = pos[:, None, :, None], torch.arange(k.shape[2], device=k.device)
    mask = (s <= t) & (t - s <= window)                                     # (B or 1, 1, T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, NH = config.n_embd, config.n_head
        self.config, self.layer, self.window = config, layer, config.window(layer)
        self.c_attn = Linear(C, 3 * C, bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        if config.has_value_embed(layer):
            self.value_gate = Linear(min(12, C), NH, bias=False)

    def forward(self, x, pos, rotary, value_embed, cache):
        B, T, C = x.shape
        NH, HS = self.config.n_head, C // self.config.n_head
        q, k, v = self.c_attn(x).view(B, T, 3, NH, HS).unbind(2)           # each (B, T, NH, HS)
        if value_embed is not None:     # v += 3 σ(W x[:12]) E[token], one gate a head
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :self.value_gate.in_features]))
            v = v + gate[..., None] * value_embed.view(B, T, NH, HS)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.config.qk_norm:         # 1.2 each: a little sharper than unit vectors give
            q, k = 1.2 * rms_norm(q), 1.2 * rms_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, NH, T, HS)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attention(q, k, v, pos, self.window, cache, self.training * self.config.dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.relu2 = config.relu2
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(F.relu(h).square() if self.relu2 else F.gelu(h, approximate="tanh"))

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, pos, rotary, value_embed, cache):
        x = x + self.dropout(self.attn(self.ln_1(x), pos, rotary, value_embed, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))

CHUNK_LOGITS = {"cuda": 2 ** 24, "cpu": 2 ** 20}    # fp32: 64 MB; 4 MB, about a CPU's cache

class CrossEntropy(torch.autograd.Function):
    """Head, soft-cap and mean cross-entropy in one, a chunk of tokens at a time.
    At B = 32, T = 2048 and V = 32,768 the logits alone are 8 GB. Here a chunk's logits turn into
    its gradient at once: they never exist all together, and are not computed twice. x (N, C), head
    weight (padded V, C), targets (N,) → the mean over targets that are not -1.
        z = W x    y = s tanh(z / s)    loss = ln Σ exp(y) - y[target]
        dz = (softmax(y) - onehot(target)) (1 - (y/s)²) / count    dx = Wᵀ dz    dW = dz xᵀ
    """

    @staticmethod
    def forward(ctx, x, weight, targets, config):
        V, s = config.vocab_size, config.softcap
        W = weight[:V].to(x.dtype)
        dx, dW = torch.empty_like(x), torch.zeros_like(weight)
        count = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        size = max(1, CHUNK_LOGITS[x.device.type] // V)
        for x_part, dx_part, target in zip(*(t.split(size) for t in (x, dx, targets[:, None]))):
            y = (x_part @ W.T).float()
            y = y.div_(s).tanh_().mul_(s) if s else y
            valid, target = target >= 0, target.clamp(min=0)
            log_sum = y.logsumexp(-1, keepdim=True)
            total += ((log_sum - y.gather(1, target)) * valid).sum()
            dz = (y - log_sum).exp_()
            dz.scatter_add_(1, target, torch.full_like(log_sum, -1.0)).mul_(valid / count)
            if s:
                dz.mul_(1 - y.div_(s).square_())
            dz = dz.to(x.dtype)
            dx_part.copy_(dz @ W)
            dW[:V] += dz.T @ x_part
        ctx.save_for_backward(dx, dW)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return dx * grad, dW * grad, None, None

class GPT(nn.Module):
    """model(idx) → logits (B, T, V); model(idx, targets) → mean loss in nats.

    idx, targets: int64 (B, T), ids below vocab_size; a target of -1 does not count.
    reduction="none" gives each token's loss (B, T). With `cache`, idx continues its rows.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        V, C, L = config.padded_vocab, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.rope:
            for name, table in zip(("rope_cos", "rope_sin"), rotary_table(config)):
                self.register_buffer(name, table, persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, C)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(L))
        self.ln_f = Norm(config)
        self.lm_head = Linear(C, V, bias=False)
        if config.value_embeds:
            layers = filter(config.has_value_embed, range(L))
            self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(V, C) for layer in layers})
        if config.residual_scalars:
            self.resid_scalars, self.x0_scalars = (nn.Parameter(torch.empty(L)) for _ in range(2))
        if config.backout:
            self.backout_scalar = nn.Parameter(torch.empty(1))
        with torch.no_grad():
            for name, p in self.named_parameters():
                self.init_parameter(name, p)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

    def init_parameter(self, name, p):
        """GPT-2: N(0, .02), residual projections /√(2L). Modern: projections 0, so that each block
        begins as the identity, and the other matrices uniform with standard deviation 1/√C."""
        L, V = self.config.n_layer, self.config.vocab_size
        if name == "resid_scalars":
            p.copy_(torch.linspace(1.15, 1.05, L))
        elif name == "x0_scalars":
            p.copy_(torch.linspace(0.20, 0.05, L))
        elif p.ndim < 2:
            p.fill_(0.2 if name == "backout_scalar" else 0.0 if name.endswith("bias") else 1.0)
        elif not self.config.rms_norm:
            p.normal_(0.0, 0.02 / math.sqrt(2 * L) if name.endswith("c_proj.weight") else 0.02)
        elif name.endswith("c_proj.weight"):
            p.zero_()
        elif name in ("wte.weight", "lm_head.weight"):
            p.normal_(0.0, 0.8 if name == "wte.weight" else 0.001)
        elif "value_gate" in name:
            p.uniform_(0.0, 0.02)
        else:
            bound = math.sqrt(3 / self.config.n_embd) * (0.4 if "c_fc" in name else 1.0)
            p.uniform_(-bound, bound)
        if name.startswith(VOCABULARY):
            p[V:] = 0.0                 # the padding rows are never a token

    def hidden(self, idx, cache=None):
        """What the head reads: (B, T, C) after the last norm."""
        config, T = self.config, idx.shape[1]
        assert T + (cache.used if cache else 0) <= config.block_size, (T, config.block_size)
        pos = torch.arange(T, device=idx.device)[None]                               # (1, T)
        if cache is not None:
            pos = pos + cache.pos[:, None]                                           # (B, T)
        x, rotary = self.wte(idx).to(self.compute_dtype), None
        if config.rope:
            rotary = self.rope_cos[pos], self.rope_sin[pos]                 # (B or 1, T, 1, HS/2)
        else:
            x = x + self.wpe(pos).to(x.dtype)
        x = x0 = self.dropout(rms_norm(x) if config.rms_norm else x)
        for layer, block in enumerate(self.h):
            if config.residual_scalars:
                x = (self.resid_scalars[layer] * x + self.x0_scalars[layer] * x0).to(x.dtype)
            value_embed = None
            if config.has_value_embed(layer):
                value_embed = self.value_embeds[str(layer)](idx).to(x.dtype)
            x = block(x, pos, rotary, value_embed, cache)
            if layer == config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.pos, cache.used = cache.pos + T, cache.used + T
        if config.backout:
            x = x - self.backout_scalar.to(x.dtype) * middle
        return self.ln_f(x)

    def logits(self, x):
        """(…, C) → fp32 logits (…, V). The padding rows are cut: neither hit nor trained."""
        z, s = self.lm_head(x)[..., :self.config.vocab_size].float(), self.config.softcap
        return s * torch.tanh(z / s) if s else z

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        x, flat = x.flatten(0, 1), targets.flatten()
        if reduction == "mean":
            return CrossEntropy.apply(x, self.lm_head.weight, flat, self.config)
        size = max(1, CHUNK_LOGITS[x.device.type] // self.config.vocab_size)
        losses = [F.cross_entropy(self.logits(part), target, ignore_index=-1, reduction="none")
                  for part, target in zip(x.split(size), flat.split(size))]
        return torch.cat(losses).view_as(targets)

    def num_params(self):
        return sum(t.numel() for _, t in file_tensors(self))

    def matmul_params(self):
        """Weights that multiply every token: the blocks' matrices and the head."""
        blocks = sum(p.numel() for p in self.h.parameters() if p.ndim == 2)
        return blocks + self.config.vocab_size * self.config.n_embd

    def flops_per_token(self):
        """Both passes, as in PaLM (arXiv 2204.02311, B): 6 a weight, 12·C a key in reach."""
        keys = sum(self.config.window(layer) for layer in range(self.config.n_layer))
        return 6 * self.matmul_params() + 12 * self.config.n_embd * keys

    def use(self, device):
        """Moves the model; it computes in bf16 on a GPU that has it. The weights stay fp32."""
        bf16 = "cuda" in str(device) and torch.cuda.is_bf16_supported()
        self.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        return self.to(device)

# ---- Ranks: a single process is rank 0 of 1, and no code below asks which case it is -------------

@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    is_main: bool = True

    def sum(self, *values):
        """Sums each number over all ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

def init_ranks(device="auto"):
    """Joins the ranks that torchrun started, if it did. device: auto, cpu or cuda."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: this torch sees no CUDA GPU; it needs one and its "
                             "driver; try --device cpu")
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        dist.init_process_group("nccl" if "cuda" in device else "gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks(rank, world_size, device, is_main=rank == 0)

# ---- The optimizer -------------------------------------------------------------------------------

POLAR_EXPRESS = (  # five quintics that push every singular value towards 1 (arXiv 2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def polar(G):
    """The factor U Vᵀ of G = U S Vᵀ, about; G (…, m, n). On a GPU bf16 is precise enough."""
    X = G.bfloat16() if G.is_cuda else G.float()
    X = X / (1.01 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).float()

def as_matrices(W):
    """c_attn.weight (3C, C) is three matrices, q, k and v; any other is one: a view (K, m, n)."""
    K = 3 if W.shape[0] == 3 * W.shape[1] else 1
    return W.view(K, W.shape[0] // K, W.shape[1])

class Optimizer:
    """AdamW and Muon with ZeRO-1: each parameter has one rank that keeps its state and updates it.

    groups: dicts of `kind` ("adamw" or "muon"), `params` {name: parameter}, `lr`, `weight_decay`,
    for AdamW `betas`, `eps`. After backward on every rank: average_grads(), then step(…).
    """

    def __init__(self, groups, ranks=Ranks()):
        self.groups, self.ranks, self.steps, self.state = groups, ranks, 0, {}
        self.params = {name: p for group in groups for name, p in group["params"].items()}
        by_size = sorted(self.params, key=lambda name: (-self.params[name].numel(), name))
        self.owner = {name: i % ranks.world_size for i, name in enumerate(by_size)}

    def is_mine(self, name):
        return self.owner[name] == self.ranks.rank

    def slot(self, name, key, like):
        """A tensor of the state, zeros at first."""
        if f"{name}.{key}" not in self.state:
            self.state[f"{name}.{key}"] = torch.zeros_like(like)
        return self.state[f"{name}.{key}"]

    @torch.no_grad()
    def average_grads(self):
        """Averages each gradient over the ranks, onto its owner; returns the norm of them all."""
        for p in self.params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.communicate(dist.reduce, {name: p.grad for name, p in self.params.items()})
        mine = [self.params[name].grad for name in filter(self.is_mine, self.params)]
        norms = [grad.div_(self.ranks.world_size).norm() for grad in mine]
        return math.sqrt(self.ranks.sum(torch.stack(norms).double().square().sum().item())[0])

    def communicate(self, collective, tensors):
        """Reduces to, or broadcasts from, each tensor's owner, all at once."""
        if self.ranks.world_size > 1:
            for work in [collective(t, self.owner[n], async_op=True) for n, t in tensors.items()]:
                work.wait()

    @torch.no_grad()
    def step(self, lr_scale=1.0, grad_scale=1.0, momentum=0.95, decay_scale=1.0):
        """The schedules scale each group's own lr and weight_decay; grad_scale clips gradients."""
        self.steps += 1
        for group in self.groups:
            lr, decay = lr_scale * group["lr"], decay_scale * group["weight_decay"]
            for name in filter(self.is_mine, group["params"]):
                p, grad = self.params[name], self.params[name].grad * grad_scale
                if group["kind"] == "adamw":
                    self.adamw(name, p, grad, lr, decay, group["betas"], group["eps"])
                else:
                    self.muon(name, as_matrices(p), as_matrices(grad), lr, decay, momentum)
        self.communicate(dist.broadcast, {name: p.data for name, p in self.params.items()})
        for p in self.params.values():
            p.grad = None

    def adamw(self, name, p, grad, lr, decay, betas, eps):
        """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2)."""
        m, v = self.slot(name, "exp_avg", p), self.slot(name, "exp_avg_sq", p)
        m.lerp_(grad, 1 - betas[0])
        v.lerp_(grad.square(), 1 - betas[1])
        m_hat, v_hat = m / (1 - betas[0] ** self.steps), v / (1 - betas[1] ** self.steps)
        p.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + eps))

    def muon(self, name, W, grad, lr, decay, momentum, beta2=0.9):
        """polar(Nesterov momentum), then NorMuon: rows of equal RMS along the longer side, the norm
        kept. Decay is cautious (arXiv 2510.12402): only where the update shrinks W. (K, m, n)"""
        buffer = self.slot(name, "momentum", W).lerp_(grad, 1 - momentum)
        U = polar(grad.lerp(buffer, momentum))
        row_variance = U.square().mean(-1 if W.shape[-2] >= W.shape[-1] else -2, keepdim=True)
        variance = self.slot(name, "variance", row_variance).lerp_(row_variance, 1 - beta2)
        scaled = U * variance.clamp_min(1e-10).rsqrt()
        U = F.normalize(scaled, dim=(-2, -1)) * U.norm(dim=(-2, -1), keepdim=True)
        lr = lr * max(1, W.shape[-2] / W.shape[-1]) ** 0.5
        W.sub_(lr * (U + decay * W * (U * W >= 0)))

ADAM_RECIPE = {     # nanochat's, tuned at d12: lr, betas, weight decay
    "lm_head": (0.008, (0.8, 0.96), 0.01), "wte": (0.3, (0.8, 0.995), 0.001),
    "value_embeds": (0.15, (0.8, 0.995), 0.01), "resid_scalars": (0.005, (0.8, 0.95), 0.05),
    "x0_scalars": (0.5, (0.96, 0.95), 0.0), "backout_scalar": (0.2, (0.8, 0.95), 0.0)}
D12_MATMUL_PARAMS = 110.1e6     # of d12 with 32,768 tokens, where decay and batch size were tuned

def make_optimizer(model, ranks=Ranks(), lr=None, batch_tokens=2 ** 19):
    """GPT-2's AdamW, lr 6e-4; or the modern mixture: Muon for the blocks' matrices, lr
    .02 √(batch_tokens / 2¹⁹), and Adam for the rest. Another lr changes all in proportion."""
    params, config = dict(model.named_parameters()), model.config
    if not config.rms_norm:
        adam = dict(kind="adamw", lr=lr or 6e-4, betas=(0.9, 0.95), eps=1e-8)
        flat = {name: p for name, p in params.items() if p.ndim < 2}       # biases and norms
        rest = {name: p for name, p in params.items() if p.ndim >= 2}
        return Optimizer([dict(adam, params=rest, weight_decay=0.1),
                          dict(adam, params=flat, weight_decay=0.0)], ranks)
    batch_scale = math.sqrt(batch_tokens / 2 ** 19)
    scale, width_scale = lr / 0.02 if lr else batch_scale, math.sqrt(768 / config.n_embd)
    decay = 0.28 * batch_scale * D12_MATMUL_PARAMS / model.matmul_params()
    groups = [dict(kind="muon", lr=0.02 * scale, weight_decay=decay,
                   params={name: p for name, p in params.items() if name.startswith("h.")})]
    for start, (lr, betas, decay) in ADAM_RECIPE.items():
        group = {name: p for name, p in params.items() if name.startswith(start)}
        lr *= scale * (width_scale if start in VOCABULARY else 1.0)
        groups.append(dict(kind="adamw", params=group, lr=lr, betas=betas, eps=1e-10,
                           weight_decay=decay))
    assert sum(len(group["params"]) for group in groups) == len(params), "a parameter nobody trains"
    return Optimizer(groups, ranks)

# ---- Checkpoints: <run>/config.json + model.safetensors, named as HF's GPT-2 names them ----------

FORMAT_VERSION = 1
VOCABULARY = ("wte", "lm_head", "value_embeds")                         # have a row a token
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")          # HF keeps these (in, out)

def file_tensor(name, p, vocab_size):
    """A parameter as it stands in the file: HF's name, (in, out) matrices, no padding rows."""
    p = p[:vocab_size] if name.startswith(VOCABULARY) else p.T if name.endswith(TRANSPOSED) else p
    return (name if name.startswith("lm_head") else "transformer." + name), p.detach()

def file_tensors(model):
    V = model.config.vocab_size
    return [file_tensor(name, p, V) for name, p in model.named_parameters()]

def save_weights(path, model):
    """Writes the file whole, then renames it: a reader never sees half of one."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in file_tensors(model)}
    save_file(tensors, f"{path}.part", metadata={"format": "pt"})
    os.replace(f"{path}.part", path)

@torch.no_grad()
def load_weights(path, model, file_vocab=None):
    """Fills the model from a file of ours or of HF's GPT-2, with or without its "transformer.".
    Where the file has only file_vocab rows a token, those of new tokens begin at the mean."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SystemExit(f"{path}: {error}; weights must be one whole safetensors file; copy it or "
                         "train it again") from None
    for name, p in model.named_parameters():
        key, ours = file_tensor(name, p, model.config.vocab_size)
        tensor = tensors.get(key, tensors.get(key.removeprefix("transformer.")))
        asked = file_tensor(name, p, file_vocab or model.config.vocab_size)[1].shape
        if tensor is None or tensor.shape != asked:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise SystemExit(f"{path}: {key} is {found}; config.json asks for {tuple(asked)}; "
                             "take both files from one checkpoint")
        ours[:len(tensor)] = tensor
        if len(ours) > len(tensor):
            ours[len(tensor):] = tensor.float().mean(0)

def save_checkpoint(run, model, tokenizer=None, stage="pretrain", step=0, **extra):
    """Writes <run>/model.safetensors, config.json, the tokenizer; `extra` joins the metadata."""
    run, config = Path(run), model.config
    run.mkdir(parents=True, exist_ok=True)
    save_weights(run / "model.safetensors", model)
    if tokenizer is not None:
        tokenizer.save(run)
    meta = dict(extra, format_version=FORMAT_VERSION, stage=stage, step=step, model=asdict(config))
    same = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    write_json(run / "config.json", dict(       # all but the last is what transformers reads
        same, model_type="deepdive" if config.rope else "gpt2", architectures=["GPT2LMHeadModel"],
        n_positions=config.block_size, activation_function="gelu_new", layer_norm_epsilon=1e-5,
        tie_word_embeddings=config.tied_head, eos_token_id=getattr(tokenizer, "eot", 50256),
        deepdive=meta))

def load_checkpoint(run, device="cpu", vocab_size=None):
    """<run>, ours or a folder with HF's GPT-2 → (model, meta); meta: run, stage, step, …

    vocab_size: grow the vocabulary to this, for special tokens that the model has never seen.
    """
    run = Path(run)
    try:
        described = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run}/config.json: {error}; a model is a folder with config.json and "
                         "model.safetensors; train one, or name another with --model") from None
    meta = described.get("deepdive", dict(format_version=FORMAT_VERSION, stage="pretrain", step=0))
    found = described.get("model_type"), meta["format_version"]
    if found not in (("gpt2", FORMAT_VERSION), ("deepdive", FORMAT_VERSION)):
        raise SystemExit(f"{run} holds a {found[0]} model of format {found[1]}; gpt2 and deepdive "
                         f"of format {FORMAT_VERSION} can be read; train it again, or name another")
    same = {name: described[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config = GPTConfig(**meta.get("model", dict(same, block_size=described["n_positions"])))
    model = GPT(replace(config, vocab_size=max(config.vocab_size, vocab_size or 0)))
    load_weights(run / "model.safetensors", model, file_vocab=config.vocab_size)
    return model.use(device), {"run": str(run), **meta}

def save_state(run, ranks, optimizer, model, **state):
    """What a bit-equal --resume needs, in <run>/state/step_N. Killed at any moment, the newest
    complete folder holds weights, each rank's optimizer shard and generators, all of one step."""
    final = Path(run) / "state" / f"step_{state['step']:06d}"
    part = final.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    tensors = {**optimizer.state, "rng.cpu": torch.get_rng_state()}
    if "cuda" in ranks.device:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, part / f"rank_{ranks.rank:05d}.safetensors")
    ranks.sum(1)                        # every rank's file is there
    if ranks.is_main:
        save_weights(part / "model.safetensors", model)
        write_json(part / "state.json", dict(state, format_version=FORMAT_VERSION,
                                             optimizer_steps=optimizer.steps,
                                             world_size=ranks.world_size))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in set(final.parent.iterdir()) - {final}:
            shutil.rmtree(old)
    ranks.sum(1)

def load_state(run, resume, ranks, optimizer, model, settings):
    """Restores what save_state wrote, for any number of ranks; returns its state, or None without
    one. `settings`, the flags that decide what is computed, must be the run's."""
    folder = max((Path(run) / "state").glob("step_" + 6 * "[0-9]"), default=None)
    if folder and not resume:
        raise SystemExit(f"{run} holds a saved run; training again would overwrite it; add "
                         "--resume to continue it, or choose another --out")
    if not folder:
        return None
    state = json.loads((folder / "state.json").read_text())
    old = dict(state["settings"], format_version=state["format_version"])
    new = dict(json.loads(json.dumps(settings)), format_version=FORMAT_VERSION)
    changed = sorted(key for key in old | new if old.get(key) != new.get(key))
    if changed:
        raise SystemExit(f"{run} was begun with another {' and '.join(changed)}; a resumed run "
                         "keeps its settings; give the same flags, or another --out")
    load_weights(folder / "model.safetensors", model)
    for number in range(state["world_size"]):
        tensors = load_file(folder / f"rank_{number:05d}.safetensors", device=ranks.device)
        rng = {name: tensors.pop(name).cpu() for name in list(tensors) if name.startswith("rng.")}
        optimizer.state.update({name: tensor for name, tensor in tensors.items()
                                if optimizer.is_mine(name.rpartition(".")[0])})
        if number == ranks.rank:
            torch.set_rng_state(rng["rng.cpu"])
            if "cuda" in ranks.device and "rng.cuda" in rng:
                torch.cuda.set_rng_state(rng["rng.cuda"])
    optimizer.steps = state["optimizer_steps"]
    return state

def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.part", path)

# ---- The run log: one grammar for every stage, on stdout and in <run>/log.jsonl ------------------

LOG_FORMATS = dict(
    loss="loss {:.6f}", val_loss="val_loss {:.6f}", val_bpb="val_bpb {:.4f}", lr="lr {:.2e}",
    norm="norm {:.4f}", ms="{:.1f} ms", tok_s="{:.0f} tok/s", mfu="mfu {:.1%}", usd="${:.2f}",
    eta="eta {}", reward="reward {:.3f}", reply_tokens="reply {:.1f} tokens", tied="tied {:.0%}",
    truncated="truncated {:.0%}", kl="kl {:.4f}")

class RunLog:
    """log(7, loss=…, lr=…) prints `step  7/90 | loss 3.421875 | lr 5.98e-04`, logs a JSON row."""

    def __init__(self, run, max_steps, ranks=Ranks(), resume_step=None):
        self.max_steps, self.is_main, kept = max_steps, ranks.is_main, []
        if self.is_main:
            path = Path(run) / "log.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:     # what came after the saved step is going to come again
                kept = [row for row in read_log(run) if row.get("step", 0) <= resume_step]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.file = open(path, "a", buffering=1)
        self.started = time.time() - (kept[-1]["seconds"] if kept else 0)

    def __call__(self, step, **values):
        values = {key: value for key, value in values.items() if value is not None}
        shown = (LOG_FORMATS[key].format(timedelta(seconds=int(value)) if key == "eta" else value)
                 for key, value in values.items())
        head = f"step {step:{len(str(self.max_steps))}d}/{self.max_steps}"
        self.say(" | ".join([head, *shown]), step=step, **values)

    def say(self, text, **row):
        """Prints a line on the main rank, and logs the row beside it if there is one."""
        if self.is_main:
            print(text, flush=True)
            if row:
                row["seconds"] = round(time.time() - self.started, 3)
                self.file.write(json.dumps(row) + "\n")

    def header(self, args, model, device):
        """What it takes to repeat a run: command, commit, versions, device, flags, parameters."""
        commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse --short HEAD")
        gpu = torch.cuda.get_device_name() if "cuda" in str(device) else None
        row = dict(command=" ".join(sys.argv), commit=commit if len(commit) < 20 else "unknown",
                   torch=torch.__version__, python=sys.version.split()[0], flags=vars(args),
                   params=model.num_params(), device=gpu or f"cpu x {torch.get_num_threads()}")
        self.say("\n".join(f"{key:8s} {value}" for key, value in row.items()), header=row)

def read_log(run):
    """The rows of <run>/log.jsonl; a last line that a kill cut short, without its end, is left."""
    path = Path(run) / "log.jsonl"
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(row) for row in rows]
