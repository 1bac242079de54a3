"""
Can practice reach what no example showed? Supervised examples follow chains of at most six arrows;
reinforcement learning practises chains of six to sixteen, of which only the end is checked.

    python bench/beyond.py                      # three seeds, on one core
    python bench/beyond.py --seeds 1            # one of them

in:  nothing
out: a table for each seed, a problem answered before and after, what the table says about the
     claim, and all of it as one line of JSON

A question lists pairs of letters and a letter to start from: "fb ac cf: a". From a one comes to c,
from c to f, from f to b, where no pair begins. The reply thinks "acfb" and answers "#### b". A
question has eight pairs, in the examples sometimes fewer; a chain of more than eight arrows has one
for each. Examples need pairs that do not belong to the chain: without them fine-tuning led to no
chain of one arrow more, and there was nothing to practise on.

Practice can only make likelier what is sampled now and then. Where examples of one to four arrows
were equally frequent, fine-tuning with seed 0 taught to stop after four: of longer chains none was
followed in 3072 replies, and one after 80 steps of practice. Long chains are therefore seldom in
the examples, so that a model learns to end where no pair begins, not after so many letters.

When a small model begins to follow chains differs from seed to seed: one has learnt it after 10,000
examples, another needs 30,000. Fine-tuning therefore goes in rounds, each on new examples, and ends
with the round after which the longest chains of the examples are followed. How much further it goes
by itself depends on the seed, so each length is judged by its own figures.

The problems of all lengths are in one file. At first the longest are hardly ever solved, so that
their groups are tied and teach nothing. What is learnt from shorter ones brings the next length
into reach: that makes a curriculum, although nobody orders the problems.

pass@1 is the share of right replies at temperature 1, pass@16 the share of problems with at least
one right reply among 16. Practice that only made likely what the model already did could raise
pass@1 up to the pass@16 of before. A length on which it ends above that was not merely sharpened;
it counts if more than half of the replies are right, because one lucky reply is above 0 of 16.
"""
import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bpe import SPECIAL_TOKENS, Tokenizer
from measure import finish, table
from model import GPT, GPTConfig, save_checkpoint
from sample import check_at_least
from training import read_log

TAUGHT = {1: 6, 2: 5, 3: 4, 4: 3, 5: 2, 6: 1}   # arrows of an example's chain: how often
PRACTISED = range(6, 17)
TESTED = range(6, 17, 2)
PAIRS = 8                       # in a question, if the chain needs no more
EXAMPLES = 10_000               # of each round of fine-tuning
ROUNDS = 8                      # of fine-tuning, at most
LEARNT = 0.9                    # share of the longest taught chains from which it is learnt
HELD_OUT = 32                   # problems of each length
SHAPE = dict(block_size=96, n_layer=2, n_head=2, n_embd=64, windows="L")

# ---- Questions -----------------------------------------------------------------------------------

def chain(rng, arrows, pairs):
    """A chain of this many arrows among so many pairs → (question, thought, answer).

    >>> chain(random.Random(1), 2, 3)
    ('yc es sz: e', 'esz', 'z')
    """
    letters = rng.sample(string.ascii_lowercase, arrows + 1 + 2 * (pairs - arrows))
    path = letters[:arrows + 1]
    others = letters[arrows + 1:]
    found = [a + b for a, b in zip(path, path[1:])]
    found += [a + b for a, b in zip(others[::2], others[1::2])]
    rng.shuffle(found)
    return f"{' '.join(found)}: {path[0]}", "".join(path), path[-1]

def example(rng):
    """A supervised conversation."""
    arrows = rng.choices(list(TAUGHT), weights=TAUGHT.values())[0]
    question, thought, answer = chain(rng, arrows, rng.randint(arrows, PAIRS))
    reply = [dict(type="think", text=thought), dict(type="text", text=f"#### {answer}")]
    return dict(messages=[dict(role="user", content=question),
                          dict(role="assistant", content=reply)])

def problem(rng, arrows):
    question, _, answer = chain(rng, arrows, max(arrows, PAIRS))
    return dict(question=question, answer=answer, kind=f"{arrows} arrows")

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def write_files(folder, seed, practised):
    """Held-out problems as long as the longest examples, problems to practise, held-out problems
    of all their lengths, and an untrained model with a tokenizer of bytes, in which each letter is
    a token."""
    rng = random.Random(seed)
    write_rows(folder / "taught.jsonl", [problem(rng, max(TAUGHT)) for _ in range(HELD_OUT)])
    write_rows(folder / "practice.jsonl",
               [problem(rng, rng.choice(PRACTISED)) for _ in range(practised)])
    write_rows(folder / "held_out.jsonl",
               [problem(rng, arrows) for arrows in TESTED for _ in range(HELD_OUT)])
    tokenizer = Tokenizer.train(["a"], 256 + len(SPECIAL_TOKENS))
    torch.manual_seed(seed)
    model = GPT(GPTConfig.preset("d2", vocab_size=tokenizer.n_vocab, **SHAPE))
    save_checkpoint(folder / "base", model, tokenizer)

# ---- One seed ------------------------------------------------------------------------------------

