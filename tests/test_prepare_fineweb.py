"""Stage 0: each rule of the filters, personal data, the pipeline from a site to shards, kills."""
import contextlib
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import corpus  # noqa: E402
import crawl  # noqa: E402
import download  # noqa: E402
import filters  # noqa: E402
import prepare_fineweb as pf  # noqa: E402
import inspection  # noqa: E402
import warc  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from conftest import mutate, run_main, slow  # noqa: E402
from test_download import add_hub, server  # noqa: E402, F401

WEB = ROOT.parent / "shared" / "data" / "web"
needs_web = pytest.mark.skipif(not WEB.exists(), reason="no ../shared/data/web here")
PROSE = (
    "The river rises in the hills to the north of the town and runs slowly through the meadows. "
    "In spring it carries the water of melted snow, and people who live near the old bridge have "
    "learned to watch it with care. Nobody remembers who built that bridge. A stone in its wall "
    "bears a date, but the letters beside the date have worn away. Children like to sit there and "
    "throw small sticks into the stream. On the other bank stands a mill that still works. ")

def page(text, url="https://example.org/a"):
    return {"id": "1", "url": url, "text": text}

def reason(step, text):
    return step(page(text))[1]

def run(*arguments, check=True):
    command = [sys.executable, str(ROOT / "prepare_fineweb.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert not check or done.returncode == 0, done.stderr
    return done

def documents(out, split="*"):
    files = sorted((out / "documents").glob(f"{split}_*.jsonl.gz"))
    return [row for file in files for row in corpus.read_documents(file)]

def distinct_prose(n, seed=0):
    """n English documents of which no two are near duplicates."""
    words = PROSE.replace(".", "").lower().split()
    random = np.random.RandomState(seed)

    def sentence():
        return " ".join(random.choice(words, 14)).capitalize() + "."

    return [" ".join(sentence() for _ in range(12)) for _ in range(n)]

def ended(out, seconds=5):
    """True once no process is left whose command names a folder; None after some seconds."""
    for _ in range(seconds * 100):
        with contextlib.suppress(OSError):  # one that ends while it is looked at
            names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
            if not any(str(out).encode() in name for name in names):
                return True
        time.sleep(0.01)

def write_warc(path, texts):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><meta charset=utf-8><p>"
    path.write_bytes(b"".join(
        warc.warc_record("response", f"https://example.org/{i}", head + text.encode())
        for i, text in enumerate(texts)))
    return path

# ---- filters -------------------------------------------------------------------------------------

@pytest.mark.parametrize("url, why", [
    ("https://example.org/river", None), ("https://www.bet365.com/", "domain"),
    ("https://notbet365.com/", None), ("https://a.org/CASINO/x", "hard_word"),
    ("https://a.org/adult-education", None), ("https://a.org/adult-dating", "soft_words"),
    ("https://a.org/free-spins-today", "part_of_word"), ("https://sussex.ac.uk/", None),
    ("https://onlyfans.com./", "domain"), ("https://ONLYFANS.com.:443/x", "domain"),
    ("https://notonlyfans.com./", None), (f"https://{'a.' * 32_000}org/", "long_host")])
def test_url_filter_drops_by_domain_words_and_parts(url, why):
    assert filters.url_filter(page("", url))[1] == why

@pytest.mark.parametrize("text, is_english", [
    (PROSE, True), ("Das ist ein Satz, der in der Sprache geschrieben ist und nicht so.", False),
    ("La maison est dans la rue et les enfants sont avec leur mère, qui est très contente.", False),
    ("El perro está en la casa con los niños, pero no quiere comer lo que le dan.", False),
    ("Pies jest w domu i nie chce się z nami bawić, bo jest już bardzo zmęczony.", False),
    ("1 2 3 4 5 6 7 8 9", False), ("これは日本語の文章です。", False)])
def test_function_words_tell_english(text, is_english):
    found, score = filters.identify_language(text)
    assert (found == "en" and score > 0.65) == is_english and 0 <= score <= 1

@needs_web
def test_without_a_model_no_foreign_text_passes_and_english_does():
    rows = list(corpus.read_documents(WEB / "multilang.jsonl.gz"))
    passed = [row["lang"] for row in rows if filters.language(page(row["text"]))[1] is None]
    # five of them are English articles, in the folders of languages that lack a translation
    assert len(rows) == 159 and sorted(passed) == ["bn"] * 3 + ["en"] * 3 + ["pcm"] * 2

@pytest.mark.parametrize("text, why", [
    (PROSE, None), ("", "empty"), (f"{PROSE}\n\nsame\n\nsame\n\nsame", "repeated_paragraphs"),
    (f"{PROSE}\nsame\nsame\nsame", "repeated_lines"), (PROSE + "good day " * 30, "top_2_gram"),
    (PROSE + "a fine clear day " * 7, "top_4_gram"),
    (PROSE + PROSE[:90] + PROSE[:90].upper() + PROSE[95:185], "repeated_5_grams"),
    (PROSE + PROSE[:53], None)])  # of overlapping runs each character counts once
def test_gopher_repetition_has_a_reason_for_each_rule(text, why):
    assert reason(filters.gopher_repetition, text) == why

@pytest.mark.parametrize("text, why", [
    (PROSE, None), ("The end of that. " * 12, "under_50_words"),
    ("of the x " * 60, "mean_word_length"),
    ("of the incomprehensibilities extraordinarily " * 20, "mean_word_length"),
    (PROSE + "# " * 40, "hashes"),
    (PROSE + "and so ... " * 20, "ellipses"), ("- " + PROSE.replace(". ", ".\n- "), "bullet_lines"),
    (PROSE.replace(". ", "…\n"), "ellipsis_lines"), (PROSE + "2024 " * 40, "words_without_letter"),
    ("Rivers flow onward past green meadows everywhere. " * 9, "stop_words")])
def test_gopher_quality_has_a_reason_for_each_rule(text, why):
    assert reason(filters.gopher_quality, text) == why

@pytest.mark.parametrize("text, why", [
    (PROSE, None), (PROSE + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
    (PROSE + "\nif x { return y }", "curly_bracket"),
    ("One line of it. And two.", "under_5_sentences")])
def test_c4_drops_pages(text, why):
    assert reason(filters.c4_quality, text) == why

def test_c4_drops_lines_and_footnote_marks():
    text = "\n".join([PROSE + "[1] See there [citation needed].", "Home",
        "Please enable JavaScript { now }.",
                      "This site uses cookies for all.", "x" * 1001 + " y z"])
    assert filters.c4_quality(page(text))[0]["text"] == PROSE + " See there ."

@pytest.mark.parametrize("text, why", [
    (PROSE.strip(), None), ("", "empty"),
    ("no stop at the end of this line here\n" * 3, "lines_without_end"),
    ("Short line.\n" * 9 + PROSE, "short_lines"),
    ("\n".join([PROSE.strip()] * 2), "repeated_lines"),
    ("\n\n\n".join(f"Line number {n} ends with a stop." for n in range(9)), "lists")])
def test_fineweb_quality_has_a_reason_for_each_rule(text, why):
    assert reason(filters.fineweb_quality, text) == why

# ---- personal data -------------------------------------------------------------------------------

@pytest.mark.parametrize("before, after", [
    ("write to a.b+c@mail.example-site.co.uk.", "write to email@example.com."),
    ("@user and a@b", "@user and a@b"),
    ("x@y.org, z@y.org, q@y.org", ", ".join([*filters.SAFE_EMAILS, filters.SAFE_EMAILS[0]])),
    ("8.8.8.8 and 151.101.1.69.", "22.214.171.124 and 126.96.36.199."),
    ("127.0.0.1 192.168.1.20 10.0.0.7",) * 2,
    ("999.1.1.1", "999.1.1.1"), ("1.2.3.4.5", "1.2.3.4.5"), ("version 1.2.3", "version 1.2.3"),
    (".3.3.3.0 and 1.3.3.3.0",) * 2, ("user@example", "user@example"),
    *((f"({address})", "(email@example.com)") for address in (
        "o'brien@x.org", "o’brien@x.org", "müller@x.org", "mu\u0308ller@x.org", "a/b=c@x.org",
        f"{'long.' * 20}name@x.org", "иван@почта.рф", "joe@xn--mnchen-3ya.xn--p1ai",
        "a@a.b.c.d.e.f.g.h.i.j.com", "email@123.123.123.123", "joe@[8.8.8.8]")),
    ("'joe@x.org'", "'email@example.com'"), ("发user@x.com请", "发email@example.com请")])
def test_public_addresses_are_replaced_and_private_ones_kept(before, after):
    assert filters.pii(page(before))[0]["text"] == after

@pytest.mark.parametrize("step", [filters.url_filter, filters.language, filters.gopher_repetition,
    filters.gopher_quality, filters.c4_quality, filters.fineweb_quality, filters.pii])
def test_no_step_takes_more_than_linear_time(step):
    for piece in ("!", "a", "a@", "1.", "a.b ", "\n", "[", "é", "- ", "!)", "a-",
                  "a@b.co ", "@b.co", "\u0301\u0327"):
        url = f"http://a.org/{piece * 100}"
        text = piece * (200_000 // len(piece))
        started = time.process_time()
        step(page(text, url))
        assert time.process_time() - started < 2, f"{step.__name__} on {piece!r}"

# ---- the pipeline --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_site(tmp_path_factory):
    """A crawl of the manual's pages for three packages, over HTTP, as documents and shards."""
    out = tmp_path_factory.mktemp("data") / "site"
    script = str(ROOT / "demo" / "web.py")
    command = [sys.executable, script, "textwrap", "heapq", "json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = child.stdout.readline().strip()
    run("--source", "crawl", url, "--out", out, "--quality", "annotate", "--extractor", "plain",
        "--val_fraction", 0.4)
    yield out, url
    child.kill()
    child.wait()

def test_a_crawl_follows_links_and_robots_and_drops_what_it_should(small_site):
    out, _ = small_site
    records = warc.read_warc(out / "warc" / "crawl_00000.warc.gz")
    fetched = "\n".join(headers["warc-target-uri"] for (headers, _), _ in records)
    assert "/json.decoder.html" in fetched and "/private" not in fetched
    kept = {row["url"].split("/", 3)[3]: row for row in documents(out)}
    assert {"textwrap.html", "contact.html"} <= set(kept)
    assert not {"mirror/textwrap.html", "de/", "casino/free-spins.html"} & set(kept)
    contact = kept["contact.html"]["text"]
    assert "editors@" not in contact and "127.0.0.1" in contact
    assert any("gopher_quality: under_50_words" in row.get("flags", ()) for row in kept.values())

def test_the_funnel_adds_up_and_has_samples(small_site):
    index = json.loads((small_site[0] / "index.json").read_text())
    steps = [row["step"] for row in index["funnel"]]
    assert steps == list(pf.STEPS)
    for row, after in zip(index["funnel"], index["funnel"][1:]):
        assert row["docs_per_s"] > 0
        assert row["in"] - sum(row["dropped"].values()) == row["kept"] == after["in"]
    assert index["samples"]["language: is_de"][0]["url"].endswith("/de/")
    assert index["funnel"][-1]["kept"] == sum(file["documents"] for file in index["documents"])

@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """--inspect N and --inspect TEXT of two files, as HTML."""
    out = tmp_path_factory.mktemp("inspect")
    texts = distinct_prose(3)
    odd = "<nav>Home</nav><p>Write to me@example.net. It works.<p>The site uses cookies."
    write_warc(out / "0.warc.gz", [texts[0] + odd, "<script>alert(1)</script>short", texts[1]])
    write_warc(out / "1.warc.gz", ["Der Hund ist in dem Haus und die Katze auch nicht. " * 9,
                                   texts[2], texts[1] + "<p>It is a near twin."])
    shown = []
    for what in ("2", "org/2"):
        run("--source", "warc", out / "0.warc.gz", out / "1.warc.gz", "--out", out / "o",
            "--inspect", what, "--extractor", "plain", "--val_fraction", 0)
        shown.append((out / "o" / "inspect.html").read_text())
    return shown

def test_inspect_shows_what_each_step_did_and_runs_nothing_of_a_page(inspected):
    shown = inspected[0]
    assert "<del>Home</del>" in shown and "<del>The site uses cookies.</del>" in shown
    assert "<ins>Write to email@example.com. It works.</ins>" in shown
    assert "<script>" not in shown and "&lt;script&gt;" in shown

def test_a_page_that_takes_too_long_to_show_has_a_note_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SHOW_SECONDS", 0.2)
    monkeypatch.setattr(inspection, "html_of_a_page", lambda trace: time.sleep(60))
    inspection.write_inspection(tmp_path / "a.html", [inspection.Trace(page("text"), [])])
    assert "https://example.org/a</h2>It is too large" in (tmp_path / "a.html").read_text()

def test_inspect_has_pages_of_every_file_for_every_way_to_end(inspected):
    ends = re.findall(r"<li><a href='#\d'>(.*?)</a>, (\d) pages", inspected[0])
    assert dict(ends) == {"kept": "3", "language: is_de": "1", "extract_text: no_text": "1",
                          "near_duplicates: near_duplicate": "1"}
    assert "near_duplicate of https://example.org/2" in inspected[0]

def test_inspect_takes_the_pages_whose_url_holds_a_text(inspected):
    assert re.findall("<h2>(.*?)</h2>", inspected[1]) == ["https://example.org/2"] * 2
    assert inspected[1].count("<li class=kept><b>url_filter</b>: kept") == 2

def test_finished_work_is_kept_and_other_settings_are_refused(small_site):
    out, url = small_site
    before = {file: file.stat().st_mtime_ns for file in (out / "documents").iterdir()}
    same = ("--source", "crawl", url, "--out", out, "--extractor", "plain", "--val_fraction", 0.4)
    run(*same, "--quality", "annotate")
    assert before == {file: file.stat().st_mtime_ns for file in (out / "documents").iterdir()}
    refused = run(*same, "--quality", "fineweb", check=False)
    assert refused.returncode and f"remove {out} or choose another --out" in refused.stderr

TEXTS = distinct_prose(701)

KILLED = """
import os, signal, sys, prepare_fineweb
victim, replace, until = os.getpid(), os.replace, sys.argv.pop(1)
def killed(part, path):
    if str(path).endswith(until):
        os.kill(os.getpid() if until == "pages/00000_0.npy" else victim, signal.SIGKILL)
    replace(part, path)
os.replace = killed
prepare_fineweb.main()"""

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(command without the folder of its output, that output) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    paths = [write_warc(folder / f"{i}.warc.gz", TEXTS[i * 30:i * 30 + 40]) for i in range(3)]
    Tokenizer.train(TEXTS[:20], 400, "gpt4").save(folder / "tok")
    command = ("--source", "warc", *paths, "--extractor", "plain", "--workers", 1, "--tokenizer",
               folder / "tok", "--shard_tokens", 10_000, "--val_fraction", 0.1, "--out")
    run(*command, folder / "data")
    return command, folder / "data"

def outputs(out):
    """The documents and shards of a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.suffix == ".bin" or path.parent.name == "documents"}

@pytest.mark.parametrize("until", [
    "pages/00000_0.npy", "pages/00001_1.json", "pages/00002_2.jsonl.gz", "unsorted/00000.gz",
    "documents/train_00000.jsonl.gz", "/index.json", "data_train_000002.bin"])
def test_a_run_killed_anywhere_ends_with_the_same_output(undisturbed, tmp_path, until):
    arguments, whole = undisturbed
    command = [sys.executable, "-c", KILLED, until, *arguments, tmp_path / "data"]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    if until == "pages/00000_0.npy":
        assert child.returncode == 1 and "a worker was killed" in child.stderr.splitlines()[-1]
    else:
        assert child.returncode == -signal.SIGKILL
    assert ended(tmp_path / "data"), "a worker writes on"
    assert outputs(tmp_path / "data") != outputs(whole)
    run(*arguments, tmp_path / "data")
    assert outputs(tmp_path / "data") == outputs(whole) and len(outputs(whole)) >= 5

def test_one_worker_and_three_write_the_same_bytes(tmp_path):
    paths = [write_warc(tmp_path / f"{i}.warc.gz", distinct_prose(20, i) + TEXTS[90:92])
             for i in range(4)]
    for name, workers in (("a", 1), ("b", 3)):
        run("--source", "warc", *paths, "--out", tmp_path / name, "--workers", workers,
            "--val_fraction", 0.3)
    files = sorted((tmp_path / "a" / "documents").iterdir())
    assert len(files) == 2 and len(documents(tmp_path / "a")) == 82
    others = [tmp_path / "b" / "documents" / file.name for file in files]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in others]

def test_a_ray_cluster_of_two_workers_writes_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="ray is an extra")
    paths = [write_warc(tmp_path / f"{i}.warc.gz", distinct_prose(20, i) + TEXTS[90:92])
             for i in range(4)]
    for name, how in (("a", ()), ("b", ("--ray", "local"))):
        run("--source", "warc", *paths, "--out", tmp_path / name, "--workers", 2, *how)
    written = [{path.name: path.read_bytes() for path in (tmp_path / name / "documents").iterdir()}
               for name in "ab"]
    assert written[0] == written[1] and len(documents(tmp_path / "b")) == 82

@slow
def test_a_mistake_on_a_ray_cluster_ends_in_one_line_too(tmp_path):
    pytest.importorskip("ray", reason="ray is an extra")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nbroken')
    done = run("--source", "text", tmp_path / "a.jsonl", "--out", tmp_path / "o", "--ray", "local",
               check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "a.jsonl cannot be read: line 2 is not JSON" in last

@pytest.mark.parametrize("name", ["trafilatura", "resiliparse"])
def test_other_extractors_give_the_main_text_and_not_the_navigation(tmp_path, name):
    pytest.importorskip(name, reason=f"{name} is an extra")
    body = "<nav><a href=/>Home page</a></nav><article><p>" + distinct_prose(1)[0] + "</article>"
    write_warc(tmp_path / "a.warc.gz", [body])
    run("--source", "warc", tmp_path / "a.warc.gz", "--out", tmp_path / "o", "--extractor", name,
        "--val_fraction", 0)
    assert [row["text"] for row in documents(tmp_path / "o")] == [distinct_prose(1)[0]]

def test_the_val_split_stays_when_input_is_added_or_cut_otherwise(tmp_path):
    texts = distinct_prose(60)
    write_warc(tmp_path / "a.warc.gz", texts[:40])
    write_warc(tmp_path / "b.warc.gz", texts)
    for name in "ab":
        run("--source", "warc", tmp_path / f"{name}.warc.gz", "--out", tmp_path / name,
            "--val_fraction", 0.2)
    small, large = ({row["text"] for row in documents(tmp_path / name, "val")} for name in "ab")
    assert small and small < large and small == {text for text in large if text in texts[:40]}

# ---- bad input -----------------------------------------------------------------------------------

def plain_settings(**changes):
    return {"is_filtered": True, "extractor": "plain", "language_identifier": "function words",
            "quality": "fineweb", "blocklist": {}} | changes

def test_bad_input_of_every_kind_is_counted_and_the_good_pages_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(crawl, "PAGE_SECONDS", 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
    extracts = {"hang": lambda: time.sleep(30), "crash": lambda: os._exit(1),
                "memory": lambda: bytearray(8 << 30)}
    plain = crawl.plain_text
    monkeypatch.setattr(crawl, "plain_text", lambda html: extracts.get(
        html.removeprefix("<html>"), lambda: plain(html))())
    bodies = [*(f"<html>{name}".encode() for name in extracts), b"<html>" + bytes(9 << 20),
              b"<meta charset=utf-16>\xff\xfe\x00\xd8" + bytes(range(128, 256)) * 9]
    bad = [warc.warc_record("response", f"https://a.org/{i}", head + b"\r\n" + body)
           for i, body in enumerate(bodies)]
    bomb = head + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(99 << 20))
    good = [write_warc(tmp_path / "x", [text]).read_bytes() for text in distinct_prose(9)]
    damaged = good[0][:40] + bytes(60) + good[0][100:]
    huge = b"WARC/1.0\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000_000)
    (tmp_path / "a.warc.gz").write_bytes(b"".join([
        good[1], damaged, good[2], *bad, warc.warc_record("response", "https://a.org/", bomb),
        good[3], gzip.compress(huge, 1), good[4], good[5][:-30]]))
    tracemalloc.start()
    pf.run_task(tmp_path / "a.warc.gz", tmp_path / "0", plain_settings(), None)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    rows = json.loads((tmp_path / "0.json").read_text())["rows"]
    assert len(list(corpus.read_documents(tmp_path / "0.jsonl.gz"))) == 4
    assert rows["read"]["dropped"] | rows["extract_text"]["dropped"] == {
        "broken_gzip": 1, "page_too_large": 2, "huge_record": 1, "truncated_record": 1,
        "error_TimeoutError": 1, "error_EOFError": 1, "error_MemoryError": 1,
        "unknown_charset": 1}

def test_a_record_or_row_that_makes_a_function_fail_is_counted(tmp_path, monkeypatch):
    def failing(headers, payload):
        if headers["warc-target-uri"].endswith("1"):
            raise RecursionError
        return parse_record(headers, payload)
    parse_record = pf.parse_record
    monkeypatch.setattr(pf, "parse_record", failing)
    path = write_warc(tmp_path / "a.warc.gz", distinct_prose(3))
    pf.run_task(path, tmp_path / "0", plain_settings(), None)
    rows = json.loads((tmp_path / "0.json").read_text())["rows"]
    assert rows["read"]["dropped"] == {"error_RecursionError": 1} and rows["read"]["kept"] == 2

def test_lone_surrogates_in_any_field_of_a_row_are_replaced(tmp_path):
    row = {"text": "a \ud83d b", "title": "\ud83d", "more": [{"\udc00": "\ud83d"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pf.run_task(tmp_path / "a.jsonl", tmp_path / "0", plain_settings(is_filtered=False), None)
    kept, = corpus.read_documents(tmp_path / "0.jsonl.gz")
    assert (kept["text"], kept["title"], kept["more"]) == ("a ? b", "?", [{"?": "?"}])

def test_rows_that_are_no_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n'
                                      '{"text": "b", "score": 1e999}\n')
    pf.run_task(tmp_path / "a.jsonl", tmp_path / "0", plain_settings(is_filtered=False), None)
    read = json.loads((tmp_path / "0.json").read_text())["rows"]["read"]
    assert read["dropped"] == {"null_text": 1, "empty_text": 1, "error_ValueError": 1}
    assert [row["id"] for row in corpus.read_documents(tmp_path / "0.jsonl.gz")] == ["a.jsonl/1"]

SLEEPING = """
import runpy, signal, time, filters
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
filters.language = lambda page, model: time.sleep(60)
runpy.run_path("prepare_fineweb.py", run_name="__main__")"""

@pytest.mark.parametrize("kill", [os.kill, os.killpg])  # one process; all, as the terminal does
def test_ctrl_c_ends_a_run_and_its_workers_in_one_line(tmp_path, kill):
    paths = [write_warc(tmp_path / f"{i}.warc.gz", TEXTS[:2]) for i in range(3)]
    child = subprocess.Popen([sys.executable, "-c", SLEEPING, "--source", "warc", *paths, "--out",
                              tmp_path / "o", "--workers", "2"], cwd=ROOT, start_new_session=True,
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(tmp_path.rglob("00001_1.jsonl.gz.part")):
        time.sleep(0.05)
    kill(child.pid, signal.SIGINT)
    errors = child.communicate(timeout=20)[1]
    assert errors.splitlines()[-1].startswith("stopped; finished files are kept; repeat")
    assert child.returncode == 130 and "Traceback" not in errors and ended(tmp_path / "o")

FULL_DISK = """
import builtins, sys, prepare_fineweb
until, opened = sys.argv.pop(1), builtins.open
class Full:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data): raise OSError(28, "No space left on device")
def full(path, mode="r", *rest, **more):
    file = opened(path, mode, *rest, **more)
    return Full(file) if str(path).endswith(until) and "w" in mode else file
builtins.open = full
prepare_fineweb.main()"""

@pytest.mark.parametrize("until", ["0.jsonl.gz.part", "train_00000.jsonl.gz.part",
                                   "index.json.part", "train_000001.bin.part"])
def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(tmp_path, until):
    Tokenizer.train(TEXTS[:20], 400, "gpt4").save(tmp_path / "tok")
    write_warc(tmp_path / "0.warc.gz", TEXTS[:50])
    arguments = [*map(str, ("--source", "warc", tmp_path / "0.warc.gz", "--extractor", "plain",
                            "--tokenizer", tmp_path / "tok", "--out"))]
    command = [sys.executable, "-c", FULL_DISK, until, *arguments, str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("the disk is full; ")
    assert not list((tmp_path / "full").rglob("*.part"))
    for name in ("full", "whole"):
        run(*arguments, tmp_path / name)
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.bin")]
    assert names and all((tmp_path / "whole" / name).read_bytes() == (
        tmp_path / "full" / str(name).replace("whole", "full")).read_bytes() for name in names)

# ---- what others have made -----------------------------------------------------------------------

def fineweb_file(texts):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet
    data = io.BytesIO()
    columns = {"text": texts, "id": [f"<{i}>" for i in range(len(texts))],
               "url": ["u"] * len(texts), "token_count": [1] * len(texts)}
    parquet.write_table(pa.table(columns), data)
    return data.getvalue()

def test_fineweb_s_documents_come_as_they_are_and_its_files_go(server, tmp_path):  # noqa: F811
    repo, revision, folder = download.NAMES["fineweb"]
    texts = ["Short.", "The same twice, me@example.net", "The same twice, me@example.net"]
    add_hub(server, repo, {"000.parquet": fineweb_file(texts), "001.parquet": b"never asked for"},
            folder, revision)
    server.moods[f"/datasets/{repo}/resolve/{revision}/{folder}/000.parquet"] = ["cut", 429]
    command = ("--source", "fineweb", "--out", tmp_path / "a", "--mirror", server.url,
               "--val_fraction", 0)
    run(*command)
    rows = documents(tmp_path / "a")
    assert sorted(row["text"] for row in rows) == texts and "token_count" not in rows[0]
    assert [path.name for path in (tmp_path / "a" / "downloads").iterdir()] == ["files.json"]
    server.files.clear()
    assert "is finished and kept" in run(*command).stdout

def test_common_crawl_s_files_are_filtered_like_local_ones_and_go(server, tmp_path,  # noqa: F811
                                                                  monkeypatch):
    crawl_id = "CC-MAIN-2024-10"
    downloads = tmp_path / "a" / "downloads"
    fetch = pf.fetch
    paths = [write_warc(tmp_path / f"{i}.warc.gz", distinct_prose(20, i)) for i in range(3)]
    server.files[f"/crawl-data/{crawl_id}/warc.paths.gz"] = gzip.compress(
        b"x/0.warc.gz\nx/1.warc.gz\nx/2.warc.gz\nx/3.warc.gz\n")
    server.files |= {f"/x/{path.name}": path.read_bytes() for path in paths}
    server.moods = {"/x/0.warc.gz": ["cut", 429, "cut", "stall"], "/x/1.warc.gz": [500, "changed"]}
    server.files["/x/1.warc.gz"] = server.files["/x/1.warc.gz"][::-1]  # "changed" turns it round
    monkeypatch.setattr(pf, "fetch", lambda *task: [] if list(downloads.glob("*.gz"))
                        else fetch(*task))  # one file at a time is on the disk of one worker
    command = ("--workers", 1, "--val_fraction", 0)
    run_main(pf, "--source", "commoncrawl", crawl_id, "--num_shards", 3, "--mirror", server.url,
             "--out", tmp_path / "a", *command)
    run("--source", "warc", *paths, "--out", tmp_path / "b", *command)
    assert documents(tmp_path / "a") == documents(tmp_path / "b") and len(documents(tmp_path / "b"))
    assert [path.name for path in downloads.iterdir()] == ["files.json"]

def test_a_download_that_ends_in_nothing_is_one_line_of_a_worker(server, tmp_path,  # noqa: F811
                                                                 monkeypatch):
    server.files["/crawl-data/CC-MAIN-2024-10/warc.paths.gz"] = gzip.compress(b"x/0.warc.gz\n")
    with pytest.raises(SystemExit, match="0.warc.gz gives status 404, so there is no such"):
        run_main(pf, "--source", "commoncrawl", "CC-MAIN-2024-10", "--mirror", server.url,
                 "--out", tmp_path / "a")
    assert not (tmp_path / "a" / "pages").exists()

# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, data, found", [
    ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "a.jsonl cannot be read: line 3 is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n\xff\n', "line 2 is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2 is not a JSON object"),
    ("a.jsonl", b'{"txt": "x"}\n', 'row 1 has no string "text"'),
    ("a.jsonl", b'{"text": 7}\n', 'row 1 has no string "text"'),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON (maximum recursion"),
    ("a.jsonl", b'{"text": "x", "score": -Infinity}', "-Infinity is not a number of JSON"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "line 1 is not JSON"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], "a.jsonl.gz cannot be read: "),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
    ("a.csv", b"text\nx\n", "a.csv is none of .txt .jsonl .jsonl.gz .parquet"),
    ("a.parquet", b"PAR1 no parquet", "a.parquet")])
def test_a_bad_documents_file_ends_in_one_line(tmp_path, name, data, found):
    if name == "a.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    (tmp_path / name).write_bytes(data)
    done = run("--source", "text", tmp_path / name, "--out", tmp_path / "out", check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and found in last and last.count("; ") == 1
    assert not list((tmp_path / "out" / "pages").glob("*"))

def test_an_input_that_changed_but_not_in_size_is_refused(tmp_path):
    arguments = ("--source", "text", tmp_path / "in.txt", "--out", tmp_path / "out")
    for text in (PROSE, PROSE.replace("river", "brook")):
        (tmp_path / "in.txt").write_text(text[:400])
        done = run(*arguments, check=False)
    assert done.returncode and "was made with inputs that differ from this run's" in done.stderr

@pytest.mark.parametrize("arguments, found", [
    (("--out", "x"), "neither --source nor the word tokenize"),
    (("--source", "warc", "--out", "x"), "was given no file"),
    (("--source", "warc", "nowhere.warc.gz", "--out", "x"), "found no file nowhere.warc.gz"),
    (("--source", "crawl", "example.org", "--out", "x"), "write https://example.org"),
    (("tokenize", "--out", "x"), "tokenize needs --tokenizer"),
    (("tokenize", "--out", "x", "--tokenizer", "gpt2"), "lists no documents"),
    (("--source", "commoncrawl", "--out", "x"), "takes the name of one crawl"),
    (("--source", "text", __file__, "--out", __file__), "is not a folder; choose another --out"),
    (("--source", "finewebb", "--out", "x"), "finewebb is not a known source"),
    (("--source", "text", __file__, "--out", "x", "--row_tokens", "1"),
     "at most --shard_tokens 100000000, got 1"),
    (("--source", "text", __file__, "--out", "x", "--val_fraction", "2"),
     "at least 0 and below 1, got 2.0")])
def test_a_user_s_mistake_ends_in_one_line(tmp_path, monkeypatch, capsys, arguments, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_fineweb.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        pf.main()
    assert found in str(stop.value) and "\n" not in str(stop.value) and not list(tmp_path.iterdir())

def test_a_crawl_that_reaches_nothing_ends_in_one_line(tmp_path):
    done = run("--source", "crawl", "http://127.0.0.1:9/", "--out", tmp_path / "o", check=False)
    assert "has no document left for training; " in done.stderr.splitlines()[-1]

def test_an_index_of_another_format_names_what_to_remove(tmp_path):
    pf.write_json(tmp_path / "index.json", {"format": "deepdive data", "version": 7})
    with pytest.raises(SystemExit, match="version 7.*remove"):
        corpus.read_index(tmp_path)

@pytest.mark.parametrize("data", [b"[" * 200_000, b"[]", b"null", b"\xff", b"{", json.dumps({
    "format": "deepdive data", "version": 1, "documents": [{"file": "a"}]}).encode()])
def test_a_damaged_index_ends_in_one_line(tmp_path, data):
    (tmp_path / "index.json").write_bytes(data)
    with pytest.raises(SystemExit, match="index.json is damaged: .*; remove [^\n]*$"):
        corpus.read_index(tmp_path)

@pytest.mark.parametrize("keys", [None, np.zeros((3, 2)), np.zeros((14, 2)), np.uint64(7)])
def test_damaged_minhash_keys_end_in_one_line(tmp_path, keys):
    if keys is None:
        (tmp_path / "0.npy").write_bytes(b"\x93NUMPY damaged")
    else:
        np.save(tmp_path / "0.npy", keys)
    with pytest.raises(SystemExit, match="0.npy is damaged; remove"):
        pf.load_keys(tmp_path / "0.npy")

def test_a_file_that_could_not_be_finished_never_gets_its_name(tmp_path):
    with pytest.raises(OSError):
        with pf.gzip_file(tmp_path / "a.jsonl.gz") as file:
            file.write(b"x")
            raise OSError(28, "No space left on device")
    assert not (tmp_path / "a.jsonl.gz").exists()

# ---- mutants: each must be caught by a test above ------------------------------------------------

def cases(test):
    """The arguments of a parametrized test's runs."""
    return [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"][0]

@pytest.mark.parametrize("name, old, new, test", [
    ("url_filter", ">= 2", ">= 1", test_url_filter_drops_by_domain_words_and_parts),
    ("url_filter", "labels[i:]", "labels[:i]", test_url_filter_drops_by_domain_words_and_parts),
    ("gopher_repetition", "(2, 0.20)", "(2, 0.90)",
     test_gopher_repetition_has_a_reason_for_each_rule),
    ("gopher_repetition", "number / len(paragraphs) > 0.30 or characters", "characters",
     test_gopher_repetition_has_a_reason_for_each_rule),
    ("gopher_repetition", "number / len(lines) > 0.30 or characters", "characters",
     test_gopher_repetition_has_a_reason_for_each_rule),
    ("gopher_repetition", "[i:i + 4]] > 1", "[i:i + 4]] > 2",
     test_gopher_repetition_has_a_reason_for_each_rule),
    ("repeated_characters", "i < end or", "",
     test_gopher_repetition_has_a_reason_for_each_rule),
    ("gopher_quality", "< 50", "< 5", test_gopher_quality_has_a_reason_for_each_rule),
    ("gopher_quality", "<= 10", "<= 99", test_gopher_quality_has_a_reason_for_each_rule),
    ("gopher_quality", "0.8 * len", "0.3 * len", test_gopher_quality_has_a_reason_for_each_rule),
    ("c4_quality", "< 5", "< 1", test_c4_drops_pages),
    ("fineweb_quality", "0.12", "0.0", test_fineweb_quality_has_a_reason_for_each_rule),
    ("fineweb_quality", "0.67", "1.67", test_fineweb_quality_has_a_reason_for_each_rule),
    ("pii", ".is_global", ".is_private", test_public_addresses_are_replaced_and_private_ones_kept)])
def test_checks_notice_a_mutant(monkeypatch, name, old, new, test):
    for case in cases(test):
        test(*case)
    mutate(monkeypatch, filters, name, old, new)
    with pytest.raises(AssertionError):
        for case in cases(test):
            test(*case)
