"""
The Transformer, its cache for generation, and its checkpoints.

GPTConfig.preset("gpt2" … "gpt2-xl") is exactly OpenAI's GPT-2. preset("d12"), preset("d24") … is a
modern recipe in which depth is the only dial. The fast versions of slow parts come last; the loss
of training is in loss.py.

    >>> model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    >>> idx = torch.zeros(1, 8, dtype=torch.long)
    >>> model(idx).shape                                   # logits
    torch.Size([1, 8, 65])

Sizes, in every file: B rows, T positions of a row (at most block_size), C channels (n_embd),
V tokens of the vocabulary, L layers, NH heads, HS channels per head (C = NH * HS).

Papers: GPT-2 (Radford et al. 2019), RoPE (arXiv 2104.09864), RMSNorm (1910.07467), QK norm
(2010.04245), ReLU² (2109.08668), value residuals (2410.17897), soft-cap (2408.00118),
FlashAttention-3 (2407.08608).
Differs from the papers: a layer adds to its values a gated vector that it looks up by token; value
residuals as in the paper would add the values of the first layer.
"""
import functools
import json
import math
import os
import re
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# ---- The configuration ---------------------------------------------------------------------------

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
    value_embeds: bool = False      # every second layer adds a gated vector per token to its values
    residual_scalars: bool = False  # x = λx + μx₀ before each block, x₀ the normed embedding
    backout: bool = False           # subtract a share of the middle layer's stream before the head
    softcap: float = 0.0            # logits = s tanh(logits / s); 0 switches it off
    windows: str = "L"              # per layer, repeated: L sees all before it, S block_size / 4
    norm_scales: str = ""           # RMSNorms with a learned scale: a before attention, m before
                                    # the MLP, f before the head

    def __post_init__(self):
        check_config(self)

    @classmethod
    def preset(cls, name, **overrides):
        """"gpt2" … "gpt2-xl", or "dN": N layers, and 64·N channels rounded up to heads of 128."""
        if name in GPT2_SIZES:
            L, NH, C = GPT2_SIZES[name]
            config = cls(n_layer=L, n_head=NH, n_embd=C)
        elif re.fullmatch("d[1-9][0-9]*", name):
            depth = int(name[1:])
            NH = math.ceil(64 * depth / 128)
            config = cls(n_layer=depth, n_head=NH, n_embd=128 * NH, block_size=2048,
                         vocab_size=32768, bias=False, rope=True, rms_norm=True, qk_norm=True,
                         relu2=True, tied_head=False, value_embeds=True, residual_scalars=True,
                         backout=True, softcap=15.0, windows="SSSL")
        else:
            raise SystemExit(f"{name} is not a preset; they are {', '.join(GPT2_SIZES)} and d1, d2 "
                             "…; try --model d12")
        return replace(config, **overrides)

    @property
    def padded_vocab(self):
        """Rows of the embedding and the head: V rounded up to 128, for the GPU's matrix units."""
        return math.ceil(self.vocab_size / 128) * 128

    def has_value_embed(self, layer):
        """Every second layer has one, and the last does."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer):
        """How many earlier positions this layer's queries see; the last layer sees all."""
        kind = self.windows[layer % len(self.windows)]
        if kind == "S" and layer < self.n_layer - 1:
            return self.block_size // 4
        return self.block_size

# ---- The model -----------------------------------------------------------------------------------

def cast(p, dtype):
    """A parameter in this dtype; None, for a bias that a layer lacks, stays None."""
    return None if p is None else p.to(dtype)

class CastBefore(torch.autograd.Function):
    """(weight, its copy in another dtype, which was made before) → the copy. The gradient is the
    weight's, as if the cast had happened here."""
    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None

