"""
eval.py beside EleutherAI's lm_eval, which reads the same GPT-2 of HF: the log-likelihoods of all
answers and the accuracies are equal, and where ours is another, the answers' lengths explain it.
"""
import os
import sys
from dataclasses import replace

import pytest

from conftest import ROOT, slow

sys.path.append(str(ROOT / "bench"))

import harness as bench
from bpe import Tokenizer
from model import load_checkpoint

SHARED = ROOT.parent / "shared" / "data"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(lm_eval, our model, GPT-2's tokenizer)"""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    if not bench.find_core().is_dir():
        pytest.skip("the CORE files are not on this machine")
    try:
        tokenizer = Tokenizer.pretrained("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("gpt2")
    bench.write_gpt2(folder, n_layer=2, n_embd=32)
    return bench.Harness(folder, tokenizer, 16), load_checkpoint(folder)[0], tokenizer


def compared(sides, label, n):
    """compare()'s outcome on the first n rows, of which half of LAMBADA's are the model's own."""
    task, rows = bench.task_rows(label, n)
    if task.kind == "language_modeling":
        rows[::2] = [bench.as_written(*sides[1:], task, row) for row in rows[::2]]
    return bench.compare(*sides, task, rows)


def check_equal(found):
    assert found["difference"] < 1e-3 and found["unexplained"] == 0, found
    assert found["acc"] == found["their_acc"] and found["acc_norm"] in (found["their_acc_norm"], 0)
    assert abs(found["accuracy"] - found["acc"]) * found["rows"] <= found["other_by_length"]


@pytest.mark.parametrize("label", bench.TASKS)
def test_log_likelihoods_and_accuracies_are_those_of_lm_eval(sides, label):
    check_equal(compared(sides, label, 4))


@slow
@pytest.mark.parametrize("label", bench.TASKS)
def test_log_likelihoods_and_accuracies_are_those_of_lm_eval_on_200_rows(sides, label):
    found = compared(sides, label, 200)
    check_equal(found)
    assert 0 < found["acc"] < 1 and found["rows"] == 200


def test_with_solved_examples_the_log_likelihoods_are_equal_too(sides):
    lm, model, tokenizer = sides
    task, rows = bench.task_rows("arc_easy", 5)
    task = replace(task, shots=3)
    questions = bench.core_questions(tokenizer, task, rows, 2)
    ours = bench.score(model, [spans for spans, _ in questions])
    theirs = lm.log_likelihoods(task, rows)[:2]
    assert [[one.logprob for one in scores] for scores in ours] == [
        pytest.approx([total for total, _ in found], abs=1e-3) for found in theirs]


def test_an_answer_that_scores_a_little_more_would_be_noticed(sides, monkeypatch):
    def biased(model, questions):
        found = score(model, questions)
        found[1][0] = replace(found[1][0], logprob=found[1][0].logprob + 500)
        return found
    score = bench.score
    monkeypatch.setattr(bench, "score", biased)
    found = compared(sides, "piqa", 4)
    assert found["difference"] > 499
    with pytest.raises(AssertionError):
        check_equal(found)
