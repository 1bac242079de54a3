"""
report.py: the page and the summary say what logs and eval.json say, whatever a run lacks, and text
from runs is shown as text.
"""
import contextlib
import gzip
import json
import random
import re
import runpy
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from html.parser import HTMLParser

import pytest

import eval as eval_module
import report
import story
from conftest import ROOT, run_main
from problems import share_of
from records import Data, Run, accuracy_sources, verdicts
from svg import FIGURE_STYLE, bars, curve, ticks
from test_style import check_commands
from training import RunLog


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- reports

def write_run(path, stage, rows=()):
    """A run folder, its log written by the trainers' own RunLog."""
    log = RunLog(path, 20)
    log.say("", header=dict(command=f"train {stage} <b>", commit="abc123", params=4, torch="2",
                            python="3", device="cpu", flags=dict(seed=1)))
    for step, values in rows:
        log.say("", **({} if step is None else dict(step=step)), **values)
    (path / "config.json").write_text(json.dumps(dict(deepdive=dict(stage=stage, step=20))))
    return path


def demo(tmp_path, bpb=2.1, identity=0.9, functions=0.6, bits=0.95, sft_bits=0.3):
    """Three runs that pass, unless a figure is changed."""
    after = dict(identity=identity, functions=functions, bits=sft_bits)
    base = [(s, dict(val_loss=6 - s / 9, val_bpb=4 - s / 12)) for s in range(0, 21, 10)]
    base += [(s, dict(sample=f"the <script>alert('x')</script> & {s}")) for s in range(0, 21, 10)]
    base += [(s, dict(loss=6 - s / 9)) for s in range(1, 21)]
    base += [(None, dict(val_bpb=bpb, gzip=2.5, xz=2.3))]
    sft = [(0, dict(when="before", accuracy=dict(identity=0.0, functions=0.1, bits=0.4))),
           (9, dict(loss=1.0)), (20, dict(when="after", accuracy=after))]
    rl = [(0, dict(kind="bits", accuracy=sft_bits, reply_tokens=4.0))]
    rl += [(s, dict(reward=s / 20, reply_tokens=4.0 + s)) for s in range(1, 21)]
    rl += [(20, dict(kind="bits", accuracy=bits, reply_tokens=20.0))]
    return [write_run(tmp_path / name, name, rows) for name, rows in
            dict(pretrain=base, sft=sft, rl=rl).items()]


