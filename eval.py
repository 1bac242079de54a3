"""
Evaluation: how well a model does, in numbers.

    python eval.py --model runs/demo-rl --tasks data/demo/chat/held_out.jsonl             # CPU
    python eval.py --model runs/d24 --tasks hellaswag,core                                # 1 GPU
    python eval.py --model runs/d24-sft --tasks gsm8k,chat --max_examples 500
    python eval.py hellaswag --tokenizer data/fineweb/tokenizer          # for train_gpt2.cu

    in:  <run>/model.safetensors, config.json, the tokenizer; the tasks' files
    out: <run>/eval.json {task: figures}, which report.py shows: each accuracy with its standard
         error; with --documents, the share of questions that stand in these training documents,
         and the accuracy on the others (contamination.py)

A model is asked in one of two ways. By log-likelihood, the model reads every possible answer, and
the most probable one is its choice; this suits base models. What answers begin with, such as the
question and the solved examples before it, is read once. By generation, the model replies greedily
to the chat prompt, and the reply is checked. A base model gets the same chat prompt, although it
has never seen the special tokens in it, so that accuracies before and after fine-tuning can be
compared.

    hellaswag    one of four endings is right; the highest mean log-probability per token wins
    core         22 tasks of three types, few-shot; accuracies are centered: guessing scores 0
    gsm8k        the reply must end with the right number after ####
    chat         ChatCORE: the centered mean of ARC and MMLU (most probable letter) and GSM8K
    FILE.jsonl   problems as chat_sft.py make writes them; an accuracy for each kind

Papers: HellaSwag (arXiv 1905.07830), DCLM's CORE (2406.11794), GSM8K (2110.14168), ARC
(1803.05457), MMLU (2009.03300).
Differs from the papers: log-probabilities are averaged over tokens, not bytes, as llm.c does. The
order of the rows and the choice of the shots follow nanochat's seeds. The scored span is the whole
answer, as in llm-foundry, whereas nanochat leaves out first tokens that all choices share. ChatCORE
has no HumanEval, because that would run code that a model wrote. lm_eval finds the same
log-likelihoods if its contexts begin with <|endoftext|>, but compares their sums.
"""
import argparse
import csv
import hashlib
import itertools
import json
import math
import random
import re
import runpy
import signal
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

from model import load_checkpoint, write_json
from problems import (STAGES, cannot_write, check_text, declines, figures, is_correct, printable,
                      quoted, read_json, read_lines, read_problems, reason, share_of, text_of,
                      write_whole)
from sample import Engine, check_at_least, find_run, load_tokenizer
from training import Ranks, init_ranks

SEED = 1337     # shuffles the rows of every test set; --max_examples N takes the first N
GET_CORE = ("get it with: curl -LO https://karpathy-public.s3.us-west-2.amazonaws.com/"
            "eval_bundle.zip && unzip eval_bundle.zip -d data; or name its folder with --core_dir")
GET_GSM8K = ("get test.jsonl from https://github.com/openai/grade-school-math, folder "
             "grade_school_math/data; or name it with --gsm8k")

# ---- Test sets -----------------------------------------------------------------------------------

FIELDS = dict(multiple_choice=("query", "choices"), schema=("context_options", "continuation"),
              language_modeling=("context", "continuation"), letters=("query", "choices"))
LETTERS = "ABCDEFGHIJ"      # those of the kind "letters"

def read_rows(path, kind):
    """The rows of a test set for tasks of this kind, shuffled with SEED."""
    rows = read_lines(path, lambda row: as_question(kind, row), "get the file again")
    random.Random(SEED).shuffle(rows)
    return rows

def as_question(kind, row):
    """One row of a test set → itself; ValueError if no task of this kind can ask it."""
    for name in FIELDS[kind]:
        value = row[name]
        if name in ("choices", "context_options"):
            check_options(name, value, row["gold"])
        elif name == "continuation":
            check_text(name, value)
        elif not isinstance(value, str):        # a context may be empty
            raise ValueError(f"{name} must be a text, got {quoted(value)}")
    if kind == "letters" and len(row["choices"]) > len(LETTERS):
        raise ValueError(f"choices must be at most {len(LETTERS)}, got {len(row['choices'])}")
    return row

