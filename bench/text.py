"""Which text, vocabulary and batch give the best sentences in the same time on a CPU?

    python bench/text.py --data data/demo-small                         →  a Markdown table

in:  DATA/documents and DATA/prose, from prepare_fineweb.py and prose.py

Each arm trains a tokenizer and a model, a d4 of 128 channels and 2 heads with rows of 256 tokens,
for --cpu_seconds of process time. All are judged by the same bytes: the prose of the val split.
`words` is the share of the words in 20 samples that stand in the text of the arm.
"""
import argparse
import gzip
import json
import lzma
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from bpe import Tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from recipe import schedule  # noqa: E402
from sample import Engine  # noqa: E402
from train_gpt2 import Loader, evaluate  # noqa: E402
from training import Ranks, make_optimizer  # noqa: E402

T = 256
MICRO_ROWS = 8              # 2048 tokens at a time
WORD = re.compile("[a-z']+")

def read_texts(data, folder, split):
    with gzip.open(Path(data, folder, f"{split}_00000.jsonl.gz"), "rt") as rows:
        return [json.loads(row)["text"] for row in rows]

class Tokens:
    """Texts as one row of tokens, which reads like train_gpt2.Shards."""

    def __init__(self, texts, tokenizer):
        rows = [[tokenizer.eot, *ids] for ids in tokenizer.encode_batch(texts)]
        self.ids = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
        self.n_tokens = len(self.ids)

    def read(self, start, count):
        return self.ids[start:start + count]

def train(tokens, vocab_size, batch, seed, cpu_seconds):
    """A model after cpu_seconds of training → (model, steps). Three steps tell how many fit."""
    def new():
        torch.manual_seed(seed)
        config = GPTConfig.preset("d4", n_embd=128, n_head=2, block_size=T, vocab_size=vocab_size,
                                  windows="L")
        model = GPT(config).use("cpu")
        return model, make_optimizer(model, Ranks(), None, batch), Loader(tokens, T, seed)

    def step(model, optimizer, loader, position, scales):
        rows = batch // T
        for first in range(0, rows, MICRO_ROWS):
            x, y = loader.batch(position * rows + first, MICRO_ROWS, "cpu")
            (model(x, y) * MICRO_ROWS / rows).backward()
        optimizer.average_grads()
        lr_scale, momentum, decay_scale = scales
        optimizer.step(lr_scale, 1.0, momentum, decay_scale)

    trial = new()
    step(*trial, 0, (0.0, 0.9, 0.0))
    started = time.process_time()
    for position in range(3):
        step(*trial, position, (0.0, 0.9, 0.0))
    steps = max(1, int(3 * cpu_seconds / (time.process_time() - started)))
    model, optimizer, loader = new()
    for position in range(steps):
        step(model, optimizer, loader, position, schedule(position, steps, modern=True))
    return model, steps

def word_share(model, tokenizer, texts):
    known = set(WORD.findall("\n".join(texts).lower()))
    engine = Engine(model, tokenizer)
    written = []
    for prompt in ("The", "Returns", "If", "This function"):
        for completion in engine.generate([prompt], 60, num_samples=5, temperature=0.8, top_p=0.95):
            written += WORD.findall(tokenizer.decode(completion.ids).lower())[1:-1]
    return sum(1 for word in written if word in known) / max(1, len(written))

def main():
    parser = argparse.ArgumentParser(description="compare texts, vocabularies and batches")
    add = parser.add_argument
    add("--data", required=True, help="folder with documents/ and prose/")
    add("--texts", nargs="+", default=["documents", "prose"], help="folders of texts to learn")
    add("--vocab_sizes", type=int, nargs="+", default=[2048, 4096, 8192])
    add("--batches", type=int, nargs="+", default=[4096], help="tokens a step")
    add("--seeds", type=int, nargs="+", default=[1337])
    add("--cpu_seconds", type=float, default=90, help="of each training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = read_texts(args.data, "prose", "val")
    data = "\n".join(held_out).encode()
    gzipped = 8 * len(gzip.compress(data, 9)) / len(data)
    xzipped = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    print(f"{len(data):,} bytes held out: gzip -9 {gzipped:.3f}, xz -9e {xzipped:.3f}\n")
    print("| text | vocabulary | batch | seed | steps | tokens | val bits per byte | words |\n"
          "|---|---|---|---|---|---|---|---|")
    for folder in args.texts:
        texts = read_texts(args.data, folder, "train")
        for vocab_size in args.vocab_sizes:
            tokenizer = Tokenizer.train(texts, vocab_size)
            tokens = Tokens(texts, tokenizer)
            token_bytes = torch.from_numpy(tokenizer.token_bytes().astype(np.int64))
            val = Tokens(held_out, tokenizer)
            for batch, seed in [(b, s) for b in args.batches for s in args.seeds]:
                model, steps = train(tokens, vocab_size, batch, seed, args.cpu_seconds)
                _, bpb = evaluate(model, val, token_bytes, T, MICRO_ROWS, Ranks())
                share = word_share(model, tokenizer, texts)
                print(f"| {folder} | {vocab_size} | {batch} | {seed} | {steps} | "
                      f"{steps * batch:,} | {bpb:.4f} | {share:.1%} |", flush=True)

if __name__ == "__main__":
    main()
