"""
Best of n: the simplest way to follow a reward, and how far it can be trusted.

    python rl_grpo.py best_of_n --model runs/demo-sft --reward model:runs/demo-reward \
        --gold demo/rlhf.py:funny --task prompts.jsonl --out runs/demo-reward/best_of_n.jsonl

    in:  an assistant's run, a reward, the true objective, prompts
    out: a .jsonl with a row for each n: {"n", "kl", "reward", "gold"}

The model writes N replies to each prompt, and the one with the highest reward is taken out of n of
them. The larger n is, the higher is the reward; the gold rises with it only as long as the reward
is right about such replies. No weight changes, so the distance to the model is known exactly:
KL = ln n - (n - 1) / n nats, at most. Compare it with GRPO at the same KL.

`turning_point` finds where the gold of a run of rl_grpo.py was highest, for the report.

Papers: Gao et al. on overoptimisation (arXiv 2210.10760); the estimator is WebGPT's (2112.09332,
appendix I); the KL is Stiennon et al.'s (2009.01325, appendix G.3).
"""
import argparse
import json
import math
import signal
import time
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from model import load_checkpoint
from problems import problems_that_fit, read_lines, read_problems, write_whole
from sample import Engine, check_at_least, choose_device, find_run, load_tokenizer, quiet_end

BATCH = 4               # prompts whose replies are written together
WINDOW = 5              # steps over which a noisy gold is averaged

# ---- What is to be expected ----------------------------------------------------------------------

def best_of_n(rewards, golds, n):
    """Rewards and golds of N replies to a prompt → the expected reward and gold of the reply with
    the highest reward among n of them, over all choices of n: with the replies sorted by reward,
    the i-th of them is the best with probability C(i - 1, n - 1) / C(N, n).

    >>> best_of_n([0.0, 1.0, 2.0], [5.0, 5.0, 2.0], 3)
    (2.0, 2.0)
    """
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    choices = math.comb(len(order), n)
    reward = gold = 0.0
    for place, i in enumerate(order):
        share = math.comb(place, n - 1) / choices
        reward += share * rewards[i]
        gold += share * golds[i]
    return reward, gold

def kl_of(n):
    """How far the best of n replies is from the model, in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n

def turning_point(rows):
    """Rows {"step", "kl_reply", "gold", "reward"} of a log → the mean of those WINDOW steps in a
    row whose mean gold is highest, and the mean of the last ones. None if there are fewer."""
    if len(rows) < WINDOW:
        return None
    means = []
    for first in range(len(rows) - WINDOW + 1):
        window = rows[first:first + WINDOW]
        means.append({key: sum(row[key] for row in window) / WINDOW
                      for key in ("step", "kl_reply", "gold", "reward")})
    return max(means, key=lambda row: row["gold"]), means[-1]

def turning_rows(turn):
    """What turning_point found → rows for a table."""
    if turn is None:
        return []
    return [(when, f"{row['step']:.0f}", f"{row['kl_reply']:.2f}", f"{row['reward']:.2f}",
             f"{row['gold']:.2f}") for when, row in zip(("highest gold", "the last"), turn)]

def read_best_of_n(run):
    """The rows of <run>/best_of_n.jsonl, for a table; [] if there is no such file."""
    path = Path(run) / "best_of_n.jsonl"
    if not path.is_file():
        return []
    return read_lines(path, lambda row: (row["n"], *(f"{row[key]:.2f}"
                                                     for key in ("kl", "reward", "gold"))),
                      "make it again with python rl_grpo.py best_of_n")

# ---- Main ----------------------------------------------------------------------------------------

def measure(engine, problems, reward, gold, args):
    """Scores args.samples replies to each problem → rows {"n", "kl", "reward", "gold"}, for n that
    double from 1 on. Replies that were cut off get what the reward gives them."""
    sizes = [2 ** power for power in range(args.samples.bit_length())]
    sizes = [n for n in sizes if n <= args.samples]
    totals = {n: [0.0, 0.0] for n in sizes}
    started = time.perf_counter()
    for first in range(0, len(problems), BATCH):
        batch = problems[first:first + BATCH]
        prompts = [engine.tokenizer.render(p["messages"], for_completion=True)[0] for p in batch]
        completions = engine.generate(prompts, args.max_new_tokens, args.samples,
                                      seed=args.seed + first)
        for number, problem in enumerate(batch):
            mine = completions[number * args.samples:(number + 1) * args.samples]
            replies = [engine.reply_text(completion) for completion in mine]
            rewards = reward.score([problem] * len(mine), replies)
            golds = gold.score([problem] * len(mine), replies)
            for scores, cut_off in ((rewards, reward.cut_off), (golds, gold.cut_off)):
                for i, completion in enumerate(mine):
                    if completion.finish != "stop" and cut_off is not None:
                        scores[i] = cut_off
            for n in sizes:
                found = best_of_n(rewards, golds, n)
                totals[n] = [total + value for total, value in zip(totals[n], found)]
        done = first + len(batch)
        seconds = (time.perf_counter() - started) / done
        print(f"{done}/{len(problems)} prompts | eta {seconds * (len(problems) - done):.0f} s",
              flush=True)
    return [dict(n=n, kl=kl_of(n), reward=totals[n][0] / len(problems),
                 gold=totals[n][1] / len(problems)) for n in sizes]

def parse_args():
    parser = argparse.ArgumentParser(prog="rl_grpo.py best_of_n",
                                     description="the best of n replies by a reward")
    add = parser.add_argument
    add("--model", help="run folder of an assistant (default: the newest one)")
    add("--reward", required=True, help="model:RUN, FILE.py:FUNCTION or checker")
    add("--gold", required=True, help="FILE.py:FUNCTION or checker: the true objective")
    add("--task", required=True, help=".jsonl or .txt of prompts")
    add("--out", required=True, help="FILE.jsonl of the figures")
    add("--prompts", type=int, default=32, help="the first prompts of the task, at most")
    add("--samples", type=int, default=64, help="replies to each prompt, the largest n")
    add("--max_new_tokens", type=int, default=128, help="longest reply, in tokens")
    add("--seed", type=int, default=1337, help="seed of the replies")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_at_least(1, args, "prompts", "samples", "max_new_tokens")
    check_at_least(0, args, "seed")
    return args

class Printer:
    """What problems_that_fit logs to, where there is no run."""

    def say(self, text):
        print(text)

def main():
    from preferences import read_prompts
    from reward_model import load_reward
    args = parse_args()
    read = read_problems if "checker" in (args.reward, args.gold) else read_prompts
    problems = read(args.task)
    run = find_run(args.model, ("sft", "rl"))
    device = choose_device(args.device)
    reward = load_reward("reward", args.reward, device)
    gold = load_reward("gold", args.gold, device)
    tokenizer = load_tokenizer(run)
    model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
    print(f"{run}: stage {meta['stage']}, step {meta['step']}", flush=True)
    problems = problems_that_fit(args.task, problems, tokenizer, model.config.block_size, Printer())
    engine = Engine(model.for_inference(), tokenizer)
    rows = measure(engine, problems[:args.prompts], reward, gold, args)
    write_whole(args.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    for row in rows:
        print(f"best of {row['n']:4d} | kl {row['kl']:.2f} | reward {row['reward']:.3f} | gold "
              f"{row['gold']:.3f}")
    print(f"{args.out}: {len(rows)} rows")

if __name__ == "__main__":
    with quiet_end():
        main()
