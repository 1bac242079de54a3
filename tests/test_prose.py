"""prose.py: which lines are sentences, a clean val split, shards of the prose, bad input."""
import doctest
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import corpus  # noqa: E402
import prose  # noqa: E402
import shards  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from conftest import mutate, run_main  # noqa: E402

SENTENCES = ["Return the number of bytes that are free.",
             "The file is closed when the last reader has ended.",
             "This is done for each of the names in the list."]


def write_documents(out, **splits):
    """OUT/documents and OUT/index.json with these texts of each split."""
    (out / "documents").mkdir()
    files = []
    for split, texts in splits.items():
        name = f"documents/{split}_00000.jsonl.gz"
        rows = "".join(json.dumps({"id": str(i), "text": text}) + "\n"
                       for i, text in enumerate(texts))
        (out / name).write_bytes(gzip.compress(rows.encode()))
        files.append({"file": name, "split": split, "documents": len(texts), "bytes": len(rows)})
    index = {"format": "deepdive data", "version": 1, "documents": files, "shards": [],
             "tokenizer": None, "funnel": [], "samples": {}}
    (out / "index.json").write_text(json.dumps(index))


def texts(out, split, folder="prose"):
    path = out / folder / f"{split}_00000.jsonl.gz"
    return [row["text"] for row in corpus.read_documents(path)]

# ---- what is prose?

@pytest.mark.parametrize("line", [
    *SENTENCES, '"It is not the end of it," said one of them.',
    "Is this (or that) a well-known one?",
    "It returns an object that has been closed; it can't be opened again."])
def test_sentences_are_prose(line):
    assert prose.is_prose(line)


@pytest.mark.parametrize("line", [
    "", "Returns the sum.", "textwrap.dedent(text, width=70, initial_indent='')",
    "return the number of bytes that are free.", "Return the number of bytes that are free",
    "Return the value of x.size[0] + 2 * n_bytes.", ">>> The list is in the order of the names.",
    "Parameters Examples Notes References Returns Raises Attributes.",
    "Args: the list of the names that are to be in the file.",
    "The rank of the matrix is 3 and that of the other is 4."])
def test_code_titles_and_lists_of_names_are_no_prose(line):
    assert not prose.is_prose(line)


def test_the_examples_of_the_docstrings_hold():
    failed, tried = doctest.testmod(prose)
    assert failed == 0 and tried >= 2


@pytest.mark.parametrize("old, new", [
    ("< LEAST_WORDS", "< 0"), ("not BEGINS.match(line)", "False"),
    ("not ENDS.search(line)", "False"),
    ("n_plain >= LEAST_PLAIN", "n_plain >= 0"), ("n_stop >= LEAST_STOP_WORDS", "n_stop >= 0")])
def test_each_part_of_the_rule_is_needed(monkeypatch, old, new):
    no_prose = ["Of a day. To be.", SENTENCES[0].lower(), SENTENCES[0][:-1],
                "The value of x.size[0] is n_bytes.",
                "Parameters Examples Notes References Raises Attributes."]
    assert not any(map(prose.is_prose, no_prose))
    mutate(monkeypatch, prose, "is_prose", old, new)
    assert any(map(prose.is_prose, no_prose))

# ---- files

def test_the_prose_has_the_lines_in_order_and_the_documents_stay_whole(tmp_path):
    whole = f"a.b(c)\n{SENTENCES[0]}\n>>> a.b(1)\n{SENTENCES[1]}"
    write_documents(tmp_path, train=[whole, "a.b(c)\n1 2 3", SENTENCES[2]])
    prose.make_prose(tmp_path)
    assert texts(tmp_path, "train") == ["\n".join(SENTENCES[:2]), SENTENCES[2]]
    assert texts(tmp_path, "train", "documents")[0] == whole
    step = corpus.read_index(tmp_path)["funnel"][-1]
    assert (step["in"], step["kept"], step["dropped"]) == (3, 2, {"no_prose": 1})


def test_no_line_of_the_val_split_stands_in_the_train_split(tmp_path):
    write_documents(tmp_path, val=["\n".join(SENTENCES), SENTENCES[1]],
                    train=[f"x\n  {SENTENCES[1]}", SENTENCES[2]])
    prose.make_prose(tmp_path)
    assert texts(tmp_path, "val") == SENTENCES[:1]
    assert texts(tmp_path, "train") == SENTENCES[1:]
    assert corpus.read_index(tmp_path)["funnel"][-1]["dropped"] == {"all_in_train": 1}


def test_a_second_run_keeps_what_is_finished_and_repeats_what_is_missing(tmp_path, capsys):
    write_documents(tmp_path, train=SENTENCES)
    run_main(prose, "--data", tmp_path)
    path = tmp_path / "prose" / "train_00000.jsonl.gz"
    first = path.read_bytes()
    run_main(prose, "--data", tmp_path)
    assert "finished and kept" in capsys.readouterr().out
    path.unlink()
    run_main(prose, "--data", tmp_path)
    assert path.read_bytes() == first
    assert [row["step"] for row in corpus.read_index(tmp_path)["funnel"]] == ["prose"]


def test_shards_hold_the_prose_if_asked_and_are_not_mixed(tmp_path):
    write_documents(tmp_path, train=[f"a.b(c)\n{line}" for line in SENTENCES])
    prose.make_prose(tmp_path)
    tokenizer = Tokenizer.train(SENTENCES, 300)
    tokenizer.save(tmp_path / "made")
    shards.tokenize(tmp_path, tmp_path / "made", 1000, texts="prose")
    data = (tmp_path / corpus.read_index(tmp_path)["shards"][0]["file"]).read_bytes()
    ids = shards.parse_bin(data, "a shard").tolist()
    assert tokenizer.decode([i for i in ids if i != tokenizer.eot]) == "".join(SENTENCES)
    with pytest.raises(SystemExit, match='made with texts "prose", but this run has "documents"'):
        shards.tokenize(tmp_path, tmp_path / "made", 1000)

# ---- bad input

def message(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          timeout=60, cwd=ROOT)
    assert done.returncode and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_missing_documents_and_missing_prose_end_in_one_line(tmp_path):
    assert "run first prepare_fineweb.py" in message("prose.py", "--data", tmp_path)
    write_documents(tmp_path, train=["a.b(c)"])
    Tokenizer.train(SENTENCES, 300).save(tmp_path / "made")
    assert "run first python prose.py" in message("shards.py", "--data", tmp_path, "--tokenizer",
                                                  tmp_path / "made", "--prose")
    with pytest.raises(SystemExit, match="no line of English sentences"):
        prose.make_prose(tmp_path)
