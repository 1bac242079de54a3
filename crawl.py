"""Stage 0: the web → WARC files, as Common Crawl makes them, and back from such files to pages.

    python crawl.py https://example.org/ --max_pages 500 --out data/site
    python crawl.py --out data/demo            the manual of the Python software on this machine
    python prepare_fineweb.py --source warc data/site/warc/*.gz --out data/clean

in:  seed URLs; without any, demo/web.py is started and crawled
out: OUT/warc/crawl_00000.warc.gz …  gzipped WARC 1.0 (ISO 28500), a gzip member for each record:
     "response" records hold what a server answered, "metadata" ones why a URL could not be had

Pages are fetched breadth first, on the hosts of the seeds only, where robots.txt (RFC 9309) allows
it. A file is written whole, and the finished files are the only state: a crawl that was killed
reads in them what is done and which links were found, and goes on as if nothing had happened.

Differs from Common Crawl: the order is breadth first instead of a ranking of hosts, there are no
request records, and a text of more than 8 MB is dropped instead of being cut.
"""
import argparse
import contextlib
import functools
import gzip
import itertools
import multiprocessing
import queue
import re
import resource
import subprocess
import sys
import threading
import time
import urllib.robotparser
import uuid
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from download import one_line_when_full, whole_file

MAX_PAGE_BYTES = 8 << 20      # HTML of a page, unzipped: bounds zip bombs too
MAX_RECORD_BYTES = 32 << 20   # a longer WARC record is passed over
MAX_HEADER_BYTES = 64 << 10   # of a WARC record
PIECE_BYTES = 128 << 10       # read at once; 32 times as much at most when unzipped
PAGES_PER_WARC = 250          # what a killed crawl loses, and one task of prepare_fineweb.py
PAGE_SECONDS = 20             # to extract the text of a page, which is dropped if it takes longer
PAGE_MEMORY_BYTES = 2 << 30   # of the process that does it, without memory that it shares
FETCH_SECONDS = 120           # one URL in all, with retries and the pauses a server asks for
SILENCE_SECONDS = 20          # without a byte, after which a try has failed
USER_AGENT = "deepdive-crawler/1.0 (educational; obeys robots.txt)"
MANUAL = "http://manual.localhost"  # keeps its name, so that a crawl goes on when the port changes

def verdict(page, **broken):
    """(page, None), or (None, the name of the first rule that is broken)."""
    reason = next((rule for rule, is_broken in broken.items() if is_broken), None)
    return (page if reason is None else None), reason

# ---- WARC files ----------------------------------------------------------------------------------
# "WARC/1.0", header lines, an empty line, Content-Length bytes, an empty line; and again. In a .gz
# each record is a gzip member of its own, so that damage reaches no further than one record.

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

def unzipped(path):
    """Yield (bytes, None) for each piece of a file, and (b"", why) where the stream breaks off.

    `why` is "broken_gzip", behind which the next gzip member is found by its magic, or "end".
    """
    with open(path, "rb") as file:
        is_gzip, member = file.peek(2)[:2] == b"\x1f\x8b", None
        data = file.read(PIECE_BYTES)
        while data and not is_gzip:
            yield data, None
            data = file.read(PIECE_BYTES)
        while data:
            if not member:
                at = data.find(b"\x1f\x8b\x08")
                if at < 0:
                    more = file.read(PIECE_BYTES)
                    data = more and data[-2:] + more  # a magic may be cut
                    continue
                data, member, is_first = data[at:], zlib.decompressobj(wbits=31), True
            try:
                yield member.decompress(data, 32 * PIECE_BYTES), None
                # at a member's end zlib may name what follows in both
                data = member.unused_data if member.eof else member.unconsumed_tail
                member, is_first = None if member.eof else member, False
            except zlib.error:
                data, member = data[is_first:], None
                yield b"", "broken_gzip"
            data = data or file.read(PIECE_BYTES)
        yield b"", "end"

