"""
The talk's claims about thinking, tools, letters and reinforcement learning.

    python talk.py think arithmetic letters jagged discovery beyond rlhf

    in:  talk.py's Models, held-out problems       out: a Finding for each claim

Each function is one claim: its docstring says what is asked, what is counted, and against what. "In
one leap" means that the reply is begun for the model, up to the place where the answer must come
next: so it has a single token's time to find it.
"""
import os
import random
import re
from pathlib import Path

from claims import (Check, Finding, Measured, NotMeasured, difference, mean, one_line, share,
                    share_of)

ASSISTANT = ("honest", "sft", "rl")     # who has not practised, if it is there
GUESSED = Measured(0.5, unit="%")       # of two answers
LEAP = "It is ####"                     # how a reply in one leap begins

def says(reply, answer):
    """Whether a reply gives the answer: after its last ####, or else anywhere in it."""
    from problems import is_correct
    checker = "contains"
    if "####" in reply:
        checker = "final"
    return is_correct(reply.rpartition("<|/output|>")[2], dict(answer=answer, checker=checker))

def in_one_leap(models, questions, begun, answers):
    """Replies that begin with `begun`, where an answer must come next. The beginning ends where the
    tokens of different answers part, since the space before an answer may be in its token."""
    encode = models.engine(*ASSISTANT).tokenizer.encode_ordinary
    ids = os.path.commonprefix([encode(f"{begun} {answer}") for answer in sorted(set(answers))])
    return models.replies(ASSISTANT, questions, ids, max_new_tokens=8, python=False)

# ---- Tokens to think -----------------------------------------------------------------------------

PER_SIZE = 24

def think(models):
    """A model needs tokens to think: the same problems, in one leap and in steps.

    Asked: sums of numbers of one, two and three digits, without the Python tool; and, where they
    are held out, whether a row of bits has an even number of ones. Counted: right answers. Against:
    the same problem in one leap.
    """
    rng = random.Random(models.seed)
    figures = {}
    checks = []
    texts = []
    outcomes = dict(leap=[], steps=[])
    for digits in (1, 2, 3):
        asked = [sum_of(digits, rng) for _ in range(PER_SIZE)]
        replies = ways(models, asked, [q for q, _ in asked], "The sum is ####")
        for way, some in replies.items():
            right = [says(reply, answer) for reply, (_, answer) in zip(some, asked)]
            outcomes[way] += map(float, right)
            figures[f"{way}_{digits}_digit_sums"] = share_of(right)
            texts.append(f"{asked[0][0]}  {way}: {one_line(some[0])}")
    checks.append(Check("sums in steps are right more often, pair by pair",
                        difference(outcomes["steps"], outcomes["leap"])))
    rows = models.held_out("bits", most=30)
    if rows:
        asked = [(p["messages"][-1]["content"].rstrip("? ") + "?", p["answer"]) for p in rows]
        replies = ways(models, asked, [f"{q} Think step by step." for q, _ in asked], LEAP)
        for way, some in replies.items():
            figures[f"{way}_bits"] = share_of(map(says, some, [a for _, a in asked]))
        checks.append(Check("rows of bits too", figures["steps_bits"], figures["leap_bits"]))
    said = "right in steps and in one leap: " + "; ".join(
        f"{name.removeprefix('steps_').replace('_', ' ')} {m} and "
        f"{figures[name.replace('steps', 'leap')]}"
        for name, m in figures.items() if name.startswith("steps"))
    return Finding(said, checks, figures, texts)

def sum_of(digits, rng):
    """A sum of two numbers of so many digits → (question, answer)."""
    numbers = range(10 ** (digits - 1), 10 ** digits)
    a = rng.choice(numbers)
    b = rng.choice(numbers)
    return f"What is {a} + {b}?", str(a + b)

def ways(models, asked, in_steps, begun):
    """Replies to the questions {"leap": begun for the model, "steps": free}, without tools."""
    questions = [question for question, _ in asked]
    answers = [answer for _, answer in asked]
    return dict(leap=in_one_leap(models, questions, begun, answers),
                steps=models.replies(ASSISTANT, in_steps, max_new_tokens=64, python=False))

# ---- Tools ---------------------------------------------------------------------------------------

