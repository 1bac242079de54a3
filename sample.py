"""
Inference: a trained model writes, one token at a time.

    python sample.py --prompt "The function returns" --num_samples 3    # the newest run under runs/
    python sample.py --model runs/demo --prompt "The function returns" --top 8 --max_new_tokens 3
    python sample.py --model runs/demo --file few_shot.txt --temperature 0
    python sample.py --model runs/demo-sft --chat                       # talk to an assistant

    in:  <run>/model.safetensors, config.json, the tokenizer      out: text

A prompt begins with <|endoftext|>, as every document in training did. The prompt goes through the
model once (prefill) and leaves its keys and values in a cache; then each new token costs one
position. When an assistant writes <|python|>code<|/python|>, the loop runs the code and forces
<|output|>its result<|/output|> into the text before the model goes on: what a tool says is never
sampled.

Papers: nucleus sampling (arXiv 1904.09751), min-p (2407.01082), tool calls in the text (Toolformer,
2302.04761).
"""
import argparse
import codecs
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bpe import Tokenizer
from model import GPT2_SIZES, KVCache, load_checkpoint

# ---- From logits to one token --------------------------------------------------------------------

def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """logits (B, V) → the distribution that is sampled, (B, V).

    Temperature 0 puts all of it on the best token. top_k keeps the k best tokens; top_p the fewest
    best ones that hold a share p; min_p those at least min_p times as probable as the best. What is
    cut off goes to the rest in proportion.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_k:
        kth = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered   # a token stays while those before hold less than p
        cut = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, before >= top_p)
        probs = probs.masked_fill(cut, 0.0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs / probs.sum(-1, keepdim=True)

def draw(probs, generator):
    """probs (B, V) → a token of each row (B,): the first up to which they add up to more than a
    random share of the whole. torch.multinomial draws a random number for each of B x V."""
    ends = probs.double().cumsum(-1)    # in fp32 rounding could give a share to what was cut off
    share = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=ends.dtype)
    return torch.searchsorted(ends, share * ends[:, -1:], right=True)[:, 0]

# ---- The Python tool -----------------------------------------------------------------------------

PYTHON_TOOL = """
import sys
code, home = sys.stdin.read(), sys.base_prefix
def guard(event, args):
    name = event.split(".")[0]
    writes = event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & 0o103)
    outside = event == "open" and (".." in str(args[0]) or not str(args[0]).startswith(home))
    forbidden = name in ("socket", "subprocess", "os", "shutil", "ctypes", "signal", "sqlite3",
                         "resource")
    if writes or outside or forbidden and event not in ("os.listdir", "os.scandir"):
        raise PermissionError(f"{event} is not allowed in the Python tool")
sys.addaudithook(guard)
names = {"__name__": "__main__"}
try:
    expression = compile(code.strip(), "<python>", "eval")
except SyntaxError:
    exec(compile(code, "<python>", "exec"), names)
else:
    value = eval(expression, names)
    if value is not None:
        print(value)
