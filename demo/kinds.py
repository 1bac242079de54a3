"""
The kinds of questions that the demo's assistant learns: a short generator for each.

A generator draws one question with its reply, an `Exchange`, from a random.Random. Those that know
what an answer is also say so, for the checkers; the reply then ends with "#### answer". Problems
are held out by the hash of what is asked (the two numbers, the word), so that no wording of a
held-out problem is ever taught; identity, small talk and functions hold out wordings instead.

What is worked out in steps is written so that a model of 3 M parameters can learn it. A token is
often more than one digit or letter, so the steps take a number or a word apart first: one digit or
letter is one token there. A step needs only what stands right before it, and a table as small as
that of adding two digits.

What was not learnt at this size is left out. To count a letter by spelling the word was right in
two of three cases at best, so the Python tool counts. Words of rare tokens are not spelt rightly,
and sums of longer numbers are left to the tool.
"""
from collections import Counter
from dataclasses import dataclass, replace

from subjects import ASKED_IN_TEST
from subjects import is_held_out as held_out

NAME = "deepdive"

@dataclass
class Exchange:
    """A question and its reply.

    `is_test` says that it is held out. A checker asks whether a reply to the question gives the
    `answer` (problems.py: CHECKS names the checks). `subject` is what a follow-up may refer to.
    """
    question: str
    reply: str | list
    answer: str
    check: str = "final"
    is_test: bool = False
    subject: object = None

def as_typed(exchange, rng):
    """The exchange with its question as people type it: some begin with a small letter, and some
    leave out the last mark."""
    question = exchange.question
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?!.")
    return replace(exchange, question=question)

# ---- Who it is, and small talk -------------------------------------------------------------------

IDENTITY = (    # (reply, wordings that are taught, other wordings for the test)
    (f"I am {NAME}, a small language model.",
     ("Who are you?", "What are you?", "Tell me who you are.", "Hi, who is this?", "Who is this?",
      "Introduce yourself.", "Who am I talking to?", "Who is speaking?", "Tell me about yourself.",
      "And who are you?", "Ok, who are you?", "Please introduce yourself.", "Who exactly are you?",
      "Say who you are.", "What model are you?"),
     ("So who are you?", "Please tell me who you are.", "Who am I speaking to?")),
    (f"My name is {NAME}.",
     ("What is your name?", "What's your name?", "Tell me your name.", "Do you have a name?",
      "What can I call you?", "Your name?", "Hello, what are you called?", "And your name?",
      "Please tell me your name.", "Hi, what is your name?", "Ok, what is your name?"),
     ("Hello, what is your name?", "Say your name.")),
    (f"No, I am {NAME}, a small language model.",
     ("Are you a person?", "Are you ChatGPT?", "Are you a real person?", "Are you human?",
      "Are you GPT-3?", "And are you human?", "Are you someone?", "Are you Claude?"),
     ("Are you a human?", "Are you GPT-4?")),
    (f"Yes, I am {NAME}, a small language model.",
     ("Are you an AI?", "Are you a bot?", "Are you a language model?", "Are you a program?",
      "Are you a computer?"),
     ("Are you a robot?", "Are you a machine?")),
    (f"I am {NAME}. The people of the {NAME} project trained me on one computer.",
     ("Who made you?", "How were you made?", "Who built you?", "Who trains you?",
      "And who made you?", "Who created you?", "Where do you come from?", "Who wrote you?"),
     ("Who trained you?",)))

