"""
Inference: a trained model writes, one token at a time.

    python sample.py                            # the newest run under runs/; an assistant chats
    python sample.py --docs my_notes/           # the assistant looks things up there
    python sample.py --prompt "The function returns" --num_samples 3
    python sample.py --model gpt2 --few_shot pairs.txt --prompt "cheese"
    python sample.py --model runs/demo --logprobs "The function returns the the"
    python sample.py --model runs/demo --file story.txt --temperature 0 --stop "THE END"

    in:  <run>/model.safetensors, config.json, the tokenizer      out: text

A prompt begins with <|endoftext|>, as every document in training did. The model reads the prompt
once (prefill) and leaves its keys and values in a cache; each new token then costs one position.
How many texts share a batch, and how a token is drawn, is told in engine.py.
When an assistant writes <|python|>code<|/python|>, the engine runs the code and forces
<|output|>its result<|/output|> into the text before the model continues: the output of a tool is
never sampled. In the same way <|search|>query<|/search|> is answered with a passage (search.py).

Paper: tool calls in the text (Toolformer, arXiv 2302.04761).
"""
import argparse
import codecs
import ctypes
import difflib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from bpe import Tokenizer
from model import GPT2_SIZES, load_checkpoint

# ---- The Python tool -----------------------------------------------------------------------------

def run_python(code, timeout=5.0, max_output=400):
    """Runs a model's code → what it printed and the value of a last line that is an expression;
    if it failed, then the last line of its error.

    The code runs in a fresh process with an empty environment, an empty folder and no input, with
    those limits on processor time, memory, output and open files that the system has.
    python_tool.py refuses files outside of Python's library, the network and other processes, and
    encloses itself as well as this machine can; enclosure() says how. The process and its children
    end with this one, and after `timeout` seconds.
    """
    command, _ = enclosure()
    return run_tool(command, code, timeout, max_output)

@functools.cache
def enclosure():
    """How the Python tool is enclosed on this machine → (its command, a line for the log). The line
    is also printed to stderr, once."""
    tool = Path(__file__).with_name("python_tool.py").read_text(encoding="utf-8")
    plain = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", "-c", tool]
    in_bubblewrap = bubblewrap() + plain
    missing, _, unlimited = run_tool([*plain, "--probe"], "", timeout=60).partition("|")
    locks = "Landlock and seccomp"
    if missing:
        locks = f"its own guard alone, because {missing}"
    if bubblewrap() and run_tool(in_bubblewrap, "6 * 7", timeout=60) == "42":
        found = in_bubblewrap, f"Python tool: enclosed by bubblewrap, and in it by {locks}"
    elif not missing:
        found = plain, f"Python tool: enclosed by {locks}"
    else:
        found = plain, (f"Python tool: enclosed by {locks}; it stops accidents, not attacks: run "
                        "models that you do not trust in a container")
    if unlimited:
        found = found[0], f"{found[1]}; this system does not limit its {unlimited}"
    print(found[1], file=sys.stderr, flush=True)
    return found

def bubblewrap():
    """The beginning of a command that runs another one with Python and its libraries alone, without
    network, in an empty folder; [] if bubblewrap is not installed."""
    program = shutil.which("bwrap")
    if not program:
        return []
    command = [program, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    for path in (sys.base_prefix, "/usr/lib", "/usr/share/zoneinfo", "/lib", "/lib64"):
        command += ["--ro-bind-try", path, path]
    return [*command, "--dev", "/dev", "--tmpfs", "/empty", "--chdir", "/empty"]

def run_tool(command, code, timeout=5.0, max_output=400):
    """Runs a command with the code as its input → what run_python returns."""
    limit = None
    environment = {}
    if hasattr(os, "fork"):
        limit = functools.partial(limit_process, timeout, os.getpid())
    if "SYSTEMROOT" in os.environ:      # without it Python does not start on Windows
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    with (tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out,
          tempfile.TemporaryFile() as err):
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE,
                                   stdout=out, stderr=err, start_new_session=True,
                                   preexec_fn=limit)
        error = None
        try:
            process.communicate(code.encode(errors="replace"), timeout=timeout)
        except subprocess.TimeoutExpired:
            error = f"TimeoutError: no result after {timeout:g} s"
        finally:
            end_with_children(process)
            process.wait()
        out.seek(0)
        err.seek(0)
        printed = out.read(4 * max_output).decode(errors="replace").strip()
        said = err.read().decode(errors="replace").strip().split("\n")[-1][:max_output]
    if error is None:
        error = failure(process.returncode, said, printed)
    if not error:
        return printed[:max_output]
    room = max(0, max_output - len(error) - 1)      # much output must not hide the error
    return f"{printed[:room]}\n{error}".strip()