def record_at(buffer, start, is_last):
    """The record that begins at `start`: ((headers, payload), None, its end) or (None, reason,
    where to search on). Unless the bytes are the last, "truncated_record" asks for more of them.
    """
    window = buffer[start:start + MAX_HEADER_BYTES]
    head, blank, _ = window.partition(b"\r\n\r\n")
    headers = parse_headers(head) if blank else {}
    length = re.fullmatch(r"\d{1,15}", headers.get("content-length", ""))
    body = start + len(head) + 4
    end = body + int(length[0]) if length else body
    following = buffer[end:end + 16].lstrip(b"\r\n")[:5]
    record, reason = verdict(
        (headers, bytes(buffer[body:end])),
        broken_header=not length and (blank or len(window) == MAX_HEADER_BYTES),
        huge_record=end - body > MAX_RECORD_BYTES,
        truncated_record=end + 16 * (not is_last) > len(buffer),
        wrong_length=not b"WARC/".startswith(following))
    return record, reason, start + 7 if reason else end

def read_warc(path):
    """Yield ((headers, payload), None) for every record of a WARC file, or (None, reason).

    Nothing in the file is fatal: after a record that is wrong, the next "WARC/1.0" counts as a
    beginning, as too great a length may have swallowed good records. Memory holds one record.
    """
    version, buffer = re.compile(rb"WARC/\d\.\d+\r\n"), bytearray()
    for piece, stop in unzipped(path):
        buffer += piece
        at = 0
        while begins := version.search(buffer, at):
            record, reason, goes_on = record_at(buffer, begins.start(), is_last=bool(stop))
            if reason == "truncated_record" and not stop:
                at = begins.start()
                break
            at = goes_on
            yield record, reason
        else:
            at = max(at, len(buffer) - 12)  # a version line may be cut
        del buffer[:len(buffer) if stop else at]
        if stop == "broken_gzip":
            yield None, stop

# ---- HTTP answers → pages ------------------------------------------------------------------------

def dechunk(body):
    """Undo Transfer-Encoding: chunked (RFC 9112, 7.1): hexadecimal size, line end, bytes, line end.

    Archives often keep the header although they store the body without chunks: left as it is.
    """
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

def parse_answer(answer):
    """A stored HTTP answer → (status or "", headers, body as the server meant it, or None)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, http = re.match(rb"HTTP/\S+ +(\d{3})", head), parse_headers(head)
    if "chunked" in http.get("transfer-encoding", "").lower():
        body = dechunk(body)
    body = unzip(body, http.get("content-encoding", "").lower())
    return status[1].decode() if status else "", http, body

def decode(body, content_type):
    """Bytes → text, or None: by the charset that the header names, that <meta> names in the first
    4 kB, UTF-8, or a guess, whichever first decodes without an error.
    """
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
    """A WARC record → (page, None) or (None, reason); page: {"id", "url", "date", "html"}.

    Kept are answers with status 200 that are HTML by the type that the archive found, or the header
    names, or, where neither is there, by an <html> tag. A "conversion" record, which is what Common
    Crawl's WET files hold, gives a page with "text" instead of "html".
    """
    kind = headers.get("warc-type", "nameless")
    page = {"id": headers.get("warc-record-id", ""), "date": headers.get("warc-date", ""),
            "url": headers.get("warc-target-uri", "").strip("<>")}
    if kind != "response":
        wet = page | {"text": payload.decode("utf-8", "replace")}
        return verdict(wet, **{f"{kind}_record": kind != "conversion"})
    status, http, body = parse_answer(payload)
    mime = headers.get("warc-identified-payload-type") or http.get("content-type", "")
    page, reason = verdict(
        page, not_http=not status, **{f"status_{status}": status != "200"},
        not_html=not re.match(r"(text/html|application/xhtml\+xml)\b", mime or "text/html", re.I),
        content_encoding=body is None, page_too_large=len(body or b"") > MAX_PAGE_BYTES)
    if reason:
        return None, reason
    html = decode(body, http.get("content-type", ""))
    return verdict(page | {"html": html}, unknown_charset=html is None,
                   not_html=not mime and "<html" not in (html or "")[:4096].lower())

# ---- HTML → text ---------------------------------------------------------------------------------
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
    """The main text of a page, a line a block, by regular expressions: for want of trafilatura.

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

