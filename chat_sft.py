r"""
Supervised fine-tuning: conversations → an assistant.

    python chat_sft.py make --data data/demo --out data/demo/chat     # conversations and problems
    python chat_sft.py show data/demo/chat/bits.jsonl                 # supervised tokens are green
    python chat_sft.py --model runs/demo --data data/demo/chat/*.jsonl --out runs/demo-sft  # CPU
    torchrun --standalone --nproc_per_node=8 chat_sft.py \
        --model runs/d24 --data chat.jsonl:2 --out runs/d24-sft                             # 8 GPUs

    in:  a base model's run; a .jsonl of {"messages": [{"role", "content"}]}. FILE:2 reads it twice
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

The algorithm is that of pretraining: predict the next token. Two things change. First, the text is
conversations instead of documents. Second, only the assistant's own tokens are learnt: the model
reads the user's words, the headers of turns and the outputs of tools, but they carry no loss.

`make` runs demo/conversations.py, which writes the demo's conversations and problems.

Papers: InstructGPT (arXiv 2203.02155), packing (2107.02027), tool use (GSM8K's calculator,
2110.14168).
Differs from the papers: rows are filled by best fit and then padded, so that no conversation is
ever cut or split.
"""
import argparse
import codecs
import math
import random
import re
import runpy
import sys
import time
from pathlib import Path

import torch

from bpe import Tokenizer
from model import load_checkpoint
from problems import check_messages, is_correct, problems_that_fit, read_lines, read_problems
from sample import Engine, check_at_least, find_run, load_tokenizer, printable, quiet_end
from training import (RunLog, already_trained, catch_signals, check_finite, contents, default_lr,
                      finish, init_ranks, load_state, make_optimizer, save_run)

WARMUP_STEPS = 10
WAITING = 100           # conversations from which `pack` chooses the next one
REPLY_TOKENS = 96       # longest reply to a held-out problem

# ---- Conversations → rows of tokens --------------------------------------------------------------

# Fields of messages in other formats. Ignoring them would lose what they say.
UNKNOWN_FIELDS = ("tool_calls", "function_call", "reasoning_content", "weight")

def split_weight(spec):
    """FILE or FILE:weight → (FILE, weight), where the default weight is 1."""
    weighted = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", spec)
    if weighted:
        return weighted[1], float(weighted[2])
    return spec, 1.0

def as_messages(row):
    """A row {"messages": [...]} → its messages. Raises ValueError that says what is wrong."""
    messages = row["messages"]
    check_messages(messages)
    for message in messages:
        for name in UNKNOWN_FIELDS:
            if message.get(name) is not None:
                raise ValueError(f"a message has {name}, which would be ignored; write it as a "
                                 "part of content (bpe.py: PARTS), or remove it")
    return messages

def read_conversations(spec):
    """FILE or FILE:weight → a list of message lists, from a .jsonl or .jsonl.gz.

    With weight 2 each conversation comes twice; with weight 0.5 the first half of the file comes
    once. Raises SystemExit that names a line that is not {"messages": [{"role", "content"}]}.
    """
    path, weight = split_weight(spec)
    rows = read_lines(path, as_messages, 'a conversation is a line {"messages": [{"role": …, '
                      '"content": …}]}; repair the file, or make one with python chat_sft.py make')
    copies = int(weight)
    first_part = round((weight - copies) * len(rows))
    return rows * copies + rows[:first_part]

def render_all(conversations, tokenizer, T, log):
    """Message lists → pairs (ids, loss_mask), two equally long lists of at most T + 1 items.

    Conversations that are longer, or in which the assistant says nothing, are left out, and their
    number is logged. Raises SystemExit if none is left.
    """
    rendered = [tokenizer.render(messages) for messages in conversations]
    fitting = [(ids, mask) for ids, mask in rendered if len(ids) <= T + 1 and any(mask)]
    tokens = sum(len(ids) for ids, _ in fitting)
    supervised = sum(sum(mask) for _, mask in fitting)
    log.say(f"{len(fitting)} conversations, {tokens} tokens, {supervised} of them supervised; "
            f"left out: {len(rendered) - len(fitting)} longer than {T + 1} tokens "
            "or with nothing to learn")
    if not fitting:
        raise SystemExit(f"none of the {len(rendered)} conversations has an assistant's turn and "
                         f"fits into {T + 1} tokens; give other --data")
    return fitting

