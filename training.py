"""
What every training loop needs beside the model: ranks, the optimizer and its recipe, the run log,
the saved state from which --resume continues, and the lines that all loops repeat.

    ranks = init_ranks()
    optimizer = make_optimizer(model, ranks)    # GPT-2's AdamW, or Muon and Adam for dN
    model(x, y).backward()
    norm = optimizer.average_grads()            # over all ranks
    optimizer.step(lr_scale=0.5)
    log(step, loss=loss, norm=norm)             # to stdout and <run>/log.jsonl
    save_run(run, ranks, optimizer, model, tokenizer, "pretrain", step=step, settings=settings)

Papers: AdamW (arXiv 1711.05101), Muon (kellerjordan.github.io/posts/muon), Polar Express
(2505.16932), NorMuon (2510.05491), cautious weight decay (2510.12402), ZeRO (1910.02054).
Differs from the papers: a rank owns whole parameters, not slices of them, because Muon needs whole
matrices; the ranks send each other the same number of bytes.
"""
import atexit
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.adamw import adamw

from model import (VOCABULARY, compiled, load_weights, put_in_place, read_json, read_tensors,
                   save_checkpoint, save_weights, write_json)

# ---- Ranks: a single process is rank 0 of 1, and no code below asks which case it is -------------

@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; is_main: it prints and writes files."""
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    is_main: bool = True

    @property
    def fp64_device(self):
        """Where sums are added up: on the CPU, if the device is a GPU of Apple, without fp64."""
        return self.device if "cuda" in self.device else "cpu"

    @property
    def runs_ahead(self):
        """Whether Python hands out work faster than the device does it, so that to read a number
        would keep both waiting. A CPU has done its work when Python goes on."""
        return "cuda" in self.device

    def sum(self, *values):
        """Sums each number over all ranks, in fp64. All ranks wait here for each other."""
        values = torch.tensor(values, dtype=torch.float64, device=self.fp64_device)
        return self.sum_tensor(values).tolist()

    def sum_tensor(self, values):
        """Sums a tensor over all ranks, in place. On a GPU, Python does not wait for the result."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

