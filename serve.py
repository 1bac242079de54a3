"""
The text box, and what is behind it: a page to talk to your models, and OpenAI's API for programs.

    pip install starlette uvicorn
    python serve.py                                     # the newest run of each stage under runs/
    python serve.py --model runs/demo-small-base runs/demo-small-rl --tools
    python serve.py --model runs/mine-sft --docs my_notes/
    python serve.py --host 0.0.0.0 --port 80 --api_key "$(cat key)"

in:  runs, and a browser or a client of OpenAI's API
out: http://127.0.0.1:8000, the page serve.html; /v1/models, /v1/chat/completions, /v1/completions;
     --preferences, a file of rankings {"prompt", "ranking"} that were made on the page

dispatch.py holds the thread that computes, api.py OpenAI's forms. This file has the routes, what
the page asks for, and what keeps others out: only this machine is served, or who knows the key; a
request from another site's page is refused; all sizes have limits; tools are off without --tools.
"""
import argparse
import asyncio
import base64
import functools
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import time
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import api
from api import Answer, Asked, Choice, Refused
from bpe import Tokenizer
from dispatch import Busy, Dispatcher, Failed
from engine import next_token_probs
from model import load_checkpoint

MAX_BODY_BYTES = 1 << 20
MAX_BODY_SECONDS = 10.0         # until it has arrived
MAX_CONNECTIONS = 512
STAGES = ("pretrain", "sft", "rl")

# ---- The models ----------------------------------------------------------------------------------

