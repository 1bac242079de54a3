r"""
Reinforcement learning on problems whose answers can be checked: an assistant → one that reasons.

    python rl_grpo.py --task data/demo/chat/practice_bits.jsonl --out runs/demo-rl      # CPU, 1 GPU
    torchrun --standalone --nproc_per_node=8 rl_grpo.py --model runs/d24-sft \
        --task gsm8k.jsonl --held_out gsm8k_test.jsonl --out runs/d24-rl                # 8 GPUs

    in:  an assistant's run; .jsonl of {"question", "answer"}, as GSM8K has it (answer behind ####)
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

For each question the model writes group_size replies. A reply is worth 1 if its final answer is
right, else 0, and its advantage is that reward less the group's mean. Every token the model
sampled, the end token too, is made more likely in proportion to its reply's advantage. Nobody shows
the model how: whatever thinking leads to right answers is what grows.

Watch reward, reply length and tied groups (all right or all wrong: nothing to learn from), not the
loss: on fresh samples its value says nothing, only its gradient does.

Papers: GRPO (DeepSeekMath, arXiv 2402.03300), DeepSeek-R1 (2501.12948), Dr. GRPO (2503.20783), DAPO
(2503.14476), PPO's clip (1707.06347), the KL estimator k3 (joschu.net/blog/kl-approx.html).
Differs from the papers: by default as Dr. GRPO and DAPO have it (no division by the group's
deviation, one mean over all tokens of the groups that are not tied, no KL), one update a batch of
samples, so that the clip never acts; --std, --kl and --updates bring GRPO's terms back.
"""
import argparse
import copy
import random
import time
from pathlib import Path

import torch

from bpe import Tokenizer
from eval import is_correct, read_problems
from model import load_checkpoint
from sample import Engine, find_run
from training import (Optimizer, RunLog, already_trained, catch_signals, check_finite, contents,
                      finish, init_ranks, load_state, save_run)

def advantages(rewards, divide_by_std=False):
    """rewards (prompts, group_size) → the same shape: each reply against the mean of its own group.

    >>> advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    return advantage / (rewards.std(1, keepdim=True) + 1e-6) if divide_by_std else advantage

def rollout_tensors(prompts, completions, pad):
    """Prompts and completions → ids, mask (N, T): the mask marks the tokens the model sampled."""
    longest = max(len(p) + len(c.ids) for p, c in zip(prompts, completions))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        end = len(p) + len(c.ids)
        ids[i, :end] = torch.tensor(p + c.ids)
        mask[i, len(p):end] = torch.tensor(c.sampled, dtype=torch.float)
    return ids, mask

def token_logprobs(model, ids, mask, rows=64):
    """log p of the tokens of ids[:, 1:] that mask (N, T - 1) marks, else 0, a few rows at a time.
    Only what is marked passes the head: neither prompts nor padding."""
    found = []
    for part, marked in zip(ids.split(rows), mask.bool().split(rows)):
        hidden, targets = model.hidden(part[:, :-1])[marked], part[:, 1:][marked]   # (n, C), (n,)
        losses = model.loss(hidden[None], targets[None], reduction="none")[0]
        found.append(torch.zeros(marked.shape, device=ids.device).masked_scatter(marked, -losses))
    return torch.cat(found)

def policy_loss(logprobs, old_logprobs, ref_logprobs, advantage, mask, clip, kl):
    """The clipped objective and the KL, summed over sampled tokens; all (N, T), advantage (N,).

        ratio = π(token) / π_old(token)
        loss  = -min(ratio · A, clip(ratio, 1 - clip, 1 + clip) · A) + kl · k3
        k3    = r - ln r - 1 with r = π_ref / π, an estimate of KL(π ‖ π_ref) that is never negative

    Divide by the token count.
    """
    ratio = (logprobs - old_logprobs).exp()
    A = advantage[:, None]
    losses = -torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    k3 = torch.zeros(())
    if ref_logprobs is not None:
        log_r = ref_logprobs - logprobs
        k3 = log_r.exp() - log_r - 1
        losses = losses + kl * k3
    return (losses * mask).sum(), (k3 * mask).sum()

def accuracy_by_kind(engine, problems, max_new_tokens):
    """{kind: (share right, mean reply length in tokens)}, greedy."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    scored = {}
    for i in range(0, len(prompts), 128):
        completions = engine.generate(prompts[i:i + 128], max_new_tokens, temperature=0)
        for problem, c in zip(problems[i:], completions):
            right = is_correct(engine.reply_text(c), problem)
            scored.setdefault(problem["kind"], []).append((right, len(c.ids)))
    return {kind: (sum(r for r, _ in rows) / len(rows), sum(n for _, n in rows) / len(rows))
            for kind, rows in scored.items()}