def check_options(name, options, gold):
    """ValueError if these are not texts with a right one at the place `gold`."""
    if not isinstance(options, list) or not options:
        raise ValueError(f"{name} must be a list of at least one text, got {quoted(options)}")
    for option in options:
        check_text(f"each of {name}", option)
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold must be a whole number from 0 to {len(options) - 1}, the place of "
                         f"the right one among {name}, got {quoted(gold)}")

def existing(path):
    """This file, with or without .gz; None if there is neither."""
    name = str(path).removesuffix(".gz")
    for found in (Path(name), Path(name + ".gz")):
        if found.is_file():
            return found
    return None

# ---- Questions with possible answers -------------------------------------------------------------

def measure(engine, questions, n, name, ranks=Ranks(), dirty=None):
    """n questions (spans, gold) → {"accuracy", "accuracy_error", "n", "cut"}. Each rank answers its
    share.

    cut counts the questions whose beginning did not fit into the model's context. dirty: for each
    question whether it is contaminated; then the accuracy on the others is measured, too.
    """
    from likelihood import is_right, score
    right = done = cut = found_dirty = clean_right = 0
    room = engine.model.config.block_size + 1
    flagged = zip(questions, dirty or itertools.repeat(False))
    mine = itertools.islice(flagged, ranks.rank, None, ranks.world_size)
    with tqdm(total=n // ranks.world_size, desc=printable(name), unit=" questions", leave=False,
              disable=not ranks.is_main) as progress:
        while chunk := list(itertools.islice(mine, 64)):
            found = score(engine.model, [spans for (spans, _), _ in chunk])
            for ((spans, gold), is_dirty), scores in zip(chunk, found):
                if is_dirty:
                    found_dirty += 1
                if is_right(scores, gold):
                    right += 1
                    if not is_dirty:
                        clean_right += 1
                if any(len(ids) > room for ids, _ in spans):
                    cut += 1
            done += len(chunk)
            progress.update(len(chunk))
            progress.set_postfix_str(f"accuracy {right / done:.3f}")
    right, done, cut, found_dirty, clean_right = map(int, ranks.sum(
        right, done, cut, found_dirty, clean_right))
    result = dict(share_of(right, done), cut=cut)
    if dirty:
        result.update(on_clean(found_dirty, done, clean_right))
    return result

def on_clean(n_dirty, n, clean_right):
    """n_dirty of n questions are contaminated, and clean_right of the others are answered right →
    what a result says about it."""
    found = dict(contaminated=n_dirty / n)
    if n_dirty < n:
        clean = share_of(clean_right, n - n_dirty)
        found.update({f"clean_{name}": value for name, value in clean.items()})
    return found

