"""Stage 0: fetch web pages into WARC files, as Common Crawl does, and read pages back from them.

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
import itertools
import multiprocessing
import queue
import re
import resource
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
import urllib3
import webencodings
from protego import Protego
from tqdm import tqdm
from w3lib.encoding import read_bom, to_unicode
from w3lib.html import get_base_url
from w3lib.url import canonicalize_url, safe_url_string

from download import one_line_when_full, whole_file
from warc import parse_headers, read_warc, warc_record

MAX_PAGE_BYTES = 8 << 20      # of a page's HTML after decompression; this also stops zip bombs
PAGES_PER_WARC = 250          # lost when a crawl is killed; also one task of prepare_fineweb.py
PAGE_SECONDS = 20             # a page is dropped if extracting its text takes longer
PAGE_MEMORY_BYTES = 2 << 30   # of the process that extracts text, without shared memory
FETCH_SECONDS = 120           # for one URL, including retries and the pauses a server asks for
SILENCE_SECONDS = 20          # a try has failed after so long without a byte
MAX_URL_CHARS = 8000          # a longer link is ignored (RFC 9110, 4.1)
AGENT = "deepdive-crawler"    # our name in robots.txt
USER_AGENT = f"{AGENT}/1.0 (educational; obeys robots.txt)"
MANUAL = "http://manual.localhost"  # stands for demo/web.py, whose port changes with every run

def verdict(page, **broken):
    """(page, None), or (None, the name of the first rule that is broken)."""
    for rule, is_broken in broken.items():
        if is_broken:
            return None, rule
    return page, None

# ---- HTTP answers → pages ------------------------------------------------------------------------

CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r\n")

def dechunk(body):
    """Undo Transfer-Encoding: chunked (RFC 9112, 7.1): hexadecimal size, line end, bytes, line end.

    A body without chunks is returned as it is: archives often store the decoded body but keep the
    header.
    """
    out, at = [], 0
    while size := CHUNK_SIZE.match(body, at):
        at = size.end() + int(size[1], 16) + 2
        out.append(body[size.end():at - 2])
    return b"".join(out) or body

def unzip(body, encoding):
    """Undo Content-Encoding, up to MAX_PAGE_BYTES + 1 bytes; None if that fails.

    A body that is not compressed is returned as it is, for the same reason as in dechunk.
    """
    for wbits in {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}.get(encoding, ()):
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(wbits=wbits).decompress(body, MAX_PAGE_BYTES + 1)
    if encoding in ("", "identity") or b"<" in body[:256]:
        return body
    return None

def parse_answer(answer):
    """A stored HTTP answer → (status or "", headers, decoded body or None)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/\S+ +(\d{3})", head)
    headers = parse_headers(head)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = dechunk(body)
    body = unzip(body, headers.get("content-encoding", "").lower())
    return status[1].decode() if status else "", headers, body

def is_html(mime, text):
    """Whether a Content-Type says HTML, or, where there is none, whether the text looks like it."""
    if mime:
        return re.match(r"\s*(text/html|application/xhtml\+xml)\b", mime, re.I) is not None
    return "<html" in text[:4096].lower()

class TagReader(HTMLParser):
    """html.parser, made to take linear time and to raise no error on any input, in all versions."""

    def read(self, html):
        """Call the handle_… methods for a page. A tag that the end of the page cuts is ignored."""
        end = html.rfind(">") + 1
        rest = re.split("<[a-zA-Z/!?]", html[end:], maxsplit=1)[0]
        # int() refuses thousands of digits; more than 20 are no character
        self.feed(re.sub("&#[0-9]{20,};?", "\ufffd", html[:end] + rest))
        self.close()

    def parse_comment(self, i, report=1):
        """Skip <!-- … -->; one that is not closed lasts to the end, as in browsers."""
        end = self.rawdata.find("-->", i + 2)
        return end + 3 if end >= 0 else len(self.rawdata)

    def parse_html_declaration(self, i):
        """Skip <!DOCTYPE …> and <![CDATA[ … ]]> up to the next ">", as browsers do."""
        return self.rawdata.find(">", i) + 1

