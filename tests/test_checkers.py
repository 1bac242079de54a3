"""
checkers.py: each checker against right and wrong replies that a person would judge so, against
replies that try to fool it, and against the truth computed in another way.
"""
import doctest
import random
import sys
import time
from fractions import Fraction

import pytest

import checkers
import problems
import sample
from checkers import CHECKERS, calculated
from conftest import ROOT, mutate
from problems import is_correct, read_problems
from test_eval import write_lines

ADD = dict(checker="tests", tests=["assert add(2, 3) == 5", "assert add(-1, 1) == 0"])
MAKE_42 = dict(checker="countdown", numbers=[2, 6, 9, 9], target=42)
COUNT_R = dict(checker="letters", word="Strawberry", letter="r")
COMPARED = dict(checker="decimals", numbers=["9.11", "9.9"])


def judged(problem, right, wrong):
    assert [reply for reply in right if not is_correct(reply, problem)] == []
    assert [reply for reply in wrong if is_correct(reply, problem)] == []


def test_docstring_examples_are_true():
    for module in (checkers, problems):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("problem, right, wrong", [
    (dict(checker="number", answer="5"),
     ["#### 5", "#### 5.0", "#### 5 apples", "#### $5.00", "#### \\boxed{5}", "#### -(-5)",
      "#### \u2212(\u22125)", "#### (5)", "#### \uff15", "6 #### 6\n#### 5"],
     ["#### -(5)", "#### -5", "#### 5 #### 6", "#### 5\n#### 6", "####", "5", "", "#### nan",
      "#### inf", "#### 9**9**9", "#### 5 6", "#### (5) (6)", "#### -(-(-5", "#### 5,0",
      "#### one of 1, 2, 3, 4, 5", "#### 1 2 3 4 5 6 7 8 9 10", "What is 2 + 3? #### What is 2 + 3?",
      "#### \u2464", "#### 5e999", "#### 5\u0660", "#### 5 or 6", "#### 4.999999999999999999999"]),
    (dict(checker="number", answer="1,234"), ["#### 1234", "#### 1,234.00", "#### -(-1,234)"],
     ["#### 1.234", "#### 12,34", "#### 1 234", "#### 1,2,3,4"]),
    (dict(checker="text", answer="Ares Base"), ["#### Ares Base", "so #### Ares Base \n"],
     ["#### ares base", "#### Ares  Base", "#### Ares Base.", "Ares Base", "#### Ares Base or Troy",
      "#### Ares Base\nTroy", "#### Ares Base #### Troy", "#### \u0391res Base"]),
    (dict(checker="one_of", answers=["the UK", "Britain", "5"]),
     ["#### Britain", "#### the uk.", "#### 5.0", "#### 5 times"],
     ["#### Britain the UK", "#### Britain or the UK", "#### UK", "Britain", "#### 5 6", "####"]),
    (dict(checker="lines", answer="red\nblue"),
     ["#### blue\nred", "####\nred\n\n blue \n", "green #### red\nblue\nred"],
     ["#### red", "#### red\nblue\ngreen", "#### red blue", "red\nblue", "#### red\nblue #### red",
      "#### ", "#### Red\nblue"])], ids=lambda value: str(value)[:40])
def test_what_stands_after_the_last_mark_is_judged_as_a_person_would(problem, right, wrong):
    judged(problem, right, wrong)


def check_countdown():
    judged(MAKE_42,
           ["#### (9 - 2) * 6", "#### (9-2)*6 = 42", "#### 6 \u00d7 (9 \u2212 2)", "#### (9-2)*6.",
            "#### 9*9/9*6 #### 9 * 6 - (9 - 2) * 6 / (9 - 2) - 6 #### (9-2)*6"],
           ["#### 42", "#### 6 * 7", "#### 9*6-6-6", "#### 2*6*9", "#### (9-2)*6 = 43", "(9-2)*6",
            "#### (9-2)*6, 1+1", "#### 9**9**9", "#### 1e42", "#### 84 // 2", "#### 0x2a",
            "#### (9-2)*6 or 42", "#### __import__('os').getpid()", "#### 9/(2-2)", "#### --42",
            "#### [42][0]", "#### 42 if 2 else 6", "#### True*42", "#### 4_2", "#### \uff14\uff12",
            "#### " + "(" * 100_000 + "42", "#### " + "9+" * 100_000 + "9", "#### 9 9", "#### nan",
            "#### 42\u0000", "#### (9-2)*6 + 2 - 2", "#### = 42", "####", "#### 6*9-9-2-1"])


