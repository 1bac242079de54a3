"""
engine.py: a text written in company equals the same text written alone, whatever its neighbours do;
what the cache holds is not read again; places are given in order and freed at once.
"""
import math
import random
import threading
from dataclasses import replace

import pytest
import torch

import engine as engine_room
from conftest import GPT2, MODERN, in_fp64, mutate, noisy
from engine import (CommonCache, CommonPrompts, Request, Scheduler, mix, random_share,
                    splitmix64)
from model import GPTConfig
from sample import Engine
from test_sample import writing


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = GPTConfig.preset("d2", block_size=96, vocab_size=tokenizer.n_vocab, n_head=2, n_embd=32)
    return Engine(noisy(config, seed=15, std=0.4), tokenizer, python=None)


def finish(scheduler):
    """Steps until nothing is left to do → all events."""
    events = []
    while scheduler.is_busy():
        events += scheduler.step()
    return events


def write(engine, request, rows=1):
    """The text of a request alone, and the scheduler that wrote it."""
    scheduler = Scheduler(engine, rows)
    row = scheduler.add(request)
    finish(scheduler)
    return row.written(), scheduler


def prompt(n, seed=0, start=()):
    return [*start, *random.Random(seed).choices(range(5, 300), k=n)]


def requests(n, chance):
    """Requests of all kinds. Some begin alike, so that they copy from one another."""
    starts = [prompt(20, 99), prompt(30, 98), []]
    settings = [dict(temperature=0), dict(), dict(temperature=2.0, top_k=9), dict(top_p=0.8),
                dict(min_p=0.1, repetition_penalty=1.3)]
    return [Request(prompt(chance.randint(1, 40), i, chance.choice(starts)), chance.randint(1, 25),
                    seed=chance.randrange(2 ** 64), stop=frozenset(chance.sample(range(400), 12)),
                    **chance.choice(settings)) for i in range(n)]


# ---- a text depends on its own request alone

def check_company(engine, seed=0, n=24):
    chance = random.Random(seed)
    wanted = requests(n, chance)
    scheduler, rows, events = Scheduler(engine, 6), [], {}
    while len(rows) < n or scheduler.is_busy():
        for request in wanted[len(rows):][:chance.choice([0, 0, 1, 5])]:
            rows.append(scheduler.add(request))
        if rows and chance.random() < 0.1:
            scheduler.cancel(chance.choice(rows))
        for event in scheduler.step():
            events.setdefault(event.row, []).append(event.token)
    for row, request in zip(rows, wanted):
        alone, _ = write(engine, request)
        assert row.written() == events.get(row, []) == alone[:len(row.written())]
        assert row.finish == "cancelled" or len(alone) == len(row.written())
    assert {"stop", "length", "cancelled"} <= {row.finish for row in rows}
    assert sum(row.reused > 0 for row in rows) > 3


@pytest.mark.parametrize("seed", range(3))
def test_a_text_written_in_company_is_the_one_written_alone(engine, seed):
    check_company(engine, seed)


def check_full_contexts(engine):
    """Two chats continue: 85 tokens are cached and 9 to read, 20 are cached and 12 to read. Padded
    to 12, the first would not fit into the context of 96."""
    scheduler = Scheduler(engine, 2)
    for n in (85, 20):
        scheduler.add(Request(prompt(n, n), 1))
    finish(scheduler)
    rows = [scheduler.add(Request(prompt(n, n) + prompt(more), 5)) for n, more in ((85, 10), (20, 13))]
    finish(scheduler)
    assert [row.reused for row in rows] == [85, 20]
    assert [row.written() for row in rows] == [write(engine, row.request)[0] for row in rows]


def test_padding_never_leaves_the_context(engine, monkeypatch):
    check_full_contexts(engine)
    mutate(monkeypatch, Scheduler, "next_batch", "<= self.block_size", "<= 999")
    with pytest.raises(AssertionError):
        check_full_contexts(engine)


