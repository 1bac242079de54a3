r"""
Supervised fine-tuning: conversations → an assistant.

    python chat_sft.py make --data data/demo --out data/demo/chat     # conversations and problems
    python chat_sft.py show data/demo/chat/bits.jsonl                 # supervised tokens are green
    python chat_sft.py --model runs/demo --data data/demo/chat/*.jsonl --out runs/demo-sft  # CPU
    torchrun --standalone --nproc_per_node=8 chat_sft.py \
        --model runs/d24 --data chat.jsonl:2 --out runs/d24-sft                             # 8 GPUs

    python chat_sft.py --model runs/d24 --data smoltalk:0.1 gsm8k:2 --out runs/d24-sft

    in:  a base model's run; a .jsonl of {"messages": [{"role", "content"}]}, another form that
         dialogs.py reads, or a data set by its name. :2 reads it twice, :0.1 every tenth row
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

The algorithm is that of pretraining: predict the next token. Two things change. First, the text is
conversations instead of documents. Second, only the assistant's own tokens are learnt: the model
reads the user's words, the headers of turns and the outputs of tools, but they carry no loss.

`make` runs demo/conversations.py, which writes the demo's conversations and problems. `probe` runs
probe.py, which finds out what a model does not know and writes conversations that say so.

Papers: InstructGPT (arXiv 2203.02155), packing (2107.02027), tool use (GSM8K's calculator,
2110.14168).
Differs from the papers: rows are filled by best fit and then padded, so that no conversation is
ever cut or split.
"""
import argparse
import bisect
import codecs
import random
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bpe import Tokenizer
from model import find_compiler, load_checkpoint, read_json
from problems import is_correct, problems_that_fit, read_problems
from sample import Engine, check_above_0, check_at_least, find_run, load_tokenizer, quiet_end
from training import (RunLog, already_trained, catch_signals, check_finite, contents, default_lr,
                      finish, init_ranks, load_state, make_optimizer, newest_state, read_rank,
                      save_run)

WARMUP_STEPS = 10
WAITING = 100           # conversations from which `pack` chooses the next one
REPLY_TOKENS = 96       # longest reply to a held-out problem
VAL_TOKENS = 2 ** 18    # most tokens of conversations that are held out for val_loss
VAL_FRACTION = 0.01     # of the conversations, if there are at least LEAST_FOR_VAL
LEAST_FOR_VAL = 1000
STOP_REPLIES = 16       # replies that are sampled for stop_rate
STOP_TOKENS = 128       # longest of them

# ---- Conversations → rows of tokens --------------------------------------------------------------

def fitting(conversations, T, log):
    """The Conversations (dialogs.py) that have at most T + 1 tokens, and something to learn. How
    many are left out is logged. Raises SystemExit if none is left."""
    too_long = conversations.lengths() > T + 1
    silent = ~too_long & (conversations.learnt == 0)
    found = conversations.pick(~too_long & ~silent)
    log.say(f"{len(found)} conversations, {found.lengths().sum()} tokens, {found.learnt.sum()} of "
            f"them supervised; left out: {too_long.sum()} longer than {T + 1} tokens, "
            f"{silent.sum()} with nothing to learn")
    if not len(found):
        raise SystemExit(f"none of the {len(conversations)} conversations has an assistant's turn "
                         f"and fits into {T + 1} tokens; give other --data")
    return found

def hold_out(conversations, fraction, log):
    """→ (those to train on, those to evaluate on, in the order of their hashes).

    A conversation is held out if its hash is among the lowest `fraction` of all possible ones, so
    neither the order of files nor what else is there decides, and a copy goes with its original.
    More than VAL_TOKENS tokens are not held out. Raises SystemExit if nothing is left to train on.
    """
    order = np.argsort(conversations.hashes, kind="stable")
    few = conversations.lengths()[order].cumsum() <= VAL_TOKENS
    low = conversations.hashes[order].astype(np.float64) < fraction * 2.0 ** 64
    held = conversations.pick(order[few & low])
    is_held = np.isin(conversations.hashes, held.hashes)
    if is_held.all():
        raise SystemExit(f"--val_fraction {fraction} holds out all {len(conversations)} "
                         "conversations; lower it")
    log.say(f"{len(held)} of them are held out for val_loss, {len(conversations) - is_held.sum()} "
            "are trained on")
    return conversations.pick(~is_held), held

