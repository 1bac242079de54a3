"""
Compares the tokenizer with its specification (bpe_train and bpe_encode), with tiktoken and with
Hugging Face's tokenizers. A test that needs OpenAI's rank files is skipped on a machine where
TIKTOKEN_CACHE_DIR does not have them.
"""
import base64
import doctest
import gzip
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import regex
import tiktoken
from conftest import DOCUMENTS, mutate

import bpe
from bpe import (PATTERNS, PRETRAINED, SPECIAL_TOKENS, Merger, Tokenizer, bpe_encode, bpe_train,
                 count_batch)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
LEAST = 256 + len(SPECIAL_TOKENS)
# All that the patterns tell apart: letters by case and script, digits, punctuation, spaces, joiners
ALPHABET = ["abcdefgh XYZ 'stdmrevl", " \t\n\r\x0b\x0c\x85\xa0\u2003\u3000\x1c\x1f\u200b",
            "012345 ٣४½²Ⅷ", "!?.,;:-_/\\(){}[]<>|#@", "éÀßſKİıΣσςДжǅǈʰªº中文日本語한국어हिन्दी́̈",
            "😀👨\u200d👩🇩🇪\ufeff\0\ufffd"]
WORDS = ["'s", "'LL", "'Re", " 've", "don't", "  ", "\r\n", "\n\n", "aaaa", "     ", "!\n \n",
         "<|im_end|>"]


@lru_cache
def pretrained(name):
    try:
        return Tokenizer.pretrained(name), tiktoken.get_encoding(name)
    except (SystemExit, OSError):
        pytest.skip(f"the rank file of {name} is not on this machine")


@lru_cache
def known_characters():
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]


@lru_cache
def fuzz(number, seed=0):
    """Strings of all that the patterns tell apart, and of any character that Python's Unicode
    tables know: newer ones are letters to one regex engine and not to the other."""
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        kinds = rng.choices([0, 1, 2], [8, 1, 1], k=rng.choice([1, 3, 8, 20, 40]))
        texts.append("".join(rng.choice([rng.choice(ALPHABET), WORDS, known_characters()][kind])
                             for kind in kinds))
    return texts


def random_chunks(seed):
    """Words of few letters, so that runs, overlaps and ties abound."""
    rng = random.Random(seed)
    letters = range(97, 98 + seed % 5)
    length = rng.choice([5, 40])
    words = [bytes(rng.choices(letters, k=rng.randint(1, length)))
             for _ in range(rng.randint(1, 60))]
    return {word: rng.choice([1, 1, rng.randint(1, 9)]) for word in words}


def differs_from_the_slow_twin(seeds=250):
    for seed in range(seeds):
        chunks = random_chunks(seed)
        num_merges = (3, 30, 300)[seed % 3]
        if Merger(chunks).run(num_merges) != bpe_train(chunks, num_merges):
            return True
    return False


def count_slowly(texts, pattern):
    find = regex.compile(PATTERNS[pattern]).findall
    return Counter(chunk.encode() for text in texts for chunk in find(text))


def encode_slowly(tok, text):
    return [tok.ranks[token] for chunk in regex.findall(tok.pattern, text)
            for token in bpe_encode(chunk.encode(), tok.ranks)]


@lru_cache
def trained(pattern="gpt4"):
    return Tokenizer.train([*DOCUMENTS, *fuzz(300)], 1000, pattern)


def error_of(*args):
    with pytest.raises(SystemExit) as stopped:
        bpe.main([str(arg) for arg in args])
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


# ---- training -----------------------------------------------------------------------------------

