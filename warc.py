"""Web archives: write WARC 1.0 files (ISO 28500), and read them back as pages of HTML.

    for record, reason in read_warc("data/site/warc/crawl_00000.warc.gz"):
        if record:
            page, reason = parse_record(*record)     # page["html"], or None and a reason

A record is "WARC/1.0", header lines, an empty line, Content-Length bytes, and an empty line. In a
.warc.gz each record is a gzip member of its own, so damage to one record does not reach the next.
Most payloads are HTTP answers as they came from the server.

Beyond the standard, damaged and foreign files are read as far as possible: lines that end in LF
only, rubbish between records, a .warc.zst where a module can read it. Charsets are chosen as
browsers choose them. Nothing in a file is fatal: what is not a page is given with a reason.
"""
import contextlib
import gzip
import importlib
import io
import os
import re
import time
import uuid
import zlib
from html.parser import HTMLParser

import webencodings
from w3lib.encoding import read_bom, to_unicode

MAX_PAGE_BYTES = 8 << 20      # of a page's HTML after decompression; this also stops zip bombs
MAX_RECORD_BYTES = 32 << 20   # a longer record is skipped
MAX_HEADER_BYTES = 64 << 10   # of a record
MAX_BAD_RECORDS = 10_000      # in a row; the rest of such a file is not read
PIECE_BYTES = 128 << 10       # read at a time; decompression makes at most 32 times as much of it

VERSION_LINE = re.compile(rb"WARC/\d\.\d{1,3}\r?\n")
BLANK_LINE = re.compile(rb"\n\r?\n")  # after the last header line
CONTENT_LENGTH = re.compile(rb"\ncontent-length:\s*([0-9]{1,15})[ \t]*\r?\n", re.I)
GZIP_MAGIC = b"\x1f\x8b\x08"
SMALLEST_MEMBER = 20  # bytes of an empty gzip member; fewer between two members are rubbish
ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # of a frame, or one to skip

def warc_record(kind, url, payload, content_type="application/http; msgtype=response"):
    """One record as a gzip member. Its id is derived from the URL, so two crawls agree on it."""
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"WARC-Date: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\r\n"
            f"WARC-Record-ID: <urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(payload)}\r\n\r\n")
    return gzip.compress(head.encode() + payload + b"\r\n\r\n", 6, mtime=0)

# ---- Files → pieces of decompressed bytes --------------------------------------------------------

def plain_pieces(file):
    """Yield (bytes, None) for each piece of an uncompressed file."""
    while data := file.read(PIECE_BYTES):
        yield data, None

def find_member(file, data, at):
    """The next gzip member in or after data[at:] → (the bytes that hold its beginning, where it
    begins in them, how many bytes were skipped). There are no bytes at the end of the file.
    """
    skipped = 0
    while True:
        start = data.find(GZIP_MAGIC, at)
        if start >= 0:
            return data, start, skipped + start - at
        rest = data[at:][-2:]  # a magic may lie across two pieces
        skipped += len(data) - at - len(rest)
        more = file.read(PIECE_BYTES)
        if not more:
            return b"", 0, skipped + len(rest)
        data = rest + more
        at = 0

def gzip_pieces(file):
    """Yield (bytes, None) for each decompressed piece of a file of gzip members, and
    (b"", "broken_gzip") where a member is damaged; the next member is then found by its magic.
    """
    data = file.read(PIECE_BYTES)  # compressed bytes
    at = 0                         # those before it are done
    is_damaged = False             # the last member; what follows then belongs to it
    n_members = 0
    while True:
        data, at, skipped = find_member(file, data, at)
        if skipped >= SMALLEST_MEMBER and not is_damaged and (data or n_members):
            yield b"", "broken_gzip"  # a member without its magic was skipped
        if not data:
            return
        n_members += 1
        member = zlib.decompressobj(wbits=31)
        is_new = True
        is_damaged = False
        while data and not member.eof and not is_damaged:
            try:
                piece = member.decompress(memoryview(data)[at:], 32 * PIECE_BYTES)
            except zlib.error:
                is_damaged = True
                if is_new:
                    at += 1  # so that the same magic is not found again
                yield b"", "broken_gzip"
                continue
            yield piece, None
            is_new = False
            at = len(data) - len(member.unused_data if member.eof else member.unconsumed_tail)
            if at == len(data):
                data = file.read(PIECE_BYTES)
                at = 0

