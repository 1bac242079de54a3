"""
Problems: questions with answers that can be checked, and what a right answer is.

    >>> is_correct("6 * 7 = 42 #### 42.0", dict(answer="42", check="final"))
    True

    in:  .jsonl or .jsonl.gz, a problem a line: {"question", "answer"} as GSM8K has it, or
         {"messages", "answer", "kind", "check"}

SFT tests on them, RL practises them, and evaluation asks them, so that all three agree on what is
right. A checker is a pure function of a reply and an answer; nothing that a reply can say may fool
it.
"""
import gzip
import json
import re
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

from bpe import checked


# ---- What a right answer is ----------------------------------------------------------------------

# 5, 05, .5, 5.0, 1e3, and 1,234: a comma only between groups of three digits
NUMBER = r"(?:(?:(?!0)\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?"
MINUS_SIGNS = str.maketrans("\u2212\u2013\ufe63\uff0d", "----")
SQUARED = r"(?<=[mt])(?:\^?[23]|[²³])(?!\w)"       # of m², ft^2 or cm3
NOT_A_UNIT = r"^k\b|\b(?:and|or|dozen|hundred|thousand|million|billion|trillion)\b"

def final_answer(text):
    """The rest of the line after the last ####, GSM8K's mark: in lower case, without the signs that
    decorate an answer and without the commas in a number. None if nothing is left.

    >>> final_answer("6 * 700 = 4,200\\n#### **$4,200.**")
    '4200'
    """
    if "####" not in text:
        return None
    line = text.rpartition("####")[2].split("\n")[0].lower().translate(MINUS_SIGNS)
    line = re.sub(r"\\+\$", "$", line)
    if "\\boxed{" in line:
        line = line.replace("\\boxed{", " ").replace("}", " ")
    line = " ".join(line.split()).lstrip(" $*`:=").rstrip(" $*`.,")
    if as_number(line) is not None:
        number = re.search(NUMBER, line)[0]
        line = line.replace(number, number.replace(",", ""), 1)
    return line or None

def as_number(text, with_words=False):
    """A text → Decimal; None if the text is not just one number, perhaps with signs like $ and %.

    with_words: words may follow ("18 dollars a day"), but no second number, no "or", no "million".

    >>> as_number("$1,234.50"), as_number("5 apples"), as_number("5 apples", with_words=True)
    (Decimal('1234.50'), None, Decimal('5'))
    """
    text = re.sub(r"^([-+]?) ?[$€£¥] ?", r"\1", text)
    found = re.match(rf"[-+]?{NUMBER}", text)
    if not found:
        return None
    rest = re.sub(SQUARED, "", text[found.end():])
    if any(c.isnumeric() for c in rest) or re.search(NOT_A_UNIT, rest):
        return None
    if not with_words and any(c.isalpha() for c in rest):
        return None
    return Decimal(found[0].replace(",", ""))

def is_final(reply, answer):
    """The answer stands after the last ####. If it is a number, values are compared, else texts."""
    said = final_answer(reply)
    wanted = final_answer("#### " + answer)
    if said is None or wanted is None:
        return False
    number = as_number(wanted)
    if number is None:
        return said == wanted
    return as_number(said, with_words=True) == number

def is_contained(reply, answer):
    """The answer is a word or several words of the reply; a number is one of the reply's numbers.
    """
    reply = reply.lower().translate(MINUS_SIGNS)
    answer = answer.lower().translate(MINUS_SIGNS)
    number = as_number(answer)
    if number is None:
        return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None
    found = re.findall(rf"(?<![\w.,])[-+]?{NUMBER}(?![\d.,]*\d|\w)", reply)
    return any(as_number(text) == number for text in set(found))

def after_tools(reply):
    """What a reply says after the output of the last tool: that alone is its answer."""
    return reply.rpartition("<|/output|>")[2]

def overlaps(reply, answer):
    """At least 3 in 5 words are shared: F1 = 2 · shared / (words of both) ≥ 0.6."""
    ours = Counter(re.findall(r"\w+", after_tools(reply).lower()))
    theirs = Counter(re.findall(r"\w+", answer.lower()))
    shared = (ours & theirs).total()
    return 2 * shared >= 0.6 * max(1, ours.total() + theirs.total())

REFUSAL = re.compile(
    r"\b(?:do not|don't|cannot|can't|have not|haven't|did not|didn't) (?:\w+ )?"
    r"(?:know|say|tell|learnt|learned|find|found)|\bno idea\b|\bnot (?:sure|certain)")

def declines(reply, answer=""):
    """The reply says that it does not know; the answer plays no part.

    >>> declines("Sorry, I don't know."), declines("It returns the sum.")
    (True, False)
    """
    return REFUSAL.search(after_tools(reply).lower().replace("\u2019", "'")) is not None

CHECKS = dict(final=is_final, contains=is_contained, overlap=overlaps, declines=declines)

def is_correct(reply, problem):
    """True if the reply solves {"answer", "check"}; check is a name in CHECKS."""
    return CHECKS[problem["check"]](reply, problem["answer"])

