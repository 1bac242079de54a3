r"""
Reinforcement learning on problems whose answers can be checked: an assistant → one that reasons.

    python rl_grpo.py --task data/demo/chat/practice_bits.jsonl --out runs/demo-rl      # CPU, 1 GPU
    torchrun --standalone --nproc_per_node=8 rl_grpo.py --model runs/d24-sft \
        --task gsm8k.jsonl --held_out gsm8k_test.jsonl --out runs/d24-rl                # 8 GPUs

    python rl_grpo.py --reward model:runs/demo-reward --kl 0.1 --max_kl 10 \
        --model runs/demo-sft --task prompts.jsonl --out runs/demo-rlhf                     # RLHF

    in:  an assistant's run; a .jsonl of {"question", "answer"}, as in GSM8K's own files
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

For each question the model writes group_size replies. A reply is worth 1 if its final answer is
right, and 0 otherwise. Its advantage is that reward minus the mean reward of its group. Every token
that the model sampled, the end token too, becomes more likely if the advantage of its reply is
positive, and less likely if it is negative; a larger advantage has a larger effect. Nobody shows
the model how to think: any thinking that leads to right answers becomes more likely.

Where no checker can tell what is good, people rank replies (`rank` runs rank.py), a reward model
learns from that to score them (`reward_model` runs reward_model.py), and --reward takes its scores.

Watch the reward, the length of the replies and the share of tied groups. In a tied group all
replies are right or all are wrong, so that there is nothing to learn from. Do not watch the loss:
its gradient is what trains the model, but its value says nothing.

Papers: GRPO (DeepSeekMath, arXiv 2402.03300), DeepSeek-R1 (2501.12948), Dr. GRPO (2503.20783), DAPO
(2503.14476), PPO's clip (1707.06347), the KL estimator k3 (joschu.net/blog/kl-approx.html).
Differs from GRPO: the defaults are those of Dr. GRPO and DAPO. Advantages are not divided by the
group's standard deviation, the loss is one mean over all tokens of the groups that are not tied,
there is no KL term, and each batch of samples gets a single update, so that the clip never acts.
--std, --kl and --updates bring back all of GRPO but its mean over each reply.
"""
import argparse
import copy
import math
import random
import runpy
import sys
import time
from pathlib import Path

import torch

from model import load_checkpoint
from problems import CheckerReward, is_correct, problems_that_fit, read_problems
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
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-6)
    return advantage

