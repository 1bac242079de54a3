"""
The report: one page that tells the story of a run, from the files that the stages left on disk.

    python report.py runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python report.py summary runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python report.py runs/demo runs/demo-sft runs/demo-rl --svg docs/curves.svg

    in:  runs and data, as records.py reads them
    out: report.html, one file that loads nothing: no script, no image, no font; or the summary, in
         the terminal; or an SVG of two curves, the base model's loss and RL's reward

story.py tells the chapters. A chapter of which nothing was recorded is left out, and the end of the
page says what makes its stage. Full tables, flags and versions are folded there, too.

`eval.py report` and `eval.py summary` are the same commands.
"""
import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from problems import STAGES, figures, write_whole
from records import (CHANCE, JUDGED_TOKENS, Data, Run, accuracy_sources, eval_accuracies, ln_vocab,
                     read_answers, tokens_read, verdicts)
from story import CHAPTERS, Story, chapter, folded, some_steps, table
from svg import FIGURE_STYLE, GRAPHICS, SVG_STYLE, panel, shown

# ---- The page ------------------------------------------------------------------------------------

MARKS = {"pass": ("✓", "pass"), "fall short": ("✗", "fall"), "too small": ("–", "too")}

def promises(runs):
    """The demo's promises in one line, with their figures folded; those without one are left out.
    """
    judged = [row for row in verdicts(runs) if not row[2].startswith("no figure")]
    if not judged:
        return ""
    line = " ".join(f"<span class={MARKS[verdict][1]}>{MARKS[verdict][0]} {shown(claim)}</span>"
                    for verdict, claim, _ in judged)
    return (f"<p class=promises>{line}</p>"
            + folded("The demo's promises, with their figures", [table(("", "claim", "figures"),
                                                                       judged)]))

def page(runs, data):
    """Runs and Data → the page as HTML."""
    story = Story(runs, data)
    told = []
    untold = []
    for one in CHAPTERS:
        parts = [part for part in one.tell(story) if part]
        if parts:
            again = story.command(one.again)
            told.append((one, chapter(len(told) + 1, one, parts, again)))
        else:
            untold.append(one)
    links = " ".join(f"<a href='#{one.name}'>{shown(one.title)}</a>" for one, _ in told)
    names = ", ".join(run.path.name for run in runs)
    title = shown(f"deepdive: {names}")
    return ("<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
            "<meta name=viewport content='width=device-width'>\n"
            f"<title>{title}</title>\n<style>{STYLE}{GRAPHICS}{FIGURE_STYLE}</style>\n"
            f"<h1>{shown(headline(story))}</h1>\n<p class=quiet>{shown(names)}</p>\n"
            f"{promises(runs)}\n<nav>{links}</nav>\n"
            + "\n".join(html for _, html in told) + f"\n{details(story, untold)}\n</html>\n")

def headline(story):
    """The page's title: how far this run came."""
    parts = [(story.data.funnel, "the web"), (story.base, "a base model"),
             (story.sft, "an assistant"), (story.rl, "a reasoner")]
    names = [name for is_here, name in parts if is_here]
    if len(names) < 2:
        return "The story of a run"
    return f"From {names[0]} to {names[-1]}"

# ---- The full tables, folded at the end of the page ----------------------------------------------

def gallery(run, most=12):
    """What the model wrote at `most` steps."""
    samples = dict.fromkeys((row["step"], row["sample"]) for row in run.rows("step", "sample"))
    if not samples:
        return ""
    steps = some_steps({step for step, _ in samples}, most)
    rows = [(step, sample) for step, sample in samples if step in steps]
    return table((f"{run.path}, step", "sample"), rows)

