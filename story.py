"""
The story of a run, from the web to the reasoner: a chapter for each stage.

    python report.py runs/demo-small-base runs/demo-small-sft runs/demo-small-honest \
        runs/demo-small-rl --data data/demo-small

    in:  Run and Data, as records.py reads them
    out: HTML of each chapter, for report.py

CHAPTERS below is the story in the talk's order. Each chapter says what the talk says of its stage,
in a sentence of ours, and what happened here: figures, and texts to read. It ends with the command
that shows it again. A chapter of which nothing was recorded tells nothing.

A text from a run enters the page only through shown(), which escapes it.
"""
import math
import os
import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

from problems import STAGES, plus_minus
from records import (CHANCE, is_finite, ln_vocab, logged_accuracies, read_answers, read_claims,
                     tokens_read)
from svg import bars, curve, shown

# ---- What was published --------------------------------------------------------------------------

# CORE and accuracies of OpenAI's GPT-2 with 1,558M parameters, from nanochat,
# dev/LEADERBOARD.md and dev/estimate_gpt3_core.ipynb, which has these six of the 22 tasks. Its
# scoring differs a little, see eval.py.
GPT2_CORE = 0.2565
GPT2_ACCURACIES = dict(hellaswag_zeroshot=0.502, lambada_openai=0.523, hellaswag=0.512, piqa=0.725,
                       arc_easy=0.595, arc_challenge=0.299)
GPT2_COST = ("OpenAI's GPT-2, 2019, 1,558M", "32 TPU v3", "168", "$43,000", f"{GPT2_CORE}",
             "nanochat, dev/LEADERBOARD.md")
PUBLISHED = [       # on 8×H100: (run, hours of training, CORE if it is known, source)
    ("llm.c, 124M", 0.75, "–", "modded-nanogpt, records/track_1_short/2024-10-13_llmc"),
    ("llm.c, 1,558M", 24.0, "–", "llm.c, discussion 677"),
    ("nanochat d24, run 1", 3.04, "0.2585", "nanochat, dev/LEADERBOARD.md"),
    ("nanochat d24, run 6", 1.65, "–", "nanochat, dev/LEADERBOARD.md")]
NODE_GPUS = 8
GPU_HOUR_USD = 3.0          # if no log has a price

# ---- Who is who ----------------------------------------------------------------------------------

class Story:
    """The runs by the part that they play, the data, and the talk's claims.

    A run of RL is a reasoner (`rl`), or belongs to RLHF (`rlhf`) if its log has a true objective
    beside the reward; so do reward models. One that practises chains of arrows is bench/beyond.py's
    (`beyond`). Of several talk.json the last one counts."""

    def __init__(self, runs, data):
        self.runs = runs
        self.data = data
        self.base = [run for run in runs if run.stage == "base"]
        self.sft = [run for run in runs if run.stage == "SFT"]
        self.rlhf = [run for run in runs if is_rlhf(run)]
        self.beyond = [run for run in runs if is_beyond(run)]
        self.experiments = [*self.rlhf, *self.beyond]       # on models that are not of the story
        self.rl = [run for run in runs if run.stage == "RL" and run not in self.experiments]
        self.claims = []
        for run in runs:
            self.claims = read_claims(run) or self.claims
        self.named = {claim["name"]: claim for claim in self.claims}

    def label(self, run):
        """The name of a run without what all names have in common: demo-small-sft → sft."""
        everyone = [other.path.name for other in self.runs]
        names = {other.path.name for other in self.runs if other not in self.experiments}
        if len(set(everyone)) < len(everyone):
            return str(run.path)        # two runs of one name, in different folders
        if run in self.experiments or len(names) < 2:
            return run.path.name
        common, dash, _ = os.path.commonprefix(list(names)).rpartition("-")
        return run.path.name.removeprefix(common + dash)

    def command(self, template):
        """A chapter's command with the folders of this story filled in, quoted for a shell; "" if
        it needs one that is missing. {honest} is the last assistant, {all} are the runs that
        talk.py takes, {crawl} the crawl and the filters' settings, {trained} the trainer's own
        command."""
        names = {}
        for name, runs in dict(base=self.base, honest=self.sft, rl=self.rl).items():
            if runs:
                names[name] = shlex.quote(str(runs[-1].path))
        names["all"] = " ".join(shlex.quote(str(run.path)) for run in self.runs
                                if run not in self.experiments)
        if self.data.path:
            names["data"] = shlex.quote(str(self.data.path))
        if self.data.path and Path(self.data.path, "warc").is_dir():
            names["crawl"] = f"{names['data']}/warc/*.warc.gz"
            for flag in ("quality", "extractor"):
                if flag in self.data.settings:
                    names["crawl"] += f" --{flag} {shlex.quote(self.data.settings[flag])}"
        if self.base and self.base[-1].header.get("command"):
            names["trained"] = str(self.base[-1].header["command"])
        try:
            return template.format_map(names)
        except KeyError:
            return ""

    def claim_texts(self, name, most=3):
        """What talk.py asked for one of its claims, and what came back, each on a line of its own
        (there two spaces stand between them, and ⏎ for the end of a line)."""
        return [("", text.replace("  ", "\n").replace("⏎", "\n").strip())
                for text in self.named.get(name, {}).get("texts", [])[:most]]

    def claim_said(self, name):
        """The figures of one of talk.py's claims in a sentence; "" if it was not measured."""
        claim = self.named.get(name, {})
        if not claim.get("checks"):
            return ""
        return claim["said"] + "."

    def claim_figures(self, name):
        """{name: (value, standard error)} of one of talk.py's claims."""
        found = {}
        for key, pair in self.named.get(name, {}).get("figures", {}).items():
            if len(pair) == 2 and pair[0] is not None:
                found[key] = tuple(pair)
        return found

