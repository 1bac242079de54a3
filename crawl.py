"""Stage 0: fetch web pages into WARC files, as Common Crawl does, and extract the text of pages.

    python crawl.py https://example.org/ --max_pages 500 --out data/site
    python crawl.py --out data/demo            the manual of the Python software on this machine
    python prepare_fineweb.py --source warc data/site/warc/*.gz --out data/clean

in:  seed URLs; without any, demo/web.py is started and crawled
out: OUT/warc/crawl_00000.warc.gz …  gzipped WARC 1.0 (ISO 28500), one gzip member per record:
     "response" records hold what a server answered, "metadata" records why a URL has no answer

Pages are fetched breadth first, only from the hosts of the seeds, and only where robots.txt
(RFC 9309) allows it. A file is written completely or not at all, and the finished files are the
only state: a crawl that was killed reads from them which pages are done and which links were found,
and then continues in the same order.

Differs from Common Crawl: the order is breadth first instead of a ranking of hosts, there are no
request records, and a page of more than 8 MB is dropped instead of being cut.
"""
import argparse
import contextlib
import functools
import http.client
import importlib.util
import itertools
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
import urllib3
from protego import Protego
from tqdm import tqdm
from w3lib.html import get_base_url
from w3lib.url import canonicalize_url, safe_url_string

from download import one_line_when_full, one_line_when_interrupted, whole_file, why_of
from warc import (MAX_PAGE_BYTES, TagReader, charset_of, decode, is_html, parse_answer,
                  parse_record, read_warc, warc_record)

PAGES_PER_WARC = 250          # lost when a crawl is killed; also one task of prepare_fineweb.py
PAGE_SECONDS = 20             # a page is dropped if extracting its text takes longer
PAGE_MEMORY_BYTES = 2 << 30   # of the process that extracts text, without shared memory
FETCH_SECONDS = 120           # for one URL, including retries and the pauses a server asks for
SILENCE_SECONDS = 20          # a try has failed after so long without a byte
BODY_TRIES = 3                # for a body that is cut short
MAX_DELAY_SECONDS = 60        # a host whose robots.txt asks for a longer Crawl-delay is left out
MAX_URL_CHARS = 8000          # a longer link is ignored (RFC 9110, 4.1)
MAX_LINKS = 10_000            # of one page; further ones are ignored
MAX_ROBOTS_CHARS = 512 << 10  # of a robots.txt; what follows is not read (RFC 9309, 2.5)
BATCH = 32                    # URLs that are fetched together, and then looked at in order
REQUESTS_PER_HOST = 4         # at once
AGENT = "deepdive-crawler"    # our name in robots.txt
VERSION = "1.0"
USER_AGENT = f"{AGENT}/{VERSION} (educational; obeys robots.txt)"
MANUAL = "http://manual.localhost"  # stands for demo/web.py, whose port changes with every run

# ---- Links ---------------------------------------------------------------------------------------

class LinkReader(TagReader):
    """HTML → self.found, the href of every <a> and <area> as it stands in the page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag in ("a", "area"):
            link = dict(reversed(attributes)).get("href")  # the first of two counts
            if link:
                self.found.append(link.strip())

@functools.lru_cache(1 << 16)
def clean_url(url, charset="utf-8"):
    """An absolute URL as it is requested: percent-encoded, with a lower-case host, and without its
    fragment. Browsers encode a query in the charset of the page, all else in UTF-8.
    """
    try:
        return safe_url_string(urldefrag(url).url, encoding=charset)
    except (UnicodeEncodeError, LookupError):
        return safe_url_string(urldefrag(url).url)

@functools.lru_cache(1 << 16)
def url_key(url):
    """Equal for URLs that name the same page, as /a, /a? and /%61 do."""
    parts = urlsplit(canonicalize_url(url))
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return parts._replace(netloc=parts.netloc.removesuffix(default_port)).geturl()

def host_of(url):
    """The host of a URL, with its port if that is not the default one."""
    return urlsplit(url_key(url)).netloc

def links_in(url, answer):
    """Yield the links of links_of, without its guard against errors."""
    _, headers, body = parse_answer(answer)
    content_type = headers.get("content-type", "")
    found, base, charset = [], url, "utf-8"
    if "location" in headers:
        found.append(headers["location"])
    html = decode(body or b"", content_type)
    if is_html(content_type, html):
        charset = charset_of(body, content_type)
        with contextlib.suppress(ValueError):  # <base href="http://[">
            base = get_base_url(html, url, charset)
        reader = LinkReader()
        # in href="?a=1&copy=2", &copy is not ©
        reader.read(re.sub("&(?=[a-zA-Z0-9]++(?!;))", "&amp;", html))
        found += reader.found
    for link in found[:MAX_LINKS]:
        with contextlib.suppress(ValueError):  # "http://[" is not a URL
            clean = clean_url(urljoin(base, link), charset)
            if re.fullmatch("[!-~]+", clean) and len(clean) <= MAX_URL_CHARS:
                yield clean

def links_of(url, answer):
    """Absolute links of a stored HTTP answer: its Location, and the links of a page of HTML."""
    links = []
    with contextlib.suppress(Exception):  # a page that cannot be read loses its links only
        links.extend(links_in(url, answer))
    return links

# ---- The crawler ---------------------------------------------------------------------------------

def origin_of(url):
    """https://host:port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"