def end_with_children(process):
    """Kills a process that leads a session, with all that it started; on Windows, itself."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError, PermissionError):     # macOS: all of them have ended
        os.killpg(process.pid, signal.SIGKILL)

def failure(returncode, said, printed):
    """The last line of an error; "" if the code did not fail. said: the last line on stderr."""
    if returncode < 0:
        return f"Error: killed by signal {-returncode}"
    if returncode > 0:
        return said or f"Error: exit status {returncode}"
    if printed:
        return ""
    return said

def limit_process(timeout, parent):
    """Limits this process, which is about to become the Python tool, and lets it end with its
    parent, even if that is killed. A limit that the system refuses is left out."""
    with suppress(ImportError):
        import resource
        limits = {resource.RLIMIT_CPU: int(timeout) + 1, resource.RLIMIT_AS: 2 ** 28,
                  resource.RLIMIT_FSIZE: 2 ** 16, resource.RLIMIT_NOFILE: 16,
                  resource.RLIMIT_CORE: 0}
        for what, most in limits.items():
            with suppress(ValueError, OSError):
                resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

# ---- The engine ----------------------------------------------------------------------------------

MAX_QUERY_TOKENS = 32       # of a search; names and a few words fit

def finds_nothing(query):
    """The search tool where there are no documents. A model that writes a query all the same learns
    that nothing was found, instead of making up how it goes on."""
    from search import NOTHING
    return NOTHING

@dataclass
class Completion:
    """What was written after one prompt."""
    ids: list = field(default_factory=list)
    sampled: list = field(default_factory=list)     # for each id: sampled, or forced in by a tool?
    finish: str = "length"      # out of tokens or context; or "stop": the last id is a stop token

class Engine:
    """A model with its tokenizer and tools: `generate` returns completions, `stream` yields text.
    Both let the Scheduler of engine.py write.

    python: the function that runs the code of <|python|>; None: the token means nothing.
    search: the function that finds a passage for the query of <|search|>, in the same way. With
    finds_nothing the model is not told that it can search.
    """

    def __init__(self, model, tokenizer, python=run_python, search=None):
        self.model = model
        self.tokenizer = tokenizer
        self.n_vocab = getattr(tokenizer, "n_vocab", None)
        self.can_search = search not in (None, finds_nothing)
        self.kept = None    # the scheduler of stream(), if its cache may be kept
        self.tools = {}     # {closing token: (opening token, function)}
        for name, tool in (("python", python), ("search", search)):
            if tool:
                opening = tokenizer.special[f"<|{name}|>"]
                self.tools[tokenizer.special[f"<|/{name}|>"]] = opening, tool

    def calls_tool(self, ids):
        """Whether ids, whose last one was sampled, end with a tool call."""
        return ids[-1] in self.tools or self.is_endless_query(ids)

    def is_endless_query(self, ids):
        """Whether ids end with a query of MAX_QUERY_TOKENS that is not closed. A small model may
        repeat itself there; the query is then looked up as it is."""
        closing = self.tokenizer.special["<|/search|>"]
        if closing not in self.tools or len(ids) <= MAX_QUERY_TOKENS:
            return False
        opening, _ = self.tools[closing]
        return ids[-1 - MAX_QUERY_TOKENS] == opening and closing not in ids[-MAX_QUERY_TOKENS:]

    def tool_output(self, ids):
        """The tokens to force in after ids, which end with a tool call."""
        special = self.tokenizer.special
        closing = ids[-1]
        begun = ids[:-1]
        forced = []
        if closing not in self.tools:       # a query that has no end
            closing = special["<|/search|>"]
            begun = ids
            forced = [closing]
        opening, tool = self.tools[closing]
        ends = self.stop_ids((opening, closing))
        marks = [i for i, token in enumerate(begun) if token in ends]
        if not marks or begun[marks[-1]] != opening:    # it was not opened in this message
            return forced
        result = tool(self.tokenizer.decode(begun[marks[-1] + 1:]))
        result_ids = self.tokenizer.encode_ordinary(result)
        return [*forced, special["<|output|>"], *result_ids, special["<|/output|>"]]

    def device(self):
        return next(self.model.parameters()).device

    def prompt_ids(self, prompt):
        """A text → <|endoftext|> and its tokens; a list of ids stays as it is."""
        if isinstance(prompt, str):
            return [self.tokenizer.eot, *self.tokenizer.encode_ordinary(prompt)]
        return list(prompt)

    def stop_ids(self, more):
        special = self.tokenizer.special
        return {special["<|endoftext|>"], special["<|im_end|>"], *more}

    def generate(self, prompts, max_new_tokens=128, num_samples=1, temperature=1.0, top_k=None,
                 top_p=None, min_p=None, repetition_penalty=1.0, seed=0, stop=(), rows=256):
        """prompts: texts or lists of ids → Completions, num_samples for each prompt, in order.

        A completion ends with <|endoftext|>, <|im_end|> or an id in `stop`. The same seed gives the
        same completions. rows: how many are written at a time. Raises ValueError if a prompt leaves
        no room in the context.
        """
        from engine import Request, Scheduler, mix
        from precision import packed
        if max_new_tokens < 1:
            return [Completion() for _ in range(len(prompts) * num_samples)]
        rows = min(rows, len(prompts) * num_samples)
        scheduler = Scheduler(self, rows, keep=False)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                        repetition_penalty=repetition_penalty, stop=self.stop_ids(stop))
        done = {}
        for prompt in prompts:
            ids = self.prompt_ids(prompt)
            for _ in range(num_samples):
                request = Request(ids, max_new_tokens, seed=mix(seed, len(done)), **sampling)
                done[scheduler.add(request)] = Completion()
        was_training = self.model.training
        self.model.eval()
        with packed(self.model, rows):
            while scheduler.is_busy():
                for event in scheduler.step():
                    completion = done[event.row]
                    completion.ids.append(event.token)
                    completion.sampled.append(event.sampled)
                    completion.finish = event.finish
        self.model.train(was_training)
        return list(done.values())

    def stream(self, prompt, max_new_tokens=128, temperature=1.0, top_k=None, top_p=None,
               min_p=None, repetition_penalty=1.0, seed=0, stop=()):
        """Yields (id, text) for each token, and (None, rest) at the end. The text of a character
        that is split over tokens comes with its last token."""
        from engine import Request, mix
        self.model.eval()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        scheduler = self.chat_scheduler()
        row = scheduler.add(Request(self.prompt_ids(prompt), max_new_tokens, temperature, top_k,
                                    top_p, min_p, repetition_penalty, mix(seed, 0),
                                    self.stop_ids(stop)))
        try:
            while not row.finish:
                for event in scheduler.step():
                    text = ""
                    if event.finish != "stop":
                        text = decoder.decode(self.tokenizer.decode_bytes([event.token]))
                    yield event.token, text
        finally:
            scheduler.cancel(row)       # the reader may leave before the end
        yield None, decoder.decode(b"", final=True)

    def chat_scheduler(self):
        """The scheduler of stream(). It is kept, so that a chat's turns so far are not read again.
        A model that still learns gets a new one each time: its keys and values change with its
        weights."""
        from engine import Scheduler
        if any(p.requires_grad for p in self.model.parameters()):
            return Scheduler(self, rows=1)
        if self.kept is None or self.kept.is_busy():
            self.kept = Scheduler(self, rows=1)
        return self.kept

    def answer(self, conversations, batch_size=64, **sampling):
        """Replies to conversations, as texts that include tool calls. A conversation is a list of
        messages, or a question as a plain string."""
        prompts = []
        for conversation in conversations:
            if isinstance(conversation, str):
                conversation = [dict(role="user", content=conversation)]
            ids, _ = self.tokenizer.render(conversation, for_completion=True)
            prompts.append(ids)
        completions = self.generate(prompts, rows=batch_size, **sampling)
        return [self.reply_text(completion) for completion in completions]

    def reply_text(self, completion):
        """The text of a completion, without its stop token."""
        ids = completion.ids
        if completion.finish == "stop":
            ids = ids[:-1]
        return self.tokenizer.decode(ids).strip()

# ---- Runs ----------------------------------------------------------------------------------------

def find_run(run, stages=(), root="runs"):
    """The folder of a run: the one that --model names, or, without a name, the newest one whose
    stage is among `stages`. "gpt2" … "gpt2-xl" mean OpenAI's weights, which are downloaded once,
    into data/openai. Raises SystemExit if there is no such run."""
    if run in GPT2_SIZES and not Path(run).exists():
        from download import download_gpt2
        return download_gpt2(run, Path("data/openai", run))
    configs = sorted(Path(root).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if run:
        return check_run(Path(run), [path.parent for path in configs])
    for path in reversed(configs):
        if stage_of(path) in stages:
            return path.parent
    raise SystemExit(f"{root}/ holds no run of stage {' or '.join(stages)}; run that stage first, "
                     "or name a folder with --model")

def stage_of(path):
    """The stage that a run's config.json states; None if it states none or is damaged."""
    try:
        return json.loads(path.read_bytes())["deepdive"]["stage"]
    except (ValueError, KeyError, TypeError):
        return None