def thinking_pays(rewards, lengths):
    """Accuracy of the shorter and the longer half of replies: is there anything to discover?

    → (middle, accuracy up to it, accuracy above it). Where long replies are not more often right,
    RL settles on short guesses: then the stage before has to teach the steps better.
    """
    middle = (min(lengths) + max(lengths)) / 2
    short = [r for r, n in zip(rewards, lengths) if n <= middle]
    long = [r for r, n in zip(rewards, lengths) if n > middle]
    return middle, sum(short) / max(1, len(short)), sum(long) / max(1, len(long))

def parse_args():
    parser = argparse.ArgumentParser(description="reinforcement learning on checkable problems")
    parser.add_argument("--model", help="run folder of an assistant; default: the newest one")
    parser.add_argument("--task", required=True, help="practice problems, .jsonl")
    parser.add_argument("--held_out", help="never practised: answered before, during, after")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue from <out>/state, if any")
    parser.add_argument("--max_steps", type=int, default=50, help="batches of rollouts")
    parser.add_argument("--prompts", type=int, default=16, help="questions a step, over all ranks")
    parser.add_argument("--group_size", type=int, default=16, help="replies to each question")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens a reply, at most")
    parser.add_argument("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps on each batch")
    parser.add_argument("--clip", type=float, default=0.2, help="the ratio's room if updates > 1")
    parser.add_argument("--kl", type=float, default=0.0, help="weight of the KL to --model")
    parser.add_argument("--std", action="store_true", help="divide advantages by the group's std")
    parser.add_argument("--eval_every", type=int, default=10, help="steps between held-out tests")
    parser.add_argument("--save_every", type=int, default=25, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=1337, help="of question order and samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()

def rollout(engine, problems, args, seed):
    """Samples group_size replies each → prompts, completions, rewards (problems, group_size)."""
    prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in problems]
    completions = engine.generate(prompts, args.max_new_tokens, args.group_size, temperature=1.0,
                                  seed=seed)
    prompts = [p for p in prompts for _ in range(args.group_size)]
    asked = [p for p in problems for _ in range(args.group_size)]
    rewards = [float(c.finish == "stop" and is_correct(engine.reply_text(c), problem))
               for problem, c in zip(asked, completions)]
    return prompts, completions, torch.tensor(rewards).view(len(problems), args.group_size)

def learn(model, optimizer, ranks, ids, mask, advantage, args, lr_scale, reference):
    """One batch of rollouts → `updates` optimizer steps; returns (loss, norm, kl) of the last."""
    live = (advantage != 0) | (reference is not None)   # a tied group has only the KL's gradient
    ids, mask, advantage = (t[live].to(ranks.device) for t in (ids, mask[:, 1:], advantage))
    tokens = max(1.0, ranks.sum(mask.sum().item())[0])          # one mean over all ranks
    with torch.inference_mode():
        ref = token_logprobs(reference, ids, mask) if reference is not None and len(ids) else None
        old = token_logprobs(model, ids, mask) if args.updates > 1 and len(ids) else None
    for update in range(args.updates):
        loss = kl = 0.0
        for rows in torch.arange(len(ids)).split(64) if len(ids) else ():
            logprobs = token_logprobs(model, ids[rows], mask[rows])
            old_logprobs = logprobs.detach() if old is None else old[rows]
            ref_logprobs = None if ref is None else ref[rows]
            part, part_kl = policy_loss(logprobs, old_logprobs, ref_logprobs, advantage[rows],
                                        mask[rows], args.clip, args.kl)
            (part / tokens * ranks.world_size).backward()
            loss, kl = loss + part.item() / tokens, kl + part_kl.item() / tokens
        norm = optimizer.average_grads()
        loss, kl = ranks.sum(loss, kl)
        check_finite(f"update {update + 1}", loss, norm)
        optimizer.step(lr_scale, min(1.0, 1.0 / (norm + 1e-6)))
    return loss, norm, kl if reference is not None else None

