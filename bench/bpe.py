"""
How fast the tokenizer trains and encodes, beside what people would take instead, and how its time
and memory grow with the input.

  python bench/bpe.py                                            50 MB, vocabulary 32,768
  python bench/bpe.py --input FILE.jsonl --megabytes 10 --repeats 5

Peers come from the environment .peers/venv (pip install rustbpe tokenizers tiktoken regex); a peer
that is not there is reported as not measured. Every run is a process of its own, which reads the
same file into memory, and is timed from there to the finished tokenizer. Runs of the contenders
take turns, so that a busy machine slows all of them; compare ratios, not seconds.

in   .jsonl[.gz|.xz] with a "text" in each line; by default the text in ../shared/data
out  one table, and the same as one line of JSON
"""
import argparse
import glob
import gzip
import hashlib
import importlib.util
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
TRAINERS = ("bpe.py", "rustbpe", "tokenizers")
ENCODERS = ("bpe.py", "tiktoken", "rustbpe", "tokenizers")


# ---- one run, in a process of its own ------------------------------------------------------------

def load_ours():
    """The project's bpe.py; `import bpe` would find this file."""
    spec = importlib.util.spec_from_file_location("bpe", ROOT / "bpe.py")
    sys.modules["bpe"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(name, texts, vocab_size, pattern):
    """-> (tokenizer, {token bytes: id}), without special tokens."""
    if name == "bpe.py":
        bpe = load_ours()
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
        return tok.core.encode_ordinary_batch(texts, num_threads=len(os.sched_getaffinity(0)))
    return tok.encode_batch(texts)


def worker(task, name, path, vocab_size, pattern):
    """Print one JSON line: seconds, peak memory, a digest of the result, and the tokens."""
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
    print(json.dumps({"seconds": seconds, "peak_mb": own + child * len(os.sched_getaffinity(0)),
                      "sha256": hashlib.sha256(json.dumps(result).encode()).hexdigest(),
                      "tokens": sum(map(len, result)) if task == "encode" else result}))


def run(task, name, path, args):
    """One run -> its JSON, or a str that says why there is none."""
    python = sys.executable if name in ("bpe.py", "tiktoken") else Path(args.peers) / "bin/python"
    if not Path(python).exists():
        return f"not measured: no {args.peers}"
    done = subprocess.run([python, __file__, "--worker", task, name, path, str(args.vocab_size)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return "not measured: " + done.stderr.strip().splitlines()[-1][:60]
    return json.loads(done.stdout)


# ---- set-up, comparison, growth ------------------------------------------------------------------

def sample(sources, megabytes):
    """Write the first megabytes of text into data/bench/, one document a line; its path."""
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


def compare(task, names, path, small, args):
    """Warm up on a small text, then let the contenders take turns on the whole one ->
    {name: list of runs, or why there is none}."""
    runs = {name: run(task, name, small, args) for name in names}
    runs = {name: first if isinstance(first, str) else [] for name, first in runs.items()}
    for _ in range(args.repeats):
        for name in names:
            if not isinstance(runs[name], str):
                runs[name].append(run(task, name, path, args))
    return runs


def same_result(name, runs, ours):
    """How the result compares with ours, which the tests compare with the textbook algorithm."""
    tokens, mine = runs[0]["tokens"], ours[0]["tokens"]
    if name == "bpe.py":
        return "equal in all runs" if len({r["sha256"] for r in runs}) == 1 else "DIFFERENT RUNS"
    if isinstance(tokens, int):
        same = runs[0]["sha256"] == ours[0]["sha256"]
        return "ids identical" if same else f"{tokens / mine:.4f} times our tokens"
    if tokens == mine:
        return "merges identical"
    return f"shares {len(set(tokens) & set(mine))} of {len(mine)} tokens"


def table(task, runs, size):
    """Print a row for each contender; -> the same as a dict."""
    print(f"\n{task:<12}{'median s':>9} {'min-max s':>14} {'MB/s':>7} {'x ours':>7} {'MB mem':>7}"
          "  result")
    ours, rows = runs["bpe.py"], {}
    if isinstance(ours, str):
        raise SystemExit(f"bpe.py failed ({ours}); it is what this measures; run the tests")
    for name, its in runs.items():
        if isinstance(its, str):
            rows[name] = its
            print(f"{name:<12} {its}")
            continue
        seconds = sorted(r["seconds"] for r in its)
        median = statistics.median(seconds)
        ratio = median / statistics.median(r["seconds"] for r in ours)
        rows[name] = {"median_s": round(median, 3), "min_s": round(seconds[0], 3),
                      "max_s": round(seconds[-1], 3), "times_ours": round(ratio, 3),
                      "peak_mb": round(max(r["peak_mb"] for r in its)),
                      "result": same_result(name, its, ours)}
        spread = f"{seconds[0]:.2f}-{seconds[-1]:.2f}"
        print(f"{name:<12}{median:9.2f} {spread:>14} {size / 1e6 / median:7.1f} {ratio:7.2f} "
              f"{rows[name]['peak_mb']:7}  {rows[name]['result']}")
    return rows


def growth(sources, args):
    """Train on 1, 4 and 16 parts of the text, streamed: what a megabyte costs should not rise."""
    print(f"\n{'bpe.py on':<12}{'s':>9} {'s per MB':>14} {'MB mem':>7} {'mem per MB':>11}")
    rows = []
    for parts in (1, 4, 16):
        path, size = sample(sources, args.megabytes * parts / 16)
        its = [run("grow", "bpe.py", path, args) for _ in range(max(1, args.repeats // 2))]
        seconds, peak = statistics.median(r["seconds"] for r in its), max(r["peak_mb"] for r in its)
        rows.append({"mb": round(size / 1e6, 1), "s": round(seconds, 2), "peak_mb": round(peak)})
        print(f"{size / 1e6:9.1f} MB{seconds:9.2f} {seconds / size * 1e6:14.3f} {peak:7.0f} "
              f"{peak / size * 1e6:11.1f}")
    return rows


def main():
    if sys.argv[1:2] == ["--worker"]:
        task, name, path, vocab_size = sys.argv[2:]
        pattern = (ROOT / "data" / "bench" / "pattern.txt").read_text()
        return worker(task, name, path, int(vocab_size), pattern)
    shared = ROOT.parent / "shared" / "data"
    default = sorted(glob.glob(f"{shared}/proxy/*.xz")) + sorted(glob.glob(f"{shared}/prose/*.gz"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", nargs="+", default=default, help=".jsonl, .gz or .xz files")
    parser.add_argument("--megabytes", type=float, default=50, help="text to train on")
    parser.add_argument("--vocab_size", type=int, default=32768, help="bytes + merges")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contender")
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "venv"), help="their environment")
    args = parser.parse_args()
    if not args.input:
        raise SystemExit("no text is given; ../shared/data is not there; try --input FILE.jsonl")
    path, size = sample(args.input, args.megabytes)
    cores = len(os.sched_getaffinity(0))
    (ROOT / "data" / "bench" / "pattern.txt").write_text(load_ours().PATTERNS["gpt4"])
    print(f"{size / 1e6:.1f} MB, vocabulary {args.vocab_size}, {cores} cores, "
          f"load {os.getloadavg()[0]:.1f}, {args.repeats} runs each, in turns")
    report = {"bench": "bpe", "mb": round(size / 1e6, 1), "vocab_size": args.vocab_size,
              "cores": cores, "repeats": args.repeats}
    warm, _ = sample(args.input, min(2, args.megabytes))
    small, small_size = sample(args.input, min(10, args.megabytes))
    report["train"] = table("training", compare("train", TRAINERS, path, warm, args), size)
    report["encode"] = table("encoding", compare("encode", ENCODERS, small, warm, args), small_size)
    report["growth"] = growth(args.input, args)
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