class MetaCharset(TagReader):
    """The charset that the beginning of a page names: <meta charset=…>, <meta
    http-equiv=content-type content="…; charset=…">, or <?xml encoding="…">."""
    label = None

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag != "meta" or self.label:
            return
        self.label = values.get("charset")
        if (values.get("http-equiv") or "").lower() == "content-type":
            self.label = self.label or charset_label(values.get("content"))

    def handle_pi(self, text):
        named = re.search(r"encoding=[\"']([^\"']+)", text)
        if named and not self.label:
            self.label = named[1]

def charset_label(content_type):
    """The charset that a Content-Type names, or None."""
    named = re.search(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", content_type or "", re.I)
    return named and named[1]

def charset_of(body, content_type):
    """The codec of a page, chosen as browsers do (WHATWG Encoding): a byte order mark, the charset
    in the Content-Type, the one in <meta>, else UTF-8 if the bytes are valid, or windows-1252.
    """
    codec, _ = read_bom(body)
    if codec:
        return codec
    encoding = webencodings.lookup(charset_label(content_type) or "")
    if not encoding:
        reader = MetaCharset()
        reader.read(body[:4096].decode("latin-1"))
        encoding = webencodings.lookup(reader.label or "")
        if encoding and encoding.name.startswith("utf-16"):  # the bytes of <meta> were ASCII
            return "utf-8"
    if encoding:
        return encoding.codec_info.name
    try:
        body.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return "cp1252"

def decode(body, content_type):
    """Bytes → text. Bytes that the charset does not have become U+FFFD, as in browsers."""
    _, mark = read_bom(body)
    return to_unicode(body[len(mark or b""):], charset_of(body, content_type))

def parse_record(headers, payload):
    """A WARC record → (page, None) or (None, reason); page: {"id", "url", "date", "html"}.

    Kept are answers with status 200 that are HTML according to the type that the archive found, the
    Content-Type, or, where both are missing, an <html> tag. A "conversion" record, as in Common
    Crawl's WET files, gives a page with "text" instead of "html".
    """
    kind = headers.get("warc-type", "nameless")
    page = {"id": headers.get("warc-record-id", ""), "date": headers.get("warc-date", ""),
            "url": headers.get("warc-target-uri", "").strip("<>")}
    if kind == "conversion":
        return page | {"text": payload.decode("utf-8", "replace")}, None
    if kind != "response":
        return None, f"{kind}_record"
    status, http, body = parse_answer(payload)
    content_type = http.get("content-type", "")
    mime = headers.get("warc-identified-payload-type") or content_type
    if not status:
        return None, "not_http"
    if status != "200":
        return None, f"status_{status}"
    if mime and not is_html(mime, ""):
        return None, "not_html"
    if body is None:
        return None, "content_encoding"
    if len(body) > MAX_PAGE_BYTES:
        return None, "page_too_large"
    html = decode(body, content_type)
    if html.count("\ufffd") * 10 > len(html):
        return None, "unknown_charset"
    if not is_html(mime, html):
        return None, "not_html"
    return page | {"html": html}, None

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
    """The main text of a page, one line per block: our extractor for want of trafilatura.

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

class Extractor:
    """extract_text(page) → (page with "text" instead of "html", None) or (None, reason).

    name: "trafilatura", called as FineWeb does; "resiliparse" (main content; a dozen times as fast,
    but it finds another text); or "plain" for plain_text. Each runs in a forked child, which is
    killed and replaced when a page takes longer than PAGE_SECONDS (TimeoutError) or makes it crash
    (EOFError). A signal could not stop it: Python handles signals between two of its own
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

    def serve(self, pipe):
        """The child: HTML comes through the pipe, and its text or an exception goes back."""
        self.pipe.close()  # the parent's side, so that recv notices when the parent is gone
        resource.setrlimit(resource.RLIMIT_DATA, (PAGE_MEMORY_BYTES, PAGE_MEMORY_BYTES))
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                html = pipe.recv()
                try:
                    pipe.send(self.extract(html) or "")
                except Exception as error:
                    pipe.send(error)

    def start(self):
        """Start the child."""
        fork = multiprocessing.get_context("fork")
        self.pipe, childs_end = fork.Pipe()
        self.child = fork.Process(target=self.serve, args=(childs_end,), daemon=True)
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
    except UnicodeEncodeError:
        return safe_url_string(urldefrag(url).url)

@functools.lru_cache(1 << 16)
def url_key(url):
    """Equal for URLs that name the same page, as /a, /a? and /%61 do."""
    parts = urlsplit(canonicalize_url(url))
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return parts._replace(netloc=parts.netloc.removesuffix(default_port)).geturl()

def host_of(url):
    return urlsplit(url_key(url)).netloc

def links_of(url, answer):
    """Absolute links of a stored HTTP answer: its Location, and the links of a page of HTML."""
    _, http, body = parse_answer(answer)
    content_type = http.get("content-type", "")
    found, base, charset = [], url, "utf-8"
    if "location" in http:
        found.append(http["location"])
    html = decode(body or b"", content_type)
    if is_html(content_type, html):
        charset = charset_of(body, content_type)
        base = get_base_url(html, url, charset)
        reader = LinkReader()
        # in href="?a=1&copy=2", &copy is not ©
        reader.read(re.sub("&(?=[a-zA-Z0-9]++(?!;))", "&amp;", html))
        found += reader.found
    for link in found:
        with contextlib.suppress(ValueError):  # "http://[" is not a URL
            clean = clean_url(urljoin(base, link), charset)
            if len(clean) <= MAX_URL_CHARS:
                yield clean

# ---- The crawler ---------------------------------------------------------------------------------

class Fetcher:
    """HTTP with retries, deadlines and robots.txt, for use by several threads.

    `delay` is the seconds between two requests. `hosts` maps the origin (scheme and host) of a URL
    to the origin that is really asked.
    """

    def __init__(self, delay, hosts):
        self.delay = delay
        self.hosts = hosts
        self.rules = {}  # origin: its robots.txt
        self.turn = threading.Lock()
        self.session = requests.Session()
        self.session.headers["User-Agent"] = USER_AGENT
        retries = urllib3.Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                                redirect=0, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retries))

    def ask(self, url):
        """URL → (the server's answer, None), or (b"", why there is none).

        The answer is stored as it came, still compressed, up to a byte more than MAX_PAGE_BYTES, so
        that parse_record sees what is too large. A redirect is not followed but counts as a link,
        except that of robots.txt (RFC 9309, 2.3.1.2). The body is read only if it is text.
        """
        origin = origin_of(url)
        is_robots = url == origin + "/robots.txt"
        try:
            with self.session.get(self.hosts.get(origin, origin) + url[len(origin):], stream=True,
                                  timeout=SILENCE_SECONDS, allow_redirects=is_robots) as answer:
                mime = answer.headers.get("Content-Type", "text/html").lower()
                body = b""
                if is_robots or mime.startswith(("text/", "application/xhtml")):
                    body = answer.raw.read(MAX_PAGE_BYTES + 1, decode_content=False)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            return b"", str(error)
        head = [f"HTTP/1.1 {answer.status_code} {answer.reason}"]
        for name, value in answer.headers.items():
            if name.lower() in ("content-type", "content-encoding", "location"):
                head.append(f"{name}: {value}")
        # requests has read the headers as Latin-1
        return "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + body, None

    def fetch(self, url):
        """ask(url) when the delay allows it, given up after FETCH_SECONDS.

        A socket's own timeout begins anew with each byte, so a server could hold a crawl for ever.
        A thread cannot be stopped, but one that is late can be left behind.
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
        """URL → (WARC record, links). A URL that has no answer gives a "metadata" record."""
        answer, why = self.fetch(url)
        if why:
            return warc_record("metadata", url, why.encode(), "text/plain"), []
        return warc_record("response", url, answer), list(links_of(url, answer))

    def read_rules(self, origin):
        """The robots.txt of an origin. One that does not exist (status 4xx) allows everything, one
        that the server fails to send (5xx, silence) nothing (RFC 9309, 2.3.1).
        """
        answer, _ = self.fetch(origin + "/robots.txt")
        status, _, body = parse_answer(answer)
        if status == "200":
            return Protego.parse(decode(body or b"", "text/plain; charset=utf-8"))
        if "200" <= status < "500":
            return Protego.parse("")
        return Protego.parse("User-agent: *\nDisallow: /")

    def allowed(self, url):
        """Whether robots.txt allows a URL."""
        origin = origin_of(url)
        if origin not in self.rules:
            self.rules[origin] = self.read_rules(origin)
            self.delay = max(self.delay, self.rules[origin].crawl_delay(AGENT) or 0)
        return self.rules[origin].can_fetch(url, AGENT)

def origin_of(url):
    """https://host:port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"

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
        self.add(clean_url(seed) for seed in seeds)

    def add(self, links):
        """Put the links that are new, and on the hosts of the seeds, at the end of the frontier."""
        for link in links:
            if link.startswith(("http://", "https://")) and url_key(link) not in self.known \
                    and host_of(link) in self.hosts:
                self.known.add(url_key(link))
                self.frontier.append(link)

    def replay(self, path):
        """Take over what a finished file holds, as if its pages had been fetched now."""
        for record, _ in read_warc(path):
            if record:
                headers, payload = record
                url = headers["warc-target-uri"]
                self.fetched.add(url_key(url))
                self.add(links_of(url, payload))

    def next_batch(self, max_pages):
        """The next URLs to fetch that robots.txt allows; none are left if it is empty."""
        batch = []
        while self.frontier and len(batch) < min(32, max_pages - len(self.fetched)):
            url = self.frontier.popleft()
            if url_key(url) not in self.fetched and self.fetcher.allowed(url):
                batch.append(url)
        return batch

    def records(self, max_pages, threads):
        """Fetch and yield WARC records until max_pages are fetched or no link is left."""
        while batch := self.next_batch(max_pages):
            for url, (record, links) in zip(batch, threads.map(self.fetcher.record, batch)):
                self.fetched.add(url_key(url))
                self.add(links)
                yield record

