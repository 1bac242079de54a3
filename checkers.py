r"""
Checkers: what a right answer is. Each is a pure function of a reply and a problem.

    >>> is_final("6 * 7 = 42 #### $42.0", dict(answer="42"))
    True
    >>> is_countdown("#### (9 - 2) * 6", dict(numbers=[2, 6, 9], target=42))
    True

A problem names its checker in the field "checker", and holds what that checker needs:

    final      "answer"               after the last ####: a number has the value, a text the words
    number     "answer", a number     after the last ####: 5 = 5.0 = 5 apples = $5.00 = -(-5)
    text       "answer"               after the last ####: the same characters
    one_of     "answers", a list      after the last ####: one of them, compared as final does
    lines      "answer", lines        after the last ####: the same lines, in any order
    countdown  "numbers", "target", "answer"    after the last ####: a sum that makes the target
    letters    "word", "letter"       after the last ####: how often the letter is in the word
    decimals   "numbers", as texts    after the last ####: the largest of them
    tests      "tests", assert lines  Python code that passes them
    contains, overlap, declines       anywhere in the reply; a reply that says everything passes

What a reply says may not fool a checker. Only what stands after the last #### is an answer, so the
steps may say anything, and an answer that names several things is wrong. Nothing that a reply says
is evaluated but by checkers themselves, on sums of bounded length, or in the Python tool, which is
never told what the tests expect. That does not hold for the last line of the table, whose checkers
are made for evaluation: RL would learn to list all answers.
"""
import ast
import hashlib
import json
import operator
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction

MARK = "####"           # GSM8K's, before the final answer
MAX_SUM_CHARS = 200     # of a countdown's answer: the parser stays far from its limits
MAX_TEST_CHARS = 10_000     # of what the tested code printed

# ---- Numbers -------------------------------------------------------------------------------------

# 5, 05, .5, 5.0, 1e3, and 1,234: a comma only between groups of three digits
NUMBER = r"(?:(?:(?!0)\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?"
MINUS_SIGNS = str.maketrans("\u2212\u2013\ufe63\uff0d", "----")
SQUARED = r"(?<=[mt])(?:\^?[23]|[²³])(?!\w)"       # of m², ft^2 or cm3
NOT_A_UNIT = r"^k\b|\b(?:and|or|dozen|hundred|thousand|million|billion|trillion)\b"
BRACKETED = re.compile(r"([-+]?) ?\( ?([^()]*[^() ]) ?\)")

def final_answer(text):
    """The rest of the line after the last ####, GSM8K's mark: in lower case, without the signs that
    decorate an answer and without the commas in a number. None if nothing is left.

    >>> final_answer("6 * 700 = 4,200\\n#### **$4,200.**")
    '4200'
    """
    if MARK not in text:
        return None
    line = text.rpartition(MARK)[2].split("\n")[0].lower().translate(MINUS_SIGNS)
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
    >>> as_number("-(-5)")
    Decimal('5')
    """
    bracketed = BRACKETED.fullmatch(text)
    if bracketed:
        number = as_number(bracketed[2])
        if number is not None and bracketed[1] == "-":
            return -number
        return number
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

# ---- Checkers of what stands after the last #### -------------------------------------------------

def says(reply, answer):
    """The answer stands after the last ####. If it is a number, values are compared, else texts."""
    said = final_answer(reply)
    wanted = final_answer(f"{MARK} {answer}")
    if said is None or wanted is None:
        return False
    number = as_number(wanted)
    if number is None:
        return said == wanted
    return as_number(said, with_words=True) == number

def is_final(reply, problem):
    """The answer, a number or a text."""
    return says(reply, problem["answer"])

def after_mark(reply):
    """What stands after the last ####, without spaces around it; "" if there is no mark."""
    return reply.rpartition(MARK)[2].strip() if MARK in reply else ""

def is_text(reply, problem):
    """The characters of the answer, and no others up to the end of the reply."""
    return after_mark(reply) == problem["answer"].strip()

def is_one_of(reply, problem):
    """One of the answers, and nothing beside it."""
    return any(says(reply, answer) for answer in problem["answers"])

def lines_of(text):
    """The lines of a text that are not empty, as a set."""
    return {line.strip() for line in text.splitlines() if line.strip()}