# ---- CORE and HellaSwag --------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """A task that is scored by log-likelihood. kind is one of

        multiple_choice    one context, several answers
        schema             several contexts, one answer
        language_modeling  one context, one answer that greedy decoding must write
        letters            several answers, listed in the chat prompt under letters
    """
    label: str
    file: str
    kind: str = "multiple_choice"
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0       # the accuracy of guessing

HELLASWAG = Task("hellaswag", "language_understanding/hellaswag.jsonl")
CHAT_TASKS = [Task(label, f"world_knowledge/{label}.jsonl", "letters", baseline=0.25)
              for label in ("arc_easy", "arc_challenge", "mmlu")]

def candidates(task, row):
    """One (context, continuation) for each possible answer of a row."""
    if task.kind == "multiple_choice":
        return [(row["query"] + task.delimiter, choice) for choice in row["choices"]]
    if task.kind == "schema":
        return [(o + task.delimiter, row["continuation"]) for o in row["context_options"]]
    return [(row["context"].strip() + task.delimiter, row["continuation"])]

def gold_of(task, row):
    """The place of the right candidate; None in language modeling, which has one candidate."""
    return None if task.kind == "language_modeling" else row["gold"]

def core_pairs(task, rows, n):
    """Yields for each of the first n rows its candidates, before which stand `shots` solved
    examples, and gold."""
    for i, row in enumerate(rows[:n]):
        shots = min(task.shots, len(rows) - 1)
        prefix = ""
        for j in random.Random(1234 + i).sample(range(len(rows) - 1), shots):
            if j >= i:
                j += 1          # never the row itself
            prefix += "".join(candidates(task, rows[j])[gold_of(task, rows[j]) or 0]) + "\n\n"
        pairs = [(prefix + context, answer) for context, answer in candidates(task, row)]
        yield pairs, gold_of(task, row)

def core_questions(tokenizer, task, rows, n):
    """Yields the first n rows as (spans, gold)."""
    from likelihood import token_spans
    for pairs, gold in core_pairs(task, rows, n):
        yield token_spans(tokenizer, pairs), gold

def letter_questions(tokenizer, task, rows, n):
    """Yields the first n rows as (spans, gold), in the chat prompt. The spans are the letters with
    which the reply may begin."""
    for row in rows[:n]:
        letters = LETTERS[:len(row["choices"])]
        listed = ""
        if row["choices"] != list(letters):     # MMLU's query lists its choices itself
            for letter, choice in zip(letters, row["choices"]):
                listed += f"{letter}. {choice}\n"
        text = row["query"].strip().removeprefix("Question: ").removesuffix("Answer:").strip()
        question = dict(role="user", content=f"{text}\n{listed}Answer with one letter.")
        ids, _ = tokenizer.render([question], for_completion=True)
        spans = [([*ids, *tokenizer.encode_ordinary(letter)], len(ids)) for letter in letters]
        yield spans, row["gold"]

def row_text(task, row):
    """A question with its right answer, as one text."""
    if task.kind == "letters":
        return f"{row['query']}\n{row['choices'][row['gold']]}"
    return "".join(candidates(task, row)[gold_of(task, row) or 0])

def run_task(engine, task, path, max_examples=None, ranks=Ranks(), overlap=None):
    """→ what measure() returns of one task. overlap: an Overlap of contamination.py that knows its
    questions, or None."""
    rows = read_rows(path, task.kind)
    n = len(rows[:max_examples])
    ask = letter_questions if task.kind == "letters" else core_questions
    questions = ask(engine.tokenizer, task, rows, n)
    if not overlap:
        return measure(engine, questions, n, task.label, ranks)
    texts = [row_text(task, row) for row in rows[:n]]
    result = measure(engine, questions, n, task.label, ranks, overlap.flags(texts))
    return dict(result, short=len([text for text in texts if text in overlap.short]))

# ---- CORE as a mean of tasks ---------------------------------------------------------------------

def centered(accuracy, baseline):
    """Accuracy on a scale where guessing is 0 and everything right is 1.

    >>> centered(0.25, 0.25), centered(1.0, 0.25)
    (0.0, 1.0)
    """
    return (accuracy - baseline) / (1 - baseline)

def core_tasks(folder):
    """The tasks that core_tasks.csv lists; without it, those of the published core.yaml."""
    source = Path(folder, "core_tasks.csv")
    listed = Path(folder, "core.yaml")
    about = Path(folder, "eval_meta_data.csv")
    tasks = []
    try:
        if source.is_file():
            rows = csv.DictReader(source.read_text("utf-8-sig").splitlines())
        elif listed.is_file() and about.is_file():
            source = listed
            rows = published_tasks(listed.read_text("utf-8-sig"), about.read_text("utf-8-sig"))
        else:
            raise SystemExit(f"{source} is missing; it lists the tasks of CORE; {GET_CORE}")
        for row in rows:
            tasks.append(as_task(row))
    except (OSError, ValueError, KeyError, csv.Error, RecursionError) as error:
        raise SystemExit(f"{source}, task {len(tasks) + 1}: {reason(error)}; repair the file, or "
                         f"{GET_CORE}") from None
    if not tasks:
        raise SystemExit(f"{source} lists no task; {GET_CORE}")
    return tasks

def as_task(row):
    """One row of core_tasks.csv → a Task; ValueError says what is wrong with the row."""
    for name in ("label", "type", "num_fewshot", "continuation_delimiter",
                 "random_baseline_percent"):
        check_text(name, row[name])
    kinds = [kind for kind in FIELDS if kind != "letters"]
    if row["type"] not in kinds:
        raise ValueError(f"type must be one of {', '.join(kinds)}, got {row['type']}")
    if not re.fullmatch("[0-9]{1,4}", row["num_fewshot"]):
        raise ValueError(f"num_fewshot must be a whole number, got {row['num_fewshot']}")
    delimiter = row["continuation_delimiter"]
    if not re.fullmatch(r'"(?:[^"\\]|\\.)*"', delimiter):
        raise ValueError(f"continuation_delimiter must be a text in quotes, got {delimiter}")
    baseline = row["random_baseline_percent"]
    if not re.fullmatch(r"[0-9]{1,2}(?:\.[0-9]+)?", baseline):
        raise ValueError(f"random_baseline_percent must be from 0 to 99, got {baseline}")
    return Task(row["label"], row["file"] or "", row["type"], int(row["num_fewshot"]),
                json.loads(delimiter), float(baseline) / 100)

def published_tasks(listed, about):
    """core.yaml and eval_meta_data.csv of the evaluation bundle → the rows of core_tasks.csv."""
    baselines = {row["Eval Task"]: row["Random baseline"]
                 for row in csv.DictReader(about.splitlines())}
    rows = []
    for entry in re.split(r"^- *", listed, flags=re.M)[1:]:
        row = dict(re.findall(r"^ *(\w+): *(.+?) *(?:#.*)?$", entry, re.M))
        rows.append(dict(label=row["label"], file=row["dataset_uri"], type=row["icl_task_type"],
                         num_fewshot=row["num_fewshot"].strip("[]"),
                         continuation_delimiter=row.get("continuation_delimiter", '" "'),
                         random_baseline_percent=baselines[row["label"]]))
    return rows

def run_tasks(engine, tasks, folder, max_examples, ranks=Ranks(), overlap=None):
    """Yields (label, baseline, result); the result is None if the task's file is missing."""
    for task in tasks:
        path = existing(Path(folder, "eval_data", task.file))
        result = None
        if path:
            result = run_task(engine, task, path, max_examples, ranks, overlap)
        yield task.label, task.baseline, result

