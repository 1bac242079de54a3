r"""
Reinforcement learning on problems whose answers can be checked: an assistant → one that reasons.

    python rl_grpo.py --task data/demo/chat/practice_bits.jsonl --out runs/demo-rl      # CPU, 1 GPU
    torchrun --standalone --nproc_per_node=8 rl_grpo.py --model runs/d24-sft \
        --task gsm8k --out runs/d24-rl                                                  # 8 GPUs

    in:  an assistant's run; a .jsonl of {"question", "answer"}, as in GSM8K's own files, or the
         name of a task, gsm8k, countdown, letters, decimals or sums, with its held-out problems
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

For each question the model writes group_size replies. A reply is worth 1 if its final answer is
right, and 0 otherwise. Its advantage is that reward minus the mean reward of its group. Every token
that the model sampled, the end token too, becomes more likely if the advantage of its reply is
positive, and less likely if it is negative; a larger advantage has a larger effect. Nobody shows
the model how to think: any thinking that leads to right answers becomes more likely.

Watch the reward, the length of the replies and the share of tied groups. In a tied group all
replies are right or all are wrong, so that there is nothing to learn from. Do not watch the loss:
its gradient is what trains the model, but its value says nothing.

Papers: GRPO (DeepSeekMath, arXiv 2402.03300), DeepSeek-R1 (2501.12948), Dr. GRPO (2503.20783), DAPO
(2503.14476), PPO's clip (1707.06347), the KL estimator k3 (joschu.net/blog/kl-approx.html) and its
gradient (DeepSeek-V3.2, 2512.02556).
Differs from GRPO: the defaults are those of Dr. GRPO and DAPO. Advantages are not divided by the
group's standard deviation, the loss is one mean over all tokens of the groups that are not tied,
there is no KL term, and each batch of samples gets a single update, so that the clip never acts.
--loss grpo, --std, --kl and --updates bring back all of GRPO. Differs from TRL: each mean is over
all ranks, also that of bnpo, and dapo does not count the tokens of tied groups.
"""
import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import load_checkpoint, visible
from problems import is_correct, problems_that_fit, read_problems
from sample import Engine, check_at_least, find_run, load_tokenizer
from training import (Optimizer, RunLog, already_trained, catch_signals, check_finite, contents,
                      finish, init_ranks, load_state, save_run)

ROWS = 64               # replies in one forward and backward pass
QUESTIONS = 128         # held-out questions that are answered in one batch

# ---- The objective -------------------------------------------------------------------------------