class Served:
    """A model as clients see it."""

    def __init__(self, name, run, engine, meta, max_tokens=None):
        self.name = name
        self.run = Path(run)
        self.engine = engine
        self.stage = meta["stage"]
        self.step = meta["step"]
        self.is_chat = self.stage != "pretrain"
        self.block_size = engine.model.config.block_size
        self.max_tokens = max_tokens or self.block_size
        self.created = int((self.run / "config.json").stat().st_mtime)
        self.index = None           # of --docs
        self.last_logits = {}       # {ids: logits of the next token} of the last few questions

    def prompt(self, messages):
        """Messages → the ids that the model reads. A base model gets their text alone."""
        if self.is_chat:
            ids, _ = self.engine.tokenizer.render(self.with_tools(messages), for_completion=True)
            return ids
        return self.document("\n".join(plain(message) for message in messages))

    def with_tools(self, messages):
        """The messages, in which the system says that the model can search, as it learnt it."""
        if not self.engine.search:
            return messages
        from search import CAN_SEARCH
        system = ""
        if messages[0]["role"] == "system":
            system = plain(messages[0])
            messages = messages[1:]
        return [dict(role="system", content=f"{system} {CAN_SEARCH}".strip()), *messages]

    def document(self, prompt):
        """A text or ids → the ids that begin a document."""
        if isinstance(prompt, str):
            return self.engine.prompt_ids(prompt)
        n_vocab = self.engine.tokenizer.n_vocab
        is_ids = isinstance(prompt, list) and prompt and all(
            type(i) is int and 0 <= i < n_vocab for i in prompt)
        if not is_ids:
            raise Refused(f"a prompt must be a text, or a list of ids from 0 to {n_vocab - 1}",
                          "prompt")
        return prompt

    def fit_document(self, ids):
        """Drops tokens after the first one until a quarter of the context is free → (ids, how many
        were dropped)."""
        most = self.block_size - max(1, self.block_size // 4)
        dropped = max(0, len(ids) - most)
        return [*ids[:1], *ids[1 + dropped:]], dropped

    def fit_chat(self, messages):
        """Drops the oldest turns of a chat until a quarter of the context is free for the reply,
        or half of it if a search may bring a passage → (ids, how many messages were dropped)."""
        from chat import fit_context
        share = 4
        if self.engine.search:
            share = 2
        most = self.block_size - max(1, self.block_size // share)
        messages = self.with_tools(messages)
        kept, ids = fit_context(self.engine.tokenizer, messages, most)
        if len(ids) >= self.block_size:
            raise Refused(f"the message is too long: with it the prompt has {len(ids)} tokens, and "
                          f"the model reads {self.block_size}", "messages",
                          code="context_length_exceeded")
        return ids, len(messages) - len(kept)

    def next_logits(self, ids):
        """The logits (V,) after a prompt; the last few are kept, for a slider that is moved."""
        import torch
        key = tuple(ids)
        if key not in self.last_logits:
            with torch.inference_mode():
                idx = torch.tensor([ids], device=self.engine.device())
                logits = self.engine.model(idx)[0, -1, :self.engine.tokenizer.n_vocab]
            while len(self.last_logits) >= 8:
                del self.last_logits[list(self.last_logits)[0]]
            self.last_logits[key] = logits.float().cpu()
        return self.last_logits[key]

    def described(self):
        return dict(name=self.name, stage=self.stage, step=self.step, is_chat=self.is_chat,
                    params=self.engine.model.num_params(), context=self.block_size,
                    vocab=self.engine.tokenizer.n_vocab, tokenizer=self.engine.tokenizer.name)

def plain(message):
    """The text of a message, without what else an assistant's may have."""
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")

def load_models(args):
    """--model, or the newest run of each stage → {name: Served}."""
    from sample import Engine, choose_device, find_run, load_tokenizer, run_python
    runs = [find_run(name) for name in args.model or ()] or newest_runs(args.runs)
    device = choose_device(args.device)
    python = run_python if args.tools else None
    models = {}
    for run in runs:
        tokenizer = load_tokenizer(run)
        model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
        index = None
        search = None
        if args.docs is not None and meta["stage"] != "pretrain":
            from search import open_docs
            index = open_docs(args.docs, run, model.config.block_size)
            search = index.look_up
        name = run.name
        if name in models:
            name = str(run)
        engine = Engine(model.for_inference(), tokenizer, python=python, search=search)
        models[name] = Served(name, run, engine, meta, args.max_tokens)
        models[name].index = index
        print(f"{run}: stage {meta['stage']}, step {meta['step']}, {model.num_params():,} "
              "parameters", flush=True)
    return models

def newest_runs(root):
    """The newest run of each stage, in the order in which they are trained."""
    from sample import find_run, stage_of
    stages = {stage_of(path) for path in Path(root).glob("*/config.json")}
    found = [find_run(None, (stage,), root) for stage in STAGES if stage in stages]
    return found or [find_run(None, STAGES, root)]

# ---- Keeping others out --------------------------------------------------------------------------

class Guard:
    """ASGI middleware: refuses what does not come from this machine's own page or programs, or
    without the key, and adds the headers that forbid a page to be anything but ours.

    A page of another site can make a browser send requests here, and a name that resolves to
    127.0.0.1 can make them look like our own ("DNS rebinding"). So the Host must be one of `hosts`,
    the Origin must be that host, and the browser must not say that the request is cross-site. hosts
    is None where a key is needed anyway, since such a page does not know it.
    """

    def __init__(self, app, hosts, api_key, policy):
        self.app = app
        self.hosts = hosts
        self.api_key = api_key
        self.headers = {
            "content-security-policy": policy, "x-content-type-options": "nosniff",
            "x-frame-options": "DENY", "referrer-policy": "no-referrer",
            "cache-control": "no-store",
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin"}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in self.headers.items()]
                message = dict(message, headers=[*message["headers"], *more])
            await send(message)
        headers = {name.decode("latin-1"): value.decode("latin-1")
                   for name, value in scope["headers"]}
        refused = self.check_source(scope, headers) or self.check_key(scope, headers)
        app = as_response(refused) if refused else self.app
        await app(scope, receive, send_with_headers)

    def check_source(self, scope, headers):
        host = headers.get("host", "")
        if self.hosts is not None and host.lower() not in self.hosts:
            return Refused("this server answers to its own address alone", status=403)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refused("requests from the pages of other sites are refused", status=403)
        is_visit = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_visit:
            return Refused("requests from the pages of other sites are refused", status=403)
        return None

    def check_key(self, scope, headers):
        if not self.api_key or scope["path"] == "/":        # the page itself holds no secret
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.api_key.encode()):
            return None
        return Refused("this server needs its --api_key, as Authorization: Bearer KEY", status=401,
                       code="invalid_api_key")

def own_hosts(host, port):
    """The values of Host that mean this machine, for a server on a loopback address."""
    names = {host, "localhost", "127.0.0.1", "[::1]"}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())

def is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def policy_of(page):
    """The Content-Security-Policy of a page: its own script and style, by their hashes, requests to
    this server, and nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    return (f"default-src 'none'; {allowed['script']}; {allowed['style']}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

# ---- Answering -----------------------------------------------------------------------------------

def as_response(refused):
    from starlette.responses import JSONResponse
    headers = {}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(refused.__cause__, Busy):
        headers["retry-after"] = str(refused.__cause__.seconds)
    return JSONResponse(api.error_form(refused), refused.status, headers)

async def read_json(request):
    """The body, which must be a JSON object within the limits."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise Refused("the body must be of content-type application/json", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise Refused(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
    except TimeoutError:
        raise Refused(f"the body took more than {MAX_BODY_SECONDS:g} s", status=408) from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body

def endpoint(function):
    """A route's function (server, body of the request) → the response that it returns, or the
    error that it raises in OpenAI's form. GET has the query for a body."""
    @functools.wraps(function)
    async def answer(request):
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse
        try:
            body = dict(request.query_params)
            if request.method == "POST":
                body = await read_json(request)
            result = await unless_gone(request, function(request.app.state.server, body))
        except Refused as refused:
            return as_response(refused)
        except ClientDisconnect:
            return JSONResponse({}, 499)        # nobody reads it
        return JSONResponse(result) if isinstance(result, dict) else result
    return answer

async def gone(receive):
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass

async def unless_gone(request, work):
    """The result of a coroutine, which is cancelled when the client leaves."""
    from starlette.requests import ClientDisconnect
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

class Stream:
    """A response of server-sent events. items: an async iterator of what to send; the first item is
    waited for before the status is sent, so that a request that is refused has its own."""

    def __init__(self, items):
        self.items = items

    async def __call__(self, scope, receive, send):
        from starlette.requests import ClientDisconnect, Request
        try:
            await unless_gone(Request(scope, receive), self.send_all(scope, receive, send))
        except ClientDisconnect:
            pass

    async def send_all(self, scope, receive, send):
        has_begun = False
        try:
            async for item in self.items:
                if not has_begun:
                    has_begun = True
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                               (b"x-accel-buffering", b"no")]
                    await send(dict(type="http.response.start", status=200, headers=headers))
                await send(dict(type="http.response.body", body=sse(item), more_body=True))
        except Refused as refused:
            if not has_begun:
                await as_response(refused)(scope, receive, send)
                return
            await send(dict(type="http.response.body", body=sse(api.error_form(refused)),
                            more_body=True))
        finally:
            await self.items.aclose()
        await send(dict(type="http.response.body", body=b"", more_body=False))

