"""crawl.py, warc.py: WARC files that are whole or damaged, charsets, text of pages, odd servers."""
import ctypes
import gzip
import http.server
import io
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

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

@pytest.mark.parametrize("body, head", [
    ("Grüße".encode("cp1252"), "text/html; charset=ISO-8859-1"), ("Grüße".encode(), "text/html"),
    ('<meta charset="windows-1252">'.encode() + "Grüße".encode("cp1252"), "text/html"),
    ("\ufeffGrüße".encode(), "text/html; charset=nonsense"),
    ("Grüße".encode("utf-16"), "text/html; charset=utf-16")])
def test_charsets_come_from_header_meta_or_the_bytes(body, head):
    assert crawl.decode(body, head).removeprefix('<meta charset="windows-1252">') == "Grüße"

@pytest.mark.parametrize("body, head", [
    (gzip.compress(b"<p>hello", mtime=0), "Content-Encoding: gzip"),
    (zlib.compress(b"<p>hello"), "Content-Encoding: deflate"),
    (b"<p>hello", "Content-Encoding: gzip"),
    (b"4\r\n<p>h\r\n4\r\nello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    (b"<p>hello", "Transfer-Encoding: chunked")])
def test_encoded_bodies_are_decoded_and_decoded_ones_left(tmp_path, body, head):
    (tmp_path / "x.warc.gz").write_bytes(html(body, head=f"Content-Type: text/html\r\n{head}"))
    assert read(tmp_path / "x.warc.gz")[0][0]["html"] == "<p>hello"

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
    assert lines[at + 1] == "Remove any common leading whitespace from every line in `text`."

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
    ("<abbr href=x>", None)])
def test_links_are_made_absolute_and_odd_ones_left_out(tag, link):
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + tag.encode()
    assert list(crawl.links_of("http://a.org/c/", answer)) == ([link] if link else [])

def test_pages_made_to_hang_a_link_finder_do_not():
    head, started = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", time.process_time()
    for piece in (b"<a ", b"<a href=", b"<a x", b"<"):
        list(crawl.links_of("http://a.org/", head + piece * (200_000 // len(piece))))
    assert time.process_time() - started < 2

def test_a_full_disk_ends_a_crawl_in_one_line(monkeypatch, tmp_path, site):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    with pytest.raises(SystemExit, match="the disk is full; .*; free some space"):
        run_main(crawl, site, "--max_pages", 3, "--out", tmp_path)
    assert not list(tmp_path.rglob("*.gz"))

def test_a_seed_that_is_no_url_ends_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["crawl.py", "example.org", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="not a URL.*begin at.*write https://example.org"):
        crawl.main()
    assert not list(tmp_path.iterdir())