def warn(text):
    """Print a line, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)

class Robots:
    """A robots.txt. Its group for AGENT counts if there is one, else that for "*"; protego alone
    would also take a group for "deep" as ours.
    """

    def __init__(self, text):
        names_us = re.search(rf"(?i)(^|[\r\n])\s*user-?agent\s*:\s*{AGENT}(?![\w-])", text)
        self.agent = f"{AGENT}/{VERSION}" if names_us else "*"
        self.rules = Protego.parse(text)
        self.delay = self.rules.crawl_delay(self.agent) or 0

    def allows(self, url):
        return self.rules.can_fetch(url, self.agent)

class Host:
    """What a crawl knows of one origin. A slow host does not hold up the others."""

    def __init__(self, delay):
        self.delay = delay            # seconds before each request
        self.turn = threading.Lock()  # held during these seconds
        self.slots = threading.Semaphore(REQUESTS_PER_HOST)
        self.robots = None            # its Robots, once they are read
        self.is_open = True           # whether any page may be fetched

class Fetcher:
    """HTTP with retries, deadlines and robots.txt, for use by several threads.

    `delay` is the seconds between two requests to one host. `moved` maps the origin (scheme and
    host) of a URL to the origin that is really asked.
    """

    def __init__(self, delay, moved):
        self.delay = delay
        self.moved = moved
        self.hosts = {}  # origin: Host
        self.session = requests.Session()
        # not br or zstd, which only some machines could read
        self.session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "gzip, deflate"})
        retries = urllib3.Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                                redirect=0, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retries))
        http.client._MAXHEADERS = 1000  # some answers have more than its 100

    def host(self, url):
        """The Host that a URL is on."""
        return self.hosts.setdefault(origin_of(url), Host(self.delay))

    def ask_once(self, url):
        """URL → the server's answer as bytes, or an error of requests or urllib3."""
        origin = origin_of(url)
        is_robots = url == origin + "/robots.txt"
        with self.session.get(self.moved.get(origin, origin) + url[len(origin):], stream=True,
                              timeout=SILENCE_SECONDS, allow_redirects=is_robots) as answer:
            mime = answer.headers.get("Content-Type", "text/html").lower()
            body = bytearray()
            if is_robots or mime.startswith(("text/", "application/xhtml")):
                # the read that finds the end raises an error if the body was cut short
                while len(body) <= MAX_PAGE_BYTES and (
                        piece := answer.raw.read(1 << 16, decode_content=False)):
                    body += piece
        head = [f"HTTP/1.1 {answer.status_code} {answer.reason}"]
        for name, value in answer.headers.items():
            if name.lower() in ("content-type", "content-encoding", "location"):
                head.append(f"{name}: {value}")
        # requests has read the headers as Latin-1
        return "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + body

    def ask(self, url):
        """URL → (the server's answer, None), or (b"", why there is none).

        The answer is stored as it came, still compressed, up to a little more than MAX_PAGE_BYTES,
        so that parse_record sees what is too large. A redirect is not followed but counts as a
        link, except that of robots.txt (RFC 9309, 2.3.1.2). The body is read only if it is text; it
        is asked for again if it was cut short.
        """
        for _ in range(BODY_TRIES):
            try:
                return self.ask_once(url), None
            except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError):
                continue  # requests has errors of its own for all but the body
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                return b"", why_of(error)
        return b"", f"the body was cut short {BODY_TRIES} times"

    def fetch(self, url):
        """ask(url) when the delay allows it, given up after FETCH_SECONDS.

        A socket's own timeout begins anew with each byte, so a server could hold a crawl for ever.
        A thread cannot be stopped, but one that is late can be left behind.
        """
        host = self.host(url)
        answers = queue.SimpleQueue()
        asking = threading.Thread(target=lambda: answers.put(self.ask(url)), daemon=True)
        with host.slots:
            with host.turn:
                time.sleep(host.delay)
            asking.start()
            try:
                return answers.get(timeout=FETCH_SECONDS)
            except queue.Empty:
                return b"", f"no complete answer within {FETCH_SECONDS} s"

    def record(self, url):
        """URL → (WARC record, links). A URL that has no answer gives a "metadata" record."""
        answer, why = self.fetch(url)
        if why:
            return warc_record("metadata", url, why.encode(), "text/plain"), []
        return warc_record("response", url, answer), links_of(url, answer)

    def read_robots(self, origin):
        """→ (the Robots of an origin, None) or (None, why no page may be fetched).

        A robots.txt that does not exist (status 4xx) allows everything. One that the server fails
        to send (5xx, silence) allows nothing (RFC 9309, 2.3.1).
        """
        answer, why = self.fetch(origin + "/robots.txt")
        if why:
            return None, f"cannot be read ({why})"
        status, _, body = parse_answer(answer)
        if not "200" <= status < "500":
            return None, f"cannot be read (status {status})"
        if status != "200":
            return Robots(""), None
        if body is None:
            return None, "cannot be read (unknown Content-Encoding)"
        robots = Robots(decode(body, "text/plain; charset=utf-8")[:MAX_ROBOTS_CHARS])
        if robots.delay > MAX_DELAY_SECONDS:
            return None, (f"asks for {robots.delay:.0f} s between two requests, and a crawl waits "
                          f"at most {MAX_DELAY_SECONDS} s")
        return robots, None

    def allowed(self, url):
        """Whether robots.txt allows a URL. A host that allows none is named in one line."""
        host = self.host(url)
        if host.is_open and host.robots is None:
            host.robots, why = self.read_robots(origin_of(url))
            if why:
                host.is_open = False
                warn(f"{origin_of(url)}/robots.txt {why}, so no page of this host is fetched")
            else:
                host.delay = max(host.delay, host.robots.delay)
        return host.is_open and host.robots.allows(url)

