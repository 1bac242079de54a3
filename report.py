"""
The report: one page that tells the story of a run, from the files that the stages left on disk.

    python report.py runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python report.py summary runs/demo runs/demo-sft runs/demo-rl --data data/demo
    python report.py runs/demo runs/demo-sft runs/demo-rl --svg docs/curves.svg

    in:  <run>/config.json, log.jsonl, eval.json; <data>/index.json
    out: report.html, one file that loads nothing; or the summary, in the terminal; or an SVG of
         two curves, the base model's loss and RL's reward

`eval.py report` and `eval.py summary` are the same commands.
"""
import argparse
import math
import signal
import sys
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from problems import STAGES, figures, printable, read_json, read_lines, reason, write_whole
from svg import GRAPHICS, SVG_STYLE, curve, panel, shown
from training import read_log

# ---- What runs left on disk ----------------------------------------------------------------------

class Run:
    """A run's config.json, log.jsonl and eval.json; what is missing is empty."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise SystemExit(f"{path} is not a run's folder; name the --out of a training")
        self.log = read_checked_log(self.path)
        self.results = read_checked(self.path / "eval.json", {ANY: RESULT})
        self.config = read_checked(self.path / "config.json", CONFIG)
        self.stage = STAGES.get(self.stage_name(), self.stage_name())
        self.header = {}
        for row in self.rows("header"):
            self.header = row["header"]
        self.seconds = 0
        if self.log:
            self.seconds = self.log[-1].get("seconds", 0)

    def stage_name(self):
        """What config.json says; before a model is saved, what the log looks like."""
        if "stage" in self.config.get("deepdive", {}):
            return self.config["deepdive"]["stage"]
        if self.points("reward"):
            return "rl"
        return "sft" if self.rows("when") else "pretrain"

    def rows(self, *keys):
        """The rows of the log that have all these keys."""
        return [row for row in self.log if all(key in row for key in keys)]

    def points(self, key, *also):
        """[(step, value)] of the rows that have these keys, where the value is a finite number."""
        return [(row["step"], row[key]) for row in self.rows("step", key, *also)
                if is_finite(row[key])]

    def held_out(self):
        """{kind: [(step, accuracy)]} of RL's held-out problems."""
        points = {}
        for row in self.rows("step", "kind", "accuracy"):
            points.setdefault(row["kind"], []).append((row["step"], row["accuracy"]))
        return points

# ---- What these files must look like -------------------------------------------------------------

def is_text(value):
    return isinstance(value, str)

def is_number(value):
    """A float may be NaN or infinite; an int must be one that a float can hold."""
    return isinstance(value, float) or is_finite(value)

def is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e18

def is_number_or_none(value):
    return value is None or is_finite(value)

def is_right(value):
    return isinstance(value, bool)

def is_size(value):
    return type(value) is int and 1 < value < 2 ** 31

# The shapes of what the stages write; see misfit for what a shape is. Only what the report reads is
# listed, so that a stage may log more.
ANY = ""        # as a key of a shape: every key
FUNNEL_ROW = {"step": is_text, "in": is_finite, "kept": is_finite, "bytes?": is_finite,
              "docs_per_s?": is_finite, "seconds?": is_finite, "dropped?": {ANY: is_finite},
              "flagged?": {ANY: is_finite}}
CONFIG = {"vocab_size?": is_size, "deepdive?": {"stage?": is_text}}
SHARES = {"accuracy": is_finite, "refused?": is_finite, "wrong?": is_finite}
RESULT = {"left_out?": [is_text], "arguments?": {}, "kinds?": {ANY: SHARES}, "tasks?": {ANY: {}}}
LOG_ROW = {"step?": is_finite, "seconds?": is_finite, "loss?": is_number, "val_loss?": is_number,
           "val_bpb?": is_number, "gzip?": is_finite, "xz?": is_finite, "reward?": is_number,
           "reply_tokens?": is_number, "usd?": is_finite, "sample?": is_text, "kind?": is_text,
           "when?": is_text, "accuracy?": is_finite, "others?": {ANY: is_finite},
           "thinking_tokens?": is_number, "gold?": is_number, "kl_reply?": is_number,
           "replies?": [{"reply": is_text, "reward": is_finite}],
           "header?": {"flags?": {"gpu_hour_usd?": is_number_or_none,
                                  "total_batch_size?": is_number_or_none}}}
ANSWER = {"step": is_finite, "question": is_text, "reply": is_text, "right": is_right}
SFT_ROW = {**LOG_ROW, "accuracy?": {ANY: is_finite}}

