"""
What to look at after each step of the demo, with figures from the files that the step left.

Each function takes the demo's names, of which it reads the folders `data`, `conversations`, `base`,
`sft`, `honest`, `rl`, `rlhf` and `beyond`, and returns lines of text. A figure that is not there is
left out, so that no line says more than a file does.
"""
import gzip
import json
import math
from pathlib import Path

STAGES = dict(base="base", honest="SFT", rl="RL")

# ---- Files ---------------------------------------------------------------------------------------

def read_json(path):
    """The object in a JSON file; {} if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

def read_rows(path, *keys):
    """The rows of a .jsonl file that have all these keys. A line cut short by a kill is no row."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(key in row for key in keys):
            rows.append(row)
    return rows

def one_line(text, width=88):
    """A text on one line: what cannot be shown becomes a space, and the end is cut off."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(text))
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return text[:width - 1] + "…"

# ---- Pretraining ---------------------------------------------------------------------------------

def documents(names):
    """How many pages became documents, what dropped most of the others, and how one begins."""
    rows = read_json(Path(names["data"], "index.json")).get("funnel", [])
    funnel = [row for row in rows if row["step"] not in ("prose", "tokenize")]      # later steps
    if not funnel:
        return []
    kept = funnel[-1]
    lines = [f"{funnel[0]['in']} pages became {kept['kept']} documents of "
             f"{kept.get('bytes', 0) / 1e6:.2f} MB of text."]
    dropped = [(n, f"{row['step']} {n} ({reason})")
               for row in funnel for reason, n in row.get("dropped", {}).items()]
    if dropped:
        most = [text for _, text in sorted(dropped, reverse=True)[:3]]
        lines.append(f"Most were dropped by {', '.join(most)}.")
    return lines + [f"One begins: {text}" for text in first_text(names, "documents")]

def first_text(names, folder):
    """The beginning of the first training document in a folder of the data, as a list, which is
    empty if there is none."""
    for path in sorted(Path(names["data"], folder).glob("train*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [one_line(json.loads(file.readline())["text"])]
    return []

def sentences(names):
    """How much of the text is prose, and a line of it."""
    funnel = read_json(Path(names["data"], "index.json")).get("funnel", [])
    n_bytes = {row["step"]: row.get("bytes", 0) for row in funnel}
    if not n_bytes.get("pii") or "prose" not in n_bytes:
        return []
    lines = [f"{n_bytes['prose'] / 1e6:.2f} MB of the {n_bytes['pii'] / 1e6:.2f} MB are sentences. "
             "The documents stay whole for what comes later."]
    return lines + [f"What one document keeps: {text}" for text in first_text(names, "prose")]

def tokens(names):
    """What the text has become."""
    index = read_json(Path(names["data"], "index.json"))
    n_tokens = sum(shard["tokens"] for shard in index.get("shards", []))
    n_bytes = sum(shard["bytes"] for shard in index.get("shards", []))
    if not n_tokens:
        return []
    return [f"{n_bytes:,} bytes became {n_tokens:,} tokens, {n_bytes / n_tokens:.2f} bytes each, "
            f"out of {index['tokenizer']['n_vocab']} different ones.",
            "The marks | above show where a token ends. The model sees the numbers below them, "
            "never the letters."]

def pretraining(names):
    """The fall of the loss, and what the model wrote on the way."""
    log = Path(names["base"], "log.jsonl")
    losses = read_rows(log, "val_loss", "step")
    lines = []
    if losses:
        V = read_json(Path(names["base"], "config.json")).get("vocab_size", 1)
        lines.append(f"On unseen text the loss fell from {losses[0]['val_loss']:.2f} to "
                     f"{losses[-1]['val_loss']:.2f}; all {V} tokens equally likely would be "
                     f"ln {V} = {math.log(V):.2f}.")
    for row in read_rows(log, "val_bpb", "gzip", "xz")[-1:]:
        lines.append(f"A model that predicts well compresses well: it needs {row['val_bpb']:.2f} "
                     f"bits a byte, gzip {row['gzip']:.2f}, xz {row['xz']:.2f}.")
    samples = {}
    for row in read_rows(log, "sample", "step"):
        samples.setdefault(row["step"], row["sample"])
    known = {row["step"]: row["known_words"] for row in read_rows(log, "known_words", "step")}
    if samples:
        lines.append("From noise towards English, what it wrote by step, and how many of its words "
                     "are real:")
    for step, text in samples.items():
        share = "    "
        if step in known:
            share = f"{known[step]:4.0%}"
        lines.append(f"{step:6d} {share}  {one_line(text, 83)}")
    return lines

RECITED = ("If this is a function, the weight of an edge is the value returned by the function. "
           "The function must accept exactly three positional arguments")

def writing(names):
    """What the samples show, and how a passage goes on in the training text. Whether the model
    recites it is for the reader to compare."""
    times = 0
    for path in sorted(Path(names["data"], "prose").glob("train*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            times += file.read().count(RECITED)
    lines = ["The same beginning was continued in different ways, because each token is drawn."]
    if times:
        lines.append("Does it recite what it has read often? Compare the second text with its "
                     f"source, which the training text has {times} times:")
        lines.append(f'"{RECITED} …"')
    return [*lines,
            "The bars are the probabilities that it was drawn from; ← marks the token."]

# ---- Conversations and practice ------------------------------------------------------------------

def plain(content):
    """The text of a message, which may be in parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)

