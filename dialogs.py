"""
Conversations of any origin: names → files → rows → messages → tokens.

    python chat_sft.py --data smoltalk:0.1 gsm8k mine.jsonl.gz:2 --out runs/sft   # shares, copies
    python chat_sft.py show alpaca.json                                    # how a file is read
    python download.py ultrachat --num_shards 9 --out data/chat/ultrachat  # before a run of 8 GPUs

    in:  .jsonl, .jsonl.gz, .json or .parquet (needs pyarrow); or a NAME of SETS below, which is
         downloaded into data/chat/NAME. NAME:0.1 or FILE:0.1 reads every tenth row, FILE:2 reads
         all of it twice
    out: lists of messages {"role", "content"}; and their tokens, which are kept in
         data/chat/tokens, because a large file takes minutes to tokenise

A row is recognised by its columns, and FORMATS has a short function for each kind. A row that is
damaged or of no known kind ends the program with its file and line. A row that is whole, but says
what our tokens cannot (the call of a tool that we do not have), is left out, and counted by reason.
Nothing is dropped from within a conversation.

Sources: the data sets' cards on the Hugging Face Hub; GSM8K's calculator (arXiv 2110.14168);
OpenAssistant's trees (2304.07327).
"""
import ast
import functools
import gzip
import hashlib
import io
import itertools
import json
import operator
import re
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import CORES
from problems import as_object, check_messages, check_text, quoted, reason, write_whole

SETS = ("smoltalk", "ultrachat", "no_robots", "oasst", "gsm8k")     # their places: download.py
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
FOLDER = Path("data/chat")
REMEDY = ('a conversation is a line {"messages": [{"role": …, "content": …}]}; repair the file, or '
          "make one with python chat_sft.py make")

# ---- Rows → messages -----------------------------------------------------------------------------

class LeftOut(Exception):
    """A row that is whole, but cannot be a conversation of ours; the text says why."""

def user_says(text):
    return dict(role="user", content=text)

def assistant_says(content):
    return dict(role="assistant", content=content)

def from_messages(row):
    """{"messages": [{"role", "content"}]}: ours, and that of OpenAI, smoltalk, UltraChat."""
    return [joined_turns(row["messages"])]

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "chatgpt": "assistant", "system": "system"}

def from_sharegpt(row):
    """{"conversations": [{"from": "human", "value"}]}, with or without a "system" beside it."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations must be a list of at least one, got {quoted(turns)}")
    if "role" in as_object(turns[0]):
        return [joined_turns(turns)]
    messages = system_message(row)
    for turn in map(as_object, turns):
        speaker = str(turn["from"])
        if speaker not in SPEAKERS:
            raise LeftOut(f"has a turn of {speaker}")
        check_text("value", turn["value"])
        messages.append(dict(role=SPEAKERS[speaker], content=turn["value"]))
    return [messages]

def system_message(row):
    """The system message in a column of its own, as a list of one or none."""
    for name in ("system", "system_prompt"):
        if row.get(name):
            check_text(name, row[name])
            return [dict(role="system", content=row[name])]
    return []

def from_pair(row, asked, answered):
    """A question and its answer in two columns. Alpaca has an input for the instruction, and Dolly
    a context. TRL has messages in both columns."""
    question = row[asked]
    answer = row[answered]
    if isinstance(question, list) and isinstance(answer, list):
        return [joined_turns(question + answer)]
    check_text(asked, question)
    check_text(answered, answer)
    for name in ("input", "context"):
        if row.get(name):
            check_text(name, row[name])
            question = f"{question}\n\n{row[name]}"
    if "<<" in answer:
        answer = with_calculations(answer)
    return [[*system_message(row), user_says(question), assistant_says(answer)]]

def from_instances(row):
    """Self-Instruct: an instruction with several inputs and outputs, each of them a
    conversation."""
    conversations = []
    for instance in row["instances"]:
        pair = dict(as_object(instance), instruction=row["instruction"])
        conversations += from_pair(pair, "instruction", "output")
    return conversations

def from_tree(row):
    """OpenAssistant: {"prompt": a message with replies, which have replies …}. The path of the best
    replies is taken, down to the assistant's last one."""
    node = as_object(row["prompt"])
    messages = []
    while node:
        check_text("text", node["text"])
        role = dict(prompter="user", assistant="assistant")[node["role"]]
        messages.append(dict(role=role, content=node["text"]))
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=preference, default=None)
    if messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        raise LeftOut("has no reply")
    return [messages]

