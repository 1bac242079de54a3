r"""
Byte-level BPE, the kind of tokenizer that GPT-2 and GPT-4 have: train one, use it, look at it.

A split pattern cuts the text into chunks; a chunk is about a word with the space before it. Every
chunk begins as its UTF-8 bytes, which are the ids 0 to 255. Training merges the most frequent pair
of neighbouring ids into a new id, again and again. The list of these merges is the tokenizer. To
encode a text means to apply the same merges to its chunks, in the order in which they were learnt.

  python bpe.py train --input data/web --vocab_size 32768 --pattern gpt4 --out data/tokenizer
  python bpe.py show "Hello world" --tokenizer data/tokenizer gpt2 cl100k_base [--html out.html]
  python bpe.py merges "low lower lowest"             learn merges from a sentence, step by step
  python bpe.py compare --tokenizer data/tokenizer    bytes per token, beside OpenAI's tokenizers
  python bpe.py export --tokenizer data/tokenizer --out tokenizer.json    for Hugging Face
  python bpe.py encode TEXT, python bpe.py decode ID ID ...               text to ids, and back
in   files .txt .jsonl .jsonl.gz .parquet (rows with a "text"), or folders of such files. Files
     of a folder named val_* are skipped, because validation text must not shape the tokenizer.
out  DIR/tokenizer.tiktoken (base64 token, space, rank), DIR/tokenizer.json (pattern, specials)

A toy example. In three words "lo" and "ow" both occur three times, and the tie goes to the smaller
pair of bytes: "lo", the bytes (108, 111), becomes id 256. Then "low", " low" and " lowe" follow.
  >>> bpe_train({b"low": 1, b" lower": 1, b" lowest": 1}, num_merges=4)
  [(108, 111), (256, 119), (32, 257), (258, 101)]
  >>> tok = Tokenizer.train(["low lower lowest"], vocab_size=256 + 4 + len(SPECIAL_TOKENS))
  >>> [tok.decode([i]) for i in tok.encode("slow lowlands")]
  ['s', 'low', ' low', 'l', 'a', 'n', 'd', 's']

`bpe_train` and `bpe_encode` come first. They are slow, short and the specification: `Merger` finds
the same merges fast, and tiktoken's Rust core, given our ranks, finds the same tokens.

Papers: Sennrich et al. 2016 (BPE on characters of words, arXiv 1508.07909); Radford et al. 2019
(GPT-2: BPE on bytes, after a split pattern). Differs from the papers: they leave ties open; here
the smallest pair of ids wins.
"""
import argparse
import base64
import functools
import gzip
import hashlib
import heapq
import html
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import regex
import tiktoken

# ---- the idea: slow, short, and the specification of all that follows ---------------------------
def bpe_train(chunk_counts, num_merges):
    """Learn merges: {chunk as bytes: how often it occurs} -> list of pairs (a, b) of ids.

    The i-th pair is merged into the new id 256 + i. There are at most num_merges pairs, fewer
    only if every chunk has become a single id before."""
    words = [(list(chunk), times) for chunk, times in chunk_counts.items()]     # list of bytes
    merges = []
    while len(merges) < num_merges:
        pair_counts = Counter()
        for ids, times in words:
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += times
        if not pair_counts:
            break
        highest = max(pair_counts.values())
        best = min(pair for pair, count in pair_counts.items() if count == highest)
        new_id = 256 + len(merges)
        words = [(merge_pair(ids, best, new_id), times) for ids, times in words]
        merges.append(best)
    return merges

