"""
Looking things up: a folder of documents → the passage that says what was asked.

    python search.py "number of bytes in a tensor" --docs data/demo            # the three best
    python sample.py --docs my_notes/            # the model writes a query, reads a passage
    python sample.py --docs my_notes/ --rag      # a passage stands before the question

    in:  text files, .jsonl, .jsonl.gz or .parquet; of a data folder, its documents/     out: text

Documents are cut into passages. BM25 ranks them: a passage counts for each word of the query that
it has, more for rare words, more for a few repetitions, less for a long passage. A word that no
passage has is first replaced by the word whose letters are most like it, so that typing errors are
forgiven. If the words find nothing and an embedding library is installed, then the passage of the
most similar meaning is taken.

Papers: Okapi at TREC-3 (Robertson et al. 1994), BM25S (arXiv 2407.03618), retrieval-augmented
generation (2005.11401).
Differs from the papers: a name such as os.path.join counts as one word and as its three parts.
"""
import argparse
import json
import logging
import re
import time
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from corpus import SUFFIXES, read_documents, read_txt

# ---- What the model sees: the same words in training and in use ----------------------------------

CAN_SEARCH = "You can search."      # the system message of a conversation with the search tool
NOTHING = "Nothing was found."

def with_context(passages, question):
    """A question with passages before it, as a user's message (--rag)."""
    found = "\n\n".join(passages) or NOTHING
    return f"Context:\n{found}\n\nQuestion: {question}"

# ---- Documents → passages ------------------------------------------------------------------------

MAX_TITLE_CHARS = 80
PLAIN_TEXT = (".txt", ".md", ".rst")

def passages_of(text, max_chars):
    """Yields the passages of a document: its paragraphs, which blank lines separate.

    A short line on its own that does not end a sentence is a title, and is added to the paragraph
    after it. A longer paragraph than max_chars is cut where a sentence or a line ends, or else
    between words.
    """
    title = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        is_line = "\n" not in paragraph and len(paragraph) <= MAX_TITLE_CHARS
        whole = f"{title}\n{paragraph}".strip()
        if is_line and not paragraph.endswith((".", "!", "?")):
            title = whole
        else:
            yield from pieces(whole, max_chars)
            title = ""
    yield from pieces(title, max_chars)

def pieces(paragraph, max_chars):
    """Cuts a paragraph → texts of at most max_chars characters."""
    while len(paragraph) > max_chars:
        room = paragraph[:max_chars + 1]
        ends = [found.end() for found in re.finditer(r"[.!?](?=\s)|(?=\n)", room)]
        if not ends or ends[-1] < max_chars // 3:
            ends = [found.start() for found in re.finditer(r"\s", room)]
        end = max(ends, default=0) or max_chars
        yield paragraph[:end].strip()
        paragraph = paragraph[end:].strip()
    if paragraph:
        yield paragraph