def accuracy_tables(runs):
    """One table for each source; a stage that was not asked has a dash."""
    errors = eval_accuracies(sorted(runs, key=lambda run: run.stage == "RL"), "accuracy_error")
    for source, stages in accuracy_sources(runs):
        kinds = dict.fromkeys(kind for accuracies in stages.values() for kind in accuracies)
        rows = []
        for kind in kinds:
            found = [stages.get(stage, {}).get(kind) for stage in STAGES.values()]
            row = [kind]
            for stage, accuracy in zip(STAGES.values(), found):
                error = errors.get(source, {}).get(stage, {}).get(kind)
                row.append("–" if accuracy is None else f"{accuracy:.1%}")
                if error is not None:
                    row[-1] += f" ± {error:.1%}"
            change = "–"
            if None not in found[1:]:
                change = f"{100 * (found[2] - found[1]):+.1f} points"
            rows.append([*row, change, f"{CHANCE.get(kind, 0):.0%}"])
        yield table((source, "base (before SFT)", "SFT (after)", "RL", "by RL", "chance"), rows)

def knowledge_table(runs):
    """Problems among which some have no answer: how many replies were right, wrong or a refusal."""
    rows = []
    for run in runs:
        for name, result in run.results.items():
            for kind, task in result.get("kinds", {}).items():
                if "wrong" in task and "refused" in task:
                    right = max(0.0, 1 - task["wrong"] - task["refused"])
                    shares = (right, task["wrong"], task["refused"])
                    rows.append((f"{run.path}, {Path(name).name}", kind,
                                 *(f"{s:.1%}" for s in shares)))
    return table(("run, problems", "kind", "right", "wrong", "refused"), rows)