def preference(message):
    """A sort key for siblings: their rank, 0 for the best one; without ranks, how many people went
    on from there."""
    rank = message.get("rank")
    if rank is None:
        rank = float("inf")
    return rank, -len(message.get("replies") or [])

def pair(asked, answered):
    return (asked, answered), functools.partial(from_pair, asked=asked, answered=answered)

FORMATS = (     # the columns of a row, and what reads it; the first that fits is taken
    (("messages",), from_messages), (("conversations",), from_sharegpt),
    (("tree_state", "prompt"), from_tree), (("instruction", "instances"), from_instances),
    pair("instruction", "output"), pair("instruction", "response"), pair("prompt", "completion"),
    pair("prompt", "response"), pair("question", "answer"), pair("question", "response"),
    pair("query", "response"))
NOT_CONVERSATIONS = (
    (("check",), "a problem to be asked, which must not be trained on"),
    (("chosen", "rejected"), "a preference, not a conversation; keep the chosen one as messages"))

def as_conversations(row):
    """A row → its conversations, lists of messages: mostly one. Raises LeftOut, or ValueError or
    KeyError that say what is wrong."""
    present = {name for name, value in row.items() if value is not None}
    if "messages" not in present or "check" in present:
        for columns, what in NOT_CONVERSATIONS:
            if present.issuperset(columns):
                raise ValueError(f"a row with {' and '.join(columns)} is {what}")
    for columns, convert in FORMATS:
        if present.issuperset(columns):
            conversations = convert(row)
            for messages in conversations:
                check_messages(messages)
                check_replies(messages)
            return conversations
    known = " | ".join(", ".join(columns) for columns, _ in FORMATS)
    raise ValueError(f"the columns {', '.join(row) or '(none)'} are none of: {known}")

def check_replies(messages):
    """Raises LeftOut if the assistant has a turn in which it says nothing: it would learn that."""
    for message in messages:
        if message["role"] != "assistant":
            continue
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        if not any(text.strip() for text in texts):
            raise LeftOut("has an empty reply")

# ---- Tools and thoughts → parts of a turn --------------------------------------------------------

OUR_TOOLS = ("python", "search")
REFUSED = ("function_call", "weight")       # ignoring these would change what the messages say