class Checker(HTMLParser):
    """Every tag is closed, nothing that a page could load or run is in it, and links stay in it."""
    opened = ()

    def __init__(self):
        super().__init__()
        self.ids, self.links = [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "img", "link", "iframe", "object", "b")
        assert not {"src", "onload", "style"} & set(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.opened += (tag,) if tag != "meta" else ()

    def handle_endtag(self, tag):
        assert self.opened[-1] == tag
        self.opened = self.opened[:-1]


def report_of(*flags):
    """The page that `eval.py report` writes into the last run."""
    run_main(eval_module, "report", *flags)
    page = (flags[-1] / "report.html").read_text("utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.opened == () and len(set(checker.ids)) == len(checker.ids)
    assert checker.links == [f"#{name}" for name in checker.ids if name != "details"]
    assert not any(word in page for word in ("url(", "@import", "http:", "https:"))
    return page


def chapters(page):
    """The names of the chapters that a page has."""
    return re.findall("<section id=([a-z]+)>", page)


def test_a_report_escapes_html_and_tells_the_stages_in_order(tmp_path):
    page = report_of(*demo(tmp_path))
    assert "&lt;script&gt;" in page and "<script" not in page and "train sft &lt;b&gt;" in page
    for text in ("abc123", "gzip -9 2.5", "xz -9e 2.3", "chance, bits 0.5", "30.0%", "95.0%"):
        assert text in page, text
    assert chapters(page) == ["base", "writing", "assistant", "reasoner", "cost", "details"]
    # loss, bits a byte; accuracies, loss; right answers, lengths; time
    assert page.count("<svg") == 7


def test_a_report_shows_the_filters_and_every_measurement(tmp_path):
    runs = demo(tmp_path)
    result = dict(share_of(2, 4), cut=0, kinds=dict(bits=share_of(2, 4)),
                  arguments=dict(files="f00", max_new_tokens=9))
    core_result = dict(core=0.1234, core_error=0.05, n=3, left_out=["coqa"], tasks=dict(
        copa=dict(accuracy=0.75, centered=0.5, centered_error=0.1, n=3, contaminated=1 / 3,
                  clean_accuracy=0.5, clean_accuracy_error=0.25, clean_n=2)))
    (runs[0] / "eval.json").write_text(json.dumps({"h.jsonl": result, "core": core_result}))
    funnel = {"step": "language", "in": 100, "kept": 70, "dropped": {"is_<de>": 30}, "bytes": 2e6,
              "flagged": dict(short=5), "docs_per_s": 12.0, "seconds": 3600}
    (tmp_path / "index.json").write_text(json.dumps(dict(funnel=[funnel])))
    page = report_of("--data", tmp_path, *runs)
    for text in ("70.0%", "is_&lt;de&gt; 30", "short 5", "2.00", "1:00:00, summed", "core 0.1234 ± 0.0500",
                 "CORE 0.1234 ± 0.0500, GPT-2", "left out: coqa", "centered 0.5000 ± 0.1000",
                 "4 of h.jsonl (hash f00)", "accuracy 0.5000 ± 0.2041", "50.0% ± 20.4%",
                 "contaminated 0.3333 | clean_accuracy 0.5000 ± 0.2500 | n 3 | clean_n 2"):
        assert text in page, text


@pytest.mark.parametrize("pieces", ["nothing", "header only", "cut line", "no config", "rl only"])
def test_a_run_that_lacks_pieces_has_a_report_all_the_same(tmp_path, pieces):
    run = tmp_path / "run"
    run.mkdir()
    if pieces == "header only":
        write_run(run, "pretrain")
    if pieces == "cut line":
        (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 3}\n{"step": 2, "lo')
    if pieces == "no config":
        (run / "log.jsonl").write_text('{"step": 1, "reward": NaN}\n{"step": 2, "reward": 0.5}\n')
        assert Run(run).stage == "RL" and Run(run).points("reward") == [(2, 0.5)]
    if pieces == "rl only":
        run = demo(tmp_path)[2]
    page = report_of("--data", tmp_path / "no", run)
    told = {"rl only": ["reasoner", "cost"], "no config": ["reasoner"],
            "header only": ["base"], "cut line": ["base", "cost"]}
    assert chapters(page) == [*told.get(pieces, []), "details"]
    assert "name the folder of prepare_fineweb.py with --data" in page      # how to make the rest


def test_a_chapter_says_what_the_talk_says_what_happened_and_the_command(tmp_path):
    runs = demo(tmp_path)
    funnel = [{**FUNNEL, "seconds": 1}, {**FUNNEL, "step": "tokenize", "tokens": 500_000}]
    index = dict(funnel=funnel, tokenizer=dict(n_vocab=4096), documents=[
        dict(file="documents/train.jsonl.gz", split="train")], samples={
            "language: is_de": [dict(text="Hier <i>ist</i> es.")]})
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "documents").mkdir()
    with gzip.open(tmp_path / "documents" / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(dict(text="The kept <i>one</i>.")) + "\n")
    page = report_of("--data", tmp_path, *runs)
    assert chapters(page)[:3] == ["web", "tokens", "base"] and page.count("<p class=talk>") == 7
    for text in ("The kept &lt;i&gt;one", "Hier &lt;i&gt;ist", "one for every 4.00 bytes", "4,096",
                 f"python sample.py --model {runs[1]} --chat", "the loss went from"):
        assert text in page, text


def test_the_commands_of_the_chapters_exist():
    for told in story.CHAPTERS:
        check_commands(told.again.format_map(defaultdict(str, trained="train_gpt2.py")))
        check_commands(told.missing)
    assert len({told.name for told in story.CHAPTERS}) == 11


def test_core_stands_beside_gpt2_and_cost_beside_published_runs(tmp_path):
    [base, *_] = demo(tmp_path)
    tasks = dict(piqa=dict(accuracy=0.74, centered=0.48, n=100), copa=dict(accuracy=0.6, n=9))
    (base / "eval.json").write_text(json.dumps(dict(core=dict(core=0.2612, n=109, tasks=tasks))))
    page = report_of(base)
    figure = re.findall("<figure><figcaption>Right answers on tasks of CORE.*?</figure>", page)[0]
    assert "74%" in figure and "72%" in figure and "class='error'" in figure   # ours, GPT-2's
    for text in ("CORE 0.2612, GPT-2 (1,558M) 0.2565", "$43,000", "nanochat d24, run 1", "$576"):
        assert text in page, text
    assert "GPT-2" not in report_of(demo(tmp_path / "without")[0]).replace("GPT-2 took", "")


def test_cost_is_the_trainers_own_or_one_gpus_hours(tmp_path):
    for name, row in dict(own=dict(usd=7.5), hours={}).items():
        row = dict(step=3, seconds=1800.0, **row)
        header = dict(header=dict(flags=dict(gpu_hour_usd=4.0)), seconds=0)
        write_jsonl(tmp_path / name / "log.jsonl", [header, row])
    page = report_of(tmp_path / "hours", tmp_path / "own")
    assert "$7.50" in page and "$2.00" in page and "0:30:00" in page and "1:00:00" in page


def test_a_curve_draws_lines_levels_and_round_ticks():
    line = [(s, s * s) for s in range(2000)]
    svg = curve("a < b", {"x & y": line, "none": []}, {"level": 5.0})
    points = svg.split("points='")[1].split("'")[0].split()
    assert "a &lt; b" in svg and "x &amp; y" in svg and "none" not in svg and len(points) == 400
    xs, ys = zip(*(map(float, point.split(",")) for point in points))
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True) and max(ys) <= 240
    assert curve("", {}) == curve("", {"x": []}) == "" and "circle" in curve("", {"x": [(0, 1.0)]})


def test_a_point_with_a_standard_error_has_it_drawn_to_scale():
    svg = curve("", {"x": [(0, 1.0, 0.5), (1, 2.0, 0.25)]})
    (low, high), (low2, high2) = [map(float, ends) for ends in re.findall(
        "class='error c0' d='M[0-9.]+ ([0-9.]+)V([0-9.]+)'", svg)]
    assert low - high == pytest.approx(2 * (low2 - high2), abs=0.3) and low > high


def test_bars_are_as_long_as_their_values_and_say_them():
    svg = bars("a < b", {"x & y": {"s": (0.5, 0.1), "t": (1.0, None)}, "none": {}})
    starts, ends = zip(*re.findall("class='bar c[01]' d='M([0-9.]+) [0-9]+H([0-9.]+)V", svg))
    short, long = [float(end) - float(start) for start, end in zip(starts, ends)]
    assert long == pytest.approx(2 * short, abs=0.2) and svg.count("class='error'") == 1
    assert "a &lt; b" in svg and "x &amp; y" in svg and "none" not in svg and ">50%<" in svg
    assert bars("", {}) == bars("", {"x": {}}) == ""
    assert ">3,048<" in bars("", {"x": {"": (3048, None)}}, unit="pages")


def test_letters_of_a_figure_are_not_shrunk_on_a_phone():
    """A phone of 400 pixels leaves 368 between the margins of the page."""
    letters = float(re.search("figure svg { [^}]*font-size: ([0-9.]+)px", FIGURE_STYLE)[1])
    for drawn in (curve("", {"x": [(0, 1.0)]}), bars("", {"x": {"": (1, None)}})):
        width = float(re.search("viewBox='0 0 ([0-9]+) ", drawn)[1])
        assert letters * 368 / width >= 11


@pytest.mark.parametrize("low, high", [(0, 9.3), (-0.4, 0.7), (1.21, 1.23), (3, 20000), (0.5, 1.5)])
def test_ticks_are_few_and_lie_within(low, high):
    found = ticks(low, high, 5)
    steps = [b - a for a, b in zip(found, found[1:])]
    assert 1 < len(found) <= 6 and low <= found[0] and found[-1] <= high * (1 + 1e-12)
    assert max(steps) == pytest.approx(min(steps)) and f"{steps[0]:.0e}"[0] in "125"


def svg_of(tmp_path, runs):
    """The file of --svg → its text, and how many points each of its lines has."""
    run_main(report, *runs, "--svg", tmp_path / "docs" / "curves.svg")
    text = (tmp_path / "docs" / "curves.svg").read_text("utf-8")
    root = ElementTree.fromstring(text)             # raises an error if it is not well-formed
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    return text, [len(line.get("points").split()) for line in lines]


def test_the_svg_holds_the_loss_with_ln_v_and_rls_reward_and_accuracy(tmp_path):
    runs = demo(tmp_path)
    (runs[0] / "config.json").write_text(json.dumps(dict(vocab_size=4096, deepdive=dict(
        stage="pretrain"))))
    text, points = svg_of(tmp_path, runs)
    assert " width='900' " in text
    assert points == [20, 3, 20, 2]     # training, validation; reward, accuracy on held-out bits
    for said in ("random guess, ln 4096 = 8.318", "training", "validation", "mean reward of samples",
                 "accuracy on held-out bits", "training step", "chance, bits 0.5"):
        assert said in text, said
    assert not any(word in text for word in ("url(", "@import", "href", "<script", "<image"))


def test_an_svg_without_a_loss_or_a_reward_is_refused_in_one_line(tmp_path):
    run = write_run(tmp_path / "empty", "pretrain")
    with pytest.raises(SystemExit, match="empty: no log holds a loss or a reward; name the runs"):
        run_main(report, run, "--svg", tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


# ---- damaged files

RESULT = dict(accuracy=0.5, n=4, kinds=dict(bits=dict(accuracy=0.5, n=4)),
              arguments=dict(files="f00", max_new_tokens=9))
CLAIM = dict(name="tokens", sentence="It cuts.", verdict="shown", said="4.2", checks=["passes"],
             texts=["a  b"], seconds=1.0, figures={"256": [1.0, 0.5]})
FUNNEL = {"step": "language", "in": 100, "kept": 70, "dropped": {"is_de": 30}, "bytes": 2e6,
          "flagged": dict(short=5), "docs_per_s": 12.0, "seconds": 3600}


@pytest.mark.parametrize("name, text", [
    ("config.json", "[1]"), ("config.json", "{"), ("config.json", '{"deepdive": []}'),
    ("config.json", '{"deepdive": {"stage": ["sft"]}}'), ("config.json", '{"vocab_size": 0}'),
    ("eval.json", "[" * 200_000), ("eval.json", '{"a": [1]}'), ("eval.json", "null"),
    ("eval.json", '{"a": {"kinds": {"bits": {"accuracy": "1"}}}}'), ("eval.json", "\udcff"),
    ("eval.json", '{"a": {"kinds": {"bits": {}}}}'), ("eval.json", '{"a": {"left_out": [1]}}'),
    ("log.jsonl", '{"step": 1, "loss": "a"}\n'), ("log.jsonl", '{"header": [1]}\n'),
    ("log.jsonl", '{"step": 1' + "0" * 400 + "}\n"), ("log.jsonl", '{"seconds": NaN}\n'),
    ("log.jsonl", '{"when": "after", "accuracy": 0.5}\n'), ("log.jsonl", '{"usd": null}\n'),
    ("index.json", '{"funnel": {}}'), ("index.json", '{"funnel": [{"step": "a", "in": 1}]}'),
    ("index.json", '{"funnel": [1]}'), ("index.json", '{"funnel": null}')],
    ids=lambda value: value[:40])
@pytest.mark.parametrize("command", ["report", "summary"])
def test_a_damaged_file_ends_in_one_line_that_names_it(command, name, text, tmp_path):
    run = demo(tmp_path)[1]
    (run / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit) as stopped:
        run_main(report, command, run, "--data", run)
    message = str(stopped.value)
    assert str(run / name) in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("line", ["3", '{"step": "x"}', "[" * 200_000, '{"step": 1, "loss"',
                                  "\udcff", "a\0b"], ids=lambda line: line[:20])
def test_a_damaged_line_of_a_log_is_named_and_left_out(line, tmp_path, capsys):
    run = demo(tmp_path)[1]
    log = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(line.encode("utf-8", "surrogateescape") + b"\n\n" + log)
    run_main(report, "report", run)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{run}/log.jsonl, line 1 is damaged and is left out"]


def damaged(value, rng):
    """A JSON value in which one place holds something else."""
    odd = [None, "a", [], {}, -1, 1e300, float("nan"), 10 ** 400, True, ["\x1b"], {"\0": 1}]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], damaged(value[place], rng), *value[place + 1:]]
    return rng.choice(odd)


