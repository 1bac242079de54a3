"""Documents → token shards, and back.

    python shards.py --data data/demo --tokenizer gpt2
    python shards.py --data data/demo --tokenizer data/demo/tokenizer --row_tokens 1024
    python shards.py --data data/demo --tokenizer data/demo/tokenizer --prose
    python shards.py --data data/demo --check

in:  DATA/documents/{train,val}_00000.jsonl.gz … and DATA/index.json, from prepare_fineweb.py;
     with --prose, DATA/prose/{train,val}_00000.jsonl.gz …, from prose.py
out: DATA/NAME_val_000000.bin, DATA/NAME_train_000001.bin …  256 int32 (magic 20240520, version 1
         for uint16 or 2 for uint32, token count), then the tokens; NAME is the last part of DATA
     DATA/index.json (grows shard by shard), DATA/token_bytes.npy, DATA/tokenizer/

`prepare_fineweb.py tokenize --out DATA --tokenizer DIR` is the same command.

Each document is stored as the end-of-text token followed by its own tokens. --row_tokens T packs
the train split into rows instead: row i begins at token i·T and with the beginning of a document,
so that a trainer with --seq_len T reads every document from its beginning. Tokens that fit no row
are lost (index.json counts them as lost_tokens). nanochat packs the same way and loses 35 % at
T = 2048.

Differs from llm.c's shards: a shard ends with the end of a document or of a row.
"""
import argparse
import bisect
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer
from corpus import print_funnel, read_documents, read_index, refuse_changes
from download import file_sha256, is_val_shard, one_line_when_full, whole_file

MAGIC = 20240520          # the first int32 of a shard
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # version of a shard: type of its tokens
WAITING = 1000            # documents from which pack_rows chooses the one that fits best

# ---- Documents → shards --------------------------------------------------------------------------

def cut_shards(texts, tokenizer, shard_tokens):
    """An iterator of texts → lists of token arrays, one list for each shard.

    Each array holds the end-of-text token and the tokens of one document. A shard ends with a
    document and has at most shard_tokens tokens, unless a single document is longer.
    """
    version = 2 if tokenizer.n_vocab > 1 << 16 else 1
    shard, n_tokens = [], 0
    while batch := list(itertools.islice(texts, 256)):
        for ids in tokenizer.encode_batch(batch):
            if shard and n_tokens + 1 + len(ids) > shard_tokens:
                yield shard
                shard, n_tokens = [], 0
            shard.append(np.array([tokenizer.eot, *ids], dtype=DTYPES[version]))
            n_tokens += 1 + len(ids)
    if shard:
        yield shard

def pack_rows(documents, row_tokens):
    """A shard's token arrays → one array, in which every row_tokens tokens begin with a document.

    Best fit: the room left in a row goes to the longest of WAITING documents that fits. If none
    does, the shortest is cut, and its end is lost. So is the last row if it is not full.
    """
    rows = []
    source = iter(documents)
    waiting = []  # sorted by length
    while True:
        row = []
        room = row_tokens
        while room:
            for ids in itertools.islice(source, WAITING - len(waiting)):
                bisect.insort(waiting, ids, key=len)
            if not waiting:
                return np.concatenate([documents[0][:0], *rows])
            n_fitting = bisect.bisect_right(waiting, room, key=len)
            ids = waiting.pop(max(0, n_fitting - 1))[:room]
            row.append(ids)
            room -= len(ids)
        rows += row

def write_bin(path, tokens):
    """Write an array of tokens as a shard; returns the SHA-256 of the file."""
    header = np.zeros(256, dtype="<i4")
    header[0] = MAGIC
    header[1] = 2 if tokens.dtype == DTYPES[2] else 1
    header[2] = len(tokens)
    with whole_file(path) as file:
        file.write(header)
        file.write(tokens)
    digest = hashlib.sha256(header)
    digest.update(tokens)
    return digest.hexdigest()

def count_bytes(tokens, token_bytes):
    """Bytes of text that tokens stand for, summed in parts to bound memory."""
    total = 0
    for i in range(0, len(tokens), 1 << 20):
        total += int(token_bytes[tokens[i:i + (1 << 20)]].sum())
    return total

def write_shards(out, index, split, tokenizer):
    """Tokenize the documents of a split that no shard holds yet.

    index.json is written after every shard, so that a killed run loses one shard at most.
    """
    texts = index["tokenizer"].get("texts", "documents")
    files = [file for file in index[texts] if file["split"] == split]
    total = sum(file["documents"] for file in files)
    n_done = sum(shard["documents"] for shard in index["shards"] if shard["split"] == split)
    rows = itertools.chain.from_iterable(read_documents(out / file["file"]) for file in files)
    rows = itertools.islice(tqdm(rows, f"tokenize {split}", total, unit="doc"), n_done, None)
    rows = (row["text"] for row in rows)
    token_bytes = tokenizer.token_bytes()
    shard_tokens = index["tokenizer"]["shard_tokens"]
    row_tokens = index["tokenizer"]["row_tokens"]
    for shard in cut_shards(rows, tokenizer, shard_tokens):
        if split == "train" and row_tokens:
            tokens = pack_rows(shard, row_tokens)
        else:
            tokens = np.concatenate(shard)
        name = f"{out.name}_{split}_{next_number(index, split):06d}.bin"
        index["shards"].append({
            "file": name, "split": split, "tokens": len(tokens), "documents": len(shard),
            "lost_tokens": sum(map(len, shard)) - len(tokens),
            "bytes": count_bytes(tokens, token_bytes), "sha256": write_bin(out / name, tokens)})
        write_json(out / "index.json", index)

