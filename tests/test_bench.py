"""
The benches themselves: what they compute from times, that projections give published hours, and
that everything meant for a GPU runs, at tiny size, before it ever meets one.
"""
import json
import os
import random
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT, slow
from test_style import check_commands

sys.path.append(str(ROOT / "bench"))

import beyond
import gpu
import measure
import project
import recipe
import scale
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


def project_report(capsys, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["project.py", *map(str, flags)])
    project.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_published_hours_are_reproduced(capsys, monkeypatch):
    report = project_report(capsys, monkeypatch, "--models", "d24")
    assert len(report["published"]) == 3
    for run in report["published"]:
        assert run["computed"] == pytest.approx(run["hours"], rel=0.05), run["run"]
    for row in report["predicted"]:
        assert row["hours_hidden"] < row["hours"]
        assert row["tokens"] == report["published"][2]["tokens"]


def test_eight_gpus_share_the_optimizer_and_pay_for_the_network():
    args = SimpleNamespace(on="H100", memory_bound=0.2, network=300)
    run = SimpleNamespace(batch=8000, params=3e9)
    row = dict(ms=100.0, optimizer_share=0.2, step_tokens=1000)
    network = 2 * 4 * 3e9 * 7 / 8 / 300e9 * 1000
    assert project.node_step_ms(row, run, args) == pytest.approx(80 + 20 / 8 + network)


@pytest.mark.parametrize("window, T", [(16, 64), (64, 64), (1, 8), (100, 64)])
def test_the_keys_that_a_token_sees_are_counted(window, T):
    config = SimpleNamespace(block_size=T, window=lambda layer: window)
    counted = sum(min(t + 1, window) for t in range(T)) / T
    assert project.seen_keys(config, 0) == pytest.approx(counted)


def test_a_step_is_as_much_slower_as_the_rate_that_bounds_it():
    """Ten times slower matmuls take all the time in the end, ten times faster ones none."""
    rates = project.read_rates(ROOT / "bench" / "rates.csv")["train_gpt2.cu"]
    run = project.plan("d24")
    usual, network = project.step_from_rates(run, rates)
    matmuls = 1000 * run.batch / 8 * 6 * 12 * 24 * 1536 ** 2 / (670e12)
    slow, _ = project.step_from_rates(run, rates | dict(block_matmuls_tflops=67))
    assert slow - usual == pytest.approx(9 * matmuls, rel=1e-3)
    assert network == pytest.approx(6 * run.params * 7 / 8 / 300e9 * 1000)


@pytest.mark.parametrize("row, found", [
    ("x,block_matmuls_tflops,1,a guess", "lacks head_matmuls_tflops"),
    ("x,block_matmuls_tflops,0,a guess", "is not a positive rate with its origin"),
    ("x,matmuls,1,a guess", "is not a positive rate with its origin"),
    ("x,launch_us,1,", "is not a positive rate with its origin")])
def test_a_rate_that_is_unknown_or_has_no_origin_is_refused(row, found, tmp_path):
    (tmp_path / "rates.csv").write_text(f"set,rate,value,from\n{row}\n")
    with pytest.raises(SystemExit, match=found):
        project.read_rates(tmp_path / "rates.csv")


def test_a_profile_gives_back_the_rates_it_was_made_with():
    kernels = [("matmul 4608 x 32768 x 1536", 24, 10.0, "1%", 0.0, 600.0, "1%"),
               ("matmul 1536 x 32768 x 6144", 24, 30.0, "1%", 0.0, 700.0, "1%"),
               ("attention_backward_keys", 24, 4.0, "1%", 0.0, 210.0, "1%"),
               ("attention_backward_queries", 24, 3.0, "1%", 0.0, 210.0, "1%"),
               ("rmsnorm_forward", 49, 5.0, "1%", 2000.0, 0.0, "1%")]
    rates = project.rates_of_profile(kernels, V=50000)
    assert rates["block_matmuls_tflops"] == 675 and rates["memory_tb_s"] == 2.0
    assert rates["attention_backward_tflops"] == pytest.approx(150)
    assert rates["head_matmuls_tflops"] == 680      # no matmul had V as a side