class Linear(nn.Linear):
    """Weights are fp32; they multiply in the dtype of the input (bf16 on a GPU). While training, a
    large matrix may have a faster product (x, W) → x Wᵀ, which GPT.use gives it, and `copy` may be
    the weight in the dtype of its factors, which GPT.cast_weights makes once for many calls."""
    product = None
    factors = None
    copy = None

    def cast_weight(self, dtype):
        """The weight in this dtype. A copy is of one training step, so nothing else reads it."""
        if self.copy is None or not (self.training and torch.is_grad_enabled()):
            return cast(self.weight, dtype)
        return CastBefore.apply(self.weight, self.copy)

    def forward(self, x):
        weight = self.cast_weight(x.dtype)
        bias = cast(self.bias, x.dtype)
        if self.product is None or not self.training:
            return F.linear(x, weight, bias)
        y = self.product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

def rms_norm(x, weight=None):
    # one epsilon for every dtype, so that bf16 and fp32 models compute the same function
    return F.rms_norm(x, x.shape[-1:], weight, eps=torch.finfo(torch.float32).eps)

class Norm(nn.Module):
    """GPT-2's LayerNorm, or RMSNorm, without parameters unless its letter is in norm_scales."""
    def __init__(self, config, letter):
        super().__init__()
        self.is_rms = config.rms_norm
        self.weight = self.bias = None
        if not self.is_rms or letter in config.norm_scales:
            self.weight = nn.Parameter(torch.empty(config.n_embd))
        if not self.is_rms and config.bias:
            self.bias = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x):
        weight = cast(self.weight, x.dtype)
        if self.is_rms:
            return rms_norm(x, weight)
        bias = cast(self.bias, x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)

def rotary_table(config, base=100_000):
    """cos and sin of RoPE's angles, each (block_size, 1, HS/2)."""
    HS = config.n_embd // config.n_head
    inv_freq = base ** (-torch.arange(0, HS, 2, dtype=torch.float32) / HS)
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None, None] * inv_freq
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotates channel pairs (i, i + HS/2) of x (B, T, NH, HS) by angles (B or 1, T, 1, HS/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)

def visible(t, s, window):
    """True where a query at position t sees a key at position s."""
    return (s <= t) & (t - s <= window)

def sdpa(q, k, v, window, scale, mask=None, dropout=0.0):
    """PyTorch's causal attention, which runs everywhere; the faster kernels are in find_kernel.

    q, k, v (B, T, NH, HS) → (B, T, NH, HS). A query sees itself and `window` positions before it.
    With a cache, k and v are (B, S, NH, HS), and it gives the mask (B, 1, T, S)."""
    q = q.transpose(1, 2)                                                   # (B, NH, T, HS)
    k = k.transpose(1, 2)                                                   # (B, NH, S, HS)
    v = v.transpose(1, 2)
    if mask is None and window < q.shape[2] - 1:
        s = torch.arange(q.shape[2], device=q.device)
        mask = visible(s[:, None], s, window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       scale=scale, dropout_p=dropout)
    return y.transpose(1, 2)

