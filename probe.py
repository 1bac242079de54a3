"""
What a model does not know: ask, judge, and teach it to say so.

    python probe.py --model runs/demo-sft --data data/demo \
        --also data/demo/chat/functions.jsonl --out data/demo/chat/probe.jsonl
    python probe.py --model runs/d24-sft --data data/fineweb --out data/probe.jsonl \
        --judge http://127.0.0.1:8000/v1 --judge_model NAME     # or: chat_sft.py probe

    in:  an assistant's run; documents
    out: FILE.jsonl  conversations for chat_sft.py; FILE_held_out.jsonl  problems for eval.py;
         FILE_replies.jsonl  what was asked and replied, from which a stopped command continues

A model that was only taught right answers learns that every question has one, and makes one up
where it knows nothing. The cure is data. Questions whose answers the documents tell are asked
several times. Where the model is right more often than not, the conversation keeps the right
answer. Where it is always wrong, the conversation says "I don't know." in one of several wordings.
Names that do not exist are unknown without asking. Near misses are among them, half known and half
not, because otherwise the model refuses by the look of a name.

Papers: the interrogation of Llama 3 (arXiv 2407.21783, section 4.3.6), R-Tuning (2311.09677).
Differs from the papers: without --judge, the questions are templates over documented functions, and
a reply is right if it shares enough words with the documentation.
"""
import argparse
import hashlib
import itertools
import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from model import load_checkpoint
from problems import is_correct, read_lines, write_whole
from sample import Engine, check_at_least, choose_device, find_run, load_tokenizer, quiet_end
from subjects import (ASKED, ASKED_IN_TEST, DONT_KNOW, documented, is_held_out, made_up,
                      recombined)

BATCH = 32          # questions that are asked together
REPLY_TOKENS = 48   # tokens in a reply, at most
WORDINGS = 16       # of a question whose answer is known
MIN_CHARS = 80      # in a passage about which a question can be written

# ---- Questions with known answers ----------------------------------------------------------------

def draw_subjects(folder, count, n_held_out, max_chars, rng):
    """→ (questions about `count` subjects and about n_held_out held-out ones, all names of the
    documents). A question is a dict (name, question, answer, is_held_out)."""
    from search import read_passages
    passages = itertools.chain.from_iterable(read_passages([folder], max_chars))
    subjects = documented(passages)
    questions = []
    for held_out, n in ((False, count), (True, n_held_out)):
        names = [name for name in subjects if is_held_out(name) == held_out]
        for name in rng.sample(names, min(n, len(names))):
            questions.append(dict(name=name, question=rng.choice(ASKED).format(f=name),
                                  answer=subjects[name][0], is_held_out=held_out))
    if not questions:
        raise SystemExit(f"--data {folder}: its documents describe no function in a short sentence "
                         "(subjects.py: DOCUMENTED); let a chat model write the questions: --judge")
    return questions, set(subjects)