def run_stage(folder, is_kept, script, *flags):
    """Runs a stage as a user does. In a folder that is kept it shows its steps, and continues what
    was interrupted. SystemExit with the end of what it said if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    if is_kept:
        sys.stdout.flush()
        done = subprocess.run([*command, "--resume"], cwd=folder)
    else:
        done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{script} failed: {(done.stdout or '')[-2000:]}")

def measured(run):
    """{kind: its figures at every evaluation} of a run of rl_grpo.py, the first before practice."""
    found = {}
    for row in read_log(run):
        if "accuracy" in row:
            found.setdefault(row["kind"], []).append(row)
    return found

def longest(run):
    """A held-out problem of the greatest length → (question, right answer, reply before practice,
    reply after it)."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").open()]
    question = rows[-1]["question"]
    replies = [row["reply"] for row in rows if row["question"] == question]
    return question, rows[-1]["answer"], replies[0], replies[-1]

def teach(folder, seed, args):
    """Fine-tunes in rounds, each on new examples, until the longest chains of the examples are
    followed → (name of the last run, share of those chains that it follows)."""
    model = "base"
    for number in range(1, args.rounds + 1):
        examples = f"examples_{number}.jsonl"
        rng = random.Random(f"{seed} {number}")
        write_rows(folder / examples, [example(rng) for _ in range(args.examples)])
        run = f"sft_{number}"
        run_stage(folder, args.folder, "chat_sft.py", "--model", model, "--out", run,
                  "--data", examples, "--held_out", "taught.jsonl", "--batch_size", 21,
                  "--lr", 0.02, "--val_fraction", 0, "--save_every", 200, "--seed", seed + number)
        model = run
        for row in read_log(folder / run):
            if "accuracy" in row:               # the last one is that of after the round
                followed = row["accuracy"][f"{max(TAUGHT)} arrows"]
        if followed >= LEARNT:
            break
    return model, followed

def one_seed(folder, seed, args):
    """Teaches and practises → (a line on what was taught, measured(), longest())."""
    if not (folder / "base" / "model.safetensors").exists():
        write_files(folder, seed, args.steps * 16)
    model, followed = teach(folder, seed, args)
    taught = (f"fine-tuning: {model.removeprefix('sft_')} rounds of {args.examples:,} examples, "
              f"after which {followed:.1%} of other chains of {max(TAUGHT)} arrows are followed")
    run_stage(folder, args.folder, "rl_grpo.py", "--model", model, "--out", "rl",
              "--task", "practice.jsonl", "--held_out", "held_out.jsonl",
              "--max_steps", args.steps, "--lr", args.lr, "--max_new_tokens", 30,
              "--eval_every", 20, "--save_every", 20, "--seed", seed)
    return taught, measured(folder / "rl"), longest(folder / "rl")

def verdict(figures):
    """What one seed says about the two claims → (lengths that rose from below 20 % to above 70 %,
    lengths whose pass@1 ended above the pass@16 of before, and above a half)."""
    risen = [kind for kind, (before, *_, after) in figures.items()
             if before["accuracy"] < 0.2 and after["accuracy"] > 0.7]
    beyond = [kind for kind, (before, *_, after) in figures.items()
              if after["pass_1"] > max(0.5, before["pass_16"])]
    return risen, beyond

def processor_time():
    """Seconds of processor time of this process and of the stages that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

def show_lengths(seed, figures):
    """The table of one seed."""
    rows = []
    for kind, tests in figures.items():
        before, after = tests[0], tests[-1]
        solved = [test["step"] for test in tests if test["pass_1"] > 0.5]
        rows.append((kind, before["accuracy"], before["pass_1"], before["pass_16"],
                     after["accuracy"], after["pass_1"], after["thinking_tokens"],
                     solved[0] if solved else None))
    table((f"seed {seed}", "greedy before", "pass@1 before", "pass@16 before", "greedy after",
           "pass@1 after", "tokens of thinking", "pass@1 above a half at step"), rows)

def main():
    parser = argparse.ArgumentParser(description="does practice reach what no example showed?")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="all of it is done with each")
    add("--steps", type=int, default=80, help="of reinforcement learning")
    add("--examples", type=int, default=EXAMPLES, help="supervised conversations of a round")
    add("--rounds", type=int, default=ROUNDS, help="of fine-tuning, at most")
    add("--lr", type=float, default=1e-3, help="learning rate of reinforcement learning")
    add("--folder", help="keeps files and runs here, so that an interrupted run continues")
    args = parser.parse_args()
    check_at_least(1, args, "steps", "examples", "rounds")
    report = []
    for seed in args.seeds:
        started = processor_time()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.folder or temporary, f"seed_{seed}").absolute()
            folder.mkdir(parents=True, exist_ok=True)
            taught, figures, (question, answer, first, last) = one_seed(folder, seed, args)
        print(f"\nseed {seed}, {taught}")
        show_lengths(seed, figures)
        print(f"\n{question} → {answer}\n\nbefore: `{first}`\n\nafter: `{last}`")
        risen, beyond = verdict(figures)
        seconds = processor_time() - started
        print(f"\nfrom below 20 % to above 70 %: {', '.join(risen) or 'none'}; pass@1 above the "
              f"pass@16 of before: {', '.join(beyond) or 'none'}; {seconds:.0f} s of processor "
              "time")
        report.append(dict(seed=seed, taught=taught, figures=figures, risen=risen, beyond=beyond,
                           seconds=seconds))
    finish("beyond", seeds=report)

if __name__ == "__main__":
    main()