def take(x, last):
    """x (B, T, …), last (B,) or (B, N) → (B, 1 or N, …): these positions of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], last.view(len(x), -1)]

class Attention(nn.Module):
    """x (B, T, C) → (B, T, C): each position averages the values of the positions that it sees.
    With `last`, only those positions do, and the result is (B, N, C)."""
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.layer = layer
        self.window = config.window(layer)
        self.kernel = sdpa              # GPT.use replaces it by a faster one
        self.c_attn = Linear(C, 3 * C, bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        if config.has_value_embed(layer):
            self.value_gate = Linear(min(12, C), config.n_head, bias=False)

    def forward(self, x, pos, rotary, value_embed, cache, last=None):
        B, T, C = x.shape
        NH = self.config.n_head
        HS = C // NH
        q, k, v = self.c_attn(x).view(B, T, 3, NH, HS).unbind(2)           # each (B, T, NH, HS)
        if value_embed is not None:     # v += 3 σ(W x[:12]) E[token], one gate per head
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :self.value_gate.in_features]))
            v = v + gate[..., None] * value_embed.view(B, T, NH, HS)
        if rotary is not None:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)
        scale = HS ** -0.5
        if self.config.qk_norm:         # the factors of 1.2 make attention a little sharper
            q = rms_norm(q)
            k = rms_norm(k)
            scale = 1.2 ** 2 * scale
        if cache is not None:
            k, v, mask = cache.append(self.layer, k, v, pos, self.window)
            if last is not None:
                q = take(q, last)
                if mask is None:
                    query = take(pos, last)[:, None, :, None]               # (B, 1, N, 1)
                    mask = visible(query, torch.arange(k.shape[1], device=k.device), self.window)
                else:
                    mask = take(mask[:, 0], last)[:, None]                  # (B, 1, N, S)
            y = cache.attention(q, k, v, self.window, scale, mask)
        elif self.training and self.config.dropout:
            y = sdpa(q, k, v, self.window, scale, dropout=self.config.dropout)
        else:
            y = self.kernel(q, k, v, self.window, scale)
        return self.c_proj(y.flatten(2))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.relu2 = config.relu2
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        h = self.c_fc(x)                                                    # (B, T, 4C)
        if not self.relu2:
            return self.c_proj(F.gelu(h, approximate="tanh"))
        h = F.relu(h)
        return self.c_proj(h * h)       # on a CPU twice as fast as h.square(), with its gradient

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = Norm(config, "a")
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config, "m")
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, pos, rotary, value_embed, cache, last=None):
        y = self.attn(self.ln_1(x), pos, rotary, value_embed, cache, last)
        if last is not None:
            x = take(x, last)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.ln_2(x)))

def run_layer(block, scalars, table, x, x0, idx, pos, rotary, cache, last):
    """A block, and what modern parts add before it: scalars, the shares of x and of x0; table, the
    embedding of the token that the values get."""
    if scalars is not None:
        share, share0 = scalars
        x = (share * x + share0 * x0).to(x.dtype)
    value_embed = None
    if table is not None:
        value_embed = table(idx).to(x.dtype)
    return block(x, pos, rotary, value_embed, cache, last)

class GPT(nn.Module):
    """model(idx) → logits (B, T, V); model(idx, targets) → mean loss in nats per token.

    idx, targets: int64 (B, T), ids below vocab_size; targets of -1 are left out of the mean.
    reduction="none" returns each token's loss (B, T). With a cache, idx continues its rows."""
    model_types = ("gpt2", "deepdive")      # in config.json: without and with modern parts
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.get_default_dtype()
        self.loss_precision = None      # of the head's matmuls while training; use() sets it
        V = config.padded_vocab
        C = config.n_embd
        L = config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.rope:
            cos, sin = rotary_table(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, C)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(L))
        self.ln_f = Norm(config, "f")
        self.lm_head = Linear(C, V, bias=False)     # tied below, after it was initialised
        if config.value_embeds:
            self.value_embeds = nn.ModuleDict()
            for layer in filter(config.has_value_embed, range(L)):
                self.value_embeds[str(layer)] = nn.Embedding(V, C)
        if config.residual_scalars:
            self.resid_scalars = nn.Parameter(torch.empty(L))
            self.x0_scalars = nn.Parameter(torch.empty(L))
        if config.backout:
            self.backout_scalar = nn.Parameter(torch.empty(1))
        with torch.no_grad():
            for name, p in self.named_parameters():
                self.init_parameter(name, p)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

    def init_parameter(self, name, p):
        """GPT-2: N(0, 0.02²), and residual projections divided by √(2L). Modern: residual
        projections are 0, so that each block begins as the identity, and the other matrices are
        uniform with standard deviation 1/√C."""
        L, V, C = self.config.n_layer, self.config.vocab_size, self.config.n_embd
        if name == "resid_scalars":
            p.copy_(torch.linspace(1.15, 1.05, L))
        elif name == "x0_scalars":
            p.copy_(torch.linspace(0.20, 0.05, L))
        elif name == "backout_scalar":
            p.fill_(0.2)
        elif name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1:               # a norm's weight
            p.fill_(1.0)
        elif not self.config.rms_norm:
            p.normal_(0.0, 0.02 / math.sqrt(2 * L) if name.endswith("c_proj.weight") else 0.02)
        elif name.endswith("c_proj.weight"):
            p.zero_()
        elif name == "lm_head.weight" or name == "wte.weight" and self.config.tied_head:
            p.normal_(0.0, 0.001)
        elif name == "wte.weight":
            p.normal_(0.0, 0.8)
        elif "value_gate" in name:
            p.uniform_(0.0, 0.02)
        else:
            bound = math.sqrt(3 / C) * (0.4 if "c_fc" in name else 1.0)
            p.uniform_(-bound, bound)
        if name.startswith(VOCABULARY):
            p[V:] = 0.0                 # the padding rows are never a token

    def hidden(self, idx, cache=None, last=None, run_layer=run_layer):
        """idx (B, T) → what the head reads, (B, T, C) after the last norm. last (B,) or (B, N):
        these positions alone are read, (B, 1 or N, C); it needs a cache. For the others the last
        layer then stops at their keys and values, and a prompt costs most of a layer less.
        run_layer: a trainer may bring its own, which computes the same."""
        config = self.config
        T = idx.shape[1]
        pos = torch.arange(T, device=idx.device)[None]                               # (1, T)
        if cache is not None:
            pos = pos + cache.pos.view(len(idx), -1)                                 # (B, T)
        longest = T if cache is None else cache.used + T
        assert longest <= config.block_size, (longest, config.block_size)
        x = self.wte(idx).to(self.compute_dtype)                                     # (B, T, C)
        rotary = None
        if config.rope:
            rotary = self.rope_cos[pos], self.rope_sin[pos]                 # (B or 1, T, 1, HS/2)
        else:
            x = x + self.wpe(pos).to(x.dtype)
        if config.rms_norm:
            x = rms_norm(x)
        x = x0 = self.dropout(x)        # residual_scalars add a share of x0 before each block
        for layer, block in enumerate(self.h):
            scalars = table = None
            if config.residual_scalars:
                scalars = self.resid_scalars[layer], self.x0_scalars[layer]
            if config.has_value_embed(layer):
                table = self.value_embeds[str(layer)]
            only = last if layer == config.n_layer - 1 else None
            x = run_layer(block, scalars, table, x, x0, idx, pos, rotary, cache, only)
            if layer == config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        if last is not None and middle is not x:    # else the last layer is the middle one
            middle = take(middle, last)
        if config.backout:
            x = x - self.backout_scalar.to(x.dtype) * middle
        return self.ln_f(x)

    def logits(self, x):
        """x (…, C) → fp32 logits (…, V), without the padding rows."""
        z = self.lm_head(x)[..., :self.config.vocab_size].float()
        s = self.config.softcap
        return s * torch.tanh(z / s) if s else z

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        x = self.hidden(idx, cache)
        return self.logits(x) if targets is None else self.loss(x, targets, reduction)

    def loss(self, x, targets, reduction="mean"):
        """The cross-entropy of what hidden() returned. It is a method of its own so that a trainer
        can compile hidden() alone: the loss is a loop over chunks, which compiling would unroll."""
        from loss import CrossEntropy, chunk_rows, loss_and_gradient
        from precision import matmul_precision
        x, flat = x.flatten(0, 1), targets.flatten()                        # (B·T, C), (B·T,)
        if reduction == "mean":
            chunk_loss = compiled(loss_and_gradient, x.device.type)
            with matmul_precision(self.loss_precision):
                W = self.lm_head.cast_weight(x.dtype).detach()
                return CrossEntropy.apply(x, self.lm_head.weight, W, flat, self.config, chunk_loss)
        size = chunk_rows(x, self.config.padded_vocab)
        losses = [F.cross_entropy(self.logits(part), target, ignore_index=-1, reduction="none")
                  for part, target in zip(x.split(size), flat.split(size))]
        return torch.cat(losses).view_as(targets)

    def num_params(self):
        """Parameters in a checkpoint: a tied head counts once, padding rows do not count."""
        return sum(t.numel() for _, t in file_tensors(self))

    def matmul_params(self):
        """Weights that multiply every token: the blocks' matrices and the head."""
        blocks = sum(p.numel() for p in self.h.parameters() if p.ndim == 2)
        return blocks + self.config.vocab_size * self.config.n_embd

    def flops_per_token(self, T=None):
        """FLOP of forward and backward, as PaLM counts them (arXiv 2204.02311, B): 6 per weight and
        12·C per key in reach, for rows of T tokens (default: block_size)."""
        config = self.config
        T = T or config.block_size
        keys = sum(min(config.window(layer), T) for layer in range(config.n_layer))
        return 6 * self.matmul_params() + 12 * config.n_embd * keys

    def use(self, device, fp8=False, bf16=None):
        """Moves the model to a device; on a GPU with bf16 it computes in bf16. Weights stay fp32.
        While training, the blocks' matrices of at least 128 x 128 multiply in 8 bits if fp8, and on
        a CPU they and the loss multiply in bf16. bf16: None means where it is faster; False: never.
        """
        from precision import bf16_product, find_bf16, find_product
        device = str(device)
        if bf16 is None:
            bf16, _ = find_bf16(device)
        self.compute_dtype = torch.get_default_dtype()
        kernel = sdpa
        if bf16 and "cuda" in device:
            self.compute_dtype = torch.bfloat16
            kernel, _ = find_kernel(device)
        self.loss_precision = None
        if bf16 and "cuda" not in device and self.config.n_embd >= 128:
            self.loss_precision = "medium"
        product = find_product(device, bf16, fp8)
        for module in self.h.modules():
            if isinstance(module, Attention):
                module.kernel = kernel
            elif isinstance(module, Linear) and min(module.weight.shape) >= 128:
                module.product = product
        for module in self.modules():
            if isinstance(module, Linear):
                module.copy = None
                module.factors = self.compute_dtype
                if module.product is bf16_product and self.compute_dtype == torch.float32:
                    module.factors = torch.bfloat16
        return self.to(device)

    @torch.no_grad()
    def cast_weights(self, part=None):
        """Copies the matrices in the dtype they multiply in, for the micro-steps of one training
        step, so that they are not cast in each. Call it again when the weights have changed. part:
        a module of the model; default: all of it."""
        for module in (part or self).modules():
            if isinstance(module, Linear) and module.factors not in (None, module.weight.dtype):
                if module.copy is None:
                    module.copy = torch.empty_like(module.weight, dtype=module.factors)
                module.copy.copy_(module.weight)

    def for_inference(self):
        """Ends training: keeps the matrices in the dtype they are multiplied in. On a GPU that
        halves the bytes, and with them the time, that each new token takes to read the weights. On
        a CPU the head is stored by columns, which one row reads faster; wte keeps its rows."""
        for p in self.parameters():
            p.requires_grad_(False)
            if p.ndim == 2:
                p.data = p.data.to(self.compute_dtype)
        head = self.lm_head.weight
        if head.device.type == "cpu":
            self.lm_head.weight = nn.Parameter(head.T.contiguous().T, requires_grad=False)
        return self