def is_rlhf(run):
    """Whether a run is part of RLHF: a reward model, or a policy whose true objective is logged."""
    return (run.stage not in STAGES.values() or bool(run.rows("step", "reward", "gold"))
            or (run.path / "best_of_n.jsonl").exists())

def is_beyond(run):
    """Whether a run practises the chains of bench/beyond.py, whose kinds are "6 arrows" and so on.
    """
    kinds = run.held_out()
    return bool(kinds) and all(kind.endswith(" arrows") for kind in kinds)

# ---- Pieces of a page ----------------------------------------------------------------------------

def said(text):
    """A sentence with figures → HTML; "" if it is empty."""
    return f"<p>{shown(text)}</p>" if text else ""

def sentence(begin, parts):
    """A beginning and its parts; "" if there is none."""
    return f"{begin}: {'; '.join(parts)}." if parts else ""

def side_by_side(*drawn):
    """Figures, some of which may be empty → HTML."""
    drawn = [one for one in drawn if one]
    return f"<div class=figures>{''.join(drawn)}</div>" if drawn else ""

def texts(title, rows):
    """(label, text) to read → HTML; "" if there is none. #### marks an answer for who checks it,
    and is left out."""
    if not rows:
        return ""
    lines = []
    for label, text in rows:
        if label:
            lines.append(f"<dt>{shown(label)}</dt>")
        lines.append(f"<dd>{shown(text.replace('#### ', ''))}</dd>")
    return f"<h3>{shown(title)}</h3><dl>{''.join(lines)}</dl>"

def table(head, rows):
    """Column names and rows of anything → HTML, "" if there is no row; every cell is escaped."""
    if not rows:
        return ""
    lines = ["".join(f"<th>{shown(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{shown(cell)}</td>" for cell in row) for row in rows]
    return "<div class=wide><table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table></div>"