def misfit(value, shape, place="the file"):
    """The place where a JSON value does not have a shape; None if it has. A shape is a test of the
    value; [shape], a list; or {key: shape}, where a "key?" may be missing."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return place
        inside = [(f"{place}[{i}]", item, shape[0]) for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return place
        inside = []
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if key == ANY:
                inside += [(f"{place}, {name}", item, inner) for name, item in value.items()]
            elif name in value:
                inside.append((f"{place}, {name}", value[name], inner))
            elif key == name:
                return f"{place}, {name}"
    else:
        return None if shape(value) else place
    for inner_place, item, inner in inside:
        found = misfit(item, inner, inner_place)
        if found:
            return found
    return None

def read_checked(path, shape):
    """A JSON object of this shape; {} if there is no file."""
    value = read_json(path)
    place = misfit(value, shape)
    if place:
        raise SystemExit(f"{path} is damaged: {printable(place)}, is missing or of a wrong type; "
                         "delete the file, or make it again")
    return value

def as_answer(row):
    """A row of answers.jsonl; ValueError if it is not one."""
    place = misfit(row, ANSWER, "its row")
    if place:
        raise ValueError(f"{printable(place)}, is missing or of a wrong type")
    return row

def read_checked_log(run):
    """The rows of <run>/log.jsonl."""
    path = run / "log.jsonl"
    try:
        rows = read_log(run)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged: {reason(error)}; remove the broken line") from None
    for number, row in enumerate(rows, 1):
        is_sft = isinstance(row, dict) and "when" in row
        place = misfit(row, SFT_ROW if is_sft else LOG_ROW, f"row {number}")
        if place:
            raise SystemExit(f"{path} is damaged: {printable(place)}, is missing or of a wrong "
                             "type; remove the row")
    return rows

# ---- The demo's verdicts -------------------------------------------------------------------------

CHANCE = dict(bits=0.5)     # even or odd; the answer to an open question cannot be guessed

def eval_accuracies(runs):
    """{source: {stage: {kind: accuracy}}} from eval.json. The hash of the problems is a part of the
    source's name, so that accuracies on different problems are never compared."""
    sources = {}
    for run in runs:
        for name, result in run.results.items():
            if "kinds" not in result:
                continue
            asked = result.get("arguments", {})
            source = (f"eval.json: {result.get('n')} of {Path(name).name} (hash "
                      f"{asked.get('files')}), replies of {asked.get('max_new_tokens')} tokens at "
                      "most")
            shares = {kind: task["accuracy"] for kind, task in result["kinds"].items()}
            sources.setdefault(source, {})[run.stage] = shares
    return sources

def logged_accuracies(runs):
    """{stage: {kind: accuracy}} from the logs of SFT and RL. RL measures once before it learns:
    that is the accuracy of the SFT model."""
    stages = {}
    for run in runs:
        for row in run.rows("when", "accuracy"):
            stage = "base" if row["when"] == "before" else "SFT"
            stages.setdefault(stage, {}).update(row["accuracy"])
        for row in run.rows("step", "kind", "accuracy"):
            if row["step"] == 0:
                stages.setdefault("SFT", {})[row["kind"]] = row["accuracy"]
            stages.setdefault("RL", {})[row["kind"]] = row["accuracy"]
        for row in run.rows("step", "others"):      # kinds that are not practised
            if row["step"] == 0:
                stages.setdefault("SFT", {}).update(row["others"])
            stages.setdefault("RL", {}).update(row["others"])
    return stages

def accuracy_sources(runs):
    """[(source, {"base" | "SFT" | "RL": {kind: accuracy}})]. All accuracies of a source come from
    greedy replies to the same problems. If several runs have the same stage, the last one counts.
    """
    runs = sorted(runs, key=lambda run: run.stage == "RL")
    sources = list(eval_accuracies(runs).items())
    logged = logged_accuracies(runs)
    if logged:
        sources.append(("training logs", logged))
    return sources

def gain(runs, kind, before, after, wanted):
    """(passed, figures as text): did the accuracy on `kind` rise by at least `wanted` percentage
    points, to more than chance?"""
    for source, stages in accuracy_sources(runs):
        if kind not in stages.get(before, {}) or kind not in stages.get(after, {}):
            continue
        old = stages[before][kind]
        new = stages[after][kind]
        points = round(100 * (new - old), 6)    # 0.65 - 0.50 is 15 points, not a hair less
        text = f"{before} {old:.1%}, {after} {new:.1%}: {points:+.1f} points; wanted +{wanted}"
        if kind in CHANCE:
            text += f", above chance {CHANCE[kind]:.0%}"
        text += f" ({source.partition(':')[0]})"
        return points >= wanted and new > CHANCE.get(kind, 0), text
    return False, f"no figure: no log or eval.json has {kind} for both {before} and {after}"

