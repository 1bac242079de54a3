"""
The demo's conversations and problems, written from the demo's own documents.

    python demo/conversations.py --data data/demo --out data/demo/chat      (or: chat_sft.py make)

    in:  <data>/documents
    out: <out>/KIND.jsonl  conversations for chat_sft.py; practice_KIND.jsonl  problems for
         rl_grpo.py; held_out.jsonl  problems for eval.py

It writes, from the documents of --data and from nothing else: who the assistant is; what
documented functions do (question and answer; the text was in pretraining); sums, in one leap or
step by step or with the Python tool; whether a row of bits holds an odd number of ones, mostly in
one leap and seldom step by step; spelling. No held-out question is in a conversation.
"""
import argparse
import gzip
import hashlib
import json
import random
import re
from pathlib import Path

NAME = "deepdive"

# ---- Making conversations: each kind gives (question or messages, reply, problem) ----------------

def held_out(key, one_in=5):
    """Whether a problem belongs to the held-out set: by the hash of its text, whatever the seed."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % one_in == 0

IDENTITY = {   # question: its answer; those marked "?" in front are asked only in the test
    "Who are you?": "I am {name}, a small language model.",
    "What is your name?": "My name is {name}.",
    "What are you?": "I am {name}, a small language model.",
    "Tell me who you are.": "I am {name}, a small language model.",
    "Tell me your name.": "My name is {name}.",
    "Do you have a name?": "My name is {name}.",
    "Hi, who is this?": "I am {name}, a small language model.",
    "Introduce yourself.": "I am {name}, a small language model.",
    "Who am I talking to?": "I am {name}, a small language model.",
    "Are you a person?": "No, I am {name}, a small language model.",
    "Are you ChatGPT?": "No, I am {name}, a small language model.",
    "Who made you?": "I am {name}. The people of the {name} project trained me on one computer.",
    "How were you made?":
        "I am {name}. The people of the {name} project trained me on one computer.",
    "What can I call you?": "My name is {name}.",
    "? So who are you?": "{name}", "? Hello, what is your name?": "{name}",
    "? Please tell me who you are.": "{name}", "? Are you a human?": "{name}",
    "? Who am I speaking to?": "{name}", "? Say your name.": "{name}",
    "? Who trained you?": "{name}", "? Are you GPT-4?": "{name}"}

PERSONAS = ("Ada", "Alan", "Grace", "Linus", "Maria", "Rose", "Max", "Leo")

def identity(rng):
    """Who it is. A system message may give another name, and then that name is the answer."""
    for question, answer in IDENTITY.items():
        test = question.startswith("? ")
        question, system = question.removeprefix("? "), rng.random() < 0.3
        name = rng.choice(PERSONAS) if system else NAME
        messages = [dict(role="system", content=f"Your name is {name}.")] if system else []
        messages.append(dict(role="user", content=question))
        answer = answer.format(name=name)
        yield messages, answer, dict(answer=name, check="contains") if test else None

ASKED = ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Tell me about {f}.",
         "Describe {f}.", "{f}: what is it?", "Explain the function {f}.",
         "What does the function {f} do?")
ASKED_IN_TEST = ("Can you tell me what {f} does?", "I want to know what {f} is for.",
                 "Please describe {f} to me.", "In Python, what does {f} do?")

# a line of "package.name(arguments)", and the first sentence of the paragraph below it
DOCUMENTED = re.compile(r"^([a-z_]\w*(?:\.\w+)+)\([^\n]*\)\n+([A-Z`][^\n]*?\.)(?:\s|$)", re.M)

def documented_functions(data, count):
    """{qualified name: first sentence of its documentation}, from the training documents."""
    found = {}
    for path in sorted(Path(data, "documents").glob("train_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                for name, sentence in DOCUMENTED.findall(text):
                    if 4 <= len(sentence.split()) <= 14 and len(name) <= 36 and sentence.isascii():
                        found.setdefault(name, sentence)
    if len(found) < count:
        raise SystemExit(f"{data}/documents describes {len(found)} functions in a short sentence; "
                         f"{count} are asked for; prepare more documents, or lower --functions")
    chosen = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    unique = {found[name]: name for name in reversed(chosen)}       # one function a sentence
    return {name: found[name] for name in chosen if unique[found[name]] == name}

def function(name, sentence, rng):
    for asked in ASKED:
        yield asked.format(f=name), sentence, None
    yield rng.choice(ASKED_IN_TEST).format(f=name), sentence, dict(answer=sentence, check="overlap")

def arithmetic(rng, style):
    """a + b: in one leap, or the ones first; with larger numbers, by the Python tool."""
    if style == "tool":
        a, b, sign = rng.randrange(100, 1000), rng.randrange(11, 100), rng.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        reply = [dict(type="python", text=f"{a} {sign} {b}"), dict(type="output", text=str(result)),
                 dict(type="text", text=f"#### {result}")]
        question = f"Compute {a} {sign} {b}."
    else:
        a, b = rng.randrange(10, 50), rng.randrange(1, 10)
        ones, tens, result = a % 10 + b, a - a % 10, a + b
        steps = f"{a % 10} + {b} = {ones}, {tens} + {ones} = {result} "
        reply = (steps if style == "steps" else "") + f"#### {result}"
        question = f"What is {a} + {b}?"
    return question, reply, dict(answer=str(result), check="final")

def bits(rng, style, n=10):
    """Is the number of ones even or odd? In one leap a guess; step by step it is easy."""
    row = [rng.randrange(2) for _ in range(n)]
    steps = " ".join(f"{bit} {('even', 'odd')[sum(row[:i + 1]) % 2]}" for i, bit in enumerate(row))
    result = ("even", "odd")[sum(row) % 2]
    reply = (f"{steps} " if style == "steps" else "") + f"#### {result}"
    question = f"Is the number of ones in {' '.join(map(str, row))} even or odd?"
    return question, reply, dict(answer=result, check="final")

def spelling(rng, words):
    word = rng.choice(words)
    return f"Spell {word}.", "#### " + "-".join(word), dict(answer="-".join(word), check="final")

def common_words(data, count):
    """The most frequent lower-case words of 3 to 6 letters in the first training documents."""
    counts = {}
    first = sorted(Path(data, "documents").glob("train_*.jsonl.gz"))[0]
    with gzip.open(first, "rt", encoding="utf-8") as lines:
        for line in lines:
            for word in re.findall(r"\b[a-z]{3,6}\b", json.loads(line)["text"]):
                counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]

def make(args):
    """Writes <out>/KIND.jsonl (conversations), practice_KIND.jsonl, held_out.jsonl (problems)."""
    rng = random.Random(args.seed)
    names = ("identity", "functions", "arithmetic", "tool", "bits", "spelling")
    kinds = {kind: ([], [], []) for kind in names}

    def add(kind, question, reply, problem, test, practice=False):
        messages = [dict(role="user", content=question)] if isinstance(question, str) else question
        conversations, practiced, tested = kinds[kind]
        if problem and (test or practice):
            row = dict(question=messages[-1]["content"], kind=kind, messages=messages, **problem)
            (tested if test else practiced).append(row)
        if not test:
            conversations.append(dict(messages=[*messages, dict(role="assistant", content=reply)]))

    for _ in range(24):
        for messages, reply, problem in identity(rng):
            add("identity", messages, reply, problem, test=problem is not None)
    functions = documented_functions(args.data, args.functions)
    for name, sentence in list(functions.items())[:args.functions]:
        for question, reply, problem in function(name, sentence, rng):
            add("functions", question, reply, problem, test=problem is not None)
    words = common_words(args.data, 3000)
    for _ in range(args.examples):
        style = "tool" if rng.random() < 0.4 else "steps" if rng.random() < 0.5 else "leap"
        kind = "tool" if style == "tool" else "arithmetic"
        question, reply, problem = arithmetic(rng, style)
        add(kind, question, reply, problem, held_out(question), practice=True)
        style = "steps" if rng.random() < args.step_by_step else "leap"
        question, reply, problem = bits(rng, style)
        add("bits", question, reply, problem, held_out(question), practice=True)
        question, reply, problem = spelling(rng, words)
        add("spelling", question, reply, problem, held_out(question), practice=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tests = []
    for kind, (conversations, practiced, tested) in kinds.items():
        write_rows(out / f"{kind}.jsonl", conversations)
        if practiced:
            write_rows(out / f"practice_{kind}.jsonl", practiced)
        distinct = list({json.dumps(row["messages"]): row for row in tested}.values())
        rng.shuffle(distinct)
        tests += distinct[:args.held_out]
        print(f"{kind:12s} {len(conversations):6d} conversations | "
              f"{len(practiced):6d} practice problems | "
              f"{min(len(distinct), args.held_out):4d} held out")
    write_rows(out / "held_out.jsonl", tests)

def write_rows(path, rows):
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)

def main():
    parser = argparse.ArgumentParser(description="conversations and problems from documents")
    add = parser.add_argument
    add("--data", required=True, help="folder with documents/")
    add("--out", required=True, help="folder for the .jsonl files")
    add("--functions", type=int, default=48, help="functions to ask about")
    add("--examples", type=int, default=4000, help="problems of each checkable kind")
    add("--step_by_step", type=float, default=0.2, help="share of bits in steps")
    add("--held_out", type=int, default=100, help="held-out problems a kind")
    add("--seed", type=int, default=1337, help="of the problems")
    make(parser.parse_args())

if __name__ == "__main__":
    main()