def folded(title, parts):
    """Parts of HTML that are shown when one asks for them; "" if all are empty."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return f"<details><summary>{shown(title)}</summary>\n{body}\n</details>"

def shortened(text, most=320):
    """The beginning of a text, cut between two words."""
    if len(text) <= most:
        return text
    return text[:most].rpartition(" ")[0] + " …"

def some_steps(steps, most):
    """`most` of a set of steps, the first and the last among them."""
    steps = sorted(steps)
    return {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)}

def with_error(accuracy, n):
    """(accuracy, its standard error), as claims.py computes it; the error is None without an n."""
    from claims import share
    if not n or n < 0 or not 0 <= accuracy <= 1:
        return accuracy, None
    return accuracy, share(accuracy * n, n).error

def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))

# ---- The web and its tokens ----------------------------------------------------------------------

LATER_STEPS = ("tokenize",)         # of the funnel, which keep all of the text

def tell_web(story):
    """How pages became documents, what was dropped, and how some of both begin."""
    funnel = [row for row in story.data.funnel if row["step"] not in LATER_STEPS]
    if not funnel:
        return
    last = funnel[-1]
    yield said(story.claim_said("funnel") or (
        f"{funnel[0]['in']:,} pages were read; {last['kept']:,} documents with "
        f"{last.get('bytes', 0) / 1e6:.2f} MB of text are left."))
    kept = {row["step"].replace("_", " "): {"kept": (row["kept"], None)} for row in funnel}
    dropped = {}
    for row in funnel:
        for why, pages in row.get("dropped", {}).items():
            dropped[why.replace("_", " ")] = {"dropped": (pages, None)}
    most = dict(sorted(dropped.items(), key=lambda pair: -pair[1]["dropped"][0])[:8])
    yield side_by_side(bars("What each filter leaves", kept, unit="pages"),
                       bars("Why most of the others were dropped", most, unit="pages"))
    rows = []
    first = story.data.first_text()
    if first:
        rows.append(("kept", shortened(first)))
    yield texts("Texts to read", rows + dropped_texts(story.data)[:3])

def dropped_texts(data):
    """(reason, how a page begins that was dropped for it), the most frequent reason first."""
    found = []
    for row in data.funnel:
        for why, pages in row.get("dropped", {}).items():
            for sample in data.samples.get(f"{row['step']}: {why}", [])[:1]:
                if sample.get("text"):
                    found.append((pages, f"dropped: {why.replace('_', ' ')}",
                                  shortened(sample["text"], 200)))
    found.sort(key=lambda one: -one[0])
    return [(why, text) for _, why, text in found]

def tell_tokens(story):
    """How many tokens the text became, and a text cut into them."""
    for row in story.data.funnel:
        if row["step"] in LATER_STEPS and row.get("tokens"):
            size = row.get("bytes", 0)
            kinds = f", of {story.data.n_vocab:,} different ones" if story.data.n_vocab else ""
            yield said(f"{size / 1e6:.2f} MB of text became {row['tokens']:,} tokens{kinds}: one "
                       f"for every {size / row['tokens']:.2f} bytes.")
    sizes = {f"{name} tokens" if name.isdecimal() else name: {"bytes": pair}
             for name, pair in story.claim_figures("tokens").items()}
    yield side_by_side(bars("Bytes a token, by size of the vocabulary, on unseen text", sizes,
                            unit="bytes a token"))
    yield cut_text(story.data)

def cut_text(data, most=240):
    """The first document in tokens, each on a ground of its own → HTML."""
    text = data.first_text()[:most].rpartition(" ")[0]
    folder = data.path and Path(data.path, "tokenizer")
    if not text or not folder.is_dir():
        return ""
    from bpe import Tokenizer
    try:
        tokenizer = Tokenizer.load(folder)
    except SystemExit:
        return ""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode_ordinary(text)]
    spans = "".join(f"<span>{shown(piece)}</span>" for piece in pieces)
    return (f"<h3>The first document, cut into {len(pieces)} tokens</h3>"
            f"<p class=tokens>{spans}</p>")

# ---- The base model ------------------------------------------------------------------------------

def tell_base(story):
    """How the loss fell, beside a random guess and beside compressors; CORE beside GPT-2's."""
    for run in story.base:
        yield said(base_sentence(story, run))
    for run in story.base:
        losses = dict(training=run.points("loss"), validation=run.points("val_loss"))
        levels = {}
        for row in run.rows("gzip", "xz"):
            levels = {"gzip -9": row["gzip"], "xz -9e": row["xz"]}
        yield side_by_side(
            curve("Loss", losses, ln_vocab(run), unit="nats a token"),
            curve("Unseen text, compressed", dict(model=run.points("val_bpb")), levels,
                  unit="bits a byte"))
    yield core_figure(story)

