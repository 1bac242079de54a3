"""Stage 0: files that others have prepared, from the Hugging Face Hub or Common Crawl, whole.

    python download.py fineweb --num_shards 2 --out data/fineweb/files
    python download.py CC-MAIN-2024-10 --num_shards 1 --out data/cc/files
    python download.py kjj0/fineweb10B-gpt2 --num_shards 9 --out data/fineweb10B
    python download.py gpt2                                 # OpenAI's weights → data/openai/gpt2
    python download.py climbmix --out data/climbmix/files --mirror https://mirror.example.org

in:  a crawl of Common Crawl, or a data set on the Hub: OWNER/NAME, or one of the short NAMES below
out: OUT/files.json  what will be downloaded: the revision, and "name", "path", "size", "sha256" of
     each file (None: Common Crawl tells neither); OUT/NAME …, with .part behind it until whole

A revision is looked up once and then stays, so a folder never mixes two versions of a data set.
A download that was cut goes on where it stopped (RFC 9110, 13.1.5 and 14: If-Range, Range); it is
given up when TRIES tries in a row got no further. Size and SHA-256 must be those of files.json.

Differs from huggingface_hub: one way only, plain HTTP; no cache folder outside of OUT, no Xet.
"""
import argparse
import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import time
from pathlib import Path
from urllib.parse import quote

import requests
from tqdm import tqdm

HUB, COMMON_CRAWL = "https://huggingface.co", "https://data.commoncrawl.org"
NAMES = {  # short name: (data set, revision, folder in it)
    "fineweb": ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                "sample/10BT"),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "main", "")}
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")     # released weights
KINDS = (".bin", ".parquet", ".jsonl", ".jsonl.gz")  # of a data set, the first that it has
TRIES = 5              # that get no further
PAUSE_SECONDS = 1      # before the second try; then 2, 4, 8
MAX_PAUSE_SECONDS = 300  # of what a server asks for in Retry-After
SILENCE_SECONDS = 30   # without a byte, after which a try has failed
PIECE_BYTES = 1 << 16  # what a cut loses at most

# ---- Files, whole and checked ---------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """Open PATH.part for writing bytes; rename it when all went well, so PATH is never half."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:  # a full disk gets its space back
        part.unlink(missing_ok=True)
        raise