@pytest.mark.parametrize("owner, name, old, new", [
    (engine_room, "draw_tokens", "rows[i].request.seed", "i"),
    (engine_room, "draw_tokens", "tokens[i] = token", "tokens[members[0]] = token"),
    (Scheduler, "read", "row.ids[row.cached:row.cached + n]", "row.ids[:n]"),
    (Scheduler, "longest_prefix", "shared_tokens(row.ids, other.ids)", "len(other.ids)"),
    (Scheduler, "copy_prefix", "row.slot, n)", "row.slot, n - 1)"),
    (engine_room.SlotCache, "copy", "self.v[:, target, :n] = self.v[:, source, :n]", "pass"),
    (engine_room.SlotCache, "swap", "t[:, b, :n] = of_a", "pass"),
    (engine_room.SlotCache, "lengthen", "new[:, :, :room] = old", "pass")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_that_disturbs_another_would_be_noticed(owner, name, old, new, engine, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        for seed in range(3):
            check_company(engine, seed)


def test_the_same_seed_continues_a_text_as_it_went_on_before(engine):
    request = Request(prompt(12), 30, seed=5)
    text, _ = write(engine, request)
    for n in (1, 7, 29):
        again, _ = write(engine, Request(request.ids + text[:n], 30 - n, seed=5))
        assert text[:n] + again == text
    assert write(engine, Request(request.ids, 30, seed=6))[0] != text


def test_splitmix64_gives_its_published_numbers():
    gamma, state = 0x9E3779B97F4A7C15, 1234567
    assert [splitmix64((state + i * gamma) % 2 ** 64) for i in range(3)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_shares_of_near_seeds_and_positions_are_uniform_and_independent():
    shares = torch.tensor([[random_share(mix(7, seed), at) for at in range(200)] for seed in range(200)])
    counts = torch.histc(shares, 100, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 99 + 4 * math.sqrt(198)
    for a, b in ((shares[1:], shares[:-1]), (shares[:, 1:], shares[:, :-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.02
    assert 0 <= shares.min() and shares.max() < 1


# ---- what is in the cache is not read again

def test_samples_of_one_prompt_read_it_once(engine):
    scheduler = Scheduler(engine, 8)
    rows = [scheduler.add(Request(prompt(60), 5, seed=i)) for i in range(8)]
    finish(scheduler)
    assert scheduler.positions == 60 + 8 * 4 and [row.reused for row in rows] == [0] + 7 * [59]
    assert [row.written() for row in rows] == [write(engine, row.request)[0] for row in rows]


def check_late_donor(engine):
    """The first of two samples begins like other rows, beside which it reads its last tokens."""
    scheduler = Scheduler(engine, rows=6)
    for seed in range(4):
        scheduler.add(Request(prompt(30), 20, seed=seed))
    samples = [scheduler.add(Request(prompt(34), 20, seed=seed)) for seed in range(2)]
    finish(scheduler)
    assert [row.reused for row in samples] == [30, 33]


def test_a_row_copies_its_prompt_from_a_sample_that_read_it_beside_other_rows(engine):
    check_late_donor(engine)


def test_a_row_that_does_not_copy_it_would_be_noticed(engine, monkeypatch):
    mutate(monkeypatch, Scheduler, "read_prompts",
           "self.copy_prefix(row)       # a step", "pass    # a step")
    with pytest.raises(AssertionError):
        check_late_donor(engine)


# ---- prompts that rows share

def logits_of_samples(engine, shares, patch):
    """The logits of each step of samples of four prompts, which end one after another, and how
    often the attention of CommonCache computed them."""
    found, calls = [], []
    feed, attention = Scheduler.feed, CommonCache.attention
    patch.setattr(Scheduler, "feed", lambda *given: found.append(feed(*given)) or found[-1])
    patch.setattr(CommonCache, "attention", lambda *given: calls.append(1) or attention(*given))
    if not shares:
        patch.setattr(Scheduler, "share_prompts", lambda *_: False)
    scheduler = Scheduler(engine, rows=12, keep=False)
    for i, ids in enumerate([prompt(30, 1), prompt(30, 2), prompt(34, 3), prompt(27, 4)]):
        for j in range(5):
            scheduler.add(Request(ids, 4 + i + 3 * j, seed=5 * i + j))
    finish(scheduler)
    return found, len(calls)


def check_common_prompts(config, tokenizer):
    """In fp64 the logits are those of rows that read each its own prompt."""
    with in_fp64():
        config = replace(config, vocab_size=tokenizer.n_vocab, block_size=96)
        model = noisy(config, seed=15, std=0.4).double()
        engine = Engine(model, tokenizer, python=None)
        with pytest.MonkeyPatch.context() as patch:
            found, calls = logits_of_samples(engine, True, patch)
        with pytest.MonkeyPatch.context() as patch:
            expected, none = logits_of_samples(engine, False, patch)
    assert calls > 10 * config.n_layer and none == 0 and len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_prompt_that_rows_share_is_read_once_a_step_and_changes_nothing(config, tokenizer):
    check_common_prompts(config, tokenizer)


def test_prompts_of_one_token_leave_nothing_to_share(tokenizer):
    engine = Engine(noisy(replace(GPT2, vocab_size=tokenizer.n_vocab)), tokenizer, python=None)
    samples = engine.generate([[tokenizer.eot]], 3, num_samples=8)
    assert all(len(sample.ids) == 3 or sample.finish == "stop" for sample in samples)


@pytest.mark.parametrize("owner, name, old, new", [
    (CommonCache, "append", "seen & ~is_common", "seen"),
    (CommonCache, "append", "seen & is_common", "is_common"),
    (CommonCache, "attention", "* scale + mask", "* scale"),
    (CommonPrompts, "arrange", "p * G", "0 * G"),
    (CommonPrompts, "__init__", "self.v[:, p, :, :n]", "self.v[:, 0, :, :n]"),
    (Scheduler, "find_common", "not prompts <= common.number.keys()", "False"),
    (Scheduler, "share_prompts", "self.common.rows != rows", "False")], ids=str)
def test_the_check_of_shared_prompts_notices_a_mutant(owner, name, old, new, tokenizer, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, IndexError, KeyError, RuntimeError)):
        check_common_prompts(MODERN, tokenizer)


def test_the_chat_so_far_is_not_read_again(engine):
    _, scheduler = write(engine, Request(prompt(40), 10, seed=1))
    first = scheduler.slots[0]
    row = scheduler.add(Request([*first.ids, 7, 8, 9], 10, seed=2))
    before = scheduler.positions
    finish(scheduler)
    alone, fresh = write(engine, row.request)
    assert row.written() == alone and row.reused == 49 and fresh.positions == 52 + 10
    assert scheduler.positions - before == fresh.positions - 49


def test_only_the_part_before_an_edited_message_is_kept(engine):
    _, scheduler = write(engine, Request(prompt(40), 10, seed=1), rows=2)
    row = scheduler.add(Request([*prompt(40)[:30], 7, 7, 7, 7], 10, seed=2))
    finish(scheduler)
    assert row.reused == 30 and row.written() == write(engine, row.request)[0]


def test_the_place_that_was_not_used_for_longest_is_given_away_first(engine):
    scheduler = Scheduler(engine, 3)
    texts = [prompt(20, seed) for seed in range(4)]
    for i in (0, 1, 2, 0, 3):
        row = scheduler.add(Request(texts[i], 3))
        finish(scheduler)
        texts[i] = row.ids
    assert row.reused == 0 and sorted(scheduler.slots, key=lambda row: row.arrival)[1].reused == 22
    assert sorted(texts.index(row.ids) for row in scheduler.slots) == [0, 2, 3]


def test_a_frozen_model_streams_a_chat_with_one_cache_and_a_learning_one_does_not(tokenizer):
    config = GPTConfig(block_size=96, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=16)
    engine = Engine(noisy(config), tokenizer)
    said = [i for i, _ in engine.stream(prompt(30), 9, seed=1)][:-1]
    second = list(engine.stream(prompt(30) + said, 9, seed=2))
    assert engine.kept is None
    engine.model.for_inference()
    assert list(engine.stream(prompt(30), 9, seed=1))[:-1] and engine.kept.slots[0].reused == 0
    assert list(engine.stream(prompt(30) + said, 9, seed=2)) == second
    assert engine.kept.slots[0].reused == 38


# ---- places

def test_rows_are_bounded_and_waiting_prompts_take_places_in_order(engine):
    scheduler = Scheduler(engine, 3)
    rows = [scheduler.add(Request(prompt(5, i), 4 + i, seed=i)) for i in range(9)]
    begun = {}
    while scheduler.is_busy():
        begun |= {event.row: None for event in scheduler.step()}
        assert scheduler.running <= 3 and scheduler.running + len(scheduler.waiting) <= 9
    assert list(begun) == rows and all(row.finish == "length" for row in rows)


def test_a_cancelled_row_frees_its_place_for_the_next_step(engine):
    scheduler = Scheduler(engine, 1)
    rows = [scheduler.add(Request(prompt(5, i), 50)) for i in range(3)]
    scheduler.step()
    scheduler.cancel(rows[0])
    scheduler.cancel(rows[1])
    assert {event.row for event in scheduler.step()} == {rows[2]}
    assert [row.finish for row in rows] == ["cancelled", "cancelled", None]
    scheduler.cancel(rows[2])
    scheduler.cancel(rows[2])
    assert not scheduler.is_busy() and scheduler.step() == []


def test_a_long_prompt_does_not_stop_the_others(engine, monkeypatch):
    monkeypatch.setattr(engine_room, "READ_TOKENS", 16)
    scheduler = Scheduler(engine, 4)
    first = scheduler.add(Request(prompt(3), 40, seed=1))
    scheduler.step()
    late = [scheduler.add(Request(prompt(80, i), 3, seed=i)) for i in range(3)]
    while not first.finish:
        before = scheduler.positions
        assert first in [event.row for event in scheduler.step()]
        assert scheduler.positions - before <= 16 + 4
    finish(scheduler)
    assert [row.written() for row in late] == [write(engine, row.request)[0] for row in late]


def test_the_cache_is_as_long_as_the_longest_text_needs(engine):
    _, short = write(engine, Request(prompt(5), 5))
    _, long = write(engine, Request(prompt(70), 99))
    assert short.cache.k.shape[2] == 5 + 64 and long.cache.k.shape[2] == 96


# ---- events

def test_log_probabilities_are_those_of_the_model_without_a_cache(engine):
    scheduler = Scheduler(engine, 3)
    scheduler.add(Request(prompt(8), 5))
    row = scheduler.add(Request(prompt(9), 5, temperature=3.0, top=4))
    alone = scheduler.add(Request(prompt(10), 5, top=0))
    events = finish(scheduler)
    logits = engine.model(torch.tensor([row.ids[:-1]]))[0, 8:, :engine.n_vocab]
    for event, expected in zip([e for e in events if e.row is row], torch.log_softmax(logits, -1)):
        assert event.logprob == pytest.approx(expected[event.token].item(), abs=1e-4)
        values, ids = expected.topk(4)
        assert [i for i, _ in event.alternatives] == ids.tolist()
        assert [p for _, p in event.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
    assert [e.alternatives for e in events if e.row is alone] == 5 * [[]]
    assert [e.logprob for e in events if e.row not in (row, alone)] == 5 * [None]


def test_a_tool_forces_its_tokens_into_its_own_row(tokenizer):
    engine, ids = writing(tokenizer, "<|python|>", "6*7", "<|/python|>", *"?????", "<|im_end|>",
                          python=lambda code: f"{code} is 42")
    forced = [tokenizer.special["<|output|>"], *tokenizer.encode_ordinary("6*7 is 42"),
              tokenizer.special["<|/output|>"]]
    scheduler = Scheduler(engine, 2)
    row = scheduler.add(Request([0], 50, temperature=0))
    events = finish(scheduler)
    n = ids.index(tokenizer.special["<|/python|>"]) + 1
    assert row.written()[n:n + len(forced)] == forced
    assert [e.sampled for e in events][n - 1:n + len(forced) + 1] == [True, *[False] * len(forced), True]


def test_a_slow_tool_stops_no_other_row_and_changes_no_text(tokenizer):
    answer = threading.Event()
    engine, _ = writing(tokenizer, "a", "<|python|>", "1", "<|/python|>", *"?????", "<|im_end|>",
                        python=lambda code: str(answer.wait(60)))
    scheduler = Scheduler(engine, 2, tool_threads=1)
    slow = scheduler.add(Request([0], 30, temperature=0))
    for _ in range(6):
        scheduler.step()
    assert slow.call
    other = scheduler.add(Request([7, 7, 7, 7, 7], 9, temperature=0))
    while not other.finish:
        assert {event.row for event in scheduler.step()} <= {other}
    assert slow.call and len(slow.written()) == 4 and other.finish == "length"
    answer.set()
    finish(scheduler)
    assert slow.written() == write(engine, slow.request)[0] and slow.finish == "length"


@pytest.mark.parametrize("changed, said", [
    (dict(ids=[]), "a prompt has 0 tokens, but the model reads 1 to 95; shorten it"),
    (dict(ids=[1] * 96), "a prompt has 96 tokens"), (dict(temperature=-1), "temperature must be"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0")], ids=str)
def test_a_request_out_of_range_is_refused(changed, said, engine):
    scheduler = Scheduler(engine)
    with pytest.raises(ValueError, match=said):
        scheduler.add(Request(**dict(dict(ids=[1]), **changed)))
    assert not scheduler.is_busy()
