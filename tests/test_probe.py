"""
probe.py with a scripted assistant that knows some subjects and makes up the rest, a judge on a
small server of this process, and commands that are stopped; subjects.py's invented names.
"""
import doctest
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import problems
import probe
import report
import subjects
from conftest import run_main
from eval import solve
from problems import share_of

ANSWER = "Return the {n}th part of the whole list."


def name_of(n):
    return f"pack{n % 7}.mod{n % 5}.part{n}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of documents with 90 subjects."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "documents").mkdir()
    rows = [dict(text=f"{name_of(n)}(x)\n{ANSWER.format(n=n)}\n\nMore of it.") for n in range(90)]
    (folder / "documents" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


class Assistant:
    """In place of an engine: it is right about the subjects with the numbers `known`, in every
    second reply about those in `half`, and makes up the rest."""

    def __init__(self, tokenizer, known=(), half=()):
        self.tokenizer, self.known, self.half = tokenizer, known, half
        self.asked = []

    def generate(self, prompts, num_samples=1, **sampling):
        texts = []
        for prompt in prompts:
            question = self.tokenizer.parse(prompt)[0]["content"]
            self.asked.append(question)
            n = int((re.search(r"pack\d+\.mod\d+\.part(\d+)", question) or [0, -1])[1])
            for i in range(num_samples):
                right = n in self.known or n in self.half and i % 2
                texts.append(ANSWER.format(n=n) if right else "Sing a song about ducks.")
        return texts

    def reply_text(self, text):
        return text

    def for_inference(self):
        return self


def run_probe(monkeypatch, engine, sft_run, data, out, *flags):
    """Runs `chat_sft.py probe` with this engine → {question: answer}."""
    monkeypatch.setattr(probe, "Engine", lambda model, tokenizer: engine)
    run_main(probe, "--model", sft_run, "--data", data, "--out", out, "--subjects", 200,
             "--held_out", 10, "--invented", 80, "--k", 4, *flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}


def number(question):
    return int((re.search(r"pack\d+\.mod\d+\.part(\d+)", question) or [0, -1])[1])


KNOWN = range(0, 90, 3)
HALF = range(1, 90, 3)


def test_what_is_known_keeps_its_answer_and_what_is_always_wrong_is_refused(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    engine = Assistant(tokenizer, KNOWN, HALF)
    taught = run_probe(monkeypatch, engine, sft_run, data, tmp_path / "p.jsonl")
    names = {name_of(n): n for n in range(90) if not subjects.is_held_out(name_of(n))}
    for question, answer in taught.items():
        n = next((names[name] for name in names if f"{name}" in re.findall(r"[\w.]*\w", question)),
                 None)
        if n in KNOWN:
            assert answer == ANSWER.format(n=n)
        else:
            assert n not in HALF and problems.declines(answer), question
    assert len(set(answer for answer in taught.values() if problems.declines(answer))) > 5


def test_known_subjects_are_taught_in_several_wordings_and_held_out_ones_in_none(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    taught = run_probe(monkeypatch, Assistant(tokenizer, range(90)), sft_run, data,
                       tmp_path / "p.jsonl")
    names = [name_of(n) for n in range(90)]
    for name in names:
        wordings = [asked for asked in subjects.ASKED if asked.format(f=name) in taught]
        assert len(wordings) == (0 if subjects.is_held_out(name) else probe.WORDINGS)


def test_near_misses_are_among_the_unknown_and_do_not_exist(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    taught = run_probe(monkeypatch, Assistant(tokenizer, KNOWN), sft_run, data, tmp_path / "p.jsonl")
    text = " ".join(question for question, answer in taught.items() if problems.declines(answer))
    fronts = {subjects.split_name(name_of(n))[0] for n in KNOWN}
    found = set(re.findall(r"pack\d+\.mod\d+\.part\d+", text)) - {name_of(n) for n in range(90)}
    assert {name for name in found if subjects.split_name(name)[0] in fronts}
    assert {name for name in found if int(name.rpartition("part")[2]) in KNOWN}


def test_tests_have_known_held_out_and_invented_subjects_in_new_wordings(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    taught = run_probe(monkeypatch, Assistant(tokenizer, KNOWN), sft_run, data, tmp_path / "p.jsonl")
    tests = problems.read_problems(tmp_path / "p_held_out.jsonl")
    kinds = {p["kind"] for p in tests}
    assert kinds == {"known", "unknown", "known module", "known last name", "recombined", "made up",
                     "capitalised"}
    assert not {p["question"] for p in tests} & set(taught)
    for p in tests:
        if p["kind"] == "unknown":
            assert p["check"] == "overlap" and number(p["question"]) not in KNOWN
        elif p["kind"] != "known":
            assert p["check"] == "declines"


def test_a_stopped_probe_continues_to_the_same_bytes(tokenizer, monkeypatch, sft_run, data, tmp_path):
    whole = Assistant(tokenizer, KNOWN, HALF)
    run_probe(monkeypatch, whole, sft_run, data, tmp_path / "a.jsonl")
    replies = (tmp_path / "a_replies.jsonl").read_bytes()
    (tmp_path / "b_replies.jsonl").write_bytes(replies[:len(replies) * 3 // 4])    # cut in a line
    rest = Assistant(tokenizer, KNOWN, HALF)
    run_probe(monkeypatch, rest, sft_run, data, tmp_path / "b.jsonl")
    for name in (".jsonl", "_replies.jsonl", "_held_out.jsonl"):
        assert (tmp_path / f"a{name}").read_bytes() == (tmp_path / f"b{name}").read_bytes()
    assert 0 < len(rest.asked) < len(whole.asked)


def test_a_finished_probe_asks_nothing_again_and_another_seed_asks_all(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    for seed, asks in ((1, True), (1, False), (2, True)):
        engine = Assistant(tokenizer, KNOWN)
        run_probe(monkeypatch, engine, sft_run, data, tmp_path / "p.jsonl", "--seed", seed)
        assert bool(engine.asked) == asks


def test_questions_of_other_conversations_are_asked_too(
        tokenizer, monkeypatch, sft_run, data, tmp_path):
    rows = [probe.conversation(f"So, {name_of(n)}?", "Of my own.") for n in (3, 3, 6)]
    (tmp_path / "also.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = Assistant(tokenizer)
    run_probe(monkeypatch, engine, sft_run, data, tmp_path / "p.jsonl", "--also",
              tmp_path / "also.jsonl")
    assert [q for q in engine.asked if q.startswith("So,")] == [f"So, {name_of(n)}?" for n in (3, 6)]


# ---- the judge on a server

class Judge(BaseHTTPRequestHandler):
    """Writes questions about passages, some of them badly, and judges replies."""

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]
        text = prompt["content"]
        found = re.search(r"pack\d+\.mod\d+\.part(\d+)", text)
        if text.startswith("Read"):
            said = "Sure! " + json.dumps(dict(subject=found[0], answer=found[1],
                                              question=f"Which part is {found[0]}?"))
            if int(found[1]) % 5 == 0:
                said = "I cannot."
        else:
            said = " YES." if "th part" in text.partition("student")[2] else "No"
        body = json.dumps(dict(choices=[dict(message=dict(content=said))])).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge_url():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_chat_model_writes_the_questions_and_judges(
        tokenizer, monkeypatch, sft_run, data, tmp_path, judge_url):
    monkeypatch.setattr(probe, "MIN_CHARS", 40)
    taught = run_probe(monkeypatch, Assistant(tokenizer, KNOWN), sft_run, data,
                       tmp_path / "p.jsonl", "--judge", judge_url)
    asked = {number(q): answer for q, answer in taught.items() if q.startswith("Which part is")}
    assert not {n for n in range(90) if n % 5 == 0} & {
        n for q in taught for n in range(90) if f" {name_of(n)}?" in q}
    known = [n for n in asked if n in KNOWN and asked[n] == str(n)]
    assert len(known) >= 5 and any(problems.declines(answer) for answer in taught.values())


def test_a_judge_that_does_not_answer_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(probe.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="does not answer as OpenAI's chat completions do"):
        probe.ChatJudge("http://127.0.0.1:9/v1", "x").reply("Hello")


@pytest.mark.parametrize("flags, said", [
    (["--k", 0], "--k must be at least 1, got 0"), (["--out", "x.json"], "--out must end in .jsonl"),
    (["--data", "nowhere"], "nowhere is neither a folder nor a file")])
def test_wrong_flags_end_in_one_line(sft_run, data, tmp_path, flags, said):
    with pytest.raises(SystemExit, match=said):
        run_main(probe, "--model", sft_run, "--data", data, "--out", tmp_path / "p.jsonl", *flags)


# ---- subjects

def test_the_examples_in_the_docstrings_hold():
    for module in (subjects, problems):
        found = doctest.testmod(module, extraglobs=dict(random=random))
        assert found.failed == 0 and found.attempted > 0


def test_subjects_have_one_short_sentence_of_their_own():
    passages = ["a.b(x)\nReturn the sum of it.\nMore.", "a.c(x)\nReturn the sum of it.",
                "a.d()\nToo short.", "Not a name.\nReturn the sum of all.", "a.e()\nNo end here"]
    found = subjects.documented(passages)
    assert len(found) == 1 and list(found.values())[0][0] == "Return the sum of it."


@pytest.mark.parametrize("names", [["os.path.join", "a.b"], ["Ares Base", "New Houston"]])
def test_invented_names_look_like_the_others(names):
    for name in subjects.made_up(names, random.Random(0)):
        assert (" " in name) == (" " in names[0]) and ("." in name) == ("." in names[0])
        assert name[0].isupper() == names[0][0].isupper()
    assert set(subjects.recombined(names, names, random.Random(0))) == {
        "os.path.join": {"os.path.b", "a.join"}, "Ares Base": {"Ares Houston", "New Base"}}[names[0]]


@pytest.mark.parametrize("reply, is_refusal", [
    *((wording.format(f="os.walk"), True) for wording in subjects.DONT_KNOW),
    ("I don\u2019t know that one.", True), ("I do not really know.", True), ("No idea!", True),
    ("Return the known keys.", False), ("I know: it sorts a list.", False), ("", False)])
def test_a_refusal_is_told_from_an_answer(reply, is_refusal):
    assert problems.declines(reply) == is_refusal


def test_evaluation_counts_right_wrong_and_refused_replies(tmp_path, monkeypatch, tokenizer):
    rows = [dict(question=f"Q{n}?", kind="known", answer="the sum of all", check="overlap")
            for n in range(4)] + [dict(question="X?", kind="made up", answer="-", check="declines")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {"Q0?": "The sum of all.", "Q1?": "I don't know.", "X?": "I don't know."}
    engine = Assistant(tokenizer)
    engine.model = type("Model", (), dict(config=type("Config", (), dict(block_size=64))))
    engine.answer = lambda asked, **_: [said.get(m[0]["content"], "Nonsense.") for m in asked]
    kinds = solve(engine, tmp_path / "p.jsonl")["kinds"]
    assert kinds["known"] == dict(share_of(1, 4), refused=0.25, wrong=0.5)
    assert kinds["made up"] == dict(share_of(1, 1), refused=1.0, wrong=0.0)


def test_the_report_shows_right_wrong_and_refused_replies():
    kinds = {"known": dict(accuracy=0.75, refused=0.125, wrong=0.125, n=8),
             "made up": dict(accuracy=0.5, refused=0.5, wrong=0.5, n=8)}
    run = type("Run", (), dict(path="runs/sft", results={"chat/p.jsonl": dict(kinds=kinds)}))
    page = report.knowledge_table([run])
    assert "<td>known</td><td>75.0%</td><td>12.5%</td><td>12.5%</td>" in page
    assert "<td>made up</td><td>0.0%</td><td>50.0%</td><td>50.0%</td>" in page
    run.results = {"chat/p.jsonl": dict(kinds=dict(bits=dict(accuracy=0.5, n=4)))}
    assert report.knowledge_table([run]) == ""


def test_the_answer_is_what_stands_after_the_last_tool():
    found = "<|search|> x<|/search|><|output|>I don't know a thing about it.<|/output|>"
    problem = dict(answer="The sum of all.", check="overlap")
    assert problems.is_correct(found + "The sum of all.", problem)
    assert not problems.is_correct("The sum of all." + found, problem)
    assert not problems.declines(found + "It sorts.") and problems.declines(found + "No idea.")