def test_a_file_damaged_anywhere_gives_a_report_or_one_line(tmp_path):
    rng = random.Random(0)
    runs = demo(tmp_path)
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            for run in runs]
    for _ in range(60):
        which = rng.randrange(3)
        rows = list(logs[which])
        rows[rng.randrange(len(rows))] = damaged(rng.choice(rows), rng)
        write_jsonl(runs[which] / "log.jsonl", rows)
        (runs[0] / "eval.json").write_text(json.dumps(damaged({"h.jsonl": RESULT}, rng)))
        index = dict(funnel=[FUNNEL], samples={"language: is_de": [dict(text="de")]},
                     tokenizer=dict(n_vocab=9), prose=[dict(file="a", split="train")])
        (tmp_path / "index.json").write_text(json.dumps(damaged(index, rng)))
        (runs[2] / "talk.json").write_text(json.dumps(damaged(dict(claims=[CLAIM]), rng)))
        for command in ("report", "summary"):
            with contextlib.suppress(SystemExit):
                run_main(report, command, *runs, "--data", tmp_path)
        with contextlib.suppress(SystemExit):
            svg_of(tmp_path, runs)
        write_jsonl(runs[which] / "log.jsonl", logs[which])


def test_kinds_that_were_not_practised_are_compared_before_and_after(tmp_path):
    rows = [(0, dict(others=dict(sums=0.9, tool=0.5))), (5, dict(reward=0.5)),
            (9, dict(others=dict(sums=0.875, tool=0.5)))]
    page = report_of(write_run(tmp_path / "rl", "rl", rows))
    cells = re.findall("<tr><td>sums</td>(.*?)</tr>", page)[0]
    assert re.findall("<td>(.*?)</td>", cells) == ["–", "90.0%", "87.5%", "-2.5 points", "0%"]