def advantages(rewards, divide_by_std=False):
    """rewards (prompts, group_size) → advantages of that shape: reward minus the group's mean.

    >>> advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    return advantage.masked_fill(is_tied(rewards)[:, None], 0.0)    # not only up to rounding

def is_tied(rewards):
    """rewards (prompts, group_size) → (prompts,): whether all of a group are equal."""
    return rewards.amax(1) == rewards.amin(1)

def policy_loss(logprobs, old_logprobs, ref_logprobs, advantage, mask, clip, kl, weight=None):
    """→ (the loss, an estimate of the KL in nats), each a sum over the tokens where mask is 1.
    logprobs, old_logprobs, ref_logprobs, mask (N, T); advantage (N,); clip: (low, high). Without a
    reference model ref_logprobs is None. weight (N,): what each token of a reply counts in the
    loss, for a mean (token_weights); None: 1.

        ratio = π(token) / π_old(token)
        loss  = -min(ratio · A, clip(ratio, 1 - low, 1 + high) · A) + kl · ratio · k3
        k3    = r - ln r - 1 with r = π_ref / π, an estimate of KL(π ‖ π_ref) that is never negative

    The ratio before k3 is 1 at first, but has a gradient. With it the mean gradient of this term is
    that of KL(π ‖ π_ref); without it, as in the paper of GRPO, it is that of KL(π_ref ‖ π).
    """
    low, high = clip
    ratio = (logprobs - old_logprobs).exp()
    A = advantage[:, None]
    losses = -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    k3 = torch.zeros(())
    if ref_logprobs is not None:
        log_r = ref_logprobs - logprobs
        k3 = log_r.exp() - log_r - 1
        losses = losses + kl * ratio * k3
    losses = losses * mask
    if weight is not None:
        losses = losses * weight[:, None]
    return losses.sum(), (k3 * mask).sum()

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")

def token_weights(mask, is_live, args, ranks):
    """What a token of each reply counts in the mean that --loss names, (N,). mask (N, T); is_live
    (N,): whether the reply has something to teach. Of N replies on all ranks, reply i has n_i
    sampled tokens and a token of it counts

        grpo     1 / (N · n_i)               a mean over replies of the mean over their tokens
        dr_grpo  1 / (N · max_new_tokens)    a constant: no length is preferred
        bnpo     1 / Σ n                     a mean over all tokens
        dapo     1 / Σ n of live replies     the same without the groups that are tied
    """
    n = mask.sum(1)
    replies, tokens, live_tokens = ranks.sum(len(n), n.sum().item(), n[is_live].sum().item())
    if args.loss == "grpo":
        return 1 / (replies * n.clamp(min=1))
    divisors = dict(dr_grpo=replies * args.max_new_tokens, bnpo=tokens, dapo=live_tokens)
    return torch.full_like(n, 1 / max(1, divisors[args.loss]))

# ---- Replies → tensors → an update ---------------------------------------------------------------

def rollout(engine, problems, args, seed):
    """Samples group_size replies to each problem → prompts and completions, one of each for every
    reply, and rewards (problems, group_size). A reply that was cut off earns 0."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    completions = engine.generate(prompts, args.max_new_tokens, args.group_size, temperature=1.0,
                                  seed=seed)
    prompts = [p for p in prompts for _ in range(args.group_size)]
    asked = [p for p in problems for _ in range(args.group_size)]
    rewards = []
    for problem, completion in zip(asked, completions):
        is_whole = completion.finish == "stop"
        rewards.append(float(is_whole and is_correct(engine.reply_text(completion), problem)))
    return prompts, completions, torch.tensor(rewards).view(len(problems), args.group_size)

def sample_groups(engine, problems, order, asked, args, step, ranks):
    """This rank's groups of a step → (prompts, completions, rewards (groups, group_size), how many
    problems have been asked since the run began, on all ranks).

    The problems are dealt out to the ranks in turn, from number `asked` of the order on. For each
    group that is tied, another problem is asked, in at most args.refill rounds, so that a step
    learns from as many groups as it has prompts.
    """
    prompts, completions, rewards = [], [], []
    wanted = args.prompts
    for extra in range(1 + args.refill):
        numbers = range(asked + ranks.rank, asked + wanted, ranks.world_size)
        mine = [problems[order[i % len(order)]] for i in numbers]
        asked += wanted
        n_tied = 0
        if mine:
            seed = hash((args.seed, step, ranks.rank)) % 2 ** 31 + extra
            try:
                found = rollout(engine, mine, args, seed)
            except OSError as error:
                raise SystemExit(f"step {step + 1}: a tool of the model does not start: {error}; "
                                 "what was saved is kept; continue with --resume") from None
            prompts += found[0]
            completions += found[1]
            rewards.append(found[2])
            n_tied = is_tied(found[2]).sum().item()
        wanted = int(ranks.sum(n_tied)[0])
        if wanted == 0:
            break
    return prompts, completions, torch.cat(rewards), asked

def rollout_tensors(prompts, completions, pad):
    """Prompts and completions → ids (N, T) int64, padded on the right with `pad`, and mask (N, T).
    The mask is 1 for tokens that the model sampled, and 0 for prompts, tool outputs and padding."""
    longest = max(len(p) + len(c.ids) for p, c in zip(prompts, completions))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        end = len(p) + len(c.ids)
        ids[i, :end] = torch.tensor(p + c.ids)
        mask[i, len(p):end] = torch.tensor(c.sampled, dtype=torch.float)
    return ids, mask

def token_logprobs(model, ids, mask, rows=ROWS):
    """ids (N, T), mask (N, T - 1) → log p (N, T - 1) of the tokens ids[:, 1:], in nats; 0 where
    the mask is 0.

    `rows` rows pass through the model at a time. Only positions where the mask is 1 pass through
    the head, so that no logits are computed for prompts and padding.
    """
    found = []
    for part, marked in zip(ids.split(rows), mask.bool().split(rows)):
        hidden = model.hidden(part[:, :-1])[marked]         # (n, C)
        targets = part[:, 1:][marked]                       # (n,)
        losses = model.loss(hidden[None], targets[None], reduction="none")[0]
        found.append(torch.zeros(marked.shape, device=ids.device).masked_scatter(marked, -losses))
    return torch.cat(found)

