"""
Tasks: problems to practise, made or downloaded by name.

    python rl_grpo.py --task countdown --out runs/rl    # its held-out problems are tested, too
    python tasks.py countdown letters:7                 # the same problems as files, to be read

    in:  a name of TASKS; the number after a colon is a seed, and another seed makes other problems
    out: data/tasks/NAME.jsonl and NAME_held_out.jsonl, problems as problems.py reads them

A generator draws one problem from a random.Random, and says what is asked in it: the numbers, the
word. The hash of that decides whether the problem is held out, so that no wording, no order and no
seed brings a held-out problem into the part that is practised. GSM8K has a test set of its own.
Every checker computes the answer from the problem, or compares it with the one that is made here.

Sources: countdown is the task of TinyZero; strawberry and 9.11 are what people ask chatbots; GSM8K
(arXiv 2110.14168).
"""
import argparse
import json
import random
import re
from pathlib import Path

from problems import as_problem, write_whole
from subjects import is_held_out

SEED = 1337
PRACTISED = 5000        # problems at most; letters has fewer
HELD_OUT = 200
FOLDER = Path("data/tasks")

# ---- Generators: rng → (what is asked, the row of a file of problems) ----------------------------

def sums(rng):
    """The sum of two or three numbers below 1000."""
    numbers = [rng.randrange(10 ** rng.choice((1, 2, 3))) for _ in range(rng.choice((2, 2, 3)))]
    question = f"What is {' + '.join(map(str, numbers))}?"
    return sorted(numbers), dict(question=question, answer=str(sum(numbers)), checker="number")

def decimals(rng):
    """Which of two numbers is larger. Most have the same whole part, and more digits often mean
    less, as in 9.9 and 9.11."""
    whole = rng.randrange(1, 100)
    wholes = whole, whole + rng.choice((0, 0, 0, 1))
    numbers = [f"{n}.{rng.randrange(1, 10 ** rng.choice((1, 2)))}" for n in wholes]
    rng.shuffle(numbers)
    first, second = numbers
    if float(first) == float(second):
        return decimals(rng)
    return sorted(numbers), dict(question=f"Which is larger, {first} or {second}?",
                                 numbers=numbers, checker="decimals")

WORDS = """
    address afternoon alphabet apple arrow assess balloon banana battle beginning blueberry
    bookkeeper bottle bubble butter butterfly cabbage calendar canal cinnamon coffee committee
    committed common cookie cotton cucumber daffodil difference dinner eleven elephant engineer
    eraser evening exercise father feather february fellow flannel forest freedom giggle goggles
    grammar grasshopper green hammer happiness hippopotamus hurricane illness independence indigo
    jazz kangaroo kettle kitten ladder letter lettuce lollipop mammal marmalade memory messenger
    millennium minimum mirror mississippi moon mother motor muffin narrow necessary needle noodle
    nutmeg occurrence onion opposite orange parallel peppermint pepper pineapple popcorn possess
    possession potato pottery puppet puzzle queue rabbit raccoon rainbow raspberry recurring referee
    remember river robber roller rubber saffron seventeen shallow sheep sleepless spaghetti squirrel
    strawberry success summer sweetness tattoo teeth tennessee terrier thirteen tomato tomorrow
    tunnel twelve umbrella unsuccessful vacuum vanilla volleyball wallet waterfall wednesday whisper
    willow window winter wonderful woodpecker yellow yesterday zigzag zucchini
    """.split()

def letters(rng):
    """How often a letter is in a word; in one of eight draws it may be missing."""
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    if rng.random() < 1 / 8:
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    question = f"How many times does the letter {letter} occur in the word {word}?"
    return [word, letter], dict(question=question, word=word, letter=letter, checker="letters")

def countdown(rng):
    """Numbers from which a target can be made, of whole numbers in every step."""
    numbers = [rng.randrange(1, 26) for _ in range(rng.choice((3, 4)))]
    target, solution = combined(numbers, rng)
    if not 1 <= target <= 100 or target in numbers:
        return countdown(rng)
    question = (f"Make {target} from the numbers {', '.join(map(str, numbers))} with + - * / and "
                "brackets. Take each number at most once. End with #### and the sum.")
    return [sorted(numbers), target], dict(question=question, numbers=numbers, target=target,
                                           answer=solution, checker="countdown")

def combined(numbers, rng):
    """All numbers, joined in a random order by random signs → (value, how it is written)."""
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left), (b, right) = parts.pop(), parts.pop()
        values = {"+": a + b, "-": a - b, "*": a * b}
        if b and a % b == 0:
            values["/"] = a // b
        sign = rng.choice(list(values))
        parts.append((values[sign], f"({left} {sign} {right})"))
    value, written = parts[0]
    return value, written[1:-1]

TASKS = dict(sums=sums, decimals=decimals, letters=letters, countdown=countdown)

# ---- Problems by name ----------------------------------------------------------------------------

def read_task(name, world_size=1):
    """NAME or NAME:seed → (problems to practise, held-out problems). SystemExit if there is no such
    task."""
    if name == "gsm8k":
        return gsm8k(world_size)
    if not re.fullmatch(rf"({'|'.join(TASKS)})(:[0-9]{{1,18}})?", name):
        raise SystemExit(f"{name} is neither a task nor a file; the tasks are gsm8k, "
                         f"{', '.join(TASKS)}, with or without a seed, as in sums:7")
    return make_task(name)

def make_task(name, practised=PRACTISED, held_out=HELD_OUT):
    """NAME or NAME:seed → (problems to practise, held-out problems). There are fewer than asked
    for if the generator runs out of new ones."""
    name, _, seed = name.partition(":")
    rng = random.Random(int(seed or SEED))
    wanted = {False: practised, True: held_out}
    found = {False: [], True: []}
    asked = set()
    tries_in_vain = 0
    while tries_in_vain < 1000:
        key, row = TASKS[name](rng)
        key = f"{name} {json.dumps(key)}"
        is_test = is_held_out(key)
        tries_in_vain += 1
        if key not in asked and len(found[is_test]) < wanted[is_test]:
            asked.add(key)
            found[is_test].append(as_problem(dict(row, kind=name)))
            tries_in_vain = 0
    return found[False], found[True]

def gsm8k(world_size=1):
    """GSM8K's problems (to practise, held out), which are downloaded if they are not there. Raises
    SystemExit on several ranks then, because the others would not wait long enough."""
    from dialogs import decoded, downloaded, read_blocks
    parts = []
    for name in ("gsm8k", "gsm8k_test"):
        problems = []
        for path in downloaded(name, world_size):
            for _, rows, _ in read_blocks(path):
                if not isinstance(rows, list):
                    rows = rows.to_pylist()         # pyarrow's
                rows = [row for row in map(decoded, rows) if row is not None]
                problems += [as_problem(dict(row, kind="gsm8k")) for row in rows]
        parts.append(problems)
    return tuple(parts)

def main():
    parser = argparse.ArgumentParser(description="write the problems of tasks to files")
    parser.add_argument("names", nargs="+", help=f"gsm8k, {', '.join(TASKS)}; NAME:SEED for others")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files")
    args = parser.parse_args()
    for name in args.names:
        practised, held_out = read_task(name)
        stem = name.replace(":", "_")
        for end, problems in (("", practised), ("_held_out", held_out)):
            path = args.out / f"{stem}{end}.jsonl"
            lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
            write_whole(path, "".join(lines).encode())
            print(f"{path}: {len(problems)} problems, for instance: {problems[0]['question']}")

if __name__ == "__main__":
    main()
