"""
The replies of a step of reinforcement learning, beside nanochat's engine prompt by prompt, on the
same weights and problems.

    python bench/rollouts.py                    # after make demo, on its assistant

in:  the run of an assistant, and the conversations of the demo; .peers/nanochat
out: a table for each kind of problems, and all of them as one line of JSON

16 problems get 16 replies each, at temperature 1, and each reply ends where the model ends it. Ours
writes them all in one batch, which a reply that ended leaves at once. nanochat's engine writes the
replies to one problem in one batch, as its own RL does, until the longest has ended. Before anything
is timed, greedy replies of both must be equal, token for token. Python is off: nobody waits for a
tool.

`practice` are the problems that the demo practises, whose replies are about equally long; `mixed`
are its held-out problems of all kinds, whose replies are not.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from contenders import nanochat_engine
from measure import finish, in_turns, missing, ratio, spread, table
from model import load_checkpoint
from problems import read_problems
from sample import Engine, load_tokenizer

KINDS = {"practice": ("practice_bits.jsonl", 64), "mixed": ("held_out.jsonl", 128)}
PROBLEMS = GROUP = 16
CHECKED = 3             # problems whose greedy replies are compared

def prompts_of(path, tokenizer):
    """The prompts of PROBLEMS problems, spread over the file, as lists of ids."""
    problems = read_problems(path)
    every = max(1, len(problems) // PROBLEMS)
    return [tokenizer.render(problem["messages"], for_completion=True)[0]
            for problem in problems[::every][:PROBLEMS]]

def check_equal(engine, nanochat, prompts, max_tokens):
    """Greedy replies of both engines are the same tokens; nanochat's has no end token."""
    done = engine.generate(prompts[:CHECKED], max_tokens, temperature=0)
    for prompt, completion in zip(prompts, done):
        theirs, _ = nanochat.generate_batch(prompt, 1, max_tokens=max_tokens, temperature=0.0)
        ours = completion.ids
        if completion.finish == "stop":
            ours = ours[:-1]
        assert theirs[0][len(prompt):] == ours, "nanochat's engine writes another reply"

def measure(engine, nanochat, prompts, max_tokens, repeats):
    """→ a row for each contender, ours first."""
    seeds = iter(range(2 * (repeats + 1)))
    lengths = []

    def ours():
        done = engine.generate(prompts, max_tokens, GROUP, seed=next(seeds))
        lengths[:] = [len(completion.ids) for completion in done]

    def theirs():
        seed = next(seeds)
        for prompt in prompts:
            nanochat.generate_batch(prompt, GROUP, max_tokens=max_tokens, seed=seed)

    contenders = dict(ours=ours)
    if nanochat:
        contenders["nanochat, prompt by prompt"] = theirs
    ms = in_turns(contenders, repeats)
    rows = []
    for label, values in ms.items():
        row = dict(contender=label, all_ms=values, ms=statistics.median(values),
                   spread=spread(values), mean_tokens=statistics.mean(lengths),
                   longest=max(lengths), ours_faster_by=None)
        if label != "ours":
            row["ours_faster_by"] = ratio(values, ms["ours"])
        rows.append(row)
    return rows

def main():
    parser = argparse.ArgumentParser(description="rollouts, beside nanochat's engine")
    add = parser.add_argument
    add("--model", default="runs/demo-small-sft", help="run folder of an assistant")
    add("--data", default="data/demo-small", help="the demo's data, with its folder chat")
    add("--repeats", type=int, default=5, help="timed runs of each")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    model, _ = load_checkpoint(args.model)
    model.for_inference().eval()
    engine = Engine(model, tokenizer, python=None)
    nanochat = nanochat_engine(model, tokenizer)
    report = {}
    for kind, (name, max_tokens) in KINDS.items():
        prompts = prompts_of(Path(args.data, "chat", name), tokenizer)
        if nanochat:
            check_equal(engine, nanochat, prompts, max_tokens)
        rows = measure(engine, nanochat, prompts, max_tokens, args.repeats)
        table([f"{kind}: {PROBLEMS} x {GROUP} replies", "ms", "spread", "tokens a reply",
               "the longest", "ours is faster by"],
              [[row[key] for key in ("contender", "ms", "spread", "mean_tokens", "longest",
                                     "ours_faster_by")] for row in rows])
        report[kind] = rows
    if not nanochat:
        print(f"\nnanochat: {missing('nanochat')}")
    finish("rollouts", model=args.model, kinds=report)

if __name__ == "__main__":
    main()