def learn(model, optimizer, ranks, ids, mask, advantage, args, lr_scale, reference, keep=None):
    """Takes args.updates optimizer steps on one batch of rollouts: ids and mask (N, T), advantage
    (N,), which rollout_tensors and advantages made. keep() adds further gradients to each update.
    Returns (loss, gradient norm, kl) of the last step; kl is None without a reference model."""
    mask = mask[:, 1:]      # of the tokens that are predicted
    # Replies of a tied group have advantage 0. Only the KL term can learn from them.
    is_live = (advantage != 0) | (reference is not None)
    n_broken = (~advantage.isfinite()).sum().item()
    n_broken, tokens = ranks.sum(n_broken, mask[is_live].sum().item())
    if n_broken:
        raise SystemExit(f"{n_broken:.0f} replies have an advantage that is not a finite number, "
                         "so nothing was learnt from this step; what was saved is kept; correct "
                         "what gives the rewards")
    weight = token_weights(mask, is_live, args, ranks)[is_live].to(ranks.device)
    advantage = advantage[is_live].to(ranks.device)
    batch = SharedPrompts(ids[is_live].to(ranks.device), mask[is_live].to(ranks.device),
                          model.config.block_size)
    parts = batch.parts
    ref_logprobs = [None for _ in parts]
    if reference is not None:
        with torch.inference_mode():
            cache = PromptCache(reference, batch.prompts)
            ref_logprobs = [cache.logprobs(part) for part in parts]
    old_logprobs = [None for _ in parts]
    for update in range(args.updates):
        loss = kl = 0.0
        if keep:
            keep()
        cache = PromptCache(model, batch.prompts)
        for i, part in enumerate(parts):
            logprobs = cache.logprobs(part)
            if update == 0:     # the policy is still the one that sampled the replies
                old_logprobs[i] = logprobs.detach()
            part_loss, part_kl = policy_loss(logprobs, old_logprobs[i], ref_logprobs[i],
                                             advantage[part.rows], part.mask, args.clip, args.kl,
                                             weight[part.rows])
            (part_loss * ranks.world_size).backward()       # average_grads() divides by it
            loss += part_loss.item()
            kl += part_kl.item() / max(1, tokens)
        cache.backward()
        norm = optimizer.average_grads()
        loss, kl = ranks.sum(loss, kl)
        check_finite(f"update {update + 1}", loss, norm)
        optimizer.step(lr_scale, min(1.0, 1.0 / (norm + 1e-6)))
    if reference is None:
        kl = None
    return loss, norm, kl

# ---- Fast: each prompt passes through the model once, not once for each reply --------------------

@dataclass
class Part:
    """n rows of similar length, from the last token of their prompt on."""
    rows: torch.Tensor      # (n,): which rows of the batch these are
    prompt: torch.Tensor    # (n,): which prompt each continues
    start: torch.Tensor     # (n,): tokens of the prompt that come before ids
    ids: torch.Tensor       # (n, T + 1)
    mask: torch.Tensor      # (n, T): 1 where ids[:, 1:] was sampled

