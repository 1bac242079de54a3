r"""
Pretraining: token shards → a base model that continues documents.

    python train_gpt2.py --model d4 --config block_size=256 \
        --data data/demo --out runs/demo                                                   # CPU
    python train_gpt2.py --model gpt2 --data data/fineweb --out runs/gpt2                  # 1 GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py \
        --model d24 --data data/fineweb --out runs/d24                                     # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_gpt2.py --model d24 --data data/fineweb --out runs/d24                       # 2 nodes

    in:  <data>/*_train_000001.bin, *_val_000000.bin (llm.c's shards too), index.json, tokenizer/
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

A step has total_batch_size tokens, which is a property of the model. Each of the world_size ranks
takes batch_size rows of seq_len tokens at a time, as many as fit in its memory. It repeats that
grad_accum_steps = total_batch_size / (batch_size * seq_len * world_size) times before an update.

Rows are cut from the shards back to back. A row may hold the end of one document and the start of
the next, and attention crosses the border. Masking the border was measured to gain 0.1 % and to
cost a third of the speed (open_lm issue 206).

A GPU is never waited for within a step: Python reads a step's loss when the next step is on its
way, and the GPU itself decides whether a step is skipped. How long a run is and how large a step,
recipe.py says.

Papers: GPT-2 and GPT-3 (arXiv 2005.14165).
Differs from the papers: a step whose loss or norm stands out is skipped, as in llm.c.
"""
import argparse
import gc
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

from bpe import Tokenizer
from model import (GPT, GPT2_SIZES, GPTConfig, find_compiler, find_kernel, load_checkpoint,
                   run_layer, sdpa)
from recipe import (RECIPES, SPIKE_WINDOW, is_spike, memory_bytes, most_rows, peak_flops,
                    plan_batch, schedule)
from sample import (Engine, check_above_0, check_at_least, choose_device, find_run, has_tokenizer,
                    load_tokenizer, quiet_end)
from training import (RunLog, already_trained, catch_signals, check_finite, finish, init_ranks,
                      load_state, make_optimizer, save_run)

# ---- Data ----------------------------------------------------------------------------------------

MAGIC = 20240520
TOKEN_TYPES = {1: np.uint16, 2: np.uint32}      # by the version in a shard's header
HEADER_BYTES = 1024                             # 256 int32: magic, version, token count, zeros

class Shards:
    """All tokens of a split as one long sequence, read from memory-mapped .bin files.

    data: a folder of token shards, written by shards.py or by llm.c. split: "train" or "val".
    vocab_size: no id may be as large; None: it is not known. Raises SystemExit if the split has no
    shard, if a shard is damaged, or, as soon as it is read, if an id is too large.
    """

    def __init__(self, data, split, vocab_size=None):
        self.vocab_size = vocab_size
        self.files = shard_files(data, split)
        self.maps = [self.open(path) for path in self.files]
        self.ends = np.cumsum([len(tokens) for tokens in self.maps])
        self.n_tokens = int(self.ends[-1])
        if self.n_tokens < 2:
            raise SystemExit(f"the {split} split in {data} holds {self.n_tokens} tokens, but one "
                             "must predict another; prepare more text")

    @staticmethod
    def open(path):
        """One file → its tokens, which stay on the disk until they are read."""
        if not path.exists():
            raise SystemExit(f"{path} is missing, but index.json lists it; run python shards.py "
                             "again")
        size = path.stat().st_size
        if size < HEADER_BYTES:
            raise SystemExit(f"{path} has {size} bytes, less than the header of a shard; delete it "
                             "and run python shards.py again")
        magic, version, n_tokens = np.fromfile(path, dtype=np.int32, count=3).tolist()
        if magic != MAGIC or version not in TOKEN_TYPES:
            raise SystemExit(f"{path} has magic {magic} version {version}, but a shard has magic "
                             f"{MAGIC} and version 1 or 2; write it again with python shards.py")
        dtype = TOKEN_TYPES[version]
        expected = HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise SystemExit(f"{path} has {size} bytes, but its header promises {expected}; delete "
                             "it and run python shards.py again")
        return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))

    def read(self, start, count):
        """Tokens start … start + count - 1 as int64, across the borders of shards."""
        pieces = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            tokens = self.maps[shard]
            begin = start - (self.ends[shard] - len(tokens))
            piece = tokens[begin:begin + count].astype(np.int64)
            if self.vocab_size and len(piece) and piece.max() >= self.vocab_size:
                raise SystemExit(f"{self.files[shard]} holds token {piece.max()}, but the "
                                 f"tokenizer has {self.vocab_size}; tokenize the text again, with "
                                 "the tokenizer that you train with")
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
            shard += 1
        return np.concatenate(pieces)