def check_run(run, others):
    """A folder that holds a model; otherwise SystemExit says what is missing, and which other runs
    have a name like it, or which others there are at all."""
    advice = "train a model with train_gpt2.py, or name its folder with --model"
    spellings = {name: name for name in GPT2_SIZES}
    for other in others:
        spellings |= {other.name: str(other), str(other): str(other)}
    near = difflib.get_close_matches(str(run), spellings, n=6)
    near = list(dict.fromkeys(spellings[name] for name in near))
    if near:
        advice = f"did you mean {' or '.join(near[:3])}?"
    elif others:
        names = ", ".join(map(str, sorted(others)))
        advice = f"the runs here are {names}"
    if not run.is_dir():
        raise SystemExit(f"{run} is not a run's folder; {advice}")
    for name in ("config.json", "model*.safetensors"):
        if not list(run.glob(name)):
            raise SystemExit(f"{run} holds no model, because it has no {name}; {advice}")
    for path in run.glob("model*.safetensors"):
        if path.is_file() and header_bytes(path) > MAX_HEADER_BYTES:
            raise SystemExit(f"{path} is damaged: its header would have {header_bytes(path)} "
                             "bytes; copy it again or train the model again")
    return run

MAX_HEADER_BYTES = 16 << 20     # about 100 bytes a tensor; GPT-2 XL has 580 tensors