# ---- The cache of generation ---------------------------------------------------------------------

class KVCache:
    """Keys and values (L, B, max_tokens, NH, HS) of the tokens so far, one row per sequence. `pos`
    (B,) counts the tokens of each row; no query sees the entries after them."""
    attention = staticmethod(sdpa)      # another cache may know a faster one
    def __init__(self, config, batch_size, max_tokens, device="cpu", dtype=torch.float32):
        HS = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, max_tokens, config.n_head, HS)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.used = 0       # length of the longest row, as an int: reading pos would wait for a GPU
        self.masks = {}     # {window: mask} of the current step

    def rows(self, index):
        """A cache of these rows, for instance [0] * n: one prefill shared by n samples."""
        new = copy(self)
        new.masks = {}
        new.k = self.k[:, index]
        new.v = self.v[:, index]
        new.pos = self.pos[index]
        return new

    def append(self, layer, k, v, pos, window):
        """Writes k, v (B, T, NH, HS) at pos (B, T), after each row's last token → all keys and
        values up to the longest row's end, (B, S, NH, HS), and the mask (B, 1, T, S) of those that
        each token sees; None, for causal, if the cache was empty."""
        T = k.shape[1]
        if not self.used:
            self.k[layer, :, :T] = k
            self.v[layer, :, :T] = v
            return k, v, None
        at = pos[:, :, None, None].expand_as(k)                             # (B, T, NH, HS)
        self.k[layer].scatter_(1, at, k)
        self.v[layer].scatter_(1, at, v)
        S = self.used + T
        if window not in self.masks:    # layers with the same window share it
            query = pos[:, None, :, None]                                   # (B, 1, T, 1)
            self.masks[window] = visible(query, torch.arange(S, device=k.device), window)
        return self.k[layer, :, :S], self.v[layer, :, :S], self.masks[window]

    def advance(self, T):
        """Call it when every layer has appended its T tokens."""
        self.pos = self.pos + T
        self.used += T
        self.masks = {}

