"""
The demo's conversations about looking things up, written from the demo's own documents.

    python demo/lookups.py --data data/demo --out data/demo/chat

    in:  <data>/documents, <data>/tokenizer; <out>/KIND.jsonl of the other kinds
    out: <out>/search.jsonl, rag.jsonl  conversations for chat_sft.py; held_out_search.jsonl
         problems for eval.py; notes/*.txt  invented facts that some of the problems ask for

What is taught is to copy: the query copies the name from the question, and the answer copies a
sentence from the passage. So most names are put together from parts of real ones or made up, and
most sentences belong to other names: then nothing but copying helps. `search`: the system message
says that there is a search tool, the assistant writes a query, reads a passage, and answers.
Sometimes nothing is found, and it says so. Other kinds of questions come under the same system
message, so that sums are not looked up. `rag`: the passage stands before the question. Held-out
subjects are in no conversation.
"""
import argparse
import itertools
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":      # the scripts that this one imports are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bpe import Tokenizer
from problems import read_lines, write_whole
from search import CAN_SEARCH, NOTHING, read_passages, with_context
from subjects import ASKED, ASKED_IN_TEST, DONT_KNOW, documented, is_held_out, syllables

# ---- Invented names, sentences and passages ------------------------------------------------------

class Material:
    """What invented names and sentences are made of: parts of the documents."""

    def __init__(self, subjects, tokenizer):
        """subjects: {name: (sentence, passage)}, without those held out."""
        self.subjects = subjects
        self.tokens = letters_of_tokens(tokenizer)
        self.names = list(subjects)
        self.sentences = [sentence for sentence, _ in subjects.values()]
        self.parts = sorted({part for name in self.names for part in name.split(".")})
        # what stands after the name, and after the sentence, in real passages
        self.arguments = ["()"]
        self.rests = []
        for name, (sentence, passage) in subjects.items():
            head, _, rest = passage.partition(sentence)
            arguments = head.removeprefix(name).partition("\n")[0]
            if len(arguments) <= 60:
                self.arguments.append(arguments)
            self.rests.append(rest)

    def word(self, rng):
        """A word of one token, or of two: each token as often as any other, because a token must
        have been copied before it can be copied well."""
        word = rng.choice(self.tokens)
        if rng.random() < 0.2:
            word += rng.choice(self.tokens).lower()
        return word

    def name(self, rng):
        """A name with dots: parts of real ones, rows of tokens, or made-up words."""
        if rng.random() < 0.15:
            return f"{syllables(rng)}.{syllables(rng)}"
        parts = [rng.choice(self.parts) for _ in range(rng.choice((2, 2, 3, 3, 4)))]
        for i in (0, -1):
            if rng.random() < 0.2:
                parts[i] = self.word(rng)
        return ".".join(parts)

    def title(self, rng):
        """A capitalised name of one or two words, such as "Ares Base"."""
        words = []
        for _ in range(rng.choice((1, 2, 2, 2))):
            word = rng.choice((syllables(rng), self.word(rng)))
            words.append(word.capitalize())
        return " ".join(words)

    def sentence(self, rng, of_others=0.6):
        """A sentence of some other name, or a row of words that means nothing, with titles."""
        if rng.random() < of_others:
            return rng.choice(self.sentences)
        words = [self.word(rng) for _ in range(rng.randrange(4, 12))]
        words[0] = words[0].capitalize()
        for _ in range(rng.choice((0, 1, 1, 2))):
            words.insert(rng.randrange(1, len(words) + 1), self.title(rng))
        return " ".join(words) + "."

