"""
The server as its clients see it: OpenAI's own client package talks to it, raw sockets misbehave,
and pages of other sites knock. The models are tiny and untrained; what they must say is computed by
the engine itself, or by the model without any cache.
"""
import asyncio
import contextlib
import http.client
import importlib.util
import json
import re
import socket
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("uvicorn", reason="the server needs it: pip install starlette uvicorn")
pytest.importorskip("starlette", reason="the server needs it: pip install starlette uvicorn")
openai = pytest.importorskip("openai", reason="its client asks the server: pip install openai")

import api
import page
import search
import serve
from api import Choice
from conftest import ROOT, noisy, run_main
from dispatch import Busy, Dispatcher
from engine import Event, Request
from model import GPTConfig, save_checkpoint
from sample import Engine

KEY = "correct horse battery"
EVIL = "<script>steal()</script><img src=x onerror=steal()>[a](javascript:steal())"


def tiny_engine(tokenizer, block_size=512, seed=4):
    config = GPTConfig(block_size=block_size, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2,
                       n_embd=32)
    return Engine(noisy(config, seed=seed, std=0.3), tokenizer, python=None)


def serve_models(folder, engines, **limits):
    """{name: Served} of engines in run folders, and a dispatcher that works for them."""
    models = {}
    for name, engine in engines.items():
        stage = "pretrain" if "base" in name else "sft"
        save_checkpoint(folder / name, engine.model, engine.tokenizer, stage=stage)
        models[name] = serve.Served(name, folder / name, engine, dict(stage=stage, step=3))
    dispatcher = Dispatcher(engines, **limits)
    dispatcher.start()
    return serve.Server(models, dispatcher, folder, folder / "preferences.jsonl")


@contextlib.contextmanager
def running(server, api_key=None):
    """The port of a server that runs in a thread."""
    import uvicorn
    sock = serve.listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = serve.make_app(server, serve.own_hosts("127.0.0.1", port), api_key)
    web = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=web.run, kwargs=dict(sockets=[sock]), daemon=True)
    thread.start()
    yield port          # the socket listens already
    web.should_exit = True
    thread.join(5)


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    engines = {"tiny-base": tiny_engine(tokenizer), "tiny-sft": tiny_engine(tokenizer, seed=5)}
    server = serve_models(folder, engines)
    yield server
    server.dispatcher.stop()