def zstd_file(file):
    """A file object that decompresses another one, or None where no module can."""
    for name in ("compression.zstd", "backports.zstd", "pyzstd"):  # the first is Python 3.14's own
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).ZstdFile(file)
    with contextlib.suppress(ImportError):
        import zstandard
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return None

def zstd_pieces(file):
    """As gzip_pieces for a .warc.zst; after damage, nothing more can be read."""
    unzipped = zstd_file(file)
    if unzipped is None:
        yield b"", "zstd_is_not_installed"
        return
    try:
        yield from plain_pieces(unzipped)
    except Exception:  # each module has an error of its own
        yield b"", "broken_zstd"

def pieces_of(path):
    """Yield (bytes, None) for each piece of a file, compressed or not, and (b"", why) where the
    stream breaks off: "broken_gzip" and the like, or "end".
    """
    with open(path, "rb") as file:
        start = file.read(MAX_HEADER_BYTES)
        file.seek(0)
        is_binary = re.search(rb"[\x00-\x08\x0e-\x1a]", start[:512]) is not None
        if ZSTD_MAGIC.match(start):
            yield from zstd_pieces(file)
        elif start.startswith(GZIP_MAGIC) or (is_binary and not VERSION_LINE.search(start)):
            yield from gzip_pieces(file)  # even if the magic of the first member is damaged
        else:
            yield from plain_pieces(file)
    yield b"", "end"

# ---- Pieces → records ----------------------------------------------------------------------------

