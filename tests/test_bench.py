"""
The benches themselves: what they compute from times, that projections give published hours, and
that everything meant for a GPU runs, at tiny size, before it ever meets one.
"""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "bench"))

import gpu
import measure
import project
import train as train_bench
import trainers


def test_a_ratio_is_of_pairs_that_ran_next_to_each_other():
    # a machine that becomes ten times slower half-way changes no ratio, but every median
    assert measure.ratio([2, 2, 20, 20], [1, 1, 10, 10]) == "2.00 x (2.00 … 2.00)"


def test_contenders_take_turns_and_the_first_round_does_not_count():
    calls = []
    ms = measure.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert calls == ["a", "b"] * 3 and {name: len(each) for name, each in ms.items()} == dict(
        a=2, b=2)


@pytest.mark.parametrize("value, shown", [(1234.5, "1,234"), (0.012345, "0.0123"), (32768, "32,768"),
                                          (None, "–"), ("x", "x"), (0.0, "0.0")])
def test_numbers_are_shown_with_three_digits(value, shown):
    assert measure.show(value) == shown


def test_a_section_of_results_replaces_its_predecessor_and_no_other():
    text = measure.put_section("# R\n\n## a\n\nold\n\n## b\n\nkept\n", "a", "new")
    assert "old" not in text and "## a\n\nnew\n" in text and text.endswith("## b\n\nkept\n")
    assert measure.put_section(text, "c", "last").endswith("## c\n\nlast\n")


def test_published_hours_are_reproduced(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["project.py"])
    project.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["published"]) == 3
    for run in report["published"]:
        assert run["computed"] == pytest.approx(run["hours"], rel=0.10), run["run"]


def test_eight_gpus_share_the_optimizer_and_pay_for_the_network():
    args = SimpleNamespace(on="H100", memory_bound=0.2, network=300)
    run = SimpleNamespace(batch=8000, params=3e9)
    row = dict(ms=100.0, optimizer_share=0.2, step_tokens=1000)
    network = 2 * 4 * 3e9 * 7 / 8 / 300e9 * 1000
    assert project.node_step_ms(row, run, args) == pytest.approx(80 + 20 / 8 + network)


@pytest.mark.parametrize("line, ms", [
    ("step    2/100 | loss 10.950000 (+nanz)| norm 15.1234 (+nanz)| lr 8.57e-07 | 139.27 ms | "
     "41.1% bf16 MFU | 470000 tok/s", 139.27),          # llm.c
    ("step  2/90 | loss 5.698421 | lr 6.00e-04 | norm 1.0000 | 103.1 ms | 310 tok/s | eta 0:00:09",
     103.1)])                                           # ours
def test_a_step_line_of_either_trainer_is_read(line, ms):
    assert [float(found) for found in trainers.STEP.findall(line)] == [ms]


def test_time_to_match_is_found_between_two_evaluations():
    theirs = [(1, 5.0, 2.0), (2, 10.0, 1.0)]
    assert train_bench.time_to_match([(1, 2.0, 1.5), (2, 4.0, 0.5)], theirs) == 0.3
    assert train_bench.time_to_match([(1, 2.0, 1.5), (2, 4.0, 1.1)], theirs) is None


def gpu_parts(monkeypatch, tmp_path, parts, *flags):
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *flags])
    gpu.main()
    return {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts
            if (tmp_path / f"{name}.json").exists()}


def test_a_part_that_hangs_or_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    parts = {"hang": (1, "-c while(1):pass"), "fail": (9, "-c raise(SystemExit(3))"),
             "good": (9, "-c print('{\"found\":1}')")}
    found = gpu_parts(monkeypatch, tmp_path, parts, "--dry_run")
    assert found["hang"]["failed"].startswith("over 1 s")
    assert found["fail"]["failed"].startswith("status 3") and found["good"]["found"] == 1


def test_a_second_call_does_what_is_left(monkeypatch, tmp_path):
    mark = tmp_path / "calls"
    parts = {"done": (9, f"-c open('{mark}','a').write('d')"),
             "late": (9, f"-c open('{mark}','a').write('l')")}
    found = gpu_parts(monkeypatch, tmp_path, parts, "--dry_run", "--parts", "done")
    assert list(found) == ["done"]
    assert list(gpu_parts(monkeypatch, tmp_path, parts, "--dry_run", "--seconds", "1")) == ["done"]
    gpu_parts(monkeypatch, tmp_path, parts, "--dry_run")
    assert mark.read_text() == "dl"


@pytest.mark.timeout(400)
def test_every_part_for_a_gpu_runs_at_tiny_size(tmp_path):
    rows = [dict(text=f"{word} and {i}") for i in range(2000) for word in ("one", "two")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", "--dry_run", "--out", tmp_path / "out",
                           "--text", tmp_path / "text.jsonl"], text=True, capture_output=True,
                          env=dict(os.environ, PYTHON=sys.executable))
    assert done.returncode == 0, done.stderr[-1000:]
    failed = {part: report["failed"] for part in gpu.PARTS if "failed" in (
        report := json.loads((tmp_path / "out" / f"{part}.json").read_text()))}
    assert not failed
