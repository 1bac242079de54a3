"""
The report: one page that tells the story of a run, from what stages left on disk.

    python report.py runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python report.py summary runs/demo runs/demo-sft runs/demo-rl --data data/demo

    in:  <run>/config.json, log.jsonl, eval.json; <data>/index.json
    out: report.html, one file that loads nothing; the summary goes to the terminal

`eval.py report` and `eval.py summary` are the same commands. The page of
`prepare_fineweb.py --inspect` is rendered here, too.
"""
import argparse
import difflib
import itertools
import math
import multiprocessing
import re
import sys
from datetime import timedelta
from html import escape
from pathlib import Path

from eval import STAGES, figures, read_json
from training import read_log

# ---- What runs left on disk, and the demo's verdicts ---------------------------------------------

CHANCE = dict(bits=0.5)         # even or odd; nobody guesses the answer to an open question

class Run:
    """A run's config.json, log.jsonl and eval.json; what is missing is empty."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise SystemExit(f"{path} is no folder; a run is a training's --out; check the path")
        self.log = read_log(path)
        self.results = read_json(self.path / "eval.json")
        self.header = next((row["header"] for row in self.log if "header" in row), {})
        guess = "rl" if self.points("reward") else "sft" if self.rows("when") else "pretrain"
        about = read_json(self.path / "config.json").get("deepdive", {})
        self.stage = STAGES.get(about.get("stage", guess), about.get("stage"))
        self.seconds = self.log[-1].get("seconds", 0) if self.log else 0

    def rows(self, *keys):
        return [row for row in self.log if all(key in row for key in keys)]

    def points(self, key, *also):
        """[(step, value)] of the rows that have these keys, where the value is a finite number."""
        return [(row["step"], row[key]) for row in self.rows("step", key, *also)
                if isinstance(row[key], (int, float)) and math.isfinite(row[key])]

def accuracy_sources(runs):
    """[(source, {"base" | "SFT" | "RL": {kind: accuracy}})]; a source asked all the same, greedily.

    First eval.json, by the hash of the problems; then the logs, where RL's own first measurement
    stands for SFT. Of several runs of one stage the last one counts.
    """
    sources, logged = {}, {}
    for run in sorted(runs, key=lambda run: run.stage == "RL"):
        for name, result in run.results.items():
            if "kinds" in result:
                asked = result["arguments"]
                source = (f"eval.json: {result['n']} of {Path(name).name} (hash {asked['files']}), "
                          f"replies of {asked['max_new_tokens']} tokens at most")
                shares = {kind: v["accuracy"] for kind, v in result["kinds"].items()}
                sources.setdefault(source, {})[run.stage] = shares
        for row in run.rows("when", "accuracy"):
            stage = "base" if row["when"] == "before" else "SFT"
            logged.setdefault(stage, {}).update(row["accuracy"])
        for row in run.rows("kind", "accuracy"):
            for stage in ("SFT", "RL") if row["step"] == 0 else ("RL",):
                logged.setdefault(stage, {})[row["kind"]] = row["accuracy"]
    return [*sources.items(), *([("training logs", logged)] if logged else [])]

def gain(runs, kind, before, after, wanted):
    """(whether accuracy rose by `wanted` points, and above chance; the figures as text)."""
    for source, stages in accuracy_sources(runs):
        a, b = stages.get(before, {}).get(kind), stages.get(after, {}).get(kind)
        if a is not None and b is not None:
            points = round(100 * (b - a), 6)        # .65 - .50 is 15 points, not a hair less
            chance = f", above chance {CHANCE[kind]:.0%}" if kind in CHANCE else ""
            return points >= wanted and b > CHANCE.get(kind, 0), (
                f"{before} {a:.1%}, {after} {b:.1%}: {points:+.1f} points; wanted +{wanted}{chance}"
                f" ({source.partition(':')[0]})")
    return False, f"no figure: no log or eval.json has {kind} of both {before} and {after}"

def verdicts(runs):
    """[(passed, claim, figures)] for what the demo promises."""
    final = [row for run in runs for row in run.rows("val_bpb", "gzip", "xz")]
    bpb = False, "no figure: no log has the end of a train_gpt2.py run"
    if final:
        model, gz, xz = (final[-1][key] for key in ("val_bpb", "gzip", "xz"))
        bpb = model < gz, f"model {model:.4f}, gzip -9 {gz:.4f}, xz -9e {xz:.4f}"
    claims = {"base: val bits a byte below gzip": bpb,
              "SFT: identity, held out": gain(runs, "identity", "base", "SFT", 30),
              "SFT: functions, held out": gain(runs, "functions", "base", "SFT", 30),
              "RL: bits, held out": gain(runs, "bits", "SFT", "RL", 15)}
    return [("pass" if passed else "fall short", claim, text)
            for claim, (passed, text) in claims.items()]

# ---- The report; text from runs enters it only through table and curve, which escape it ----------

def table(head, rows):
    """Column names and rows of anything → HTML; every cell is escaped."""
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<div class=wide><table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table></div>"

def section(name, title, *parts):
    body = "\n".join(filter(None, parts)) or "<p>Nothing of this is recorded here.</p>"
    return f"<section id={name}>\n<h2>{title}</h2>\n{body}\n</section>"

def curve(title, lines, levels={}, W=640, H=240):
    """An SVG of lines {name: [(step, y)]} and dashed levels {name: y}; "" if there is no point."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = zip(*itertools.chain(*lines.values()))
    ys = [*ys, *levels.values()]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    pad = 0.05 * (max(ys) - min(ys)) or 0.5
    y0, y1 = min(ys) - pad, max(ys) + pad
    X = lambda x: round(56 + (x - x0) / (x1 - x0) * (W - 72), 1)
    Y = lambda y: round(10 + (y1 - y) / (y1 - y0) * (H - 40), 1)
    svg = [f"<text x=50 y={Y(y) + 4} class=end>{y:.6g}</text>"
           f"<path class=grid d='M56 {Y(y)}H{W - 16}'/>" for y in ticks(y0, y1, 5)]
    svg += [f"<text x={X(x)} y={H - 10} class=mid>{x:.6g}</text>" for x in ticks(x0, x1, 8)]
    svg += [f"<text x={W - 18 - 110 * i} y={Y(y) - 4} class=end>{escape(name)} {y:.4g}</text>"
            f"<path class=level d='M56 {Y(y)}H{W - 16}'/>"
            for i, (name, y) in enumerate(levels.items())]
    for i, points in enumerate(lines.values()):
        size = -(-len(points) // 400)       # at most 400 points a line, each the mean of `size`
        groups = [zip(*points[j:j + size]) for j in range(0, len(points), size)]
        at = [[sum(values) / len(values) for values in group] for group in groups]
        path = " ".join(f"{X(x)},{Y(y)}" for x, y in at)
        svg.append(f"<polyline class=c{i % 4} points='{path}'/>")
        svg += [f"<circle class=c{i % 4} cx={X(x)} cy={Y(y)} r=2 />" for x, y in at if len(at) < 50]
    names = " ".join(f"<span class=c{i % 4}>● {escape(k)}</span>" for i, k in enumerate(lines))
    return (f"<figure><figcaption>{escape(title)}, by step: {names}</figcaption>"
            f"<svg viewBox='0 0 {W} {H}'>{''.join(svg)}</svg></figure>")

def ticks(low, high, most):
    """Round numbers between low and high: 0, 9.3, 5 → 0, 2, 4, 6, 8."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    size *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * size) <= most)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]

STYLE = """
:root { color-scheme: light dark }
.c0 { color: light-dark(#0b62c4, #6ab0ff) } .c1 { color: light-dark(#c4530b, #ff9d5c) }
.c2 { color: light-dark(#1c7f3c, #6fd08c) } .c3 { color: light-dark(#8a3fc0, #c99bf2) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem; white-space: pre-wrap;
  border-bottom: 1px solid #8886 }
svg { width: 100%; font-size: 12px } text, circle { fill: currentColor }
.mid { text-anchor: middle } .end { text-anchor: end }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5 }
.grid { stroke: #8884 } .level { stroke: currentColor; stroke-dasharray: 5 4 }
"""

def filter_table(funnel):
    """funnel: the rows of index.json that prepare_fineweb.py wrote, one a step."""
    if not funnel:
        return "<p>No filter table: name the folder of prepare_fineweb.py with --data.</p>"
    counts = lambda why: ", ".join(f"{w} {n}" for w, n in sorted(why.items(), key=lambda x: -x[1]))
    rows = [(row["step"], row["in"], row["kept"], f"{row['kept'] / max(1, row['in']):.1%}",
             f"{row.get('bytes', 0) / 1e6:.2f}", f"{row.get('docs_per_s', 0):.0f}",
             counts(row.get("dropped", {})), counts(row.get("flagged", {}))) for row in funnel]
    return table(("step", "in", "kept", "share", "MB of text", "pages/s", "why dropped",
                  "noted, not dropped"), rows)

def gallery(run, most=12):
    """What the model wrote at some steps, the first and the last among them."""
    rows = dict.fromkeys((row["step"], row["sample"]) for row in run.rows("step", "sample"))
    steps = sorted({step for step, _ in rows})
    shown = {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)} if steps else ()
    return rows and table((f"{run.path}, step", "sample"), [row for row in rows if row[0] in shown])

def run_curves(runs):
    """{section: curves}; a curve is "" where a log has no such rows."""
    parts = dict(loss=[], bpb=[], rl=[])
    for run in runs:
        held_out, levels = {}, {}
        for row in run.rows("step", "kind", "accuracy"):
            held_out.setdefault(row["kind"], []).append((row["step"], row["accuracy"]))
        for row in run.rows("gzip", "xz"):
            levels = {"gzip -9": row["gzip"], "xz -9e": row["xz"]}
        chance = {f"chance, {kind}": CHANCE[kind] for kind in held_out if kind in CHANCE}
        losses = dict(train=run.points("loss"), val=run.points("val_loss"))
        if run.stage != "RL":       # on fresh samples the loss says nothing, see rl_grpo.py
            parts["loss"].append(curve(f"{run.path} ({run.stage}), loss in nats a token", losses))
        parts["bpb"].append(curve(f"{run.path}, val bits a byte", dict(model=run.points("val_bpb")),
                                  levels))
        tokens = dict(tokens=run.points("reply_tokens", "reward"))
        parts["rl"] += [
            curve(f"{run.path}, mean reward of samples", dict(reward=run.points("reward"))),
            curve(f"{run.path}, mean reply length of samples", tokens),
            curve(f"{run.path}, greedy accuracy on held-out problems", held_out, chance)]
    return parts

def accuracy_tables(runs):
    """One table a source; a stage that it did not ask has a dash."""
    for source, stages in accuracy_sources(runs):
        rows = [(kind, *(f"{stages[s][kind]:.1%}" if kind in stages.get(s, {}) else "–"
                         for s in STAGES.values()), f"{CHANCE.get(kind, 0):.0%}")
                for kind in dict.fromkeys(itertools.chain(*stages.values()))]
        yield table((source, "base (before SFT)", "SFT (after)", "RL", "chance"), rows)

def result_rows(runs):
    """(run, task, figures) of each eval.json, the tasks of a mean below it."""
    for run in runs:
        for name, result in run.results.items():
            yield run.path, name, " | ".join(figures(result))
            for label, task in result.get("tasks", {}).items():
                yield run.path, f"· {label}", " | ".join(figures(task))

def cost_table(runs, funnel):
    """Seconds from the end of each log; the trainer's own running cost counts every GPU it used."""
    seconds = sum(row.get("seconds", 0) for row in funnel)
    rows = []
    if funnel:
        spent = timedelta(seconds=int(seconds))
        rows.append(("data", "", "", f"{spent}, summed over workers", ""))
    for run in runs:
        price = run.header.get("flags", {}).get("gpu_hour_usd") or 0
        usd = [run.seconds / 3600 * price, *(row["usd"] for row in run.rows("usd"))][-1]
        steps = max((row["step"] for row in run.rows("step")), default="–")
        cost = f"${usd:.2f}" if price else "–"
        rows.append((run.path, run.stage, steps, str(timedelta(seconds=int(run.seconds))), cost))
    total = timedelta(seconds=int(sum(run.seconds for run in runs)))
    rows.append(("all runs", "", "", str(total), ""))
    return table(("", "stage", "steps", "h:mm:ss", "cost"), rows)

def report(runs, funnel, out):
    """Writes one HTML file: no script, no image, no font, nothing to load."""
    keys = ("params", "commit", "torch", "python", "device", "command")
    about = [(run.path, run.stage, *(run.header.get(key, "–") for key in keys)) for run in runs]
    curves, results = run_curves(runs), list(result_rows(runs))
    title = escape("deepdive: " + ", ".join(run.path.name for run in runs))
    sections = [
        section("runs", "Runs", table(("run", "stage", *keys), about)),
        section("verdicts", "The demo's promises", table(("", "claim", "figures"), verdicts(runs))),
        section("data", "What the filters kept and dropped", filter_table(funnel)),
        section("loss", "Loss", *curves["loss"]),
        section("bpb", "Bits per byte", *curves["bpb"]),
        section("samples", "From noise to English: samples by training step", *map(gallery, runs)),
        section("accuracy", "Base, SFT, RL on the same held-out problems", *accuracy_tables(runs)),
        section("rl", "Reinforcement learning: reward, reply length, accuracy", *curves["rl"]),
        section("results", "All that eval.py measured",
                results and table(("run", "task", "figures"), results)),
        section("cost", "Time and cost of every stage", cost_table(runs, funnel))]
    page = ("<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
            f"<meta name=viewport content='width=device-width'>\n<title>{title}</title>\n"
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</html>\n")
    part = Path(f"{out}.part")
    part.write_text(page, encoding="utf-8", errors="replace")
    part.replace(out)
    print(f"{out}: {len(page) / 1e3:.0f} kB, open it in a browser")

def summary(runs, funnel, strict):
    """Prints the verdicts; returns the exit status."""
    for last in funnel[-1:]:
        print(f"data: {last['kept']} documents, {last['bytes'] / 1e6:.2f} MB of text")
    judged = verdicts(runs)
    for verdict, claim, text in judged:
        print(f"{verdict:10s} | {claim:32s} | {text}")
    return int(strict and any(verdict != "pass" for verdict, _, _ in judged))

# ---- The filters' page: what each step did to some pages ------------------------------------------

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

def within(seconds, function, argument):
    """function(argument), a str, from a forked process; None if that fails or takes longer."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=lambda: theirs.send(function(argument)), daemon=True)
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

def main():
    parser = argparse.ArgumentParser(description="show what runs left on disk")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders, in the order of the stages")
    add("--data", help="folder of prepare_fineweb.py")
    add("--out", help="file of the report (default: report.html in the last run)")
    add("--strict", action="store_true", help="the summary exits with 1 if something falls short")
    words = sys.argv[1:]
    command = words.pop(0) if words and words[0] in ("report", "summary") else "report"
    args = parser.parse_args(words)
    runs = [Run(path) for path in args.runs]
    funnel = read_json(Path(args.data, "index.json")).get("funnel", []) if args.data else []
    if command == "summary":
        raise SystemExit(summary(runs, funnel, args.strict))
    report(runs, funnel, args.out or runs[-1].path / "report.html")

if __name__ == "__main__":
    main()
