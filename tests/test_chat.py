"""
The conversation in the terminal and what else is shown there, with scripted models: what a user
types is taken from a list, and what is printed is compared with what must be said.
"""
import io
import json
import math
import re
import sys

import pytest
import torch

import few_shot
import sample
import show
from chat import Chat, Shown
from conftest import noisy, run_main
from dialogs import read_conversations
from model import GPTConfig
from sample import Engine
from test_sample import Scripted, writing


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    return Engine(noisy(config, seed=15, std=0.4), tokenizer, python=None)


def typed(monkeypatch, *lines):
    """What the user types, line by line, before Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))


# ---- the conversation

def test_chat_goes_on_from_what_was_said(tokenizer, monkeypatch, capsys):
    prompts = []
    engine, _ = writing(tokenizer, "?")

    def stream(prompt, *args, **kwargs):
        prompts.append(tokenizer.decode(prompt))
        ids = [*tokenizer.encode_ordinary("Yes."), tokenizer.special["<|im_end|>"]]
        yield from [(i, "." if i == ids[-2] else "") for i in ids] + [(None, "")]

    typed(monkeypatch, "Hi", "", "And?")
    monkeypatch.setattr(engine, "stream", stream)
    assert Chat(engine, "Be brief.", 9, 0, {}).run() == 2
    im = "<|im_start|>{}<|im_sep|>".format
    first = f"<|endoftext|>{im('system')}Be brief.<|im_end|>{im('user')}Hi<|im_end|>"
    first += im("assistant")
    second = f"{first}Yes.<|im_end|>{im('user')}And?<|im_end|>{im('assistant')}"
    assert prompts == [first, second] and capsys.readouterr().out.count("assistant: .") == 2


def test_a_long_chat_forgets_its_oldest_turns_and_says_so_once(tokenizer, monkeypatch, capsys):
    engine, _ = writing(tokenizer, *"?" * 200, "<|im_end|>")        # 200 tokens do not fit in 256
    seen = []

    def stream(ids, *args, **kwargs):
        seen.append(engine.tokenizer.parse(ids))
        yield from [(i, "") for i in tokenizer.encode_ordinary("Yes. " * 9)] + [(None, "")]

    typed(monkeypatch, *(f"Question {n}?" for n in range(9)), "x" * 900, "Again?")
    monkeypatch.setattr(engine, "stream", stream)
    conversation = Chat(engine, "Be brief.", 64, 0, {})
    conversation.run()
    out = capsys.readouterr().out
    assert out.count("forgets the oldest turns") == 1 and out.count("too long") == 1
    assert all(messages[0]["role"] == "system" and messages[1]["role"] == "user" for messages in seen)
    assert "Question 8?" in str(seen[8]) and "Question 0?" not in str(seen[8])
    assert "Question 8?" in str(seen[9]) and "xxx" not in str(seen[9])
    assert len(conversation.said) == 21 and "Question 0?" in str(conversation.said)


COMMANDS = [
    ("/reset", "This is a new conversation"), ("/help", "/save FILE.jsonl"),
    ("/nothing", "no command /nothing; /help"), ("/temperature 0.5", "The temperature is 0.5"),
    ("/temperature", "at least 0, got none; it stays 1"), ("/temperature x", "at least 0, got x"),
    ("/temperature -1", "got -1"), ("/temperature nan", "got nan"), ("/temperature inf", "got inf"),
    ("/system Ho.", "with a new system message"), ("/system", "with no system message"),
    ("/system " + "x" * 900, "system message is too long: "), ("/save a.jsonl", "nothing to save"),
    ("/save a.txt", "ends in .jsonl"), ("/save", "ends in .jsonl")]


@pytest.mark.parametrize("line, said", COMMANDS, ids=lambda value: value[:16])
def test_each_command_says_what_it_did_or_what_is_wrong(line, said, tokenizer, monkeypatch, capsys):
    engine, _ = writing(tokenizer, "?")
    typed(monkeypatch, line)
    assert Chat(engine, None, 9, 0, {}).run() == 0
    assert said in capsys.readouterr().out


def test_commands_change_what_the_next_reply_is_drawn_from(tokenizer, monkeypatch):
    engine, _ = writing(tokenizer, "?")
    seen = []
    monkeypatch.setattr(engine, "stream", lambda ids, n, **sampling: seen.append(
        (tokenizer.decode(ids), sampling["temperature"])) or iter([(65, "A"), (None, "")]))
    typed(monkeypatch, "One", "/temperature 0", "/system Be Ada.", "Two", "/reset", "Three")
    Chat(engine, None, 9, 0, dict(temperature=1.0)).run()
    assert [temperature for _, temperature in seen] == [1.0, 0.0, 0.0]
    assert "One" not in seen[1][0] and "Be Ada." in seen[1][0] and "Two" not in seen[2][0]
    assert "Be Ada." in seen[2][0]


def test_a_saved_conversation_can_be_learnt_from(tokenizer, tmp_path, monkeypatch, capsys):
    engine, _ = writing(tokenizer, "?")
    call = [tokenizer.special["<|python|>"], *b"1+1", tokenizer.special["<|/python|>"], *b"2"]
    monkeypatch.setattr(engine, "stream", lambda *_, **__: ((i, tokenizer.decode([i])) for i in call))
    path = tmp_path / "a.jsonl"
    other = dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")])
    path.write_text(json.dumps(other))          # without a line end
    typed(monkeypatch, "Hé", f"/save {path}", f"/save {tmp_path}/no/a.jsonl")
    Chat(engine, "Be brief.", 9, 0, {}).run()
    first, saved = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    parts = [dict(type="python", text="1+1"), dict(type="text", text="2")]
    assert first == other and saved["messages"][1:] == [
        dict(role="user", content="Hé"), dict(role="assistant", content=parts)]
    assert tokenizer.render(read_conversations(str(path))[1]) and "cannot be written" in capsys.readouterr().out


def interrupted_after(n):
    """In place of Engine.stream: the user presses Ctrl-C after n tokens."""
    def stream(*_, **__):
        yield from [(65, "A")] * n
        raise KeyboardInterrupt
    return stream


@pytest.mark.parametrize("n, said, turns", [(3, "what was said stays", 4), (0, "is forgotten", 2)])
def test_ctrl_c_stops_one_reply_and_the_chat_continues(n, said, turns, tokenizer, monkeypatch, capsys):
    engine, _ = writing(tokenizer, "ab", "<|im_end|>")
    chat = Chat(engine, None, 9, 0, {})
    with monkeypatch.context() as patch:
        patch.setattr(engine, "stream", interrupted_after(n))
        chat.ask("Hi")
    chat.ask("And?")
    out = capsys.readouterr().out
    assert said in out and len(chat.messages) == turns and chat.messages[-2]["content"] == "And?"


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(tokenizer, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "/help", EOFError])

    def read(_):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert Chat(writing(tokenizer, "?")[0], None, 9, 0, {}).run() == 0
    out = capsys.readouterr().out
    assert "Ctrl-D ends the conversation" in out and "/reset" in out


def test_a_reply_without_a_word_and_one_that_was_cut_say_so(tokenizer, capsys):
    im_end = tokenizer.special["<|im_end|>"]
    for written, most, said in (([im_end], 9, "ended its turn without a word"),
                                ([*b"####", im_end], 9, "without a word"),
                                ([65] * 9, 9, "Cut after 9 tokens; --max_new_tokens allows more"),
                                ([65] * 300, 300, "because the model can read no more than 256")):
        prompt = tokenizer.render([dict(role="user", content="Hi")], for_completion=True)[0]
        model = Scripted(written, tokenizer.n_vocab, len(prompt))
        Chat(Engine(model, tokenizer), None, most, 0, {}).ask("Hi")
        assert said in capsys.readouterr().out, said


def test_a_stop_text_ends_a_reply_and_stays_out_of_the_conversation(tokenizer, capsys):
    prompt = tokenizer.render([dict(role="user", content="Hi")], for_completion=True)[0]
    model = Scripted([*b"Yes. STOP it", tokenizer.special["<|im_end|>"]], tokenizer.n_vocab, len(prompt))
    chat = Chat(Engine(model, tokenizer), None, 50, 0, {}, stops=["STOP", "it"])
    chat.ask("Hi")
    assert chat.messages[-1] == dict(role="assistant", content="Yes. ")
    assert capsys.readouterr().out == "assistant: Yes.\n"


# ---- what people see of a reply

REPLIES = [
    ("#### 20", "20"), ("8 + 3 = 11 #### 11", "8 + 3 = 11\nAnswer: 11"), ("####", ""), ("", ""),
    ("a\n\n#### $4,200.\n", "a\nAnswer: $4,200."), ("The sum is #### 42.", "The sum is 42."), ("##### c-o-r-e", "c-o-r-e"), ("C# is", "C# is"),
    ("#### Heading\nText.", "#### Heading\nText."), ("## b\n#", "## b\n#"), (" a ", "a"),
    ("<|python|>6*7<|/python|><|output|>42<|/output|>#### 42",
     "(asks Python: 6*7)\n(Python answers: 42)\nAnswer: 42"),
    ("Look: <|search|>sea<|/search|><|output|>blue<|/output|> So blue.",
     "Look:\n(searches for: sea)\n(finds: blue)\nSo blue."),
    ("<|think|>#### 1<|/think|>Hm", "(thinks: #### 1)\nHm"), ("<|python|>1", "(asks Python: 1)"),
    ("a<|/python|>b", "a<|/python|>b"), ("<|python|>a<|think|>b<|/python|>", "(asks Python: a<|think|>b)"),
    ("#### 1 <|python|>2<|/python|>", "#### 1\n(asks Python: 2)")]


@pytest.mark.parametrize("reply, wanted", REPLIES)
def test_people_see_text_where_checkers_see_marks(reply, wanted, tokenizer):
    ids = tokenizer.encode(reply, allowed_special="all")
    for tokens in (ids, [i for token in ids for i in (
            [token] if token in tokenizer.special.values() else tokenizer.decode_bytes([token]))]):
        shown = Shown(tokenizer)
        text = "".join(shown.add(i, tokenizer.decode([i])) for i in tokens) + shown.end()
        assert text == wanted and shown.is_empty == (not wanted)


def test_thoughts_are_dimmed_in_a_terminal_alone(tokenizer, monkeypatch, capsys):
    prompt = tokenizer.render([dict(role="user", content="Hi")], for_completion=True)[0]
    written = tokenizer.encode("<|think|>1<|/think|>2<|im_end|>", allowed_special="all")
    for is_terminal in (False, True):
        engine = Engine(Scripted(written, tokenizer.n_vocab, len(prompt)), tokenizer)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
        Chat(engine, None, 50, 0, {}).ask("Hi")
        said = capsys.readouterr().out
        assert said.replace("\033[2m", "").replace("\033[0m", "") == "assistant: (thinks: 1)\n2\n"
        dim = re.findall("\033\\[2m(.*?)\033\\[0m", said)
        assert "".join(dim) == ("(thinks: 1)" if is_terminal else "")


def test_text_is_shown_as_soon_as_it_cannot_be_the_mark(tokenizer):
    shown = Shown(tokenizer)
    pieces = [shown.add(None, text) for text in ("Hi", " there", " ####", " 4", " of", "\n\n", "x")]
    assert pieces == ["Hi", " there", "", "", "", "", " #### 4 of\n\nx"] and shown.end() == ""


# ---- stop texts

@pytest.mark.parametrize("stops, wanted", [
    (["cd"], "ab"), (["d"], "abc"), (["efg"], "abcd"), (["zz"], "abcdefgh"), ([], "abcdefgh"),
    (["gh", "cd", "bcd"], "a"), (["ab"], ""), (["ghi"], "abcdefgh")], ids=str)
def test_text_ends_before_a_stop_text_wherever_tokens_end(stops, wanted):
    text = "abcdefgh"
    for cuts in range(2 ** 7):
        pieces = [""]
        for n, c in enumerate(text):
            pieces[-1] += c
            if cuts >> n & 1:
                pieces.append("")
        pairs = list(show.until(enumerate(pieces), stops))
        assert "".join(piece for _, piece in pairs) == wanted
        assert [i for i, _ in pairs] == list(range(len(pairs)))


def test_a_stop_text_ends_the_engines_work_at_once():
    def pieces():
        yield from enumerate("abc")
        raise AssertionError("one token too many was asked for")
    assert list(show.until(pieces(), ["bc"])) == [(0, "a")]
    assert next(show.until(pieces(), ["bc"])) == (0, "a")


# ---- examples

@pytest.mark.parametrize("name, text", [
    ("a.txt", "sea => mer\n\n sun=>soleil \n"), ("a.tsv", "\ufeffsea\tmer\nsun\tsoleil"),
    ("a.jsonl", '{"input": "sea", "output": " mer"}\n{"input": "sun", "output": "soleil"}')])
def test_examples_become_the_prompt_of_the_docstring(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    pairs = few_shot.read_pairs(str(tmp_path / name))
    assert pairs == [("sea", "mer"), ("sun", "soleil")]
    assert few_shot.few_shot_prompt(pairs, "sky") == (
        "input: sea\noutput: mer\n\ninput: sun\noutput: soleil\n\ninput: sky\noutput:")


@pytest.mark.parametrize("name, text, said", [
    ("a.txt", "a => b\nc\n", "a.txt, line 2: .*, got \"c\"; an example is"), ("a.txt", "", "is empty"),
    ("a.txt", "a => b => c", "line 1: "), ("a.txt", "a =>", "line 1: "), ("a.txt", None, "cannot be read"),
    ("a.jsonl", '{"input": "a"}', "line 1: output must be a text on one line, got null"),
    ("a.jsonl", '{"input": "a", "output": "b\\nc"}', "line 1: output must be a text on one line")])
def test_a_line_that_is_no_example_is_named(name, text, said, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=said):
        few_shot.read_pairs(str(tmp_path / name))


def test_few_shot_shows_its_prompt_and_ends_with_the_line(tokenizer, base_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("a => b")
    pieces = [(None, " x"), (None, "y\n"), (None, "input: more")]
    monkeypatch.setattr(Engine, "stream", lambda *_, **__: iter(pieces))
    run_main(sample, "--model", base_run, "--few_shot", tmp_path / "a.txt", "--prompt", "c")
    assert capsys.readouterr().out.endswith("-\ninput: a\noutput: b\n\ninput: c\noutput: xy\n")


# ---- surprise

def test_the_surprise_of_a_text_is_the_loss_in_bits(engine):
    text = "Return the né"
    ids, bits = show.surprises(engine, text)
    row = torch.tensor([engine.prompt_ids(text)])
    loss = engine.model(row[:, :-1], row[:, 1:]).item()
    assert ids == row[0, 1:].tolist() and engine.tokenizer.decode(ids) == text
    assert sum(bits) / len(bits) == pytest.approx(loss / math.log(2), rel=1e-4)


def test_surprise_is_shown_in_numbers_or_in_colours(engine, capsys):
    show.show_surprise(engine, "Re\x1bn é", in_colours=False)
    plain = capsys.readouterr().out
    numbers = [float(number) for number in re.findall(r"^ *([\d.]+)  ['<]", plain, re.M)]
    total, share = map(float, re.search(r"7 bytes: ([\d.]+) bits, ([\d.]+) bits a byte", plain).groups())
    assert total == pytest.approx(sum(numbers), abs=0.1) and share == pytest.approx(total / 7, abs=1e-3)
    show.show_surprise(engine, "Re\x1bn é", in_colours=True)
    shown = capsys.readouterr().out
    assert re.sub(r"\x1b\[\d*m", "", shown).startswith("Re\\x1bn é\nup to 1 bits  up to 4 bits")
    assert shown.splitlines()[-1] == plain.splitlines()[-1]


def test_a_text_without_a_token_or_with_too_many_is_refused(engine):
    for text in ("", "é" * 200):
        with pytest.raises(ValueError, match="tokens, but the model reads 1 to 64; give a text"):
            show.surprises(engine, text)


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
