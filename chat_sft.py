r"""
Supervised fine-tuning: conversations → an assistant.

    python chat_sft.py make --data data/demo --out data/demo/chat     # conversations and problems
    python chat_sft.py show data/demo/chat/bits.jsonl                 # what is supervised is green
    python chat_sft.py --model runs/demo --data data/demo/chat/*.jsonl --out runs/demo-sft  # CPU
    torchrun --standalone --nproc_per_node=8 chat_sft.py \
        --model runs/d24 --data chat.jsonl:2 --out runs/d24-sft                             # 8 GPUs

    in:  a base model's run; .jsonl of {"messages": [{"role", "content"}]}, FILE:2 reads it twice
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

The training is pretraining's: predict the next token. What changes is the text, conversations
instead of documents, and that only the assistant's own tokens are learnt: not the user's, not the
headers, not what a tool answered.

`make` is demo/conversations.py: it writes the demo's conversations and problems.

Papers: InstructGPT (arXiv 2203.02155), packing (2107.02027), tool use (GSM8K's calculator,
2110.14168).
Differs from the papers: rows are filled by best fit and padded, so that no conversation is ever cut
or split.
"""
import argparse
import json
import random
import re
import runpy
import sys
import time
from pathlib import Path

import torch

from bpe import Tokenizer
from eval import is_correct, read_problems
from model import load_checkpoint
from sample import Engine, find_run, load_tokenizer
from training import (RunLog, already_trained, catch_signals, check_finite, contents, default_lr,
                      finish, init_ranks, load_state, make_optimizer, save_run)

# ---- Conversations → rows of tokens --------------------------------------------------------------

