"""Stage 0: download files that others have published, and check them.

    python download.py fineweb --num_shards 2 --out data/fineweb/files
    python download.py CC-MAIN-2024-10 --num_shards 1 --out data/cc/files
    python download.py kjj0/fineweb10B-gpt2 --num_shards 9 --out data/fineweb10B
    python download.py gpt2                                 # OpenAI's weights → data/openai/gpt2
    python download.py climbmix --out data/climbmix/files --mirror https://mirror.example.org

in:  a crawl of Common Crawl; a data set on the Hugging Face Hub, as OWNER/NAME, OWNER/NAME/FOLDER
     or one of the short NAMES below; or OpenAI's GPT-2 weights
out: OUT/files.json  the list of the files: the revision, and "name", "path", "size" and "sha256" of
     each file (size and sha256 are null for Common Crawl, which does not state them)
     OUT/NAME        the files; a file is called NAME.part until it is complete

The revision of a data set is looked up once and kept in files.json, so a folder never mixes two
versions. A download that was interrupted continues where it stopped (RFC 9110, 13.1.5 and 14:
If-Range and Range). It is given up after TRIES tries in a row that brought no new bytes. Size and
SHA-256 must be those of files.json.

Differs from huggingface_hub: there is only plain HTTP, no cache folder outside of OUT, and no Xet.
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
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote

import requests
import urllib3
from tqdm import tqdm

HUB = "https://huggingface.co"
COMMON_CRAWL = "https://data.commoncrawl.org"
NAMES = {  # short name: (data set, revision, folder in the data set)
    "fineweb": ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                "sample/10BT"),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "main", ""),
    # conversations, for chat_sft.py; no_robots may not be used commercially (CC BY-NC 4.0)
    "smoltalk": ("HuggingFaceTB/smoltalk", "main", "data/all"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "main", "data"),
    "no_robots": ("HuggingFaceH4/no_robots", "main", "data"),
    "oasst": ("OpenAssistant/oasst2", "main", ""),
    "gsm8k": ("openai/gsm8k", "main", "main"),
    "gsm8k_test": ("openai/gsm8k", "main", "main")}     # never to be trained on
ONLY = {  # of these data sets, only files whose path holds this pattern
    "gsm8k_test": "/test-",
    "ultrachat": "/train_sft-", "oasst": r"_ready\.trees\.jsonl\.gz$"}
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
KINDS = {  # the first kind of which a data set has files is taken
    "token shards (…_train_….bin)": r"_(train|val)_[^/]*\.bin$", ".parquet": r"\.parquet$",
    ".jsonl": r"\.jsonl$", ".jsonl.gz": r"\.jsonl\.gz$"}
HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}  # splits that are not trained on
TRIES = 5                # tries in a row that bring no new bytes
PAUSE_SECONDS = 1        # before the second try; it doubles with each further one
MAX_PAUSE_SECONDS = 300  # the longest Retry-After that is obeyed
SILENCE_SECONDS = 30     # a try has failed after so long without a byte
PIECE_BYTES = 1 << 16    # bytes read at a time: an interruption loses at most these

# ---- One file, complete and checked --------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """Open PATH.part for writing bytes and rename it to PATH at the end, so that PATH is never
    incomplete. After an error PATH.part is removed, which gives a full disk its space back.
    """
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

@contextlib.contextmanager
def one_line_when_full():
    """Turn the error of a full disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit("the disk is full; all finished files are kept; free some space and run "
                         "the same command again to continue") from None

