"""crawl.py, warc.py: WARC files that are whole or damaged, charsets, text of pages, odd servers."""
import ctypes
import gzip
import http.server
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import urllib3

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import crawl  # noqa: E402
import download  # noqa: E402
import warc  # noqa: E402
from demo import web  # noqa: E402
from conftest import run_main  # noqa: E402

WEB = ROOT.parent / "shared" / "data" / "web"
needs_web = pytest.mark.skipif(not WEB.exists(), reason="no ../shared/data/web here")
PROSE = ("The river rises in the hills to the north of the town and runs through the meadows. "
         "In spring it carries the water of melted snow.")

def same_gzip(data):
    """gzip without the time, so that tests have the same names in every process."""
    return gzip.compress(data, mtime=0)

def html(text, url="https://example.org/a", head="Content-Type: text/html; charset=utf-8"):
    body = text if isinstance(text, bytes) else f"<html><body><p>{text}</p></body></html>".encode()
    return crawl.warc_record("response", url, f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)

def read(path):
    """The pages of a WARC file, and the reasons for which other records are none."""
    parsed = [crawl.parse_record(*record) if record else (None, why)
              for record, why in crawl.read_warc(path)]
    return [page for page, _ in parsed if page], [why for page, why in parsed if not page]

# ---- WARC ----------------------------------------------------------------------------------------

def test_a_record_that_is_written_is_read_back(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(html("Grüße", "https://example.org/ü?x=1"))
    (headers, payload), why = next(crawl.read_warc(tmp_path / "a.warc.gz"))
    assert why is None and headers["warc-target-uri"] == "https://example.org/ü?x=1"
    assert "Grüße" in crawl.parse_record(headers, payload)[0]["html"]

@needs_web
@pytest.mark.parametrize("name, pages", [
    ("whirlwind.warc.gz", 1), ("whirlwind.warc.wet.gz", 1),
    ("resiliparse-commoncrawl-16pages.warc.gz", 16),
    ("jwarc-cc-1page.warc.gz", 1), ("warcio-example-iana.org-chunked.warc", 1),
    ("pywb-iana.warc.gz", 16), ("warcio-example-wrong-chunks.warc.gz", 1),
    ("aut-archiveorg-subset.warc.gz", 94), ("ukwa-datagovuk-1.warc.gz", 32)])
def test_real_archives_give_their_pages(name, pages):
    assert len(read(WEB / "warc" / name)[0]) == pages

@needs_web
@pytest.mark.parametrize("name, why", [
    ("resiliparse-clipped.warc.gz", "truncated_record"),
    ("warcio-example-trunc.warc", "wrong_length")])
def test_damaged_archives_are_reported_and_not_fatal(name, why):
    assert why in read(WEB / "warc" / name)[1]

@pytest.mark.parametrize("damage, expected, pages", [
    (lambda a, b: a[:40] + b"\x00" * 60 + a[100:] + b, "broken_gzip", 1),
    (lambda a, b: a + b[:-40], "truncated_record", 1),
    (lambda a, b: a + b"rubbish" + b, None, 2),
    (lambda a, b: gzip.decompress(a) + gzip.decompress(b), None, 2),
    (lambda a, b: gzip.decompress(a).replace(b"Content-Length: ", b"Content-Length: 9") +
     gzip.decompress(b), "truncated_record", 1),
    (lambda a, b: gzip.decompress(a).replace(b"Length: 1", b"Length: ") + gzip.decompress(b),
        "wrong_length", 1),
    (lambda a, b: gzip.decompress(a).replace(b"Length: ", b"Length: x") + gzip.decompress(b),
        "broken_header", 1),
    (lambda a, b: b"", None, 0)])
def test_good_records_are_found_behind_a_broken_one(tmp_path, damage, expected, pages):
    path = tmp_path / "x.warc.gz"
    path.write_bytes(damage(html("first " * 12), html("second")))
    found, reasons = read(path)
    assert len(found) == pages and (expected in reasons if expected else not reasons)

@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_one_gzip_member_is_streamed(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(warc, "MAX_RECORD_BYTES", 100_000)
    noise = random.Random(0).randbytes(40_000).hex()
    data = b"".join(gzip.decompress(html(noise, f"https://example.org/{i}")) for i in range(99))
    zipped = gzip.compress(data, 1)
    (tmp_path / "x.warc.gz").write_bytes(zipped if whole else zipped[:len(zipped) // 2])
    tracemalloc.start()
    reasons = [reason for _, reason in crawl.read_warc(tmp_path / "x.warc.gz")]
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    assert reasons == ([None] * 99 if whole else [None] * 49 + ["truncated_record"])

def test_a_page_that_unzips_to_much_more_than_a_piece_hides_no_other(tmp_path):
    noise = random.Random(0).randbytes(30_000).hex()
    data = [html("first") + html(bytes(7 << 20)) if i == 2 else html(noise, f"https://a.org/{i}")
            for i in range(9)]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(data))
    assert len(read(tmp_path / "x.warc.gz")[0]) == 10

def test_records_that_lie_across_gzip_members_are_read(tmp_path):
    data = gzip.decompress(html("first") + html("second"))
    cuts = [data[i:i + 77] for i in range(0, len(data), 77)]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(map(gzip.compress, cuts)))
    assert len(read(tmp_path / "x.warc.gz")[0]) == 2

@pytest.mark.parametrize("zipped", [False, True])
def test_where_a_file_is_cut_into_pieces_does_not_matter(tmp_path, monkeypatch, zipped):
    first, second = html("first"), html("second")
    data = first[:40] + bytes(60) + first[100:] + b"rubbish" + second + first if zipped else \
        (gzip.decompress(first + second) + b"rubbish").replace(b"Length: 1", b"Length: ", 1)
    (tmp_path / "x.warc").write_bytes(data)
    found = []
    for n in (1, 2, 7, 64, 1 << 17):
        monkeypatch.setattr(warc, "PIECE_BYTES", n)
        found.append([record for record in crawl.read_warc(tmp_path / "x.warc") if record[0]])
    assert len(found[0]) >= 1 and all(one == found[0] for one in found)

def test_memory_does_not_grow_with_a_file(tmp_path):
    noise = random.Random(0).randbytes(1 << 20).hex()
    (tmp_path / "x.warc.gz").write_bytes(html(noise) * 100)
    code = ("import crawl, re, sys; print(sum(1 for _ in crawl.read_warc(sys.argv[1])), "
            "re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.warc.gz"], cwd=ROOT,
                          capture_output=True, text=True)
    n, peak_kb = map(int, done.stdout.split())
    assert n == 100 and peak_kb < 100_000, "of a file of 115 MB"

def test_a_zip_bomb_is_dropped_without_being_unzipped(tmp_path):
    bomb = zlib.compress(b"<p>" + bytes(200 << 20), 9)
    (tmp_path / "x.warc.gz").write_bytes(html(bomb,
        head="Content-Type: text/html\r\nContent-Encoding: deflate"))
    tracemalloc.start()
    assert read(tmp_path / "x.warc.gz") == ([], ["page_too_large"])
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()

def test_a_huge_record_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "MAX_RECORD_BYTES", 10_000)
    data = html("a " * 9000) + html("second")
    for name, content in (("x.warc.gz", data), ("x.warc", gzip.decompress(data))):
        (tmp_path / name).write_bytes(content)
        pages, reasons = read(tmp_path / name)
        assert len(pages) == 1 and reasons == ["huge_record"]