def arithmetic(models):
    """Mental arithmetic fails where the Python tool does not.

    Asked: products of a number of three digits and one of two. Counted: right answers with the
    tool. Against: the same problems in one leap.
    """
    rng = random.Random(models.seed)
    asked = []
    for _ in range(PER_SIZE):
        a = rng.randrange(100, 1000)
        b = rng.randrange(12, 100)
        asked.append((f"Compute {a} * {b}.", str(a * b)))
    questions = [question for question, _ in asked]
    answers = [answer for _, answer in asked]
    mental = in_one_leap(models, questions, LEAP, answers)
    tool = models.replies(ASSISTANT, questions)
    figures = dict(mental=share_of(map(says, mental, answers)),
                   tool=share_of(map(says, tool, answers)))
    called = share_of("<|python|>" in reply for reply in tool)
    texts = [f"{question}  {one_line(leap, 30)}  tool: {one_line(reply)}  (it is {answer})" for
             question, leap, reply, answer in list(zip(questions, mental, tool, answers))[:4]]
    return Finding(f"products right: {figures['tool']} with Python (asked in {called} of replies), "
                   f"{figures['mental']} in one leap",
                   [Check("right more often with Python", figures["tool"], figures["mental"])],
                   dict(figures, called=called), texts)

# ---- Letters -------------------------------------------------------------------------------------

def letters(models):
    """Tokens are not letters: counting letters fails in one leap, and Python does it.

    Asked: how often a letter is in a held-out word; how many dots are in a row. Counted: right
    answers in one leap, in one leap after the word was spelt in the chat, and with Python. Against:
    one leap.
    """
    tokenizer = models.engine(*ASSISTANT).tokenizer
    problems = [p for p in models.problems("held_out.jsonl", "counting", most=30)
                if letter_and_word(p["messages"][-1]["content"])]
    questions = [p["messages"][-1]["content"] for p in problems]
    answers = [p["answer"] for p in problems]
    words = [letter_and_word(question)[1] for question in questions]
    spelt = [[dict(role="user", content=f"Spell {word}."),
              dict(role="assistant", content=f"The letters are #### {' '.join(word)}."),
              dict(role="user", content=question)] for word, question in zip(words, questions)]
    dots = [(f"How many . are in {'.' * n}?", str(n)) for n in range(3, 19)]
    counts = list(map(str, range(10)))
    replies = dict(leap=in_one_leap(models, questions, LEAP, counts),
                   spelt=in_one_leap(models, spelt, LEAP, counts),
                   python=models.replies(ASSISTANT, questions))
    figures = {way: share_of(map(says, some, answers)) for way, some in replies.items()}
    counted = in_one_leap(models, [question for question, _ in dots], LEAP, counts)
    figures["dots_leap"] = share_of(map(says, counted, [n for _, n in dots]))
    spelling = models.problems("held_out.jsonl", "spelling", most=30)
    from problems import is_correct
    figures["spelling"] = share_of(map(is_correct, models.replies(
        ASSISTANT, [p["messages"] for p in spelling]), spelling))
    sizes = [len(word) / len(tokenizer.encode_ordinary(f" {word}")) for word in words]
    figures["letters_a_token"] = mean(sizes)
    checks = [Check("a token holds more than a letter", figures["letters_a_token"], Measured(1.0)),
              Check("Python counts right more often than one leap", figures["python"],
                    figures["leap"])]
    said = (f"letters counted right: {figures['leap']} in one leap, {figures['spelt']} after "
            f"spelling, {figures['python']} with Python; dots {figures['dots_leap']}; words spelt "
            f"right {figures['spelling']}; {figures['letters_a_token']} letters a token")
    texts = [f"{question}  {way}: {one_line(some[i])}" for i, question in
             list(enumerate(questions))[:3] for way, some in replies.items()]
    return Finding(said, checks, figures, texts)

def letter_and_word(question):
    """The letter and the word that a question to count names, or None.

    >>> letter_and_word("How many times is the letter r in strawberry?")
    ('r', 'strawberry')
    """
    found = (re.search(r"(?:many|letter|the) ([a-z]) (?:are )?in (\w+)", question))
    return found and found.groups()

# ---- Jagged intelligence -------------------------------------------------------------------------

