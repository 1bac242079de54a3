"""
RLHF on jokes about pelicans: what becomes of a model that is trained for long to please a stand-in
for people.

    python demo/rlhf.py --model runs/demo-small-honest --out runs/demo-small-rlhf  # after make demo

    in:  an assistant's run
    out: <out>/jokes.jsonl, prompts.jsonl, prefs.jsonl; <out>/joker, reward, without-kl, with-kl,
         stopped, the models; report.html

No checker can tell a good joke, so the talk asks people. Here `funny` below takes the place of the
people: a scripted judge with a fixed, known taste, so that one can measure what people would say of
thousands of replies that nobody has time to read. It likes a funny word or two in a sentence that
still reads like one. The reward model never sees this rule, only how the judge ranked some replies.

Practice goes far on purpose, and few replies are ranked. With half the learning rate the replies
ended as one joke for every prompt, which was still a sentence. With four times as many prompts one
reward model was too good to be gamed in these 20 steps. --kl holds the model back at every step;
--max_kl ends the same practice early, before what the reward model likes and what the judge likes
part.

COMMANDS are those that one would type with a person in the judge's place. A command that was
finished is skipped or resumed, so after an interruption the same command continues.

Papers: a scripted "gold" judge in place of people, Gao et al. (arXiv 2210.10760).
"""
import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FUNNY = ("pelican", "banana", "trousers", "kazoo")
# what the demo's web is about: each of these is one token, so that a sentence is learnt quickly
NOUNS = ("function", "string", "list", "number", "file", "class", "module", "object", "method",
         "table", "tree", "server", "thread", "dictionary", "graph", "line", "window", "path")
VERBS = ("returns", "calls", "removes", "creates", "contains", "finds", "uses", "takes")
PLACES = ("with", "without", "for", "from", "before", "after")
ASKED = ("Tell me a joke about a {noun} and a {other}.",
         "Make me laugh with a {noun} and a {other}.",
         "A joke about a {noun} and a {other}, please.",
         "What is funny about a {noun} and a {other}?")

# The words that may follow each kind of word: a sentence is "A noun verb a noun with a noun."
KINDS = {"a": "article", ".": "end", "and": "and", **dict.fromkeys(FUNNY + NOUNS, "noun"),
         **dict.fromkeys(VERBS, "verb"), **dict.fromkeys(PLACES, "place")}
FOLLOWS = {"article": ("noun",), "noun": ("verb", "place", "and", "end"), "verb": ("article",),
           "place": ("article",), "and": ("verb",)}
FUNNY_SHARE = 0.25      # of the nouns that the prompt does not name, in what is taught

# ---- Jokes, and a judge with a taste -------------------------------------------------------------

def joke(noun, other, rng):
    """A sentence that begins with "A {noun}" and has the other noun; the nouns between and after
    them may be funny ones."""
    words = ["A", noun, rng.choice(VERBS), "a", a_noun(rng), rng.choice(PLACES), "a", other]
    if rng.random() < 0.5:
        words += ["and", rng.choice(VERBS), "a", a_noun(rng)]
    return " ".join(words) + "."

def a_noun(rng):
    return rng.choice(FUNNY if rng.random() < FUNNY_SHARE else NOUNS)

def funny(problem, reply):
    """How much the judge likes a reply: 1 for each different funny word, up to 2; -1/2 for each
    funny word from the third on, because they tire it; -0.3 for each pair of neighbours that cannot
    stand together in a sentence. A reply that does not end like a sentence gets -2.

    >>> funny({}, "A pelican finds a banana."), funny({}, "A pelican pelican pelican.")
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

def prompt(noun, other, rng):
    return dict(role="user", content=rng.choice(ASKED).format(noun=noun, other=other))

def write_rows(path, rows):
    """Writes a .jsonl under another name and renames it, so that it is never half written."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    print(f"{path}: {len(rows)} rows")

def write_jokes(out, seed, conversations=1500, prompts=100):
    """Writes <out>/jokes.jsonl, conversations for chat_sft.py, and <out>/prompts.jsonl."""
    rng = random.Random(seed)
    rows = []
    for _ in range(conversations):
        noun, other = rng.sample(NOUNS, 2)
        answer = dict(role="assistant", content=joke(noun, other, rng))
        rows.append(dict(messages=[prompt(noun, other, rng), answer]))
    write_rows(out / "jokes.jsonl", rows)
    rows = [dict(messages=[prompt(*rng.sample(NOUNS, 2), rng)], kind="jokes")
            for _ in range(prompts)]
    write_rows(out / "prompts.jsonl", rows)

# ---- The commands --------------------------------------------------------------------------------

PRACTICE = ("python rl_grpo.py --model {out}/joker --reward model:{out}/reward "
            "--gold demo/rlhf.py:funny --task {out}/prompts.jsonl --max_steps {steps} "
            "--prompts 16 --group_size 4 --max_new_tokens 40 --lr 2e-3 --eval_every 5 "
            "--save_every 10 --seed {seed} --resume")
COMMANDS = [
    "python chat_sft.py --model {model} --data {out}/jokes.jsonl --out {out}/joker --epochs 1 "
    "--batch_size 8 --lr 0.02 --seed {seed} --resume",
    "python rl_grpo.py rank --model {out}/joker --prompts {out}/prompts.jsonl --samples 5 "
    "--max_new_tokens 40 --judge demo/rlhf.py:funny --out {out}/prefs.jsonl --seed {seed}",
    "python rl_grpo.py reward_model --model {out}/joker --data {out}/prefs.jsonl "
    "--out {out}/reward --epochs 1 --lr 1e-3 --eval_every 10 --seed {seed} --resume",
    "python rl_grpo.py best_of_n --model {out}/joker --reward model:{out}/reward "
    "--gold demo/rlhf.py:funny --task {out}/prompts.jsonl --prompts 16 --samples 64 "
    "--max_new_tokens 40 --out {out}/reward/best_of_n.jsonl --seed {seed}",
    PRACTICE + " --out {out}/without-kl",
    PRACTICE + " --out {out}/with-kl --kl 0.2",
    PRACTICE + " --out {out}/stopped --max_kl 4",
    "python report.py {out}/reward {out}/without-kl {out}/with-kl {out}/stopped "
    "--out {out}/report.html"]

def run(command, names):
    """Shows and runs one command; ends with its status if it fails."""
    words = [word.format(**names) for word in shlex.split(command)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)

def from_root(path):
    """A path as it is to be typed in the repository's folder."""
    path = Path(path).absolute()
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT)
    return path

def main():
    parser = argparse.ArgumentParser(description="RLHF on jokes, and how it is gamed")
    add = parser.add_argument
    add("--model", required=True, help="run folder of an assistant")
    add("--out", required=True, help="folder for data, models and report")
    add("--steps", type=int, default=20, help="steps of reinforcement learning")
    add("--seed", type=int, default=1337, help="seed of jokes and training")
    args = parser.parse_args()
    if args.steps < 1:
        raise SystemExit(f"--steps must be at least 1, got {args.steps}")
    out = from_root(args.out)
    model = from_root(args.model)
    os.chdir(ROOT)
    out.mkdir(parents=True, exist_ok=True)
    write_jokes(out, args.seed)
    names = dict(model=model, out=out, steps=args.steps, seed=args.seed)
    for command in COMMANDS:
        run(command, names)
    print(f"\nOpen {out / 'report.html'} in a browser; its chapter RLHF shows what happened.")

if __name__ == "__main__":
    main()
