"""
Contamination: which questions of a task the training documents already hold.

    python eval.py --model runs/d24 --tasks hellaswag --documents data/fineweb

    in:  texts of questions; a data folder of prepare_fineweb.py, or any file or folder of documents
         or token shards
    out: the texts of which 13 successive words stand in a document

A model that has read a test may remember instead of knowing. As for GPT-3, a question counts as
contaminated if any 13 successive words of it, with its right answer, stand in a training document,
too. Words are compared without case and punctuation. A question of fewer than 13 words can never be
found; these are counted on their own.

    >>> overlap = Overlap(["Colorless green ideas sleep " * 4, "so short"])
    >>> overlap.scan(["They said: " + "COLORLESS, green ideas sleep. " * 4])
    >>> overlap.flags(overlap.texts), overlap.short
    ([True, False], {'so short'})

The n-grams of the questions are kept as numbers of 64 bits, sorted; the documents pass by one after
another, so that memory does not grow with them.

Papers: GPT-3 (arXiv 2005.14165), appendix C, whose normalisation lm_eval's decontamination follows.
Differs from the paper: n is always 13, as in lm_eval, where GPT-3 takes 8 to 13 by task. What is no
letter or digit of any script is deleted, not only ASCII's punctuation. 13 words count wherever they
stand, even if many documents have them, as a licence does.
"""
import re
import unicodedata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus import SUFFIXES, read_documents, read_index

N = 13                                              # words
FACTOR = np.uint64(0x9E3779B97F4A7C15)              # odd, so that no bit of a word is lost
FILTER_BITS = 24                                    # a table of 16 MB says no to most n-grams

# ---- N-grams as numbers --------------------------------------------------------------------------

def words_of(text):
    """The words of a text as they are compared.

    >>> words_of("Don't panic — the E-mail said “NO”!")
    ['dont', 'panic', 'the', 'email', 'said', 'no']
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[^\w\s]|_", "", text).split()

def ngrams(words, n=N):
    """The n-grams of a list of words, as tuples: the specification of ngram_hashes."""
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]

def ngram_hashes(words, n=N):
    """For each n-gram a uint64, Σ FACTOR^(n-1-k) hash(word k). Python salts hash(), so that these
    are equal within a process only, and nobody can make two texts collide."""
    count = max(0, len(words) - n + 1)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    sums = np.zeros(count, np.uint64)
    for k in range(n):
        sums = sums * FACTOR + hashes[k:k + count]      # modulo 2^64
    return sums

class Overlap:
    """Questions, and which of them have an n-gram in common with the documents that were scanned.
    """
    def __init__(self, texts):
        self.texts = list(dict.fromkeys(texts))
        found = [ngram_hashes(words_of(text)) for text in self.texts]
        self.short = {text for text, hashes in zip(self.texts, found) if len(hashes) == 0}
        owners = np.repeat(np.arange(len(found)), [len(hashes) for hashes in found])
        hashes = np.concatenate([np.zeros(0, np.uint64), *found])
        order = hashes.argsort(kind="stable")
        self.hashes = hashes[order]             # sorted, one for each n-gram of each question
        self.owners = owners[order]             # the number of its question
        self.filter = np.zeros(2 ** FILTER_BITS, bool)
        self.filter[self.hashes >> np.uint64(64 - FILTER_BITS)] = True
        self.is_found = np.zeros(len(self.texts), bool)

    def scan(self, documents):
        """Marks the questions that share an n-gram with one of these texts."""
        for text in documents:
            hashes = ngram_hashes(words_of(text))
            hashes = hashes[self.filter[hashes >> np.uint64(64 - FILTER_BITS)]]
            first = np.searchsorted(self.hashes, hashes)
            after = np.searchsorted(self.hashes, hashes, side="right")
            for start, end in zip(first, after):
                self.is_found[self.owners[start:end]] = True

    def flags(self, texts):
        """For each of these questions whether it is contaminated."""
        found = {text for text, is_found in zip(self.texts, self.is_found) if is_found}
        return [text in found for text in texts]

# ---- The training documents ----------------------------------------------------------------------

def training_files(folders):
    """The files of folders or files that were named → {path: bytes}. A data folder's own documents
    are those of its training split; without any, its shards are read."""
    files = []
    for folder in map(Path, folders):
        listed = []
        if folder.is_file():
            listed = [folder]
        elif folder.is_dir():
            index = read_index(folder)
            rows = [*index.get("documents", []), *index.get("prose", [])]
            listed = [folder / row["file"] for row in rows if row["split"] == "train"]
            listed = listed or [path for path in sorted(folder.rglob("*"))
                                if path.name.lower().endswith(SUFFIXES) and path.is_file()]
            listed = listed or [path for path in sorted(folder.glob("*.bin"))
                                if "_val_" not in path.name]
        if not listed:
            raise SystemExit(f"--documents {folder} holds no documents ({' '.join(SUFFIXES)}) and "
                             "no token shards (.bin); name the folder of the training data")
        files += listed
    for path in files:
        if not path.is_file():
            raise SystemExit(f"{path} is missing, although index.json lists it; prepare the data "
                             "again, or name another folder with --documents")
    return {str(path): path.stat().st_size for path in files}

def texts_of(path):
    """Yields the texts of the documents in a file."""
    if path.suffix == ".bin":
        yield from decoded_shard(path)
    else:
        for row in read_documents(path):
            yield row["text"]

def decoded_shard(path):
    """Yields the texts of a token shard, whose folder has the tokenizer; without one it is GPT-2's.
    """
    from bpe import Tokenizer
    from shards import check_tokens, parse_bin
    folder = path.parent / "tokenizer"
    tokenizer = Tokenizer.load(folder) if folder.is_dir() else Tokenizer.pretrained("gpt2")
    tokens = parse_bin(path.read_bytes(), path)
    check_tokens(path, tokens, tokenizer)
    ends = np.flatnonzero(tokens == tokenizer.eot)
    for document in np.split(tokens, ends):
        yield tokenizer.decode(document[document != tokenizer.eot].tolist())

def find(texts, folders):
    """→ an Overlap of these texts that has read all training documents in the folders."""
    overlap = Overlap(texts)
    files = training_files(folders)
    for number, path in enumerate(map(Path, files), 1):
        overlap.scan(tqdm(texts_of(path), desc=f"contamination, file {number} of {len(files)}",
                          unit=" documents", leave=False))
    return overlap