# ---- Checkpoints: <run>/config.json + model.safetensors, named as HF's GPT-2 names them ----------

FORMAT_VERSION = 1
LIMITS = dict(block_size=(1, 2 ** 20), vocab_size=(1, 2 ** 22), n_layer=(1, 1000),
              n_head=(1, 2 ** 12), n_embd=(1, 2 ** 16), dropout=(0, 0.99), softcap=(0, 1e6))
HF_VALUES = {       # fields of HF's GPT-2 that change what it computes, and what they are here
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False]}
VOCABULARY = ("wte", "lm_head", "value_embeds")                         # these have a row per token
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")          # HF keeps these (in, out)

def check_config(config):
    """Ends the program with a line that names the first field whose value cannot be used."""
    for field in fields(config):
        value = getattr(config, field.name)
        least, most = LIMITS.get(field.name, (0, 0))
        is_number = type(value) in (int, field.type)
        if field.name in LIMITS and not (is_number and least <= value <= most):
            raise SystemExit(f"{field.name} must be from {least} to {most}, got {value}")
        if field.type is bool and not isinstance(value, bool):
            raise SystemExit(f"{field.name} must be true or false, got {value}")
    if not re.fullmatch("[SL]+", str(config.windows)):
        raise SystemExit(f"windows must be letters S and L, got {config.windows}")
    if not re.fullmatch("[amf]*", str(config.norm_scales)):
        raise SystemExit(f"norm_scales must be letters a, m and f, got {config.norm_scales}")
    HS, rest = divmod(config.n_embd, config.n_head)
    if rest:
        raise SystemExit(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}; all "
                         f"heads are equally wide; try n_embd={max(1, HS) * config.n_head}")
    if config.rope and HS % 2:
        raise SystemExit(f"rope needs heads with an even number of channels, got {HS}")