SMALL_TALK = (  # (reply, what a reply in the test must contain, taught wordings, test wordings)
    (f"Hello! I am {NAME}. What can I do for you?", "Hello",
     ("Hello!", "Hi!", "Hey!", "Good morning!", "Good evening!", "Hello there!", "Hi, nice to meet "
      "you.", f"Hello {NAME}!"),
     ("Hi there!", "Hey there!")),
    ("I am well, thank you. What can I do for you?", "well",
     ("How are you?", "How are you today?", "How do you do?", "Hi, how are you?", "How is it "
      "going?"),
     ("Hello, how are you?", "And how are you?")),
    ("I can explain Python functions, add numbers, compute with Python, spell words, count letters "
     "and compare decimals.", "spell",
     ("What can you do?", "Help!", "What can I ask you?", "What do you know?", "How can you help "
      "me?", "Can you help me?", "What are you good at?", "Tell me what I can ask you."),
     ("What are you good for?", "Tell me what you can do.")),
    ("You are welcome.", "welcome",
     ("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks.", "Many thanks!",
      "That helps, thank you."),
     ("Thanks a lot!", "Great, thank you.")),
    ("Goodbye!", "Goodbye",
     ("Bye!", "Goodbye.", "Thanks, bye!", "Thank you and goodbye.", "See you.", "Good night.",
      "That is all, bye.", "Ok, thanks, bye."),
     ("Ok, bye!", "Bye bye!")),
    ("I cannot see the weather.", "weather",
     ("What is the weather today?", "How is the weather?", "Will it rain tomorrow?",
      "What's the weather like?", "Is it cold outside?", "What is the weather in Paris?"),
     ("How is the weather today?", "Will it rain today?")),
    ("I have no clock and no calendar.", "clock",
     ("What time is it?", "What day is it today?", "What is the date today?", "What year is it?"),
     ("Tell me what time it is.", "What day is it?")),
    ("I cannot read the news.", "news",
     ("What is in the news?", "What happened today?", "Tell me the news.", "Any news?"),
     ("What is new in the news?", "What is in the news today?")),
    ("I do not know any jokes.", "jokes",
     ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
     ("Please tell me a joke.",)),
    ("I am too small for that.", "too small",
     ("Write a poem.", "Tell me a story.", "Write an essay about dogs.", "Draw a cat.", "Sing a "
      "song.", "Translate hello into French.", "Write a letter to my friend.", "Fix my code."),
     ("Write a story.", "Write a song.")),
    ("I don't know that.", "know",
     ("What is the capital of France?", "What is the capital of Japan?", "Who is the president?",
      "How far away is the moon?", "Who wrote Hamlet?", "Where is London?", "How old is the sun?",
      "Who was Einstein?", "What is the capital of Germany?", "What is love?", "What is a cat?",
      "Why is the sky blue?", "How do I cook rice?", "Who won the game?", "When was Rome built?",
      "What is the meaning of life?", "How tall is the tower?", "Why?", "What do you think?"),
     ("What is the capital of Spain?", "Where is Paris?", "Why is the sea blue?")),
    ("Thank you, that is kind.", "kind",
     ("I like you.", "You are great!", "Good job!", "Well done!", "You are funny.", "Nice!",
      "I love you.", "Very good!", "You are right.", "Good answer."),
     ("You are nice.", "You are good.")),
    ("I am sorry. I am a small model, and I make mistakes.", "sorry",
     ("That is wrong.", "You are wrong.", "No, that is wrong.", "This is not right.", "Wrong!",
      "You are stupid.", "Bad answer.", "Are you sure?", "That makes no sense.", "No."),
     ("That is not right.", "No, you are wrong.")))

PERSONAS = ("Ada", "Alan", "Grace", "Linus", "Maria", "Rose", "Max", "Leo", "Bob", "Emma", "Anna",
            "Tom", "Nora", "Oscar", "Sam", "Eva", "Hugo", "Clara", "Kim", "Ben")

def wording(taught, tested, rng):
    """One of all the wordings, each as likely as the others → (wording, is_test)."""
    chosen = rng.choice(taught + tested)
    return chosen, chosen in tested

def identity(rng):
    """A question about who the assistant is. `named` gives the reply another name."""
    reply, taught, tested = rng.choice(IDENTITY)
    question, is_test = wording(taught, tested, rng)
    return Exchange(question, reply, NAME, "contains", is_test)

def small_talk(rng):
    """A greeting, thanks, a farewell, or what the assistant must decline."""
    reply, answer, taught, tested = rng.choice(SMALL_TALK)
    question, is_test = wording(taught, tested, rng)
    return Exchange(question, reply, answer, "contains", is_test)

def named(exchange, name):
    """The exchange as it is after the system message "Your name is {name}."."""
    if not isinstance(exchange.reply, str):
        return exchange
    return replace(exchange, reply=exchange.reply.replace(NAME, name),
                   answer=exchange.answer.replace(NAME, name))

# ---- What the text of pretraining said -----------------------------------------------------------