@contextlib.contextmanager
def one_line_when_interrupted():
    """Turn Ctrl-C into one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command again to continue") from None

def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

class Unfit(Exception):
    """An answer that another try may mend; pause_seconds is how long the server asks to wait."""

    def __init__(self, why, pause_seconds=0):
        super().__init__(why)
        self.pause_seconds = min(pause_seconds, MAX_PAUSE_SECONDS)

def why_of(error):
    """The reason of an error of requests in a few words, without its Python objects."""
    cause = error.args[0] if error.args else None
    if isinstance(cause, urllib3.exceptions.ProtocolError):
        return "the connection was cut"
    if isinstance(cause, urllib3.exceptions.MaxRetryError):
        error = cause.reason
    return str(error).rpartition(": ")[2] or type(error).__name__

def pause_of(answer):
    """Seconds that a server asks to wait: Retry-After holds a number or a date (RFC 9110)."""
    wait = answer.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", wait):
        return int(wait)
    try:
        return (parsedate_to_datetime(wait) - datetime.now(timezone.utc)).total_seconds()
    except (TypeError, ValueError):  # neither
        return 0

def check_status(url, answer):
    """Raise Unfit for a status that may change with time, SystemExit for one that will not."""
    status = answer.status_code
    if status < 400:
        return
    if status in (403, 408, 416, 429) or status >= 500:  # 403: Common Crawl's limit of requests
        raise Unfit(f"status {status}", pause_of(answer))
    raise SystemExit(f"{url} gives status {status}, so there is no such public file; check the "
                     "name, or give another --mirror")

def ask(url, **headers):
    """GET → a streamed answer of status 200 or 206; raises Unfit or SystemExit otherwise."""
    headers["Accept-Encoding"] = "identity"
    answer = requests.get(url, headers=headers, stream=True, timeout=SILENCE_SECONDS)
    if answer.status_code not in (200, 206):
        answer.close()
        check_status(url, answer)
        raise Unfit(f"status {answer.status_code}")
    if "text/html" in answer.headers.get("Content-Type", "").lower():
        answer.close()
        raise Unfit("the server sent a page of HTML instead of the file")
    return answer

def nothing_here():
    """For persist, where a failed try leaves nothing behind."""
    return 0

def persist(url, attempt, bytes_here=nothing_here,
            remedy="check the network or give another --mirror"):
    """Call attempt() until it succeeds, and return what it returns.

    The pauses between tries grow. After TRIES tries in a row that did not increase bytes_here(),
    SystemExit gives the last error and the remedy.
    """
    tries = 0
    furthest = bytes_here()
    while True:
        try:
            return attempt()
        except (requests.RequestException, Unfit) as error:
            if bytes_here() > furthest:
                furthest = bytes_here()
                tries = 0
            tries += 1
            if tries == TRIES:
                raise SystemExit(
                    f"{url} failed {TRIES} times, the last time with: {why_of(error)}; {remedy}, "
                    "then run the same command again to continue") from None
            pause = PAUSE_SECONDS * 2 ** (tries - 1)
            time.sleep(max(pause, getattr(error, "pause_seconds", 0)))

class Part:
    """The incomplete file PATH.part, and what is needed to complete it.

    Resume an earlier process's partial file only when a SHA-256 can verify it; within one process,
    an ETag is enough.
    """

    def __init__(self, url, path, size, sha256):
        self.url = url
        self.sha256 = sha256
        self.path = Path(f"{path}.part")
        self.pinned_size = size  # known beforehand
        self.size = size         # or stated by the server
        self.etag = None
        if not sha256 or self.bytes_here() > (size or 0):
            self.path.unlink(missing_ok=True)

    def bytes_here(self):
        """How much of the file is on the disk."""
        return self.path.stat().st_size if self.path.exists() else 0

    def receive(self, progress):
        """One try to get the bytes that are missing; raises Unfit or requests' errors."""
        have = self.bytes_here() if self.sha256 or self.etag else 0
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.etag:
                headers["If-Range"] = self.etag
        with ask(self.url, **headers) as answer:
            is_rest = answer.status_code == 206
            self.note_size_and_etag(answer, have)
            progress.total = self.size
            progress.n = have if is_rest else 0
            with open(self.path, "ab" if is_rest else "wb") as file:
                for piece in answer.iter_content(PIECE_BYTES):
                    file.write(piece)
                    progress.update(len(piece))

    def note_size_and_etag(self, answer, have):
        """Check the headers of an answer to a request for all bytes from `have` on."""
        place = re.match(r"bytes (\d+)-\d+/(\d+)$", answer.headers.get("Content-Range", ""))
        if answer.status_code == 206 and (not place or int(place[1]) != have):
            raise Unfit(f"the server sent another range than the requested one, {have}-")
        length = place[2] if place else answer.headers.get("Content-Length")
        if length:
            if self.pinned_size not in (None, int(length)):
                raise SystemExit(
                    f"{self.url} has {length} bytes, expected {self.pinned_size}; a file of a "
                    f"pinned revision never changes; remove {self.path.parent} and run the same "
                    "command again")
            self.size = int(length)
        self.etag = answer.headers.get("ETag", "")
        if not self.etag.startswith('"'):  # W/"…" does not promise equal bytes
            self.etag = None

    def complete(self, progress):
        """Receive what is missing, then check size and SHA-256; raises Unfit."""
        if not self.sha256 or self.bytes_here() != self.size:
            self.receive(progress)
        if self.size not in (None, self.bytes_here()):
            raise Unfit(f"only {self.bytes_here()} of {self.size} bytes arrived")
        if self.sha256:
            found = file_sha256(self.path)
            if found != self.sha256:
                self.path.unlink()
                raise Unfit(f"the file has the SHA-256 {found}, expected {self.sha256}")