def file_tensor(name, p, vocab_size):
    """A parameter as it is in the file: HF's name, matrices (in, out), no padding rows."""
    if name.startswith(VOCABULARY):
        p = p[:vocab_size]
    elif name.endswith(TRANSPOSED):
        p = p.T
    if not name.startswith(("lm_head", "score")):       # score: the head of a reward model
        name = "transformer." + name
    return name, p.detach()

def file_tensors(model):
    V = model.config.vocab_size     # a tied head is in no file, though for_inference copies it
    return [file_tensor(name, p, V) for name, p in model.named_parameters()
            if name != "lm_head.weight" or not model.config.tied_head]

def put_in_place(part, path):
    """Gives a finished file its name after its bytes are on the disk, so that there is never half
    a file under that name, neither for a reader nor after a power cut."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)

def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1))
    put_in_place(f"{path}.part", path)

def read_json(path, advice):
    """The object in a JSON file. Where there is none, a line ends the program, with `advice`."""
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("this is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: {error}; {advice}") from None
    return value

def save_weights(path, model):
    tensors = {}
    for name, tensor in file_tensors(model):
        if not tensor.isfinite().all():
            raise SystemExit(f"{path}: {name} is not finite, so it is not saved; what was saved "
                             "before is kept; try a lower --lr in another --out")
        tensors[name] = tensor.cpu().contiguous()
    save_file(tensors, f"{path}.part", metadata={"format": "pt"})
    put_in_place(f"{path}.part", path)

def read_tensors(path):
    """The tensors of a model.safetensors {name without "transformer.": tensor}, or those of its
    parts in the same folder, because transformers splits models over 5 GB."""
    parts = [Path(path)]
    if not parts[0].exists():
        parts = sorted(parts[0].parent.glob("model-*-of-*.safetensors")) or parts
    tensors = {}
    for part in parts:
        try:
            if not part.is_file():
                raise OSError("there is no such file")
            tensors |= load_file(part)
        except (SafetensorError, OSError) as error:
            raise SystemExit(f"{part}: {error}; weights must be one whole safetensors file; copy "
                             "it again or train the model again") from None
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

def find_tensor(tensors, key, shape, path):
    """The tensor of this name, if it has this shape and is fit to be a weight."""
    tensor = tensors.get(key.removeprefix("transformer."))
    found = "missing" if tensor is None else tuple(tensor.shape)
    if found != tuple(shape):
        raise SystemExit(f"{path}: {key} is {found}; config.json asks for {tuple(shape)}; take "
                         "both files from one checkpoint")
    if not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise SystemExit(f"{path}: {key} has values that are not finite floating-point numbers; "
                         "the file is damaged; copy it again or train the model again")
    return tensor

@torch.no_grad()
def load_weights(path, model, tensors, file_vocab=None):
    """Fills the model with the tensors that read_tensors(path) returned. file_vocab: tokens in the
    file, if the model has more; the new ones begin at the mean of the old."""
    V = model.config.vocab_size
    for name, p in model.named_parameters():
        key, ours = file_tensor(name, p, V)
        shape = file_tensor(name, p, file_vocab or V)[1].shape
        tensor = find_tensor(tensors, key, shape, path)
        ours[:len(tensor)] = tensor
        if len(ours) > len(tensor):
            ours[len(tensor):] = tensor.float().mean(0)

def save_checkpoint(run, model, tokenizer=None, stage="pretrain", step=0, **extra):
    """Writes <run>/model.safetensors, config.json and the tokenizer; `extra` joins the metadata."""
    config = model.config
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    save_weights(run / "model.safetensors", model)
    if tokenizer is not None:
        tokenizer.save(run)
    # transformers must not open a model with modern parts: it would leave them out
    plain = GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head,
                      config.n_embd, config.dropout, tied_head=config.tied_head)
    write_json(run / "config.json", dict(
        model_type=model.model_types[0 if config == plain else -1], vocab_size=config.vocab_size,
        architectures=["GPT2LMHeadModel"], n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, n_positions=config.block_size, activation_function="gelu_new",
        layer_norm_epsilon=1e-5, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        resid_pdrop=config.dropout, tie_word_embeddings=config.tied_head,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), getattr(tokenizer, "eot", 50256)),
        deepdive=dict(extra, format_version=FORMAT_VERSION, stage=stage, step=step,
                      model=asdict(config))))

def config_from_hf(described):
    """HF's config.json of a GPT-2 → GPTConfig, with dropout 0."""
    sizes = {name: described.get(name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config = GPTConfig(**sizes, block_size=described.get("n_positions"),
                       tied_head=described.get("tie_word_embeddings", True))
    for name, values in (HF_VALUES | {"n_inner": [None, 4 * config.n_embd]}).items():
        value = described.get(name, values[0])
        if value not in values:
            raise SystemExit(f"{name} is {value}, but here it is always {values[-1]}")
    return config

def read_config(path, model_types=GPT.model_types):
    """config.json, ours or HF's → (GPTConfig, metadata)."""
    described = read_json(path, "a model is a folder with config.json and model.safetensors; train "
                          "one, or name another with --model")
    meta = described.get("deepdive", dict(format_version=FORMAT_VERSION, stage="pretrain", step=0))
    kind = described.get("model_type")
    try:
        if kind not in model_types or meta.get("format_version") != FORMAT_VERSION:
            raise SystemExit(f"this is a {kind} model of format {meta.get('format_version')}; only "
                             f"{' and '.join(model_types)} of format {FORMAT_VERSION} can be read")
        config = GPTConfig(**meta["model"]) if "model" in meta else config_from_hf(described)
    except (SystemExit, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: {error}; train this model again, or name another") from None
    return config, meta

def load_checkpoint(run, device="cpu", vocab_size=None, architecture=GPT):
    """A run of ours, or a folder with HF's GPT-2 → (model, meta); meta: run, stage, step, …
    vocab_size: grows the vocabulary to this, for special tokens that the model has never seen."""
    config, meta = read_config(Path(run) / "config.json", architecture.model_types)
    path = Path(run) / "model.safetensors"
    tensors = read_tensors(path)
    find_tensor(tensors, "transformer.wte.weight", (config.vocab_size, config.n_embd), path)
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    if len(layers) != config.n_layer:
        raise SystemExit(f"{path} has {len(layers)} layers; config.json asks for {config.n_layer}; "
                         "take both files from one checkpoint")
    model = architecture(replace(config, vocab_size=max(config.vocab_size, vocab_size or 0)))
    load_weights(path, model, tensors, file_vocab=config.vocab_size)
    return model.use(device), {"run": str(run), **meta}

# ---- Fast attention: kernels (q, k, v, window, scale) → y, all (B, T, NH, HS). Unlike sdpa's mask,
# they skip the keys outside of the window. --------------------------------------------------------

def flash_attention_3(q, k, v, window, scale):
    from flash_attn_interface import flash_attn_func    # Dao-AILab/flash-attention, in hopper/
    y = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(window, 0))
    return y[0] if isinstance(y, tuple) else y

def varlen_attention(q, k, v, window, scale):
    from torch.nn.attention.varlen import varlen_attn   # PyTorch's own FlashAttention
    B, T = q.shape[:2]
    starts = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)      # of the rows
    y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, T, T,
                    scale=scale, window_size=(window, 0))
    return y.view(q.shape)