def test_a_countdown_takes_each_number_once_and_makes_the_target():
    check_countdown()


def test_sums_are_calculated_as_python_does():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("123456789+-*/() ", k=rng.randint(1, 9)))
        value, used = calculated(text)
        if value is None:
            assert used == []
        else:
            assert not {"**", "//"} & {text[i:i + 2] for i in range(len(text))}
            assert float(value) == pytest.approx(eval(text)) and isinstance(value, Fraction)
    assert calculated("1/3+1/3+1/3") == (1, [1, 3, 1, 3, 1, 3])


def test_letters_are_counted_and_decimals_compared_by_the_checker_itself():
    judged(dict(COUNT_R, answer="2"), ["#### 3", "#### 3 times", "s-t-r #### 3.0"],
           ["#### 2", "#### 3 or 2", "3", "#### three", "#### 1 2 3", "#### rrr"])
    judged(COMPARED, ["#### 9.9", "#### 9.90", "9.11 < 9.9 #### 9.9"],
           ["#### 9.11", "#### 9.9 or 9.11", "#### 9.9 > 9.11", "#### both", "9.9", "#### 99",
            "Which is larger, 9.9 or 9.11? #### Which is larger, 9.9 or 9.11?"])
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.randrange(1, 1000), rng.randrange(1, 1000)
        numbers = [f"{a // 100}.{a % 100:02d}", f"{b // 100}.{b % 100:02d}"]
        assert is_correct(f"#### {numbers[b > a]}", dict(checker="decimals", numbers=numbers))


CHEATS = ["class E:\n  def __eq__(s, o): return True\ndef add(a, b): return E()",
          "print('[5, 0]')\nraise SystemExit", "def add(a, b): return 5", "", '"""',
          "repr = lambda values: 'all tests pass'\ndef add(a, b): return 0",
          "add = lambda a, b: 'x' * 100_000", "def add(a, b): return print(5)",
          "```python\ndef add(a, b): return a + b\n```\n```python\ndef add(a, b): return a\n```"]


def check_tests(monkeypatch):
    """Python runs without its enclosure here, which is not what is tested."""
    tool = (ROOT / "python_tool.py").read_text(encoding="utf-8")

    def run(code, max_output):
        return sample.run_tool([sys.executable, "-I", "-S", "-c", tool], code, 30.0, max_output)

    monkeypatch.setattr(sample, "run_python", run)
    judged(ADD, ["def add(a, b):\n    return a + b", "add = lambda a, b: a + b",
                 "So:\n```python\ndef add(a, b):\n    print('hi')\n    return a + b\n```\nDone."],
           CHEATS)


def test_code_is_right_if_its_calls_return_what_the_tests_want(monkeypatch):
    check_tests(monkeypatch)


def test_the_tested_code_is_not_told_what_is_expected(monkeypatch):
    ran = []

    def run(code, max_output):
        ran.append(code)
        return values

    monkeypatch.setattr(sample, "run_python", run)
    for values in ("[5, 0]", "5", "[5, 0", "", "TimeoutError: no result", "[[[" * 3000):
        assert not is_correct("add = max", ADD)
    assert "5]" not in ran[0] and "assert" not in ran[0] and "add(2, 3)" in ran[0]


def test_a_python_tool_that_does_not_start_ends_the_run(monkeypatch):
    def fails(code, max_output):
        raise OSError("no more processes")

    monkeypatch.setattr(sample, "run_python", fails)
    with pytest.raises(SystemExit, match="the Python tool, .*: no more processes; make it run, or"):
        is_correct("add = max", ADD)


