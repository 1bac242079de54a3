"""
The demo's table of commands and its narrator: what is printed, what passes by, and how it ends.
"""
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "demo"))
import look  # noqa: E402
import narrator  # noqa: E402
import run  # noqa: E402

STEP_LINE = ("step {}/300 | loss 5.203758 | lr 8.22e-03 | norm 0.3086 | 706.9 ms | 5794 tok/s | "
             "eta 0:00:07")
BAR_LINE = "crawl:  {}%|█▍   | 55/400 [00:01<00:08, 41.93page/s]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def tell(tmp_path):
    """A narrator whose screen is a text in memory."""
    screen = narrator.Screen(io.StringIO())
    return narrator.Narrator(screen, tmp_path / "x.log", tmp_path / "x-times.jsonl", size="tiny")


def names(folder, size="tiny"):
    """What the table's placeholders stand for."""
    folders = ("data", "base", "sft", "honest", "rl", "rlhf", "beyond", "conversations")
    return dict(run.SIZES[size], seed=1, **{name: f"{folder}/{name}" for name in folders})


def python(code, *words):
    return ["python", "-c", code, *words]


# ---- the table

@pytest.mark.parametrize("size", sorted(run.SIZES))
def test_every_command_is_filled_and_a_path_with_a_space_stays_one_word(size):
    commands = [command for step in run.STEPS for command in step.commands] + run.NEXT
    for command in commands:
        words = run.fill(command, names("my runs", size))
        assert words[0] == "python" and (ROOT / words[1]).exists()
        assert not [word for word in words if "{" in word or word == "my"]
    assert len(run.NEXT) == 5 and size in run.MINUTES


def test_each_step_says_what_and_why_on_a_line_each():
    for step in run.STEPS:
        assert 20 < len(step.what) < 90 and 20 < len(step.why) < 90
        assert "\n" not in step.what + step.why and step.title[0].isupper()


# ---- commands

