r"""
Pretraining: token shards → a base model that continues documents.

    python train_gpt2.py --model d4 --data data/demo --out runs/demo --block_size 256      # CPU
    python train_gpt2.py --model gpt2 --data data/fineweb --out runs/gpt2                  # 1 GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py \
        --model d24 --data data/fineweb --out runs/d24                                     # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_gpt2.py --model d24 --data data/fineweb --out runs/d24                       # 2 nodes

    in:  <data>/*_train_*.bin, *_val_*.bin (llm.c's shards too), <data>/tokenizer
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

Three numbers decide a step: total_batch_size tokens (a property of the model), batch_size rows of
block_size tokens on each rank at a time (what fits in memory), and the number of ranks. The rest is
arithmetic: grad_accum_steps = total_batch_size / (batch_size * block_size * world_size).

Rows are cut from the shards back to back, so a row may hold the end of one document and the start
of the next, and they attend to each other: masking that was measured to gain 0.1 % for a third of
the speed (open_lm issue 206).

Papers: GPT-2 and GPT-3 (arXiv 2005.14165) for the AdamW presets, MiniCPM (2404.06395) for the
trapezoidal schedule, Chinchilla (2203.15556) for tokens per parameter, Power Lines (2505.13738) for
batch size against tokens.
Differs from the papers: constants are nanochat's for dN and llm.c's for gpt2…gpt2-xl.
"""
import argparse
import gzip
import lzma
import math
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from bpe import Tokenizer
from model import GPT, GPTConfig, RunLog, init_ranks, load_checkpoint, save_checkpoint
from optim import D12_MATMUL_PARAMS, load_state, make_optimizer, save_state
from sample import Engine

# ---- Data ----------------------------------------------------------------------------------------

MAGIC, TOKEN_TYPES = 20240520, {1: np.uint16, 2: np.uint32}

class Shards:
    """All tokens of a split as one long sequence, read from memory-mapped .bin files."""

    def __init__(self, data, split):
        self.files = sorted(Path(data).glob(f"*{split}_*.bin"))
        if not self.files:
            raise SystemExit(f"{data} holds no *{split}_*.bin; training reads token shards; run "
                             f"python prepare_fineweb.py tokenize --out {data} --tokenizer DIR")
        self.maps = [self.open(path) for path in self.files]
        self.ends = np.cumsum([len(m) for m in self.maps])
        self.n_tokens = int(self.ends[-1])

    @staticmethod
    def open(path):
        header = np.fromfile(path, dtype=np.int32, count=256)
        if len(header) < 256 or header[0] != MAGIC or int(header[1]) not in TOKEN_TYPES:
            found = f"magic {header[0]} version {header[1]}" if len(header) > 1 else "an empty file"
            raise SystemExit(f"{path}: {found}; a shard has magic {MAGIC} and version 1 or 2; "
                             "write it again with python prepare_fineweb.py tokenize")
        dtype = TOKEN_TYPES[int(header[1])]
        size, expected = path.stat().st_size, 1024 + int(header[2]) * np.dtype(dtype).itemsize
        if size != expected:
            raise SystemExit(f"{path} has {size} bytes; its header promises {expected}; it is cut "
                             "short: delete it and run python prepare_fineweb.py tokenize again")
        return np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(int(header[2]),))

    def read(self, start, count):
        """Tokens start … start + count - 1 as int64, across shard borders."""
        pieces = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            begin = start - (int(self.ends[shard - 1]) if shard else 0)
            pieces.append(self.maps[shard][begin:begin + count].astype(np.int64))
            start, count, shard = start + len(pieces[-1]), count - len(pieces[-1]), shard + 1
        return np.concatenate(pieces)