def next_number(index, split):
    """The number of the next shard; the first train shard is number 1 even without a val shard."""
    if index["shards"]:
        return int(index["shards"][-1]["file"][-10:-4]) + 1
    return 1 if split == "train" else 0

def tokenize(out, name, shard_tokens, row_tokens=0, texts="documents"):
    """OUT/documents → shards, tokenizer/, token_bytes.npy. Whole shards of the index are kept.

    name: a folder or a name that Tokenizer.load takes. texts: "documents", or "prose" to take those
    of OUT/prose. SystemExit if OUT has no such texts, or has shards of the other ones, of another
    tokenizer or of other sizes.
    """
    started = time.perf_counter()
    index = read_index(out)
    if not index.get("documents"):
        raise SystemExit(f"{out}/index.json lists no documents; run first prepare_fineweb.py "
                         f"--source crawl|warc|text … --out {out}")
    if not index.get(texts):
        raise SystemExit(f"{out}/index.json lists no {texts}; run first python prose.py --data "
                         f"{out}")
    tokenizer = Tokenizer.load(name)
    settings = tokenizer_settings(tokenizer, shard_tokens, row_tokens, texts)
    if index["tokenizer"]:
        index["tokenizer"].setdefault("texts", "documents")     # which is what older ones hold
        refuse_changes(index["tokenizer"], settings, out, f"remove {out}/index.json and repeat the "
                       "--source command, or choose another --out")
    index["tokenizer"] = settings
    index["shards"] = list(itertools.takewhile(lambda shard: is_whole(out, shard), index["shards"]))
    kept = {shard["file"] for shard in index["shards"]}
    for path in out.glob(f"{out.name}_*.bin"):
        if path.name not in kept:  # of an earlier run, which may have been longer
            path.unlink()
    save_tokenizer(out, tokenizer, name)
    for split in ("val", "train"):
        write_shards(out, index, split, tokenizer)
    add_to_funnel(index, time.perf_counter() - started)
    write_json(out / "index.json", index)

def is_whole(out, shard):
    """True if the file of a shard is the one that the index describes."""
    path = out / shard["file"]
    return path.exists() and file_sha256(path) == shard["sha256"]

def add_to_funnel(index, seconds):
    """Put the step "tokenize" at the end of the funnel, in place of one from an earlier run."""
    n_documents = sum(shard["documents"] for shard in index["shards"])
    row = {"step": "tokenize", "in": n_documents, "kept": n_documents, "dropped": {}, "flagged": {},
           "bytes": sum(shard["bytes"] for shard in index["shards"]), "seconds": seconds,
           "docs_per_s": n_documents / seconds,
           "tokens": sum(shard["tokens"] for shard in index["shards"])}
    index["funnel"] = [row for row in index["funnel"] if row["step"] != "tokenize"] + [row]

def save_tokenizer(out, tokenizer, name):
    """Put a tokenizer, which was loaded from a folder or by name, into OUT."""
    if (out / "tokenizer").resolve() != Path(name).resolve():
        tokenizer.save(out / "tokenizer")
    with whole_file(out / "token_bytes.npy") as file:
        np.save(file, tokenizer.token_bytes())

def tokenizer_settings(tokenizer, shard_tokens, row_tokens, texts="documents"):
    """What index.json says of the tokenizer, and of which texts were cut and how."""
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot, "shard_tokens": shard_tokens, "row_tokens": row_tokens,
            "texts": texts}

# ---- Shards that others have made ----------------------------------------------------------------

def adopt(out, paths, name):
    """Ready shards in OUT → index.json, tokenizer/ and token_bytes.npy beside them.

    SystemExit if a shard is damaged or holds tokens that the tokenizer does not have.
    """
    tokenizer = Tokenizer.load(name)
    save_tokenizer(out, tokenizer, name)
    token_bytes = tokenizer.token_bytes()
    shards = []
    for path in tqdm(paths, "check", unit="shard"):
        data = path.read_bytes()
        tokens = parse_bin(data, path)
        check_tokens(path, tokens, tokenizer)
        split = "val" if is_val_shard(path.name) else "train"
        shards.append({"file": path.name, "split": split, "tokens": len(tokens),
                       "documents": int((tokens == tokenizer.eot).sum()),
                       "bytes": count_bytes(tokens, token_bytes), "sha256": sha256(data)})
    write_json(out / "index.json", {
        "format": "deepdive data", "version": 1, "settings": None, "documents": [], "funnel": [],
        "samples": {}, "tokenizer": tokenizer_settings(tokenizer, None, 0), "shards": shards})