def test_a_printed_command_can_be_pasted(tell):
    tell.run(python("import sys; print(sys.argv[1:])", "a b", "$c"))
    command, output = tell.screen.stream.getvalue().splitlines()[:2]
    again = subprocess.run(command.removeprefix("$ "), shell=True, cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert output == again.stdout.strip() == "['a b', '$c']"


def test_the_demo_ends_with_the_status_of_the_command_that_failed(tell):
    for code, status in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        with pytest.raises(SystemExit) as end:
            tell.run(python(code), "a step")
        assert end.value.code == status
    assert f"status 137; the whole output is in {tell.log}" in tell.screen.stream.getvalue()
    rows = [json.loads(row) for row in tell.times.read_text().splitlines()]
    assert [(row["step"], row["status"], row["size"]) for row in rows] == [
        ("a step", 7, "tiny"), ("a step", 137, "tiny")] and all(row["seconds"] for row in rows)


def test_a_command_has_no_input_but_the_chat_has(tell):
    tell.run(python("import sys; print(repr(sys.stdin.read()))"))
    assert "\n''\n" in tell.screen.stream.getvalue()


TELL = """
import sys
sys.path.append(sys.argv[1])
from narrator import Narrator, Screen
narrator = Narrator(Screen(sys.stdout), sys.argv[2] + "/log", sys.argv[2] + "/times")
narrator.catch_signals()
narrator.run(["python", "-c", sys.argv[3]])
print("not reached")
"""
WAIT = """
import os, signal, time
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
print("pid", os.getpid(), flush=True)
while not caught:
    time.sleep(0.01)
print("saved", flush=True)
raise SystemExit(130)
"""


@pytest.fixture
def told(tmp_path):
    """A narrator in a process of its own, whose command waits for a signal."""
    process = subprocess.Popen([sys.executable, "-c", TELL, str(ROOT / "demo"), str(tmp_path), WAIT],
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("pid "):
            process.command = int(line.split()[1])
            break
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_ctrl_c_lets_the_command_save(told):
    os.killpg(told.pid, signal.SIGINT)          # as a terminal does
    out, _ = told.communicate(timeout=60)
    assert "saved" in out and "continues from here" in out and "not reached" not in out
    assert told.returncode == 130


def test_a_terminated_demo_ends_its_command_first(told):
    told.terminate()
    out, _ = told.communicate(timeout=60)
    assert "saved" in out and told.returncode == 143


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_demo_leaves_nothing_running(told):
    told.kill()
    told.wait()
    for _ in range(500):
        state = Path(f"/proc/{told.command}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the command still runs")


# ---- what passes by

@pytest.mark.parametrize("line", [
    STEP_LINE.format(1), STEP_LINE.format(20), STEP_LINE.format(300),
    STEP_LINE.format(7).replace("5.203758", "nan"), STEP_LINE.format(7) + " | skipped",
    "step 7/300 | val_loss 5.913670 | val_bpb 2.3025", "step 7: skipped, loss 9.1 or norm 3.2",
    "step 7/16 | held out: bits accuracy 0.000 | reply 64.0 tokens", "warning: 97% were cut off",
    "Traceback (most recent call last):", "disk: 100%| full", "error [00:01] at 3", "",
    "--steps 0 must be at least 1, got 0", "flags", "params   2883689"])
def test_a_line_that_says_anything_else_is_never_left_out(line):
    screen = narrator.Screen(io.StringIO())
    screen.piece(line + "\n")
    assert screen.stream.getvalue() == line + "\n"


def test_steps_and_bars_pass_by_and_a_bar_s_end_stays():
    screen = narrator.Screen(io.StringIO())
    for line in (STEP_LINE.format(7), "commit   87ca7f2", "step  9/60 | reward 0.062 | reply 6.1 "
                 "tokens | tied 0% | truncated 88% | norm 0.2 | loss -0.01 | 1.3 ms | eta 0:00:00"):
        screen.piece(line + "\n")
    for piece in ("\r", BAR_LINE.format(50) + "\r", "documents: 9doc [00:00, ?doc/s]\r", "    \r"):
        screen.piece(piece)
    assert screen.stream.getvalue() == ""
    screen.piece(BAR_LINE.format(100) + "\n")
    assert screen.stream.getvalue() == BAR_LINE.format(100) + "\n"


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_line_that_follows_a_bar_without_a_new_line_is_shown(end):
    screen = narrator.Screen(io.StringIO())
    screen.piece(BAR_LINE.format(50) + "the disk is full" + end)
    assert "the disk is full\n" in screen.stream.getvalue()


def test_a_run_of_any_length_has_10_to_25_lines():
    for max_steps in (10, 16, 60, 152, 300, 19_073):
        every = narrator.steps_between(max_steps)
        assert 10 <= max_steps // every <= 25, max_steps


def test_in_a_long_silence_a_passing_line_is_written():
    screen = narrator.Screen(io.StringIO(), quiet_seconds=0)
    time.sleep(0.001)
    screen.piece(STEP_LINE.format(7) + "\n")
    assert screen.stream.getvalue() == STEP_LINE.format(7) + "\n"


def test_on_a_terminal_passing_lines_go_over_each_other_and_leave_nothing(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    screen = narrator.Screen(Terminal())
    for line in (STEP_LINE.format(7), STEP_LINE.format(8)):
        screen.piece(line + "\n")
    screen.line("stays", "title")
    first, second, blank, last = screen.stream.getvalue().split("\r")[1:]
    assert first == STEP_LINE.format(7)[:29] and second == STEP_LINE.format(8)[:29]
    assert blank == " " * 29 and last == "\033[1mstays\033[0m\n"


@pytest.mark.parametrize("stream, no_color", [(io.StringIO(), ""), (Terminal(), "1")])
def test_there_is_no_colour_in_a_pipe_or_with_no_color(monkeypatch, stream, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    narrator.Screen(stream).line("text", "title")
    assert stream.getvalue() == "text\n"


def test_the_log_holds_what_the_screen_left_out(tell):
    lines = [STEP_LINE.format(step) for step in range(1, 301)]
    tell.run(python("import sys; print(sys.argv[1])", "\n".join(lines)))
    assert 10 < len(tell.screen.stream.getvalue().splitlines()[len(lines):]) < 30
    assert all(line in tell.log.read_text().splitlines() for line in lines)


def test_text_that_is_cut_in_a_character_or_ends_without_a_new_line_is_whole():
    stream = io.BytesIO("a\r\nb█\rc".encode())
    stream.read1 = lambda _: stream.read(4)     # the bytes of █ come in two parts
    assert "".join(narrator.pieces(stream)) == "a\r\nb█\rc"


# ---- what to look at

def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_to_look_at_has_the_figures_of_the_files(tmp_path):
    write_rows(tmp_path / "base" / "log.jsonl", dict(step=0, val_loss=8.318), dict(step=0, sample="a"),
               dict(step=9, val_loss=3.61), dict(step=9, sample="b\nc"), dict(step=9, sample="d"),
               dict(val_bpb=1.9, gzip=2.4, xz=2.2))
    (tmp_path / "base" / "config.json").write_text('{"vocab_size": 4096}')
    text = look.pretraining(names(tmp_path))
    assert "fell from 8.32 to 3.61" in text[0] and "ln 4096 = 8.32" in text[0]
    assert "1.90 bits a byte, gzip 2.40, xz 2.20" in text[1]
    assert [line.split() for line in text[3:]] == [["0", "a"], ["9", "b", "c"]]


def test_practice_and_held_out_problems_are_told_with_figures(tmp_path):
    write_rows(tmp_path / "rl" / "log.jsonl", dict(step=1, reward=0.25, reply_tokens=6.1),
               dict(step=0, kind="bits", accuracy=0.52), dict(step=16, kind="bits", accuracy=0.97),
               dict(step=16, reward=0.95, reply_tokens=40.6))
    reward, accuracy = look.practice(names(tmp_path))
    assert "from 0.25 to 0.95" in reward and "from 6 to 41 tokens" in reward
    assert "bits" in accuracy and "52.0%" in accuracy and "97.0%" in accuracy
    write_rows(tmp_path / "rl" / "answers.jsonl",
               *(dict(step=step, question=q, reply=f"{q}{step}", right=step > 0 and q == "b")
                 for step in (0, 8) for q in "ab"))
    assert [line.split() for line in look.practice(names(tmp_path))[-2:]] == [["0", "b0"], ["8", "b8"]]
    kinds = dict(bits=dict(accuracy=0.97))
    (tmp_path / "rl" / "eval.json").write_text(json.dumps(
        {str(tmp_path / "conversations" / "held_out.jsonl"): dict(kinds=kinds)}))
    assert [line.split() for line in look.held_out(names(tmp_path))] == [
        ["right", "answers", "base", "SFT", "RL"], ["bits", "-", "-", "97.0%"]]


def test_chains_are_told_by_length_with_how_a_long_one_grew(tmp_path):
    run_of = tmp_path / "beyond" / "seed_0" / "rl"
    write_rows(run_of / "log.jsonl", dict(kind="16 arrows", accuracy=0.0, pass_16=0.125, step=0),
               dict(kind="16 arrows", accuracy=0.75, pass_16=0.875, step=80))
    write_rows(run_of / "answers.jsonl",
               *(dict(step=step, question=q, reply=f"{q}{step}", right=step > 0)
                 for step in (0, 80) for q in ("short", "long")))
    share, question, *replies = look.beyond(names(tmp_path))
    assert share.split()[-1] == "75.0%" and "12.5%" in share and question.endswith("long")
    assert [line.split() for line in replies] == [["0", "long0"], ["80", "long80"]]


def test_data_and_tokens_are_told_with_figures(tmp_path):
    funnel = [{"step": "read", "in": 400, "kept": 399, "dropped": {"status_404": 1}},
              {"step": "language", "in": 399, "kept": 300, "dropped": {"is_de": 99}, "bytes": 2e6}]
    shards = [dict(tokens=100, bytes=400), dict(tokens=100, bytes=300)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").write_text(json.dumps(
        dict(funnel=funnel, shards=shards, tokenizer=dict(n_vocab=4096))))
    pages, dropped = look.documents(names(tmp_path))
    assert "400 pages became 300 documents of 2.00 MB" in pages
    assert "language 99 (is_de), read 1 (status_404)" in dropped
    assert "700 bytes became 200 tokens, 3.50 bytes each" in look.tokens(names(tmp_path))[0]


@pytest.mark.parametrize("content", [None, "", '{"cut', "[]"])
def test_without_figures_nothing_is_said(tmp_path, content):
    for folder in ("data", "base", "sft", "honest", "rl", "rlhf", "beyond", "conversations"):
        (tmp_path / folder).mkdir()
        for name in ("index.json", "log.jsonl", "eval.json", "config.json", "identity.jsonl"):
            if content is not None:
                (tmp_path / folder / name).write_text(content)
    for step in run.STEPS:
        if step.look not in (None, look.writing):
            assert step.look(names(tmp_path)) == []


# ---- the whole

def test_a_step_is_told_in_order_and_the_end_says_where_the_report_is(tell, tmp_path):
    step = run.Step("Title", "What.", "Why.", ["python -c print({seed})"],
                    lambda names: [f"loss {names['seed']}"])
    run.begin(tell.screen, "tiny", tell.log)
    run.tell(tell, 1, step, names(tmp_path))
    run.end(tell, "tiny", names(tmp_path))
    text = tell.screen.stream.getvalue()
    order = ["Ctrl-C", str(tell.log), "Title", "What.", "Why.", "$ ", "\n1\n", "→ loss 1",
             "What took how long", "s  Title", "s  together", "report.html", "--chat", "bpe.py", "serve.py --model"]
    places = [text.find(word) for word in order]
    assert places == sorted(places) and -1 not in places


def test_the_chat_opens_only_if_both_ends_are_terminals(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(run, "STEPS", [])
    monkeypatch.setattr(run, "talk", lambda screen, names: opened.append(names["rl"]))
    monkeypatch.setattr(narrator.Narrator, "catch_signals", lambda self: None)
    monkeypatch.delenv("MAKELEVEL", raising=False)
    for is_terminal, chat, wanted in ((True, "1", 1), (True, "0", 1), (False, "1", 1)):
        monkeypatch.setattr(run, "has_terminal", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "argv", ["run.py", "--run", f"{tmp_path}/r", "--chat", chat])
        run.main()
        assert len(opened) == wanted
