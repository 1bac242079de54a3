"""
The Transformer, its cache for generation, and its checkpoints.

GPTConfig.preset("gpt2" … "gpt2-xl") is exactly OpenAI's GPT-2. preset("d12"), preset("d24") … is a
modern recipe in which depth is the only dial. The model comes first; after the checkpoints stand the
fast twins of its slow parts: attention kernels, 8-bit matmuls, the loss in chunks.

    >>> model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    >>> idx = torch.zeros(1, 8, dtype=torch.long)
    >>> model(idx).shape                                   # logits
    torch.Size([1, 8, 65])

Sizes, in every file: B rows, T positions (block_size), C channels (n_embd), V vocabulary,
L layers, NH heads, HS channels a head (C = NH * HS).

Papers: GPT-2 (Radford et al. 2019), RoPE (arXiv 2104.09864), RMSNorm (1910.07467), QK norm
(2010.04245), ReLU² (2109.08668), value residuals (2410.17897), soft-cap (2408.00118),
FlashAttention-3 (2407.08608), FP8 training (2209.05433).
Differs from the papers: value embeddings are looked up by token, not taken from layer 0, and gated.
"""
import functools
import json
import math
import os
import re
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
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
    """fp32 master weights, computed in the dtype of the input (bf16 on a GPU), or in fp8."""
    fp8 = False         # GPT.use sets it

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.fp8 and self.training:
            return Fp8Matmul.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

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

def visible(t, s, window):
    """Which keys at positions s a query at t sees."""
    return (s <= t) & (t - s <= window)

def sdpa(q, k, v, window, scale, mask=None, dropout=0.0):
    """Runs everywhere. A mask is built only where the window is shorter than the text; or a cache
    gives one, (B, 1, T, S), with k and v (B, S, NH, HS)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))                        # (B, NH, T or S, HS)
    causal = mask is None and window >= q.shape[2] - 1
    if mask is None and not causal:
        s = torch.arange(q.shape[2], device=q.device)
        mask = visible(s[:, None], s, window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale,
                                       dropout_p=dropout)
    return y.transpose(1, 2)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, NH = config.n_embd, config.n_head
        self.config, self.layer, self.window = config, layer, config.window(layer)
        self.kernel = sdpa
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
        scale = HS ** -0.5
        if self.config.qk_norm:         # 1.2 each: a little sharper than unit vectors give
            q, k, scale = rms_norm(q), rms_norm(k), 1.2 ** 2 * scale
        dropout = self.training * self.config.dropout
        if cache is not None:
            k, v, mask = cache.append(self.layer, k, v, pos, self.window)
            y = sdpa(q, k, v, self.window, scale, mask)
        elif dropout:
            y = sdpa(q, k, v, self.window, scale, dropout=dropout)
        else:
            y = self.kernel(q, k, v, self.window, scale)
        return self.c_proj(y.reshape(B, T, C))

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
        elif name in ("wte.weight", "lm_head.weight"):      # tied, it must begin as a head does
            is_head = name == "lm_head.weight" or self.config.tied_head
            p.normal_(0.0, 0.001 if is_head else 0.8)
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
            cache.advance(T)
        if config.backout:
            x = x - self.backout_scalar.to(x.dtype) * middle
        return self.ln_f(x)

    def logits(self, x):
        """(…, C) → fp32 logits (…, V). The padding rows are cut: neither hit nor trained."""
        z, s = self.lm_head(x)[..., :self.config.vocab_size].float(), self.config.softcap
        return s * torch.tanh(z / s) if s else z

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        x = self.hidden(idx, cache)
        return self.logits(x) if targets is None else self.loss(x, targets, reduction)

    def loss(self, x, targets, reduction="mean"):
        """Of what hidden() gave. (Only hidden() is worth compiling: the loss is a loop.)"""
        x, flat = x.flatten(0, 1), targets.flatten()
        if reduction == "mean":
            return CrossEntropy.apply(x, self.lm_head.weight, flat, self.config)
        size = chunk_rows(x, self.config.vocab_size)
        losses = [F.cross_entropy(self.logits(part), target, ignore_index=-1, reduction="none")
                  for part, target in zip(x.split(size), flat.split(size))]
        return torch.cat(losses).view_as(targets)

    def num_params(self):
        return sum(t.numel() for _, t in file_tensors(self))

    def matmul_params(self):
        """Weights that multiply every token: the blocks' matrices and the head."""
        blocks = sum(p.numel() for p in self.h.parameters() if p.ndim == 2)
        return blocks + self.config.vocab_size * self.config.n_embd

    def flops_per_token(self, T=None):
        """Both passes, as in PaLM (arXiv 2204.02311, B): 6 a weight, 12·C a key in reach, in rows
        of T tokens (default: block_size)."""
        windows = map(self.config.window, range(self.config.n_layer))
        keys = sum(min(window, T or self.config.block_size) for window in windows)
        return 6 * self.matmul_params() + 12 * self.config.n_embd * keys

    def use(self, device, fp8=False):
        """Moves the model; it computes in bf16 on a GPU that has it. The weights stay fp32.
        fp8: the blocks' matrices of at least 128 x 128 multiply in 8 bits while training."""
        bf16 = "cuda" in str(device) and torch.cuda.is_bf16_supported()
        self.compute_dtype = torch.bfloat16 if bf16 else torch.get_default_dtype()
        self.kernel, self.kernel_why = find_kernel(device) if bf16 else (sdpa, "sdpa: no bf16 here")
        for module in self.h.modules():
            if isinstance(module, Attention):
                module.kernel = self.kernel
            elif isinstance(module, Linear):
                module.fp8 = fp8 and min(module.weight.shape) >= 128
        if fp8:     # torch.compile leaves it as it is: what it makes of the parts is slower
            torch._dynamo.allow_in_graph(Fp8Matmul)
        return self.to(device)

    def for_inference(self):
        """For inference alone: keeps the matrices in the dtype they are multiplied in. On a GPU
        that halves what writing a token reads, and so takes."""
        for p in self.parameters():
            p.requires_grad_(False)
            if p.ndim == 2:
                p.data = p.data.to(self.compute_dtype)
        return self