def first_line(problem):
    """What an error says, short enough for a line of the log."""
    return (str(problem).strip() or repr(problem)).splitlines()[0][:90]

@functools.cache
def find_kernel(device, kernels=(flash_attention_3, varlen_attention)):
    """The first kernel that agrees with sdpa on this device, forward and backward, or sdpa itself;
    and a line for the log that says why."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(3, 2, 256, 2, 128, device=device, generator=generator)
    inputs = inputs.bfloat16().requires_grad_().unbind()

    def outcome(kernel):
        y = kernel(*inputs, window=64, scale=0.1)
        return torch.stack((y, *torch.autograd.grad(y.square().sum(), inputs))).float()

    wanted = outcome(sdpa)
    tried = []
    for kernel in kernels:
        try:
            error = ((outcome(kernel) - wanted).norm() / wanted.norm()).item()
        except Exception as problem:    # whatever is wrong with a kernel, sdpa can replace it
            tried.append(f"{kernel.__name__}: {first_line(problem)}")
            continue
        tried.append(f"{kernel.__name__}: differs from sdpa by {error:.1%}")
        if error < 0.02:                # bf16 rounds to 0.4 %
            return kernel, "; ".join(tried)
    return sdpa, "; ".join([*tried, "sdpa is used"])

# ---- torch.compile -------------------------------------------------------------------------------

@functools.cache
def find_compiler(device):
    """torch.compile where it works, which takes a GPU, Triton and a C compiler; elsewhere a
    function that changes nothing; and a line for the log that says why."""
    if "cuda" not in device:
        return lambda f: f, f"eager: compiling for {device} takes longer than it saves"
    compiler = functools.partial(torch.compile, dynamic=False)
    try:
        compiler(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as problem:        # an old GPU, no Triton, no C compiler: train without
        return lambda f: f, f"eager: torch.compile fails here: {first_line(problem)}"
    return compiler, "torch.compile; TORCH_COMPILE_DISABLE=1 switches it off"

@functools.cache
def compiled(function, device):
    compiler, _ = find_compiler(device)
    return compiler(function)
