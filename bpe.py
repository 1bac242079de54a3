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
from collections import Counter, defaultdict, deque
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

# ---- split patterns and special tokens ----------------------------------------------------------
# These match what the published patterns match. They are written differently in two ways. A second
# + as in ++, ?+ and *+ keeps the regex engine from giving characters back where that cannot help.
# Brackets around \p{L} and \p{N} allow ascii_pattern below to put A-Za-z and 0-9 in their place.
O200K_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++| ?[\p{N}]++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+[\p{L}]++|[\p{N}]{1,3}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": O200K_WORD % ("*", "+") + O200K_WORD % ("+", "*") +
             r"[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}

# <|endoftext|> begins every document. A turn of a conversation is
# <|im_start|>role<|im_sep|>content<|im_end|>. Each part of the content that is not plain text
# stands between two tokens of its own.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>",
                  "<|think|>", "<|/think|>", "<|python|>", "<|/python|>",
                  "<|output|>", "<|/output|>", "<|search|>", "<|/search|>", "<|pad|>")
ROLES = ("system", "user", "assistant", "tool")
PARTS = ("text", "think", "python", "output", "search")     # only assistants use others than text

# How Tokenizer.parse finds the parts: {(state, special token): next state}. A state is "role", one
# of PARTS, or None outside of turns.
MOVES = {(None, "<|im_start|>"): "role", ("role", "<|im_sep|>"): "text"}
MOVES |= {("text", f"<|{part}|>"): part for part in PARTS[1:]}
MOVES |= {(part, f"<|/{part}|>"): "text" for part in PARTS[1:]}
MOVES |= {(part, "<|im_end|>"): None for part in PARTS}