def letters_of_tokens(tokenizer):
    """The tokens of letters only, but for a space or a mark before them, as texts without it."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]
    found = {text[1:] for text in texts if text[1:].isalpha() and text.isascii()}
    return sorted(found | {text for text in texts if text.isalpha() and text.isascii()})

def fact(material, rng):
    """→ (name, passage, answer). The answer is a sentence of the passage."""
    kind = rng.random()
    if kind < 0.2:
        name = rng.choice(material.names)
        sentence, passage = material.subjects[name]
        return name, passage, sentence
    if kind < 0.6:
        name = material.name(rng)
        sentence = material.sentence(rng)
        rest = rng.choice(("", "", rng.choice(material.rests)))     # short passages cost less
        passage = f"{name}{rng.choice(material.arguments)}\n{sentence}{rest}"
        return name, passage[:256].strip(), sentence
    name = material.title(rng)
    sentence = material.sentence(rng, of_others=0.4)
    if rng.random() < 0.7:
        verb = rng.choice(("is", "is", "is", "was", "has", "can", "lies in", "means"))
        sentence = f"{name} {verb} {sentence[0].lower()}{sentence[1:]}"
        return name, sentence + rng.choice(("", f" {material.sentence(rng)}")), sentence
    return name, f"{name}\n{sentence}", sentence

# ---- Conversations and problems ------------------------------------------------------------------

def user(text):
    return dict(role="user", content=text)

def assistant(content):
    return dict(role="assistant", content=content)

def looked_up(name, passage, answer):
    """The assistant's turn: its query, what was found, its answer. The query begins with a space,
    because then its tokens are those of the name in the question."""
    return assistant([dict(type="search", text=f" {name}"), dict(type="output", text=passage),
                      dict(type="text", text=answer)])

SYSTEM = ("", "", "", "You are a helpful assistant. ", "Be brief. ", "Your name is Ada. ",
          "You are Max. ")

def can_search(rng):
    """The system message, in which other words may come first."""
    return dict(role="system", content=rng.choice(SYSTEM) + CAN_SEARCH)

def question_with_search(material, rng):
    """One question that is looked up → its two messages. Sometimes nothing is found."""
    name, passage, answer = fact(material, rng)
    if rng.random() < 0.08:
        passage = NOTHING
        answer = rng.choice(DONT_KNOW).format(f=name)
    return [user(rng.choice(ASKED).format(f=name)), looked_up(name, passage, answer)]

def search_conversation(material, short, rng):
    """One question that is looked up; in half of the draws with one or two more before or after it,
    one of which may be looked up as well.

    short: short conversations of other kinds. Two passages in one conversation are what is left of
    a long chat, whose oldest turns were dropped: the answer must be copied from the last one.
    """
    turns = [question_with_search(material, rng)]
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        more = question_with_search(material, rng)
        if short and (len(turns) > 1 or rng.random() < 0.4):
            more = rng.choice(short)
        turns.insert(rng.choice((0, len(turns))), more)
    return [can_search(rng), *itertools.chain(*turns)]

def rag_conversation(material, rng):
    """One question with its passage before it."""
    name, passage, answer = fact(material, rng)
    question = rng.choice(ASKED).format(f=name)
    return [user(with_context([passage], question)), assistant(answer)]

def other_conversations(out):
    """The single-turn conversations of other kinds without a system message, which are in the
    folder already, as lists of messages."""
    found = []
    for path in sorted(out.glob("*.jsonl")):
        if not path.name.startswith(("search", "rag", "practice_", "held_out", "probe")):
            rows = read_lines(path, lambda row: row["messages"], "make it again")
            found += [messages for messages in rows if messages[0]["role"] == "user"]
    return found

def problem(kind, messages, answer):
    return dict(question=messages[-1]["content"], kind=kind, messages=messages, answer=answer,
                check="overlap")

NOTES = ("{a} Base is a colony on {b} whose capital is New {c}.",
         "Lake {a} is the deepest lake of the moon {b}.",
         "Captain {a} sailed to the island of {b} in a ship of glass.",
         "The {a} Festival is held in {b} when the first snow falls.")
NOTE_NAMES = ("{a} Base", "Lake {a}", "Captain {a}", "The {a} Festival")
NAMES = ("Ares", "Mirkwell", "Tolva", "Ondara", "Quill", "Brenna", "Sorrel", "Halden", "Vesper",
         "Ilmar", "Corwen", "Dorrin")
PLACES = ("Mars", "Titan", "Sarnia", "Lorne", "Veld")
CAPITALS = ("Kestrel", "Marlow", "Aldgate", "Fenwick")

def notes(rng):
    """Invented facts → [(name, sentence)]. None of the sentences' words matters: no conversation
    of training has these names."""
    for i, name in enumerate(NAMES):
        words = dict(a=name, b=rng.choice(PLACES), c=rng.choice(CAPITALS))
        yield NOTE_NAMES[i % 4].format(**words), NOTES[i % 4].format(**words)

def make_problems(held, count, out, rng):
    """Problems about subjects that no conversation has: with the search tool, and with the passage
    in the question; and about invented facts, which are written to notes/."""
    system = dict(role="system", content=CAN_SEARCH)
    found = []
    for name in list(held)[:count]:
        sentence, passage = held[name]
        question = rng.choice(ASKED_IN_TEST).format(f=name)
        found.append(problem("search", [system, user(question)], sentence))
        found.append(problem("rag", [user(with_context([passage], question))], sentence))
    for name, sentence in notes(rng):
        question = rng.choice(("What is {f}?", "Tell me about {f}.")).format(f=name)
        found.append(problem("notes", [system, user(question)], sentence))
        write_whole(out / "notes" / f"{name.replace(' ', '_').lower()}.txt", sentence.encode())
    return found

def write_rows(path, rows):
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{path.name:24s} {len(rows):6d} rows")

def main():
    parser = argparse.ArgumentParser(description="make conversations about looking things up")
    add = parser.add_argument
    add("--data", required=True, help="folder with documents/")
    add("--out", required=True, help="folder for the .jsonl files")
    add("--tokenizer", help="folder of a tokenizer, or gpt2 (default: <data>/tokenizer)")
    add("--examples", type=int, default=3400, help="conversations in which something is "
        "looked up")
    add("--rag", type=float, default=0.2, help="share of them with the passage in the question")
    add("--others", type=int, default=1000, help="questions of other kinds, not looked up")
    add("--max_chars", type=int, default=256, help="characters in a passage")
    add("--held_out", type=int, default=100, help="held-out subjects to ask about")
    add("--seed", type=int, default=1337, help="seed of the conversations")
    args = parser.parse_args()
    for name in ("examples", "max_chars", "held_out"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    rng = random.Random(args.seed)
    out = Path(args.out)
    subjects = documented(itertools.chain(*read_passages([args.data], args.max_chars)))
    held = {name: subject for name, subject in subjects.items() if is_held_out(name)}
    taught = {name: subject for name, subject in subjects.items() if name not in held}
    if not held or not taught:
        raise SystemExit(f"--data {args.data}: its documents describe {len(subjects)} functions in "
                         "a short sentence, too few to teach and to test with; prepare more")
    others = other_conversations(out)
    tokenizer = Tokenizer.load(args.tokenizer or Path(args.data, "tokenizer"))
    short = [messages for messages in others if len(json.dumps(messages)) < 250]
    material = Material(taught, tokenizer)
    n_rag = round(args.examples * args.rag)
    search = [search_conversation(material, short, rng) for _ in range(args.examples - n_rag)]
    for messages in rng.sample(others, min(args.others, len(others))):
        search.append([can_search(rng), *messages])
    rag = [rag_conversation(material, rng) for _ in range(n_rag)]
    write_rows(out / "search.jsonl", [dict(messages=messages) for messages in search])
    write_rows(out / "rag.jsonl", [dict(messages=messages) for messages in rag])
    write_rows(out / "held_out_search.jsonl", make_problems(held, args.held_out, out, rng))

if __name__ == "__main__":
    main()
