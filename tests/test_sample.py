"""
sample.py against slow twins: one token at a time without a cache, probabilities from their
definitions. The Python tool meets code that means ill, the answer checker replies that cheat.
"""
import contextlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine as engine_room
import precision
import sample
from conftest import ROOT, mutate, noisy, run_main
from engine import Scheduler, next_token_probs
from model import GPTConfig, load_checkpoint, save_checkpoint
from precision import PACKED_ROWS, can_pack, packed
from sample import Engine, find_run, run_python

PROMPTS = ["Return", "Return the mean of the data", "If", "a, b", "Return the"]


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    return Engine(noisy(config, seed=15, std=0.4), tokenizer, python=None)   # writes 40 tokens


class Scripted(torch.nn.Module):
    """In place of a model: after its prompt it writes these ids, whatever it reads."""

    def __init__(self, ids, vocab_size, prompt_tokens=1):
        super().__init__()
        self.ids, self.start = torch.tensor(ids), prompt_tokens - 1
        self.config = GPTConfig(256, vocab_size, n_layer=1, n_head=1, n_embd=2)
        self.compute_dtype, self.weight = torch.float32, torch.nn.Parameter(torch.zeros(1))

    def hidden(self, idx, cache, last=None):
        pos = cache.pos[:, None] + torch.arange(idx.shape[1])
        if last is not None:
            pos = pos.gather(1, last[:, None])
        cache.advance(idx.shape[1])
        return (pos - self.start).clamp(0, len(self.ids) - 1)

    def logits(self, at):
        return 99.0 * torch.nn.functional.one_hot(self.ids[at], self.config.vocab_size)

    def forward(self, idx, cache=None):
        return self.logits(self.hidden(idx, cache))


def writing(tokenizer, *pieces, python=None):
    """An engine that writes these texts and special tokens; ??? is what a tool will write over."""
    ids = [i for piece in pieces for i in ([tokenizer.special[piece]] if piece in tokenizer.special
                                           else tokenizer.encode_ordinary(piece))]
    return Engine(Scripted(ids, tokenizer.n_vocab), tokenizer, python), ids


# ---- from logits to one token

def check_greedy(engine):
    ids = [engine.tokenizer.eot, *engine.tokenizer.encode_ordinary("Return the")]
    found = engine.generate(["Return the"], 30, temperature=0)[0]
    for token in found.ids:
        assert token == engine.model(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)
    assert len(found.ids) == 30 and all(found.sampled) and len(set(found.ids)) > 3


def test_temperature_0_takes_the_best_token_of_an_uncached_model(engine):
    check_greedy(engine)


def check_frequencies(engine, n=20_000, temperature=4.0):
    drawn = [c.ids[0] for c in engine.generate(["Return"], 1, n, temperature, seed=3)]
    ids = [engine.tokenizer.eot, *engine.tokenizer.encode_ordinary("Return")]
    logits = engine.model(torch.tensor([ids]))[0, -1].double()
    expected = n * torch.softmax(logits / temperature, 0)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected))
    often = expected > 5
    chi2 = ((counts - expected).square() / expected)[often].sum()
    assert often.sum() > 100 and chi2 < often.sum() + 3 * math.sqrt(2 * often.sum())


def test_tokens_are_drawn_as_often_as_the_softmax_says(engine):
    check_frequencies(engine)


def check_draw():
    weights = torch.tensor([[0.0, 0.5, 0.0, 1.5, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]])
    for share, wanted in ((0.0, [1, 0]), (0.2499, [1, 0]), (0.25, [3, 0]), (1 - 2 ** -53, [3, 0])):
        assert engine_room.draw(weights, torch.full((2,), share, dtype=torch.double)).tolist() == wanted, share


def test_a_random_share_picks_its_token_and_never_one_of_probability_0():
    check_draw()


@pytest.mark.parametrize("old, new", [("right=True", "right=False"), ("* ends[:, -1:]", ""),
                                      ("probs.cumsum", "probs.flip(-1).cumsum")])
def test_a_draw_at_the_wrong_end_would_be_noticed(old, new, monkeypatch):
    mutate(monkeypatch, engine_room, "draw", old, new)
    with pytest.raises(AssertionError):
        check_draw()


def twin_probs(logits, temperature, top_k, top_p, min_p):
    """One row, from the definitions: a token stays if it passes each cut; p is a share of what k
    left."""
    weights = [math.exp(z / temperature) for z in logits.double().tolist()]
    p = [w / sum(weights) for w in weights]
    order, kept, before = sorted(range(len(p)), key=lambda i: -p[i]), [0.0] * len(p), 0.0
    left = sum(sorted(p, reverse=True)[:top_k])
    for rank, i in enumerate(order):
        if not (top_k and rank >= top_k or top_p and before >= top_p * left
                or min_p and p[i] < min_p * p[order[0]]):
            kept[i] = p[i]
        before += p[i]
    return torch.tensor([k / sum(kept) for k in kept])


CUTS = [dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=1), dict(top_k=5),
        dict(top_k=999), dict(top_p=1e-9), dict(top_p=0.5), dict(top_p=0.95), dict(top_p=1.0),
        dict(min_p=0.05), dict(min_p=1.0), dict(top_k=7, top_p=0.6), dict(top_p=0.8, min_p=0.2),
        dict(temperature=2.0, top_k=20, top_p=0.9, min_p=0.1)]