"""

def run_python(code, timeout=5.0, max_output=400):
    """Runs a model's code → what it printed, an expression's value, or its error's last line.

    A fresh process with an empty environment and folder and no input; limits on processor time,
    memory, output and open files; files outside Python's own library, the network and other
    processes are refused; killed with its children after `timeout` seconds. This keeps accidents
    small. It is NOT a sandbox: run models you do not trust in a container.
    """
    def limit():
        import resource
        for what, most in ((resource.RLIMIT_CPU, int(timeout) + 1), (resource.RLIMIT_AS, 2 ** 28),
                           (resource.RLIMIT_FSIZE, 2 ** 16), (resource.RLIMIT_NOFILE, 16),
                           (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(what, (most, most))

    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", PYTHON_TOOL]
    with (tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out,
          tempfile.TemporaryFile() as err):
        process = subprocess.Popen(command, cwd=folder, env={}, stdin=subprocess.PIPE, stdout=out,
                                   stderr=err, preexec_fn=limit, start_new_session=True)
        error = b""
        try:
            process.communicate(code.encode(errors="replace"), timeout=timeout)
        except subprocess.TimeoutExpired:
            error = b"TimeoutError: no result after %g s" % timeout
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (out, err):
            file.seek(0)
        result = error or out.read(4 * max_output).strip() or err.read().strip().split(b"\n")[-1]
    return result.decode(errors="replace").strip()[:max_output]

# ---- The loop ------------------------------------------------------------------------------------

@dataclass
class Completion:
    """What one row wrote: ids, whether each was sampled or forced in by a tool, how it ended."""
    ids: list = field(default_factory=list)
    sampled: list = field(default_factory=list)
    finish: str = "length"  # out of tokens or context; or "stop": the last id is a stop token

class Engine:
    """Batched generation with a KV cache: `generate` returns completions, `stream` yields text."""

    def __init__(self, model, tokenizer, python=run_python):
        self.model, self.tokenizer = model, tokenizer
        special = tokenizer.special
        self.tools = {special["<|/python|>"]: ("<|python|>", python)} if python else {}

    def tool_output(self, ids, closing):
        """The tokens to force in after a tool call that ends ids with `closing`."""
        special = self.tokenizer.special
        opening, tool = self.tools[closing]
        marks = [i for i, token in enumerate(ids[:-1]) if token in (special[opening], closing)]
        if not marks or ids[marks[-1]] == closing:      # closed without having been opened
            return []
        result = tool(self.tokenizer.decode(ids[marks[-1] + 1:-1]))
        result_ids = self.tokenizer.encode_ordinary(result)
        return [special["<|output|>"], *result_ids, special["<|/output|>"]]

    @torch.inference_mode()
    def steps(self, prompts, num_samples, max_new_tokens, sampling, seed, stop):
        """Yields, token by token, a list of (row, id, was sampled) for the rows still writing."""
        model, device = self.model, next(self.model.parameters()).device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest, block_size = max(map(len, prompts)), model.config.block_size
        if min(map(len, prompts)) == 0 or longest >= block_size:
            raise ValueError(f"a prompt has {longest} tokens; the model reads 1 to "
                             f"{block_size - 1}; shorten it")
        generator = torch.Generator(device).manual_seed(seed)
        max_new_tokens = min(max_new_tokens, block_size - longest)
        cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device,
                        model.compute_dtype)
        idx = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        hidden = model.hidden(idx, cache)   # one prefill for all samples
        logits = model.logits(hidden[torch.arange(len(prompts)), lengths - 1])  # (prompts, V)
        cache.pos = lengths.clone()     # new tokens overwrite the padding behind a short prompt
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
        cache, logits = cache.rows(repeat), logits[repeat]
        rows = list(range(len(repeat)))     # which completion each row of the batch is
        texts, forced = [[] for _ in rows], [deque() for _ in rows]
        for step in range(max_new_tokens):
            probs = next_token_probs(logits, **sampling)
            drawn = draw(probs, generator).tolist()
            emitted, next_ids = [], []
            for row, token in zip(rows, drawn):
                free = not forced[row]
                token = token if free else forced[row].popleft()
                next_ids.append(token)
                if texts[row] is None:          # finished, not dropped yet
                    continue
                emitted.append((row, token, free))
                texts[row].append(token)
                if free and token in self.tools:
                    forced[row].extend(self.tool_output(texts[row], token))
                if free and token in stop:
                    texts[row] = None
            yield emitted
            alive = [i for i, row in enumerate(rows) if texts[row] is not None]
            if not alive or step == max_new_tokens - 1:
                return
            if len(alive) <= len(rows) // 2:    # finished rows cost as much: drop them in bulk
                cache = cache.rows(torch.tensor(alive, device=device))
                rows, next_ids = [rows[i] for i in alive], [next_ids[i] for i in alive]
            logits = model(torch.tensor(next_ids, device=device)[:, None], cache=cache)[:, -1]

    def prepare(self, prompts, stop):
        tokenizer, special = self.tokenizer, self.tokenizer.special
        prompts = [[tokenizer.eot, *tokenizer.encode_ordinary(p)] if isinstance(p, str) else list(p)
                   for p in prompts]
        return prompts, {special["<|endoftext|>"], special["<|im_end|>"], *stop}

    def generate(self, prompts, max_new_tokens=128, num_samples=1, temperature=1.0, top_k=None,
                 top_p=None, min_p=None, seed=0, stop=()):
        """prompts: texts or id lists → Completions, num_samples for each prompt, in order.

        A row ends with <|endoftext|>, <|im_end|> or an id in `stop`. Same seed, same samples.
        """
        prompts, stop = self.prepare(prompts, stop)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        done = [Completion() for _ in range(len(prompts) * num_samples)]
        training = self.model.training
        self.model.eval()
        for emitted in self.steps(prompts, num_samples, max_new_tokens, sampling, seed, stop):
            for row, token, sampled in emitted:
                done[row].ids.append(token)
                done[row].sampled.append(sampled)
                if sampled and token in stop:
                    done[row].finish = "stop"
        self.model.train(training)
        return done

    def stream(self, prompt, max_new_tokens=128, temperature=1.0, top_k=None, top_p=None,
               min_p=None, seed=0, stop=()):
        """Yields (id, text) a token, (None, rest) last; a character waits until it is whole."""
        prompts, stop = self.prepare([prompt], stop)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self.model.eval()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for emitted in self.steps(prompts, 1, max_new_tokens, sampling, seed, stop):
            for _, token, sampled in emitted:
                ends = sampled and token in stop
                yield token, decoder.decode(b"" if ends else self.tokenizer.decode_bytes([token]))
        yield None, decoder.decode(b"", final=True)

    def answer(self, conversations, batch_size=64, **sampling):
        """Replies to message lists, or to questions as plain strings → texts, with tool calls."""
        replies = []
        conversations = [[dict(role="user", content=c)] if isinstance(c, str) else c
                         for c in conversations]
        for i in range(0, len(conversations), batch_size):
            prompts = [self.tokenizer.render(messages, for_completion=True)[0]
                       for messages in conversations[i:i + batch_size]]
            replies += [self.reply_text(c) for c in self.generate(prompts, **sampling)]
        return replies

    def reply_text(self, completion):
        ids = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        return self.tokenizer.decode(ids).strip()

def find_run(run, stages=(), root="runs"):
    """The run that --model names; without a name, the newest one whose stage is among `stages`.
    "gpt2" … "gpt2-xl" mean OpenAI's weights, which are downloaded once, into data/openai."""
    if run in GPT2_SIZES and not Path(run).exists():
        from download import download_gpt2
        return download_gpt2(run, Path("data/openai", run))
    if run:
        return Path(run)
    configs = sorted(Path(root).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(configs):
        if json.loads(path.read_text()).get("deepdive", {}).get("stage") in stages:
            return path.parent
    raise SystemExit(f"no run in {root}/ is of stage {' or '.join(stages)}; a stage starts from "
                     "the one before it; run that first, or name a folder with --model")

def load_tokenizer(run):
    """A run's own; OpenAI's GPT-2 comes with its tokenizer in another format, and we have it."""
    ours = (Path(run) / "tokenizer.tiktoken").exists()
    return Tokenizer.load(run) if ours else Tokenizer.pretrained("gpt2")

# ---- The terminal --------------------------------------------------------------------------------

def show_steps(engine, prompt, top, max_new_tokens, seed, sampling):
    """After each token, the `top` most probable next ones as bars, and which was drawn."""
    tokenizer, model = engine.tokenizer, engine.model
    ids = [tokenizer.eot, *tokenizer.encode_ordinary(prompt)]
    for token in engine.generate([prompt], max_new_tokens, seed=seed, **sampling)[0].ids:
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=next(model.parameters()).device))[:, -1]
        probs, order = next_token_probs(logits)[0].topk(top)
        print(f"\n… {tokenizer.decode(ids[-12:])!r}")
        for p, i in zip(probs.tolist(), order.tolist()):
            mark = "←" if i == token else ""
            print(f"{i:8d}  {tokenizer.decode([i])!r:16s} {p:6.1%} {'█' * round(40 * p)} {mark}")
        ids.append(token)