def test_answers_to_the_same_problem_stand_together_by_step(tmp_path):
    run = demo(tmp_path)[2]
    rows = [dict(step=step, question=q, reply=f"<|think|>{q}{step}", right=step == 8)
            for step in (0, 4, 8) for q in "ba"]
    write_jsonl(run / "answers.jsonl", rows)
    found = re.findall("&lt;|think|&gt;(..)</td><td>(.....)".replace("|", "[|]"), report_of(run))
    assert found == [("a0", "wrong"), ("a4", "wrong"), ("a8", "right"),
                     ("b0", "wrong"), ("b4", "wrong"), ("b8", "right")]
    for text in ("", "[]", '{"step": 0, "question": "?", "reply": "", "right": 1}'):
        (run / "answers.jsonl").write_text(text)
        with pytest.raises(SystemExit, match="answers.jsonl.*; delete the file"):
            report_of(run)


def test_chains_stand_in_a_chapter_of_their_own_and_their_run_is_no_reasoner(tmp_path):
    rows = [(step, dict(kind=f"{n} arrows", accuracy=right, pass_16=0.5, thinking_tokens=3.0 + step))
            for step, right in ((0, 0.125), (80, 0.75)) for n in (6, 16)]
    run = write_run(tmp_path / "chains", "rl", rows)
    write_jsonl(run / "answers.jsonl", [
        dict(step=step, question=q, reply=f"{q}{step}", right=step == 80 and q == "long")
        for step in (0, 80) for q in ("short", "long", "never")])
    runs = demo(tmp_path)
    page = report_of(*runs, run)
    found = re.findall("<section id=beyond>.*?</section>", page, re.S)[0]
    assert "16 arrows 12%, then 75%" in found and "before, in 16 tries" in found
    assert "long · step 80, right" in found and "never" not in found and "short" not in found
    assert "arrows" not in re.findall("<section id=reasoner>.*?</section>", page, re.S)[0]
    told = story.Story([Run(path) for path in (*runs, run)], Data())
    assert told.rl == [told.runs[2]] and told.command("{all}") == " ".join(map(str, runs))


