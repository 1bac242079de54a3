"""
The server under load: 64 clients at once, beside the same requests one after the other, and beside
nanochat's engine prompt by prompt.

    python bench/serve.py --model runs/demo-small-rl        # three minutes on a quiet CPU

in:  the run of an assistant, best the demo's; .peers/nanochat, if it is there
out: a table and the same as one line of JSON: time to the first token, tokens per second, answers
     that were wrong or missing; then what 1,000 requests whose clients are killed leave behind

Each client asks for a sum of its own, at temperature 0, as a stream. Its marker is the whole reply:
it must be, token for token, what the model writes for it alone, with no cache and no neighbours. So
an answer that is lost, cut or given to another client counts.

The clients are a process of their own and speak HTTP over plain sockets, because a client library
would take more of the CPU than the server. nanochat's engine gets our weights and writes the same
tokens, in its own process and without HTTP. It can write samples of one prompt at once, but not
the replies to different prompts.
"""
import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import finish, in_turns, missing, ratio, table

MAX_TOKENS = 64

def questions(count, seed=0):
    """Sums, each another one."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [f"What is {a} + {b}?" for a, b in random.Random(seed).sample(pairs, count)]

# ---- Clients -------------------------------------------------------------------------------------

def http_request(port, model, question, max_tokens=MAX_TOKENS):
    body = json.dumps(dict(model=model, messages=[dict(role="user", content=question)],
                           max_tokens=max_tokens, temperature=0, stream=True,
                           stream_options=dict(include_usage=True))).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n")
    return head.encode() + body

async def ask(port, model, question):
    """One client → (its reply's text, its tokens, seconds to the first one)."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http_request(port, model, question))
    first = None
    text = ""
    n_tokens = 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[len("data: "):])
        if chunk["choices"]:
            delta = chunk["choices"][0]["delta"]
            text += delta.get("reasoning_content", "") + delta.get("content", "")
            first = first or time.perf_counter() - started
        if chunk.get("usage"):
            n_tokens = chunk["usage"]["completion_tokens"]
    writer.close()
    return text, n_tokens, first

async def ask_all(port, model, asked, at_once):
    """Many clients → their results, in order. at_once: so many of them wait at any time."""
    gate = asyncio.Semaphore(at_once)

    async def one(question):
        async with gate:
            return await ask(port, model, question)
    return await asyncio.gather(*[one(question) for question in asked])

def kill_clients(port, model, asked):
    """Asks from a process of its own, which kill -9 ends when every stream has begun."""
    child = os.fork()
    if child == 0:
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in asked]
        for sock, question in zip(socks, asked):
            sock.sendall(http_request(port, model, question))
        for sock in socks:
            sock.recv(64)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)

# ---- The server ----------------------------------------------------------------------------------