def sse(item):
    """An event: a JSON value, or a plain text such as [DONE]."""
    if not isinstance(item, str):
        item = json.dumps(item, ensure_ascii=False, separators=(",", ":"))
    return f"data: {item}\n\n".encode("utf-8", "replace")

# ---- The server ----------------------------------------------------------------------------------

class Server:
    """What the routes share."""

    def __init__(self, models, dispatcher, runs="runs", preferences="data/preferences.jsonl",
                 tools=False):
        self.models = models
        self.dispatcher = dispatcher
        self.runs = Path(runs)
        self.preferences = Path(preferences)
        self.tools = tools

    @asynccontextmanager
    async def tickets(self, asked):
        """A request's rows in the engine; if there is no room, or one fails, it is Refused."""
        requests = asked.requests()
        if len(requests) > self.dispatcher.max_open:
            raise Refused(f"this server writes at most {self.dispatcher.max_open} answers at once, "
                          f"not {len(requests)}", "n")
        try:
            async with self.dispatcher.open(asked.model.name, requests) as tickets:
                yield tickets
        except Busy as busy:
            raise Refused(str(busy), status=429, code="rate_limit_exceeded") from busy
        except Failed as failed:
            raise Refused(str(failed), status=500) from failed

    async def events(self, asked, choices):
        """Yields (number of the choice, event, its pieces) until all choices are finished."""
        async with self.tickets(asked) as tickets:
            async for i, event in tickets:
                if choices[i].finish:       # tokens that were written before it was cancelled
                    continue
                pieces = choices[i].add(event)
                if choices[i].finish:       # at a stop text; the row would write on
                    tickets.cancel(i)
                yield i, event, pieces

    # ---- OpenAI's API

    async def answer(self, asked):
        answer = Answer(asked)
        if asked.is_stream:
            return Stream(self.chunks(asked, answer))
        async for _ in self.events(asked, answer.choices):
            pass
        return answer.whole()

    async def chunks(self, asked, answer):
        begun = set()
        async for i, _, pieces in self.events(asked, answer.choices):
            is_last = bool(answer.choices[i].finish)
            if pieces or is_last or i not in begun:
                yield answer.chunk(i, pieces, i not in begun, is_last)
            begun.add(i)
        if asked.has_usage:
            yield answer.last_chunk()
        yield "[DONE]"

