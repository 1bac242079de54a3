"""Documents → token shards, and back.

    python shards.py --data data/demo --tokenizer gpt2
    python shards.py --data data/demo --tokenizer data/demo/tokenizer --row_tokens 1024

in:  DATA/documents/{train,val}_00000.jsonl.gz … and DATA/index.json, from prepare_fineweb.py
out: DATA/NAME_val_000000.bin, DATA/NAME_train_000001.bin …  256 int32 (magic 20240520, version 1
         for uint16 or 2 for uint32, token count), then tokens; NAME is the last part of DATA
     DATA/index.json (grows shard by shard), DATA/token_bytes.npy, DATA/tokenizer/

`prepare_fineweb.py tokenize --out DATA --tokenizer DIR` is the same command.
A document is the end-of-text token and its own tokens, and one follows the other. --row_tokens T
packs the train split instead: every T tokens begin with a document, so that none is read without
its beginning, and row i of a trainer with --seq_len T is at token i·T. What does not fit a row
is lost (index.json: lost_tokens); nanochat, which packs so, loses 35 % at T = 2048.

Differs from llm.c's shards: a shard ends with a document, or with a row.
"""
import argparse
import bisect
import contextlib
import gzip
import hashlib
import itertools
import json
import time
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer
from download import one_line_when_full, whole_file

COLUMNS = ("text", "id", "url", "date", "dump", "language", "language_score")  # FineWeb's, of use
WAITING = 1000            # documents among which the one that fits best is looked for

# ---- Files ---------------------------------------------------------------------------------------

def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())

@contextlib.contextmanager
def gzip_file(path, level=6):
    """A whole_file that is zipped; its bytes depend on what is written alone (no time stamp)."""
    with whole_file(path) as file, gzip.GzipFile("", "wb", level, file, mtime=0) as zipped:
        yield zipped

