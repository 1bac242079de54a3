"""
Preferences: which of several replies to a prompt is better.

    {"prompt": …, "chosen": …, "rejected": …}       one pair, as TRL has it
    {"prompt": …, "ranking": [best, …, worst]}      K replies, as InstructGPT has them; a list
                                                    within the list holds replies that tie

    in:  .jsonl, .jsonl.gz, .json or .parquet (needs pyarrow), of these two forms or of a public
         set: HH-RLHF, OpenAssistant's trees, PandaLM, LLMBar, Taskmaster-4
    out: a list of Preference

A row is recognised by its columns, and FORMATS has a short function for each kind. A row that is
damaged or of no known kind ends the program with its file and line. A row from which nothing can be
learnt, such as a tie of two, is left out, and counted by reason.

Sources: HH-RLHF (arXiv 2204.05862), InstructGPT (2203.02155), OpenAssistant (2304.07327), PandaLM
(2306.05087), LLMBar (2310.07641), Taskmaster-4 (google-research-datasets/Taskmaster, TM-4-2024).
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dialogs import (SUFFIXES, LeftOut, assistant_says, decoded, joined_turns, read_blocks,
                     user_says)
from problems import as_object, check_messages, check_text, quoted, read_lines, reason

REMEDY = ('a preference is a line {"prompt": …, "chosen": …, "rejected": …} or {"prompt": …, '
          '"ranking": [best, …, worst]}; repair the file, or make one with python rl_grpo.py rank')

@dataclass
class Preference:
    """A prompt, replies to it, and the rank of each reply: 0 is the best, equal ranks are a tie."""
    messages: list          # of the prompt, {"role", "content"}
    replies: list           # texts
    ranks: list             # integers, one for each reply

    def pairs(self):
        """[(index of the better reply, index of the worse one)], K (K - 1) / 2 without ties.

        >>> Preference([], ["a", "b", "c"], [0, 1, 1]).pairs()
        [(0, 1), (0, 2)]
        """
        numbers = range(len(self.replies))
        return [(i, j) for i in numbers for j in numbers if self.ranks[i] < self.ranks[j]]

# ---- Rows → preferences --------------------------------------------------------------------------

def as_messages(prompt):
    """A prompt as a text or as messages → messages."""
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        return [user_says(prompt)]
    messages = joined_turns(prompt)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's turn; a reply belongs to the others")
    return messages

def as_reply(name, reply):
    """A reply as a text, or as a list of one message of the assistant → a text."""
    if isinstance(reply, list) and len(reply) == 1:
        reply = as_object(reply[0]).get("content")
    if not isinstance(reply, str):
        raise ValueError(f"{name} must be a text, got {quoted(reply)}")
    return reply

def from_ranking(row):
    """Ours: {"prompt", "ranking": [best, …, worst]}."""
    ranking = row["ranking"]
    if not isinstance(ranking, list):
        raise ValueError(f"ranking must be a list of replies, got {quoted(ranking)}")
    replies = []
    ranks = []
    for rank, tied in enumerate(ranking):
        if not isinstance(tied, list):
            tied = [tied]
        replies += [as_reply("a reply", reply) for reply in tied]
        ranks += [rank] * len(tied)
    return [Preference(as_messages(row["prompt"]), replies, ranks)]

def from_pair(row):
    """{"prompt", "chosen", "rejected"}: ours, TRL's, and the pairs made from OpenAssistant."""
    replies = [as_reply(name, row[name]) for name in ("chosen", "rejected")]
    return [Preference(as_messages(row["prompt"]), replies, [0, 1])]

def from_dialogues(row):
    """HH-RLHF: "chosen" and "rejected" are whole dialogues, which differ in the last reply. They
    are texts with "\\n\\nHuman:" and "\\n\\nAssistant:" before the turns, or lists of messages."""
    dialogues = []
    for name in ("chosen", "rejected"):
        turns = row[name]
        if isinstance(turns, str):
            turns = hh_turns(name, turns)
        check_messages(turns)
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise ValueError(f"{name} must end with the assistant's reply to something")
        dialogues.append(turns)
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut("have two different prompts")
    replies = [as_reply("a reply", turns[-1]["content"]) for turns in dialogues]
    return [Preference(chosen[:-1], replies, [0, 1])]