def mix64(z):
    """The output function of splitmix64 (Steele, Lea and Flood 2014), on an array of uint64.

    It can be inverted, so different inputs have different outputs, and each bit of the output
    depends on every bit of the input."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)

GOLDEN_RATIO = 0x9E3779B97F4A7C15       # 2⁶⁴ over the golden ratio, made odd

def shuffled_rows(n_rows, seed, epoch):
    """The rows 0 … n_rows - 1 in the order of an epoch: sorted by a hash of (seed, epoch, row).

    The hash is the row-th output of a splitmix64 that starts at a hash of seed and epoch. Two rows
    of an epoch never have the same hash. train_gpt2.cu computes the same order in ten lines, which
    numpy's own permutation does not allow."""
    start = mix64(mix64(np.array([seed % 2 ** 64], np.uint64)) + epoch)
    keys = mix64(start + np.arange(1, n_rows + 1, dtype=np.uint64) * GOLDEN_RATIO)
    return np.argsort(keys, kind="stable")

class Loader:
    """Rows of T + 1 tokens in a seeded order. Each row comes once an epoch. A position is the
    number of rows that all ranks have read so far."""

    def __init__(self, shards, T, seed):
        self.shards = shards
        self.T = T
        self.seed = seed
        self.n_rows = (shards.n_tokens - 1) // T
        if self.n_rows < 1:
            raise SystemExit(f"the shards hold {shards.n_tokens} tokens, fewer than the {T + 1} of "
                             "a row; prepare more text, or lower --seq_len")
        self.epoch = None
        self.order = None

    def row(self, position):
        epoch, i = divmod(position, self.n_rows)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = shuffled_rows(self.n_rows, self.seed, epoch)
        return self.shards.read(int(self.order[i]) * self.T, self.T + 1)

    def batch(self, position, batch_size, device):
        """Rows position … position + batch_size - 1 → inputs, targets (B, T) on the device."""
        rows = torch.from_numpy(np.stack([self.row(position + b) for b in range(batch_size)]))
        if "cuda" in device:
            rows = rows.pin_memory().to(device, non_blocking=True)
        rows = rows.to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

# ---- Which files belong together? ----------------------------------------------------------------

HASHED_BYTES = 2 ** 30      # of shards at the start, which takes seconds; the others are trusted

def read_index(data):
    """index.json of a folder that shards.py wrote: its tokenizer, and the split, tokens and SHA-256
    of each shard. {}: there is none; llm.c writes shards without it."""
    path = Path(data) / "index.json"
    if not path.exists():
        return {}
    try:
        index = dict(json.loads(path.read_bytes()))
        index["shards"] = [dict(shard, path=Path(data, shard["file"]), split=shard["split"])
                           for shard in index.get("shards") or []]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SystemExit(f"{path} is not an index of shards ({error}); remove it and run python "
                         "shards.py again") from None
    return index

def shard_files(data, split):
    """The files of a split: those that index.json lists for it. Without an index they are those
    whose name ends in _{split}_DIGITS.bin, or in _{split}.bin, as in llm.c's small data sets.
    Raises SystemExit if there is none."""
    listed = read_index(data).get("shards")
    name = re.compile(rf"(.+_)?{split}(_[0-9]+)?\.bin")
    if listed:
        files = [shard["path"] for shard in listed if shard["split"] == split]
    else:
        files = sorted(path for path in Path(data).glob("*.bin") if name.fullmatch(path.name))
    if not files:
        raise SystemExit(f"{data} holds no shards of the {split} split, *_{split}_000000.bin; "
                         f"make them with python shards.py --data {data} --tokenizer DIR")
    return files

def data_tokenizer(data):
    """The tokenizer beside the shards. llm.c's shards have none, and their tokens are GPT-2's.
    Raises SystemExit if index.json says that another one made the shards."""
    folder = Path(data) / "tokenizer"
    if folder.exists():
        tokenizer = Tokenizer.load(folder)
    else:
        shard_files(data, "train")      # a missing folder is named before a vocabulary is fetched
        tokenizer = Tokenizer.pretrained("gpt2")
    made_by = read_index(data).get("tokenizer") or {}
    if made_by.get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise SystemExit(f"{data}/index.json: tokenizer {made_by['sha256'][:8]} made the shards, "
                         f"but {folder} is {tokenizer.sha256[:8]}; bring that one back, or remove "
                         "index.json and repeat prepare_fineweb.py and shards.py")
    return tokenizer