def json_line(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"

def open_text_file(path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")

def read_json_lines(path):
    """Yield the objects of a .jsonl or .jsonl.gz; SystemExit names the first line that is none."""
    number = 0
    try:
        with open_text_file(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield json.loads(line)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SystemExit(f"{path} line {number + isinstance(error, EOFError)}: {error}; a .jsonl "
                         "holds a JSON object in each line; mend or remove the line, or take the "
                         "file off the command") from None

def read_parquet(path):
    """Yield the rows of a .parquet, without columns that documents have no use for."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path} found, but not pyarrow; .parquet is read with it; "
                         "pip install -r requirements-extra.txt") from None
    try:
        file = ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise SystemExit(f"{path}: {str(error).splitlines()[0]}; a .parquet file must be whole; "
                         "download it again") from None

def read_documents(path):
    """Yield the rows {"text", …} of a .txt (one document), .jsonl, .jsonl.gz or .parquet file."""
    if path.suffix == ".txt":
        yield {"text": path.read_text(encoding="utf-8", errors="replace")}
        return
    rows = (read_parquet if path.suffix == ".parquet" else read_json_lines)(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SystemExit(f"{path} row {number} has no text; each row must be an object with a "
                             'string "text"; mend or remove it, or take the file off the command')
        yield row

def sha256(data):
    return hashlib.sha256(data).hexdigest()

# ---- Shards --------------------------------------------------------------------------------------

def refuse_changes(before, now, out, remedy):
    """Stop if a folder was made with other settings than this run has."""
    for key in now:
        if before.get(key) != now[key]:
            raise SystemExit(f"{out} was made with {key} {before.get(key)}, this run has {now[key]}"
                             f"; a folder holds what one setting makes; {remedy}")

def read_index(out):
    """index.json of a folder; {} where there is none."""
    path = out / "index.json"
    index = json.loads(path.read_bytes()) if path.exists() else {}
    if index and (index.get("format"), index.get("version")) != ("deepdive data", 1):
        raise SystemExit(f"{path} has format {index.get('format')!r} version {index.get('version')}"
                         f"; this script reads 'deepdive data' version 1; remove {out}, run again")
    return index

def print_funnel(index):
    """The table of what each step took in, kept and dropped, and what the splits hold."""
    print(f"{'step':<18}{'in':>9}{'kept':>9}{'MB kept':>9}{'docs/s':>9}   dropped (? only noted)")
    for row in index["funnel"]:
        reasons = [(n, f"{mark}{reason} {n}") for field, mark in (("dropped", ""), ("flagged", "?"))
                   for reason, n in row[field].items()]
        why = ", ".join(text for _, text in sorted(reasons, reverse=True)[:6])
        print(f"{row['step']:<18}{row['in']:>9}{row['kept']:>9}{row['bytes'] / 1e6:>9.2f}"
              f"{row['docs_per_s']:>9.0f}   {why}")
    for split in ("val", "train"):
        files = [file for file in index["documents"] if file["split"] == split]
        tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)
        print(f"{split:<5} {sum(f['documents'] for f in files)} documents, "
              f"{sum(f['bytes'] for f in files) / 1e6:.2f} MB, {tokens} tokens")

def cut_shards(texts, tokenizer, shard_tokens):
    """Tokenize texts and yield shards: lists of documents, each the end-of-text token and its own.
    A shard ends with a document; one of more than shard_tokens is a shard of its own.
    """
    shard, n_tokens, dtype = [], 0, "<u4" if tokenizer.n_vocab > 1 << 16 else "<u2"
    while batch := list(itertools.islice(texts, 256)):
        for ids in tokenizer.encode_batch(batch):
            if shard and n_tokens + 1 + len(ids) > shard_tokens:
                yield shard
                shard, n_tokens = [], 0
            shard.append(np.array([tokenizer.eot, *ids], dtype=dtype))
            n_tokens += 1 + len(ids)
    if shard:
        yield shard

def pack_rows(documents, row_tokens):
    """Documents of a shard → one array, of which every row_tokens tokens begin with a document.

    Best fit, as nanochat packs: what is left of a row goes to the longest document among WAITING
    that fits; if none does, to the shortest, whose end is lost. So is a last row that is not full.
    """
    rows, source, waiting = [], iter(documents), []  # waiting: by length
    while True:
        row, room = [], row_tokens
        while room:
            for ids in itertools.islice(source, WAITING - len(waiting)):
                bisect.insort(waiting, ids, key=len)
            if not waiting:
                return np.concatenate(rows) if rows else documents[0][:0]
            ids = waiting.pop(max(0, bisect.bisect_right(waiting, room, key=len) - 1))[:room]
            row.append(ids)
            room -= len(ids)
        rows += row

def write_bin(path, tokens):
    """A shard of tokens → its file; returns the file's SHA-256."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1 + (tokens.dtype == np.uint32), len(tokens)
    with whole_file(path) as file:
        file.write(header)
        file.write(tokens)
    digest = hashlib.sha256(header)
    digest.update(tokens)
    return digest.hexdigest()

def count_bytes(tokens, token_bytes):
    """Bytes of text that tokens stand for, summed in parts: a shard's int32 would be twice it."""
    return sum(int(token_bytes[tokens[i:i + (1 << 20)]].sum())
               for i in range(0, len(tokens), 1 << 20))

def write_shards(out, index, split, tokenizer):
    """Tokenize the documents of a split that no shard holds yet; the index grows shard by shard."""
    files = [file for file in index["documents"] if file["split"] == split]
    total = sum(file["documents"] for file in files)
    n_done = sum(shard["documents"] for shard in index["shards"] if shard["split"] == split)
    rows = itertools.chain.from_iterable(read_documents(out / file["file"]) for file in files)
    rows = itertools.islice(tqdm(rows, f"tokenize {split}", total, unit="doc"), n_done, None)
    first = max([split == "train", *(int(one["file"][-10:-4]) + 1 for one in index["shards"])])
    texts, token_bytes = (row["text"] for row in rows), tokenizer.token_bytes()
    shard_tokens, row_tokens = index["tokenizer"]["shard_tokens"], index["tokenizer"]["row_tokens"]
    for number, shard in enumerate(cut_shards(texts, tokenizer, shard_tokens), first):
        is_packed = split == "train" and row_tokens
        tokens = pack_rows(shard, row_tokens) if is_packed else np.concatenate(shard)
        name = f"{out.name}_{split}_{number:06d}.bin"
        index["shards"].append({
            "file": name, "split": split, "tokens": len(tokens), "documents": len(shard),
            "lost_tokens": sum(map(len, shard)) - len(tokens),
            "bytes": count_bytes(tokens, token_bytes), "sha256": write_bin(out / name, tokens)})
        write_json(out / "index.json", index)

def save_tokenizer(out, tokenizer, name):
    """Put a tokenizer, loaded from a folder or by name, into OUT."""
    if (out / "tokenizer").resolve() != Path(name).resolve():
        tokenizer.save(out / "tokenizer")
    with whole_file(out / "token_bytes.npy") as file:
        np.save(file, tokenizer.token_bytes())

def about(tokenizer, shard_tokens, row_tokens):
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot, "shard_tokens": shard_tokens, "row_tokens": row_tokens}

def tokenize(out, name, shard_tokens, row_tokens=0):
    """OUT/documents → shards, token_bytes.npy, tokenizer/. Whole shards in the index are kept."""
    index, started = read_index(out), time.perf_counter()
    if not index.get("documents"):
        raise SystemExit(f"{out}/index.json lists no documents; tokenize needs them; first run "
                         f"prepare_fineweb.py --source crawl|warc|text … --out {out}")
    tokenizer = Tokenizer.load(name)
    now = about(tokenizer, shard_tokens, row_tokens)
    refuse_changes({"row_tokens": 0} | (index["tokenizer"] or now), now, out,
                   remedy=f"remove {out}/index.json and repeat the --source command, or choose "
                   "another --out")

    def is_whole(shard):
        path = out / shard["file"]
        return path.exists() and sha256(path.read_bytes()) == shard["sha256"]

    index |= {"tokenizer": now, "shards": list(itertools.takewhile(is_whole, index["shards"]))}
    for path in out.glob(f"{out.name}_*.bin"):  # none of an earlier, longer run may stay
        if path.name not in {shard["file"] for shard in index["shards"]}:
            path.unlink()
    save_tokenizer(out, tokenizer, name)
    for split in ("val", "train"):
        write_shards(out, index, split, tokenizer)
    total = {key: sum(s[key] for s in index["shards"]) for key in ("documents", "bytes", "tokens")}
    seconds = time.perf_counter() - started
    row = {"step": "tokenize", "in": total["documents"], "kept": total["documents"], "dropped": {},
           "flagged": {}, "bytes": total["bytes"], "seconds": seconds,
           "docs_per_s": total["documents"] / seconds, "tokens": total["tokens"]}
    index["funnel"] = [row for row in index["funnel"] if row["step"] != "tokenize"] + [row]
    write_json(out / "index.json", index)

def adopt(out, paths, name):
    """Ready shards of others in OUT → index.json, tokenizer/, token_bytes.npy beside them."""
    tokenizer = Tokenizer.load(name)
    save_tokenizer(out, tokenizer, name)
    token_bytes, shards = tokenizer.token_bytes(), []
    for path in tqdm(paths, "check", unit="shard"):
        data = path.read_bytes()
        header = np.frombuffer(data[:1024].ljust(1024, b"\0"), "<i4")
        dtype = {1: "<u2", 2: "<u4"}.get(int(header[1]))
        if not dtype or header[0] != 20240520 or \
                len(data) != 1024 + int(header[2]) * np.dtype(dtype).itemsize:
            raise SystemExit(f"{path} has {len(data)} bytes and begins with {header[:3]}; a shard "
                             "begins with 20240520, version 1 or 2, and its number of tokens; "
                             "remove it and repeat the command")
        tokens = np.frombuffer(data, dtype, offset=1024)
        if len(tokens) and tokens.max() >= tokenizer.n_vocab:
            raise SystemExit(f"{path} holds token {tokens.max()}, {name} has {tokenizer.n_vocab}; "
                             "shards need the tokenizer that made them; give it as --tokenizer")
        shards.append({"file": path.name, "split": "val" if "_val_" in path.name else "train",
                       "tokens": len(tokens), "documents": int((tokens == tokenizer.eot).sum()),
                       "bytes": count_bytes(tokens, token_bytes), "sha256": sha256(data)})
    write_json(out / "index.json", {
        "format": "deepdive data", "version": 1, "settings": None, "documents": [], "funnel": [],
        "samples": {}, "tokenizer": about(tokenizer, None, 0), "shards": shards})

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of prepare_fineweb.py")
    add("--tokenizer", required=True, help="folder of one, or gpt2, cl100k_base, o200k_base")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard at most")
    add("--row_tokens", type=int, default=0, help="pack rows that begin with a document (0: no)")
    args = parser.parse_args()
    check_sizes(args.shard_tokens, args.row_tokens)
    with one_line_when_full():
        tokenize(args.data, args.tokenizer, args.shard_tokens, args.row_tokens)
    print_funnel(read_index(args.data))

def check_sizes(shard_tokens, row_tokens):
    """Stop if a shard would hold nothing, or not a single row."""
    if shard_tokens < 1:
        raise SystemExit(f"--shard_tokens must be at least 1, got {shard_tokens}")
    if row_tokens and not 2 <= row_tokens <= shard_tokens:
        raise SystemExit(f"--row_tokens must be 0 or in 2 … {shard_tokens} (--shard_tokens), got "
                         f"{row_tokens}; try 1024")

if __name__ == "__main__":
    main()