def init_ranks(device="auto"):
    """Joins the ranks that torchrun started, if it did. device: auto, cpu, cuda or mps, Apple's
    GPUs; auto means a CUDA GPU or the CPU."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    has_cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise SystemExit(f"--device must be auto, cpu, cuda or mps, got {device}")
    if device == "cuda" and not has_cuda:
        raise SystemExit("--device cuda: PyTorch finds no CUDA GPU here; install its driver and a "
                         "CUDA build of torch, or try --device cpu")
    if device == "mps":
        check_mps()
        if world_size > 1:
            raise SystemExit("--device mps is one GPU, but torchrun started "
                             f"{world_size} processes; start one, or try --device cpu")
        return Ranks(device="mps")
    if has_cuda and device != "cpu":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        backend = "nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = "cpu"
        backend = "gloo"
    if world_size > 1:
        dist.init_process_group(backend)
        atexit.register(dist.destroy_process_group)
    return Ranks(rank, world_size, device, is_main=rank == 0)

def check_mps():
    """SystemExit if PyTorch finds no GPU of Apple."""
    if not torch.backends.mps.is_available():
        raise SystemExit("--device mps: PyTorch finds no Apple GPU here, which takes macOS 14 on "
                         "Apple silicon; try --device cpu")

# ---- Muon: a matrix is updated by polar(momentum), all of whose singular values are near 1 -------

POLAR_EXPRESS = (  # five quintics that push every singular value towards 1 (arXiv 2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def polar(G):
    """About U Vᵀ for G = U S Vᵀ; G (…, m, n). On a GPU it computes in bf16, which is enough."""
    X = G.bfloat16() if G.is_cuda else G
    X = X / (1.01 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)      # singular values up to 1
    tall = X.shape[-2] > X.shape[-1]
    if tall:                                                        # the smaller X Xᵀ is cheaper
        X = X.mT
    for a, b, c in POLAR_EXPRESS:       # s → a s + b s³ + c s⁵ for each singular value s
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    if tall:
        X = X.mT
    return X.to(G.dtype)

def short_axis(W):
    """The axis of the shorter side of W (…, m, n), of the columns if both are equal."""
    return -1 if W.shape[-2] >= W.shape[-1] else -2

def muon(W, grad, buffer, variance, lr, decay, momentum, skip=None, beta2=0.9):
    """One update of each matrix in W (K, m, n) → the next W, buffer and variance; the same ones
    again if skip, a 0-D tensor, is true.

    polar() of the Nesterov momentum, then NorMuon: the rows along the longer side get the same mean
    square, and the norm is kept. Decay is cautious: it acts only where the update shrinks W too.
    buffer (K, m, n); variance (K, m, 1), or (K, 1, n) if m < n. On a GPU this is compiled.

    Differs from nanochat's Muon: neither MuonEq, which equalises the rows before polar(), nor
    Muon+, which sets the norm to √min(m, n) after it. On a d4 neither lowered val bits per byte
    (bench/RESULTS.md). Muon+ enlarges the update of a gradient of low rank.
    """
    before = W, buffer, variance
    buffer = buffer.lerp(grad, 1 - momentum)
    U = polar(grad.lerp(buffer, momentum))
    variance = variance.lerp(U.square().mean(short_axis(W), keepdim=True), 1 - beta2)
    scaled = U * variance.clamp_min(1e-10).rsqrt()
    U = F.normalize(scaled, dim=(-2, -1)) * U.norm(dim=(-2, -1), keepdim=True)
    lr = lr * max(1, W.shape[-2] / W.shape[-1]) ** 0.5
    after = W - lr * (U + decay * W * (U * W >= 0)), buffer, variance
    if skip is None:
        return after
    return tuple(torch.where(skip, old, new) for old, new in zip(before, after))

def as_matrices(W):
    """A view (K, m, n): c_attn.weight (3C, C) is three matrices, q, k and v; any other is one."""
    K = 3 if W.shape[0] == 3 * W.shape[1] else 1
    return W.view(K, W.shape[0] // K, W.shape[1])

# ---- The optimizer: AdamW and Muon on several ranks ----------------------------------------------

class Optimizer:
    """AdamW and Muon with ZeRO-1: each parameter has one rank that keeps its state and updates it.

    groups: dicts of `kind` ("adamw" or "muon"), `params` {name: parameter}, `lr`, `weight_decay`,
    and for AdamW `betas`, `eps`. After backward on every rank: average_grads(), then step(…).
    """

    def __init__(self, groups, ranks=Ranks()):
        self.groups = groups
        self.ranks = ranks
        self.steps = 0
        self.state = {}         # {"parameter.key": tensor} of the parameters this rank owns
        self.params = {name: p for group in groups for name, p in group["params"].items()}
        by_size = sorted(self.params, key=lambda name: (-self.params[name].numel(), name))
        self.owner = {name: i % ranks.world_size for i, name in enumerate(by_size)}
        from exchange import Exchange
        self.exchange = Exchange(self.params, self.owner, ranks)

    def is_mine(self, name):
        """Whether this rank owns a parameter. Large ones are dealt out first, so that all ranks
        have about the same work."""
        return self.owner[name] == self.ranks.rank

    def slot(self, name, key, like):
        """A tensor of the state, zeros at first."""
        if f"{name}.{key}" not in self.state:
            self.state[f"{name}.{key}"] = torch.zeros_like(like)
        return self.state[f"{name}.{key}"]

    def wanted_state(self):
        """{"parameter.key": a tensor of this shape and dtype}: the state that this rank keeps."""
        wanted = {}
        for group in self.groups:
            for name in filter(self.is_mine, group["params"]):
                W = self.params[name]
                like = {"exp_avg": W, "exp_avg_sq": W}
                if group["kind"] == "muon":
                    W = as_matrices(W)
                    like = {"momentum": W, "variance": W.narrow(short_axis(W), 0, 1)}
                wanted |= {f"{name}.{key}": tensor for key, tensor in like.items()}
        return wanted

    def missing_state(self):
        """The first tensor of this rank's state that is not there or not fit to continue from, or
        None. It would begin at 0, and the resumed run would differ from the one it continues."""
        if self.steps == 0:
            return None
        for name, tensor in self.wanted_state().items():
            found = self.state.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                return name
            if not found.isfinite().all():
                return name
        return None

    def zero_grad(self):
        """Frees the gradients; the next backward makes new ones."""
        for p in self.params.values():
            p.grad = None

    def average_grads(self):
        """Averages each gradient over the ranks, onto its owner. Returns the norm of all."""
        square = self.reduce_grads().item()
        return math.sqrt(self.ranks.sum(square)[0])

    @torch.no_grad()
    def reduce_grads(self):
        """Averages each gradient over the ranks, onto its owner. Returns the sum of the squares of
        those that this rank owns, a tensor, for which Python has not waited."""
        for p in self.params.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.exchange.collect_gradients()
        mine = [self.params[name].grad for name in filter(self.is_mine, self.params)]
        if not mine:
            return torch.zeros((), dtype=torch.float64, device=self.ranks.fp64_device)
        if self.ranks.world_size > 1:
            torch._foreach_div_(mine, self.ranks.world_size)
        norms = torch.stack(torch._foreach_norm(mine))
        if not self.ranks.runs_ahead:
            norms = norms.cpu()
        return norms.double().square().sum()

    @torch.no_grad()
    def step(self, lr_scale=1.0, grad_scale=1.0, momentum=0.95, decay_scale=1.0, skip=None,
             wait=True):
        """Updates all parameters. The scales multiply each group's lr and weight_decay; grad_scale
        clips the gradients.

        grad_scale may be a 0-D tensor. skip, a 0-D tensor of bool, leaves all as it was if it is
        true. A GPU decides by itself, so that Python does not wait; elsewhere Python decides.
        wait=False: the parameters may still travel; exchange.wait_for() says when they are there.
        """
        if not self.ranks.runs_ahead:
            grad_scale = float(grad_scale)
            if skip is not None and bool(skip):
                return self.zero_grad()
            skip = None
        elif torch.is_tensor(grad_scale):
            grad_scale = grad_scale.float()
        for group in self.groups:
            lr = lr_scale * group["lr"]
            decay = decay_scale * group["weight_decay"]
            for names in self.batches(group):
                mine = list(filter(self.is_mine, names))
                if mine and (torch.is_tensor(grad_scale) or grad_scale != 1):
                    torch._foreach_mul_([self.params[name].grad for name in mine], grad_scale)
                if mine and group["kind"] == "adamw":
                    self.adamw(mine, lr, decay, group["betas"], group["eps"], skip)
                elif mine:
                    self.muon(mine, lr, decay, momentum, skip)
        self.exchange.send_weights()
        if wait:
            self.exchange.wait()
        self.zero_grad()
        self.steps = self.steps + 1         # a tensor, once a GPU has decided about a step
        if skip is not None:
            self.steps = self.steps - skip.to(torch.float32)

    def batches(self, group):
        """The names that are updated in one call: all of AdamW's, or Muon's of equal shape."""
        if group["kind"] == "adamw":
            return [list(group["params"])]
        by_shape = {}
        for name, p in group["params"].items():
            by_shape.setdefault(as_matrices(p).shape[1:], []).append(name)
        return sorted(by_shape.values(), key=lambda names: -self.params[names[0]].numel())

    def adamw(self, names, lr, decay, betas, eps, skip=None):
        """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2); PyTorch's function
        updates all tensors in one pass. At step t, with m^ = m / (1 - β₁ᵗ), v^ = v / (1 - β₂ᵗ):
            m = β₁ m + (1 - β₁) g    v = β₂ v + (1 - β₂) g²    p = p - lr (m^ / (√v^ + ε) + decay p)
        """
        params = [self.params[name] for name in names]
        m = [self.slot(name, "exp_avg", self.params[name]) for name in names]
        v = [self.slot(name, "exp_avg_sq", self.params[name]) for name in names]
        steps_before = torch.zeros(len(names), device=params[0].device) + self.steps
        if skip is not None:
            skip = skip.to(torch.float32)
        adamw([p.data for p in params], [p.grad for p in params], m, v, [],
              list(steps_before.unbind()), fused=True, amsgrad=False, maximize=False,
              beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=decay, eps=eps, found_inf=skip)

    def muon(self, names, lr, decay, momentum, skip=None):
        """muon() of all these parameters in one call: their matrices have equal shapes."""
        weights, grads, buffers, variances = [], [], [], []
        for name in names:
            W = as_matrices(self.params[name].data)
            weights.append(W)
            grads.append(as_matrices(self.params[name].grad))
            buffers.append(self.slot(name, "momentum", W))
            variances.append(self.slot(name, "variance", W.narrow(short_axis(W), 0, 1)))
        update = compiled(muon, weights[0].device.type)
        # tensors, because torch.compile would recompile for every new float
        results = update(torch.cat(weights), torch.cat(grads), torch.cat(buffers),
                         torch.cat(variances), torch.tensor(lr), torch.tensor(decay),
                         torch.tensor(momentum), skip)
        sizes = [len(W) for W in weights]
        for tensors, result in zip((weights, buffers, variances), results):
            torch._foreach_copy_(tensors, result.split(sizes))

# ---- The recipe: how each parameter is trained ---------------------------------------------------

ADAM_RECIPE = {     # nanochat's, tuned at d12: lr, betas, weight decay
    "lm_head": (0.008, (0.8, 0.96), 0.01), "wte": (0.3, (0.8, 0.995), 0.001),
    "wpe": (0.3, (0.8, 0.995), 0.001),      # our own, for a dN without RoPE
    "norm_scales": (0.005, (0.8, 0.95), 0.0),       # our own, of RMSNorms
    "value_embeds": (0.15, (0.8, 0.995), 0.01), "resid_scalars": (0.005, (0.8, 0.95), 0.05),
    "x0_scalars": (0.5, (0.96, 0.95), 0.0), "backout_scalar": (0.2, (0.8, 0.95), 0.0)}
D12_MATMUL_PARAMS = 110.1e6     # of d12 with 32,768 tokens, where decay and batch size were tuned

def default_lr(config, batch_tokens):
    """The peak learning rate of pretraining: 6e-4 for GPT-2's AdamW; for dN's Muon
    0.02 √(batch_tokens / 2¹⁹).

    The square root was fitted to batches of 2¹⁸ tokens and more; the rate does not fall below its
    value there. Batches under 2¹⁶ tokens, which are a toy's, get 0.028. With a d4 of 128 channels
    and 4096 tokens a batch, one seed each, val bits per byte were:
        lr           .0018   .014   .020   .028   .040   .042   .057
        150 batches   2.51          2.29   2.26          2.24   2.26
        300 batches          2.12   2.09   2.12   2.13
    """
    if not config.rms_norm:
        return 6e-4
    if batch_tokens < 2 ** 16:
        return 0.028
    return 0.02 * math.sqrt(max(0.5, batch_tokens / 2 ** 19))

def make_optimizer(model, ranks=Ranks(), lr=None, batch_tokens=2 ** 19):
    """GPT-2's AdamW, or dN's mixture: Muon with this lr for the blocks' matrices, and Adam for the
    other parameters, with rates in proportion to it."""
    params = dict(model.named_parameters())
    config = model.config
    lr = lr or default_lr(config, batch_tokens)
    if not config.rms_norm:
        adam = dict(kind="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-8)
        vectors = {name: p for name, p in params.items() if p.ndim < 2}    # biases and norms
        matrices = {name: p for name, p in params.items() if p.ndim >= 2}
        return Optimizer([dict(adam, params=matrices, weight_decay=0.1),
                          dict(adam, params=vectors, weight_decay=0.0)], ranks)
    decay = 0.28 * math.sqrt(batch_tokens / 2 ** 19) * D12_MATMUL_PARAMS / model.matmul_params()
    scales = {name: p for name, p in params.items() if ".ln_" in f".{name}"}
    groups = [dict(kind="muon", lr=lr, weight_decay=decay,
                   params={name: p for name, p in params.items()
                           if name.startswith("h.") and name not in scales})]
    for start, recipe in ADAM_RECIPE.items():
        if start == "wte" and config.tied_head:
            recipe = ADAM_RECIPE["lm_head"]
        rate, betas, decay = recipe
        rate *= lr / 0.02
        if start in VOCABULARY:
            rate *= math.sqrt(768 / config.n_embd)
        group = {name: p for name, p in params.items() if name.startswith(start)}
        if start == "norm_scales":
            group = scales
        groups.append(dict(kind="adamw", params=group, lr=rate, betas=betas, eps=1e-10,
                           weight_decay=decay))
    assert sum(len(group["params"]) for group in groups) == len(params), "a parameter in no group"
    return Optimizer(groups, ranks)

# ---- The run log: one grammar for every stage, on stdout and in <run>/log.jsonl ------------------

# {key of log.jsonl: how its value is printed}; train_gpt2.cu prints the same
LOG_FORMATS = dict(
    loss="loss {:.6f}", val_loss="val_loss {:.6f}", val_bpb="val_bpb {:.4f}", lr="lr {:.2e}",
    stop_rate="stops {:.0%}", norm="norm {:.4f}", ms="{:.1f} ms", tok_s="{:.0f} tok/s",
    mfu="mfu {:.1%}", usd="${:.2f}", eta="eta {}", reward="reward {:.3f}",
    well_formed="well formed {:.0%}", reply_tokens="reply {:.1f} tokens",
    thinking_tokens="thinking {:.1f}", tied="tied {:.0%}", truncated="truncated {:.0%}",
    entropy="entropy {:.3f}", keep_loss="keep_loss {:.4f}", kl="kl {:.4f}",
    kl_reply="kl a reply {:.2f}", gold="gold {:.3f}", kind="held out: {}",
    n="{} asked", accuracy="accuracy {:.3f}", pass_1="pass@1 {:.3f}", pass_16="pass@16 {:.3f}",
    sampled="of {} problems", hellaswag="hellaswag {:.4f}", core="core {:.4f}")

class RunLog:
    """log(7, loss=…, lr=…) prints `step  7/90 | loss 3.421875 | lr 5.98e-04`, and appends the same
    as a row of JSON to <run>/log.jsonl. Only the main rank writes."""

    def __init__(self, run, max_steps, ranks=Ranks(), resume_step=None):
        self.max_steps = max_steps
        self.is_main = ranks.is_main
        self.run = run
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0      # of the processes that this one continues
        if not self.is_main:
            return
        path = Path(run) / "log.jsonl"
        rows = []
        if resume_step is not None:     # the steps after the saved one will be logged again
            rows = [row for row in read_log(run) if row.get("step", 0) <= resume_step]
        if rows:
            self.earlier_seconds = rows[-1].get("seconds", 0.0)
        with one_line_if_full(run):
            part = path.with_suffix(".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            put_in_place(part, path)
            self.file = open(path, "a", buffering=1)        # a kill loses no finished line

    def seconds(self):
        """Seconds since this process began the log."""
        return time.perf_counter() - self.started

    def __call__(self, step, **values):
        """Logs a step; a value of None is left out."""
        values = {key: value for key, value in values.items() if value is not None}
        shown = [f"step {step:{len(str(self.max_steps))}d}/{self.max_steps}"]
        for key, value in values.items():
            if key == "eta":
                value = timedelta(seconds=int(value))
            shown.append(LOG_FORMATS[key].format(value))
        self.say(" | ".join(shown), step=step, **values)

    def say(self, text, **row):
        """Prints a line, and appends `row` to the log, if there is one."""
        if not self.is_main:
            return
        print(text, flush=True)
        if row:
            row["seconds"] = round(self.earlier_seconds + self.seconds(), 3)
            with one_line_if_full(self.run):
                self.file.write(json.dumps(row) + "\n")

    def header(self, args, model, device):
        """What it takes to repeat a run: command, commit, versions, device, flags, parameters."""
        failed, commit = subprocess.getstatusoutput(
            f"git -C '{Path(__file__).parent}' rev-parse --short HEAD")
        device_name = f"cpu x {torch.get_num_threads()}"
        if "cuda" in str(device):
            device_name = torch.cuda.get_device_name()
        elif device == "mps":
            device_name = "mps"
        row = dict(command=" ".join(sys.argv), commit="unknown" if failed else commit,
                   torch=torch.__version__, python=sys.version.split()[0], flags=vars(args),
                   params=model.num_params(), device=device_name)
        self.say("\n".join(f"{key:8s} {value}" for key, value in row.items()), header=row)

def read_log(run):
    """The rows of <run>/log.jsonl. A last line that a kill cut short is left out; so is a damaged
    line, which is named on stderr."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            is_row = isinstance(row, dict) and isinstance(row.get("step", 0), int)
        except (ValueError, RecursionError):
            is_row = False
        if is_row:
            rows.append(row)
        elif line.strip():
            print(f"{path}, line {number} is damaged and is left out", file=sys.stderr)
    return rows