def test_merges_are_those_of_the_slow_twin_on_random_bytes():
    assert not differs_from_the_slow_twin()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_are_those_of_the_slow_twin_on_real_text(pattern):
    text = "\n".join(DOCUMENTS)[-60_000:]
    tokens = [bytes([b]) for b in range(256)]
    for a, b in bpe_train(count_slowly([text], pattern), 300):
        tokens.append(tokens[a] + tokens[b])
    tok = Tokenizer.train([text], LEAST + 300, pattern)
    assert tok.ranks == {token: i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("name, old, new", [
    ("step", "sorted(found)", "sorted(found, key=lambda entry: (entry[0], -entry[1]))"),    # ties
    ("track", "(-count, pair)", "(-count, -pair)"),         # the heap's order among equals
    ("track", "counts >= self.floor", "counts > self.floor"),       # a pair at the floor is lost
    ("step", "entry <= self.heap[0]", "True"),              # a better pair on the heap is passed
    ("step", "at[there], which[there]", "at, which"),       # places that are gone are counted
    ("merge", "if shared.any()", "if False"),               # two merges of a sweep share a place
    ("merge", "[which == other] += 1", "[which == other] += 9"),    # a run does not end the sweep
    ("merge", "% 2 == 0", "% 2 >= 0"),                      # aaa is merged twice
    ("merge", "& (self.ids[left] < first_new)", ""),        # two new neighbours count twice
])
def test_the_slow_twin_notices_a_mutation_of_the_merger(monkeypatch, name, old, new):
    mutate(monkeypatch, Merger, name, old, new)
    try:
        assert differs_from_the_slow_twin()
    except (KeyError, IndexError, ValueError):              # a mutant may fall over, too
        pass


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counting_each_piece_once_is_counting_chunks_everywhere(pattern):
    for seed in range(20):
        assert count_batch(fuzz(200, seed), pattern) == count_slowly(fuzz(200, seed), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_kind_of_whitespace_is_cut_apart(pattern):
    spaces = [c for c in known_characters() if regex.match(r"\s", c) or c.isspace()]
    texts = [f"a{c} b  {c}c{c}" for c in spaces]
    assert len(spaces) > 20 and count_batch(texts, pattern) == count_slowly(texts, pattern)


def test_all_cores_count_what_one_counts():
    counts = bpe.count_chunks(fuzz(500), "gpt4", lambda line: None, batch_chars=300)
    assert counts == count_slowly(fuzz(500), "gpt4")


def test_a_long_file_is_cut_only_between_chunks(tmp_path):
    spaces = (" ", "  ", "!\n\n", "\r\n")
    text = "".join(word + space for word in DOCUMENTS[-1].split() for space in spaces) * 400
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(bpe.read_texts(tmp_path / "a.txt"))
    assert len(text) > 2 << 20 and len(pieces) > 2 and "".join(pieces) == text
    for pattern in PATTERNS:
        assert count_batch(pieces, pattern) == count_batch([text], pattern)


def test_vocab_size_includes_bytes_and_special_tokens():
    tok = Tokenizer.train(DOCUMENTS, 700)
    assert tok.n_vocab == 700 and len(tok.merges) == 700 - LEAST and tok.eot == 687
    assert [tok.special[name] for name in SPECIAL_TOKENS] == list(range(687, 700))


def test_training_stops_with_a_message_when_no_pair_is_left(capsys):
    tok = Tokenizer.train(["low low"], 1000)
    assert tok.n_vocab == LEAST + 3 and "no more pairs to merge" in capsys.readouterr().err
    assert Tokenizer.train(["a"], 1000).n_vocab == LEAST


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000 + "x", "ab" * 500_000,
                                  "A\n" * 500_000])
def test_a_million_equal_characters_take_seconds(text):
    start = time.process_time()
    tok = Tokenizer.train([text], 300)
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode_batch([text, "a"])[1] == tok.encode("a")
    assert time.process_time() - start < 20


def test_lone_surrogates_train_and_encode():
    tok = Tokenizer.train(["a\ud83d b \udc00"], 300)
    assert tok.decode(tok.encode("a\ud83d b")) == "a\ufffd b"


# ---- encoding -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRETRAINED)
def test_ids_are_tiktokens_on_fuzzed_unicode(name):
    tok, oracle = pretrained(name)
    texts = fuzz(10_000)
    wanted = oracle.encode_ordinary_batch(texts)
    assert tok.encode_batch(texts) == wanted
    for text, want in zip(texts, wanted):
        assert tok.encode_ordinary(text) == encode_slowly(tok, text) == want
        assert tok.decode(want) == text


