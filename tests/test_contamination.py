"""
contamination.py: a planted question is found, whatever its case and punctuation, and nothing else
is; documents are read from all that prepare_fineweb.py writes; eval.py tells the score without it.
"""
import doctest
import gzip
import json
import random
import shutil
from types import SimpleNamespace

import pytest

import contamination
import eval as eval_module
import likelihood
from conftest import mutate, run_main, write_shard
from contamination import N, Overlap, find, ngram_hashes, ngrams, training_files, words_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(rng, words):
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(words))


def found(text, document):
    overlap = Overlap([text])
    overlap.scan([document])
    return overlap.flags([text]) == [True]


def test_the_docstrings_examples_are_true():
    result = doctest.testmod(contamination)
    assert result.attempted >= 3 and result.failed == 0


# ---- what is found

def planted_is_missed():
    """Whether the fast search differs from comparing tuples: in documents that hold 12, 13 or 14
    successive words of a question, at its beginning, in its middle or at its end."""
    rng = random.Random(0)
    for trial in range(60):
        question, noise = sentence(rng, 20).split(), sentence(rng, 30).split()
        length, start = rng.choice((N - 1, N, N + 1)), rng.choice((0, 3, 6))
        at = rng.choice((0, 7, 30))
        words = noise[:at] + question[start:start + length] + noise[at:]
        expected = not set(ngrams(words)).isdisjoint(ngrams(question))
        assert expected == (length >= N)
        if found(" ".join(question), " ".join(words)) != expected:
            return True
    return False


def test_13_successive_words_are_found_wherever_they_stand_and_12_are_not():
    assert not planted_is_missed()


@pytest.mark.parametrize("name, old, new", [
    ("ngram_hashes", "len(words) - n + 1", "len(words) - n"),
    ("ngram_hashes", "hashes[k:k + count]", "hashes[:count]"),
    ("ngram_hashes", "range(n)", "range(n - 1)"),
    ("Overlap.scan", 'side="right"', 'side="left"'),
    ("Overlap.scan", "hashes[self.filter", "hashes[~self.filter"),
    ("words_of", ".casefold()", "")])
def test_a_search_that_misses_words_would_be_noticed(name, old, new, monkeypatch):
    *owner, name = name.split(".")
    mutate(monkeypatch, Overlap if owner else contamination, name, old, new)
    same = " ".join(LETTERS).upper()
    assert planted_is_missed() or not found(same, same.lower())


def test_equal_ngrams_have_equal_hashes_and_others_differ_even_by_order():
    rng = random.Random(1)
    words = [rng.choice("ab") for _ in range(5000)]
    hashes = ngram_hashes(words).tolist()
    assert len(set(hashes)) == len(set(ngrams(words))) > 3000
    assert len(set(zip(hashes, ngrams(words)))) == len(set(hashes))


@pytest.mark.parametrize("change", [
    str.upper, lambda s: s.replace(" ", "  \n"), lambda s: s.replace(" ", ", "),
    lambda s: "“" + s.replace(" ", "” — “") + "”", lambda s: s.replace("fi", "\ufb01")])
def test_case_space_and_punctuation_of_any_script_do_not_matter(change):
    text = "The naïve Straße first asked why ΣΊΣΥΦΟΣ 漢字 can not find 42 stones or profit"
    assert len(words_of(text)) >= N and words_of(change(text)) == words_of(text)
    assert found(text, "before " + change(text)) and found(change(text), text)


def test_a_question_below_13_words_is_short_and_never_found():
    text = " ".join(LETTERS[:N - 1])
    overlap = Overlap([text, text + " m", ""])
    overlap.scan([text, "", "x"])
    assert overlap.short == {text, ""} and overlap.flags([text, text + " m"]) == [False, False]
    overlap.scan([text + " m"])
    assert overlap.flags([text, text + " m"]) == [False, True]
    Overlap([]).scan([text + " m"])


def test_questions_that_share_the_words_are_all_found_and_no_two_documents_make_one():
    common = " ".join(LETTERS[:N])
    texts = [f"one {common}", f"{common} two", common, "three " + " ".join(LETTERS[1:N + 5])]
    overlap = Overlap(texts)
    overlap.scan([" ".join(LETTERS[:7]), " ".join(LETTERS[7:N])])
    assert overlap.flags(texts) == [False] * 4
    overlap.scan([common])
    assert overlap.flags(texts) == [True, True, True, False]


# ---- the training documents

SECRET = "the quick brown fox jumps over the lazy dog and then it sleeps all day"