def draw_passages(folder, count, n_held_out, max_chars, rng):
    """The same from any documents: passages about which the judge will write the questions."""
    from search import read_passages
    passages = itertools.chain.from_iterable(read_passages([folder], max_chars))
    long_enough = [passage for passage in passages if len(passage) >= MIN_CHARS]
    drawn = rng.sample(long_enough, min(count + n_held_out, len(long_enough)))
    if not drawn:
        raise SystemExit(f"--data {folder} has no passage of at least {MIN_CHARS} characters")
    n_held_out = min(n_held_out, len(drawn) // 5)
    return [dict(passage=passage, is_held_out=i < n_held_out)
            for i, passage in enumerate(drawn)], set()

def asked_also(path, names):
    """The questions of a file of conversations, one for each name, with the answers given there. A
    name is one of `names` and a word of the question."""
    found = {}
    for messages in read_lines(path, lambda row: row["messages"],
                               "--also takes conversations as chat_sft.py does"):
        question = messages[0]["content"]
        answer = messages[-1]["content"]
        if len(messages) == 2 and isinstance(answer, str):
            for word in re.findall(r"\w+(?:\.\w+)*", question):
                if word in names:
                    found.setdefault(word, dict(name=word, question=question, answer=answer,
                                                is_held_out=False))
    return list(found.values())

# ---- Judges --------------------------------------------------------------------------------------

class WordJudge:
    """A reply is right if it shares enough of its words with the answer."""

    def complete(self, question):
        """A drawn question → itself, ready to be asked."""
        return question

    def is_right(self, question, reply):
        return is_correct(reply, dict(answer=question["answer"], check="overlap"))

WRITE_QUESTION = """Read this text:

{passage}

Write one short question that this text answers, about something the text names. Reply with one
line of JSON and nothing else: {{"subject": the name, "question": …, "answer": a short answer}}"""

IS_RIGHT = """Question: {question}
Right answer: {answer}
A student's answer: {reply}

Does the student's answer agree with the right answer? Reply with yes or no."""

class ChatJudge:
    """A chat model at an OpenAI-compatible URL, which writes the questions and judges the replies.
    """

    def __init__(self, url, model):
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model = model

    def reply(self, prompt, tries=4):
        """What the model replies. Raises SystemExit if the server does not answer, after some
        seconds of trying."""
        import requests
        message = dict(role="user", content=prompt)
        for number in range(tries):
            if number:
                time.sleep(2 ** number)
            try:
                answer = requests.post(self.url, timeout=120, json=dict(
                    model=self.model, messages=[message], temperature=0))
                answer.raise_for_status()
                return answer.json()["choices"][0]["message"]["content"] or ""
            except (requests.RequestException, ValueError, LookupError, TypeError) as error:
                failure = f"{type(error).__name__}: {error}"
        raise SystemExit(f"--judge {self.url} does not answer as OpenAI's chat completions do: "
                         f"{failure}; start the server, then give the same command again")

    def complete(self, question):
        """A drawn passage → a question about it; None if the model does not write one."""
        text = self.reply(WRITE_QUESTION.format(passage=question["passage"]))
        found = re.search(r"\{.*\}", text, re.S)
        try:
            row = json.loads(found[0])
            name, asked, answer = row["subject"], row["question"], row["answer"]
            if name in asked and name and answer:
                return dict(name=name, question=asked, answer=answer,
                            is_held_out=question["is_held_out"])
        except (ValueError, LookupError, TypeError):
            pass
        return None

    def is_right(self, question, reply):
        said = self.reply(IS_RIGHT.format(reply=reply, **question))
        return said.strip().lower().startswith("yes")

# ---- Asking --------------------------------------------------------------------------------------

def ask(engine, questions, k, temperature, seed):
    """Asks each question k times → a list of k replies for each."""
    prompts = []
    for question in questions:
        message = dict(role="user", content=question["question"])
        prompts.append(engine.tokenizer.render([message], for_completion=True)[0])
    completions = engine.generate(prompts, max_new_tokens=REPLY_TOKENS, num_samples=k,
                                  temperature=temperature, seed=seed)
    replies = [engine.reply_text(completion) for completion in completions]
    return [replies[i:i + k] for i in range(0, len(replies), k)]

def probe(engine, drawn, judge, args, path, settings):
    """Asks and judges → a row for each drawn question: the question with its replies, and `right`,
    how many of them are; or {} where the judge wrote no question.

    Each batch is written to `path` as it is done, after a line of the settings, and a later call
    with the same settings continues there. The seed of a batch depends on its place, so that it
    does not matter where a command was stopped.
    """
    rows = finished_rows(path, settings, len(drawn))
    if not rows:
        write_whole(path, (json.dumps(settings) + "\n").encode())
    started = time.perf_counter()
    first = len(rows)
    while len(rows) < len(drawn):
        completed = [judge.complete(question) for question in drawn[len(rows):len(rows) + BATCH]]
        questions = [question for question in completed if question]
        replies = iter(ask(engine, questions, args.k, args.temperature, args.seed + len(rows)))
        batch = []
        for question in completed:
            row = {}
            if question:
                row = dict(question, replies=next(replies))
                row["right"] = sum(1 for r in row["replies"] if judge.is_right(question, r))
            batch.append(row)
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in batch))
        rows += batch
        seconds = (time.perf_counter() - started) / (len(rows) - first)
        right = sum(row.get("right", 0) for row in rows)
        print(f"asked {len(rows)}/{len(drawn)} | right {right} of {args.k * len(rows)} replies | "
              f"eta {seconds * (len(drawn) - len(rows)):.0f} s", flush=True)
    return rows

