"""
Evaluation: what a right answer is, and what a model can do, in numbers.

    python eval.py --model runs/demo-rl --tasks data/demo/chat/held_out.jsonl             # CPU
    python eval.py --model runs/d24 --tasks hellaswag,core                                # 1 GPU
    python eval.py --model runs/d24-sft --tasks gsm8k,chat --max_examples 500
    python eval.py hellaswag --tokenizer data/fineweb/tokenizer          # for train_gpt2.cu

    in:  <run>/model.safetensors, config.json, the tokenizer; the tasks' files
    out: <run>/eval.json {task: figures}; report.py shows it

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
import os
import random
import re
import runpy
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from model import load_checkpoint, write_json
from sample import Engine, find_run, load_tokenizer
from training import Ranks, init_ranks

STAGES = dict(pretrain="base", sft="SFT", rl="RL")
SEED = 1337     # of the order of rows; --max_examples N asks the first N of that order
GET_CORE = ("get it with: curl -LO https://karpathy-public.s3.us-west-2.amazonaws.com/"
            "eval_bundle.zip && unzip eval_bundle.zip -d data; or name its folder with --core_dir")
GET_GSM8K = ("get test.jsonl from https://github.com/openai/grade-school-math, folder "
             "grade_school_math/data; or name it with --gsm8k")

# ---- What a right answer is ----------------------------------------------------------------------

def read_problems(path):
    """A .jsonl of {"question", "answer"} → problems, with `messages` to answer, `kind`, `check`.

    GSM8K's own rows are read as they are: of a worked solution only the result behind #### is kept.
    """
    problems, line = [], ""
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                p = json.loads(line)
                if "messages" not in p:
                    p["messages"] = [dict(role="user", content=p["question"])]
                p.setdefault("kind", "problems")
                if p.setdefault("check", "final") == "final":
                    p["answer"] = final_answer(p["answer"]) or final_answer("#### " + p["answer"])
                if not p["answer"] or p["check"] not in ("final", "contains", "overlap"):
                    raise ValueError("no answer, or an unknown check")
                problems.append(p)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}, line {number if line else 0}: {error!r}; problems are lines of "
                         '{"question", "answer"} in UTF-8; repair the file, or make one with '
                         "python chat_sft.py make") from None
    if not problems:
        raise SystemExit(f"{path} is empty; it must hold at least one problem; make some with "
                         "python chat_sft.py make")
    return problems

def final_answer(text):
    """What the line holds behind the last ####, GSM8K's mark, without $ and commas; or None."""
    answer = text.rpartition("####")[2].split("\n")[0] if "####" in text else ""
    return answer.replace(",", "").strip(" $").rstrip(" .").lower() or None

def is_correct(reply, problem):
    """Whether a reply solves {"answer", "check"}. "final": the answer is what stands behind ####;
    "contains": it is a word of the reply; "overlap": they share at least 3 in 5 words (F1)."""
    answer, check = problem["answer"], problem["check"]
    if check == "final":
        return final_answer(reply) == final_answer("#### " + answer) is not None
    if check == "contains":
        return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", reply.lower()) is not None
    ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (reply, answer))
    return 2 * (ours & theirs).total() >= 0.6 * max(1, ours.total() + theirs.total())

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

def read_json(path):
    """A JSON object; {} where there is no file."""
    try:
        return json.loads(Path(path).read_text("utf-8")) if Path(path).is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: {error}; it is a JSON file; delete it, make it again") from None

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
    parser = argparse.ArgumentParser(description="measure a model; see also: hellaswag, report, summary")
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
    results = read_json(run / "eval.json")
    tokenizer = load_tokenizer(run)
    # conversation tokens that GPT-2 lacks take 1.6e-4 of its probability at most: mean rows, Jensen
    model, meta = load_checkpoint(run, init_ranks(args.device).device, tokenizer.n_vocab)
    print(f"{run}: stage {meta['stage']}, step {meta['step']}, {model.num_params():,} parameters")
    engine = Engine(model.for_inference(), tokenizer)
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

def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("report", "summary"):        # these moved to report.py
        runpy.run_path(str(Path(__file__).with_name("report.py")), run_name="__main__")
    elif command == "hellaswag":
        write_hellaswag()
    else:
        evaluate()

if __name__ == "__main__":
    main()