@pytest.mark.parametrize("name", PRETRAINED)
def test_ids_are_tiktokens_on_two_megabytes_of_prose(name):
    tok, oracle = pretrained(name)
    size = 0
    for path in sorted(SHARED.glob("prose/*.jsonl.gz")) or pytest.skip("no prose to read"):
        with gzip.open(path) as lines:
            text = "\n".join(json.loads(next(lines))["text"] for _ in range(75))[:400_000]
        want = oracle.encode_ordinary(text)
        assert tok.encode_ordinary(text) == want
        encode = lru_cache(None)(lambda chunk: bpe_encode(chunk.encode(), tok.ranks))
        chunks = regex.findall(tok.pattern, text)
        assert [tok.ranks[token] for chunk in chunks for token in encode(chunk)] == want
        size += len(text.encode())
    assert size > 1_900_000


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_core_encodes_as_the_specification_says(pattern):
    for text in fuzz(1000, seed=1):
        assert trained(pattern).encode_ordinary(text) == encode_slowly(trained(pattern), text)


def test_runs_too_long_for_the_core_are_split_with_equal_ids(monkeypatch):
    tok = trained()
    texts = ["x" + " " * n + tail for n in (1, 2, 99_999) for tail in ("", "y", "\ny", " \n")]
    direct = [tok.core.encode_ordinary(text) for text in texts]
    mutate(monkeypatch, Tokenizer, "encode_ordinary", "if max(map(len, runs), default=0) <=",
           "if 2 * len(text) <=")
    assert [tok.encode_ordinary(text) for text in texts] == direct


def test_any_bytes_survive_a_round_trip():
    tok = trained()
    rng = random.Random(0)
    for _ in range(2000):
        data = rng.randbytes(rng.randint(0, 40))
        ids = [tok.ranks[token] for token in bpe_encode(data, tok.ranks)]
        assert tok.decode_bytes(ids) == data and tok.decode(ids) == data.decode("utf-8", "replace")


def test_merges_are_recovered_from_the_ranks():
    merges = Merger(count_batch([*DOCUMENTS, *fuzz(300)], "gpt4")).run(1000 - LEAST)
    assert trained().merges == [(a, b, 256 + i) for i, (a, b) in enumerate(merges)]


def test_gpt4s_merges_and_byte_order_are_recovered():
    tok, _ = pretrained("cl100k_base")
    assert [i for _, _, i in tok.merges] == list(range(256, 100_256))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    assert [tok.ranks[bytes([b])] for b in printable + others] == list(range(256))


def test_the_facts_of_the_talk():
    tok, oracle = pretrained("cl100k_base")

    def cut(text):
        return [tok.decode([i]) for i in tok.encode(text)]

    assert tok.encode("Hello world") == [9906, 1917] and tok.encode("hello world") == [15339, 1917]
    assert len(tok.encode("hello  world")) == 3 and tok.encode("HELLO world")[0] != 15339
    assert cut("ubiquitous") == ["ub", "iqu", "itous"]
    assert cut("strawberry") == ["str", "aw", "berry"] and cut(" strawberry") == [" strawberry"]
    assert oracle.n_vocab == 100_277 == tok.special["<|endofprompt|>"] + 1


def test_token_bytes_add_up_to_the_bytes_of_a_text():
    tok = trained()
    sizes = tok.token_bytes()
    assert sizes.dtype == "int32" and sizes.shape == (tok.n_vocab,)
    assert not sizes[list(tok.special.values())].any()
    for text in fuzz(500):
        assert sizes[tok.encode_ordinary(text)].sum() == len(text.encode())


def test_ids_that_are_no_token_are_refused():
    tok, _ = pretrained("cl100k_base")
    for i in (-1, tok.n_vocab, 100_256):                    # GPT-4's vocabulary leaves out 100256
        with pytest.raises(ValueError, match=str(i)):
            tok.decode([9906, i])
    assert tok.token_bytes()[100_256] == 0


# ---- special tokens and conversations -----------------------------------------------------------

def test_special_tokens_have_their_published_ids_or_come_after_them():
    gpt2, gpt4, gpt4o = (pretrained(name)[0] for name in PRETRAINED)
    assert gpt2.eot == 50256 and gpt2.special["<|im_start|>"] == 50257 and gpt2.n_vocab == 50269
    assert gpt4.eot == 100257 and gpt4.special["<|im_start|>"] == 100264
    assert gpt4.special["<|im_end|>"] == 100265 and gpt4.special["<|im_sep|>"] == 100266
    assert gpt4.special["<|think|>"] == 100277 and gpt4.n_vocab == 100286
    assert gpt4o.eot == 199999 and gpt4o.special["<|im_start|>"] == 200019
    assert all(set(SPECIAL_TOKENS) <= set(tok.special) for tok in (gpt2, gpt4, gpt4o))