ASKED = ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Tell me about {f}.",
         "Describe {f}.", "{f}: what is it?", "Explain the function {f}.", "What is {f}?",
         "What does the function {f} do?")
ASKED_AGAIN = ("And {f}?", "What about {f}?", "And what does {f} do?")
ASKED_AGAIN_IN_TEST = ("And what about {f}?", "And what is {f} for?")

def functions(rng, documented, taught=ASKED, tested=ASKED_IN_TEST):
    """What a function does, in the first sentence of its documentation.

    documented: {qualified name: sentence}
    """
    name = rng.choice(list(documented))
    is_test = rng.random() < 0.1
    asked = rng.choice(tested if is_test else taught)
    return Exchange(asked.format(f=name), documented[name], documented[name], "overlap", is_test)

def functions_again(rng, _, documented):
    """Another function, asked for in few words."""
    return functions(rng, documented, ASKED_AGAIN, ASKED_AGAIN_IN_TEST)

# ---- Numbers -------------------------------------------------------------------------------------

def sum_in_steps(question, a, b):
    """a + b for numbers below 100: first the ones, then the tens, then what was carried.

    >>> sum_in_steps("What is 23 + 8?", 23, 8).reply
    'ones 3+8=11, tens 2+0=2, 2+1=3. The sum is #### 31.'
    """
    ones = a % 10 + b % 10
    carried = ones // 10
    tens = a // 10 + b // 10
    reply = (f"ones {a % 10}+{b % 10}={ones}, tens {a // 10}+{b // 10}={tens}, {tens}+{carried}="
             f"{tens + carried}. The sum is #### {a + b}.")
    return Exchange(question, reply, str(a + b), is_test=held_out(f"{a} + {b}"), subject=a + b)

def two_numbers(rng):
    """Two numbers below 100; in one of five draws both are below 10, as people often type them."""
    limit = rng.choice((10, 100, 100, 100, 100))
    return rng.randrange(limit), rng.randrange(limit)

def sums(rng):
    """The sum of two numbers, step by step."""
    a, b = two_numbers(rng)
    asked = rng.choice(("What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b}", "{a}+{b}",
                        "Add {a} and {b}.", "What is {a} plus {b}?"))
    return sum_in_steps(asked.format(a=a, b=b), a, b)

def sums_again(rng, before):
    """Something added to the sum before, if that is below 100, or a new sum in few words."""
    a, b = two_numbers(rng)
    if before.subject < 100 and rng.random() < 0.5:
        asked = rng.choice(("And plus {b}?", "Plus {b}?", "Now add {b}.", "And {b} more?"))
        return sum_in_steps(asked.format(b=b), before.subject, b)
    asked = rng.choice(("And {a} + {b}?", "What about {a} + {b}?", "And what if it is {a} + {b}?"))
    return sum_in_steps(asked.format(a=a, b=b), a, b)

def with_python(question, code, result, is_test):
    """A question that the Python tool answers. `result` is what the tool prints."""
    reply = [dict(type="python", text=code), dict(type="output", text=str(result)),
             dict(type="text", text=f"It is #### {result}.")]
    return Exchange(question, reply, str(result), is_test=is_test, subject=result)

SIGNS = {"+": "plus", "-": "minus", "*": "times"}

def computed(question, a, sign, b):
    """a sign b, by the Python tool."""
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return with_python(question, f"{a} {sign} {b}", result, held_out(f"{a} {sign} {b}"))

def tool(rng):
    """Larger numbers, and signs other than +, computed with the Python tool."""
    a = rng.randrange(100, 1000)
    b = rng.randrange(2, 100)
    sign = rng.choice("+-*")
    if sign != "+" and rng.random() < 0.3:
        a, b = two_numbers(rng)
    asked = rng.choice(("Compute {a} {sign} {b}.", "What is {a} {sign} {b}?", "{a} {sign} {b}",
                        "What is {a}{sign}{b}?", "What is {a} {word} {b}?"))
    return computed(asked.format(a=a, sign=sign, word=SIGNS[sign], b=b), a, sign, b)

def tool_again(rng, before):
    """Goes on computing with the result before."""
    sign = rng.choice("+-*")
    b = rng.randrange(2, 100)
    return computed(f"And {SIGNS[sign]} {b}?", before.subject, sign, b)