def header_bytes(path):
    """The length of a safetensors file's header, which its first 8 bytes say."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")

HF_TOKENIZER_FILES = ("vocab.json", "tokenizer.json")
GPT2_VOCAB = 50257

def has_tokenizer(run):
    """Whether a folder says which tokenizer its model was trained with."""
    return any((Path(run) / name).exists() for name in ("tokenizer.tiktoken", *HF_TOKENIZER_FILES))

def load_tokenizer(run):
    """The tokenizer in a run's folder; for OpenAI's weights, which come without ours, GPT-2's.
    Raises SystemExit if a folder has another one in HF's format, which cannot be read, or none
    although its model has fewer tokens than GPT-2."""
    run = Path(run)
    if (run / "tokenizer.tiktoken").exists():
        return Tokenizer.load(run)
    n_vocab = hf_vocab_size(run / "config.json")
    if n_vocab < GPT2_VOCAB and not has_tokenizer(run):
        raise SystemExit(f"{run} has no tokenizer, and its model's {n_vocab} tokens are not "
                         f"GPT-2's {GPT2_VOCAB}; put the model's tokenizer into the folder as "
                         "bpe.py writes it, tokenizer.tiktoken and tokenizer.json")
    tokenizer = Tokenizer.pretrained("gpt2")
    for name in HF_TOKENIZER_FILES:
        if (run / name).exists() and not is_gpt2(hf_vocabulary(run / name), tokenizer):
            raise SystemExit(f"{run / name} is not GPT-2's tokenizer, the only one of this format "
                             "that can be read; put the model's tokenizer into the folder as "
                             "bpe.py writes it, tokenizer.tiktoken and tokenizer.json")
    return tokenizer

def hf_vocab_size(path):
    """The vocab_size that a config.json states; GPT-2's if it states none."""
    try:
        return int(json.loads(path.read_bytes())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return GPT2_VOCAB

def hf_vocabulary(path):
    """{token: id} of a tokenizer file of HF; {} if it is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            described = described["model"]["vocab"]
        return dict(described)
    except (ValueError, KeyError, TypeError):
        return {}

def is_gpt2(vocabulary, tokenizer):
    """Whether a vocabulary of HF holds the tokens of GPT-2's tokenizer under the same ids. HF
    writes a byte as its own character if that is visible, and otherwise as one from U+0100 on."""
    letters = [chr(byte) for byte in range(256)]
    hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
    for n, byte in enumerate(hidden):
        letters[byte] = chr(256 + n)
    for token, i in tokenizer.ranks.items():
        word = "".join(letters[byte] for byte in token)
        if vocabulary.get(word) != i:
            return False
    return True

# ---- The terminal --------------------------------------------------------------------------------

def check_at_least(least, args, *names):
    """Stops at a flag below `least`; one that was not given is None and passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise SystemExit(f"--{name} must be at least {least}, got {value}")

def check_above_0(args, *names):
    """Stops at a flag that is not above 0 and finite; one that was not given is None and passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise SystemExit(f"--{name} must be above 0, got {value}")

def choose_device(name):
    """--device → a device of torch, for auto the GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|mps|cuda(:[0-9]+)?", name):
        raise SystemExit(f"--device must be auto, cpu, cuda or mps, got {name}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("--device mps: this machine has no Apple GPU that torch can use; try "
                         "--device cpu")
    if "cuda" in name and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: this machine has no CUDA GPU that torch can use; try "
                         "--device cpu")
    return name