class Server:
    """serve.py in a process of its own."""

    def __init__(self, model, rows):
        command = [sys.executable, str(ROOT / "serve.py"), "--model", str(model), "--port", "0",
                   "--max_rows", str(rows), "--max_waiting", str(rows)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                return
        raise SystemExit("serve.py did not start; its message stands above")

    def n_open(self):
        """Requests that are being written or wait."""
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            sock.sendall(f"GET /api/state HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n"
                         "connection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        return json.loads(answer.partition(b"\r\n\r\n")[2])["open"]

    def memory_mb(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def wait_until_idle(self, seconds=10):
        """→ the requests that are still open after so many seconds; 0 as soon as none is."""
        end = time.monotonic() + seconds
        while self.n_open() and time.monotonic() < end:
            time.sleep(0.01)
        return self.n_open()

    def stop(self):
        self.process.terminate()
        self.process.wait()

# ---- The other contender, and the oracle ---------------------------------------------------------

def prompts(run, asked):
    """→ (model, tokenizer, the ids of each conversation)."""
    from model import load_checkpoint
    from sample import load_tokenizer
    tokenizer = load_tokenizer(run)
    model, _ = load_checkpoint(run, vocab_size=tokenizer.n_vocab)
    found = [tokenizer.render([dict(role="user", content=question)], for_completion=True)[0]
             for question in asked]
    return model.eval().for_inference(), tokenizer, found

def write_alone(model, tokenizer, ids):
    """The greedy reply to one prompt, without a cache → its ids, the stop token included."""
    import torch
    stop = tokenizer.special["<|im_end|>"], tokenizer.eot
    ids = list(ids)
    written = []
    with torch.inference_mode():
        while len(written) < MAX_TOKENS and (not written or written[-1] not in stop):
            logits = model(torch.tensor([ids]))[0, -1, :tokenizer.n_vocab]
            written.append(logits.argmax().item())
            ids.append(written[-1])
    return written

def shown(tokenizer, ids):
    """The text that clients see: without special tokens."""
    special = set(tokenizer.special.values())
    return tokenizer.decode([i for i in ids if i not in special])

# ---- Measuring -----------------------------------------------------------------------------------

def measure(server, name, asked, ids, wanted, nanochat, clients, repeats):
    """The contenders in turns → the rows of the table. nanochat: a function of a prompt's ids →
    what `ask` returns; or None. wanted: the text of each reply."""
    last = {}

    def at_once():
        last["at once"] = asyncio.run(ask_all(server.port, name, asked, clients))

    def in_order():
        last["one by one"] = asyncio.run(ask_all(server.port, name, asked, 1))

    def peer():
        last["nanochat"] = [nanochat(prompt) for prompt in ids]
    contenders = {"at once": at_once, "one by one": in_order}
    if nanochat:
        contenders["nanochat"] = peer
    ms = in_turns(contenders, repeats)
    labels = {"at once": f"ours, {clients} clients at once", "one by one": "ours, one by one",
              "nanochat": "nanochat's engine, prompt by prompt"}
    rows = []
    for label, results in last.items():
        firsts = sorted(1000 * first for _, _, first in results)
        wrong = sum(text != right for (text, _, _), right in zip(results, wanted))
        n_tokens = sum(n for _, n, _ in results)
        seconds = statistics.median(ms[label]) / 1000
        row = dict(contender=labels[label], answers=len(results), wrong=wrong, tokens=n_tokens,
                   tok_s=n_tokens / seconds, first_ms=statistics.median(firsts),
                   last_first_ms=firsts[-1], ours_faster_by=None)
        if label != "at once":
            row["ours_faster_by"] = ratio(ms[label], ms["at once"])
        rows.append(row)
    return rows

def nanochat_reply(engine, tokenizer, prompt):
    """→ (text, tokens, seconds to the first one)."""
    started = time.perf_counter()
    first = None
    ids = []
    stop = engine.tokenizer.encode_special("<|assistant_end|>")
    for column, _ in engine.generate(prompt, 1, max_tokens=MAX_TOKENS, temperature=0):
        first = first or time.perf_counter() - started
        ids.append(column[0])
        if column[0] == stop:
            break
    return shown(tokenizer, ids), len(ids), first

def measure_killed(server, name, count, clients):
    """→ what `count` requests whose clients are killed leave behind."""
    asked = questions(clients, seed=1)
    n_open = 0
    before = server.memory_mb()
    for done in range(0, count + clients, clients):
        if done == clients:         # after the first round, which allocates what all rounds need
            before = server.memory_mb()
        kill_clients(server.port, name, asked)
        n_open = server.wait_until_idle()
        print(f"\rkilled {done + clients}", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return dict(requests=count, still_open=n_open, before_mb=before, after_mb=server.memory_mb())

def main():
    parser = argparse.ArgumentParser(description="the server under load")
    parser.add_argument("--model", default="runs/demo-small-rl", help="the run of an assistant")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--killed", type=int, default=1000, help="requests of killed clients")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    args = parser.parse_args()
    from contenders import nanochat_engine
    asked = questions(args.clients)
    model, tokenizer, ids = prompts(args.model, asked)
    alone = [write_alone(model, tokenizer, prompt) for prompt in ids]
    engine = nanochat_engine(model, tokenizer)
    nanochat = None
    if engine:
        nanochat = partial(nanochat_reply, engine, tokenizer)
    name = Path(args.model).name
    server = Server(args.model, args.clients)
    try:
        wanted = [shown(tokenizer, written) for written in alone]
        rows = measure(server, name, asked, ids, wanted, nanochat, args.clients, args.repeats)
        killed = measure_killed(server, name, args.killed, args.clients)
    finally:
        server.stop()
    table([f"{len(asked)} replies of {name}", "wrong or missing", "tokens", "tok/s",
           "ms to the first token, median", "the longest", "at once is faster by"],
          [[row["contender"], row["wrong"], row["tokens"], row["tok_s"], row["first_ms"],
            row["last_first_ms"], row["ours_faster_by"]] for row in rows])
    if not engine:
        print(f"\nnanochat: {missing('nanochat')}")
    table(["clients killed with kill -9 while they read", "requests still open after 10 s",
           "MB before", "MB after"],
          [[killed["requests"], killed["still_open"], killed["before_mb"], killed["after_mb"]]])
    finish("serve", contenders=rows, killed=killed)

if __name__ == "__main__":
    main()