@contextmanager
def one_line_if_full(run):
    """A full disk, a folder that cannot be written and the like end the program with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise SystemExit(f"{run} cannot be written: {problem}; what was saved before is kept; free "
                         "some space, or choose another --out") from None

# ---- The saved run: its checkpoint, and <run>/state/step_N to continue from ----------------------

# It goes up whenever an older state would be resumed with another result. Version 2 has a new order
# of train_gpt2.py's rows. The version of checkpoints is model.py's.
STATE_VERSION = 2

def save_run(run, ranks, optimizer, model, tokenizer, stage, meta=None, **state):
    """Saves a run on all ranks. `state`, which has the step and the settings, is what load_state
    will return; `meta` joins config.json.

    The new state is complete as step_N.part before the checkpoint is written, and it gets its name
    afterwards. So a kill or a power cut at any moment leaves a run that --resume can finish with
    the same weights: the newest step_N is whole, and the checkpoint is never older than it.
    """
    tensors = [*model.parameters(), *optimizer.state.values()]
    n_broken = sum(1 for tensor in tensors if not tensor.isfinite().all())
    if ranks.sum(n_broken)[0]:
        raise SystemExit(f"step {state['step']}: weights are not finite, so they are not saved; "
                         "what was saved before is kept; try a lower --lr in another --out")
    with one_line_if_full(run):
        part = write_state(run, ranks, optimizer, model, **state)
        if ranks.is_main:
            save_checkpoint(run, model, tokenizer, stage=stage, step=state["step"], **meta or {})
            export_tokenizer(run, tokenizer)
            name_state(part)
    ranks.sum(0)                        # no rank continues before the run is saved

def write_state(run, ranks, optimizer, model, **state):
    """Writes what a bit-equal --resume needs to <run>/state/step_N.part: the weights, each rank's
    part of the optimizer's state and its random generators, and `state`. Returns that folder."""
    part = Path(run) / "state" / f"step_{state['step']:06d}.part"
    part.mkdir(parents=True, exist_ok=True)
    tensors = {**optimizer.state, "rng.cpu": torch.get_rng_state()}
    if "cuda" in ranks.device:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    path = part / f"rank_{ranks.rank:05d}.safetensors"
    save_file(tensors, f"{path}.part")
    put_in_place(f"{path}.part", path)
    ranks.sum(0)                        # wait until every rank's file is there
    if ranks.is_main:
        save_weights(part / "model.safetensors", model)
        write_json(part / "state.json", dict(state, format_version=STATE_VERSION,
                                             optimizer_steps=int(optimizer.steps),
                                             world_size=ranks.world_size))
    return part

