"""
Evaluation by log-likelihood, beside nanochat's and lm_eval's: how many questions a second.

    python bench/eval.py                                        # two minutes on a quiet CPU
    python bench/eval.py --device cuda --shapes d12             # 1 GPU

in:  tasks of CORE, as eval.py reads them; .peers/nanochat; lm_eval and transformers, which measure
     GPT-2's shapes on a CPU. Who is not there is not measured
out: a table for each shape, and all of them as one line of JSON

All ask the same model the same questions in the same order, with the same shots and tokens; the
time goes into reading them. lm_eval runs HF's GPT-2 with the same weights, in batches of one answer,
its default, and of 16; harness.py compares accuracies. Before anything is timed, the bench checks
that lm_eval finds the same log-likelihoods, and nanochat the same answers right. Only questions on
which nanochat scores other spans are excepted: eval.py scores the whole answer, while nanochat
leaves out first tokens that all choices share, and adds last tokens that all contexts share. The
table says how many these are.
"""
import argparse
import importlib.util
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bpe import Tokenizer
from contenders import PEERS, Shape
from eval import candidates, core_questions, core_tasks, existing, measure, read_rows
from likelihood import is_right, score
from harness import Harness, find_core
from measure import chosen_shapes, finish, in_turns, missing, ratio, shape_flags, spread, table
from model import GPT, save_checkpoint, sdpa
from training import Ranks

SHAPES = {      # device or "quick": {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"d4": Shape(True, 4, 256, 2, 8192, 2048, 1),
            "gpt2": Shape(False, 4, 256, 4, 8192, 1024, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 2048, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 8192, 2048, 1),
              "d2": Shape(True, 2, 64, 2, 8192, 2048, 1)}}
TASKS = ["hellaswag_zeroshot", "arc_easy", "winograd", "lambada_openai"]    # all three types
QUESTIONS = {"cpu": 32, "cuda": 256, "quick": 4}
LONG = {"arc_easy": 4}      # its ten solved examples make a question so many times as long
CORE = find_core()

class Ours:
    """An untrained model and eval.py's functions."""

    def __init__(self, shape, tokenizer, device):
        torch.manual_seed(1)
        self.model = GPT(shape.config()).eval()
        self.tokenizer = tokenizer
        self.device = device
        with torch.no_grad():       # a new model's zeros would make every answer equally likely
            for p in self.model.parameters():
                std = 2 * shape.C ** -0.5 if p.ndim > 1 else 0.1
                p.add_(torch.randn_like(p), alpha=std)
        self.set_precision(fp32=False)

    def set_precision(self, fp32):
        """fp32, or the precision that eval.py takes on this device."""
        self.model.use(self.device)
        if fp32:
            self.model.compute_dtype = torch.float32
            for block in self.model.h:
                block.attn.kernel = sdpa        # the other kernels need bf16

    def accuracy(self, task, rows):
        questions = core_questions(self.tokenizer, task, rows, len(rows))
        quiet = Ranks(is_main=False)
        return measure(self, questions, len(rows), task.label, quiet)["accuracy"]

    def answers(self, task, rows):
        """Yields (spans, whether the answer was right)."""
        for spans, gold in core_questions(self.tokenizer, task, rows, len(rows)):
            yield spans, is_right(score(self.model, [spans])[0], gold)

    def as_written(self, task, row, rest):
        """A row of language modeling whose answer begins with the model's own next token. Without
        a rest, greedy decoding writes this answer, unless the token is only a space."""
        context = candidates(task, row)[0][0].rstrip()
        ids = [self.tokenizer.eot, *self.tokenizer.encode_ordinary(context)]
        logits = self.model(torch.tensor([ids], device=self.device))
        word = self.tokenizer.decode(logits[0, -1:].argmax(-1).tolist()).strip()
        return dict(row, continuation=f"{word} {rest}".strip() or row["continuation"])

