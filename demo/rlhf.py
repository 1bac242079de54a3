"""
RLHF on jokes about pelicans: what happens when a model is trained for long to please a judge's
stand-in.

    python demo/rlhf.py --out data/demo-small/jokes      # conversations, prompts

    in:  nothing
    out: <out>/jokes.jsonl    conversations for chat_sft.py, after which the assistant tells jokes
         <out>/prompts.jsonl  prompts for rl_grpo.py and rl_grpo.py rank

No checker can tell a good joke, so the talk asks people. Here `funny` below takes the place of the
people: it is a scripted judge with a taste, which is fixed and known, so that one can measure what
people would say of replies that nobody has time to read. It likes one or two funny words in a
sentence that still reads like one. The reward model only sees how this judge ranked some replies.

Papers: a scripted "gold" judge in place of people, Gao et al. (arXiv 2210.10760).
"""
import argparse
import json
import random
import re
from pathlib import Path

FUNNY = ("pelican", "banana", "trousers", "kazoo")
NOUNS = ("man", "chef", "robot", "dog", "teacher", "queen", "soup", "car", "house", "moon", "hat",
         "piano", "doctor", "horse", "tree", "window")
VERBS = ("saw", "ate", "sold", "lost", "painted", "followed", "found", "carried")
PLACES = ("with", "under", "behind", "near", "without", "for")
ASKED = ("Tell me a joke about a {noun}.", "Do you know a joke about a {noun}?",
         "A joke about a {noun}, please.", "Make me laugh with a {noun}.")

# The words that may follow each kind of word: a sentence is "A noun verb a noun near a noun."
KINDS = {"a": "article", ".": "end", "and": "and", **dict.fromkeys(FUNNY + NOUNS, "noun"),
         **dict.fromkeys(VERBS, "verb"), **dict.fromkeys(PLACES, "place")}
FOLLOWS = {"article": ("noun",), "noun": ("verb", "place", "and", "end"), "verb": ("article",),
           "place": ("article",), "and": ("verb",)}
FUNNY_SHARE = 0.12      # of the nouns in what the assistant is taught

# ---- Jokes, and a judge with a taste -------------------------------------------------------------

def joke(noun, rng):
    """A sentence that begins with "A {noun}"; each later noun may be a funny one."""
    words = ["A", noun, rng.choice(VERBS), "a", a_noun(rng)]
    if rng.random() < 0.7:
        words += [rng.choice(PLACES), "a", a_noun(rng)]
    if rng.random() < 0.5:
        words += ["and", rng.choice(VERBS), "a", a_noun(rng)]
    return " ".join(words) + "."

def a_noun(rng):
    return rng.choice(FUNNY if rng.random() < FUNNY_SHARE else NOUNS)

def funny(problem, reply):
    """How much the judge likes a reply: 1 for each different funny word, up to 2; -1/2 for each
    funny word from the third on, because they tire it; -0.3 for each pair of neighbours that cannot
    stand together in a sentence. A reply that does not end like a sentence gets -2.

    >>> funny({}, "A pelican ate a banana."), funny({}, "A pelican pelican pelican.")
    (2.0, -0.1)
    """
    words = re.findall(r"\w+|[^\w\s]", reply.lower())
    if not words or words[-1] != "." or "a" not in words:
        return -2.0
    said = [word for word in words if word in FUNNY]
    kinds = [KINDS.get(word) for word in words]
    odd = sum(1 for first, second in zip(kinds, kinds[1:])
              if second not in FOLLOWS.get(first, ()))
    score = min(len(set(said)), 2) - 0.5 * max(0, len(said) - 2) - 0.3 * odd
    return round(score, 6)

# ---- The files -----------------------------------------------------------------------------------

def prompt(noun, rng):
    return dict(role="user", content=rng.choice(ASKED).format(noun=noun))

def write_rows(path, rows):
    """Writes a .jsonl under another name and renames it, so that it is never half written."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    print(f"{path}: {len(rows)} rows")

def main():
    parser = argparse.ArgumentParser(description="make conversations and prompts about jokes")
    add = parser.add_argument
    add("--out", required=True, help="folder for the .jsonl files")
    add("--conversations", type=int, default=1500, help="jokes to teach")
    add("--prompts", type=int, default=400, help="prompts to rank and to practise")
    add("--seed", type=int, default=1337, help="seed of the jokes")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for _ in range(args.conversations):
        noun = rng.choice(FUNNY + NOUNS)
        answer = dict(role="assistant", content=joke(noun, rng))
        rows.append(dict(messages=[prompt(noun, rng), answer]))
    write_rows(out / "jokes.jsonl", rows)
    rows = [dict(messages=[prompt(rng.choice(FUNNY + NOUNS), rng)], kind="jokes", number=number)
            for number in range(args.prompts)]
    write_rows(out / "prompts.jsonl", rows)

if __name__ == "__main__":
    main()