def mean_of(name, results):
    """Results as run_tasks yields them → {name: mean of centered, its standard error, "n", "tasks",
    "left_out"}."""
    tasks = {}
    left_out = []
    squares = 0.0
    for label, baseline, result in results:
        if not result:
            left_out.append(label)
            continue
        error = result["accuracy_error"] / (1 - baseline)
        squares += error ** 2
        tasks[label] = dict(result, centered=centered(result["accuracy"], baseline),
                            centered_error=error)
        say(f"{label:32s}", *figures(tasks[label]))
    if not tasks:
        raise SystemExit(f"{name} needs the file of at least one of {', '.join(left_out)}, and "
                         f"none is there; {GET_CORE}")
    mean = sum(task["centered"] for task in tasks.values()) / len(tasks)
    n = sum(task["n"] for task in tasks.values())
    found = {name: mean, f"{name}_error": math.sqrt(squares) / len(tasks), "n": n}
    if any("contaminated" in task for task in tasks.values()):
        dirty = sum(task["contaminated"] * task["n"] for task in tasks.values())
        found["contaminated"] = dirty / n
    return dict(found, tasks=tasks, left_out=left_out)

def core(engine, folder, max_examples=None, overlap=None):
    """→ {"core": mean of centered, "core_error", "n", "tasks": {label: result}, "left_out"}."""
    tasks = core_tasks(folder)
    return mean_of("core", run_tasks(engine, tasks, folder, max_examples, overlap=overlap))

def scores(engine, folder, max_examples=None, ranks=Ranks()):
    """For the log of a training run: {"hellaswag": accuracy, "core": mean of centered}."""
    tasks = core_tasks(folder)
    path = existing(Path(folder, "eval_data", HELLASWAG.file))
    found = [centered(result["accuracy"], baseline) for _, baseline, result
             in run_tasks(engine, tasks, folder, max_examples, ranks) if result]
    if not path or not found:
        raise SystemExit(f"{folder} lacks HellaSwag or every task of CORE, which are asked during "
                         f"training; {GET_CORE}")
    hellaswag = run_task(engine, HELLASWAG, path, max_examples, ranks)
    return dict(hellaswag=hellaswag["accuracy"], core=sum(found) / len(found))

