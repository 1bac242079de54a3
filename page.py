"""
What the page serve.html asks for: tokens, the roads not taken, logs of training, rankings.

in:  the server, and the body of a request      out: an answer as JSON, or a stream of them

    state       which models, tokenizers and runs there are
    write       a reply or a continuation, token by token, with the prompt as the model reads it
    next_token  the distribution of the next token under the settings of the sliders
    tokens      how a tokenizer cuts a text
    log         the rows of a run's log.jsonl that are new since the last time
    rank        adds an order of answers to the preferences, from which a reward model learns

All texts go out as JSON. The page puts them into text nodes, never into markup, whoever wrote them.
"""
import asyncio
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import api
from api import Choice, Refused, plain
from engine import next_token_probs

# ---- What a model writes -------------------------------------------------------------------------

def token_form(tokenizer, i):
    """A token as the page shows it: [id, its text, its bytes in hex, is it special?]. Bytes that
    are not whole characters are shown as \\xe4."""
    data = tokenizer.decode_bytes([i])
    is_special = i in tokenizer.special.values()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in data)
    return [i, text, data.hex(" "), is_special]

async def state(server, body):
    """What the page must know before it shows anything."""
    models = server.models.values()
    return dict(models=[model.described() for model in models], tools=server.tools,
                docs=any(model.index for model in models), open=server.dispatcher.n_open,
                tokenizers=tokenizer_names(server), runs=list(run_folders(server)))

WRITE_FIELDS = ("messages", "text", "reply_ids", "top", "rag")

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
    return written(server, asked, prefix, head)

def read_prompt(model, body):
    """What the page asks a model → (ids, how many messages of a chat or tokens of a document fell
    out of the context, passages that were put before the question)."""
    if "messages" not in body:
        return *model.fit_document(model.document(body.get("text", ""))), []
    messages = api.read_messages(body)
    retrieved = []
    is_rag = api.flag(body, "rag")
    if is_rag and model.index:
        messages, retrieved = with_passages(model, messages)
    if not model.is_chat:
        return *model.fit_document(model.prompt(messages)), retrieved
    return *model.fit_chat(messages, may_search=not is_rag), retrieved

def number_of_bars(body):
    """How many alternatives to each token the page wants to show."""
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
    """The events of a stream: head, with the texts of the prefix's tokens; then one for each token
    of each choice; at last {"type": "end"}. The head waits for the first token, because a request
    may still be refused until then."""
    tokenizer = asked.model.engine.tokenizer
    choices = [Choice(tokenizer, asked.stops) for _ in range(asked.n)]
    for choice in choices:      # a character may be split over the prefix and what follows it
        head["prefix"] = [choice.decoder.decode(tokenizer.decode_bytes([i])) for i in prefix]
    has_begun = False
    async with aclosing(server.events(asked, choices)) as events:
        async for i, event, pieces in events:
            if not has_begun:
                has_begun = True
                yield head
            yield dict(event_form(tokenizer, event), choice=i, finish=choices[i].finish,
                       text="".join(piece.text for piece in pieces))
    yield dict(type="end")

def event_form(tokenizer, event):
    """A new token as the page shows it, with its alternatives, if it was drawn among some."""
    form = dict(type="token", token=token_form(tokenizer, event.token), sampled=event.sampled)
    if event.logprob is not None:
        form["logprob"] = round(event.logprob, 5)
        form["top"] = [[*token_form(tokenizer, token)[:2], round(logprob, 5)]
                       for token, logprob in event.alternatives]
    return form

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

# ---- Tokens --------------------------------------------------------------------------------------

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
    default = Path(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    keys = [hashlib.sha1((OPENAI_URL + path).encode()).hexdigest() for path in OPENAI_FILES[name]]
    return all(Path(folder, key).is_file() for key in keys)

@functools.cache
def openai_tokenizer(name):
    """A tokenizer of OpenAI, which is read from the disk once, in a second or so."""
    from bpe import Tokenizer
    return Tokenizer.pretrained(name)

MAX_TEXT_CHARS = 20_000     # of the Tokens page

async def tokens(server, body):
    """How a tokenizer cuts a text. The name of a special token becomes its id, unless `plain`."""
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

# ---- Training ------------------------------------------------------------------------------------

def run_folders(server):
    """{name: folder} of the runs that have a log, oldest first, those of the models included."""
    folders = [path.parent for path in server.runs.glob("*/log.jsonl")]
    folders += [model.run for model in server.models.values() if (model.run / "log.jsonl").exists()]
    folders = sorted(set(folders), key=lambda folder: (folder / "log.jsonl").stat().st_mtime)
    return {folder.name: folder for folder in folders}

SHOWN = ("step", "loss", "val_loss", "val_bpb", "sample", "reward", "reply_tokens", "kind",
         "accuracy", "lr", "tok_s", "eta", "seconds")
MAX_LOG_BYTES = 8 << 20         # in one answer
LIVE_SECONDS = 60               # a run that wrote nothing for so long is not training

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
    """Lines of a log → the rows with what the page draws. A damaged line is left out."""
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            shown = {key: finite(row[key]) for key in SHOWN
                     if isinstance(row.get(key), (str, int, float))}
            if isinstance(row.get("header"), dict):
                shown["command"] = str(row["header"].get("command", ""))
            rows.append(shown)
    return rows

def finite(value):
    """JSON has no word for infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

# ---- Ranking -------------------------------------------------------------------------------------

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