def base_sentence(story, run):
    """What the base model is, what it read, and how well it guesses."""
    parts = []
    if is_finite(run.header.get("params")):
        parts.append(f"{run.header['params']:,} parameters")
    if math.isfinite(tokens_read([run])):
        parts.append(f"{tokens_read([run]):,} tokens read")
    losses = run.points("val_loss") or run.points("loss")
    if len(losses) > 1:
        parts.append(f"the loss went from {losses[0][1]:.2f} to {losses[-1][1]:.2f} nats a token")
    for row in run.rows("val_bpb", "gzip", "xz")[-1:]:      # a resumed run may have several
        parts.append(f"unseen text takes {row['val_bpb']:.2f} bits a byte, gzip {row['gzip']:.2f}, "
                     f"xz {row['xz']:.2f}")
    for result in run.results.values():
        if "core" in result:
            parts.append(f"CORE {plus_minus(result, 'core')}, GPT-2 (1,558M) {GPT2_CORE}")
    name = "The model"
    if len(story.base) > 1:
        name = story.label(run)
    return sentence(name, parts)

def core_runs(story):
    """[(run, its result of CORE)]"""
    return [(run, result) for run in story.runs for result in run.results.values()
            if "core" in result]

def core_figure(story):
    """Accuracies on CORE's tasks of which GPT-2's are published, beside GPT-2's."""
    rows = {}
    for label, theirs in GPT2_ACCURACIES.items():
        for run, result in core_runs(story):
            task = result.get("tasks", {}).get(label, {})
            if "accuracy" in task:
                series = rows.setdefault(label, {})
                series[story.label(run)] = with_error(task["accuracy"], task.get("n"))
                series["GPT-2 (1,558M)"] = (theirs, None)
    return side_by_side(bars("Right answers on tasks of CORE", rows))

def tell_writing(story):
    """What the model wrote as it learnt."""
    for run in story.base:
        last = {row["step"]: row["sample"] for row in run.rows("step", "sample")}
        words = {"words": run.points("known_words")}
        yield side_by_side(curve("Of the words it writes, those of the training text", words,
                                 unit="share"))
        steps = some_steps(last, 4) if last else {}
        yield texts("What it wrote, by step of training",
                    [(f"step {step}", shortened(last[step])) for step in sorted(steps)])
    yield texts("Asked a question, it goes on writing", story.claim_texts("no_assistant", 1))

# ---- The assistant -------------------------------------------------------------------------------

def asked(runs):
    """{(name of a file of problems, its hash, longest reply): {run: {kind: task}}}, from eval.json.
    """
    files = {}
    for run in runs:
        for name, result in run.results.items():
            if result.get("kinds"):
                how = result.get("arguments", {})
                key = (Path(name).name, str(how.get("files")), str(how.get("max_new_tokens")))
                files.setdefault(key, {})[run] = result["kinds"]
    return files

def is_about_knowledge(name, answered):
    """Whether a file of problems asks for what is known, or lets the model search."""
    return name.endswith("with search") or any(
        "refused" in task for kinds in answered.values() for task in kinds.values())

def tell_assistant(story):
    """How many held-out problems base model, assistant and reasoner solve, by kind."""
    if not story.sft:
        return
    rows = {}
    for (name, *_), answered in asked(story.runs).items():
        if not is_about_knowledge(name, answered):
            for run, kinds in answered.items():
                for kind, task in kinds.items():
                    rows.setdefault(kind, {})[run.stage] = with_error(task["accuracy"],
                                                                      task.get("n"))
    if not rows:
        for stage, accuracies in logged_accuracies(story.runs).items():
            for kind, accuracy in accuracies.items():
                rows.setdefault(kind, {})[stage] = (accuracy, None)
    yield said(solved_sentence(story))
    first_turns = {kind.replace("_", " "): series for kind, series in rows.items()
                   if not kind.endswith("2nd turn")}
    losses = {story.label(run): run.points("loss") for run in story.sft}
    yield side_by_side(
        bars("Right answers to problems that were never shown, by kind", first_turns),
        curve("Loss on the assistant's words", losses, unit="nats a token"))
    yield texts("Asked, and what came back",
                story.claim_texts("identity", 3) + story.claim_texts("arithmetic", 1)
                + story.claim_texts("letters", 3)[2:])