# ---- Replies to the chat prompt ------------------------------------------------------------------

def some_problems(path, max_examples=None):
    """The problems of a file, shuffled with SEED, at most so many."""
    problems = read_problems(path)
    random.Random(SEED).shuffle(problems)
    return problems[:max_examples]

def solve(engine, path, max_examples=None, max_new_tokens=128, overlap=None):
    """Greedy replies to the problems of a file → {"accuracy", "accuracy_error", "n", "cut",
    "kinds"}, and with an overlap what run_task says of it.

    kinds: {kind: {"accuracy", "accuracy_error", "n"}}, and if some questions have no answer (their
    checker is "declines"), also "refused" and "wrong", the shares of such replies. cut counts the
    questions that do not fit into the model's context; they count as wrong.
    """
    problems = some_problems(path, max_examples)
    for p in problems:
        p["tokens"] = len(engine.tokenizer.render(p["messages"], for_completion=True)[0])
        p["right"] = False
        p["refused"] = False
    problems.sort(key=lambda p: p["tokens"])    # similar lengths share a batch: little padding
    fitting = [p for p in problems if p["tokens"] < engine.model.config.block_size]
    for i in tqdm(range(0, len(fitting), 64), desc=printable(Path(path).name), unit=" batches",
                  leave=False):
        batch = fitting[i:i + 64]
        replies = engine.answer([p["messages"] for p in batch], max_new_tokens=max_new_tokens,
                                temperature=0)
        for p, reply in zip(batch, replies):
            p["right"] = is_correct(reply, p)
            p["refused"] = declines(reply)
    kinds = {}
    has_unknown = any(p["checker"] == "declines" for p in problems)
    for kind in sorted({p["kind"] for p in problems}):
        of_kind = [p for p in problems if p["kind"] == kind]
        kinds[kind] = share_right(of_kind)
        if has_unknown:
            refused = len([p for p in of_kind if p["refused"]]) / len(of_kind)
            wrong = len([p for p in of_kind if not (p["right"] or p["refused"])]) / len(of_kind)
            kinds[kind].update(refused=refused, wrong=wrong)
    result = dict(share_right(problems), cut=len(problems) - len(fitting))
    if overlap:
        texts = [text_of(p) for p in problems]
        flags = overlap.flags(texts)
        clean_right = [p for p, is_dirty in zip(problems, flags) if p["right"] and not is_dirty]
        result.update(on_clean(flags.count(True), len(flags), len(clean_right)))
        result["short"] = len([text for text in texts if text in overlap.short])
    return dict(result, kinds=kinds)

def share_right(problems):
    return share_of(len([p for p in problems if p["right"]]), len(problems))

def chat_core(engine, folder, gsm8k, max_examples=None, max_new_tokens=256, overlap=None):
    """ChatCORE of the tasks whose files are there: letters are guessed with 0.25, GSM8K with 0."""
    def results():
        path = existing(gsm8k)
        yield from run_tasks(engine, CHAT_TASKS, folder, max_examples, overlap=overlap)
        yield "gsm8k", 0.0, path and solve(engine, path, max_examples, max_new_tokens, overlap)
        yield "humaneval", 0.0, None
    return mean_of("chat_core", results())

# ---- Measuring a run -----------------------------------------------------------------------------

def say(*fields):
    """Prints fields as a line of the log."""
    print(printable(" | ".join(fields)), flush=True)