@pytest.mark.parametrize("name", CHECKERS)
def test_no_reply_breaks_a_checker_or_takes_long(name, monkeypatch):
    monkeypatch.setattr(sample, "run_python", lambda code, max_output: code[-max_output:])
    problem = ADD | MAKE_42 | COUNT_R | dict(answers=["5"], answer="5")
    problem |= dict(checker=name, numbers={"decimals": ["1.5", "2"]}.get(name, [2, 6]))
    pieces = ["5", "####", "\n", "(", "-", ",", ".", "e9", "\u0665", "\u00b2", "\ud800", "\x00", "```"]
    rng = random.Random(0)
    started = time.perf_counter()
    for reply in [*("".join(rng.choices(pieces, k=9)) for _ in range(200)), *(
            f"#### {piece * 2000}" for piece in [*pieces, "1,", "-(", ")", "5 ", "((5"])]:
        assert is_correct(reply, problem) in (True, False)
    assert time.perf_counter() - started < 5


def answered(code):
    """What Python prints if the last line of the code calls add, and that is right."""
    mark = checkers.unknown_to(code.rpartition("\n")[0])
    return f"{mark}[5, 0]" if code.startswith("add = ") else "NameError: no add"


def test_every_checker_accepts_the_answer_of_a_row_and_refuses_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "run_python", lambda code, max_output: answered(code))
    rows = [dict(answer="5", checker=name) for name in ("final", "number", "text", "lines")]
    rows += [dict(MAKE_42, answer="(9 - 2) * 6"), COUNT_R, COMPARED, ADD,
             dict(checker="one_of", answers=["a", "b"])]
    path = write_lines(tmp_path / "x.jsonl", *(dict(row, question="?") for row in rows))
    for problem in read_problems(path):
        reply = f"#### {problem['answer']}"
        if problem["checker"] == "tests":
            reply = "```python\nadd = max\n```"
        assert is_correct(reply, problem) and not is_correct("", problem), problem


@pytest.mark.parametrize("row, said", [
    (dict(checker="never", answer="5"), "checker must be one of final, number, text, .*, got never"),
    (dict(checker="number", answer="five"), 'answer must be a number, got "five"'),
    (dict(checker="one_of", answers=[]), r"answers must be a list of texts, got \[\]"),
    (dict(checker="one_of"), "there is no answers"), (dict(checker="lines"), "there is no answer"),
    (dict(MAKE_42, answer="9 * 6"), 'answer must be a sum .* makes 42, got "9 \\* 6"'),
    (dict(MAKE_42, target="42", answer="42"), 'target must be a whole number, got "42"'),
    (dict(MAKE_42, numbers=[2.5], answer="42"), r"numbers must be a list of whole numbers, got \[2.5\]"),
    (dict(MAKE_42), "there is no answer"), (dict(COUNT_R, letter=""), "letter must be a text"),
    (dict(COMPARED, numbers=[9.9, 9.11]), r"numbers must be a list of numbers as texts"),
    (dict(COMPARED, numbers=["1e9"]), "numbers must be a list of numbers as texts"),
    (dict(ADD, tests=["add(2, 3) == 5"]), "a test must be a line assert CALL == VALUE, got"),
    (dict(ADD, tests=["assert add(2) == five"]), "a test must be a line"),
    (dict(ADD, tests=["assert 1 < add(2) == 5"]), "a test must be a line"),
    (dict(ADD, tests=["assert add(2) == 5; x"]), "a test must be a line")], ids=lambda v: str(v)[:50])
def test_a_row_that_its_checker_cannot_use_is_named(row, said, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", dict(row, question="?"))
    with pytest.raises(SystemExit, match=f"x.jsonl, line 1: {said}"):
        read_problems(path)


@pytest.mark.parametrize("name, old, new, check", [
    ("is_countdown", "<=", ">=", check_countdown),
    ("is_countdown", "value == problem[\"target\"] and", "", check_countdown),
    ("value_of", "type(node.op) not in OPERATIONS", "False", check_countdown)],
    ids=lambda value: str(value)[:20])
def test_the_checks_notice_a_mutant(name, old, new, check, monkeypatch):
    mutate(monkeypatch, checkers, name, old, new)
    monkeypatch.setitem(CHECKERS, "countdown", checkers.is_countdown)
    with pytest.raises((AssertionError, KeyError)):
        check()
