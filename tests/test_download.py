"""download.py against a server that truncates, stalls, refuses, changes files, and goes away."""
import gzip
import hashlib
import http.server
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import download as dl  # noqa: E402
from conftest import run_main  # noqa: E402

DATA = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()

class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files; the n-th request for a path meets the n-th of its server.moods."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        moods, data = self.server.moods.get(self.path, []), self.server.files.get(self.path)
        mood = moods.pop(0) if moods else "well"
        if data is None or isinstance(mood, int):
            return self.answer(mood if isinstance(mood, int) else 404, b"", {"Retry-After": "0"})
        if mood == "changed":
            data = self.server.files[self.path] = data[::-1] + b"new"
        head = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} | self.server.heads.get(self.path, {})
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        is_same = self.headers.get("If-Range", head["ETag"]) == head["ETag"]
        if start and is_same and mood != "whole":
            head["Content-Range"] = f"bytes {start + 7 * (mood == 'shifted')}-/{len(data)}".replace(
                "-/", f"-{len(data) - 1}/")
            return self.answer(206, data[start:], head, mood)
        self.answer(200, data, head, mood)

    def do_HEAD(self):
        """The redirect to the store of large files, with what the Hub states of them."""
        self.server.heads_asked.append(self.path)
        data = self.server.files.get(self.path)
        head = {}
        if self.path.endswith(".safetensors"):
            head = {"X-Linked-Size": len(data or b""), "X-Linked-ETag": f'"{self.server.sha256}"'}
        self.answer(404 if data is None else 302, b"", head)

    def answer(self, status, body, head, mood="well"):
        self.send_response(status)
        for name, value in (head | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        body = bytes(len(body)) if mood == "garbled" else body
        self.wfile.write(body[:len(body) // 2] if mood in ("cut", "stall") else body)
        if mood == "stall":
            self.server.released.wait(20)

    log_message = lambda *_: None

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(dl, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(dl, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(dl, "PIECE_BYTES", 1000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.moods, server.asked, server.heads = {"/f": DATA}, {}, [], {}
    server.heads_asked, server.sha256 = [], SHA256
    server.released, server.handle_error = threading.Event(), lambda *_: None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()

PINNED = {"size": len(DATA), "sha256": SHA256}

# ---- one file ------------------------------------------------------------------------------------

@pytest.mark.parametrize("pinned", [PINNED, {}], ids=["pinned", "unknown"])
@pytest.mark.parametrize("moods", [
    [], ["cut", "cut", "cut"], ["stall"], [429, 500, 503], ["cut", "whole"], ["cut", "shifted"],
    ["cut", 416, "cut"], ["cut"] * 9], ids=str)
def test_a_file_arrives_whole_whatever_the_server_does(server, tmp_path, moods, pinned):
    server.moods["/f"] = list(moods)
    dl.download(f"{server.url}/f", tmp_path / "a", **pinned)
    assert (tmp_path / "a").read_bytes() == DATA and [p.name for p in tmp_path.iterdir()] == ["a"]

def test_a_cut_download_asks_only_for_what_is_missing(server, tmp_path):
    server.moods["/f"] = ["cut", "cut"]
    dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)
    assert [r for _, r in server.asked] == [None, "bytes=150000-", "bytes=225000-"]

def test_the_part_of_a_killed_process_is_gone_on_with_if_a_hash_can_check_it(server, tmp_path):
    for name, pinned, wanted in (("a", PINNED, "bytes=1000-"), ("b", {}, None)):
        (tmp_path / f"{name}.part").write_bytes(DATA[:1000])
        dl.download(f"{server.url}/f", tmp_path / name, **pinned)
        assert server.asked.pop()[1] == wanted and (tmp_path / name).read_bytes() == DATA

@pytest.mark.parametrize("part", [DATA, DATA[:999] + b"x", DATA + b"x"], ids=len)
def test_a_part_that_is_whole_or_wrong_or_too_long_ends_right(server, tmp_path, part):
    (tmp_path / "a.part").write_bytes(part)
    dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)
    assert (tmp_path / "a").read_bytes() == DATA and (part != DATA or not server.asked)

def test_a_file_that_changes_in_the_middle_is_never_mixed(server, tmp_path):
    server.moods["/f"] = ["cut", "changed"]
    dl.download(f"{server.url}/f", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA[::-1] + b"new"

def test_a_pinned_file_of_another_size_ends_in_one_line(server, tmp_path):
    server.moods["/f"] = ["cut", "changed"]
    with pytest.raises(SystemExit, match="has 300003 bytes, expected 300000; a file of a pinned"):
        dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)

@pytest.mark.parametrize("moods, why", [
    ([404], "gives status 404, so there is no such public file; check the name"),
    ([500] * 5, "failed 5 times, the last time with: status 500"),
    (["stall"] * 2 + [503] * 6, "failed 5 times"),
    (["garbled"] * 6, "has the SHA-256 .*, expected")])
def test_what_does_not_get_better_ends_in_one_line(server, tmp_path, moods, why):
    server.moods["/f"] = moods
    with pytest.raises(SystemExit, match=why) as stop:
        dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)
    assert "\n" not in str(stop.value) and not (tmp_path / "a").exists()

def test_a_server_that_goes_away_leaves_a_part_from_which_the_next_run_goes_on(server, tmp_path):
    server.moods["/f"] = ["cut"] + [500] * 9
    with pytest.raises(SystemExit, match="run the same command again to continue"):
        dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)
    server.moods["/f"] = []
    dl.download(f"{server.url}/f", tmp_path / "a", **PINNED)
    assert server.asked[-1][1] == "bytes=150000-"
    with pytest.raises(SystemExit, match="failed 5 times.*: .*refused; check the net") as stop:
        dl.download("http://127.0.0.1:9/f", tmp_path / "b", **PINNED)
    assert "object at" not in str(stop.value)

def test_tries_that_get_further_do_not_count_and_others_wait_longer_and_longer(monkeypatch):
    pauses, here = [], [0]
    monkeypatch.setattr(dl.time, "sleep", pauses.append)
    def fails():
        here[0] += 5 * (len(pauses) == 2)
        raise dl.Unfit("x", 9 if len(pauses) == 4 else 0)
    with pytest.raises(SystemExit):
        dl.persist("u", fails, lambda: here[0])
    assert pauses == [1, 2, 1, 2, 9, 8]

@pytest.mark.parametrize("wait, least, most", [
    ("7", 7, 7), ("Fri, 01 Jan 2100 00:00:00 GMT", 300, 300), ("x", 0, 0), ("", 0, 0), ("²", 0, 0),
    ("Fri, 01 Jan 2100 00:00:00 -0000", 0, 0), ("9" * 99, 0, 0), ("-3", 0, 0)])
def test_a_server_says_in_seconds_or_by_a_date_when_to_come_again(wait, least, most):
    answer = SimpleNamespace(status_code=429, headers={"Retry-After": wait})
    with pytest.raises(dl.Unfit) as stop:
        dl.check_status("u", answer)
    assert least <= stop.value.pause_seconds <= most

def test_common_crawl_s_limit_of_requests_is_waited_for(server, tmp_path):
    server.moods["/f"] = [403, 403]
    dl.download(f"{server.url}/f", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA

def test_ctrl_c_ends_a_download_in_one_line(server, tmp_path, monkeypatch):
    add_hub(server, "a/b", {"0.parquet": DATA})
    monkeypatch.setattr(dl.Part, "receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="interrupted; run the same command again to continue"):
        run_main(dl, "a/b", "--out", tmp_path, "--mirror", server.url)

def test_a_full_disk_is_no_reason_to_try_again_and_ends_in_one_line(server, tmp_path, monkeypatch):
    add_hub(server, "a/b", {"0.parquet": DATA})
    monkeypatch.setattr(dl.Part, "receive", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.setattr(dl.time, "sleep", None)
    with pytest.raises(SystemExit, match="the disk is full; .*; free some space"):
        run_main(dl, "a/b", "--out", tmp_path, "--mirror", server.url)

# ---- OpenAI's weights ----------------------------------------------------------------------------

WEIGHTS = "/openai-community/gpt2/resolve/main/model.safetensors"

@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files |= {WEIGHTS: DATA, WEIGHTS.replace("model.safetensors", "config.json"): b"{}"}
    return server

def test_a_download_of_weights_that_was_cut_continues_and_nothing_is_fetched_twice(hub, tmp_path):
    hub.moods[WEIGHTS] = ["cut"] + [503] * 9
    with pytest.raises(SystemExit, match="run the same command again"):
        dl.download_gpt2("gpt2", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    hub.moods[WEIGHTS] = []
    hub.asked.clear()
    dl.download_gpt2("gpt2", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == DATA
    assert [r for _, r in hub.asked] == ["bytes=150000-", None]  # the second is config.json's
    dl.download_gpt2("gpt2", tmp_path)
    assert len(hub.asked) == 2

def test_ranks_that_want_the_same_weights_wait_for_the_first_which_downloads_them(hub, tmp_path):
    hub.moods[WEIGHTS] = ["cut"]
    ranks = [threading.Thread(target=dl.download_gpt2, args=("gpt2", tmp_path / "gpt2"))
             for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert (tmp_path / "gpt2" / "model.safetensors").read_bytes() == DATA
    assert [r for _, r in hub.asked] == [None, "bytes=150000-", None]

def test_weights_with_another_sha256_are_refused_and_removed(hub, tmp_path):
    hub.sha256 = 64 * "0"
    with pytest.raises(SystemExit, match="expected 000"):
        dl.download_gpt2("gpt2", tmp_path)
    assert list(tmp_path.iterdir()) == []

def test_an_unreachable_hub_is_one_line_that_says_what_to_do(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=f";.*put the file into {tmp_path}"):
        dl.download_gpt2("gpt2-xl", tmp_path)

def test_weights_that_do_not_exist_end_at_once(hub, tmp_path):
    with pytest.raises(SystemExit, match="status 404"):
        dl.download_gpt2("gpt2-xxl", tmp_path)
    assert len(hub.heads_asked) == 1 and not hub.asked

# ---- what there is -------------------------------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"

def add_hub(server, repo, files, folder="", revision=REVISION):
    """A data set on a Hub of its own, whose listing has two pages."""
    tree = f"/api/datasets/{repo}/tree/{revision}/{folder}".rstrip("/")
    rows = [{"type": "file", "path": f"{folder}/{name}".strip("/"), "size": len(data),
             "lfs": {"oid": hashlib.sha256(data).hexdigest()}} for name, data in files.items()]
    rows.append({"type": "directory", "path": "x"})
    server.files |= {f"/datasets/{repo}/resolve/{revision}/{folder}/{name}".replace("//", "/"): data
                     for name, data in files.items()}
    server.files[f"/api/datasets/{repo}/revision/main"] = json.dumps({"sha": revision}).encode()
    page = f"{tree}?recursive=true"
    server.files[page] = json.dumps(rows[:1]).encode()
    server.files[f"{page}&cursor=2"] = json.dumps(rows[1:]).encode()
    server.heads[page] = {"Link": f'<https://elsewhere.org{page}&cursor=2>; rel="next"'}

def test_fineweb_s_files_come_from_the_pinned_revision_and_the_folder(server, tmp_path):
    repo, revision, folder = dl.NAMES["fineweb"]
    add_hub(server, repo, {"001.parquet": b"b", "000.parquet": b"a", "x.md": b""}, folder, revision)
    (file,) = dl.find_files("fineweb", 1, tmp_path, server.url)
    assert dl.fetch(file, "fineweb", tmp_path, server.url).read_bytes() == b"a"
    assert file["name"] == "000.parquet" and file["sha256"] == hashlib.sha256(b"a").hexdigest()

def test_a_branch_is_looked_up_once_and_then_stays(server, tmp_path):
    add_hub(server, "a/b", {"0.parquet": b"a", "1.parquet": b"b"})
    dl.find_files("a/b", 1, tmp_path, server.url)
    add_hub(server, "a/b", {"0.parquet": b"new", "1.parquet": b"new"}, revision="f" * 40)
    n_asked = len(server.asked)
    assert len(dl.find_files("a/b", 1, tmp_path)) == 1 and len(server.asked) == n_asked
    assert [REVISION in file["path"] for file in dl.find_files("a/b", 2, tmp_path, server.url)] == \
        [True, True]

@pytest.mark.parametrize("name, is_val", [
    ("fineweb_val_000000.bin", True), ("a/tiny_val.bin", True), ("val_0.bin", True),
    ("my_val_train_000001.bin", False), ("medieval_000001.bin", False), ("eval.bin", False),
    ("val_train_000001.bin", False), ("x_val_000000.parquet", False)])
def test_only_the_end_of_a_name_makes_a_val_shard(name, is_val):
    assert dl.is_val_shard(name) is is_val


def test_val_shards_come_whatever_the_number_of_train_shards(server, tmp_path):
    add_hub(server, "a/b", {f"w_{n}.bin": b"x" for n in ("train_000001", "train_000002", "val_0")})
    names = [file["name"] for file in dl.find_files("a/b", 1, tmp_path, server.url)]
    assert names == ["w_val_0.bin", "w_train_000001.bin"]

def test_a_crawl_s_warc_files_are_those_of_its_list(server, tmp_path):
    server.files["/crawl-data/CC-MAIN-2024-10/warc.paths.gz"] = gzip.compress(b"c/0.gz\nc/1.gz\n")
    server.files["/c/1.gz"] = DATA
    files = dl.find_files("CC-MAIN-2024-10", 2, tmp_path, server.url)
    path = dl.fetch(files[1], "CC-MAIN-2024-10", tmp_path, server.url)
    assert path == tmp_path / "1.gz" and path.read_bytes() == DATA

@pytest.mark.parametrize("source, shards, found", [
    ("finewebb", 1, "is not a known source"), ("fineweb", 0, "at least 1, got 0"),
    ("a/empty", 1, "no file of the kinds"),
    ("a/missing", 1, "status 404"), ("CC-MAIN-1999-01", 1, "status 404")])
def test_an_odd_source_ends_in_one_line(server, tmp_path, monkeypatch, source, shards, found):
    add_hub(server, "a/empty", {"README.md": b""})
    monkeypatch.setattr(sys, "argv", ["download.py", source, "--num_shards", str(shards),
                                      "--out", str(tmp_path), "--mirror", server.url])
    with pytest.raises(SystemExit, match=found) as stop:
        dl.main()
    assert "\n" not in str(stop.value)

@pytest.mark.parametrize("names, found", [
    (["test-00000-of-1.parquet", "train-00000-of-1.parquet"], ["train-00000-of-1.parquet"]),
    (["d/dev.jsonl", "d/x_validation_1.jsonl", "d/x_train_test.jsonl"], ["d/x_train_test.jsonl"]),
    (["eval/0.parquet", "pytorch_model.bin", "train/0.parquet"], ["train/0.parquet"]),
    (["w_train_1.bin", "w_val_0.bin", "x.parquet"], ["w_val_0.bin", "w_train_1.bin"]),
    (["contest.parquet", "latest.parquet"], ["contest.parquet", "latest.parquet"])])
def test_only_what_is_to_be_trained_on_is_taken(server, tmp_path, names, found):
    add_hub(server, "a/b", dict.fromkeys(names, b"x"))
    assert [file["name"] for file in dl.find_files("a/b", 9, tmp_path, server.url)] == found

def test_several_folders_are_refused_until_one_is_named(server, tmp_path):
    add_hub(server, "a/b", {"de/1.parquet": b"x", "en/x/1.parquet": b"x", "en/x_1.parquet": b"y"})
    with pytest.raises(SystemExit, match="a/b has files in 3 folders: de, en, en/x; .* a/b/de"):
        dl.find_files("a/b", 9, tmp_path, server.url)
    add_hub(server, "a/b", {"x/1.parquet": b"x", "x_1.parquet": b"y"}, folder="en")
    files = dl.find_files("a/b/en", 9, tmp_path, server.url)
    paths = [dl.fetch(file, "a/b/en", tmp_path, server.url) for file in files]
    assert [path.read_bytes() for path in paths] == [b"x", b"y"]  # of the same name with _ for /

def test_a_data_set_that_is_only_for_evaluation_is_refused(server, tmp_path):
    add_hub(server, "a/b", {"test.parquet": b"x", "dev/0.parquet": b"x"})
    with pytest.raises(SystemExit, match="a/b has only files for evaluation, e.g. dev/0.parquet"):
        dl.find_files("a/b", 9, tmp_path, server.url)

@pytest.mark.parametrize("content", [
    b"<html>", b"", b"[]", b"null", b'{"sha": 1}', b'{"sha": "main"}',
    gzip.compress(b"<html>\n", mtime=0), gzip.compress(b"x/0.warc.gz\n", mtime=0)[:-9], b"\x1f\x8b\x08" + bytes(99), b"[" * 100_000])
def test_a_mirror_that_answers_something_else_ends_in_one_line(server, tmp_path, content):
    server.files["/api/datasets/a/b/revision/main"] = content
    server.files["/crawl-data/CC-MAIN-2024-10/warc.paths.gz"] = content
    for source in ("a/b", "CC-MAIN-2024-10"):
        with pytest.raises(SystemExit, match="is not the list that was asked for") as stop:
            dl.find_files(source, 1, tmp_path, server.url)
        assert "\n" not in str(stop.value)

def test_a_page_of_html_is_not_taken_for_a_file(server, tmp_path):
    server.heads["/f"] = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(SystemExit, match="a page of HTML instead of the file"):
        dl.download(f"{server.url}/f", tmp_path / "a")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "a/b"}'])
def test_a_damaged_list_of_files_ends_in_one_line(server, tmp_path, content):
    (tmp_path / "files.json").write_text(content)
    with pytest.raises(SystemExit, match="files.json is damaged; remove it"):
        dl.find_files("a/b", 1, tmp_path, server.url)

def test_another_source_in_the_same_folder_is_refused(server, tmp_path):
    add_hub(server, "a/b", {"0.parquet": b"a"})
    dl.find_files("a/b", 1, tmp_path, server.url)
    with pytest.raises(SystemExit, match="lists files of a/b, but a/c was asked for"):
        dl.find_files("a/c", 1, tmp_path, server.url)

def test_a_process_killed_in_a_download_leaves_no_half_file(server, tmp_path):
    add_hub(server, "a/b", {"0.parquet": DATA})
    server.moods[f"/datasets/a/b/resolve/{REVISION}/0.parquet"] = ["stall"]
    command = [sys.executable, str(ROOT / "download.py"), "a/b", "--out", str(tmp_path), "--mirror",
               server.url]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 20
    while not (tmp_path / "0.parquet.part").exists() and time.time() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / "0.parquet").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "0.parquet").read_bytes() == DATA
