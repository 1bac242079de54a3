r"""
Reinforcement learning on problems whose answers can be checked: an assistant → one that reasons.

    python rl_grpo.py --task data/demo/chat/practice_bits.jsonl --out runs/demo-rl      # CPU, 1 GPU
    torchrun --standalone --nproc_per_node=8 rl_grpo.py --model runs/d24-sft \
        --task gsm8k --out runs/d24-rl --keep smoltalk:0.1 --format_reward 0.1          # 8 GPUs

    python rl_grpo.py --reward model:runs/demo-reward --kl 0.1 --max_kl 10 \
        --model runs/demo-sft --task prompts.jsonl --out runs/demo-rlhf                 # RLHF

    in:  an assistant's run; a .jsonl of {"question", "answer"}, as in GSM8K's own files, or the
         name of a task, gsm8k, countdown, letters, decimals or sums, with its held-out problems;
         for --keep, conversations as chat_sft.py reads them
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume;
         answers.jsonl: replies to the same eight held-out problems at every evaluation

For each question the model writes group_size replies. A reply is worth 1 if its final answer is
right, and 0 otherwise. Its advantage is that reward minus the mean reward of its group. Every token
that the model sampled, the end token too, becomes more likely if the advantage of its reply is
positive, and less likely if it is negative; a larger advantage has a larger effect. Nobody shows
the model how to think: any thinking that leads to right answers becomes more likely. What stands
in <|think|>…<|/think|> is learnt in the same way, but an answer in there does not count.

What is not practised may be forgotten. --keep adds the loss of SFT on some conversations to each
step, and the log says how all kinds of held-out problems are answered before and after.

Where no checker can tell what is good, people rank replies (`rank` runs rank.py), a reward model
learns from that to score them (`reward_model` runs reward_model.py), and --reward takes its scores.
`best_of_n` runs best_of_n.py.

Watch the reward, the length of the replies and the share of tied groups. In a tied group all
replies are right or all are wrong, so that there is nothing to learn from. Do not watch the loss:
its gradient is what trains the model, but its value says nothing.

Papers: GRPO (DeepSeekMath, arXiv 2402.03300), DeepSeek-R1 (2501.12948), Dr. GRPO (2503.20783), DAPO
(2503.14476), PPO's clip (1707.06347), the KL estimator k3 (joschu.net/blog/kl-approx.html) and its
gradient (DeepSeek-V3.2, 2512.02556).
Differs from GRPO: the defaults are those of Dr. GRPO and DAPO. Advantages are not divided by the
group's standard deviation, the loss is one mean over all tokens of the groups that are not tied,
there is no KL term, and each batch of samples gets a single update, so that the clip never acts.
--loss grpo+std, --kl and --updates bring back all of GRPO. Differs from TRL: each mean is over
all ranks, also that of bnpo, and dapo does not count the tokens of tied groups.
"""
import argparse
import copy
import json
import math
import random
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bpe import checked
from model import load_checkpoint, sdpa, visible
from problems import (CheckerReward, is_correct, problems_that_fit, read_lines, read_problems,
                      warn_of_gamed, write_whole)
from sample import Engine, check_above_0, check_at_least, find_run, load_tokenizer
from training import (Optimizer, RunLog, already_trained, catch_signals, check_finite, contents,
                      finish, init_ranks, load_state, save_run)

ROWS = 64               # replies in one forward and backward pass
REPLIES = 128           # replies to held-out questions that are written in one batch
KEEP_ROWS = 4           # rows of conversations that each file of --keep adds to a step
# The weight of their loss. In the demo the bits are learnt in 6 steps with 0.1, and in 12 not yet
# with 1: the conversations that are kept answer most bits at once.
KEEP_WEIGHT = 0.1
SAMPLES = 16            # replies to a held-out problem, for pass@1 and pass@16
SAMPLED_PROBLEMS = 32   # of each kind, which get so many
READ_PROBLEMS = 8       # whose replies are kept, to be read
ENTROPY_ROWS = 16       # replies of a step whose entropy is computed

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

