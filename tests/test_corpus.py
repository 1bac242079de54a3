"""Documents from every kind of file: encodings, empty rows, odd types, damage; and index.json."""
import datetime
import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import corpus  # noqa: E402

TEXTS = ["The river rises.", "Größe, naïve, 河流\n", "\ufeffmark \u2028 \r\n kept"]

def write_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet
    parquet.write_table(pa.table(columns), path)

def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()

def texts(path):
    return [row["text"] for row in corpus.read_documents(path)]

@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.jsonl.gz", "A.Jsonl.GZ", "a.Parquet"])
def test_all_rows_come_from_every_kind_of_file_in_any_case(tmp_path, name):
    data = jsonl(*({"text": text} for text in TEXTS)).replace(b"\n", b"\r\n")
    path = tmp_path / name
    if name == "a.Parquet":
        write_parquet(path, text=TEXTS)
    else:
        path.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert texts(path) == list(bpe.read_texts(path)) == TEXTS

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32"])
def test_a_txt_is_read_in_the_encoding_that_it_has(tmp_path, encoding):
    text = "“Größe” is a naïve café’s word.\r\nIt has two lines.\n" * 9
    (tmp_path / "a.TXT").write_bytes(text.encode(encoding))
    assert texts(tmp_path / "a.TXT") == ["".join(bpe.read_texts(tmp_path / "a.TXT"))] == [text]

@pytest.mark.parametrize("data", ["“Bäcker”".encode("cp1252"), b"a" * (3 << 20) + b"\xa0"])
def test_a_txt_in_an_unknown_encoding_is_refused_by_both_readers(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    for read in (corpus.read_rows, bpe.read_texts):
        with pytest.raises(SystemExit, match="a.txt is not UTF-8 text; convert it"):
            list(read(tmp_path / "a.txt"))

def test_a_character_may_lie_across_two_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 8)
    (tmp_path / "a.txt").write_bytes("1234567ß and more".encode())
    assert texts(tmp_path / "a.txt") == ["1234567ß and more"]

def test_rows_without_text_are_skipped_and_counted_by_both_readers(tmp_path, capsys):
    rows = [{"text": None}, {"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(*rows))
    write_parquet(tmp_path / "a.parquet", text=[row["text"] for row in rows])
    for name in ("a.jsonl", "a.parquet"):
        reasons = [reason for _, reason in corpus.read_rows(tmp_path / name)]
        assert reasons == ["null_text", None, "empty_text", "empty_text", None]
        assert list(bpe.read_texts(tmp_path / name)) == ["a", "b"]
        assert "3 rows without text" in capsys.readouterr().out

def test_values_of_a_parquet_become_values_of_json(tmp_path):
    when = datetime.datetime(2024, 10, 1, 12, 30)
    write_parquet(tmp_path / "a.parquet", text=["Größe".encode(), b"\xff"], date=[when, None],
                  language_score=[0.9, float("nan")], token_count=[1, 2])
    rows = list(corpus.read_documents(tmp_path / "a.parquet"))
    assert rows == [{"text": "Größe", "date": "2024-10-01T12:30:00", "language_score": 0.9},
                    {"text": "\ufffd", "date": None, "language_score": None}]
    json.dumps(rows, allow_nan=False)

@pytest.mark.parametrize("columns", [{"body": ["x"]}, {"text": [7]}, {"text": [["x"]]}])
def test_a_parquet_without_text_ends_in_one_line(tmp_path, columns):
    write_parquet(tmp_path / "a.parquet", **columns)
    for read in (corpus.read_rows, bpe.read_texts):
        with pytest.raises(SystemExit, match='a.parquet cannot be read: .* has no .*"text"; '):
            list(read(tmp_path / "a.parquet"))

@pytest.mark.parametrize("before, now, found", [
    ({"seed": 1}, {"seed": 2}, "seed 1, but this run has 2; remove"),
    ({}, {"quality": "fineweb"}, 'quality null, but this run has "fineweb"; remove'),
    ({"inputs": {"a": "1", "b": "2"}}, {"inputs": {"a": "1", "b": "3"}}, "inputs that differ .* b;")])
def test_other_settings_are_named(before, now, found):
    corpus.refuse_changes(before, {"more": None}, "out", "remove it")
    with pytest.raises(SystemExit, match=f"out was made with {found}"):
        corpus.refuse_changes(before, now, "out", "remove it")

def test_a_line_or_text_that_memory_could_not_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(corpus, "MAX_TXT_BYTES", 1 << 20)
    line = jsonl({"text": "x" * (1 << 20)})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "a"}) + line))
    with pytest.raises(SystemExit, match="a.jsonl.gz cannot be read: line 2 has more than 1 MB"):
        texts(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.txt").write_bytes(line)
    with pytest.raises(SystemExit, match="a.txt cannot be read: it has more than 1 MB"):
        texts(tmp_path / "a.txt")
    assert "".join(bpe.read_texts(tmp_path / "a.txt")) == line.decode()