def main():
    args = parse_args()
    run = Path(args.out)
    signals, stop = catch_signals(), False
    ranks = init_ranks(args.device)
    if args.prompts % ranks.world_size:
        nearest = -(-args.prompts // ranks.world_size) * ranks.world_size
        raise SystemExit(f"prompts {args.prompts} is not a multiple of world_size = "
                         f"{ranks.world_size}; they are split evenly; try --prompts {nearest}")
    if args.group_size < 2:
        raise SystemExit(f"group_size {args.group_size} leaves nothing to compare a reply with; "
                         "it must be at least 2; try --group_size 16")
    problems = read_problems(args.task)
    held_out = read_problems(args.held_out) if args.held_out else []
    kinds = {p["kind"] for p in problems}
    held_out = [p for p in held_out if p["kind"] in kinds]
    base = find_run(args.model, ("sft",))
    model, meta = load_checkpoint(base, ranks.device)
    model.eval()    # no dropout: the samples' probabilities are the ones that are trained
    tokenizer = Tokenizer.load(base)
    reference = copy.deepcopy(model) if args.kl else None
    adamw = dict(kind="adamw", lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer([dict(adamw, params=dict(model.named_parameters()))], ranks)
    engine = Engine(model, tokenizer)
    kept = ("task", "max_steps", "prompts", "group_size", "max_new_tokens", "lr", "updates", "clip",
            "kl", "std", "seed")
    settings = {key: getattr(args, key) for key in kept}
    settings |= dict(base=meta["run"], contents_of_task=contents(problems))
    state = load_state(run, args.resume, ranks, optimizer, model, settings)
    step = state["step"] if state else 0
    log = RunLog(run, args.max_steps, ranks, resume_step=step if state else None)
    if step >= args.max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "rl", step, args.max_steps,
                               base=meta["run"])
    log.header(args, model, ranks.device)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "rl", dict(base=meta["run"]), step=step,
                 settings=settings)

    def report_accuracy():
        if held_out and ranks.is_main:
            head = f"step {step:{len(str(args.max_steps))}d}/{args.max_steps}"
            by_kind = accuracy_by_kind(engine, held_out, args.max_new_tokens)
            for kind, (share, tokens) in by_kind.items():
                log.say(f"{head} | held out: {kind} accuracy {share:.3f} | "
                        f"reply {tokens:.1f} tokens",
                        step=step, kind=kind, accuracy=share, reply_tokens=tokens)

    order = random.Random(args.seed).sample(range(len(problems)), len(problems))
    started, first_step = time.perf_counter(), step
    while True:
        last = step == args.max_steps
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            report_accuracy()
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        mine = [problems[order[(step * args.prompts + i) % len(order)]]
                for i in range(ranks.rank, args.prompts, ranks.world_size)]
        seed = hash((args.seed, step, ranks.rank)) % 2 ** 31
        prompts, completions, rewards = rollout(engine, mine, args, seed)
        lengths = [len(c.ids) for c in completions]
        if step == 0:
            middle, short, long = thinking_pays(rewards.flatten().tolist(), lengths)
            log.say(f"sampled before learning: replies up to {middle:.0f} tokens are right "
                    f"{short:.0%} of the time, longer ones {long:.0%}",
                    step=0, middle=middle, short=short, long=long)
        ids, mask = rollout_tensors(prompts, completions, tokenizer.special["<|pad|>"])
        advantage = advantages(rewards, args.std).flatten()
        loss, norm, kl = learn(model, optimizer, ranks, ids, mask, advantage, args,
                               lr_scale=1 - step / args.max_steps, reference=reference)
        tied_groups = (rewards.std(1) == 0).sum().item()
        n, reward, tied, truncated, tokens, stops = ranks.sum(
            len(lengths), rewards.sum().item(), tied_groups * args.group_size,
            sum(c.finish == "length" for c in completions), sum(lengths), len(signals))
        stop = stops > 0
        step += 1
        log(step, reward=reward / n, reply_tokens=tokens / n, tied=tied / n,
            truncated=truncated / n, norm=norm, kl=kl, loss=loss, ms=1000 * (time.perf_counter() - tick),
            eta=(time.perf_counter() - started) / (step - first_step) * (args.max_steps - step))
        if truncated > n / 2:
            log.say(f"warning: {truncated / n:.0%} of the replies were cut off and earned nothing; "
                    "raise --max_new_tokens")
        if tied > 0.9 * n:
            log.say(f"warning: {tied / n:.0%} of the groups are tied, all right or all wrong; "
                    "give problems that are sometimes solved, or raise --group_size")
    finish(log, run, "rl", step, stopped=stop and step < args.max_steps)

if __name__ == "__main__":
    main()