def joined_turns(messages):
    """OpenAI's messages → ours. reasoning_content becomes a part "think"; tool_calls and the tools'
    messages become parts of the assistant's turn, which the message after them continues."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        check_messages(messages)        # which raises the error
    turns = []
    waiting = []                        # (id of a call, the part for its output)
    is_open = False
    for message in messages:
        for name in REFUSED:
            if message.get(name) is not None:
                raise ValueError(f"a message has {name}, which would be ignored; write it as a "
                                 "part of content (bpe.py: PARTS), or remove it")
        if message.get("role") == "tool" and waiting:
            fill_output(message, waiting)
            continue
        parts = thoughts(message)
        calls = tool_calls(message)
        if waiting:
            raise LeftOut("has a tool call without a result")
        is_continued = is_open and message.get("role") == "assistant"
        if not (parts or calls or is_continued):
            turns.append(message)       # as nearly all are
            is_open = False
            continue
        parts += text_parts(message.get("content"))
        for number, part in calls:
            output = dict(type="output", text="")
            parts += [part, output]
            waiting.append((number, output))
        if is_continued:
            turns[-1]["content"] += parts
        else:
            turns.append(dict(role=message.get("role"), content=parts))
        is_open = bool(calls)
    if waiting:
        raise LeftOut("has a tool call without a result")
    return turns

def text_parts(content):
    """The content of a message as a list of parts; null and "" are none."""
    if isinstance(content, list):
        return list(content)
    return [dict(type="text", text=content)] if content else []

def thoughts(message):
    """reasoning_content as a list of one part, or of none."""
    thought = message.get("reasoning_content")
    if not thought:
        return []
    if not isinstance(thought, str):
        raise ValueError(f"a message has reasoning_content that is no text: {quoted(thought)}")
    return [dict(type="think", text=thought)]

def tool_calls(message):
    """OpenAI's tool_calls → [(id, part)]. Raises LeftOut for a tool that we do not have."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"a message has tool_calls that are no list: {quoted(calls)}")
    found = []
    for call in map(as_object, calls):
        function = as_object(call.get("function", call))
        name = function.get("name")
        if name not in OUR_TOOLS:
            raise LeftOut(f"calls the tool {name}")
        found.append((call.get("id"), dict(type=name, text=only_argument(function))))
    return found

def only_argument(function):
    """The arguments of a call, JSON or a plain text → the code or the query."""
    written = arguments = function.get("arguments")
    if isinstance(written, str):
        try:
            arguments = json.loads(written)
        except ValueError:
            pass
        if not isinstance(arguments, dict):     # code like 6 * 7, or 42, which is JSON too
            return written
    values = list(as_object(arguments).values())
    if len(values) != 1 or not isinstance(values[0], str):
        raise LeftOut(f"calls {function['name']} with other arguments than one text")
    return values[0]

def fill_output(message, waiting):
    """Puts what a tool said into the output part of its call: that of the same id, or the first."""
    found = [entry for entry in waiting if entry[0] == message.get("tool_call_id")]
    entry = (found or waiting)[0]
    waiting.remove(entry)
    texts = [part.get("text") for part in text_parts(message.get("content"))]
    if not all(isinstance(text, str) for text in texts):
        raise LeftOut("has a tool's result that is no text")
    entry[1]["text"] = "".join(texts)

CALCULATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}

def with_calculations(text):
    """GSM8K's "48/2 = <<48/2=24>>24 clips" → parts: the text, the Python call, what Python prints
    (24.0), and the rest. The result that was written down is kept as text, after the mark. A mark
    that Python does not confirm, to 1 %, is left away.

    >>> [part["text"] for part in with_calculations("2 * 3 = <<2*3=6>>6 #### 6")]
    ['2 * 3 = ', '2*3', '6', '6 #### 6']
    """
    pieces = CALCULATION.split(text)
    parts = [dict(type="text", text=pieces[0])]
    for code, written, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        value = calculate(code)
        if value is not None and is_near(value, written):
            parts += [dict(type="python", text=code.strip()), dict(type="output", text=str(value)),
                      dict(type="text", text=rest)]
        else:
            parts[-1]["text"] += rest
    return [part for part in parts if part["text"]]