class Crawl:
    """The state of a crawl: which URLs were fetched, and which are next, in breadth-first order.

    The order follows from the answers alone, however many threads fetch and however often the crawl
    is killed: links are added in the order of the pages that hold them.
    """

    def __init__(self, seeds, fetcher):
        self.hosts = {host_of(seed) for seed in seeds}
        self.fetcher = fetcher
        self.known = set()     # keys of URLs that are or were in the frontier
        self.fetched = set()   # keys of URLs that have a record
        self.frontier = deque()
        self.n_forbidden = 0   # URLs that robots.txt does not allow
        self.elsewhere = None  # the first link to another host
        self.add(clean_url(seed) for seed in seeds)

    def add(self, links):
        """Put the links that are new, and on the hosts of the seeds, at the end of the frontier."""
        for link in links:
            if not link.startswith(("http://", "https://")) or url_key(link) in self.known:
                continue
            if host_of(link) in self.hosts:
                self.known.add(url_key(link))
                self.frontier.append(link)
            elif not self.elsewhere:
                self.elsewhere = link

    def replay(self, path):
        """Take over what a finished file holds, as if its pages had been fetched now."""
        for record, _ in read_warc(path):
            if record:
                headers, payload = record
                url = headers.get("warc-target-uri", "")
                with contextlib.suppress(ValueError):  # a file of another crawler may hold anything
                    self.fetched.add(url_key(url))
                    self.add(links_of(url, payload))

    def next_batch(self, max_pages):
        """The next URLs to fetch that robots.txt allows; empty at the end of the crawl."""
        batch = []
        while self.frontier and len(batch) < min(BATCH, max_pages - len(self.fetched)):
            url = self.frontier.popleft()
            if url_key(url) in self.fetched:
                continue
            if self.fetcher.allowed(url):
                batch.append(url)
            elif self.fetcher.host(url).is_open:
                self.n_forbidden += 1
        return batch

    def records(self, max_pages, threads):
        """Fetch and yield WARC records until max_pages are fetched or no link is left."""
        while batch := self.next_batch(max_pages):
            for url, (record, links) in zip(batch, threads.imap(self.fetcher.record, batch)):
                self.fetched.add(url_key(url))
                self.add(links)
                yield record