def fine_tuning(names):
    """A conversation that was learnt, and the fall of the loss."""
    lines = []
    for row in read_rows(Path(names["conversations"], "identity.jsonl"), "messages")[:1]:
        said = [f"{message['role']}: {plain(message['content'])}" for message in row["messages"]]
        lines.append(f"One of the conversations: {one_line(' / '.join(said))}")
    losses = read_rows(Path(names["sft"], "log.jsonl"), "loss", "step")
    if losses:
        lines.append(f"The loss on the assistant's words fell from {losses[0]['loss']:.2f} to "
                     f"{losses[-1]['loss']:.2f} in {losses[-1]['step']} steps.")
    return lines

def results_of(names, run, problems):
    """{kind: figures} that eval.py measured of a run on a file of problems, with or without
    search."""
    for tasks, result in read_json(Path(names[run], "eval.json")).items():
        if Path(tasks.removesuffix(" with search")).name == problems:
            return result.get("kinds", {})
    return {}

def knowledge(names):
    """Replies about known and unknown subjects before and after: right, wrong, refused."""
    lines = []
    for run, when in (("sft", "before"), ("honest", "after")):
        for kind, task in results_of(names, run, "probe_held_out.jsonl").items():
            if "wrong" not in task:
                continue
            right = max(0.0, 1 - task["wrong"] - task["refused"])
            lines.append(f"{when:8s}{kind:17s}right {right:6.1%}   wrong {task['wrong']:6.1%}   "
                         f"refused {task['refused']:6.1%}")
    return lines

def lookups(names):
    """How many names it looked up rightly."""
    lines = []
    for kind, task in results_of(names, "honest", "held_out_search.jsonl").items():
        lines.append(f"{kind}: {task['accuracy']:.1%} of {task['n']} answers are right")
    return lines

def practice(names):
    """The rise of the reward and the length of replies, then of held-out accuracy."""
    log = Path(names["rl"], "log.jsonl")
    rewards = read_rows(log, "reward", "reply_tokens", "step")
    lines = []
    if rewards:
        first = rewards[0]
        last = rewards[-1]
        lines.append(f"The reward went from {first['reward']:.2f} to {last['reward']:.2f}, and the "
                     f"length of a reply from {first['reply_tokens']:.0f} to "
                     f"{last['reply_tokens']:.0f} tokens: tokens are its time to think.")
    by_kind = {}
    for row in read_rows(log, "kind", "accuracy", "step"):
        by_kind.setdefault(row["kind"], []).append(row["accuracy"])
    for kind, accuracies in by_kind.items():
        lines.append(f"On {kind} that it never saw, {accuracies[0]:.1%} of the answers were right "
                     f"before, and {accuracies[-1]:.1%} are right now.")
    others = [row["others"] for row in read_rows(log, "others", "step")]
    if len(others) > 1:
        before, after = (sum(shares.values()) / len(shares) for shares in (others[0], others[-1]))
        lines.append(f"Of what it did not practise, {before:.1%} was right before, and "
                     f"{after:.1%} is right now: supervised conversations keep it.")
    return lines + grown_answer(names["rl"])