def solved_sentence(story):
    """How many held-out problems of all kinds each run solves; "" if none was asked."""
    parts = []
    for (name, *_), answered in asked(story.runs).items():
        if not is_about_knowledge(name, answered):
            for run, kinds in answered.items():
                n = sum(task.get("n", 0) for task in kinds.values())
                right = sum(task["accuracy"] * task.get("n", 0) for task in kinds.values())
                if n > 0:
                    parts.append(f"{story.label(run)} solves {right / n:.0%} of {n:,.0f}")
    return sentence("Of problems that were never shown", parts)

# ---- What it knows -------------------------------------------------------------------------------

def tell_knowledge(story):
    """What it says to names that it knows and does not know, and what it looks up. A file of
    problems whose result has "refused" asks for names; one "with search" was asked with --docs."""
    refused = {}
    found = {}
    for (name, *_), answered in asked(story.runs).items():
        for run, kinds in answered.items():
            for kind, task in kinds.items():
                if "refused" in task:
                    refused.setdefault(kind, {})[story.label(run)] = with_error(
                        task["refused"], task.get("n"))
                if name.endswith("with search"):
                    found.setdefault(kind, {})[story.label(run)] = with_error(
                        task["accuracy"], task.get("n"))
    before_after = {}
    for kind, series in refused.items():
        if kind != "known":
            for label, (share, _) in series.items():
                before_after.setdefault(label, []).append(share)
    yield said(sentence("Of names that it does not know, by kind, it says so on average", [
        f"{label} for {sum(shares) / len(shares):.0%}" for label, shares in before_after.items()]))
    yield side_by_side(bars("Says that it does not know, by kind of name", refused),
                       bars("Right after looking it up, by kind of question", found))
    yield texts("Asked, and what came back",
                story.claim_texts("probing", 3) + story.claim_texts("search", 2))

# ---- Reinforcement learning ----------------------------------------------------------------------

VERDICTS = {True: "right", False: "wrong"}

def tell_practice(story):
    """Replies become longer and rewards higher together: that is the thinking which emerges."""
    for run in story.rl:
        lines = {"mean reward of samples": run.points("reward")}
        held_out = held_out_points(run)
        yield said(sentence("Before practice and after it", practice_parts(run)))
        for kind, points in held_out.items():
            lines[f"accuracy on held-out {kind}"] = points
        chance = {f"chance, {kind}": CHANCE[kind] for kind in held_out if kind in CHANCE}
        yield side_by_side(
            curve("Right answers", lines, chance, unit="share"),
            curve("Length of the replies", dict(
                reply=run.points("reply_tokens", "reward"),
                thinking=run.points("thinking_tokens", "reward")), unit="tokens a reply"))
        yield texts("The same problem, by step of practice", answers_by_step(run) or
                    story.claim_texts("discovery", 99)[-2:])

def held_out_points(run):
    """{kind: [(step, accuracy, standard error)]} of held-out problems; the error is 0 in logs that
    do not say how many there were."""
    lines = {}
    for row in run.rows("step", "kind", "accuracy"):
        error = with_error(row["accuracy"], row.get("n"))[1]
        lines.setdefault(row["kind"], []).append((row["step"], row["accuracy"], error or 0))
    return lines

def practice_parts(run):
    """What practice changed, each with its first and its last figure."""
    changes = {f"right on held-out {kind}": (points, ".0%")
               for kind, points in run.held_out().items()}
    changes["mean reward of samples"] = (run.points("reward"), ".2f")
    changes["tokens a reply"] = (run.points("reply_tokens", "reward"), ".0f")
    return [f"{what} {points[0][1]:{form}}, then {points[-1][1]:{form}}"
            for what, (points, form) in changes.items() if len(points) > 1]

def answers_by_step(run, most=4):
    """Replies to the first held-out problems at `most` steps."""
    answers = read_answers(run)
    if not answers:
        return []
    steps = some_steps({row["step"] for row in answers}, most)
    first = sorted({row["question"] for row in answers})[:2]
    rows = []
    for question in first:
        for row in answers:
            if row["question"] == question and row["step"] in steps:
                rows.append((f"{question} · step {row['step']}, {VERDICTS[row['right']]}",
                             shortened(row["reply"], 500)))
    return rows

# ---- Beyond imitation ----------------------------------------------------------------------------

