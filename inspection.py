"""
The filters' page: some pages for every verdict, and what each step did to them.

    python prepare_fineweb.py --source warc FILE --out DIR --inspect 3

    in:  a Trace of each page, which prepare_fineweb.filter_page fills
    out: one HTML file; what a step removed is struck out, what it added is green
"""
import difflib
import itertools
import multiprocessing
import os
import re
import sys
from html import escape
from pathlib import Path

INSPECTION_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<title>What each step did</title><style>
body {font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em}
h2 {font-size: 1.1em; overflow-wrap: anywhere; border-top: 2px solid #ccc; padding-top: 1em}
pre {white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow: auto;
background: #f6f6f6; padding: .7em; color: #222; font: 13px/1.5 sans-serif} li {margin: .3em 0}
.kept {color: #070} .noted {color: #a60} .dropped {color: #b00} .later {color: #999}
del {color: #b55; opacity: .7} ins {background: #cfc; text-decoration: none}</style>
<h1>What each step did</h1><p>Struck out: what a step removes. Green: what it adds.
"""

class Trace:
    """What each step did to one page; prepare_fineweb.filter_page fills it as it fills a Funnel.

    rows: (step, page before, page after or None, reason or None) for each step that ran.
    ending: "kept", or the step that dropped the page and its reason.
    """

    def __init__(self, page, step_names):
        self.page = page
        self.step_names = step_names
        self.rows = []
        self.ending = "kept"

    def enter(self, step, before, after, reason, seconds):
        self.rows.append((step, before, after, reason))
        if after is None:
            self.ending = f"{step}: {reason.partition(' of ')[0]}"  # near_duplicate of URL
        else:
            self.page = after

SHOW_SECONDS = 20  # for one page, whose steps are not shown if it takes longer

def write_inspection(path, traces):
    """Traces → one HTML file with a chapter for every ending, the pages that were kept first."""
    chapters = {}
    for trace in traces:
        chapters.setdefault(trace.ending, []).append(trace)
    endings = sorted(chapters, key=lambda ending: (ending != "kept", ending))
    contents = "".join(f"<li><a href='#{i}'>{escape(ending)}</a>, {len(chapters[ending])} pages"
                       for i, ending in enumerate(endings))
    parts = [f"{INSPECTION_HEAD}<ul>{contents}</ul>"]
    for i, ending in enumerate(endings):
        parts.append(f"<h1 id='{i}'>{escape(ending)}</h1>")
        for trace in chapters[ending]:
            parts.append(within(SHOW_SECONDS, html_of_a_page, trace)
                         or f"<h2>{escape(trace.page['url'])}</h2>It is too large to be shown.")
    part = Path(f"{path}.part")
    part.write_text("".join(parts), encoding="utf-8", errors="replace")
    part.replace(path)

def send_result(pipe, function, argument):
    pipe.send(function(argument))

def within(seconds, function, argument):
    """function(argument), a str, from another process; None if that fails or takes longer."""
    method = "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=send_result, args=(theirs, function, argument), daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()

def html_of_a_page(trace):
    """One page: its HTML, a list of the steps, and the text that the last one left."""
    steps = [html_of_a_step(*row) for row in trace.rows]
    steps += [f"<li class=later>{escape(name)}" for name in trace.step_names[len(steps):]]
    source = trace.rows[0][1].get("html", "")
    text = trace.page.get("text", "")
    return (f"<h2>{escape(trace.page['url'])}</h2>"
            f"<details><summary>HTML, {len(source)} characters</summary>"
            f"<pre>{escape(source[:20_000])}</pre></details><ol>{''.join(steps)}</ol>"
            f"<details><summary>Text at the end</summary><pre>{escape(text)}</pre></details>")

def html_of_a_step(name, before, after, reason):
    """One step: its reason if it has one, and what it changed in the text."""
    if after is None:
        return f"<li class=dropped><b>{name}</b>: {escape(reason)}"
    kind = "noted" if reason else "kept"
    if name == "language":
        reason = f"{after['language']}, score {after['language_score']}"
    head = f"<li class={kind}><b>{name}</b>: {escape(reason or 'kept')}"
    if "html" in before and "html" not in after:
        return head + html_extraction(before["html"], after["text"])
    return head + html_changes(before.get("text", ""), after.get("text", ""))

def html_changes(before, after):
    """Two texts → HTML of their lines: those that are gone struck out, those that are new green."""
    old = [line.strip() for line in before.split("\n") if line.strip()]
    new = [line.strip() for line in after.split("\n") if line.strip()]
    if old == new:
        return ""
    out = []
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    for kind, i, j, k, n in changes:
        if kind == "equal":
            out += map(escape, old[i:j])
        else:
            out += [f"<del>{escape(line)}</del>" for line in old[i:j]]
            out += [f"<ins>{escape(line)}</ins>" for line in new[k:n]]
    return "<pre>" + "\n".join(out) + "</pre>"

def html_extraction(source, text):
    """Everything that a browser shows of an HTML source, with what is not in text struck out."""
    from crawl import HIDDEN, blocks_of

    def letters(text):
        return re.sub(r"\W+", "", text)

    lines = {letters(line) for line in text.split("\n")}
    whole = letters(text)

    def is_kept(block):
        key = letters(block)
        # a long block may be a part of a line; a short one would be found in any line
        return key in lines or (len(key) > 20 and key in whole)

    out = []
    visible = (block.text for block in blocks_of(source, HIDDEN))
    for kept, run in itertools.groupby(visible, is_kept):
        run = map(escape, run)
        if kept:
            out.append("\n".join(run))
        else:
            out.append(f"<del>{' · '.join(run)}</del>")
    return "<pre>" + "\n".join(out) + "</pre>"
