r"""
Pretraining: token shards → a base model that continues documents.

    python train_gpt2.py --model d4 --config block_size=256 \
        --data data/demo --out runs/demo                                                   # CPU
    python train_gpt2.py --model gpt2 --data data/fineweb --out runs/gpt2                  # 1 GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py \
        --model d24 --data data/fineweb --out runs/d24                                     # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_gpt2.py --model d24 --data data/fineweb --out runs/d24                       # 2 nodes

    in:  <data>/*_train_*.bin, *_val_*.bin (llm.c's shards too), <data>/tokenizer
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

Three numbers decide a step: total_batch_size tokens (a property of the model), batch_size rows of
seq_len tokens on each rank at a time (what fits in memory), and the number of ranks. The rest is
arithmetic: grad_accum_steps = total_batch_size / (batch_size * seq_len * world_size).

Rows are cut from the shards back to back, so a row may hold the end of one document and the start
of the next, and they attend to each other: masking that was measured to gain 0.1 % for a third of
the speed (open_lm issue 206).

Papers: GPT-2 and GPT-3 (arXiv 2005.14165) for the AdamW presets, MiniCPM (2404.06395) for the
trapezoidal schedule, Chinchilla (2203.15556) for tokens per parameter, Power Lines (2505.13738) for
batch size against tokens.
Differs from the papers: constants are nanochat's for dN and llm.c's for gpt2…gpt2-xl.
"""
import argparse
import gc
import gzip
import lzma
import math
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from bpe import Tokenizer
from eval import scores
from model import GPT, GPTConfig, find_compiler, find_kernel, load_checkpoint, sdpa
from sample import Engine, find_run
from training import (D12_MATMUL_PARAMS, RunLog, already_trained, catch_signals, check_finite,
                      finish, init_ranks, load_state, make_optimizer, save_run)

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
    """Rows of T + 1 tokens in a seeded order, each once an epoch; position = rows read."""

    def __init__(self, shards, T, seed):
        self.shards, self.T, self.seed = shards, T, seed
        self.n_rows = (shards.n_tokens - 1) // T
        if self.n_rows < 1:
            raise SystemExit(f"the shards hold {shards.n_tokens} tokens; a row needs "
                             f"{T + 1}; prepare more text, or lower --seq_len")
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