def tell_beyond(story):
    """Chains by their length: the share that is followed before practice and after it, and how long
    the thinking about them became; then how the reply to one of the longest grew."""
    for run in story.beyond:
        right = {}
        for row in run.rows("step", "kind", "accuracy"):
            if row["step"] == 0:
                right[row["kind"]] = {"before": with_error(row["accuracy"], row.get("n"))}
                if "pass_16" in row:
                    right[row["kind"]]["before, in 16 tries"] = with_error(row["pass_16"],
                                                                           row.get("sampled"))
        thinking = {}
        for row in run.rows("step", "kind", "thinking_tokens"):
            thinking.setdefault(row["kind"], []).append((row["step"], row["thinking_tokens"]))
        parts = []
        tests = held_out_points(run)
        for kind, points in tests.items():
            if len(points) > 1:
                right.setdefault(kind, {})["after"] = points[-1][1], points[-1][2] or None
                parts.append(f"{kind} {points[0][1]:.0%}, then {points[-1][1]:.0%}")
        kinds = list(tests)
        yield said(sentence(f"No example was longer than {kinds[0]}. Right answers before practice "
                            "and after it", parts))
        yield said(story.claim_said("beyond"))
        every_second = dict(list(thinking.items())[1::2])       # a figure has four colours
        yield side_by_side(bars("Chains that are followed to their end", right),
                           curve("Length of the thinking", every_second, unit="tokens a reply"))
        yield texts("A long chain, by step of practice", growth_of_a_reply(run))

def growth_of_a_reply(run):
    """Replies by step to the last held-out problem that became right, or to the last one."""
    by_question = {}
    for row in read_answers(run):
        by_question.setdefault(row["question"], []).append(row)
    chosen = list(by_question.values())[-1:]
    for rows in by_question.values():
        if rows[-1]["right"] and not rows[0]["right"]:
            chosen = [rows]
    return [(f"{row['question']} · step {row['step']}, {VERDICTS[row['right']]}",
             shortened(row["reply"], 500)) for rows in chosen for row in rows]

# ---- RLHF ----------------------------------------------------------------------------------------

def tell_rlhf(story):
    """The reward that was followed and the true objective beside it, as far as the policy has gone
    from its start; where the objective turned; and what the replies became."""
    from best_of_n import turning_point, turning_rows
    followed = {}
    for run in story.rlhf:
        rows = [row for row in run.rows("step", "reward", "gold", "kl_reply")
                if all(is_finite(row[key]) for key in ("reward", "gold", "kl_reply"))]
        if rows:
            followed[story.label(run)] = rows
    drawn = []
    parts = []
    for name, rows in followed.items():
        best, last = turning_point(rows)
        parts.append(f"{name}: best for the judge at step {best['step']}, {best['gold']:.2f}; at "
                     f"step {last['step']} {last['gold']:.2f}, and its reward from "
                     f"{rows[0]['reward']:.2f} to {last['reward']:.2f}")
    yield said(sentence("What the judge thinks of the replies (gold), and the reward model",
                        parts))
    yield side_by_side(*reward_figures(story))
    two = list(followed.items())[:2]        # a figure has four colours
    for by, key in (("step", "step"), ("KL in nats a reply", "kl_reply")):
        lines = {}
        for name, rows in two:
            rows = sorted(rows, key=lambda row: row[key])
            for what in ("reward", "gold"):
                lines[f"{name}, {what}"] = [(row[key], row[what]) for row in rows]
        drawn.append(curve("What is followed and what is meant", lines, by=by, unit="score"))
    yield side_by_side(*drawn)
    turns = [(name, *turn) for name, rows in followed.items()
             for turn in turning_rows(turning_point(rows))]
    yield table(("run", "where", "step", "KL", "reward", "gold"), turns)
    yield texts("What it wrote, the farther it went from where it started",
                [reply for run in story.rlhf for reply in replies_by_distance(story, run)])

def replies_by_distance(story, run, most=5):
    """A reply of at most `most` steps, with how far its policy is from where it started."""
    rows = [row for row in run.rows("step", "kl_reply", "replies") if row["replies"]]
    if not rows:
        return []
    steps = some_steps({row["step"] for row in rows}, most)
    found = []
    for row in rows:
        if row["step"] in steps:
            one = row["replies"][0]
            found.append((f"{story.label(run)}, {row['kl_reply']:.1f} nats away: reward "
                          f"{one['reward']:.2f}, gold {one.get('gold', '–')}",
                          shortened(one["reply"])))
    return found

