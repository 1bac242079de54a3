"""
Evaluation by log-likelihood, beside nanochat's: how many questions a second.

    python bench/eval.py                                        # a minute on a quiet CPU
    python bench/eval.py --device cuda --shapes d12             # 1 GPU

in:  tasks of CORE, as eval.py reads them; .peers/nanochat, else it is reported as not measured
out: a table a shape, and the same as one line of JSON

Both ask the same model the same questions in the same order, with the same shots and tokens; what
takes time is reading them. Before anything is timed, both must find the same answers right, but for
questions where eval.py scores another span on purpose, the whole answer: nanochat leaves out first
tokens that all choices share, and adds last ones that all contexts share. How many these are is in
the table.
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
from eval import candidates, core_questions, core_tasks, existing, measure, read_rows, score
from measure import chosen_shapes, finish, in_turns, missing, ratio, shape_flags, spread, table
from model import GPT, sdpa
from training import Ranks

SHAPES = {      # where: {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"d4": Shape(True, 4, 256, 2, 8192, 2048, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 2048, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 8192, 2048, 1),
              "d2": Shape(True, 2, 64, 2, 8192, 2048, 1)}}
TASKS = ["hellaswag_zeroshot", "arc_easy", "winograd", "lambada_openai"]    # all three types
QUESTIONS = {"cpu": 12, "cuda": 256, "quick": 4}
CORE = next((folder for folder in (ROOT / "data" / "eval_bundle",
                                   ROOT.parent / "shared" / "data" / "core") if folder.is_dir()),
            ROOT / "data" / "eval_bundle")

class Ours:
    def __init__(self, shape, tokenizer, device):
        torch.manual_seed(1)
        self.model, self.tokenizer, self.device = GPT(shape.config()).eval(), tokenizer, device
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=2 * shape.C ** -0.5 if p.ndim > 1 else 0.1)
        self.exactly(fp32=False)

    def exactly(self, fp32):
        """Computes in fp32 from now on, or else in what it would take."""
        self.model.use(self.device)
        if fp32:
            self.model.compute_dtype = torch.float32
            for block in self.model.h:
                block.attn.kernel = sdpa        # others want bf16

    def accuracy(self, task, rows):
        questions = core_questions(self.tokenizer, task, rows, len(rows))
        quiet = Ranks(is_main=False)
        return measure(self, questions, len(rows), task.label, quiet)["accuracy"]

    def answers(self, task, rows):
        """→ [(spans, whether it was right)]"""
        for spans, gold in core_questions(self.tokenizer, task, rows, len(rows)):
            scores = score(self.model, spans)
            best = max(range(len(scores)), key=lambda i: scores[i][0])
            yield spans, scores[0][1] if gold is None else best == gold

    def as_written(self, task, row, rest):
        """A row of language modeling whose answer begins as the model would; if that is a word,
        and there is no rest, it is right."""
        context = candidates(task, row)[0][0].rstrip()
        ids = [self.tokenizer.eot, *self.tokenizer.encode_ordinary(context)]
        logits = self.model(torch.tensor([ids], device=self.device))
        word = self.tokenizer.decode(logits[0, -1:].argmax(-1).tolist()).strip()
        return dict(row, continuation=f"{word} {rest}".strip() or row["continuation"])

class Nanochat:
    """Its core_eval. To that it is a model: model(ids) → logits; and a tokenizer."""

    def __init__(self, ours, device):
        from nanochat import core_eval
        self.core_eval, self.ours, self.device = core_eval, ours, device
        self.max_seq_len = ours.model.config.block_size

    def __call__(self, given, prepend=None):
        if torch.is_tensor(given):
            return self.ours.model(given)
        core = self.ours.tokenizer.core         # with as many threads as nanochat's tokenizer has
        return [[prepend, *ids] for ids in core.encode_ordinary_batch(given, num_threads=8)]

    def get_bos_token_id(self):
        return self.ours.tokenizer.eot

    def about(self, task):
        return dict(task_type=task.kind, num_fewshot=task.shots,
                    continuation_delimiter=task.delimiter)

    def accuracy(self, task, rows):
        return self.core_eval.evaluate_task(self, self, rows, self.device, self.about(task))

    def answers(self, task, rows):
        """Yields (spans, whether it was right); the spans are caught on their way to the model."""
        name = "batch_sequences_" + dict(multiple_choice="mc", schema="schema",
                                         language_modeling="lm")[task.kind]
        cut, caught = getattr(self.core_eval, name), []
        setattr(self.core_eval, name, lambda *asked: caught.append(cut(*asked)) or caught[-1])
        for i in range(len(rows)):
            right = self.core_eval.evaluate_example(i, self, self, rows, self.device,
                                                    self.about(task))
            tokens, starts, _ = caught[-1]
            yield [*zip(tokens, starts)], right
        setattr(self.core_eval, name, cut)

def check(ours, theirs, task, rows):
    """In fp32 the same spans have the same outcome; → how many questions have others."""
    ours.exactly(fp32=True)
    if task.kind == "language_modeling":        # else no answer would be right
        rows = [ours.as_written(task, row, ["", row["continuation"]][i % 2])
                for i, row in enumerate(rows)]
    outcomes = [*zip(ours.answers(task, rows), theirs.answers(task, rows))]
    for (a, mine), (b, other) in outcomes:
        assert [ids for ids, _ in a] == [ids for ids, _ in b], f"{task.label}: other tokens"
        assert mine == other or a != b, f"{task.label}: another outcome of {a}"
    assert task.kind != "language_modeling" or any(mine for (_, mine), _ in outcomes), "none right"
    differ = sum(a != b for (a, _), (b, _) in outcomes)
    assert differ < len(rows) / 2, f"{task.label}: {differ} other spans"
    ours.exactly(fp32=False)
    return f"{differ} of {len(rows)}"

def read_tasks(n):
    """[(task, its first n rows)]; shots are rows, too."""
    found = {task.label: task for task in core_tasks(CORE)}
    return [(replace(found[label], shots=min(found[label].shots, n - 1)),
             read_rows(existing(CORE / "eval_data" / found[label].file))[:n]) for label in TASKS]

def words_of(rows):
    return [text for row in rows for value in row.values()
            for text in (value if isinstance(value, list) else [str(value)])]

def main():
    parser = argparse.ArgumentParser(description="questions a second, beside nanochat")
    shape_flags(parser, repeats=3, timed="rounds")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    tasks, report = read_tasks(QUESTIONS[where]), {}
    tokenizer = Tokenizer.train([text for _, rows in read_tasks(1000) for text in words_of(rows)],
                                8192)
    for name, shape in shapes.items():
        ours = Ours(shape, tokenizer, args.device)
        absent = None if (PEERS / "nanochat").is_dir() else missing("nanochat")
        found = dict(ours=ours) | ({} if absent else dict(nanochat=Nanochat(ours, args.device)))
        report[name] = []
        for task, rows in tasks:
            differ = None if absent else check(ours, found["nanochat"], task, rows[:32])
            right = {}
            calls = {label: lambda label=label, c=c: right.update({label: c.accuracy(task, rows)})
                     for label, c in found.items()}
            ms = in_turns(calls, args.repeats, device=args.device)
            report[name] += [dict(
                task=task.label, contender=label, accuracy=right[label], other_spans=differ,
                questions_s=1000 * len(rows) / statistics.median(mine), spread=spread(mine),
                all_ms=mine, ours_faster_by=None if label == "ours" else ratio(mine, ms["ours"]))
                for label, mine in ms.items()]
        table([f"{name}: {shape.L} layers, {shape.C} channels, {QUESTIONS[where]} questions a task",
               "", "accuracy", "other spans", "questions/s", "spread", "ours is faster by"],
              [[row["task"], row["contender"], f"{row['accuracy']:.4f}",
                row["other_spans"] if row["contender"] != "ours" else None, row["questions_s"],
                row["spread"], row["ours_faster_by"]] for row in report[name]]
              + [["", "nanochat", absent, *[None] * 4]] * bool(absent))
    finish("eval", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
