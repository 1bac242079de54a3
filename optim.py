"""
What training adds to a model: the optimizer, its recipe, and the state a --resume goes on from.

    optimizer = make_optimizer(model)           # GPT-2's AdamW, or Muon and Adam for dN
    model(x, y).backward()
    norm = optimizer.average_grads()            # over all ranks
    optimizer.step(lr_scale=0.5)

Papers: AdamW (arXiv 1711.05101), Muon (kellerjordan.github.io/posts/muon), Polar Express
(2505.16932), NorMuon (2510.05491), cautious weight decay (2510.12402), ZeRO (1910.02054).
Differs from the papers: a rank owns whole parameters, not slices of them, because Muon needs whole
matrices; what is sent between ranks is as much.
"""
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.optim.adamw import adamw

from model import VOCABULARY, Ranks, compiled, load_weights, save_weights, write_json

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

def muon(W, grad, buffer, variance, lr, decay, momentum, beta2=0.9):
    """polar(Nesterov momentum), then NorMuon: rows of equal RMS along the longer side, the norm
    kept. Decay is cautious (arXiv 2510.12402): only where the update shrinks W.

    Of all matrices of a shape at once, (K, m, n); variance (K, m, 1) or, if m < n, (K, 1, n).
    → the next W, buffer and variance. On a GPU it is compiled."""
    buffer = buffer.lerp(grad, 1 - momentum)
    U = polar(grad.lerp(buffer, momentum))
    row_variance = U.square().mean(-1 if W.shape[-2] >= W.shape[-1] else -2, keepdim=True)
    variance = variance.lerp(row_variance, 1 - beta2)
    scaled = U * variance.clamp_min(1e-10).rsqrt()
    U = F.normalize(scaled, dim=(-2, -1)) * U.norm(dim=(-2, -1), keepdim=True)
    lr = lr * max(1, W.shape[-2] / W.shape[-1]) ** 0.5
    return W - lr * (U + decay * W * (U * W >= 0)), buffer, variance

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

    def zero_grad(self):
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def average_grads(self):
        """Averages each gradient over the ranks, onto its owner; returns the norm of them all."""
        for p in self.params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for work in [self.send(dist.reduce, name, p.grad) for name, p in self.params.items()]:
            work.wait()
        mine = [self.params[name].grad for name in filter(self.is_mine, self.params)]
        if self.ranks.world_size > 1:
            torch._foreach_div_(mine, self.ranks.world_size)
        norms = torch.stack(torch._foreach_norm(mine)) if mine else torch.zeros(1)
        return math.sqrt(self.ranks.sum(norms.double().square().sum().item())[0])

    def send(self, collective, name, tensor):
        """Starts reducing a tensor to its owner, or broadcasting it from there."""
        if self.ranks.world_size == 1:
            return SimpleNamespace(wait=lambda: None)
        return collective(tensor, self.owner[name], async_op=True)

    @torch.no_grad()
    def step(self, lr_scale=1.0, grad_scale=1.0, momentum=0.95, decay_scale=1.0):
        """The schedules scale each group's own lr and weight_decay; grad_scale clips gradients.
        Parameters are on their way to the other ranks while their owners update the next."""
        self.steps += 1
        sent = []
        for group in sorted(self.groups, key=lambda group: group["kind"]):      # AdamW is quick
            lr, decay = lr_scale * group["lr"], decay_scale * group["weight_decay"]
            for names in self.together(group):
                mine = list(filter(self.is_mine, names))
                if mine and grad_scale != 1:
                    torch._foreach_mul_([self.params[name].grad for name in mine], grad_scale)
                if mine and group["kind"] == "adamw":
                    self.adamw(mine, lr, decay, group["betas"], group["eps"])
                elif mine:
                    self.muon(mine, lr, decay, momentum)
                sent += [self.send(dist.broadcast, name, self.params[name].data) for name in names]
        for work in sent:
            work.wait()
        self.zero_grad()

    def together(self, group):
        """The names of a group, as they are updated at once: for Muon those of equal shape."""
        if group["kind"] == "adamw":
            return [list(group["params"])]
        by_shape = {}
        for name, p in group["params"].items():
            by_shape.setdefault(as_matrices(p).shape[1:], []).append(name)
        return sorted(by_shape.values(), key=lambda names: -self.params[names[0]].numel())

    def adamw(self, names, lr, decay, betas, eps):
        """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2), PyTorch's, which makes
        one pass over all tensors. With ^ for what is divided by 1 - βᵗ at step t:
            m = β₁ m + (1 - β₁) g    v = β₂ v + (1 - β₂) g²    p = p - lr (m^ / (√v^ + ε) + decay p)
        """
        params = [self.params[name] for name in names]
        m, v = ([self.slot(name, key, p) for name, p in zip(names, params)]
                for key in ("exp_avg", "exp_avg_sq"))
        before = torch.full((len(names),), self.steps - 1.0, device=params[0].device).unbind()
        adamw([p.data for p in params], [p.grad for p in params], m, v, [], list(before),
              fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1], lr=lr,
              weight_decay=decay, eps=eps)

    def muon(self, names, lr, decay, momentum):
        W = [as_matrices(self.params[name].data) for name in names]
        grads = [as_matrices(self.params[name].grad) for name in names]
        rows = [w[..., :1] if w.shape[-2] >= w.shape[-1] else w[..., :1, :] for w in W]
        kept = [W, [self.slot(name, "momentum", w) for name, w in zip(names, W)],
                [self.slot(name, "variance", row) for name, row in zip(names, rows)]]
        update = compiled(muon, W[0].device.type)
        numbers = map(torch.tensor, (lr, decay, momentum))      # as floats each would be compiled
        stacks = [torch.cat(tensors) for tensors in (W, grads, *kept[1:])]
        for tensors, result in zip(kept, update(*stacks, *numbers)):
            torch._foreach_copy_(tensors, result.split([len(w) for w in W]))