def pack_slowly(lengths, T, seed, epoch):
    """Lengths of conversations → rows. A row is a list of indices of conversations, which together
    have at most T + 1 tokens.

    Best fit: of the next WAITING conversations, the longest one that fits is added to the row, the
    first of several, until none fits. The seed and the epoch fix the order of conversations and
    rows. This is the specification of pack().
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    waiting = []
    rows = []
    while order or waiting:
        row = []
        room = T + 1
        while True:
            while order and len(waiting) < WAITING:
                waiting.append(order.pop())
            fits = [i for i in waiting if lengths[i] <= room]
            if not fits:
                break
            best = max(fits, key=lengths.__getitem__)
            waiting.remove(best)
            row.append(best)
            room -= lengths[best]
        rows.append(row)
    return shuffled(rows, seed, epoch)

def shuffled(rows, seed, epoch):
    """Rows in another order, and each of them within: the longest conversation came first in it."""
    shuffler = random.Random(f"{seed} {epoch} rows")
    rows = [shuffler.sample(row, len(row)) for row in rows]
    shuffler.shuffle(rows)
    return rows

def pack(lengths, T, seed, epoch):
    """The rows of pack_slowly(), but what waits is sorted by length, and the best one is found by
    bisection. An entry is (length, conversations that come later, index)."""
    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    lengths = np.asarray(lengths)[order].tolist()
    waiting = []
    rows = []
    while order or waiting:
        row = []
        room = T + 1
        while True:
            while order and len(waiting) < WAITING:
                bisect.insort(waiting, (lengths.pop(), len(order), order.pop()))
            place = bisect.bisect_left(waiting, (room + 1,))
            if not place:
                break
            length, _, best = waiting.pop(place - 1)
            row.append(best)
            room -= length
        assert row, "a conversation is longer than a row"
        rows.append(row)
    return shuffled(rows, seed, epoch)

def row_tensors(row, conversations, T, pad):
    """A packed row → inputs and targets, int64 (T,) each. Where the mask is 0 and on padding, the
    target is -1, which the loss ignores."""
    ids = np.full(T + 1, pad)
    targets = np.full(T + 1, -1)
    end = 0
    for c in row:
        tokens = slice(conversations.starts[c], conversations.ends[c])
        start = end
        end += tokens.stop - tokens.start
        ids[start:end] = conversations.ids[tokens]
        targets[start:end] = np.where(conversations.mask[tokens], conversations.ids[tokens], -1)
    return torch.from_numpy(ids[:-1]), torch.from_numpy(targets[1:])

class Loader:
    """The rows of all epochs as one sequence. A position in it is a number of rows, which is all
    that a saved state needs to remember."""

    def __init__(self, conversations, T, seed, pad):
        self.conversations, self.T = conversations, T
        self.seed, self.pad = seed, pad
        self.lengths = conversations.lengths()
        self.packed = {}        # {epoch: its rows}, of the last two that were needed
        self.starts = [0]       # the position at which each epoch begins

    def epoch(self, number):
        """The rows of an epoch."""
        if number not in self.packed:
            for old in list(self.packed)[:-1]:      # a step may need rows of two epochs
                del self.packed[old]
            self.packed[number] = pack(self.lengths, self.T, self.seed, number)
        return self.packed[number]

    def row(self, position):
        """The row at a position, as a list of indices of conversations."""
        while position >= self.starts[-1]:
            self.starts.append(self.starts[-1] + len(self.epoch(len(self.starts) - 1)))
        number = bisect.bisect_right(self.starts, position) - 1
        return self.epoch(number)[position - self.starts[number]]

    def supervised(self, position, rows):
        """How many tokens are learnt of the rows at position … position + rows - 1."""
        return sum(int(self.conversations.learnt[self.row(position + b)].sum())
                   for b in range(rows))

    def batch(self, position, batch_size, device):
        """Rows position … position + batch_size - 1 → inputs, targets (B, T) on the device."""
        rows = [row_tensors(self.row(position + b), self.conversations, self.T, self.pad)
                for b in range(batch_size)]
        x = torch.stack([inputs for inputs, _ in rows])
        y = torch.stack([targets for _, targets in rows])
        if "cuda" in str(device):
            x = x.pin_memory()
            y = y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

def show(args):
    """Prints conversations token by token: tokens that are learnt in green, the others in grey.
    A character that is split into several tokens is printed with the last of them."""
    from dialogs import read_conversations
    from show import printable
    tokenizer = Tokenizer.load(args.tokenizer)
    for messages in read_conversations(args.file)[:args.count]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i, is_learnt in zip(*tokenizer.render(messages)):
            color = 32 if is_learnt else 90
            text = decoder.decode(tokenizer.decode_bytes([i]))
            print(f"\033[{color}m{printable(text)}", end="")
        print("\033[0m\n")

# ---- The gradients of a step ---------------------------------------------------------------------

def add_gradients(model, hidden, loader, position, total_rows, batch_size, ranks, weight=1.0):
    """Adds the gradients of this rank's part of a step, in micro-steps of batch_size rows, to the
    parameters → this rank's part of the loss, whose sum over the ranks is the step's loss. The
    gradients alone are multiplied by `weight`.

    The loss is one mean over the supervised tokens of all total_rows rows, so each token counts the
    same, whatever the number of ranks and micro-steps. With n of the S supervised tokens of a step:
        loss = Σ over micro-steps: n / S · mean over its n tokens
    average_grads() divides by the number of ranks, so the gradients are multiplied by it here.
    """
    loss = torch.zeros((), device=ranks.device)
    supervised = max(1, loader.supervised(position, total_rows))
    mine = position + ranks.rank * batch_size
    for first in range(mine, position + total_rows, batch_size * ranks.world_size):
        x, y = loader.batch(first, batch_size, ranks.device)
        share = loader.supervised(first, batch_size) / supervised
        micro_loss = model.loss(hidden(x), y) * share
        (micro_loss * weight * ranks.world_size).backward()
        loss += micro_loss.detach()
    return loss

# ---- Is it learnt? -------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, held, T, pad, batch_size, ranks):
    """The mean loss over the supervised tokens of held-out conversations; the ranks share them."""
    rows = pack(held.lengths(), T, seed=0, epoch=0)[ranks.rank::ranks.world_size]
    total = 0.0
    model.eval()
    for first in range(0, len(rows), batch_size):
        pairs = [row_tensors(row, held, T, pad) for row in rows[first:first + batch_size]]
        x = torch.stack([inputs for inputs, _ in pairs]).to(ranks.device)
        y = torch.stack([targets for _, targets in pairs]).to(ranks.device)
        total += model(x, y, reduction="none").double().sum().item()
    model.train()
    return ranks.sum(total)[0] / held.learnt.sum()

def stop_rate(engine, held, seed):
    """The share of replies to held-out conversations, sampled at temperature 1, that end by
    themselves within STOP_TOKENS tokens. None if no conversation leaves so much room."""
    separator = engine.tokenizer.special["<|im_sep|>"]
    prompts = []
    for start, end in zip(held.starts, held.ends):
        ids = held.ids[start:end]
        of_assistant = (ids[:-1] == separator) & (held.mask[start + 1:end] == 1)
        n = np.flatnonzero(of_assistant)[-1] + 1        # tokens up to its last header
        if n + STOP_TOKENS <= engine.model.config.block_size:
            prompts.append(ids[:n].tolist())
    if not prompts:
        return None
    replies = engine.generate(prompts[:STOP_REPLIES], STOP_TOKENS, seed=seed)
    return sum(1 for reply in replies if reply.finish == "stop") / len(replies)

def warm_start(base, optimizer, ranks, log):
    """Gives the optimizer the state that pretraining saved with the base model: its momenta, as far
    as shapes are equal, and its count of steps, which AdamW's correction of them depends on."""
    folder = newest_state(base)
    if not folder:
        log.say(f"{base} has no saved state, so the optimizer's momenta begin at 0")
        return
    state = read_json(folder / "state.json", "remove this folder, or leave out --warm_start")
    wanted = optimizer.wanted_state()
    for number in range(state["world_size"]):
        tensors = read_rank(folder / f"rank_{number:05d}.safetensors", ranks.device)
        for name, tensor in tensors.items():
            if name in wanted and wanted[name].shape == tensor.shape:
                optimizer.state[name] = tensor
    optimizer.steps = state["optimizer_steps"]
    log.say(f"{len(optimizer.state)} of {len(wanted)} momenta begin as {folder} has them")