def download(url, path, size=None, sha256=None, **advice):
    """URL → path, complete and checked; returns path, or ends with SystemExit (see persist, which
    takes `remedy`). Nothing is requested if the path exists.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Part(url, path, size, sha256)
        with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False) as progress:
            persist(url, lambda: part.complete(progress), part.bytes_here, **advice)
        os.replace(part.path, path)
    return path

# ---- OpenAI's weights ----------------------------------------------------------------------------

def stated(url):
    """The size and SHA-256 that the Hub states for a large file, or (None, None) for a small one.

    They stand in the headers of the redirect to the store of large files.
    """
    answer = requests.head(url, timeout=SILENCE_SECONDS)
    check_status(url, answer)
    digest = answer.headers.get("X-Linked-ETag", "").strip('"')
    size = answer.headers.get("X-Linked-Size", "")
    if len(digest) != 64 or not size.isdecimal():
        return None, None
    return int(size), digest

@contextlib.contextmanager
def one_at_a_time(folder):
    """Let processes that would fill the same folder, such as torchrun's ranks, wait for each other:
    the first one downloads, and the others find its files. FOLDER.lock stays, empty; where there
    are no locks of Unix, nobody waits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "ab") as file:
        with contextlib.suppress(ImportError):
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)    # until the file is closed
        yield

def download_gpt2(name, folder):
    """Download config.json and model.safetensors of "gpt2" … "gpt2-xl" into folder; returns folder.

    The environment variable HF_ENDPOINT names another server than the Hub, as for huggingface_hub.
    """
    paths = [folder / file for file in ("model.safetensors", "config.json")]
    if all(path.exists() for path in paths):
        return folder
    base = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    remedy = f"check the network, or set HF_ENDPOINT to a mirror, or put the file into {folder}"
    with one_line_when_full(), one_at_a_time(folder):
        for path in paths:
            url = f"{base}/openai-community/{name}/resolve/main/{path.name}"
            if not path.exists():
                size, digest = persist(url, lambda url=url: stated(url), remedy=remedy)
                download(url, path, size, digest, remedy=remedy)
    return folder

# ---- Data sets of the Hub and crawls of Common Crawl ---------------------------------------------

def is_crawl(source):
    """Whether a source is a crawl of Common Crawl, not a data set on the Hub."""
    return source.startswith("CC-MAIN-")

