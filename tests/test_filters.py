"""The filters compared with datatrove's own classes, document by document, and real blocklists.

datatrove and what its classes need are in requirements-extra.txt (`# parity`). It gets its words
from spaCy; ours come from one regular expression. So there are two questions: are the rules the
same, given the same words? And how often do other words lead to another decision?
"""
import doctest
import functools
import gzip
import hashlib
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import corpus  # noqa: E402
import crawl  # noqa: E402
import filters  # noqa: E402
import prepare_fineweb as pf  # noqa: E402
import warc  # noqa: E402
from conftest import slow  # noqa: E402

WEB = ROOT.parent / "shared" / "data" / "web"
NEEDED = ("datatrove", "spacy", "tldextract", "ahocorasick", "fasteners", "nltk")
needs_web = pytest.mark.skipif(not WEB.exists(), reason="no ../shared/data/web here")
needs_datatrove = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"not all installed: {NEEDED}")
RULES = {"gopher_repetition": "GopherRepetitionFilter", "gopher_quality": "GopherQualityFilter",
         "c4_quality": "C4QualityFilter", "fineweb_quality": "FineWebQualityFilter"}

def test_the_docstring_s_example_is_true():
    result = doctest.testmod(filters)
    assert result.attempted == 3 and result.failed == 0

def parity(test):
    return needs_web(needs_datatrove(test))

def url_reason(url, lists):
    return filters.url_filter({"url": url}, lists)[1]

# ---- datatrove -----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def real_texts(extractor):
    """[(URL, text)] of every page in the WARC files of ../shared/data/web."""
    if extractor == "plain":
        extract = crawl.plain_text
    else:
        trafilatura = pytest.importorskip("trafilatura", reason="trafilatura is an extra")
        extract = functools.partial(trafilatura.extract, favor_precision=True,
                                    include_comments=False)
    files = [*sorted((WEB / "warc").iterdir()), *sorted(WEB.glob("pages-*.warc.gz"))]
    records = [record for path in files for record, _ in warc.read_warc(path) if record]
    pages = [page for record in records for page, _ in [crawl.parse_record(*record)] if page]
    texts = ((page["url"], page.get("text") or extract(page["html"]) or "") for page in pages)
    return [(url, text.strip()) for url, text in texts if text.strip()]

@functools.lru_cache(maxsize=2)
def theirs(extractor):
    """[(datatrove's words, {rule: (whether it keeps the text, the text it leaves)})]."""
    from datatrove.data import Document
    from datatrove.pipeline import filters as datatrove_filters
    from datatrove.utils.text import split_into_words
    rules = {name: getattr(datatrove_filters, kind)(
        **{"filter_no_terminal_punct": False} if name == "c4_quality" else {})
        for name, kind in RULES.items()}
    found = []
    for _, text in real_texts(extractor):
        documents = {name: Document(text=text, id="") for name in rules}
        found.append((tuple(split_into_words(text)),
                      {name: (rules[name].filter(documents[name]) is True, documents[name].text)
                       for name in rules}))
    return found

def decision(rule, text):
    page, _ = getattr(filters, rule)({"text": text})
    return page is not None, page["text"] if page else text

@parity
@pytest.mark.parametrize("extractor", ["plain", pytest.param("trafilatura", marks=slow)])
def test_given_the_same_words_every_document_is_decided_as_datatrove_s(monkeypatch, extractor):
    for (url, text), (words, decisions) in zip(real_texts(extractor), theirs(extractor)):
        monkeypatch.setattr(filters, "split_words", lambda text: words)
        for rule in ("gopher_repetition", "gopher_quality", "fineweb_quality"):
            assert decision(rule, text) == decisions[rule], (rule, url)

# Where our words decide otherwise. gopher_quality: shares of words with a letter within 0.004 of
# the limit 0.8, where spaCy knows emoticons, "cannot" as two words, or 9to5 as one. c4_quality: a
# Chinese page, whose sentences spaCy does not find: no space follows their full stops.
DIFFERENT = {
    "plain": {"gopher_quality": {"www.semanticscholar.org", "www.slashgear.com", "9to5mac.com",
                                 "lemire.me"}},
    "trafilatura": {"gopher_quality": {"www.archive.org", "9to5mac.com"},
                    "c4_quality": {"037426.cn"}}}

@parity
@pytest.mark.parametrize("extractor", ["plain", "trafilatura"])
def test_our_words_change_only_the_decisions_that_are_explained(extractor):
    for rule in RULES:
        found = [url.split("/")[2] for (url, text), (_, decisions) in
                 zip(real_texts(extractor), theirs(extractor))
                 if decision(rule, text)[0] != decisions[rule][0]]
        wanted = DIFFERENT[extractor].get(rule, set())
        assert set(found) == wanted and len(found) == len(wanted), rule

@parity
def test_what_c4_s_rules_leave_of_a_text_is_what_datatrove_leaves():
    for (url, text), (_, decisions) in zip(real_texts("plain"), theirs("plain")):
        ours, other = decision("c4_quality", text), decisions["c4_quality"]
        assert ours == other, url

@parity
def test_words_are_datatrove_s_but_for_one_in_a_hundred():
    pairs = [(filters.split_words(text), words) for (_, text), (words, _) in
             zip(real_texts("plain"), theirs("plain"))]
    missing = sum((filters.Counter(b) - filters.Counter(a)).total() for a, b in pairs)
    assert missing < 0.01 * sum(len(b) for _, b in pairs)