def parse_bin(data, path):
    """The bytes of a shard → its tokens; SystemExit names the path if they are not a shard."""
    header = np.frombuffer(data[:1024].ljust(1024, b"\0"), "<i4")
    magic, version, n_tokens = header[:3].tolist()
    dtype = DTYPES.get(version)
    if magic != MAGIC or not dtype or len(data) != 1024 + n_tokens * dtype.itemsize:
        raise SystemExit(f"{path} is not a token shard: it has {len(data)} bytes and begins with "
                         f"{magic} {version} {n_tokens}, not with {MAGIC}, version 1 or 2 and its "
                         "number of tokens; remove it and repeat the command")
    return np.frombuffer(data, dtype, offset=1024)

# ---- Do tokenizer and shards belong together? ----------------------------------------------------

def check_data(out):
    """Stop if a shard in OUT is damaged, or if OUT/tokenizer is not the one that made the shards.

    A tokenizer that was trained again gives other meanings to the same ids: a model that is trained
    on them learns nonsense, and no error tells. Reads every shard once.
    """
    index = read_index(out)
    made_by = index.get("tokenizer")
    if not isinstance(made_by, dict) or not index["shards"]:
        raise SystemExit(f"{out}/index.json lists no shards; make some with python shards.py "
                         f"--data {out} --tokenizer DIR")
    tokenizer = Tokenizer.load(out / "tokenizer")
    if made_by.get("sha256") != tokenizer.sha256:
        raise SystemExit(f"{out}/tokenizer is not the tokenizer that made the shards; put that one "
                         f"there, or remove {out}/index.json and prepare the data again")
    for shard in tqdm(index["shards"], "check", unit="shard"):
        path = out / shard["file"]
        data = path.read_bytes() if path.exists() else b""
        if sha256(data) != shard["sha256"]:
            raise SystemExit(f"{path} is missing or damaged; python shards.py --data {out} "
                             f"--tokenizer {out}/tokenizer makes it again")
        check_tokens(path, parse_bin(data, path), tokenizer)

def check_tokens(path, tokens, tokenizer):
    """Stop if the tokens of a shard cannot be those of a tokenizer."""
    if len(tokens) and tokens.max() >= tokenizer.n_vocab:
        raise SystemExit(f"{path} has token {tokens.max()}, but tokenizer {tokenizer.name} has "
                         f"only {tokenizer.n_vocab}; give the tokenizer that made it")
    if len(tokens) and tokenizer.eot not in tokens:
        raise SystemExit(f"{path} has no end-of-text token {tokenizer.eot} of tokenizer "
                         f"{tokenizer.name}; give the tokenizer that made it")

def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace"))

def sha256(data):
    return hashlib.sha256(data).hexdigest()

# ---- Command line --------------------------------------------------------------------------------

def check_sizes(shard_tokens, row_tokens):
    """Stop if a shard would hold nothing, or not a single row."""
    if shard_tokens < 1:
        raise SystemExit(f"--shard_tokens must be at least 1, got {shard_tokens}")
    if row_tokens and not 2 <= row_tokens <= shard_tokens:
        raise SystemExit("--row_tokens must be 0, or at least 2 and at most --shard_tokens "
                         f"{shard_tokens}, got {row_tokens}; try 1024")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_fineweb.py has made")
    add("--tokenizer", help="its folder, or gpt2, cl100k_base, o200k_base")
    add("--shard_tokens", type=int, default=100_000_000, help="largest number of tokens in a shard")
    add("--row_tokens", type=int, default=0,
        help="pack train shards into rows of so many tokens that begin with a document (0: no)")
    add("--prose", action="store_true", help="take the texts that prose.py has written")
    add("--check", action="store_true", help="only check that the shards are whole, and that "
        "DATA/tokenizer made them")
    args = parser.parse_args()
    if args.check:
        check_data(args.data)
        print(f"{args.data} holds whole shards of its tokenizer")
        return
    if not args.tokenizer:
        parser.error("--tokenizer is missing; give a folder, or gpt2, cl100k_base, o200k_base")
    check_sizes(args.shard_tokens, args.row_tokens)
    texts = "prose" if args.prose else "documents"
    with one_line_when_full():
        tokenize(args.data, args.tokenizer, args.shard_tokens, args.row_tokens, texts)
    index = read_index(args.data)
    print_funnel(dict(index, funnel=index["funnel"][-1:]))      # the filters' rows were printed

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished files are kept; repeat the command to continue", file=sys.stderr)
        raise SystemExit(130) from None