def check_shards(data):
    """Compares shards with the SHA-256 of index.json, in its order, up to HASHED_BYTES."""
    n_bytes = 0
    for shard in read_index(data).get("shards", []):
        n_bytes += shard["path"].stat().st_size
        if "sha256" not in shard or n_bytes > HASHED_BYTES:
            continue
        with open(shard["path"], "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            raise SystemExit(f"{shard['path']} is not the file that index.json describes; its "
                             f"SHA-256 begins with {found[:8]}; run python shards.py again")

def check_same_tokenizer(run, name, tokenizer):
    """Stops if a checkpoint was trained with another tokenizer than the data's, so that its rows of
    the embedding would mean other tokens. A folder that holds weights alone does not say."""
    if not (name in GPT2_SIZES or has_tokenizer(run)):
        return
    theirs = load_tokenizer(run)
    if theirs.sha256 != tokenizer.sha256:
        raise SystemExit(f"--init_from {name} has the tokenizer {theirs.name} {theirs.sha256[:8]}, "
                         f"but the data has {tokenizer.name} {tokenizer.sha256[:8]}; tokenize the "
                         f"data with the model's: python shards.py --data DATA --tokenizer {run}")

# ---- Validation ----------------------------------------------------------------------------------

VAL_TOKENS = 2 ** 20            # tokens per evaluation; the final one uses the whole split
CORE_EXAMPLES = 500             # questions per task of --core_dir
COMPRESSED_TOKENS = 2 ** 22     # larger val splits are not compressed, because xz is slow
SAMPLE_PROMPTS = ("The", "Return the")
SAMPLES = 8                     # of each prompt, whose words are looked up; the first is shown
WORD = re.compile("[a-z]+(?:'[a-z]+)?")
KNOWN_TOKENS = 2 ** 22          # of the train split are read for their words

def val_rows(shards, starts, n_targets, T):
    """The rows that begin at `starts` → inputs, targets (B, T). Where a row is longer than the
    text, its targets are -1, which do not count."""
    x = torch.zeros(len(starts), T, dtype=torch.long)
    y = torch.full((len(starts), T), -1)
    for b, start in enumerate(starts):
        length = min(T, n_targets - start)
        row = torch.from_numpy(shards.read(start, length + 1))
        x[b, :length] = row[:-1]
        y[b, :length] = row[1:]
    return x, y

@torch.inference_mode()
def evaluate(model, shards, token_bytes, T, batch_size, ranks, max_tokens=None):
    """How well a model predicts a split → (val_loss, val_bpb), the same on every rank.

    val_loss is in nats per token. val_bpb is in bits per byte of text:
        val_bpb = total nats / (ln 2 · total bytes), excluding <|endoftext|>, which is not text
    It compares models with different tokenizers with each other, and with gzip. None: no text.

    token_bytes: int64 (V,), the bytes of text that each token stands for; 0: not text.
    max_tokens: how much of the split is read, from its beginning; default: all of it.
    """
    model.eval()
    n_targets = shards.n_tokens - 1
    if max_tokens:
        n_targets = min(n_targets, max_tokens)
    starts = range(0, n_targets, T)
    nats = n_tokens = text_nats = text_bytes = 0.0
    token_bytes = token_bytes.cpu()
    for first in range(ranks.rank * batch_size, len(starts), batch_size * ranks.world_size):
        x, y = val_rows(shards, starts[first:first + batch_size], n_targets, T)
        losses = model(x.to(ranks.device), y.to(ranks.device), reduction="none")    # (B, T)
        losses = losses.cpu().double()      # Apple's GPUs have no fp64
        n_bytes = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)               # (B, T)
        nats += losses.sum().item()
        n_tokens += (y >= 0).sum().item()
        text_nats += losses[n_bytes > 0].sum().item()
        text_bytes += n_bytes.sum().item()
    model.train()
    nats, n_tokens, text_nats, text_bytes = ranks.sum(nats, n_tokens, text_nats, text_bytes)
    val_bpb = None
    if text_bytes:
        val_bpb = text_nats / math.log(2) / text_bytes
    return nats / n_tokens, val_bpb