def name_state(part):
    """Renames step_N.part to step_N, and deletes the older states."""
    final = part.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for folder in final.parent.glob("step_*"):
        if folder != final and folder.is_dir():
            shutil.rmtree(folder)

def export_tokenizer(run, tokenizer):
    """Writes what transformers' AutoTokenizer reads. HF's file would be called tokenizer.json, as
    ours is; by tokenizer_config.json it takes tokenizer.4.0.0.json instead (4.0.0: for this version
    of transformers and later ones)."""
    path = Path(run) / "tokenizer.4.0.0.json"
    if tokenizer is None or path.exists():
        return
    tokenizer.export_hf(path)
    eot = tokenizer.decode([tokenizer.eot])
    write_json(Path(run) / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", fast_tokenizer_files=[path.name],
        bos_token=eot, eos_token=eot))

def load_state(run, resume, ranks, optimizer, model, settings):
    """Restores what save_run wrote, by any number of ranks. Returns its `state`, or None if nothing
    was saved. `settings`, the flags that decide what is computed, must be the run's. From here on
    no other process can train in this run."""
    n_locked_out = 0
    if ranks.is_main and not lock_run(run):
        n_locked_out = 1
    if ranks.sum(n_locked_out)[0]:
        raise SystemExit(f"another process is training in {run}; wait until it ends, or choose "
                         "another --out")
    folder = newest_state(run)
    if folder and not resume:
        raise SystemExit(f"{run} holds a saved run; training again would overwrite it; add "
                         "--resume to continue it, or choose another --out")
    if not folder:
        refuse_model_without_state(run, resume)
        return None
    state = read_state(folder, settings)
    weights = folder / "model.safetensors"
    load_weights(weights, model, read_tensors(weights))
    for number in range(state["world_size"]):
        tensors = read_rank(folder / f"rank_{number:05d}.safetensors", ranks.device)
        # the optimizer's state goes to its owners now, the generators to the rank of this number
        generators = {name: tensors.pop(name).cpu() for name in list(tensors)
                      if name.startswith("rng.")}
        optimizer.state.update({name: tensor for name, tensor in tensors.items()
                                if optimizer.is_mine(name.rpartition(".")[0])})
        if number == ranks.rank:
            torch.set_rng_state(generators["rng.cpu"])
            if "cuda" in ranks.device and "rng.cuda" in generators:
                torch.cuda.set_rng_state(generators["rng.cuda"])
    optimizer.steps = state["optimizer_steps"]
    missing = optimizer.missing_state()
    if missing:
        raise SystemExit(f"{folder}: {missing} is missing or damaged; remove this folder, or "
                         "choose another --out")
    return state