def check_source(source, num_shards):
    """Stop if a source has no known form, or if no file is wanted."""
    is_known = source in NAMES or is_crawl(source)
    if not is_known and not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", source):
        raise SystemExit(f"{source} is not a known source; give CC-MAIN-…, OWNER/NAME of a data set"
                         f" on the Hub, or one of {', '.join(NAMES)}")
    if num_shards < 1:
        raise SystemExit(f"--num_shards must be at least 1, got {num_shards}")

def listing(url, parse):
    """GET a small answer → (parse(its bytes), the URL of the next page or None)."""
    def attempt():
        """Whatever goes wrong, a mirror's answer in HTML for instance, may be better next time."""
        with ask(url) as answer:
            content = answer.content
            following = answer.links.get("next", {}).get("url")
        try:
            return parse(content), following
        except Exception:
            raise Unfit("the answer is not the list that was asked for") from None
    return persist(url, attempt)

def parse_revision(content):
    """The Hub's answer about a branch → the commit that it points to now."""
    return re.fullmatch("[0-9a-f]{40}", json.loads(content)["sha"])[0]

def parse_tree(content):
    """A listing of the Hub → [(path, size, SHA-256 or None)]; it states one for large files."""
    return [(row["path"], int(row["size"]), (row.get("lfs") or {}).get("oid"))
            for row in json.loads(content) if row["type"] == "file"]

def is_held_out(path):
    """Whether a file belongs to a split for evaluation, by the words of its path."""
    *folders, name = path.lower().split("/")
    words = {*folders, *re.split("[^a-z]+", name)}
    return bool(words & HELD_OUT) and "train" not in words

def choose_rows(rows, source):
    """The rows of parse_tree, below the wanted folder, that are to be trained on: of one kind."""
    for kind in KINDS.values():
        found = [row for row in rows if re.search(kind, row[0])]
        if found:
            break
    else:
        raise SystemExit(f"{source} has no file of the kinds {', '.join(KINDS)}; check the name")
    if found[0][0].endswith(".bin"):
        return found
    train = [row for row in found if not is_held_out(row[0])]
    if not train and source in ONLY:    # then this is what the name stands for
        return found
    if not train:
        raise SystemExit(f"{source} has only files for evaluation, e.g. {found[0][0]}; give "
                         "another data set")
    return train

def check_folders(rows, source):
    """Stop if files lie in several folders, which are different data sets: languages, crawls."""
    folders = sorted({row[0].rpartition("/")[0] for row in rows})
    if len(folders) > 1:
        repo = "/".join(source.split("/")[:2])
        named = [folder for folder in folders if folder]
        raise SystemExit(f"{source} has files in {len(folders)} folders: {', '.join(named[:5])}; "
                         f"give one of them, e.g. {repo}/{named[0]}")

def hub_files(source, revision, mirror):
    """A data set on the Hub → (revision, its files that are to be trained on, and val shards)."""
    base = (mirror or HUB).rstrip("/")
    if source in NAMES:
        repo, pinned, folder = NAMES[source]
    else:
        owner, name, *folders = source.split("/")
        repo, pinned, folder = f"{owner}/{name}", "main", "/".join(folders)
    revision = revision or pinned
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch, which moves
        revision, _ = listing(f"{base}/api/datasets/{repo}/revision/{revision}", parse_revision)
    tree = f"{base}/api/datasets/{repo}/tree/{revision}/{folder}".rstrip("/")
    page = f"{tree}?recursive=true"
    rows = []
    while page:
        found, following = listing(page, parse_tree)
        rows += found
        page = None
        if following:  # the Hub names itself, but a mirror must be asked
            page = f"{base}/api/{following.partition('/api/')[2]}"
    rows = [row for row in rows if re.search(ONLY.get(source, ""), row[0])]
    rows = choose_rows(sorted(rows), source)
    if not folder and source not in NAMES:
        check_folders(rows, source)
    return revision, [{"name": path.removeprefix(folder).strip("/"), "size": size,
                       "path": f"datasets/{repo}/resolve/{revision}/{path}", "sha256": sha256}
                      for path, size, sha256 in rows]