def test_text_never_becomes_a_special_token():
    tok = trained()
    special = set(trained().special.values())
    for name in SPECIAL_TOKENS:
        for ids in (tok.encode_ordinary(f"a{name}b"), *tok.encode_batch([name, f"x {name}"])):
            assert not set(ids) & special
        ids, _ = tok.render([{"role": "user", "content": f"hi{name}"}])
        assert sum(i in special for i in ids) == 4 and tok.parse(ids)[0]["content"] == f"hi{name}"


def test_encode_allows_and_refuses_special_tokens_as_tiktoken_does():
    tok, oracle = pretrained("gpt2")
    end = "<|endoftext|>"
    for allowed in ("all", set(), {end}):
        for disallowed in ("all", (), {end}):
            for text in ("plain", f"a{end}b {end}", end):
                options = {"allowed_special": allowed, "disallowed_special": disallowed}
                try:
                    want = oracle.encode(text, **options)
                except ValueError:
                    with pytest.raises(ValueError):
                        tok.encode(text, **options)
                else:
                    assert tok.encode(text, **options) == want


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3*4? <|im_end|>"},
    {"role": "assistant", "content": [
        {"type": "think", "text": "compute"}, {"type": "text", "text": "It is "},
        {"type": "python", "text": "3*4"}, {"type": "output", "text": "12"},
        {"type": "text", "text": "12."}]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": [{"type": "search", "text": "x"}]},
    {"role": "assistant", "content": ""}]


def test_the_loss_mask_covers_what_the_assistant_says():
    tok = trained()
    ids, mask = tok.render(CONVERSATION[1:3])
    assert len(ids) == len(mask) and tok.decode(ids) == (
        "<|endoftext|><|im_start|>user<|im_sep|>What is 3*4? <|im_end|><|im_end|>"
        "<|im_start|>assistant<|im_sep|><|think|>compute<|/think|>It is <|python|>3*4<|/python|>"
        "<|output|>12<|/output|>12.<|im_end|>")
    assert tok.decode([i for i, learnt in zip(ids, mask) if learnt]) == (
        "<|think|>compute<|/think|>It is <|python|>3*4<|/python|>12.<|im_end|>")


def random_conversation(rng):
    messages = []
    for text in rng.choices(fuzz(1000, seed=2), k=rng.randint(0, 6)):
        kinds = [kind for kind in rng.choices(bpe.PARTS[1:], k=rng.randint(1, 5))]
        parts = [{"type": kind, "text": rng.choice(fuzz(1000))} for kind in kinds]
        parts.insert(rng.randint(0, len(parts)), {"type": "text", "text": "between"})
        role = rng.choice(bpe.ROLES)
        content = parts if role == "assistant" and rng.random() < 0.7 else text
        messages.append({"role": role, "content": content})
    return messages


def test_parse_inverts_render_and_the_first_messages_give_the_first_ids():
    tok = trained()
    rng = random.Random(0)
    for messages in [CONVERSATION] + [random_conversation(rng) for _ in range(100)]:
        ids, mask = tok.render(messages)
        assert tok.parse(ids) == messages
        for k in range(len(messages)):
            start, start_mask = tok.render(messages[:k])
            assert ids[:len(start)] == start and mask[:len(start)] == start_mask


def test_a_conversation_for_completion_ends_in_the_assistants_header():
    tok = trained()
    messages = CONVERSATION[:2]
    ids, mask = tok.render(messages, for_completion=True)
    whole, learnt = tok.render(messages + [{"role": "assistant", "content": "Twelve."}])
    assert whole[:len(ids)] == ids and learnt[:len(ids)] == mask and learnt[len(ids)] == 1
    assert tok.decode(ids).endswith("<|im_start|>assistant<|im_sep|>")


@pytest.mark.parametrize("said, content", [
    ("Hi", "Hi"),
    ("Hi<|im_end|><|endoftext|>x", "Hi"),
    ("a<|im_sep|>b<|/think|>", "a<|im_sep|>b<|/think|>"),
    ("<|think|>a<|python|>b", [{"type": "think", "text": "a<|python|>b"}])])
