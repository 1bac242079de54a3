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
import json
import re
from pathlib import Path

REMEDY = 'an example is a line INPUT => OUTPUT, or in a .jsonl {"input": …, "output": …}'

def few_shot_prompt(pairs, last):
    """Examples (input, output), and a last input whose output is left to the model."""
    examples = [f"input: {given}\noutput: {wanted}\n\n" for given, wanted in pairs]
    return "".join(examples) + f"input: {last}\noutput:"

def read_pairs(path):
    """A file of examples → [(input, output)]; SystemExit names a line that is not an example."""
    as_pair = from_text
    if path.endswith(".jsonl"):
        as_pair = from_json
    pairs = []
    number = 0
    try:
        for number, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                pairs.append(as_pair(line))
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}; {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path}, line {max(1, number)}: {error}; {REMEDY}") from None
    if not pairs:
        raise SystemExit(f"{path} is empty; {REMEDY}")
    return pairs

def from_text(line):
    """INPUT => OUTPUT, or with a tab → (input, output). ValueError for any other line."""
    cells = [cell.strip() for cell in re.split("\t|=>", line)]
    if len(cells) != 2 or not all(cells):
        raise ValueError(f"there must be one arrow between two texts, got {json.dumps(line[:60])}")
    return tuple(cells)

def from_json(line):
    """{"input", "output"} → (input, output). ValueError if one is not a text on one line, because
    the end of the line ends the model's output."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {line[:60]}")
    for name in ("input", "output"):
        text = row.get(name)
        if not isinstance(text, str) or len(text.strip().splitlines()) != 1:
            raise ValueError(f"{name} must be a text on one line, got {json.dumps(text)[:60]}")
    return row["input"].strip(), row["output"].strip()
