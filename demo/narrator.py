"""
The demo's voice: it runs a command and shows what the command prints, without most of what repeats.

    screen = Screen(sys.stdout)
    narrator = Narrator(screen, "runs/demo.log", "runs/demo-times.jsonl")
    narrator.run(["python", "train_gpt2.py", …])
    narrator.times()

A run of hundreds of steps prints hundreds of lines, and a progress bar prints itself many times a
second. On a terminal such lines pass by on one line, each over the one before. Elsewhere they are
left out, but for one in ten seconds. Every other line is shown, so that no error or warning is ever
hidden, and the log file holds the whole output.
"""
import codecs
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ---- Lines that may pass by ----------------------------------------------------------------------

# What tqdm draws: "crawl:  3%|▎  | 5/195 [00:00<00:09, 20.1page/s]", "documents: 9doc [00:01, …]".
# Another program may print right after a bar without a new line; that text is the group `rest`.
BAR = re.compile(r"(?P<bar>[^|]*?(\d+%\|[^|]*\|)? *[\d.]+\w*(/[\d.?]+\w*)? *"
                 r"\[(\d+:)?\d\d:\d\d[^\]]*\])(?P<rest>.*)", re.DOTALL)
STEP = re.compile(r"step +(\d+)/(\d+) +\| (.*)")
STEP_FIGURE = re.compile(r"(loss|lr|norm|mfu|reward|gold|well formed|thinking|tied|truncated|"
                         r"entropy|keep_loss|kl|kl a reply) -?[\d.]+(e-?\d+)?%?"
                         r"|reply [\d.]+ tokens|[\d.]+ ms|\d+ tok/s|\$[\d.]+|eta \d+:\d\d:\d\d")
COUNT = re.compile(r"(judged \d+/\d+|\d+/\d+ prompts) \| eta .*")
HEADER = re.compile(r"(command|commit|torch|python|flags)  +\S.*")     # of a training run

def steps_between(max_steps):
    """Show every 1st, 2nd, 5th, 10th, 20th … step, so that a run has about 10 to 25 lines."""
    unit = 1
    while True:
        for every in (unit, 2 * unit, 5 * unit):
            if max_steps <= 25 * every:
                return every
        unit *= 10

def is_passing(line):
    """True for a line that repeats what others say: a step of training between those that are
    shown, a count of what is done, a bench's figures as JSON, or a part of a run's header that
    log.jsonl holds, too. A step's line with anything more than finite figures, such as an
    evaluation, is none."""
    if HEADER.fullmatch(line) or COUNT.fullmatch(line) or line.startswith('{"bench"'):
        return True
    step = STEP.fullmatch(line)
    if not step or not all(STEP_FIGURE.fullmatch(part) for part in step[3].split(" | ")):
        return False
    number = int(step[1])
    return number not in (1, int(step[2])) and number % steps_between(int(step[2])) != 0

def pieces(stream):
    """The text of a byte stream, each piece as it comes: up to a new line or a carriage return,
    with which a bar draws itself again."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while data := stream.read1(65536):
        rest += decoder.decode(data)
        *done, rest = re.split(r"(?<=[\r\n])", rest)
        yield from done
    yield rest + decoder.decode(b"", final=True)

# ---- The screen ----------------------------------------------------------------------------------

STYLES = dict(title="1", command="36", look="32", error="31")       # ANSI: bold and colours

class Screen:
    """Writes lines that stay, and lines that pass by. There is colour on a terminal alone, and none
    if NO_COLOR is set (no-color.org)."""

    def __init__(self, stream, quiet_seconds=10):
        self.stream = stream
        self.quiet_seconds = quiet_seconds      # elsewhere than on a terminal, after such a silence
        self.is_terminal = stream.isatty()      # a passing line is written, too
        self.has_colour = (self.is_terminal and not os.environ.get("NO_COLOR")
                           and os.environ.get("TERM") != "dumb" and os.name != "nt")
        self.passing_width = 0
        self.written = time.monotonic()

    def line(self, text="", style=None):
        """Writes a line that stays."""
        self.clear()
        if style and text and self.has_colour:
            text = f"\033[{STYLES[style]}m{text}\033[0m"
        self.write(text + "\n")

    def passing(self, text):
        """Writes a line over the passing line before it."""
        if self.is_terminal:
            text = text[:shutil.get_terminal_size().columns - 1]
            self.write("\r" + text.ljust(self.passing_width))
            self.passing_width = len(text)
        elif time.monotonic() - self.written > self.quiet_seconds:
            self.write(text + "\n")

    def clear(self):
        """Removes the passing line."""
        if self.passing_width:
            self.write("\r" + " " * self.passing_width + "\r")
            self.passing_width = 0

    def write(self, text):
        self.stream.write(text)
        self.stream.flush()
        self.written = time.monotonic()

    def piece(self, piece):
        """Shows a piece of a command's output."""
        text = piece.rstrip("\r\n")
        bar = BAR.fullmatch(text)
        if bar:
            if piece.endswith("\n"):            # it stays as it was at its end
                self.line(text)
            else:
                self.passing(bar["bar"])
            if bar["rest"].strip() and not piece.endswith("\n"):
                self.line(bar["rest"])
        elif is_passing(text):
            self.passing(text)
        elif text.strip() or piece == "\n":     # a bar that ends may blank its line
            self.line(text)