def document_files(folder):
    """The files of documents in a folder, or the file itself, in order. Raises SystemExit if there
    are none."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise SystemExit(f"--docs {folder} is neither a folder nor a file; name one that holds "
                         f"documents ({' '.join(dict.fromkeys(PLAIN_TEXT + SUFFIXES))})")
    if (folder / "documents").is_dir():
        folder = folder / "documents"       # beside it are pages and shards of the same text
    files = [path for path in sorted(folder.rglob("*"))
             if path.name.lower().endswith(PLAIN_TEXT + SUFFIXES) and path.is_file()]
    if not files:
        raise SystemExit(f"--docs {folder} holds no documents; put files there that end in "
                         f"{' '.join(dict.fromkeys(PLAIN_TEXT + SUFFIXES))}")
    return files

def read_texts(path):
    """Yields the texts of a file of documents; a .md or .rst is read as a .txt is."""
    if path.suffix.lower() in PLAIN_TEXT:
        rows = read_txt(path)
    else:
        rows = read_documents(path)
    for row in rows:
        yield row["text"]

def read_passages(folders, max_chars):
    """Yields for each document of these folders the list of its passages."""
    for folder in folders:
        for path in document_files(folder):
            for text in read_texts(path):
                yield list(passages_of(text, max_chars))

# ---- Words ---------------------------------------------------------------------------------------

def words_of(text):
    """The words of a text in lower case. A name with dots or underscores is a word, and so is each
    of its parts.

    >>> words_of("Call os.path here.")
    ['call', 'os.path', 'here', 'os', 'path']
    """
    words = re.findall(r"[^\W_]+(?:[._][^\W_]+)*", text.lower())
    for name in words.copy():
        parts = name.replace("_", ".").split(".")
        if len(parts) > 1:
            words += parts
    return words

QUESTION_WORDS = frozenset(
    "a about am an and any are can could describe did do does explain for give has have how i in "
    "is it know list look me my of on or please say should show so tell that the there these this "
    "to up was were what when where which who whose why will with would you your".split())

def query_words(query):
    """The words of a query, each once, without those that only make a question of it.

    >>> query_words("Tell me about Ares Base"), query_words("Who?")
    (['ares', 'base'], ['who'])
    """
    words = list(dict.fromkeys(words_of(query)))
    return [word for word in words if word not in QUESTION_WORDS] or words

def letter_pairs(word):
    """The pairs of neighbouring letters of a word, with a space before and after it."""
    padded = f" {word} "
    return [padded[i:i + 2] for i in range(len(padded) - 1)]

def likeness(word, other):
    """2 · pairs that both have / pairs of both, from 0 to 1 (Dice)."""
    ours = Counter(letter_pairs(word))
    theirs = Counter(letter_pairs(other))
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())

# ---- BM25 ----------------------------------------------------------------------------------------

K1 = 1.5        # how soon further repetitions of a word stop to count
B = 0.75        # how much a long passage is held against its words: 0 not at all, 1 in proportion

class BM25:
    """The scores of N rows of words for a query.

    A word with n occurrences in a row of length L adds
        idf · n / (n + K1 · (1 - B + B · L / mean L)),   idf = log(1 + (N - df + ½) / (df + ½))
    to the row's score, where df rows have the word. That is Lucene's form. All these numbers are
    computed once, and lie word by word: a query only adds up those of its words.
    """

    def __init__(self, rows):
        """rows: lists of words."""
        self.n_rows = len(rows)
        self.number_of = {}             # {word: its number}
        numbers = []
        for row in rows:
            numbers += [self.number_of.setdefault(word, len(self.number_of)) for word in row]
        lengths = np.array([len(row) for row in rows])
        rows_of_words = np.repeat(np.arange(self.n_rows), lengths)
        pairs, n = np.unique(np.array(numbers, np.int64) * self.n_rows + rows_of_words,
                             return_counts=True)
        numbers = pairs // self.n_rows
        self.rows = pairs % self.n_rows     # of word w: rows[starts[w]:starts[w + 1]]
        df = np.bincount(numbers, minlength=len(self.number_of))
        self.starts = np.concatenate([[0], df.cumsum()])
        self.idf = np.log(1 + (self.n_rows - df + 0.5) / (df + 0.5))
        norm = K1 * (1 - B + B * lengths / lengths.mean())
        self.weights = self.idf[numbers] * n / (n + norm[self.rows])

    def scores(self, words):
        """The score of each row for the words of a query, (N,)."""
        total = np.zeros(self.n_rows)
        for word in words:
            if word in self.number_of:
                at = self.number_of[word]
                span = slice(self.starts[at], self.starts[at + 1])
                total[self.rows[span]] += self.weights[span]    # a row stands there once
        return total

    def idf_of(self, word):
        """How much the word says; the most for a word that no row has."""
        if word in self.number_of:
            return self.idf[self.number_of[word]]
        return np.log(1 + (self.n_rows + 0.5) / 0.5)

def use_bm25s(ranking, rows):
    """Lets the library bm25s compute the scores of a BM25, if it is installed → was it?"""
    try:
        import bm25s
    except ImportError:
        return False
    logging.getLogger("bm25s").setLevel(logging.WARNING)     # it sets DEBUG when it is imported
    library = bm25s.BM25(k1=K1, b=B, method="lucene")
    library.index(rows, show_progress=False)

    def scores(words):
        known = [word for word in words if word in ranking.number_of]
        if not known:
            return np.zeros(ranking.n_rows)
        return library.get_scores(known)
    ranking.scores = scores
    return True

# ---- The index -----------------------------------------------------------------------------------

LEAST_LIKENESS = 0.7    # of a word to the one that it may be a typing error of
LEAST_SHARE = 0.4       # of what the query's words say; a passage with less was not meant
LEAST_COSINE = 0.35     # of a passage that is found by its meaning

class Index:
    """Passages, and how to find them. embed: a function of a list of texts → one row of numbers for
    each; None: only words count."""

    def __init__(self, passages, embed=None):
        self.passages = passages
        # the first line counts twice: a passage is most about what it begins with
        rows = [words_of(passage.partition("\n")[0] + "\n" + passage) for passage in passages]
        self.ranking = BM25(rows)
        self.uses_bm25s = use_bm25s(self.ranking, rows)
        self.embed = embed

    def search(self, query, k=1):
        """The k best passages for a query, best first; fewer or none if no others fit it."""
        corrected = {word: self.corrected(word) for word in query_words(query)}
        scores = self.ranking.scores(list(dict.fromkeys(corrected.values())))
        best = np.argsort(-scores, kind="stable")[:k]
        found = [self.passages[i] for i in best if self.fits(self.passages[i], corrected)]
        if not found and self.embed:
            cosines = self.embeddings @ unit_length(self.embed([query]))[0]
            best = np.argsort(-cosines, kind="stable")[:k]
            found = [self.passages[i] for i in best if cosines[i] >= LEAST_COSINE]
        return found

    def look_up(self, query):
        """What the model reads after its query: the best passage, or that there is none."""
        found = self.search(query)
        return found[0] if found else NOTHING

    def in_context(self, question):
        """What the model reads in place of a question with --rag."""
        return with_context(self.search(question), question)

    def fits(self, passage, corrected):
        """Whether a passage has enough of the words that say what the query is about. Otherwise
        "New Houston" would find any passage with "new". corrected: {word: the one to look for}.
        """
        theirs = set(words_of(passage))
        said = sum(self.ranking.idf_of(word) for word in corrected)
        shared = sum(self.ranking.idf_of(word) * likeness(word, other)
                     for word, other in corrected.items() if other in theirs)
        return shared > 0 and shared >= LEAST_SHARE * said

    def corrected(self, word):
        """The word; or if no passage has it, the one whose letters are most like it."""
        if word in self.ranking.number_of or len(word) < 3:
            return word
        vocabulary, spelling = self.spelling
        best = vocabulary[spelling.scores(letter_pairs(word)).argmax()]
        return best if likeness(word, best) >= LEAST_LIKENESS else word

    @cached_property
    def embeddings(self):
        """The directions of all passages, (N, D); made when words find nothing for the first time,
        because that takes longer than all else."""
        return unit_length(self.embed(self.passages))

    @cached_property
    def spelling(self):
        """The words of all passages as rows of their letter pairs, for the same ranking."""
        vocabulary = list(self.ranking.number_of)
        return vocabulary, BM25([letter_pairs(word) for word in vocabulary])

def unit_length(rows):
    """Vectors (N, D) → the same directions with length 1, so that a dot product is a cosine."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