def compression(runs):
    """(passed, figures as text): does the base model compress unseen text better than gzip?"""
    ends = [row for run in runs for row in run.rows("val_bpb", "gzip", "xz")]
    if not ends:
        return False, "no figure: no log holds the end of a train_gpt2.py run"
    end = ends[-1]
    text = f"model {end['val_bpb']:.4f}, gzip -9 {end['gzip']:.4f}, xz -9e {end['xz']:.4f}"
    return end["val_bpb"] < end["gzip"], text

JUDGED_TOKENS = 500_000     # of pretraining; fewer only show that everything works (SIZE=tiny)

def tokens_read(runs):
    """How many tokens the base model has read; math.inf if no log of pretraining says so."""
    for run in runs:
        batch_tokens = run.header.get("flags", {}).get("total_batch_size")
        steps = run.points("loss")
        if run.stage == "base" and batch_tokens and steps:
            return batch_tokens * steps[-1][0]
    return math.inf

def verdicts(runs):
    """[("pass" | "fall short" | "too small", claim, figures)] for what the demo promises. A claim
    that fails is too small to judge if the base model has read fewer than JUDGED_TOKENS."""
    failed = "too small" if tokens_read(runs) < JUDGED_TOKENS else "fall short"
    claims = {"base: val bits a byte below gzip": compression(runs),
              "SFT: identity, held out": gain(runs, "identity", "base", "SFT", 30),
              "SFT: functions, held out": gain(runs, "functions", "base", "SFT", 30),
              "RL: bits, held out": gain(runs, "bits", "SFT", "RL", 15)}
    return [("pass" if passed else failed, claim, text)
            for claim, (passed, text) in claims.items()]

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

# ---- The two curves of the story, for the report and for a file of their own ---------------------

def ln_vocab(run):
    """The level of a model that finds all tokens equally likely, where training starts."""
    V = run.config.get("vocab_size")
    return {f"random guess, ln {V} =": math.log(V)} if V else {}

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

# ---- The page; text from runs enters it only through table, section and curve, which escape it ---

STYLE = """
:root { color-scheme: light dark }
.c0 { color: light-dark(#0b62c4, #6ab0ff) } .c1 { color: light-dark(#c4530b, #ff9d5c) }
.c2 { color: light-dark(#1c7f3c, #6fd08c) } .c3 { color: light-dark(#8a3fc0, #c99bf2) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem; white-space: pre-wrap;
  border-bottom: 1px solid #8886 }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
td:first-child { white-space: nowrap }
svg { width: 100%; font-size: 12px }
"""

def table(head, rows):
    """Column names and rows of anything → HTML, "" if there is no row; every cell is escaped."""
    if not rows:
        return ""
    lines = ["".join(f"<th>{shown(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{shown(cell)}</td>" for cell in row) for row in rows]
    return "<div class=wide><table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table></div>"

def section(name, title, parts):
    """A title and parts of HTML, some of which may be empty → HTML."""
    body = "\n".join(part for part in parts if part)
    if not body:
        body = "<p>Nothing of this is recorded here.</p>"
    return f"<section id={name}>\n<h2>{shown(title)}</h2>\n{body}\n</section>"

def loss_curves(runs):
    """RL's runs have no curve here, because on fresh samples the loss says nothing, see rl_grpo.py.
    """
    for run in runs:
        if run.stage != "RL":
            lines = dict(train=run.points("loss"), val=run.points("val_loss"))
            levels = ln_vocab(run) if run.stage == "base" else {}
            yield curve(f"{run.path} ({run.stage}), loss in nats a token", lines, levels)

def bpb_curves(runs):
    """Bits a byte beside what compressors need for the same text."""
    for run in runs:
        levels = {}
        for row in run.rows("gzip", "xz"):
            levels = {"gzip -9": row["gzip"], "xz -9e": row["xz"]}
        yield curve(f"{run.path}, val bits a byte", dict(model=run.points("val_bpb")), levels)

