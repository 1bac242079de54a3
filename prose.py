"""Documents → their prose: the lines that are English sentences, for a small model to learn.

    python prose.py --data data/demo
    python bpe.py train --input data/demo/prose --vocab_size 2048 --out data/demo/tokenizer
    python shards.py --data data/demo --tokenizer data/demo/tokenizer --prose

in:  DATA/documents/{train,val}_00000.jsonl.gz … and DATA/index.json, from prepare_fineweb.py
out: DATA/prose/{train,val}_00000.jsonl.gz …  the same documents with fewer lines, in the same order
     DATA/index.json (its list "prose", and the step "prose" of its funnel)

A manual is half code, lists, formulas and names. A model of three million parameters that reads two
million tokens learns a little of each, and writes none of them well; given the sentences alone, it
learns to write sentences. The documents stay whole: what asks about functions reads those.

A line of the val split that also stands in the train split is left out of it. Boilerplate repeats
in any web, and a model that has read a line before is not tested by it.

Differs from C4 (arXiv 1910.10683, §2.2), which keeps the lines that end with a punctuation mark:
here a line must also consist of plain words, since code ends with one, too.
"""
import argparse
import gzip
import hashlib
import json
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from corpus import print_funnel, read_documents, read_index
from download import one_line_when_full, whole_file

# ---- What is prose? ------------------------------------------------------------------------------

LEAST_WORDS = 6             # a shorter line is a title or a remark
LEAST_PLAIN = 0.95          # share of a line's words that PLAIN_WORD matches
LEAST_STOP_WORDS = 0.20     # running English has 30 to 50 % of them, a list of names has none

# letters with hyphens, slashes and apostrophes inside, and quotes, brackets or punctuation around
PLAIN_WORD = re.compile(r"""["'(]*[A-Za-z]+(?:[-'/][A-Za-z]+)*[)"']*[.,;:!?]*[)"']*""")
BEGINS = re.compile(r"""["'(]?[A-Z](?!\w*:)""")     # but not with a label, such as Args:
ENDS = re.compile(r"""[.!?:]["')]*$""")
STOP_WORDS = set("""the of a an and to in is that it for as with are be this by or on not from if
    which can will at when has have was""".split())

def is_prose(line):
    """True if a line is made of English sentences: it begins with a capital, ends as a sentence
    does, and its words are plain words with enough stop words among them.

    >>> is_prose("Return the number of bytes that are free.")
    True
    >>> is_prose("Return the value of x.size[0] + 2 * n_bytes.")
    False
    """
    words = line.split()
    if len(words) < LEAST_WORDS or not BEGINS.match(line) or not ENDS.search(line):
        return False
    n_plain = sum(1 for word in words if PLAIN_WORD.fullmatch(word))
    n_stop = sum(1 for word in words if word.lower().strip("\"'().,;:!?") in STOP_WORDS)
    return n_plain >= LEAST_PLAIN * len(words) and n_stop >= LEAST_STOP_WORDS * len(words)

def prose_lines(text):
    """The lines of a text that are prose, in order."""
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if is_prose(line)]

# ---- Documents → files of prose ------------------------------------------------------------------

def line_hash(line):
    return hashlib.sha256(line.encode()).digest()[:8]

def repeated_lines(files, out):
    """Hashes of the val split's lines of prose that also stand in the train split. Memory grows
    with the val split only."""
    of_val = {line_hash(line) for file in files if file["split"] == "val"
              for row in read_documents(out / file["file"]) for line in prose_lines(row["text"])}
    repeated = set()
    if of_val:
        for file in files:
            if file["split"] == "train":
                for row in read_documents(out / file["file"]):
                    repeated |= of_val.intersection(map(line_hash, prose_lines(row["text"])))
    return repeated

def write_prose(out, file, repeated, row):
    """A file of documents → one in OUT/prose; returns its entry of index.json. `row`, the step's
    row of the funnel, counts what is kept and dropped."""
    name = f"prose/{Path(file['file']).name}"
    n_documents = n_bytes = 0
    with whole_file(out / name) as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as zipped:
        for document in read_documents(out / file["file"]):
            lines = prose_lines(document["text"])
            reason = "no_prose"
            if file["split"] == "val" and lines:
                lines = [line for line in lines if line_hash(line) not in repeated]
                reason = "all_in_train"
            row["in"] += 1
            if not lines:
                row["dropped"][reason] = row["dropped"].get(reason, 0) + 1
                continue
            text = "\n".join(lines)
            zipped.write(json.dumps(document | {"text": text}, ensure_ascii=False).encode() + b"\n")
            n_documents += 1
            n_bytes += len(text.encode())
    row["kept"] += n_documents
    row["bytes"] += n_bytes
    return {"file": name, "split": file["split"], "documents": n_documents, "bytes": n_bytes}

def make_prose(out):
    """OUT/documents → OUT/prose, unless it is finished. SystemExit if there are no documents, or no
    prose in those of the train split."""
    started = time.perf_counter()
    index = read_index(out)
    files = index.get("documents")
    if not files:
        raise SystemExit(f"{out}/index.json lists no documents; run first prepare_fineweb.py "
                         f"--source crawl|warc|text … --out {out}")
    if index.get("prose") and all((out / file["file"]).exists() for file in index["prose"]):
        print(f"{out}/prose is finished and kept")
        return
    row = {"step": "prose", "in": 0, "kept": 0, "dropped": {}, "flagged": {}, "bytes": 0}
    repeated = repeated_lines(files, out)
    index["prose"] = [write_prose(out, file, repeated, row)
                      for file in tqdm(files, "prose", unit="file")]
    if not any(file["documents"] for file in index["prose"] if file["split"] == "train"):
        raise SystemExit(f"{out}/documents holds no line of English sentences to train with; leave "
                         "this step and shards.py --prose out")
    row["seconds"] = time.perf_counter() - started
    row["docs_per_s"] = row["in"] / row["seconds"]
    index["funnel"] = [other for other in index["funnel"] if other["step"] not in
                       ("prose", "tokenize")] + [row]
    with whole_file(out / "index.json") as file:
        file.write(json.dumps(index, indent=1, ensure_ascii=False).encode("utf-8", "replace"))

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder that prepare_fineweb.py has made")
    args = parser.parse_args()
    with one_line_when_full():
        make_prose(args.data)
    index = read_index(args.data)
    print_funnel(dict(index, funnel=[row for row in index["funnel"] if row["step"] == "prose"]))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to make the prose", file=sys.stderr)
        raise SystemExit(130) from None