def reward_figures(story):
    """How often the reward model prefers the reply that the judge does, and what the best of n
    replies by its score is worth to the judge."""
    from best_of_n import read_best_of_n
    for run in story.rlhf:
        agrees = [(row["step"], row["accuracy"], row["accuracy_error"])
                  for row in run.rows("step", "accuracy", "accuracy_error")
                  if is_finite(row["accuracy_error"])]
        yield curve("The reward model prefers what the judge prefers", {"unseen pairs": agrees},
                    {"chance": 0.5}, unit="share of pairs")
        best = [tuple(map(float, row)) for row in read_best_of_n(run.path)]
        yield curve("The best of n replies by the reward model", {
            "reward": [(kl, reward) for _, kl, reward, _ in best],
            "gold": [(kl, gold) for _, kl, _, gold in best]}, by="KL in nats a reply",
            unit="score")

# ---- The talk's claims ---------------------------------------------------------------------------

def tell_claims(story):
    """The talk's claims as talk.py measured them; what was asked and checked of each is folded."""
    if not story.claims:
        return
    counts = {}
    for claim in story.claims:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    yield said(f"Of {len(story.claims)} claims: "
               + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".")
    for number, claim in enumerate(story.claims, 1):
        lines = "\n".join([*claim["checks"], *claim["texts"]])
        mark = "shown" if claim["verdict"] == "shown" else "other"
        yield (f"<details class=claim><summary>{number}. {shown(claim['sentence'])} "
               f"<strong class={mark}>{shown(claim['verdict'])}</strong></summary>"
               f"<p>{shown(claim['said'])}</p><pre>{shown(lines)}</pre></details>")

# ---- What it cost --------------------------------------------------------------------------------

def gpu_hour_usd(run):
    """The price of a GPU hour that the run was told, or None."""
    return run.header.get("flags", {}).get("gpu_hour_usd")

def tell_cost(story):
    """Time and money of each stage; beside published runs if CORE was measured."""
    times = {}
    if story.data.funnel:
        times["data"] = sum(row.get("seconds", 0) for row in story.data.funnel)
    for run in story.runs:
        if run.rows("step"):
            times[story.label(run)] = run.seconds
    minutes = {name: {"minutes": (seconds / 60, None)} for name, seconds in times.items()
               if seconds > 0}
    if not minutes:
        return
    yield side_by_side(bars("Time of each stage", minutes, unit="minutes"))
    yield table(*cost_table(story))
    yield said(story.claim_said("cost"))
    if core_runs(story):
        yield published_table(story)

def cost_table(story):
    """(column names, rows): the time at the end of each log. A trainer that logs its cost counts
    every GPU; otherwise the cost is that of one GPU."""
    rows = []
    if story.data.funnel:
        seconds = sum(row.get("seconds", 0) for row in story.data.funnel)
        rows.append(("data", "", f"{duration(seconds)}, summed over workers", ""))
    for run in story.runs:
        steps = max((row["step"] for row in run.rows("step")), default="–")
        rows.append((story.label(run), steps, duration(run.seconds), dollars(run)))
    rows.append(("all runs", "", duration(sum(run.seconds for run in story.runs)), ""))
    return ("", "steps", "h:mm:ss", "cost"), rows

def dollars(run):
    """What a run cost, as text; a dash without a price."""
    price = gpu_hour_usd(run)
    if not price:
        return "–"
    usd = run.seconds / 3600 * price
    for row in run.rows("usd"):
        usd = row["usd"]
    return f"${usd:.2f}"

def published_table(story):
    """Our runs with CORE beside published ones, at the price of a GPU hour that our log has."""
    price = GPU_HOUR_USD
    for run in story.runs:
        price = gpu_hour_usd(run) or price
    rows = []
    for run, result in core_runs(story):
        device = str(run.header.get("device", "–"))
        rows.append((f"this: {story.label(run)}", device, f"{run.seconds / 3600:.2f}", dollars(run),
                     f"{result['core']:.4f}"))
    rows.append(GPT2_COST[:-1])
    for name, hours, core, _ in PUBLISHED:
        rows.append((name, "8×H100", hours, f"${hours * NODE_GPUS * price:.0f}", core))
    sources = "; ".join(f"{name}: {source}" for name, *_, source in [GPT2_COST, *PUBLISHED])
    return (said(f"Beside published runs, whose dollars are at ${price:g} a GPU hour:")
            + table(("run", "on", "hours", "cost", "CORE"), rows)
            + f"<p class=quiet>{shown(sources)}.</p>")