def rl_curves(runs):
    """Replies become longer and rewards higher together: that is the thinking which emerges."""
    for run in runs:
        held_out = run.held_out()
        chance = {f"chance, {kind}": CHANCE[kind] for kind in held_out if kind in CHANCE}
        yield curve(f"{run.path}, mean reward of samples", dict(reward=run.points("reward")))
        yield curve(f"{run.path}, mean reply length of samples",
                    dict(tokens=run.points("reply_tokens", "reward"),
                         thinking=run.points("thinking_tokens", "reward")))
        yield curve(f"{run.path}, greedy accuracy on held-out problems", held_out, chance)
        yield answers_table(run)

def answers_table(run, most=5):
    """Replies to the same held-out problems at `most` steps: how the thinking grew."""
    if not (run.path / "answers.jsonl").exists():
        return ""
    answers = read_lines(run.path / "answers.jsonl", as_answer, "delete the file")
    shown = some_steps({row["step"] for row in answers}, most)
    rows = []
    for row in sorted(answers, key=lambda row: row["question"]):    # its steps stay in their order
        if row["step"] in shown:
            verdict = {True: "right", False: "wrong"}[row["right"]]
            rows.append((row["question"], row["step"], row["reply"], verdict))
    return table((f"{run.path}, held-out problem", "step", "reply", ""), rows)

def some_steps(steps, most):
    """`most` of a set of steps, the first and the last among them."""
    steps = sorted(steps)
    return {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)}

def gallery(run, most=12):
    """What the model wrote at `most` steps."""
    samples = dict.fromkeys((row["step"], row["sample"]) for row in run.rows("step", "sample"))
    if not samples:
        return ""
    shown = some_steps({step for step, _ in samples}, most)
    rows = [(step, sample) for step, sample in samples if step in shown]
    return table((f"{run.path}, step", "sample"), rows)

def accuracy_tables(runs):
    """One table for each source; a stage that was not asked has a dash."""
    for source, stages in accuracy_sources(runs):
        kinds = dict.fromkeys(kind for accuracies in stages.values() for kind in accuracies)
        rows = []
        for kind in kinds:
            found = [stages.get(stage, {}).get(kind) for stage in STAGES.values()]
            row = [kind]
            for accuracy in found:
                row.append("–" if accuracy is None else f"{accuracy:.1%}")
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
                    rows.append((run.path, Path(name).name, kind, *(f"{s:.1%}" for s in shares)))
    return table(("run", "problems", "kind", "right", "wrong", "refused"), rows)

def rlhf_figures(runs):
    """RLHF: the reward that was followed and the true objective beside it, as far as the policy has
    gone from its start; where the objective turned; and what the replies became."""
    from best_of_n import read_best_of_n, turning_point, turning_rows
    followed = {run.path.name: run.rows("step", "reward", "gold", "kl_reply") for run in runs}
    followed = {name: rows for name, rows in followed.items() if rows}
    for by, key in (("step", "step"), ("KL in nats a reply", "kl_reply")):
        lines = {}
        for name, rows in followed.items():
            rows = sorted(rows, key=lambda row: row[key])
            for what in ("reward", "gold"):
                lines[f"{name}, {what}"] = [(row[key], row[what]) for row in rows]
        yield curve("What is followed and what is meant", lines, by=by)
    turns = [(name, *turn) for name, rows in followed.items()
             for turn in turning_rows(turning_point(rows))]
    if turns:
        yield table(("run", "5 steps in a row", "step", "KL", "reward", "gold"), turns)
    for run in runs:
        rows = read_best_of_n(run.path)
        if rows:
            yield table((f"{run.path}, best of n", "KL", "reward", "gold"), rows)
        replies = [(row["step"], f"{one['reward']:.2f}", one["reply"])
                   for row in run.rows("step", "replies") for one in row["replies"]]
        if replies:
            yield (f"<details><summary>{shown(run.path)}: what it wrote</summary>"
                   f"{table(('step', 'reward', 'reply'), replies)}</details>")