HH_ROLES = dict(Human="user", Assistant="assistant")

def hh_turns(name, text):
    """A dialogue of HH-RLHF → messages."""
    before, *pieces = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not pieces:
        raise ValueError(f'{name} must begin with "\\n\\nHuman:", got {quoted(text)}')
    return [dict(role=HH_ROLES[speaker], content=said.strip())
            for speaker, said in zip(pieces[::2], pieces[1::2])]

def instruction(*texts):
    """The message of an instruction and of the input that it may have."""
    said = "\n\n".join(text.strip() for text in texts if text).strip()
    return [user_says(said)] if said else []

def from_instruction(row):
    """Alpaca's columns with "chosen" and "rejected" beside them."""
    replies = [as_reply(name, row[name]) for name in ("chosen", "rejected")]
    return [Preference(instruction(row["instruction"], row.get("input")), replies, [0, 1])]

def from_llmbar(row):
    """LLMBar: two outputs, and a label that says which one is better, 1 or 2."""
    if row["label"] not in (1, 2):
        raise ValueError(f"label must be 1 or 2, got {quoted(row['label'])}")
    replies = [as_reply(name, row[name]) for name in ("output_1", "output_2")]
    return [Preference(instruction(row["input"]), replies, [row["label"] - 1, 2 - row["label"]])]

def from_pandalm(row):
    """PandaLM's test set: three people say which response is better, 1 or 2, or 0 for a tie. Most
    of them decide."""
    votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
    for vote in votes:
        if vote not in (0, 1, 2):
            raise ValueError(f"an annotator must say 0, 1 or 2, got {quoted(vote)}")
    winner, count = Counter(votes).most_common(1)[0]
    if count < 2 or winner == 0:
        raise LeftOut("are ties")
    replies = [row["response1"], row["response2"]]
    if not all(isinstance(reply, str) for reply in replies):
        raise LeftOut("have a reply that is no text")       # JSON's true, in a few of its rows
    messages = instruction(row["instruction"], row.get("input"))
    return [Preference(messages, replies, [winner - 1, 2 - winner])]

TASKMASTER_ROLES = dict(user="user", agent="assistant", api="tool")

def from_taskmaster(row):
    """Taskmaster-4: one reply and whether it is good, 1 or 0. `merged` makes rankings of those
    with equal prompts."""
    if row["reward"] not in (0, 1):
        raise ValueError(f"reward must be 0 or 1, got {quoted(row['reward'])}")
    messages = []
    for turn in json.loads(row["context"]):
        messages.append(dict(role=TASKMASTER_ROLES[turn["role"]], content=taskmaster_text(turn)))
    reply = taskmaster_text(json.loads(row["generation"]))
    return [Preference(messages, [reply], [1 - int(row["reward"])])]

def taskmaster_text(turn):
    """What a turn says: a text, or the JSON of a call or of its result."""
    return turn.get("text") or json.dumps(turn.get("api") or turn.get("response") or {})

def from_tree(row):
    """OpenAssistant: a tree of messages. People ranked the replies to each of a prompter's."""
    found = []
    waiting = [(as_object(row["prompt"]), [])]
    while waiting:
        node, before = waiting.pop()
        speaker = user_says if node["role"] == "prompter" else assistant_says
        messages = [*before, speaker(node["text"])]
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        waiting += [(reply, messages) for reply in replies]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if node["role"] == "prompter" and len(ranked) > 1:
            found.append(Preference(messages, [reply["text"] for reply in ranked],
                                    [reply["rank"] for reply in ranked]))
    if not found:
        raise LeftOut("have no ranks")
    return found

FORMATS = (     # the columns of a row, and what reads it; the first that fits is taken
    (("prompt", "ranking"), from_ranking), (("prompt", "chosen", "rejected"), from_pair),
    (("instruction", "chosen", "rejected"), from_instruction),
    (("chosen", "rejected"), from_dialogues),
    (("input", "output_1", "output_2", "label"), from_llmbar),
    (("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"),
     from_pandalm),
    (("context", "generation", "reward"), from_taskmaster), (("tree_state", "prompt"), from_tree))