GERMAN = "Die Bäckerin öffnete früh. " * 40

@pytest.mark.parametrize("body, head, text", [
    ("Grüße".encode("cp1252"), "; charset=ISO-8859-1", "Grüße"), ("Grüße".encode(), "", "Grüße"),
    (b'<meta charset="windows-1252">\xfc', "", '<meta charset="windows-1252">ü'),
    ("\ufeffGrüße".encode(), "; charset=nonsense", "Grüße"), (b"caf\xe9", "", "café"),
    ("\ufeffGrüße".encode(), "; charset=iso-8859-1", "Grüße"),
    ("Grüße".encode("utf-16"), "; charset=utf-16", "Grüße"),
    (GERMAN.encode() + b"\xa0", "; charset=utf-8", GERMAN + "\ufffd"),
    (GERMAN.encode() + b"\xa0", "", GERMAN + "\ufffd"),
    (b"caf\xe9 \x81", "; charset=cp1252", "café \ufffd"),
    (b"<meta charset=utf-16>\xc3\xbc", "", "<meta charset=utf-16>ü"),
    (b"<!-- <meta charset=utf-8> --><meta http-equiv=content-type content='charset=cp1251'>\xcf",
     "", "<!-- <meta charset=utf-8> --><meta http-equiv=content-type content='charset=cp1251'>П"),
    (b"<?xml encoding='iso-8859-2'?>\xb1", "", "<?xml encoding='iso-8859-2'?>ą"),
    *((b"abc", f"; charset={name}", "abc") for name in ("undefined", "punycode", "hex", "utf-7"))])
def test_charsets_are_those_that_a_browser_takes(body, head, text):
    assert crawl.decode(body, f"text/html{head}") == text

