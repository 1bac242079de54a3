"""What a base model does: which sentences it recites, whether examples help it, what it writes.

    python bench/base.py --model runs/demo-small-base --data data/demo-small    →  a Markdown section

Recite: the first 8 tokens of a line of the training text are given, and the model continues them
greedily. A line counts as recited if the next 12 tokens are those of the text. Lines are grouped by
how often they stand in the text.

Examples: 0, 1, 2 or 4 lines of the val split that begin with the same two words stand before the
next line; how probable is it that it begins with them, too? With 0 examples another line stands
there. And, harder, does it repeat a word after 0, 1, 2 or 4 lines that do: "The graph is a graph."?

Samples: one from <|endoftext|> and from each of four prompts, by seeds 0 … 4, none picked.
"""
import argparse
import gzip
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

from model import load_checkpoint  # noqa: E402
from sample import Engine, load_tokenizer  # noqa: E402

GIVEN, WANTED = 8, 12       # tokens of a line
GROUPS = ((10, 99), (5, 9), (2, 4), (1, 1))    # times that a line stands in the text
MOST_LINES = 60             # of a group
EXAMPLES = (0, 1, 2, 4)
QUESTIONS = 200
LONGEST = 120               # characters of an example
PROMPTS = ("The", "Returns", "If", "This function")

def count_lines(data, split):
    """{line: times} of the prose of a split."""
    with gzip.open(Path(data, "prose", f"{split}_00000.jsonl.gz"), "rt", encoding="utf-8") as rows:
        return Counter(line for row in rows for line in json.loads(row)["text"].split("\n"))

def recited(engine, lines):
    """How many of the lines the model continues word for word."""
    ids = [engine.tokenizer.encode_ordinary(line) for line in lines]
    done = engine.generate([[engine.tokenizer.eot, *row[:GIVEN]] for row in ids], WANTED,
                           temperature=0)
    return [line for line, row, completion in zip(lines, ids, done)
            if completion.ids[:WANTED] == row[GIVEN:GIVEN + WANTED]]

def recital(engine, counts, rng):
    """A row of the table for each group, and the longest line that was recited."""
    rows = ["| times in the text | lines | recited |", "|---|---|---|"]
    best = ""
    for least, most in GROUPS:
        lines = sorted(line for line, n in counts.items() if least <= n <= most and
                       len(engine.tokenizer.encode_ordinary(line)) >= GIVEN + WANTED)
        lines = rng.sample(lines, min(MOST_LINES, len(lines)))
        found = recited(engine, lines)
        best = max([best, *found], key=lambda line: (counts[line], len(line)))
        rows.append(f"| {least} … {most} | {len(lines)} | {len(found)} |")
    return [*rows, "", f"Most often seen of those recited, {counts[best]} times: {best!r}"]

def p_next(engine, prompt, text):
    """The probability that a model continues a text with another, token by token."""
    given = [engine.tokenizer.eot, *engine.tokenizer.encode_ordinary(prompt)]
    wanted = engine.tokenizer.encode_ordinary(text)
    ids = torch.tensor([given + wanted])
    with torch.inference_mode():
        losses = engine.model(ids[:, :-1], ids[:, 1:].contiguous(), reduction="none").flatten()
    return math.exp(-losses[-len(wanted):].sum().item())

def few_shot(engine, lines, rng):
    """A row for each number of examples."""
    lines = [line for line in lines if len(line) <= LONGEST]
    openings = Counter(" ".join(line.split()[:2]) for line in lines)
    pools = {opening: [line for line in lines if line.startswith(f"{opening} ")]
             for opening, n in openings.most_common(8)}
    words = sorted({word for line in lines for word in re.findall(r"\b[a-z]{4,8}\b", line)})
    rows = ["| examples | probability of the opening | words repeated |", "|---|---|---|"]
    for n in EXAMPLES:
        p = right = 0
        for _ in range(QUESTIONS):
            opening = rng.choice(sorted(pools))
            others = [line for line in lines if not line.startswith(opening)]
            shown = rng.sample(pools[opening], n) or [rng.choice(others)]
            p += p_next(engine, "\n".join(shown) + "\n", opening) / QUESTIONS
            *shown, asked = rng.sample(words, n + 1)
            prompt = "".join(f"The {word} is a {word}.\n" for word in shown) + f"The {asked} is a"
            done = engine.generate([prompt], 8, temperature=0)[0]
            right += engine.tokenizer.decode(done.ids).split()[:1] == [f"{asked}."]
        rows.append(f"| {n} | {p:.3f} | {right} of {QUESTIONS} |")
    return rows

def samples(engine):
    """A line for each seed and prompt."""
    lines = []
    for seed in range(5):
        for prompt in ("", *PROMPTS):
            ids = [engine.tokenizer.eot, *engine.tokenizer.encode_ordinary(prompt)]
            done = engine.generate([ids], 48, temperature=0.8, top_p=0.95, seed=seed)[0]
            lines.append(f"seed {seed}: {prompt + engine.tokenizer.decode(done.ids)!r}")
    return lines

def main():
    parser = argparse.ArgumentParser(description="what a base model recites, and what it writes")
    parser.add_argument("--model", required=True, help="run folder of a base model")
    parser.add_argument("--data", required=True, help="folder with prose/, which it was trained on")
    args = parser.parse_args()
    engine = Engine(load_checkpoint(args.model)[0], load_tokenizer(args.model))
    rng = random.Random(1337)
    for lines in (recital(engine, count_lines(args.data, "train"), rng),
                  few_shot(engine, sorted(count_lines(args.data, "val")), rng), samples(engine)):
        print("\n".join(lines), end="\n\n", flush=True)

if __name__ == "__main__":
    main()