def policy_loss(logprobs, old_logprobs, ref_logprobs, advantage, mask, clip, kl):
    """→ (the loss, an estimate of the KL in nats), each a sum over the tokens where mask is 1.
    logprobs, old_logprobs, ref_logprobs, mask (N, T); advantage (N,). Without a reference model
    ref_logprobs is None. For means, divide both results by the number of sampled tokens.

        ratio = π(token) / π_old(token)
        loss  = -min(ratio · A, clip(ratio, 1 - clip, 1 + clip) · A) + kl · k3
        k3    = r - ln r - 1 with r = π_ref / π, an estimate of KL(π ‖ π_ref) that is never negative
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

def learn(model, optimizer, ranks, ids, mask, advantage, args, lr_scale, reference):
    """Takes args.updates optimizer steps on one batch of rollouts: ids and mask (N, T), advantage
    (N,), which rollout_tensors and advantages made. Returns (loss, gradient norm, kl) of the last
    step; kl is None without a reference model."""
    # Replies of a tied group have advantage 0. Only the KL term can learn from them.
    live = (advantage != 0) | (reference is not None)
    ids = ids[live].to(ranks.device)
    mask = mask[:, 1:][live].to(ranks.device)
    advantage = advantage[live].to(ranks.device)
    tokens = max(1.0, ranks.sum(mask.sum().item())[0])          # one mean over all ranks
    ref_logprobs = torch.zeros_like(mask)
    old_logprobs = torch.zeros_like(mask)
    with torch.inference_mode():
        if reference is not None and len(ids):
            ref_logprobs = token_logprobs(reference, ids, mask)
        if args.updates > 1 and len(ids):
            old_logprobs = token_logprobs(model, ids, mask)
    for update in range(args.updates):
        loss = kl = 0.0
        for start in range(0, len(ids), ROWS):
            rows = slice(start, start + ROWS)
            logprobs = token_logprobs(model, ids[rows], mask[rows])
            # with a single update, the policy is still the one that sampled the replies
            old = old_logprobs[rows] if args.updates > 1 else logprobs.detach()
            ref = ref_logprobs[rows] if reference is not None else None
            part, part_kl = policy_loss(logprobs, old, ref, advantage[rows], mask[rows], args.clip,
                                        args.kl)
            (part / tokens * ranks.world_size).backward()       # average_grads() divides by it
            loss += part.item() / tokens
            kl += part_kl.item() / tokens
        norm = optimizer.average_grads()
        loss, kl = ranks.sum(loss, kl)
        check_finite(f"update {update + 1}", loss, norm)
        optimizer.step(lr_scale, min(1.0, 1.0 / (norm + 1e-6)))
    if reference is None:
        kl = None
    return loss, norm, kl

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
    add("--task", required=True, help="problems to practise, .jsonl")
    add("--held_out", help="problems to test before, during and after training, never to train on")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue from <out>/state, if there is one")
    add("--max_steps", type=int, default=50, help="batches of rollouts")
    add("--prompts", type=int, default=16, help="questions of a step, on all ranks together")
    add("--group_size", type=int, default=16, help="replies to each question")
    add("--max_new_tokens", type=int, default=128, help="longest reply, in tokens")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW; it falls linearly to 0")
    add("--updates", type=int, default=1, help="optimizer steps on each batch of rollouts")
    add("--clip", type=float, default=0.2, help="limit of |ratio - 1|; acts only if --updates > 1")
    add("--kl", type=float, default=0.0, help="weight of the KL divergence from --model")
    add("--max_kl", type=float, help="stop at this KL from --model, in nats a reply")
    add("--reward", default="checker", help="checker, model:RUN of reward_model, or "
        "FILE.py:FUNCTION of (problem, reply)")
    add("--gold", help="checker or FILE.py:FUNCTION: the true objective, only watched")
    add("--std", action="store_true", help="divide advantages by the group's standard deviation")
    add("--eval_every", type=int, default=10, help="steps between tests on held-out problems")
    add("--save_every", type=int, default=25, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the questions' order and of the samples")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "max_steps", "prompts", "max_new_tokens", "updates", "eval_every",
                   "save_every")
    check_at_least(0, args, "clip", "kl", "seed")
    if args.max_kl is not None and not args.max_kl > 0:
        raise SystemExit(f"--max_kl must be above 0, got {args.max_kl}")
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

def read_task(args):
    """The problems of --task; only a checker needs their answers."""
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
SETTINGS = ("task", "max_steps", "prompts", "group_size", "max_new_tokens", "lr", "updates", "clip",
            "kl", "std", "seed", "max_kl", "reward", "gold")

def log_replies(log, step, engine, completions, rewards, golds, most=4):
    """Logs a few replies of a step, evenly spread, with their rewards: numbers alone do not show
    that a reward is being gamed."""
    rows = []
    for i in range(0, len(completions), max(1, len(completions) // most)):
        text = engine.reply_text(completions[i])
        rows.append(dict(reply=text, reward=rewards[i]))
        if golds:
            rows[-1]["gold"] = golds[i]
        log.say(f"  reward {rewards[i]:6.2f} | {' '.join(text.split())}")
    log.say(f"  {len(rows)} replies of step {step}", step=step, replies=rows)

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
    problems = read_task(args)
    held_out = read_problems(args.held_out) if args.held_out else []
    base = find_run(args.model, ("sft",))
    tokenizer = load_tokenizer(base)
    model, meta = load_checkpoint(base, ranks.device, vocab_size=tokenizer.n_vocab)
    model.eval()    # without dropout, training sees the same probabilities as sampling
    engine = Engine(model, tokenizer)
    reward, gold = load_rewards(args, ranks.device)
    follows_kl = args.kl or args.max_kl or args.reward != "checker"
    reference = None
    if follows_kl:
        reference = copy.deepcopy(model)
    adamw = dict(kind="adamw", lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer([dict(adamw, params=dict(model.named_parameters()))], ranks)

    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= dict(base=meta["run"], contents_of_task=contents(problems))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
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
                 settings=settings, is_far=is_far)

    order = random.Random(args.seed).sample(range(len(problems)), len(problems))
    started = time.perf_counter()
    stop = is_far = False
    while True:
        last = step == args.max_steps or is_far
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            report_accuracy()
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        mine = []
        for i in range(ranks.rank, args.prompts, ranks.world_size):
            mine.append(problems[order[(step * args.prompts + i) % len(order)]])
        seed = hash((args.seed, step, ranks.rank)) % 2 ** 31
        prompts, completions, rewards = rollout(engine, mine, args, seed, reward)
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
        advantage = advantages(rewards, args.std).flatten()
        loss, norm, kl = learn(model, optimizer, ranks, ids, mask, advantage, args,
                               lr_scale=1 - step / args.max_steps, reference=reference)
        tied_groups = (rewards.std(1) == 0).sum().item()
        cut_off = sum(completion.finish == "length" for completion in completions)
        n, total_reward, total_gold, tied, truncated, tokens, sampled, stops = ranks.sum(
            len(lengths), rewards.sum().item(), sum(golds), tied_groups * args.group_size, cut_off,
            sum(lengths), mask.sum().item(), len(signals))
        kl_reply = None
        if kl is not None:
            kl_reply = kl * sampled / n
            is_far = args.max_kl is not None and kl_reply > args.max_kl
        stop = stops > 0
        if args.reward != "checker" and (step % args.eval_every == 0 or is_far):
            log_replies(log, step, engine, completions, rewards.flatten().tolist(), golds)
        step += 1
        ms = 1000 * (time.perf_counter() - tick)
        seconds_a_step = (time.perf_counter() - started) / (step - first_step)
        mean_gold = None
        if gold:
            mean_gold = total_gold / n
        log(step, reward=total_reward / n, gold=mean_gold, reply_tokens=tokens / n, tied=tied / n,
            truncated=truncated / n, norm=norm, kl=kl, kl_reply=kl_reply, loss=loss, ms=ms,
            eta=seconds_a_step * (args.max_steps - step))
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
