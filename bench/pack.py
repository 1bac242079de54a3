"""
Text → token shards for the benches that measure quality; the tokenizer is trained on a part of it.

    python bench/pack.py --vocab_size 32768 --out data/bench/proxy-32768

in:  data/proxy/*.jsonl.xz or --input: .jsonl or .jsonl.xz files with shuffled rows {"text"}
out: OUT/proxy_train_*.bin, proxy_val_000000.bin, tokenizer/, token_bytes.npy, as train_gpt2.py
     reads them. The first shard, 2 million tokens, is the val split.
"""
import argparse
import itertools
import json
import lzma
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from bpe import Tokenizer
from shards import cut_shards, save_tokenizer, write_bin
from measure import PROXY

def read_texts(paths):
    texts = []
    for path in paths:
        open_file = lzma.open if path.suffix == ".xz" else open
        with open_file(path, "rb") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts

def show(line):
    """Overwrite the line that tells the progress."""
    print(f"\r{line:60}", end="", file=sys.stderr, flush=True)

def pack(out, texts, vocab_size, shard_tokens, train_mb):
    ends = itertools.accumulate(map(len, texts))
    n_train = sum(end < train_mb * 1e6 for end in ends)
    tokenizer = Tokenizer.train(texts[:n_train], vocab_size, "gpt4", log=show)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    split, total = "val", 0
    for number, shard in enumerate(cut_shards(iter(texts), tokenizer, shard_tokens)):
        tokens = np.concatenate(shard)
        write_bin(part / f"proxy_{split}_{number:06d}.bin", tokens)
        split = "train"
        total += len(tokens)
        show(f"{total:,} tokens")
    tokenizer.save(part / "tokenizer")
    save_tokenizer(part, tokenizer, part / "tokenizer")
    part.rename(out)
    print(f"\r{out}: {total:,} tokens of {sum(map(len, texts)):,} characters")

def main():
    parser = argparse.ArgumentParser(description="text → tokenizer and token shards")
    parser.add_argument("--input", nargs="+", type=Path, help="files; default: the proxy's")
    parser.add_argument("--vocab_size", type=int, default=32768, help="tokens")
    parser.add_argument("--train_mb", type=float, default=50, help="MB the tokenizer is trained on")
    parser.add_argument("--shard_tokens", type=int, default=2 ** 21, help="tokens of a shard")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "bench" / "proxy-32768")
    args = parser.parse_args()
    if args.out.is_dir():
        return print(f"{args.out} exists and is kept")
    paths = args.input or sorted(PROXY.glob("*.jsonl.xz") if PROXY else [])
    if not paths:
        raise SystemExit("data/proxy is missing; name .jsonl or .jsonl.xz files with rows "
                         '{"text": …} with --input')
    pack(args.out, read_texts(paths), args.vocab_size, args.shard_tokens, args.train_mb)

if __name__ == "__main__":
    main()