def finished_rows(path, settings, n_drawn):
    """The rows of whole batches that an earlier command with these settings left in the file; what
    comes after them is cut off."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]     # a line that was not finished has no end
    if not lines or lines[0] != json.dumps(settings).encode():
        return []
    whole = len(lines) - 1
    if whole < n_drawn:
        whole -= whole % BATCH
    kept = lines[:1 + whole]
    write_whole(path, b"".join(line + b"\n" for line in kept))
    return [json.loads(line) for line in kept[1:]]

# ---- Verdicts → conversations and problems -------------------------------------------------------

def verdict(row, k):
    """known: right more often than not; unknown: always wrong; else unclear."""
    if 2 * row["right"] > k:
        return "known"
    return "unclear" if row["right"] else "unknown"

def invent(known, unknown, taken, count, rng):
    """{kind: names that do not exist}, about `count` in all. Half of them are near misses of known
    names, if there are any."""
    n_near = count // 4 if known else 0
    n_far = (count - count // 8 - 2 * n_near) // 2
    unknown = unknown or known
    kinds = {
        "known module": recombined(rng.choices(known or unknown, k=n_near), unknown, rng),
        "known last name": recombined(rng.choices(unknown, k=n_near), known or unknown, rng),
        "recombined": recombined(rng.choices(unknown, k=n_far), unknown, rng),
        "made up": made_up(rng.choices(unknown, k=n_far), rng),
        "capitalised": made_up(["Ares Base"] * (count // 8), rng)}
    for kind, names in kinds.items():
        kinds[kind] = [name for name in dict.fromkeys(names) if name not in taken]
    return kinds

def wordings(row):
    """A question in all wordings, if it was made from one of them; else as it is."""
    templates = [asked.format(f=row["name"]) for asked in ASKED]
    if row["question"] in templates:
        return templates
    return [row["question"]]

def conversation(question, answer):
    return dict(messages=[dict(role="user", content=question),
                          dict(role="assistant", content=answer)])

def conversations(rows, invented, k, rng):
    """Judged questions and invented names → conversations. What is known comes in several wordings,
    or else the model would refuse by the wording. An invented name takes the place of the name in
    one of the questions."""
    made = []
    for row in rows:
        if verdict(row, k) == "known":
            several = wordings(row)
            for wording in rng.sample(several, min(WORDINGS, len(several))):
                made.append(conversation(wording, row["answer"]))
        elif verdict(row, k) == "unknown":
            refusal = rng.choice(DONT_KNOW).format(f=row["name"])
            made.append(conversation(row["question"], refusal))
    for names in invented.values():
        for name in names:
            row = rng.choice(rows)
            refusal = rng.choice(DONT_KNOW).format(f=name)
            made.append(conversation(row["question"].replace(row["name"], name), refusal))
    rng.shuffle(made)
    return made

def problems(kind, rows, rng):
    """Judged questions → problems, where templates are in wordings that are never taught."""
    for row in rows:
        question = row["question"]
        if len(wordings(row)) > 1:
            question = rng.choice(ASKED_IN_TEST).format(f=row["name"])
        yield dict(question=question, kind=kind, answer=row["answer"],
                   check=row.get("check", "overlap"))

def held_out_problems(rows, known, invented, k, rng):
    """Problems about known subjects, about held-out ones, and about invented names, for which the
    right reply is that one does not know."""
    made = list(problems("known", known, rng))
    for row in rows:
        made += problems(verdict(row, k), [row], rng)
    for kind, names in invented.items():
        for name in names:
            row = rng.choice(rows)
            question = row["question"].replace(row["name"], name)
            made += problems(kind, [dict(name=name, question=question, answer=DONT_KNOW[0],
                                         check="declines")], rng)
    return made

# ---- Main ----------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(prog="chat_sft.py probe",
                                     description="find out what a model does not know")
    add = parser.add_argument
    add("--model", help="run folder of an assistant (default: the newest one)")
    add("--data", required=True, help="folder of documents")
    add("--also", help="conversations of one question each, to ask as well")
    add("--out", required=True, help="FILE.jsonl for the conversations")
    add("--subjects", type=int, default=300, help="subjects of the documents to ask about")
    add("--invented", type=int, default=400, help="invented names to add")
    add("--held_out", type=int, default=60, help="subjects, and invented names of each kind, to "
        "test with")
    add("--k", type=int, default=3, help="how often each question is asked")
    add("--temperature", type=float, default=1.0, help="of the replies")
    add("--max_chars", type=int, default=1000, help="characters in a passage")
    add("--judge", help="URL of an OpenAI-compatible server, whose model writes the questions and "
        "judges")
    add("--judge_model", default="default", help="name of the model at that server")
    add("--seed", type=int, default=1337, help="seed of the subjects and of the replies")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    check_at_least(1, args, "subjects", "held_out", "k", "max_chars")
    check_at_least(0, args, "invented", "temperature", "seed")
    if not args.out.endswith(".jsonl"):
        raise SystemExit(f"--out must end in .jsonl, got {args.out}")
    return args

def weights_of(run):
    """12 hex digits that change with the weights of a run."""
    digests = []
    for path in sorted(Path(run).glob("model*.safetensors")):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]

def write_rows(path, rows):
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{path}: {len(rows)} rows")

def main():
    args = parse_args()
    stem = args.out.removesuffix(".jsonl")
    run = find_run(args.model, ("sft", "rl"))
    rng = random.Random(args.seed)
    judge = WordJudge()
    draw = draw_subjects
    if args.judge:
        judge = ChatJudge(args.judge, args.judge_model)
        draw = draw_passages
    drawn, taken = draw(args.data, args.subjects, args.held_out, args.max_chars, rng)
    if args.also:
        drawn += asked_also(args.also, taken)
    tokenizer = load_tokenizer(run)
    model, meta = load_checkpoint(run, choose_device(args.device), tokenizer.n_vocab)
    print(f"{run}: stage {meta['stage']}, step {meta['step']}; {len(drawn)} questions, asked "
          f"{args.k} times each", flush=True)
    engine = Engine(model.for_inference(), tokenizer)
    settings = dict(weights=weights_of(run), k=args.k, temperature=args.temperature,
                    seed=args.seed, judge=args.judge, judge_model=args.judge_model,
                    drawn=hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12])
    rows = probe(engine, drawn, judge, args, Path(f"{stem}_replies.jsonl"), settings)

    rows = [row for row in rows if row]
    taught = [row for row in rows if not row["is_held_out"]]
    tested = [row for row in rows if row["is_held_out"]]
    if not taught or not tested:
        raise SystemExit(f"of {len(drawn)} questions, {len(taught)} are left to teach and "
                         f"{len(tested)} to test with; give more --subjects and --held_out"
                         + (", or another --judge" if args.judge else ""))
    known = [row for row in taught if verdict(row, args.k) == "known"]
    known_names = [row["name"] for row in known]
    taken |= {row["name"] for row in rows}
    others = [row["name"] for row in taught if verdict(row, args.k) != "known"]
    invented = invent(known_names, others, taken, args.invented, rng)
    taken.update(*invented.values())
    counts = Counter(verdict(row, args.k) for row in taught)
    print(" | ".join(f"{kind} {n}" for kind, n in counts.items()), "|",
          " | ".join(f"{kind} {len(names)}" for kind, names in invented.items()))
    write_rows(args.out, conversations(taught, invented, args.k, rng))
    never_seen = invent(known_names, [row["name"] for row in tested], taken, 4 * args.held_out, rng)
    write_rows(f"{stem}_held_out.jsonl",
               held_out_problems(tested, known, never_seen, args.k, rng))

if __name__ == "__main__":
    with quiet_end():
        main()