def jagged(models):
    """Intelligence is jagged: 9.11 against 9.9 fails beside harder things that succeed.

    Asked: pairs such as 9.11 and 9.9, where the longer number is the smaller one; pairs with one
    digit after the point; products of three digits by two. Counted: right answers; those to pairs
    also in one leap. Against: the products, which are harder for people; all may use their tools.
    """
    rng = random.Random(models.seed)
    traps = [("9.11", "9.9")]
    while len(traps) < 40:
        whole = rng.randrange(1, 10)
        tenths = rng.randrange(2, 10)
        pair = (f"{whole}.{rng.randrange(1, tenths)}{rng.randrange(1, 10)}", f"{whole}.{tenths}")
        traps.append(tuple(rng.sample(pair, 2)))
    easy = [tuple(f"{rng.randrange(1, 10)}.{d}" for d in rng.sample(range(1, 10), 2))
            for _ in traps]
    figures = {}
    texts = []
    for name, pairs in dict(traps=traps, one_digit=easy).items():
        questions = [f"Which is larger, {a} or {b}?" for a, b in pairs]
        larger = [max(pair, key=float) for pair in pairs]
        leap = in_one_leap(models, questions, "The larger one is ####", larger)
        free = models.replies(ASSISTANT, questions, max_new_tokens=64)
        figures[f"{name}_leap"] = share_of(map(says, leap, larger))
        figures[f"{name}_free"] = share_of(map(says, free, larger))
        texts += [f"{q}  {one_line(a)}  freely: {one_line(b)}"
                  for q, a, b in list(zip(questions, leap, free))[:3]]
    figures["products"] = arithmetic(models).figures["tool"]
    said = (f"pairs like 9.11 and 9.9 right: {figures['traps_free']}, in one leap "
            f"{figures['traps_leap']}; with one digit {figures['one_digit_free']}, in one leap "
            f"{figures['one_digit_leap']}; products {figures['products']}")
    return Finding(said, [Check("products are right more often than pairs like 9.11 and 9.9",
                                figures["products"], figures["traps_free"])], figures, texts)

# ---- Reinforcement learning ----------------------------------------------------------------------

LONGER = 14             # bits in a row; the examples have 12 at most

def discovery(models):
    """SFT imitates, RL discovers: practice finds a longer way of thinking that is right more often.

    Asked: held-out problems of the practised kind, of the model before and after practice; rows of
    14 bits, longer than any example. Counted: right answers; tokens of the replies. Against:
    before practice; guessing.
    """
    tokenizer = models.engine("rl").tokenizer
    log = models.log("rl")
    practised = {row["kind"] for row in log if "kind" in row and "accuracy" in row}
    if not practised:
        raise NotMeasured("the log of rl_grpo.py has no held-out problems; give it --held_out")
    problems = models.problems("held_out.jsonl", *practised, most=30)
    replies = {role: models.replies((role, *ASSISTANT), [p["messages"] for p in problems],
                                    max_new_tokens=128) for role in ("honest", "rl")}
    from problems import is_correct
    right = {role: share_of(map(is_correct, some, problems)) for role, some in replies.items()}
    lengths = {role: mean([len(tokenizer.encode_ordinary(reply)) for reply in some], "tokens")
               for role, some in replies.items()}
    checks = [Check("more answers are right after practice", right["rl"], right["honest"]),
              Check("replies are longer after practice", lengths["rl"], lengths["honest"])]
    figures = dict(before=right["honest"], after=right["rl"], tokens_before=lengths["honest"],
                   tokens_after=lengths["rl"])
    said = (f"right before practice {right['honest']}, after {right['rl']}; replies "
            f"{lengths['honest']}, then {lengths['rl']}")
    if "bits" in practised:
        longer = longer_rows(models)
        figures["longer"] = longer
        checks.append(Check(f"rows of {LONGER} bits, longer than any example, are no guess", longer,
                            GUESSED))
        said += f"; rows of {LONGER} bits {longer}"
    texts = [f"step {row['step']}: reward {row['reward']:.2f}, {row['reply_tokens']:.0f} tokens a "
             "reply" for row in log if "reward" in row and "reply_tokens" in row][::3]
    texts += [f"{problems[0]['messages'][-1]['content']}  {role}: {one_line(some[0])}"
              for role, some in replies.items()]
    return Finding(said, checks, figures, texts)

def longer_rows(models):
    """The share of rows of LONGER bits that the reasoner answers rightly."""
    rng = random.Random(models.seed)
    rows = [[rng.randrange(2) for _ in range(LONGER)] for _ in range(40)]
    replies = models.replies(("rl",), [
        f"Is the number of ones in {' '.join(map(str, row))} even or odd?" for row in rows],
        max_new_tokens=128)
    return share_of(says(reply, ("even", "odd")[sum(row) % 2]) for reply, row in zip(replies, rows))

TAUGHT = 6              # arrows of the longest chain that an example of bench/beyond.py follows