def counts(reasons):
    """{reason: pages} → the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{reason} {pages}" for reason, pages in ordered)

def filter_table(funnel):
    """funnel: the rows of index.json that prepare_fineweb.py wrote, one for each step."""
    rows = []
    reasons = []
    for row in funnel:
        share = row["kept"] / max(1, row["in"])
        rows.append((row["step"], row["in"], row["kept"], f"{share:.1%}",
                     f"{row.get('bytes', 0) / 1e6:.2f}", f"{row.get('docs_per_s', 0):.0f}"))
        reasons.append((row["step"], counts(row.get("dropped", {})),
                        counts(row.get("flagged", {}))))
    return (table(("step", "in", "kept", "share", "MB of text", "pages/s"), rows)
            + table(("step", "why dropped", "noted, not dropped"), reasons))

def results_tables(runs):
    """Everything in eval.json; the tasks of a mean stand below it."""
    for run in runs:
        rows = []
        for name, result in run.results.items():
            rows.append((name, " | ".join(figures(result))))
            for label, task in result.get("tasks", {}).items():
                rows.append((f"· {label}", " | ".join(figures(task))))
        yield table((f"{run.path}, task", "figures"), rows)

def answers_table(run, most=5):
    """Replies to the same held-out problems at `most` steps: how the thinking grew."""
    answers = read_answers(run)
    if not answers:
        return ""
    steps = some_steps({row["step"] for row in answers}, most)
    rows = []
    for row in sorted(answers, key=lambda row: row["question"]):    # its steps stay in their order
        if row["step"] in steps:
            verdict = {True: "right", False: "wrong"}[row["right"]]
            rows.append((row["question"], row["step"], row["reply"], verdict))
    return table((f"{run.path}, held-out problem", "step", "reply", ""), rows)

def rlhf_tables(story):
    """The best of n by the reward, and all replies that were logged."""
    from best_of_n import read_best_of_n
    for run in story.rlhf:
        yield table((f"{run.path}, best of n", "KL", "reward", "gold"), read_best_of_n(run.path))
        replies = [(row["step"], f"{one['reward']:.2f}", one.get("gold", "–"), one["reply"])
                   for row in run.rows("step", "replies") for one in row["replies"]]
        yield table((f"{run.path}, step", "reward", "gold", "reply"), replies)

def run_tables(runs):
    """What it takes to repeat each run, and the flags that it had."""
    for run in runs:
        rows = [("stage", run.stage)]
        for key in ("params", "commit", "torch", "python", "device", "command"):
            rows.append((key, run.header.get(key, "–")))
        flags = run.header.get("flags", {})
        rows.append(("flags", " ".join(f"{name}={value}" for name, value in flags.items())))
        yield table(("run", run.path), rows)

def details(story, untold):
    """The folded tables at the end → HTML."""
    runs = story.runs
    parts = [
        folded("What the filters kept and dropped", [filter_table(story.data.funnel)]),
        folded("More samples, by training step", map(gallery, runs)),
        folded("Base, SFT, RL on the same held-out problems", accuracy_tables(runs)),
        folded("Right, wrong and refused", [knowledge_table(runs)]),
        folded("Held-out problems of reinforcement learning",
               map(answers_table, story.rl + story.beyond)),
        folded("RLHF: the best of n, and all replies", rlhf_tables(story)),
        folded("All that eval.py measured", results_tables(runs)),
        folded("Runs, versions, and the commands that repeat them", run_tables(runs)),
        folded("What is not told here, and what would tell it", [table(
            ("chapter", "what makes it"), [(told.title, told.missing) for told in untold])])]
    return ("<section id=details>\n<h2>Details</h2>\n" + "\n".join(part for part in parts if part)
            + "\n</section>")

# ---- How the page looks --------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --quiet: light-dark(#5d6570, #9aa4b0);
  --line: light-dark(#dfe3e8, #343b44); --ground: light-dark(#f4f6f8, #1c2127) }
.c0 { color: light-dark(#0b62c4, #6ab0ff) } .c1 { color: light-dark(#c4530b, #ff9d5c) }
.c2 { color: light-dark(#1c7f3c, #6fd08c) } .c3 { color: light-dark(#8a3fc0, #c99bf2) }
body { font: 17px/1.6 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem;
  color: light-dark(#1d2329, #dde3ea); background: light-dark(#fff, #14181c) }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 .2rem }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .4rem }
h2 span { color: var(--quiet); font-weight: 400; margin-right: .3rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
section { margin: 3.2rem 0 }
.quiet { color: var(--quiet); margin: 0 0 1rem; overflow-wrap: anywhere }
.talk { color: var(--quiet); border-left: 3px solid var(--line); padding-left: .9rem;
  margin: .2rem 0 1.1rem; max-width: 40rem } .talk strong { font-weight: 600 }
nav { font-size: .94rem; line-height: 1.9; margin: 1rem 0 }
nav a { color: inherit; margin-right: 1rem; white-space: nowrap }
.promises span { margin-right: 1rem; display: inline-block }
.pass, .shown { color: light-dark(#1c7f3c, #6fd08c) } .fall { color: light-dark(#b3261e, #ff8a80) }
.too, .other { color: light-dark(#8a5a00, #e5b567) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1.6rem 2rem; margin: 1.2rem 0; align-items: start }
dl { margin: .4rem 0 } dt { color: var(--quiet); font-size: .875rem; margin-top: .7rem }
dd { margin: .15rem 0 .5rem; padding: .5rem .8rem; background: var(--ground); border-radius: 6px;
  font-size: .94rem; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9 }
.tokens span { background: light-dark(#dbe9fb, #23405f); border-radius: 3px }
.tokens span:nth-child(2n) { background: light-dark(#fbe6d4, #553621) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.5;
  background: var(--ground); padding: .6rem .8rem; border-radius: 6px; margin: .8rem 0 }
.again { border: 1px solid var(--line) } .again::before { content: "See it again: ";
  color: var(--quiet); font-family: system-ui, sans-serif; display: block }
details { border-bottom: 1px solid var(--line); padding: .45rem 0 } summary { cursor: pointer }
.wide { overflow-x: auto; margin: 1rem 0; font-size: .875rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0;
  white-space: pre-wrap; border-bottom: 1px solid var(--line); min-width: 2.4rem }
th:first-child, td:first-child { overflow-wrap: anywhere; min-width: 8.5rem }
th:last-child, td:last-child { overflow-wrap: anywhere; min-width: 3.5rem }
@media (max-width: 600px) { body { font-size: 16px } section { margin: 2.4rem 0 }
  .wide { font-size: .78rem } th, td { padding-right: .3rem; min-width: 2rem }
  th:first-child, td:first-child { min-width: 5.2rem }
  th:last-child, td:last-child { min-width: 3rem; padding-right: 0 } }
@media print { :root { color-scheme: light } body { max-width: none; font-size: 11pt; padding: 0 }
  nav { display: none } details::details-content { content-visibility: visible }
  .wide { overflow-x: visible } section, dd { break-inside: auto } h2, h3 { break-after: avoid } }
"""