def newest_state(run):
    """The folder <run>/state/step_N with the largest N, or None."""
    found = {}
    for folder in (Path(run) / "state").glob("step_*"):
        number = re.fullmatch("step_([0-9]+)", folder.name)
        if number and folder.is_dir():
            found[int(number[1])] = folder
    return found[max(found)] if found else None

def lock_run(run):
    """Keeps other processes from training in this run until this one ends or is killed. Returns
    False if another one keeps this one out."""
    with one_line_if_full(run):
        Path(run).mkdir(parents=True, exist_ok=True)
        # never closed: closing it would free the lock
        file = os.open(Path(run) / "lock", os.O_RDWR | os.O_CREAT)
    try:
        lock_file(file)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:                     # this file system has no locks
        pass
    return True

def lock_file(file):
    """Locks an open file; BlockingIOError or PermissionError if another process holds it."""
    try:
        import fcntl
    except ImportError:                 # Windows
        import msvcrt
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        return
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

def refuse_model_without_state(run, resume):
    """Keeps a model that cannot be continued from being overwritten: HF's, or one whose state/ was
    removed. A run that was killed in its first save has a state/, and --resume begins it again."""
    if resume and (Path(run) / "state").is_dir():
        return
    for name in ("config.json", "model.safetensors"):
        if (Path(run) / name).exists():
            raise SystemExit(f"{run} holds a model but no saved state to continue from; training "
                             "would overwrite it; choose another --out")