def compressors_bpb(shards, tokenizer):
    """Bits per byte of gzip -9 and xz -9e on the text of a split, which must not be empty."""
    ids = [i for i in shards.read(0, shards.n_tokens).tolist() if i != tokenizer.eot]
    text = tokenizer.decode_bytes(ids)
    gzipped = gzip.compress(text, 9)
    xzipped = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return {"gzip": 8 * len(gzipped) / len(text), "xz": 8 * len(xzipped) / len(text)}

def benchmark_scores(engine, core_dir, ranks):
    """Accuracy on HellaSwag and the CORE metric, of CORE_EXAMPLES questions a task."""
    from eval import scores
    return scores(engine, core_dir, CORE_EXAMPLES, ranks)

def show_compressors(log, step, val_shards, tokenizer, val_bpb):
    """Logs the model's bits per byte beside those of gzip and xz."""
    if val_bpb is None or val_shards.n_tokens >= COMPRESSED_TOKENS:
        return
    others = compressors_bpb(val_shards, tokenizer)
    log.say(f"val bits per byte: this model {val_bpb:.4f}, gzip -9 {others['gzip']:.4f}, "
            f"xz -9e {others['xz']:.4f}", step=step, val_bpb=val_bpb, **others)

def known_words(shards, tokenizer):
    """The set of words, in lower case, in the first KNOWN_TOKENS tokens of a split."""
    ids = shards.read(0, min(shards.n_tokens, KNOWN_TOKENS)).tolist()
    return set(WORD.findall(tokenizer.decode(ids).lower()))

def show_samples(log, step, engine, known):
    """Logs how the model continues each of SAMPLE_PROMPTS that leaves room in its context, and
    which share of the words that it wrote are among `known`, the words of the training text.

    The first and the last word of a sample do not count, since they may be parts of words.
    """
    written = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        if len(engine.prompt_ids(prompt)) >= engine.model.config.block_size:
            continue
        completions = engine.generate([prompt], 48, num_samples=SAMPLES, temperature=0.8, seed=seed)
        texts = [engine.tokenizer.decode(completion.ids) for completion in completions]
        for text in texts:
            written += WORD.findall(text.lower())[1:-1]
        log.say(f"  sample: {prompt}{texts[0]!r}", step=step, sample=prompt + texts[0])
    if written:
        share = sum(1 for word in written if word in known) / len(written)
        log.say(f"  words: {share:.1%} of {len(written)} stand in the training text", step=step,
                known_words=share)

def check_first_loss(val_loss, config):
    """Stops a new model whose first loss shows that the code is broken. The model knows nothing, so
    its logits are noise of some variance v, and its loss is ln V + v / 2. GPT-2's logits sum over C
    channels of variance 1 times weights of standard deviation 0.02; those of dN are near 0."""
    expected = math.log(config.vocab_size)
    if not config.rms_norm:
        expected += 0.02 ** 2 * config.n_embd / 2
    if not 0.95 < val_loss / expected < 1.05:
        raise SystemExit(f"val_loss is {val_loss:.4f} before step 1, but an untrained model's is "
                         f"{expected:.4f}, about ln({config.vocab_size}); the model or the loss is "
                         "broken: run make test")