def chat(engine, system, max_new_tokens, seed, sampling):
    """A conversation in the terminal; an empty line or Ctrl-D ends it."""
    messages = [dict(role="system", content=system)] if system else []
    while True:
        try:
            question = input("\nuser: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        messages.append(dict(role="user", content=question))
        prompt, _ = engine.tokenizer.render(messages, for_completion=True)
        print("assistant: ", end="")
        ids = []
        for token, text in engine.stream(prompt, max_new_tokens, seed=seed, **sampling):
            ids += [] if token is None else [token]
            print(text, end="", flush=True)
        print()
        messages = engine.tokenizer.parse([*prompt, *ids])
        seed += 1

def main():
    parser = argparse.ArgumentParser(description="write with a trained model")
    parser.add_argument("--model", help="run folder; default: the newest under runs/")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--file", help="read the prompt from this file")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of the prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the best token")
    parser.add_argument("--top_k", type=int, help="keep the k best tokens")
    parser.add_argument("--top_p", type=float, help="keep the best tokens that hold this share")
    parser.add_argument("--min_p", type=float, help="least probability, as a share of the best's")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    parser.add_argument("--top", type=int, help="show this many next tokens as bars, at each step")
    parser.add_argument("--chat", action="store_true", help="talk with an assistant")
    parser.add_argument("--system", help="system message for --chat")
    parser.add_argument("--allow_base", action="store_true", help="--chat with a base model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    chatting = args.chat and not args.allow_base
    run = find_run(args.model, ("sft", "rl") if chatting else ("pretrain", "sft", "rl"))
    tokenizer = load_tokenizer(run)
    model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
    print(f"{meta['run']}: stage {meta['stage']}, step {meta['step']}, "
          f"{model.num_params():,} parameters", flush=True)
    engine = Engine(model.for_inference(), tokenizer)
    sampling = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    if args.chat:
        if meta["stage"] == "pretrain" and not args.allow_base:
            raise SystemExit(f"{run} is a base model: it continues documents and answers nobody; "
                             "chat needs a model of chat_sft.py; name one with --model, or see for "
                             "yourself with --allow_base")
        return chat(engine, args.system, args.max_new_tokens, args.seed, sampling)
    prompt = open(args.file, encoding="utf-8").read().rstrip("\n") if args.file else args.prompt
    if args.top:
        return show_steps(engine, prompt, args.top, args.max_new_tokens, args.seed, sampling)
    for i in range(args.num_samples):
        print("-" * 80 + f"\n{prompt}", end="")
        for _, text in engine.stream(prompt, args.max_new_tokens, seed=args.seed + i, **sampling):
            print(text, end="", flush=True)
        print()

if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, UnicodeDecodeError) as error:
        raise SystemExit(str(error)) from None
