"""
Problems: questions with answers that can be checked, and what a right answer is.

    >>> is_correct("6 * 7 = 42 #### 42.0", dict(answer="42", checker="final"))
    True

    in:  .jsonl or .jsonl.gz, a problem a line: {"question", "answer"} as GSM8K has it, or
         {"messages", "answer", "kind", "checker"}; checkers.py lists the checkers

SFT tests on them, RL practises them, and evaluation asks them, so that all three agree on what is
right.
"""
import gzip
import json
import re
import zlib
from pathlib import Path

from bpe import checked

# ---- What a right answer is: checkers.py knows; who only reads files needs none of it ----------

def is_correct(reply, problem):
    """True if the reply solves the problem, which names its checker and holds what that needs.
    What the reply thinks is not looked at."""
    from checkers import CHECKERS
    return CHECKERS[checker_of(problem)](without_thinking(reply), problem)

def checker_of(problem):
    """The name of a problem's checker. "check" is what the demo's files call the field."""
    return problem.get("checker", problem.get("check", "final"))

def declines(reply):
    """Whether a reply says that it does not know."""
    return is_correct(reply, dict(checker="declines"))

def without_thinking(reply):
    """What a reply says outside of <|think|>…<|/think|>. A thought that is not closed reaches to
    the end.

    >>> without_thinking("<|think|>perhaps #### 5<|/think|>It is #### 6")
    'It is #### 6'
    """
    return re.sub(r"<\|think\|>.*?(?:<\|/think\|>|\Z)", "", reply, flags=re.DOTALL)

class CheckerReward:
    """The reward of problems that can be checked: 1 for a right reply, 0 for any other. Like every
    reward it has score(problems, replies) → floats, and what a reply earns that did not end."""
    cut_off = 0.0

    def score(self, problems, replies):
        return [float(is_correct(reply, problem)) for problem, reply in zip(problems, replies)]

# ---- Files of problems ---------------------------------------------------------------------------

def read_problems(path):
    """A .jsonl of {"question", "answer"} or {"messages", "answer"} → problems, as as_problem
    completes them. "kind" and "checker" are optional."""
    return read_lines(path, as_problem, 'a problem is a line {"question": …, "answer": …}; repair '
                      "the file, or make one with python chat_sft.py make")

def as_problem(row):
    """One row of a file of problems → the problem; ValueError says what is wrong with the row.

    Of the worked solution in a row of GSM8K only the result after #### is kept.
    """
    from checkers import CHECKERS, complete
    problem = dict(row)
    if "messages" not in problem:
        check_text("question", problem["question"])
        problem["messages"] = [dict(role="user", content=problem["question"])]
    check_messages(problem["messages"])
    problem.setdefault("kind", "problems")
    check_text("kind", problem["kind"])
    problem["checker"] = checker_of(problem)
    check_text("checker", problem["checker"])
    if problem["checker"] not in CHECKERS:
        raise ValueError(f"checker must be one of {', '.join(CHECKERS)}, got "
                         f"{problem['checker']}")
    complete(problem)
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

def text_of(problem):
    """What a problem asks, and its answer, as one text."""
    texts = [text for message in problem["messages"] for _, text in checked(message)[1]]
    return "\n".join([*texts, str(problem.get("answer", ""))])

def problems_that_fit(path, problems, tokenizer, block_size, log):
    """The problems whose question leaves room for a reply in block_size tokens. The number of the
    others is logged."""
    fitting = [p for p in problems
               if len(tokenizer.render(p["messages"], for_completion=True)[0]) < block_size]
    if len(fitting) < len(problems):
        log.say(f"{path}: {len(problems) - len(fitting)} of {len(problems)} questions are longer "
                f"than {block_size - 1} tokens and are left out")
    return fitting

def warn_of_gamed(problems, log):
    """Logs a warning if RL is about to practise problems whose checker a reply can fool."""
    from checkers import EVALUATION_ONLY
    names = sorted({checker_of(problem) for problem in problems} & set(EVALUATION_ONLY))
    if names:
        log.say(f"warning: a reply that says everything passes the checkers {', '.join(names)}; "
                "practise problems with another one")

# ---- Results -------------------------------------------------------------------------------------

STAGES = dict(pretrain="base", sft="SFT", rl="RL")      # stage in config.json: its name in tables

def share_of(hits, n):
    """hits of n are right → {"accuracy", "accuracy_error", "n"}. The standard error is that of
    claims.py, by Laplace's rule, so that it is not 0 even if all or none are right.

    >>> share_of(30, 100)
    {'accuracy': 0.3, 'accuracy_error': 0.045542, 'n': 100}
    """
    from claims import share
    return dict(accuracy=hits / n, accuracy_error=round(share(hits, n).error, 6), n=n)

def plus_minus(result, key):
    """A figure of a result, and its standard error if it has one: "0.3000 ± 0.0456"."""
    error = result.get(f"{key}_error")
    if isinstance(error, float):
        return f"{result[key]:.4f} ± {error:.4f}"
    return f"{result[key]:.4f}"

def figures(result):
    """The result of a task, as eval.py measures it → the fields of a log line."""
    fields = [f"{key} {plus_minus(result, key)}" for key, value in result.items()
              if isinstance(value, float) and not key.endswith("_error")]
    kinds = result.get("kinds", {})
    if len(kinds) > 1:
        for kind, task in kinds.items():
            fields.append(f"{kind} {plus_minus(task, 'accuracy')}")
            if "wrong" in task:
                fields[-1] += f" (wrong {task['wrong']:.4f}, refused {task['refused']:.4f})"
    counts = ("n", "clean_n", "short", "cut")
    fields += [f"{key} {result[key]}" for key in counts if result.get(key)]
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