def test_parse_forgives_what_models_get_wrong(said, content):
    text = f"<|endoftext|><|im_start|>assistant<|im_sep|>{said}"
    messages = trained().parse(trained().encode(text, allowed_special="all"))
    assert messages == [{"role": "assistant", "content": content}]


@pytest.mark.parametrize("text", ["Hi", "<|im_start|>user<|im_sep|>Hi<|im_end|>there", "<|think|>"])
def test_parse_refuses_text_outside_of_turns(text):
    with pytest.raises(ValueError, match="should begin a turn"):
        trained().parse(trained().encode(text, allowed_special="all"))
    assert trained().parse([]) == trained().parse([trained().eot]) == []


@pytest.mark.parametrize("message, allowed", [
    ({"role": "bot", "content": "x"}, "system, user, assistant, tool, got bot"),
    ({"role": "assistant", "content": [{"type": "image", "text": "x"}]}, "text, think, .*image"),
    ({"role": "user", "content": [{"type": "think", "text": "x"}]}, "a type out of text, got"),
    ({"role": "user", "content": None}, "a text and a type out of text, got .*null"),
    ({"content": "x"}, "system, user, assistant, tool, got None")])
def test_an_unknown_role_or_part_is_refused_by_naming_what_is_allowed(message, allowed):
    with pytest.raises(ValueError, match=allowed):
        trained().render([message])


# ---- files and other libraries ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["ours", "cl100k_base"])
def test_a_saved_tokenizer_loads_equal(tmp_path, name):
    tok = trained() if name == "ours" else pretrained(name)[0]
    tok.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    for attribute in ("ranks", "special", "pattern", "name", "sha256", "n_vocab"):
        assert getattr(again, attribute) == getattr(tok, attribute)
    assert again.encode_ordinary("Hi  there") == tok.encode_ordinary("Hi  there")
    assert tok.sha256 != trained("gpt2").sha256 and not list(tmp_path.rglob("*.part"))


def test_tiktoken_reads_our_rank_file_and_ours_of_gpt2_is_its(tmp_path):
    trained().save(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    assert ranks == trained().ranks
    tok, oracle = pretrained("gpt2")
    tok.save(tmp_path)
    tokens = map(oracle.decode_single_token_bytes, range(50256))
    assert (tmp_path / "tokenizer.tiktoken").read_bytes().splitlines() == [
        base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]


@pytest.mark.parametrize("name", [*PATTERNS, "cl100k_base"])
def test_hugging_faces_tokenizers_give_equal_ids_after_export(tmp_path, name):
    hf = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tok = trained(name) if name in PATTERNS else pretrained(name)[0]
    tok.export_hf(tmp_path / "tokenizer.json")
    other = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*fuzz(3000), "<|im_start|>user<|im_sep|>Hi<|im_end|><|pad|>"]:
        ids = tok.encode(text, allowed_special="all")
        assert other.encode(text).ids == ids
        assert other.decode(ids, skip_special_tokens=False) == text


def test_jsonl_and_gz_and_txt_and_parquet_hold_the_same_documents(tmp_path):
    rows = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "b.txt").write_bytes("\r\n ".join(DOCUMENTS).encode())
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"):
        assert list(filter(None, bpe.read_texts(path))) == DOCUMENTS
    assert "".join(bpe.read_texts(tmp_path / "b.txt")) == "\r\n ".join(DOCUMENTS)
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow, for .parquet")
    from pyarrow.parquet import write_table
    write_table(pyarrow.table({"url": DOCUMENTS, "text": DOCUMENTS}), tmp_path / "a.parquet")
    assert list(bpe.read_texts(tmp_path / "a.parquet")) == DOCUMENTS


def test_the_command_line_trains_once_and_leaves_validation_text_alone(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("low lower lowest " * 50)
    (tmp_path / "val_000.txt").write_text("secret " * 500)
    out = tmp_path / "t"
    flags = ["train", "--input", str(tmp_path), "--vocab_size", "290", "--out", str(out)]
    bpe.main(flags)
    tok, before = Tokenizer.load(out), (out / "tokenizer.json").stat().st_mtime_ns
    assert tok.name == "t" and b" low" in tok.ranks and b" secret" not in tok.ranks
    bpe.main(flags)
    assert "--force" in capsys.readouterr().out
    assert before == (out / "tokenizer.json").stat().st_mtime_ns
    (tmp_path / "train.txt").write_text("new text " * 50)
    bpe.main(flags)
    assert b" text" in Tokenizer.load(out).ranks


@pytest.mark.parametrize("name, data, message", [
    ("latin.txt", "Bäcker".encode("latin-1"), "UTF-8"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 99, mtime=0)[:-9], "whole"),
    ("bad.jsonl", b'{"body": "abc"}\n', "text"), ("bad.parquet", b"PAR1", "parquet"),
    ("empty.txt", b"", "is empty"), ("pages.html", b"<p>", "no training text")])
