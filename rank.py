"""
Which reply is better? A person ranks what a model writes, for a reward model to learn from.

    python rl_grpo.py rank --model runs/demo-sft --prompts prompts.jsonl --out prefs.jsonl
    python rl_grpo.py rank --model runs/demo-sft --prompts prompts.jsonl --out prefs.jsonl \
        --samples 5 --judge my_taste.py:score       # a scripted judge in place of the person

    in:  an assistant's run; a .jsonl of {"prompt"}, {"question"} or {"messages"}; or a .txt
    out: a .jsonl of {"prompt", "ranking": [best, …, worst]}, where replies that tie are a list

For each prompt the model writes several replies, and equal ones are shown once. You type their
numbers, the best first: `2 1 3`, or `2 1=3` if 1 and 3 are equally good. Each ranking is written as
soon as it is typed. The same command continues with the prompts that are not in the file yet.

Papers: people rank K replies to a prompt in InstructGPT (arXiv 2203.02155); a scripted judge, the
"gold" reward, takes their place in Gao et al. (2210.10760).
"""
import argparse
import json
import re
import signal
import time
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from model import load_checkpoint
from problems import cannot_write, printable, read_lines, read_problems, write_whole
from sample import Engine, check_at_least, choose_device, find_run, load_tokenizer, quiet_end

BATCH = 16          # prompts whose replies are written together
HELP = "best first, as in 2 1 3; 2 1=3: 1 and 3 tie; s: none is better; q: quit, all is kept"

# ---- An order of replies -------------------------------------------------------------------------

def parse_order(typed, count):
    """What a person typed → indices of replies, from 0, as [[best], …, [worst]] with ties together.
    ValueError says what is wrong with it.

    >>> parse_order("2 1=3", 3)
    [[1], [0, 2]]
    """
    places = re.sub(r"\s*=\s*", "=", typed.replace(",", " ").replace(">", " ")).split()
    order = []
    seen = []
    for place in places:
        tied = []
        for word in place.split("="):
            if not re.fullmatch("[0-9]+", word) or not 1 <= int(word) <= count:
                raise ValueError(f"{word or '='} is not the number of a reply; they are 1 to "
                                 f"{count}")
            if int(word) in seen:
                raise ValueError(f"reply {word} stands there twice")
            seen.append(int(word))
            tied.append(int(word) - 1)
        order.append(tied)
    missing = [str(number) for number in range(1, count + 1) if number not in seen]
    if missing:
        raise ValueError(f"reply {' and '.join(missing)} is missing; every reply needs its place")
    return order

def order_by(scores):
    """The order of replies by a judge's scores: the highest first, equal ones together.

    >>> order_by([0.5, 2.0, 0.5])
    [[1], [0, 2]]
    """
    return [[i for i, score in enumerate(scores) if score == value]
            for value in sorted(set(scores), reverse=True)]

def as_ranking(replies, order):
    """Replies in an order of their indices → the "ranking" of a row."""
    ranking = []
    for tied in order:
        ranking.append(replies[tied[0]] if len(tied) == 1 else [replies[i] for i in tied])
    return ranking

# ---- The person ----------------------------------------------------------------------------------

class Quit(Exception):
    """The person has had enough."""

def show(messages, replies, number, count):
    """Prints a prompt and the replies to it."""
    print(f"\n{number} of {count}")
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        print(f"{message['role']}: {shown(content)}")
    for i, reply in enumerate(replies, 1):
        print(f"  {i}  {shown(reply)}")

def shown(text):
    """A text of a model without what would control the terminal."""
    return "\n     ".join(printable(line) for line in text.split("\n"))

def ask_person(replies):
    """Asks until an order is right → the order. Raises Quit at q and at the end of input."""
    while True:
        try:
            typed = input("> ").strip()
        except EOFError:
            raise Quit from None
        if typed == "q":
            raise Quit
        if typed == "s":
            return [list(range(len(replies)))]
        try:
            return parse_order(typed, len(replies))
        except ValueError as error:
            print(f"{error} ({HELP})")

# ---- The file ------------------------------------------------------------------------------------

def key_of(messages):
    return json.dumps(messages, sort_keys=True)

def ranked_prompts(path):
    """The keys of the prompts in the file. A last line that a kill cut short is removed."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        write_whole(path, whole)
    if not whole:
        return set()
    return set(read_lines(path, lambda row: key_of(row["prompt"]),
                          "--out takes a file that this command wrote; name another"))

def append(path, row):
    """Adds a row to the file, and waits until the system has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None

