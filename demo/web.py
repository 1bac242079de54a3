"""The web of the demo: a documentation site for the Python software that requirements.txt installs.

    python demo/web.py textwrap heapq    prints its address, then serves the pages of these two only

There is a page for every public module of that software and of the standard library. It shows the
module's docstrings, with signatures as headings. The source is read with `ast`; nothing is imported
or run. As on the real web, there are also pages that the crawler or the filters should drop (a
translation, mirrors, an advertisement, a private folder), and there are dead links.
"""
import ast
import contextlib
import inspect
import os
import re
import sys
import sysconfig
from collections import defaultdict
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

SKIPPED = {"test", "tests", "testing", "idle_test", "site-packages", "lib2to3", "pydoc_data"}
WRITTEN = {  # the pages that do not come from a docstring
    "/de/": "Hier ist die Beschreibung aller Module, die auf diesem Rechner installiert sind.",
    "/contact.html": "If a page is wrong, write to editors@manual-site.net. The address of this "
                     "machine is 151.101.1.69 from the outside, and 127.0.0.1 from the inside.",
    "/casino/free-spins.html": "Claim the free spins that are waiting for you at our tables.",
    "/private/notes.html": "A crawler that keeps to robots.txt never reads this page."}
MIRRORED = "textwrap heapq bisect csv fractions statistics shelve sched queue graphlib".split()
LINKED = [*WRITTEN, "/missing.html", *(f"/mirror/{name}.html" for name in MIRRORED)]

# ---- Modules → pages -----------------------------------------------------------------------------

def required_packages():
    """Top-level names of the packages that requirements.txt installs and of those that they need.
    The site shows only these, so that it does not depend on what else the machine has.
    """
    requirements = Path(__file__).parents[1] / "requirements.txt"
    todo = re.findall(r"(?m)^[\w.-]+", requirements.read_text())
    tops = set()
    for name in todo:  # the loop also visits the names that it adds
        with contextlib.suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(name)
            tops |= {path.parts[0].removesuffix(".py") for path in package.files or ()}
            needs = re.findall(r"(?m)^[\w.-]+\b(?!.*extra ==)", "\n".join(package.requires or ()))
            todo += [need for need in needs if need not in todo]
    return tops

def is_public(parts):
    """True if no part of a dotted module name is private or belongs to tests."""
    return bool(parts) and not SKIPPED & set(parts) and all(
        part.isidentifier() and not part.startswith(("_", "test_")) for part in parts)

def find_modules(packages):
    """{dotted name: source path} of public modules, sorted by name. `packages`, if not empty, are
    the top-level names to take."""
    wanted = packages or required_packages()
    found = {}
    for key in ("stdlib", "purelib", "platlib"):
        root = Path(sysconfig.get_path(key))
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not is_public(parts):
                continue
            if parts[0] in wanted or (key == "stdlib" and not packages):
                found[".".join(parts)] = path
    return dict(sorted(found.items()))

def paragraphs(lines, indents):
    """The lines of a block of prose and their indents → a list of <p>. If indents differ, each line
    with the smallest indent, such as "name : type", begins a <p>, which takes the lines below it.
    """
    hangs = max(indents) > min(indents)
    groups = []
    for i, line in enumerate(lines):
        if i == 0 or (hangs and indents[i] == min(indents)):
            groups.append([])
        groups[-1].append(line)
    return [f"<p>{escape(without_markup(' '.join(' '.join(group).split())))}</p>"
            for group in groups]

MARKUP = [(re.compile(pattern), shown) for pattern, shown in (
    (r":[a-z:]+:`~(?:[^`<>]*\.)?([^`<>]+)`", r"\1"),               # :func:`~json.dumps` → dumps
    (r"(?::[a-z:]+:)?`([^`<]+?)\s*<[^`>]+>`_*", r"\1"),           # `the guide <url>`_ → the guide
    (r"(?::[a-z:]+:)?(`{1,2})(?=\S)([^`]*[^`\s])\1_*", r"\2"),    # ``None`` → None
    (r"(?<![\w*])(\*{1,2})([A-Za-z][^*]*)\1(?![\w*])", r"\2"),   # *name* → name
    (r" ?\[[\w*#]+\]_(?!\w)", ""),                                # a footnote's number: [1]_
    (r"::(?=\s|$)", ":"))]
TITLE = re.compile(r"^( *[A-Z][A-Za-z ]+)\n *([-=~^*])\2{2,} *$", re.M)     # with its underline

def without_markup(text):
    """reStructuredText in a line → the text that a reader of the rendered page sees."""
    for pattern, shown in MARKUP:
        text = pattern.sub(shown, text)
    return text