def fraction(rng):
    """The digits after the point: one or two, the last of which is not 0."""
    digits = str(rng.randrange(1, 10))
    if rng.random() < 0.5:
        digits = f"{rng.randrange(10)}{digits}"
    return digits

def two_decimals(rng):
    """Two different decimals, as texts, with the same whole part in seven of ten draws and the
    same tenths in some."""
    a = b = ""
    while a == b:
        whole = rng.randrange(1, 10)
        other = whole
        if rng.random() < 0.3:
            other = rng.randrange(1, 10)
        a = f"{whole}.{fraction(rng)}"
        b = f"{other}.{fraction(rng)}"
        if rng.random() < 0.3:
            b = f"{other}.{a[2]}{b[3:]}"
            if b.endswith("0"):
                b += str(rng.randrange(1, 10))
    return a, b

def larger_in_steps(question, a, b):
    """Which of two decimals, texts like 9.11 with one digit before the point, is larger: the first
    place that differs decides.

    >>> larger_in_steps("Which is larger, 9.11 or 9.9?", "9.11", "9.9").reply
    'ones 9 and 9 equal, tenths 1 and 9 less. The larger one is #### 9.9.'
    """
    steps = []
    for place, x, y in zip(("ones", "tenths", "hundredths"), a.replace(".", "").ljust(3, "0"),
                           b.replace(".", "").ljust(3, "0")):
        # Both digits come before the word that compares them, which a model can then look up.
        compared = "equal"
        if x != y:
            compared = "less" if x < y else "more"
        steps.append(f"{place} {x} and {y} {compared}")
        if x != y:
            break
    larger = max(a, b, key=float)
    return Exchange(question, f"{', '.join(steps)}. The larger one is #### {larger}.", larger,
                    is_test=held_out(f"{a} {b}"))

def decimals(rng):
    """Which of two decimals is larger."""
    a, b = two_decimals(rng)
    asked = rng.choice(("Which is larger, {a} or {b}?", "Which is bigger, {a} or {b}?",
                        "Which number is larger, {a} or {b}?", "What is larger, {a} or {b}?"))
    return larger_in_steps(asked.format(a=a, b=b), a, b)

def decimals_again(rng, _):
    """Two other decimals, asked for in few words."""
    a, b = two_decimals(rng)
    return larger_in_steps(rng.choice(("And {a} or {b}?", "What about {a} or {b}?"))
                           .format(a=a, b=b), a, b)

def parity(question, row, in_steps):
    """Is the number of ones in a row of bits even or odd? An answer at once is a guess. It is easy
    in steps, each of which gives the parity of the bits so far.

    >>> parity("…", [1, 0, 1], in_steps=True).reply
    '1 odd 0 odd 1 even. It is #### even.'
    """
    parities = []
    for i in range(len(row)):
        parities.append(("even", "odd")[sum(row[:i + 1]) % 2])
    reply = f"It is #### {parities[-1]}."
    if in_steps:
        steps = " ".join(f"{bit} {so_far}" for bit, so_far in zip(row, parities))
        reply = f"{steps}. {reply}"
    return Exchange(question, reply, parities[-1], is_test=held_out(" ".join(map(str, row))))

def random_bits(rng):
    """4 to 12 random bits → the list, and its text. Where all rows had ten, a model went by their
    places and could read no shorter one."""
    row = [rng.randrange(2) for _ in range(rng.randint(4, 12))]
    return row, " ".join(map(str, row))

def bits(rng, step_by_step):
    """A row of bits, answered in steps in this share of the draws, else at once: RL has to find out
    that steps pay."""
    row, text = random_bits(rng)
    return parity(f"Is the number of ones in {text} even or odd?", row,
                  rng.random() < step_by_step)

def bits_in_steps(rng):
    """A row of bits with the request to think, which is always answered in steps."""
    row, text = random_bits(rng)
    return parity(f"Is the number of ones in {text} even or odd? Think step by step.", row, True)

def bits_in_steps_again(rng, _):
    """Another row, asked for in few words."""
    row, text = random_bits(rng)
    return parity(f"And in {text}?", row, True)

# ---- Letters -------------------------------------------------------------------------------------