def test_a_reward_model_is_shown_with_its_standard_error_and_its_best_of_n(tmp_path):
    rows = [(step, dict(accuracy=0.5 + step / 100, accuracy_error=0.05)) for step in (0, 20)]
    run = write_run(tmp_path / "reward", "reward_model", rows)
    best = [dict(n=n, kl=n / 4, reward=float(n), gold=1.0) for n in (1, 2, 4)]
    write_jsonl(run / "best_of_n.jsonl", best)
    page = report_of(run)
    assert chapters(page)[0] == "rlhf" and page.count("class='error c0'") == 2
    assert "unseen pairs" in page and "chance 0.5" in page and "The best of n replies" in page


def test_text_from_runs_cannot_control_a_terminal_a_page_or_an_svg(tmp_path, capsys):
    evil = "\x1b[2J\0</text><script>&\ud800"
    rl = [(step, dict(reward=0.5)) for step in range(1, 4)]
    rl += [(step, dict(kind=evil, accuracy=0.5)) for step in (0, 3)]
    run = write_run(tmp_path / "rl", "rl", rl)
    (run / "eval.json").write_text(json.dumps({evil: dict(RESULT, kinds={evil: RESULT})}))
    text, _ = svg_of(tmp_path, [*demo(tmp_path)[:1], run])
    page = report_of(run)
    with pytest.raises(SystemExit):
        run_main(report, "summary", run)
    for shown in (text, page, capsys.readouterr().out):
        assert not any(c in shown for c in ("\x1b", "\0", "<script", "\ud800"))


