"""
Evaluation beside EleutherAI's lm_eval: the same log-likelihoods and accuracies on the same rows?

    python bench/harness.py                 # 200 rows each of five tasks, some minutes on a CPU

in:  tasks of CORE, as eval.py reads them; lm_eval and transformers, of requirements-extra.txt
out: a table with a row for each task, and all rows as one line of JSON

Both read one folder with an untrained GPT-2 of HF, whose weights are large enough that answers
differ, and GPT-2's tokenizer. The contexts that lm_eval is given begin with <|endoftext|>, with
which eval.py begins every text; no example is solved before a question. lm_eval's pipeline runs as
it is, from a file of rows to its metrics. Half of LAMBADA's answers are replaced by what the model
itself would write, because an untrained one never writes the true ones.

Three accuracies may differ though the log-likelihoods are equal, because answers differ in length:
lm_eval's acc takes the answer with the highest sum, its acc_norm divides by characters, and
eval.py's accuracy divides by tokens. The bench computes the first two from eval.py's sums as well,
and compares them with lm_eval's row by row; a row is unexplained if they differ by more than a tie.
"""
import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

from bpe import Tokenizer
from eval import candidates, core_pairs, core_questions, core_tasks, existing, gold_of, read_rows
from likelihood import score
from measure import finish, table
from model import load_checkpoint

TASKS = ["hellaswag_zeroshot", "piqa", "arc_easy", "arc_challenge", "lambada_openai"]
EOT = "<|endoftext|>"
TIE = 1e-3          # nats; so close may two sums be

def find_core():
    """The folder of CORE's tasks."""
    for folder in (ROOT / "data" / "eval_bundle", ROOT.parent / "shared" / "data" / "core"):
        if folder.is_dir():
            return folder
    return ROOT / "data" / "eval_bundle"

def task_rows(label, n):
    """(a task of CORE without solved examples, its first n rows)"""
    core = find_core()
    [task] = [task for task in core_tasks(core) if task.label == label]
    return replace(task, shots=0), read_rows(existing(core / "eval_data" / task.file), task.kind)[:n]