class Extractor:
    """extract_text(page) → (page with "text" instead of "html", None) or (None, reason).

    name: "trafilatura", called as FineWeb does, "resiliparse" (main content, a dozen times as fast,
    another text) or "plain" for plain_text. Each runs in a forked child, which is killed and
    replaced when a page takes PAGE_SECONDS (TimeoutError) or makes it crash (EOFError). A signal
    would not do: Python handles one between two of its own instructions, and what hangs or crashes
    is C code.
    """
    __name__ = "extract_text"  # the step's name, as that of a function

    def __init__(self, name):
        self.extract, self.child = plain_text, None
        if name == "trafilatura":  # imported here, so that a new child need not
            from trafilatura import extract
            self.extract = functools.partial(extract, favor_precision=True, include_comments=False)
        if name == "resiliparse":
            from resiliparse.extract.html2text import extract_plain_text
            self.extract = functools.partial(extract_plain_text, main_content=True, links=False,
                                             alt_texts=False, form_fields=False, noscript=False)

    def serve(self, pipe):
        """The child: HTML comes from the pipe, its text or an exception goes back."""
        self.pipe.close()  # the parent's end; open here, it would hide that the parent is gone
        resource.setrlimit(resource.RLIMIT_DATA, (PAGE_MEMORY_BYTES, PAGE_MEMORY_BYTES))
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                html = pipe.recv()
                try:
                    pipe.send(self.extract(html) or "")
                except Exception as error:
                    pipe.send(error)

    def __call__(self, page):
        if "text" in page:  # a WET record
            return page, None
        if self.child is None:
            fork = multiprocessing.get_context("fork")
            self.pipe, theirs = fork.Pipe()
            self.child = fork.Process(target=self.serve, args=(theirs,), daemon=True)
            self.child.start()
            theirs.close()
        try:
            self.pipe.send(page["html"])
            text = self.pipe.recv() if self.pipe.poll(PAGE_SECONDS) else TimeoutError()
        except (EOFError, OSError) as crash:
            text = crash
        if isinstance(text, Exception):
            self.close()
            raise text
        rest = {key: value for key, value in page.items() if key != "html"}
        return verdict(rest | {"text": text.strip()}, no_text=not text.strip())

    def close(self):
        """End the child; the next page starts another one."""
        if self.child:
            self.child.kill()
            self.child.join()
            self.child = None

# ---- The crawler ---------------------------------------------------------------------------------

def links_of(url, answer):
    """Absolute links of a stored HTTP answer: its Location, and every <a href> if it is HTML."""
    _, http, body = parse_answer(answer)
    found = [http["location"]] if "location" in http else []
    if "html" in http.get("content-type", ""):
        found += [unescape(link.decode("utf-8", "replace")) for link in
                  re.findall(rb"<a\s[^<>]*?href\s*=\s*[\"']?([^\"'\s>]+)", body or b"", re.I)]
    for link in found:
        with contextlib.suppress(ValueError):  # "http://[" is no URL
            yield urldefrag(urljoin(url, link)).url

