r"""
Byte-level BPE, the kind of tokenizer that GPT-2 and GPT-4 have: train one, use it, look at it.

A split pattern cuts the text into chunks; a chunk is about a word with the space before it. Every
chunk begins as its UTF-8 bytes, which are the ids 0 to 255. Training merges the most frequent pair
of neighbouring ids into a new id, again and again. The list of these merges is the tokenizer.
Encoding applies the same merges to the chunks of a text, in the order in which they were learnt.

  python bpe.py train --input data/web --vocab_size 32768 --pattern gpt4 --out data/tokenizer
  python bpe.py show "Hello world" --tokenizer data/tokenizer gpt2 cl100k_base [--html out.html]
  python bpe.py merges "low lower lowest"             learn merges from a sentence, step by step
  python bpe.py compare --tokenizer data/tokenizer    bytes per token, beside OpenAI's tokenizers
  python bpe.py export --tokenizer data/tokenizer --out tokenizer.json    also: encode, decode
in   .txt .jsonl .jsonl.gz .parquet (rows with a "text"), or folders of them; val_* are left out
out  DIR/tokenizer.tiktoken (base64 token, space, rank), DIR/tokenizer.json (pattern, specials)

A toy example. In these three words "lo" and "ow" are the most frequent pairs. The tie goes to "lo",
whose bytes (108, 111) are smaller, and it becomes id 256. "low", " low" and " lowe" follow.
  >>> bpe_train({b"low": 1, b" lower": 1, b" lowest": 1}, num_merges=4)
  [(108, 111), (256, 119), (32, 257), (258, 101)]
  >>> tok = Tokenizer.train(["low lower lowest"], vocab_size=256 + 4 + len(SPECIAL_TOKENS))
  >>> [tok.decode([i]) for i in tok.encode("slow lowlands")]
  ['s', 'low', ' low', 'l', 'a', 'n', 'd', 's']

`bpe_train` and `bpe_encode` are the specification, slow and short. `Merger` finds the same merges
fast, and tiktoken's Rust core, made from our ranks, finds the same tokens fast.
Papers: Sennrich et al. 2016 (arXiv 1508.07909, BPE on words); Radford et al. 2019 (GPT-2, BPE on
bytes). Differs from the papers: they leave ties open; here a tie goes to the smallest pair of ids.
"""
import argparse
import base64
import functools
import hashlib
import heapq
import html
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import regex
import tiktoken

# ---- the idea: slow and short, the specification of all that follows ----------------------------
def bpe_train(chunk_counts, num_merges):
    """Learn merges: {chunk as bytes: how often it occurs} -> list of pairs (a, b) of ids.
    Pair number i, from 0, is merged into the new id 256 + i. The list has num_merges pairs, or
    fewer if nothing is left to merge because every chunk is a single id."""
    words = [(list(chunk), times) for chunk, times in chunk_counts.items()]     # bytes are ids
    merges = []
    while len(merges) < num_merges:
        pair_counts = Counter()
        for ids, times in words:
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += times
        if not pair_counts:
            break
        highest = max(pair_counts.values())
        best = min(pair for pair, count in pair_counts.items() if count == highest)     # of a tie
        new_id = 256 + len(merges)
        words = [(merge_pair(ids, best, new_id), times) for ids, times in words]
        merges.append(best)
    return merges

def merge_pair(ids, pair, new_id):
    """Replace every occurrence of a pair in a list of ids by new_id, from left to right.
    >>> merge_pair([1, 2, 3, 1, 2], pair=(1, 2), new_id=256)
    [256, 3, 256]"""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged

def bpe_encode(chunk, ranks, limit=1 << 30):
    """Encode one chunk: bytes -> list of its tokens as bytes.
    While two neighbours together are a token, join the two whose token has the lowest rank (it was
    learnt first), the leftmost ones if there are several. Only ranks below `limit` count.
    >>> bpe_encode(b"lower", {b"lo": 256, b"low": 257, b"er": 258})
    [b'low', b'er']"""
    parts = [bytes([byte]) for byte in chunk]
    while len(parts) > 1:
        joined = [first + second for first, second in zip(parts, parts[1:])]
        joined_ranks = [ranks.get(token, limit) for token in joined]
        lowest = min(joined_ranks)
        if lowest >= limit:
            break
        i = joined_ranks.index(lowest)
        parts[i:i + 2] = [joined[i]]
    return parts

# ---- split patterns and special tokens ----------------------------------------------------------
# These match what the published patterns match, and differ from them in two ways. The second + in
# ++, ?+ and *+ stops the regex engine from backtracking where that cannot help. \p{L} and \p{N} are
# in brackets, so that the ASCII forms of the patterns can have A-Za-z and 0-9 there (ASCII_CLASS).
O200K_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++| ?[\p{N}]++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+[\p{L}]++|[\p{N}]{1,3}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": O200K_WORD % ("*", "+") + O200K_WORD % ("+", "*") +
             r"[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