def calculate(code):
    """The value of an expression of numbers and + - * / // %; None if it is anything else."""
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        raise KeyError(node)
    try:
        return value(ast.parse(code.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError):
        return None

def is_near(value, written):
    """Whether a result that was written down is this value, but for rounding."""
    try:
        return abs(float(written.replace(",", "")) - value) <= 0.01 * abs(value)
    except (ValueError, OverflowError):
        return False

# ---- Names → files → rows ------------------------------------------------------------------------

def split_weight(spec):
    """FILE or FILE:weight → (FILE, weight), where the default weight is 1."""
    weighted = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", spec)
    if weighted:
        return weighted[1], float(weighted[2])
    return spec, 1.0

def find_files(name, world_size=1):
    """A file, or the name of a set → the files to read. A set is downloaded if it is not there; but
    not while other ranks wait, because they would give up before a large one has arrived."""
    if Path(name).is_file():
        return [Path(name)]
    if name not in SETS:
        why = "it is a folder" if Path(name).is_dir() else "No such file or directory"
        raise SystemExit(f"{name} cannot be read: {why}; give a file {', '.join(SUFFIXES)}; or the "
                         f"name of a set, {', '.join(SETS)}")
    return downloaded(name, world_size)

def downloaded(name, world_size=1):
    """The files of a data set under a short name of download.py, which fetches those that are not
    there yet."""
    import download
    out = FOLDER / name
    everything = 10 ** 6
    with download.one_line_when_full(), download.one_line_when_interrupted():
        if world_size > 1 and not (out / "files.json").exists():
            raise SystemExit(f"{name} is not on this machine; download it first, with python "
                             f"download.py {name} --num_shards {everything} --out {out}")
        files = download.find_files(name, everything, out)
        return [download.fetch(file, name, out) for file in files]

BLOCK_BYTES = 8 << 20       # of rows that one process works on at a time: a second or two
BLOCK_ROWS = 4096           # of a .parquet

def read_blocks(path):
    """Yields (number of the first row, rows, share of the file that is read) until the end. Rows
    are as they stand in the file, for decoded(). Raises SystemExit if the file cannot be read."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise SystemExit(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one of them")
    reader = read_text
    if name.endswith(".parquet"):
        reader = read_parquet
    elif name.endswith(".json"):
        reader = read_json
    number = 1
    try:
        for rows, share in reader(path):
            yield number, rows, share
            number += len(rows)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read: {reason(error)}; {REMEDY}") from None
    if number == 1:
        raise SystemExit(f"{path} is empty; {REMEDY}")

def read_text(path):
    """A .jsonl or .jsonl.gz → lists of lines, as bytes."""
    size = max(1, path.stat().st_size)
    lines_before = 0
    block = []
    block_bytes = 0
    with open(path, "rb") as file:
        lines = file
        if path.name.lower().endswith(".gz"):
            lines = gzip.GzipFile(fileobj=file)
        try:
            for line in lines:
                block.append(line)
                block_bytes += len(line)
                if block_bytes >= BLOCK_BYTES:
                    yield block, file.tell() / size
                    lines_before += len(block)
                    block = []
                    block_bytes = 0
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"after line {lines_before + len(block)}, {reason(error)}") from None
    if block:
        yield block, 1.0

def read_json(path):
    """A .json that is one list → that list."""
    rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("a .json must be a list of rows")
    if rows:
        yield rows, 1.0

def read_parquet(path):
    """A .parquet → its record batches."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path} needs the package pyarrow, which is not installed; run pip "
                         "install -r requirements-extra.txt") from None
    try:
        file = ParquetFile(path)
        done = 0
        for batch in file.iter_batches(BLOCK_ROWS):
            done += len(batch)
            yield batch, done / file.metadata.num_rows
    except ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None

def decoded(row):
    """A row as it stands in a file → an object of JSON; None for an empty line."""
    if not isinstance(row, bytes):
        return row
    text = row.decode("utf-8-sig")      # a byte order mark may stand at the start
    return json.loads(text) if text.strip() else None

def in_share(i, share):
    """Whether row i, from 0, is one of a share of the rows that are spread evenly over the file."""
    return i == 0 or int(i * share) != int((i - 1) * share)

def convert_block(path, share, left_out, block):
    """Yields the conversations of a block. left_out: a Counter of reasons, which grows."""
    first, rows, _ = block
    if not isinstance(rows, list):
        rows = rows.to_pylist()         # pyarrow's
    for number, row in enumerate(rows, first):
        if not in_share(number - 1, share):
            continue
        try:
            row = decoded(row)
            if row is not None:
                yield from as_conversations(as_object(row))
        except LeftOut as error:
            left_out[str(error)] += 1
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SystemExit(f"{path}, line {number}: {reason(error)}; {REMEDY}") from None