LINKS = SimpleNamespace(nvlink_gb_s=300, card_gb_s=40, nvlink_hop_us=1.0, network_hop_us=5.0)


@pytest.mark.parametrize("ranks", [2, 8, 16, 24])
def test_a_ring_sends_what_the_simulation_says(ranks):
    """Each of `ranks` pieces of 24 bytes travels along all ranks but one and is added up there."""
    sent, out = [0] * ranks, [0] * (ranks // 8 + 1)
    for piece in range(ranks):
        for hop in range(ranks - 1):
            sender = (piece + hop) % ranks
            sent[sender] += 24
            if ranks > 8 and sender % 8 == 7:       # its neighbour is in another node
                out[sender // 8] += 24
    by_gpu, by_node = scale.sent_bytes(24 * ranks, ranks)
    assert by_gpu == pytest.approx(sum(sent) / ranks) and max(sent) == 24 * (ranks - 1)
    assert by_node == pytest.approx(sum(out) / max(1, ranks // 8))


def test_buckets_hold_every_parameter_that_is_not_a_scalar():
    for name in ("gpt2", "d12", "d22"):
        run = project.plan(name)
        padding = (run.config.padded_vocab - run.config.vocab_size) * run.config.n_embd
        n_tables = sum("h." not in bucket for bucket, _, _ in scale.buckets_of(run.config))
        left = run.params + n_tables * padding - sum(n for _, n, _ in scale.buckets_of(run.config))
        assert 0 <= left <= 12 * run.config.n_head * run.config.n_layer + 100, name     # gates


def test_what_is_sent_is_hidden_by_a_long_backward_pass_but_for_the_last_buckets():
    buckets = [("wte", 3e6, None), ("h.0", 12e6, 0), ("h.1", 12e6, 1)]
    one = scale.transfer_ms(4 * 12e6, 8, LINKS)
    last = scale.transfer_ms(4 * 3e6, 8, LINKS)
    assert scale.reduced_at(buckets, 1000.0, 8, LINKS)[0][:2] == ("h.1", 500.0)
    assert scale.reduced_at(buckets, 1000.0, 8, LINKS)[-1] == ("wte", 1000.0, 1000 + one + last)
    assert scale.reduced_at(buckets, 0.0, 8, LINKS)[-1][2] == pytest.approx(2 * one + last)
    assert scale.transfer_ms(1e9, 1, LINKS) == 0 and scale.transfer_ms(1e9, 64, LINKS) > one


def test_more_ranks_have_less_to_compute_and_as_much_to_send():
    run, rates = project.plan("d12"), project.read_rates(ROOT / "bench" / "rates.csv")["limit"]
    few, many = (scale.simulate(run, rates, ranks, LINKS) for ranks in (8, 64))
    assert few["passes_ms"] == pytest.approx(8 * many["passes_ms"])
    assert few["gpu_gb"] < many["gpu_gb"] < 1.2 * few["gpu_gb"] and few["node_gb"] == 0
    assert few["tok_s"] < many["tok_s"] < 8 * few["tok_s"]
    assert scale.simulate(run, rates, 10 ** 6, LINKS) is None       # less than a row for each


def test_commands_of_the_page_about_gpus_exist():
    assert check_commands((ROOT / "bench" / "GPU.md").read_text(encoding="utf-8")) >= 5


def fake_nvidia_smi(monkeypatch, folder, text):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("name, gpu", [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")])
def test_a_projection_starts_from_the_gpu_that_was_measured(name, gpu, tmp_path, monkeypatch):
    fake_nvidia_smi(monkeypatch, tmp_path, name)
    (tmp_path / "d24.json").write_text(json.dumps(dict(machine=measure.machine())))
    assert project.gpu_of(project.read_reports(tmp_path)) == gpu


@pytest.mark.parametrize("line, ms", [
    ("step    2/100 | loss 10.950000 (+nanz)| norm 15.1234 (+nanz)| lr 8.57e-07 | 139.27 ms | "
     "41.1% bf16 MFU | 470000 tok/s", 139.27),          # llm.c
    ("step  2/90 | loss 5.698421 | lr 6.00e-04 | norm 1.0000 | 103.1 ms | 310 tok/s | eta 0:00:09",
     103.1)])                                           # ours
def test_a_step_line_of_either_trainer_is_read(line, ms):
    assert [float(found) for found in trainers.STEP.findall(line)] == [ms]


def test_llm_c_is_never_given_an_interval_of_0_that_it_would_divide_by():
    """And its 1558M gets 8 rows, since 16 do not fit into 80 GB without cuDNN."""
    shape = trainers.TRAINED["gpt2-xl"]
    words = [str(word) for word in trainers.llmc_command("gpt2-xl", shape, "x", ROOT)]
    flags = dict(zip(words[1::2], words[2::2]))
    assert int(flags["-v"]) > int(flags["-x"]) - 1 and int(flags["-v"]) > 1000
    assert (flags["-b"], flags["-d"]) == ("8", str(2 ** 17))


PROFILE = """kernel                                        calls  ms a step  share   MB a step    GB/s
matmul 4608 x 32768 x 1536 += fp32             24     12.345  10.0%  123.4  1234.5  678.90  70.0%
rmsnorm_forward                                  49      1.500   1.2%   33.0  2200.0    0.00  66.0%
the rest: gaps, copies, other ranks                      2.000   1.0%
a step 123.456 ms; at best 3350 GB/s, 989 TFLOP/s
kernel of no table 1 2 3 4 5 6 7"""


def test_the_profile_of_the_cuda_trainer_is_read():
    assert trainers.read_profile(PROFILE.splitlines()) == [
        ("matmul 4608 x 32768 x 1536 += fp32", 24, 12.345, "10.0%", 1234.5, 678.9, "70.0%"),
        ("rmsnorm_forward", 49, 1.5, "1.2%", 2200.0, 0.0, "66.0%")]


TRAINER = """import os, sys, time
for step in range(1, 9):
    print(f"step {step}/9 | loss 1.0 | {100 * step}.0 ms | rank", os.environ["RANK"], flush=True)
time.sleep(60)"""


def test_a_trainer_is_killed_with_all_its_ranks_after_the_last_timed_step(tmp_path, monkeypatch):
    fake_nvidia_smi(monkeypatch, tmp_path, "40960")
    command = [sys.executable, "-c", TRAINER]
    ms, memory_gb, start_s, lines = trainers.run(command, steps=3, ranks=2)
    assert ms == [100, 200, 300] and memory_gb == 40.96 and start_s < 30
    assert all(line.endswith("rank 0") for line in lines)
    with pytest.raises(RuntimeError, match="ValueError"):
        trainers.run([sys.executable, "-c", "raise ValueError"], steps=1)


def test_time_to_match_is_found_between_two_evaluations():
    theirs = [(1, 5.0, 2.0), (2, 10.0, 1.0)]
    assert train_bench.time_to_match([(1, 2.0, 1.5), (2, 4.0, 0.5)], theirs) == 0.3
    assert train_bench.time_to_match([(1, 2.0, 1.5), (2, 4.0, 1.1)], theirs) is None


def gpu_parts(monkeypatch, out, parts, *flags):
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "build_emulated_trainer", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *map(str, flags)])
    gpu.main()
    return gpu.read_reports(out)


def python(code):
    """The command of a part that runs this code"""
    return f"-c {shlex.quote(code)}"


def test_a_part_that_hangs_or_fails_keeps_its_rows_and_the_others_go_on(monkeypatch, tmp_path):
    parts = {"hang": (3, python("print('| a | 1 |')\nwhile True: pass")),
             "fail": (9, python("print('| b | 2 |')\nraise SystemExit(3)")),
             "good": (9, python("print('{}')"))}
    found = gpu_parts(monkeypatch, tmp_path, parts, "--dry_run")
    assert found["hang"]["failed"].startswith("over 3 s") and found["hang"]["tables"] == "| a | 1 |"
    assert found["fail"]["failed"].startswith("status 3") and found["fail"]["tables"] == "| b | 2 |"
    assert "failed" not in found["good"] and "| a | 1 |" in gpu.all_tables(tmp_path)


def test_a_second_call_does_what_is_left(monkeypatch, tmp_path):
    """Neither what is done nor what its whole time was too short for."""
    def part(letter, then=""):
        return python(f"open('{tmp_path}/calls', 'a').write('{letter}')\n{then}")

    parts = {"done": (9, part("d")), "late": (200, part("l")),
             "slow": (3, part("s", "while True: pass")), "fail": (9, part("f", "1 / 0"))}
    first = gpu_parts(monkeypatch, tmp_path, parts, "--seconds", 60)
    assert list(first) == ["done", "slow", "fail"]
    gpu_parts(monkeypatch, tmp_path, parts, "--seconds", 400)
    gpu_parts(monkeypatch, tmp_path, parts, "--parts", "slow")
    assert (tmp_path / "calls").read_text() == "dsf" + "lf" + "s"


def test_results_come_back_in_two_files_and_another_machine_takes_them_up(monkeypatch, tmp_path):
    parts = {name: (9, python(f"print({name!r})")) for name in "ab"}
    back, first, second = tmp_path / "back", tmp_path / "first", tmp_path / "second"
    gpu_parts(monkeypatch, first, parts, "--parts", "a", "--copy_to", back)
    assert {path.name for path in back.iterdir()} == {"gpu.json", "gpu.log"}
    found = gpu_parts(monkeypatch, second, parts, "--copy_to", back)
    assert set(found) == {"a", "b"} and not (second / "a.log").exists()
    assert set(json.loads((back / "gpu.json").read_text())) == {"a", "b"}


def test_each_part_fits_into_one_call_and_the_first_call_times_the_cuda_trainer():
    calls = gpu.plan(gpu.PARTS, gpu.CALL_SECONDS)
    assert sorted(sum(calls, [])) == sorted(gpu.PARTS)
    assert calls[0][:5] == ["ceilings", "build", "cuda_gpt2", "cuda_d12", "cuda_d24"]
    for call in calls:
        assert sum(gpu.PARTS[part][0] for part in call) <= gpu.CALL_SECONDS


def test_contenders_of_several_parts_meet_in_one_table():
    row = dict(tok_s=1e5, memory_gb=40.0)
    reports = {label: dict(machine="H100", speed=dict(d24=[dict(row, contender=label, ms=ms)]))
               for label, ms in (("nanochat", 300.0), ("ours", 200.0))}
    table, = gpu.speed_tables(reports)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["ours", "nanochat"]
    assert table.splitlines()[-1].endswith("| 1.50 |")
    curves = dict(ours=[(1, 2.0, 1.5), (2, 4.0, 0.5)], nanochat=[(1, 5.0, 2.0), (2, 10.0, 1.0)])
    row = dict(shape="d12")
    reports = {label: dict(machine="H100", quality=[dict(row, contender=label, curve=curve)])
               for label, curve in curves.items()}
    assert gpu.quality_tables(reports)[0].endswith("| nanochat | 1.0000 | 0.5000 | 0.300 |")


@slow
@pytest.mark.timeout(600)
def test_every_part_for_a_gpu_runs_at_tiny_size(tmp_path):
    rows = [dict(text=f"{word} and {i}") for i in range(2000) for word in ("one", "two")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", "--dry_run", "--out",
                           tmp_path / "out", "--text", tmp_path / "text.jsonl"], text=True,
                          capture_output=True,
                          env=dict(os.environ, PYTHON=sys.executable))
    assert done.returncode == 0, done.stderr[-1000:]
    failed = {part: report["failed"] for part in gpu.PARTS if "failed" in (
        report := json.loads((tmp_path / "out" / f"{part}.json").read_text()))}
    assert not failed


# ---- beyond.py

def test_a_chain_leads_from_its_start_to_its_answer():
    for arrows in range(1, 9):
        question, thought, answer = beyond.chain(random.Random(arrows), arrows, 8)
        pairs, at = question.split(": ")
        found, after = at, dict(tuple(pair) for pair in pairs.split())
        while at in after:
            at = after[at]
            found += at
        assert (found, at, len(thought), len(after)) == (thought, answer, arrows + 1, 8)


def test_no_example_is_as_long_as_what_is_practised_beyond_them():
    rng = random.Random(0)
    examples = [beyond.example(rng)["messages"] for _ in range(200)]
    longest = max(len(reply["content"][0]["text"]) for _, reply in examples)
    assert longest == max(beyond.TAUGHT) + 1
    for arrows in beyond.TESTED[1:]:
        question = beyond.problem(rng, arrows)["question"]
        after = dict(tuple(pair) for pair in question.split(": ")[0].split())
        at, steps = question[-1], 0
        while at in after:
            at, steps = after[at], steps + 1
        assert steps == arrows > max(beyond.TAUGHT) and len(after) == max(arrows, beyond.PAIRS)


@pytest.mark.parametrize("shares, rounds", [((0.0, 0.91, 1.0), 2), ((0.0, 0.5, 0.89), 3)])
def test_fine_tuning_ends_with_the_round_that_follows_the_longest_chains(
        shares, rounds, tmp_path, monkeypatch):
    def run_stage(folder, is_kept, script, *flags):
        flags = dict(zip(flags[::2], flags[1::2]))
        started.append((flags["--model"], flags["--out"], (folder / flags["--data"]).read_text()))
        (folder / flags["--out"]).mkdir()
        beyond.write_rows(folder / flags["--out"] / "log.jsonl", [
            dict(step=0, accuracy={"6 arrows": share}) for share in (0.0, shares[len(started) - 1])])
    started = []
    monkeypatch.setattr(beyond, "run_stage", run_stage)
    args = SimpleNamespace(rounds=3, examples=5, folder=None)
    assert beyond.teach(tmp_path, 0, args) == (f"sft_{rounds}", shares[rounds - 1])
    assert [names for *names, _ in started] == [
        ["base", "sft_1"], ["sft_1", "sft_2"], ["sft_2", "sft_3"]][:rounds]
    assert len({data for *_, data in started}) == rounds        # each on examples of its own


def test_beyond_claims_only_what_rose_past_every_sample_of_before():
    before = dict(accuracy=0.1, pass_1=0.1, pass_16=0.5)
    figures = dict(a=(before, dict(accuracy=0.9, pass_1=0.6)), b=(before, dict(accuracy=0.6, pass_1=0.5)),
                   c=(dict(before, accuracy=0.2), dict(accuracy=1.0, pass_1=0.5)),
                   d=(dict(before, pass_16=0.0), dict(accuracy=0.1, pass_1=0.1)))
    assert beyond.verdict(figures) == (["a"], ["a"])


def test_the_speedruns_arithmetic_is_what_its_docstring_says():
    run = project.plan("speedrun")
    config = run.config
    keys = sum(min(config.window(layer), 2048) for layer in range(config.n_layer))
    rates = project.read_rates(ROOT / "bench" / "rates.csv")
    said = [f"{run.matmul_params / 1e6:.0f} million", f"{run.tokens / 1e9:.2f} billion",
            f"{run.steps:,} steps", f"{keys:,} keys", f"{run.flops / 1e9:.2f} billion a token",
            f"{run.flops * run.tokens:.2e}".replace("e+", "e"), "22 · 12 · 1408²",
            f"{run.flops * run.tokens / 8 / project.H100_FLOPS / 60:.0f} minutes"]
    for kernels in ("train_gpt2.cu", "wgmma and fp8"):
        ms, _ = project.step_from_rates(run, rates[kernels])
        hours = run.steps * ms / 3.6e6
        said.append(f"{hours:.2f} hours, ${24 * hours:.1f}")
    for words in said:
        assert words in recipe.__doc__, words
    assert (config.n_layer, config.n_embd, config.vocab_size) == (22, 1408, 49152)