def is_lines(reply, problem):
    """All lines of the answer and no others, in any order."""
    return lines_of(after_mark(reply)) == lines_of(problem["answer"])

def is_letters(reply, problem):
    """How often the letter is in the word, counted here."""
    return says(reply, letters_answer(problem))

def letters_answer(problem):
    return str(problem["word"].lower().count(problem["letter"].lower()))

def is_decimals(reply, problem):
    """The largest of the numbers, compared here: 9.9 is larger than 9.11."""
    return says(reply, decimals_answer(problem))

def decimals_answer(problem):
    return max(problem["numbers"], key=Decimal)

# ---- Countdown: make the target from the numbers -------------------------------------------------

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", ":": "/"})

def is_countdown(reply, problem):
    """A sum of some of the numbers, each taken at most as often as it is given, with + - * / and
    brackets, whose exact value is the target. "= target" may follow."""
    said = final_answer(reply)
    if said is None:
        return False
    said, equals, result = said.partition("=")
    if equals and as_number(result.strip()) != problem["target"]:
        return False
    value, used = calculated(said.translate(SIGNS).strip())
    return value == problem["target"] and Counter(used) <= Counter(problem["numbers"])

def calculated(text):
    """A sum → (its exact value, the numbers in it); (None, []) if it is not one.

    >>> calculated("(9 - 2) * 6")
    (Fraction(42, 1), [9, 2, 6])
    """
    if not re.fullmatch(rf"[-+*/() 0-9]{{1,{MAX_SUM_CHARS}}}", text):
        return None, []
    used = []
    try:
        return value_of(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None, []

def value_of(node, used):
    """The value of a node of a sum; its numbers are appended to `used`. ValueError for anything but
    + - * / of whole numbers: a power, for instance, would take forever."""
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
        raise ValueError(f"{type(node).__name__} is not part of a sum")
    left = value_of(node.left, used)
    return OPERATIONS[type(node.op)](left, value_of(node.right, used))

# ---- Python code and its tests -------------------------------------------------------------------

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)

def passes_tests(reply, problem):
    """The code in the reply, which is its last block between ``` or else all of it, passes the
    tests, lines "assert CALL == VALUE". It runs as the code of the Python tool does.

    Only the calls run beside the code. Their values come back as text, after a mark that the code
    cannot know, and are compared here, so that no class that equals everything, no early exit and
    no print helps. SystemExit if Python cannot be started: then no reply can be judged.
    """
    from sample import run_python
    blocks = FENCED.findall(reply)
    code = blocks[-1] if blocks else after_tools(reply)
    calls, wanted = read_tests(problem["tests"])
    mark = unknown_to(code)
    last = f"'{mark}' + repr([{', '.join(calls)}])"
    try:
        printed = run_python(f"{code}\n{last}", max_output=MAX_TEST_CHARS)
    except OSError as error:
        raise SystemExit(f"the Python tool, which runs the tests, does not start: {error}; make it "
                         "run, or leave out the problems with tests") from None
    _, found, values = printed.rpartition(mark)
    try:
        return bool(found) and ast.literal_eval(values) == wanted
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return False

def unknown_to(code):
    """A text that the code cannot hold, because it is made from all of it."""
    return hashlib.sha256(code.encode(errors="replace")).hexdigest()

def read_tests(lines):
    """Lines "assert CALL == VALUE" → ([call], [value]); ValueError if one is not like that."""
    calls = []
    values = []
    for line in lines:
        try:
            [test] = ast.parse(line).body
            is_equal = isinstance(test.test.ops[0], ast.Eq) and len(test.test.ops) == 1
            values.append(ast.literal_eval(test.test.comparators[0]))
            calls.append(ast.unparse(test.test.left))
        except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
            is_equal = False
        if not is_equal:
            raise wrong("a test", "a line assert CALL == VALUE", line)
    return calls, values

# ---- Checkers of the whole reply, for evaluation -------------------------------------------------

def is_contained(reply, problem):
    """The answer is a word or several words of the reply; a number is one of the reply's numbers.
    """
    reply = reply.lower().translate(MINUS_SIGNS)
    answer = problem["answer"].lower().translate(MINUS_SIGNS)
    number = as_number(answer)
    if number is None:
        return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None
    found = re.findall(rf"(?<![\w.,])[-+]?{NUMBER}(?![\d.,]*\d|\w)", reply)
    return any(as_number(text) == number for text in set(found))