class LmEval:
    """lm_eval, asked for the log-likelihoods alone."""

    def __init__(self, folder, tokenizer, batch_size):
        self.harness = Harness(folder, tokenizer, batch_size)

    def accuracy(self, task, rows):
        self.harness.log_likelihoods(task, rows)

    def check(self, ours, task, rows):
        """Asserts that in fp32 its log-likelihoods are ours, but for rounding."""
        theirs = self.harness.log_likelihoods(task, rows)
        questions = core_questions(ours.tokenizer, task, rows, len(rows))
        for scores, found in zip(score(ours.model, [spans for spans, _ in questions]), theirs):
            for one, (total, greedy) in zip(scores, found, strict=True):
                assert abs(one.logprob - total) < 1e-3 - 1e-5 * total, (task.label, one, total)
                assert one.greedy == greedy, (task.label, one, total)

class Nanochat:
    """nanochat's core_eval. This object stands in for its model, model(ids) → logits, and for its
    tokenizer, tokenizer(texts, prepend) → ids."""

    def __init__(self, ours, device):
        from nanochat import core_eval
        self.core_eval = core_eval
        self.ours = ours
        self.device = device
        self.max_seq_len = ours.model.config.block_size

    def __call__(self, given, prepend=None):
        if torch.is_tensor(given):
            return self.ours.model(given)
        core = self.ours.tokenizer.core         # 8 threads, as many as nanochat's tokenizer has
        return [[prepend, *ids] for ids in core.encode_ordinary_batch(given, num_threads=8)]

    def get_bos_token_id(self):
        return self.ours.tokenizer.eot

    def about(self, task):
        return dict(task_type=task.kind, num_fewshot=task.shots,
                    continuation_delimiter=task.delimiter)

    def accuracy(self, task, rows):
        return self.core_eval.evaluate_task(self, self, rows, self.device, self.about(task))

    def answers(self, task, rows):
        """Yields (spans, whether the answer was right). The function that makes the spans is
        replaced by one that keeps them, too."""
        name = dict(multiple_choice="batch_sequences_mc", schema="batch_sequences_schema",
                    language_modeling="batch_sequences_lm")[task.kind]
        make_spans = getattr(self.core_eval, name)
        made = []

        def kept(*asked):
            made.append(make_spans(*asked))
            return made[-1]

        setattr(self.core_eval, name, kept)
        try:
            for i in range(len(rows)):
                right = self.core_eval.evaluate_example(i, self, self, rows, self.device,
                                                        self.about(task))
                tokens, starts, _ = made[-1]
                yield list(zip(tokens, starts)), right
        finally:
            setattr(self.core_eval, name, make_spans)

def check(ours, theirs, task, rows):
    """Asserts that in fp32 equal spans have equal outcomes → on how many questions spans differ."""
    ours.set_precision(fp32=True)
    if task.kind == "language_modeling":        # otherwise no answer would be right
        rows = [ours.as_written(task, row, ["", row["continuation"]][i % 2])
                for i, row in enumerate(rows)]
    differ = 0
    anything_right = False
    for (mine, right), (other, theirs_right) in zip(ours.answers(task, rows),
                                                    theirs.answers(task, rows)):
        anything_right = anything_right or right
        assert [ids for ids, _ in mine] == [ids for ids, _ in other], f"{task.label}: other tokens"
        if mine != other:
            differ += 1
        else:
            assert right == theirs_right, f"{task.label}: another outcome of {mine}"
    assert anything_right or task.kind != "language_modeling", f"{task.label}: none is right"
    assert differ < len(rows) / 2, f"{task.label}: {differ} spans differ"
    ours.set_precision(fp32=False)
    return f"{differ} of {len(rows)}"