def rollout(engine, problems, args, seed, reward=CheckerReward()):
    """Samples group_size replies to each problem → prompts and completions, one of each for every
    reply, and rewards (problems, group_size). A reply that was cut off earns reward.cut_off."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    completions = engine.generate(prompts, args.max_new_tokens, args.group_size, temperature=1.0,
                                  seed=seed)
    prompts = [p for p in prompts for _ in range(args.group_size)]
    rewards = torch.tensor(scores(reward, engine, problems, completions))
    return prompts, completions, rewards.view(len(problems), args.group_size)

def scores(reward, engine, problems, completions):
    """What a reward gives the completions, of which each problem has equally many: floats."""
    asked = [p for p in problems for _ in range(len(completions) // len(problems))]
    found = reward.score(asked, [engine.reply_text(completion) for completion in completions])
    if reward.cut_off is None:
        return found
    return [score if completion.finish == "stop" else reward.cut_off
            for score, completion in zip(found, completions)]

def is_well_formed(ids, special):
    """Whether a reply that has ended opens with <|think|>, thinks something, closes that once, and
    then says something. ids: its tokens, with the stop token."""
    opening = special["<|think|>"]
    closing = special["<|/think|>"]
    if ids[0] != opening or ids.count(opening) != 1 or ids.count(closing) != 1:
        return False
    return 1 < ids.index(closing) < len(ids) - 2

def well_formed_replies(completions, special):
    """1.0 for each reply that has ended and is well formed, and 0.0 for the others, (N,)."""
    return torch.tensor([c.finish == "stop" and is_well_formed(c.ids, special)
                         for c in completions]).float()

def thinking_tokens(ids, special):
    """How many tokens of a reply stand between <|think|> and <|/think|>, or after a <|think|> that
    is not closed."""
    count = 0
    is_thinking = False
    for token in ids:
        if token in (special["<|think|>"], special["<|/think|>"]):
            is_thinking = token == special["<|think|>"]
        elif is_thinking:
            count += 1
    return count

def sample_groups(engine, problems, order, asked, args, step, ranks, reward=CheckerReward()):
    """This rank's groups of a step → (their problems, and what rollout returns for these; how many
    problems have been asked since the run began, on all ranks).

    The problems are dealt out to the ranks in turn, from number `asked` of the order on. For each
    group that is tied, also in --format_reward, another problem is asked, in at most args.refill
    rounds, so that a step learns from as many groups as it has prompts.
    """
    chosen, prompts, completions, rewards = [], [], [], []
    wanted = args.prompts
    for extra in range(1 + args.refill):
        numbers = range(asked + ranks.rank, asked + wanted, ranks.world_size)
        mine = [problems[order[i % len(order)]] for i in numbers]
        asked += wanted
        n_tied = 0
        if mine:
            seed = hash((args.seed, step, ranks.rank)) % 2 ** 31 + extra
            try:
                found = rollout(engine, mine, args, seed, reward)
            except OSError as error:
                raise SystemExit(f"step {step + 1}: a tool of the model does not start: {error}; "
                                 "what was saved is kept; continue with --resume") from None
            chosen += mine
            prompts += found[0]
            completions += found[1]
            rewards.append(found[2])
            formed = well_formed_replies(found[1], engine.tokenizer.special).view_as(found[2])
            n_tied = is_tied(found[2] + args.format_reward * formed).sum().item()
        wanted = int(ranks.sum(n_tied)[0])
        if wanted == 0:
            break
    return chosen, prompts, completions, torch.cat(rewards), asked

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
    the mask is 0. The slow twin of PromptCache, which learn() uses: each prompt passes through the
    model with every reply.

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

# ---- What must not be lost -----------------------------------------------------------------------

def load_kept(specs, tokenizer, ranks):
    """FILE or FILE:weight each → [(name, weight, Conversations, a line on what was left out)].
    Raises SystemExit if a file cannot be read."""
    from dialogs import load_conversations, split_weight
    kept = []
    for spec in specs:
        name, weight = split_weight(spec)
        if name == spec:
            weight = KEEP_WEIGHT
        kept.append((name, weight, *load_conversations([name], tokenizer, ranks)))
    return kept

def keep_loaders(kept, T, seed, pad, log):
    """What load_kept found → [(chat_sft.Loader, weight)]."""
    from chat_sft import Loader, fitting
    loaders = []
    for name, weight, conversations, left_out in kept:
        log.say(f"{left_out}{name} is kept with weight {weight}")
        loaders.append((Loader(fitting(conversations, T, log), T, seed, pad), weight))
    return loaders

def keep_gradients(model, loaders, step, ranks):
    """Adds weight · the gradients of SFT on the next KEEP_ROWS rows of each loader → the loss of
    those rows, in nats a supervised token, summed over the ranks and averaged over the loaders."""
    from chat_sft import add_gradients
    batch_size = 1      # the ranks share the rows, one at a time if they cannot share them evenly
    if KEEP_ROWS % ranks.world_size == 0:
        batch_size = KEEP_ROWS // ranks.world_size
    total = 0.0
    for loader, weight in loaders:
        total += add_gradients(model, model.hidden, loader, step * KEEP_ROWS, KEEP_ROWS, batch_size,
                               ranks, weight).item()
    return ranks.sum(total)[0] / len(loaders)

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
    attention = staticmethod(sdpa)

    def __init__(self, model, prompts):
        self.model = model
        self.made = []          # keys and values of layer 0, 1, …
        self.part = None
        self.used = 0
        self.pos = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
        self.s = torch.arange(prompts.shape[1], device=prompts.device)
        if len(prompts):
            model.hidden(prompts, self, last=self.pos)  # of the last layer, only keys and values
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

def pass_at_k(n, right, k):
    """The probability that one of k replies is right, of n replies of which `right` are: unbiased,
    1 - C(n - right, k) / C(n, k) (arXiv 2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)