@endpoint
async def list_models(server, body):
    return api.models_form(server.models)

@endpoint
async def chat_completions(server, body):
    return await server.answer(api.read_chat(body, server.models))

@endpoint
async def completions(server, body):
    return await server.answer(api.read_completion(body, server.models))

# ---- What the page asks for ----------------------------------------------------------------------

def token_form(tokenizer, i):
    """A token as the page shows it: [id, its text or bytes, its bytes in hex, is it special?]."""
    data = tokenizer.decode_bytes([i])
    is_special = i in tokenizer.special.values()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in data)
    return [i, text, data.hex(" "), is_special]

@endpoint
async def state(server, body):
    """What the page must know before it shows anything."""
    return dict(models=[model.described() for model in server.models.values()],
                open=server.dispatcher.n_open, tools=server.tools, docs=any(model.index for model in server.models.values()),
                tokenizers=tokenizer_names(server), runs=run_names(server),
                preferences=str(server.preferences))

WRITE_FIELDS = ("messages", "text", "reply_ids", "top", "rag")

@endpoint
async def write(server, body):
    """A stream for the page: the prompt as the model reads it, then every token of every answer,
    with the alternatives. reply_ids: how the reply begins, from where it is continued."""
    api.check_fields(body, WRITE_FIELDS)
    model = api.find_model(body, server.models)
    prompt, dropped, retrieved = await asyncio.to_thread(read_prompt, model, body)
    prefix = body.get("reply_ids") or []
    if prefix:
        prefix = model.document(prefix)
    asked = api.read_common(body, model, [[*prompt, *prefix]], None)
    asked.top = number_of_bars(body)
    asked.has_logprobs = asked.top > 0
    head = dict(type="prompt", tokens=[token_form(model.engine.tokenizer, i) for i in prompt],
                dropped=dropped, retrieved=retrieved, context=model.block_size, seed=asked.seed)
    return Stream(written(server, asked, prefix, head))

def read_prompt(model, body):
    """What the page asks a model → (ids, how many messages of a chat or tokens of a document fell
    out of the context, passages that were put before the question)."""
    if "messages" not in body:
        return *model.fit_document(model.document(body.get("text", ""))), []
    messages = api.read_messages(body)
    retrieved = []
    if api.flag(body, "rag") and model.index:
        messages, retrieved = with_passages(model, messages)
    if not model.is_chat:
        return *model.fit_document(model.prompt(messages)), retrieved
    return *model.fit_chat(messages), retrieved