@contextmanager
def quiet_end():
    """Ends the command without a traceback if the user presses Ctrl-C, or if the reader of a pipe
    has gone, as in `sample.py | head`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise SystemExit(141) from None     # as a program that SIGPIPE ends

CHAT_STAGES = ("sft", "rl")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")     # flags, arguments
EXCLUDES = dict(     # flags that no command can have together
    chat=("prompt", "file", "few_shot", "logprobs", "top", "num_samples"),
    logprobs=("prompt", "file", "few_shot", "top", "num_samples", "stop"),
    prompt=("file",), top=("num_samples",))

def parse_args():
    parser = argparse.ArgumentParser(description="write with a trained model, or talk to it")
    add = parser.add_argument
    add("--model", help="run folder, or gpt2 … gpt2-xl; default: the newest run")
    add("--prompt", help="text to continue")
    add("--file", help="read the prompt from this file")
    add("--few_shot", metavar="FILE", help="put its lines INPUT => OUTPUT before the prompt; "
        'or .jsonl lines {"input", "output"}')
    add("--logprobs", metavar="TEXT", help="show how much each token of a text surprises the model")
    add("--num_samples", type=int, help="continuations of the prompt (default: 1)")
    add("--max_new_tokens", type=int, default=128, help="tokens at most")
    add("--temperature", type=float, default=0.8, help="0: always the best token")
    add("--top_k", type=int, help="keep the k best tokens")
    add("--top_p", type=float, help="keep the best tokens that hold this share")
    add("--min_p", type=float, help="least probability, as a share of the best's")
    add("--repetition_penalty", type=float, default=1.0,
        help="above 1: what was read or written becomes less probable")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="the same seed writes the same text")
    add("--top", type=int, help="show this many next tokens as bars, at each step")
    add("--chat", action="store_true", help="talk with the newest assistant")
    add("--system", help="system message of the chat")
    add("--docs", nargs="*", help="folders of documents to look things up in; without a name: "
        "those that the run was trained on")
    add("--rag", action="store_true", help="--docs puts a passage before the question instead")
    add("--allow_base", action="store_true", help="chat with a base model, which cannot")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    args.chat = args.chat or args.allow_base or args.system is not None
    check_at_least(1, args, "num_samples", "max_new_tokens", "top")
    check_at_least(0, args, "seed")
    for name, others in EXCLUDES.items():
        for other in others:
            if is_given(args, name) and is_given(args, other):
                raise SystemExit(f"--{name} and --{other} exclude each other; leave one out")
    if args.few_shot and not is_given(args, "prompt") and not is_given(args, "file"):
        raise SystemExit("--few_shot needs --prompt TEXT, the input whose output is asked for")
    if args.rag and args.docs is None:
        raise SystemExit("--rag needs documents; name their folder with --docs")
    if "" in (args.stop or ()):
        raise SystemExit("--stop must be a text that is not empty")
    return args

def is_given(args, name):
    """Whether a flag stands on the command line; for one without a default."""
    return getattr(args, name) not in (None, False)

def read_prompt(args):
    """--prompt, or the text of --file, or "" without either; after the pairs of --few_shot."""
    prompt = args.prompt or ""
    if args.file is not None:
        try:
            prompt = Path(args.file).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--file {args.file} cannot be read as UTF-8 text: {error}") from None
    if args.few_shot:
        from few_shot import few_shot_prompt, read_pairs
        prompt = few_shot_prompt(read_pairs(args.few_shot), prompt)
    return prompt

def talk(engine, args, sampling, index=None):
    """A conversation, with the user at a terminal or with the lines of stdin. index: of --docs."""
    from chat import Chat
    conversation = Chat(engine, args.system, args.max_new_tokens, args.seed, sampling,
                        args.stop or ())
    if args.rag:
        conversation.in_context = index.in_context
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    enclosure()     # its line would otherwise stand in the middle of the first reply with a tool
    if is_terminal:
        print("Ask something. /help lists the commands, Ctrl-D ends.")
    n_questions = conversation.run()
    if not is_terminal and n_questions == 0:
        raise SystemExit("nothing was asked: stdin is not a terminal and holds no question; give a "
                         "--prompt to continue, or pipe a question in, one a line")

def write(engine, args, prompt, sampling):
    """Everything but a conversation: text, bars, or the surprise of a text."""
    from show import show_samples, show_steps, show_surprise
    if args.logprobs is not None:
        show_surprise(engine, args.logprobs, in_colours=sys.stdout.isatty())
        return
    stops = args.stop or []
    if args.few_shot:
        stops = [*stops, "\n"]
    if not prompt:
        print("Without a prompt, the text begins after <|endoftext|>, as a document does.")
    if args.top:
        show_steps(engine, prompt, args.top, args.max_new_tokens, args.seed, sampling, stops)
    else:
        show_samples(engine, prompt, args.num_samples or 1, args.max_new_tokens, args.seed,
                     sampling, stops)

def main():
    from engine import check_sampling
    args = parse_args()
    sampling = {name: getattr(args, name) for name in SAMPLING}
    try:
        check_sampling(**sampling)
    except ValueError as error:
        raise SystemExit(f"--{error}") from None
    device = choose_device(args.device)
    prompt = read_prompt(args)
    stages = ("pretrain", *CHAT_STAGES)
    if args.chat and not args.allow_base:
        stages = CHAT_STAGES
    run = find_run(args.model, stages)
    tokenizer = load_tokenizer(run)
    model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
    print(f"{meta['run']}: stage {meta['stage']}, step {meta['step']}, "
          f"{model.num_params():,} parameters", flush=True)
    if args.top and args.top > tokenizer.n_vocab:
        raise SystemExit(f"--top must be at most {tokenizer.n_vocab}, the model's tokens, got "
                         f"{args.top}")
    is_assistant = meta["stage"] in CHAT_STAGES
    if args.chat and not is_assistant and not args.allow_base:
        raise SystemExit(f"{run} is a base model, which continues documents and does not answer; "
                         "name a model of chat_sft.py with --model, or see for yourself with "
                         "--allow_base")
    index = None
    if args.docs is not None:
        from search import open_docs
        index = open_docs(args.docs, run, model.config.block_size)
    search = finds_nothing if is_assistant else None
    if index and args.rag:
        prompt = prompt and index.in_context(prompt)
    elif index:
        search = index.look_up
    engine = Engine(model.for_inference(), tokenizer, search=search)
    asks_for_text = any(is_given(args, name) for name in EXCLUDES["chat"])
    if args.chat or is_assistant and not asks_for_text:
        talk(engine, args, sampling, index)
    else:
        write(engine, args, prompt, sampling)

if __name__ == "__main__":
    try:
        with quiet_end():
            main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