def digest(*paths):
    """12 hex digits that change with the content of these files, read in pieces of 1 MB."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2 ** 20):
                sha.update(piece)
    return sha.hexdigest()[:12]

def tasks_of(name, args):
    """The tasks by log-likelihood that a name of --tasks stands for."""
    if name == "core":
        return core_tasks(args.core_dir)
    return dict(chat=CHAT_TASKS, hellaswag=[HELLASWAG]).get(name, [])

def files_of(name, args):
    """The files that a task reads; each may be missing, or be there with .gz."""
    files = [Path(args.core_dir, "eval_data", task.file) for task in tasks_of(name, args)]
    if name in ("gsm8k", "chat"):
        files.append(args.gsm8k)
    return files or [name]

def plan(args):
    """--tasks → [(name, its first file, arguments to remember)]; each needs at least one file."""
    jobs = []
    for name in [name.strip() for name in args.tasks.split(",")]:
        if not name:
            raise SystemExit(f"--tasks {args.tasks}: a name is empty; remove the comma beside it")
        files = files_of(name, args)
        found = [path for path in map(existing, files) if path]
        if not found:
            remedy = dict(gsm8k=GET_GSM8K, chat=GET_CORE, core=GET_CORE, hellaswag=GET_CORE).get(
                name, "--tasks takes hellaswag, core, gsm8k, chat and .jsonl files")
            raise SystemExit(f"{files[0]} is missing; {remedy}")
        max_new_tokens = args.max_new_tokens
        if name in ("core", "hellaswag"):
            max_new_tokens = None       # nothing is generated
        elif max_new_tokens is None:
            max_new_tokens = 256 if name in ("gsm8k", "chat") else 128
        arguments = dict(files=digest(*found), max_examples=args.max_examples,
                         max_new_tokens=max_new_tokens)
        if args.documents:
            from contamination import training_files
            arguments["documents"] = training_files(args.documents)     # {file: bytes}
        jobs.append((name, found[0], arguments))
    return jobs

def find_overlap(names, args):
    """Which questions of these tasks stand in the documents of --documents → an Overlap; None if no
    documents were named."""
    if not args.documents:
        return None
    from contamination import find
    texts = []
    for name in names:
        problem_files = set(map(existing, files_of(name, args)))
        for task in tasks_of(name, args):
            path = existing(Path(args.core_dir, "eval_data", task.file))
            problem_files.discard(path)
            if path:
                rows = read_rows(path, task.kind)[:args.max_examples]
                texts += [row_text(task, row) for row in rows]
        for path in problem_files - {None}:
            texts += map(text_of, some_problems(path, args.max_examples))
    return find(texts, args.documents)

def measure_task(engine, name, path, arguments, args, overlap):
    """→ the result of one of the jobs that plan() lists."""
    n = args.max_examples
    max_new_tokens = arguments["max_new_tokens"]
    if name == "core":
        return core(engine, args.core_dir, n, overlap)
    if name == "hellaswag":
        return run_task(engine, HELLASWAG, path, n, overlap=overlap)
    if name == "chat":
        return chat_core(engine, args.core_dir, args.gsm8k, n, max_new_tokens, overlap)
    return solve(engine, path, n, max_new_tokens, overlap)

def parse_args():
    parser = argparse.ArgumentParser(
        description="measure a model; other commands: eval.py hellaswag, report, summary")
    add = parser.add_argument
    add("--model", help="run folder; default: the newest under runs/")
    add("--tasks", required=True, help="hellaswag,core,gsm8k,chat,FILE.jsonl …, with commas")
    add("--core_dir", default="data/eval_bundle", help="folder of eval_data/ and the list of tasks")
    add("--gsm8k", default="data/gsm8k/test.jsonl", help="GSM8K's test set")
    add("--docs", nargs="+", help="folders of documents that the model may search in its replies")
    add("--documents", nargs="+", help="folders of training data, searched for the questions")
    add("--max_examples", type=int, help="questions per task, at most (default: all)")
    add("--max_new_tokens", type=int, help="tokens per reply, at most (128; gsm8k and chat: 256)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "max_examples", "max_new_tokens")
    return args

def measure_run():
    """Runs the tasks that --tasks names and adds each result to <run>/eval.json."""
    args = parse_args()
    jobs = plan(args)       # wrong names and missing files are found before a model is loaded
    run = find_run(args.model, STAGES)
    if not run.is_dir():
        raise SystemExit(f"{run} is not a run's folder; name one with --model")
    results = read_json(run / "eval.json")
    tokenizer = load_tokenizer(run)
    # GPT-2 lacks the conversation tokens. Their rows start at the mean embedding, so by Jensen's
    # inequality they get at most 1.6e-4 of the probability.
    model, meta = load_checkpoint(run, init_ranks(args.device).device, tokenizer.n_vocab)
    say(f"{run}: stage {meta['stage']}, step {meta['step']}, {model.num_params():,} parameters")
    search = None
    if args.docs:
        from search import build_index
        search = build_index(args.docs, max_chars=model.config.block_size).look_up
    engine = Engine(model.for_inference(), tokenizer, search=search)
    checkpoint = dict(stage=meta["stage"], step=meta["step"], seed=SEED,
                      weights=digest(run / "model.safetensors"))
    to_ask = []
    for name, path, arguments in jobs:
        key = name
        if args.docs and arguments["max_new_tokens"]:
            arguments = dict(arguments, docs=args.docs)
            key = f"{name} with search"
        asked = dict(checkpoint, arguments=arguments)
        known = results.get(key)
        if isinstance(known, dict) and all(known.get(key) == asked[key] for key in asked):
            say(f"{key}: skipped, {run}/eval.json has it for these weights and arguments")
            continue
        to_ask.append((key, name, path, asked))
    overlap = None
    if to_ask:
        overlap = find_overlap([name for _, name, _, _ in to_ask], args)
    for key, name, path, asked in to_ask:
        arguments = asked["arguments"]
        if meta["stage"] == "pretrain" and arguments["max_new_tokens"]:
            say(f"{name}: a base model is asked, which has never seen the chat prompt")
        result = measure_task(engine, name, path, arguments, args, overlap)
        say(key, *figures(result))
        results[key] = {**result, **asked}
        try:
            write_json(run / "eval.json", results)
        except OSError as error:
            raise cannot_write(run / "eval.json", error) from None

# ---- HellaSwag for train_gpt2.cu, which has no tokenizer -----------------------------------------

def hellaswag_words(questions, n_questions, n_vocab):
    """(spans, gold) pairs → the int32s of hellaswag.bin:

        magic 20251121, version, n_vocab, int32s in the file, n_questions
        for each question: gold, n_answers
        for each of its answers: n_ids, index of the first id that is scored, the ids
    """
    words = array("i", [20251121, 1, n_vocab, 0, n_questions])
    for spans, gold in questions:
        words.extend([gold, len(spans)])
        for ids, start in spans:
            words.extend([len(ids), start, *ids])
    words[3] = len(words)
    return words

def write_hellaswag():
    """HellaSwag as tokens → <core_dir>/hellaswag.bin."""
    parser = argparse.ArgumentParser(prog="eval.py")
    add = parser.add_argument
    add("command", choices=("hellaswag",), help="write its questions as tokens, for train_gpt2.cu")
    add("--core_dir", default="data/eval_bundle", help="folder of eval_data/")
    add("--tokenizer", default="gpt2", help="folder of a tokenizer, or gpt2")
    add("--max_examples", type=int, default=500, help="questions, at most (train_gpt2.py asks 500)")
    args = parser.parse_args()
    check_at_least(1, args, "max_examples")
    path = existing(Path(args.core_dir, "eval_data", HELLASWAG.file))
    if not path:
        raise SystemExit(f"{args.core_dir} holds no HellaSwag; {GET_CORE}")
    tokenizer = load_tokenizer(args.tokenizer)
    rows = read_rows(path, HELLASWAG.kind)[:args.max_examples]
    questions = core_questions(tokenizer, HELLASWAG, rows, len(rows))
    words = hellaswag_words(questions, len(rows), tokenizer.n_vocab)
    out = Path(args.core_dir, "hellaswag.bin")
    write_whole(out, words.tobytes())
    print(f"{out}: {len(rows)} questions, {tokenizer.n_vocab} tokens")

def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("report", "summary"):        # other names for the commands of report.py
        runpy.run_path(str(Path(__file__).with_name("report.py")), run_name="__main__")
    elif command == "hellaswag":
        write_hellaswag()
    else:
        measure_run()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; eval.json holds the tasks that were finished", file=sys.stderr)
        raise SystemExit(130) from None