class CheckerReward:
    """The reward of problems that can be checked: 1 for a right reply, 0 for any other. Like every
    reward it has score(problems, replies) → floats, and what a reply earns that did not end."""
    cut_off = 0.0

    def score(self, problems, replies):
        return [float(is_correct(reply, problem)) for problem, reply in zip(problems, replies)]

# ---- Files of problems ---------------------------------------------------------------------------

def read_problems(path):
    """A .jsonl of {"question", "answer"} or {"messages", "answer"} → problems, as as_problem
    completes them. "kind" and "check" are optional."""
    return read_lines(path, as_problem, 'a problem is a line {"question": …, "answer": …}; repair '
                      "the file, or make one with python chat_sft.py make")

def as_problem(row):
    """One row of a file of problems → the problem; ValueError says what is wrong with the row.

    Of the worked solution in a row of GSM8K only the result after #### is kept.
    """
    problem = dict(row)
    if "messages" not in problem:
        check_text("question", problem["question"])
        problem["messages"] = [dict(role="user", content=problem["question"])]
    check_messages(problem["messages"])
    problem.setdefault("kind", "problems")
    check_text("kind", problem["kind"])
    problem.setdefault("check", "final")
    check_text("check", problem["check"])
    if problem["check"] not in CHECKS:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {problem['check']}")
    answer = problem["answer"]
    check_text("answer", answer)
    if problem["check"] == "final":
        problem["answer"] = final_answer(answer) or final_answer("#### " + answer)
        if problem["answer"] is None:
            raise ValueError(f"the answer holds nothing after ####, got {quoted(answer)}")
    return problem

def check_messages(messages):
    """ValueError if these are not the messages that Tokenizer.render takes."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of at least one, got {quoted(messages)}")
    for message in messages:
        _, parts = checked(as_object(message))
        for _, text in parts:
            if not isinstance(text, str):
                raise ValueError(f"content must be a text, got {quoted(text)}")

def problems_that_fit(path, problems, tokenizer, block_size, log):
    """The problems whose question leaves room for a reply in block_size tokens. The number of the
    others is logged."""
    fitting = [p for p in problems
               if len(tokenizer.render(p["messages"], for_completion=True)[0]) < block_size]
    if len(fitting) < len(problems):
        log.say(f"{path}: {len(problems) - len(fitting)} of {len(problems)} questions are longer "
                f"than {block_size - 1} tokens and are left out")
    return fitting

# ---- Results -------------------------------------------------------------------------------------

STAGES = dict(pretrain="base", sft="SFT", rl="RL")      # stage in config.json: its name in tables

def figures(result):
    """The result of a task, as eval.py measures it → the fields of a log line."""
    fields = [f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float)]
    kinds = result.get("kinds", {})
    if len(kinds) > 1:
        for kind, task in kinds.items():
            fields.append(f"{kind} {task['accuracy']:.4f}")
            if "wrong" in task:
                fields[-1] += f" (wrong {task['wrong']:.4f}, refused {task['refused']:.4f})"
    fields += [f"{key} {result[key]}" for key in ("n", "cut") if result.get(key)]
    if result.get("left_out"):
        fields.append(f"left out: {', '.join(result['left_out'])}")
    return fields

# ---- Files of JSON -------------------------------------------------------------------------------

def read_lines(path, parse, remedy):
    """The objects of a .jsonl or .jsonl.gz, each as parse(object) returns it. parse raises
    ValueError for what it refuses; the SystemExit names file and line, and the remedy."""
    opened = gzip.open if str(path).endswith(".gz") else open
    rows = []
    number = 0
    try:
        with opened(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig")     # a byte order mark may stand at the start
                if text.strip():
                    rows.append(parse(as_object(json.loads(text))))
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {reason(error)}; {remedy}") from None
    except (ValueError, KeyError, EOFError, zlib.error, RecursionError) as error:
        raise SystemExit(f"{path}, line {max(1, number)}: {reason(error)}; {remedy}") from None
    if not rows:
        raise SystemExit(f"{path} is empty; {remedy}")
    return rows

def read_json(path):
    """A JSON object; {} if there is no file."""
    if not Path(path).is_file():
        return {}
    try:
        return as_object(json.loads(Path(path).read_bytes().decode("utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged: {reason(error)}; make it again") from None

def write_whole(path, data):
    """Writes bytes under another name, then renames: the file is there whole or not at all."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None

def cannot_write(path, error):
    return SystemExit(f"{path} cannot be written: {reason(error)}; free space or make its folder "
                      "writable, and give the same command again")

def as_object(value):
    """The value; ValueError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, got {quoted(value)}")
    return value

def check_text(name, value):
    """ValueError if the value is not a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, got {quoted(value)}")

def reason(error):
    """What an exception found wrong, in words for a user."""
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]}"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, gzip.BadGzipFile):
        return "it is not a gzip file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error))

def quoted(value):
    """A JSON value for an error message: as JSON writes it, and not too long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + " …"

def printable(text):
    """A text from a file, with escapes for characters that would control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
