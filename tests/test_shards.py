"""Near duplicates and the shuffle; then token shards: cut, packed, damaged, resumed, adopted."""
import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import corpus  # noqa: E402
import prepare_fineweb as pf  # noqa: E402
import shards  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from conftest import mutate  # noqa: E402
from test_download import add_hub, server  # noqa: E402, F401
from test_prepare_fineweb import (KILLED, PROSE, TEXTS, distinct_prose, documents,  # noqa: E402
                                  run)

CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"

# ---- near duplicates -----------------------------------------------------------------------------

@pytest.mark.parametrize("jaccard, probability",
    [(0.7, 0.565), (0.75, 0.772), (0.8, 0.924), (0.85, 0.988)])
def test_the_s_curve_is_fineweb_s(jaccard, probability):
    assert pf.match_probability(jaccard) == pytest.approx(probability, abs=1e-3)

def test_matches_of_planted_copies_follow_the_s_curve():
    matched = expected = 0
    for seed, text in enumerate(distinct_prose(120)):
        words = (text * 3).split()
        random = np.random.RandomState(seed)
        for at in random.choice(len(words), 10, replace=False):
            words[at] = f"word{chr(97 + at % 26)}{chr(97 + at // 26)}"
        copy = " ".join(words)
        a = set(pf.shingles(text * 3))
        b = set(pf.shingles(copy))
        expected += pf.match_probability(len(a & b) / len(a | b))
        matched += bool((pf.minhash(text * 3) == pf.minhash(copy)).any())
    assert 10 < expected < 110 and abs(matched - expected) < 14

def test_case_digits_accents_and_punctuation_do_not_matter():
    keys = pf.minhash("Cafés No. 17 in the Old Town, open daily")
    assert (keys == pf.minhash("cafes no 9 in the old town open daily!")).all()

def test_a_price_is_one_word_as_datatrove_has_it():
    assert pf.simplify("$17.56 or 1,000 or ١٢٫٥") == ["0", "or", "0", "or", "0"]

def test_combining_marks_take_linear_time():
    started = time.process_time()
    assert pf.simplify("e" + "\u0301\u0327" * 200_000) == ["e"]
    assert time.process_time() - started < 2

def test_copies_are_joined_through_a_chain_and_the_first_stays(tmp_path):
    keys = np.arange(6 * 14, dtype=np.uint64).reshape(6, 14)
    keys[4, 3] = keys[2, 3]  # 4 matches 2
    keys[1, 9] = keys[4, 9]  # and 1 matches 4
    np.save(tmp_path / "a.npy", keys[:3].T)
    np.save(tmp_path / "b.npy", keys[3:].T)
    for n_parts in (1, 3, 64):
        pairs = [pf.find_pairs([tmp_path / "a.npy", tmp_path / "b.npy"], bucket, part, n_parts)
                 for bucket in range(14) for part in range(n_parts)]
        assert list(pf.find_originals(6, pairs)) == [0, 1, 1, 3, 1, 5]

# ---- documents -----------------------------------------------------------------------------------

def test_the_order_of_documents_does_not_follow_from_the_number_of_files(tmp_path, monkeypatch):
    args = SimpleNamespace(ray=None, workers=1)
    settings = {"seed": 7, "val_fraction": 0.2}
    orders = []
    for n_files in (1, 5):
        monkeypatch.setattr(pf, "MAX_FILES", n_files)
        out = tmp_path / str(n_files)
        files = pf.write_documents(out, ({"text": text} for text in TEXTS), 1 << 60, settings,
                                       args)
        orders.append([[row["text"] for row in documents(out, split)] for split in ("*", "train")])
        assert len(files) == 2 * n_files and sum(file["bytes"] for file in files) == sum(
            len(text.encode()) for text in TEXTS)
    assert orders[0] == orders[1] and orders[0][1] != [t for t in TEXTS if t in orders[0][1]]

# ---- shards --------------------------------------------------------------------------------------

@pytest.fixture
def text_data(tmp_path):
    texts = [*TEXTS[:80], TEXTS[0], "\ud800 odd", "<|endoftext|>"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "book.txt").write_text(PROSE)
    Tokenizer.train(TEXTS[:20], vocab_size=400, pattern="gpt4").save(tmp_path / "tokenizer")
    inputs = ("--source", "text", tmp_path / "in.jsonl", tmp_path / "book.txt")
    return tmp_path / "toy", (*inputs, "--val_fraction", 0.1, "--out", tmp_path / "toy",
                              "--tokenizer", tmp_path / "tokenizer", "--shard_tokens", 4000)

def bins(out):
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.bin"))}

def test_shards_read_back_to_the_documents(text_data):
    out, arguments = text_data
    run(*arguments)
    tokenizer = Tokenizer.load(out / "tokenizer")
    texts = {"val": [], "train": []}
    for shard in json.loads((out / "index.json").read_text())["shards"]:
        header = np.fromfile(out / shard["file"], "<i4", 256)
        ids = np.fromfile(out / shard["file"], "<u2", offset=1024)
        assert list(header[:3]) == [20240520, 1, len(ids)] and len(ids) <= 4000
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
        assert len(parts[0]) == 0 and np.load(out / "token_bytes.npy")[ids].sum() == shard["bytes"]
        texts[shard["split"]] += [tokenizer.decode(part[1:].tolist()) for part in parts[1:]]
    assert texts == {split: [row["text"] for row in documents(out, split)] for split in texts}
    assert len(texts["val"] + texts["train"]) == 83 and "toy_train_000001.bin" in bins(out)