class SharedPrompts:
    """A batch, ids (N, T + 1) and mask (N, T), whose rows are cut where the first sampled token is
    predicted: what stands before that, which the rows of a group share, is a prompt (P, S). The
    rest is in `parts`, in order of length, so that there is little padding."""

    def __init__(self, ids, mask, block_size, rows=ROWS):
        self.prompts = ids[:0]
        self.parts = []
        if not len(ids):
            return
        T = mask.shape[1]
        t = torch.arange(T, device=ids.device)
        end = (mask.bool() * (t + 1)).amax(1)           # (N,): after the last sampled token
        start = mask.bool().long().argmax(1)
        longest = (end - start).amax()
        start = start.clamp(max=block_size - longest)   # so that padding fits into the context
        prompts = ids[:, :-1].masked_fill(t >= start[:, None], -1)
        prompts, prompt = prompts.unique(dim=0, return_inverse=True)
        width = max(1, int((prompts >= 0).sum(1).amax()))
        self.prompts = prompts[:, :width].clamp(min=0)                              # (P, S)
        for part in (end - start).argsort(stable=True).split(rows):
            longest = int((end - start)[part].amax())
            at = start[part, None] + torch.arange(longest + 1, device=ids.device)   # (n, T + 1)
            marked = mask[part].gather(1, at[:, :-1].clamp(max=T - 1))
            marked = marked.masked_fill(at[:, :-1] >= end[part, None], 0.0)
            self.parts.append(Part(part, prompt[part], start[part],
                                   ids[part].gather(1, at.clamp(max=T)), marked))

class PromptCache:
    """Keys and values of prompts (P, S) in each layer, which rows continue. Gradients are kept: the
    backward of a part ends at these keys and values, and that of the prompts, which happens once
    for all parts, begins there.

    To model.hidden it is a cache, as KVCache is: first of the prompts, then of each part's rows.
    """

    def __init__(self, model, prompts):
        self.model = model
        self.made = []          # keys and values of layer 0, 1, …
        self.part = None
        self.used = 0
        self.pos = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
        self.s = torch.arange(prompts.shape[1], device=prompts.device)
        if len(prompts):
            model.hidden(prompts, self)
        self.leaves = self.made
        if torch.is_grad_enabled():
            self.leaves = [tensor.detach().requires_grad_() for tensor in self.made]

    def append(self, layer, k, v, pos, window):
        """k, v (n, T, NH, HS) of the tokens at pos (n, T) → keys and values with those of the
        prompts before them, (n, S + T, NH, HS), and the mask (n, 1, T, S + T)."""
        if self.part is None:
            self.made += [k, v]
            return k, v, None
        if window not in self.masks:
            unseen = self.s >= self.part.start[:, None]         # padding, as if it came later
            before = self.s.masked_fill(unseen, self.model.config.block_size)       # (n, S)
            keys = torch.cat((before, pos), 1)[:, None, None]
            self.masks[window] = visible(pos[:, None, :, None], keys, window)
        k = torch.cat((self.leaves[2 * layer][self.part.prompt], k), 1)
        v = torch.cat((self.leaves[2 * layer + 1][self.part.prompt], v), 1)
        return k, v, self.masks[window]

    def advance(self, T):
        """The positions of the next rows are set by logprobs."""

    def logprobs(self, part):
        """What token_logprobs returns for the rows of this part, (n, T)."""
        self.part = part
        self.pos = part.start
        self.masks = {}
        marked = part.mask.bool()
        hidden = self.model.hidden(part.ids[:, :-1], self)[marked]
        targets = part.ids[:, 1:][marked]
        losses = self.model.loss(hidden[None], targets[None], reduction="none")[0]
        return losses.new_zeros(marked.shape).masked_scatter(marked, -losses)

    def backward(self):
        """The backward of the prompts, after that of all parts."""
        torch.autograd.backward(self.made, [leaf.grad for leaf in self.leaves])

# ---- Measuring -----------------------------------------------------------------------------------

