"""
The demo's conversations and problems, written from the demo's own documents.

    python demo/conversations.py --data data/demo --out data/demo/chat      (or: chat_sft.py make)

    in:  <data>/documents
    out: <out>/KIND.jsonl  conversations for chat_sft.py; practice_KIND.jsonl  problems for
         rl_grpo.py; held_out.jsonl  problems for eval.py

There are six kinds of questions. `identity`: who is the assistant? `functions`: what does a Python
function do? The text of pretraining said it. `arithmetic`: sums, answered at once or step by step.
`tool`: larger numbers, computed with the Python tool. `bits`: is the number of ones in a row of
bits even or odd? Most answers are given at once, few step by step, so that RL has something to
find. `spelling`: the letters of a word. No held-out question is in a conversation.
"""
import argparse
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

NAME = "deepdive"

# ---- The kinds: each function makes (question or messages, reply, problem) -----------------------

def held_out(key, one_in=5):
    """True if the problem with this text is held out. The hash of the text decides, so that the
    choice does not depend on the seed."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % one_in == 0

IDENTITY = {   # question: answer. For a question that begins with "? ", which is only tested, the
               # reply must contain the answer.
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
    """Questions about who the assistant is. Three in ten follow a system message that gives it
    another name, and then that name is the answer."""
    for question, answer in IDENTITY.items():
        name = NAME
        messages = []
        if rng.random() < 0.3:
            name = rng.choice(PERSONAS)
            messages.append(dict(role="system", content=f"Your name is {name}."))
        messages.append(dict(role="user", content=question.removeprefix("? ")))
        problem = None
        if question.startswith("? "):
            problem = dict(answer=name, check="contains")
        yield messages, answer.format(name=name), problem

ASKED = ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Tell me about {f}.",
         "Describe {f}.", "{f}: what is it?", "Explain the function {f}.",
         "What does the function {f} do?")
ASKED_IN_TEST = ("Can you tell me what {f} does?", "I want to know what {f} is for.",
                 "Please describe {f} to me.", "In Python, what does {f} do?")

# A line "package.name(arguments)", and the first sentence of the paragraph after it
DOCUMENTED = re.compile(r"^([a-z_]\w*(?:\.\w+)+)\([^\n]*\)\n+([A-Z`][^\n]*?\.)(?:\s|$)", re.M)

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
    one of them is taken. Raises SystemExit if fewer than `count` functions are left.
    """
    found = {}
    for path in train_files(data):
        for text in read_texts(path):
            for name, sentence in DOCUMENTED.findall(text):
                if 4 <= len(sentence.split()) <= 14 and len(name) <= 36 and sentence.isascii():
                    found.setdefault(name, sentence)
    # Names are ordered by their hash, so that the choice does not follow the alphabet.
    chosen = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    first_with = {}     # sentence: the first function that has it
    for name in chosen:
        first_with.setdefault(found[name], name)
    documented = {name: found[name] for name in chosen if first_with[found[name]] == name}
    if len(documented) < count:
        raise SystemExit(f"{data}/documents describes {len(documented)} functions in a short "
                         f"sentence of their own, fewer than --functions {count}; prepare more "
                         "documents, or lower --functions")
    return documented

def function(name, sentence, rng):
    """Every wording of the question with its answer, and one other wording for the test."""
    for asked in ASKED:
        yield asked.format(f=name), sentence, None
    yield rng.choice(ASKED_IN_TEST).format(f=name), sentence, dict(answer=sentence, check="overlap")

def tool_sum(rng):
    """A sum, difference or product of larger numbers, answered with the Python tool."""
    a = rng.randrange(100, 1000)
    b = rng.randrange(11, 100)
    sign = rng.choice("+-*")
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    reply = [dict(type="python", text=f"{a} {sign} {b}"), dict(type="output", text=str(result)),
             dict(type="text", text=f"#### {result}")]
    return f"Compute {a} {sign} {b}.", reply, dict(answer=str(result), check="final")

def arithmetic(rng, in_steps):
    """a + b, answered at once or in steps: first the ones, then the tens."""
    a = rng.randrange(10, 50)
    b = rng.randrange(1, 10)
    ones = a % 10 + b
    tens = a - a % 10
    result = a + b
    reply = f"#### {result}"
    if in_steps:
        reply = f"{a % 10} + {b} = {ones}, {tens} + {ones} = {result} {reply}"
    return f"What is {a} + {b}?", reply, dict(answer=str(result), check="final")