class Loader:
    """Rows of block_size + 1 tokens in a seeded order, each once an epoch; position = rows read."""

    def __init__(self, shards, block_size, seed):
        self.shards, self.T, self.seed = shards, block_size, seed
        self.n_rows = (shards.n_tokens - 1) // block_size
        if self.n_rows < 1:
            raise SystemExit(f"the shards hold {shards.n_tokens} tokens; a row needs "
                             f"{block_size + 1}; prepare more text, or lower --block_size")
        self.epoch, self.order = None, None

    def row(self, position):
        epoch, i = divmod(position, self.n_rows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(self.n_rows)
        return self.shards.read(int(self.order[i]) * self.T, self.T + 1)

    def batch(self, position, batch_size, device):
        """Rows position … position + batch_size - 1 → inputs, targets (B, T) on the device."""
        rows = torch.from_numpy(np.stack([self.row(position + b) for b in range(batch_size)]))
        if "cuda" in device:
            rows = rows.pin_memory().to(device, non_blocking=True)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

@torch.inference_mode()
def evaluate(model, shards, token_bytes, T, batch_size, ranks, max_tokens=None):
    """Val loss in nats a token, and bits per byte of text: (loss, bpb).

    Bits per byte compare models with different tokenizers, and with gzip: nats of the text's tokens
    over ln 2 times their bytes. <|endoftext|> is no text: it counts in neither sum.
    """
    model.eval()
    n = min(shards.n_tokens, (max_tokens or shards.n_tokens) + 1) - 1
    starts = range(0, n, T)
    nats = tokens = text_nats = text_bytes = 0.0
    for first in range(ranks.rank * batch_size, len(starts), batch_size * ranks.world_size):
        rows = [shards.read(s, min(T, n - s) + 1) for s in starts[first:first + batch_size]]
        x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
        for b, row in enumerate(map(torch.from_numpy, rows)):
            x[b, :len(row) - 1], y[b, :len(row) - 1] = row[:-1], row[1:]
        x, y = x.to(ranks.device), y.to(ranks.device)
        losses = model(x, y, reduction="none").double()
        n_bytes = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        nats, tokens = nats + losses.sum().item(), tokens + (y >= 0).sum().item()
        text_nats += losses[n_bytes > 0].sum().item()
        text_bytes += n_bytes.sum().item()
    model.train()
    nats, tokens, text_nats, text_bytes = ranks.sum(nats, tokens, text_nats, text_bytes)
    return nats / max(1, tokens), text_nats / math.log(2) / max(1, text_bytes)

def compressors_bpb(shards, tokenizer):
    """Bits per byte of gzip -9 and xz -9e on the text of these shards."""
    ids = [i for i in shards.read(0, shards.n_tokens).tolist() if i != tokenizer.eot]
    text = tokenizer.decode_bytes(ids)
    packed = dict(gzip=gzip.compress(text, 9),
                  xz=lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}

# ---- The recipe: learning rates, their schedule, the batch size ----------------------------------

def schedule(step, max_steps, modern):
    """→ (lr_scale, momentum, decay_scale) for step 0 … max_steps - 1."""
    if not modern:      # llm.c's GPT-2: linear warm-up, cosine to 0
        warmup = min(700, max_steps // 10)
        if step < warmup:
            return (step + 1) / warmup, 0.95, 1.0
        angle = math.pi * (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1 + math.cos(angle)), 0.95, 1.0
    warmup, ramp = min(40, max_steps // 10), min(400, max_steps // 4)
    warmdown = 0.65 * max_steps     # the last 65 % go down linearly to 5 %
    left = min(1.0, (max_steps - step) / warmdown)
    lr_scale = min(1.0, (step + 1) / max(1, warmup)) * (0.05 + 0.95 * left)
    momentum = 0.85 + 0.12 * min(1.0, step / max(1, ramp))
    momentum = momentum if left == 1 else 0.90 + (momentum - 0.90) * left
    return lr_scale, momentum, 0.5 * (1 + math.cos(math.pi * step / max_steps))

def horizon(model, args, world_size, cuda):
    """Fills in max_steps, total_batch_size, batch_size where no flag did; → grad_accum_steps."""
    config, size = model.config, model.matmul_params()
    # 80 tokens a parameter: llm.c's 10B for 124M
    tokens = size * (args.tokens_per_param or (12 if config.rms_norm else 80))
    if not args.total_batch_size:       # ∝ tokens^.383, 2¹⁹ at d12
        scale = (size / D12_MATMUL_PARAMS) ** 0.383 if config.rms_norm else 1.0
        args.total_batch_size = 2 ** round(math.log2(2 ** 19 * scale))
    if not args.batch_size:             # the most rows that divide the batch and usually fit
        rows, most = args.total_batch_size // (config.block_size * world_size), 32 if cuda else 16
        args.batch_size = max((n for n in range(1, most + 1) if rows % n == 0), default=1)
    micro_tokens = args.batch_size * config.block_size * world_size
    if args.total_batch_size % micro_tokens:
        nearest = max(1, round(args.total_batch_size / micro_tokens)) * micro_tokens
        raise SystemExit(f"total_batch_size {args.total_batch_size} is not a multiple of "
                         f"batch_size*block_size*world_size = {micro_tokens}; it is split evenly; "
                         f"try --total_batch_size {nearest}")
    if args.max_steps is None:
        args.max_steps = max(1, round(tokens / args.total_batch_size))
    return args.total_batch_size // micro_tokens

def peak_flops(device):
    """Dense bf16 FLOP/s of common GPUs, by their data sheets; None: unknown, no MFU is shown."""
    if "cuda" not in device:
        return None
    name = torch.cuda.get_device_name().upper()
    known = {"H100 PCIE": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}
    return next((flops for key, flops in known.items() if key in name), None)

# ---- Main ----------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description="pretrain a GPT on token shards")
    parser.add_argument("--model", default="d12", help="gpt2 … gpt2-xl, or dN: N layers")
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue from <out>/state, if any")
    parser.add_argument("--init_from", help="start from this checkpoint's weights and shape")
    parser.add_argument("--block_size", type=int, help="T, tokens a row (default: the preset's)")
    parser.add_argument("--n_embd", type=int, help="C, channels (default: the preset's)")
    parser.add_argument("--n_head", type=int, help="NH, heads (default: the preset's)")
    parser.add_argument("--max_steps", type=int, help="steps (default: from tokens_per_param)")
    parser.add_argument("--tokens_per_param", type=float, help="tokens a parameter (12; gpt2: 80)")
    parser.add_argument("--total_batch_size", type=int, help="tokens a step, over all ranks")
    parser.add_argument("--batch_size", type=int, help="rows at a time on one rank")
    parser.add_argument("--lr", type=float, help="AdamW's, or for dN Muon's, peak learning rate")
    parser.add_argument("--eval_every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--val_tokens", type=int, default=2 ** 20, help="tokens an eval; last: all")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--gpu_hour_usd", type=float, help="price of one GPU hour: shows the cost")
    parser.add_argument("--seed", type=int, default=1337, help="of the weights and the rows' order")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compile", type=int, help="1: torch.compile (default on a GPU), 0: eager")
    return parser.parse_args()

def build_model(args, tokenizer):
    if args.init_from:
        return load_checkpoint(args.init_from, vocab_size=tokenizer.n_vocab)[0]
    given = {key: getattr(args, key) for key in ("block_size", "n_embd", "n_head")}
    given = {key: value for key, value in given.items() if value is not None}
    # every layer sees all: windows pay only with a kernel that skips what lies outside of them
    config = GPTConfig.preset(args.model, vocab_size=tokenizer.n_vocab, windows="L", **given)
    C, NH = config.n_embd, config.n_head
    if C % NH:
        raise SystemExit(f"n_embd {C} is not a multiple of n_head {NH}; heads are equally wide; "
                         f"try --n_embd {C // NH * NH}")
    return GPT(config)

def main():
    args = parse_args()
    run = Path(args.out)
    train_shards, val_shards = Shards(args.data, "train"), Shards(args.data, "val")
    folder = Path(args.data) / "tokenizer"
    tokenizer = Tokenizer.load(folder) if folder.exists() else Tokenizer.pretrained("gpt2")
    signals, stop = [], False   # a signal is agreed on by all ranks: they leave after the same step
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    ranks = init_ranks(args.device)
    torch.manual_seed(args.seed)
    model = build_model(args, tokenizer).use(ranks.device)
    config, T, V = model.config, model.config.block_size, model.config.vocab_size
    grad_accum_steps = horizon(model, args, ranks.world_size, "cuda" in ranks.device)
    optimizer = make_optimizer(model, ranks, args.lr, args.total_batch_size)
    loader = Loader(train_shards, T, args.seed)
    token_bytes = torch.from_numpy(tokenizer.token_bytes().astype(np.int64)).to(ranks.device)
    engine = Engine(model, tokenizer)
    settings = dict(model=vars(config), total_batch_size=args.total_batch_size,
                    max_steps=args.max_steps, seed=args.seed, lr=args.lr,
                    tokenizer=tokenizer.sha256, n_tokens=train_shards.n_tokens)

    state = load_state(run, args.resume, ranks, optimizer, model, settings)
    step, position = (state["step"], state["position"]) if state else (0, 0)
    log = RunLog(run, args.max_steps, ranks, resume_step=step if state else None)
    if step >= args.max_steps:
        return log.say(f"{run} is trained: step {step} of {args.max_steps}")
    log.header(args, model, ranks.device)
    log.say(f"{args.total_batch_size} tokens a step = {args.batch_size} rows x {T} tokens x "
            f"{ranks.world_size} ranks x {grad_accum_steps} accumulated; {args.max_steps} steps = "
            f"{args.max_steps * args.total_batch_size / train_shards.n_tokens:.2f} epochs of "
            f"{train_shards.n_tokens:,} tokens; {model.flops_per_token():.3g} FLOP a token; "
            f"an untrained model's loss is ln({V}) = {math.log(V):.4f}")
    # only training is compiled: evaluation and samples use the raw model
    use_compile = args.compile if args.compile is not None else "cuda" in ranks.device
    train_model = torch.compile(model, dynamic=False) if use_compile else model
    peak = peak_flops(ranks.device)
    started, first_step, recent = time.time(), step, []

    def save():
        save_state(run, ranks, optimizer, model, step=step, position=position, settings=settings)
        if ranks.is_main:
            save_checkpoint(run, model, tokenizer, stage="pretrain", step=step, val_bpb=val_bpb)

    val_bpb = None
    model.train()
    while True:
        last = step == args.max_steps
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            val_loss, val_bpb = evaluate(model, val_shards, token_bytes, T, args.batch_size, ranks,
                                         None if last else args.val_tokens)
            log(step, val_loss=val_loss, val_bpb=val_bpb)
            if ranks.is_main:
                for i, prompt in enumerate(("The", "Return the")):
                    ids = engine.generate([prompt], 48, temperature=0.8, seed=i)[0].ids
                    text = tokenizer.decode(ids)
                    log.say(f"  sample: {prompt}{text!r}", step=step, sample=prompt + text)
            if last and ranks.is_main and val_shards.n_tokens < 2 ** 22:  # xz is slow
                others = compressors_bpb(val_shards, tokenizer)
                log.say(f"val bits per byte: this model {val_bpb:.4f}, gzip -9 "
                        f"{others['gzip']:.4f}, xz -9e {others['xz']:.4f}",
                        step=step, val_bpb=val_bpb, **others)
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.time()
        loss = torch.zeros((), device=ranks.device)
        for micro_step in range(grad_accum_steps):
            rows = position + (micro_step * ranks.world_size + ranks.rank) * args.batch_size
            x, y = loader.batch(rows, args.batch_size, ranks.device)
            micro_loss = train_model(x, y) / grad_accum_steps
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = optimizer.average_grads()
        loss, stops = ranks.sum(loss.item() / ranks.world_size, len(signals))
        stop = stops > 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SystemExit(f"step {step}: loss {loss}, norm {norm}; training needs finite "
                             "numbers; what was saved is kept; try a lower --lr in another --out")
        lr_scale, momentum, decay_scale = schedule(step, args.max_steps, modern=config.rms_norm)
        # GPT-2 clips at norm 1; the modern recipe never reaches a norm where clipping would matter
        grad_scale = 1.0 if config.rms_norm else min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step(lr_scale, grad_scale, momentum, decay_scale)
        step, position = step + 1, position + args.total_batch_size // T

        seconds = time.time() - tick
        recent = [*recent[-19:], seconds]
        tok_s = args.total_batch_size / seconds
        gpu_hours = (time.time() - started) / 3600 * ranks.world_size
        usd = args.gpu_hour_usd and gpu_hours * args.gpu_hour_usd
        log(step, loss=loss, lr=lr_scale * optimizer.groups[0]["lr"], norm=norm, ms=1000 * seconds,
            tok_s=tok_s, mfu=peak and model.flops_per_token() * tok_s / peak / ranks.world_size,
            usd=usd or None, eta=sum(recent) / len(recent) * (args.max_steps - step))

    if stop and not last:
        log.say(f"stopped and saved at step {step}; continue with the same command and --resume")
        raise SystemExit(130)
    log.say(f"{run}: stage pretrain, step {step}, {time.time() - started:.0f} s")

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