def counts(reasons):
    """{reason: pages} → the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{reason} {pages}" for reason, pages in ordered)

def filter_table(funnel):
    """funnel: the rows of index.json that prepare_fineweb.py wrote, one for each step."""
    if not funnel:
        return "<p>No filter table: name the folder of prepare_fineweb.py with --data.</p>"
    rows = []
    for row in funnel:
        share = row["kept"] / max(1, row["in"])
        rows.append((row["step"], row["in"], row["kept"], f"{share:.1%}",
                     f"{row.get('bytes', 0) / 1e6:.2f}", f"{row.get('docs_per_s', 0):.0f}",
                     counts(row.get("dropped", {})), counts(row.get("flagged", {}))))
    return table(("step", "in", "kept", "share", "MB of text", "pages/s", "why dropped",
                  "noted, not dropped"), rows)

def results_table(runs):
    """Everything in eval.json; the tasks of a mean stand below it."""
    rows = []
    for run in runs:
        for name, result in run.results.items():
            rows.append((run.path, name, " | ".join(figures(result))))
            for label, task in result.get("tasks", {}).items():
                rows.append((run.path, f"· {label}", " | ".join(figures(task))))
    return table(("run", "task", "figures"), rows)

def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))

def cost_table(runs, funnel):
    """The time at the end of each log. A trainer that logs its cost counts every GPU; otherwise the
    cost is that of one GPU."""
    rows = []
    if funnel:
        seconds = sum(row.get("seconds", 0) for row in funnel)
        rows.append(("data", "", "", f"{duration(seconds)}, summed over workers", ""))
    for run in runs:
        steps = max((row["step"] for row in run.rows("step")), default="–")
        price = run.header.get("flags", {}).get("gpu_hour_usd")
        cost = "–"
        if price:
            usd = run.seconds / 3600 * price
            for row in run.rows("usd"):
                usd = row["usd"]
            cost = f"${usd:.2f}"
        rows.append((run.path, run.stage, steps, duration(run.seconds), cost))
    rows.append(("all runs", "", "", duration(sum(run.seconds for run in runs)), ""))
    return table(("", "stage", "steps", "h:mm:ss", "cost"), rows)

def runs_table(runs):
    """What it takes to repeat each run."""
    keys = ("params", "commit", "torch", "python", "device", "command")
    rows = [(run.path, run.stage, *(run.header.get(key, "–") for key in keys)) for run in runs]
    return table(("run", "stage", *keys), rows)

CLAIMS = {"claims?": [{"name": is_text, "sentence": is_text, "verdict": is_text, "said": is_text,
                       "checks": [is_text], "texts": [is_text]}]}

def claims_table(run):
    """The talk's claims as talk.py measured them; what was asked and checked of each is folded."""
    found = read_checked(run.path / "talk.json", CLAIMS)
    for number, claim in enumerate(found.get("claims", []), 1):
        lines = "\n".join([claim["said"], *claim["checks"], *claim["texts"]])
        yield (f"<details><summary>{number}. {shown(claim['sentence'])} "
               f"<strong>{shown(claim['verdict'])}</strong></summary>"
               f"<pre>{shown(lines)}</pre></details>")

def write_report(runs, funnel, out):
    """Writes one HTML file: no script, no image, no font, nothing to load."""
    title = shown("deepdive: " + ", ".join(run.path.name for run in runs))
    promises = table(("", "claim", "figures"), verdicts(runs))
    sections = [
        section("verdicts", "The demo's promises", [promises]),
        section("talk", "The talk's claims, held against these models",
                claims_table(runs[-1])),
        section("loss", "Loss", loss_curves(runs)),
        section("samples", "From noise to English: samples by training step", map(gallery, runs)),
        section("bpb", "Bits per byte", bpb_curves(runs)),
        section("accuracy", "Base, SFT, RL on the same held-out problems", accuracy_tables(runs)),
        section("knowledge", "What it knows, and what it says it does not know",
                [knowledge_table(runs)]),
        section("rl", "Reinforcement learning: reward, reply length, accuracy", rl_curves(runs)),
        section("rlhf", "RLHF: a reward that people's ranks taught, and what they meant",
                rlhf_figures(runs)),
        section("data", "What the filters kept and dropped", [filter_table(funnel)]),
        section("results", "All that eval.py measured", [results_table(runs)]),
        section("cost", "Time and cost of every stage", [cost_table(runs, funnel)]),
        section("runs", "Runs, and the commands that repeat them", [runs_table(runs)])]
    write_page(out, "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
               "<meta name=viewport content='width=device-width'>\n"
               f"<title>{title}</title>\n<style>{STYLE}{GRAPHICS}</style>\n<h1>{title}</h1>\n"
               + "\n".join(sections) + "\n</html>\n")

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
    funnel = []
    if args.data:
        index = read_checked(Path(args.data, "index.json"), {"funnel?": [FUNNEL_ROW]})
        funnel = index.get("funnel", [])
    if command == "summary":
        raise SystemExit(print_summary(runs, funnel, args.strict))
    if args.svg:
        write_curves(runs, args.svg)
    else:
        write_report(runs, funnel, args.out or runs[-1].path / "report.html")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