@contextlib.contextmanager
def manual_of_this_machine():
    """Serve demo/web.py while the block runs; gives its address."""
    script = Path(__file__).parent / "demo" / "web.py"
    # in a session of its own, so that Ctrl-C reaches the crawl alone
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
                             start_new_session=True)
    try:
        address = child.stdout.readline().strip().rstrip("/")
        if not address:
            raise SystemExit(f"{script}, which is crawled when no seed URL is given, did not start;"
                             " run it alone to see why, or give a seed URL")
        yield address
    finally:
        child.kill()
        child.wait()

def check_seeds(seeds):
    """Stop if a seed is not a URL of a page."""
    for seed in seeds:
        try:
            is_url = re.match("https?://[^/]", seed, re.I) and host_of(clean_url(seed))
        except ValueError:  # "http://["
            is_url = False
        if not is_url:
            url = "https://example.org" if "://" in seed else f"https://{seed}"
            raise SystemExit(f"{seed} is not a URL that a crawl can begin at; write {url}")

def default_delay(seeds):
    """Seconds between two requests: none where all seeds are on this machine, else 1."""
    near = rf"http://(127\.0\.0\.1|localhost)\b|{MANUAL}/"
    return 0.0 if all(re.match(near, seed) for seed in seeds) else 1.0

def crawl(seeds, folder, max_pages, delay=None):
    """Fetch up to max_pages into folder/crawl_00000.warc.gz …; returns the paths.

    seeds: URLs; none means the manual of this machine. delay: seconds between two requests; None
    means default_delay. A Crawl-delay in robots.txt may lengthen it. Pages in files that exist
    already count as fetched. REQUESTS_PER_HOST run at once where the delay allows.
    """
    check_seeds(seeds)
    if delay is not None and not 0 <= delay <= threading.TIMEOUT_MAX:
        raise SystemExit(f"--delay must be at least 0 seconds, got {delay}")
    with contextlib.ExitStack() as stack:
        moved = {}
        if not seeds:
            moved[MANUAL] = stack.enter_context(manual_of_this_machine())
            seeds = [f"{MANUAL}/"]
        if delay is None:
            delay = default_delay(seeds)
        state = Crawl(seeds, Fetcher(delay, moved))
        paths = []
        while (path := folder / f"crawl_{len(paths):05d}.warc.gz").exists():
            state.replay(path)
            paths.append(path)
        progress = stack.enter_context(tqdm(
            total=max_pages, initial=len(state.fetched), desc="crawl", unit=" pages"))
        threads = stack.enter_context(ThreadPool(BATCH))  # its end does not wait for late ones
        records = state.records(max_pages, threads)
        for first in records:  # a file is begun when there is a record for it
            paths.append(folder / f"crawl_{len(paths):05d}.warc.gz")
            others = itertools.islice(records, PAGES_PER_WARC - 1)
            with whole_file(paths[-1]) as file:
                for record in itertools.chain([first], others):
                    file.write(record)
                    progress.total = min(max_pages, len(state.fetched) + len(state.frontier))
                    progress.update()
    if state.n_forbidden and not state.fetched:
        warn("robots.txt does not allow the seeds to be fetched")
    if state.elsewhere and len(state.known) <= len(seeds):
        warn(f"no page links to another one of its host; the first link leads to {state.elsewhere};"
             " to crawl that host, give this URL as a seed")
    return paths

# ---- HTML → text ---------------------------------------------------------------------------------

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
HIDDEN = set("""title script style noscript template svg iframe select button
    textarea""".split())                               # hold no text of the page
LAYOUT = {"nav", "header", "footer", "aside"}          # rarely hold any
BLOCK_TAGS = {*HEADINGS, *LAYOUT, *"""form p div li dd dt td th tr pre blockquote section article
    main ul ol dl br table caption figcaption figure hr body address details summary
    center""".split()}
VOID_TAGS = set("area base br col embed hr img input link meta param source track wbr".split())