@parity
def test_languages_are_decided_as_datatrove_decides_by_the_same_model(monkeypatch):
    from datatrove.data import Document
    from datatrove.pipeline.filters import LanguageFilter
    model = filters.fasttext_model() or pytest.skip("lid.176 is an extra")
    monkeypatch.setattr(LanguageFilter, "_requires_dependencies", [])  # of the package fasttext

    class Model:  # as that package answers
        def predict(self, text, k):
            labels, scores = model.predict(text, k=k)
            return labels, np.array(scores)

    other = LanguageFilter("en")
    other.model._model = Model()
    texts = [text for _, text in real_texts("plain")] + [
        row["text"] for row in corpus.read_documents(WEB / "multilang.jsonl.gz")]
    for text in texts:
        assert other.filter(Document(text=text, id="")) == (
            filters.language({"text": text}, model=model)[0] is not None), text[:80]

@parity
def test_urls_are_dropped_as_datatrove_drops_them_by_fineweb_s_own_words(monkeypatch):
    from datatrove.data import Document
    from datatrove.pipeline.filters import URLFilter
    from datatrove.utils._import_utils import ASSETS_PATH
    from tldextract import TLDExtract
    words = {name: (Path(ASSETS_PATH) / f"{name}.txt").read_text().splitlines()
             for name in ("banned_words", "banned_subwords", "soft_banned_words")}
    other = URLFilter(use_integrated_lists=False, **words)
    other.tldextractor = TLDExtract(suffix_list_urls=())  # no download
    for name in ("BLOCKED_DOMAINS", "HARD_WORDS", "SOFT_WORDS", "WORD_PARTS"):
        monkeypatch.setattr(filters, name, set())
    lists, n_dropped = filters.blocklists.__wrapped__((str(ASSETS_PATH),)), 0
    for url in real_urls():
        dropped = other.filter(Document(text="", id="", metadata={"url": url})) is not True
        n_dropped += dropped
        # it does not lower the case of a URL before it looks for whole words
        if url == url.lower() or dropped:
            assert dropped == (filters.url_filter({"url": url}, lists)[0] is None), url
    assert n_dropped > 300

@parity
def test_personal_data_gives_way_as_datatrove_s_formatter_has_it():
    from datatrove.pipeline.formatters.pii import PIIFormatter
    found = [url for url, text in real_texts("plain")
             if filters.pii({"text": text})[0]["text"] != PIIFormatter().format(text)]
    # it replaces the first four numbers of the object identifier 1.3.6.1.1, and keeps an address
    # that touches Chinese characters
    assert len(found) <= 2

@parity
def test_minhash_is_datatrove_s_to_the_bit(tmp_path):
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8,
                           hash_config=HashConfig(precision=64, hash_fc="sha1"))
    other = MinhashDedupSignature(str(tmp_path), config)
    for _, text in real_texts("plain")[:40]:
        runs = pf.shingles(text)
        assert [hashlib.sha1(np.array(bucket, "<u8").tobytes()).digest()[:8]
                for bucket in other.get_signature(runs.reshape(-1, 1))] == \
            [key.tobytes() for key in pf.minhash(text)]

@parity
def test_shingles_of_english_are_datatrove_s_but_for_the_words():
    from datatrove.utils.text import simplify_text
    for _, text in real_texts("plain")[:40]:
        mine = set(pf.simplify(text))
        other = set(re.sub(r"[^\w\s]|_", " ", simplify_text(text)).split())
        assert len(mine ^ other) <= 0.02 * len(other)

# ---- blocklists ----------------------------------------------------------------------------------

def real_urls():
    lists = [gzip.open(path, "rt", errors="replace").read().splitlines()
             for path in sorted((WEB / "ut1").rglob("urls.gz"))]
    return sorted({url for url, _ in real_texts("plain")} |
                  {f"http://{line.strip()}" for lines in lists for line in lines})

@needs_web
def test_every_domain_and_url_of_a_ut1_category_is_dropped_and_their_neighbours_are_not():
    lists = filters.blocklists((str(WEB / "ut1" / "warez"), str(WEB / "ut1" / "adult")))
    domains = gzip.open(WEB / "ut1" / "warez" / "domains.gz", "rt").read().split()
    assert all(url_reason(f"https://www.{domain}/page", lists) for domain in domains)
    assert len(domains) > 100
    urls = gzip.open(WEB / "ut1" / "warez" / "urls.gz", "rt").read().split()
    assert all(url_reason(f"http://{url}", lists) for url in urls)
    assert url_reason("http://abclan.com/", lists) is None
    assert url_reason("https://example.org/a", lists) is None

def test_blocklist_folders_are_read_plain_or_zipped_and_add_to_our_own(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "domains").write_text("# a comment\nBad.example\n")
    (tmp_path / "urls.gz").write_bytes(gzip.compress(b"ok.example/bad/\n"))
    (tmp_path / "banned_words.txt").write_text("forbidden\n")
    lists = filters.blocklists((str(tmp_path),))
    reasons = {"https://x.bad.example/": "domain", "https://www.ok.example/bad": "url",
               "https://notbad.example/": None, "https://ok.example/": None,
               "https://a.org/forbidden": "hard_word", "https://a.org/casino": "hard_word"}
    assert {url: url_reason(url, lists) for url in reasons} == reasons

@pytest.mark.parametrize("text, words", [
    ("Don't, it's well-known.", "Do n't , it 's well - known ."),
    ("U.S. and e.g. Dr. X", "U.S. and e.g. Dr. X"), ("foo... -- x", "foo ... -- x"),
    ("3.14% (see http://a.b/c?d=1)", "3.14 % ( see http://a.b / c?d=1 )"),
    ("word.Next 10-20 1,000 5pm", "word . Next 10 - 20 1,000 5 pm"),
    ("a@b.com #tag", "a@b.com # tag")])
def test_words_are_cut_as_spacy_cuts_them(text, words):
    assert " ".join(filters.split_words(text)) == words
