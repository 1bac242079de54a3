"""
How fast the tokenizer trains and encodes, beside what people would take instead, and how its time
and memory grow with the input.

    python bench/bpe.py                                         # 50 MB, vocabulary 32,768
    python bench/bpe.py --input FILE.jsonl --megabytes 10 --repeats 5

in:  .jsonl[.gz|.xz] with a "text" in each line, by default what is in ../shared/data; peers in
     the environment .peers/venv, see peers.txt; one that is not there is reported as not measured
out: three tables, and the same as one line of JSON

Every run is a process of its own, which reads the same file into memory, and is timed from there to
the finished tokenizer. Contenders take turns. What they find is compared, too: the merges of a
trainer, the ids of an encoder; ours are checked by the tests against the textbook's algorithm.
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
    """→ (tokenizer, {token bytes: id}), without special tokens."""
    if name == "bpe.py":
        import bpe
        tok = bpe.Tokenizer.train(texts, vocab_size + len(bpe.SPECIAL_TOKENS))
        return tok, tok.ranks
    if name == "rustbpe":
        import rustbpe
        tok = rustbpe.Tokenizer()
        tok.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
        return tok, {bytes(token): i for token, i in tok.get_mergeable_ranks()}
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return tok, {bytes(map(byte_of.get, token)): i for token, i in tok.get_vocab().items()}

def encode(name, tok, texts):
    if name == "rustbpe":
        return tok.batch_encode(texts)
    if name == "tokenizers":
        return [e.ids for e in tok.encode_batch(texts, add_special_tokens=False)]
    if name == "tiktoken":
        return tok.core.encode_ordinary_batch(texts, num_threads=CORES)
    return tok.encode_batch(texts)

def worker(task, name, path, vocab_size, pattern):
    """Prints one line of JSON: seconds, peak memory, a digest of the result, and the tokens."""
    texts = (json.loads(line)["text"] for line in open(path, encoding="utf-8"))
    if task != "grow":                      # there the text is read as training goes on
        texts = list(texts)
    if task != "encode":
        start = time.perf_counter()
        _, ranks = train(name, texts, vocab_size, pattern)
        seconds = time.perf_counter() - start
        result = sorted(token.hex() for token in ranks) if name == "tokenizers" else \
            [token.hex() for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    else:
        tok, _ = train("bpe.py" if name == "tiktoken" else name, texts[:2000], 4096, pattern)
        encode(name, tok, texts[:100])
        start = time.perf_counter()
        result = encode(name, tok, texts)
        seconds = time.perf_counter() - start
    own, child = (resource.getrusage(who).ru_maxrss / 1024
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "peak_mb": own + child * CORES,
                      "sha256": hashlib.sha256(json.dumps(result).encode()).hexdigest(),
                      "tokens": sum(map(len, result)) if task == "encode" else result}))

def run(task, name, path, args):
    """One run → its JSON, or a str that says why there is none."""
    python = sys.executable if name in ("bpe.py", "tiktoken") else args.peers / "bin" / "python"
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
        for source in sources:
            open_text = {".gz": gzip.open, ".xz": lzma.open}.get(Path(source).suffix, open)
            for line in open_text(source, "rt", encoding="utf-8"):
                text = json.loads(line)["text"]
                if size >= megabytes * 1e6:
                    return str(path), size
                size += len(text.encode())
                out.write(json.dumps({"text": text}) + "\n")
    return str(path), size

def in_turns(task, names, path, small, args):
    """Warms up on a small text, then lets the contenders take turns on the whole one →
    {name: list of runs, or why there is none}."""
    runs = {name: run(task, name, small, args) for name in names}
    runs = {name: first if isinstance(first, str) else [] for name, first in runs.items()}
    if isinstance(runs["bpe.py"], str):
        raise SystemExit(f"bpe.py failed ({runs['bpe.py']}); it is what this measures; run the "
                         "tests")
    for _ in range(args.repeats):
        for name in names:
            if not isinstance(runs[name], str):
                runs[name].append(run(task, name, path, args))
    return runs

def outcome(name, runs, ours):
    """How what a contender found compares with what we found."""
    tokens, mine = runs[0]["tokens"], ours[0]["tokens"]
    if name == "bpe.py":
        assert len({r["sha256"] for r in runs}) == 1, "two runs of ours differ"
        return "equal in all runs"
    if isinstance(tokens, int):
        same = runs[0]["sha256"] == ours[0]["sha256"]
        return "ids identical" if same else f"{tokens / mine:.4f} times our tokens"
    if tokens == mine:
        return "merges identical"
    return f"shares {len(set(tokens) & set(mine))} of {len(mine)} tokens"

def compare(task, names, path, size, small, args):
    """Prints a row for each contender → the rows."""
    runs, rows = in_turns(task, names, path, small, args), []
    ours = runs["bpe.py"]
    for name, its in runs.items():
        if isinstance(its, str):
            rows.append(dict(contender=name, missing=its))
            continue
        seconds = [r["seconds"] for r in its]
        rows.append(dict(
            contender=name, s=statistics.median(seconds), spread=spread(seconds), all_s=seconds,
            mb_s=size / 1e6 / statistics.median(seconds), peak_mb=max(r["peak_mb"] for r in its),
            found=outcome(name, its, ours), ours_faster_by=None if name == "bpe.py" else (
                ratio(seconds, [r["seconds"] for r in ours]))))
    table([f"{task}: {size / 1e6:.1f} MB, {CORES} cores", "s", "spread", "MB/s", "peak MB",
           "ours is faster by", "found"],
          [[row["contender"], row["missing"], *[None] * 5] if "missing" in row else
           [row["contender"], row["s"], row["spread"], row["mb_s"], row["peak_mb"],
            row["ours_faster_by"], row["found"]] for row in rows])
    return rows

def growth(sources, args):
    """Trains on 1, 4 and 16 parts of the text, streamed: what a megabyte costs should not rise."""
    rows = []
    for parts in (1, 4, 16):
        path, size = sample(sources, args.megabytes * parts / 16)
        its = [run("grow", "bpe.py", path, args) for _ in range(max(1, args.repeats // 2))]
        seconds, peak = statistics.median(r["seconds"] for r in its), max(r["peak_mb"] for r in its)
        rows.append(dict(mb=size / 1e6, s=seconds, peak_mb=peak))
    table(["bpe.py on", "s", "s a MB", "peak MB", "peak MB a MB"],
          [[f"{row['mb']:.3g} MB", row["s"], row["s"] / row["mb"], row["peak_mb"],
            row["peak_mb"] / row["mb"]] for row in rows])
    return rows

def main():
    if sys.argv[1:2] == ["--worker"]:
        task, name, path, vocab_size = sys.argv[2:]
        pattern = (ROOT / "data" / "bench" / "pattern.txt").read_text()
        return worker(task, name, path, int(vocab_size), pattern)
    shared = ROOT.parent / "shared" / "data"
    default = sorted(glob.glob(f"{shared}/proxy/*.xz")) + sorted(glob.glob(f"{shared}/prose/*.gz"))
    parser = argparse.ArgumentParser(description="the tokenizer's speed, beside peers")
    parser.add_argument("--input", nargs="+", default=default, help=".jsonl, .gz or .xz files")
    parser.add_argument("--megabytes", type=float, default=50, help="text to train on")
    parser.add_argument("--vocab_size", type=int, default=32768, help="bytes + merges")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contender")
    parser.add_argument("--peers", type=Path, default=PEERS / "venv", help="their environment")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    args = parser.parse_args()
    if not args.input:
        raise SystemExit("no text is given; ../shared/data is not there; try --input FILE.jsonl")
    if args.quick:
        args.megabytes, args.vocab_size, args.repeats = 0.5, 1024, 1
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