def test_input_that_cannot_be_read_ends_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in error_of("train", "--input", tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    few = ("train", "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab_size", 255)
    assert "at least 269 " in error_of(*few)
    assert "no training text" in error_of("train", "--input", tmp_path / "b", "--out", tmp_path)
    assert "b.txt" in error_of("show", "--file", tmp_path / "b.txt")
    trained().save(tmp_path)
    assert "0 to 999" in error_of("decode", "1000", "--tokenizer", tmp_path)
    assert "gpt2" in error_of("encode", "x", "--tokenizer", tmp_path / "nothing")


@pytest.mark.parametrize("name, old, new, message", [
    ("tokenizer.tiktoken", "999", "99", "damaged"),
    ("tokenizer.tiktoken", "IQ== 33\n", "", "cut short"),
    ("tokenizer.json", '"version": 1', '"version": 9', "version 9"),
    ("tokenizer.json", "{", "", "bpe.py train"), ("tokenizer.json", '"format"', '"x"', "format")])
def test_a_damaged_tokenizer_ends_in_one_line(tmp_path, name, old, new, message):
    trained().save(tmp_path)
    data = (tmp_path / name).read_text() + "999"
    (tmp_path / name).write_text(data.replace(old, new, 1).removesuffix("999"))
    assert message in error_of("encode", "x", "--tokenizer", tmp_path)


# ---- looking ------------------------------------------------------------------------------------

def test_show_prints_tokens_ids_and_counts_and_writes_a_page(tmp_path, capsys):
    trained().save(tmp_path / "ours")
    flags = ["--tokenizer", str(tmp_path / "ours"), "--html", str(tmp_path / "a.html")]
    bpe.main(["show", "Hi <b>\n", *flags])
    title, tokens, ids = capsys.readouterr().out.splitlines()
    assert title.endswith("7 characters | 7 bytes") and tokens.replace("|", "") == "Hi <b>\\n"
    assert list(map(int, ids.split())) == trained().encode("Hi <b>\n")
    page = (tmp_path / "a.html").read_text()
    assert "&lt;" in page and "<b>" not in page and 'title="id 72, bytes 48"' in page


def test_merges_replays_the_training_of_a_sentence(capsys):
    bpe.main(["merges", "aaabdaaabac"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["  11 tokens: a|a|a|b|d|a|a|a|b|a|c",
                         "   1. 'a' + 'a' -> 256, 4 times", "   9 tokens: aa|a|b|d|aa|a|b|a|c"]
    assert "   5 tokens: aaab|d|aaab|a|c" in lines


def test_compare_prints_bytes_per_token(capsys):
    tok = pretrained("gpt2")[0]
    text = bpe.SAMPLES["Russian"]
    bpe.main(["compare"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["Russian"][0] == f"{len(text.encode()) / len(tok.encode(text)):.2f}"
    assert len(rows) == len(bpe.SAMPLES) + 1


def test_names_of_special_tokens_are_found_in_a_text_of_a_million_spaces(tokenizer):
    text = "<|endoftext|>" + " " * 1_000_000 + "a<|endoftext|>"
    ids = tokenizer.encode(text, allowed_special="all")
    assert ids[0] == ids[-1] == tokenizer.eot and tokenizer.decode(ids) == text
    assert tokenizer.eot not in tokenizer.encode(text, disallowed_special=())


def test_show_takes_flags_before_its_text_and_prints_on_a_terminal_of_ascii(tmp_path):
    Tokenizer.train(["\u00ef"] * 9, 257 + len(SPECIAL_TOKENS)).save(tmp_path)
    command = [sys.executable, bpe.__file__, "show", "--special", "na\u00efve<|endoftext|>",
               "--tokenizer", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "\\xef" in done.stdout, done.stderr


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(bpe) == (0, 5)
