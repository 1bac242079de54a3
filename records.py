"""
What runs left on disk, each file checked before it is shown, and what it says of the demo's
promises.

    >>> misfit({"step": "one"}, {"step": is_finite, "loss?": is_finite}, "row 1")
    'row 1, step'

    in:  <run>/config.json, log.jsonl, eval.json, talk.json; <data>/index.json
    out: Run, Data, accuracies by stage, verdicts

A file that does not look like what the stages write ends in one line that names the place.
"""
import gzip
import json
import math
import zlib
from pathlib import Path

from problems import STAGES, printable, read_json, read_lines, reason

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

class Data:
    """A folder of prepare_fineweb.py: its index.json, and what it holds. Without a folder, or
    without an index, all is empty."""

    def __init__(self, path=None):
        self.path = path and Path(path)
        index = {}
        if path:
            index = read_checked(self.path / "index.json", INDEX)
        self.funnel = index.get("funnel", [])       # a row for each step
        self.samples = index.get("samples", {})     # "step: reason": pages that ended so
        self.settings = index.get("settings", {})   # flags of prepare_fineweb.py
        self.n_vocab = index.get("tokenizer", {}).get("n_vocab")
        self.texts = index.get("prose") or index.get("documents", [])

    def first_text(self):
        """The first training document, as the model reads it; "" if it cannot be read."""
        for row in self.texts:
            if row.get("split") == "train":
                try:
                    with gzip.open(self.path / row["file"], "rt", encoding="utf-8") as lines:
                        return str(json.loads(next(lines))["text"])
                except (OSError, ValueError, LookupError, TypeError, EOFError, StopIteration,
                        zlib.error, RecursionError):
                    return ""
        return ""

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
              "flagged?": {ANY: is_finite}, "tokens?": is_finite}
CONFIG = {"vocab_size?": is_size, "deepdive?": {"stage?": is_text}}
INDEX = {"funnel?": [FUNNEL_ROW], "samples?": {ANY: [{"text?": is_text}]},
         "tokenizer?": {"n_vocab?": is_finite},
         "settings?": {"quality?": is_text, "extractor?": is_text},
         **dict.fromkeys(("documents?", "prose?"), [{"file": is_text, "split?": is_text}])}
SHARES = {"accuracy": is_finite, "accuracy_error?": is_finite, "n?": is_finite,
          "refused?": is_finite, "wrong?": is_finite}
TASK = {"accuracy?": is_finite, "accuracy_error?": is_finite, "centered?": is_finite,
        "n?": is_finite, "contaminated?": is_finite, "clean_accuracy?": is_finite}
RESULT = {"left_out?": [is_text], "arguments?": {}, "kinds?": {ANY: SHARES}, "core?": is_finite,
          "tasks?": {ANY: TASK}}
LOG_ROW = {"step?": is_finite, "seconds?": is_finite, "loss?": is_number, "val_loss?": is_number,
           "val_bpb?": is_number, "known_words?": is_number, "gzip?": is_finite, "xz?": is_finite,
           "reward?": is_number, "reply_tokens?": is_number, "usd?": is_finite, "sample?": is_text,
           "kind?": is_text, "when?": is_text, "accuracy?": is_finite, "n?": is_finite,
           "accuracy_error?": is_number, "others?": {ANY: is_finite},
           "thinking_tokens?": is_number, "pass_16?": is_finite, "sampled?": is_finite,
           "gold?": is_number, "kl_reply?": is_number,
           "replies?": [{"reply": is_text, "reward": is_finite, "gold?": is_finite}],
           "header?": {"flags?": {"gpu_hour_usd?": is_number_or_none,
                                  "total_batch_size?": is_number_or_none}}}
ANSWER = {"step": is_finite, "question": is_text, "reply": is_text, "right": is_right}
SFT_ROW = {**LOG_ROW, "accuracy?": {ANY: is_finite}}
FIGURE = [is_number_or_none]        # a number and its standard error
CLAIMS = {"claims?": [{"name": is_text, "sentence": is_text, "verdict": is_text, "said": is_text,
                       "checks": [is_text], "texts": [is_text], "figures?": {ANY: FIGURE}}]}

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

def read_claims(run):
    """The claims in <run>/talk.json, in the talk's order; [] if there is no such file."""
    return read_checked(run.path / "talk.json", CLAIMS).get("claims", [])

def read_answers(run):
    """The rows of <run>/answers.jsonl, replies to held-out problems by step; [] without it."""
    path = run.path / "answers.jsonl"
    if not path.exists():
        return []
    return read_lines(path, as_answer, "delete the file")

def read_checked_log(run):
    """The rows of <run>/log.jsonl."""
    from training import read_log
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

def eval_accuracies(runs, key="accuracy"):
    """{source: {stage: {kind: accuracy}}} from eval.json, or another figure of a kind. The hash of
    the problems is a part of the source's name, so that accuracies on different problems are never
    compared."""
    sources = {}
    for run in runs:
        for name, result in run.results.items():
            if "kinds" not in result:
                continue
            asked = result.get("arguments", {})
            source = (f"eval.json: {result.get('n')} of {Path(name).name} (hash "
                      f"{asked.get('files')}), replies of {asked.get('max_new_tokens')} tokens at "
                      "most")
            shares = {kind: task[key] for kind, task in result["kinds"].items() if key in task}
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

def ln_vocab(run):
    """The level of a model that finds all tokens equally likely, where training starts."""
    V = run.config.get("vocab_size")
    if not V:
        return {}
    return {f"random guess, ln {V} =": math.log(V)}