def parse_headers(head):
    """Header lines as {lower-case name: value}, without the first (version or status) line. A line
    that begins with a space continues the one before it (RFC 9112, 5.2).
    """
    text = re.sub(rb"\r?\n[ \t]+", b" ", head).decode("utf-8", "replace")
    headers = {}
    for line in text.split("\n")[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers

def record_at(buffer, start, after_version, body, is_last):
    """The record that begins at `start` → ((headers, payload), None, its end) or (None, reason,
    None). The reason "truncated_record" comes with the length that the buffer should have.

    Its headers begin at `after_version`; `body` is the end of the next blank line.
    """
    if body > len(buffer) and len(buffer) - start < MAX_HEADER_BYTES:  # no blank line yet
        return None, "truncated_record", start + (len(buffer) - start) * 5 // 4
    if body - start > MAX_HEADER_BYTES or VERSION_LINE.search(buffer, after_version, body):
        return None, "broken_header", None
    length = CONTENT_LENGTH.search(buffer, after_version - 1, body)
    if not length:
        return None, "broken_header", None
    end = body + int(length[1])
    if end - body > MAX_RECORD_BYTES:
        return None, "huge_record", None
    needed = end if is_last else end + 16  # what follows shows whether the length is right
    if needed > len(buffer):
        return None, "truncated_record", needed
    following = buffer[end:end + 16].lstrip(b"\r\n")[:5]
    if not b"WARC/".startswith(following):
        return None, "wrong_length", None
    return (parse_headers(buffer[start:body]), bytes(buffer[body:end])), None, end

def records_of(path):
    """Yield ((headers, payload), None) for every record of a WARC file, or (None, reason). Memory
    holds one record. Time is linear: the next blank line is searched once, and a buffer is looked
    at again when it has grown enough, or by a quarter.
    """
    buffer = bytearray()
    wanted = 0  # the length below which looking at the buffer again is of no use
    for piece, stop in pieces_of(path):
        buffer += piece
        if len(buffer) < wanted and not stop:
            continue
        wanted = 0
        at = 0    # where the next version line is searched
        body = 0  # the end of the next blank line
        while begins := VERSION_LINE.search(buffer, at):
            start, at = begins.span()
            if body <= at:
                blank = BLANK_LINE.search(buffer, at - 1)
                body = blank.end() if blank else len(buffer) + 1
            record, reason, end = record_at(buffer, start, at, body, is_last=bool(stop))
            if reason == "truncated_record" and not stop:
                at = start
                wanted = end - start
                break
            if record:
                at = end
            yield record, reason
        else:
            at = max(at, len(buffer) - 12)  # a version line may lie across two pieces
        del buffer[:at]
        if stop:
            buffer.clear()
            if stop != "end":
                yield None, stop

def read_warc(path):
    """Yield ((headers, payload), None) for every record of a WARC file, or (None, reason).

    Nothing in the file is fatal. After a bad record, resume at the next WARC/1.0 header, because a
    wrong length may span good records. A file that holds neither good nor bad records yields the
    reason "no_record", unless it is empty.
    """
    n_bad = 0  # in a row
    is_silent = os.path.getsize(path) > 0  # nothing was said of a file that holds something
    for record, reason in records_of(path):
        yield record, reason
        is_silent = False
        n_bad = 0 if record else n_bad + 1
        if n_bad == MAX_BAD_RECORDS:
            yield None, "too_many_bad_records"
            return
    if is_silent:
        yield None, "no_record"

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

def inflate(body, wbits):
    """Undo gzip (wbits 31), deflate (15) or deflate without a header (-15), up to a little more
    than MAX_PAGE_BYTES; raises zlib.error. A gzip body may have several members (RFC 1952, 2.2).
    """
    pieces, n_bytes, at = [], 0, 0
    member = zlib.decompressobj(wbits=wbits)
    while at < len(body) and n_bytes <= MAX_PAGE_BYTES:
        if member.eof:
            if wbits != 31 or not body.startswith(GZIP_MAGIC, at):
                break
            member = zlib.decompressobj(wbits=wbits)
        window = body[at:at + 4096]  # short: what a member leaves of it is copied
        pieces.append(member.decompress(window))
        n_bytes += len(pieces[-1])
        at += len(window) - len(member.unused_data)
    if wbits == -15 and not member.eof and n_bytes <= MAX_PAGE_BYTES:
        raise zlib.error("most bytes begin like such a stream, so it must have an end")
    return b"".join(pieces)

def unzip_once(body, coding):
    """Undo one Content-Encoding; raises an exception if that is not possible."""
    if coding in ("gzip", "x-gzip"):
        return inflate(body, 31)
    if coding == "deflate":
        try:
            return inflate(body, 15)
        except zlib.error:
            return inflate(body, -15)
    if coding == "zstd":
        return zstd_file(io.BytesIO(body)).read(MAX_PAGE_BYTES + 1)
    if coding == "br":
        import brotli  # an extra, of version 1.2 or later
        stream = brotli.Decompressor()
        page = stream.process(body, output_buffer_limit=MAX_PAGE_BYTES + 1)
        if len(page) <= MAX_PAGE_BYTES and not stream.is_finished():
            raise ValueError("the stream has no end")
        return page
    raise ValueError(coding)

def unzip(body, codings):
    """Undo the codings of a Content-Encoding header; None if that fails.

    A body that is not compressed is returned as it is, for the same reason as in dechunk.
    """
    for coding in reversed(codings.split(",")):
        if coding.strip() in ("", "identity"):
            continue
        try:
            body = unzip_once(body, coding.strip())
        except Exception:  # each module has an error of its own
            is_text = not re.search(rb"[\x00-\x08]", body[:1024])
            return body if is_text else None
    return body

def parse_answer(answer):
    """A stored HTTP answer → (status or "", headers, decoded body or None)."""
    blank = BLANK_LINE.search(answer, 0, MAX_HEADER_BYTES)
    at = blank.end() if blank else MAX_HEADER_BYTES
    body = answer[at:]
    status = re.match(rb"HTTP/\S+ +(\d{3})", answer)
    headers = parse_headers(answer[:at])
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = dechunk(body)
    body = unzip(body, headers.get("content-encoding", "").lower())
    return status[1].decode() if status else "", headers, body

# a page of HTML that does not say so begins with one of these (WHATWG MIME Sniffing, 7.1)
FIRST_TAG = re.compile(r"\s*(<!--|<(!doctype html|head|script|iframe|h1|div|font|table|a|style"
                       r"|title|b|body|br|p)[ >])", re.I)

def is_html(mime, text):
    """Whether a Content-Type says HTML, or, where there is none, whether the text looks like it."""
    if mime:
        return re.match(r"\s*(text/html|application/xhtml\+xml)\b", mime, re.I) is not None
    return "<html" in text[:4096].lower() or FIRST_TAG.match(text) is not None

class TagReader(HTMLParser):
    """html.parser, made to take linear time and to raise no error on any input.

    Older versions of it search the whole page again for every comment, declaration or tag that is
    not closed, and fail on some declarations. The methods below decide these cases at once.
    """

    def read(self, html):
        """Call the handle_… methods for a page. A tag that the end of the page cuts is ignored."""
        end = html.rfind(">") + 1
        rest = re.split("<[a-zA-Z/!?]", html[end:], maxsplit=1)[0]
        # int() refuses thousands of digits; more than 20 are no character
        self.feed(re.sub("&#[0-9]{20,};?", "\ufffd", html[:end] + rest))
        self.close()

    def parse_starttag(self, i):
        """A tag that cannot be read, as <a href='x> is, ends at the next ">"."""
        end = super().parse_starttag(i)
        if end < 0:
            end = self.rawdata.find(">", i) + 1 or -1
        return end

    def parse_comment(self, i, report=1):
        """Skip <!-- … -->; one that is not closed lasts to the end, as in browsers."""
        end = self.rawdata.find("-->", i + 2)
        return end + 3 if end >= 0 else len(self.rawdata)

    def parse_html_declaration(self, i):
        """Skip <!DOCTYPE …> and <![CDATA[ … ]]> up to the next ">", as browsers do."""
        return self.rawdata.find(">", i) + 1 or -1

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

def is_utf8(body):
    """Whether more of the bytes beyond ASCII are valid UTF-8 than not; also if there are none."""
    text = body.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    n_good = len(text) - len(text.encode("ascii", "ignore")) - n_bad
    return n_bad == 0 or n_bad < n_good

def charset_of(body, content_type):
    """The codec of a page, chosen as browsers do (WHATWG Encoding): a byte order mark, the charset
    in the Content-Type, the one in <meta>, else UTF-8 if the bytes look like it, or windows-1252.
    It is "replacement" for the charsets that browsers refuse to read.
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
    if not encoding:
        return "utf-8" if is_utf8(body) else "cp1252"
    if encoding.name == "x-user-defined":  # for which Python has no codec
        return "cp1252"
    return encoding.codec_info.name

def decode(body, content_type):
    """Bytes → text. Bytes that the charset does not have become U+FFFD, as in browsers."""
    _, mark = read_bom(body)
    codec = charset_of(body, content_type)
    if codec == "replacement":
        return "\ufffd"
    return to_unicode(body[len(mark or b""):], codec)

def parse_record(headers, payload):
    """A WARC record → (page, None) or (None, reason); page: {"id", "url", "date", "html"}.

    Kept are answers with status 200 that are HTML according to the type that the archive found, the
    Content-Type, or, where both are missing, an <html> tag; and "resource" records of HTML, which
    have no HTTP headers. A "conversion" record, as in Common Crawl's WET files, gives a page with
    "text" instead of "html". Nothing in a record is fatal: an error is a reason too.
    """
    try:
        return page_of(headers, payload)
    except Exception as error:
        return None, f"error_{type(error).__name__}"

def page_of(headers, payload):
    """parse_record without its guard against errors."""
    kind = headers.get("warc-type", "nameless")
    page = {"id": headers.get("warc-record-id", ""), "date": headers.get("warc-date", ""),
            "url": headers.get("warc-target-uri", "").strip("<>")}
    if kind == "conversion":
        return page | {"text": payload.decode("utf-8", "replace")}, None
    if kind == "resource":
        content_type = headers.get("content-type", "")
        body = payload
    elif kind == "response":
        status, http, body = parse_answer(payload)
        content_type = http.get("content-type", "")
        if not status:
            return None, "not_http"
        if status != "200":
            return None, f"status_{status}"
    else:
        return None, f"{kind}_record"
    mime = headers.get("warc-identified-payload-type") or content_type
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