def parse_warc_paths(content):
    """Common Crawl's list of the WARC files of a crawl → their paths."""
    paths = gzip.decompress(content).decode().split()
    if not paths or not all(path.endswith(".gz") for path in paths):
        raise ValueError(paths)
    return paths

def crawl_files(source, mirror):
    """The WARC files of a crawl, for instance CC-MAIN-2024-10, in the order of its own list."""
    base = (mirror or COMMON_CRAWL).rstrip("/")
    paths, _ = listing(f"{base}/crawl-data/{source}/warc.paths.gz", parse_warc_paths)
    return [{"name": path.rpartition("/")[2], "path": path, "size": None, "sha256": None}
            for path in paths]

def is_val_shard(name):
    """Whether a name ends as that of a shard of the val split: only its end tells."""
    return re.search(r"(^|_)val(_[0-9]+)?\.bin$", name.rsplit("/", 1)[-1]) is not None

def find_files(source, num_shards, out, mirror=None):
    """The first num_shards files of a source and all its val shards, as a list of
    {"name", "path", "size", "sha256"}.

    The list is written to OUT/files.json; a later call for the same files reads it from there and
    needs no network. SystemExit names a source that does not exist or is not that of OUT.
    """
    check_source(source, num_shards)
    path = out / "files.json"
    known = {"source": source}
    if path.exists():
        try:
            known = json.loads(path.read_bytes())
            known["source"], known["files"]
        except (ValueError, TypeError, KeyError):
            raise SystemExit(f"{path} is damaged; remove it and run the same command again") \
                from None
    if known["source"] != source:
        raise SystemExit(f"{path} lists files of {known['source']}, but {source} was asked for; "
                         "give another --out for it")
    if known.get("num_shards") != num_shards:
        if is_crawl(source):
            revision = None
            files = crawl_files(source, mirror)
        else:
            revision, files = hub_files(source, known.get("revision"), mirror)
        val = [file for file in files if is_val_shard(file["name"])]
        train = [file for file in files if file not in val]
        known = {"source": source, "revision": revision, "num_shards": num_shards,
                 "files": val + train[:num_shards]}
        with whole_file(path) as file:
            file.write(json.dumps(known, indent=1).encode())
    return known["files"]

def fetch(file, source, out, mirror=None):
    """Download one file of find_files; returns its path in OUT, which has no folders."""
    base = mirror or (COMMON_CRAWL if is_crawl(source) else HUB)
    name = file["name"].replace("%", "%25").replace("/", "%2F")  # a/b and a_b stay apart
    return download(f"{base.rstrip('/')}/{quote(file['path'])}", out / name, file["size"],
                    file["sha256"])

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="CC-MAIN-…, OWNER/NAME on the Hub, or one of: "
        + ", ".join([*NAMES, *OPENAI]))
    add("--out", type=Path, help="folder for the files (gpt2 …: data/openai/gpt2 …)")
    add("--num_shards", type=int, default=1, help="files to download, in addition to val shards")
    add("--mirror", help=f"URL to use instead of {HUB} or {COMMON_CRAWL}")
    args = parser.parse_args()
    if args.source in OPENAI:
        with one_line_when_full(), one_line_when_interrupted():
            folder = download_gpt2(args.source, args.out or Path("data/openai", args.source))
        print(f"{folder} holds OpenAI's {args.source}")
        return
    check_source(args.source, args.num_shards)
    if not args.out:
        raise SystemExit("--out is missing; give a folder for the files, e.g. --out data/fineweb")
    with one_line_when_full(), one_line_when_interrupted():
        files = find_files(args.source, args.num_shards, args.out, args.mirror)
        for file in tqdm(files, desc=args.source, unit=" files"):
            fetch(file, args.source, args.out, args.mirror)
    print(f"{args.out} holds {len(files)} files of {args.source}, all complete")

if __name__ == "__main__":
    main()