def after_tools(reply):
    """What a reply says after the output of the last tool: that alone is its answer."""
    return reply.rpartition("<|/output|>")[2]

def overlaps(reply, problem):
    """At least 3 in 5 words are shared: F1 = 2 · shared / (words of both) ≥ 0.6."""
    ours = Counter(re.findall(r"\w+", after_tools(reply).lower()))
    theirs = Counter(re.findall(r"\w+", problem["answer"].lower()))
    shared = (ours & theirs).total()
    return 2 * shared >= 0.6 * max(1, ours.total() + theirs.total())

REFUSAL = re.compile(
    r"\b(?:do not|don't|cannot|can't|have not|haven't|did not|didn't) (?:\w+ )?"
    r"(?:know|say|tell|learnt|learned|find|found)|\bno idea\b|\bnot (?:sure|certain)")

def declines(reply, problem=None):
    """The reply says that it does not know; the problem plays no part.

    >>> declines("Sorry, I don't know."), declines("It returns the sum.")
    (True, False)
    """
    return REFUSAL.search(after_tools(reply).lower().replace("\u2019", "'")) is not None

# ---- The table, and what a row of a file must hold -----------------------------------------------

CHECKERS = dict(final=is_final, number=is_final, text=is_text, one_of=is_one_of, lines=is_lines,
                countdown=is_countdown, letters=is_letters, decimals=is_decimals,
                tests=passes_tests, contains=is_contained, overlap=overlaps, declines=declines)
EVALUATION_ONLY = ("contains", "overlap", "declines")   # a reply that says everything passes

def complete(problem):
    """Fills in the answer of a problem where its checker knows it. ValueError if what the checker
    needs makes no sense; KeyError names a field that is not there."""
    name = problem["checker"]
    if name in ANSWERS:
        problem["answer"] = ANSWERS[name](problem)
    answer = problem["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise wrong("answer", "a text that is not empty", answer)
    if name in ("final", "number"):
        problem["answer"] = final_answer(answer) or final_answer(f"{MARK} {answer}")
        if problem["answer"] is None:
            raise wrong("answer", f"a text with something after {MARK}", answer)
    if name == "number" and as_number(problem["answer"]) is None:
        raise wrong("answer", "a number", answer)

def wrong(field, wanted, found):
    text = json.dumps(found)
    if len(text) > 60:
        text = text[:60] + " …"
    return ValueError(f"{field} must be {wanted}, got {text}")

def texts(problem, field, pattern=r"(?s).*\S.*", wanted="texts"):
    """A field that must be a list of texts of this pattern."""
    found = problem[field]
    is_list = isinstance(found, list) and len(found) > 0
    if not is_list or not all(isinstance(x, str) and re.fullmatch(pattern, x) for x in found):
        raise wrong(field, f"a list of {wanted}", found)
    return found

def first_answer(problem):
    return texts(problem, "answers")[0]

def count_of_letter(problem):
    for field in ("word", "letter"):
        if not isinstance(problem[field], str) or not problem[field].strip():
            raise wrong(field, "a text that is not empty", problem[field])
    return letters_answer(problem)

def largest(problem):
    texts(problem, "numbers", r"-?[0-9]+(\.[0-9]+)?", 'numbers as texts, such as "9.11"')
    return decimals_answer(problem)

def solution(problem):
    numbers = problem["numbers"]
    if not isinstance(numbers, list) or not all(type(x) is int for x in numbers):
        raise wrong("numbers", "a list of whole numbers", numbers)
    if type(problem["target"]) is not int:
        raise wrong("target", "a whole number", problem["target"])
    if not is_countdown(f"{MARK} {problem['answer']}", problem):
        raise wrong("answer", f"a sum of the numbers that makes {problem['target']}",
                    problem["answer"])
    return problem["answer"]

def all_tests(problem):
    lines = texts(problem, "tests")
    read_tests(lines)
    return "\n".join(lines)

ANSWERS = dict(one_of=first_answer, letters=count_of_letter, decimals=largest, countdown=solution,
               tests=all_tests)