@contextlib.contextmanager
def one_line_when_full():
    """A full disk ends in one line; whole_file has left nothing half-written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit("no space is left on the disk; no file has its name before it is whole; "
                         "make room and repeat the command, which goes on") from None

class Unfit(Exception):
    """An answer that is not (the rest of) the file, and how long the server asks to wait."""

    def __init__(self, why, pause_seconds=0):
        super().__init__(why)
        self.pause_seconds = min(pause_seconds, MAX_PAUSE_SECONDS)

def ask(url, **headers):
    """GET → a streamed answer of status 200 or 206; raises Unfit where another try may help."""
    answer = requests.get(url, headers={"Accept-Encoding": "identity"} | headers, stream=True,
                          timeout=SILENCE_SECONDS)
    if answer.status_code in (200, 206):
        return answer
    answer.close()
    if answer.status_code in (408, 416, 429) or answer.status_code >= 500:
        wait = answer.headers.get("Retry-After", "")
        raise Unfit(f"status {answer.status_code}", int(wait) if wait.isdigit() else 0)
    raise SystemExit(f"{url} answers with status {answer.status_code}; it must be a public file; "
                     "check the name, or give another --mirror")

def persist(url, attempt, bytes_here=lambda: 0):
    """attempt(), again and again with growing pauses, until TRIES in a row got no further."""
    tries, furthest = 0, bytes_here()
    while True:
        try:
            return attempt()
        except (requests.RequestException, Unfit) as error:
            tries = tries + 1 if bytes_here() <= furthest else 1
            furthest = max(furthest, bytes_here())
            if tries == TRIES:
                raise SystemExit(
                    f"{url} failed {TRIES} times, at last with: {str(error).splitlines()[0]}; only "
                    "a file that is whole is used; check the network or give another --mirror, and "
                    "repeat the command, which goes on from here") from None
            time.sleep(max(getattr(error, "pause_seconds", 0), PAUSE_SECONDS * 2 ** (tries - 1)))

class Part:
    """What is there of a file, PATH.part, and the tries to get the rest of it.

    Bytes of an earlier process count only if a SHA-256 will tell whether they belong to the file;
    those of this process also if the server says so, by the ETag.
    """

    def __init__(self, url, path, size, sha256):
        self.url, self.path, self.sha256 = url, Path(f"{path}.part"), sha256
        self.size = self.pinned_size = size
        self.etag = None
        if not sha256:
            self.path.unlink(missing_ok=True)

    def bytes_here(self):
        return self.path.stat().st_size if self.path.exists() else 0

    def receive(self, progress):
        """One try to get all the bytes that are missing, from the first one that is."""
        have = self.bytes_here() if self.sha256 or self.etag else 0
        headers = {"Range": f"bytes={have}-"} | ({"If-Range": self.etag} if self.etag else {})
        with ask(self.url, **headers if have else {}) as answer:
            place = re.match(r"bytes (\d+)-\d+/(\d+)$", answer.headers.get("Content-Range", ""))
            is_rest = answer.status_code == 206
            if is_rest and (not place or int(place[1]) != have):
                raise Unfit(f"another range than was asked for, {have}-")
            length = place[2] if place else answer.headers.get("Content-Length")
            if length and self.pinned_size not in (None, int(length)):
                raise SystemExit(
                    f"{self.url} has {length} bytes, not {self.pinned_size}; a file of a pinned "
                    f"revision never changes; remove {self.path.parent} and repeat the command")
            tag = answer.headers.get("ETag", "")
            self.size = int(length) if length else self.size
            self.etag = tag if tag.startswith('"') else None  # W/"…" promises no equal bytes
            progress.total, progress.n = self.size, have * is_rest
            with open(self.path, "ab" if is_rest else "wb") as file:
                for piece in answer.iter_content(PIECE_BYTES):
                    file.write(piece)
                    progress.update(len(piece))

    def complete(self, progress):
        """Receive what is missing, then check it; raises Unfit."""
        if not self.sha256 or self.bytes_here() != self.size:
            self.receive(progress)
        if self.size not in (None, self.bytes_here()):
            raise Unfit(f"{self.bytes_here()} of {self.size} bytes")
        if self.sha256 and file_sha256(self.path) != self.sha256:
            self.path.unlink()
            raise Unfit("bytes of another SHA-256")

def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def download(url, path, size=None, sha256=None):
    """URL → path, whole and checked, or SystemExit. Nothing is fetched if the path is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Part(url, path, size, sha256)
        if part.bytes_here() > (size or 0):
            part.path.unlink()
        with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False) as progress:
            persist(url, lambda: part.complete(progress), part.bytes_here)
        os.replace(part.path, path)
    return path

# ---- What there is to download -------------------------------------------------------------------

def listing(url):
    """A small answer as (bytes, URL of its next page or None)."""
    def attempt():
        with ask(url) as answer:
            return answer.content, answer.links.get("next", {}).get("url")
    return persist(url, attempt)

def hub_files(source, revision, mirror):
    """A data set on the Hub → (revision, its files); large ones have a SHA-256 there."""
    base = (mirror or HUB).rstrip("/")
    repo, pinned, folder = NAMES.get(source, (source, "main", ""))
    revision = revision or pinned
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch moves
        answer, _ = listing(f"{base}/api/datasets/{repo}/revision/{revision}")
        revision = json.loads(answer)["sha"]
    page, files = f"{base}/api/datasets/{repo}/tree/{revision}/{folder}".rstrip("/"), []
    while page:
        answer, following = listing(page)
        files += [row for row in json.loads(answer) if row["type"] == "file"]
        page = following and base + following[following.index("/api/"):]  # stay on the mirror
    kind = next((kind for kind in KINDS if any(row["path"].endswith(kind) for row in files)), None)
    if not kind:
        raise SystemExit(f"{repo} at {revision} has none of {' '.join(KINDS)} in its folder "
                         f"{folder or '/'}; documents or token shards are wanted; check the name")
    return revision, [
        {"name": row["path"].removeprefix(folder).strip("/"), "size": row["size"],
         "path": f"datasets/{repo}/resolve/{revision}/{row['path']}",
         "sha256": row.get("lfs", {}).get("oid")}
        for row in sorted(files, key=lambda row: row["path"]) if row["path"].endswith(kind)]