# OpenAI's tokenizers and their patterns. The published vocabulary of GPT-4 leaves out some ids, and
# the chat models are known to use three of them for these special tokens.
PRETRAINED = {"gpt2": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
GPT4_GAP = {"<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266}

# ---- the tokenizer ------------------------------------------------------------------------------
LONG_WHITESPACE = 500_000   # characters; tiktoken's regex engine gives up on a million in a row
CORES = os.cpu_count()
if hasattr(os, "sched_getaffinity"):
    CORES = len(os.sched_getaffinity(0))    # those that this process may use

class Tokenizer:
    """A vocabulary {token bytes: id}, a split pattern (a regex) and special tokens {name: id}.

    An id is also called the rank of its token, because merges of a lower rank are applied first.
    Text never turns into a special token by itself: encode_ordinary, encode_batch and render treat
    the name of a special token as plain characters, and encode refuses it unless it is allowed."""

    def __init__(self, ranks, pattern, special, name, training=None):
        self.ranks = ranks                      # {token bytes: id}, without special tokens
        self.pattern = pattern
        self.special = special                  # {name: id}
        self.name = name
        self.training = training                # what it was trained on, as tokenizer.json says
        self.eot = special["<|endoftext|>"]     # begins every document and conversation
        self.n_vocab = max(*ranks.values(), *special.values()) + 1
        self.token_of = [None] * self.n_vocab   # id -> bytes; None for ids that GPT-4 leaves out
        for token, i in ranks.items():
            self.token_of[i] = token
        for special_name, i in special.items():
            self.token_of[i] = special_name.encode()
        self.core = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens=special)

    # -- making, loading and saving one

    @classmethod
    def train(cls, texts, vocab_size, pattern="gpt4", *, name="deepdive", log=lambda line: None):
        """Train on an iterable of str.

        vocab_size INCLUDES the 256 bytes and the special tokens, and n_vocab becomes vocab_size.
        It becomes less only if the text has too few pairs to merge; stderr is told. pattern is a
        name in PATTERNS. log is called with lines that tell the progress. SystemExit if vocab_size
        is out of range or there is no text."""
        assert pattern in PATTERNS, (pattern, list(PATTERNS))
        smallest = 256 + len(SPECIAL_TOKENS)
        largest = (1 << ID_BITS) - 1
        if not smallest <= vocab_size <= largest:
            raise SystemExit(f"--vocab_size must be at least {smallest} (256 bytes and "
                             f"{len(SPECIAL_TOKENS)} special tokens) and at most {largest}, got "
                             f"{vocab_size}; try --vocab_size 32768")
        num_merges = vocab_size - smallest
        merges = Merger(count_chunks(texts, pattern, log)).run(num_merges, log)
        if len(merges) < num_merges:
            print(f"the text has no more pairs to merge after {len(merges)} merges, so the "
                  f"vocabulary has {smallest + len(merges)} tokens instead of {vocab_size}",
                  file=sys.stderr)
        tokens = [bytes([byte]) for byte in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        ranks = {token: i for i, token in enumerate(tokens)}
        special = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(ranks, PATTERNS[pattern], special, name)

    @classmethod
    def pretrained(cls, name):
        """OpenAI's "gpt2", "cl100k_base" (GPT-4) or "o200k_base" (GPT-4o), with our special tokens
        added. SystemExit if the vocabulary has to be downloaded and cannot be."""
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS
        try:
            source = ENCODING_CONSTRUCTORS[name]()
        except OSError as error:            # connection errors of requests are among them
            raise SystemExit(f"{name} cannot be downloaded ({type(error).__name__}); connect to "
                             f"the internet once, or set TIKTOKEN_CACHE_DIR to a folder that has "
                             f"its vocabulary")
        special = dict(source["special_tokens"])
        if name == "cl100k_base":
            special |= GPT4_GAP
        for token in SPECIAL_TOKENS:
            if token not in special:
                special[token] = max(special.values()) + 1
        return cls(source["mergeable_ranks"], PATTERNS[PRETRAINED[name]], special, name)

    @classmethod
    def load(cls, name):
        """Load from a folder that save wrote, or by the name of a pretrained tokenizer.
        SystemExit if it is neither, or if a file is damaged."""
        folder = Path(name)
        if str(name) in PRETRAINED and not folder.is_dir():
            return cls.pretrained(str(name))
        try:
            header = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            data = (folder / "tokenizer.tiktoken").read_bytes()
            if (header["format"], header["version"]) != ("deepdive tokenizer", 1):
                raise ValueError(f"tokenizer.json has format {header['format']}, version "
                                 f"{header['version']}, not deepdive tokenizer, version 1")
            if hashlib.sha256(data).hexdigest() != header["ranks_sha256"]:
                raise ValueError("tokenizer.tiktoken is damaged or cut short")
            ranks = {}
            for line in data.splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
            return cls(ranks, header["pattern"], header["special_tokens"], header["name"],
                       header["training"])
        except OSError as error:
            reason = f"{error.filename} cannot be read ({error.strerror})"
        except json.JSONDecodeError as error:
            reason = f"tokenizer.json is not JSON ({error})"
        except KeyError as error:
            reason = f"tokenizer.json has no {error.args[0]}"
        except (TypeError, ValueError) as error:
            reason = str(error)
        raise SystemExit(f"{name} is not a tokenizer: {reason}; give {', '.join(PRETRAINED)} or a "
                         f"folder that this has written: python bpe.py train --input PATH "
                         f"--out {name} --force")

    def save(self, folder):
        """Write folder/tokenizer.tiktoken, which tiktoken reads too, and folder/tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
        data = "".join(lines)
        header = {"format": "deepdive tokenizer", "version": 1, "training": self.training,
                  "name": self.name, "pattern": self.pattern, "special_tokens": self.special,
                  "ranks_sha256": hashlib.sha256(data.encode()).hexdigest()}
        # If this is interrupted, no old tokenizer.json may stand beside new ranks
        (folder / "tokenizer.json").unlink(missing_ok=True)
        write_whole(folder / "tokenizer.tiktoken", data)
        write_whole(folder / "tokenizer.json", json.dumps(header, indent=1) + "\n")

    @functools.cached_property
    def sha256(self):
        """Hash of the ranks, the pattern and the special tokens. Token shards carry it to say
        which tokenizer made them."""
        ranks = sorted((token.hex(), rank) for token, rank in self.ranks.items())
        content = json.dumps([ranks, self.pattern, sorted(self.special.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def merges(self):
        """[(a, b, new id)] in the order of learning, recovered from the ranks: the merges that
        were learnt before a token turn its bytes into exactly two parts."""
        merges = []
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            if len(token) > 1:
                first, second = bpe_encode(token, self.ranks, limit=rank)
                merges.append((self.ranks[first], self.ranks[second], rank))
        return merges

    # -- text to ids, and back

    def encode_ordinary(self, text):
        """str -> list of ids. The name of a special token is text like any other."""
        if not has_long_whitespace(text):
            return self.core.encode_ordinary(text)
        # Split the text here, and let the core only encode the chunks, each as a whole
        core = tiktoken.Encoding(self.name, pat_str=r"[\s\S]+", mergeable_ranks=self.ranks,
                                 special_tokens={})
        ids = []
        for chunk in regex.findall(self.pattern, repair(text)):
            ids.extend(core.encode_ordinary(chunk))
        return ids

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, as encode_ordinary gives them, on all cores."""
        if any(has_long_whitespace(text) for text in texts):
            return [self.encode_ordinary(text) for text in texts]
        return self.core.encode_ordinary_batch(texts, num_threads=CORES)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """str -> list of ids, where the names of allowed special tokens become their ids.

        allowed_special is a set of names, or "all". ValueError if the text has a name that is in
        disallowed_special, a collection of names, or "all" for all that are not allowed. A name
        that is neither allowed nor disallowed is plain text."""
        if not any(name in text for name in self.special):
            return self.encode_ordinary(text)
        return self.core.encode(text, allowed_special=allowed_special,
                                disallowed_special=disallowed_special)

    def decode_bytes(self, ids):
        """ids -> bytes, which may end within a character. ValueError if an id has no token."""
        tokens = []
        for i in ids:
            if not 0 <= i < self.n_vocab or self.token_of[i] is None:
                raise ValueError(f"{i} is not an id of {self.name}, whose ids are 0 to "
                                 f"{self.n_vocab - 1}")
            tokens.append(self.token_of[i])
        return b"".join(tokens)

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD. ValueError if an id has no token."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """-> int32 [n_vocab], the bytes of text that each id stands for: 0 for special tokens and
        for ids without a token."""
        lengths = np.zeros(self.n_vocab, np.int32)
        for token, i in self.ranks.items():
            lengths[i] = len(token)
        return lengths

    # -- conversations to ids, and back

    def render(self, messages, for_completion=False):
        """[{"role", "content"}, ...] -> (list of ids, list loss_mask of 0 and 1).

        content is a str, or for the assistant a list of parts {"type", "text"} with a type out of
        PARTS. loss_mask is 1 on what the assistant says: text, thoughts, tool calls and the
        <|im_end|> of its turns. It is 0 on headers, other roles and what tools returned. It tells
        which ids are targets: loss_mask[i] belongs to ids[i]. The ids of the first messages are
        the first ids of all messages. for_completion appends the header of an assistant's turn,
        so that a model continues with the answer. ValueError if a role or a type is unknown."""
        special = self.special
        ids = [self.eot]
        loss_mask = [0]

        def append(tokens, learnt):
            ids.extend(tokens)
            loss_mask.extend([int(learnt)] * len(tokens))

        def append_header(role):
            role_ids = self.encode_ordinary(role)
            append([special["<|im_start|>"], *role_ids, special["<|im_sep|>"]], learnt=False)

        for message in messages:
            role, parts = checked(message)
            speaks = role == "assistant"
            append_header(role)
            for kind, text in parts:
                tokens = self.encode_ordinary(text)
                if kind != "text":
                    tokens = [special[f"<|{kind}|>"], *tokens, special[f"<|/{kind}|>"]]
                append(tokens, learnt=speaks and kind != "output")
            append([special["<|im_end|>"]], learnt=speaks)
        if for_completion:
            append_header("assistant")
        return ids, loss_mask

    def parse(self, ids):
        """The inverse of render: the ids of one conversation -> its messages.

        Models make mistakes, which are forgiven: a turn that is cut short is returned as far as it
        goes, a special token in the wrong place becomes its name as text, and everything from a
        second <|endoftext|> on is ignored. ValueError if there is text outside of turns."""
        ids = list(ids)
        if ids[:1] == [self.eot]:
            ids = ids[1:]
        if self.eot in ids:
            ids = ids[:ids.index(self.eot)]
        name_of = {i: name for name, i in self.special.items()}
        kind = None
        run = []
        runs = [(kind, run)]                # (state, the ids that stand there)
        for i in ids:
            move = (kind, name_of.get(i))
            if move in MOVES:
                kind = MOVES[move]
                run = []
                runs.append((kind, run))
            else:
                run.append(i)
        messages = []
        for kind, run in runs:
            text = self.decode(run)
            if kind == "role":
                messages.append({"role": text, "content": []})
            elif kind == "text" and not text:
                continue                    # there is nothing between two other parts
            elif kind is not None:
                messages[-1]["content"].append({"type": kind, "text": text})
            elif text:
                raise ValueError(f"{printable(text[:40].encode())} stands where <|im_start|> should "
                                 f"begin a turn")
        for message in messages:
            if all(part["type"] == "text" for part in message["content"]):
                message["content"] = "".join(part["text"] for part in message["content"])
        return messages

    def export_hf(self, path):
        """Write a tokenizer.json for tokenizers.Tokenizer.from_file, which gives the same ids."""
        letters = byte_letters()
        word_of = {i: "".join(letters[byte] for byte in token) for token, i in self.ranks.items()}
        added_tokens = []
        for name, i in self.special.items():
            added_tokens.append({"id": i, "content": name, "special": True, "single_word": False,
                                 "lstrip": False, "rstrip": False, "normalized": False})
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": False}
        vocab = {word: i for i, word in word_of.items()} | self.special
        merges = [[word_of[a], word_of[b]] for a, b, _ in self.merges]
        write_whole(path, json.dumps({
            "added_tokens": added_tokens,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))

def has_long_whitespace(text):
    """True if the text has so much whitespace in a row that tiktoken may fail on it."""
    if len(text) < LONG_WHITESPACE:
        return False
    return any(len(run) >= LONG_WHITESPACE for run in re.findall(r"\s{99,}", text))

def repair(text):
    """Put U+FFFD for lone surrogates (half an emoji in broken JSON), which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def checked(message):
    """A message -> its role and a list of (type, text). ValueError if one of them is unknown."""
    role = message.get("role")
    content = message.get("content")
    if role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, got {role}")
    if isinstance(content, str):
        return role, [("text", content)]
    allowed = PARTS if role == "assistant" else PARTS[:1]
    if not isinstance(content, list):
        raise ValueError(f"the content of a message must be text or a list of parts, got "
                         f"{json.dumps(content, default=str)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in allowed or "text" not in part:
            raise ValueError(f"a part of a message by {role} must have a text and a type out of "
                             f"{', '.join(allowed)}, got {json.dumps(part, default=str)}")
    return role, [(part["type"], part["text"]) for part in content]

def byte_letters():
    """{byte: the character that stands for it in the files of GPT-2 and Hugging Face}, which is
    itself if it is printable and not a space; else the next free one from U+0100 on."""
    letters = {}
    unused = itertools.count(256)
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(next(unused))
    return letters

def write_whole(path, text):
    """Write a file under another name and rename it, so that no file is ever half written."""
    part = Path(f"{path}.part")
    part.write_text(text, "utf-8")
    part.replace(path)

# ---- training fast, first half: text -> how often each chunk occurs -----------------------------
# Text repeats itself, and str.split is far faster than a pattern. In all three patterns a space
# after a character that is not whitespace begins a chunk. So text is cut at these spaces first, and
# each different piece goes through the pattern once. Pieces of ASCII go through a short form of
# the pattern, for which Python's own re is enough and faster than regex.
ASCII_LETTERS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
LATER_SPACE = re.compile(r" (?<=\s )")      # a space after whitespace: no place to cut

def count_batch(texts, pattern):
    """list of str -> {chunk as bytes: occurrences}, as findall(pattern) would count in each."""
    find = regex.compile(PATTERNS[pattern]).findall
    find_ascii = re.compile(ascii_pattern(PATTERNS[pattern]), re.ASCII).findall
    chunks = Counter()
    pieces = Counter()
    for text in texts:
        ends, inner = cut_at_spaces(repair(text))
        chunks.update(find(ends))
        pieces.update(inner)
    alike = defaultdict(list)       # pieces with the same count are joined: one search for all
    for piece, times in pieces.items():
        alike[times, piece.isascii()].append(piece)
    for (times, is_ascii), group in alike.items():
        search = find_ascii if is_ascii else find
        text = join_at_spaces([b"", *group])
        for chunk, n in Counter(search(text)).items():
            chunks[chunk] += n * times
    return {chunk.encode(): n for chunk, n in chunks.items()}

def ascii_pattern(pattern):
    """A pattern for regex -> one for re that finds the same chunks in ASCII."""
    return re.sub(r"\\p\{(\w+)\}", lambda match: ASCII_LETTERS.get(match[1], ""), pattern)

def cut_at_spaces(text):
    """str -> (its two ends as one str, list of the pieces between them, as bytes).

    Each piece follows a space and ends in a character that is not whitespace, so its chunks do not
    depend on its neighbours. This is not true of the two ends of the text: nothing precedes the
    first piece, and the last may end in whitespace."""
    pieces = []
    if "\0" not in text:            # NUL is free to hide the spaces at which not to cut
        pieces = LATER_SPACE.sub("\0", text).encode().split(b" ")
    if len(pieces) <= 2:
        return text, []
    return join_at_spaces([pieces[0], pieces[-1]]), pieces[1:-1]

def join_at_spaces(pieces):
    return b" ".join(pieces).decode().replace("\0", " ")

def count_chunks(texts, pattern, log, batch_chars=4_000_000):
    """Iterable of str -> Counter {chunk as bytes: occurrences}.

    At most two batches of batch_chars characters per core are in memory. log is called with a line
    that tells the progress. SystemExit if there is no text."""
    counts = Counter()
    batches_done = 0
    for batch_counts in count_in_parallel(batches(texts, batch_chars), pattern):
        counts.update(batch_counts)
        batches_done += 1
        log(f"split {batches_done * batch_chars / 1e6:6.0f} M characters | "
            f"{len(counts)} different chunks")
    if not counts:
        raise SystemExit("the input is empty, and training needs text; check --input")
    return counts

def count_in_parallel(source, pattern):
    """Yield count_batch of each batch in turn; if there are several, all cores work on them."""
    start = list(itertools.islice(source, 2))
    if len(start) == 1:             # too little text to be worth starting processes
        yield count_batch(start[0], pattern)
        return
    with ProcessPoolExecutor(CORES) as pool:
        running = deque()
        for batch in itertools.chain(start, source):
            running.append(pool.submit(count_batch, batch, pattern))
            if len(running) == 2 * CORES:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

def batches(texts, size):
    """Group texts into lists of at least `size` characters. The last is shorter, maybe empty."""
    batch = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= size:
            yield batch
            batch = []
            chars = 0
    yield batch

# ---- training fast, second half: counted chunks -> merges ---------------------------------------
ID_BITS = 21                            # an id has 21 bits, the pair (a, b) is a << 21 | b
ID_MASK = (1 << ID_BITS) - 1
PAIR_MASK = (1 << 2 * ID_BITS) - 1
WALL = -1                               # in ids: stands between two chunks
GONE = -2                               # in ids: was the right half of a pair that is merged
NOBODY = -1                             # in owner: no pair of this sweep has this place

def heap_entry(count, pair):
    """One integer; the smallest is of the pair with the highest count, of equals the smallest."""
    return (-count << 2 * ID_BITS) + pair

class Merger:
    """Finds the merges of `bpe_train`, fast. All different chunks stand side by side in one array
    of ids, with walls between them. The place of a pair is the index of its left half.

    Three facts make this fast and keep it exact; the tests compare it with `bpe_train`:
    1. When the places of a pair are known, its count can only fall, as other merges take its ids
       away. So a count on the heap is an upper bound, and only pairs that reach the top of the
       heap are counted again.
    2. Rare pairs cannot be next. Pairs that occur less than `floor` times are not tracked. When no
       tracked pair is left, everything is counted anew with a lower floor. This happens only a few
       times, and it bounds the memory.
    3. One numpy sweep can merge many pairs: from the top of the list down to the first that shares
       a place with an earlier one. None of the pairs that these merges create can come in between.
       If x a b becomes x new, then (x, new) is at most as frequent as (x, a) was, so it could only
       come after (x, a). But (x, a) shares a place with (a, b), so the sweep has ended there. A run
       a a a shares places with itself.
    Sizes: P places in the array; K pairs at hand, which have N places."""

    def __init__(self, chunk_counts):
        words = [chunk for chunk in chunk_counts if len(chunk) > 1]
        lengths = np.array([len(word) + 1 for word in words], np.int64)     # with a wall
        text = b"\0".join([b"", *words, b""])
        self.ids = np.frombuffer(text, np.uint8).astype(np.int32)           # P
        self.ids[np.append(0, np.cumsum(lengths))] = WALL
        counts = np.array([0] + [chunk_counts[word] for word in words])
        counts = counts.astype(np.min_scalar_type(counts.max()))    # P may be a hundred million
        self.weight = np.repeat(counts, np.append(1, lengths))      # P: occurrences of the chunk
        self.heap = []
        self.merges = []
        self.width = 8                                              # pairs to try in one sweep

    def run(self, num_merges, log=lambda line: None):
        """-> list of at most num_merges pairs (a, b) of ids, the i-th of which makes id 256 + i."""
        while len(self.merges) < num_merges:
            if not self.heap and not self.recount():
                break
            done = self.step(num_merges - len(self.merges))
            self.width = min(2 * done + 8, 512)         # the next sweep may be as long as this one
            log(f"merge {len(self.merges):6d}/{num_merges}")
        return self.merges

    def recount(self):
        """Count all pairs and track those at least 1/32 as frequent as the best.
        Return False if there is no pair."""
        keep = self.ids != GONE
        self.ids = self.ids[keep]                                       # P shrinks
        self.weight = self.weight[keep]
        self.where = {}                                                 # {pair: its places}
        self.floor = None                                               # least count to track
        at = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)
        if len(at) == 0:
            return False
        self.track(self.ids[at], self.ids[at + 1], at)
        self.next = np.arange(1, len(self.ids) + 1, dtype=np.int32)     # P: a linked list,
        self.prev = self.next - 2                                       # P: in both directions
        self.owner = np.full(len(self.ids), NOBODY, np.int16)           # P: for use in a sweep
        return True

    def track(self, first, second, at):
        """Group places `at` by the pair (first, second) of ids that stands there, and put the
        pairs that are frequent enough on the heap. All three: [N]."""
        narrow = np.min_scalar_type(max(first.max(), second.max()))     # 16 bits: radix sort
        first = first.astype(narrow)
        second = second.astype(narrow)
        order = np.lexsort((second, first))
        first = first[order]
        second = second[order]
        at = at[order]
        change = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        starts = np.append(0, 1 + np.flatnonzero(change))               # K: first place of a pair
        ends = np.append(starts[1:], len(at))
        counts = np.add.reduceat(self.weight[at], starts, dtype=np.int64)
        if self.floor is None:
            self.floor = max(1, int(counts.max()) // 32)
        often = counts >= self.floor
        starts = starts[often]                                          # K shrinks
        pairs = first[starts].astype(np.int64) << ID_BITS | second[starts]
        columns = zip(pairs.tolist(), counts[often].tolist(), starts.tolist(), ends[often].tolist())
        for pair, count, start, end in columns:
            self.where[pair] = at[start:end]
            heapq.heappush(self.heap, heap_entry(count, pair))

    def step(self, wanted):
        """Count the pairs on top of the heap again and merge those that surely come next, at most
        `wanted`. Return how many were merged."""
        width = min(self.width, len(self.heap))
        pairs = [heapq.heappop(self.heap) & PAIR_MASK for _ in range(width)]
        known = [self.where.pop(pair) for pair in pairs]
        at = np.concatenate(known).astype(np.intp)              # N: the type numpy indexes with
        which = np.repeat(np.arange(width), [len(places) for places in known])      # N: its pair
        first = np.array(pairs) >> ID_BITS                      # K
        second = np.array(pairs) & ID_MASK
        there = (self.ids[at] == first[which]) & (self.ids[self.next[at]] == second[which])
        at = at[there]                                          # N shrinks
        which = which[there]
        counts = np.bincount(which, self.weight[at], width).astype(np.int64).tolist()
        edges = np.searchsorted(which, np.arange(width + 1)).tolist()
        found = {}                                              # {heap entry: places}
        for i, pair in enumerate(pairs):
            if counts[i] >= self.floor:
                found[heap_entry(counts[i], pair)] = at[edges[i]:edges[i + 1]]
        entries = sorted(found)
        sure = [entry for entry in entries if not self.heap or entry <= self.heap[0]]   # fact 1
        done = 0
        if sure:
            sure = sure[:wanted]
            done = self.merge([entry & PAIR_MASK for entry in sure], [found[entry] for entry in sure])
        for entry in entries[done:]:
            self.where[entry & PAIR_MASK] = found[entry]
            heapq.heappush(self.heap, entry)
        return done

    def merge(self, pairs, places):
        """Merge the first of these pairs, as many as fact 3 allows. Return how many."""
        which = np.repeat(np.arange(len(pairs)), [len(at) for at in places])    # N
        at = np.concatenate(places)                                             # N
        done = self.num_apart(at, which, len(pairs))
        end = np.searchsorted(which, done)
        at = at[:end]                                           # N shrinks to those of `done` pairs
        which = which[:end]
        # In a run like a a a a only the 1st, 3rd, ... place of (a, a) is merged
        touches = (self.next[at[:-1]] == at[1:]) & (which[:-1] == which[1:])
        i = np.arange(len(at))
        run_start = np.maximum.accumulate(np.where(np.append(False, touches), 0, i))
        keep = (i - run_start) % 2 == 0
        at = at[keep]                                           # N shrinks
        first_new = 256 + len(self.merges)
        new = first_new + which[keep]
        self.merges += [(pair >> ID_BITS, pair & ID_MASK) for pair in pairs[:done]]
        second = self.next[at]                                  # a stands at `at`, b at `second`
        right = self.next[second]
        self.ids[at] = new
        self.ids[second] = GONE
        self.next[at] = right
        self.prev[right] = at
        left = self.prev[at]                                    # when all links are right again
        # The new pairs are (left, new) and (new, right); one of two new ids counts for the first
        has_left = (self.ids[left] >= 0) & (self.ids[left] < first_new)
        has_right = self.ids[right] >= 0
        if has_left.any() or has_right.any():
            self.track(np.concatenate([self.ids[left[has_left]], new[has_right]]),
                       np.concatenate([new[has_left], self.ids[right[has_right]]]),
                       np.concatenate([left[has_left], at[has_right]]))
        return done

    def num_apart(self, at, which, num_pairs):
        """Of pairs with the places `at`, how many come before the first that shares a place with
        an earlier one? They do if the right half of one is the left half of the other."""
        self.owner[at] = which
        other = self.owner[self.next[at]]                       # N: the pair at the right half
        self.owner[at] = NOBODY
        shared = other != NOBODY
        if not shared.any():
            return num_pairs
        end = np.maximum(which, other)
        end[which == other] += 1                                # a run is merged, then ends it
        return int(end[shared].min())

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")      # of the files that train takes
# A long file is cut at whitespace after a letter or digit, where in all patterns a chunk begins.
WORD_END = re.compile(r"[^\W_](?=\s)")

# ---- files --------------------------------------------------------------------------------------
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

def printable(token):
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
        words = [printable(tok.token_of[i]) for i in ids]
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
        tokens = [printable(token) for parts in cut for token in parts]
        print(f"{len(tokens):4} tokens: {'|'.join(tokens)}")
        pairs = Counter((tok.ranks[a + b], a, b) for parts in cut for a, b in zip(parts, parts[1:])
                        if a + b in tok.ranks)
        if not pairs or step > steps:       # the last line shows what came out
            break
        rank, a, b = min(pairs)
        print(f"{step:4}. '{printable(a)}' + '{printable(b)}' -> {rank}, {pairs[rank, a, b]} times")
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