def read_state(folder, settings):
    """state.json, if it is whole and of a run with these settings."""
    advice = "this saved state is damaged; remove its folder, or choose another --out"
    state = read_json(folder / "state.json", advice)
    for name in ("step", "world_size", "optimizer_steps"):
        if not isinstance(state.get(name), int) or state[name] < 0:
            raise SystemExit(f"{folder}/state.json: {name} is {state.get(name)}; {advice}")
    if not isinstance(state.get("settings"), dict):
        raise SystemExit(f"{folder}/state.json has no settings; {advice}")
    run = folder.parent.parent
    if state.get("format_version") != STATE_VERSION:
        raise SystemExit(f"{run} holds a saved state of format {state.get('format_version')}; only "
                         f"format {STATE_VERSION} can be resumed, because the order of the rows "
                         "has changed; train again in another --out")
    old = state["settings"]
    new = json.loads(json.dumps(settings))      # as they would be read back: tuples become lists
    changed = sorted(key for key in old | new if old.get(key) != new.get(key))
    if changed:
        raise SystemExit(f"{run} was begun with another {' and '.join(changed)}; a resumed run "
                         "keeps its settings; give the same flags, or choose another --out")
    return state

def read_rank(path, device):
    """The tensors that one rank saved."""
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        # clones, because Windows removes no file that is still mapped into memory
        tensors = {name: tensor.clone() for name, tensor in load_file(path, device=device).items()}
        generator = tensors["rng.cpu"].cpu()
        wanted = torch.get_rng_state()
        if (generator.dtype, generator.shape) != (wanted.dtype, wanted.shape):
            raise OSError("its random generator is damaged")
    except (OSError, SafetensorError, KeyError) as error:
        raise SystemExit(f"{path}: {error}; this saved state is damaged; remove its folder, or "
                         "choose another --out") from None
    return tensors

