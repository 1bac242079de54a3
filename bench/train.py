"""
Pretraining beside its peers: tokens per second, and val bits per byte after the same tokens.

    python bench/train.py                                       # speed, two minutes on a quiet CPU
    python bench/train.py --quality 3 --data data/wiki          # bits per byte, with 3 seeds
    python bench/train.py --device cuda --shapes d24            # 1 GPU
    python bench/train.py --sft runs/demo-base --data data/demo --chat data/demo/chat/bits.jsonl
    python bench/train.py --device cuda --shapes d12 --quality 1 --data data/bench/proxy-32768 \
        --max_steps 610

in:  .peers/nanoGPT and .peers/nanochat, checkouts of karpathy's repositories; a peer that is not
     there is reported as not measured. --quality reads token shards and their tokenizer
out: a table, and the same as one line of JSON

All contenders run in this process on the same rows; contenders.py says what each of them brings.
On a CPU they take turns step by step, so that a busy machine slows all of them down alike. A GPU is
not shared, so there each contender runs alone and has all the memory. A step has the tokens that
one GPU of eight would get of the recipe's batch, but it updates all parameters, which eight GPUs
would divide among themselves. MFU is the share of the data sheet's bf16 peak.
"""
import argparse
import gc
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import measure
from bpe import Tokenizer
from contenders import Shape, arms
from measure import (Clock, chosen_shapes, finish, missing, ratio, shape_flags, spread,
                     table)
from model import find_compiler, load_checkpoint
from recipe import peak_flops
from sample import load_tokenizer
from train_gpt2 import Loader, Shards, evaluate
from training import Ranks, make_optimizer

SHAPES = {      # where: {name: modern, L, C, NH, V, T, tokens of a step}
    "cpu": {"gpt2-2k": Shape(False, 4, 128, 4, 2048, 256, 4096),
            "gpt2-50k": Shape(False, 4, 256, 4, 50257, 256, 4096),
            "d4-2k": Shape(True, 4, 128, 4, 2048, 256, 4096)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 1024, 2 ** 16),
             "gpt2-xl": Shape(False, 48, 1600, 25, 50257, 1024, 2 ** 17),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 2 ** 16),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 2 ** 17)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 512, 32, 128),
              "gpt2-xl": Shape(False, 3, 64, 2, 512, 32, 128),
              "d12": Shape(True, 2, 64, 2, 512, 32, 128),
              "d24": Shape(True, 3, 64, 2, 512, 32, 128)}}

# ---- Speed ---------------------------------------------------------------------------------------

def micro_batch(arm, shape, device):
    """Rows at a time, a divisor of the step's rows: as many as the contender asks for; otherwise
    all on a CPU, and on a GPU nanochat's 32, or 16 for models above d12."""
    rows = shape.step_tokens // shape.T
    if arm.rows:
        most = arm.rows
    elif "cuda" not in str(device):
        most = rows
    elif shape.C <= 768:
        most = 32
    else:
        most = 16
    return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)

def train_step(arm, step, x, y, rows, mark=lambda: None):
    """One step of a contender; mark() is called at its beginning, when the gradients are there, and
    after the update."""
    mark()
    for a, b in zip(x.split(rows), y.split(rows)):
        arm.gradients(a, b, len(a) / len(x))
    mark()
    arm.update(step)
    mark()