def test_a_lost_or_damaged_shard_is_made_again_and_others_stay(text_data):
    out, arguments = text_data
    run(*arguments)
    whole = bins(out)
    first = out / "toy_train_000001.bin"
    kept = first.stat().st_mtime_ns
    (out / "toy_train_000003.bin").write_bytes(whole["toy_train_000003.bin"][:-7])
    (out / "toy_train_000099.bin").write_bytes(b"of a longer run")
    run("tokenize", *arguments[arguments.index("--out"):])
    assert bins(out) == whole and first.stat().st_mtime_ns == kept

def test_another_tokenizer_or_shard_size_is_refused(text_data):
    out, arguments = text_data
    run(*arguments)
    done = run("tokenize", "--out", out, "--tokenizer", out / "tokenizer", "--shard_tokens", 5000,
        check=False)
    assert done.returncode and "shard_tokens 4000, but this run has 5000" in done.stderr

def test_shards_are_checked_against_their_hashes_and_their_tokenizer(text_data):
    out, arguments = text_data
    run(*arguments)
    shards.check_data(out)
    first = out / "toy_train_000001.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[:-2] + b"\0\0")
    with pytest.raises(SystemExit, match="toy_train_000001.bin is missing or damaged"):
        shards.check_data(out)
    first.write_bytes(whole)
    Tokenizer.train(TEXTS[20:40], vocab_size=400, pattern="gpt4").save(out / "tokenizer")
    with pytest.raises(SystemExit, match="is not the tokenizer that made the shards"):
        shards.check_data(out)

def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    class Wide:
        eot = 100_257
        n_vocab = 100_277
        encode_batch = staticmethod(lambda texts: [[70_000] for _ in texts])
        token_bytes = staticmethod(lambda: np.zeros(100_277, dtype=np.int32))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}'))
    index = {"documents": [{"file": "d.jsonl.gz", "split": "val", "documents": 1}], "shards": [],
             "tokenizer": {"shard_tokens": 10, "row_tokens": 0}}
    shards.write_shards(tmp_path, index, "val", Wide)
    data = (tmp_path / index["shards"][0]["file"]).read_bytes()
    stored = np.frombuffer(data, "<i4")
    assert [*stored[:3], *stored[256:]] == [20240520, 2, 2, 100_257, 70_000]

# ---- packed rows ---------------------------------------------------------------------------------

def test_every_packed_row_begins_with_a_document_and_only_the_val_split_is_not_packed(text_data):
    out, arguments = text_data
    run(*arguments, "--row_tokens", 64)
    for shard in json.loads((out / "index.json").read_text())["shards"]:
        ids = np.fromfile(out / shard["file"], "<u2", offset=1024)
        is_packed = len(ids) % 64 == 0 and (ids.reshape(-1, 64)[:, 0] == ids[0]).all()
        assert is_packed == (shard["split"] == "train") and len(ids) == shard["tokens"]
        assert (shard["lost_tokens"] > 0) == is_packed
        assert np.load(out / "token_bytes.npy")[ids].sum() == shard["bytes"]

def test_a_trainer_with_rows_of_that_length_reads_none_without_its_beginning(text_data):
    from train_gpt2 import Loader, Shards
    out, arguments = text_data
    run(*arguments, "--row_tokens", 64)
    loader = Loader(Shards(out, "train"), 64, seed=0)
    eot = corpus.read_index(out)["tokenizer"]["eot"]
    assert loader.n_rows > 50 and all(loader.row(i)[0] == eot for i in range(loader.n_rows))

def pieces(lengths, T):
    """[(document, tokens of it)] of each packed row; documents are named 1, 2, 3 …"""
    rows = shards.pack_rows([np.full(n, i, "<u2") for i, n in enumerate(lengths, 1)], T)
    return [[(int(i), int((row == i).sum())) for i in dict.fromkeys(row)]
            for row in rows.reshape(-1, T)]

@pytest.mark.parametrize("lengths, rows", [
    ([10], [[(1, 10)]]), ([3, 7, 10], [[(3, 10)], [(2, 7), (1, 3)]]),
    ([6, 6, 4, 3], [[(2, 6), (3, 4)], [(1, 6), (4, 3)]][:1]),
    ([8, 5, 9], [[(3, 9), (2, 1)]]), ([25, 12], [[(2, 10)], [(1, 10)]]), ([4, 5], [])])
def test_rows_take_what_fits_best_then_the_beginning_of_the_shortest(lengths, rows):
    assert pieces(lengths, 10) == rows

def test_a_document_is_in_at_most_one_row_and_few_tokens_are_lost():
    lengths = np.random.RandomState(0).geometric(1 / 60, size=4000)
    rows = pieces(lengths, 256)
    names = [name for row in rows for name, _ in row]
    assert len(names) == len(set(names)) and len(rows) * 256 > 0.9 * lengths.sum()

