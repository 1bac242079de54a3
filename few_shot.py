"""
A prompt that teaches a task by examples: a base model continues the pattern, though it was never
trained on the task ("in-context learning", GPT-3, arXiv 2005.14165).

    python sample.py --model gpt2 --few_shot pairs.txt --prompt cheese

in:  pairs, one a line: INPUT => OUTPUT, with a tab in place of the arrow if you like; or a .jsonl
     with lines {"input": …, "output": …}
out: a prompt, which sample.py prints, and which the model continues to the end of the line

    >>> print(few_shot_prompt([("sea", "mer"), ("sun", "soleil")], "sky"))
    input: sea
    output: mer
    <BLANKLINE>
    input: sun
    output: soleil
    <BLANKLINE>
    input: sky
    output:
"""
import re
from pathlib import Path

from problems import quoted, read_lines, reason

REMEDY = 'an example is a line INPUT => OUTPUT, or in a .jsonl {"input": …, "output": …}'

def few_shot_prompt(pairs, last):
    """Examples (input, output), and a last input whose output is left to the model."""
    examples = [f"input: {given}\noutput: {wanted}\n\n" for given, wanted in pairs]
    return "".join(examples) + f"input: {last}\noutput:"

def read_pairs(path):
    """A file of examples → [(input, output)]; SystemExit names a line that is not an example."""
    if path.endswith(".jsonl"):
        return read_lines(path, as_pair, REMEDY)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {reason(error)}; {REMEDY}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in re.split("\t|=>", line)]
        if len(cells) == 2 and all(cells):
            pairs.append(tuple(cells))
        elif line.strip():
            raise SystemExit(f"{path}, line {number}: {REMEDY}, got {quoted(line)}")
    if not pairs:
        raise SystemExit(f"{path} is empty; {REMEDY}")
    return pairs

def as_pair(row):
    """{"input", "output"} → (input, output). ValueError if one is not a text on one line, because
    the end of the line ends the model's output."""
    for name in ("input", "output"):
        if not isinstance(row[name], str) or len(row[name].strip().splitlines()) != 1:
            raise ValueError(f"{name} must be a text on one line, got {quoted(row[name])}")
    return row["input"].strip(), row["output"].strip()