def write_gpt2(folder, n_layer=2, n_head=2, n_embd=64, std=0.15):
    """Writes a GPT-2 of HF with random weights, as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    model.save_pretrained(folder)

class Harness:
    """lm_eval with the model in a folder of HF, and one of our tokenizers in HF's format."""

    def __init__(self, folder, tokenizer, batch_size):
        from lm_eval.models.huggingface import HFLM
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        path = Path(folder, "for_lm_eval.json")
        tokenizer.export_hf(path)
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=EOT, eos_token=EOT)
        self.folder = folder
        self.lm = HFLM(pretrained=GPT2LMHeadModel.from_pretrained(folder).eval(), tokenizer=theirs,
                       batch_size=batch_size, device="cpu")

    def log_likelihoods(self, task, rows):
        """[[(sum of log-probabilities, whether greedy) of each answer] of each row], with the
        solved examples before each question."""
        from lm_eval.api.instance import Instance
        questions = [pairs for pairs, _ in core_pairs(task, rows, len(rows))]
        requests = [Instance("loglikelihood", {}, (EOT + context, answer), 0)
                    for pairs in questions for context, answer in pairs]
        found = iter(self.lm.loglikelihood(requests, disable_tqdm=True))
        return [[next(found) for _ in pairs] for pairs in questions]

    def evaluate(self, task, rows):
        """lm_eval's whole pipeline → its results {"acc", "acc_norm"}, and a sample for each row."""
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        path = Path(self.folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for row in rows:
                context, _ = candidates(task, row)[0]
                file.write(json.dumps(dict(row, text=EOT + context)) + "\n")
        about = dict(task=task.label, dataset_path="json", test_split="test",
                     dataset_kwargs=dict(data_files=dict(test=str(path)), cache_dir=self.folder),
                     doc_to_text="{{text}}", target_delimiter="")
        if task.kind == "multiple_choice":
            about.update(output_type="multiple_choice", doc_to_choice="choices",
                         doc_to_target="gold", metric_list=[dict(metric="acc"),
                                                            dict(metric="acc_norm")])
        else:
            about.update(output_type="loglikelihood", doc_to_target="continuation",
                         metric_list=[dict(metric="acc")])
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(model=self.lm, tasks=[about], bootstrap_iters=0,
                                    log_samples=True, verbosity="ERROR",
                                    task_manager=TaskManager(include_defaults=False))
        results = found["results"][task.label]
        return ({name: results.get(f"{name},none") for name in ("acc", "acc_norm")},
                sorted(found["samples"][task.label], key=lambda sample: sample["doc_id"]))

def as_written(model, tokenizer, task, row):
    """A row of language modeling whose answer is the model's own next token, so that greedy
    decoding writes it, unless the token does not begin a word."""
    context = candidates(task, row)[0][0].rstrip()
    ids = [tokenizer.eot, *tokenizer.encode_ordinary(context)]
    word = tokenizer.decode(model(torch.tensor([ids]))[0, -1:].argmax(-1).tolist()).strip()
    return dict(row, continuation=word or row["continuation"])

# ---- Row by row ----------------------------------------------------------------------------------

def best(values):
    return max(range(len(values)), key=values.__getitem__)

def is_tied(values):
    """Whether the two highest values are so close that rounding may decide."""
    first, second = sorted(values, reverse=True)[:2]
    return first - second < TIE

def compare(harness, model, tokenizer, task, rows):
    """→ how eval.py and lm_eval agree on these rows: the largest difference of two log-likelihoods,
    the accuracies, and how many rows are right here and wrong there, and why."""
    questions = core_questions(tokenizer, task, rows, len(rows))
    scores = score(model, [spans for spans, _ in questions])
    theirs, samples = harness.evaluate(task, rows)
    outcome = dict(task=task.label, rows=len(rows), choices=sum(map(len, scores)), difference=0.0,
                   accuracy=0, acc=0, acc_norm=0, other_by_length=0, unexplained=0)
    for row, own, sample in zip(rows, scores, samples, strict=True):
        sums = [one.logprob for one in own]
        other = [total for total, _ in sample["filtered_resps"]]
        outcome["difference"] = max([outcome["difference"],
                                     *(abs(a - b) for a, b in zip(sums, other, strict=True))])
        gold = gold_of(task, row)
        if gold is None:
            right = dict(accuracy=own[0].greedy, acc=own[0].greedy)
        else:
            by_chars = [total / len(choice) for total, choice in zip(sums, row["choices"])]
            right = dict(accuracy=best([one.mean() for one in own]) == gold,
                         acc=best(sums) == gold, acc_norm=best(by_chars) == gold)
        for name, is_right in right.items():
            outcome[name] += int(is_right)
        differing = [name for name in right if name != "accuracy" and right[name] != sample[name]]
        if differing and not (gold is not None and is_tied(sums)):
            outcome["unexplained"] += 1
        elif right["accuracy"] != bool(sample["acc"]):
            outcome["other_by_length"] += 1     # the sums agree, and their lengths decide otherwise
    for name in ("accuracy", "acc", "acc_norm"):
        outcome[name] /= len(rows)
    return dict(outcome, their_acc=theirs["acc"], their_acc_norm=theirs["acc_norm"])

def main():
    parser = argparse.ArgumentParser(description="log-likelihoods and accuracies beside lm_eval's")
    parser.add_argument("--rows", type=int, default=200, help="rows of each task, at most")
    args = parser.parse_args()
    report = []
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            write_gpt2(folder)
        tokenizer = Tokenizer.pretrained("gpt2")
        model, _ = load_checkpoint(folder)
        harness = Harness(folder, tokenizer, batch_size=1)
        for label in TASKS:
            task, rows = task_rows(label, args.rows)
            if task.kind == "language_modeling":        # otherwise nothing would be right
                rows[::2] = [as_written(model, tokenizer, task, row) for row in rows[::2]]
            report.append(compare(harness, model, tokenizer, task, rows))
    table(["task", "rows", "answers", "largest difference, nats", "acc: ours", "lm_eval",
           "acc_norm: ours", "lm_eval", "accuracy by tokens", "rows decided by length",
           "rows unexplained"],
          [[one["task"], one["rows"], one["choices"], f"{one['difference']:.1e}",
            *(one[name] for name in ("acc", "their_acc")),
            *(one[name] if one["their_acc_norm"] is not None else None
              for name in ("acc_norm", "their_acc_norm")),
            one["accuracy"], one["other_by_length"], one["unexplained"]] for one in report])
    finish("harness", tasks=report)

if __name__ == "__main__":
    main()
