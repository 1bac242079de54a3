"""
The conversation in the terminal and what else is shown there, with scripted models: what a user
types is taken from a list, and what is printed is compared with what must be said.
"""
import builtins
import re

import pytest
import torch

import chat
import show
from conftest import noisy
from model import GPTConfig
from sample import Engine
from test_sample import Scripted, writing


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    return Engine(noisy(config, seed=15, std=0.4), tokenizer, python=None)


# ---- the conversation

def test_chat_goes_on_from_what_was_said(tokenizer, monkeypatch, capsys):
    asked, prompts = iter(["Hi", "And?", ""]), []
    engine, _ = writing(tokenizer, "?")

    def stream(prompt, *args, **kwargs):
        prompts.append(tokenizer.decode(prompt))
        ids = [*tokenizer.encode_ordinary("Yes."), tokenizer.special["<|im_end|>"]]
        yield from [(i, "." if i == ids[-2] else "") for i in ids] + [(None, "")]

    monkeypatch.setattr(builtins, "input", lambda _: next(asked))
    monkeypatch.setattr(engine, "stream", stream)
    chat.chat(engine, "Be brief.", 9, 0, {})
    im = "<|im_start|>{}<|im_sep|>".format
    first = f"<|endoftext|>{im('system')}Be brief.<|im_end|>{im('user')}Hi<|im_end|>"
    first += im("assistant")
    second = f"{first}Yes.<|im_end|>{im('user')}And?<|im_end|>{im('assistant')}"
    assert prompts == [first, second] and capsys.readouterr().out.count("assistant: .") == 2


def test_a_long_chat_forgets_its_oldest_turns_and_says_so_once(tokenizer, monkeypatch, capsys):
    engine, _ = writing(tokenizer, *"?" * 200, "<|im_end|>")        # 200 tokens do not fit in 256
    questions = iter([*(f"Question {n}?" for n in range(9)), "x" * 900, "Again?", ""])
    seen = []

    def stream(ids, *args, **kwargs):
        seen.append(engine.tokenizer.parse(ids))
        yield from [(i, "") for i in tokenizer.encode_ordinary("Yes. " * 9)] + [(None, "")]

    monkeypatch.setattr(builtins, "input", lambda _: next(questions))
    monkeypatch.setattr(engine, "stream", stream)
    chat.chat(engine, "Be brief.", 64, 0, {})
    out = capsys.readouterr().out
    assert out.count("forgets the oldest turns") == 1 and out.count("too long") == 1
    assert all(messages[0]["role"] == "system" and messages[1]["role"] == "user" for messages in seen)
    assert "Question 8?" in str(seen[8]) and "Question 0?" not in str(seen[8])
    assert "Question 8?" in str(seen[9]) and "xxx" not in str(seen[9])


# ---- what is shown

@pytest.mark.parametrize("text, shown", [
    ("a\tb\n", "a\tb\n"), ("\x1b[2J", r"\x1b[2J"), ("\r\x07\x9b\x7f", r"\r\x07\x9b\x7f"),
    ("é中😀", "é中😀"), ("\u202egnp", r"\u202egnp")])
def test_control_characters_never_reach_the_terminal(text, shown):
    assert show.printable(text) == shown


def test_what_a_prompt_and_a_model_write_is_shown_printable(tokenizer, capsys):
    ids = [*b"a\x1b[31mb\xe4\xb8\xad", tokenizer.special["<|im_end|>"]]
    engine = Engine(Scripted(ids, tokenizer.n_vocab), tokenizer)
    show.show_samples(engine, "\x1b", 1, 50, 0, {})
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b\x1b[31mb中" in out      # one of the prompt, one of the model


def test_a_token_that_is_not_a_whole_character_is_shown_as_bytes(tokenizer):
    shown = [show.show_token(tokenizer, i) for i in (*"é".encode(), ord("a"), 27)]
    assert shown == ["<c3>", "<a9>", "'a'", r"'\x1b'"]


def test_bars_show_the_models_probabilities_and_the_drawn_token(engine, capsys):
    show.show_steps(engine, "Return", 5, 2, 0, dict(temperature=0))
    rows = re.findall(r"^ *(\d+)  .* +([\d.]+)% █* (←?)", capsys.readouterr().out, re.M)
    ids = [engine.tokenizer.eot, *engine.tokenizer.encode_ordinary("Return")]
    for step in (0, 5):
        p, order = torch.softmax(engine.model(torch.tensor([ids]))[0, -1], 0).topk(5)
        assert [int(i) for i, _, _ in rows[step:step + 5]] == order.tolist()
        shown = [float(share) / 100 for _, share, _ in rows[step:step + 5]]
        assert shown == pytest.approx(p.tolist(), abs=6e-4)
        assert [mark for _, _, mark in rows[step:step + 5]] == ["←", "", "", "", ""]
        ids.append(order[0].item())
