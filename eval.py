"""
Evaluation: what a model can do, in numbers, and the report of a whole run.

    python eval.py --model runs/demo-rl --tasks data/demo/chat/held_out.jsonl             # CPU
    python eval.py --model runs/d24 --tasks hellaswag,core                                # 1 GPU
    python eval.py --model runs/d24-sft --tasks gsm8k,chat --max_examples 500
    python eval.py report runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python eval.py summary runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python eval.py hellaswag --tokenizer data/fineweb/tokenizer          # for train_gpt2.cu

    in:  <run>/model.safetensors, config.json, the tokenizer; log.jsonl for report and summary
    out: <run>/eval.json {task: figures}; report.html, one file that loads nothing

There are two ways to ask. By log-likelihood: the model reads every possible answer, and the most
probable one is its choice; this suits base models. By generation: it replies greedily to the chat
prompt, and the reply is checked. A base model is asked in that same prompt, whose special tokens it
has never seen, so that before and after training compare one thing.

    hellaswag    which of four endings? The mean log-prob a token over the whole ending decides
    core         22 tasks of three types, few-shot; each is centered, so that guessing is 0
    gsm8k        the number behind the last #### of the reply
    chat         ChatCORE: ARC and MMLU by the most probable letter, GSM8K; the mean of centered
    FILE.jsonl   problems of chat_sft.py make: accuracy for each kind

Papers: HellaSwag (arXiv 1905.07830), DCLM's CORE (2406.11794), GSM8K (2110.14168), ARC
(1803.05457), MMLU (2009.03300).
Differs from the papers: log-probs are averaged over tokens, not bytes, as llm.c does. The order of
rows and the choice of shots follow nanochat's seeds; the scored span is the whole answer, as in
llm-foundry, where nanochat leaves out first tokens that all choices share. ChatCORE is without
HumanEval, which would run code that a model wrote.
"""
import argparse
import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from array import array
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path

import torch
from tqdm import tqdm

from model import Ranks, init_ranks, load_checkpoint, read_log, write_json
from sample import Engine, find_run, is_correct, load_tokenizer, read_problems

SEED = 1337     # of the order of rows; --max_examples N asks the first N of that order
GET_CORE = ("get it with: curl -LO https://karpathy-public.s3.us-west-2.amazonaws.com/"
            "eval_bundle.zip && unzip eval_bundle.zip -d data; or name its folder with --core_dir")
GET_GSM8K = ("get test.jsonl from https://github.com/openai/grade-school-math, folder "
             "grade_school_math/data; or name it with --gsm8k")

# ---- Log-likelihood ------------------------------------------------------------------------------

def token_spans(tokenizer, pairs):
    """(context, continuation) texts → spans (ids, start): ids[start:] is what gets scored.

    The text is cut into tokens as a whole, since " Paris" is one token even where the space belongs
    to the context; the span begins where the context's own tokens stop agreeing with it.
    """
    contexts = tokenizer.encode_batch([context for context, _ in pairs])
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    return [([tokenizer.eot, *whole], 1 + len(os.path.commonprefix([context, whole[:-1]])))
            for context, whole in zip(contexts, wholes)]