class Timed:
    """A contender that trains on one batch of random tokens, and the times of its steps."""

    def __init__(self, make, shape, device, warmup):
        self.cuda = "cuda" in str(device)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.device = device
        self.arm = make()
        self.batch = torch.randint(0, shape.V, (2, shape.step_tokens // shape.T, shape.T),
                                   device=device)
        self.rows = micro_batch(self.arm, shape, device)
        self.steps = 0
        self.forget()
        for _ in range(warmup):
            self.step()
        self.forget()

    def forget(self):
        """Drops the times so far."""
        self.ms = []
        self.optimizer_ms = []

    def step(self):
        clock = Clock(self.device)
        x, y = self.batch
        train_step(self.arm, self.steps, x, y, self.rows, clock.mark)
        gradients, optimizer = clock.ms()
        self.ms.append(gradients + optimizer)
        self.optimizer_ms.append(optimizer)
        self.steps += 1

    def row(self, shape, label):
        """The figures of the table."""
        median = statistics.median(self.ms)
        tok_s = 1000 * shape.step_tokens / median
        windows = "L"
        if "ours" in label:
            windows = self.arm.model.config.windows
        memory_gb = None
        if self.cuda:
            memory_gb = torch.cuda.max_memory_allocated() / 1e9
        return dict(
            contender=label, step_tokens=shape.step_tokens, ms=median, spread=spread(self.ms),
            tok_s=tok_s, all_ms=self.ms, rows=self.rows, memory_gb=memory_gb,
            mfu=mfu(shape.flops_per_token(windows) * tok_s, str(self.device)),
            optimizer_share=statistics.median(self.optimizer_ms) / median)

def mfu(flops, device):
    """FLOP/s as a share of the peak; None if the peak is not known."""
    peak = peak_flops(device)
    if not peak:
        return None
    return flops / peak

def alone(make, shape, label, repeats, device, warmup):
    """Runs a contender with all of a GPU's memory → its row. The row of one that fails says why."""
    timed = None
    try:
        timed = Timed(make, shape, device, warmup)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(repeats):
            timed.step()
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        return dict(timed.row(shape, label), recompiled=again)
    except Exception as error:
        return dict(contender=label, missing=f"failed: {str(error).strip().splitlines()[0][:90]}")
    finally:
        timed = None        # the next contender needs the memory
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()

def in_turns(makes, shape, repeats, device, warmup):
    """Runs contenders on a CPU, step by step in turns → {label: row}."""
    contenders = {label: Timed(make, shape, device, warmup) for label, make in makes.items()}
    for _ in range(repeats):
        for timed in contenders.values():
            timed.step()
    return {label: timed.row(shape, label) for label, timed in contenders.items()}

def speed(shape, contenders, repeats, device):
    """contenders: {label: constructor, or None if it is missing} → their rows, ours first."""
    present = {label: make for label, make in contenders.items() if make}
    if "cuda" in str(device):       # the first steps compile
        measured = {label: alone(make, shape, label, repeats, device, warmup=5)
                    for label, make in present.items()}
    else:                           # the first steps fill the allocator
        measured = in_turns(present, shape, repeats, device, warmup=2)
    rows = []
    ours = measured.get("ours", {}).get("all_ms")
    for label in contenders:
        row = measured.get(label) or dict(contender=label, missing=missing(label.split(",")[0]))
        row["ours_faster_by"] = None
        if ours and "all_ms" in row:
            row["ours_faster_by"] = ratio(row["all_ms"], ours)
        rows.append(row)
    return rows

def percent(share, digits=0):
    """A cell: a share as "12 %", or None."""
    if share is None:
        return None
    return f"{share:.{digits}%}"

def show_speed(name, shape, rows):
    head = [f"{name}: {shape.L} layers, {shape.C} channels, T {shape.T}, "
            f"{shape.step_tokens:,} tokens a step", "ms", "spread", "tok/s", "MFU", "peak GB",
            "optimizer", "recompiled", "ours is faster by"]
    cells = []
    for row in rows:
        if "missing" in row:
            cells.append([row["contender"], row["missing"], *[None] * 7])
            continue
        cells.append([row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
                      percent(row["mfu"], 1), row["memory_gb"], percent(row["optimizer_share"]),
                      row.get("recompiled"), row["ours_faster_by"]])
    table(head, cells)

# ---- Quality -------------------------------------------------------------------------------------

class Scored:
    """A contender with the parts of a model that train_gpt2.evaluate() uses."""

    def __init__(self, arm):
        self.arm = arm
        self.eval = arm.model.eval
        self.train = arm.model.train

    def __call__(self, x, y, reduction):
        return self.arm.losses(x, y)

SETTLING_STEPS = 10     # at the beginning, which do not count for tokens per second

def learn(data, shape, make, seed, args):
    """Trains a contender on a folder of shards → (val bits per byte at the end, the curve [(step,
    seconds of training, bits per byte)], tokens per second after SETTLING_STEPS)."""
    torch.manual_seed(seed)
    arm = make()
    device = args.device
    loader = Loader(Shards(data, "train"), shape.T, seed)
    val_shards = Shards(data, "val")
    token_bytes = Tokenizer.load(Path(data) / "tokenizer").token_bytes()
    token_bytes = torch.from_numpy(token_bytes).long().to(device)
    n_rows = shape.step_tokens // shape.T
    rows = micro_batch(arm, shape, device)
    settling = min(SETTLING_STEPS, args.max_steps - 1)
    clock = Clock(device)
    seconds = settled = 0.0
    curve = []
    for step in range(args.max_steps):
        if step == settling:
            settled = seconds
        clock.mark()
        x, y = loader.batch(step * n_rows, n_rows, device)
        train_step(arm, step, x, y, rows)
        clock.mark()
        seconds += clock.ms()[0] / 1000
        done = step + 1
        if done == args.max_steps or done % args.eval_every == 0:
            _, bpb = evaluate(Scored(arm), val_shards, token_bytes, shape.T, min(n_rows, 32),
                              Ranks(device=device), args.val_tokens)
            curve.append((done, round(seconds, 2), bpb))
        if done % 10 == 0:
            print(f"\rseed {seed}: step {done}/{args.max_steps}", end="", file=sys.stderr)
    tok_s = (args.max_steps - settling) * shape.step_tokens / (seconds - settled)
    return bpb, curve, tok_s

def time_to_match(ours, theirs):
    """When our curve [(step, seconds, bpb)] reaches their last bpb, as a share of their time, by
    interpolation between two evaluations; None if it does not."""
    _, total, goal = theirs[-1]
    before = None
    for _, seconds, bpb in ours:
        if bpb <= goal:
            if before:
                earlier, higher = before
                seconds -= (seconds - earlier) * (goal - bpb) / (higher - bpb)
            return seconds / total
        before = seconds, bpb
    return None

def quality(name, shape, args):
    """Trains each contender with each seed, on the same rows → rows of the table."""
    shape = replace(shape, V=Tokenizer.load(Path(args.data) / "tokenizer").n_vocab)
    rows = []
    for label, make in chosen(arms(shape, args.max_steps, args.device), args).items():
        row = dict(shape=name, contender=label)
        rows.append(row)
        if make is None:
            row["missing"] = missing(label.split(",")[0])
            continue
        runs = [learn(args.data, shape, make, seed, args) for seed in range(1, args.quality + 1)]
        row["val_bpb"] = [bpb for bpb, _, _ in runs]
        row["mean"] = statistics.mean(row["val_bpb"])
        row["curve"] = runs[0][1]
        row["tok_s"] = statistics.median(tok_s for _, _, tok_s in runs)
        if "cuda" in args.device:
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    ours = None
    for row in rows:
        if row["contender"].startswith("ours") and "curve" in row:
            ours = row["curve"]
    for row in rows:
        if ours and "curve" in row and not row["contender"].startswith("ours"):
            row["matched_in"] = time_to_match(ours, row["curve"])
    return rows

def show_quality(rows, args):
    cells = []
    for row in rows:
        label = f"{row['contender']} ({row['shape']})"
        if "missing" in row:
            cells.append([label, row["missing"], *[None] * 4])
            continue
        matched = None
        if row.get("matched_in"):
            matched = f"{row['matched_in']:.0%} of its time"
        cells.append([label, ", ".join(f"{bpb:.4f}" for bpb in row["val_bpb"]),
                      f"{row['mean']:.4f}", f"{row['tok_s']:,.0f}", matched,
                      ", ".join(f"{s:.0f}: {bpb:.4f}" for _, s, bpb in row["curve"])])
    table([f"{args.max_steps} steps", "val bits per byte, one per seed", "mean", "tok/s",
           "ours is as good after", "seconds: bits per byte"], cells)

# ---- Fine-tuning ---------------------------------------------------------------------------------

SFT_ROWS = 16           # of a step

def sft_speed(args):
    """Steps of chat_sft.py and of train_gpt2.py on the same model, in turns → a row: tokens a
    second of both, and of fine-tuning as a share of pretraining. Padding counts as tokens."""
    from chat_sft import Loader as ChatLoader
    from chat_sft import add_gradients, fitting
    from dialogs import load_conversations
    ranks = Ranks(device=args.device)
    tokenizer = load_tokenizer(args.sft)
    model, _ = load_checkpoint(args.sft, args.device, vocab_size=tokenizer.n_vocab)
    T = model.config.block_size
    optimizer = make_optimizer(model, ranks, lr=1e-5)
    hidden = find_compiler(args.device)[0](model.hidden)
    loader = Loader(Shards(args.data, "train"), T, seed=1)
    conversations, _ = load_conversations(args.chat, tokenizer, ranks)
    chats = ChatLoader(fitting(conversations, T, SimpleNamespace(say=print)), T, 1,
                       tokenizer.special["<|pad|>"])

    def pretrain(position):
        x, y = loader.batch(position, SFT_ROWS, args.device)
        loss = model.loss(hidden(x), y)
        loss.backward()
        return loss

    def finetune(position):
        return add_gradients(model, hidden, chats, position, SFT_ROWS, SFT_ROWS, ranks)

    def steps(gradients):
        position = itertools.count(0, SFT_ROWS)

        def step():
            loss = gradients(next(position))
            optimizer.average_grads()
            optimizer.step()
            loss.item()
        return step

    ms = measure.in_turns({"pretraining": steps(pretrain), "fine-tuning": steps(finetune)},
                          args.repeats, warmup=3, device=args.device)
    tok_s = {name: 1000 * SFT_ROWS * T / statistics.median(times) for name, times in ms.items()}
    share = ratio(ms["pretraining"], ms["fine-tuning"])
    table(["tokens per second", *tok_s, "fine-tuning / pretraining"],
          [[str(args.sft), *map("{:,.0f}".format, tok_s.values()), share]])
    return dict(tok_s=tok_s, share=share)

# ---- Main ----------------------------------------------------------------------------------------

def chosen(contenders, args):
    """The contenders that --arms names; default: all."""
    return {label: make for label, make in contenders.items()
            if not args.arms or label in args.arms}

def parse_args():
    parser = argparse.ArgumentParser(description="training speed and quality, beside peers")
    shape_flags(parser, repeats=12, timed="steps")
    parser.add_argument("--arms", nargs="+", help="names of contenders; default: all")
    parser.add_argument("--quality", type=int, default=0, help="seeds to train with; 0: only speed")
    parser.add_argument("--data", help="folder of shards, for --quality")
    parser.add_argument("--sft", help="a base model's run: time fine-tuning on --chat, beside "
                        "pretraining on --data")
    parser.add_argument("--chat", nargs="+", help="conversations, for --sft")
    parser.add_argument("--max_steps", type=int, default=150, help="steps of --quality")
    parser.add_argument("--eval_every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--val_tokens", type=int, default=2 ** 18, help="tokens per evaluation")
    args = parser.parse_args()
    _, shapes = chosen_shapes(args, SHAPES)
    if args.quality and not args.shapes:        # --quality takes the vocabulary of the data
        shapes.pop("gpt2-50k", None)
    if args.quality and not args.data:
        raise SystemExit("--quality needs --data, a folder of token shards with their tokenizer; "
                         "make one with python bench/pack.py")
    if args.sft and not (args.data and args.chat):
        raise SystemExit("--sft needs --data, a folder of token shards, and --chat, conversations")
    return args, shapes

def main():
    args, shapes = parse_args()
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")
    if args.sft:
        return finish("train", device=args.device, sft=sft_speed(args))
    report = {}
    learnt = []
    for name, shape in shapes.items():
        if args.quality:
            learnt += quality(name, shape, args)
            continue
        contenders = chosen(arms(shape, args.repeats + 5, args.device), args)
        report[name] = speed(shape, contenders, args.repeats, args.device)
        show_speed(name, shape, report[name])
    if args.quality:
        print("\r", end="", file=sys.stderr)
        show_quality(learnt, args)
    finish("train", device=args.device, speed=report, quality=learnt)

if __name__ == "__main__":
    main()