def grown_answer(run):
    """The last held-out problem that became right, as it was answered by step."""
    answers = {}
    for row in read_rows(Path(run, "answers.jsonl"), "step", "question", "reply", "right"):
        answers.setdefault(row["question"], []).append(row)
    for question, rows in reversed(answers.items()):
        if rows[-1]["right"] and not rows[0]["right"]:
            return [f"How its answer to one problem grew, by step: {one_line(question, 60)}",
                    *(f"{row['step']:6d}  {one_line(row['reply'], 88)}" for row in rows)]
    return []

def beyond(names):
    """Right answers by length of the chain, before practice and after, and how a reply grew."""
    run = Path(names["beyond"], "seed_0", "rl")
    tests = {}
    for row in read_rows(run / "log.jsonl", "kind", "accuracy"):
        tests.setdefault(row["kind"], []).append(row)
    lines = []
    for kind, rows in tests.items():
        lines.append(f"{kind:10s} right before {rows[0]['accuracy']:6.1%} (of 16 tries one: "
                     f"{rows[0].get('pass_16', 0):6.1%})   after {rows[-1]['accuracy']:6.1%}")
    return lines + grown_answer(run)

def pleasing(names):
    """Without the KL term, with it, and stopped at a KL: the stand-in's reward and the judge's own
    opinion at the start, where the judge liked the replies best, and at the end; and what was
    written on the way."""
    lines = []
    for run, when in (("without-kl", "without a KL term"), ("with-kl", "with a KL term"),
                      ("stopped", "stopped in time")):
        log = Path(names["rlhf"], run, "log.jsonl")
        rows = read_rows(log, "step", "reward", "gold", "kl_reply")
        if not rows:
            continue
        best = max(rows, key=lambda row: row["gold"])
        away = f"{best['kl_reply']:.1f} nats away"
        rewards = " → ".join(f"{row['reward']:.2f}" for row in (rows[0], best, rows[-1]))
        golds = " → ".join(f"{row['gold']:.2f}" for row in (rows[0], best, rows[-1]))
        lines.append(f"{when:18s} at the start, in step {best['step']} ({away}), and at the end: "
                     f"the stand-in gives {rewards}, the judge {golds}")
    written = []
    for row in read_rows(Path(names["rlhf"], "without-kl", "log.jsonl"), "replies", "kl_reply"):
        for one in row["replies"][:1]:
            written.append(f"{row['kl_reply']:6.1f} nats  stand-in {one['reward']:5.2f}, judge "
                           f"{one['gold']:5.2f}: {one_line(one['reply'], 60)}")
    if written:
        lines.append("What it writes without a KL term, the farther it goes from its start:")
    return lines + written

def held_out(names):
    """A table of accuracies: a row a kind of problem, a column a model."""
    file = str(Path(names["conversations"], "held_out.jsonl"))
    columns = {}
    for stage, name in STAGES.items():
        results = read_json(Path(names[stage], "eval.json"))
        found = {str(Path(tasks)): result for tasks, result in results.items()}
        columns[name] = dict(found.get(file, {}).get("kinds", {}),
                             **results_of(names, stage, "held_out_search.jsonl"))
    kinds = sorted({kind for column in columns.values() for kind in column})
    if not kinds:
        return []
    lines = [f"{'right answers':16s}" + "".join(f"{name:>9s}" for name in columns)]
    for kind in kinds:
        line = f"{kind:16s}"
        for column in columns.values():
            cell = "-"
            if kind in column:
                cell = f"{column[kind]['accuracy']:.1%}"
            line += f"{cell:>9s}"
        lines.append(line)
    return lines

def claims(names):
    """How many of the talk's claims the models show, and the sentences of the others."""
    found = read_json(Path(names["rl"], "talk.json")).get("claims", [])
    lines = []
    for verdict in ("shown", "partly shown", "not at this size", "not measured"):
        of_verdict = [claim for claim in found if claim["verdict"] == verdict]
        if of_verdict:
            lines.append(f"{verdict}: {len(of_verdict)} of {len(found)} claims")
        if verdict != "shown":
            lines += [f"  {claim['sentence']}" for claim in of_verdict]
    return lines