def crawl_files(source, mirror):
    """The WARC files of a crawl, e.g. CC-MAIN-2024-10, in the order of its list."""
    base = (mirror or COMMON_CRAWL).rstrip("/")
    answer, _ = listing(f"{base}/crawl-data/{source}/warc.paths.gz")
    return [{"name": path.rsplit("/", 1)[1], "path": path, "size": None, "sha256": None}
            for path in gzip.decompress(answer).decode().split()]

def is_crawl(source):
    return source.startswith("CC-MAIN-")

def find_files(source, num_shards, out, mirror=None):
    """The first num_shards files of a source, and every val shard, as OUT/files.json says.

    That file is written at the first call and read at the next ones, without a network.
    """
    path = out / "files.json"
    known = json.loads(path.read_bytes()) if path.exists() else {"source": source}
    if known["source"] != source:
        raise SystemExit(f"{path} is of {known['source']}, this run of {source}; a folder holds "
                         "one source; choose another --out")
    if known.get("num_shards") != num_shards:
        revision, files = (None, crawl_files(source, mirror)) if is_crawl(source) else \
            hub_files(source, known.get("revision"), mirror)
        val = [file for file in files if file["name"].endswith(".bin") and "_val_" in file["name"]]
        train = [file for file in files if file not in val][:num_shards]
        known = {"source": source, "revision": revision, "num_shards": num_shards,
                 "files": val + train}
        with whole_file(path) as file:
            file.write(json.dumps(known, indent=1).encode())
    return known["files"]

def download_gpt2(name, folder):
    """config.json and model.safetensors of "gpt2" … "gpt2-xl" → folder, which is returned. Size and
    SHA-256 are those that the Hub states; HF_ENDPOINT names a mirror."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    for file in ("model.safetensors", "config.json"):
        url, path = f"{hub}/openai-community/{name}/resolve/main/{file}", folder / file
        if not path.exists():
            size, digest = persist(url, lambda: stated(url))
            download(url, path, size, digest)
    return folder

def stated(url):
    """The (size, SHA-256) that the Hub states of a large file; (None, None) of a small one."""
    answer = requests.head(url, timeout=SILENCE_SECONDS)
    if answer.status_code >= 400:
        raise Unfit(f"status {answer.status_code}")
    size = answer.headers.get("X-Linked-Size")
    digest = answer.headers.get("X-Linked-ETag", "").strip('"')
    if len(digest) != 64:
        return None, None
    return int(size), digest

def fetch(file, source, out, mirror=None):
    """A file of find_files → its path in OUT."""
    base = (mirror or (COMMON_CRAWL if is_crawl(source) else HUB)).rstrip("/")
    return download(f"{base}/{quote(file['path'])}", out / file["name"].replace("/", "_"),
                    file["size"], file["sha256"])

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="CC-MAIN-…, OWNER/NAME on the Hub, or one of: "
        + ", ".join([*NAMES, *OPENAI]))
    add("--out", type=Path, help="folder for the files (of gpt2 …: data/openai/gpt2)")
    add("--num_shards", type=int, default=1, help="files to take, besides val shards")
    add("--mirror", help=f"URL to ask instead of {HUB} or {COMMON_CRAWL}")
    args = parser.parse_args()
    if args.source in OPENAI:
        with one_line_when_full():
            folder = download_gpt2(args.source, args.out or Path("data/openai", args.source))
        print(f"{folder} holds OpenAI's {args.source}")
        return
    check_source(args.source, args.num_shards)
    if not args.out:
        raise SystemExit("--out is missing; give a folder for the files, e.g. --out data/fineweb")
    with one_line_when_full():
        files = find_files(args.source, args.num_shards, args.out, args.mirror)
        for file in tqdm(files, desc=args.source, unit="file"):
            fetch(file, args.source, args.out, args.mirror)
    print(f"{args.out} holds {len(files)} files of {args.source}, each whole")

def check_source(source, num_shards):
    """Stop if a source has no form that is known, or nothing of it is wanted."""
    if not (source in NAMES or is_crawl(source) or re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        raise SystemExit(f"{source} is no source; one is CC-MAIN-…, OWNER/NAME on the Hub, or of "
                         f"{', '.join(NAMES)}; check the spelling")
    if num_shards < 1:
        raise SystemExit(f"--num_shards {num_shards} is below 1; it counts files; give 1 or more")

if __name__ == "__main__":
    main()