class Fetcher:
    """HTTP with retries, deadlines and robots.txt, for several threads.

    `delay` is the seconds between two requests; `hosts` maps the origin (scheme and host) of a URL
    to the one that is really asked.
    """

    def __init__(self, delay, hosts):
        self.delay, self.hosts, self.rules = delay, hosts, {}
        self.turn, self.session = threading.Lock(), requests.Session()
        self.session.headers["User-Agent"] = USER_AGENT
        retries = urllib3.Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                                redirect=0, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retries))

    def ask(self, url):
        """URL → (the server's answer, None), or (b"", why there is none).

        The answer is stored as it came, still gzipped, up to a byte more than MAX_PAGE_BYTES: thus
        parse_record sees what is too large. A redirect is not followed but is a link, except that
        of robots.txt (RFC 9309, 2.3.1.2). What is not text is not read at all.
        """
        origin = "/".join(url.split("/")[:3])
        try:
            with self.session.get(self.hosts.get(origin, origin) + url[len(origin):], stream=True,
                                  timeout=SILENCE_SECONDS,
                                  allow_redirects=url == origin + "/robots.txt") as answer:
                mime = answer.headers.get("Content-Type", "text/html")
                is_text = mime.startswith(("text/", "application/xhtml"))
                body = answer.raw.read((MAX_PAGE_BYTES + 1) * is_text, decode_content=False)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            return b"", str(error)
        head = [f"HTTP/1.1 {answer.status_code} {answer.reason}"] + [
            f"{name}: {value}" for name, value in answer.headers.items()
            if name.lower() in ("content-type", "content-encoding", "location")]
        return "\r\n".join(head).encode("utf-8", "replace") + b"\r\n\r\n" + body, None

    def fetch(self, url):
        """ask(url) in its turn, given up after FETCH_SECONDS.

        A socket's own timeout begins anew with each byte, so that a server could hold a crawl for
        ever; a thread cannot be stopped, but one that is late can be left behind.
        """
        with self.turn:
            time.sleep(self.delay)
        answers = queue.SimpleQueue()
        threading.Thread(target=lambda: answers.put(self.ask(url)), daemon=True).start()
        try:
            return answers.get(timeout=FETCH_SECONDS)
        except queue.Empty:
            return b"", f"no complete answer within {FETCH_SECONDS} s"

    def record(self, url):
        """URL → (WARC record, links); what cannot be had is a record too."""
        answer, why = self.fetch(url)
        if why:
            return warc_record("metadata", url, why.encode(), "text/plain"), []
        return warc_record("response", url, answer), list(links_of(url, answer))

    def allowed(self, url):
        """Whether robots.txt allows a URL. One that is not there (status 4xx) allows everything,
        one that a server fails to send (5xx, silence) nothing, as RFC 9309, 2.3.1, has it.
        """
        origin = "/".join(url.split("/")[:3])
        if origin not in self.rules:
            rules = self.rules[origin] = urllib.robotparser.RobotFileParser()
            status, _, body = parse_answer(self.fetch(origin + "/robots.txt")[0])
            text = (body or b"").decode("utf-8", "replace") if status == "200" else ""
            rules.parse(text.splitlines() if "200" <= status < "500" else
                        ["User-agent: *", "Disallow: /"])
            self.delay = max(self.delay, float(rules.crawl_delay(USER_AGENT) or 0))
        return self.rules[origin].can_fetch(USER_AGENT, url)

class Crawl:
    """The state of a crawl: which URLs were fetched, and which are next, in breadth-first order.

    The order follows from the answers alone, however many threads fetch and however often the
    crawl is killed: links are added in the order of the pages that hold them.
    """

    def __init__(self, seeds, fetcher):
        self.hosts, self.fetcher = {urlsplit(seed).netloc for seed in seeds}, fetcher
        self.known, self.fetched, self.frontier = set(), set(), deque()
        self.add(urldefrag(seed).url for seed in seeds)

    def add(self, links):
        """Put the links that are new, and on the hosts of the seeds, at the end of the frontier."""
        for link in links:
            if link not in self.known and link.startswith("http") \
                    and urlsplit(link).netloc in self.hosts:
                self.known.add(link)
                self.frontier.append(link)

    def replay(self, path):
        """Take over what a finished file holds, as if its pages had been fetched now."""
        for headers, payload in (record for record, _ in read_warc(path) if record):
            self.fetched.add(headers["warc-target-uri"])
            self.add(links_of(headers["warc-target-uri"], payload))

    def records(self, max_pages, threads):
        """Fetch and yield WARC records until max_pages are fetched or no link is left."""
        while len(self.fetched) < max_pages and self.frontier:
            batch = []
            while self.frontier and len(batch) < min(32, max_pages - len(self.fetched)):
                url = self.frontier.popleft()
                if url not in self.fetched and self.fetcher.allowed(url):
                    batch.append(url)
            for url, (record, links) in zip(batch, threads.map(self.fetcher.record, batch)):
                self.fetched.add(url)
                self.add(links)
                yield record