# ---- The summary, in the terminal ----------------------------------------------------------------

def print_summary(runs, funnel, strict):
    """Prints the verdicts; returns the exit status, which is 1 only if a strict one falls short."""
    if funnel:
        last = funnel[-1]
        megabytes = last.get("bytes", 0) / 1e6
        print(f"data: {last['kept']} documents, {megabytes:.2f} MB of text")
    judged = verdicts(runs)
    for verdict, claim, text in judged:
        print(f"{verdict:10s} | {claim:32s} | {text}")
    if tokens_read(runs) < JUDGED_TOKENS:
        print(f"too small  | to judge: the base model has read {tokens_read(runs):,} tokens, and "
              f"the demo promises nothing below {JUDGED_TOKENS:,}")
    fall_short = [claim for verdict, claim, _ in judged if verdict == "fall short"]
    return 1 if strict and fall_short else 0

# ---- The two curves of the story, in a file of their own -----------------------------------------

def story_panels(runs):
    """[(title, lines, levels)]: the base model's loss, and RL's reward and held-out accuracy."""
    panels = []
    for run in runs:
        losses = dict(training=run.points("loss"), validation=run.points("val_loss"))
        if run.stage == "base" and losses["training"]:
            panels.append(("From noise to English: loss, nats per token", losses, ln_vocab(run)))
    for run in runs:
        lines = {"mean reward of samples": run.points("reward")}
        for kind, points in run.held_out().items():
            lines[f"accuracy on held-out {kind}"] = points
        levels = {f"chance, {kind}": CHANCE[kind] for kind in run.held_out() if kind in CHANCE}
        if run.stage == "RL" and lines["mean reward of samples"]:
            panels.append(("Reinforcement learning: share of right answers", lines, levels))
    return panels

def write_curves(runs, out, W=450, H=330):
    """The panels of the story side by side → one SVG file, on a white card."""
    panels = story_panels(runs)
    if not panels:
        raise SystemExit(f"{', '.join(str(run.path) for run in runs)}: no log holds a loss or a "
                         "reward; name the runs of train_gpt2.py and rl_grpo.py")
    width = W * len(panels)
    svg = [f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{H}' "
           f"viewBox='0 0 {width} {H}'>",
           f"<style>{SVG_STYLE}{GRAPHICS}</style>",
           f"<rect width='{width}' height='{H}' rx='8' class='card'/>"]
    for i, (title, lines, levels) in enumerate(panels):
        svg.append(f"<g transform='translate({i * W} 0)'>{panel(title, lines, levels, W, H)}</g>")
    write_page(out, "\n".join([*svg, "</svg>\n"]))

def write_page(out, text):
    """Writes a page or a picture, and says where it is."""
    write_whole(out, text.encode("utf-8"))
    print(f"{out}: {len(text) / 1e3:.0f} kB, open it in a browser")

# ---- Command line --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="show what runs left on disk",
                                     usage="%(prog)s [report | summary] RUN … [flags]")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders, in the order of the stages")
    add("--data", help="folder of prepare_fineweb.py")
    add("--out", help="file of the report (default: report.html in the last run)")
    add("--svg", help="write only the curves of loss and reward, into this SVG file")
    add("--strict", action="store_true", help="the summary exits with 1 if a claim falls short")
    words = sys.argv[1:]
    command = "report"
    if words and words[0] in ("report", "summary"):
        command = words.pop(0)
    args = parser.parse_args(words)
    if command == "summary" and (args.svg or args.out):
        raise SystemExit("the summary writes no file; leave out --out and --svg, or the command")
    runs = [Run(path) for path in args.runs]
    data = Data(args.data)
    if command == "summary":
        raise SystemExit(print_summary(runs, data.funnel, args.strict))
    if args.svg:
        write_curves(runs, args.svg)
    else:
        write_page(args.out or runs[-1].path / "report.html", page(runs, data))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
