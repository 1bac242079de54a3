"""
Measures how fast the tokenizer trains and encodes, beside the libraries that people would use
instead, and how its time and memory grow with the input.

    python bench/bpe.py                                         # 50 MB, vocabulary 32,768
    python bench/bpe.py --input FILE.jsonl --megabytes 10 --repeats 5

in:  .jsonl[.gz|.xz] files with a "text" in each line. The other libraries are those installed in
     the environment .peers/venv, see peers.txt; any that is missing is reported as not measured.
out: three tables, and their numbers as one line of JSON

Every run is a process of its own. It reads the same file into memory and measures the time from
there to the finished tokenizer. The contenders take turns. Their results are compared, too: the
merges of the trainers and the ids of the encoders. Our tests compare ours with the textbook.
"""
import argparse
import glob
import gzip
import hashlib
import json
import lzma
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # `import bpe` must not find this file

from measure import PEERS, finish, missing, ratio, spread, table

CORES = len(os.sched_getaffinity(0))
TRAINERS = ("bpe.py", "rustbpe", "tokenizers")
ENCODERS = ("bpe.py", "tiktoken", "rustbpe", "tokenizers")

# ---- One run, in a process of its own ------------------------------------------------------------

def train(name, texts, vocab_size, pattern):
    """Trains one contender → (tokenizer, {token bytes: id}), without special tokens."""
    if name == "bpe.py":
        import bpe
        tok = bpe.Tokenizer.train(texts, vocab_size + len(bpe.SPECIAL_TOKENS))
        return tok, tok.ranks
    if name == "rustbpe":
        import rustbpe
        tok = rustbpe.Tokenizer()
        tok.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
        return tok, {bytes(token): i for token, i in tok.get_mergeable_ranks()}
    return train_hugging_face(texts, vocab_size, pattern)

def train_hugging_face(texts, vocab_size, pattern):
    """Sets up Hugging Face's tokenizers for byte-level BPE with our pattern, and trains it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainer)
    # Its tokens are text in which each byte that cannot be printed has a stand-in from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {}
    for token, i in tok.get_vocab().items():
        ranks[bytes(byte_of[letter] for letter in token)] = i
    return tok, ranks

def encode(name, tok, texts):
    """Encodes a list of str with all cores → list of lists of ids."""
    if name == "rustbpe":
        return tok.batch_encode(texts)
    if name == "tokenizers":
        return [e.ids for e in tok.encode_batch(texts, add_special_tokens=False)]
    if name == "tiktoken":
        return tok.core.encode_ordinary_batch(texts, num_threads=CORES)
    return tok.encode_batch(texts)

def worker(task, name, path, vocab_size, pattern):
    """Runs one task and prints one line of JSON: seconds, peak memory in MB, a digest of the
    result and its tokens. Tasks "train" and "grow" result in the tokens in the order of learning,
    "encode" in the ids, of which only the number is printed.
    The peak counts every worker process as large as the largest."""
    texts = (json.loads(line)["text"] for line in open(path, encoding="utf-8"))
    if task != "grow":                      # "grow" reads the text while it trains
        texts = list(texts)
    if task == "encode":
        trainer = "bpe.py" if name == "tiktoken" else name
        tok, _ = train(trainer, texts[:2000], 4096, pattern)
        encode(name, tok, texts[:100])      # warms up
        start = time.perf_counter()
        result = encode(name, tok, texts)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, result))
    else:
        start = time.perf_counter()
        _, ranks = train(name, texts, vocab_size, pattern)
        seconds = time.perf_counter() - start
        result = [token.hex() for token in sorted(ranks, key=ranks.get)]
        if name == "tokenizers":            # gives its ids in another order
            result.sort()
        tokens = result
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    digest = hashlib.sha256(json.dumps(result).encode()).hexdigest()
    print(json.dumps({"seconds": seconds, "peak_mb": own + child * CORES, "sha256": digest,
                      "tokens": tokens}))

def run(task, name, path, args):
    """One run → its JSON, or a str that says why there is none."""
    python = args.peers / "bin" / "python"
    if name in ("bpe.py", "tiktoken"):
        python = sys.executable
    if not Path(python).exists():
        return missing(args.peers.name)
    done = subprocess.run([python, __file__, "--worker", task, name, path, str(args.vocab_size)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return "not measured: " + done.stderr.strip().splitlines()[-1][:60]
    return json.loads(done.stdout)

# ---- Set-up, comparison, growth ------------------------------------------------------------------

def sample(sources, megabytes):
    """Writes the first megabytes of text into data/bench/, one document a line → path, bytes."""
    path = ROOT / "data" / "bench" / f"text_{megabytes:g}mb.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for text in read_texts(sources):
            if size >= megabytes * 1e6:
                break
            size += len(text.encode())
            out.write(json.dumps({"text": text}) + "\n")
    return str(path), size

def read_texts(sources):
    """Yields the texts of .jsonl files, of which some may be compressed."""
    openers = {".gz": gzip.open, ".xz": lzma.open}
    for source in sources:
        open_text = openers.get(Path(source).suffix, open)
        with open_text(source, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]

def in_turns(task, names, path, small, args):
    """Warms up on a small text, then lets the contenders take turns on the whole text →
    {name: list of runs, or a str that says why there are none}."""
    runs = {}
    for name in names:
        warm_up = run(task, name, small, args)
        runs[name] = warm_up if isinstance(warm_up, str) else []
    if isinstance(runs["bpe.py"], str):
        raise SystemExit(f"bpe.py failed ({runs['bpe.py']}); run pytest tests/test_bpe.py")
    for _ in range(args.repeats):
        for name in names:
            if not isinstance(runs[name], str):
                runs[name].append(run(task, name, path, args))
    return runs

def outcome(name, runs, ours):
    """Says in words how a contender's result compares with ours."""
    if name == "bpe.py":
        assert len({r["sha256"] for r in runs}) == 1, "two runs of ours differ"
        return "equal in all runs"
    theirs = runs[0]
    mine = ours[0]
    if isinstance(theirs["tokens"], int):               # encoders: how many tokens
        if theirs["sha256"] == mine["sha256"]:
            return "ids identical"
        return f"{theirs['tokens'] / mine['tokens']:.4f} times our tokens"
    if theirs["tokens"] == mine["tokens"]:
        return "merges identical"
    shared = set(theirs["tokens"]) & set(mine["tokens"])
    return f"shares {len(shared)} of {len(mine['tokens'])} tokens"