# ---- The cache of generation ---------------------------------------------------------------------

class KVCache:
    """Keys and values (L, B, NH, max_tokens, HS) of the tokens seen so far, a row a sequence; `pos`
    (B,) counts the tokens of each row, and what lies behind them is never seen."""

    def __init__(self, config, batch_size, max_tokens, device="cpu", dtype=torch.float32):
        HS = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, max_tokens, HS)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        self.pos = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.used = 0       # the longest row, as an integer: no waiting for the GPU to know it
        self.masks = {}     # of this step, by window

    def rows(self, index):
        """A cache of these rows: [0] * n shares one prefill among n samples; also drops rows."""
        new = copy(self)
        new.masks = {}
        new.k, new.v, new.pos = self.k[:, index], self.v[:, index], self.pos[index]
        return new

    def append(self, layer, k, v, pos, window):
        """Writes k, v (B, T, NH, HS) behind each row, where pos (B, T) says. → all keys and values
        up to the longest row's end, and which of them each token sees, (B, 1, T, S); None: those
        before it in its window."""
        T = k.shape[1]
        if not self.used:       # a prefill: what is there is what comes
            self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k.transpose(1, 2), v.transpose(1, 2)
            return k, v, None
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        at = pos[:, None, :, None]
        self.k[layer].scatter_(2, at.expand_as(k), k)
        self.v[layer].scatter_(2, at.expand_as(v), v)
        if window not in self.masks:    # layers share it
            s = torch.arange(self.used + T, device=k.device)
            self.masks[window] = visible(at, s, window)
        k, v = (kept[layer, :, :, :self.used + T].transpose(1, 2) for kept in (self.k, self.v))
        return k, v, self.masks[window]

    def advance(self, T):
        """Every layer has appended its T tokens."""
        self.pos, self.used, self.masks = self.pos + T, self.used + T, {}

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
        embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
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

def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.part", path)

# ---- Fast twins: attention kernels, (q, k, v, window, scale) → y, all (B, T, NH, HS), causal. The
# query at t sees the keys t - window … t; only the first two kernels skip the others. -------------

def flash_attention_3(q, k, v, window, scale):
    from flash_attn_interface import flash_attn_func    # Dao-AILab/flash-attention, in hopper/
    y = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(window, 0))
    return y[0] if isinstance(y, tuple) else y

def varlen_attention(q, k, v, window, scale):
    from torch.nn.attention.varlen import varlen_attn   # PyTorch's own FlashAttention
    B, T = q.shape[:2]
    starts = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(*flat, starts, starts, T, T, scale=scale, window_size=(window, 0))
    return y.view(q.shape)

def first_line(problem):
    return (str(problem).strip() or repr(problem)).splitlines()[0][:90]

@functools.cache
def find_kernel(device, kernels=(flash_attention_3, varlen_attention)):
    """The first of the kernels that gives what sdpa gives, forward and backward, on this device;
    else sdpa. → (kernel, why), the second a line for the log."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(3, 2, 256, 2, 128, device=device, generator=generator)
    inputs = inputs.bfloat16().requires_grad_().unbind()

    def outcome(kernel):
        y = kernel(*inputs, window=64, scale=0.1)
        return torch.stack((y, *torch.autograd.grad(y.square().sum(), inputs))).float()

    wanted, tried = outcome(sdpa), []
    for kernel in kernels:
        try:
            error = ((outcome(kernel) - wanted).norm() / wanted.norm()).item()
        except Exception as problem:    # whatever is wrong with a kernel, training goes on without
            tried.append(f"{kernel.__name__}: {first_line(problem)}")
            continue
        tried.append(f"{kernel.__name__}: differs from sdpa by {error:.1%}")
        if error < 0.02:                # bf16 rounds to 0.4 %
            return kernel, "; ".join(tried)
    return sdpa, "; ".join([*tried, "sdpa it is"])

# ---- Fast twins: 8-bit matmuls -------------------------------------------------------------------

def to_fp8(x, dtype):
    """x / scale in 8 bits, with one scale for the whole tensor: its largest value just fits."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale

def fp8_matmul(a, b, fast_accum=False):
    """a (M, K) @ b (N, K)ᵀ → bf16; a and b are what to_fp8 gave."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=torch.bfloat16,
                            use_fast_accum=fast_accum)

class Fp8Matmul(torch.autograd.Function):
    """y = x Wᵀ    dx = dy W    dW = dyᵀ x, each of 8-bit operands and summed in fp32.

    x (M, K), W (N, K), all of them multiples of 16. e4m3 has 3 bits of mantissa; gradients need the
    range of e5m2. The 8-bit x is what backward keeps, half of bf16's memory.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x8, weight8 = to_fp8(x, torch.float8_e4m3fn), to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        return fp8_matmul(x8, weight8, fast_accum=True).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        dy8, dy_scale = to_fp8(dy, torch.float8_e5m2)
        transposed = weight.t().contiguous(), weight_scale
        dx = fp8_matmul((dy8, dy_scale), transposed)
        dW = fp8_matmul((dy8.t().contiguous(), dy_scale), (x.t().contiguous(), x_scale))
        return dx.to(dy.dtype), dW.to(dy.dtype)

# ---- Fast twins: torch.compile, and the loss in chunks -------------------------------------------

@functools.cache
def find_compiler(device):
    """→ (compile, why): torch.compile where it works, which takes a GPU, Triton and a C compiler;
    else what leaves a function as it is. The second is a line for the log."""
    if "cuda" not in device:
        return (lambda function: function), "eager: on a CPU compiling takes longer than it saves"
    compile = functools.partial(torch.compile, dynamic=False)
    try:
        compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as problem:        # an old GPU, no Triton, no compiler: all go on without
        why = f"eager: torch.compile fails here: {first_line(problem)}"
        return (lambda function: function), why
    return compile, "torch.compile; TORCH_COMPILE_DISABLE=1 leaves all eager"

@functools.cache
def compiled(function, device):
    return find_compiler(device)[0](function)

CHUNK_LOGITS = {"cuda": 2 ** 27, "cpu": 2 ** 20}    # bf16: 256 MB; fp32: 4 MB, a CPU's cache

def chunk_rows(x, V):
    """Tokens whose logits are held at a time; with fewer than 256, matmuls would wait for W."""
    return max(256, CHUNK_LOGITS[x.device.type] // V)

def loss_and_gradient(z, target, share, s):
    """Of one chunk: head outputs z (n, V), targets (n, 1), the share of each in the mean (n, 1),
    soft-cap s → (loss, dz). z is overwritten. On a GPU it is compiled into a pass or two over z."""
    t = z.float()
    y = t.div_(s).tanh_() * s if s else t
    y_target, top = y.gather(1, target), y.amax(-1, keepdim=True)
    dy = y.sub_(top).exp_()             # the loss needs its sum, the gradient all of it
    sum_exp = dy.sum(-1, keepdim=True)
    loss = ((top + sum_exp.log() - y_target) * share).sum()
    dy_target = ((y_target - top).exp() / sum_exp - 1) * share
    dy.mul_(share / sum_exp)
    if s:
        dy.addcmul_(dy, t.square_(), value=-1)
        dy_target = dy_target * (1 - (y_target / s).square())
    return loss, dy.to(z.dtype).scatter_(1, target, dy_target.to(z.dtype))

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
        share = (targets >= 0) / (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        size = chunk_rows(x, V)
        of_chunk = compiled(loss_and_gradient, x.device.type)
        tensors = x, dx, targets.clamp(min=0)[:, None], share[:, None]
        buffer = x.new_empty(min(size, len(x)), V)
        for x_part, dx_part, target, share_part in zip(*(t.split(size) for t in tensors)):
            z = torch.mm(x_part, W.T, out=buffer[:len(x_part)])
            loss, dz = of_chunk(z, target, share_part, s)
            total += loss
            torch.mm(dz, W, out=dx_part)
            if dz.dtype == dW.dtype:
                dW[:V].addmm_(dz.T, x_part)
            else:
                dW[:V] += dz.T @ x_part
        ctx.save_for_backward(dx, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return dx * grad, dW * grad, None, None
