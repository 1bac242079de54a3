"""
The text of the quality benches, as token shards: a tokenizer is trained on a part of it.

    python bench/pack.py --vocab_size 32768 --out data/bench/proxy-32768

in:  data/proxy/*.jsonl.xz, or --input: .jsonl or .jsonl.xz rows {"text"}, shuffled
out: OUT/proxy_train_*.bin, proxy_val_000000.bin, tokenizer/, token_bytes.npy, as train_gpt2.py reads
     them. Documents are joined back to back; the first 2 million tokens are for validation.
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

def pack(out, paths, vocab_size, shard_tokens, train_mb):
    texts = []
    for path in paths:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            texts += [json.loads(line)["text"] for line in file]
    ends = itertools.accumulate(map(len, texts))
    some = list(itertools.takewhile(lambda pair: pair[0] < train_mb * 1e6, zip(ends, texts)))
    tokenizer = Tokenizer.train((text for _, text in some), vocab_size, "gpt4", log=lambda line: print(
        f"\r{line:60}", end="", file=sys.stderr, flush=True))
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    total = 0
    for number, shard in enumerate(cut_shards(iter(texts), tokenizer, shard_tokens)):
        split, tokens = "train" if number else "val", np.concatenate(shard)
        write_bin(part / f"proxy_{split}_{number:06d}.bin", tokens)
        total += len(tokens)
        print(f"\r{total:,} tokens", end="", file=sys.stderr, flush=True)
    tokenizer.save(part / "tokenizer")
    save_tokenizer(part, tokenizer, part / "tokenizer")
    part.rename(out)
    print(f"\r{out}: {total:,} tokens of {sum(map(len, texts)):,} characters")

def main():
    parser = argparse.ArgumentParser(description="text → tokenizer and shards, for the benches")
    parser.add_argument("--input", nargs="+", type=Path, help="files; default: the proxy's")
    parser.add_argument("--vocab_size", type=int, default=32768, help="tokens")
    parser.add_argument("--train_mb", type=float, default=50, help="MB the tokenizer is trained on")
    parser.add_argument("--shard_tokens", type=int, default=2 ** 21, help="tokens of a shard")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "bench" / "proxy-32768")
    args = parser.parse_args()
    if args.out.is_dir():
        return print(f"{args.out} is there")
    paths = args.input or sorted(PROXY.glob("*.jsonl.xz") if PROXY else [])
    if not paths:
        raise SystemExit("there is no data/proxy; the benches' text is .jsonl or .jsonl.xz files of "
                         "rows with a text; name some with --input")
    pack(args.out, paths, args.vocab_size, args.shard_tokens, args.train_mb)

if __name__ == "__main__":
    main()
