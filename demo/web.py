"""The web of the demo: a documentation site for the Python software that requirements.txt brings.

A page for every public module of it and of the standard library: docstrings, and signatures as
headings, read with `ast`; nothing is imported or run. As on the real web there are also pages to
drop: a translation, mirrors, an advertisement, dead links, a private folder.

    python tests/manual_site.py textwrap heapq    prints its address, then serves these two only
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

def required_packages():
    """Top names of what requirements.txt installs, so that other packages change nothing."""
    requirements = Path(__file__).parents[1] / "requirements.txt"
    todo, tops = re.findall(r"(?m)^[\w.-]+", requirements.read_text()), set()
    for name in todo:  # grows while it is walked
        with contextlib.suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(name)
            tops |= {path.parts[0].removesuffix(".py") for path in package.files or ()}
            needs = re.findall(r"(?m)^[\w.-]+\b(?!.*extra ==)", "\n".join(package.requires or ()))
            todo += [need for need in needs if need not in todo]
    return tops

def find_modules(packages):
    """{dotted name: source path} of public modules, sorted; `packages` limits the top names."""
    found, wanted = {}, packages or required_packages()
    for key in ("stdlib", "purelib", "platlib"):
        for path in Path(root := sysconfig.get_path(key)).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            is_public = parts and not SKIPPED & set(parts) and all(
                part.isidentifier() and not part.startswith(("_", "test_")) for part in parts)
            if is_public and (parts[0] in wanted or (key == "stdlib" and not packages)):
                found[".".join(parts)] = path
    return dict(sorted(found.items()))

def prose(docstring):
    """A docstring as HTML: <p> for a paragraph or an argument's lines, <pre> for code, tables."""
    out, in_code = [], False
    for block in filter(str.strip, re.split(r"\n\s*\n", inspect.cleandoc(docstring or ""))):
        lines = [line for line in block.split("\n") if not re.fullmatch(r"\s*[-=~^*]{3,}\s*", line)]
        indents = [len(line) - len(line.lstrip()) for line in lines] or [0]
        in_code = in_code and indents[0] > 0  # what is indented below "Example::"
        letters = sum(c.isalpha() or c in " ,." for c in block) / len(block)
        if in_code or letters < 0.75 or re.search(r"^\s*>>>|\S {3,}\S", block):
            out.append(f"<pre>{escape(inspect.cleandoc(chr(10) + block))}</pre>")
        else:
            # lines that hang under "name : type" or "Args:" belong to it; each such group is a <p>
            hangs = max(indents) > min(indents)
            starts = [i for i, n in enumerate(indents) if i == 0 or (hangs and n == min(indents))]
            out += [f"<p>{escape(' '.join(' '.join(lines[i:j]).split()))}</p>"
                    for i, j in zip(starts, [*starts[1:], len(lines)])]
        in_code = in_code or block.rstrip().endswith("::")
    return "\n".join(out)

def entries(prefix, body, level=2):
    """HTML of every public, documented class, function and method, in source order."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from entries(prefix, node.body, level)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) \
                and not node.name.startswith("_"):
            name, is_class = f"{prefix}.{node.name}", isinstance(node, ast.ClassDef)
            inits = [child for child in node.body if getattr(child, "name", "") == "__init__"]
            arguments = getattr(inits[0] if is_class and inits else node, "args", None)
            if docstring := ast.get_docstring(node):
                for argument in ast.walk(arguments) if arguments else ():
                    argument.annotation = None
                listed = re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(arguments or []))
                yield f"<h{level}>{escape(f'{name}({listed})')}</h{level}>\n{prose(docstring)}"
            yield from entries(name, node.body, min(level + 1, 6)) if is_class else ()

class Site:
    """`page(path)` → (HTTP status, content type, text), built anew each time it is asked for."""
    def __init__(self, packages=()):
        self.modules, self.children = find_modules(packages), defaultdict(list)
        for name in self.modules:
            self.children[self.parent(name)].append(name)

    def parent(self, name):
        """The nearest package above a module that has a page; "" is the site's first page."""
        up = name.rpartition(".")[0]
        return up if up in self.modules or not up else self.parent(up)

    def frame(self, title, body, near=(), status=200):
        links = " ".join(f'<a href="/{name}.html">{name}</a>' for name in near)
        return status, "text/html; charset=utf-8", (
            f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{title}</title><script>var '
            'menu = {open: 0};</script></head><body><header><a href="/">Manual</a> <form>Search '
            f"<input></form></header><nav>{links}</nav>\n<main><h1>{title}</h1>\n{body}\n</main>"
            "<footer><p>This site uses cookies; see our terms of use.</p></footer></body></html>")

    def page(self, path):
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
        except (KeyError, SyntaxError, ValueError, RecursionError):  # some only look like modules
            return self.frame("404 Not Found", f"<p>There is no {escape(path)}.</p>", status=404)
        up, near = self.parent(name), self.children[name]
        near = [*near, up, *self.children[up][:200]] if up else near
        body = "\n".join([prose(ast.get_docstring(tree)), *entries(name, tree.body)])
        return self.frame(name + " (a copy)" * path.startswith("/mirror/"), body, near)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps the connection open between pages
    log_message = lambda *_: None

    def do_GET(self):
        status, mime, text = self.server.site.page(self.path.partition("?")[0])
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def main():
    server, parent = ThreadingHTTPServer(("127.0.0.1", 0), Handler), os.getppid()
    server.site = Site(sys.argv[1:])
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    # a parent that is killed cannot stop its child, so the child looks whether it is still there
    server.service_actions = lambda: os.getppid() == parent or os._exit(0)
    server.serve_forever()

if __name__ == "__main__":
    main()