class Block(NamedTuple):
    """Text between two block tags."""
    tag: str           # the tag that begins it; "div" after an end tag, "p" after <br>
    text: str
    link_share: float  # of its characters, those within <a href>
    in_main: bool      # within <main> or <article>
    in_form: bool

class BlockReader(TagReader):
    """HTML → self.blocks. An element whose tag is in `skipped` is left out with its contents."""

    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped
        self.blocks = []
        self.open_tags = []      # the elements that enclose the present position
        self.n_open = Counter()  # how many of them have each tag
        self.skip_depth = None   # len(open_tags) at the beginning of the element being skipped
        self.in_link = False
        self.in_pre = False
        self.pieces = []
        self.begin_block("body")

    def handle_starttag(self, tag, attributes):
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
            self.n_open[tag] += 1
            if tag in self.skipped and self.skip_depth is None:
                self.skip_depth = len(self.open_tags)
                self.pieces.append(" ")
        if tag == "a":
            names = {name for name, _ in attributes}
            self.in_link = "href" in names or not names & {"name", "id"}  # <a name=top> is a target
        if tag == "br":
            self.pieces.append("\n")
        if tag in BLOCK_TAGS and (tag == "pre" or not self.n_open["pre"]):
            self.begin_block("p" if tag == "br" else tag)

    def handle_endtag(self, tag):
        if self.n_open[tag]:
            closed = None
            while closed != tag:  # what was left open inside the element ends with it
                closed = self.open_tags.pop()
                self.n_open[closed] -= 1
            if self.skip_depth is not None and len(self.open_tags) < self.skip_depth:
                self.skip_depth = None
        if tag == "a":
            self.in_link = False
        if tag in BLOCK_TAGS and not self.n_open["pre"]:
            self.begin_block("div")

    def handle_data(self, text):
        if self.skip_depth is None:
            self.pieces.append(text)
            if self.in_link:
                self.link_chars += len(text.strip())

    def begin_block(self, tag):
        """Store the block that ends here, if it has any text, and begin another one."""
        text = "".join(self.pieces)
        text = text.strip("\n").rstrip() if self.in_pre else " ".join(text.split())
        if text.strip():
            link_share = self.link_chars / len(text)
            self.blocks.append(Block(self.tag, text, link_share, self.in_main, self.in_form))
        self.tag, self.pieces, self.link_chars = tag, [], 0
        self.in_pre = self.n_open["pre"] > 0
        self.in_main = self.n_open["main"] + self.n_open["article"] > 0
        self.in_form = self.n_open["form"] > 0

def blocks_of(html, skipped):
    """HTML → its Blocks, without the elements whose tags are in `skipped`."""
    reader = BlockReader(skipped)
    reader.read(html)
    reader.begin_block("div")
    return reader.blocks

def content_blocks(html):
    """The blocks of a page without its layout. Forms are dropped too, unless they hold most of the
    text, because some sites put each page into one.
    """
    blocks = blocks_of(html, HIDDEN | LAYOUT)
    chars = {True: 0, False: 0}
    for block in blocks:
        chars[block.in_form] += len(block.text) * (1 - block.link_share)
    if chars[True] < chars[False]:
        blocks = [block for block in blocks if not block.in_form]
    return blocks or blocks_of(html, HIDDEN)

def is_surely_text(block):
    """Whether a block with few links is text, whatever its neighbours are."""
    n_words = len(block.text.split())
    return (block.tag == "pre" or n_words >= 12 or (block.tag == "p" and block.in_main)
            or (n_words >= 4 and block.text[-1] in ".!?:”。"))

def plain_text(html):
    """The main text of a page, one line per block; it serves where trafilatura is not installed.

    Layout elements are dropped. Where <main> or <article> holds a third of the text, all that is
    outside is dropped too. A block that is half links is boilerplate; one of 12 words, or of 4
    words and a full stop, is text. A short block is classified like the block before it. A heading
    is kept if text follows it.
    """
    blocks = content_blocks(html)
    chars = {True: 0, False: 0}
    for block in blocks:
        chars[block.in_main] += len(block.text)
    only_main = chars[True] * 2 > chars[False]
    lines, headings, is_text = [], [], False
    for block in blocks:
        if only_main and not block.in_main:
            continue
        if block.link_share > 0.5:
            is_text = False
            continue
        if block.tag in HEADINGS:
            headings.append(f"\n{block.text}")
            continue
        is_text = is_text or is_surely_text(block)
        if is_text:
            lines += headings
            lines.append(block.text)
        headings = []
    return "\n".join(lines).strip()