# ---- Main ----------------------------------------------------------------------------------------

def held_out_accuracy(engine, problems):
    """Answers problems greedily → {kind: share of right replies}."""
    replies = engine.answer([p["messages"] for p in problems], max_new_tokens=REPLY_TOKENS,
                            temperature=0)
    by_kind = {}
    for problem, reply in zip(problems, replies):
        by_kind.setdefault(problem["kind"], []).append(is_correct(reply, problem))
    return {kind: sum(right) / len(right) for kind, right in by_kind.items()}

def learning_rate_scale(step, max_steps):
    """The factor of the learning rate: it rises linearly for WARMUP_STEPS, stays at 1, and falls
    linearly to 0 over the second half of the steps."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    left = 1 - step / max_steps
    return warmup * min(1.0, 2 * left)

def rows_a_step(args, T, world_size):
    """--total_batch_size (tokens) in rows of T tokens. Raises SystemExit if the ranks cannot share
    them evenly."""
    micro_rows = args.batch_size * world_size
    if not args.total_batch_size:
        return micro_rows
    micro_tokens = micro_rows * T
    if args.total_batch_size % micro_tokens:
        nearest = max(1, args.total_batch_size // micro_tokens) * micro_tokens
        raise SystemExit(f"--total_batch_size {args.total_batch_size} must be a multiple of "
                         f"batch_size*block_size*world_size = {micro_tokens}; try "
                         f"--total_batch_size {nearest}")
    return args.total_batch_size // T

def parse_args():
    parser = argparse.ArgumentParser(
        description="fine-tune on conversations; other commands: make, show, probe")
    add = parser.add_argument
    add("--model", help="run folder of a base model (default: the newest one)")
    add("--data", nargs="+", required=True, help="FILE or NAME of a data set, perhaps :weight; …")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue from <out>/state, if there is one")
    add("--epochs", type=float, default=1.0, help="passes over the conversations")
    add("--batch_size", type=int, default=16, help="rows in one forward pass on one rank")
    add("--total_batch_size", type=int, help="tokens a step (default: one batch on each rank)")
    add("--lr", type=float, help="peak learning rate of AdamW, or of Muon for dN")
    add("--warm_start", action="store_true", help="with the momenta that pretraining saved")
    add("--val_fraction", type=float, help="share of conversations to hold out for val_loss "
        f"(default: {VAL_FRACTION} of {LEAST_FOR_VAL} or more)")
    add("--eval_every", type=int, default=100, help="steps between evaluations of val_loss")
    add("--held_out", help="problems to answer before and after training, never to train on")
    add("--save_every", type=int, default=200, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the conversations' order")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "batch_size", "total_batch_size", "save_every", "eval_every")
    check_at_least(0, args, "seed")
    check_above_0(args, "epochs", "lr")
    if args.val_fraction is not None and not 0 <= args.val_fraction < 1:
        raise SystemExit(f"--val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    return args

def main():
    from dialogs import load_conversations      # a room of its own for what others write
    args = parse_args()
    run = Path(args.out)
    signals = catch_signals()
    ranks = init_ranks(args.device)
    base = find_run(args.model, ("pretrain",))
    tokenizer = load_tokenizer(base)
    model, meta = load_checkpoint(base, ranks.device, vocab_size=tokenizer.n_vocab)
    T = model.config.block_size
    engine = Engine(model, tokenizer)
    total_rows = rows_a_step(args, T, ranks.world_size)
    # The rate that pretraining would use with 65,536 tokens a step, whatever the batch here:
    # gradients of a pretrained model are less noisy than those of a new one.
    lr = args.lr or default_lr(model.config, 2 ** 16)
    optimizer = make_optimizer(model, ranks, lr, total_rows * T)
    pad = tokenizer.special["<|pad|>"]
    conversations, left_out = load_conversations(args.data, tokenizer, ranks)
    val_fraction = args.val_fraction
    if val_fraction is None:
        val_fraction = VAL_FRACTION if len(conversations) >= LEAST_FOR_VAL else 0

    settings = dict(data=args.data, epochs=args.epochs, total_rows=total_rows, lr=args.lr,
                    seed=args.seed, base=meta["run"], warm_start=args.warm_start,
                    val_fraction=val_fraction,
                    contents_of_data=contents(conversations.hashes.tolist()))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
    log = RunLog(run, 0, ranks, resume_step=state.get("step"))
    log.say(left_out.rstrip() or f"all rows of {' '.join(args.data)} are read")
    train, held = hold_out(fitting(conversations, T, log), val_fraction, log)
    loader = Loader(train, T, args.seed, pad)
    rows_an_epoch = len(loader.epoch(0))
    max_steps = log.max_steps = max(1, round(args.epochs * rows_an_epoch / total_rows))
    if step >= max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "sft", step, max_steps,
                               base=meta["run"])
    log.header(args, model, ranks.device)
    problems = []
    if args.held_out:
        problems = problems_that_fit(args.held_out, read_problems(args.held_out), tokenizer, T, log)

    def report_accuracy(when):
        if problems and ranks.is_main:
            accuracy = held_out_accuracy(engine, problems)
            shares = " | ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
            log.say(f"held out, {when}: {shares}", step=step, when=when, accuracy=accuracy)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "sft", dict(base=meta["run"]), step=step,
                 settings=settings)

    if args.warm_start and not state:
        warm_start(base, optimizer, ranks, log)
    hidden = find_compiler(ranks.device)[0](model.hidden)   # evaluations and replies stay eager
    started = time.perf_counter()
    stop = False
    model.train()
    while True:
        last = step == max_steps
        is_new = step == 0 or step > first_step     # a resumed run has evaluated its first step
        if step == 0:
            report_accuracy("before")
        if last:
            report_accuracy("after")    # before the last save, after which a resume does nothing
        if len(held) and is_new and (last or step % args.eval_every == 0):
            log(step, val_loss=evaluate(model, held, T, pad, args.batch_size, ranks),
                stop_rate=stop_rate(engine, held, args.seed))
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        loss = add_gradients(model, hidden, loader, step * total_rows, total_rows, args.batch_size,
                             ranks)
        norm = optimizer.average_grads()
        loss, stops = ranks.sum(loss.item(), len(signals))
        stop = stops > 0
        check_finite(f"step {step}", loss, norm)
        lr_scale = learning_rate_scale(step, max_steps)
        optimizer.step(lr_scale, grad_scale=min(1.0, 1.0 / (norm + 1e-6)), decay_scale=0.0)
        step += 1
        seconds = time.perf_counter() - tick
        seconds_a_step = (time.perf_counter() - started) / (step - first_step)
        log(step, loss=loss, lr=lr_scale * optimizer.groups[0]["lr"], norm=norm, ms=1000 * seconds,
            tok_s=total_rows * T / seconds, eta=seconds_a_step * (max_steps - step))
    finish(log, run, "sft", step, stopped=stop and not last)

def parse_show_args():
    parser = argparse.ArgumentParser(prog="chat_sft.py show")
    parser.add_argument("file", help="a file of conversations, or the name of a data set")
    parser.add_argument("--tokenizer", default="gpt2", help="folder of a tokenizer, or gpt2")
    parser.add_argument("--count", type=int, default=5, help="conversations to show")
    args = parser.parse_args(sys.argv[2:])
    check_at_least(1, args, "count")
    return args

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "make":
        del sys.argv[1]
        script = Path(__file__).parent / "demo" / "conversations.py"
        runpy.run_path(str(script), run_name="__main__")
    elif command == "probe":
        del sys.argv[1]
        runpy.run_path(str(Path(__file__).with_name("probe.py")), run_name="__main__")
    elif command == "show":
        with quiet_end():
            show(parse_show_args())
    else:
        main()