def answer(engine, problems, max_new_tokens, num_samples=1, temperature=0.0, seed=0):
    """Yields (problem, its num_samples completions, a list that says which are right)."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    size = max(1, REPLIES // num_samples)
    for i in range(0, len(prompts), size):
        completions = engine.generate(prompts[i:i + size], max_new_tokens, num_samples,
                                      temperature=temperature, seed=seed + i)
        for j, problem in enumerate(problems[i:i + size]):
            replies = completions[j * num_samples:(j + 1) * num_samples]
            right = [is_correct(engine.reply_text(reply), problem) for reply in replies]
            yield problem, replies, right

def mean(values):
    return sum(values) / len(values)

def greedy_figures(engine, problems, max_new_tokens):
    """Answers problems greedily → ({kind: figures}, [reply]): how many there are, the share of
    right replies, the mean tokens of a reply and of its thinking; and a row for answers.jsonl for
    each problem."""
    special = engine.tokenizer.special
    by_kind = {}
    rows = []
    for problem, (reply,), (is_right,) in answer(engine, problems, max_new_tokens):
        _, parts = checked(problem["messages"][-1])
        row = dict(kind=problem["kind"], question="".join(text for _, text in parts),
                   answer=problem["answer"], reply=engine.reply_text(reply), right=is_right,
                   reply_tokens=len(reply.ids), thinking_tokens=thinking_tokens(reply.ids, special))
        rows.append(row)
        by_kind.setdefault(problem["kind"], []).append(row)
    found = {}
    for kind, of_kind in by_kind.items():
        found[kind] = dict(n=len(of_kind), accuracy=mean([row["right"] for row in of_kind]),
                           reply_tokens=mean([row["reply_tokens"] for row in of_kind]),
                           thinking_tokens=mean([row["thinking_tokens"] for row in of_kind]))
    return found, rows

def sampled_figures(engine, problems, max_new_tokens, seed):
    """Samples SAMPLES replies at temperature 1 to the first problems of each kind → {kind:
    pass@1 and pass@16, the mean share of right replies and of problems with one among 16; and of
    how many problems}."""
    chosen = {}
    for problem in problems:
        of_kind = chosen.setdefault(problem["kind"], [])
        if len(of_kind) < SAMPLED_PROBLEMS:
            of_kind.append(problem)
    found = {}
    for kind, of_kind in chosen.items():
        right = [sum(right) for _, _, right in
                 answer(engine, of_kind, max_new_tokens, SAMPLES, 1.0, seed)]
        found[kind] = {f"pass_{k}": mean([pass_at_k(SAMPLES, n, k) for n in right])
                       for k in (1, SAMPLES)}
        found[kind]["sampled"] = len(of_kind)
    return found

@torch.inference_mode()
def sampled_entropy(model, ids, mask):
    """(sum, tokens): the entropy in nats of the distributions from which the marked tokens of at
    most ENTROPY_ROWS replies were sampled, which are spread evenly over ids and mask (N, T)."""
    every = math.ceil(len(ids) / ENTROPY_ROWS)
    device = next(model.parameters()).device
    ids = ids[::every].to(device)
    marked = mask[::every, 1:].bool().to(device)
    logprobs = model.logits(model.hidden(ids[:, :-1])[marked]).float().log_softmax(-1)  # (n, V)
    return -(logprobs.exp() * logprobs).sum().item(), marked.sum().item()

def spread_out(rows, most):
    """`most` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]