def as_preferences(row):
    """A row → its preferences: mostly one. Raises LeftOut, or ValueError or KeyError that say what
    is wrong."""
    present = {name for name, value in row.items() if value is not None}
    for columns, convert in FORMATS:
        if present.issuperset(columns):
            return [checked(preference) for preference in convert(row)]
    known = " | ".join(", ".join(columns) for columns, _ in FORMATS)
    raise ValueError(f"the columns {', '.join(row) or '(none)'} are none of: {known}")

def checked(preference):
    """The preference with its replies stripped; LeftOut if nothing can be learnt from it."""
    if not preference.messages:
        raise LeftOut("have an empty prompt")
    check_messages(preference.messages)
    replies = [reply.strip() for reply in preference.replies]
    if not all(replies):
        raise LeftOut("have an empty reply")
    if len(replies) > 1 and len(set(replies)) == 1:
        raise LeftOut("have equal replies")
    return Preference(preference.messages, replies, preference.ranks)

# ---- Files ---------------------------------------------------------------------------------------

def read_preferences(paths):
    """Files → (a list of Preference, each with at least one pair; lines on what was left out).
    Raises SystemExit for a line that is damaged or of no known kind."""
    found = []
    lines = []
    for path in map(Path, paths):
        left_out = Counter()
        of_file = merged(list(convert_file(path, left_out)))
        usable = [preference for preference in of_file if preference.pairs()]
        left_out["have nothing to compare"] += len(of_file) - len(usable)
        counts = ", ".join(f"{n} {why}" for why, n in left_out.most_common() if n)
        if not usable:
            raise SystemExit(f"{path} has no preference that can be used ({counts}); {REMEDY}")
        if counts:
            lines.append(f"{path}: left out: {counts}")
        found += usable
    return found, lines

def convert_file(path, left_out):
    """Yields the preferences of a file. left_out: a Counter of reasons, which grows."""
    if not path.is_file() or not path.name.lower().endswith(SUFFIXES):
        why = "No such file" if not path.exists() else f"it is none of {', '.join(SUFFIXES)}"
        raise SystemExit(f"{path} cannot be read: {why}; {REMEDY}")
    for first, rows, _ in read_blocks(path):
        if not isinstance(rows, list):
            rows = rows.to_pylist()         # pyarrow's
        for number, row in enumerate(rows, first):
            try:
                row = decoded(row)
                if row is not None:
                    yield from as_preferences(as_object(row))
            except LeftOut as error:
                left_out[str(error)] += 1
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise SystemExit(f"{path}, line {number}: {reason(error)}; {REMEDY}") from None

def merged(preferences):
    """Preferences of one reply each, which was judged by itself, become one for each prompt."""
    by_prompt = {}
    found = []
    for preference in preferences:
        if len(preference.replies) > 1:
            found.append(preference)
            continue
        first = by_prompt.setdefault(json.dumps(preference.messages), preference)
        if first is preference:
            found.append(first)
        elif preference.replies[0] not in first.replies:
            first.replies += preference.replies
            first.ranks += preference.ranks
    return found

# ---- Prompts -------------------------------------------------------------------------------------

def read_prompts(path):
    """A .jsonl of {"messages"}, {"question"} or {"prompt"}; or a .txt with a prompt a line → dicts
    {"messages", "kind", …}, as problems are, but without the need for an answer."""
    remedy = 'a prompt is a line {"prompt": …}, or a line of a .txt; repair the file'
    if str(path).endswith(".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{path} cannot be read: {reason(error)}; {remedy}") from None
        prompts = [dict(messages=[user_says(line.strip())], kind="prompts")
                   for line in lines if line.strip()]
        if not prompts:
            raise SystemExit(f"{path} is empty; {remedy}")
        return prompts
    return read_lines(path, as_prompt, remedy)

def as_prompt(row):
    """A row of a file of prompts → {"messages", "kind", …}."""
    for name in ("messages", "question", "prompt"):
        if row.get(name):
            messages = as_messages(row[name])
            check_messages(messages)
            return dict(row, messages=messages, kind=row.get("kind", "prompts"))
    raise ValueError(f"the columns {', '.join(row) or '(none)'} are none of: messages, question, "
                     "prompt")
