"""Documents: the rows {"text", …} that stages read from files, and the index.json of their folder.

in:  .txt (one document), .jsonl, .jsonl.gz or .parquet (one document a row), upper case or lower
     case; index.json of prepare_fineweb.py

A row must have a "text". A row whose text is null or empty is no document: readers count it and
continue. Anything else that is wrong with a file ends in one line with its name, because it is
cheaper to correct a file than to find out later what is missing.

A .txt is UTF-8, or UTF-16 or UTF-32 if it looks so; another encoding would have to be guessed, and
is refused. Line ends stay as they are. JSON is that of RFC 8259, in UTF-8 and without NaN.
"""
import codecs
import datetime
import gzip
import itertools
import json
import math
import zlib

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("text", "id", "url", "date", "dump", "language", "language_score")  # used of a .parquet
MAX_LINE_BYTES = 256 << 20     # of a .jsonl; Python needs up to nine times as much memory for one
MAX_TXT_BYTES = 64 << 20       # of a .txt as one document
BLOCK_BYTES = 1 << 20

# ---- Any file → rows -----------------------------------------------------------------------------

def read_documents(path):
    """Yield the rows {"text", …} of a file."""
    for row, _ in read_rows(path):
        if row:
            yield row

def read_rows(path):
    """Yield (row, None) for each row of a file, or (None, reason) for one without a text.

    SystemExit names the file, and the line or row, if it cannot be read.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise SystemExit(f"{path} is none of {' '.join(SUFFIXES)}; convert it to one of them")
    try:
        if name.endswith(".txt"):
            rows = read_txt(path)
        elif name.endswith(".parquet"):
            rows = read_parquet(path)
        else:
            rows = read_json_lines(path)
        for number, row in enumerate(rows, 1):
            if "text" not in row or not isinstance(row["text"], str | None):
                raise ValueError(f'row {number} has no string "text"')
            if row["text"] is None:
                yield None, "null_text"
            elif not row["text"] or row["text"].isspace():
                yield None, "empty_text"
            else:
                yield row, None
    except (ValueError, ArithmeticError, OSError, EOFError, zlib.error) as error:
        why = str(error).splitlines() or ["it ends too early"]
        raise SystemExit(f"{path} cannot be read: {why[0]}; correct the file, or replace it by a "
                         "whole one") from None

def read_json_lines(path):
    """Yield the objects of a .jsonl or .jsonl.gz; ValueError names the first line without one."""
    open_file = gzip.open if path.name.lower().endswith(".gz") else open
    with open_file(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} has more than {MAX_LINE_BYTES >> 20} MB")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield parse_line(line, number)

def parse_line(line, number):
    """A line of a .jsonl → its object; ValueError."""
    try:
        row = DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not a JSON object")
    return row

def refuse_constant(name):
    raise ValueError(f"{name} is not a number of JSON")

DECODER = json.JSONDecoder(parse_constant=refuse_constant)  # NaN, Infinity

def read_parquet(path):
    """Yield the rows of a .parquet with those of COLUMNS that it has, as JSON has them."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path} needs the package pyarrow, which is not installed; run pip "
                         "install -r requirements-extra.txt") from None
    try:
        file = ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        if "text" not in columns:
            raise ValueError('it has no column "text"')
        for batch in file.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                text = row.pop("text")
                if isinstance(text, bytes):
                    text = text.decode("utf-8", "replace")
                others = {name: json_value(value) for name, value in row.items()}
                yield {"text": text} | others
    except ArrowException as error:
        raise ValueError(str(error)) from None