# ---- What main() is made of ----------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description="pretrain a GPT on token shards")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="flags of a known run, from "
                        "recipe.py; those that are given too count more")
    parser.add_argument("--model", default="d12", help="gpt2 … gpt2-xl, or dN for N layers")
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE",
                        help="other fields of GPTConfig: n_embd=128 n_head=4 block_size=256 …")
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue from <out>/state, if any")
    parser.add_argument("--init_from", help="start from a run's weights, or from gpt2 … gpt2-xl")
    parser.add_argument("--max_steps", type=int, help="steps (default: from the model's size)")
    parser.add_argument("--ratio", type=float, help="tokens to train on for each weight that "
                        "multiplies a token (default: 8 for dN), instead of --max_steps")
    parser.add_argument("--total_batch_size", type=int, help="tokens per step, over all ranks")
    parser.add_argument("--batch_size", type=int, help="rows per rank at a time")
    parser.add_argument("--seq_len", type=int, help="tokens per row (default and maximum: the "
                        "model's block_size)")
    parser.add_argument("--lr", type=float, help="peak learning rate: AdamW's, or for dN Muon's")
    parser.add_argument("--final_lr", type=float, help="share of the peak to which the learning "
                        "rate falls (default: 0.05 for dN, 0 for GPT-2)")
    parser.add_argument("--eval_every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--core_dir", help="eval_bundle folder: also evaluate HellaSwag and CORE")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--gpu_hour_usd", type=float, help="price of a GPU hour, to show the cost")
    parser.add_argument("--seed", type=int, default=1337, help="seed of weights and row order")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--fp8", type=int, default=0, choices=(0, 1),
                        help="1: multiply in 8 bits (H100 or later)")
    parser.add_argument("--bf16", type=int, choices=(0, 1, 2), help="1: multiply in bf16 while "
                        "training; 2: and send gradients in bf16; default: 1 where it is faster")
    parser.add_argument("--deterministic", type=int, default=0, choices=(0, 1),
                        help="1: repeatable bits on a GPU")
    parser.add_argument("--profile", action="store_true", help="trace steps 10-12 into <out>")
    parser.set_defaults(warmdown=None)      # no flag: a recipe may set it
    args = parser.parse_args()
    check_at_least(1, args, "total_batch_size", "batch_size", "seq_len", "eval_every", "save_every")
    check_at_least(0, args, "max_steps", "gpu_hour_usd", "seed", "final_lr")
    if args.seed >= 2 ** 63:
        raise SystemExit(f"--seed must be below {2 ** 63}, got {args.seed}")
    check_above_0(args, "lr", "ratio")
    if args.ratio and args.max_steps is not None:
        raise SystemExit("--ratio and --max_steps both say how long the run is; leave one out")
    if args.recipe:
        parser.set_defaults(**RECIPES[args.recipe])
        args = parser.parse_args()
    choose_device(args.device)
    return args

YES_OR_NO = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}

def parse_config(given):
    """--config KEY=VALUE … → {field of GPTConfig: value of its type}."""
    names = [name for name in GPTConfig.__dataclass_fields__ if name != "vocab_size"]
    fields = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in names:
            raise SystemExit(f"--config {text}: GPTConfig has no such field that can be set; use "
                             f"one of {', '.join(names)}")
        kind = type(getattr(GPTConfig, name))
        try:
            fields[name] = parse_field(kind, value)
        except ValueError:
            wanted = {bool: "1 or 0", int: "an integer", float: "a number"}[kind]
            raise SystemExit(f"--config {text}: {name} must be {wanted}; try --config "
                             f"{name}={getattr(GPTConfig, name):g}") from None
    return fields