def pack(conversations, T, seed, epoch):
    """Pairs (ids, loss_mask) → rows. A row is a list of indices of conversations, which together
    have at most T + 1 tokens.

    Best fit: of the next WAITING conversations, the longest one that fits is added to the row,
    until none fits. The seed and the epoch fix the order of conversations and rows.
    """
    lengths = [len(ids) for ids, _ in conversations]
    order = list(range(len(conversations)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    shuffler = random.Random(f"{seed} {epoch} rows")
    waiting = []
    rows = []
    while order or waiting:
        row = []
        room = T + 1
        assert all(lengths[i] <= room for i in waiting), "longer than a row"
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
        # without this shuffle, the longest conversation would come first in every row
        rows.append(shuffler.sample(row, len(row)))
    shuffler.shuffle(rows)
    return rows

def row_tensors(row, conversations, T, pad):
    """A packed row → inputs and targets, int64 (T,) each. Where the mask is 0 and on padding, the
    target is -1, which the loss ignores."""
    ids = []
    mask = []
    for c in row:
        ids += conversations[c][0]
        mask += conversations[c][1]
    padding = T + 1 - len(ids)
    ids = torch.tensor(ids + [pad] * padding)
    mask = torch.tensor(mask + [0] * padding)
    return ids[:-1], torch.where(mask[1:] == 1, ids[1:], -1)

class Loader:
    """The rows of all epochs as one sequence. A position in it is a number of rows, which is all
    that a saved state needs to remember."""

    def __init__(self, conversations, T, seed, pad):
        self.conversations, self.T = conversations, T
        self.seed, self.pad = seed, pad
        self.epochs = []        # each one is packed when its first row is needed
        self.starts = [0]       # the position at which each epoch begins

    def row(self, position):
        """The row at a position → inputs, targets (T,)."""
        while position >= self.starts[-1]:
            self.epochs.append(pack(self.conversations, self.T, self.seed, len(self.epochs)))
            self.starts.append(self.starts[-1] + len(self.epochs[-1]))
        epoch = 0
        while position >= self.starts[epoch + 1]:
            epoch += 1
        row = self.epochs[epoch][position - self.starts[epoch]]
        return row_tensors(row, self.conversations, self.T, self.pad)

    def batch(self, position, batch_size, device):
        """Rows position … position + batch_size - 1 → inputs, targets (B, T) on the device."""
        rows = [self.row(position + b) for b in range(batch_size)]
        x = torch.stack([inputs for inputs, _ in rows])
        y = torch.stack([targets for _, targets in rows])
        return x.to(device), y.to(device)

def show(args):
    """Prints conversations token by token: tokens that are learnt in green, the others in grey.
    A character that is split into several tokens is printed with the last of them."""
    tokenizer = Tokenizer.load(args.tokenizer)
    for messages in read_conversations(args.file)[:args.count]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i, is_learnt in zip(*tokenizer.render(messages)):
            color = 32 if is_learnt else 90
            text = decoder.decode(tokenizer.decode_bytes([i]))
            print(f"\033[{color}m{printable(text)}", end="")
        print("\033[0m\n")

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
    parser = argparse.ArgumentParser(description="fine-tune on conversations; see also: make, show")
    add = parser.add_argument
    add("--model", help="run folder of a base model (default: the newest one)")
    add("--data", nargs="+", required=True, help="FILE.jsonl[:weight] …")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue from <out>/state, if there is one")
    add("--epochs", type=float, default=1.0, help="passes over the conversations")
    add("--batch_size", type=int, default=16, help="rows in one forward pass on one rank")
    add("--total_batch_size", type=int, help="tokens a step (default: one batch on each rank)")
    add("--lr", type=float, help="peak learning rate of AdamW, or of Muon for dN")
    add("--held_out", help="problems to answer before and after training, never to train on")
    add("--save_every", type=int, default=200, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the conversations' order")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "batch_size", "total_batch_size", "save_every")
    check_at_least(0, args, "seed")
    for name, value in (("epochs", args.epochs), ("lr", args.lr)):
        if value is not None and not 0 < value < math.inf:
            raise SystemExit(f"--{name} must be above 0, got {value}")
    return args

def main():
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
    conversations = []
    for spec in args.data:
        conversations += read_conversations(spec)

    settings = dict(data=args.data, epochs=args.epochs, total_rows=total_rows, lr=args.lr,
                    seed=args.seed, base=meta["run"], contents_of_data=contents(conversations))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
    log = RunLog(run, 0, ranks, resume_step=state.get("step"))
    fitting = render_all(conversations, tokenizer, T, log)
    loader = Loader(fitting, T, args.seed, tokenizer.special["<|pad|>"])
    rows_an_epoch = len(pack(fitting, T, args.seed, epoch=0))
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

    started = time.perf_counter()
    stop = False
    model.train()
    while True:
        last = step == max_steps
        if step == 0:
            report_accuracy("before")
        if last:
            report_accuracy("after")    # before the last save, after which a resume does nothing
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break

        tick = time.perf_counter()
        batches = []
        for first in range(ranks.rank * args.batch_size, total_rows,
                           args.batch_size * ranks.world_size):
            batches.append(loader.batch(step * total_rows + first, args.batch_size, ranks.device))
        # The loss is one mean over the supervised tokens of all ranks, so that each counts equally.
        supervised = ranks.sum(sum((y >= 0).sum().item() for _, y in batches))[0]
        loss = 0.0
        for x, y in batches:
            micro_loss = model(x, y) * ((y >= 0).sum() / max(1, supervised))
            (micro_loss * ranks.world_size).backward()      # average_grads() divides by world_size
            loss += micro_loss.item()
        norm = optimizer.average_grads()
        loss, stops = ranks.sum(loss, len(signals))
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
    parser.add_argument("file", help="a .jsonl of conversations")
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
    elif command == "show":
        with quiet_end():
            show(parse_show_args())
    else:
        main()
