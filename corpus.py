"""Stage 0, its second half: what is done to pages together, once each has passed the filters.

    python prepare_fineweb.py tokenize --out data/demo --tokenizer gpt2
    python prepare_fineweb.py tokenize --out data/demo --tokenizer gpt2 --row_tokens 1024

in:  OUT/pages/00000_NAME.jsonl.gz, .npy (MinHash of each page), as prepare_fineweb.py leaves them
out: OUT/documents/{train,val}_00000.jsonl.gz …  without near duplicates, shuffled
     OUT/NAME_val_000000.bin, OUT/NAME_train_000001.bin …  256 int32 (magic 20240520, version 1
         for uint16 or 2 for uint32, token count), then tokens; NAME is the last part of OUT
     OUT/index.json (grows shard by shard), OUT/token_bytes.npy, OUT/tokenizer/

Near duplicates are found as FineWeb does (§3.4), by sorting the (bucket, hash) pairs of MinHash, in
parts that fit into memory and may run on a cluster.
A document is the end-of-text token and its own tokens, and one follows the other. --row_tokens T
packs the train split instead: every T tokens begin with a document, so that none is read without
its beginning, and row i of a trainer with --block_size T is at token i·T. What does not fit a row
is lost (index.json: lost_tokens); nanochat, which packs so, loses 35 % at T = 2048.

Differs from FineWeb: near duplicates are looked for in all that OUT holds, not within each crawl.
Differs from llm.c's shards: a shard ends with a document, or with a row.
"""
import bisect
import contextlib
import gzip
import hashlib
import importlib
import itertools
import json
import re
import shutil
import time
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer
from crawl import end_with_parent, one_line_when_full, whole_file

COLUMNS = ("text", "id", "url", "date", "dump", "language", "language_score")  # FineWeb's, of use
FILE_BYTES = 256 << 20    # text in one documents file, which is sorted in memory
MAX_FILES = 512           # which are written at once; more text than 128 GB makes them larger
SORTED_AT_ONCE = 1 << 22  # documents of which a worker sorts the MinHash keys: 60 bytes for each
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

# ---- Work ----------------------------------------------------------------------------------------

def outcome(function, *task):
    """(result, None) or (None, the message of a SystemExit), which would end a worker of Ray."""
    try:
        with one_line_when_full():
            return function(*task), None
    except SystemExit as stop:
        return None, str(stop)

def import_outcome(script, name, *task):
    """The same on another machine, which knows the script as a module and not as __main__."""
    return outcome(getattr(importlib.import_module(script), name), *task)

def start_ray(args):
    """The module ray, joined to a cluster: once for all that a run does, until its process ends."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray found no ray; it runs tasks on a cluster; pip install -r "
                         "requirements-extra.txt, or leave it out") from None
    here = str(Path(__file__).resolve().parent)
    where = {"num_cpus": args.workers} if args.ray == "local" else {"address": args.ray}
    try:
        if not ray.is_initialized():
            ray.init(**where, runtime_env={"env_vars": {"PYTHONPATH": here}})
    except ConnectionError as error:
        why = str(error).split(". ")[0]
        raise SystemExit(f"--ray {args.ray}: {why}; it is the address of a cluster, auto, "
                         "or local; check ray status") from None
    return ray

def in_workers(function, tasks, desc, args):
    """Yield function(*task) for each task, from processes of this machine or from a Ray cluster.

    Tasks name files, so that a cluster needs a folder that all its machines see at one path.
    """
    with contextlib.ExitStack() as stack:
        if args.ray:
            ray = start_ray(args)
            lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
            remote, script = ray.remote(import_outcome), Path(function.__code__.co_filename).stem
            results = map(ray.get, [remote.remote(script, function.__name__, *task)
                                    for task in tasks])
        else:
            lost = BrokenProcessPool
            pool = ProcessPoolExecutor(max(1, min(args.workers, len(tasks))),
                                       initializer=end_with_parent)
            results = stack.enter_context(pool).map(outcome, [function] * len(tasks), *zip(*tasks))
        try:
            for result, stop in tqdm(results, desc, len(tasks), unit="task"):
                if stop:
                    raise SystemExit(stop)
                yield result
        except lost:
            raise SystemExit("a worker was killed, most likely for want of memory; finished files "
                             "are kept; repeat the command with fewer --workers") from None

# ---- Near duplicates -----------------------------------------------------------------------------

BUCKETS, HASHES, SHINGLE = 14, 8, 5  # FineWeb §3.4: a pair matches if all 8 of any bucket agree

def match_probability(jaccard):
    """The S-curve: how probably two texts with this share of common shingles are matched."""
    return 1 - (1 - jaccard ** HASHES) ** BUCKETS

def simplify(text):
    """The words of a text without case, accents, digits and punctuation."""
    text = unicodedata.normalize("NFD", re.sub(r"\d+", "0", text.lower()))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^\w\s]|_", " ", text).split()

def shingles(text):
    """uint64 hashes of the 5-word runs of a text."""
    words = simplify(text)
    runs = {" ".join(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    return np.frombuffer(b"".join(hashlib.sha1(r.encode()).digest()[:8] for r in runs), "<u8")

def minhash(text):
    """A text → uint64 [BUCKETS]: a hash of the 8 minima of (a·h + b) mod p in each bucket."""
    generator, prime = np.random.RandomState(1), np.uint64((1 << 61) - 1)
    a, b = (generator.randint(low, prime, dtype=np.uint64, size=BUCKETS * HASHES) for low in (1, 0))
    minima, hashes = np.full(BUCKETS * HASHES, prime, dtype=np.uint64), shingles(text)
    for i in range(0, len(hashes), 1024):  # 1024 × 112 numbers stay in the cache
        minima = np.minimum(minima, ((hashes[i:i + 1024, None] * a + b) % prime).min(axis=0))
    digests = [hashlib.sha1(row.tobytes()).digest()[:8] for row in minima.reshape(BUCKETS, HASHES)]
    return np.frombuffer(b"".join(digests), "<u8")

def find_pairs(key_files, bucket, part, n_parts):
    """int64 [n, 2]: documents next to each other in the order of (key, document) with one key.

    .npy files of uint64 [BUCKETS, documents] are read, and sorted is what falls into one of n_parts
    ranges of the keys of one bucket: memory holds that part only, and parts may run anywhere.
    """
    keys, documents, n_before = [], [], 0
    for path in key_files:
        row = np.load(path, mmap_mode="r")[bucket]
        here = np.flatnonzero((row >> np.uint64(32)) * n_parts >> np.uint64(32) == part)
        keys.append(row[here])
        documents.append(here + n_before)
        n_before += len(row)
    keys, documents = np.concatenate(keys), np.concatenate(documents)
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    same = keys[1:] == keys[:-1]
    return np.stack([documents[:-1][same], documents[1:][same]], axis=1)

def find_originals(n_documents, pairs):
    """Pairs → int64 [documents]: the first document of each one's cluster (union-find)."""
    first = np.arange(n_documents)

    def find(i):
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, j in itertools.chain.from_iterable(pairs):
        low, high = sorted((find(i), find(j)))
        first[high] = low
    while (first != first[first]).any():
        first = first[first]
    return first