# <|endoftext|> begins every document. A turn is <|im_start|>role<|im_sep|>content<|im_end|>. A part
# of the content that is not text stands between two tokens of its own.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|think|>",
                  "<|/think|>", "<|python|>", "<|/python|>", "<|output|>", "<|/output|>",
                  "<|search|>", "<|/search|>", "<|pad|>")
ROLES = ("system", "user", "assistant", "tool")
PARTS = ("text", "think", "python", "output", "search")     # roles but the assistant have only text
# For parse: {(state, special token): next state}. A state is "role", a part, or None between turns.
MOVES = {(None, "<|endoftext|>"): None, (None, "<|im_start|>"): "role",
         ("role", "<|im_sep|>"): "text"}
MOVES |= {("text", f"<|{part}|>"): part for part in PARTS[1:]}
MOVES |= {(part, f"<|/{part}|>"): "text" for part in PARTS[1:]}
MOVES |= {(part, "<|im_end|>"): None for part in PARTS}
PRETRAINED = {"gpt2": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}     # name: pattern
# GPT-4's chat tokens, which cl100k_base leaves out, have ids in the gap after its ranks.
GPT4_GAP = {"<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266}

# ---- the tokenizer ------------------------------------------------------------------------------
MAX_SPACES = 500_000        # tiktoken's regex engine gives up on a million of them in a row
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

class Tokenizer:
    """A vocabulary {token bytes: id}, a split pattern (a regex) and special tokens {name: id}.
    The id of a token is also its rank, because merges into tokens of a lower rank go first.
    Text never becomes a special token by accident: encode_ordinary, encode_batch and render treat
    the name of a special token as plain characters, and encode refuses it unless it is allowed."""

    def __init__(self, ranks, pattern, special, name, training=None):
        self.ranks = ranks                      # {token bytes: id}, without special tokens
        self.pattern = pattern
        self.special = special                  # {name: id}
        self.name = name
        self.training = training                # a dict, saved in tokenizer.json: input, time, …
        self.eot = special["<|endoftext|>"]     # begins every document and conversation
        self.n_vocab = max(*ranks.values(), *special.values()) + 1
        self.token_of = [None] * self.n_vocab   # id -> bytes; None for ids that GPT-4 does not use
        special_ids = {token.encode(): i for token, i in special.items()}
        for token, i in itertools.chain(ranks.items(), special_ids.items()):
            self.token_of[i] = token
        self.core = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens=special)

    @classmethod
    def train(cls, texts, vocab_size, pattern="gpt4", *, name="deepdive", log=lambda line: None):
        """Train on an iterable of str. vocab_size includes the 256 bytes and the special tokens.
        If the text has too few pairs to merge, n_vocab is smaller, and a line on stderr says so.
        SystemExit if vocab_size is out of range or if there is no text."""
        assert pattern in PATTERNS, (pattern, list(PATTERNS))
        smallest = 256 + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= ID_MASK:
            raise SystemExit(f"--vocab_size must be at least {smallest} (all bytes and special "
                             f"tokens) and at most {ID_MASK}, got {vocab_size}; try 32768")
        merges = Merger(count_chunks(texts, pattern, log)).run(vocab_size - smallest, log)
        tokens = [bytes([byte]) for byte in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        ranks = {token: i for i, token in enumerate(tokens)}
        special = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
        if len(tokens) + len(special) < vocab_size:
            print(f"the text has no more pairs to merge after {len(merges)} merges, so n_vocab is "
                  f"{len(tokens) + len(special)} instead of {vocab_size}", file=sys.stderr)
        return cls(ranks, PATTERNS[pattern], special, name)

    @classmethod
    def pretrained(cls, name):
        """OpenAI's "gpt2", "cl100k_base" (GPT-4) or "o200k_base" (GPT-4o), with our special tokens
        added. SystemExit if the vocabulary is not on this machine and cannot be downloaded."""
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS
        try:
            source = ENCODING_CONSTRUCTORS[name]()
        except OSError as error:                # includes the connection errors of requests
            raise SystemExit(f"{name} cannot be downloaded ({type(error).__name__}); go online, or "
                             f"set TIKTOKEN_CACHE_DIR to a folder that holds its vocabulary")
        special = source["special_tokens"] | (GPT4_GAP if name == "cl100k_base" else {})
        for token in SPECIAL_TOKENS:
            if token not in special:
                special[token] = max(special.values()) + 1
        return cls(source["mergeable_ranks"], PATTERNS[PRETRAINED[name]], special, name)

    @classmethod
    def load(cls, name):
        """Load what save wrote, or OpenAI's tokenizer of that name. SystemExit if it is neither."""
        folder = Path(name)
        if str(name) in PRETRAINED and not folder.is_dir():
            return cls.pretrained(str(name))
        try:
            header = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            data = (folder / "tokenizer.tiktoken").read_bytes()
            if header["format"] != "deepdive tokenizer" or header["version"] != 1:
                raise ValueError(f"its format is {header['format']}, version {header['version']}")
            if hashlib.sha256(data).hexdigest() != header["ranks_sha256"]:
                raise ValueError("tokenizer.tiktoken is damaged or cut short")
            lines = [line.split() for line in data.splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return cls(ranks, header["pattern"], header["special_tokens"], header["name"],
                       header["training"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{name} is not a tokenizer ({reason(error)}); use gpt2, or make it: "
                             f"python bpe.py train --input PATH --out {name} --force")

    def save(self, folder):
        """Write folder/tokenizer.tiktoken, which tiktoken reads too, and folder/tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        data = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank)
        header = {"format": "deepdive tokenizer", "version": 1, "training": self.training,
                  "name": self.name, "pattern": self.pattern, "special_tokens": self.special,
                  "ranks_sha256": hashlib.sha256(data.encode()).hexdigest()}
        # The old header goes first: an interrupted save must not leave it beside new ranks.
        (folder / "tokenizer.json").unlink(missing_ok=True)
        write_whole(folder / "tokenizer.tiktoken", data)
        write_whole(folder / "tokenizer.json", json.dumps(header, indent=1) + "\n")

    @functools.cached_property
    def sha256(self):
        """Hash of ranks, pattern and special tokens, by which token shards name their tokenizer."""
        ranks = sorted((token.hex(), rank) for token, rank in self.ranks.items())
        content = json.dumps([ranks, self.pattern, sorted(self.special.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def merges(self):
        """[(a, b, new id)] in the order of learning, recovered from the ranks: applied to the bytes
        of a token, the merges learnt before it leave exactly two parts, a and b."""
        merges = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            if len(token) > 1:
                first, second = bpe_encode(token, self.ranks, limit=rank)
                merges.append((self.ranks[first], self.ranks[second], rank))
        return merges

    def encode_ordinary(self, text):
        """str -> list of ids. The name of a special token is text like any other."""
        runs = re.findall(r"\s{99,}", text) if len(text) > MAX_SPACES else []
        if max(map(len, runs), default=0) <= MAX_SPACES:
            return self.core.encode_ordinary(text)
        # The core's regex engine would fail, so regex cuts the text and the core gets the chunks.
        core = tiktoken.Encoding(self.name, pat_str=r"[\s\S]+", mergeable_ranks=self.ranks,
                                 special_tokens={})
        chunks = regex.findall(self.pattern, repair(text))
        return list(itertools.chain.from_iterable(map(core.encode_ordinary, chunks)))

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, as encode_ordinary gives them, on all cores."""
        if any(len(text) > MAX_SPACES for text in texts):
            return [self.encode_ordinary(text) for text in texts]
        return self.core.encode_ordinary_batch(texts, num_threads=CORES)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """str -> list of ids. Names of special tokens in allowed_special (a set, or "all") become
        their ids. ValueError if the text has one in disallowed_special (a collection, or "all" for
        those that are not allowed). Other names are plain text."""
        found = {name for name in self.special if name in text}
        allowed = found if allowed_special == "all" else found & set(allowed_special)
        disallowed = found - allowed if disallowed_special == "all" else set(disallowed_special)
        refused = found & disallowed
        if refused:
            raise ValueError(f"the text holds {min(refused)}, the name of a special token, which "
                             "is not allowed here")
        if not allowed:
            return self.encode_ordinary(text)
        ids = []
        for piece in re.split("(" + "|".join(map(re.escape, sorted(allowed))) + ")", text):
            ids += [self.special[piece]] if piece in allowed else self.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character. ValueError if an id has no token."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.n_vocab or self.token_of[i] is None:
                raise ValueError(f"{i} is not an id of {self.name} (0 to {self.n_vocab - 1})")
        return b"".join([self.token_of[i] for i in ids])

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD. ValueError if an id has no token."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """-> int32 [n_vocab]: how many bytes of text each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.n_vocab, np.int32)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def render(self, messages, for_completion=False):
        """[{"role", "content"}, ...] -> (ids, loss_mask), two lists of equal length.
        content is a str, or a list of parts {"type", "text"}; only the assistant may have types
        other than "text". loss_mask is 1 on what the assistant writes (text, thoughts, tool calls,
        its <|im_end|>) and 0 on headers, other roles and what tools returned. for_completion adds
        the header of an assistant's turn, for a model to continue. Adding a message does not change
        the ids of the messages before it. ValueError if a role or a type is unknown."""
        special = self.special
        ids = [self.eot]
        loss_mask = [0]

        def append(tokens, learnt):
            ids.extend(tokens)
            loss_mask.extend([int(learnt)] * len(tokens))

        def append_header(role):
            name = self.encode_ordinary(role)
            append([special["<|im_start|>"], *name, special["<|im_sep|>"]], learnt=False)

        for message in messages:
            role, parts = checked(message)
            append_header(role)
            for kind, text in parts:
                tokens = self.encode_ordinary(text)
                if kind != "text":
                    tokens = [special[f"<|{kind}|>"], *tokens, special[f"<|/{kind}|>"]]
                append(tokens, learnt=role == "assistant" and kind != "output")
            append([special["<|im_end|>"]], learnt=role == "assistant")
        if for_completion:
            append_header("assistant")
        return ids, loss_mask

    def parse(self, ids):
        """The inverse of render: the ids of one conversation -> its messages.
        It tolerates the mistakes of models: of a turn that is cut short it returns what is there,
        a special token in the wrong place becomes its name, and an <|endoftext|> after the first
        id ends the conversation. ValueError if there is text outside of turns."""
        ids = list(ids)
        if self.eot in ids[1:]:
            ids = ids[:ids.index(self.eot, 1)]
        name_of = {i: name for name, i in self.special.items()}
        runs = [(None, [])]                     # (state as in MOVES, the ids of its text)
        for i in ids:
            state, run = runs[-1]
            move = (state, name_of.get(i))
            if move in MOVES:
                runs.append((MOVES[move], []))
            else:
                run.append(i)
        messages = []
        for state, run in runs:
            text = self.decode(run)
            if state == "role":
                messages.append({"role": text, "content": []})
            elif state in PARTS and (text or state != "text"):
                messages[-1]["content"].append({"type": state, "text": text})
            elif text:
                raise ValueError(f"<|im_start|> should begin a turn, got {text[:40]}")
        for message in messages:
            if all(part["type"] == "text" for part in message["content"]):
                message["content"] = "".join(part["text"] for part in message["content"])
        return messages

    def export_hf(self, path):
        """Write a tokenizer.json for tokenizers.Tokenizer.from_file, which gives the same ids."""
        # A byte is written as the character of its code if that is visible, else from U+0100 on.
        letters = {byte: chr(byte) for byte in range(256)}
        hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
        letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
        word_of = {i: "".join(letters[byte] for byte in token) for token, i in self.ranks.items()}
        vocab = {word: i for i, word in word_of.items()} | self.special
        merges = [[word_of[a], word_of[b]] for a, b, _ in self.merges]
        added = [dict(id=i, content=name, special=True, single_word=False, lstrip=False,
                      rstrip=False, normalized=False) for name, i in self.special.items()]
        cut = dict(type="Split", behavior="Isolated", invert=False, pattern={"Regex": self.pattern})
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        write_whole(path, json.dumps({
            "added_tokens": added, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))

def checked(message):
    """A message -> its role and a list of (type, text). ValueError if one of them is unknown."""
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, got {role}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    allowed = PARTS if role == "assistant" else PARTS[:1]
    for part in parts:
        known = isinstance(part, dict) and part.get("type") in allowed
        if not known or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of a message by {role} must have a text and a type out of "
                             f"{', '.join(allowed)}, got {json.dumps(part, default=str)}")
    return role, [(part["type"], part["text"]) for part in parts]

def repair(text):
    """Replace lone surrogates (half an emoji in broken JSON) by U+FFFD: UTF-8 cannot hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def write_whole(path, text):
    """Write a file under another name and rename it, so that no file is ever half written."""
    part = Path(f"{path}.part")
    part.write_text(text, "utf-8")
    part.replace(path)

def reason(error):
    """The message of an exception in words for a user."""
    if isinstance(error, KeyError):
        return f"not found: {error.args[0]}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)

# ---- training fast, first half: text -> how often each chunk occurs -----------------------------
# Text repeats itself, and str.split is far faster than a pattern. In all three patterns a space
# after a character that is not whitespace begins a chunk. So text is cut there first, and each
# different piece goes through the pattern once. ASCII pieces go through an ASCII form of the
# pattern with Python's own re, which is faster than regex but does not know Unicode's classes.
ASCII_CLASS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
LATER_SPACE = re.compile(r" (?<=\s )")      # a space after whitespace; text is not cut there

def count_batch(texts, pattern):
    """list of str -> {chunk as bytes: occurrences}, as findall(pattern) finds them in each."""
    short = re.sub(r"\\p\{(\w+)\}", lambda name: ASCII_CLASS.get(name[1], ""), PATTERNS[pattern])
    find_ascii = re.compile(short, re.ASCII).findall
    find = regex.compile(PATTERNS[pattern]).findall
    chunks = Counter()
    pieces = Counter()
    for text in texts:
        ends, inner = cut_at_spaces(repair(text))
        chunks.update(find(ends))
        pieces.update(inner)
    groups = defaultdict(list)              # pieces that are equally frequent, to search at once
    for piece, times in pieces.items():
        groups[times, piece.isascii()].append(piece)
    for (times, is_ascii), group in groups.items():
        find_all = find_ascii if is_ascii else find
        text = (b" " + b" ".join(group)).decode().replace("\0", " ")
        for chunk, n in Counter(find_all(text)).items():
            chunks[chunk] += n * times
    return {chunk.encode(): n for chunk, n in chunks.items()}

def cut_at_spaces(text):
    """str -> (both ends of the text as one str, list of the pieces between them as bytes).
    A piece comes after a space and ends in a character that is not whitespace, so its chunks do
    not depend on its neighbours. Those of the two ends do: no space comes before the first piece,
    and the last may end in whitespace. NUL hides the spaces at which text is not cut."""
    pieces = LATER_SPACE.sub("\0", text).encode().split(b" ")
    if "\0" in text or len(pieces) < 3:
        return text, []
    return (pieces[0] + b" " + pieces[-1]).decode().replace("\0", " "), pieces[1:-1]

def count_chunks(texts, pattern, log, batch_chars=4_000_000):
    """Iterable of str -> Counter {chunk as bytes: occurrences}. SystemExit if there is no text."""
    counts = Counter()
    running = deque()
    batch, chars, total = [], 0, 0

    def collect():
        counts.update(running.popleft().result())
        log(f"split {total / 1e6:6.0f} M characters | {len(counts)} different chunks")

    with ProcessPoolExecutor(CORES) as pool:
        for text in texts:
            batch.append(text)
            chars += len(text)
            if chars >= batch_chars:
                running.append(pool.submit(count_batch, batch, pattern))
                total += chars
                batch, chars = [], 0
            if len(running) == 2 * CORES:           # no more batches are in memory at a time
                collect()
        counts.update(count_batch(batch, pattern))  # if this is all, no process has been started
        while running:
            collect()
    if not counts:
        raise SystemExit("the input is empty, and training needs text; check --input")
    return counts

# ---- training fast, second half: counted chunks -> merges ---------------------------------------
ID_BITS = 21                                # an id has 21 bits; the pair (a, b) is a << 21 | b
ID_MASK = (1 << ID_BITS) - 1
WALL, GONE = -1, -2                         # in ids: between two chunks; merged into its left
NOBODY = -1                                 # in owner: the place belongs to no pair of this sweep

class Merger:
    """Finds the merges of `bpe_train`, fast. All different chunks stand side by side in one array
    of ids, with walls between them. The place of a pair is the index of its left half.
    Three facts make this fast and keep it exact; the tests compare it with `bpe_train`:
    1. Once the places of a pair are known, its count can only fall, as other merges take its ids
       away. So counts on the heap are upper bounds, and only its top has to be counted again.
    2. Rare pairs cannot be next. Pairs with less than `floor` occurrences are not tracked; when no
       tracked pair is left, all are counted again with a lower floor. This bounds the memory.
    3. One numpy sweep can merge many pairs: from the best down to the first that shares a place
       with a better one. No pair that these merges create can come in between. If x a b becomes
       x new, then (x, new) is at most as frequent as (x, a) was, so it comes after (x, a). But
       (x, a) shares a place with (a, b) and has ended the sweep. So does a run a a a.
    Sizes: P places in the array; K pairs at hand, which have N places."""

    def __init__(self, chunk_counts):
        words = [chunk for chunk in chunk_counts if len(chunk) > 1]
        lengths = np.array([len(word) + 1 for word in words], np.int64)     # each with a wall
        text = b"\0".join([b"", *words, b""])
        self.ids = np.frombuffer(text, np.uint8).astype(np.int32)           # P
        self.ids[np.append(0, np.cumsum(lengths))] = WALL
        counts = np.array([0] + [chunk_counts[word] for word in words])
        counts = counts.astype(np.min_scalar_type(counts.max()))    # P may be a hundred million
        self.weight = np.repeat(counts, np.append(1, lengths))      # P: how often the chunk occurs
        self.heap = []                                              # (-count, pair)
        self.merges = []
        self.width = 8                                              # how many pairs to try at once

    def run(self, num_merges, log=lambda line: None):
        """-> list of at most num_merges pairs (a, b) of ids, the i-th of which makes id 256 + i."""
        while len(self.merges) < num_merges and (self.heap or self.recount()):
            done = self.step(num_merges - len(self.merges))
            self.width = min(2 * done + 8, 512)     # a sweep is about as long as the one before
            log(f"merge {len(self.merges):6d}/{num_merges}")
        return self.merges

    def recount(self):
        """Count all pairs and track those at least 1/32 as frequent as the best; False if none."""
        self.weight = self.weight[self.ids != GONE]
        self.ids = self.ids[self.ids != GONE]                           # P shrinks
        self.where = {}                                                 # {pair: its places}
        self.floor = None                                               # least count to track
        at = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)
        if not len(at):
            return False
        self.track(self.ids[at], self.ids[at + 1], at)
        self.next = np.arange(1, len(self.ids) + 1, dtype=np.int32)     # P: a linked list,
        self.prev = self.next - 2                                       # P: in both directions
        self.owner = np.full(len(self.ids), NOBODY, np.int16)           # P: used within a sweep
        return True

    def track(self, first, second, at):
        """Group the places `at` by the pair (first, second) of ids there, three arrays [N]. Put
        the pairs that are frequent enough on the heap."""
        narrow = np.min_scalar_type(max(first.max(), second.max()))     # to 16 bits: radix sort
        order = np.lexsort((second.astype(narrow), first.astype(narrow)))
        first, second, at = first[order], second[order], at[order]
        change = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        starts = np.append(0, 1 + np.flatnonzero(change))               # K: first place of a pair
        ends = np.append(starts[1:], len(at))
        counts = np.add.reduceat(self.weight[at], starts, dtype=np.int64)
        self.floor = self.floor or max(1, int(counts.max()) // 32)
        often = counts >= self.floor
        starts = starts[often]                                          # K shrinks
        pairs = (first[starts].astype(np.int64) << ID_BITS | second[starts]).tolist()
        rows = zip(pairs, counts[often].tolist(), starts.tolist(), ends[often].tolist())
        for pair, count, start, end in rows:
            self.where[pair] = at[start:end]
            heapq.heappush(self.heap, (-count, pair))

    def step(self, wanted):
        """Recount the pairs on top of the heap, merge those that come next, return how many."""
        width = min(self.width, len(self.heap))
        pairs = [heapq.heappop(self.heap)[1] for _ in range(width)]
        known = [self.where.pop(pair) for pair in pairs]
        at = np.concatenate(known).astype(np.intp)              # N: the type numpy indexes with
        which = np.repeat(np.arange(width), [len(places) for places in known])      # N: its pair
        here = self.ids[at].astype(np.int64) << ID_BITS | self.ids[self.next[at]]
        there = here == np.array(pairs)[which]                  # N: false where ids are merged away
        at, which = at[there], which[there]                     # N shrinks
        counts = np.bincount(which, self.weight[at], width).astype(np.int64).tolist()
        edges = np.searchsorted(which, np.arange(width + 1)).tolist()
        found = {}                                              # {heap entry: places}
        for i, pair in enumerate(pairs):
            if counts[i] >= self.floor:
                found[-counts[i], pair] = at[edges[i]:edges[i + 1]]
        entries = sorted(found)
        sure = [entry for entry in entries if not self.heap or entry <= self.heap[0]]   # fact 1
        done = self.merge(sure[:wanted], found) if sure else 0
        for entry in entries[done:]:
            self.where[entry[1]] = found[entry]
            heapq.heappush(self.heap, entry)
        return done

    def merge(self, entries, found):
        """Merge the first of these heap entries, as many as fact 3 allows; return how many."""
        places = [found[entry] for entry in entries]
        at = np.concatenate(places)                             # N
        which = np.repeat(np.arange(len(places)), [len(at) for at in places])       # N
        # Two pairs share a place if the right half of one is the left half of the other
        self.owner[at] = which
        other = self.owner[self.next[at]]                       # N: the pair that begins with b
        self.owner[at] = NOBODY
        shared = other != NOBODY
        done = len(places)
        if shared.any():
            worse = np.maximum(which, other)                    # N: of the two, it has to wait
            worse[which == other] += 1                          # but a run only ends the sweep
            done = int(worse[shared].min())
        end = np.searchsorted(which, done)
        at, which = at[:end], which[:end]                       # N shrinks to the pairs to merge
        # In a run like a a a a only the 1st, 3rd, ... place of (a, a) is merged
        touches = (self.next[at[:-1]] == at[1:]) & (which[:-1] == which[1:])
        i = np.arange(len(at))
        run_start = np.maximum.accumulate(np.where(np.append(False, touches), 0, i))
        keep = (i - run_start) % 2 == 0
        first_new = 256 + len(self.merges)
        at, new = at[keep], first_new + which[keep]             # N shrinks
        self.merges += [(pair >> ID_BITS, pair & ID_MASK) for _, pair in entries[:done]]
        second = self.next[at]                                  # (a, b): a at `at`, b at `second`
        right = self.next[second]
        self.ids[at] = new
        self.ids[second] = GONE
        self.next[at] = right
        self.prev[right] = at
        left = self.prev[at]                                    # when all links are right again
        # New pairs are (left, new) and (new, right). Two new neighbours count only as the latter.
        has_left = (self.ids[left] >= 0) & (self.ids[left] < first_new)
        has_right = self.ids[right] >= 0
        if has_left.any() or has_right.any():
            self.track(np.concatenate([self.ids[left[has_left]], new[has_right]]),
                       np.concatenate([new[has_left], self.ids[right[has_right]]]),
                       np.concatenate([left[has_left], at[has_right]]))
        return done

# ---- the command line ---------------------------------------------------------------------------
WORD_END = re.compile(r"[^\W_](?=\s)")  # after a letter or digit, whitespace begins a chunk

def input_files(paths):
    """Files and folders -> files. Validation text, val_*, must not shape the tokenizer."""
    from corpus import SUFFIXES
    for path in map(Path, paths):
        inside = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        found = [file for file in inside if file.is_file() and file.name.lower().endswith(SUFFIXES)
                 and (file == path or not file.name.startswith("val_"))]
        if not found:
            raise SystemExit(f"{path} holds no training text; --input takes files "
                             f"{', '.join(SUFFIXES)} and folders of them")
        yield from found

def read_texts(path):
    """Yield the documents of a file as str, a .txt in pieces. SystemExit if it cannot be read."""
    from corpus import read_rows, text_blocks
    if path.name.lower().endswith(".txt"):
        yield from cut_where_chunks_begin(text_blocks(path))
        return
    skipped = 0
    for row, _ in read_rows(path):
        if row:
            yield row["text"]
        else:
            skipped += 1
    if skipped:
        print(f"{path}: {skipped} rows without text are skipped")

def cut_where_chunks_begin(blocks):
    """Join blocks of a text and cut them again, so that no chunk lies across two pieces."""
    rest = ""
    for block in blocks:
        rest += block
        cut = max((word.end() for word in WORD_END.finditer(rest, len(rest) - 9999)), default=0)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest

SAMPLES = {     # one thought in several scripts, to see which of them a vocabulary suits
    "English": "The baker opened her shop before sunrise, and by eight all the bread was sold.",
    "Russian": "Булочница открыла лавку до рассвета, и к восьми весь хлеб был продан.",
    "Chinese": "面包师在日出前就开了店，到八点钟所有的面包都卖完了。",
    "Python": "def sold(loaves):\n    for n in loaves:\n        if n > 0:\n            yield n\n",
    "numbers": "8:00 127 loaves, 3.25 each = 412.75; 2024-11-20; 1,000,000 + 234567 = 1234567"}

def printable(token):
    """bytes -> str on one line, with line ends and the bytes of incomplete characters escaped."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def show(text, tokenizers, allowed_special=frozenset(), page_path=None):
    """Print how each tokenizer cuts a text: counts, tokens (in colours on a terminal) and ids.
    With page_path, write the same as an HTML page; it shows a token's bytes under the mouse."""
    page = ["<!doctype html><meta charset=utf-8><style>body{font:16px/1.8 monospace;margin:2em}"
            "span{white-space:pre-wrap}span:hover{outline:2px solid}</style>"]
    for tok in tokenizers:
        ids = tok.encode(text, allowed_special=allowed_special, disallowed_special=())
        words = [printable(tok.token_of[i]) for i in ids]
        title = (f"{tok.name} | {len(ids)} tokens | {len(text)} characters | "
                 f"{len(repair(text).encode())} bytes")
        coloured = [f"\033[30;4{1 + n % 6}m{word}\033[0m" for n, word in enumerate(words)]
        print(title, "".join(coloured) if sys.stdout.isatty() else "|".join(words), sep="\n")
        print(*ids)
        page.append(f"<h3>{html.escape(title)}</h3>")
        for n, i in enumerate(ids):
            token = tok.token_of[i]
            style = f"background:hsl({n * 67 % 360} 80% 85%)"
            page.append(f'<span title="id {i}, bytes {token.hex(" ")}" style="{style}">'
                        f"{html.escape(words[n])}</span>" + "<br>" * token.count(b"\n"))
    if page_path:
        write_whole(page_path, "".join(page))

def show_merges(text, tok, steps):
    """Print how the merges of a tokenizer shorten a text, one by one, in the order of learning."""
    chunks = [chunk.encode() for chunk in regex.findall(tok.pattern, repair(text))]
    limit = 0                                   # only merges of a lower rank are applied
    for step in range(1, steps + 2):
        cut = [bpe_encode(chunk, tok.ranks, limit) for chunk in chunks]
        tokens = [printable(token) for parts in cut for token in parts]
        print(f"{len(tokens):4} tokens: {'|'.join(tokens)}")
        pairs = Counter((tok.ranks[a + b], a, b) for parts in cut for a, b in zip(parts, parts[1:])
                        if a + b in tok.ranks)
        if not pairs or step > steps:           # the last line shows the result
            break
        rank, a, b = min(pairs)
        print(f"{step:4}. '{printable(a)}' + '{printable(b)}' -> {rank}, {pairs[rank, a, b]} times")
        limit = rank + 1

def compare(samples, tokenizers):
    """Print bytes per token for each text and tokenizer. More means that a model reads less."""
    print("bytes per token " + "".join(f"{tok.name[-14:]:>15}" for tok in tokenizers))
    for name, text in samples.items():
        num_bytes = len(repair(text).encode())
        rates = [num_bytes / max(1, len(tok.encode_ordinary(text))) for tok in tokenizers]
        print(f"{name[-15:]:<16}" + "".join(f"{rate:15.2f}" for rate in rates))

def train_command(args):
    """Train and save, unless that was done with the same text (by its sha256) and settings."""
    files = list(input_files(args.input))
    out = Path(args.out)
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    training = {"input_sha256": digest.hexdigest(), "vocab_size": args.vocab_size,
                "pattern": args.pattern}
    exists = (out / "tokenizer.json").exists() and not args.force
    if exists and Tokenizer.load(out).training == training:
        return print(f"{out} was trained on this text with these settings; --force repeats it")
    start = last = time.time()

    def log(line):
        nonlocal last
        if time.time() > last + 1:
            last = time.time()
            print(f"{line} | {last - start:.0f} s", flush=True)
    texts = itertools.chain.from_iterable(map(read_texts, files))
    tok = Tokenizer.train(texts, args.vocab_size, args.pattern, name=out.name, log=log)
    tok.training = training
    tok.save(out)
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"{out}: {tok.n_vocab} tokens from {megabytes:.1f} MB in {len(files)} files | "
          f"sha256 {tok.sha256[:16]} | {time.time() - start:.1f} s")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Byte-level BPE: train it, use it, look at it.")
    add = parser.add_argument
    add("command", choices=["train", "show", "encode", "decode", "merges", "compare", "export"])
    add("text", nargs="*", help="show, encode, merges: the text; decode: the ids")
    add("--tokenizer", nargs="+", default=[], help=f"folder, or {', '.join(PRETRAINED)}")
    add("--file", nargs="+", default=[], help="UTF-8 files to take the text from")
    add("--input", nargs="+", default=[], help="train: text files, or folders of them")
    add("--vocab_size", type=int, default=32768, help="train: bytes + merges + special tokens")
    add("--pattern", choices=PATTERNS, default="gpt4", help="train: how text is split into chunks")
    add("--out", help="train: folder to write; export: file to write")
    add("--force", action="store_true", help="train: even if it was done before")
    add("--special", action="store_true", help="show, encode: take names of special tokens as such")
    add("--html", help="show: HTML page to write as well")
    add("--steps", type=int, default=10, help="merges: how many to show")
    args = parser.parse_intermixed_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")      # a terminal may know ASCII only
    if args.command == "train" and args.input and args.out:
        return train_command(args)
    try:
        files = {path: Path(path).read_bytes().decode() for path in args.file}
    except (OSError, ValueError) as error:
        raise SystemExit(f"--file cannot be read ({reason(error)}); give a text file in UTF-8")
    text = "".join(files.values()) or " ".join(args.text)
    if args.command == "train" or args.command == "export" and not args.out:
        parser.error("train needs --input and --out, and export needs --out")
    if args.command not in ("compare", "export") and not text:
        parser.error(f"{args.command} needs a text, before the flags or in a --file")
    if args.command == "merges" and not args.tokenizer:
        tokenizers = [Tokenizer.train([text], 256 + args.steps + len(SPECIAL_TOKENS))]
    elif args.command == "compare":
        tokenizers = [Tokenizer.load(name) for name in [*args.tokenizer, *PRETRAINED]]
    else:
        tokenizers = [Tokenizer.load(name) for name in args.tokenizer or ["gpt2"]]
    tok = tokenizers[0]
    special = "all" if args.special else set()
    if args.command == "show":
        show(text, tokenizers, special, args.html)
    elif args.command == "encode":
        print(*tok.encode(text, allowed_special=special, disallowed_special=()))
    elif args.command == "decode":
        try:
            print(tok.decode(map(int, text.split())))
        except ValueError:
            raise SystemExit(f"decode takes ids of {tok.name}, which are 0 to {tok.n_vocab - 1}, "
                             f"got {text[:60]}")
    elif args.command == "merges":
        show_merges(text, tok, args.steps)
    elif args.command == "compare":
        compare(files or SAMPLES, tokenizers)
    else:
        tok.export_hf(args.out)

if __name__ == "__main__":
    main()