def read_conversations(spec):
    """FILE or FILE:weight → list of message lists; weight 2: each twice, 0.5: the first half."""
    found = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", spec)
    path, weight = (found[1], float(found[2])) if found else (spec, 1.0)
    rows, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                rows.append(json.loads(line)["messages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}, line {number}: {error!r}; conversations are lines of "
                         '{"messages": [{"role", "content"}]} in UTF-8; repair the file, or make '
                         "one with python chat_sft.py make") from None
    return rows * int(weight) + rows[:round(weight % 1 * len(rows))]

def pack(conversations, T, seed, epoch, buffer=100):
    """(ids, loss_mask) pairs → rows of whole conversations, each at most T + 1 tokens, shuffled.

    Best fit: of the next `buffer` conversations the longest that fits goes in, until none does.
    """
    order = list(range(len(conversations)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    shuffled, waiting, rows = random.Random(f"{seed} {epoch} rows"), [], []
    while order or waiting:
        room, row = T + 1, []
        assert all(len(conversations[i][0]) <= room for i in waiting), "longer than a row"
        while True:
            while order and len(waiting) < buffer:
                waiting.append(order.pop())
            fits = [i for i in waiting if len(conversations[i][0]) <= room]
            if not fits:
                break
            best = max(fits, key=lambda i: len(conversations[i][0]))
            waiting.remove(best)
            row.append(best)
            room -= len(conversations[best][0])
        rows.append(shuffled.sample(row, len(row)))     # else the longest would always come first
    shuffled.shuffle(rows)
    return rows

def row_tensors(row, conversations, T, pad):
    """A packed row → inputs, targets (T,): the target is -1 where the mask is 0 and on padding."""
    ids = [i for c in row for i in conversations[c][0]]
    mask = [m for c in row for m in conversations[c][1]]
    ids, mask = ids + [pad] * (T + 1 - len(ids)), mask + [0] * (T + 1 - len(mask))
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    return ids[:-1], torch.where(mask[1:] == 1, ids[1:], -1)

class Loader:
    """The rows of all epochs as one sequence; a position is one integer: rows read."""

    def __init__(self, conversations, T, seed, pad):
        self.conversations, self.T, self.seed, self.pad = conversations, T, seed, pad
        self.starts, self.epochs = [0], []

    def row(self, position):
        while position >= self.starts[-1]:
            self.epochs.append(pack(self.conversations, self.T, self.seed, len(self.epochs)))
            self.starts.append(self.starts[-1] + len(self.epochs[-1]))
        epoch = next(e for e, end in enumerate(self.starts[1:]) if position < end)
        row = self.epochs[epoch][position - self.starts[epoch]]
        return row_tensors(row, self.conversations, self.T, self.pad)

    def batch(self, position, batch_size, device):
        x, y = zip(*(self.row(position + b) for b in range(batch_size)))
        return torch.stack(x).to(device), torch.stack(y).to(device)

def show(args):
    """Prints conversations token by token: green is learnt, grey is only read."""
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else Tokenizer.pretrained("gpt2")
    for messages in read_conversations(args.file)[:args.count]:
        ids, mask = tokenizer.render(messages)
        shown = (f"\033[{32 if m else 90}m{tokenizer.decode([i])}" for i, m in zip(ids, mask))
        print("".join(shown) + "\033[0m\n")

# ---- Main ----------------------------------------------------------------------------------------

def held_out_accuracy(engine, problems):
    """{kind: share of its problems answered rightly}, greedy."""
    replies = engine.answer([p["messages"] for p in problems], max_new_tokens=96, temperature=0)
    by_kind = {}
    for problem, reply in zip(problems, replies):
        by_kind.setdefault(problem["kind"], []).append(is_correct(reply, problem))
    return {kind: sum(right) / len(right) for kind, right in by_kind.items()}

def parse_args():
    parser = argparse.ArgumentParser(description="fine-tune on conversations; see also: make, show")
    parser.add_argument("--model", help="run folder of a base model; default: the newest one")
    parser.add_argument("--data", nargs="+", required=True, help="FILE.jsonl[:weight] …")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue from <out>/state, if any")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the conversations")
    parser.add_argument("--batch_size", type=int, default=16, help="rows at a time on one rank")
    parser.add_argument("--total_batch_size", type=int, help="tokens a step (a batch on each rank)")
    parser.add_argument("--lr", type=float, help="AdamW's, or for dN Muon's, peak learning rate")
    parser.add_argument("--held_out", help="problems to answer before and after")
    parser.add_argument("--save_every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=1337, help="of the order of the conversations")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()

def render_all(conversations, tokenizer, T, log):
    """Renders and measures; conversations longer than a row are left out, and how many is said."""
    try:
        rendered = [tokenizer.render(messages) for messages in conversations]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"a conversation cannot be rendered: {error!r}; turns are "
                         '{"role", "content"}; repair the files given with --data') from None
    fitting = [(ids, mask) for ids, mask in rendered if len(ids) <= T + 1 and any(mask)]
    tokens, learnt = sum(len(ids) for ids, _ in fitting), sum(sum(mask) for _, mask in fitting)
    log.say(f"{len(fitting)} conversations, {tokens} tokens, {learnt} of them supervised; "
            f"left out: {len(rendered) - len(fitting)} longer than {T + 1} tokens "
            "or with nothing to learn")
    if not fitting:
        raise SystemExit(f"none of {len(rendered)} conversations fits {T + 1} tokens and has an "
                         "assistant's turn; training needs one; give other --data")
    return fitting

def main():
    args = parse_args()
    run = Path(args.out)
    signals, stop = catch_signals(), False
    ranks = init_ranks(args.device)
    base = find_run(args.model, ("pretrain",))
    tokenizer = load_tokenizer(base)
    model, meta = load_checkpoint(base, ranks.device, vocab_size=tokenizer.n_vocab)
    T, engine = model.config.block_size, Engine(model, tokenizer)
    micro_rows = args.batch_size * ranks.world_size
    total_rows, rest = divmod(args.total_batch_size or micro_rows * T, T)
    if rest or total_rows % micro_rows:
        nearest = max(1, total_rows // micro_rows) * micro_rows * T
        raise SystemExit(f"total_batch_size {args.total_batch_size} is not a multiple of "
                         f"batch_size*block_size*world_size = {micro_rows * T}; it is split "
                         f"evenly; try --total_batch_size {nearest}")
    lr = args.lr or default_lr(model.config, 2 ** 16)       # not a toy's: it is no noise any more
    optimizer = make_optimizer(model, ranks, lr, total_rows * T)
    conversations = [messages for spec in args.data for messages in read_conversations(spec)]
    settings = dict(data=args.data, epochs=args.epochs, total_rows=total_rows, lr=args.lr,
                    seed=args.seed, base=meta["run"], contents_of_data=contents(conversations))
    state = load_state(run, args.resume, ranks, optimizer, model, settings)
    step, position = (state["step"], state["position"]) if state else (0, 0)
    log = RunLog(run, 0, ranks, resume_step=step if state else None)
    fitting = render_all(conversations, tokenizer, T, log)
    loader = Loader(fitting, T, args.seed, tokenizer.special["<|pad|>"])
    rows_an_epoch = len(pack(loader.conversations, T, args.seed, 0))
    max_steps = log.max_steps = max(1, round(args.epochs * rows_an_epoch / total_rows))
    if step >= max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "sft", step, max_steps,
                               base=meta["run"])
    log.header(args, model, ranks.device)
    problems = read_problems(args.held_out) if args.held_out else []

    def report_accuracy(when):
        if problems and ranks.is_main:
            accuracy = held_out_accuracy(engine, problems)
            shares = " | ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
            log.say(f"held out, {when}: {shares}", step=step, when=when, accuracy=accuracy)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "sft", dict(base=meta["run"]), step=step,
                 position=position, settings=settings)

    if step == 0:
        report_accuracy("before")
    started, first_step = time.perf_counter(), step
    model.train()
    while step < max_steps and not stop:
        tick = time.perf_counter()
        mine = position + ranks.rank * args.batch_size
        batches = [loader.batch(mine + first, args.batch_size, ranks.device)
                   for first in range(0, total_rows, micro_rows)]
        # one mean over all supervised tokens of the step: a short answer counts by its tokens
        supervised = ranks.sum(sum((y >= 0).sum().item() for _, y in batches))[0]
        loss = 0.0
        for x, y in batches:
            micro_loss = model(x, y) * ((y >= 0).sum() / max(1, supervised))
            (micro_loss * ranks.world_size).backward()
            loss += micro_loss.item()
        norm = optimizer.average_grads()
        loss, stops = ranks.sum(loss, len(signals))
        stop = stops > 0
        check_finite(f"step {step}", loss, norm)
        left = 1 - step / max_steps
        # constant, then linearly to 0 over the last half
        lr_scale = min(1.0, (step + 1) / 10) * min(1.0, 2 * left)
        optimizer.step(lr_scale, grad_scale=min(1.0, 1.0 / (norm + 1e-6)), decay_scale=0.0)
        step, position = step + 1, position + total_rows
        seconds = time.perf_counter() - tick
        log(step, loss=loss, lr=lr_scale * optimizer.groups[0]["lr"], norm=norm, ms=1000 * seconds,
            tok_s=total_rows * T / seconds,
            eta=(time.perf_counter() - started) / (step - first_step) * (max_steps - step))
        if step == max_steps:
            report_accuracy("after")    # before the last save, after which a resume does nothing
        if step % args.save_every == 0 or step == max_steps or stop:
            save()
    finish(log, run, "sft", step, stopped=stop and step < max_steps)

def parse_show_args():
    parser = argparse.ArgumentParser(prog="chat_sft.py show")
    parser.add_argument("file", help="a .jsonl of conversations")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: GPT-2's)")
    parser.add_argument("--count", type=int, default=5, help="conversations to show")
    return parser.parse_args(sys.argv[2:])

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "make":
        del sys.argv[1]
        runpy.run_path(str(Path(__file__).parent / "demo" / "conversations.py"), run_name="__main__")
    elif command == "show":
        show(parse_show_args())
    else:
        main()