ADAM_RECIPE = {     # nanochat's, tuned at d12: lr, betas, weight decay
    "lm_head": (0.008, (0.8, 0.96), 0.01), "wte": (0.3, (0.8, 0.995), 0.001),
    "wpe": (0.3, (0.8, 0.995), 0.001),      # ours, for a dN without RoPE
    "value_embeds": (0.15, (0.8, 0.995), 0.01), "resid_scalars": (0.005, (0.8, 0.95), 0.05),
    "x0_scalars": (0.5, (0.96, 0.95), 0.0), "backout_scalar": (0.2, (0.8, 0.95), 0.0)}
D12_MATMUL_PARAMS = 110.1e6     # of d12 with 32,768 tokens, where decay and batch size were tuned

def default_lr(config, batch_tokens):
    """Of pretraining: 6e-4 for GPT-2's AdamW; for dN's Muon .02 √(batch_tokens / 2¹⁹).

    The root was fitted to 2¹⁸ tokens and more; below it rates do not fall further, and toys get
    twice as much: a d4 of 128 channels that saw 150 batches of 4096 tokens came to 2.51 bits a byte
    by the root's rate, .0018, to 2.29 at .02, 2.26 at .028, 2.24 at .042 and 2.26 at .057; with 300
    batches to 2.12 at .014, 2.09 at .02, 2.12 at .028 and 2.13 at .04 (a seed each)."""
    if not config.rms_norm:
        return 6e-4
    return 0.028 if batch_tokens < 2 ** 16 else 0.02 * math.sqrt(max(0.5, batch_tokens / 2 ** 19))

def make_optimizer(model, ranks=Ranks(), lr=None, batch_tokens=2 ** 19):
    """GPT-2's AdamW, or the modern mixture: Muon for the blocks' matrices, with this lr, and Adam
    for the rest, with rates in proportion to it."""
    params, config = dict(model.named_parameters()), model.config
    lr = lr or default_lr(config, batch_tokens)
    if not config.rms_norm:
        adam = dict(kind="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-8)
        flat = {name: p for name, p in params.items() if p.ndim < 2}       # biases and norms
        rest = {name: p for name, p in params.items() if p.ndim >= 2}
        return Optimizer([dict(adam, params=rest, weight_decay=0.1),
                          dict(adam, params=flat, weight_decay=0.0)], ranks)
    width_scale = math.sqrt(768 / config.n_embd)
    decay = 0.28 * math.sqrt(batch_tokens / 2 ** 19) * D12_MATMUL_PARAMS / model.matmul_params()
    groups = [dict(kind="muon", lr=lr, weight_decay=decay,
                   params={name: p for name, p in params.items() if name.startswith("h.")})]
    for start, (rate, betas, decay) in ADAM_RECIPE.items():
        group = {name: p for name, p in params.items() if name.startswith(start)}
        if start == "wte" and config.tied_head:
            rate, betas, decay = ADAM_RECIPE["lm_head"]
        rate *= lr / 0.02 * (width_scale if start in VOCABULARY else 1.0)
        groups.append(dict(kind="adamw", params=group, lr=rate, betas=betas, eps=1e-10,
                           weight_decay=decay))
    assert sum(len(group["params"]) for group in groups) == len(params), "a parameter nobody trains"
    return Optimizer(groups, ranks)

# ---- The training state: <run>/state/step_N ------------------------------------------------------

# It grows whenever an older state would be resumed with another result, as when the order of
# train_gpt2.py's rows changed (2). The version of checkpoints is model.py's.
STATE_VERSION = 2

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
        write_json(part / "state.json", dict(state, format_version=STATE_VERSION,
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
    if state["format_version"] != STATE_VERSION:
        raise SystemExit(f"{run} holds a saved state of format {state['format_version']}; only "
                         f"format {STATE_VERSION} can be resumed, because the order of the rows "
                         "has changed; train again in another --out")
    old = state["settings"]
    new = json.loads(json.dumps(settings))
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