# ---- Main ----------------------------------------------------------------------------------------

def write_replies(engine, prompts, args, first):
    """The different replies to each of some prompts, lists of texts. The seed depends on the place
    `first` of these prompts, so that it does not matter where a command was stopped."""
    ids = [engine.tokenizer.render(prompt["messages"], for_completion=True)[0]
           for prompt in prompts]
    completions = engine.generate(ids, args.max_new_tokens, args.samples, seed=args.seed + first,
                                  temperature=args.temperature)
    replies = [engine.reply_text(completion) for completion in completions]
    return [[reply for reply in dict.fromkeys(replies[i:i + args.samples]) if reply]
            for i in range(0, len(replies), args.samples)]

def rank_all(engine, prompts, judge, args, path):
    """Ranks the replies to all prompts that are not in the file yet → how many it added."""
    done = ranked_prompts(path)
    waiting = sum(1 for prompt in prompts if key_of(prompt["messages"]) not in done)
    print(f"{path}: {len(prompts) - waiting} of {len(prompts)} prompts are ranked")
    added = 0
    started = time.perf_counter()
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first:first + BATCH]
        if all(key_of(prompt["messages"]) in done for prompt in batch):
            continue
        for prompt, replies in zip(batch, write_replies(engine, batch, args, first)):
            key = key_of(prompt["messages"])
            if key in done:
                continue
            if judge:
                order = order_by(judge.score([prompt] * len(replies), replies))
            elif len(replies) < 2:      # all samples are equal: there is nothing to ask
                order = [list(range(len(replies)))]
            else:
                show(prompt["messages"], replies, added + 1, waiting)
                order = ask_person(replies)
            append(path, dict(prompt=prompt["messages"], ranking=as_ranking(replies, order)))
            done.add(key)
            added += 1
        if judge:
            seconds = (time.perf_counter() - started) / added
            print(f"judged {added}/{waiting} | eta {seconds * (waiting - added):.0f} s", flush=True)
    return added

def parse_args():
    parser = argparse.ArgumentParser(prog="rl_grpo.py rank",
                                     description="rank what a model writes, best reply first")
    add = parser.add_argument
    add("--model", help="run folder of an assistant (default: the newest one)")
    add("--prompts", required=True, help=".jsonl or .txt of prompts")
    add("--out", required=True, help="FILE.jsonl of rankings; what is in it is not asked again")
    add("--samples", type=int, default=4, help="replies to each prompt")
    add("--max_new_tokens", type=int, default=128, help="longest reply, in tokens")
    add("--temperature", type=float, default=1.0, help="of the replies")
    add("--judge", help="checker, model:RUN or FILE.py:FUNCTION of (problem, reply), not a person")
    add("--seed", type=int, default=1337, help="seed of the replies")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_at_least(1, args, "max_new_tokens")
    check_at_least(2, args, "samples")
    check_at_least(0, args, "temperature", "seed")
    if not args.out.endswith(".jsonl"):
        raise SystemExit(f"--out must end in .jsonl, got {args.out}")
    return args

def main():
    from preferences import read_prompts    # a room of its own for what others write
    args = parse_args()
    read = read_problems if args.judge == "checker" else read_prompts
    prompts = read(args.prompts)
    run = find_run(args.model, ("sft", "rl"))
    device = choose_device(args.device)
    judge = None
    if args.judge:
        from reward_model import load_reward
        judge = load_reward("judge", args.judge, device)
    tokenizer = load_tokenizer(run)
    model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
    print(f"{run}: stage {meta['stage']}, step {meta['step']}", flush=True)
    fits = [prompt for prompt in prompts
            if len(tokenizer.render(prompt["messages"], for_completion=True)[0])
            < model.config.block_size]
    if len(fits) < len(prompts):
        print(f"{len(prompts) - len(fits)} prompts do not fit into {model.config.block_size - 1} "
              "tokens and are left out")
    if not judge:
        print(HELP)
    path = Path(args.out)
    try:
        rank_all(Engine(model.for_inference(), tokenizer), fits, judge, args, path)
    except Quit:
        print(f"\n{path} is kept; the same command continues there")
        return
    print(f"{path}: all prompts are ranked; train with rl_grpo.py reward_model --data {path}")

if __name__ == "__main__":
    with quiet_end():
        main()
