"""
The demo's conversations and problems, written from the demo's own documents.

    python demo/conversations.py --data data/demo --out data/demo/chat      (or: chat_sft.py make)

    in:  <data>/documents, <data>/tokenizer
    out: <out>/KIND.jsonl  conversations of one turn, for chat_sft.py; mixed.jsonl  conversations of
         two to four turns; practice_KIND.jsonl  problems for rl_grpo.py; held_out.jsonl  problems
         for eval.py

make_kinds lists the kinds of questions, and demo/kinds.py has a generator for each. A conversation
of several turns mixes them: it may begin with a system message, and a question may refer back to
the one before it ("And plus 5?", "Spell it."). Held-out problems are asked in the first turn and
in the second, where their kind is called "sums, 2nd turn". Those that refer back are of the kind
"follow-up". No held-out question is in a conversation.
"""
import argparse
import gzip
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

if __name__ == "__main__":      # what this script imports is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bpe import Tokenizer
from demo import kinds as k
from subjects import DOCUMENTED, is_plain, one_name_each

# ---- What the documents say ----------------------------------------------------------------------

DOCUMENTED_LINE = re.compile("^" + DOCUMENTED.pattern, re.M)     # anywhere in a document

def read_texts(path):
    """Yields the texts of a .jsonl.gz of documents."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]

def train_files(data):
    """The files of training documents, in order."""
    return sorted(Path(data, "documents").glob("train_*.jsonl.gz"))

def documented_functions(data, count):
    """{qualified name: first sentence of its documentation}, from the training documents.

    Only ASCII sentences of 4 to 14 words are taken. If several functions have the same sentence,
    one of them is taken. A fifth is left out by the hash of the name: those functions are for
    questions whose answer must be looked up. Raises SystemExit if fewer than `count` are left.
    """
    found = {}
    for path in train_files(data):
        for text in read_texts(path):
            for name, sentence in DOCUMENTED_LINE.findall(text):
                if is_plain(name, sentence):
                    found.setdefault(name, sentence)
    documented = {name: found[name] for name in one_name_each(found) if not k.held_out(name)}
    if len(documented) < count:
        raise SystemExit(f"{data}/documents describes {len(documented)} functions in a short "
                         f"sentence of their own, fewer than --functions {count}; prepare more "
                         "documents, or lower --functions")
    return documented

def common_words(data, count):
    """The `count` most frequent lower-case words of 3 to 8 letters in the first file of documents.
    Raises SystemExit if there are none."""
    counts = Counter()
    for text in read_texts(train_files(data)[0]):
        counts.update(re.findall(r"\b[a-z]{3,8}\b", text))
    if not counts:
        raise SystemExit(f"{data}/documents has no lower-case words of 3 to 8 letters to spell; "
                         "prepare English documents")
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]

# ---- Kinds and conversations ---------------------------------------------------------------------

@dataclass
class Kind:
    """One kind of questions, and what was drawn of it.

    draw: rng → Exchange. again: rng, the Exchange before → an Exchange that refers back to it.
    share: conversations of this kind, in --examples; also how often it comes in mixed ones.
    """
    name: str
    draw: Callable
    share: float
    again: Callable = None
    taught: list = field(default_factory=list)      # Exchanges
    tests: list = field(default_factory=list)       # Exchanges, each question once

    def next(self, rng, before=None, is_test=False):
        """A new exchange, held out or not as is_test says, which refers back to `before` if that is
        given."""
        while True:
            exchange = self.draw(rng) if before is None else self.again(rng, before)
            if exchange.is_test == is_test:
                return k.as_typed(exchange, rng)

    def fill(self, count, count_tests, rng):
        """Draws `count` exchanges to teach, and at most `count_tests` different ones for tests."""
        self.taught = [self.next(rng) for _ in range(count)]
        drawn = [self.next(rng, is_test=True) for _ in range(2 * count_tests)]
        tests = {exchange.question: exchange for exchange in drawn}
        self.tests = list(tests.values())[:count_tests]

def make_kinds(args, rng):
    """The kinds of questions that the demo teaches, with their exchanges → a list of Kind."""
    documented = documented_functions(args.data, args.functions)
    documented = dict(list(documented.items())[:args.functions])
    tokenizer = Tokenizer.load(args.tokenizer or Path(args.data, "tokenizer"))
    words = k.split_words(common_words(args.data, args.words), tokenizer)
    about = partial(k.functions, documented=documented)
    kinds = [
        Kind("identity", k.identity, 1.0),
        Kind("small_talk", k.small_talk, 1.0),
        Kind("functions", about, 0.7, partial(k.functions_again, documented=documented)),
        Kind("sums", k.sums, 2.0, k.sums_again),
        Kind("tool", k.tool, 0.9, k.tool_again),
        Kind("decimals", k.decimals, 0.8, k.decimals_again),
        Kind("bits", partial(k.bits, step_by_step=args.step_by_step), 0.7),
        Kind("bits_in_steps", k.bits_in_steps, 0.5, k.bits_in_steps_again),
        Kind("spelling", partial(k.spelling, words=words), 3.6,
             partial(k.spelling_again, words=words)),
        Kind("counting", partial(k.counting, words=words), 1.0, k.counting_again)]
    for kind in kinds:
        kind.fill(max(1, round(args.examples * kind.share)), args.held_out, rng)
    return kinds

SYSTEM = ("Your name is {name}.", "You are {name}.", "You are {name}, a helpful assistant.",
          "You are a helpful assistant.")

def system_message(rng):
    """In one of four draws, a system message, which may give the assistant another name → (list of
    messages, name)."""
    if rng.random() < 0.75:
        return [], k.NAME
    text = rng.choice(SYSTEM)
    name = rng.choice(k.PERSONAS) if "{name}" in text else k.NAME
    return [dict(role="system", content=text.format(name=name))], name

def turn(exchange):
    """An exchange → the messages of the user and of the assistant."""
    return [dict(role="user", content=exchange.question),
            dict(role="assistant", content=exchange.reply)]

def any_kind(kinds, rng, name=k.NAME):
    """One of the kinds, each as often as its share says. An assistant with another name is often
    asked who it is: in a later turn, the name is far back in the system message."""
    if name != k.NAME and rng.random() < 0.35:
        return next(kind for kind in kinds if kind.name == "identity")
    return rng.choices(kinds, [kind.share for kind in kinds])[0]

def single(exchange, rng):
    """A conversation of one turn → its messages."""
    messages, name = system_message(rng)
    return messages + turn(k.named(exchange, name))

def mixed(kinds, rng):
    """A conversation of two to four turns of any kinds → its messages."""
    messages, name = system_message(rng)
    kind = any_kind(kinds, rng, name)
    exchange = None
    for _ in range(rng.randrange(2, 5)):
        before = None
        if exchange and kind.again and rng.random() < 0.5:
            before = exchange
        elif exchange:
            kind = any_kind(kinds, rng, name)
        exchange = kind.next(rng, before)
        messages = messages + turn(k.named(exchange, name))
    return messages

# ---- The files -----------------------------------------------------------------------------------

def problem(kind, exchange, before, name):
    """An exchange, with the messages before it → a row of a file of problems."""
    exchange = k.named(exchange, name)
    messages = [*before, dict(role="user", content=exchange.question)]
    return dict(question=exchange.question, answer=exchange.answer, check=exchange.check, kind=kind,
                messages=messages)

def held_out_problems(kinds, count, rng):
    """At most `count` problems of each kind in the first turn, as many in the second turn, and the
    same number of follow-ups."""
    rows = []
    for kind in kinds:
        for exchange in kind.tests:
            system, name = system_message(rng)
            rows.append(problem(kind.name, exchange, system, name))
            system, name = system_message(rng)
            first = any_kind(kinds, rng).next(rng)
            rows.append(problem(f"{kind.name}, 2nd turn", exchange,
                                system + turn(k.named(first, name)), name))
    referring = [kind for kind in kinds if kind.again]
    for _ in range(count):
        kind = rng.choice(referring)
        first = rng.choice(kind.tests)
        exchange = kind.next(rng, first, is_test=True)
        rows.append(problem("follow-up", exchange, turn(first), k.NAME))
    return rows

def make(args):
    """Writes <out>/KIND.jsonl and mixed.jsonl (conversations), practice_KIND.jsonl and
    held_out.jsonl (problems)."""
    rng = random.Random(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kinds = make_kinds(args, rng)
    for kind in kinds:
        write_rows(out / f"{kind.name}.jsonl",
                   [dict(messages=single(exchange, rng)) for exchange in kind.taught])
        practice = [problem(kind.name, exchange, [], k.NAME) for exchange in kind.taught
                    if exchange.check == "final"]
        if practice:
            write_rows(out / f"practice_{kind.name}.jsonl", practice)
        print(f"{kind.name:20s} {len(kind.taught):6d} conversations | {len(practice):6d} practice "
              f"problems | {len(kind.tests):4d} held out")
    rows = [dict(messages=mixed(kinds, rng)) for _ in range(args.mixed)]
    write_rows(out / "mixed.jsonl", rows)
    print(f"{'mixed':20s} {len(rows):6d} conversations of two to four turns")
    write_rows(out / "held_out.jsonl", held_out_problems(kinds, args.held_out, rng))

def write_rows(path, rows):
    """Writes a .jsonl under another name and renames it, so that it is never half written."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)

def main():
    parser = argparse.ArgumentParser(description="make conversations and problems from documents")
    add = parser.add_argument
    add("--data", required=True, help="folder with documents/")
    add("--out", required=True, help="folder for the .jsonl files")
    add("--tokenizer", help="folder of a tokenizer, or gpt2 (default: <data>/tokenizer)")
    add("--functions", type=int, default=48, help="functions to ask about")
    add("--words", type=int, default=10000, help="most frequent words, of which some are spelt")
    add("--examples", type=int, default=850, help="conversations of one kind, on average")
    add("--mixed", type=int, default=2500, help="conversations of two to four turns")
    add("--step_by_step", type=float, default=0.2, help="share of bits answered in steps, 0 to 1")
    add("--held_out", type=int, default=100, help="most held-out problems of a kind in one turn")
    add("--seed", type=int, default=1337, help="seed of the problems")
    args = parser.parse_args()
    for name in ("functions", "words", "examples", "mixed", "held_out"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.step_by_step <= 1:
        raise SystemExit(f"--step_by_step must be from 0 to 1, got {args.step_by_step}")
    make(args)

if __name__ == "__main__":
    main()