def beyond(models):
    """Practice reaches what no example showed: problems longer than any that was taught.

    Read: the log of a tiny model that was shown chains of up to six arrows and practised longer
    ones. Counted, over the lengths that no example had: greedy answers that are right, and the
    right ones among all samples. Against: before practice the same, and the problems to which at
    least one of sixteen samples was right.
    """
    from training import read_log
    folder = experiment(models, "beyond")
    tests = {}
    for row in read_log(folder / "seed_0" / "rl"):
        if "accuracy" in row and "pass_16" in row and arrows(row["kind"]) > TAUGHT:
            tests.setdefault(row["kind"], []).append(row)
    if not tests or any(len(rows) < 2 for rows in tests.values()):
        raise NotMeasured(f"run python bench/beyond.py --seeds 0 --folder {folder}")
    first = [rows[0] for rows in tests.values()]
    last = [rows[-1] for rows in tests.values()]
    figures = dict(before=pooled(first, "accuracy", "n"), after=pooled(last, "accuracy", "n"),
                   pass_16_before=pooled(first, "pass_16", "sampled"),
                   pass_1_after=pooled(last, "pass_1", "sampled"))
    checks = [Check("more longer chains are right after practice", figures["after"],
                    figures["before"]),
              Check("one try after practice does better than sixteen before",
                    figures["pass_1_after"], figures["pass_16_before"])]
    said = (f"longer chains right before practice {figures['before']}, after {figures['after']}; "
            f"by one of 16 tries before {figures['pass_16_before']}, by each try after "
            f"{figures['pass_1_after']}")
    texts = [f"{kind}: right before practice {rows[0]['accuracy']:.1%}, after "
             f"{rows[-1]['accuracy']:.1%}" for kind, rows in tests.items()]
    return Finding(said, checks, figures, texts)

def arrows(kind):
    """The length of a chain in the name of its kind, such as "12 arrows"; 0 if it has none."""
    length = kind.partition(" ")[0]
    if not length.isdecimal():
        return 0
    return int(length)

def pooled(rows, figure, count):
    """The share of a figure over rows of several lengths, each with its number of problems. The
    error is that of so many problems: samples of one problem are not independent."""
    n = sum(row[count] for row in rows)
    return share(round(sum(row[figure] * row[count] for row in rows)), n)

def experiment(models, name):
    """The folder of one of the demo's experiments, which lies beside the runs: demo-small-rlhf."""
    assistant = Path(models.run("honest", "sft", "base"))
    return assistant.with_name(f"{assistant.name.rpartition('-')[0]}-{name}".lstrip("-"))

# ---- Pleasing a judge ----------------------------------------------------------------------------

LAST = 5                # steps whose mean counts
TOP = 2                 # scores whose mean is the best: the truth may turn after a few steps

def rlhf(models):
    """RLHF climbs a stand-in for people: for long enough, its score rises while the truth turns,
    and a KL penalty holds it.

    Read: the logs of two policies that were trained to please a reward model, with the scores that
    the true judge (gold) gave to the same replies. Counted: the reward and the gold of the last 5
    steps. Against: the first 5 steps; the gold at its best; the policy with a KL penalty.
    """
    from training import read_log
    folder = experiment(models, "rlhf")
    rows = {}
    for name in ("without-kl", "with-kl"):
        rows[name] = [row for row in read_log(folder / name)
                      if row.get("gold") is not None and "reward" in row]
        if len(rows[name]) < 2 * LAST:
            raise NotMeasured("run python demo/rlhf.py --model "
                              f"{models.run('honest', 'sft')} --out {folder}")
    reward = [row["reward"] for row in rows["without-kl"]]
    gold = [row["gold"] for row in rows["without-kl"]]
    held = [row["gold"] for row in rows["with-kl"]]
    best = at_its_best(gold)
    last = {name: mean(scores[-LAST:]) for name, scores in
            dict(reward=reward, gold=gold, gold_with_kl=held).items()}
    checks = [Check("the reward model's score rises", last["reward"], mean(reward[:LAST])),
              Check("the truth turns: its best is above its last", best, last["gold"]),
              Check("a KL penalty holds it", last["gold_with_kl"], last["gold"])]
    said = (f"reward {mean(reward[:LAST])}, then {last['reward']}; gold {mean(gold[:LAST])}, at "
            f"best {best}, then {last['gold']}; with a KL penalty {last['gold_with_kl']}")
    texts = [f"step {row['step']}: reward {row['reward']:.2f}, gold {row['gold']:.2f}"
             for row in rows["without-kl"][::max(1, len(gold) // 6)]]
    return Finding(said, checks, dict(last, best_gold=best), texts)

def at_its_best(scores):
    """The mean of scores where they are highest. The place is found on every second score and the
    mean is that of the others there, so that a lucky score does not count."""
    found_on = scores[::2]
    others = scores[1::2]
    places = range(max(1, len(others) - TOP + 1))
    best = max(places, key=lambda i: sum(found_on[i:i + TOP]))
    return mean(others[best:best + TOP])