@pytest.mark.parametrize("codec, labels", [
    ("cp1252", "iso8859-1 l1 cp819 latin-1 ascii x-cp1252"), ("cp1254", "iso-8859-9 latin5"),
    ("cp874", "tis-620 dos-874"), ("cp932", "shift_jis windows-31j x-sjis"),
    ("mac-roman", "x-mac-roman"), ("gbk", "gb2312 x-gbk"), ("cp949", "euc-kr ks_c_5601-1987")])
def test_labels_of_charsets_are_those_of_the_whatwg(codec, labels):
    for label in labels.split():
        assert warc.charset_of(b"\xe9", f"text/html; charset={label}") == codec
        assert warc.charset_of(f"<meta charset={label}>\xe9".encode("latin-1"), "") == codec

def test_a_charset_that_browsers_refuse_and_pages_of_garbage_are_dropped(tmp_path):
    (tmp_path / "x.warc.gz").write_bytes(html(b"\x1b$)Cabc", head="Content-Type: text/html; "
        "charset=iso-2022-kr") + html(bytes(range(128, 256)), head="Content-Type: text/html; "
        "charset=utf-8"))
    assert read(tmp_path / "x.warc.gz") == ([], ["unknown_charset"] * 2)

def test_no_record_is_fatal(tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "decode", lambda *_: 1 / 0)
    (tmp_path / "x.warc.gz").write_bytes(html(b"worse") * 2)
    assert read(tmp_path / "x.warc.gz") == ([], ["error_ZeroDivisionError"] * 2)

def test_resource_records_of_html_are_pages(tmp_path):
    records = [warc.warc_record("resource", f"https://a.org/{i}", b"<p>hello", mime)
               for i, mime in enumerate(("text/html; charset=utf-8", "text/plain", "TEXT/HTML"))]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(records))
    pages, reasons = read(tmp_path / "x.warc.gz")
    assert [page["html"] for page in pages] == ["<p>hello"] * 2 and reasons == ["not_html"]