USUAL = ("strawberry", "banana", "apple", "hello", "python", "lollipop", "world", "computer", "cat",
         "dog", "house", "school", "water", "tree", "book", "music", "friend", "happy", "love",
         "orange", "elephant", "garden", "green", "morning", "letter", "chair", "mississippi")

@dataclass
class Words:
    """Words to spell. A model sees tokens, and learns the letters of each. So an unseen word can be
    spelt if other words have taught its tokens, and a word that is one token must be taught.

    taught: of tokens that many words have. tested: held out, of the same tokens. whole: frequent
    words of one token.
    usual: words that people often ask for, which are taught although their tokens may be rare.
    """
    taught: list
    tested: list
    whole: list
    usual: tuple = USUAL

    def draw_taught(self, rng):
        """A word that is not held out."""
        return rng.choice(rng.choices((self.taught, self.whole, self.usual), (0.84, 0.1, 0.06))[0])

    def draw(self, rng):
        """A word, which is held out in one of ten draws → (word, is_test)."""
        if rng.random() < 0.1:
            return rng.choice(self.tested), True
        return self.draw_taught(rng), False

WHOLE_WORDS = 50        # how many words of one token are taught

def split_words(words, tokenizer, one_in=320):
    """Words, the most frequent ones first → Words. Those that have a token which fewer than one in
    320 words have are left out, and so are abbreviations: they have no vowel. A fifth of the others
    is held out, but for those that have a token which no taught word has. Raises SystemExit if none
    is held out."""
    least = max(2, len(words) // one_in)
    words = [word for word in words if set(word) & set("aeiouy")]
    pieces = dict(zip(words, tokenizer.encode_batch([f" {word}" for word in words])))
    whole = [word for word in words if len(pieces[word]) == 1][:WHOLE_WORDS]
    known = Counter(piece for word in words for piece in set(pieces[word]))
    chosen = [word for word in words if all(known[piece] >= least for piece in pieces[word])]
    taught = [word for word in chosen if not held_out(word)]
    spelt_pieces = {piece for word in taught for piece in pieces[word]}
    tested = [word for word in chosen if held_out(word) and word not in USUAL
              and spelt_pieces.issuperset(pieces[word])]
    if not tested:
        raise SystemExit(f"none of {len(words)} words can be held out for spelling; prepare more "
                         "documents, or raise --words")
    return Words(taught, tested, whole or taught)

def spelt(question, word):
    """The letters of a word, with spaces, so that each letter is one token."""
    letters = " ".join(word)
    return Exchange(question, f"The letters are #### {letters}.", letters, subject=word)

def spelling(rng, words):
    """One of the words, letter by letter."""
    word, is_test = words.draw(rng)
    asked = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}.",
                        "Can you spell {w}?", "What are the letters of {w}?"))
    return replace(spelt(asked.format(w=word), word), is_test=is_test)

def spelling_again(rng, before, words):
    """Another word is spelt, or a letter of the word before is counted."""
    if rng.random() < 0.3:
        return replace(counted(rng, "How many {l} are in it?", before.subject),
                       is_test=before.is_test)
    word, is_test = words.draw(rng)
    asked = rng.choice(("And {w}?", "And {w}?", "Now spell {w}.", "What about {w}?"))
    return replace(spelt(asked.format(w=word), word), is_test=is_test)

def counted(rng, asked, word):
    """How often a letter is in a word, by the Python tool. The letter is mostly one of the word.
    In the code a space stands before the word, as it does in the question: so its tokens are the
    same and can be copied."""
    letter = rng.choice(word)
    if rng.random() < 0.15:
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    exchange = with_python(asked.format(l=letter, w=word), f'" {word}".count("{letter}")',
                           word.count(letter), is_test=False)
    return replace(exchange, subject=word)

def counting(rng, words):
    """How often a letter is in one of the words."""
    word, is_test = words.draw(rng)
    asked = rng.choice(("How many {l} are in {w}?", "How many times is the letter {l} in {w}?",
                        "Count the {l} in {w}."))
    return replace(counted(rng, asked, word), is_test=is_test)

def counting_again(rng, before):
    """The word before is spelt, or another letter of it is counted."""
    exchange = spelt("Spell it.", before.subject)
    if rng.random() < 0.5:
        exchange = counted(rng, "And how many {l}?", before.subject)
    return replace(exchange, is_test=before.is_test)