# ---- Documents -----------------------------------------------------------------------------------

def near_duplicates(stems, args):
    """For each document the first one of its cluster; [] if its source had them removed."""
    key_files = [Path(f"{stem}.npy") for stem in stems]
    n_documents = sum(np.load(path, mmap_mode="r").shape[1] for path in key_files)
    n_parts = 1 + n_documents // SORTED_AT_ONCE
    tasks = [(key_files, bucket, part, n_parts) for bucket in range(BUCKETS)
             for part in range(n_parts)] if n_documents else []
    return find_originals(n_documents, in_workers(find_pairs, tasks, "near duplicates", args))

def sort_documents(out, k):
    """OUT/unsorted/k → its val and train file in OUT/documents; their rows of index.json."""
    with gzip.open(out / "unsorted" / f"{k:05d}.gz") as file:
        lines = sorted(file)
    files = []
    for split in ("val", "train"):
        found = {"file": f"documents/{split}_{k:05d}.jsonl.gz", "split": split, "documents": 0,
                 "bytes": 0}
        with gzip_file(out / found["file"]) as file:
            for its_split, _, n_bytes, row in (line.split(b" ", 3) for line in lines):
                if its_split == split.encode():
                    file.write(row)
                    found["documents"] += 1
                    found["bytes"] += int(n_bytes)
        files.append(found)
    return files

def write_documents(out, pages, n_bytes, settings, args):
    """Unique pages, of about n_bytes, → shuffled documents in OUT/documents; returns their rows of
    index.json.

    Split and order follow from SHA-256 of a text (the order also from the seed), not from the
    number of files, tasks or shards. The order is a number that is sorted in two rounds, by its
    first digits into n_files, of lines "split order bytes {row}", and then within each.
    """
    n_files = min(MAX_FILES, 1 + n_bytes // FILE_BYTES)
    with contextlib.ExitStack() as stack:
        unsorted = [stack.enter_context(gzip_file(out / "unsorted" / f"{k:05d}.gz", 1))
                    for k in range(n_files)]
        for page in pages:
            text = page["text"].encode()
            digest = sha256(text)
            order = sha256(f"{settings['seed']} {digest}".encode())
            is_val = int(digest[:8], 16) < settings["val_fraction"] * 2 ** 32
            head = f"{'val' if is_val else 'train'} {order} {len(text)} ".encode()
            unsorted[int(order[:8], 16) * n_files >> 32].write(head + json_line(page))
    tasks = [(out, k) for k in range(n_files)]
    files = list(itertools.chain.from_iterable(in_workers(sort_documents, tasks, "sort", args)))
    shutil.rmtree(out / "unsorted")
    return files

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