def parse_field(kind, text):
    """A text as bool, int, float or str; ValueError if it is not one."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in YES_OR_NO:
        raise ValueError
    return YES_OR_NO[text.lower()]

def build_model(args, tokenizer, device):
    """The model that --init_from names, or a new one as --model and --config describe it."""
    if args.init_from and args.config:
        raise SystemExit(f"--config {args.config[0]} cannot be combined with --init_from, which "
                         "brings its own shape; leave --config out (--seq_len makes rows shorter)")
    if args.init_from:
        run = find_run(args.init_from)
        check_same_tokenizer(run, args.init_from, tokenizer)
        return load_checkpoint(run, vocab_size=tokenizer.n_vocab)[0]
    fields = {"vocab_size": tokenizer.n_vocab}
    if find_kernel(device)[0] is sdpa:  # only the other kernels skip the keys outside of a window
        fields["windows"] = "L"
    fields |= parse_config(args.config)
    return GPT(GPTConfig.preset(args.model, **fields))

def row_tokens(args, config):
    """T, the tokens of a row: --seq_len, or as many as the model has positions."""
    T = args.seq_len or config.block_size
    if not 1 <= T <= config.block_size:
        raise SystemExit(f"--seq_len must be 1 to {config.block_size}, the model's block_size, got "
                         f"{T}")
    return T

@dataclass
class Progress:
    """What changes from step to step, beside weights, optimizer and generators. It is saved with
    them, so that a resumed run continues from it."""
    step: int = 0           # updates so far
    position: int = 0       # rows that all ranks have read
    usd: float = 0.0        # what the run has cost
    losses: list = field(default_factory=list)      # of the last SPIKE_WINDOW steps
    norms: list = field(default_factory=list)

    @classmethod
    def of(cls, state, rows_a_step, run):
        """state: what load_state returned. Raises SystemExit if its values do not fit together."""
        try:
            numbers = [state["usd"], *state["losses"], *state["norms"]]
            fits = state["position"] == state["step"] * rows_a_step
            fits = fits and all(isinstance(number, (int, float)) for number in numbers)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise SystemExit(f"{run}/state holds a damaged state.json; remove its folder, or "
                             "choose another --out")
        return cls(**{name: state[name] for name in cls.__dataclass_fields__})

    def window(self, ranks):
        """The last losses and norms as is_spike wants them, on the device."""
        values = [self.losses, self.norms]
        return torch.tensor(values, dtype=torch.float64, device=ranks.fp64_device)

    def remember(self, loss, norm):
        """Of a step whose numbers have arrived."""
        self.losses = [*self.losses, loss][-SPIKE_WINDOW:]
        self.norms = [*self.norms, norm][-SPIKE_WINDOW:]

def sum_over_ranks(ranks, loss, square, n_signals):
    """A rank's mean loss, the sum of the squares of its gradients, and how many signals it caught →
    a tensor on the device: the loss, the norm of the gradient, and the signals of all ranks."""
    loss = loss.to(square.device).to(square.dtype) / ranks.world_size
    totals = ranks.sum_tensor(torch.stack([loss, square, torch.full_like(square, n_signals)]))
    totals[1].sqrt_()
    return totals

class Outcome:
    """The numbers of a step, on their way from the device. They are read when the next step has
    been handed out, and until then a GPU is never without work."""

    def __init__(self, step, started, lr, numbers):
        self.step = step
        self.started = started      # when Python began to hand it out
        self.lr = lr
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.arrival = None
        if numbers.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def read(self):
        """Waits until this step is done, not for those after it."""
        if self.arrival:
            self.arrival.synchronize()
        return self.numbers.tolist()

class Meter:
    """Measures steps, for the figures of their log lines: time, speed, cost, and time left."""

    def __init__(self, args, model, T, ranks, earlier_usd):
        self.step_tokens = args.total_batch_size
        self.step_flops = model.flops_per_token(T) * self.step_tokens / ranks.world_size
        self.peak = peak_flops(ranks.device)
        self.usd_per_second = (args.gpu_hour_usd or 0) * ranks.world_size / 3600
        self.earlier_usd = earlier_usd
        self.seconds = []       # of the last 20 steps
        self.started = self.ended = time.perf_counter()

    def usd(self):
        """The cost so far, with evaluations and saving, and with the processes before --resume."""
        return self.earlier_usd + (time.perf_counter() - self.started) * self.usd_per_second

    def figures(self, started, steps_left):
        """Of the step that has just ended, and of the run so far. None: unknown, not shown. It
        began at `started`, or when the step before it ended, if a GPU was still busy with that."""
        began = max(started, self.ended)
        self.ended = time.perf_counter()
        seconds = self.ended - began
        self.seconds = [*self.seconds[-19:], seconds]
        mfu = None
        if self.peak:
            mfu = self.step_flops / seconds / self.peak
        return dict(ms=1000 * seconds, tok_s=self.step_tokens / seconds, usd=self.usd() or None,
                    mfu=mfu, eta=sum(self.seconds) / len(self.seconds) * steps_left)

def log_plan(log, args, model, T, ranks, grad_accum_steps, n_tokens):
    """The lines after the log's header: the batch, the length of the run, sizes, and kernels."""
    B = args.batch_size
    epochs = args.max_steps * args.total_batch_size / n_tokens
    log.say(f"{args.total_batch_size} tokens a step = {B} rows x {T} tokens x {ranks.world_size} "
            f"ranks x {grad_accum_steps} accumulated; {args.max_steps} steps = {epochs:.2f} epochs "
            f"of {n_tokens:,} tokens")
    fixed, row = memory_bytes(model, T, ranks.world_size)
    log.say(f"{model.matmul_params():,} parameters in matmuls, {model.flops_per_token(T):.3g} FLOP "
            f"a token; about {(fixed + B * row) / 1e9:.1f} GB of memory a rank, of which a row "
            f"takes {row / 1e9:.2f} GB")
    log.say(f"attention windows {model.config.windows}: {find_kernel(ranks.device)[1]}")
    log.say(find_compiler(ranks.device)[1])
    if args.bf16 is None:
        from precision import find_bf16
        log.say(find_bf16(ranks.device)[1])