def embedding():
    """(name, function of texts) of an installed embedding library that brings its own weights; else
    (None, None)."""
    try:
        import wordllama
    except ImportError:
        return None, None
    folder = Path(wordllama.__file__).parent    # the weights come with the package
    library = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    return "wordllama", library.embed

def build_index(folders, max_chars=1000):
    """The Index of the documents of some folders; one line says what it holds and how it ranks."""
    started = time.perf_counter()
    documents = list(read_passages(folders, max_chars))
    passages = [passage for document in documents for passage in document]
    names = ", ".join(map(str, folders))
    if not passages:
        raise SystemExit(f"--docs {names}: there is no text in it; put documents there")
    library, embed = embedding()
    index = Index(passages, embed)
    by = "BM25"
    if index.uses_bm25s:
        by += " of bm25s"
    if library:
        by += f", then embeddings of {library}"
    print(f"search: {len(documents)} documents of {names}, {len(passages)} passages, ranked by "
          f"{by}; {time.perf_counter() - started:.1f} s", flush=True)
    return index

def open_docs(folders, run, block_size):
    """--docs of sample.py → an Index; of the documents of the run if no folder is named. A passage
    has at most as many characters as the model's context has tokens: about a quarter of it."""
    return build_index(folders or [own_documents(run)], max_chars=block_size)

def own_documents(run):
    """The data folder that a run, or the run that it began from, was trained on. Raises SystemExit
    if that is not to be found."""
    first = run = Path(run)
    seen = set()
    while run not in seen:
        seen.add(run)
        try:
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))
            run = Path(config["deepdive"]["base"])
        except (OSError, ValueError, LookupError, TypeError):
            break
    try:
        with open(run / "log.jsonl", encoding="utf-8") as lines:
            folder = json.loads(next(lines))["header"]["flags"]["data"]
        if Path(folder).is_dir():
            return folder
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        pass
    raise SystemExit(f"--docs: the documents that {first} was trained on are not here; name a "
                     "folder of documents")

def main():
    parser = argparse.ArgumentParser(description="find passages in documents")
    parser.add_argument("query", help="what to look for")
    parser.add_argument("--docs", nargs="+", required=True, help="folders of documents")
    parser.add_argument("--count", type=int, default=3, help="passages to print, at most")
    parser.add_argument("--max_chars", type=int, default=1000, help="characters in a passage")
    args = parser.parse_args()
    for name in ("count", "max_chars"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    found = build_index(args.docs, args.max_chars).search(args.query, args.count)
    print("\n\n".join(found) or NOTHING)

if __name__ == "__main__":
    main()