def json_value(value):
    """A value of a .parquet → one that JSON can hold: None, a str or a finite number."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)

# ---- .txt ----------------------------------------------------------------------------------------

def read_txt(path):
    """Yield the whole text as one row."""
    if path.stat().st_size > MAX_TXT_BYTES:
        raise ValueError(f"it has more than {MAX_TXT_BYTES >> 20} MB, which is too long for one "
                         "document")
    yield {"text": "".join(text_blocks(path))}

def text_blocks(path):
    """Yield the text of a .txt in blocks of up to a million characters; SystemExit."""
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(BLOCK_BYTES))
        with open(path, encoding=encoding, newline="") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not {error.encoding.upper()} text; convert it to UTF-8, e.g. "
                         "with iconv -f WINDOWS-1252 -t UTF-8") from None

def encoding_of(head):
    """The first bytes of a text → the name of its encoding, UTF-8 unless it looks like another."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head[1::2].count(0) > len(head) // 4:  # every second byte of English UTF-16 is 0
        return "utf-16-le"
    if head[::2].count(0) > len(head) // 4:
        return "utf-16-be"
    return "utf-8-sig"  # without the mark that some programs write

# ---- index.json, settings.json -------------------------------------------------------------------

INDEX_LISTS = {"documents": ("file", "split", "documents", "bytes"),
               "shards": ("file", "split", "tokens", "documents", "bytes", "sha256"),
               "funnel": ("step", "in", "kept", "dropped", "flagged", "bytes", "docs_per_s")}

def read_index(out):
    """index.json of a folder; {} if there is none."""
    path = out / "index.json"
    if not path.exists():
        return {}
    index = read_json(path)
    if (index.get("format"), index.get("version")) != ("deepdive data", 1):
        raise SystemExit(f"{path} has format {index.get('format')} version {index.get('version')}, "
                         f"not deepdive data version 1; remove {out} and prepare the data again")
    if not isinstance(index.get("samples"), dict):
        raise SystemExit(f"{path} is damaged: it has no samples; remove {out} and prepare the data "
                         "again")
    for name, fields in INDEX_LISTS.items():
        rows = index.get(name)
        if not isinstance(rows, list) or not all(has_fields(row, fields) for row in rows):
            raise SystemExit(f"{path} is damaged: {name} is not a list of objects with "
                             f"{', '.join(fields)}; remove {out} and prepare the data again")
    return index

def has_fields(row, fields):
    return isinstance(row, dict) and all(field in row for field in fields)

def read_json(path):
    """The object in a JSON file; SystemExit if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # RecursionError: too many brackets
        value = None
    if not isinstance(value, dict):
        raise SystemExit(f"{path} is damaged: it is not a JSON object; remove it and repeat the "
                         "command that wrote it")
    return value

def refuse_changes(before, now, out, remedy):
    """Stop if a folder was made with other settings than this run has; settings are flat JSON."""
    for key, value in now.items():
        other = before.get(key)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            names = sorted(value.keys() | other.keys())
            changed = [name for name in names if value.get(name) != other.get(name)]
            raise SystemExit(f"{out} was made with {key} that differ from this run's in "
                             f"{changed[0]}; {remedy}")
        raise SystemExit(f"{out} was made with {key} {json.dumps(other)}, but this run has "
                         f"{json.dumps(value)}; {remedy}")

def print_funnel(index):
    """Print what each step received, kept and dropped, and what the splits hold."""
    print(f"{'step':<18}{'in':>9}{'kept':>9}{'MB kept':>9}{'docs/s':>9}   dropped (? only noted)")
    for row in index["funnel"]:
        reasons = [(n, f"{reason} {n}") for reason, n in row["dropped"].items()]
        reasons += [(n, f"?{reason} {n}") for reason, n in row["flagged"].items()]
        why = ", ".join(text for _, text in sorted(reasons, reverse=True)[:6])
        print(f"{row['step']:<18}{row['in']:>9}{row['kept']:>9}{row['bytes'] / 1e6:>9.2f}"
              f"{row['docs_per_s']:>9.0f}   {why}")
    for split in ("val", "train"):
        files = [file for file in index["documents"] if file["split"] == split]
        n_documents = sum(file["documents"] for file in files)
        megabytes = sum(file["bytes"] for file in files) / 1e6
        tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)
        print(f"{split:<5} {n_documents} documents, {megabytes:.2f} MB, {tokens} tokens")