def contents(value):
    """A hash of data, for `settings`: a run is not resumed on other data under the same name."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

# ---- What every training loop repeats ------------------------------------------------------------

def catch_signals():
    """From now on SIGTERM and SIGINT do not end the program; they are appended to the list that
    this returns. The ranks add up its lengths after each step, so that all stop after the same."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught

def check_finite(where, loss, norm):
    """Ends the run before a loss or norm that is not finite reaches the weights."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise SystemExit(f"{where}: loss {loss}, norm {norm}; training needs finite numbers; what "
                         "was saved is kept; try a lower --lr in another --out")

def already_trained(log, run, ranks, model, tokenizer, stage, step, max_steps, **meta):
    """Ends a resume that has no step left to train: writes the checkpoint again if it is missing or
    of another step."""
    if ranks.is_main and not is_checkpoint_of(run, stage, step):
        with one_line_if_full(run):
            save_checkpoint(run, model, tokenizer, stage=stage, step=step, **meta)
        log.say(f"{run}: the checkpoint of step {step} was missing; it is written again")
    log.say(f"{run} is trained: step {step} of {max_steps}")

def is_checkpoint_of(run, stage, step):
    """Whether the run's checkpoint is there and of this stage and step."""
    if not (Path(run) / "model.safetensors").exists():
        return False
    try:
        meta = json.loads((Path(run) / "config.json").read_text())["deepdive"]
        return (meta["stage"], meta["step"]) == (stage, step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False

def finish(log, run, stage, step, stopped):
    """Logs the last line of a run. One that a signal stopped exits with status 130."""
    if stopped:
        log.say(f"stopped and saved at step {step}; continue with the same command and --resume")
        raise SystemExit(130)
    if not (Path(run) / "log.jsonl").exists() and log.is_main:
        raise SystemExit(f"{run} was removed while it was trained; its log is lost; train again")
    log.say(f"{run}: stage {stage}, step {step}, {log.seconds():.0f} s")