def check_cuts(**cut):
    cut = dict(dict(temperature=1.0, top_k=None, top_p=None, min_p=None), **cut)
    logits = 2 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([twin_probs(row, **cut) for row in logits])
    torch.testing.assert_close(next_token_probs(logits, **cut), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_top_k_top_p_and_min_p_equal_their_slow_twin(cut):
    check_cuts(**cut)


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut.get("temperature") is None], ids=str)
def test_cuts_keep_what_transformers_keeps(cut):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(200, 500, generator=torch.Generator().manual_seed(1))
    expected = logits
    for name, warper in dict(top_k="TopK", top_p="TopP", min_p="MinP").items():
        if name in cut:
            expected = getattr(process, f"{warper}LogitsWarper")(cut[name])(None, expected)
    assert torch.equal(next_token_probs(logits, **cut) > 0, expected > -math.inf)


def check_penalty():
    logits = 2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    contexts = torch.randint(50, (3, 30), generator=torch.Generator().manual_seed(3))
    for penalty in (0.5, 1.0, 1.3, 4.0):
        process = pytest.importorskip("transformers.generation.logits_process")
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(contexts, logits.clone())
        found = next_token_probs(logits, 0.7, repetition_penalty=penalty, contexts=contexts.tolist())
        torch.testing.assert_close(found, torch.softmax(expected / 0.7, -1))


def test_the_repetition_penalty_is_that_of_transformers():
    check_penalty()


def test_the_penalty_counts_the_prompt_and_what_was_written_of_each_row_alone(engine):
    prompts = ["Return the", "If"]
    found = engine.generate(prompts, 20, 2, temperature=0, repetition_penalty=3.0)
    for prompt, completion in zip([prompts[0]] * 2 + [prompts[1]] * 2, found):
        ids = engine.prompt_ids(prompt)
        for token in completion.ids:
            logits = engine.model(torch.tensor([ids]))[:, -1, :engine.n_vocab]
            assert token == engine_room.penalize(logits, [ids], 3.0).argmax()
            ids.append(token)
    assert found[0].ids != engine.generate(prompts, 20, temperature=0)[0].ids


def test_top_p_1_keeps_every_token_and_a_tiny_temperature_is_greedy():
    logits = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    assert (next_token_probs(logits, top_p=1.0) > 0).all()
    assert torch.equal(next_token_probs(logits, 1e-45), next_token_probs(logits, 0))


@pytest.mark.parametrize("given, said", [
    (dict(temperature=-1.0), "temperature must be at least 0, got -1"),
    (dict(temperature=math.nan), "temperature must be at least 0, got nan"),
    (dict(top_k=0), "top_k must be at least 1, got 0"), (dict(top_k=-1), "top_k must be"),
    (dict(top_p=0.0), "top_p must be above 0"), (dict(top_p=-0.5), "top_p must be above 0"),
    (dict(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"), (dict(min_p=1.5), "min_p must be from 0 to 1, got 1.5"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be above 0, got 0.0")], ids=str)
def test_sampling_out_of_range_is_refused_before_anything_is_written(given, said, engine, base_run):
    with pytest.raises(ValueError, match=said):
        engine.generate(["a"], 1, **given)
    (name, value), = given.items()
    with pytest.raises(SystemExit, match=f"^--{said}"):
        run_main(sample, "--model", base_run, f"--{name}", value)


def test_a_model_with_damaged_weights_is_named(tokenizer, engine):
    for temperature in (0.0, 1.0):
        broken = noisy(engine.model.config)
        broken.wte.weight.data[:] = math.nan
        with pytest.raises(ValueError, match="not finite; its weights are damaged"):
            Engine(broken, tokenizer).generate(["a"], 1, temperature=temperature)


def test_ids_that_only_pad_the_vocabulary_are_never_written(tokenizer):
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab + 300, n_layer=1, n_head=1,
                       n_embd=16)
    ids = Engine(noisy(config), tokenizer).generate(["a"], 40, 4, temperature=3.0)[0].ids
    assert max(ids) < tokenizer.n_vocab


# ---- packed weights