def number_of_bars(body):
    top = body.get("top", 10)
    if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= 20:
        raise Refused("top must be a whole number from 0 to 20", "top")
    return top

def with_passages(model, messages):
    """Puts the passages that the last question finds before it → (messages, passages)."""
    from search import with_context
    question = plain(messages[-1])
    found = model.index.search(question)
    last = dict(messages[-1], content=with_context(found, question))
    return [*messages[:-1], last], found

async def written(server, asked, prefix, head):
    tokenizer = asked.model.engine.tokenizer
    choices = [Choice(tokenizer, asked.stops) for _ in range(asked.n)]
    for choice in choices:      # a character may be split over the prefix and what follows it
        head["prefix"] = [choice.decoder.decode(tokenizer.decode_bytes([i])) for i in prefix]
    has_begun = False
    async for i, event, pieces in server.events(asked, choices):
        if not has_begun:
            has_begun = True
            yield head
        form = dict(type="token", choice=i, token=token_form(tokenizer, event.token),
                    sampled=event.sampled, text="".join(piece.text for piece in pieces),
                    finish=choices[i].finish)
        if event.logprob is not None:
            form.update(logprob=round(event.logprob, 5), top=[
                [*token_form(tokenizer, token)[:2], round(logprob, 5)]
                for token, logprob in event.alternatives])
        yield form
    yield dict(type="end")

@endpoint
async def next_token(server, body):
    """The bars of the next token of a document, as the sampler would draw it."""
    api.check_fields(body, ("text",))
    model = api.find_model(body, server.models)
    ids, _ = model.fit_document(model.document(body.get("text", "")))
    sampling = api.read_common(body, model, [ids[:1]], None).sampling
    logits = await server.dispatcher.call(model.next_logits, ids)
    probs = next_token_probs(logits[None], **sampling, contexts=[ids])[0]
    values, order = probs.topk(min(12, len(probs)))
    bars = [[*token_form(model.engine.tokenizer, i)[:2], p]
            for i, p in zip(order.tolist(), values.tolist()) if p > 0]
    possible = probs[probs > 0]
    return dict(bars=bars, kept=len(possible), tokens=len(ids),
                bits=-(possible * possible.log2()).sum().item())

# ---- tokens

def tokenizer_names(server):
    """The tokenizers of the models, and those of OpenAI that are on the disk."""
    own = dict.fromkeys(model.name for model in distinct_tokenizers(server))
    return list(dict.fromkeys([*own, *filter(is_on_disk, OPENAI_FILES)]))

def distinct_tokenizers(server):
    """One model for each different tokenizer."""
    found = {model.engine.tokenizer.sha256: model for model in reversed(server.models.values())}
    return list(reversed(found.values()))

OPENAI_URL = "https://openaipublic.blob.core.windows.net/"
OPENAI_FILES = {"gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
                "cl100k_base": ("encodings/cl100k_base.tiktoken",),
                "o200k_base": ("encodings/o200k_base.tiktoken",)}