def accuracy_by_kind(engine, problems, max_new_tokens):
    """Answers problems greedily → {kind: (share of right replies, mean tokens of a reply)}."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    right = {}
    lengths = {}
    for i in range(0, len(prompts), QUESTIONS):
        completions = engine.generate(prompts[i:i + QUESTIONS], max_new_tokens, temperature=0)
        for problem, completion in zip(problems[i:], completions):
            kind = problem["kind"]
            correct = is_correct(engine.reply_text(completion), problem)
            right.setdefault(kind, []).append(correct)
            lengths.setdefault(kind, []).append(len(completion.ids))
    return {kind: (sum(right[kind]) / len(right[kind]), sum(lengths[kind]) / len(lengths[kind]))
            for kind in right}

def thinking_pays(rewards, lengths):
    """Are longer replies right more often? If not, RL settles on short guesses, and SFT has to
    teach the steps better first.

    rewards and lengths (tokens), one for each reply → (middle, mean reward of replies up to this
    length, mean reward of longer replies). The middle is halfway from the shortest to the longest.
    """
    middle = (min(lengths) + max(lengths)) / 2
    short = [r for r, n in zip(rewards, lengths) if n <= middle]
    long = [r for r, n in zip(rewards, lengths) if n > middle]
    return middle, sum(short) / max(1, len(short)), sum(long) / max(1, len(long))

# ---- Main ----------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description="reinforcement learning on checkable problems")
    add = parser.add_argument
    add("--model", help="run folder of an assistant (default: the newest one)")
    add("--task", required=True, help="problems to practise: a .jsonl, or gsm8k, countdown, "
        "letters, decimals, sums")
    add("--held_out", help="problems to test before, during and after training, never to train on "
        "(default: those of a task with a name)")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue from <out>/state, if there is one")
    add("--max_steps", type=int, default=50, help="batches of rollouts")
    add("--prompts", type=int, default=16, help="questions of a step, on all ranks together")
    add("--group_size", type=int, default=16, help="replies to each question")
    add("--refill", type=int, default=0, help="rounds, at most, in which a step's tied groups are "
        "replaced by those of other questions")
    add("--max_new_tokens", type=int, default=128, help="longest reply, in tokens")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW; it falls linearly to 0")
    add("--updates", type=int, default=1, help="optimizer steps on each batch of rollouts")
    add("--loss", choices=LOSSES, default="dapo", help="the mean over the tokens of a step")
    add("--clip", type=float, nargs="+", default=[0.2], metavar="LIMIT", help="limits of 1 - ratio "
        "and ratio - 1, or one for both; they act only if --updates > 1")
    add("--kl", type=float, default=0.0, help="weight of the KL divergence from --model")
    add("--std", action="store_true", help="divide advantages by the group's standard deviation")
    add("--eval_every", type=int, default=10, help="steps between tests on held-out problems")
    add("--save_every", type=int, default=25, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the questions' order and of the samples")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "max_steps", "prompts", "max_new_tokens", "updates", "eval_every",
                   "save_every")
    check_at_least(0, args, "refill", "kl", "seed")
    if len(args.clip) > 2:
        raise SystemExit(f"--clip must be one limit or two, got {len(args.clip)}")
    for limit in args.clip:
        if not 0 <= limit < math.inf:
            raise SystemExit(f"--clip must be at least 0, got {limit:g}")
    args.clip = args.clip[0], args.clip[-1]
    if not 0 < args.lr < math.inf:
        raise SystemExit(f"--lr must be above 0, got {args.lr}")
    if args.group_size < 2:
        raise SystemExit(f"--group_size must be at least 2, got {args.group_size}; "
                         "try --group_size 16")
    return args

def check_ranks(prompts, world_size):
    """Raises SystemExit if the ranks cannot share the questions of a step."""
    if prompts % world_size:
        next_multiple = (prompts // world_size + 1) * world_size
        raise SystemExit(f"--prompts {prompts} must be a multiple of the {world_size} ranks; "
                         f"try --prompts {next_multiple}")

def load_problems(args, world_size):
    """The problems of --task, a file or a name, and the held-out ones: those of --held_out, or else
    those that come with the name."""
    held_out = []
    if Path(args.task).exists() or args.task.endswith((".jsonl", ".gz")):
        problems = read_problems(args.task)
    else:
        from tasks import read_task
        problems, held_out = read_task(args.task, world_size)
    if args.held_out:
        held_out = read_problems(args.held_out)
    args.held_out = args.held_out or args.task      # for the log
    return problems, held_out

# Flags that a resumed run must not change
SETTINGS = ("task", "max_steps", "prompts", "group_size", "max_new_tokens", "lr", "updates", "refill",
            "loss", "clip", "kl", "std", "seed")

def warn(log, truncated, tied):
    """Logs warnings about a step: `truncated` and `tied` are shares of its replies, 0 to 1."""
    if truncated > 0.5:
        log.say(f"warning: {truncated:.0%} of the replies were cut off and earned nothing; raise "
                "--max_new_tokens")
    if tied > 0.9:
        log.say(f"warning: {tied:.0%} of the groups are tied, all right or all wrong; give "
                "problems that are sometimes solved, or raise --group_size")

def main():
    args = parse_args()
    run = Path(args.out)
    signals = catch_signals()
    ranks = init_ranks(args.device)
    check_ranks(args.prompts, ranks.world_size)
    problems, held_out = load_problems(args, ranks.world_size)
    base = find_run(args.model, ("sft",))
    tokenizer = load_tokenizer(base)
    model, meta = load_checkpoint(base, ranks.device, vocab_size=tokenizer.n_vocab)
    model.eval()    # without dropout, training sees the same probabilities as sampling
    engine = Engine(model, tokenizer)
    reference = copy.deepcopy(model) if args.kl else None
    adamw = dict(kind="adamw", lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer([dict(adamw, params=dict(model.named_parameters()))], ranks)

    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= dict(base=meta["run"], contents_of_task=contents(problems))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
    asked = state.get("asked", 0)       # problems so far
    log = RunLog(run, args.max_steps, ranks, resume_step=state.get("step"))
    if step >= args.max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "rl", step, args.max_steps,
                               base=meta["run"])
    log.header(args, model, ranks.device)
    block_size = model.config.block_size
    problems = problems_that_fit(args.task, problems, tokenizer, block_size, log)
    if not problems:
        raise SystemExit(f"no question of {args.task} fits into {block_size - 1} tokens; give "
                         "shorter problems, or a model with a larger block_size")
    kinds = {p["kind"] for p in problems}
    others = sorted({p["kind"] for p in held_out} - kinds)
    if others:
        log.say(f"{args.held_out}: only kinds that are practised are tested; left out: "
                f"{', '.join(others)}")
    held_out = [p for p in held_out if p["kind"] in kinds]
    held_out = problems_that_fit(args.held_out, held_out, tokenizer, block_size, log)

    def report_accuracy():
        if held_out and ranks.is_main:
            head = f"step {step:{len(str(args.max_steps))}d}/{args.max_steps}"
            by_kind = accuracy_by_kind(engine, held_out, args.max_new_tokens)
            for kind, (share, tokens) in by_kind.items():
                log.say(f"{head} | held out: {kind} accuracy {share:.3f} | "
                        f"reply {tokens:.1f} tokens",
                        step=step, kind=kind, accuracy=share, reply_tokens=tokens)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "rl", dict(base=meta["run"]), step=step,
                 asked=asked, settings=settings)

    order = random.Random(args.seed).sample(range(len(problems)), len(problems))
    started = time.perf_counter()
    stop = False
    while True:
        last = step == args.max_steps
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            report_accuracy()
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        prompts, completions, rewards, asked = sample_groups(engine, problems, order, asked, args,
                                                             step, ranks)
        lengths = [len(completion.ids) for completion in completions]
        if step == 0:
            middle, short, long = thinking_pays(rewards.flatten().tolist(), lengths)
            log.say(f"sampled before learning: replies up to {middle:.0f} tokens are right "
                    f"{short:.0%} of the time, longer ones {long:.0%}",
                    step=0, middle=middle, short=short, long=long)
        ids, mask = rollout_tensors(prompts, completions, tokenizer.special["<|pad|>"])
        advantage = advantages(rewards, args.std).flatten()
        loss, norm, kl = learn(model, optimizer, ranks, ids, mask, advantage, args,
                               lr_scale=1 - step / args.max_steps, reference=reference)
        tied_groups = is_tied(rewards).sum().item()
        cut_off = sum(completion.finish == "length" for completion in completions)
        n, reward, tied, truncated, tokens, stops = ranks.sum(
            len(lengths), rewards.sum().item(), tied_groups * args.group_size, cut_off,
            sum(lengths), len(signals))
        stop = stops > 0
        step += 1
        ms = 1000 * (time.perf_counter() - tick)
        seconds_a_step = (time.perf_counter() - started) / (step - first_step)
        log(step, reward=reward / n, reply_tokens=tokens / n, tied=tied / n,
            truncated=truncated / n, norm=norm, kl=kl, loss=loss, ms=ms,
            eta=seconds_a_step * (args.max_steps - step))
        warn(log, truncated / n, tied / n)
    finish(log, run, "rl", step, stopped=stop and not last)

if __name__ == "__main__":
    main()