def limit_memory(n_bytes):
    """Limit the memory of this process, without what it shares. False: this system cannot, as
    Windows, which lacks the module."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    except (ImportError, ValueError, OSError):
        return False
    return True

def serve_texts(extract, pipe, parents_end):
    """An Extractor's child: HTML comes through the pipe, and its text or an exception goes back."""
    if parents_end:
        parents_end.close()  # so that recv notices when the parent is gone
    limit_memory(PAGE_MEMORY_BYTES)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            html = pipe.recv()
            try:
                pipe.send(extract(html) or "")
            except Exception as error:
                pipe.send(error)

class Extractor:
    """extract_text(page) → (page with "text" instead of "html", None) or (None, reason).

    name: "trafilatura", called as FineWeb does; "resiliparse" (main content; a dozen times as fast,
    but it finds another text); or "plain" for plain_text. Each runs in a child, which is killed
    and replaced when a page takes longer than PAGE_SECONDS (TimeoutError) or makes it crash
    (EOFError). The child is a fork, or a fresh process where forks are missing or, as on macOS, not
    safe. A signal could not stop it: Python handles signals between two of its own
    instructions, and what hangs or crashes is C code.
    """
    __name__ = "extract_text"  # prepare_fineweb.py's steps are known by their names

    def __init__(self, name):
        self.child = None
        self.extract = plain_text
        if name == "trafilatura":  # imported here, so that a new child need not import it
            from trafilatura import extract
            self.extract = functools.partial(extract, favor_precision=True, include_comments=False)
        if name == "resiliparse":
            from resiliparse.extract.html2text import extract_plain_text
            self.extract = functools.partial(extract_plain_text, main_content=True, links=False,
                                             alt_texts=False, form_fields=False, noscript=False)

    @staticmethod
    def limits_memory():
        """Whether this system limits the memory that a page may take. macOS accepts the limit, but
        does not keep it."""
        return bool(importlib.util.find_spec("resource")) and sys.platform != "darwin"

    def start(self):
        """Start the child."""
        method = "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"
        context = multiprocessing.get_context(method)
        self.pipe, childs_end = context.Pipe()
        inherited = self.pipe if method == "fork" else None
        self.child = context.Process(target=serve_texts, daemon=True,
                                     args=(self.extract, childs_end, inherited))
        self.child.start()
        childs_end.close()

    def __call__(self, page):
        if "text" in page:  # a WET record
            return page, None
        if self.child is None:
            self.start()
        try:
            self.pipe.send(page["html"])
            text = self.pipe.recv() if self.pipe.poll(PAGE_SECONDS) else TimeoutError()
        except (EOFError, OSError) as crash:
            text = crash
        if isinstance(text, Exception):
            self.close()
            raise text
        if not text.strip():
            return None, "no_text"
        rest = {key: value for key, value in page.items() if key != "html"}
        return rest | {"text": text.strip()}, None

    def close(self):
        """End the child; the next page starts another one."""
        if self.child:
            self.child.kill()
            self.child.join()
            self.child = None

# ---- The command line ----------------------------------------------------------------------------

def count_pages(paths):
    """WARC files of a crawl → (how many pages they hold, {reason: how many other records})."""
    n_pages = 0
    reasons = Counter()
    for path in paths:
        for record, reason in read_warc(path):
            if record:
                _, reason = parse_record(*record)
            if reason == "metadata_record":  # its payload says why a URL has no answer
                reason = record[1].decode("utf-8", "replace")[:80]
            if reason:
                reasons[reason] += 1
            else:
                n_pages += 1
    return n_pages, reasons

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
        raise SystemExit(f"--max_pages must be at least 1, got {args.max_pages}")
    with one_line_when_full(), one_line_when_interrupted():
        paths = crawl(args.seeds, args.out / "warc", args.max_pages, args.delay)
        n_pages, reasons = count_pages(paths)
    others = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common()) or "none"
    if not n_pages:
        raise SystemExit(f"{args.out}/warc holds no page; other records: {others}; give another "
                         "seed URL")
    print(f"{args.out}/warc holds {n_pages} pages in {len(paths)} files; other records: {others}")

if __name__ == "__main__":
    main()
