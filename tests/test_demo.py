"""The demo's table of commands and its narrator: what they print, skip and refuse."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "demo"))
import run  # noqa: E402


def demo(names=None, size="tiny"):
    """What the table's placeholders stand for."""
    folders = dict(data="my data", base="r-base", sft="r-sft", rl="r-rl", conversations="chat")
    return dict(run.SIZES[size], seed=1, **folders) | (names or {})


@pytest.mark.parametrize("size", sorted(run.SIZES))
def test_every_command_is_filled_and_a_path_with_a_space_stays_one_word(size):
    for step in run.STEPS:
        for command in step.commands:
            words = run.fill(command, demo(size=size))
            assert words[0] == "python" and (ROOT / words[1]).exists()
            assert not [word for word in words if "{" in word or word == "my"]


def test_a_printed_command_can_be_pasted(capfd):
    words = ["python", "-c", "import sys; print(sys.argv[1:])", "a b", "c"]
    run.run(words)
    command, output = capfd.readouterr().out.splitlines()
    again = subprocess.run(command.removeprefix("$ "), shell=True, cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert output == again.stdout.strip() == "['a b', 'c']"


def test_the_demo_ends_with_the_status_of_the_command_that_failed():
    with pytest.raises(SystemExit) as end:
        run.run(["python", "-c", "raise SystemExit(7)"])
    assert end.value.code == 7
    with pytest.raises(SystemExit) as end:
        run.run(["python", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert end.value.code == 137