VAL_TOKENS, CORE_EXAMPLES = 2 ** 20, 500    # of an evaluation; only the last val_loss is of all

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
    warmup = min(40, max_steps // 10)
    warmdown = 0.65 * max_steps     # the last 65 % go down linearly to 5 %
    left = min(1.0, (max_steps - step) / warmdown)
    lr_scale = min(1.0, (step + 1) / max(1, warmup)) * (0.05 + 0.95 * left)
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    momentum = momentum if left == 1 else 0.90 + (momentum - 0.90) * left
    return lr_scale, momentum, 0.5 * (1 + math.cos(math.pi * step / max_steps))

GPT2_MATMUL_PARAMS = 12 * 12 * 768 ** 2 + 50257 * 768     # of the 124M

def plan_batch(model, args, world_size, most_rows):
    """Fills in max_steps, total_batch_size, batch_size where no flag did; → grad_accum_steps."""
    config, size = model.config, model.matmul_params()
    T = args.seq_len or config.block_size
    if config.rms_norm:     # 8 tokens a parameter reach GPT-2 at d24; batch ∝ tokens^.383
        tokens, scale = 8 * size, (size / D12_MATMUL_PARAMS) ** 0.383
    else:                   # through llm.c's runs: 10B tokens for 124M, 33.6B by 2²⁰ for 1558M
        times = size / GPT2_MATMUL_PARAMS
        tokens, scale = 1e10 * times ** 0.48, times ** 0.27
    if not args.total_batch_size:
        args.total_batch_size = 2 ** round(math.log2(2 ** 19 * scale))
    if not args.batch_size:             # the most rows that fit and divide the batch
        rows = args.total_batch_size // (T * world_size)
        args.batch_size = max((n for n in range(1, most_rows + 1) if rows % n == 0), default=1)
    micro_tokens = args.batch_size * T * world_size
    if args.total_batch_size % micro_tokens:
        nearest = max(1, round(args.total_batch_size / micro_tokens)) * micro_tokens
        raise SystemExit(f"total_batch_size {args.total_batch_size} is not a multiple of "
                         f"batch_size*seq_len*world_size = {micro_tokens}; it is split evenly; "
                         f"try --total_batch_size {nearest}")
    if args.max_steps is None:
        args.max_steps = max(1, round(tokens / args.total_batch_size))
    return args.total_batch_size // micro_tokens

def memory_bytes(model, T, world_size):
    """An estimate of (fixed, a row's) memory on a rank: in fp32 weights, gradients and this rank's
    share of Adam's two moments (Muon has one); weights once more in the dtype of the matmuls;
    activations at 34 C bytes a token and layer in 16 bits (arXiv 2205.05198, eq. 2, less T x T)."""
    config, width = model.config, model.compute_dtype.itemsize
    params = sum(p.numel() for p in model.parameters())
    muon = sum(p.numel() for p in model.h.parameters()) if config.rms_norm else 0
    row = 34 * config.n_embd * T * config.n_layer * width // 2
    return 4 * (2 * params + (2 * params - muon) // world_size) + params * width, row

def most_rows(model, T, world_size, device):
    """Rows that a micro-batch should have at most: on a GPU what fits into its memory, but no more
    than 32; on a CPU 2048 tokens, whose activations stay in the cache."""
    fixed, row = memory_bytes(model, T, world_size)
    if "cuda" not in device:
        return max(1, 2048 // T)
    free = 0.85 * torch.cuda.mem_get_info()[0] - 2 ** 30        # the loss's chunk, and cuBLAS
    return max(1, min(32, int((free - fixed) // row)))

def peak_flops(device):
    """Dense bf16 FLOP/s of common GPUs, by their data sheets; None: unknown, no MFU is shown."""
    if "cuda" not in device:
        return None
    name = torch.cuda.get_device_name().upper()
    known = {"H100 PCIE": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}
    return next((flops for key, flops in known.items() if key in name), None)

SPIKE_WINDOW, SPIKE_Z = 128, 7.0        # llm.c's window, and what its GPT-2 1558M run was given

def is_spike(window, value):
    """Whether a value stands out of the last SPIKE_WINDOW, by its z-score."""
    if len(window) < SPIKE_WINDOW:
        return False
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in window) / len(window))
    return value - mean > SPIKE_Z * deviation

# ---- Main ----------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description="pretrain a GPT on token shards")
    parser.add_argument("--model", default="d12", help="gpt2 … gpt2-xl, or dN: N layers")
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE",
                        help="other fields of GPTConfig: n_embd=128 n_head=4 block_size=256 …")
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue from <out>/state, if any")
    parser.add_argument("--init_from", help="weights and shape: a run's folder, or gpt2 … gpt2-xl")
    parser.add_argument("--max_steps", type=int, help="steps (default: by the model's size)")
    parser.add_argument("--total_batch_size", type=int, help="tokens a step, over all ranks")
    parser.add_argument("--batch_size", type=int, help="rows at a time on one rank")
    parser.add_argument("--seq_len", type=int, help="tokens of a row (default, and at most: the "
                        "model's block_size)")
    parser.add_argument("--lr", type=float, help="AdamW's, or for dN Muon's, peak learning rate")
    parser.add_argument("--eval_every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--core_dir", help="eval_bundle folder: evaluate HellaSwag and CORE, too")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--gpu_hour_usd", type=float, help="price of one GPU hour: shows the cost")
    parser.add_argument("--seed", type=int, default=1337, help="of the weights and the rows' order")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--fp8", type=int, default=0, help="1: multiply in 8 bits (H100 or later)")
    parser.add_argument("--deterministic", type=int, default=0, help="1: the same bits on a GPU")
    parser.add_argument("--profile", action="store_true", help="trace steps 10-12 into <out>")
    return parser.parse_args()

def build_model(args, tokenizer, kernel):
    if args.init_from and args.config:
        raise SystemExit(f"--config {args.config[0]} with --init_from {args.init_from}; a "
                         "checkpoint has its own shape; leave --config out (for shorter rows there "
                         "is --seq_len)")
    if args.init_from:
        return load_checkpoint(find_run(args.init_from), vocab_size=tokenizer.n_vocab)[0]
    # without a kernel that skips what lies outside of them, windows only cost
    fields = dict(vocab_size=tokenizer.n_vocab, **({} if kernel is not sdpa else {"windows": "L"}))
    for given in args.config:
        key, _, value = given.partition("=")
        if key not in GPTConfig.__dataclass_fields__ or key == "vocab_size":
            raise SystemExit(f"--config {given}: no such field; they are "
                             f"{', '.join(GPTConfig.__dataclass_fields__)}, less vocab_size, which "
                             "is the tokenizer's; try --config block_size=256")
        kind = type(getattr(GPTConfig, key))
        try:
            fields[key] = value in ("1", "True", "true") if kind is bool else kind(value)
        except ValueError:
            raise SystemExit(f"--config {given}: {value!r} is no {kind.__name__}; fields have the "
                             "types of GPTConfig; try --config n_embd=128") from None
    config = GPTConfig.preset(args.model, **fields)
    C, NH = config.n_embd, config.n_head
    if C % NH:
        raise SystemExit(f"n_embd {C} is not a multiple of n_head {NH}; heads are equally wide; "
                         f"try --config n_embd={C // NH * NH}")
    return GPT(config)

@contextmanager
def named_failures(ranks, where):
    """A rank that loses another in a collective says which it is and where, then ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"rank {ranks.rank}, {where()}: {str(error).splitlines()[0]}; a step "
                         "takes the same in smaller pieces; halve --batch_size") from None
    except RuntimeError as error:
        if ranks.world_size == 1:
            raise
        raise SystemExit(f"rank {ranks.rank} of {ranks.world_size}, {where()}: "
                         f"{str(error).splitlines()[0][:200]}; a rank ends when another is gone; "
                         "see what that one said, then continue with --resume") from error

def make_profiler(run, ranks, log):
    """Steps 10-12 → <run>/trace.json (chrome://tracing, ui.perfetto.dev), and the 15 longest."""
    def show(profiler):
        cuda = "cuda" in ranks.device
        by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        log.say(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))
        profiler.export_chrome_trace(str(run / "trace.json"))
    steps = torch.profiler.schedule(wait=8, warmup=1, active=3, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=show)

def main():
    args = parse_args()
    run = Path(args.out)
    train_shards, val_shards = Shards(args.data, "train"), Shards(args.data, "val")
    folder = Path(args.data) / "tokenizer"
    tokenizer = Tokenizer.load(folder) if folder.exists() else Tokenizer.pretrained("gpt2")
    signals, stop = catch_signals(), False
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    ranks = init_ranks(args.device)
    torch.manual_seed(args.seed)
    kernel, why = find_kernel(ranks.device)
    model = build_model(args, tokenizer, kernel).use(ranks.device, fp8=args.fp8)
    config, V = model.config, model.config.vocab_size
    T = args.seq_len or config.block_size
    if not 1 <= T <= config.block_size:
        raise SystemExit(f"--seq_len {T}; the model has {config.block_size} positions, and a row 1 "
                         f"to as many; try --seq_len {config.block_size}")
    grad_accum_steps = plan_batch(model, args, ranks.world_size,
                               most_rows(model, T, ranks.world_size, ranks.device))
    optimizer = make_optimizer(model, ranks, args.lr, args.total_batch_size)
    B = args.batch_size
    loader = Loader(train_shards, T, args.seed)
    token_bytes = torch.from_numpy(tokenizer.token_bytes().astype(np.int64)).to(ranks.device)
    engine = Engine(model, tokenizer)
    settings = dict(model=vars(config), total_batch_size=args.total_batch_size,
                    seq_len=T, max_steps=args.max_steps, seed=args.seed, lr=args.lr, fp8=args.fp8,
                    tokenizer=tokenizer.sha256, n_tokens=train_shards.n_tokens)

    state = load_state(run, args.resume, ranks, optimizer, model, settings)
    first_step = step = state["step"] if state else 0
    position, usd = (state["position"], state["usd"]) if state else (0, 0.0)
    losses, norms = (state["losses"], state["norms"]) if state else ([], [])    # for is_spike
    log = RunLog(run, args.max_steps, ranks, resume_step=step if state else None)
    if step >= args.max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "pretrain", step, args.max_steps)
    log.header(args, model, ranks.device)
    log.say(f"{args.total_batch_size} tokens a step = {B} rows x {T} tokens x "
            f"{ranks.world_size} ranks x {grad_accum_steps} accumulated; {args.max_steps} steps = "
            f"{args.max_steps * args.total_batch_size / train_shards.n_tokens:.2f} epochs of "
            f"{train_shards.n_tokens:,} tokens")
    fixed, row = memory_bytes(model, T, ranks.world_size)
    flops_per_token = model.flops_per_token(T)
    log.say(f"{model.matmul_params():,} parameters in matmuls, {flops_per_token:.3g} FLOP "
            f"a token; memory about {(fixed + B * row) / 1e9:.1f} GB a rank, {row / 1e9:.2f} GB of "
            "it a row: if it does not fit, halve --batch_size")
    log.say(f"attention {config.windows}: {why}")
    compile, why = find_compiler(ranks.device)
    log.say(why)
    hidden = compile(model.hidden)      # of training only: evaluation and samples use the raw model
    peak = peak_flops(ranks.device)
    gpu_usd, earlier_usd = (args.gpu_hour_usd or 0) * ranks.world_size, usd
    started, recent, phase, val_bpb = time.perf_counter(), [], "the first collective", None

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "pretrain", dict(val_bpb=val_bpb),
                 step=step, position=position, usd=usd, losses=losses, norms=norms,
                 settings=settings)

    def batch(micro_step):
        """Rows of a micro-step; one behind the last is the first of the next step."""
        first = position + (micro_step * ranks.world_size + ranks.rank) * B
        return loader.batch(first, B, ranks.device)

    with ExitStack() as stack:
        stack.enter_context(named_failures(ranks, lambda: f"step {step}, {phase}"))
        profiler = args.profile and ranks.is_main and stack.enter_context(
            make_profiler(run, ranks, log))
        ranks.sum(1)
        model.train()
        x, y = batch(0)
        while True:
            last = step == args.max_steps
            if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
                phase = "evaluation"
                val_loss, val_bpb = evaluate(model, val_shards, token_bytes, T, B, ranks,
                                             None if last else VAL_TOKENS)
                figures = {"val_loss": val_loss, "val_bpb": val_bpb}
                if args.core_dir:
                    figures |= scores(engine, args.core_dir, CORE_EXAMPLES, ranks)
                log(step, **figures)
                if step == 0 and not args.init_from and not 0.95 < val_loss / math.log(V) < 1.05:
                    raise SystemExit(f"val_loss {val_loss:.4f} before step 1; an untrained model's "
                                     f"is ln({V}) = {math.log(V):.4f}; the code of the model or "
                                     "of the loss was broken: run make test")
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
                phase = "saving"
                save()
            if last or stop:
                break

            phase, tick = "training", time.perf_counter()
            loss = torch.zeros((), device=ranks.device)
            for micro_step in range(grad_accum_steps):
                micro_loss = model.loss(hidden(x), y) / grad_accum_steps
                micro_loss.backward()
                loss += micro_loss.detach()
                x, y = batch(micro_step + 1)        # while a GPU is still busy with the backward
            norm = optimizer.average_grads()
            loss, stops = ranks.sum(loss.item() / ranks.world_size, len(signals))
            stop = stops > 0
            check_finite(f"step {step}", loss, norm)
            lr_scale, momentum, decay_scale = schedule(step, args.max_steps, config.rms_norm)
            if is_spike(losses, loss) or is_spike(norms, norm):
                log.say(f"step {step + 1}: skipped, loss {loss:.4f} or norm {norm:.4f} stands out "
                        f"of the last {SPIKE_WINDOW}", step=step + 1, skipped=True)
                optimizer.zero_grad()
            else:   # GPT-2 clips at norm 1; the modern recipe's clipping would never act, but cost
                grad_scale = 1.0 if config.rms_norm else min(1.0, 1.0 / (norm + 1e-6))
                optimizer.step(lr_scale, grad_scale, momentum, decay_scale)
            losses, norms = ([*last_ones, value][-SPIKE_WINDOW:]
                             for last_ones, value in ((losses, loss), (norms, norm)))
            step, position = step + 1, position + args.total_batch_size // T

            seconds = time.perf_counter() - tick
            recent = [*recent[-19:], seconds]
            tok_s = args.total_batch_size / seconds
            usd = earlier_usd + (time.perf_counter() - started) / 3600 * gpu_usd
            log(step, loss=loss, lr=lr_scale * optimizer.groups[0]["lr"], norm=norm,
                ms=1000 * seconds, tok_s=tok_s, usd=usd or None,
                mfu=peak and flops_per_token * tok_s / peak / ranks.world_size,
                eta=sum(recent) / len(recent) * (args.max_steps - step))
            if profiler:
                profiler.step()
            if step == first_step + 1:      # collecting garbage takes half a second now and then
                gc.collect()
                gc.freeze()

    finish(log, run, "pretrain", step, stopped=stop and not last)

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