def read_tasks(n):
    """[(task, its first n rows)]; the shots are taken from the same rows."""
    found = {task.label: task for task in core_tasks(CORE)}
    tasks = []
    for label in TASKS:
        count = max(4, n // LONG.get(label, 1))
        task = replace(found[label], shots=min(found[label].shots, count - 1))
        path = existing(CORE / "eval_data" / task.file)
        tasks.append((task, read_rows(path, task.kind)[:count]))
    return tasks

def texts_of(rows):
    """The values of all rows as texts, for a tokenizer to learn from."""
    texts = []
    for row in rows:
        for value in row.values():
            texts += value if isinstance(value, list) else [str(value)]
    return texts

def time_task(contenders, task, rows, args, other_spans):
    """→ one row for each contender, timed in turns."""
    right = {}

    def asking(label, contender):
        def ask():
            right[label] = contender.accuracy(task, rows)
        return ask

    calls = {label: asking(label, contender) for label, contender in contenders.items()}
    ms = in_turns(calls, args.repeats, device=args.device)
    timed = []
    for label, times in ms.items():
        row = dict(task=task.label, contender=label, questions=len(rows), accuracy=right[label],
                   spread=spread(times), all_ms=times,
                   questions_s=1000 * len(rows) / statistics.median(times), ours_faster_by=None)
        if label == "nanochat":
            row["other_spans"] = other_spans
        if label != "ours":
            row["ours_faster_by"] = ratio(times, ms["ours"])
        timed.append(row)
    return timed

def all_tasks(timed):
    """Rows as time_task returns them → a row for each contender that adds up all tasks."""
    sums = {}
    for row in timed:
        sums.setdefault(row["contender"], []).append(row["all_ms"])
    sums = {name: [sum(round_ms) for round_ms in zip(*ms)] for name, ms in sums.items()}
    n = sum(row["questions"] for row in timed if row["contender"] == "ours")
    return [dict(task="all", contender=name, questions=n, all_ms=ms, spread=spread(ms),
                 questions_s=1000 * n / statistics.median(ms),
                 ours_faster_by=None if name == "ours" else ratio(ms, sums["ours"]))
            for name, ms in sums.items()]

def show_shape(name, shape, timed, absent):
    """Prints the table of one shape. absent: why nanochat is not measured, or None."""
    head = [f"{name}: {shape.L} layers, {shape.C} channels", "questions", "", "accuracy",
            "other spans", "questions/s", "spread", "ours is faster by"]
    rows = []
    for row in timed:
        accuracy = row.get("accuracy")
        if accuracy is not None:
            accuracy = f"{accuracy:.4f}"
        rows.append([row["task"], row["questions"], row["contender"], accuracy,
                     row.get("other_spans"), row["questions_s"], row["spread"],
                     row["ours_faster_by"]])
    if absent:
        rows.append(["", None, "nanochat", absent, None, None, None, None])
    table(head, rows)

def harnesses(ours, folder):
    """{label: lm_eval with HF's GPT-2 of the same weights} for two sizes of its batches."""
    save_checkpoint(folder, ours.model)
    return {f"lm_eval, batch {n}": LmEval(folder, ours.tokenizer, n) for n in (1, 16)}

def main():
    parser = argparse.ArgumentParser(description="questions a second, beside nanochat and lm_eval")
    shape_flags(parser, repeats=3, timed="rounds")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    tasks = read_tasks(QUESTIONS[where])
    texts = [text for _, rows in read_tasks(1000) for text in texts_of(rows)]
    tokenizer = Tokenizer.train(texts, 8192)
    absent = None
    if not (PEERS / "nanochat").is_dir():
        absent = missing("nanochat")
    report = {}
    for name, shape in shapes.items():
        contenders = dict(ours=Ours(shape, tokenizer, args.device))
        if not absent:
            contenders["nanochat"] = Nanochat(contenders["ours"], args.device)
        if not shape.modern and args.device == "cpu" and importlib.util.find_spec("lm_eval"):
            with tempfile.TemporaryDirectory() as folder:
                contenders.update(harnesses(contenders["ours"], folder))
        report[name] = []
        for task, rows in tasks:
            differ = None
            if not absent:
                differ = check(contenders["ours"], contenders["nanochat"], task, rows[:32])
            for contender in contenders.values():
                if isinstance(contender, LmEval):
                    contender.check(contenders["ours"], task, rows[:4])
            report[name] += time_task(contenders, task, rows, args, differ)
        report[name] += all_tasks(report[name])
        show_shape(name, shape, report[name], absent)
    finish("eval", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