@pytest.mark.parametrize("body, head", [
    (gzip.compress(b"<p>hello", mtime=0), "Content-Encoding: gzip"),
    (zlib.compress(b"<p>hello"), "Content-Encoding: deflate"),
    (same_gzip(b"<p>he") + same_gzip(b"llo") + b"rubbish", "Content-Encoding: gzip"),
    (same_gzip(same_gzip(b"<p>hello")), "Content-Encoding: gzip, gzip"),
    (zlib.compress(same_gzip(b"<p>hello")), "Content-Encoding: gzip, identity,Deflate"),
    (zlib.compress(b"<p>hello")[2:-4], "Content-Encoding: deflate"),
    (b"<p>hello", "Content-Encoding: gzip"), (b"<p>hello", "Content-Encoding: br"),
    (b"<p>hello", "Content-Encoding: utf-8"),
    (b"4\r\n<p>h\r\n4\r\nello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    (b"<p>hello", "Transfer-Encoding: chunked")])
def test_encoded_bodies_are_decoded_and_decoded_ones_left(tmp_path, body, head):
    (tmp_path / "x.warc.gz").write_bytes(html(body, head=f"Content-Type: text/html\r\n{head}"))
    assert read(tmp_path / "x.warc.gz")[0][0]["html"] == "<p>hello"

def damaged(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]

@pytest.mark.parametrize("at", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_gzip_member_whose_first_bytes_are_damaged_is_counted(tmp_path, member, at):
    members = [html("first"), html("second"), html("third")]
    members[member] = damaged(members[member], at)
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members))
    assert [len(found) for found in read(tmp_path / "x.warc.gz")] == [2, 1]

@pytest.mark.parametrize("data, why", [
    (b"Not an archive.\n" * 99, "no_record"), (same_gzip(b"filedesc://a.arc\n"), "no_record"),
    (b"\xfd7zXZ\0" + bytes(99), "no_record"), (same_gzip(b""), "no_record"), (b"", None),
    (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd_is_not_installed")])
def test_a_file_without_records_says_so(tmp_path, monkeypatch, data, why):
    monkeypatch.setattr(warc, "zstd_file", lambda file: None)
    (tmp_path / "x.warc.gz").write_bytes(data)
    assert read(tmp_path / "x.warc.gz") == ([], [why] if why else [])

def test_lines_that_end_in_lf_and_folded_headers_are_read(tmp_path):
    head = b"HTTP/1.1 200 OK\nContent-Type:\n text/html;\n\tcharset=cp1252\n\n"
    body = head + b"<p>\xfc\n\n<p>b\r\n\r\nc"
    head = f"WARC/1.0\nWARC-Type: response\nContent-Length:\n {len(body)}\n\n".encode()
    (tmp_path / "x.warc").write_bytes((head + body + b"\n\n") * 2)
    pages, reasons = read(tmp_path / "x.warc")
    assert [page["html"] for page in pages] == ["<p>ü\n\n<p>b\r\n\r\nc"] * 2 and not reasons

@pytest.mark.parametrize("piece", [
    b"WARC/1.0\r\n", b"xWARC/1.0\r\n", b"WARC/1.0\r\nA: b\r\n", b"WARC/1.0\r\n\r\n", b"\r\n\r\n",
    b"WARC/1.0\r\nContent-Length: 9\r\n\r\n", b"WARC/1.0\r\nContent-Length: 99999\r\n\r\n"])
def test_files_made_to_hang_the_reader_do_not(tmp_path, piece):
    for name, data in (("x.warc", piece * (400_000 // len(piece))),
                       ("y.warc.gz", gzip.compress(piece * (40_000_000 // len(piece))))):
        (tmp_path / name).write_bytes(data)
        started = time.process_time()
        assert sum(1 for _ in warc.read_warc(tmp_path / name)) <= warc.MAX_BAD_RECORDS + 1
        assert time.process_time() - started < 2

@pytest.mark.parametrize("coding, module", [("br", "brotli"), ("zstd", "backports.zstd")])
def test_bodies_of_other_codings_are_read_where_the_module_is_there(tmp_path, coding, module):
    compress = pytest.importorskip(module, reason="an extra").compress
    bomb = compress(b"<p>" + bytes(99 << 20))
    for body, page in ((compress(b"<p>hello"), "<p>hello"), (bomb, None)):
        head = f"Content-Type: text/html\r\nContent-Encoding: {coding}"
        (tmp_path / "x.warc.gz").write_bytes(html(body, head=head))
        pages, reasons = read(tmp_path / "x.warc.gz")
        assert pages[0]["html"] == page if page else reasons == ["page_too_large"]

def test_compressed_bodies_that_cannot_be_read_are_dropped(tmp_path):
    noise = random.Random(0).randbytes(999)
    (tmp_path / "x.warc.gz").write_bytes(b"".join(
        html(noise, head=f"Content-Type: text/html\r\nContent-Encoding: {coding}")
        for coding in ("gzip", "deflate", "br", "zstd", "compress")))
    assert read(tmp_path / "x.warc.gz") == ([], ["content_encoding"] * 5)

# ---- text of a page ------------------------------------------------------------------------------

def test_plain_extraction_keeps_text_and_drops_layout():
    text = crawl.plain_text(
        "<head><title>T</title><style>p{}</style></head><nav><a href=/>Home</a></nav><main>"
        f"<h1>River</h1><p>{PROSE}</p><pre>a\n  b</pre><h2>Links</h2><li><a href=/x>All of it</a>"
        "</main><footer>All rights are reserved for ever and ever.</footer>")
    assert text == f"River\n{PROSE.strip()}\na\n  b"

def test_a_documented_function_is_a_signature_line_and_a_paragraph_line():
    site = web.Site(["textwrap"])
    lines = crawl.plain_text(site.page("/textwrap.html")[2]).split("\n")
    at = lines.index("textwrap.dedent(text)")
    assert lines[at + 1] == "Remove any common leading whitespace from every line in text."

@pytest.mark.parametrize("line, shown", [
    ("Return ``None`` or :func:`~json.dumps`, see `the guide <https://a.org>`_::",
     "Return None or dumps, see the guide:"),
    (":py:class:`a.B`, :mod:`c <d.e>` and :meth:`~close`", "a.B, c and close"),
    ("*name* is **not** a * b * c", "name is not a * b * c"),
    ("as in [1]_ and [CIT]_, not a[1]_x", "as in and, not a[1]_x"),
    ("2**3 with *args and **kwargs, a[::2], C::D", "2**3 with *args and **kwargs, a[::2], C::D"),
    ("an unpaired ` stays", "an unpaired ` stays")])
def test_the_manual_shows_no_markup_of_rest(line, shown):
    assert web.without_markup(line) == shown

def test_a_title_of_a_docstring_is_a_paragraph_of_its_own():
    page = web.prose("Do it.\n\nNotes\n-----\nIt is slow.\n\n    Usage\n    =====\n    Call it.")
    titles_and_text = ["Do it.", "Notes", "It is slow.", "Usage", "Call it."]
    assert re.findall("<p>(.*?)</p>", page) == titles_and_text
    assert web.prose("  p\n---\n  2").startswith("<pre>")

TEXT = "<p>This is a sentence that has more than twelve words in it, surely so.</p>"

@pytest.mark.parametrize("page", [
    f"<a name=top>{TEXT}", f"<p title='a>b'>{TEXT[3:]}", f"<textarea>{TEXT[3:]}</textarea>{TEXT}",
    f"{TEXT}<script>var x = '{TEXT}", f"{TEXT}<style>{TEXT}", f"<div><nav>a b c.</div>{TEXT}",
    f"{TEXT}<nav>{TEXT}", f"{TEXT}<!-- {TEXT}", f"{TEXT}<p title='a>", f"{TEXT}<![if x]>",
    f"Two words.<form>{TEXT}</form>", f"<form><form>{TEXT}</form></form>",
    f"<title>{TEXT[3:-4]}</title>{TEXT}", f"<!-->{TEXT}", f"{TEXT}&#{'1' * 5000};"])
def test_markup_of_all_kinds_neither_hides_text_nor_becomes_it(page):
    assert crawl.plain_text(page).replace("\ufffd", "").strip() == TEXT[3:-4]

def test_a_form_that_holds_most_of_a_page_is_kept_and_a_small_one_dropped():
    outside = "<p>One sentence stands outside of the form.</p>"
    assert crawl.plain_text(f"{outside}<form>{TEXT * 3}</form>").count("\n") == 3
    assert crawl.plain_text(f"{TEXT * 3}<form>{outside}</form>").count("\n") == 2

@pytest.mark.parametrize("piece", [
    "<script>", "<!--", "<nav>", "</nav", "<a ", "<a href='", "<![CDATA[", "<![if ", "<?", "</",
    "<p>", "<pre>", "<form>", "</p>", "&#1", "&amp", "<div></x>", "<base href=x>", "<meta a='"])
def test_pages_made_to_hang_the_extractor_or_the_link_finder_do_not(piece):
    page, started = piece * (200_000 // len(piece)), time.process_time()
    crawl.plain_text(page + TEXT)
    crawl.links_of("http://a.org/", b"HTTP/1.1 200 OK\r\n\r\n<html>" + page.encode())
    assert time.process_time() - started < 4

def test_a_page_cut_anywhere_never_breaks_the_extractor():
    whole = web.Site(["textwrap"]).page("/textwrap.html")[2]
    for n in range(0, len(whole), 997):
        crawl.plain_text(whole[:n] + "<" + whole[n + 1:n + 300])

@pytest.mark.parametrize("hang", [
    lambda html: ctypes.PyDLL(None).sleep(30), lambda html: os._exit(1), lambda html: [][0]])
def test_a_page_that_hangs_or_crashes_the_extractor_costs_only_itself(monkeypatch, hang):
    monkeypatch.setattr(crawl, "PAGE_SECONDS", 1)
    monkeypatch.setattr(crawl, "plain_text", lambda html: hang(html) if html == "bad" else html)
    extractor = crawl.Extractor("plain")
    with pytest.raises((TimeoutError, EOFError, IndexError)):
        extractor({"html": "bad"})
    assert extractor({"html": "good", "url": "u"}) == ({"text": "good", "url": "u"}, None)
    extractor.close()

def test_the_extractor_s_child_ends_when_its_parent_is_killed():
    code = ("import crawl, time; e = crawl.Extractor('plain'); e({'html': '<p>x'}); "
            "print(e.child.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    child = Path("/proc", parent.stdout.readline().strip().decode(), "cmdline")
    assert child.read_bytes()
    parent.kill()
    parent.wait()
    deadline = time.time() + 5
    while child.exists() and child.read_bytes() and time.time() < deadline:
        time.sleep(0.01)
    assert not child.exists() or not child.read_bytes()

# ---- the crawler ---------------------------------------------------------------------------------

class Site(http.server.BaseHTTPRequestHandler):
    """700 pages in a chain of tens, every 50th of which fails at first; robots.txt moved; two that
    send a byte now and then for 20 s, in the body and in the head."""
    failed = set()

    def do_GET(self):
        number = int(self.path[1:] or 0) if self.path[1:].isdigit() or self.path == "/" else 0
        status, body, head = 200, b"", {"Content-Type": "text/html"}
        if self.path in ("/slow-body", "/slow-head"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (self.path == "/slow-body"))
            for _ in range(400):
                time.sleep(0.05)
                self.wfile.write(b"x")
        elif self.path == "/robots.txt":
            status, head = 301, head | {"Location": "/moved.txt"}
        elif self.path == "/moved.txt":
            body = gzip.compress(b"User-agent: *\nDisallow: /13")
            head |= {"Content-Encoding": "gzip"}
        elif number and number % 50 == 0 and number not in self.failed:
            status = 503
            self.failed.add(number)
        else:
            links = range(number * 10, min(700, number * 10 + 11))
            body = "".join(f"<p>{number}<a href='/{i}'>{i}</a>" for i in links).encode()
        self.send_response(status)
        for name, value in (head | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    log_message = lambda *_: None

@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *_: None  # who was left behind hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()

def records_of(folder):
    """[(url, type, payload)] of a crawl, in order."""
    found = [record for path in sorted(folder.glob("*.gz")) for record, _ in crawl.read_warc(path)]
    return [(head["warc-target-uri"], head["warc-type"], payload) for head, payload in found]

def test_a_crawl_killed_in_the_middle_goes_on_in_the_same_order(tmp_path, site):
    command = [sys.executable, str(ROOT / "crawl.py"), site, "--max_pages", "600", "--out"]
    done = subprocess.run([*command, tmp_path / "whole"], capture_output=True, text=True)
    assert "holds 600 pages in 3 files" in done.stdout, done.stderr
    child = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "warc" / "crawl_00001.warc.gz.part").exists():
        assert child.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    child.kill()
    child.wait()
    subprocess.run([*command, tmp_path / "killed"], capture_output=True, check=True)
    assert records_of(tmp_path / "killed" / "warc") == records_of(tmp_path / "whole" / "warc")

def test_robots_txt_is_followed_where_it_moved_and_unzipped(site):
    fetcher = crawl.Fetcher(0, {})
    assert fetcher.allowed(site + "12") and not fetcher.allowed(site + "130")

def test_where_robots_txt_cannot_be_had_nothing_is_fetched(tmp_path):
    assert crawl.crawl(["http://127.0.0.1:9/"], tmp_path, 10) == [] and not list(tmp_path.iterdir())

@pytest.mark.parametrize("path", ["slow-body", "slow-head"])
def test_a_server_that_never_stops_sending_is_left_after_the_deadline(monkeypatch, site, path):
    monkeypatch.setattr(crawl, "FETCH_SECONDS", 0.5)
    started = time.time()
    record, links = crawl.Fetcher(0, {}).record(site + path)
    assert time.time() - started < 10 and links == []
    assert b"no complete answer within 0.5 s" in gzip.decompress(record)

def test_requests_keep_the_delay_between_them(site):
    fetcher, started = crawl.Fetcher(0.1, {}), time.time()
    threads = [threading.Thread(target=fetcher.record, args=(site,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert time.time() - started >= 0.4

@pytest.mark.parametrize("tag, link", [
    ("<a href='/b'>", "http://a.org/b"), ('<A class=x HREF="b#top">', "http://a.org/c/b"),
    ("<a href=?x&amp;y>", "http://a.org/c/?x&y"), ("<a href='http://['>", None),
    ("<abbr href=x>", None), ("<area href=x>", "http://a.org/c/x"), ("<a href>", None),
    ("<base href=/d/><a href=x>", "http://a.org/d/x"), ("<a data-href=x>", None),
    ("<base href='http://['><a href=x>", "http://a.org/c/x"),
    ("<a href='/l?a=1&copy=2&section=4'>", "http://a.org/l?a=1&copy=2&section=4"),
    ("<a href='/a b'>", "http://a.org/a%20b"), ("<a title='a>b' href=/z>", "http://a.org/z"),
    ("<a data-href=/no href=/yes href=/no>", "http://a.org/yes"),
    ("<a href='/\u2028\x0c/ü?ü'>", "http://a.org/%E2%80%A8%0C/%C3%BC?%C3%BC"),
    ("<a href='HTTP://A.ORG/Up'>", "http://a.org/Up"), ("<a href='//A.org?x'>", "http://a.org/?x"),
    (f"<a href='/&#{'1' * 5000};'>", "http://a.org/%EF%BF%BD"), ("<!-- <a href=x> -->", None),
    ("<script>'<a href=x>'</script>", None), (f"<a href='/{'x' * 9000}'>", None)])
def test_links_are_made_absolute_and_odd_ones_left_out(tag, link):
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + tag.encode()
    assert list(crawl.links_of("http://a.org/c/", answer)) == ([link] if link else [])

@pytest.mark.parametrize("head, body, links", [
    ("Content-Type: text/html; charset=latin1", "<a href='/ü?ü'>", ["http://a.org/%C3%BC?%FC"]),
    ("Content-Type: TEXT/HTML", "<a href=/b>", ["http://a.org/b"]),
    ("X: y", "<!doctype html><a href=/b>", ["http://a.org/b"]),
    ("X: y", "<p>no head <a href=/b>", ["http://a.org/b"]), ("X: y", "text <a href=/b>", []),
    ("Content-Type: text/plain", "<html><a href=/b>", []), ("Location: /Ã¼", "",
                                                            ["http://a.org/%C3%BC"])])
def test_links_are_found_in_whatever_is_html_and_in_its_charset(head, body, links):
    answer = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}".encode("latin-1")
    assert crawl.links_of("http://a.org/", answer) == links

def test_urls_of_the_same_page_are_one():
    urls = "http://a.org/a http://a.org/a? http://a.org/%61 HTTP://A.org:80/b/../a#x".split()
    assert len({crawl.url_key(crawl.clean_url(url)) for url in urls}) == 1
    others = "http://a.org/a/ http://a.org/a?b http://a.org/A https://a.org/a".split()
    assert len({crawl.url_key(crawl.clean_url(url)) for url in [*others, urls[0]]}) == 5

def test_pages_made_to_hang_a_link_finder_do_not():
    head, started = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", time.process_time()
    for piece in (b"<a ", b"<a href=", b"<a x", b"<"):
        list(crawl.links_of("http://a.org/", head + piece * (200_000 // len(piece))))
    assert time.process_time() - started < 2

@pytest.fixture
def serve():
    """serve({path: raw answers, of which the last is repeated}) → the address of such a server."""
    servers = []

    def start(answers):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.asked.append((self.path, self.headers["Accept-Encoding"]))
                left = answers.get(self.path, [b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"])
                self.wfile.write(left.pop(0) if len(left) > 1 else left[0])

            log_message = lambda *_: None

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.asked = []
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()

def answer(body, *headers, status="200 OK", n_bytes=None):
    body = body if isinstance(body, bytes) else body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {n_bytes or len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

OURS = "User-agent: deepdive-crawler\nDisallow: /a"

@pytest.mark.parametrize("robots, refused, allowed", [
    ("User-agent: *\nDisallow: /*.pdf$\nDisallow: /a*b", "/x.pdf /axb", "/x.pdf?1 /c"),
    ("User-agent: *\nDisallow: /\nAllow: /p", "/q ?x", "/p/1"),
    ("User-agent: *\n\nDisallow: /a\n\nDisallow: /b", "/a /b", "/c"),
    ("User-agent: *\nDisallow: /a\nUser-agent: *\nDisallow: /b", "/a /b", "/c"),
    ("\ufeffUser-agent: *\nDisallow: /a", "/a", "/c"),
    ("User-agent: *\nDisallow: /a".encode("utf-16"), "/a", "/c"),
    ("User-agent: *\nDisallow: /?x", "?x /?x", "/x"),
    (f"{OURS}\nUser-agent: *\nDisallow: /b", "/a", "/b"),
    (OURS.replace("deepdive-c", "Deepdive-C").replace("er\n", "er/1.0\n"), "/a", "/b"),
    *((OURS.replace("deepdive-crawler", name), "", "/a") for name in
      ("deepdive", "crawler", "deep", "deepdive-crawlers", "robots", "d"))])
def test_robots_txt_is_read_as_rfc_9309_has_it(serve, robots, refused, allowed):
    site = serve({"/robots.txt": [answer(robots, "Content-Type: application/octet-stream")]})
    fetcher = crawl.Fetcher(0, {})
    assert not any(fetcher.allowed(crawl.clean_url(site + path)) for path in refused.split())
    assert all(fetcher.allowed(crawl.clean_url(site + path)) for path in allowed.split())

@pytest.mark.parametrize("wanted, delay, is_open", [
    ("0.5", 0.5, True), ("abc", 0, True), ("-1", 0, True), ("60", 60, True), ("61", 0, False),
    ("86400", 0, False)])
def test_a_crawl_delay_holds_for_its_host_and_one_too_long_closes_it(serve, capsys, wanted, delay,
                                                                     is_open):
    site, other = (serve({"/robots.txt": [answer(f"User-agent: *\n{line}")]})
                   for line in (f"Crawl-delay: {wanted}", ""))
    fetcher = crawl.Fetcher(0, {})
    assert fetcher.allowed(f"{site}/") == is_open and fetcher.allowed(f"{other}/")
    assert (fetcher.host(site).delay, fetcher.host(other).delay) == (delay, 0)
    assert is_open != (f"asks for {wanted} s between two requests" in capsys.readouterr().err)

def test_a_slow_host_does_not_hold_up_another_one(serve):
    slow, fast = serve({}), serve({})
    fetcher = crawl.Fetcher(0, {})
    fetcher.host(slow).delay = 1
    with crawl.ThreadPool(crawl.BATCH) as threads:
        late = threads.map_async(fetcher.record, [f"{slow}/{i}" for i in range(8)])
        started = time.time()
        threads.map(fetcher.record, [f"{fast}/{i}" for i in range(8)])
        assert time.time() - started < 3 and not late.ready()

@pytest.mark.parametrize("robots", [
    answer("", status="503 No"), answer("\x01\x8b\x02", "Content-Encoding: compress"), b""])
def test_a_host_whose_robots_txt_cannot_be_read_is_named(serve, capsys, monkeypatch, robots):
    monkeypatch.setattr(urllib3.Retry, "DEFAULT_BACKOFF_MAX", 0)
    assert not crawl.Fetcher(0, {}).allowed(serve({"/robots.txt": [robots]}) + "/")
    assert "so no page of this host is fetched" in capsys.readouterr().err

def test_a_body_that_is_cut_short_is_fetched_again_and_never_stored(serve):
    head, chunked = "Content-Type: text/html", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    site = serve({"/once": [answer("<p>x", head, n_bytes=9), answer("<p>whole", head)],
                  "/always": [answer("<p>x", head, n_bytes=9)],
                  "/chunked": [chunked + b"\r\n9\r\n<p>x"]})
    records = [gzip.decompress(crawl.Fetcher(0, {}).record(f"{site}/{name}")[0])
               for name in ("once", "always", "chunked")]
    assert b"<p>whole" in records[0]
    assert all(b"Type: metadata" in record and b"cut short 3 times" in record
               for record in records[1:])

def test_answers_with_many_headers_are_read_and_only_gzip_is_asked_for(serve):
    site = serve({"/": [answer("<p>x", "Content-Type: TEXT/HTML", *["X: y"] * 300)]})
    assert b"<p>x" in gzip.decompress(crawl.Fetcher(0, {}).record(f"{site}/")[0])
    assert "br" not in crawl.Fetcher(0, {}).session.headers["Accept-Encoding"]

@pytest.mark.parametrize("page, why", [
    (answer("", "Location: http://www.example.org/x", status="301 Moved"),
     "the first link leads to http://www.example.org/x;"),
    (None, "cannot be read (Failed to resolve")])
def test_a_crawl_that_gets_no_page_says_why_and_fails(serve, tmp_path, capsys, page, why):
    seed = serve({"/": [page]}) if page else "http://nowhere.invalid/"
    with pytest.raises(SystemExit, match="holds no page; other records: .*; give another seed"):
        run_main(crawl, seed, "--out", tmp_path)
    assert why in capsys.readouterr().err

def test_a_crawl_says_which_urls_had_no_answer(serve, tmp_path, capsys):
    site = serve({"/": [answer("<html><a href=/cut>", "Content-Type: text/html")],
                  "/cut": [answer("x", "Content-Type: text/html", n_bytes=9)]})
    run_main(crawl, site, "--out", tmp_path)
    assert "holds 1 pages in 1 files; other records: the body was cut short 3 times: 1" in \
        capsys.readouterr().out

def test_ctrl_c_ends_a_crawl_in_one_line_at_once(site, tmp_path):
    command = [sys.executable, str(ROOT / "crawl.py"), f"{site}slow-body", "--out", str(tmp_path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "0/" not in child.stderr.read(20):
        pass
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=15)[1]
    assert said.strip().endswith("interrupted; run the same command again to continue")
    assert "Traceback" not in said

def test_a_full_disk_ends_a_crawl_in_one_line(monkeypatch, tmp_path, site):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    with pytest.raises(SystemExit, match="the disk is full; .*; free some space"):
        run_main(crawl, site, "--max_pages", 3, "--out", tmp_path)
    assert not list(tmp_path.rglob("*.gz"))

@pytest.mark.parametrize("seed", ["example.org", "http://", "http://[", "ftp://example.org",
                                  "http://a.org:99999/"])
def test_a_seed_that_is_not_a_url_ends_in_one_line(tmp_path, seed):
    with pytest.raises(SystemExit, match="is not a URL.*begin at; .* https://example.org"):
        run_main(crawl, seed, "--out", tmp_path / "x")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("flag, value, found", [
    ("--delay", "-1", "--delay must be at least 0 seconds, got -1"), ("--delay", "nan", "got nan"),
    ("--max_pages", "0", "--max_pages must be at least 1, got 0")])
def test_flags_out_of_range_end_in_one_line(tmp_path, flag, value, found):
    with pytest.raises(SystemExit, match=found):
        run_main(crawl, "http://127.0.0.1:9/", "--out", tmp_path / "x", flag, value)
    assert not list(tmp_path.iterdir())

def test_seeds_that_robots_txt_forbids_are_said_to_be(serve, tmp_path, capsys):
    site = serve({"/robots.txt": [answer("User-agent: *\nDisallow: /")]})
    assert crawl.crawl([f"{site}/"], tmp_path, 9) == []
    assert "robots.txt does not allow the seeds to be fetched" in capsys.readouterr().err

def test_a_crawl_goes_on_beside_a_file_of_another_crawler(serve, tmp_path):
    site = serve({"/": [answer("<html><a href=/b>", "Content-Type: text/html")]})
    (tmp_path / "crawl_00000.warc.gz").write_bytes(
        warc.warc_record("warcinfo", "urn:x", b"") + warc.warc_record("response", "http://[", b""))
    assert len(crawl.crawl([f"{site}/"], tmp_path, 9)) == 2
