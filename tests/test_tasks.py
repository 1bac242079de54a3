"""
tasks.py: the problems of a name have right answers, found in another way; the held-out ones are
never practised, whatever the seed; and RL takes a name where it takes a file.
"""

import pytest

import dialogs
import download
import tasks
from conftest import run_main
from problems import is_correct, read_problems
from tasks import TASKS, gsm8k, make_task, read_task
from test_eval import write_lines


def what_is_asked(problem):
    """The numbers or words of a question, in any order."""
    return sorted(problem["question"].replace("?", "").replace(",", "").split())


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_problem_is_practised_in_any_order_or_with_any_seed(name):
    practised, held_out = make_task(name, 300, 60)
    assert len(practised) == 300 and len(held_out) == 60
    others = sum((make_task(f"{name}:{seed}", 100, 0)[0] for seed in (1, 2)), practised)
    asked = {str(what_is_asked(p)) for p in others}
    assert not asked & {str(what_is_asked(p)) for p in held_out}
    assert len({str(what_is_asked(p)) for p in practised}) > 290


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_each_time_and_another_with_another_seed(name):
    assert make_task(name, 20, 5) == make_task(f"{name}:{tasks.SEED}", 20, 5)
    assert make_task(name, 20, 5) != make_task(f"{name}:1", 20, 5)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_no_guess_is_right_for_most(name):
    practised, _ = make_task(name, 200, 0)
    assert {p["kind"] for p in practised} == {name}
    guesses = {}
    for p in practised:
        assert is_correct(f"#### {p['answer']}", p) and not is_correct(f"#### {p['answer']} 7", p)
        guesses[p["answer"]] = guesses.get(p["answer"], 0) + 1
    assert max(guesses.values()) < 0.7 * len(practised)


def test_sums_and_countdowns_are_those_that_python_calculates():
    for p in make_task("sums", 100, 0)[0]:
        assert eval(p["question"].removeprefix("What is ").rstrip("?")) == int(p["answer"])
    for p in make_task("countdown", 100, 0)[0]:
        assert eval(p["answer"]) == p["target"] and p["question"].startswith(f"Make {p['target']} ")


def test_a_task_with_few_problems_ends(monkeypatch):
    monkeypatch.setattr(tasks, "WORDS", ["eel", "apple"])
    practised, held_out = make_task("letters", 100, 100)
    assert 5 < len(practised) + len(held_out) < 60


def test_gsm8k_is_downloaded_and_its_test_set_held_out(tmp_path, monkeypatch):
    rows = dict(gsm8k=dict(question="1?", answer="It is\n#### 1"),
                gsm8k_test=dict(question="2?", answer="#### 1,002"))

    def downloaded(name, world_size):
        return [write_lines(tmp_path / f"{name}.jsonl", rows[name], "")]

    monkeypatch.setattr(dialogs, "downloaded", downloaded)
    [practised], [held_out] = gsm8k()
    assert (practised["question"], practised["answer"], practised["kind"]) == ("1?", "1", "gsm8k")
    assert (held_out["question"], held_out["answer"]) == ("2?", "1002")


def test_the_test_set_of_gsm8k_has_a_name_of_its_own(monkeypatch):
    paths = ["main/test-00000-of-00001.parquet", "main/train-00000-of-00001.parquet"]
    monkeypatch.setattr(download, "listing", lambda url, parse: (
        ("0" * 40, None) if "/revision/" in url else ([(path, 1, None) for path in paths], None)))
    for name, path in zip(("gsm8k_test", "gsm8k"), paths):
        [file] = download.hub_files(name, None, None)[1]
        assert file["path"].endswith(path)


@pytest.mark.parametrize("name", ["cuntdown", "sums:", "sums:x", "gsm8k:1", "", "sums:1:2", "sums:-1"])
def test_an_unknown_task_is_one_line_with_those_there_are(name):
    with pytest.raises(SystemExit, match="neither a task nor a file; the tasks are gsm8k, sums"):
        read_task(name)


def test_tasks_are_written_as_files_that_are_read_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks.make_task, "__defaults__", (9, 3))
    run_main(tasks, "letters:3", "--out", tmp_path)
    assert [read_problems(tmp_path / f"letters_3{end}.jsonl") for end in ("", "_held_out")] == list(
        make_task("letters:3", 9, 3))
    assert "letters_3_held_out.jsonl: 3 problems, for instance: How many" in capsys.readouterr().out