def bits(rng, in_steps, n=10):
    """Is the number of ones among n bits even or odd? An answer at once is a guess. It is easy in
    steps, each of which gives the parity of the bits so far."""
    row = [rng.randrange(2) for _ in range(n)]
    parities = []
    for i in range(n):
        parities.append(("even", "odd")[sum(row[:i + 1]) % 2])
    reply = f"#### {parities[-1]}"
    if in_steps:
        steps = " ".join(f"{bit} {parity}" for bit, parity in zip(row, parities))
        reply = f"{steps} {reply}"
    question = f"Is the number of ones in {' '.join(map(str, row))} even or odd?"
    return question, reply, dict(answer=parities[-1], check="final")

def spelling(rng, words):
    """One of the words, letter by letter."""
    word = rng.choice(words)
    letters = "-".join(word)
    return f"Spell {word}.", f"#### {letters}", dict(answer=letters, check="final")

def common_words(data, count):
    """The `count` most frequent lower-case words of 3 to 6 letters in the first file of documents.
    Raises SystemExit if there are none."""
    counts = Counter()
    for text in read_texts(train_files(data)[0]):
        counts.update(re.findall(r"\b[a-z]{3,6}\b", text))
    if not counts:
        raise SystemExit(f"{data}/documents has no lower-case words of 3 to 6 letters to spell; "
                         "prepare English documents")
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]

# ---- The files -----------------------------------------------------------------------------------

class Kind:
    """One kind of questions: its conversations, its problems to practise, its problems to test."""

    def __init__(self, name):
        self.name = name
        self.conversations = []
        self.practice = []
        self.tests = []

    def add(self, question, reply, problem, is_test, is_practice=False):
        """Adds a question (a text, or the messages before the reply) to the tests, or else to the
        conversations and, if is_practice, to the problems to practise."""
        messages = question
        if isinstance(question, str):
            messages = [dict(role="user", content=question)]
        if not is_test:
            answer = dict(role="assistant", content=reply)
            self.conversations.append(dict(messages=[*messages, answer]))
        if problem:
            row = dict(question=messages[-1]["content"], kind=self.name, messages=messages,
                       **problem)
            if is_test:
                self.tests.append(row)
            elif is_practice:
                self.practice.append(row)

    def add_problem(self, question, reply, problem):
        """Adds a problem to the tests if it is held out, else to what is taught and practised."""
        self.add(question, reply, problem, is_test=held_out(question), is_practice=True)

def make_kinds(args, rng):
    """All conversations and problems → a list of Kind."""
    names = ("identity", "functions", "arithmetic", "tool", "bits", "spelling")
    kinds = {name: Kind(name) for name in names}
    for _ in range(24):
        for messages, reply, problem in identity(rng):
            kinds["identity"].add(messages, reply, problem, is_test=problem is not None)
    documented = documented_functions(args.data, args.functions)
    for name, sentence in list(documented.items())[:args.functions]:
        for question, reply, problem in function(name, sentence, rng):
            kinds["functions"].add(question, reply, problem, is_test=problem is not None)

    words = common_words(args.data, 3000)
    for _ in range(args.examples):
        if rng.random() < 0.4:
            kinds["tool"].add_problem(*tool_sum(rng))
        else:
            kinds["arithmetic"].add_problem(*arithmetic(rng, in_steps=rng.random() < 0.5))
        in_steps = rng.random() < args.step_by_step
        kinds["bits"].add_problem(*bits(rng, in_steps))
        kinds["spelling"].add_problem(*spelling(rng, words))
    return list(kinds.values())

def make(args):
    """Writes <out>/KIND.jsonl (conversations), practice_KIND.jsonl, held_out.jsonl (problems)."""
    rng = random.Random(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tests = []
    for kind in make_kinds(args, rng):
        write_rows(out / f"{kind.name}.jsonl", kind.conversations)
        if kind.practice:
            write_rows(out / f"practice_{kind.name}.jsonl", kind.practice)
        by_messages = {json.dumps(row["messages"]): row for row in kind.tests}
        distinct = list(by_messages.values())
        rng.shuffle(distinct)
        chosen = distinct[:args.held_out]
        tests += chosen
        print(f"{kind.name:12s} {len(kind.conversations):6d} conversations | "
              f"{len(kind.practice):6d} practice problems | {len(chosen):4d} held out")
    write_rows(out / "held_out.jsonl", tests)

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
    add("--functions", type=int, default=48, help="functions to ask about")
    add("--examples", type=int, default=4000, help="problems of bits, of spelling, and of sums")
    add("--step_by_step", type=float, default=0.2, help="share of bits answered in steps, 0 to 1")
    add("--held_out", type=int, default=100, help="most held-out problems of each kind")
    add("--seed", type=int, default=1337, help="seed of the problems")
    args = parser.parse_args()
    for name in ("functions", "examples", "held_out"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    make(args)

if __name__ == "__main__":
    main()