@pytest.fixture(scope="module")
def port(server):
    with running(server) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def request(port, method, path, body=None, **headers):
    """→ (status, the answer's JSON or text, its headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers = {"content-type": "application/json"} | headers
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    with contextlib.suppress(ValueError):
        text = json.loads(text)
    return response.status, text, response.headers


def events(port, body, path="/api/write"):
    status, text, _ = request(port, "POST", path, body)
    assert status == 200, text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


CHAT = dict(model="tiny-sft", messages=[dict(role="user", content="Hi")], max_tokens=24, seed=1)


# ---- the API

def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny-base", "tiny-sft"]
    assert client.models.retrieve("tiny-sft").owned_by == "deepdive"
    with pytest.raises(openai.NotFoundError, match="no model gpt-5"):
        client.models.retrieve("gpt-5")


def test_a_reply_is_what_the_engine_writes(client, server, tokenizer):
    engine = server.models["tiny-sft"].engine
    ids, _ = tokenizer.render(CHAT["messages"], for_completion=True)
    wanted = engine.generate([ids], 24, temperature=0)[0].ids
    got = client.chat.completions.create(**CHAT, temperature=0, logprobs=True)
    assert [tokenizer.decode([i]) for i in wanted] == [
        entry.token for entry in got.choices[0].logprobs.content]
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), len(wanted))
    assert got.object == "chat.completion" and got.choices[0].message.role == "assistant"


def test_a_stream_says_the_same_as_the_whole(client):
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True,
                                                 stream_options=dict(include_usage=True)))
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant" and len(deltas) > 10
    assert [d.finish_reason for d in deltas][-2:] == [None, whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


def test_each_of_n_answers_is_that_of_its_seed_alone(client):
    together = client.chat.completions.create(**CHAT, n=3)
    alone = [client.chat.completions.create(**CHAT | dict(seed=1 + i)) for i in range(3)]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert len(set(texts)) == 3
    message = client.chat.completions.create(**CHAT | dict(seed=None)).choices[0].message
    assert message.content or message.parts     # a random reply may be a query alone


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(client, stream):
    text = client.completions.create(model="tiny-base", prompt="The", max_tokens=30,
                                     seed=2).choices[0].text
    stop = text[11:15]      # over several tokens
    got = client.completions.create(model="tiny-base", prompt="The", max_tokens=30, seed=2,
                                    stop=["never", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in got] if stream else got.choices
    assert "".join(choice.text for choice in choices) == text[:text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client, server, tokenizer):
    got = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    engine = server.models["tiny-sft"].engine
    ids, _ = tokenizer.render(CHAT["messages"], for_completion=True)
    for entry in got.choices[0].logprobs.content[:8]:
        logits = engine.model(torch.tensor([ids]))[0, -1, :tokenizer.n_vocab]
        best = torch.log_softmax(logits, -1).topk(3)
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(best.values.tolist(), abs=1e-4)
        assert bytes(entry.top_logprobs[0].bytes) == tokenizer.decode_bytes([best.indices[0]])
        ids += [tokenizer.token_of.index(bytes(entry.bytes))]


def test_completions_take_texts_ids_and_lists_of_both(client, tokenizer):
    ids = [tokenizer.eot, *tokenizer.encode_ordinary("The")]
    how = dict(model="tiny-base", max_tokens=5, temperature=0, logprobs=2)
    got = client.completions.create(**how, prompt=["The", "A"])
    assert [choice.index for choice in got.choices] == [0, 1]
    for prompt in ("The", ids, [ids]):
        again = client.completions.create(**how, prompt=prompt)
        assert again.choices[0].text == got.choices[0].text
    logprobs = got.choices[0].logprobs
    assert "".join(logprobs.tokens) == got.choices[0].text and logprobs.text_offset[0] == 0
    assert all(len(top) <= 2 for top in logprobs.top_logprobs) and max(logprobs.token_logprobs) <= 0


WRONG = [
    (dict(model="gpt-5"), "model", 404), (dict(messages=[]), "messages", 400),
    (dict(messages=[dict(role="robot", content="")]), "messages", 400),
    (dict(messages=[dict(role="user", content=[dict(type="python", text="1")])]), "messages", 400),
    (dict(messages=[dict(role="user", content=7)]), "messages", 400),
    (dict(temperature=3), "temperature", 400), (dict(temperature=True), "temperature", 400),
    (dict(n=0), "n", 400), (dict(top_p="1"), "top_p", 400),
    (dict(max_tokens=1.5), "max_tokens", 400),
    (dict(stop=[""]), "stop", 400), (dict(stop=["a"] * 17), "stop", 400),
    (dict(top_logprobs=2), "top_logprobs", 400), (dict(stream="yes"), "stream", 400),
    (dict(stream=1), "stream", 400), (dict(stream_options=dict(a=1)), "stream_options", 400),
    (dict(presence_penalty=1), "presence_penalty", 400), (dict(tools=[1]), "tools", 400),
    (dict(colour="red"), "colour", 400),
    (dict(messages=[dict(role="user", content="x " * 900)]), "messages", 400),
    (dict(messages=[dict(role="user", content="x")] * 1001), "messages", 400),
    (dict(seed=10 ** 400), "seed", 400)]


@pytest.mark.parametrize("wrong, param, status", WRONG, ids=range(len(WRONG)))
def test_a_wrong_request_is_refused_in_openai_form(client, wrong, param, status):
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**CHAT | dict(extra_body=wrong))
    assert (error.value.status_code, error.value.param) == (status, param)
    assert error.value.type == "invalid_request_error" and len(error.value.message) > 20


def test_fields_that_change_nothing_are_accepted(client):
    neutral = dict(user="me", presence_penalty=0, tools=[], top_k=3, min_p=0.1, top_p=0,
                   response_format=dict(type="text"), logit_bias=None)
    assert client.chat.completions.create(**CHAT | dict(extra_body=neutral)).choices


def choose(tokenizer, text, stops=(), in_parts=True):
    """A Choice to which the tokens of a text were given, special ones by their names."""
    choice = Choice(tokenizer, stops, in_parts)
    ids = tokenizer.encode(text, allowed_special="all")
    for n, i in enumerate(ids):
        finish = None
        if n == len(ids) - 1:
            finish = "stop" if i == tokenizer.special["<|im_end|>"] else "length"
        if not choice.finish:
            choice.add(Event(None, i, True, finish=finish))
    return choice


def test_thoughts_and_tools_are_not_the_content(tokenizer):
    text = ("Wait.<|python|>6*7<|/python|><|output|>42<|/output|>It is <|think|>sure<|/think|>42 "
            "<|/python|>é<|im_end|>")
    choice = choose(tokenizer, text)
    assert choice.text_of() == "Wait.It is 42 <|/python|>é" and choice.finish == "stop"
    assert choice.text_of(is_text=False) == "6*742sure"
    assert [part["type"] for part in choice.parts()] == ["text", "python", "output", "text",
                                                         "think", "text"]
    assert choose(tokenizer, text, in_parts=False).text_of() == text.removesuffix("<|im_end|>")


@pytest.mark.parametrize("text, stop, wanted", [
    ("one two three", "two", "one "), ("one two", "o", ""), ("aab", "ab", "a"), ("ab", "abc", "ab"),
    ("no no nobody", "nob", "no no ")])
def test_text_that_may_begin_a_stop_text_waits(tokenizer, text, stop, wanted):
    choice = choose(tokenizer, text, [stop])
    assert choice.text_of() == wanted
    assert choice.finish == ("stop" if stop in text else "length")


def test_half_a_character_is_never_sent(tokenizer):
    choice = Choice(tokenizer)
    sent = [choice.add(Event(None, byte, True)) for byte in "aé世".encode()]
    texts = ["".join(piece.text for piece in pieces) for pieces in sent]
    assert texts == ["a", "", "é", "", "", "世"]
    assert [p.text for p in choice.add(Event(None, "é".encode()[0], True, finish="length"))] == [
        "", "\ufffd"]


# ---- the engine under load

def test_a_text_does_not_depend_on_its_company(server, port):
    bodies = [dict(model="tiny-base", text="word " * i, seed=i, max_tokens=12 + i, top=0,
                   temperature=0.5 + i / 10) for i in range(1, 7)]
    alone = [events(port, body) for body in bodies]
    together = [None] * len(bodies)

    def ask(i):
        together[i] = events(port, bodies[i])
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and server.dispatcher.n_open == 0


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def leave(port, body, path, when):
    """Sends a request, and when a condition holds, is gone without a word, as after kill -9."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application"
                     f"/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(when)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")     # RST


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server, port, stream, monkeypatch):
    scheduler = server.dispatcher.schedulers["tiny-base"]
    slow = type(scheduler).step
    monkeypatch.setattr(scheduler, "step", lambda: time.sleep(0.01) or slow(scheduler))
    body = dict(model="tiny-base", prompt="The", max_tokens=500, temperature=0, n=3, stream=stream)
    before = scheduler.step_number
    leave(port, body, "/v1/completions", lambda: scheduler.step_number > before + 3)
    wait_until(lambda: scheduler.running == 0 and server.dispatcher.n_open == 0, 2)
    assert scheduler.step_number - before < 100 and not scheduler.waiting