def read_answers(run, step):
    """The rows of <run>/answers.jsonl up to a step; [] if there are none."""
    path = Path(run) / "answers.jsonl"
    if not path.exists():
        return []
    rows = read_lines(path, dict, "delete the file")
    return [row for row in rows if row["step"] <= step]

def write_answers(run, rows):
    """The file that read_answers reads, there whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(Path(run) / "answers.jsonl", "".join(lines).encode(errors="replace"))

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
    add("--loss", choices=[*LOSSES, *(f"{loss}+std" for loss in LOSSES)], default="dapo",
        help="the mean over a step's tokens; +std divides advantages by the group's deviation")
    add("--clip", type=float, nargs="+", default=[0.2], metavar="LIMIT", help="limits of 1 - ratio "
        "and ratio - 1, or one for both; they act only if --updates > 1")
    add("--format_reward", type=float, default=0.0, help="for a reply that thinks, then answers")
    add("--keep", nargs="+", default=[], metavar="FILE", help="conversations not to be forgotten: "
        f"adds their loss to each step, FILE:weight times (default weight: {KEEP_WEIGHT})")
    add("--kl", type=float, default=0.0, help="weight of the KL divergence from --model")
    add("--max_kl", type=float, help="stop at this KL from --model, in nats a reply")
    add("--reward", default="checker", help="checker, model:RUN of reward_model, or "
        "FILE.py:FUNCTION of (problem, reply)")
    add("--gold", help="checker or FILE.py:FUNCTION: the true objective, only watched")
    add("--eval_every", type=int, default=10, help="steps between tests on held-out problems")
    add("--save_every", type=int, default=25, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the questions' order and of the samples")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "max_steps", "prompts", "max_new_tokens", "updates", "eval_every",
                   "save_every")
    check_at_least(0, args, "refill", "kl", "seed", "format_reward")
    if len(args.clip) > 2:
        raise SystemExit(f"--clip must be one limit or two, got {len(args.clip)}")
    for limit in args.clip:
        if not 0 <= limit < math.inf:
            raise SystemExit(f"--clip must be at least 0, got {limit:g}")
    args.clip = args.clip[0], args.clip[-1]
    args.std = args.loss.endswith("+std")
    args.loss = args.loss.removesuffix("+std")
    if args.max_kl is not None and not args.max_kl > 0:
        raise SystemExit(f"--max_kl must be above 0, got {args.max_kl}")
    check_above_0(args, "lr")
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
    if Path(args.task).exists() or args.task.endswith((".jsonl", ".gz", ".txt")):
        problems = read_file(args)
    else:
        from tasks import read_task
        problems, held_out = read_task(args.task, world_size)
    if args.held_out:
        held_out = read_problems(args.held_out)
    args.held_out = args.held_out or args.task      # for the log
    return problems, held_out

def read_file(args):
    """The problems of a file; only a checker needs their answers."""
    if "checker" in (args.reward, args.gold):
        return read_problems(args.task)
    from preferences import read_prompts
    return read_prompts(args.task)

def load_rewards(args, device):
    """→ the rewards of --reward and --gold, the latter None if it is not given."""
    if args.reward == "checker" and not args.gold:
        return CheckerReward(), None
    from reward_model import load_reward
    gold = None
    if args.gold:
        gold = load_reward("gold", args.gold, device)
    return load_reward("reward", args.reward, device), gold

# Flags that a resumed run must not change
SETTINGS = ("task", "max_steps", "prompts", "group_size", "max_new_tokens", "lr", "updates",
            "refill", "loss", "clip", "kl", "std", "seed", "keep", "format_reward", "max_kl",
            "reward", "gold")

def log_replies(log, step, engine, completions, rewards, golds, kl_reply, most=4):
    """Logs a few replies of a step, evenly spread, with their rewards and how far they are from
    where it started: numbers alone do not show that a reward is being gamed."""
    rows = []
    for i in range(0, len(completions), max(1, len(completions) // most)):
        text = engine.reply_text(completions[i])
        rows.append(dict(reply=text, reward=rewards[i]))
        if golds:
            rows[-1]["gold"] = golds[i]
        log.say(f"  reward {rewards[i]:6.2f} | {' '.join(text.split())}")
    log.say(f"  {len(rows)} replies of step {step}", step=step, kl_reply=kl_reply, replies=rows)

def warn(log, truncated, tied):
    """Logs warnings about a step: `truncated` and `tied` are shares of its replies, 0 to 1."""
    if truncated > 0.5:
        log.say(f"warning: {truncated:.0%} of the replies were cut off, which earns the least; "
                "raise --max_new_tokens")
    if tied > 0.9:
        log.say(f"warning: {tied:.0%} of the groups are tied, whose replies all earn the "
                "same; give problems that are sometimes solved, or raise --group_size")

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
    kept = load_kept(args.keep, tokenizer, ranks)
    reward, gold = load_rewards(args, ranks.device)
    reference = None
    if args.kl or args.max_kl or args.reward != "checker":
        reference = copy.deepcopy(model)
    adamw = dict(kind="adamw", lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer([dict(adamw, params=dict(model.named_parameters()))], ranks)

    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= dict(base=meta["run"], contents_of_task=contents(problems))
    if kept:
        hashes = [conversations.hashes.tolist() for _, _, conversations, _ in kept]
        settings |= dict(contents_of_keep=contents(hashes))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
    asked = state.get("asked", 0)       # problems so far
    log = RunLog(run, args.max_steps, ranks, resume_step=state.get("step"))
    if step >= args.max_steps or state.get("is_far"):
        return already_trained(log, run, ranks, model, tokenizer, "rl", step, args.max_steps,
                               base=meta["run"])
    log.header(args, model, ranks.device)
    block_size = model.config.block_size
    problems = problems_that_fit(args.task, problems, tokenizer, block_size, log)
    if not problems:
        raise SystemExit(f"no question of {args.task} fits into {block_size - 1} tokens; give "
                         "shorter problems, or a model with a larger block_size")
    if args.reward == "checker":
        warn_of_gamed(problems, log)
    loaders = keep_loaders(kept, block_size, args.seed, tokenizer.special["<|pad|>"], log)
    held_out = problems_that_fit(args.held_out, held_out, tokenizer, block_size, log)
    kinds = {p["kind"] for p in problems}
    practised = [p for p in held_out if p["kind"] in kinds]
    others = [p for p in held_out if p["kind"] not in kinds]
    answers = []
    if state:
        answers = read_answers(run, step)

    def report_accuracy():
        if not held_out or not ranks.is_main:
            return
        figures, rows = greedy_figures(engine, practised, args.max_new_tokens)
        sampled = sampled_figures(engine, practised, args.max_new_tokens, args.seed)
        for kind in figures:
            log(step, kind=kind, **figures[kind], **sampled[kind])
        answers.extend(dict(row, step=step) for row in spread_out(rows, READ_PROBLEMS))
        if answers:
            write_answers(run, answers)
        if others and (step == 0 or last):
            figures, _ = greedy_figures(engine, others, args.max_new_tokens)
            accuracy = {kind: figures[kind]["accuracy"] for kind in figures}
            shares = " | ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
            log.say(f"step {step}/{args.max_steps} | held out, not practised: {shares}", step=step,
                    others=accuracy)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "rl", dict(base=meta["run"]), step=step,
                 asked=asked, settings=settings, is_far=is_far)

    special = tokenizer.special
    order = random.Random(args.seed).sample(range(len(problems)), len(problems))
    started = time.perf_counter()
    stop = is_far = False       # is_far: beyond --max_kl
    while True:
        last = step == args.max_steps or is_far
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            report_accuracy()
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        mine, prompts, completions, rewards, asked = sample_groups(
            engine, problems, order, asked, args, step, ranks, reward)
        golds = []
        if gold:
            golds = scores(gold, engine, mine, completions)
        lengths = [len(completion.ids) for completion in completions]
        if step == 0 and args.reward == "checker":
            middle, short, long = thinking_pays(rewards.flatten().tolist(), lengths)
            log.say(f"sampled before learning: replies up to {middle:.0f} tokens are right "
                    f"{short:.0%} of the time, longer ones {long:.0%}",
                    step=0, middle=middle, short=short, long=long)
        ids, mask = rollout_tensors(prompts, completions, tokenizer.special["<|pad|>"])
        well_formed = well_formed_replies(completions, special).view_as(rewards)
        total = rewards + args.format_reward * well_formed
        entropy = sampled_entropy(model, ids, mask)
        keep_losses = []

        def keep():
            keep_losses.append(keep_gradients(model, loaders, step, ranks))

        loss, norm, kl = learn(model, optimizer, ranks, ids, mask,
                               advantages(total, args.std).flatten(), args,
                               lr_scale=1 - step / args.max_steps, reference=reference,
                               keep=keep if loaders else None)
        tied_groups = is_tied(total).sum().item()
        cut_off = sum(completion.finish == "length" for completion in completions)
        thinking = sum(thinking_tokens(completion.ids, special) for completion in completions)
        n, rewarded, formed, tied, truncated, tokens, thinking, nats, measured, stops = ranks.sum(
            len(lengths), rewards.sum().item(), well_formed.sum().item(),
            tied_groups * args.group_size, cut_off, sum(lengths), thinking, *entropy, len(signals))
        kl_reply = mean_gold = None
        if kl is not None:
            kl_reply = kl * ranks.sum(mask.sum().item())[0] / n
            is_far = args.max_kl is not None and kl_reply > args.max_kl
        if gold:
            mean_gold = ranks.sum(sum(golds))[0] / n
        is_last = step + 1 == args.max_steps or is_far
        if args.reward != "checker" and (step % args.eval_every == 0 or is_last):
            log_replies(log, step, engine, completions, rewards.flatten().tolist(), golds, kl_reply)
        stop = stops > 0
        step += 1
        ms = 1000 * (time.perf_counter() - tick)
        seconds_a_step = (time.perf_counter() - started) / (step - first_step)
        thinks = thinking > 0 or args.format_reward > 0
        log(step, reward=rewarded / n, gold=mean_gold, well_formed=formed / n if thinks else None,
            reply_tokens=tokens / n, thinking_tokens=thinking / n if thinks else None,
            tied=tied / n, truncated=truncated / n, entropy=nats / measured,
            keep_loss=keep_losses[-1] if loaders else None, norm=norm, kl=kl,
            kl_reply=kl_reply, loss=loss, ms=ms, eta=seconds_a_step * (args.max_steps - step))
        warn(log, truncated / n, tied / n)
        if is_far:
            log.say(f"--max_kl {args.max_kl}: the replies of step {step} are {kl_reply:.2f} nats "
                    "from --model, so the training ends here")
    finish(log, run, "rl", step, stopped=stop and not last)

# rooms of their own, which this script also starts
COMMANDS = ("reward_model", "rank", "best_of_n")

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        script = Path(__file__).with_name(f"{sys.argv.pop(1)}.py")
        runpy.run_path(str(script), run_name="__main__")
    else:
        main()