def test_texts_from_all_files_are_escaped_in_the_story(tmp_path):
    evil = "</p>'\"<script>&\x1b"
    rlhf = [(n, dict(reward=0.5, gold=0.1 * n, kl_reply=0.5, replies=[dict(reply=evil, reward=1.0)]))
            for n in range(3)]
    runs = [*demo(tmp_path), write_run(tmp_path / "rlhf", "rl", rlhf)]
    rows = [dict(step=step, question=evil, reply=evil, right=True) for step in (0, 9)]
    write_jsonl(runs[2] / "answers.jsonl", rows)
    claim = dict(name="tokens", sentence=evil, verdict=evil, said=evil, checks=[evil], texts=[evil],
                 figures={evil: [1.0, None]})
    names = ("tokens", "funnel", "cost", "no_assistant", "identity", "search", "discovery")
    (runs[3] / "talk.json").write_text(json.dumps(dict(claims=[dict(claim, name=n) for n in names])))
    (runs[1] / "eval.json").write_text(json.dumps({evil: dict(RESULT, kinds={evil: dict(
        accuracy=0.5, refused=0.5, wrong=0, n=2)})}))
    index = dict(funnel=[{**FUNNEL, "step": evil, "dropped": {evil: 3}}],
                 samples={f"{evil}: {evil}": [dict(text=evil)]})
    (tmp_path / "index.json").write_text(json.dumps(index))
    page = report_of("--data", tmp_path, *runs)
    assert page.count("&lt;script&gt;") > 20 and "<script" not in page and "\x1b" not in page
    assert {"web", "tokens", "rlhf", "talk", "knowledge"} <= set(chapters(page))


@pytest.mark.parametrize("flag", ["--out", "--svg"])
def test_a_report_that_cannot_be_written_is_one_line(flag, tmp_path):
    run = demo(tmp_path)[0]
    with pytest.raises(SystemExit, match="val cannot be written: .*; free space") as stopped:
        run_main(report, run, flag, tmp_path / "pretrain" / "log.jsonl" / "val")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("script", ["eval.py", "report.py"])