def is_on_disk(name):
    """Whether tiktoken has downloaded a vocabulary before, under the hash of its address."""
    import tempfile
    default = Path(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    keys = [hashlib.sha1((OPENAI_URL + path).encode()).hexdigest() for path in OPENAI_FILES[name]]
    return all(Path(folder, key).is_file() for key in keys)

@functools.cache
def openai_tokenizer(name):
    return Tokenizer.pretrained(name)

MAX_TEXT_CHARS = 20_000     # of the Tokens page

@endpoint
async def tokens(server, body):
    """How a tokenizer cuts a text."""
    text = body.get("text")
    name = body.get("tokenizer")
    if not isinstance(text, str) or len(text) > MAX_TEXT_CHARS:
        raise Refused(f"text must be a text of at most {MAX_TEXT_CHARS} characters", "text")
    if name not in tokenizer_names(server):
        raise Refused(f"there is no tokenizer {name}", "tokenizer", 404)
    if name in server.models:
        tokenizer = server.models[name].engine.tokenizer
    else:
        tokenizer = await asyncio.to_thread(openai_tokenizer, name)
    ids = tokenizer.encode(text, allowed_special="all")
    if api.flag(body, "plain"):
        ids = tokenizer.encode_ordinary(text)
    return dict(tokens=[token_form(tokenizer, i) for i in ids], chars=len(text),
                bytes=len(text.encode("utf-8", "replace")), vocab=tokenizer.n_vocab)

# ---- training

def run_folders(server):
    """{name: folder} of the runs that have a log, oldest first, those of the models included."""
    folders = [path.parent for path in server.runs.glob("*/log.jsonl")]
    folders += [model.run for model in server.models.values() if (model.run / "log.jsonl").exists()]
    folders = sorted(set(folders), key=lambda folder: (folder / "log.jsonl").stat().st_mtime)
    return {folder.name: folder for folder in folders}

def run_names(server):
    return list(run_folders(server))

SHOWN = ("step", "loss", "val_loss", "val_bpb", "sample", "reward", "reply_tokens", "kind",
         "accuracy", "lr", "tok_s", "eta", "seconds")
MAX_LOG_BYTES = 8 << 20         # in one answer
LIVE_SECONDS = 60               # a run that wrote nothing for so long is not training

@endpoint
async def log(server, body):
    """The rows of a run's log.jsonl from a byte on, and the byte to ask from next."""
    folders = run_folders(server)
    if body.get("run") not in folders:
        raise Refused("there is no run of this name with a log", "run", 404)
    try:
        start = max(0, int(body.get("after", 0)))
    except ValueError:
        raise Refused("after must be a whole number", "after") from None
    path = folders[body["run"]] / "log.jsonl"
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(min(start, size))
        data = file.read(MAX_LOG_BYTES)
    data = data[:data.rfind(b"\n") + 1]         # a line that is still being written comes later
    is_live = time.time() - path.stat().st_mtime < LIVE_SECONDS
    return dict(rows=log_rows(data), next=min(start, size) + len(data), size=size, is_live=is_live)

def log_rows(data):
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            shown = {key: finite(row[key]) for key in SHOWN if key in row}
            if isinstance(row.get("header"), dict):
                shown["command"] = str(row["header"].get("command", ""))
            rows.append(shown)
    return rows

def finite(value):
    """JSON has no word for infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

# ---- ranking

@endpoint
async def rank(server, body):
    """Appends {"prompt", "ranking"} to the preferences, the best answer first."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refused("prompt must be a text that is not empty", "prompt")
    ranking = body.get("ranking")
    is_ranking = isinstance(ranking, list) and 2 <= len(ranking) <= 16 and all(
        isinstance(text, str) for text in ranking)
    if not is_ranking:
        raise Refused("ranking must be a list of 2 to 16 texts, the best first", "ranking")
    line = json.dumps(dict(prompt=prompt, ranking=ranking), ensure_ascii=False)
    try:
        server.preferences.parent.mkdir(parents=True, exist_ok=True)
        with open(server.preferences, "ab") as file:
            file.write(line.encode("utf-8", "replace") + b"\n")
        count = server.preferences.read_bytes().count(b"\n")
    except OSError as error:
        raise Refused(f"{server.preferences} cannot be written: {error.strerror}",
                      status=500) from None
    return dict(saved=str(server.preferences), lines=count)

# ---- Starting ------------------------------------------------------------------------------------

ROUTES = {("GET", "/v1/models"): list_models, ("POST", "/v1/chat/completions"): chat_completions,
          ("POST", "/v1/completions"): completions, ("GET", "/api/state"): state,
          ("POST", "/api/write"): write, ("POST", "/api/next"): next_token,
          ("POST", "/api/tokens"): tokens, ("GET", "/api/log"): log, ("POST", "/api/rank"): rank}

def make_app(server, hosts, api_key=None):
    """The ASGI application. hosts: what Guard accepts."""
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Route
    page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")

    async def home(request):
        return HTMLResponse(page)

    async def refuse(request, error):
        return as_response(Refused(f"{request.method} {request.url.path}: {error.detail}",
                                   status=error.status_code))

    async def fail(request, error):
        return as_response(Refused("the server failed; its log says why", status=500))
    routes = [Route("/", home)]
    routes += [Route(path, function, methods=[method])
               for (method, path), function in ROUTES.items()]
    app = Starlette(routes=routes, exception_handlers={404: refuse, 405: refuse, 500: fail})
    app.state.server = server
    return Guard(app, hosts, api_key, policy_of(page))

def parse_args():
    parser = argparse.ArgumentParser(description="a page and an API for your models")
    add = parser.add_argument
    add("--model", nargs="+", help="run folders, or gpt2 … gpt2-xl; default: the newest run of "
        "each stage")
    add("--runs", default="runs", help="folder of the runs that the page shows")
    add("--host", default="127.0.0.1", help="address to listen on; another than this machine's own "
        "needs --api_key")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--api_key", help="what clients must send as Authorization: Bearer KEY")
    add("--tools", action="store_true", help="lets models run Python, as sample.py does")
    add("--docs", nargs="*", help="folders of documents to look things up in; without a name: "
        "those that the run was trained on")
    add("--max_tokens", type=int, help="of an answer, at most (default: what the context holds)")
    add("--max_rows", type=int, default=64, help="answers of a model that are written at once")
    add("--max_waiting", type=int, default=64, help="answers that may wait for it")
    add("--preferences", default="data/preferences.jsonl", help="file of rankings")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    for name, least in (("max_tokens", 1), ("max_rows", 1), ("max_waiting", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise SystemExit(f"--{name} must be at least {least}, got {value}")
    if not 0 <= args.port < 2 ** 16:
        raise SystemExit(f"--port must be from 0 to 65535, got {args.port}")
    if args.api_key is not None and (not args.api_key.isascii() or len(args.api_key) < 8):
        raise SystemExit("--api_key must have at least 8 ASCII characters")
    if not is_loopback(args.host) and not args.api_key:
        raise SystemExit(f"--host {args.host} lets other machines in, which needs --api_key KEY; "
                         f"for instance --api_key {secrets.token_urlsafe(12)}")
    return args

def listen(host, port):
    """A socket on the address; SystemExit if it is taken."""
    import socket
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(MAX_CONNECTIONS)    # who comes before the event loop runs waits for it
    except OSError as error:
        raise SystemExit(f"--host {host} --port {port} cannot be used: {error.strerror}; try "
                         "--port 0, which takes one that is free") from None
    return sock

def main():
    args = parse_args()
    try:
        import uvicorn
        import starlette    # noqa: F401
    except ImportError:
        raise SystemExit("serve.py needs two packages: pip install starlette uvicorn") from None
    models = load_models(args)
    sock = listen(args.host, args.port)
    port = sock.getsockname()[1]
    dispatcher = Dispatcher({name: model.engine for name, model in models.items()}, args.max_rows,
                            args.max_waiting)
    server = Server(models, dispatcher, args.runs, args.preferences, args.tools)
    hosts = None
    if is_loopback(args.host):
        hosts = own_hosts(args.host, port)
    dispatcher.start()
    name = f"[{args.host}]" if ":" in args.host else args.host
    print(f"Open http://{name}:{port} in a browser. Programs: OpenAI's API at "
          f"http://{name}:{port}/v1. Ctrl-C ends.", flush=True)
    config = uvicorn.Config(make_app(server, hosts, args.api_key), log_level="warning",
                            limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[sock])

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