def compare(task, names, path, size, small, args):
    """Prints a table with a row for each contender → the rows."""
    runs = in_turns(task, names, path, small, args)
    our_seconds = [r["seconds"] for r in runs["bpe.py"]]
    rows = []
    cells = []
    for name, its in runs.items():
        if isinstance(its, str):
            rows.append(dict(contender=name, missing=its))
            cells.append([name, its] + 5 * [None])
            continue
        seconds = [r["seconds"] for r in its]
        median = statistics.median(seconds)
        row = dict(contender=name, s=median, spread=spread(seconds), all_s=seconds,
                   mb_s=size / 1e6 / median, peak_mb=max(r["peak_mb"] for r in its),
                   found=outcome(name, its, runs["bpe.py"]), ours_faster_by=None)
        if name != "bpe.py":
            row["ours_faster_by"] = ratio(seconds, our_seconds)
        rows.append(row)
        cells.append([row[key] for key in ("contender", "s", "spread", "mb_s", "peak_mb",
                                           "ours_faster_by", "found")])
    table([f"{task}: {size / 1e6:.1f} MB, {CORES} cores", "s", "spread", "MB/s", "peak MB",
           "ours is faster by", "found"], cells)
    return rows

def growth(sources, args):
    """Trains on 1/16, 4/16 and all of the text, which is read as training goes. What a megabyte
    costs in seconds and in memory should not rise → rows of the table."""
    rows = []
    cells = []
    for parts in (1, 4, 16):
        path, size = sample(sources, args.megabytes * parts / 16)
        its = [run("grow", "bpe.py", path, args) for _ in range(max(1, args.repeats // 2))]
        mb = size / 1e6
        seconds = statistics.median(r["seconds"] for r in its)
        peak_mb = max(r["peak_mb"] for r in its)
        rows.append(dict(mb=mb, s=seconds, peak_mb=peak_mb))
        cells.append([f"{mb:.3g} MB", seconds, seconds / mb, peak_mb, peak_mb / mb])
    table(["bpe.py on", "s", "s a MB", "peak MB", "peak MB a MB"], cells)
    return rows

def main():
    if sys.argv[1:2] == ["--worker"]:
        task, name, path, vocab_size = sys.argv[2:]
        pattern = (ROOT / "data" / "bench" / "pattern.txt").read_text()
        return worker(task, name, path, int(vocab_size), pattern)
    shared = ROOT.parent / "shared" / "data"
    default = sorted(glob.glob(f"{shared}/proxy/*.xz")) + sorted(glob.glob(f"{shared}/prose/*.gz"))
    parser = argparse.ArgumentParser(description="Measures the tokenizer beside other libraries.")
    parser.add_argument("--input", nargs="+", default=default, help=".jsonl files, also .gz or .xz")
    parser.add_argument("--megabytes", type=float, default=50, help="how much text to train on")
    parser.add_argument("--vocab_size", type=int, default=32768, help="bytes + merges")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contender")
    parser.add_argument("--peers", type=Path, default=PEERS / "venv", help="environment of peers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it runs")
    args = parser.parse_args()
    if not args.input:
        raise SystemExit("there is no text to measure with; try --input FILE.jsonl")
    if args.quick:
        args.megabytes = 0.5
        args.vocab_size = 1024
        args.repeats = 1
    from bpe import PATTERNS
    path, size = sample(args.input, args.megabytes)
    (ROOT / "data" / "bench" / "pattern.txt").write_text(PATTERNS["gpt4"])
    warm, _ = sample(args.input, min(2, args.megabytes))
    small, small_size = sample(args.input, min(10, args.megabytes))
    finish("bpe", mb=size / 1e6, vocab_size=args.vocab_size, cores=CORES,
           train=compare("train", TRAINERS, path, size, warm, args),
           encode=compare("encode", ENCODERS, small, small_size, warm, args),
           growth=growth(args.input, args))

if __name__ == "__main__":
    main()
