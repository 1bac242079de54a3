"""
Evaluation by log-likelihood, beside nanochat's: how many questions a second.

    python bench/eval.py                                        # a minute on a quiet CPU
    python bench/eval.py --device cuda --shapes d12             # 1 GPU

in:  tasks of CORE, as eval.py reads them; .peers/nanochat, without which only ours is measured
out: a table for each shape, and all of them as one line of JSON

Both ask the same model the same questions in the same order, with the same shots and tokens; the
time goes into reading them. Before anything is timed, the bench checks that both find the same
answers right. Only questions on which the two score different spans are excepted: eval.py scores
the whole answer, while nanochat leaves out first tokens that all choices share, and adds last
tokens that all contexts share. The table says how many these are.
"""
import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bpe import Tokenizer
from contenders import PEERS, Shape
from eval import (candidates, core_questions, core_tasks, existing, is_right, measure, read_rows,
                  score)
from measure import chosen_shapes, finish, in_turns, missing, ratio, shape_flags, spread, table
from model import GPT, sdpa
from training import Ranks

SHAPES = {      # device or "quick": {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"d4": Shape(True, 4, 256, 2, 8192, 2048, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 2048, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 8192, 2048, 1),
              "d2": Shape(True, 2, 64, 2, 8192, 2048, 1)}}
TASKS = ["hellaswag_zeroshot", "arc_easy", "winograd", "lambada_openai"]    # all three types
QUESTIONS = {"cpu": 12, "cuda": 256, "quick": 4}
CORE = ROOT / "data" / "eval_bundle"
if not CORE.is_dir() and (ROOT.parent / "shared" / "data" / "core").is_dir():
    CORE = ROOT.parent / "shared" / "data" / "core"

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
        task = replace(found[label], shots=min(found[label].shots, n - 1))
        path = existing(CORE / "eval_data" / task.file)
        tasks.append((task, read_rows(path, task.kind)[:n]))
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
        row = dict(task=task.label, contender=label, accuracy=right[label],
                   other_spans=other_spans, spread=spread(times), all_ms=times,
                   questions_s=1000 * len(rows) / statistics.median(times), ours_faster_by=None)
        if label != "ours":
            row["ours_faster_by"] = ratio(times, ms["ours"])
        timed.append(row)
    return timed

def show_shape(name, shape, n_questions, timed, absent):
    """Prints the table of one shape. absent: why nanochat is not measured, or None."""
    head = [f"{name}: {shape.L} layers, {shape.C} channels, {n_questions} questions a task", "",
            "accuracy", "other spans", "questions/s", "spread", "ours is faster by"]
    rows = []
    for row in timed:
        other_spans = None if row["contender"] == "ours" else row["other_spans"]
        rows.append([row["task"], row["contender"], f"{row['accuracy']:.4f}", other_spans,
                     row["questions_s"], row["spread"], row["ours_faster_by"]])
    if absent:
        rows.append(["", "nanochat", absent, None, None, None, None])
    table(head, rows)

def main():
    parser = argparse.ArgumentParser(description="questions a second, beside nanochat")
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
        report[name] = []
        for task, rows in tasks:
            differ = None
            if not absent:
                differ = check(contenders["ours"], contenders["nanochat"], task, rows[:32])
            report[name] += time_task(contenders, task, rows, args, differ)
        show_shape(name, shape, QUESTIONS[where], report[name], absent)
    finish("eval", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