def merge_pair(ids, pair, new_id):
    """Replace each occurrence of a pair by new_id, from left to right.

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

    While two neighbours together are a token, join those whose token has the lowest rank, which
    is the one that was learnt first; of equals, the leftmost. Ranks from `limit` on are ignored,
    which gives the state of the chunk as it was before the merge number `limit` was learnt.

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

# ---- split patterns and special tokens -----------------------------------------------------------
# As published, but for the second + of ++ and ?+, which says that giving characters back cannot
# help, and for brackets around \p{L} and \p{N}, which let ASCII below take their place.
O200K_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++| ?[\p{N}]++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+[\p{L}]++|[\p{N}]{1,3}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": O200K_WORD % ("*", "+") + O200K_WORD % ("+", "*") +
             r"[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
# <|endoftext|> begins every document. A turn is <|im_start|>role<|im_sep|>content<|im_end|>, and
# a part of it that is not plain text stands between its own two tokens.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>",
                  "<|think|>", "<|/think|>", "<|python|>", "<|/python|>",
                  "<|output|>", "<|/output|>", "<|search|>", "<|/search|>", "<|pad|>")
ROLES = ("system", "user", "assistant", "tool")
PARTS = ("text", "think", "python", "output", "search")     # all but text for the assistant alone
# OpenAI's: the pattern of each; ids that GPT-4's gave to tokens of ours, in a gap of its vocabulary
PRETRAINED = {"gpt2": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
GPT4_GAP = {"<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266}
# How special tokens lead from part to part of a conversation; None is outside of turns
MOVES = {(None, "<|im_start|>"): "role", ("role", "<|im_sep|>"): "text"}
MOVES |= {("text", f"<|{part}|>"): part for part in PARTS[1:]}
MOVES |= {(part, f"<|/{part}|>"): "text" for part in PARTS[1:]}
MOVES |= {(part, "<|im_end|>"): None for part in PARTS}
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")      # of the files that train takes
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# ---- the tokenizer ------------------------------------------------------------------------------
class Tokenizer:
    """Ranks {token bytes: id}, a split pattern (regex) and special tokens {name: id}. Text never
    turns into a special token by itself: encode_ordinary, encode_batch and render take their names
    for the plain characters they are, and encode refuses them unless it is told otherwise."""

    def __init__(self, ranks, pattern, special, name, training=None):
        self.ranks, self.pattern, self.special, self.name = ranks, pattern, special, name
        self.training = training            # what it was trained from, as in tokenizer.json
        self.eot = special["<|endoftext|>"]     # begins every document and conversation
        self.n_vocab = max(*ranks.values(), *special.values()) + 1
        self.token_of = [None] * self.n_vocab   # id -> bytes; GPT-4's vocabulary has unused ids
        for token, i in [*ranks.items(), *((token.encode(), i) for token, i in special.items())]:
            self.token_of[i] = token
        self.core = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens=special)

    @classmethod
    def train(cls, texts, vocab_size, pattern="gpt4", *, name="deepdive", log=lambda line: None):
        """Train on an iterable of str. vocab_size INCLUDES the 256 bytes and the special tokens, so
        n_vocab == vocab_size; less only if no pair is left to merge, which stderr is told."""
        assert pattern in PATTERNS, (pattern, list(PATTERNS))
        least = 256 + len(SPECIAL_TOKENS)
        if not least <= vocab_size <= ID:
            raise SystemExit(f"vocab_size {vocab_size} is not in {least} to {ID}; bytes and special"
                             f" tokens are {least}; try --vocab_size 32768")
        merges = Merger(count_chunks(texts, pattern, log)).run(vocab_size - least, log)
        if len(merges) < vocab_size - least:
            print(f"no pair is left to merge after {len(merges)} merges: n_vocab is "
                  f"{least + len(merges)}, not {vocab_size}", file=sys.stderr)
        tokens = [bytes([b]) for b in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        special = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls({token: i for i, token in enumerate(tokens)}, PATTERNS[pattern], special, name)

    @classmethod
    def pretrained(cls, name):
        """OpenAI's "gpt2", "cl100k_base" (GPT-4) or "o200k_base" (GPT-4o), and our tokens."""
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS
        try:
            source = ENCODING_CONSTRUCTORS[name]()
        except OSError as error:            # among them the connection errors of requests
            raise SystemExit(f"{name} cannot be downloaded ({type(error).__name__}); its ranks are "
                             f"fetched once; connect, or set TIKTOKEN_CACHE_DIR to a copy")
        special = source["special_tokens"] | (GPT4_GAP if name == "cl100k_base" else {})
        rest = [token for token in SPECIAL_TOKENS if token not in special]
        special |= zip(rest, itertools.count(max(special.values()) + 1))
        return cls(source["mergeable_ranks"], PATTERNS[PRETRAINED[name]], special, name)

    @classmethod
    def load(cls, name):
        """A folder that save wrote, or else the name of a pretrained one; SystemExit if neither."""
        folder = Path(name)
        if str(name) in PRETRAINED and not folder.is_dir():
            return cls.pretrained(name)
        try:
            header = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            data = (folder / "tokenizer.tiktoken").read_bytes()
            if (header["format"], header["version"]) != ("deepdive tokenizer", 1):
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            if hashlib.sha256(data).hexdigest() != header["ranks_sha256"]:
                raise ValueError("tokenizer.tiktoken is damaged or cut short")
            lines = map(bytes.split, data.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return cls(ranks, header["pattern"], header["special_tokens"], header["name"],
                       header["training"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{name} is no tokenizer: {error!r}; it must be one of "
                             f"{', '.join(PRETRAINED)} or a folder of format version 1; make that "
                             f"with python bpe.py train --input PATH --out {name} --force")

    def save(self, folder):
        """Write folder/tokenizer.tiktoken, which tiktoken reads too, and folder/tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        data = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank)
        header = {"format": "deepdive tokenizer", "version": 1, "training": self.training,
                  "name": self.name, "pattern": self.pattern, "special_tokens": self.special,
                  "ranks_sha256": hashlib.sha256(data.encode()).hexdigest()}
        (folder / "tokenizer.json").unlink(missing_ok=True)         # never beside other ranks
        write_whole(folder / "tokenizer.tiktoken", data)
        write_whole(folder / "tokenizer.json", json.dumps(header, indent=1) + "\n")

    @functools.cached_property
    def sha256(self):
        """Of ranks, pattern and special tokens: token shards carry it to name their tokenizer."""
        ranks = sorted((token.hex(), rank) for token, rank in self.ranks.items())
        content = json.dumps([ranks, self.pattern, sorted(self.special.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def merges(self):
        """[(a, b, new id)] as they were learnt, recovered from the ranks: when a token was made,
        the merges before it had left exactly two parts of it."""
        by_rank = sorted((rank, token) for token, rank in self.ranks.items() if len(token) > 1)
        halves = ((bpe_encode(token, self.ranks, limit=rank), rank) for rank, token in by_rank)
        return [(self.ranks[a], self.ranks[b], rank) for (a, b), rank in halves]

    def encode_ordinary(self, text):
        """str -> list of ids; the name of a special token is text like any other."""
        if len(text) < 500_000 or max(map(len, re.findall(r"\s{99,}", text)), default=0) < 500_000:
            return self.core.encode_ordinary(text)
        # The regex engine of the core gives up on a million spaces in a row: split here instead
        core = tiktoken.Encoding(self.name, pat_str=r"[\s\S]+", mergeable_ranks=self.ranks,
                                 special_tokens={})
        chunks = regex.findall(self.pattern, repair(text))
        return list(itertools.chain.from_iterable(map(core.encode_ordinary, chunks)))

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, as encode_ordinary has them, on all cores."""
        if any(len(text) >= 500_000 for text in texts):     # one may need what is done there
            return list(map(self.encode_ordinary, texts))
        return self.core.encode_ordinary_batch(texts, num_threads=CORES)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """str -> list of ids. Special tokens that the text names become their ids if they are in
        allowed_special (a set, or "all"), ValueError if in disallowed_special ("all": the rest)."""
        if not any(name in text for name in self.special):
            return self.encode_ordinary(text)
        return self.core.encode(text, allowed_special=allowed_special,
                                disallowed_special=disallowed_special)

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character; ValueError for an id without token."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.n_vocab or self.token_of[i] is None:
                raise ValueError(f"{i} is no id of {self.name}, which has 0 to {self.n_vocab - 1}")
        return b"".join([self.token_of[i] for i in ids])

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """-> int32 [n_vocab]: bytes of text an id stands for; 0 for special and unused ones."""
        lengths = np.zeros(self.n_vocab, np.int32)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def render(self, messages, for_completion=False):
        """[{"role", "content"}, ...] -> (ids, loss_mask), lists. content is a str, or a list of
        parts {"type", "text"}, where types other than "text" are for the assistant. loss_mask is
        1 where the assistant speaks (text, thoughts, tool calls, its <|im_end|>) and 0 for
        headers, other roles and what tools returned. The first messages alone give the first ids.
        for_completion adds the header of an assistant's turn, so that a model can answer."""
        ids, mask, special = [self.eot], [0], self.special          # the mask is for ids as targets

        def put(learnt, *tokens):
            ids.extend(tokens)
            mask.extend([int(learnt)] * len(tokens))

        for role, parts in [*map(checked, messages)] + [("assistant", None)] * for_completion:
            put(False, special["<|im_start|>"], *self.encode_ordinary(role), special["<|im_sep|>"])
            for kind, text in parts or ():
                tokens = self.encode_ordinary(text)
                if kind != "text":      # a part's own tokens are learnt or not as its text is
                    tokens = [special[f"<|{kind}|>"], *tokens, special[f"<|/{kind}|>"]]
                put(role == "assistant" and kind != "output", *tokens)
            if parts is not None:
                put(role == "assistant", special["<|im_end|>"])
        return ids, mask

    def parse(self, ids):
        """ids of one conversation -> messages, the inverse of render. Models err: a turn cut short
        is returned as far as it goes, a special token out of place is kept as its name, and a
        second <|endoftext|> ends it all. ValueError for text outside of turns."""
        ids, special = list(ids), {i: name for name, i in self.special.items()}
        ids = ids[1:] if ids[:1] == [self.eot] else ids
        pieces, messages = [(None, [])], []         # (type of part, its ids)
        for i in ids[:ids.index(self.eot)] if self.eot in ids else ids:
            move = (pieces[-1][0], special.get(i))
            if move in MOVES:
                pieces.append((MOVES[move], []))
            else:
                pieces[-1][1].append(i)
        for kind, run in pieces:
            text = self.decode(run)
            if kind == "role":
                messages.append({"role": text, "content": []})
            elif kind and (text or kind != "text"):
                messages[-1]["content"].append({"type": kind, "text": text})
            elif text:
                raise ValueError(f"{text[:40]!r} stands where <|im_start|> should begin a turn")
        for message in messages:
            if all(part["type"] == "text" for part in message["content"]):
                message["content"] = "".join(part["text"] for part in message["content"])
        return messages

    def export_hf(self, path):
        """Write a tokenizer.json for tokenizers.Tokenizer.from_file; it gives the same ids."""
        # Its tokens are text: each byte has a stand-in, itself if printable, else U+0100 and up
        shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
        letter = {b: chr(b) for b in shown}
        letter |= zip((b for b in range(256) if b not in shown), map(chr, itertools.count(256)))
        word = {i: "".join(map(letter.get, token)) for token, i in self.ranks.items()}
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        cut = dict(type="Split", behavior="Isolated", invert=False, pattern={"Regex": self.pattern})
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        write_whole(path, json.dumps({
            "added_tokens": [plain | {"id": i, "content": name, "special": True}
                             for name, i in self.special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
            "decoder": level,
            "model": {"type": "BPE", "merges": [[word[a], word[b]] for a, b, _ in self.merges],
                      "vocab": {token: i for i, token in word.items()} | self.special}}))

def checked(message):
    """A message -> its role and [(type, text)], or a ValueError that says what is allowed."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    allowed = PARTS if role == "assistant" else PARTS[:1]
    for part in parts if isinstance(parts, list) else [content]:
        if not isinstance(part, dict) or part.get("type") not in allowed:
            raise ValueError(f"content {part!r} of {role} is neither a str nor a list of parts "
                             f"with a text and a type out of {', '.join(allowed)}")
    return role, [(part["type"], part["text"]) for part in parts]

# ---- splitting: text -> how often each chunk occurs ---------------------------------------------
# Text repeats itself, and str.split is far faster than the pattern. In all three patterns a space
# after a character that is not whitespace begins a chunk: text is cut there first, and each
# different piece goes through the pattern once. Other spaces hide as NUL while str.split works.
# For ASCII there is a short form of the patterns, with which Python's own re is faster than regex.
ASCII = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
LATER_SPACE = re.compile(r" (?<=\s )")
# Whitespace after a letter or digit begins a chunk, too: there a long file is cut.
WORD_END = re.compile(r"[^\W_](?=\s)")

def repair(text):
    """Lone surrogates (half an emoji in broken JSON), which UTF-8 cannot hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def count_batch(texts, pattern):
    """list of str -> {chunk as bytes: occurrences}, what findall(pattern) on each would count."""
    find = regex.compile(PATTERNS[pattern]).findall                 # knows all of Unicode
    short = re.sub(r"\\p\{(\w+)\}", lambda m: ASCII.get(m[1], ""), PATTERNS[pattern])
    find_ascii = re.compile(short, re.ASCII).findall                # knows ASCII, is faster
    chunks, inner, equally_often = Counter(), Counter(), defaultdict(list)
    for text in map(repair, texts):
        # A piece may end in whitespace only if it is the last: first and last stay with their text
        pieces = [text] if "\0" in text else LATER_SPACE.sub("\0", text).encode().split(b" ")
        inner.update(pieces[1:-1])
        if len(pieces) > 2:
            text = (pieces[0] + b" " + pieces[-1]).decode().replace("\0", " ")
        chunks.update(find(text))
    for piece, n in inner.items():          # pieces that share a count share a search
        equally_often[n, piece.isascii()].append(piece)
    for (n, is_ascii), pieces in equally_often.items():
        text = (b" " + b" ".join(pieces)).decode().replace("\0", " ")
        found = find_ascii(text) if is_ascii else find(text)
        for chunk, m in Counter(found).items():
            chunks[chunk] += n * m
    return {chunk.encode(): n for chunk, n in chunks.items()}

def batches(texts, size):
    """Group texts into lists of at least `size` characters."""
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    yield batch

def count_chunks(texts, pattern, log, batch_chars=4_000_000):
    """iterable of str -> Counter {chunk as bytes: occurrences}, on all cores. Two batches a core
    are held at a time; log is called with a line on how far it is."""
    source, counts, waiting, done = batches(texts, batch_chars), Counter(), [], 0
    head = list(itertools.islice(source, 2))
    if len(head) < 2:                       # too little to be worth starting processes
        counts, head = Counter(count_batch(head[0], pattern)), []
    with ProcessPoolExecutor(CORES) as pool:
        for batch in itertools.chain(head, source, [None] * 2 * CORES):
            if batch:                       # None: all is read, only collect
                waiting.append(pool.submit(count_batch, batch, pattern))
            if waiting and (batch is None or len(waiting) == 2 * CORES):
                counts.update(waiting.pop(0).result())
                done += batch_chars
                log(f"split {done / 1e6:6.0f} M characters | {len(counts)} different chunks")
    if not counts:
        raise SystemExit("the input is empty; training needs text; check --input")
    return counts

# ---- merging: counted chunks -> merges ----------------------------------------------------------
BITS = 21                                   # an id has 21 bits: the pair (a, b) is a << 21 | b
ID, PAIR = (1 << BITS) - 1, (1 << 2 * BITS) - 1
WALL, GONE, NOBODY = -1, -2, -1             # in ids: between chunks, merged away; in owner: none

class Merger:
    """Finds the merges. All different chunks stand side by side in one array, with walls between.

    The specification: count all pairs; merge the most frequent, ties to the smallest (a, b);
    repeat. Three facts make it fast and leave it exact (a slow twin in the tests checks that):
    1. Once the places of a pair are known its count only falls, as its ids are merged away. So
       a count in the heap is an upper bound, and only pairs that come to its top are recounted.
    2. Rare pairs cannot win yet. Pairs below `floor` are not tracked; when all above are used up
       everything is counted anew, with a lower floor. A handful of times, and memory is bounded.
    3. Many pairs can be merged in one numpy sweep: as far down the list as no two of them share a
       place. No pair that these merges create can come in between: if x a b becomes x new, then
       (x, new) is at most as frequent as (x, a) was, which stands in the list, shares a place
       with (a, b) and so ends the sweep first. A run a a a shares places with itself.
    Sizes: P places in the array; K pairs in hand, with N places among them."""

    def __init__(self, chunks):
        words = [chunk for chunk in chunks if len(chunk) > 1]
        lengths = np.array([len(word) + 1 for word in words], np.int64)
        text = b"\0" + b"\0".join(words) + b"\0"
        self.ids = np.frombuffer(text, np.uint8)[:1 + lengths.sum()].astype(np.int32)       # P
        self.ids[np.cumsum(lengths)] = self.ids[0] = WALL
        counts = np.array([0] + [chunks[word] for word in words])
        counts = counts.astype(np.min_scalar_type(counts.max()))    # P may be a hundred million
        self.weight = np.repeat(counts, np.append(1, lengths))      # P: how often the chunk occurs
        self.heap, self.merges, self.width = [], [], 8              # width: pairs to try at once

    def run(self, num_merges, log=lambda line: None):
        """-> at most num_merges pairs (a, b) of ids, the i-th of which makes id 256 + i."""
        while len(self.merges) < num_merges and (self.heap or self.recount()):
            done = self.step(num_merges - len(self.merges))
            self.width = min(2 * done + 8, 512)         # as the last sweep went, so will the next
            log(f"merge {len(self.merges):6d}/{num_merges}")
        return self.merges

    def recount(self):
        """Count all pairs, track those at least 1/32 as frequent as the best; False if none."""
        keep = self.ids != GONE
        self.ids, self.weight = self.ids[keep], self.weight[keep]   # P shrinks
        self.where, self.floor = {}, None                           # {pair: places}; least count
        at = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)
        if not len(at):
            return False
        self.track(self.ids[at], self.ids[at + 1], at)
        self.next = np.arange(1, len(self.ids) + 1, dtype=np.int32)     # P: a linked list,
        self.prev = self.next - 2                                       # P: in both directions
        self.owner = np.full(len(self.ids), NOBODY, np.int16)           # P: used within a sweep
        return True

    def track(self, first, second, at):
        """Group places by the pair (first, second) of ids there; pairs that are frequent enough
        go on the heap, smallest entry first: the highest count, and then the smallest ids."""
        narrow = np.min_scalar_type(max(first.max(), second.max()))     # to 16 bits: radix sort
        first, second = first.astype(narrow), second.astype(narrow)
        order = np.lexsort((second, first))
        first, second, at = first[order], second[order], at[order]
        change = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        starts = np.append(0, 1 + np.flatnonzero(change))       # K: the places of a pair in a row
        counts = np.add.reduceat(self.weight[at], starts, dtype=np.int64)
        self.floor = self.floor or max(1, int(counts.max()) // 32)
        often = counts >= self.floor
        for a, b, count, start, end in zip(*(x[often].tolist() for x in (
                first[starts], second[starts], counts, starts, np.append(starts[1:], len(at))))):
            self.where[a << BITS | b] = at[start:end]
            heapq.heappush(self.heap, (-count << 2 * BITS) + (a << BITS | b))

    def step(self, wanted):
        """Recount the pairs on top of the heap and merge those that surely come next; how many."""
        keys = [heapq.heappop(self.heap) & PAIR for _ in range(min(self.width, len(self.heap)))]
        known = [self.where.pop(key) for key in keys]
        at = np.concatenate(known).astype(np.intp)              # N: the type numpy indexes with
        which = np.repeat(np.arange(len(keys)), list(map(len, known)))
        a, b = np.array(keys) >> BITS, np.array(keys) & ID      # K
        there = (self.ids[at] == a[which]) & (self.ids[self.next[at]] == b[which])
        at, which = at[there], which[there]                     # N: the place, and whose it is
        counts = np.bincount(which, self.weight[at], len(keys)).astype(np.int64).tolist()
        edges = np.searchsorted(which, np.arange(len(keys) + 1)).tolist()
        found = sorted(((-count << 2 * BITS) + key, at[start:end]) for key, count, start, end
                       in zip(keys, counts, edges, edges[1:]) if count >= self.floor)
        best_of_rest = self.heap[0] if self.heap else 0         # at best, that is: fact 1
        done = min(wanted, sum(entry <= best_of_rest for entry, _ in found))
        if done:
            done = self.merge(found[:done])
        for entry, places in found[done:]:
            self.where[entry & PAIR] = places
            heapq.heappush(self.heap, entry)
        return done

    def merge(self, found):
        """Merge the first of these (heap entry, places), as many as fact 3 allows; how many."""
        ids, nxt, prv, n = self.ids, self.next, self.prev, len(found)
        which = np.repeat(np.arange(n), [len(places) for _, places in found])
        at = np.concatenate([places for _, places in found])
        # Two pairs share a place if the right half of one is the left half of the other
        self.owner[at] = which
        other = self.owner[nxt[at]]
        self.owner[at] = NOBODY
        shared = other != NOBODY
        if shared.any():
            n = np.maximum(which + (other == which), other)[shared].min()
        # In a run like aaaa only the 1st, 3rd, ... place of (a, a) is merged
        touching = np.append(False, (nxt[at[:-1]] == at[1:]) & (which[:-1] == which[1:]))
        i = np.arange(len(at))
        keep = (i - np.maximum.accumulate(np.where(touching, 0, i))) % 2 == 0
        at, which = at[keep], which[keep]                       # N shrinks
        end, first_new = np.searchsorted(which, n), 256 + len(self.merges)
        self.merges += [(entry >> BITS & ID, entry & ID) for entry, _ in found[:n]]
        at, new = at[:end], first_new + which[:end]             # N shrinks to the n first pairs
        second = nxt[at]                                        # a at `at`, b at `second`
        right = nxt[second]
        ids[at], ids[second] = new, GONE
        nxt[at], prv[right] = right, at
        left = prv[at]                                          # after all links are right again
        # Only (left, new) and (new, right) are new pairs; two new ids are counted from the left
        a, b = (ids[left] >= 0) & (ids[left] < first_new), ids[right] >= 0
        if a.any() or b.any():
            self.track(np.concatenate([ids[left[a]], new[b]]),
                       np.concatenate([new[a], ids[right[b]]]), np.concatenate([left[a], at[b]]))
        return n

# ---- files --------------------------------------------------------------------------------------
def write_whole(path, text):
    """Write under another name, then rename: the file is there whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text, "utf-8")
    part.replace(path)

def input_files(paths):
    """Yield the files that are meant: of a folder all that hold text, but not val_*."""
    for path in map(Path, paths):
        inside = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        found = [f for f in inside if f.is_file() and f.name.endswith(SUFFIXES)
                 and (f == path or not f.name.startswith("val_"))]
        if not found:
            raise SystemExit(f"{path} holds no training text; --input takes {' '.join(SUFFIXES)} "
                             f"and folders of them; check the path")
        yield from found

def read_texts(path):
    """Yield the documents of a file as str, a .txt in pieces cut where a chunk ends."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile
            for rows in ParquetFile(path).iter_batches(1024, columns=["text"]):
                yield from filter(None, rows.column(0).to_pylist())
            return
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8", newline="") as f:      # "": \r\n stays \r\n
            if path.suffix != ".txt":       # nothing is left of f for the loop below
                yield from (json.loads(line)["text"] for line in f if line.strip())
            held = ""
            while block := f.read(1 << 20):
                held += block
                end = max((m.end() for m in WORD_END.finditer(held, len(held) - 9999)), default=0)
                yield held[:end]
                held = held[end:]
            yield held
    except ImportError:
        raise SystemExit(f"{path} is parquet; reading it needs pyarrow; pip install pyarrow")
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise SystemExit(f"{path} is unreadable ({type(error).__name__}: {error}); it must be whole"
                         f", UTF-8, and .jsonl have a \"text\" a line; convert or replace it")

def train_command(args):
    """Train and save, unless it was done with the same text (by its sha256) and settings."""
    files, out = list(input_files(args.input)), Path(args.out)
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    training = {"input_sha256": digest.hexdigest(), "vocab_size": args.vocab_size,
                "pattern": args.pattern}
    before = (out / "tokenizer.json").exists() and not args.force and Tokenizer.load(out).training
    if before == training:
        return print(f"{out}: made from this input with these settings before; --force repeats it")
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
    print(f"{out}: {tok.n_vocab} tokens from {sum(f.stat().st_size for f in files) / 1e6:.1f} MB "
          f"in {len(files)} files | sha256 {tok.sha256[:16]} | {time.time() - start:.1f} s")

# ---- looking, and the command line --------------------------------------------------------------
# One thought in many scripts, to see for which a vocabulary was made. Written for this file.
SAMPLES = {
    "English": "The baker opened her shop before sunrise, and by eight all the bread was sold.",
    "Russian": "Булочница открыла лавку до рассвета, и к восьми весь хлеб был продан.",
    "Chinese": "面包师在日出前就开了店，到八点钟所有的面包都卖完了。",
    "Python": "def sold(loaves):\n    for n in loaves:\n        if n > 0:\n            yield n\n",
    "numbers": "8:00 127 loaves, 3.25 each = 412.75; 2024-11-20; 1,000,000 + 234567 = 1234567"}

def visible(token):
    """bytes -> str on one line; line ends and bytes of broken characters are escaped."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def show(text, tokenizers, allowed_special=frozenset(), page_path=None):
    """Print a text cut into tokens, coloured in a terminal, with ids and counts, by one tokenizer
    after the other; write the same as an HTML page, where the mouse on a token shows its bytes."""
    page = ["<!doctype html><meta charset=utf-8><style>body{font:16px/1.8 monospace;margin:2em}"
            "span{white-space:pre-wrap}span:hover{outline:2px solid}</style>"]
    for tok in tokenizers:
        ids = tok.encode(text, allowed_special=allowed_special, disallowed_special=())
        words = [visible(tok.token_of[i]) for i in ids]
        title = (f"{tok.name} | {len(ids)} tokens | {len(text)} characters | "
                 f"{len(repair(text).encode())} bytes")
        print(title, "|".join(words) if not sys.stdout.isatty() else "".join(
            f"\033[30;4{1 + n % 6}m{word}\033[0m" for n, word in enumerate(words)), sep="\n")
        print(*ids)
        page.append(f"<h3>{html.escape(title)}</h3>")
        for n, (i, word) in enumerate(zip(ids, words)):
            token, colour = tok.token_of[i], f"hsl({n * 67 % 360} 80% 85%)"
            page.append(f'<span title="id {i}, bytes {token.hex(" ")}" style="background:{colour}">'
                        f"{html.escape(word)}</span>" + "<br>" * token.count(b"\n"))
    if page_path:
        write_whole(page_path, "".join(page))

def show_merges(text, tok, steps):
    """Print how the merges of a tokenizer shorten a text, one by one, in the order of learning."""
    chunks, limit = [c.encode() for c in regex.findall(tok.pattern, repair(text))], 0
    for step in range(1, steps + 2):
        cut = [bpe_encode(chunk, tok.ranks, limit) for chunk in chunks]     # as far as limit
        tokens = [visible(token) for parts in cut for token in parts]
        print(f"{len(tokens):4} tokens: {'|'.join(tokens)}")
        pairs = Counter((tok.ranks[a + b], a, b) for parts in cut for a, b in zip(parts, parts[1:])
                        if a + b in tok.ranks)
        if not pairs or step > steps:       # the last line shows what came out
            break
        rank, a, b = min(pairs)
        print(f"{step:4}. '{visible(a)}' + '{visible(b)}' -> {rank}, {pairs[rank, a, b]} times")
        limit = rank + 1

def compare(samples, tokenizers):
    """Print bytes per token, by text and tokenizer; more means that a model has less to read."""
    print("bytes per token " + "".join(f"{tok.name[-14:]:>15}" for tok in tokenizers))
    for name, text in samples.items():
        rates = [len(repair(text).encode()) / max(1, len(tok.encode_ordinary(text)))
                 for tok in tokenizers]
        print(f"{name[-15:]:<16}" + "".join(f"{rate:15.2f}" for rate in rates))

def main(argv=None):
    parser = argparse.ArgumentParser(description="Byte-level BPE: train it, use it, look at it.")
    add = parser.add_argument
    add("command", choices=["train", "show", "encode", "decode", "merges", "compare", "export"])
    add("text", nargs="*", help="for show, encode, merges: the text; for decode: ids")
    add("--tokenizer", nargs="+", default=[], help=f"folder or {', '.join(PRETRAINED)}")
    add("--file", nargs="+", default=[], help="UTF-8 files to take the text from")
    add("--input", nargs="+", default=[], help="train: text files or folders of them")
    add("--vocab_size", type=int, default=32768, help="train: bytes + merges + special tokens")
    add("--pattern", choices=PATTERNS, default="gpt4", help="train: how text is split")
    add("--out", help="train: folder to write; export: file to write")
    add("--force", action="store_true", help="train: also if it was done before")
    add("--special", action="store_true", help="show, encode: names of special tokens are those")
    add("--html", help="show: page to write as well")
    add("--steps", type=int, default=10, help="merges: how many")
    args = parser.parse_args(argv)
    try:
        files = {Path(path).name: Path(path).read_bytes().decode() for path in args.file}
    except (OSError, ValueError) as error:
        raise SystemExit(f"--file cannot be read ({error}); it must be UTF-8 text; check its path")
    text = "".join(files.values()) or " ".join(args.text)
    if args.command == "train" and args.input and args.out:
        return train_command(args)
    if not {"train": False, "compare": True, "export": args.out}.get(args.command, text):
        parser.error("train needs --input and --out, export needs --out, and the others a text, "
                     "before the flags or in a --file")
    if args.command == "merges" and not args.tokenizer:
        tokenizers = [Tokenizer.train([text], 256 + args.steps + len(SPECIAL_TOKENS))]
    else:
        others = PRETRAINED if args.command == "compare" else [] if args.tokenizer else ["gpt2"]
        tokenizers = [Tokenizer.load(name) for name in [*args.tokenizer, *others]]
    tok, special = tokenizers[0], "all" if args.special else set()
    if args.command == "show":
        show(text, tokenizers, special, args.html)
    elif args.command == "encode":
        print(*tok.encode(text, allowed_special=special, disallowed_special=()))
    elif args.command == "decode":
        try:
            print(tok.decode(list(map(int, text.split()))))
        except ValueError as error:
            raise SystemExit(f"{error}; decode takes ids; python bpe.py encode TEXT prints some")
    elif args.command == "merges":
        show_merges(text, tok, args.steps)
    elif args.command == "compare":
        compare(files or SAMPLES, tokenizers)
    else:
        tok.export_hf(args.out)

if __name__ == "__main__":
    main()
