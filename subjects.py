"""
Subjects: what documents say about a name, questions about it, and names that nobody knows.

    >>> recombined(["os.path.join"], ["math.gcd"], random.Random(1))
    ['os.path.gcd']

    in:  passages of documents, as search.py cuts them
    out: {name: (sentence, passage)}, questions, invented names

probe.py asks a model about them, and demo/lookups.py writes conversations about them. A subject is
a function and the first sentence of its documentation: a question about it has an answer that can
be checked. Which subjects are held out is decided by the hash of the name, so that all programs
agree without a list.
"""
import hashlib
import random
import re

# ---- Questions and the answer to those that one cannot answer -----------------------------------

ASKED = ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Tell me about {f}.",
         "Describe {f}.", "Explain the function {f}.", "What does the function {f} do?",
         "What is {f}?", "Do you know {f}?", "How would you describe {f}?", "Please explain {f}.",
         "Hi, what does {f} do?", "I have a question about {f}.", "What is the purpose of {f}?",
         "Say what {f} does.", "What can you say about {f}?", "In short, what is {f}?",
         "What is {f} good for?", "Tell me what {f} does, please.", "Explain {f} in one sentence.",
         "I would like to know what {f} means.", "What does {f} mean here?", "How does {f} work?",
         "Do you know what {f} is about?", "Show me how {f} is used.",
         "Why do people use {f} then?", "Give me a short description of {f}, please.",
         "When is {f} used?", "So {f} is what?",
         "Say something about {f} for a beginner.", "Can I ask you about {f} now?",
         "Describe {f} for a friend.", "Explain {f} to us, please.", "Introduce {f} and its use.",
         "As a function, what does {f} do?", "Here, what does {f} do?", "Please say what {f} does.")
ASKED_IN_TEST = ("Can you tell me what {f} does?", "I want to know what {f} is for.",
                 "Please describe {f} to me.", "In Python, what does {f} do?")

DONT_KNOW = ("I don't know.", "I don't know that.", "Sorry, I don't know.",
             "I don't know anything about {f}.", "I have not learnt what {f} is.")

def is_held_out(name, one_in=5):
    """Whether the subject with this name, or the problem with this text, is only asked in tests.
    The hash decides, so that the choice does not depend on a seed."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0

# ---- Documents → subjects ------------------------------------------------------------------------

MAX_NAME_CHARS = 36
# A line "package.name(arguments)", and the first sentence after it
DOCUMENTED = re.compile(r"([a-z_]\w*(?:\.\w+)+)\([^\n]*\)\n+([A-Z`][^\n]*?\.)(?:\s|$)")

def documented(passages):
    """Passages → {qualified name: (first sentence about it, its passage)}.

    Only ASCII sentences of 4 to 14 words are taken, and one name for each sentence.
    """
    found = {}
    for passage in passages:
        match = DOCUMENTED.match(passage)
        if match and is_plain(*match.groups()):
            found.setdefault(match[1], (match[2], passage))
    names = one_name_each({name: sentence for name, (sentence, _) in found.items()})
    return {name: found[name] for name in names}

def one_name_each(sentence_of):
    """{name: sentence} → one of the names for each sentence. The names are ordered by their hash,
    so that the order does not follow the alphabet."""
    first_with = {}     # sentence: the first name that has it
    for name in sorted(sentence_of, key=lambda name: hashlib.sha256(name.encode()).digest()):
        first_with.setdefault(sentence_of[name], name)
    return list(first_with.values())

def is_plain(name, sentence):
    """Whether a name and a sentence are short and simple enough for a small model."""
    return (len(name) <= MAX_NAME_CHARS and sentence.isascii()
            and 4 <= len(sentence.split()) <= 14)

# ---- Names that nobody knows ---------------------------------------------------------------------

def syllables(rng, least=2, most=3):
    """A made-up word, "zorblat"-like: two or three syllables of a consonant and a vowel."""
    word = ""
    for _ in range(rng.randint(least, most)):
        word += rng.choice("bdfgklmnprstvz") + rng.choice("aeiou")
    return word

def split_name(name):
    """A name of several words or parts → (all but the last, what stands between, the last).

    >>> split_name("os.path.join"), split_name("Ares Base"), split_name("zorblat")
    (('os.path', '.', 'join'), ('Ares', ' ', 'Base'), ('', '', 'zorblat'))
    """
    for between in (".", " "):
        if between in name:
            front, _, last = name.rpartition(between)
            return front, between, last
    return "", "", name

def made_up(names, rng):
    """Names of new words, one for each of the names, of the same form; some with an underscore."""
    found = []
    for name in names:
        _, between, _ = split_name(name)
        last = syllables(rng)
        if between == " ":
            last = last.capitalize()
        elif rng.random() < 0.5:
            last += f"_{syllables(rng, 1, 2)}"
        first = syllables(rng)
        if name[0].isupper():
            first = first.capitalize()
        found.append(f"{first}{between or '.'}{last}")
    return found

def recombined(fronts, lasts, rng):
    """The beginning of each of the names `fronts` with the end of one of the names `lasts`, which
    is drawn: all parts exist, but as a rule the whole does not."""
    found = []
    for name in fronts:
        front, between, last = split_name(name)
        others = [split_name(other) for other in rng.sample(lasts, min(len(lasts), 20))]
        ends = [other[2] for other in others if other[1] == between and other[2] != last]
        if front and ends:
            found.append(f"{front}{between}{rng.choice(ends)}")
    return found