@contextlib.contextmanager
def manual_of_this_machine():
    """Serve demo/web.py while the block runs; gives its address."""
    script = Path(__file__).parent / "demo" / "web.py"
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
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
    """Stop if a seed is not a URL: a crawl of it would fetch nothing and say nothing."""
    for seed in seeds:
        if not re.match("https?://[^/]", seed, re.I):
            raise SystemExit(f"{seed} is not a URL that a crawl can begin at; for a site write "
                             f"https://{seed}")

def default_delay(seeds):
    """Seconds between two requests: none where all seeds are on this machine, else 1."""
    near = rf"http://(127\.0\.0\.1|localhost)\b|{MANUAL}/"
    return 0.0 if all(re.match(near, seed) for seed in seeds) else 1.0

def crawl(seeds, folder, max_pages, delay=None):
    """Fetch up to max_pages into folder/crawl_00000.warc.gz …; returns the paths.

    seeds: URLs; none means the manual of this machine. delay: seconds between two requests; None
    means default_delay. A Crawl-delay in robots.txt may lengthen it. Pages in files that exist
    already count as fetched. Four requests run at once where the delay allows.
    """
    check_seeds(seeds)
    with contextlib.ExitStack() as stack:
        hosts = {}
        if not seeds:
            hosts[MANUAL] = stack.enter_context(manual_of_this_machine())
            seeds = [f"{MANUAL}/"]
        if delay is None:
            delay = default_delay(seeds)
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
        raise SystemExit(f"--max_pages must be at least 1, got {args.max_pages}")
    with one_line_when_full():
        paths = crawl(args.seeds, args.out / "warc", args.max_pages, args.delay)
    n_pages, reasons = 0, Counter()
    for path in paths:
        for record, reason in read_warc(path):
            if record:
                page, reason = parse_record(*record)
            if reason:
                reasons[reason] += 1
            else:
                n_pages += 1
    others = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()) or "none"
    print(f"{args.out}/warc holds {n_pages} pages in {len(paths)} files; other records: {others}")

if __name__ == "__main__":
    main()