# ---- The chapters --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chapter:
    """tell(story) yields HTML. `talk` is what the talk says, in a sentence of ours; `again` the
    command that shows it again; `missing` what makes the stage if nothing of it is here."""
    name: str
    title: str
    talk: str
    tell: Callable
    again: str
    missing: str

CHAPTERS = [
    Chapter("web", "The web",
            "A model knows only what it has read. So the web is collected page by page, and most "
            "of it is thrown away before a model sees any.",
            tell_web, "python prepare_fineweb.py --source warc {crawl} --out data/inspected "
            "--inspect 3", "name the folder of prepare_fineweb.py with --data"),
    Chapter("tokens", "Tokens",
            "A network reads a row of numbers. Pieces of text that are frequent become one number "
            "each, which makes the row shorter.",
            tell_tokens, 'python bpe.py show "Hello world" --tokenizer {data}/tokenizer',
            "name the folder of shards.py with --data"),
    Chapter("base", "The base model",
            "Pretraining asks for the next token of real documents, millions of times. What is "
            "left in the weights is the text, compressed with losses.",
            tell_base, "python {trained}", "name the run of train_gpt2.py"),
    Chapter("writing", "What it writes",
            "A base model dreams documents. It draws one token after another: noise at first, "
            "English in the end, and never an answer.",
            tell_writing, 'python sample.py --model {base} --prompt "This function" '
            "--num_samples 3", "name the run of train_gpt2.py"),
    Chapter("assistant", "The assistant",
            "The same training on conversations makes it imitate how an assistant answers: who it "
            "is, how it replies, when it asks a tool.",
            tell_assistant, "python sample.py --model {honest} --chat",
            "name the runs of chat_sft.py"),
    Chapter("knowledge", "What it knows, and what it looks up",
            "Weights recall vaguely, and a model makes up what it never knew. It can be taught to "
            "say so, and to look things up.",
            tell_knowledge, "python sample.py --model {honest} --docs {data}",
            "python chat_sft.py probe, then eval.py, measure it"),
    Chapter("reasoner", "The reasoner",
            "No teacher knows which way of thinking suits a model. Practice on problems whose "
            "answers can be checked lets it find out.",
            tell_practice, "python sample.py --model {rl} --chat", "name the run of rl_grpo.py"),
    Chapter("beyond", "Beyond imitation",
            "An imitator is at best as good as whom it imitates. Practice against a check has no "
            "such limit: at Go it found moves that no expert would have played.",
            tell_beyond, "python bench/beyond.py --seeds 0", "python bench/beyond.py --folder "
            "makes its run"),
    Chapter("rlhf", "RLHF",
            "Where nothing can be checked, a model of what people like gives the reward. Followed "
            "for too long, it is gamed: the score rises, and the replies get worse.",
            tell_rlhf, "python demo/rlhf.py --model {honest} --out runs/demo-rlhf",
            "python demo/rlhf.py makes its runs"),
    Chapter("talk", "The talk's claims",
            "Each of its claims is measured on these models, with its standard error. What a model "
            "of this size does not show is said as plainly.",
            tell_claims, "python talk.py --runs {all} --data {data}",
            "python talk.py measures them"),
    Chapter("cost", "What it cost",
            "GPT-2 took a team and a fortune in 2019. The same can now be had for less than a "
            "hundred dollars, most of it for pretraining.",
            tell_cost, "python talk.py cost --runs {all} --data {data}", "no log has a time")]

def chapter(number, told, parts, again):
    """A Chapter and what it told → HTML."""
    body = "\n".join(parts)
    command = f"<pre class=again><code>{shown(again)}</code></pre>" if again else ""
    return (f"<section id={told.name}>\n<h2><span>{number}</span> {shown(told.title)}</h2>\n"
            f"<p class=talk><strong>The talk:</strong> {shown(told.talk)}</p>\n"
            f"{body}\n{command}\n</section>")