# ---- Commands ------------------------------------------------------------------------------------

def shown(words):
    """A command as one would type it in the project's folder."""
    python = Path(sys.executable)
    if python.is_relative_to(ROOT):
        python = python.relative_to(ROOT)
    return shlex.join([str(python), *words[1:]])

def end_with_parent():
    """On Linux, lets this process end with the one that started it, even if that is killed, so that
    nothing runs on alone while the demo is started again."""
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: man 2 prctl

class Narrator:
    """Runs commands, shows their output on a screen, and keeps it whole in the file `log`. The file
    `times` gets a row of JSON for each command.

    Ctrl-C reaches the command, too, which then saves what it has; the narrator waits for it.
    """

    def __init__(self, screen, log, times, **about):
        self.screen = screen
        self.log = log
        self.times = times
        self.about = about          # joins each row of `times`
        self.seconds = {}           # {title of a step: seconds}
        self.process = None
        self.signals = []

    def catch_signals(self):
        """From now on SIGINT and SIGTERM end the command first."""
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, number, frame):
        self.signals.append(number)
        if self.process is None:
            raise SystemExit(128 + number)
        if number == signal.SIGTERM:            # a terminal sends SIGINT to the command itself
            self.process.terminate()

    def run(self, words, title=""):
        """Prints a command as it could be typed and runs it with this Python. If it fails, the demo
        ends with its exit status."""
        self.screen.line(f"$ {shown(words)}", "command")
        started = time.perf_counter()
        status = self.show_output(words)
        seconds = time.perf_counter() - started
        self.seconds[title] = self.seconds.get(title, 0) + seconds
        with open(self.times, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(step=title, command=" ".join(words), status=status,
                                       seconds=round(seconds, 3), **self.about)) + "\n")
        if self.signals:
            self.screen.line("Stopped. The same command continues from here.")
            raise SystemExit(128 + self.signals[0])
        if status:
            self.screen.line(f"This command failed with exit status {status}; the whole output is "
                             f"in {self.log}. The same command continues from here.", "error")
            raise SystemExit(status)
        self.screen.line()

    def show_output(self, words):
        """Runs a command → its exit status; as in a shell, 128 + N if signal N ended it."""
        env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
        # GNU OpenMP's idle threads sleep sooner, which helps where other programs run
        env.setdefault("GOMP_SPINCOUNT", "20000")
        limits = {}
        if sys.platform == "linux":
            limits = dict(preexec_fn=end_with_parent)
        with (open(self.log, "a", encoding="utf-8", newline="") as log,
              subprocess.Popen([sys.executable, *words[1:]], env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               **limits) as self.process):
            log.write(f"$ {shown(words)}\n")
            try:
                for piece in pieces(self.process.stdout):
                    log.write(piece)
                    log.flush()
                    self.screen.piece(piece)
            except BrokenPipeError:             # nobody reads the demo's output any more
                self.process.terminate()
                raise
        status = self.process.returncode
        self.process = None
        return status if status >= 0 else 128 - status

    def table(self):
        """Lines that say how long each step took."""
        lines = [f"{seconds:7.0f} s  {title}" for title, seconds in self.seconds.items()]
        return [*lines, f"{sum(self.seconds.values()):7.0f} s  together"]