def training_hidden(model, exchange, ranks):
    """A function that computes model.hidden in a training step: compiled, and with weights that
    are cast when they are new.

    On one rank the model is compiled as a whole. Several ranks compile a layer, because a compiled
    backward gives its gradients away at its end: so each layer's can leave when they are finished,
    and its weights may arrive while the layers before it compute.
    """
    compiler, _ = find_compiler(ranks.device)
    whole = compiler(model.hidden)
    one_layer = compiler(run_layer)

    def layer(block, *inputs):
        if exchange.wait_for(block.attn.layer):
            model.cast_weights(block)
        return one_layer(block, *inputs)

    def hidden_by_layers(x):
        exchange.wait_for(exchange.first)
        y = model.hidden(x, run_layer=layer)
        if exchange.wait_for(exchange.head):
            model.cast_weights(model.lm_head)
        return y

    def hidden(x):
        if exchange.wait_for(exchange.first):
            model.cast_weights()
        return whole(x)

    if ranks.world_size > 1:
        return hidden_by_layers
    return hidden

@contextmanager
def named_failures(ranks, step, phase):
    """If memory runs out, or if another rank is lost in a collective, this rank ends with one line
    that says which rank it is and what it was doing."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"rank {ranks.rank}, step {step}, {phase}: {str(error).splitlines()[0]}; "
                         "halve --batch_size (the result is the same, with more accumulation)"
                         ) from None
    except RuntimeError as error:
        if ranks.world_size == 1:
            raise
        raise SystemExit(f"rank {ranks.rank} of {ranks.world_size}, step {step}, {phase}: "
                         f"{str(error).splitlines()[0][:200]}; see what the rank that ended first "
                         "has said, then continue with --resume") from error

def make_profiler(run, ranks, log):
    """Traces steps 10-12 → <run>/trace.json (for chrome://tracing or ui.perfetto.dev), and logs the
    15 operations that took longest."""
    def show(profiler):
        by = "self_cuda_time_total" if "cuda" in ranks.device else "self_cpu_time_total"
        log.say(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))
        profiler.export_chrome_trace(str(run / "trace.json"))
    steps = torch.profiler.schedule(wait=8, warmup=1, active=3, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=show)

# ---- Main ----------------------------------------------------------------------------------------

def main():
    args = parse_args()
    run = Path(args.out)
    tokenizer = data_tokenizer(args.data)
    train_shards = Shards(args.data, "train", tokenizer.n_vocab)
    val_shards = Shards(args.data, "val", tokenizer.n_vocab)
    check_shards(args.data)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    ranks = init_ranks(args.device)
    torch.manual_seed(args.seed)
    model = build_model(args, tokenizer, ranks.device)
    model.use(ranks.device, args.fp8, args.bf16)
    config = model.config
    T = row_tokens(args, config)
    most = most_rows(model, T, ranks.world_size, ranks.device)
    grad_accum_steps = plan_batch(model, args, ranks.world_size, most)
    B = args.batch_size
    loader = Loader(train_shards, T, args.seed)
    optimizer = make_optimizer(model, ranks, args.lr, args.total_batch_size)
    if args.bf16 == 2:
        optimizer.exchange.dtype = torch.bfloat16
    engine = Engine(model, tokenizer)
    token_bytes = torch.from_numpy(tokenizer.token_bytes().astype(np.int64))
    known = known_words(train_shards, tokenizer)

    # norm_scales is left out where it is off, so that runs from before it existed can be resumed
    shape = {name: value for name, value in vars(config).items() if name != "norm_scales" or value}
    settings = dict(model=shape, total_batch_size=args.total_batch_size,
                    seq_len=T, max_steps=args.max_steps, seed=args.seed, lr=args.lr,
                    final_lr=args.final_lr, warmdown=args.warmdown, fp8=args.fp8, bf16=args.bf16,
                    tokenizer=tokenizer.sha256, n_tokens=train_shards.n_tokens)
    state = load_state(run, args.resume, ranks, optimizer, model, settings)
    progress = Progress()
    resume_step = None
    if state:
        progress = Progress.of(state, args.total_batch_size // T, run)
        resume_step = progress.step
    log = RunLog(run, args.max_steps, ranks, resume_step=resume_step)
    if progress.step >= args.max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "pretrain", progress.step,
                               args.max_steps)
    log.header(args, model, ranks.device)
    log_plan(log, args, model, T, ranks, grad_accum_steps, train_shards.n_tokens)
    exchange = optimizer.exchange
    hidden = training_hidden(model, exchange, ranks)        # evaluations and samples stay eager
    profiler = None
    if args.profile and ranks.is_main:
        profiler = make_profiler(run, ranks, log)
        profiler.start()

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "pretrain", dict(val_bpb=val_bpb),
                 **vars(progress), settings=settings)

    def report(outcome):
        """Logs a step whose numbers the device has computed; it may end the run."""
        nonlocal stop
        loss, norm, n_signals, is_skipped = outcome.read()
        check_finite(f"step {outcome.step}", loss, norm)
        stop = stop or n_signals > 0
        if is_skipped:
            log.say(f"step {outcome.step}: skipped, loss {loss:.4f} or norm {norm:.4f} stands out "
                    f"of the last {SPIKE_WINDOW}", step=outcome.step, skipped=True)
        progress.remember(loss, norm)
        log(outcome.step, loss=loss, lr=outcome.lr, norm=norm,
            **meter.figures(outcome.started, args.max_steps - outcome.step))

    def batch(micro_step):
        """This rank's rows of a micro-step. The one after the last is the next step's first."""
        first = progress.position + (micro_step * ranks.world_size + ranks.rank) * B
        return loader.batch(first, B, ranks.device)

    first_step = progress.step
    signals = catch_signals()       # from here on they end the run after a step, with a saved state
    stop = False
    outcomes = []                   # of steps that were handed out and not yet read
    window = progress.window(ranks)
    val_bpb = None
    with named_failures(ranks, first_step, "the first collective"):
        ranks.sum(1)
    meter = Meter(args, model, T, ranks, progress.usd)
    model.train()
    x, y = batch(0)
    while True:
        step = progress.step
        is_last = step == args.max_steps
        is_new = step == 0 or step > first_step     # a resumed run has evaluated its first step
        evaluates = is_new and (is_last or step % args.eval_every == 0)
        saves = step > first_step and step % args.save_every == 0
        if is_last or stop or evaluates or saves:
            with named_failures(ranks, step, "training"):
                for outcome in outcomes:
                    report(outcome)
                exchange.wait()
            outcomes = []

        if evaluates:
            with named_failures(ranks, step, "evaluation"):
                val_tokens = None if is_last else VAL_TOKENS
                val_loss, val_bpb = evaluate(model, val_shards, token_bytes, T, B, ranks,
                                             val_tokens)
                figures = {"val_loss": val_loss, "val_bpb": val_bpb}
                if args.core_dir:
                    figures |= benchmark_scores(engine, args.core_dir, ranks)
                log(step, **figures)
                if step == 0 and not args.init_from:
                    check_first_loss(val_loss, config)
                if ranks.is_main:
                    show_samples(log, step, engine, known)
                    if is_last:
                        show_compressors(log, step, val_shards, tokenizer, val_bpb)

        if is_last or stop or saves:
            progress.usd = meter.usd()
            with named_failures(ranks, step, "saving"):
                save()
        if is_last or stop:
            break

        with named_failures(ranks, step, "training"):
            started = time.perf_counter()
            loss = torch.zeros((), device=ranks.device)
            for micro_step in range(grad_accum_steps):
                micro_loss = model.loss(hidden(x), y) / grad_accum_steps
                if micro_step == grad_accum_steps - 1:
                    exchange.expect()
                micro_loss.backward()
                loss += micro_loss.detach()
                x, y = batch(micro_step + 1)        # while a GPU is still busy with the backward
            totals = sum_over_ranks(ranks, loss, optimizer.reduce_grads(), len(signals))
            values = totals[:2]                     # loss and norm
            skip = is_spike(window, values)
            window = torch.cat([window, values[:, None]], 1)[:, -SPIKE_WINDOW:]
            lr_scale, momentum, decay_scale = schedule(step, args.max_steps, config.rms_norm,
                                                       args.final_lr, args.warmdown)
            grad_scale = 1.0            # the modern recipe does not clip: it would never act
            if not config.rms_norm:
                grad_scale = (1 / (values[1] + 1e-6)).clamp(max=1.0)
            optimizer.step(lr_scale, grad_scale, momentum, decay_scale, skip, wait=False)
            progress.step += 1
            progress.position += args.total_batch_size // T
            outcomes.append(Outcome(progress.step, started, lr_scale * optimizer.groups[0]["lr"],
                                    torch.cat([totals, skip[None]])))
            if outcomes[1:] or not ranks.runs_ahead:
                report(outcomes.pop(0))
        if profiler:
            profiler.step()
        if step == first_step:
            gc.collect()
            gc.freeze()     # else a collection takes half a second now and then

    if profiler:
        profiler.stop()
    finish(log, run, "pretrain", step, stopped=stop and not is_last)

if __name__ == "__main__":
    with quiet_end():
        main()