def read_conversations(spec):
    """FILE, NAME, or one of these with :weight → a list of message lists.

    With weight 2 each conversation comes twice; with weight 0.5 every second row comes once. Raises
    SystemExit that names a line that is not a conversation.
    """
    name, weight = split_weight(spec)
    conversations = []
    for share in shares(weight):
        for path in find_files(name):
            left_out = Counter()
            before = len(conversations)
            for block in read_blocks(path):
                conversations += convert_block(path, share, left_out, block)
            print(end=account(path, len(conversations) - before, left_out))
    return conversations

def shares(weight):
    """2.5 → [1.0, 1.0, 0.5]: the parts of the rows that are read, one after the other."""
    whole = int(weight)
    rest = weight - whole
    return [1.0] * whole + ([rest] if rest else [])

def account(path, count, left_out):
    """A line that says how many conversations of a file were left out, and why; "" if none was.
    SystemExit if none can be used."""
    reasons = ", ".join(f"{n} {why}" for why, n in left_out.most_common(5))
    if len(left_out) > 5:
        reasons += f", and {len(left_out) - 5} other reasons"
    if not count:
        raise SystemExit(f"{path} has no conversation that can be used ({reasons or 'it is empty'}"
                         f"); {REMEDY}")
    if not left_out:
        return ""
    return f"{path}: {left_out.total()} rows are left out: {reasons}\n"

# ---- Messages → tokens, in parallel and once -----------------------------------------------------

@dataclass
class Conversations:
    """K conversations as tokens, one after another in two arrays.

    ids int32 (N,); mask uint8 (N,), 1 where the assistant writes. Of each conversation: where it
    begins and ends, starts and ends (K,); how many tokens are learnt (K,); and a hash, uint64 (K,).
    """
    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    learnt: np.ndarray
    hashes: np.ndarray

    def __len__(self):
        return len(self.starts)

    def lengths(self):
        return self.ends - self.starts

    def pick(self, which):
        """Those with these indices, or where a boolean (K,) is true. The tokens are not copied."""
        return replace(self, starts=self.starts[which], ends=self.ends[which],
                       learnt=self.learnt[which], hashes=self.hashes[which])

    @classmethod
    def of(cls, rendered):
        """[(ids, loss_mask)] as Tokenizer.render gives them → Conversations."""
        lengths = np.array([len(ids) for ids, _ in rendered], np.int64)
        ends = lengths.cumsum()
        ids = flat_array([ids for ids, _ in rendered], np.int32)
        mask = flat_array([mask for _, mask in rendered], np.uint8)
        hashes = [hashlib.blake2b(ids[end - n:end], digest_size=8).digest()
                  for end, n in zip(ends, lengths)]
        learnt_before = np.append(0, mask.cumsum(dtype=np.int64))
        return cls(ids, mask, ends - lengths, ends,
                   learnt_before[ends] - learnt_before[ends - lengths],
                   np.frombuffer(b"".join(hashes), "<u8"))

    @classmethod
    def joined(cls, parts):
        """Several, one after another."""
        offsets = np.cumsum([0] + [len(part.ids) for part in parts])
        return cls(np.concatenate([part.ids for part in parts]),
                   np.concatenate([part.mask for part in parts]),
                   np.concatenate([part.starts + n for part, n in zip(parts, offsets)]),
                   np.concatenate([part.ends + n for part, n in zip(parts, offsets)]),
                   np.concatenate([part.learnt for part in parts]),
                   np.concatenate([part.hashes for part in parts]))

def flat_array(lists, dtype):
    return np.fromiter(itertools.chain.from_iterable(lists), dtype)

