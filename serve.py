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

dispatch.py has the thread that computes, api.py OpenAI's forms, and page.py what the page asks for.
Here is what answers them over HTTP, and what keeps others out: only this machine is served, or who
knows the key; a request from the page of another site is refused; all sizes have limits; tools are
off without --tools.
"""
import argparse
import asyncio
import base64
import functools
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import signal
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__":      # Ctrl-C ends without a traceback, during the slow imports below too
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import api
import page
from api import Answer, Refused
from dispatch import Busy, Dispatcher, Failed
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
        return self.document("\n".join(api.plain(message) for message in messages))

    def with_tools(self, messages):
        """The messages, in which the system says that the model can search, as it learnt it."""
        if not self.engine.can_search:
            return messages
        from search import CAN_SEARCH
        system = ""
        if messages[0]["role"] == "system":
            system = api.plain(messages[0])
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

    def fit_chat(self, messages, may_search=True):
        """Drops the oldest turns of a chat until a quarter of the context is free for the reply,
        or half of it if a search may bring a passage → (ids, how many messages were dropped)."""
        from chat import fit_context
        share = 4
        if self.engine.can_search and may_search:
            share = 2
            messages = self.with_tools(messages)
        most = self.block_size - max(1, self.block_size // share)
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
        """What the page shows of it."""
        return dict(name=self.name, stage=self.stage, step=self.step, is_chat=self.is_chat,
                    params=self.engine.model.num_params(), context=self.block_size,
                    vocab=self.engine.tokenizer.n_vocab, tokenizer=self.engine.tokenizer.name)

def load_models(args):
    """--model, or the newest run of each stage → {name: Served}."""
    from sample import (Engine, choose_device, find_run, finds_nothing, load_tokenizer,
                        run_python)
    runs = [find_run(name) for name in args.model or ()] or newest_runs(args.runs)
    device = choose_device(args.device)
    python = run_python if args.tools else None
    indexes = {}        # of --docs; models with the same documents and context share one
    models = {}
    for run in runs:
        tokenizer = load_tokenizer(run)
        model, meta = load_checkpoint(run, device, tokenizer.n_vocab)
        index = None
        search = None
        if meta["stage"] != "pretrain":
            search = finds_nothing
        if args.docs is not None and meta["stage"] != "pretrain":
            from search import build_index, own_documents
            folders = tuple(args.docs) or (own_documents(run),)
            block_size = model.config.block_size
            if (folders, block_size) not in indexes:
                indexes[folders, block_size] = build_index(folders, max_chars=block_size)
            index = indexes[folders, block_size]
            search = index.look_up
        name = run.name
        if name in models:
            name = str(run)
        engine = Engine(model.eval().for_inference(), tokenizer, python=python, search=search)
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
        """None, or why a request does not come from this server's own page or from a program. A
        link from another site may open the page itself, which is a navigation."""
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
        """None, or that the key is missing; compared in a time that does not tell how much of it
        was right."""
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
    """Whether only programs on this machine can reach an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def policy_of(html):
    """The Content-Security-Policy of a page: its own script and style, by their hashes, requests to
    this server, and nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    return (f"default-src 'none'; {allowed['script']}; {allowed['style']}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

# ---- Answering -----------------------------------------------------------------------------------

def as_response(refused):
    """A Refused → the response in OpenAI's form."""
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
    """A coroutine function (server, body of the request) → a route's function. What it returns is
    sent as JSON, or if it is an async iterator, as a stream of its items; a Refused that it raises,
    in OpenAI's form. GET has the query, and what the path names, for a body."""
    @functools.wraps(function)
    async def answer(request):
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse
        try:
            body = dict(request.query_params, **request.path_params)
            if request.method == "POST":
                body = await read_json(request)
            result = await unless_gone(request, function(request.app.state.server, body))
        except Refused as refused:
            return as_response(refused)
        except ClientDisconnect:
            return JSONResponse({}, 499)        # nobody reads it
        if isinstance(result, dict):
            return JSONResponse(result)
        return Stream(result)
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
        """Sends the items. An error after the first one becomes an event, as OpenAI does it."""
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
        """What /v1/chat/completions and /v1/completions answer, whole or as a stream."""
        answer = Answer(asked)
        if asked.is_stream:
            return self.chunks(asked, answer)
        async for _ in self.events(asked, answer.choices):
            pass
        return answer.whole()

    async def chunks(self, asked, answer):
        """The chunks of a stream. A token without text of its own is held back for the next one."""
        begun = set()
        async with aclosing(self.events(asked, answer.choices)) as events:
            async for i, _, pieces in events:
                is_last = bool(answer.choices[i].finish)
                if pieces or is_last or i not in begun:
                    yield answer.chunk(i, pieces, i not in begun, is_last)
                begun.add(i)
        if asked.has_usage:
            yield answer.last_chunk()
        yield "[DONE]"

async def list_models(server, body):
    return api.models_form(server.models)

async def show_model(server, body):
    return api.model_form(api.find_model(body, server.models))

async def chat_completions(server, body):
    return await server.answer(api.read_chat(body, server.models))

async def completions(server, body):
    return await server.answer(api.read_completion(body, server.models))

# ---- Starting ------------------------------------------------------------------------------------

ROUTES = {("GET", "/v1/models"): list_models, ("GET", "/v1/models/{model:path}"): show_model,
          ("POST", "/v1/chat/completions"): chat_completions,
          ("POST", "/v1/completions"): completions, ("GET", "/api/state"): page.state,
          ("POST", "/api/write"): page.write, ("POST", "/api/next"): page.next_token,
          ("POST", "/api/tokens"): page.tokens, ("GET", "/api/log"): page.log,
          ("POST", "/api/rank"): page.rank}

def make_app(server, hosts, api_key=None):
    """The ASGI application. hosts: what Guard accepts."""
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Route
    html = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")

    async def home(request):
        return HTMLResponse(html)

    async def refuse(request, error):
        return as_response(Refused(f"{request.method} {request.url.path}: {error.detail}",
                                   status=error.status_code))

    async def fail(request, error):
        return as_response(Refused("the server failed; its log says why", status=500))
    routes = [Route("/", home)]
    routes += [Route(path, endpoint(function), methods=[method])
               for (method, path), function in ROUTES.items()]
    app = Starlette(routes=routes, exception_handlers={404: refuse, 405: refuse, 500: fail})
    app.state.server = server
    return Guard(app, hosts, api_key, policy_of(html))

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
    sock = listen(args.host, args.port)
    port = sock.getsockname()[1]
    models = load_models(args)
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