def prose(docstring):
    """A docstring as HTML: <p> for a paragraph or for one argument, <pre> for code and tables."""
    out = []
    in_code = False         # true after a block that ends with "::", while blocks are indented
    text = TITLE.sub(r"\1\n", inspect.cleandoc(docstring or ""))     # a block of its own
    for block in re.split(r"\n\s*\n", text):
        if not block.strip():
            continue
        lines = [line for line in block.split("\n") if not re.fullmatch(r"\s*[-=~^*]{3,}\s*", line)]
        indents = [len(line) - len(line.lstrip()) for line in lines]
        in_code = in_code and bool(indents) and indents[0] > 0
        letters = sum(c.isalpha() or c in " ,." for c in block) / len(block)
        if in_code or letters < 0.75 or re.search(r"^\s*>>>|\S {3,}\S", block):
            # cleandoc never dedents by the first line, so the block starts with an empty one
            out.append(f"<pre>{escape(inspect.cleandoc(chr(10) + block))}</pre>")
        else:
            out += paragraphs(lines, indents)
        in_code = in_code or block.rstrip().endswith("::")
    return "\n".join(out)

def signature(name, node):
    """The text name(arguments) for a class or function, without annotations and without self."""
    arguments = getattr(node, "args", None)
    for child in node.body:
        if isinstance(node, ast.ClassDef) and getattr(child, "name", "") == "__init__":
            arguments = getattr(child, "args", None)
            break
    if arguments is None:
        return f"{name}()"
    for argument in ast.walk(arguments):
        argument.annotation = None
    return f"{name}({re.sub(r'^(self|cls)(, /)?(, |$)', '', ast.unparse(arguments))})"

def entries(prefix, body, level=2):
    """HTML of every public, documented class, function and method, in source order."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from entries(prefix, node.body, level)
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) \
                or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"<h{level}>{escape(signature(name, node))}</h{level}>\n{prose(docstring)}"
        if isinstance(node, ast.ClassDef):
            yield from entries(name, node.body, min(level + 1, 6))

class Site:
    """page(path) makes the page at a path, anew for each request."""

    def __init__(self, packages=()):
        self.modules = find_modules(packages)
        self.children = defaultdict(list)
        for name in self.modules:
            self.children[self.parent(name)].append(name)

    def parent(self, name):
        """The nearest package above a module that has a page; "" stands for the first page."""
        up = name.rpartition(".")[0]
        if not up or up in self.modules:
            return up
        return self.parent(up)

    def frame(self, title, body, near=(), status=200):
        """A whole page, with links to the modules in `near` → (HTTP status, content type, text)."""
        links = " ".join(f'<a href="/{name}.html">{name}</a>' for name in near)
        return status, "text/html; charset=utf-8", (
            f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{title}</title><script>var '
            'menu = {open: 0};</script></head><body><header><a href="/">Manual</a> <form>Search '
            f"<input></form></header><nav>{links}</nav>\n<main><h1>{title}</h1>\n{body}\n</main>"
            "<footer><p>This site uses cookies; see our terms of use.</p></footer></body></html>")

    def page(self, path):
        """A path → (HTTP status, content type, text). Below /mirror/ the same pages stand again."""
        if path == "/robots.txt":
            return 200, "text/plain", "User-agent: *\nDisallow: /private/\n"
        if path == "/":
            links = " ".join(f'<a href="{link}">{link}</a>' for link in LINKED)
            return self.frame("Manual of this machine", f"<p>{links}</p>", self.children[""])
        if path in WRITTEN:
            return self.frame(path.strip("/"), f"<p>{WRITTEN[path]}</p>")
        name = path.removeprefix("/mirror").removeprefix("/").removesuffix(".html")
        try:
            tree = ast.parse(self.modules[name].read_bytes())
        except (KeyError, SyntaxError, ValueError, RecursionError):  # no module, or not Python
            return self.frame("404 Not Found", f"<p>There is no {escape(path)}.</p>", status=404)
        up, near = self.parent(name), self.children[name]
        if up:
            near = [*near, up, *self.children[up][:200]]
        title = f"{name} (a copy)" if path.startswith("/mirror/") else name
        body = "\n".join([prose(ast.get_docstring(tree)), *entries(name, tree.body)])
        return self.frame(title, body, near)

# ---- The server ----------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """Answers GET with a page of the server's site."""
    protocol_version = "HTTP/1.1"  # keeps the connection open between pages

    def log_message(self, *_):
        """Print nothing: the crawl has its own progress bar."""

    def do_GET(self):
        status, mime, text = self.server.site.page(self.path.partition("?")[0])
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(ThreadingHTTPServer):
    """A server that ends when its parent process ends. A parent that is killed cannot stop its
    child, so the child has to watch.
    """

    def __init__(self, site):
        super().__init__(("127.0.0.1", 0), Handler)
        self.site = site
        self.parent = os.getppid()

    def service_actions(self):
        """serve_forever() calls this about twice a second."""
        if os.getppid() != self.parent:
            os._exit(0)

def main():
    server = Server(Site(sys.argv[1:]))
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()

if __name__ == "__main__":
    main()