def batches(spans, block_size, batch_tokens):
    """Longest first, so that little is padding → (indices, inputs, targets (B, T)); -1: not scored.

    ids[start] is predicted at position start - 1. Padding comes last, where causal attention hides
    it. What is longer than the model's context loses its beginning.
    """
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i][0]))
    while order:
        T = min(len(spans[order[0]][0]) - 1, block_size)
        B = max(1, batch_tokens // T)
        rows, order = order[:B], order[B:]
        x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
        for b, i in enumerate(rows):
            ids, start = spans[i]
            cut = max(0, len(ids) - 1 - T)
            ids, start = torch.tensor(ids[cut:]), max(1, start - cut)
            x[b, :len(ids) - 1], y[b, start - 1:len(ids) - 1] = ids[:-1], ids[start:]
        yield rows, x, y

@torch.inference_mode()
def score(model, spans):
    """Spans → for each, (mean log-prob a token in nats, whether greedy decoding would write it)."""
    device, training, scores = next(model.parameters()).device, model.training, [None] * len(spans)
    model.eval()
    batch_tokens = 2 ** 15 if device.type == "cuda" else 2 ** 12
    for rows, x, y in batches(spans, model.config.block_size, batch_tokens):
        x, y = x.to(device), y.to(device)
        hidden, targets = model.hidden(x)[y >= 0], y[y >= 0]    # (N, C), (N,): only what is scored
        logprobs, greedy = [], []
        for h, t in zip(hidden.split(1024), targets.split(1024)):
            logits = model.logits(h)                            # (1024, V)
            logprobs.append(logits.log_softmax(-1).gather(1, t[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == t)
        counts = (y >= 0).sum(1).tolist()
        logprobs, greedy = torch.cat(logprobs).split(counts), torch.cat(greedy).split(counts)
        for i, p, g in zip(rows, logprobs, greedy):
            scores[i] = (p.mean().item(), bool(g.all()))
    model.train(training)
    return scores

def measure(engine, questions, n, name, ranks=Ranks()):
    """questions: n pairs (spans, gold); gold None: greedy decoding must write the only span.

    → {"accuracy", "n", "cut"}; cut: questions whose beginning did not fit the model's context.
    Each rank answers its share.
    """
    right = done = cut = 0
    questions = itertools.islice(questions, ranks.rank, None, ranks.world_size)
    with tqdm(total=n // ranks.world_size, desc=name, unit="question", leave=False,
              disable=not ranks.is_main) as progress:
        while chunk := list(itertools.islice(questions, 64)):
            scores = iter(score(engine.model, [span for spans, _ in chunk for span in spans]))
            for spans, gold in chunk:
                mine = [next(scores) for _ in spans]
                best = max(range(len(mine)), key=lambda i: mine[i][0])
                right += mine[0][1] if gold is None else best == gold
                cut += max(len(ids) for ids, _ in spans) - 1 > engine.model.config.block_size
            done += len(chunk)
            progress.update(len(chunk))
            progress.set_postfix_str(f"accuracy {right / done:.3f}")
    right, done, cut = map(int, ranks.sum(right, done, cut))
    return dict(accuracy=right / done, n=done, cut=cut)

# ---- CORE and HellaSwag --------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """A task by log-likelihood. kind: multiple_choice (one context, several answers), schema
    (several contexts, one answer), language_modeling (one of each), letters (a choice in the chat
    prompt). baseline: accuracy of guessing."""
    label: str
    file: str
    kind: str = "multiple_choice"
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0

HELLASWAG = Task("hellaswag", "language_understanding/hellaswag.jsonl")
CHAT_TASKS = [Task(label, f"world_knowledge/{label}.jsonl", "letters", baseline=0.25)
              for label in ("arc_easy", "arc_challenge", "mmlu")]

def existing(path):
    """This file, with or without .gz; None where there is neither."""
    name = str(path).removesuffix(".gz")
    return next((p for p in (Path(name), Path(name + ".gz")) if p.is_file()), None)

def read_rows(path):
    """The rows of a .jsonl or .jsonl.gz in the order of SEED."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            rows = [dict(json.loads(line)) for line in lines if line.strip()]
        if not rows:
            raise ValueError("it is empty")
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}; a test set is lines of one JSON object each, in UTF-8; "
                         "get it again") from None
    random.Random(SEED).shuffle(rows)
    return rows

def candidates(task, row):
    """One (context, continuation) for each possible answer of a row."""
    if task.kind == "multiple_choice":
        return [(row["query"] + task.delimiter, choice) for choice in row["choices"]]
    if task.kind == "schema":
        return [(o + task.delimiter, row["continuation"]) for o in row["context_options"]]
    return [(row["context"].strip() + task.delimiter, row["continuation"])]

def core_questions(tokenizer, task, rows, n):
    """The first n rows as questions; before each stand `shots` others with their right answers."""
    for i, row in enumerate(rows[:n]):
        shots = min(task.shots, len(rows) - 1)
        prefix = ""
        for j in random.Random(1234 + i).sample(range(len(rows) - 1), shots):
            shot = rows[j + (j >= i)]       # never the row itself
            prefix += "".join(candidates(task, shot)[shot.get("gold", 0)]) + "\n\n"
        pairs = [(prefix + context, answer) for context, answer in candidates(task, row)]
        gold = None if task.kind == "language_modeling" else row["gold"]
        yield token_spans(tokenizer, pairs), gold

def letter_questions(tokenizer, task, rows, n):
    """Multiple choice in the chat prompt: the candidates are the letters a reply may begin with."""
    for row in rows[:n]:
        letters = "ABCDEFGHIJ"[:len(row["choices"])]
        options = "" if row["choices"] == list(letters) else "".join(
            f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"]))
        text = row["query"].strip().removeprefix("Question: ").removesuffix("Answer:").strip()
        question = dict(role="user", content=f"{text}\n{options}Answer with one letter.")
        ids, _ = tokenizer.render([question], for_completion=True)
        yield [([*ids, *tokenizer.encode_ordinary(c)], len(ids)) for c in letters], row["gold"]

def run_task(engine, task, path, max_examples=None, ranks=Ranks()):
    """→ {"accuracy", "n", "cut"} of one task."""
    rows = read_rows(path)
    n = min(max_examples or len(rows), len(rows))
    ask = letter_questions if task.kind == "letters" else core_questions
    try:
        return measure(engine, ask(engine.tokenizer, task, rows, n), n, task.label, ranks)
    except KeyError as error:
        raise SystemExit(f"{path}: a row has no {error}; every row of {task.kind} has one; get "
                         "the file again") from None

def write_hellaswag():
    """HellaSwag as tokens → <core_dir>/hellaswag.bin, which train_gpt2.cu reads: int32 magic,
    version, n_vocab, the int32s in the file, questions; of each: gold, answers; of each answer:
    its ids, where what is scored begins, the ids."""
    parser = argparse.ArgumentParser(prog="eval.py")
    add = parser.add_argument
    add("command", choices=("hellaswag",), help="its questions as tokens, for train_gpt2.cu")
    add("--core_dir", default="data/eval_bundle", help="folder of eval_data/")
    add("--tokenizer", default="gpt2", help="folder of a tokenizer, or gpt2")
    add("--max_examples", type=int, default=500, help="questions, as many as train_gpt2.py asks")
    args = parser.parse_args()
    if not (path := existing(Path(args.core_dir, "eval_data", HELLASWAG.file))):
        raise SystemExit(f"{args.core_dir} holds no HellaSwag; it is what is written; {GET_CORE}")
    tokenizer, rows = load_tokenizer(args.tokenizer), read_rows(path)[:args.max_examples]
    words = array("i", [20251121, 1, tokenizer.n_vocab, 0, len(rows)])
    for spans, gold in core_questions(tokenizer, HELLASWAG, rows, len(rows)):
        words.extend([gold, len(spans)])
        for ids, start in spans:
            words.extend([len(ids), start, *ids])
    words[3] = len(words)
    part, out = (Path(args.core_dir, "hellaswag.bin" + end) for end in (".part", ""))
    part.write_bytes(words.tobytes())
    part.replace(out)
    print(f"{out}: {len(rows)} questions, {tokenizer.n_vocab} tokens")

def core_tasks(folder):
    """What core_tasks.csv lists; or core.yaml, with the baselines of eval_meta_data.csv."""
    table, listed, about = (Path(folder, name) for name in (
        "core_tasks.csv", "core.yaml", "eval_meta_data.csv"))
    if table.is_file():
        rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    elif listed.is_file() and about.is_file():
        rows, about = [], csv.DictReader(about.read_text("utf-8").splitlines())
        baselines = {row["Eval Task"]: row["Random baseline"] for row in about}
        for entry in re.split(r"^- *", listed.read_text("utf-8"), flags=re.M)[1:]:
            row = dict(re.findall(r"^ *(\w+): *(.+?) *(?:#.*)?$", entry, re.M))
            rows.append(dict(label=row["label"], file=row["dataset_uri"], type=row["icl_task_type"],
                             num_fewshot=row["num_fewshot"].strip("[]"),
                             continuation_delimiter=row.get("continuation_delimiter", '" "'),
                             random_baseline_percent=baselines[row["label"]]))
    else:
        raise SystemExit(f"{table} is not there; it lists the tasks of CORE; {GET_CORE}")
    return [Task(row["label"], row["file"], row["type"], int(row["num_fewshot"]),
                 json.loads(row["continuation_delimiter"]),
                 float(row["random_baseline_percent"]) / 100) for row in rows]

def centered(accuracy, baseline):
    """Guessing → 0, all right → 1.

    >>> centered(0.25, 0.25), centered(1.0, 0.25)
    (0.0, 1.0)
    """
    return (accuracy - baseline) / (1 - baseline)

def run_tasks(engine, tasks, folder, max_examples, ranks=Ranks()):
    """Yields (label, baseline, result); a task without a file has the result None."""
    for task in tasks:
        path = existing(Path(folder, "eval_data", task.file))
        result = path and run_task(engine, task, path, max_examples, ranks)
        yield task.label, task.baseline, result

def mean_of(name, results):
    """(label, baseline, result) … → {name: mean of centered, "n", "tasks", "left_out"}."""
    tasks, left_out = {}, []
    for label, baseline, result in results:
        if result:
            tasks[label] = dict(result, centered=centered(result["accuracy"], baseline))
            print(" | ".join([f"{label:32s}", *figures(tasks[label])]), flush=True)
        else:
            left_out.append(label)
    if not tasks:
        raise SystemExit(f"{', '.join(left_out)}: no file; {name} needs one of them; {GET_CORE}")
    return {name: sum(task["centered"] for task in tasks.values()) / len(tasks),
            "n": sum(task["n"] for task in tasks.values()), "tasks": tasks, "left_out": left_out}

def core(engine, folder, max_examples=None):
    """→ {"core": mean of centered, "n", "tasks": {label: result}, "left_out": [labels]}."""
    return mean_of("core", run_tasks(engine, core_tasks(folder), folder, max_examples))

def scores(engine, folder, max_examples=None, ranks=Ranks()):
    """For the log of a training run: {"hellaswag": accuracy, "core": mean of centered}."""
    tasks = core_tasks(folder)
    path = existing(Path(folder, "eval_data", HELLASWAG.file))
    results = [(baseline, result["accuracy"]) for _, baseline, result
               in run_tasks(engine, tasks, folder, max_examples, ranks) if result]
    if not path or not results:
        raise SystemExit(f"{folder} holds no HellaSwag or no CORE tasks; they are asked while "
                         f"training; {GET_CORE}")
    return dict(hellaswag=run_task(engine, HELLASWAG, path, max_examples, ranks)["accuracy"],
                core=sum(centered(a, baseline) for baseline, a in results) / len(results))

# ---- Replies to the chat prompt ------------------------------------------------------------------

def solve(engine, path, max_examples=None, max_new_tokens=128):
    """Greedy replies to the problems of a file → {"accuracy", "n", "cut", "kinds"}.

    kinds: {kind: {"accuracy", "n"}}; cut: questions that do not fit the context and count as wrong.
    """
    problems, room, rights = read_problems(path), engine.model.config.block_size, {}
    random.Random(SEED).shuffle(problems)
    problems = problems[:max_examples or None]
    for p in problems:
        p["tokens"] = len(engine.tokenizer.render(p["messages"], for_completion=True)[0])
    problems.sort(key=lambda p: p["tokens"])        # one length a batch: little is padding
    for i in tqdm(range(0, len(problems), 64), desc=Path(path).name, unit="batch", leave=False):
        batch = [p for p in problems[i:i + 64] if p["tokens"] < room]
        replies = engine.answer([p["messages"] for p in batch], max_new_tokens=max_new_tokens,
                                temperature=0)
        for p, reply in itertools.zip_longest(problems[i:i + 64], replies):
            right = reply is not None and is_correct(reply, p)
            rights.setdefault(p["kind"], []).append(right)
    kinds = {k: dict(accuracy=sum(r) / len(r), n=len(r)) for k, r in sorted(rights.items())}
    return dict(accuracy=sum(map(sum, rights.values())) / len(problems), n=len(problems),
                cut=sum(p["tokens"] >= room for p in problems), kinds=kinds)

def chat_core(engine, folder, gsm8k, max_examples=None, max_new_tokens=256):
    """ChatCORE over what is at hand: letters against a baseline of .25, GSM8K against 0."""
    def results():
        path = existing(gsm8k)
        yield from run_tasks(engine, CHAT_TASKS, folder, max_examples)
        yield "gsm8k", 0.0, path and solve(engine, path, max_examples, max_new_tokens)
        yield "humaneval", 0.0, None
    return mean_of("chat_core", results())

# ---- Measuring a run -----------------------------------------------------------------------------

def digest(*paths):
    """12 hex digits that change with the content of these files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]

def plan(args):
    """--tasks → [(name, its first file, arguments to remember)]; each needs one file at least."""
    jobs = []
    for name in args.tasks.split(","):
        tasks = core_tasks(args.core_dir) if name == "core" else dict(
            chat=CHAT_TASKS, hellaswag=[HELLASWAG]).get(name, [])
        files = [Path(args.core_dir, "eval_data", task.file) for task in tasks]
        files += [args.gsm8k] if name in ("gsm8k", "chat") else [] if tasks else [name]
        found = [path for path in map(existing, files) if path]
        if not found:
            remedy = GET_CORE if tasks else GET_GSM8K if name == "gsm8k" else "check --tasks"
            raise SystemExit(f"{files[0]} is not there; a task is hellaswag, core, gsm8k, chat or a"
                             f" .jsonl file, and reads its file; {remedy}")
        length = args.max_new_tokens or (256 if name in ("gsm8k", "chat") else 128)
        length = None if name in ("core", "hellaswag") else length
        jobs.append((name, found[0], dict(files=digest(*found), max_examples=args.max_examples,
                                          max_new_tokens=length)))
    return jobs

def parse_args():
    parser = argparse.ArgumentParser(description="measure a model; see also: report, summary")
    add = parser.add_argument
    add("--model", help="run folder; default: the newest under runs/")
    add("--tasks", required=True, help="hellaswag,core,gsm8k,chat,FILE.jsonl …, with commas")
    add("--core_dir", default="data/eval_bundle", help="folder of eval_data/ and the list of tasks")
    add("--gsm8k", default="data/gsm8k/test.jsonl", help="GSM8K's test set")
    add("--max_examples", type=int, help="questions a task, at most (default: all)")
    add("--max_new_tokens", type=int, help="tokens a reply, at most (128; gsm8k and chat: 256)")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if (args.max_examples or 0) < 0:
        raise SystemExit("--max_examples is below 0; it counts questions; leave it out for all")
    return args

def evaluate():
    args = parse_args()
    jobs = plan(args)       # bad names and missing files are found before a model is loaded
    run, folder, n = find_run(args.model, STAGES), args.core_dir, args.max_examples
    results = Run(run).results
    tokenizer = load_tokenizer(run)
    # conversation tokens that GPT-2 lacks take 1.6e-4 of its probability at most: mean rows, Jensen
    model, meta = load_checkpoint(run, init_ranks(args.device).device, tokenizer.n_vocab)
    print(f"{run}: stage {meta['stage']}, step {meta['step']}, {model.num_params():,} parameters")
    engine = Engine(model.freeze(), tokenizer)
    checkpoint = dict(stage=meta["stage"], step=meta["step"], seed=SEED,
                      weights=digest(run / "model.safetensors"))
    for name, path, arguments in jobs:
        key, length = dict(checkpoint, arguments=arguments), arguments["max_new_tokens"]
        if key.items() <= results.get(name, {}).items():
            print(f"{name}: skipped, {run}/eval.json has it for these weights and arguments")
            continue
        if meta["stage"] == "pretrain" and length:
            print(f"{name}: a base model, asked in the chat prompt that it has never seen")
        result = (core(engine, folder, n) if name == "core" else
                  run_task(engine, HELLASWAG, path, n) if name == "hellaswag" else
                  chat_core(engine, folder, args.gsm8k, n, length) if name == "chat" else
                  solve(engine, path, n, length))
        results[name] = {**result, **key}
        write_json(run / "eval.json", results)
        print(" | ".join([name, *figures(result)]), flush=True)

def figures(result):
    """A task's result as the fields of a log line."""
    shares = {key: value for key, value in result.items() if isinstance(value, float)}
    if len(result.get("kinds", {})) > 1:
        shares |= {kind: task["accuracy"] for kind, task in result["kinds"].items()}
    left_out = ", ".join(result.get("left_out", []))
    return ([f"{key} {share:.4f}" for key, share in shares.items()]
            + [f"{key} {result[key]}" for key in ("n", "cut") if result.get(key)]
            + [f"left out: {left_out}"] * bool(left_out))

# ---- What runs left on disk, and the demo's verdicts ---------------------------------------------

STAGES = dict(pretrain="base", sft="SFT", rl="RL")
CHANCE = dict(bits=0.5)         # even or odd; nobody guesses the answer to an open question

def read_json(path):
    """A JSON object; {} where there is no file."""
    try:
        return json.loads(Path(path).read_text("utf-8")) if Path(path).is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: {error}; it is a JSON file; delete it, make it again") from None

class Run:
    """A run's config.json, log.jsonl and eval.json; what is missing is empty."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise SystemExit(f"{path} is no folder; a run is a training's --out; check the path")
        self.log = read_log(path)
        self.results = read_json(self.path / "eval.json")
        self.header = next((row["header"] for row in self.log if "header" in row), {})
        guess = "rl" if self.points("reward") else "sft" if self.rows("when") else "pretrain"
        about = read_json(self.path / "config.json").get("deepdive", {})
        self.stage = STAGES.get(about.get("stage", guess), about.get("stage"))
        self.seconds = self.log[-1].get("seconds", 0) if self.log else 0

    def rows(self, *keys):
        return [row for row in self.log if all(key in row for key in keys)]

    def points(self, key, *also):
        """[(step, value)] of the rows that have these keys, where the value is a finite number."""
        return [(row["step"], row[key]) for row in self.rows("step", key, *also)
                if isinstance(row[key], (int, float)) and math.isfinite(row[key])]

def accuracy_sources(runs):
    """[(source, {"base" | "SFT" | "RL": {kind: accuracy}})]; a source asked all the same, greedily.

    First eval.json, by the hash of the problems; then the logs, where RL's own first measurement
    stands for SFT. Of several runs of one stage the last one counts.
    """
    sources, logged = {}, {}
    for run in sorted(runs, key=lambda run: run.stage == "RL"):
        for name, result in run.results.items():
            if "kinds" in result:
                asked = result["arguments"]
                source = (f"eval.json: {result['n']} of {Path(name).name} (hash {asked['files']}), "
                          f"replies of {asked['max_new_tokens']} tokens at most")
                shares = {kind: v["accuracy"] for kind, v in result["kinds"].items()}
                sources.setdefault(source, {})[run.stage] = shares
        for row in run.rows("when", "accuracy"):
            stage = "base" if row["when"] == "before" else "SFT"
            logged.setdefault(stage, {}).update(row["accuracy"])
        for row in run.rows("kind", "accuracy"):
            for stage in ("SFT", "RL") if row["step"] == 0 else ("RL",):
                logged.setdefault(stage, {})[row["kind"]] = row["accuracy"]
    return [*sources.items(), *([("training logs", logged)] if logged else [])]

def gain(runs, kind, before, after, wanted):
    """(whether accuracy rose by `wanted` points, and above chance; the figures as text)."""
    for source, stages in accuracy_sources(runs):
        a, b = stages.get(before, {}).get(kind), stages.get(after, {}).get(kind)
        if a is not None and b is not None:
            points = round(100 * (b - a), 6)        # .65 - .50 is 15 points, not a hair less
            chance = f", above chance {CHANCE[kind]:.0%}" if kind in CHANCE else ""
            return points >= wanted and b > CHANCE.get(kind, 0), (
                f"{before} {a:.1%}, {after} {b:.1%}: {points:+.1f} points; wanted +{wanted}{chance}"
                f" ({source.partition(':')[0]})")
    return False, f"no figure: no log or eval.json has {kind} of both {before} and {after}"

def verdicts(runs):
    """[(passed, claim, figures)] for what the demo promises."""
    final = [row for run in runs for row in run.rows("val_bpb", "gzip", "xz")]
    bpb = False, "no figure: no log has the end of a train_gpt2.py run"
    if final:
        model, gz, xz = (final[-1][key] for key in ("val_bpb", "gzip", "xz"))
        bpb = model < gz, f"model {model:.4f}, gzip -9 {gz:.4f}, xz -9e {xz:.4f}"
    claims = {"base: val bits a byte below gzip": bpb,
              "SFT: identity, held out": gain(runs, "identity", "base", "SFT", 30),
              "SFT: functions, held out": gain(runs, "functions", "base", "SFT", 30),
              "RL: bits, held out": gain(runs, "bits", "SFT", "RL", 15)}
    return [("pass" if passed else "fall short", claim, text)
            for claim, (passed, text) in claims.items()]

# ---- The report; text from runs enters it only through table and curve, which escape it ----------

def table(head, rows):
    """Column names and rows of anything → HTML; every cell is escaped."""
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<div class=wide><table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table></div>"

def section(name, title, *parts):
    body = "\n".join(filter(None, parts)) or "<p>Nothing of this is recorded here.</p>"
    return f"<section id={name}>\n<h2>{title}</h2>\n{body}\n</section>"

def curve(title, lines, levels={}, W=640, H=240):
    """An SVG of lines {name: [(step, y)]} and dashed levels {name: y}; "" if there is no point."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = zip(*itertools.chain(*lines.values()))
    ys = [*ys, *levels.values()]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    pad = 0.05 * (max(ys) - min(ys)) or 0.5
    y0, y1 = min(ys) - pad, max(ys) + pad
    X = lambda x: round(56 + (x - x0) / (x1 - x0) * (W - 72), 1)
    Y = lambda y: round(10 + (y1 - y) / (y1 - y0) * (H - 40), 1)
    svg = [f"<text x=50 y={Y(y) + 4} class=end>{y:.6g}</text>"
           f"<path class=grid d='M56 {Y(y)}H{W - 16}'/>" for y in ticks(y0, y1, 5)]
    svg += [f"<text x={X(x)} y={H - 10} class=mid>{x:.6g}</text>" for x in ticks(x0, x1, 8)]
    svg += [f"<text x={W - 18 - 110 * i} y={Y(y) - 4} class=end>{escape(name)} {y:.4g}</text>"
            f"<path class=level d='M56 {Y(y)}H{W - 16}'/>"
            for i, (name, y) in enumerate(levels.items())]
    for i, points in enumerate(lines.values()):
        size = -(-len(points) // 400)       # at most 400 points a line, each the mean of `size`
        groups = [zip(*points[j:j + size]) for j in range(0, len(points), size)]
        at = [[sum(values) / len(values) for values in group] for group in groups]
        path = " ".join(f"{X(x)},{Y(y)}" for x, y in at)
        svg.append(f"<polyline class=c{i % 4} points='{path}'/>")
        svg += [f"<circle class=c{i % 4} cx={X(x)} cy={Y(y)} r=2 />" for x, y in at if len(at) < 50]
    names = " ".join(f"<span class=c{i % 4}>● {escape(k)}</span>" for i, k in enumerate(lines))
    return (f"<figure><figcaption>{escape(title)}, by step: {names}</figcaption>"
            f"<svg viewBox='0 0 {W} {H}'>{''.join(svg)}</svg></figure>")

def ticks(low, high, most):
    """Round numbers between low and high: 0, 9.3, 5 → 0, 2, 4, 6, 8."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    size *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * size) <= most)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]

STYLE = """
:root { color-scheme: light dark }
.c0 { color: light-dark(#0b62c4, #6ab0ff) } .c1 { color: light-dark(#c4530b, #ff9d5c) }
.c2 { color: light-dark(#1c7f3c, #6fd08c) } .c3 { color: light-dark(#8a3fc0, #c99bf2) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem; white-space: pre-wrap;
  border-bottom: 1px solid #8886 }
svg { width: 100%; font-size: 12px } text, circle { fill: currentColor }
.mid { text-anchor: middle } .end { text-anchor: end }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5 }
.grid { stroke: #8884 } .level { stroke: currentColor; stroke-dasharray: 5 4 }
"""

def filter_table(funnel):
    """funnel: the rows of index.json that prepare_fineweb.py wrote, one a step."""
    if not funnel:
        return "<p>No filter table: name the folder of prepare_fineweb.py with --data.</p>"
    counts = lambda why: ", ".join(f"{w} {n}" for w, n in sorted(why.items(), key=lambda x: -x[1]))
    rows = [(row["step"], row["in"], row["kept"], f"{row['kept'] / max(1, row['in']):.1%}",
             f"{row.get('bytes', 0) / 1e6:.2f}", f"{row.get('docs_per_s', 0):.0f}",
             counts(row.get("dropped", {})), counts(row.get("flagged", {}))) for row in funnel]
    return table(("step", "in", "kept", "share", "MB of text", "pages/s", "why dropped",
                  "noted, not dropped"), rows)

def gallery(run, most=12):
    """What the model wrote at some steps, the first and the last among them."""
    rows = dict.fromkeys((row["step"], row["sample"]) for row in run.rows("step", "sample"))
    steps = sorted({step for step, _ in rows})
    shown = {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)} if steps else ()
    return rows and table((f"{run.path}, step", "sample"), [row for row in rows if row[0] in shown])

def run_curves(runs):
    """{section: curves}; a curve is "" where a log has no such rows."""
    parts = dict(loss=[], bpb=[], rl=[])
    for run in runs:
        held_out, levels = {}, {}
        for row in run.rows("step", "kind", "accuracy"):
            held_out.setdefault(row["kind"], []).append((row["step"], row["accuracy"]))
        for row in run.rows("gzip", "xz"):
            levels = {"gzip -9": row["gzip"], "xz -9e": row["xz"]}
        chance = {f"chance, {kind}": CHANCE[kind] for kind in held_out if kind in CHANCE}
        losses = dict(train=run.points("loss"), val=run.points("val_loss"))
        if run.stage != "RL":       # on fresh samples the loss says nothing, see rl_grpo.py
            parts["loss"].append(curve(f"{run.path} ({run.stage}), loss in nats a token", losses))
        parts["bpb"].append(curve(f"{run.path}, val bits a byte", dict(model=run.points("val_bpb")),
                                  levels))
        tokens = dict(tokens=run.points("reply_tokens", "reward"))
        parts["rl"] += [
            curve(f"{run.path}, mean reward of samples", dict(reward=run.points("reward"))),
            curve(f"{run.path}, mean reply length of samples", tokens),
            curve(f"{run.path}, greedy accuracy on held-out problems", held_out, chance)]
    return parts

def accuracy_tables(runs):
    """One table a source; a stage that it did not ask has a dash."""
    for source, stages in accuracy_sources(runs):
        rows = [(kind, *(f"{stages[s][kind]:.1%}" if kind in stages.get(s, {}) else "–"
                         for s in STAGES.values()), f"{CHANCE.get(kind, 0):.0%}")
                for kind in dict.fromkeys(itertools.chain(*stages.values()))]
        yield table((source, "base (before SFT)", "SFT (after)", "RL", "chance"), rows)

def result_rows(runs):
    """(run, task, figures) of each eval.json, the tasks of a mean below it."""
    for run in runs:
        for name, result in run.results.items():
            yield run.path, name, " | ".join(figures(result))
            for label, task in result.get("tasks", {}).items():
                yield run.path, f"· {label}", " | ".join(figures(task))

def cost_table(runs, funnel):
    """Seconds from the end of each log; the trainer's own running cost counts every GPU it used."""
    seconds = sum(row.get("seconds", 0) for row in funnel)
    rows = []
    if funnel:
        spent = timedelta(seconds=int(seconds))
        rows.append(("data", "", "", f"{spent}, summed over workers", ""))
    for run in runs:
        price = run.header.get("flags", {}).get("gpu_hour_usd") or 0
        usd = [run.seconds / 3600 * price, *(row["usd"] for row in run.rows("usd"))][-1]
        steps = max((row["step"] for row in run.rows("step")), default="–")
        cost = f"${usd:.2f}" if price else "–"
        rows.append((run.path, run.stage, steps, str(timedelta(seconds=int(run.seconds))), cost))
    total = timedelta(seconds=int(sum(run.seconds for run in runs)))
    rows.append(("all runs", "", "", str(total), ""))
    return table(("", "stage", "steps", "h:mm:ss", "cost"), rows)

def report(runs, funnel, out):
    """Writes one HTML file: no script, no image, no font, nothing to load."""
    keys = ("params", "commit", "torch", "python", "device", "command")
    about = [(run.path, run.stage, *(run.header.get(key, "–") for key in keys)) for run in runs]
    curves, results = run_curves(runs), list(result_rows(runs))
    title = escape("deepdive: " + ", ".join(run.path.name for run in runs))
    sections = [
        section("runs", "Runs", table(("run", "stage", *keys), about)),
        section("verdicts", "The demo's promises", table(("", "claim", "figures"), verdicts(runs))),
        section("data", "What the filters kept and dropped", filter_table(funnel)),
        section("loss", "Loss", *curves["loss"]),
        section("bpb", "Bits per byte", *curves["bpb"]),
        section("samples", "From noise to English: samples by training step", *map(gallery, runs)),
        section("accuracy", "Base, SFT, RL on the same held-out problems", *accuracy_tables(runs)),
        section("rl", "Reinforcement learning: reward, reply length, accuracy", *curves["rl"]),
        section("results", "All that eval.py measured",
                results and table(("run", "task", "figures"), results)),
        section("cost", "Time and cost of every stage", cost_table(runs, funnel))]
    page = ("<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
            f"<meta name=viewport content='width=device-width'>\n<title>{title}</title>\n"
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</html>\n")
    part = Path(f"{out}.part")
    part.write_text(page, encoding="utf-8", errors="replace")
    part.replace(out)
    print(f"{out}: {len(page) / 1e3:.0f} kB, open it in a browser")

def summary(runs, funnel, strict):
    """Prints the verdicts; returns the exit status."""
    for last in funnel[-1:]:
        print(f"data: {last['kept']} documents, {last['bytes'] / 1e6:.2f} MB of text")
    judged = verdicts(runs)
    for verdict, claim, text in judged:
        print(f"{verdict:10s} | {claim:32s} | {text}")
    return int(strict and any(verdict != "pass" for verdict, _, _ in judged))

def read_runs():
    """The two subcommands that only read what runs left on disk."""
    parser = argparse.ArgumentParser(prog="eval.py")
    add = parser.add_argument
    add("command", choices=("report", "summary"), help="one HTML file; the demo's verdicts")
    add("runs", nargs="+", help="run folders, in the order of the stages")
    add("--data", help="folder of prepare_fineweb.py")
    add("--out", help="file of the report (default: report.html in the last run)")
    add("--strict", action="store_true", help="the summary exits with 1 if something falls short")
    args = parser.parse_args()
    runs = [Run(path) for path in args.runs]
    funnel = read_json(Path(args.data, "index.json")).get("funnel", []) if args.data else []
    if args.command == "summary":
        raise SystemExit(summary(runs, funnel, args.strict))
    report(runs, funnel, args.out or runs[-1].path / "report.html")

def main():
    commands = dict(report=read_runs, summary=read_runs, hellaswag=write_hellaswag)
    commands.get("".join(sys.argv[1:2]), evaluate)()

if __name__ == "__main__":
    main()