def check_packed(bias=True):
    """Within, many rows multiply with packed weights, and few do not; afterwards none do."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 512, bias=bias)
    many, few = torch.randn(PACKED_ROWS, 1, 256), torch.randn(1, 256)
    wanted = layer(many), layer(few)
    with torch.inference_mode(), packed(layer, PACKED_ROWS):
        assert "forward" in vars(layer)
        torch.testing.assert_close((layer(many), layer(few)), wanted, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(layer) and layer(many).grad_fn


@pytest.mark.skipif(not can_pack(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_multiply_as_the_others_and_are_forgotten(bias):
    check_packed(bias)


@pytest.mark.skipif(not can_pack(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("name, old, new", [
    ("pack", "ordered, bias,", "ordered, None,"), ("packed", "layer.forward =", "_ ="),
    ("packed", 'pop("forward", None)', 'get("forward")')], ids=str)
def test_the_check_of_packed_weights_notices_a_mutant(name, old, new, monkeypatch):
    mutate(monkeypatch, precision, name, old, new)
    monkeypatch.setitem(globals(), name, getattr(precision, name))
    with pytest.raises(AssertionError):
        check_packed()


def test_without_onednn_nothing_is_packed(monkeypatch):
    def pack(*_):
        raise AttributeError("no mkldnn")

    monkeypatch.setattr(precision, "pack", pack)
    assert not can_pack.__wrapped__()
    monkeypatch.setattr(precision, "can_pack", lambda: False)
    layer = torch.nn.Linear(256, 512)
    with packed(layer, PACKED_ROWS):
        assert "forward" not in vars(layer)


def test_a_batch_that_is_written_with_packed_weights_learns_as_before(tokenizer):
    """The replies are those of rows that are written alone, and the model keeps its gradients."""
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=256)
    engine = Engine(noisy(config, seed=15, std=0.1), tokenizer, python=None)
    together = engine.generate(PROMPTS * 2, 12, temperature=0)
    alone = [engine.generate([prompt], 12, temperature=0)[0] for prompt in PROMPTS]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone * 2]
    engine.model(torch.zeros(8, 4, dtype=torch.long)).sum().backward()
    assert all(p.grad is not None for p in engine.model.parameters())


# ---- the loop

def test_same_seed_repeats_and_another_does_not(engine):
    first, again, other = ([c.ids for c in engine.generate(PROMPTS, 12, 2, seed=seed)]
                           for seed in (5, 5, 6))
    assert first == again and first != other
    assert first[0] != first[1]                         # two samples of one prompt


def check_rows_equal_single_runs(engine):
    alone = [engine.generate([prompt], 40, temperature=0)[0].ids for prompt in PROMPTS]
    stop = {alone[0][3], alone[1][9], alone[3][20]}
    alone = [engine.generate([prompt], 40, temperature=0, stop=stop)[0] for prompt in PROMPTS]
    assert len({len(c.ids) for c in alone}) >= 3        # rows end at different times
    together = engine.generate(PROMPTS, 40, temperature=0, stop=stop)
    twice = engine.generate(PROMPTS, 40, 2, temperature=0, stop=stop)
    assert together == alone and twice == [c for c in alone for _ in range(2)]


def test_rows_of_a_batch_equal_single_runs(engine):
    check_rows_equal_single_runs(engine)


def check_each_row_has_its_own_end(engine):
    """Prompts that leave 1, 4, 44 and 60 tokens of 64; the first to end are the longest ones."""
    prompts = [list(range(1, n + 1)) for n in (63, 20, 60, 4)]
    alone = [engine.generate([prompt], 99, temperature=0)[0] for prompt in prompts]
    assert [len(completion.ids) for completion in alone] == [1, 44, 4, 60]
    assert engine.generate(prompts, 99, temperature=0) == alone
    assert engine.generate(prompts[1:], 50, 3, temperature=0) == [
        engine.generate([prompt], 50, temperature=0)[0] for prompt in prompts[1:] for _ in range(3)]


def test_a_long_prompt_does_not_cut_the_replies_of_its_batch(engine):
    check_each_row_has_its_own_end(engine)


def test_a_row_that_stops_early_may_wait_beside_others_until_the_cache_is_full(engine):
    model = noisy(engine.model.config, seed=29, std=0.4)    # repeats itself less
    engine = Engine(model, engine.tokenizer, python=None)
    prompts = [[5] * 55, [7] * 6, [9] * 7, [11] * 8]
    alone = [engine.generate([prompt], 99, temperature=0)[0] for prompt in prompts]
    stop = {alone[0].ids[1]}
    alone = [engine.generate([prompt], 99, temperature=0, stop=stop)[0] for prompt in prompts]
    assert len(alone[0].ids) <= 2 and max(len(completion.ids) for completion in alone) > 9
    assert engine.generate(prompts, 99, temperature=0, stop=stop) == alone


def test_a_row_that_ended_costs_nothing_in_the_next_step(engine, monkeypatch):
    fed = []
    feed = Scheduler.feed

    def watched(self, rows):
        assert not any(row.finish for row in rows)
        fed.append(len(rows))
        return feed(self, rows)
    monkeypatch.setattr(Scheduler, "feed", watched)
    check_rows_equal_single_runs(engine)
    last = fed[-fed[::-1].index(max(fed)):]             # of the last batch, from its full size on
    assert max(fed) >= 5 and fed[-1] < max(fed) and sorted(last, reverse=True) == last


def test_a_stop_token_is_the_last_and_ends_the_row(tokenizer):
    for end in ("<|im_end|>", "<|endoftext|>", "z"):
        engine, ids = writing(tokenizer, "ab", end, "never")
        found = engine.generate([""], 50, stop=tokenizer.encode_ordinary("z"))[0]
        assert (found.ids, found.finish) == (ids[:3], "stop"), end
        assert engine.reply_text(found) == "ab"
    found = engine.generate([""], 2)[0]
    assert (found.ids, found.finish) == (ids[:2], "length")


def test_context_is_never_exceeded_and_a_prompt_must_leave_room(engine):
    assert len(engine.generate([list(range(60))], 99)[0].ids) <= 4
    for prompt in (list(range(64)), []):
        with pytest.raises(ValueError, match="1 to 63"):
            engine.generate([prompt], 1)


def test_generation_leaves_the_models_mode_as_it_was(engine):
    for mode in (True, False):
        engine.model.train(mode)
        engine.generate(["a"], 1)
        assert engine.model.training == mode


def test_answers_do_not_depend_on_the_batch_size(engine):
    conversations = ["Hi", [dict(role="system", content="Hm."), dict(role="user", content="?")]]
    found = [engine.answer(conversations, batch_size=n, max_new_tokens=12, temperature=0)
             for n in (1, 64)]
    prompt = engine.tokenizer.render([dict(role="user", content="Hi")], for_completion=True)[0]
    assert found[0] == found[1]
    assert found[0][0] == engine.reply_text(engine.generate([prompt], 12, temperature=0)[0])


# ---- tools

def called(tokenizer, *pieces, result="42 <|im_end|>"):
    """→ completion, the codes that were run, and the ids of what the tool must have forced in."""
    codes = []
    engine, ids = writing(tokenizer, *pieces, python=lambda code: codes.append(code) or result)
    forced = [tokenizer.special["<|output|>"], *tokenizer.encode_ordinary(result),
              tokenizer.special["<|/output|>"]]
    return engine.generate([""], 60, stop=tokenizer.encode_ordinary("4"))[0], codes, ids, forced


def check_tool(tokenizer):
    call = ["x", "<|python|>", "6*7", "<|/python|>"]
    n_call = 2 + len(tokenizer.encode_ordinary("6*7")) + 1
    n_forced = 2 + len(tokenizer.encode_ordinary("42 <|im_end|>"))
    found, codes, ids, forced = called(tokenizer, *call, *"?" * n_forced, "so", "<|im_end|>")
    assert codes == ["6*7"] and found.ids == ids[:n_call] + forced + ids[n_call + n_forced:]
    assert found.sampled[n_call:] == n_forced * [False] + (len(ids) - n_call - n_forced) * [True]
    assert all(found.sampled[:n_call])
    assert found.finish == "stop" and len(forced) == n_forced
    assert forced.count(tokenizer.special["<|im_end|>"]) == 0       # the name is text to a tool


def test_what_a_tool_says_is_forced_in_and_marked_unsampled(tokenizer):
    check_tool(tokenizer)


@pytest.mark.parametrize("pieces", [
    ["<|/python|>", "a", "<|im_end|>"], ["1", "<|/python|>", "<|/python|>", "<|im_end|>"]], ids=len)
def test_a_stray_closing_token_runs_nothing(pieces, tokenizer):
    found, codes, ids, _ = called(tokenizer, *pieces)
    assert codes == [] and found.ids == ids and all(found.sampled)


def test_a_second_closing_token_does_not_run_the_code_again(tokenizer):
    n_forced = 2 + len(tokenizer.encode_ordinary("42 <|im_end|>"))
    found, codes, ids, _ = called(tokenizer, "<|python|>", "1", "<|/python|>", *"?" * n_forced,
                                  "<|/python|>", "b", "<|im_end|>")
    assert codes == ["1"] and found.ids[-3:] == ids[-3:]


def test_a_call_runs_from_the_last_opening_token(tokenizer):
    _, codes, *_ = called(tokenizer, "<|python|>", "a", "<|python|>", "b", "<|/python|>", "?")
    assert codes == ["b"]


@pytest.mark.parametrize("code, expected", [
    ("6 * 7", "42"), ("print('a')\nprint('b')", "a\nb"), ("'éü'", "éü"), (" 1 + 1 ", "2"),
    ("import math\nprint(math.factorial(20))", "2432902008176640000"), ("x = 3", ""), ("None", ""),
    ("sum(i for i in range(5))", "10"), ("", ""), ("a = 5\na * 2", "10"), ("a = 5\nNone", ""),
    ("print(1)\n1 / 0", "1\nZeroDivisionError: division by zero"), ("#", ""),
    ("import sys; sys.exit(3)", "Error: exit status 3"), ("import sys; sys.exit(0)", ""),
    ("import os; os._exit(7)", "Error: exit status 7"), ("print(1); print(2)\n3", "1\n2\n3"),
 ("def f(n):\n    return n\nprint(f(3))", "3"),
    ("1 / 0", "ZeroDivisionError: division by zero"), ("{}[7]", "KeyError: 7"),
    ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("raise KeyError('k')", "KeyError: 'k'"), ("import sys; sys.exit('bye')", "bye"),
    ("import os; print(os.listdir('.'))", "[]"), ("input()", "EOFError: EOF when reading a line")])
def test_python_tool_gives_prints_values_and_errors(code, expected):
    assert run_python(code) == expected


def test_python_tool_survives_code_of_any_shape():
    assert run_python("x = 1\n" * 33_000 + "print(7)") == "7"
    assert "null" in run_python("print(1)\0")
    assert "SyntaxError" in run_python("def f(:")
    for code in ("(" * 200_000, "\ud800", "1+" * 50_000 + "1", "#" * 200_000):
        assert isinstance(run_python(code), str)


@pytest.mark.parametrize("code, expected", [
    ("while True: pass", "TimeoutError: no result after 1 s"),
    ("import time; time.sleep(99)", "TimeoutError: no result after 1 s"),
    ("'x' * 10 ** 10", "MemoryError"), ("x = []\nwhile True: x.append('x' * 10 ** 6 + str(len(x)))",
                                        "MemoryError"),
    ("while True: print('y' * 99)", "y" * 99), ("print('y' * 10 ** 4)", "y" * 400),
    ("print('y' * 10 ** 7)", "y" * 300),
    ("import sys\nwhile True: sys.stderr.write('e' * 99)", "e" * 99)])
def test_python_tool_is_bounded_in_time_memory_and_output(code, expected):
    started = time.time()
    result = run_python(code, timeout=1.0)
    assert result.startswith(expected) and len(result) <= 400 and time.time() - started < 5


@pytest.mark.parametrize("code", [
    "open('/etc/passwd').read()", "open('x.txt', 'w')", "open('/proc/self/environ').read()",
    "import os; open(f'/proc/{os.getppid()}/environ').read()", "import os; open(os.__file__, 'a')",
    "import os; os.open('/etc/passwd', os.O_RDONLY)", "import os; os.open('x', os.O_CREAT | 1)",
    "import pathlib; pathlib.Path('/etc/hostname').read_bytes()", "open(b'/etc/passwd')",
    "import socket; socket.create_connection(('127.0.0.1', 80))", "import os; os.remove('/tmp/x')",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1')", "import os; os.fork()",
    "import subprocess; subprocess.run(['true'])", "import os; os.system('true')",
    "import ctypes; ctypes.CDLL(None)", "import os; os.kill(os.getppid(), 15)"])
def test_python_tool_refuses_files_network_and_processes(code):
    assert re.search("not allowed|ImportError", run_python(code))


@pytest.mark.parametrize("code", [
    "import sys; open(sys.base_prefix + '/..' * 9 + '/etc/passwd').read()",
    "import sqlite3; sqlite3.connect('x.db').execute('create table t (a)')",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"])
def test_python_tool_refuses_ways_around_its_guard(code):
    assert re.search("not allowed|ImportError|ModuleNotFound", run_python(code))


def test_much_output_hides_no_error_and_a_crash_does_not_look_like_success():
    said = run_python("print('y' * 999)\n1 / 0")
    assert len(said) == 400 and said.endswith("y\nZeroDivisionError: division by zero")
    crash = "import sys; sys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nprint('a', flush=True); f()"
    assert re.fullmatch("a\n(Error: .*|.*Error.*)", run_python(crash))
    assert sample.failure(-9, "", "") == "Error: killed by signal 9"


GUARD_OFF = """
import sys
main = sys.modules["__main__"]
main.guard.__code__ = (lambda event, args: None).__code__
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    if libc.syscall(*args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
ATTEMPTS = [        # each would be done if only the guard were there
    "open('/etc/passwd').read()", "open('x', 'w')", "open('/proc/self/environ').read()",
    "open(f'/proc/{os.getppid()}/cmdline').read()", "os.open('/etc/passwd', os.O_RDONLY)",
    "os.listdir('/')", "os.mkdir('x')", "os.symlink('a', 'b')", "os.mkfifo('x')", "os.mknod('x')",
    "os.unlink('/etc/hostname')", "os.chmod('.', 0o777)", "os.utime('.')", "os.chown('.', 1, 1)",
    "os.rename('/etc/hostname', 'x')", "os.truncate('/etc/hostname', 0)", "os.setxattr('.', 'user.a', b'b')",
    "import socket; socket.create_connection(('127.0.0.1', 80))",
    "import _socket; _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)",
    "import socket; socket.socket(socket.AF_UNIX)", "import socket; socket.socketpair()",
    "os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])",
    "import subprocess; subprocess.run(['true'])", "assert os.system('true') == 0, 'not permitted'",
    "import multiprocessing; p = multiprocessing.Process(); p.start()",
    "os.kill(os.getppid(), 9)", "os.killpg(os.getpgid(os.getppid()), 9)", "os.pidfd_open(os.getppid())",
    "import signal; signal.pidfd_send_signal(0, 9)", "os.setsid()", "os.setpriority(0, 0, 1)",
    "os.sched_setaffinity(0, {0})", "os.chroot('.')", "os.memfd_create('x')", "os.setuid(0)",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "import _xxsubinterpreters as s; s.run_string(s.create(), 'open(\"/etc/passwd\")')",
    "import readline; readline.write_history_file('x')", "import sqlite3; sqlite3.connect('x').execute('create table t (a)')",
    "import pwd; pwd.getpwall()[0]", "call(425, 8, None)", "call(435, None, 0)", "call(0x40000000 | 41, 2, 1, 0)",
    "call(9999)", "call(157, 1, 0, 0, 0, 0)", "call(101, 0, 0, 0, 0)"]


@pytest.mark.skipif(sys.platform != "linux", reason="the locks are Linux's")
@pytest.mark.parametrize("code", ATTEMPTS)
def test_the_kernel_refuses_what_the_guard_would_if_it_were_still_on(code):
    if "guard alone" in sample.enclosure()[1]:
        pytest.skip(sample.enclosure()[1])
    refused = ("Error: |denied|permitted|No such file|not implemented|No module|NotFound|unable to open|"
               "index out of range|Resource temporarily|Read-only")
    said = run_python(f"{GUARD_OFF}\n{code}\nprint('done')")
    assert "done" not in said and re.search(refused, said), said


def test_the_same_code_runs_without_the_locks_so_that_the_test_can_fail(tmp_path):
    code = f"{GUARD_OFF}\nprint(len(open('/etc/passwd').read()) > 0, call(39))"
    source = (ROOT / "python_tool.py").read_text().replace("    problem = lock()", "    problem = ''")
    said = sample.run_tool([sys.executable, "-I", "-S", "-c", source], code)
    assert said == "True None"


def test_useful_modules_and_threads_work_inside_the_locks():
    found = run_python("import math, json, re, random, datetime, fractions, decimal, statistics\n"
                       "import itertools, collections, functools, threading, zoneinfo, hashlib, time\n"
                       "t = threading.Thread(target=lambda: print('thread'))\nt.start(); t.join()\n"
                       "time.sleep(0.01); random.random(); math.comb(50, 3)")
    assert found == "thread\n19600"


def test_the_tool_dies_with_its_parent():
    code = "from sample import run_python; run_python('import time; time.sleep(50)', timeout=60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    children = []
    deadline = time.time() + 60
    while time.time() < deadline and not any("sleep" in name or "python" in name for name in children):
        time.sleep(0.3)
        tasks = open(f"/proc/{parent.pid}/task/{parent.pid}/children").read().split()
        started = [pid for pid in tasks if time.time() - os.stat(f"/proc/{pid}").st_ctime > 2]
        children = [open(f"/proc/{pid}/cmdline").read() for pid in started]
    parent.kill()
    parent.wait()
    time.sleep(1)
    alive = [pid for pid in started if os.path.exists(f"/proc/{pid}")
             and "(zombie)" not in open(f"/proc/{pid}/status").read()]
    assert children and not alive


def test_parents_environment_is_invisible_to_the_tool(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "hidden")
    found = run_python("import os; print(dict(os.environ), os.getcwd())")
    assert "SECRET" not in found and "HOME" not in found and os.getcwd() not in found


# ---- text as it comes

def test_streaming_joins_characters_split_over_tokens(tokenizer):
    text = "né中😀!"
    ids = [*text.encode(), tokenizer.special["<|im_end|>"]]     # ids 0 … 255 are bytes
    pieces = list(Engine(Scripted(ids, tokenizer.n_vocab), tokenizer).stream("", 50))
    assert "".join(piece for _, piece in pieces) == text
    assert [token for token, _ in pieces] == [*ids, None]
    assert all("\ufffd" not in piece for _, piece in pieces)
    cut = Engine(Scripted(ids, tokenizer.n_vocab), tokenizer).stream("", len(ids) - 3)
    assert "".join(piece for _, piece in cut) == text[:-2] + "\ufffd"


def test_streaming_writes_what_generate_does(engine):
    ids = [token for token, _ in engine.stream("Return", 20, temperature=0.9, seed=4)]
    assert ids == [*engine.generate(["Return"], 20, temperature=0.9, seed=4)[0].ids, None]


# ---- the terminal

def test_newest_run_of_a_stage_is_found(tmp_path, base_run):
    model, _ = load_checkpoint(base_run)
    for age, (name, stage) in enumerate(dict(a="pretrain", b="sft", c="sft", d="rl").items()):
        save_checkpoint(tmp_path / name, model, stage=stage)
        os.utime(tmp_path / name / "config.json", (age, age))
    assert find_run(None, ("sft",), tmp_path) == tmp_path / "c"
    assert find_run(None, ("pretrain", "rl"), tmp_path) == tmp_path / "d"
    assert find_run(tmp_path / "a", ("sft",)) == tmp_path / "a"
    with pytest.raises(SystemExit, match="stage reward; "):
        find_run(None, ("reward",), tmp_path)


@pytest.mark.parametrize("name, said", [
    ("minw", "minw is not a run's folder; did you mean runs/mine[?]$"),
    ("runs/mien", "runs/mien is not a run's folder; did you mean runs/mine[?]$"),
    ("gpt-2", "gpt-2 is not a run's folder; did you mean gpt2 or gpt2-xl[?]"),
    ("quite/another", "another is not a run's folder; the runs here are runs/mine, runs/zzz$"),
    ("runs/empty", "runs/empty holds no model, because it has no config.json; ")])
def test_a_mistyped_run_is_one_line_that_names_the_nearest(name, said, tmp_path, base_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    for run in ("mine", "zzz"):
        (tmp_path / "runs" / run).symlink_to(base_run)
    with pytest.raises(SystemExit, match=said) as error:
        find_run(name)
    assert "\n" not in str(error.value)


def test_without_any_run_a_mistyped_one_says_how_to_train_one(tmp_path):
    with pytest.raises(SystemExit, match="none is not a run's folder; train a model with"):
        find_run("none", root=tmp_path)


def test_a_run_with_a_damaged_config_is_not_taken_for_the_newest(tmp_path, base_run):
    shutil.copytree(base_run, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    for text in ("{", "[]", '{"deepdive": 3}', "{}"):
        (tmp_path / "bad" / "config.json").write_text(text)
        assert find_run(None, ("pretrain",), tmp_path) == tmp_path / "good"


@pytest.fixture
def gpt2(tokenizer, tmp_path, monkeypatch):
    """A folder in which "gpt2" has been downloaded: a tiny one, with this tokenizer for OpenAI's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample.Tokenizer, "pretrained", lambda name: tokenizer)
    config = GPTConfig(64, tokenizer.n_vocab - len(tokenizer.special) + 1, 1, 2, 32)
    monkeypatch.setattr(sample, "GPT2_VOCAB", config.vocab_size)
    save_checkpoint("data/openai/gpt2", noisy(config))
    described = json.loads(Path("data/openai/gpt2/config.json").read_text())
    del described["deepdive"]
    Path("data/openai/gpt2/config.json").write_text(json.dumps(described))
    message = dict(role="user", content="Hi")
    Path("chat.jsonl").write_text(json.dumps(dict(messages=[message, dict(message, role="assistant")])))
    Path("tasks.jsonl").write_text('{"question": "Hi", "answer": "Hi", "check": "contains"}\n')


@pytest.mark.parametrize("module, flags", [
    ("sample", "--model gpt2 --prompt Hi --max_new_tokens 3"),
    ("chat_sft", "--model gpt2 --data chat.jsonl --batch_size 1 --out out"),
    ("eval", "--model gpt2 --tasks tasks.jsonl --max_new_tokens 3"),
    ("rl_grpo", "--model gpt2 --task tasks.jsonl --max_steps 1 --prompts 1 --group_size 2 "
     "--max_new_tokens 3 --out out"),
    ("train_gpt2", "--init_from gpt2 --data DATA --max_steps 1 --batch_size 1 "
     "--total_batch_size 64 --seq_len 64 --out out")], ids=lambda value: value.split()[0])
def test_gpt2_may_be_named_wherever_a_run_is_expected(module, flags, gpt2, data, capsys):
    run_main(importlib.import_module(module), *flags.replace("DATA", str(data)).split())
    assert "data/openai/gpt2" in capsys.readouterr().out or Path("out/model.safetensors").exists()


def test_a_model_with_a_header_without_limit_is_refused_before_it_is_read(base_run, tmp_path):
    run = shutil.copytree(base_run, tmp_path / "run")
    (run / "model.safetensors").write_bytes((90 << 20).to_bytes(8, "little") + b"{" * 99)
    with pytest.raises(SystemExit, match="is damaged: its header would have 94371840 bytes"):
        find_run(str(run))


def test_chat_refuses_a_base_model_unless_told(base_run, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="base model.*; name a model"):
        run_main(sample, "--chat", "--model", base_run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    run_main(sample, "--model", base_run, "--allow_base", "--max_new_tokens", 2)
    assert "user: Hi\nassistant: " in capsys.readouterr().out


# ---- without a flag

@pytest.fixture
def runs(base_run, tmp_path, monkeypatch):
    """A folder whose newest run is an assistant."""
    monkeypatch.chdir(tmp_path)
    model, _ = load_checkpoint(base_run)
    for age, stage in enumerate(("pretrain", "sft")):
        save_checkpoint(f"runs/{stage}", model, sample.load_tokenizer(base_run), stage=stage)
        os.utime(f"runs/{stage}/config.json", (age, age))


def test_alone_it_talks_with_the_newest_assistant(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nWell"))
    run_main(sample, "--max_new_tokens", 2)
    out = capsys.readouterr().out
    assert out.startswith("runs/sft: stage sft, step 0, ") and out.count("\nassistant: ") == 2
    assert "user: Well\n" in out


def test_without_a_question_it_says_why_it_prints_nothing(runs, monkeypatch):
    for stdin in (io.StringIO("\n\n"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit, match="nothing was asked: .*; give a --prompt"):
            run_main(sample)


def test_an_assistant_continues_a_prompt_as_a_document(runs, capsys):
    run_main(sample, "--prompt", "Return", "--max_new_tokens", 2)
    out = capsys.readouterr().out
    assert "runs/sft" in out and "-\nReturn" in out and "assistant:" not in out


def test_a_base_model_without_a_prompt_begins_a_document_and_says_so(runs, capsys):
    run_main(sample, "--model", "runs/pretrain", "--max_new_tokens", 2)
    assert "begins after <|endoftext|>" in capsys.readouterr().out


def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(base_run):
    command = [sys.executable, "sample.py", "--model", base_run, "--num_samples", "500"]
    for end in ("signal", "pipe"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        if end == "signal":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        assert process.wait(60) in (130, 141) and process.stderr.read() == b"", end


@pytest.mark.parametrize("flags, said", [
    (["--top", "0"], "--top must be at least 1, got 0"), (["--top", "5000"], "--top must be at most 400"),
    (["--num_samples", "0"], "--num_samples must be at least 1"),
    (["--max_new_tokens", "-1"], "--max_new_tokens must be at least 1, got -1"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--device", "foo"], "--device must be auto"),
    (["--file", "nothing.txt"], "--file nothing.txt cannot be read"),
    (["--prompt", "a", "--file", "b"], "--prompt and --file exclude each other; leave one out"),
    (["--chat", "--prompt", "a"], "--chat and --prompt exclude each other"),
    (["--system", "a", "--top", "3"], "--chat and --top exclude each other"),
    (["--logprobs", "a", "--prompt", ""], "--logprobs and --prompt exclude each other"),
    (["--few_shot", "a"], "--few_shot needs --prompt TEXT"), (["--stop", ""], "--stop must be")])
def test_a_bad_flag_is_one_line(flags, said, base_run):
    with pytest.raises(SystemExit, match=f"^{said}") as error:
        run_main(sample, "--model", base_run, *flags)
    assert "\n" not in str(error.value)


def test_the_command_writes_the_same_text_twice(base_run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Return the\n")
    outputs = []
    for prompt in (["--prompt", "Return the"], ["--file", tmp_path / "prompt.txt"]):
        run_main(sample, "--model", base_run, *prompt, "--num_samples", 2, "--max_new_tokens", 8)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].count("Return the") == 2
    assert f"{base_run}: stage pretrain, step 0" in outputs[0]


# ---- mutants

@pytest.mark.parametrize("owner, name, old, new, check", [
    (Scheduler, "leave", "self.move(self.running, row.slot)", "pass", check_rows_equal_single_runs),
    (Scheduler, "add", ", self.block_size)", ", 99)", check_each_row_has_its_own_end),
    (Scheduler, "copy_prefix", "self.cache.copy(donor.slot, row.slot, n)", "pass",
     check_each_row_has_its_own_end),
    (Scheduler, "move", "self.cache.copy(source, target, row.cached)", "pass", check_rows_equal_single_runs),
    (engine_room, "next_token_probs", "logits.argmax", "logits.argmin", check_greedy),
    (engine_room, "next_token_probs", "logits / temperature", "logits", check_frequencies)],
    ids=lambda value: value if isinstance(value, str) else "")
def test_checks_of_the_loop_notice_a_mutant(owner, name, old, new, check, engine, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, RuntimeError, IndexError, AttributeError)):
        check(engine)


@pytest.mark.parametrize("owner, name, old, new", [
    (Scheduler, "force", "token, False", "token, True"),
    (Scheduler, "append", "if sampled and token in", "if token in"),
    (Engine, "calls_tool", "ids[-1] in self.tools", "ids[-1] in self.tools and len(ids) > 9")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_check_of_the_tool_notices_a_mutant(owner, name, old, new, tokenizer, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises(AssertionError):
        check_tool(tokenizer)


@pytest.mark.parametrize("old, new", [
    ("before * penalty)", "before / penalty)"), ("before > 0", "before < 0"),
    ("sorted(set(ids))", "ids[-9:]")], ids=lambda value: value)
def test_oracle_of_the_penalty_notices_a_mutant(old, new, monkeypatch):
    mutate(monkeypatch, engine_room, "penalize", old, new)
    with pytest.raises(AssertionError):
        check_penalty()


@pytest.mark.parametrize("old, new", [
    ("before >= top_p", "ends >= top_p"), (".values[:, -1:]", ".values[:, :1]"),
    ("top_p * ends[:, -1:]", "top_p"), ("min_p * probs.amax(-1, keepdim=True)", "min_p"),
    (".scatter_(1, order, ", ".logical_or_(")],
    ids=lambda value: value)
def test_twin_of_the_cuts_notices_a_mutant(old, new, monkeypatch):
    mutate(monkeypatch, engine_room, "next_token_probs", old, new)
    monkeypatch.setitem(globals(), "next_token_probs", engine_room.next_token_probs)
    with pytest.raises(AssertionError):
        for cut in CUTS:
            check_cuts(**cut)


def test_openais_gpt2_is_read_with_gpt2s_tokenizer(base_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample.Tokenizer, "pretrained", asked.append)
    assert sample.load_tokenizer(tmp_path) is None and asked == ["gpt2"]
    assert sample.load_tokenizer(base_run).n_vocab == 400
    for size, known in ((8192, False), (50256, False), (50257, True), (50304, True)):
        (tmp_path / "config.json").write_text(json.dumps(dict(vocab_size=size)))
        with contextlib.nullcontext() if known else pytest.raises(
                SystemExit, match=f"has no tokenizer, and its model's {size} tokens are not GPT-2"):
            sample.load_tokenizer(tmp_path)
    assert asked == ["gpt2"] * 3


def test_a_checkpoint_in_hfs_format_with_another_tokenizer_than_gpt2s_is_refused(
        tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.Tokenizer, "pretrained", lambda name: tokenizer)     # takes GPT-2's place
    tokenizer.export_hf(tmp_path / "tokenizer.json")
    assert sample.has_tokenizer(tmp_path) and sample.load_tokenizer(tmp_path) is tokenizer
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert sample.load_tokenizer(tmp_path) is tokenizer
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    for text in (json.dumps(vocab), "[]", "no json"):
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(SystemExit, match="vocab.json is not GPT-2's tokenizer, .*; put the"):
            sample.load_tokenizer(tmp_path)