@contextlib.contextmanager
def manual_of_this_machine():
    """Serves demo/web.py while the block runs; gives its address."""
    script = Path(__file__).parent / "demo" / "web.py"
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        address = child.stdout.readline().strip().rstrip("/")
        if not address:
            raise SystemExit(f"{script} printed no address; a crawl without a seed URL reads its "
                             "site; run it alone to see why, or give a seed URL")
        yield address
    finally:
        child.kill()
        child.wait()

def check_seeds(seeds):
    """Stop if a seed is no URL: a crawl of it would fetch nothing and say nothing."""
    if odd := [seed for seed in seeds if not re.match("https?://[^/]", seed)]:
        raise SystemExit(f"{odd[0]} is no URL of a page; a crawl begins at such URLs; for a site "
                         f"write https://{odd[0]}")

def crawl(seeds, folder, max_pages, delay=None):
    """Fetch up to max_pages into folder/crawl_00000.warc.gz …; returns these paths.

    seeds: URLs; none means the manual of this machine. delay: seconds between two requests, by
    default 1, or 0 if all seeds are on this machine; a Crawl-delay in robots.txt may lengthen it.
    Files that are there already count as fetched; 4 requests run at once where the delay allows.
    """
    with contextlib.ExitStack() as stack:
        hosts = {} if seeds else {MANUAL: stack.enter_context(manual_of_this_machine())}
        seeds = seeds or [f"{MANUAL}/"]
        near = rf"http://(127\.0\.0\.1|localhost)\b|{MANUAL}/"
        is_near = all(re.match(near, seed) for seed in seeds)
        delay = delay if delay is not None else 0.0 if is_near else 1.0
        state, paths = Crawl(seeds, Fetcher(delay, hosts)), []
        while (path := folder / f"crawl_{len(paths):05d}.warc.gz").exists():
            state.replay(path)
            paths.append(path)
        progress = stack.enter_context(tqdm(
            total=max_pages, initial=len(state.fetched), desc="crawl", unit="page"))
        threads = stack.enter_context(ThreadPoolExecutor(4))
        records = state.records(max_pages, threads)
        for first in records:
            paths.append(folder / f"crawl_{len(paths):05d}.warc.gz")
            others = itertools.islice(records, PAGES_PER_WARC - 1)
            with whole_file(paths[-1]) as file:
                for record in itertools.chain([first], others):
                    file.write(record)
                    progress.total = min(max_pages, len(state.fetched) + len(state.frontier))
                    progress.update()
    return paths

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("seeds", nargs="*", help="URLs to begin at (none: the manual of this machine)")
    add("--out", type=Path, required=True, help="folder in which warc/ is made, e.g. data/site")
    add("--max_pages", type=int, default=5000, help="pages to crawl")
    add("--delay", type=float, help="seconds between requests (1; 0 on this machine)")
    args = parser.parse_args()
    if args.max_pages < 1:
        raise SystemExit(f"--max_pages {args.max_pages} is below 1; it counts pages; give 1 "
                         "or more")
    check_seeds(args.seeds)
    with one_line_when_full():
        paths = crawl(args.seeds, args.out / "warc", args.max_pages, args.delay)
    found = Counter()
    for record, reason in itertools.chain.from_iterable(map(read_warc, paths)):
        found[parse_record(*record)[1] if record else reason] += 1
    print(f"{args.out}/warc holds {found.pop(None, 0)} pages in {len(paths)} files; no pages are: "
          + (", ".join(f"{reason} {n}" for reason, n in found.most_common()) or "none"))

if __name__ == "__main__":
    main()
