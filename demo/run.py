"""
The demo: every command from a small web to a model that reasons, with a word on each.

    python demo/run.py --size small         (make demo calls it)

    in:  nothing; the web is the manual of the software on this machine (demo/web.py)
    out: <data>/     documents, tokenizer, shards, conversations
         <run>-base, <run>-sft, <run>-honest, <run>-rl    the models; the last one holds
         report.html; <run>-rlhf/, <run>-beyond/    the models of two experiments
         <run>.log, <run>-times.jsonl       all that was printed; the seconds of each command

STEPS below is the whole demo, in the order of the talk. Each command is one that you can type
yourself. A command skips or resumes what is done, so after an interruption, even by kill -9, the
demo continues where it stopped. It ends with the first command that fails, and with its status.
Words and commands are here; figures are in look.py, and how it is shown is in narrator.py.
"""
import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import look
from narrator import ROOT, Narrator, Screen, end_with_parent, shown

# ---- The steps -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    """Commands, with a line on what is about to happen and one on why. A command is text: {data},
    {base}, {sft}, {honest}, {rl}, {rlhf}, {beyond}, {conversations}, {seed} and the names in SIZES
    are filled in, each into the word where it stands. look(names) → lines on what is to be seen
    afterwards, with figures."""
    title: str
    what: str
    why: str
    commands: list
    look: Callable = None

SIZES = {
    "tiny": dict(pages=400, steps=60, eval_every=30, examples=60, functions=12, mixed=200,
                 held_out=20, lookups=300, subjects=40, invented=60,
                 rl_steps=4, prompts=4, group_size=8, rl_eval_every=2, rlhf_steps=2,
                 chains=400, chain_rounds=1, chain_steps=2),
    "small": dict(pages=5000, steps=300, eval_every=50, examples=850, functions=48,
                  mixed=2500, held_out=30, lookups=3400, subjects=250, invented=350,
                  rl_steps=20, prompts=16, group_size=16, rl_eval_every=10, rlhf_steps=20,
                  chains=10000, chain_rounds=8, chain_steps=80)}

MINUTES = dict(tiny=5, small=12)     # on two CPU cores

STEPS = [
    Step(
        title="Download and clean the web",
        what="A crawler walks a small web from one seed page; filters drop what is not worth it.",
        why="A model knows what it has read: bad pages, copies and private data must go first.",
        commands=[
            "python prepare_fineweb.py --source crawl --out {data} --quality annotate "
            "--extractor plain --val_fraction 0.02 --max_pages {pages}"],
        look=look.documents),
    Step(
        title="Keep the sentences",
        what="Of each document only the lines that are English sentences are kept for the model.",
        why="A small model learns to write sentences if it reads nothing but sentences.",
        commands=["python prose.py --data {data}"],
        look=look.sentences),
    Step(
        title="Cut the text into tokens",
        what="The most frequent pair of symbols becomes a new token, again and again.",
        why="A network reads a row of numbers; the more text each stands for, the shorter it is.",
        commands=[
            "python bpe.py train --input {data}/prose --vocab_size 4096 --pattern gpt4 "
            "--out {data}/tokenizer",
            'python bpe.py show "Return a copy of the string with leading whitespace removed." '
            "--tokenizer {data}/tokenizer",
            "python shards.py --data {data} --tokenizer {data}/tokenizer --prose"],
        look=look.tokens),
    Step(
        title="Train the base model",
        what="A Transformer guesses each next token; each step turns its knobs a little.",
        why="To guess well it must pick up words, grammar and facts. Most of the time goes here.",
        commands=[
            "python train_gpt2.py --model d4 --config n_embd=128 n_head=4 block_size=256 "
            "--data {data} --out {base} --total_batch_size 4096 --save_every 100 --seed {seed} "
            "--resume --max_steps {steps} --eval_every {eval_every}"],
        look=look.pretraining),
    Step(
        title="Let the base model write",
        what="Its knobs are fixed now; it draws one token after another by their probabilities.",
        why="A base model continues documents, each time in another way. It does not answer yet.",
        commands=[
            'python sample.py --model {base} --prompt "This function" --num_samples 3 '
            "--max_new_tokens 40",
            'python sample.py --model {base} --prompt "If this is a function, the weight of" '
            "--temperature 0 --max_new_tokens 50",
            'python sample.py --model {base} --prompt "Return the" --top 8 --max_new_tokens 2'],
        look=look.writing),
    Step(
        title="Make it an assistant: supervised fine-tuning",
        what="The same training continues on conversations; only the assistant's words are learnt.",
        why="The model takes on the manner of these answers: who it is, and how to reply.",
        commands=[
            "python demo/conversations.py --data {data} --out {conversations} --seed {seed} "
            "--examples {examples} --functions {functions} --mixed {mixed} --held_out {held_out}",
            "python demo/lookups.py --data {data} --out {conversations} --seed {seed} "
            "--examples {lookups}",
            "python chat_sft.py --model {base} --out {sft} --data {conversations}/identity.jsonl "
            "{conversations}/small_talk.jsonl {conversations}/functions.jsonl "
            "{conversations}/sums.jsonl {conversations}/tool.jsonl {conversations}/decimals.jsonl "
            "{conversations}/bits.jsonl {conversations}/bits_in_steps.jsonl "
            "{conversations}/spelling.jsonl {conversations}/counting.jsonl "
            "{conversations}/mixed.jsonl "
            "{conversations}/search.jsonl {conversations}/rag.jsonl "
            "--batch_size 8 --lr 0.02 --save_every 100 --seed {seed} --resume --epochs 1"],
        look=look.fine_tuning),
    Step(
        title="Teach it to say that it does not know",
        what="It is asked about names; where it is always wrong, the answer becomes I don't know.",
        why="Who only learnt right answers makes one up for every name, also for one without any.",
        commands=[
            "python chat_sft.py probe --model {sft} --data {data} --also "
            "{conversations}/functions.jsonl --subjects {subjects} --invented {invented} "
            "--seed {seed} --out {conversations}/probe.jsonl",
            "python chat_sft.py --model {sft} --out {honest} --data {conversations}/probe.jsonl "
            "{conversations}/functions.jsonl:0.6 {conversations}/identity.jsonl:0.3 "
            "{conversations}/small_talk.jsonl:0.4 {conversations}/mixed.jsonl:0.25 "
            "{conversations}/bits.jsonl:0.1 {conversations}/spelling.jsonl:0.3 "
            "{conversations}/search.jsonl:0.25 {conversations}/rag.jsonl:0.2 "
            "--batch_size 8 --lr 0.005 --save_every 50 --seed {seed} --resume",
            "python eval.py --model {sft} --tasks {conversations}/probe_held_out.jsonl "
            "--max_new_tokens 48",
            "python eval.py --model {honest} --tasks {conversations}/probe_held_out.jsonl "
            "--max_new_tokens 48"],
        look=look.knowledge),
    Step(
        title="Let it look things up",
        what="Names that no conversation had: it writes a query, reads what is found, and answers.",
        why="What stands in the context can be read off, even an invented fact of your own.",
        commands=[
            "python eval.py --model {honest} --tasks {conversations}/held_out_search.jsonl "
            "--docs {data} {conversations}/notes"],
        look=look.lookups),
    Step(
        title="Let it practise: reinforcement learning",
        what="It answers each problem many times, and what led to right answers becomes likelier.",
        why="No teacher knows which way of thinking suits it; checked answers let it find out.",
        commands=[
            "python rl_grpo.py --model {honest} --out {rl} "
            "--task {conversations}/practice_bits.jsonl "
            "--held_out {conversations}/held_out.jsonl --max_new_tokens 64 --lr 3e-4 "
            "--keep {conversations}/mixed.jsonl {conversations}/search.jsonl "
            "--save_every 8 --seed {seed} --resume --max_steps {rl_steps} --prompts {prompts} "
            "--group_size {group_size} --eval_every {rl_eval_every}"],
        look=look.practice),
    Step(
        title="Go beyond what was shown",
        what="A tiny model saw chains of up to six arrows followed; it practises up to sixteen.",
        why="Imitation ends where its examples end. Practice needs only that answers are checked.",
        commands=[
            "python bench/beyond.py --seeds 0 --examples {chains} --rounds {chain_rounds} "
            "--steps {chain_steps} --folder {beyond}"],
        look=look.beyond),
    Step(
        title="Train it to please a stand-in for people",
        what="A reward model learns from ranked jokes what a judge likes, and practice follows it.",
        why="A stand-in can be gamed: its reward still rises when the judge likes the jokes less.",
        commands=[
            "python demo/rlhf.py --model {honest} --out {rlhf} --steps {rlhf_steps} --seed {seed}"],
        look=look.pleasing),
    Step(
        title="Ask all three models what they never saw",
        what="Base model, assistant and reasoner get the same problems, held out from training.",
        why="Only a problem that was never shown tells understanding from memory.",
        commands=[
            "python eval.py --model {base} --tasks {conversations}/held_out.jsonl",
            "python eval.py --model {honest} --tasks {conversations}/held_out.jsonl",
            "python eval.py --model {rl} --tasks {conversations}/held_out.jsonl",
            "python eval.py --model {rl} --tasks {conversations}/held_out_search.jsonl "
            "--docs {data} {conversations}/notes"],
        look=look.held_out),
    Step(
        title="Hold the talk's claims against it",
        what="Each claim of the talk is measured on these models, in its order, with its error.",
        why="What a small model does not show is said as plainly as what it does.",
        commands=[
            "python talk.py --runs {base} {sft} {honest} {rl} --data {data} "
            "--conversations {conversations}"],
        look=look.claims),
    Step(
        title="Write the report",
        what="One page tells the story of this run, and a summary judges what the demo promises.",
        why="A claim counts only with a figure from the logs beside it.",
        commands=[
            "python report.py {base} {sft} {honest} {rl} {beyond}/seed_0/rl {rlhf}/reward "
            "{rlhf}/without-kl {rlhf}/with-kl {rlhf}/stopped --data {data} "
            "--out {rl}/report.html",
            "python report.py summary {base} {sft} {honest} {rl} --data {data}"]),
]

NEXT = [
    "python sample.py --model {rl} --chat",
    'python sample.py --model {rl} --chat --system "Your name is Ada."',
    'python sample.py --model {base} --prompt "Return the" --top 8',
    'python bpe.py show "Hello world" --tokenizer {data}/tokenizer',
    "python chat_sft.py show {conversations}/bits.jsonl --tokenizer {data}/tokenizer"]

PAGE = ["python serve.py --model {base} {honest} {rl} --tools"]

def fill(command, names):
    """A command of STEPS → its words. Text is split first, so that a path may contain a space."""
    return [word.format(**names) for word in shlex.split(command)]

# ---- Telling it ----------------------------------------------------------------------------------

def begin(screen, size, log):
    """What will happen, in how many minutes, and how to interrupt it."""
    screen.line("This makes a small ChatGPT from nothing: a web is crawled, and a model reads it, "
                "learns", "title")
    screen.line(f"to answer, and practises. The {len(STEPS)} steps take about {MINUTES[size]} "
                "minutes on two CPU cores.", "title")
    screen.line("Ctrl-C interrupts it at any time; the same command continues.")
    screen.line(f"Most lines that repeat are left out; {log} has them all.")

def tell(narrator, number, step, names):
    """One step: its words, its commands, and what to look at."""
    line = narrator.screen.line
    line()
    line(f"{number} of {len(STEPS)} · {step.title}".ljust(72), "title")
    line(step.what)
    line(step.why)
    line()
    for command in step.commands:
        narrator.run(fill(command, names), step.title)
    if step.look:
        for text in step.look(names):
            line(f"→ {text}", "look")

def end(narrator, size, names):
    """How long it took, where the report is, and what to try."""
    line = narrator.screen.line
    line("What took how long".ljust(72), "title")
    for text in narrator.table():
        line(text)
    line()
    line(f"The report: open {names['rl']}/report.html in a browser.", "title")
    line("Five commands to try:")
    for command in NEXT:
        line(f"  {shown(fill(command, names))}", "command")
    install = shown(["python", "-m", "pip", "install", "starlette", "uvicorn"])
    line(f"In a browser: {install} && {shown(fill(PAGE[0], names))}", "title")

def has_terminal():
    """Whether somebody may be there to type and to read."""
    return sys.stdin.isatty() and sys.stdout.isatty()

def talk(screen, names):
    """A chat with the last model, for which this terminal is handed over."""
    words = fill(NEXT[0], names)
    screen.line("\nNow you can talk to it; an empty line ends the chat.", "title")
    screen.line(f"$ {shown(words)}", "command")
    subprocess.run([sys.executable, *words[1:]], check=False)

def parse_args():
    parser = argparse.ArgumentParser(description="from a small web to a model that reasons")
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="tiny only shows that everything works")
    add("--seed", type=int, default=1337, help="of training and conversations")
    add("--data", help="folder of data (default: data/demo-SIZE)")
    add("--run", help="the models' folders are RUN-base, RUN-sft, RUN-rl (default: runs/demo-SIZE)")
    add("--conversations", help="folder of conversations (default: DATA/chat)")
    add("--chat", type=int, choices=(0, 1), default=1, help="0: no chat at the end")
    return parser.parse_args()

def main():
    args = parse_args()
    data = args.data or f"data/demo-{args.size}"
    prefix = args.run or f"runs/demo-{args.size}"
    names = dict(SIZES[args.size], seed=args.seed, data=data, base=f"{prefix}-base",
                 sft=f"{prefix}-sft", honest=f"{prefix}-honest", rl=f"{prefix}-rl",
                 rlhf=f"{prefix}-rlhf", beyond=f"{prefix}-beyond",
                 conversations=args.conversations or f"{data}/chat")
    os.chdir(ROOT)
    if "MAKELEVEL" in os.environ:
        end_with_parent()
    sys.stdout.reconfigure(errors="replace")
    screen = Screen(sys.stdout)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    narrator = Narrator(screen, f"{prefix}.log", f"{prefix}-times.jsonl", size=args.size)
    narrator.catch_signals()
    begin(screen, args.size, narrator.log)
    for number, step in enumerate(STEPS, 1):
        tell(narrator, number, step, names)
    end(narrator, args.size, names)
    if args.chat and has_terminal():
        talk(screen, names)

if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:             # the reader of a pipe has gone, as in `make demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise SystemExit(141) from None
    except OSError as error:
        raise SystemExit(f"the demo cannot write its log: {error}; free some space, or choose "
                         "another --run") from None