def write_documents(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dict(text=text, id=str(n))) + "\n" for n, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.fixture
def data(tmp_path):
    """A data folder whose validation document holds SECRET, and its training documents do not."""
    write_documents(tmp_path / "documents/val_0.jsonl.gz", SECRET)
    write_documents(tmp_path / "documents/train_0.jsonl.gz", "one", "two")
    files = [dict(file=f"documents/{split}_0.jsonl.gz", split=split, documents=1, bytes=9)
             for split in ("val", "train")]
    (tmp_path / "index.json").write_text(json.dumps(dict(
        format="deepdive data", version=1, samples={}, shards=[], funnel=[], documents=files)))
    return tmp_path


def test_only_the_training_split_counts(data):
    assert list(training_files([data])) == [str(data / "documents/train_0.jsonl.gz")]
    assert find([SECRET], [data]).flags([SECRET]) == [False]
    write_documents(data / "documents/train_0.jsonl.gz", "one", f"He said: {SECRET.title()}!")
    assert find([SECRET], [data]).flags([SECRET]) == [True]


def test_folders_of_any_documents_and_single_files_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/story.txt").write_text(SECRET)
    write_documents(tmp_path / "b/c/rows.jsonl", "nothing")
    for folders, is_there in ((["a"], True), (["b"], False), (["b", "a/story.txt"], True)):
        overlap = find([SECRET], [tmp_path / folder for folder in folders])
        assert overlap.flags([SECRET]) == [is_there]


def test_shards_without_documents_are_decoded_document_by_document(tmp_path, tokenizer):
    words = SECRET.split()
    halves = [" ".join(words[:8]), " " + " ".join(words[8:])]
    documents = [[tokenizer.eot, *tokenizer.encode_ordinary(text)] for text in (SECRET, *halves)]
    tokenizer.save(tmp_path / "tokenizer")
    write_shard(tmp_path / "x_val_000.bin", documents[0])
    write_shard(tmp_path / "x_train_001.bin", documents[1] + documents[2])
    assert find([SECRET], [tmp_path]).flags([SECRET]) == [False]
    write_shard(tmp_path / "x_train_002.bin", documents[1] + documents[0])
    assert find([SECRET], [tmp_path]).flags([SECRET]) == [True]


def test_no_documents_or_a_missing_one_ends_in_one_line(data, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(SystemExit, match="holds no documents .*; name the folder"):
            training_files([folder])
    (data / "documents/train_0.jsonl.gz").unlink()
    with pytest.raises(SystemExit, match="train_0.jsonl.gz is missing, although"):
        training_files([data])


# ---- beside the score

def test_eval_writes_the_share_and_the_accuracy_on_the_others(base_run, data, tmp_path, capsys):
    rows = [dict(query=SECRET, choices=["now", "then"], gold=0),
            dict(query=SECRET[::-1], choices=["now", "then"], gold=0),
            dict(query="short", choices=["now", "then"], gold=1)]
    write_documents(data / "documents/train_0.jsonl.gz", SECRET)
    folder = tmp_path / "eval_data/language_understanding"
    folder.mkdir(parents=True)
    (folder / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = shutil.copytree(base_run, tmp_path / "run")
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps(dict(question=SECRET, answer="1", check="contains")) + "\n")
    for _ in range(2):
        run_main(eval_module, "--model", run, "--tasks", f"hellaswag,{problems}", "--core_dir",
                 tmp_path, "--max_new_tokens", 2, "--documents", data)
    results = json.loads((run / "eval.json").read_text())
    result, out = results["hellaswag"], capsys.readouterr().out
    assert result["contaminated"] == pytest.approx(1 / 3) and result["clean_n"] == 2
    assert result["short"] == 1 and result["clean_accuracy"] in (0.0, 0.5, 1.0)
    assert results[str(problems)]["contaminated"] == 1 and "clean_n" not in results[str(problems)]
    assert "contaminated 0.3333 | clean_accuracy " in out and out.count("skipped") == 2


def test_the_accuracy_on_the_others_counts_the_others_alone(monkeypatch):
    spans = [([0, n], 1) for n in range(2)]
    monkeypatch.setattr(likelihood, "score", lambda model, questions: [
        [likelihood.Score(-1.0, 1, False), likelihood.Score(-2.0, 1, False)] for _ in questions])
    engine = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(block_size=9)))
    questions = [(spans, gold) for gold in (0, 0, 1, 0)]        # the first of two always wins
    result = eval_module.measure(engine, questions, 4, "", dirty=[True, False, False, False])
    assert result["accuracy"] == 0.75 and result["contaminated"] == 0.25
    assert result["clean_accuracy"] == pytest.approx(2 / 3) and result["clean_n"] == 3