@pytest.mark.parametrize("packed", [(), ("--row_tokens", 64)])
def test_a_tokenization_killed_in_the_middle_ends_with_the_same_shards(text_data, packed):
    out, arguments = text_data
    run(*arguments, *packed)
    whole = bins(out)
    again = ["--tokenizer", out / "tokenizer", "--shard_tokens", 4000, *packed]
    index = json.loads((out / "index.json").read_text()) | {"shards": [], "tokenizer": None}
    (out / "index.json").write_text(json.dumps(index))
    command = [sys.executable, "-c", KILLED, "train_000003.bin", "tokenize", "--out", out, *again]
    child = subprocess.run([*map(str, command)], stderr=subprocess.DEVNULL, cwd=ROOT)
    assert child.returncode == -signal.SIGKILL and len(bins(out)) < len(whole)
    run("tokenize", "--out", out, *again)
    assert bins(out) == whole

# ---- ready shards --------------------------------------------------------------------------------

def shard_bytes(tokens, n_tokens=None, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(tokens) if n_tokens is None else n_tokens
    return header.tobytes() + np.array(tokens, "<u2").tobytes()

@pytest.mark.skipif(not CACHE.exists(), reason="no ../shared/data/tiktoken_cache here")
def test_ready_shards_come_with_an_index_and_gpt_2_s_tokenizer(server, tmp_path,  # noqa: F811
                                                               monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    add_hub(server, "kjj0/fineweb10B-gpt2", {
        f"fineweb_{name}.bin": shard_bytes([50256, 15496, 995])
        for name in ("train_000001", "train_000002", "val_000000")})
    run("--source", "kjj0/fineweb10B-gpt2", "--out", tmp_path / "a", "--mirror", server.url)
    index = corpus.read_index(tmp_path / "a")
    found = [(s["file"], s["split"], s["tokens"], s["documents"], s["bytes"])
             for s in index["shards"]]
    assert found == [("fineweb_val_000000.bin", "val", 3, 1, 11),
                     ("fineweb_train_000001.bin", "train", 3, 1, 11)]
    assert Tokenizer.load(tmp_path / "a" / "tokenizer").eot == 50256

@pytest.mark.parametrize("data, found", [
    (shard_bytes([1, 2], 3), "begins with"), (shard_bytes([1], magic=7), "begins with"),
    (b"short", "has 5 bytes"), (shard_bytes([401]), "has token 401"),
    (shard_bytes([5, 6]), "has no end-of-text token")])
def test_ready_shards_that_are_none_end_in_one_line(tmp_path, data, found):
    Tokenizer.train(TEXTS[:20], vocab_size=400, pattern="gpt4").save(tmp_path / "tokenizer")
    (tmp_path / "a_train_1.bin").write_bytes(data)
    with pytest.raises(SystemExit, match=found):
        shards.adopt(tmp_path, [tmp_path / "a_train_1.bin"], tmp_path / "tokenizer")

# ---- mutants: each must be caught by the test beside it ------------------------------------------

def caught(test, *arguments):
    try:
        test(*arguments)
    except (AssertionError, IndexError, ValueError):
        return True

CURVE = (test_the_s_curve_is_fineweb_s, 0.75, 0.772)
PLANTED = (test_matches_of_planted_copies_follow_the_s_curve,)
ALIKE = (test_case_digits_accents_and_punctuation_do_not_matter,)
CHAIN = (test_copies_are_joined_through_a_chain_and_the_first_stays, Path)
FIT = (test_rows_take_what_fits_best_then_the_beginning_of_the_shortest, [3, 7, 10],
       [[(3, 10)], [(2, 7), (1, 3)]])

@pytest.mark.parametrize("name, old, new, check", [
    ("match_probability", "** HASHES", "* HASHES", CURVE),
    ("match_probability", "** BUCKETS", "** HASHES", CURVE),
    ("minhash", "reshape(BUCKETS, HASHES)", "reshape(HASHES, BUCKETS)[[0] * BUCKETS]", PLANTED),
    ("shingles", "i:i + SHINGLE", "i:i + 1", PLANTED),
    ("simplify", 'r"\\d+(', 'r"x+(', ALIKE),
    ("simplify", ".translate(WITHOUT_ACCENTS)", "", ALIKE),
    ("simplify", "text.lower()", "text", ALIKE),
    ("pack_rows", "bisect_right", "bisect_left", FIT),
    ("pack_rows", "n_fitting - 1", "n_fitting - 2", FIT),
    ("find_pairs", "here + n_before", "here", CHAIN),
    ("find_originals", "(find(i), find(j))", "(i, j)", CHAIN)])
def test_checks_notice_a_mutant(monkeypatch, tmp_path, name, old, new, check):
    test, *arguments = [tmp_path if one is Path else one for one in check]
    assert not caught(test, *arguments)
    owner = shards if name == "pack_rows" else pf
    mutate(monkeypatch, owner, name, old, new)
    assert caught(test, *arguments), f"{name} with {new!r} passes"