def test_ctrl_c_ends_in_one_line_and_status_130(script, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", interrupted)
    monkeypatch.setattr("sys.argv", [script, "--tasks", "x"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 130 and capsys.readouterr().err.strip().startswith("stopped; ")


# ---- verdicts

FIGURES = dict(bpb=(2.49, 2.51), identity=(0.30, 0.29), functions=(0.41, 0.39), bits=(0.51, 0.49),
               sft_bits=(0.79, 0.81))


@pytest.mark.parametrize("figure", FIGURES)
def test_a_verdict_flips_when_its_figure_is_changed(tmp_path, figure):
    enough, short = FIGURES[figure]
    said = [[verdict for verdict, _, _ in verdicts([Run(run) for run in demo(
        tmp_path / str(value), **{figure: value})])] for value in (enough, short)]
    which = dict(bpb=0, identity=1, functions=2, bits=3, sft_bits=3)[figure]
    assert said[0] == ["pass"] * 4 and said[1].count("fall short") == 1
    assert said[1][which] == "fall short"


def test_the_summary_prints_figures_and_is_strict_only_when_asked(tmp_path, capsys):
    runs = demo(tmp_path, bits=0.44)        # 14 points, and below chance
    for flags, status in (([], 0), (["--strict"], 1)):
        with pytest.raises(SystemExit) as stopped:
            run_main(eval_module, "summary", *runs, *flags)
        assert stopped.value.code == status
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith("pass       | ") and "model 2.1000, gzip -9 2.5000" in lines[0]
    assert lines[3].startswith("fall short | ") and "SFT 30.0%, RL 44.0%: +14.0 points" in lines[3]
    assert "chance 50%" in lines[3] and len({line.index("|", 12) for line in lines}) == 1


def test_a_base_model_that_read_too_little_is_not_judged(tmp_path, capsys):
    runs = demo(tmp_path, bits=0.44)
    header = dict(flags=dict(total_batch_size=24_999))      # 20 steps: 499,980 tokens
    RunLog(runs[0], 20, resume_step=20).say("", header=header)
    with pytest.raises(SystemExit) as stopped:
        run_main(eval_module, "summary", *runs, "--strict")
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert stopped.value.code == 0
    assert [line.split(" |")[0].strip() for line in lines] == ["pass"] * 3 + ["too small"] * 2
    header["flags"]["total_batch_size"] = 25_000
    RunLog(runs[0], 20, resume_step=20).say("", header=header)
    assert verdicts([Run(run) for run in runs])[3][0] == "fall short"


def test_a_missing_figure_falls_short(tmp_path):
    judged = verdicts([Run(demo(tmp_path)[1])])
    assert [verdict for verdict, _, _ in judged] == ["fall short", "pass", "pass", "fall short"]
    assert judged[0][2].startswith("no figure") and judged[3][2].startswith("no figure")


def test_figures_of_different_problems_are_never_compared(tmp_path):
    runs = demo(tmp_path, bits=0.31)

    def measured(run, share, files):
        result = dict(n=9, kinds=dict(bits=dict(accuracy=share, n=9)),
                      arguments=dict(files=files, max_new_tokens=128))
        (run / "eval.json").write_text(json.dumps({"held_out.jsonl": result}))

    for files, verdict in (("other", "fall short"), ("same", "pass")):
        measured(runs[1], 0.2, "same")
        measured(runs[2], 0.9, files)
        assert verdicts([Run(run) for run in runs])[3][0] == verdict


def test_rls_own_first_measurement_stands_for_sft(tmp_path):
    runs = demo(tmp_path, bits=0.95, sft_bits=0.35)
    [(source, stages)] = accuracy_sources([Run(run) for run in reversed(runs)])
    assert source == "training logs" and stages["RL"]["bits"] == 0.95
    assert stages["SFT"] == dict(identity=0.9, functions=0.6, bits=0.35)
    assert stages["base"] == dict(identity=0.0, functions=0.1, bits=0.4)


def test_a_report_shows_the_talks_claims_folded_and_escaped(tmp_path):
    runs = demo(tmp_path)
    claim = dict(name="coin", sentence="It <tosses>.", verdict="partly shown", said="p 0.5",
                 checks=["passes: a"], texts=["<b>x"], seconds=1.0, figures=dict(p=[0.5, None]))
    (runs[-1] / "talk.json").write_text(json.dumps(dict(claims=[claim])))
    page = report_of(*runs)
    assert "1. It &lt;tosses&gt;. <strong class=other>partly shown</strong>" in page
    assert "<p>p 0.5</p><pre>passes: a\n&lt;b&gt;x</pre>" in page