def render_block(tokenizer, path, share, block):
    """A block of rows → its Conversations and a Counter of what was left out. It may run in a
    process of its own."""
    left_out = Counter()
    rendered = [tokenizer.render(messages)
                for messages in convert_block(path, share, left_out, block)]
    return Conversations.of(rendered), left_out

def render_file(tokenizer, path, share):
    """A file → its Conversations and the line of account()."""
    with tqdm(total=1.0, desc=path.name, leave=False, delay=2,
              bar_format="{desc} {percentage:3.0f}% {bar} {remaining} left") as progress:
        blocks = list(map_blocks(functools.partial(render_block, tokenizer, path, share),
                                 read_blocks(path), progress))
    left_out = sum((counts for _, counts in blocks), Counter())
    conversations = Conversations.joined([part for part, _ in blocks])
    return conversations, account(path, len(conversations), left_out)

def map_blocks(function, blocks, progress):
    """Yields function(block) of each block, in order, on all cores. For a single block no process
    is started, which takes longer than a second."""
    ahead = list(itertools.islice(blocks, 2))
    if len(ahead) == 1:
        yield function(ahead[0])
        return
    running = deque()
    # "spawn", because a process with threads, such as those of torch, must not be forked
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        for block in itertools.chain(ahead, blocks):
            running.append((pool.submit(function, block), block[2]))
            if len(running) == 2 * CORES:       # no more blocks are in memory at a time
                yield result_of(running, progress)
        while running:
            yield result_of(running, progress)

def result_of(running, progress):
    """Waits for the first of the running blocks, and shows how far it is into the file."""
    future, share = running.popleft()
    result = future.result()
    progress.update(share - progress.n)
    return result

# ---- Kept on the disk ----------------------------------------------------------------------------

RENDER_VERSION = 1          # goes up when the same rows are to give other tokens
LEAST_KEPT = 2 ** 20        # tokens; fewer are made again in a second or two

def rendered_file(tokenizer, path, share):
    """render_file(), from the disk if the same file was rendered before by the same tokenizer."""
    with open(path, "rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()
    key = json.dumps([RENDER_VERSION, contents, tokenizer.sha256, share])
    kept = FOLDER / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if kept.exists():
        try:
            with np.load(kept) as file:
                arrays = dict(file)
            line = str(arrays.pop("line"))
            return Conversations(**arrays), line
        except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error,
                zipfile.BadZipFile):
            print(f"{kept} is damaged; {path} is tokenised again")
    conversations, line = render_file(tokenizer, path, share)
    if len(conversations.ids) >= LEAST_KEPT:
        data = io.BytesIO()
        np.savez(data, line=np.array(line), **vars(conversations))
        write_whole(kept, data.getbuffer())
    return conversations, line

def load_conversations(specs, tokenizer, ranks):
    """FILE or NAME, perhaps with :weight, each → the Conversations of all, and lines that say what
    was left out. The main rank makes what the others then find on the disk."""
    for turn in (True, False):
        if ranks.is_main == turn:
            loaded = load_in_turn(specs, tokenizer, ranks.world_size)
        ranks.sum(0)                # wait
    return loaded

def load_in_turn(specs, tokenizer, world_size):
    """load_conversations() for one rank."""
    parts = {}                      # {(path, share): Conversations}
    which = []                      # indices: a conversation that comes twice is in memory once
    lines = ""
    count = 0
    first = {}
    for spec in specs:
        name, weight = split_weight(spec)
        for share in shares(weight):
            for path in find_files(name, world_size):
                key = path, share
                if key not in parts:
                    parts[key], line = rendered_file(tokenizer, path, share)
                    lines += line
                    first[key] = count
                    count += len(parts[key])
                which.append(np.arange(first[key], first[key] + len(parts[key])))
    if not parts:
        raise SystemExit(f"--data {' '.join(specs)} asks for nothing; give a weight above 0")
    return Conversations.joined(list(parts.values())).pick(np.concatenate(which)), lines
