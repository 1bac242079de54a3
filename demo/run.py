"""
The demo: every command from a small web to a model that reasons, with a word on each.

    python demo/run.py --size small         (make demo calls it)

    in:  nothing; the web is the manual of the software on this machine (demo/web.py)
    out: <data>/     documents, tokenizer, shards, conversations
         <run>-base, <run>-sft, <run>-rl    the three models; the last one holds report.html

STEPS below is the whole demo, in the order of the talk. Each command is one that you can type
yourself. A command skips or resumes what is done, so after an interruption, even by kill -9, the
demo continues where it stopped. It ends with the first command that fails, and with its status.
"""
import argparse
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ---- The steps -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    """Commands, with a line on what is about to happen and one on why. A command is text: {data},
    {base}, {sft}, {rl}, {conversations}, {seed} and the names in SIZES are filled in, each into the
    word where it stands."""
    title: str
    what: str
    why: str
    commands: tuple

SIZES = {
    "tiny": dict(pages=400, steps=60, eval_every=30, examples=600, functions=12, epochs=1,
                 rl_steps=4, prompts=4, group_size=8, rl_eval_every=2),
    "small": dict(pages=5000, steps=300, eval_every=50, examples=5000, functions=48, epochs=1.2,
                  rl_steps=16, prompts=16, group_size=16, rl_eval_every=8)}

STEPS = (
    Step("Download and clean the web",
         "A crawler walks a small web from one seed page; filters then drop what should not be "
         "learnt.",
         "A model knows only what it has read: bad pages, duplicates and private data must go "
         "first.",
         ("python prepare_fineweb.py --source crawl --out {data} --quality annotate "
          "--extractor plain --val_fraction 0.02 --max_pages {pages}",)),
    Step("Cut the text into tokens",
         "Byte-pair encoding mints a new token for the most frequent pair, again and again; then "
         "all documents become numbers.",
         "A network reads one row of symbols from a fixed set; the more a symbol holds, the "
         "shorter the row.",
         ("python bpe.py train --input {data}/documents --vocab_size 4096 --pattern gpt4 "
          "--out {data}/tokenizer",
          'python bpe.py show "Return a copy of the string with leading whitespace removed." '
          "--tokenizer {data}/tokenizer",
          "python shards.py --data {data} --tokenizer {data}/tokenizer")),
    Step("Train the base model",
         "A Transformer guesses the next token of every position; each step turns its parameters "
         "a little towards the right one.",
         "To guess the next token well it must pick up words, grammar and some facts. This is "
         "where most of the computing goes.",
         ("python train_gpt2.py --model d4 --config n_embd=128 n_head=4 block_size=256 "
          "--data {data} --out {base} --total_batch_size 4096 --save_every 100 --seed {seed} "
          "--resume --max_steps {steps} --eval_every {eval_every}",)),
    Step("Let the base model write",
         "The parameters are fixed now; the model draws one token after another, each time by "
         "the probabilities it computed.",
         "A base model continues documents, and by chance never twice in the same way. It does "
         "not answer yet.",
         ('python sample.py --model {base} --prompt "Return the number of" --num_samples 3 '
          "--max_new_tokens 40",
          'python sample.py --model {base} --prompt "True, False, True, False, True," '
          "--temperature 0 --max_new_tokens 8",
          'python sample.py --model {base} --prompt "Return the" --top 8 --max_new_tokens 2')),
    Step("Make an assistant of it: supervised fine-tuning",
         "Conversations are written, and training continues on them; only the assistant's words "
         "are learnt.",
         "The model takes on the manner of the answers that it is shown: who it is, when to use "
         "a tool, how to end.",
         ("python demo/conversations.py --data {data} --out {conversations} --seed {seed} "
          "--examples {examples} --functions {functions}",
          "python chat_sft.py --model {base} --out {sft} --data {conversations}/identity.jsonl "
          "{conversations}/functions.jsonl:2 {conversations}/arithmetic.jsonl "
          "{conversations}/tool.jsonl:0.7 {conversations}/bits.jsonl "
          "{conversations}/spelling.jsonl --lr 0.005 --save_every 50 --seed {seed} --resume "
          "--epochs {epochs}")),
    Step("Let it practise: reinforcement learning",
         "The model answers each practice problem several times; what the right answers did "
         "becomes more probable.",
         "Nobody knows which way of thinking suits the model. It finds out by itself, because "
         "answers can be checked.",
         ("python rl_grpo.py --model {sft} --out {rl} --task {conversations}/practice_bits.jsonl "
          "--held_out {conversations}/held_out.jsonl --max_new_tokens 64 --save_every 8 "
          "--seed {seed} --resume --max_steps {rl_steps} --prompts {prompts} "
          "--group_size {group_size} --eval_every {rl_eval_every}",)),
    Step("Ask all three models what they never saw",
         "Base model, assistant and reasoner get the same problems, which were held out from all "
         "training.",
         "Only problems that were never shown tell learning from memory.",
         ("python eval.py --model {base} --tasks {conversations}/held_out.jsonl",
          "python eval.py --model {sft} --tasks {conversations}/held_out.jsonl",
          "python eval.py --model {rl} --tasks {conversations}/held_out.jsonl")),
    Step("Write the report",
         "One page tells the story of this run; a summary says whether it kept what the demo "
         "promises.",
         "A claim counts when a figure from the logs stands beside it.",
         ("python report.py {base} {sft} {rl} --data {data}",
          "python report.py summary {base} {sft} {rl} --data {data}")),
)

def fill(command, names):
    """A command of STEPS → its words. Text is split first, so that a path may contain a space."""
    return [word.format(**names) for word in shlex.split(command)]

# ---- Running them --------------------------------------------------------------------------------

def run(words):
    """Prints a command as it could be typed, and runs it. Ends the demo with its exit status."""
    python = shown_python()
    print("$ " + shlex.join([python, *words[1:]]), flush=True)
    done = subprocess.run([sys.executable, *words[1:]], check=False)
    if done.returncode:
        # a status below 0 is a signal; a shell would report 128 more than its number
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)

def shown_python():
    """This Python as one would type it in the project's folder."""
    path = Path(sys.executable)
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return str(path)

def parse_args():
    parser = argparse.ArgumentParser(description="from a small web to a model that reasons")
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="tiny only shows that everything works")
    add("--seed", type=int, default=1337, help="of training and conversations")
    add("--data", help="folder of data (default: data/demo-SIZE)")
    add("--run", help="the models' folders are RUN-base, RUN-sft, RUN-rl (default: runs/demo-SIZE)")
    add("--conversations", help="folder of conversations (default: DATA/chat)")
    return parser.parse_args()

def main():
    args = parse_args()
    data = args.data or f"data/demo-{args.size}"
    prefix = args.run or f"runs/demo-{args.size}"
    names = dict(SIZES[args.size], seed=args.seed, data=data, base=f"{prefix}-base",
                 sft=f"{prefix}-sft", rl=f"{prefix}-rl",
                 conversations=args.conversations or f"{data}/chat")
    os.chdir(ROOT)
    # GNU OpenMP's idle threads sleep sooner, which helps where other programs run
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for number, step in enumerate(STEPS, 1):
        print(f"\n== {number} of {len(STEPS)}: {step.title}\n{step.what}\n{step.why}\n", flush=True)
        for command in step.commands:
            run(fill(command, names))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
