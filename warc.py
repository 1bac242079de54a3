"""The format of web archives: read and write WARC 1.0 files (ISO 28500).

A record is "WARC/1.0", header lines, an empty line, Content-Length bytes, and an empty line. In a
.warc.gz each record is a gzip member of its own, so damage to one record does not reach the next.

    for record, reason in read_warc("data/site/warc/crawl_00000.warc.gz"):
        headers, payload = record       # or None, and reason says what was wrong
"""
import gzip
import re
import time
import uuid
import zlib

MAX_RECORD_BYTES = 32 << 20   # a longer record is skipped
MAX_HEADER_BYTES = 64 << 10   # of a record
PIECE_BYTES = 128 << 10       # read at a time; decompression makes at most 32 times as much of it

VERSION_LINE = re.compile(rb"WARC/\d\.\d+\r\n")
GZIP_MAGIC = b"\x1f\x8b\x08"

def warc_record(kind, url, payload, content_type="application/http; msgtype=response"):
    """One record as a gzip member. Its id is derived from the URL, so two crawls agree on it."""
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"WARC-Date: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\r\n"
            f"WARC-Record-ID: <urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(payload)}\r\n\r\n")
    return gzip.compress(head.encode() + payload + b"\r\n\r\n", 6, mtime=0)

def parse_headers(head):
    """Header lines as {lower-case name: value}, without the first (version or status) line."""
    headers = {}
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers

def plain_pieces(file):
    """Yield (bytes, None) for each piece of an uncompressed file."""
    while data := file.read(PIECE_BYTES):
        yield data, None

def gzip_pieces(file):
    """Yield (bytes, None) for each decompressed piece of a file of gzip members, and
    (b"", "broken_gzip") where a member is damaged; the next member is then found by its magic.
    """
    data = file.read(PIECE_BYTES)
    member = None
    while data:
        if member is None:
            start = data.find(GZIP_MAGIC)
            if start < 0:
                more = file.read(PIECE_BYTES)
                if not more:
                    return
                data = data[-2:] + more  # the magic may lie across two pieces
                continue
            data = data[start:]
            member = zlib.decompressobj(wbits=31)
            is_first_piece = True
        try:
            yield member.decompress(data, 32 * PIECE_BYTES), None
        except zlib.error:
            yield b"", "broken_gzip"
            member = None
            if is_first_piece:
                data = data[1:]  # so that the same magic is not found again
        else:
            if member.eof:
                data = member.unused_data
                member = None
            else:
                data = member.unconsumed_tail
            is_first_piece = False
        data = data or file.read(PIECE_BYTES)

def unzipped(path):
    """Yield (bytes, None) for each piece of a file, compressed or not, and (b"", why) where the
    stream breaks off: "broken_gzip", after which it resumes, or "end".
    """
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC[:2]
        file.seek(0)
        yield from gzip_pieces(file) if is_gzip else plain_pieces(file)
    yield b"", "end"

def record_at(buffer, start, is_last):
    """The record that begins at `start` → ((headers, payload), None, its end) or (None, reason,
    where to search for the next one). The reason "truncated_record" asks for more bytes, unless the
    buffer holds the last ones.
    """
    resume = start + 7
    window = buffer[start:start + MAX_HEADER_BYTES]
    head, blank, _ = window.partition(b"\r\n\r\n")
    if not blank:
        if is_last or len(window) == MAX_HEADER_BYTES:
            return None, "broken_header", resume
        return None, "truncated_record", resume
    headers = parse_headers(head)
    length = headers.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,15}", length):
        return None, "broken_header", resume
    body = start + len(head) + 4
    end = body + int(length)
    if end - body > MAX_RECORD_BYTES:
        return None, "huge_record", resume
    needed = end if is_last else end + 16  # what follows shows whether the length is right
    if needed > len(buffer):
        return None, "truncated_record", resume
    following = buffer[end:end + 16].lstrip(b"\r\n")[:5]
    if not b"WARC/".startswith(following):
        return None, "wrong_length", resume
    return (headers, bytes(buffer[body:end])), None, end

def read_warc(path):
    """Yield ((headers, payload), None) for every record of a WARC file, or (None, reason).

    Nothing in the file is fatal. After a bad record, resume at the next WARC/1.0 header, because a
    wrong length may span good records. Memory holds one record.
    """
    buffer = bytearray()
    for piece, stop in unzipped(path):
        buffer += piece
        at = 0
        while begins := VERSION_LINE.search(buffer, at):
            record, reason, resume = record_at(buffer, begins.start(), is_last=bool(stop))
            if reason == "truncated_record" and not stop:
                at = begins.start()
                break
            at = resume
            yield record, reason
        else:
            at = max(at, len(buffer) - 12)  # a version line may lie across two pieces
        if stop:
            buffer.clear()
        else:
            del buffer[:at]
        if stop == "broken_gzip":
            yield None, stop