def test_the_bench_asks_and_kills(server, port, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("bench_serve", ROOT / "bench" / "serve.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    asked = bench.questions(3)
    answers = asyncio.run(bench.ask_all(port, "tiny-sft", asked, at_once=3))
    assert len(set(asked)) == 3 and all(text and tokens for text, tokens, _ in answers)
    assert all(0 < first < 20 for _, _, first in answers)
    bench.kill_clients(port, "tiny-sft", asked)
    wait_until(lambda: server.dispatcher.n_open == 0)


def idle_dispatcher(tokenizer, **limits):
    """One whose thread is not started, so that the test can take its steps."""
    return Dispatcher({"one": tiny_engine(tokenizer, 64)}, **limits)


def test_a_cancelled_row_writes_no_other_token(tokenizer):
    dispatcher = idle_dispatcher(tokenizer)
    requests = [Request([tokenizer.eot, 65 + i], 20, temperature=0) for i in range(3)]

    async def work():
        async with dispatcher.open("one", requests) as tickets:
            dispatcher.obey(wait=False)
            while tickets.events.qsize() < 3:       # the prompts are read, and a token each
                dispatcher.step("one")
                await asyncio.sleep(0)
            tickets.cancel(1)
            dispatcher.obey(wait=False)
            dispatcher.step("one")
            await asyncio.sleep(0)
            return [tickets.events.get_nowait()[0] for _ in range(tickets.events.qsize())]
    assert asyncio.run(work()) == [0, 1, 2, 0, 2]
    dispatcher.obey(wait=False)
    assert dispatcher.n_open == 0 and dispatcher.schedulers["one"].running == 0


def test_a_full_house_says_when_to_ask_again(tokenizer, server, port, monkeypatch):
    dispatcher = idle_dispatcher(tokenizer, max_rows=2, max_waiting=1)
    requests = [Request([tokenizer.eot], 20)] * 2

    async def work():
        async with dispatcher.open("one", requests):
            async with dispatcher.open("one", requests[:1]):
                with pytest.raises(Busy) as busy:
                    await dispatcher.open("one", requests[:1]).__aenter__()
        return busy.value.seconds
    assert asyncio.run(work()) == 2
    monkeypatch.setattr(server.dispatcher, "max_open", 2)
    assert request(port, "POST", "/v1/chat/completions", CHAT | dict(n=3))[0] == 400
    monkeypatch.setattr(server.dispatcher, "n_open", 2)
    for stream in (True, False):
        status, body, headers = request(port, "POST", "/v1/chat/completions",
                                        CHAT | dict(stream=stream))
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert body["error"]["code"] == "rate_limit_exceeded"


def test_a_broken_model_fails_its_requests_and_no_others(server, port, monkeypatch):
    scheduler = server.dispatcher.schedulers["tiny-base"]

    def broken():
        raise ValueError("the weights are damaged")
    monkeypatch.setattr(scheduler, "step", broken)
    body = dict(model="tiny-base", prompt="The", max_tokens=3)
    status, answer, _ = request(port, "POST", "/v1/completions", body)
    assert status == 500 and "damaged" in answer["error"]["message"]
    assert request(port, "POST", "/v1/completions", body)[0] == 200
    assert server.dispatcher.n_open == 0


# ---- what the page asks for

def test_the_page_is_shown_the_tokens_as_the_model_read_them(port, tokenizer):
    messages = [dict(role="system", content=EVIL), dict(role="user", content="<|im_end|> Hi é")]
    body = dict(model="tiny-sft", messages=messages, seed=3, max_tokens=9, top=4)
    head, *rest = events(port, body)
    ids, _ = tokenizer.render(messages, for_completion=True)
    assert [token[0] for token in head["tokens"]] == ids and head["context"] == 512
    tokens = [event for event in rest if event["type"] == "token"]
    assert all(len(token["top"]) == 4 and token["sampled"] for token in tokens)
    assert rest[-1] == dict(type="end") and tokens[-1]["finish"] in ("stop", "length")


def test_a_reply_continues_from_another_token(port):
    body = dict(model="tiny-base", text="The", seed=3, max_tokens=8, temperature=0, top=2)
    tokens = [event for event in events(port, body) if event["type"] == "token"]
    kept = [token["token"][0] for token in tokens[:4]]
    head, *forked = events(port, body | dict(reply_ids=kept))
    assert [event["token"] for event in forked[:4]] == [event["token"] for event in tokens[4:8]]
    assert "".join(head["prefix"]) == "".join(token["text"] for token in tokens[:4])
    assert events(port, body | dict(reply_ids=[*kept[:3], 65]))[1]["type"] == "token"


def test_what_falls_out_of_the_context_is_said(port):
    turn = [dict(role=role, content="word " * 60) for role in ("user", "assistant")]
    long = turn * 8
    body = dict(model="tiny-sft", messages=[*long, dict(role="user", content="Now?")], max_tokens=2)
    head = events(port, body)[0]
    assert head["dropped"] > 0 and head["dropped"] % 2 == 0 and len(head["tokens"]) <= 384
    status, answer, _ = request(port, "POST", "/api/write", body | dict(
        messages=[dict(role="user", content="word " * 900)]))
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_the_beginning_of_a_long_document_falls_out(port, tokenizer):
    text = "word " * 900
    head = events(port, dict(model="tiny-base", text=text, max_tokens=2))[0]
    ids = [tokenizer.eot, *tokenizer.encode_ordinary(text)]
    assert len(head["tokens"]) == 384 and head["dropped"] == len(ids) - 384
    assert [token[0] for token in head["tokens"]] == [ids[0], *ids[-383:]]
    body = dict(model="tiny-base", text=text)
    assert request(port, "POST", "/api/next", body)[1]["tokens"] == 384


def test_a_base_model_gets_the_question_as_a_document(port, tokenizer):
    messages = [dict(role="user", content="Who are you?")]
    head = events(port, dict(model="tiny-base", messages=messages, max_tokens=2))[0]
    assert [token[0] for token in head["tokens"]] == [
        tokenizer.eot, *tokenizer.encode_ordinary("Who are you?")]


@pytest.mark.parametrize("how", [{}, dict(temperature=0.5), dict(top_k=3), dict(top_p=0.4)])
def test_the_bars_are_what_the_sampler_draws_from(server, port, how):
    _, bars, _ = request(port, "POST", "/api/next", dict(model="tiny-base", text="The a", **how))
    engine = server.models["tiny-base"].engine
    logits = engine.model(torch.tensor([engine.prompt_ids("The a")]))[:, -1, :engine.n_vocab]
    wanted = page.next_token_probs(logits, **how)[0]
    assert bars["bars"][0][0] == wanted.argmax() and bars["kept"] == (wanted > 0).sum()
    assert [bar[2] for bar in bars["bars"]] == pytest.approx(
        wanted.topk(len(bars["bars"])).values.tolist(), abs=1e-5)


def test_tokens_are_cut_as_the_tokenizer_cuts(port, tokenizer):
    text = "Hello é<|im_end|>" + EVIL
    for plain in (True, False):
        body = dict(text=text, tokenizer="tiny-base", plain=plain)
        _, cut, _ = request(port, "POST", "/api/tokens", body)
        ids = tokenizer.encode_ordinary(text) if plain else tokenizer.encode(
            text, allowed_special="all")
        assert [token[0] for token in cut["tokens"]] == ids
        assert bytes.fromhex("".join(token[2] for token in cut["tokens"])).decode() == text
    assert request(port, "POST", "/api/tokens", body | dict(tokenizer="/etc"))[0] == 404
    assert request(port, "POST", "/api/tokens", body | dict(text="x" * 20_001))[0] == 400


def test_openai_tokenizers_are_offered_if_they_are_on_the_disk(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert page.tokenizer_names(server) == ["tiny-base"]
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(b"")
    assert page.tokenizer_names(server) == ["tiny-base", "cl100k_base"]


def test_a_log_is_read_while_it_grows(server, port):
    run = server.runs / "growing"
    run.mkdir(exist_ok=True)
    row = json.dumps(dict(step=1, loss=2.5, sample=EVIL, secret=1)) + "\n"
    (run / "log.jsonl").write_text(row + '{"step": 2, "loss": NaN}\n[1]\nbroken\n{"step": 3, "lo')
    _, log, _ = request(port, "GET", "/api/log?run=growing")
    assert log["rows"] == [dict(step=1, loss=2.5, sample=EVIL), dict(step=2, loss=None)]
    with open(run / "log.jsonl", "a") as file:
        file.write('ss": 1}\n')
    _, more, _ = request(port, "GET", f"/api/log?run=growing&after={log['next']}")
    assert more["rows"] == [dict(step=3, loss=1)] and more["is_live"]
    assert more["next"] == more["size"] == (run / "log.jsonl").stat().st_size


@pytest.mark.parametrize("run", ["../runs", "growing/../growing", "/etc", "", "tiny-base"])
def test_no_other_file_is_read(port, run):
    status, body, _ = request(port, "GET", f"/api/log?run={run}")
    assert status == 404 and "error" in body


def test_an_order_of_answers_is_a_line_of_the_preferences(server, port):
    body = dict(prompt="Hi\n" + EVIL, ranking=["é", "b", EVIL])
    _, first, _ = request(port, "POST", "/api/rank", body)
    _, second, _ = request(port, "POST", "/api/rank", body | dict(ranking=["a", "b"]))
    lines = [json.loads(line) for line in server.preferences.read_text("utf-8").splitlines()]
    assert lines[0] == body and lines[1]["ranking"] == ["a", "b"]
    assert (first["lines"], second["lines"]) == (1, 2)
    for wrong in (dict(ranking=["a"]), dict(ranking="ab"), dict(prompt=" "), dict(ranking=[1, 2])):
        assert request(port, "POST", "/api/rank", body | wrong)[0] == 400


# ---- safety

FOREIGN = [dict(host="evil.example"), dict(host="evil.example:{port}"), dict(host="127.0.0.1"),
           dict(origin="http://evil.example"), dict(origin="null"), dict(origin=""),
           dict(origin="http://127.0.0.1:1"), dict(origin="http://127.0.0.1.evil.example:{port}"),
           dict(sec_fetch_site="cross-site"),
           dict(sec_fetch_site="same-site", sec_fetch_mode="cors")]


@pytest.mark.parametrize("headers", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("path", ["/v1/models", "/api/state"])
def test_other_sites_are_refused(port, headers, path):
    headers = {name: value.format(port=port) for name, value in headers.items()}
    status, body, answer = request(port, "GET", path, **headers)
    assert status == 403 and body["error"]["type"] == "permission_error"
    assert "access-control-allow-origin" not in answer


def test_a_form_of_another_site_and_a_preflight_are_refused(port):
    body = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert request(port, "POST", "/api/rank", body, content_type=kind)[0] == 415
    status, _, headers = request(port, "OPTIONS", "/v1/models", origin="http://evil.example")
    assert status == 403 and "access-control-allow-methods" not in headers
    visit = dict(sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert request(port, "GET", "/", **visit)[0] == 200
    assert request(port, "GET", "/api/state", origin=f"http://127.0.0.1:{port}")[0] == 200


def test_with_a_key_only_the_page_is_open(server):
    with running(server, KEY) as port:
        for given in ("", "Bearer wrong", f"Bearer {KEY}x", KEY[:5], "Bearer é"):
            status, body, headers = request(port, "GET", "/v1/models",
                                            authorization=given.encode("utf-8").decode("latin-1"))
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert headers["www-authenticate"] == "Bearer"
        assert request(port, "GET", "/")[0] == 200
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY)
        assert len(list(client.models.list())) == 2


def test_limits_of_the_body(port, monkeypatch):
    big = b" " * (serve.MAX_BODY_BYTES + 1)
    assert request(port, "POST", "/v1/completions", big, content_type="application/json")[0] == 413
    for wrong in (b"", b"{", b"[1]", b"[" * 100_000, b"\xff"):
        status, body, _ = request(port, "POST", "/v1/completions", wrong,
                                  content_type="application/json")
        assert status == 400 and "JSON" in body["error"]["message"]
    monkeypatch.setattr(serve, "MAX_BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"POST /api/next HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: "
                     "application/json\r\ncontent-length: 99\r\n\r\n{".encode())
        assert b" 408 " in sock.recv(4096)


def test_the_page_can_hold_no_foreign_script(port):
    _, html, headers = request(port, "GET", "/")
    policy = headers["content-security-policy"]
    assert policy == serve.policy_of(html) and "default-src 'none'" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    script = re.search(r"<script>(.*)</script>", html, re.S)[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\("
                         r"|srcdoc|setTimeout\(['\"]", script)
    assert not re.search(r"""<[^>]+ (?:on\w+|style)=|(?:src|href)=["'](?!data:|#)""", html.replace(
        script, ""))
    assert headers["x-content-type-options"] == "nosniff"


def test_paths_that_do_not_exist_are_refused_in_openai_form(port):
    for method, path, status in (("GET", "/v1/files", 404), ("GET", "/v1/chat/completions", 405),
                                 ("GET", "/../serve.py", 404), ("DELETE", "/", 405)):
        got, body, headers = request(port, method, path)
        assert got == status and path in body["error"]["message"]
        assert "content-security-policy" in headers


@pytest.mark.parametrize("flags, said", [
    (["--host", "0.0.0.0"], "needs --api_key"), (["--host", "example.org"], "needs --api_key"),
    (["--api_key", "short"], "at least 8"), (["--max_rows", "0"], "at least 1, got 0"),
    (["--port", "70000"], "from 0 to 65535, got 70000"), (["--max_waiting", "-1"], "at least 0")])
def test_wrong_flags_end_in_one_line(flags, said):
    with pytest.raises(SystemExit) as error:
        run_main(serve, *flags)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("host, is_own", [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True),
                                          ("localhost", True), ("0.0.0.0", False), ("::", False),
                                          ("192.168.0.7", False), ("localhost.example", False)])
def test_loopback_addresses(host, is_own):
    assert serve.is_loopback(host) == is_own


def test_without_its_packages_it_says_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="pip install starlette uvicorn"):
        run_main(serve)


def test_a_port_that_is_taken_is_named(port):
    with pytest.raises(SystemExit, match=f"--port {port} cannot be used: .*--port 0"):
        serve.listen("127.0.0.1", port)


@pytest.mark.parametrize("tools", [False, True])
def test_models_run_python_with_tools_alone(server, tools, monkeypatch):
    flags = ["--model", str(server.runs / "tiny-sft"), str(server.runs / "tiny-base")]
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags, *["--tools"] * int(tools)])
    models = serve.load_models(serve.parse_args())
    assert list(models) == ["tiny-sft", "tiny-base"]
    closing = models["tiny-sft"].engine.tokenizer.special["<|/python|>"]
    assert [closing in model.engine.tools for model in models.values()] == [tools, tools]
    assert not any(model.engine.model.training for model in models.values())


def test_documents_are_searched_as_the_model_learnt_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "embedding", lambda: (None, None))     # it takes a second to load
    (tmp_path / "notes.txt").write_text("Zorblax is the capital of Mars.")
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(server.runs / "tiny-sft"),
                                      "--docs", str(tmp_path)])
    model = serve.load_models(serve.parse_args())["tiny-sft"]
    messages = [dict(role="user", content="What is Zorblax?")]
    assert "search" in api.plain(model.with_tools(messages)[0]) and model.engine.can_search
    replaced, found = page.with_passages(model, messages)
    assert "capital of Mars" in found[0] and "capital of Mars" in replaced[0]["content"]
    decode = model.engine.tokenizer.decode
    assert "search" in decode(page.read_prompt(model, dict(messages=messages))[0])
    ids, _, shown = page.read_prompt(model, dict(messages=messages, rag=True))
    assert shown == found and "search" not in decode(ids) and "of Mars" in decode(ids)


def test_the_newest_run_of_each_stage_is_served(server, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--runs", str(server.runs)])
    assert list(serve.load_models(serve.parse_args())) == ["tiny-base", "tiny-sft"]
