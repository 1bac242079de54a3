"""
eval.py: replies that cheat do not pass, the scored span is the answer and nothing else (against a
twin that feeds one token at a time), and tasks are right when a rigged model knows the answers.
"""
import contextlib
import dataclasses
import doctest
import gzip
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

import claims
import eval as eval_module
import likelihood
import problems
from conftest import GPT2, MODERN, ROOT, mutate, noisy, run_main
from eval import (HELLASWAG, Task, centered, core, core_questions, core_tasks, letter_questions,
                  mean_of, read_rows, run_task, solve)
from likelihood import (SharedRow, SharedRows, batches, mean_log_probs, score, score_alone,
                        token_spans)
from bpe import Tokenizer
from model import load_checkpoint, save_weights
from checkers import final_answer
from problems import figures, is_correct, read_problems, share_of
from sample import Engine

T = GPT2.block_size
CORE = ROOT.parent / "shared" / "data" / "core"


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("module", [eval_module, likelihood, problems], ids=lambda module: module.__name__)
def test_docstring_examples_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- what a right answer is

@pytest.mark.parametrize("text, answer", [
    ("#### 72", "72"), ("7 + 8 = 15\n#### 1,234", "1234"), ("#### $18.00.", "18.00"), ("72", None),
    ("####", None), ("#### ", None), ("####\n72", None), ("#### 1 #### 2", "2"), ("#### -3", "-3"),
    ("#### 3\nand 4", "3"), ("####Even ", "even"), ("#### 4 or 5", "4 or 5"), ("### 5", None),
    ("#### .5", ".5"), ("", None), ("#### 1,2,3", "1,2,3"), ("#### 12,5", "12,5"),
    ("#### 5\r\n", "5"), ("#### a\t b", "a b"), ("#### 5 $.", "5"), ("#### **5**", "5"),
    ("#### $\\boxed{5}$.", "5"), ("#### \u22125", "-5"), ("#### 5 apples", "5 apples")])
def test_final_answer_is_the_whole_line_after_the_last_mark(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("check, answer, right, wrong", [
    ("final", "even", ["0 even #### even", "#### odd\n#### even", "#### Even."],
     ["even", "#### even odd", "#### odd even", "#### even or odd", "####", "", "#### eve",
      "#### even #### odd", "even ####", "#### not even"]),
    ("final", "12", ["#### 12", "#### $12", "#### 12."], ["#### 1", "#### 112", "#### 1 2", "12",
                                                          "#### 12 13", "#### -12", "#### 12.5"]),
    ("final", "5", ["#### 5", "#### 5 apples", "#### 5%", "#### 5 (five)", "#### 5€", "#### 5.0",
                    "#### $5.00", "#### 05", "#### +5", "#### **5**", "#### \\boxed{5}", "#### €5",
                    "#### 5 kg.", "#### \uff15", "#### 5 $.", "#### \\$5", "#### 6 #### 5",
                    "####: 5", "#### =5", "#### 5 m\u00b2", "#### 5 ft^2."],
     ["#### .5", "#### -5", "#### 5 or 6", "#### 5 or six", "#### 5, 6", "#### 6 5", "#### 5/6",
      "#### 5 million", "#### 5k", "#### 5 hundred", "#### 5\u00b2", "#### 5\u00bd", "#### 5.0.0",
      "#### 5 and a half", "#### not 5", "#### 1 2 3 4 5 6 7 8 9 10", "#### 5 #### 6", "#### 5:30",
      "#### 5 \\boxed{6}", "####\n5", "#### 5,0", "#### \u00b2", "#### 5 + 1", "#### 5x2",
      "#### 5 m20", "5"]),
    ("final", "18", ["#### 18 dollars every day", "#### $18/day"], ["#### 1 8", "#### 1,8"]),
    ("final", "-5", ["#### \u22125", "#### -$5.00", "#### $-5"], ["#### 5", "#### --5"]),
    ("final", "1,234", ["#### 1234", "#### 1,234.0", "#### 1.234e3"],
     ["#### 1234,0", "#### 12,34"]),
    ("final", "1,2,3", ["#### 1,2,3", "#### 1,2,3."], ["#### 123", "#### 1", "#### 1,23"]),
    ("final", "(1,2)", ["#### (1,2)", "#### **(1,2)**"], ["#### (12)", "#### 12", "#### 1,2"]),
    ("final", "12,5", ["#### 12,5"], ["#### 125", "#### 12.5", "#### 12"]),
    ("final", "0,125", ["#### 0,125"], ["#### 125", "#### 0125"]),
    ("final", "3 pm", ["#### 3 PM."], ["#### 3 am", "#### 3", "#### 3 pm or 4 pm"]),
    ("final", "5e", ["#### 5E"], ["#### 5"]),
    ("contains", "5", ["It is 5.", "5", "$5.00", "3-5", "(5)", "**5**", "so 5, 6"],
     ["1.5", "15", "5.1", "-5", "1,5", "5th", "2.5.1", ".5", "5,000", "v5", "5\u00b2", "-\u22125"]),
    ("contains", "Ada", ["I am Ada.", "ada"], ["Adam", "I am Adams", "", "A d a", "Canada"]),
    ("contains", "C++", ["I like C++.", "c++"], ["C", "XC++", "C+"]),
    ("overlap", "Return the mean of the data.",
     ["Return the mean of the data.", "It is to return the mean of data"],
     ["", "the the the the", "the", "Return", "Return the mode, or raise if data is empty."])])
def test_replies_are_judged_as_a_person_would(check, answer, right, wrong):
    problem = dict(answer=answer, check=check)
    assert [reply for reply in right if not is_correct(reply, problem)] == []
    assert [reply for reply in wrong if is_correct(reply, problem)] == []


def test_an_answer_stays_the_same_if_it_is_taken_again():
    rng = random.Random(0)
    pieces = ["5", "1,234", ".", "$", " ", "\r", "\t", "*", "`", "\\", "\\boxed{", "}", "####",
              "#", "a", "\u0130", "\u2028", "\u2212", "-", "%", ",", "\u0665", "\u00b2", "e", "or"]
    for _ in range(20_000):
        answer = final_answer("#### " + "".join(rng.choices(pieces, k=rng.randint(1, 7))))
        assert answer is None or final_answer("#### " + answer) == answer
        assert answer is None or is_correct("#### " + answer, dict(answer=answer, check="final"))


def write_lines(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_gsm8ks_rows_are_read_as_they_are(tmp_path):
    worked = dict(question="How many?", answer="She has 48/2 = <<48/2=24>>24.\n#### 1,024")
    path = write_lines(tmp_path / "x.jsonl", worked, "", dict(question="a\u2028b", answer="7"))
    first, second = read_problems(path)
    assert first["answer"] == "1024" and first["checker"] == "final"
    assert first["messages"] == [dict(role="user", content="How many?")]
    assert second["answer"] == "7" and second["question"] == "a\u2028b"


SAID = [dict(role="user", content="?")]


@pytest.mark.parametrize("row", [
    "{", "[1, 2]", "3", '"text"', "null", "[" * 200_000, "\0",
    '{"question": "?", "answer": ' + "9" * 5000, dict(question="?"), dict(answer="1"), dict(question="?", answer=""),
    dict(question="?", answer=5), dict(question="?", answer=None), dict(question="?", answer=["1"]),
    dict(question="?", answer="####"), dict(question="?", answer="1", check="never"),
    dict(question="?", answer="1", check=[]), dict(question="?", answer="1", kind=["a"]),
    dict(question="?", answer="1", kind=None), dict(question=None, answer="1"),
    dict(question=["?"], answer="1"), dict(question=" ", answer="1"),
    dict(messages=3, answer="1"), dict(messages=[], answer="1"), dict(messages=["?"], answer="1"),
    dict(messages=[dict(role="human", content="?")], answer="1"),
    dict(messages=[dict(role=["user"], content="?")], answer="1"),
    dict(messages=[dict(role="user", content=5)], answer="1"),
    dict(messages=[dict(role="user")], answer="1"),
    dict(messages=[dict(role="user", content=[dict(type="text")])], answer="1"),
    dict(messages=[dict(role="user", content=[dict(type="text", text=5)])], answer="1"),
    dict(messages=[*SAID, dict(role="user", content=[dict(type="think", text="?")])], answer="1")],
    ids=lambda row: str(row)[:60])
def test_a_bad_problem_is_one_line_with_its_number(row, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", dict(question="1", answer="1"), row)
    with pytest.raises(SystemExit, match=r"x.jsonl, line 2: .*; repair the file") as error:
        read_problems(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_any_problem_that_is_accepted_can_be_rendered(tmp_path, tokenizer):
    rng = random.Random(0)
    values = [None, 5, "", "a", "user", "text", [], ["a"], {}, SAID, SAID[0], "####", 1.5, True,
              dict(role="assistant", content=[dict(type="think", text="b")]), "\ud800"]
    for _ in range(500):
        keys = ("question", "messages", "answer", "kind", "check")
        row = {key: rng.choice(values) for key in keys if rng.random() < 0.6}
        row = rng.choice([row, dict(row, messages=[rng.choice(values), rng.choice(values)])])
        path = write_lines(tmp_path / "x.jsonl", dict(dict(question="?", answer="1"), **row))
        with contextlib.suppress(SystemExit):
            [problem] = read_problems(path)
            tokenizer.render(problem["messages"], for_completion=True)
            is_correct("#### 1", problem)
            dict.fromkeys([problem["kind"]])


def test_missing_empty_and_foreign_problem_files_are_one_line(tmp_path):
    (tmp_path / "latin1.jsonl").write_bytes(b'{"question": "\xe9"}')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "?"}\n' * 9)[:-9])
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("latin1.jsonl", "empty.jsonl", "missing.jsonl", "plain.jsonl.gz", "cut.jsonl.gz",
                 "folder.jsonl"):
        with pytest.raises(SystemExit, match=f"{name}.*;.*chat_sft.py make") as error:
            read_problems(tmp_path / name)
        assert "\n" not in str(error.value) and "b'" not in str(error.value)


def test_problems_may_be_gzipped_and_begin_with_a_byte_order_mark(tmp_path):
    text = b'\xef\xbb\xbf{"question": "?", "answer": "1"}\r\n'
    (tmp_path / "x.jsonl").write_bytes(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text))
    assert read_problems(tmp_path / "x.jsonl") == read_problems(tmp_path / "x.jsonl.gz")


# ---- log-likelihood

@torch.no_grad()
def slow_score(model, ids, start):
    """One token at a time, the whole prefix anew: the specification of score_alone and score."""
    ids, start = ids[-T - 1:], max(1, start - max(0, len(ids) - T - 1))
    steps = [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1) for t in range(start, len(ids))]
    logprobs = [p[i].item() for p, i in zip(steps, ids[start:])]
    return sum(logprobs), len(logprobs), all(p.argmax() == i for p, i in zip(steps, ids[start:]))


def some_questions(model, count=16):
    """Questions whose spans begin alike up to some place: with random ids, as the model writes
    greedily, and greedy but for the last id. Some are longer than the context, some are alone."""
    rng, questions = random.Random(0), []
    for n in range(count):
        shared = [rng.randrange(65) for _ in range(rng.choice((1, 5, 12, T)))]
        spans = []
        for m in range(n % 5 + 1):
            ids = shared[:rng.choice((1, len(shared), len(shared)))]
            start = rng.randint(1, len(ids))
            for left in reversed(range(rng.randint(1, 9))):
                best = model(torch.tensor([ids[-T:]]))[0, -1].argmax().item()
                ids.append(rng.randrange(65) if m % 3 == 0 or m % 3 == 1 and not left else best)
            spans.append((ids, start if len(ids) - start < 12 else len(ids) - 3))
        questions.append(spans)
    return questions


def differs_from_the_slow_twin(config):
    model = noisy(config)
    questions = some_questions(model)
    expected = [[slow_score(model, *span) for span in spans] for spans in questions]
    found = [[(s.logprob, s.n_tokens, s.greedy) for s in scores]
             for scores in likelihood.score(model, questions)]
    assert {greedy for scores in expected for _, _, greedy in scores} == {True, False}
    pairs = [pair for one, other in zip(found, expected) for pair in zip(one, other, strict=True)]
    return any(abs(a[0] - b[0]) > 1e-3 or a[1:] != b[1:] for a, b in pairs)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_scores_with_shared_beginnings_are_those_of_one_token_at_a_time(config):
    assert not differs_from_the_slow_twin(config)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
@torch.no_grad()
def test_a_span_that_is_read_alone_scores_the_same(config):
    model = noisy(config)
    for ids, start in [span for spans in some_questions(model) for span in spans]:
        if len(ids) <= T + 1:
            logprobs, greedy = score_alone(model, ids, start)
            total, n, expected = slow_score(model, ids, start)
            assert abs(logprobs.sum() - total) < 1e-3 and (len(logprobs), greedy) == (n, expected)


def test_what_spans_begin_with_is_read_once_and_the_last_id_never():
    shared = list(range(20))
    row = SharedRow([(shared + [30 + n, 40, 41], 20) for n in range(4)], T)
    assert len(row.ids) == 20 + 4 * 2 and row.ids[:20] == shared and 41 not in row.ids
    assert SharedRow([(shared, 3), (shared, 3)], T).ids == shared[:-1]
    assert len(SharedRow([([1, 2, 3], 1), ([2, 2, 3], 1)], T).ids) == 4


@pytest.mark.parametrize("owner, name, old, new", [
    (SharedRow, "__init__", "places[n][start - 1:]", "places[n][start:] + places[n][:1]"),
    (SharedRow, "__init__", "shared_tokens(before, read)",
     "min(len(before), len(read), shared_tokens(before, read) + 1)"),
    (SharedRow, "__init__", "range(shared, len(read))",
     "range(len(self.pos), len(self.pos) + len(read) - shared)"),
    (SharedRow, "__init__", "self.close(path[shared:])", "self.close([])"),
    (SharedRow, "__init__", "max(1, start - cut[n])", "start"),
    (SharedRows, "append", "(t < self.ends)", "(t <= self.ends)"),
    (SharedRows, "append", "pos[:, None], window)", "pos[:, None], 999)"),
    (likelihood, "score", "sum(logprobs[part])", "logprobs[at]"),
    (likelihood, "score", "all(greedy[part])", "any(greedy[part])"),
    (likelihood, "score", "at += n", "at += 1")])
def test_a_span_that_sees_or_scores_another_id_would_be_noticed(owner, name, old, new, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    try:
        noticed = differs_from_the_slow_twin(MODERN)
    except (RuntimeError, IndexError, TypeError, AssertionError):       # a length does not fit
        noticed = True
    assert noticed


def test_batches_hold_every_row_once_and_the_longest_come_first():
    rows = [SimpleNamespace(ids=[0] * n) for n in (3, 9, 1, 4, 4, 30, 2)]
    found = list(batches(rows, 12))
    assert sorted(sum(found, [])) == list(range(7)) and found[0] == [5]
    assert all(len(rows[b[0]].ids) * len(b) <= 12 for b in found[1:])


def test_what_exceeds_the_context_loses_its_beginning_and_is_counted(tokenizer):
    model = noisy(GPT2)
    ids = [random.Random(1).randrange(65) for _ in range(50)]
    kept = ids[-T - 1:]
    [[found]] = score(model, [[(ids, 47)]])
    assert found.logprob == pytest.approx(slow_score(model, kept, len(kept) - 3)[0], abs=1e-4)
    engine = SimpleNamespace(model=model, tokenizer=tokenizer)
    questions = [([(ids, 47)], 0), ([(kept, 30)], 0)]
    assert eval_module.measure(engine, questions, 2, "")["cut"] == 1


def test_scoring_leaves_the_model_in_the_mode_it_was_in():
    model = noisy(GPT2).train()
    assert len(mean_log_probs(model, [([1, 2, 3], 1)])) == 1
    assert model.training


@pytest.mark.parametrize("context, continuation", [
    ("The capital is", " Paris"), ("Question?\nAnswer: ", "the list"), ("a ", "b"),
    ("Answer:  ", "A"), ("A row of", " rows of rows")])
def test_the_span_is_the_whole_answer_and_nothing_else(tokenizer, context, continuation):
    [(ids, start)] = token_spans(tokenizer, [(context, continuation)])
    assert ids[0] == tokenizer.eot and tokenizer.decode(ids[1:]) == context + continuation
    assert tokenizer.decode(ids[start:]).strip() == continuation.strip()
    assert tokenizer.decode(ids[1:start]) == context.rstrip() or context[-1] != " "


def test_one_token_is_scored_even_where_the_answer_melts_into_the_context(tokenizer):
    [(ids, start)] = token_spans(tokenizer, [("the", "")])
    assert start == len(ids) - 1 >= 1


# ---- tasks

class Parrot(torch.nn.Module):
    """Knows which token came after each three of some texts (fewer at the start), and no more."""

    def __init__(self, tokenizer, texts, block_size=256):
        super().__init__()
        self.config = SimpleNamespace(block_size=block_size)
        self.weight = torch.nn.Parameter(torch.zeros(tokenizer.n_vocab))
        self.next = {}
        for text in texts:
            ids = [tokenizer.eot, *tokenizer.encode_ordinary(text)]
            self.next.update({tuple(ids[max(0, t - 3):t]): ids[t] for t in range(1, len(ids))})

    def hidden(self, idx, cache, last):
        x = torch.zeros(*last.shape, len(self.weight))
        ends = torch.full(idx.shape, 999) if cache.ends is None else cache.ends[:, 0]
        for b, places in enumerate(last.tolist()):
            for n, t in enumerate(places):
                seen = tuple(idx[b, s].item() for s in range(t + 1) if t < ends[b, s])[-3:]
                if seen in self.next:
                    x[b, n, self.next[seen]] = 9.0
        return x

    def logits(self, x):
        return x


CHOICES = [dict(query="You can see", choices=["zzqx kk", "the moon"], gold=1),
           dict(query="She will eat", choices=["an apple", "jjw vvk"], gold=0)]
SCHEMAS = [dict(context_options=["Qqzx jwv", "Mary left"], continuation="for home", gold=1),
           dict(context_options=["Tom ran", "Vvk zzq"], continuation="by car", gold=0)]
GAPS = [dict(context="Two and two is ", continuation="four"),
        dict(context="A", continuation="bird")]
RIGHT = ["You can see the moon", "She will eat an apple", "Mary left for home", "Tom ran by car",
         "Two and two is four", "A bird"]
TABLE = """label,file,type,num_fewshot,continuation_delimiter,random_baseline_percent
mc,a/mc.jsonl.gz,multiple_choice,0,\"\"\" \"\"\",50
sc,a/sc.jsonl,schema,1,\"\"\" \"\"\",50
lm,b/lm.jsonl,language_modeling,0,\"\"\" \"\"\",0
gone,,language_modeling,0,\"\"\"\\nAnswer: \"\"\",0
"""


@pytest.fixture
def core_folder(tmp_path):
    for name, rows in {"a/mc": CHOICES, "a/sc": SCHEMAS, "b/lm": GAPS}.items():
        write_jsonl(tmp_path / f"eval_data/{name}.jsonl", rows)
    (tmp_path / "core_tasks.csv").write_text(TABLE)
    return tmp_path


@pytest.fixture
def parrot(tokenizer):
    return Engine(Parrot(tokenizer, RIGHT), tokenizer)


def test_a_rigged_model_prefers_the_right_ending(parrot, tmp_path):
    path = write_jsonl(tmp_path / "hellaswag.jsonl", CHOICES)
    assert run_task(parrot, HELLASWAG, path)["accuracy"] == 1.0
    write_jsonl(path, [dict(row, gold=1 - row["gold"]) for row in CHOICES])
    assert run_task(parrot, HELLASWAG, path)["accuracy"] == 0.0
    assert run_task(parrot, HELLASWAG, path, max_examples=1)["n"] == 1


@pytest.mark.parametrize("kind, rows", [
    ("multiple_choice", CHOICES), ("schema", SCHEMAS), ("language_modeling", GAPS)])
def test_each_type_of_task_is_right_only_for_a_model_that_knows(tokenizer, tmp_path, kind, rows):
    path, task = write_jsonl(tmp_path / "rows.jsonl", rows), Task("t", "", kind)
    knows = Engine(Parrot(tokenizer, RIGHT), tokenizer)
    wrong = Engine(Parrot(tokenizer, ["You can see zzqx kk", "She will eat jjw vvk",
                                      "Qqzx jwv for home", "Vvk zzq by car"]), tokenizer)
    assert run_task(knows, task, path) == dict(share_of(2, 2), cut=0)
    assert run_task(wrong, task, path)["accuracy"] == 0.0


def test_core_is_the_mean_of_centered_and_names_what_is_left_out(parrot, core_folder, capsys):
    result = core(parrot, core_folder)
    assert result["core"] == 1.0 and result["n"] == 6 and result["left_out"] == ["gone"]
    assert list(result["tasks"]) == ["mc", "sc", "lm"]
    assert "sc " in capsys.readouterr().out
    (core_folder / "eval_data/b/lm.jsonl").unlink()
    assert core(parrot, core_folder)["left_out"] == ["lm", "gone"]


def test_guessing_is_zero_after_centering():
    tasks = [("a", 0.25, share_of(1, 4)), ("b", 0.5, share_of(2, 4))]
    assert mean_of("core", tasks)["core"] == 0.0
    assert centered(0.62, 0.62) == 0.0 and centered(1.0, 0.62) == 1.0 and centered(0.0, 0.5) == -1.0
    mixed = mean_of("core", [*tasks, ("c", 0.0, share_of(3, 5))])
    assert mixed["core"] == pytest.approx(0.2)
    errors = [share_of(1, 4)["accuracy_error"] / 0.75, share_of(2, 4)["accuracy_error"] / 0.5,
              share_of(3, 5)["accuracy_error"]]
    assert mixed["core_error"] == pytest.approx(sum(e ** 2 for e in errors) ** 0.5 / 3)
    assert mixed["tasks"]["a"]["centered_error"] == pytest.approx(errors[0])


def test_the_standard_error_is_that_of_claims_and_stands_beside_each_accuracy():
    for hits, n in ((0, 7), (7, 7), (30, 100)):
        assert share_of(hits, n)["accuracy_error"] == pytest.approx(claims.share(hits, n).error,
                                                                    abs=1e-6)
    assert figures(dict(share_of(30, 100), cut=2)) == ["accuracy 0.3000 ± 0.0455", "n 100", "cut 2"]
    kinds = dict(a=share_of(1, 2), b=dict(share_of(2, 2), wrong=0.5, refused=0.0))
    assert figures(dict(share_of(3, 4), kinds=kinds))[1:3] == [
        "a 0.5000 ± 0.2500", "b 1.0000 ± 0.2165 (wrong 0.5000, refused 0.0000)"]
    assert figures(dict(accuracy=0.5, accuracy_error="?", n=1)) == ["accuracy 0.5000", "n 1"]


def test_the_published_list_of_tasks_reads_as_the_table_does(core_folder):
    table = core_tasks(core_folder)
    (core_folder / "core_tasks.csv").unlink()
    (core_folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nlm,0\nsc,50\n")
    (core_folder / "core.yaml").write_text(
        "seed: 9\nicl_tasks:\n-\n  label: sc\n  dataset_uri: a/sc.jsonl\n  num_fewshot: [1]\n"
        "  icl_task_type: schema\n- label: lm\n  dataset_uri: b/lm.jsonl\n  num_fewshot: [0]\n"
        '  icl_task_type: language_modeling\n  continuation_delimiter: "\\nAnswer: " # why\n')
    sc, lm = core_tasks(core_folder)
    assert sc == table[1]
    assert lm == Task("lm", "b/lm.jsonl", "language_modeling", 0, "\nAnswer: ", 0.0)


def test_shots_are_seeded_and_never_the_question_itself(tokenizer):
    rows = [dict(context=f"Say {n}", continuation=f"yes {n}") for n in range(8)]
    task = Task("t", "", "language_modeling", shots=7, delimiter=" - ")

    def texts():
        return [tokenizer.decode(spans[0][0][1:])
                for spans, _ in core_questions(tokenizer, task, rows, 3)]

    for n, text in enumerate(texts()):
        assert text.endswith(f"\n\nSay {n} - yes {n}") and text.count("\n\n") == 7
        assert sorted(text.split("\n\n")) == sorted(f"Say {m} - yes {m}" for m in range(8))
    assert texts() == texts()


def test_rows_come_in_one_order_from_plain_and_gzipped_files(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [
        dict(n=n, context="a\u2028b", continuation="c") for n in range(20)])
    rows = read_rows(path, "language_modeling")
    assert rows == read_rows(path, "language_modeling")
    assert sorted(row["n"] for row in rows) == list(range(20))
    assert [row["n"] for row in rows] != list(range(20))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_rows(tmp_path / "rows.jsonl.gz", "language_modeling") == rows


TWO = dict(query="a", choices=["b", "c"], gold=1)


@pytest.mark.parametrize("kind, row, said", [
    ("multiple_choice", dict(TWO, gold="1"), 'gold must be a whole number from 0 to 1, .* got "1"'),
    ("multiple_choice", dict(TWO, gold=7), "got 7"), ("letters", dict(TWO, gold=2), "got 2"),
    ("multiple_choice", dict(TWO, gold=-1), "got -1"), ("letters", dict(TWO, gold=1.0), "got 1.0"),
    ("multiple_choice", dict(TWO, gold=True), "got true"),
    ("multiple_choice", dict(TWO, choices=[]), r"choices must be a list .* got \[\]"),
    ("multiple_choice", dict(TWO, choices="bc"), 'got "bc"'),
    ("multiple_choice", dict(TWO, choices=["b", ""]), 'each of choices must be .* got ""'),
    ("multiple_choice", dict(TWO, choices=["b", 5]), "got 5"),
    ("letters", dict(TWO, choices=["b"] * 11), "choices must be at most 10, got 11"),
    ("letters", dict(TWO, query=None), "query must be a text, got null"),
    ("schema", dict(TWO, context_options=["a"], continuation="b"), "from 0 to 0"),
    ("schema", TWO, "there is no context_options"),
    ("language_modeling", dict(context="a", continuation=""), "continuation must be"),
    ("language_modeling", dict(context=3, continuation="a"), "context must be a text, got 3")])
def test_a_question_that_cannot_be_asked_is_refused_by_file_and_line(kind, row, said, tmp_path):
    good = dict(TWO, context_options=["a", "b"], continuation="c", context="")
    path = write_jsonl(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 2: .*{said}.*; get the file again"):
        read_rows(path, kind)


@pytest.mark.parametrize("old, new, said", [
    ("schema,1,", "schema,-1,", "num_fewshot must be a whole number, got -1"),
    ("schema,1,", "schema,x,", "num_fewshot must be a whole number, got x"),
    (',""" """,50\nlm', ",,50\nlm", "continuation_delimiter must be a text"),
    (',""" """,50\nlm', ",3,50\nlm", "continuation_delimiter must be a text in quotes, got 3"),
    (',50\nlm', ",100\nlm", "random_baseline_percent must be from 0 to 99, got 100"),
    (',50\nlm', ",nan\nlm", "random_baseline_percent must be from 0 to 99, got nan"),
    (',50\nlm', ",-5\nlm", "random_baseline_percent must be from 0 to 99, got -5"),
    ("schema,", "essay,", "type must be one of multiple_choice, schema, .* got essay"),
    ('sc,a/sc.jsonl,schema,1,""" """,50', "sc", "type must be a text"),
    ("label,file", "name,file", "there is no label")])
def test_a_bad_list_of_tasks_is_one_line_with_the_number_of_the_task(old, new, said, core_folder):
    assert TABLE.count(old) == 1
    (core_folder / "core_tasks.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(SystemExit, match=f"core_tasks.csv, task [12]: {said}.*; repair") as error:
        core_tasks(core_folder)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not CORE.exists(), reason="the CORE files are not on this machine")
def test_core_runs_on_the_real_files_and_says_that_coqa_is_missing(base_run, tokenizer):
    engine = Engine(load_checkpoint(base_run)[0], tokenizer)
    result = core(engine, CORE, max_examples=2)
    assert len(result["tasks"]) == 21 and result["left_out"] == ["coqa"]
    assert -1.7 < result["core"] < 1 and all(task["n"] == 2 for task in result["tasks"].values())


@pytest.mark.skipif(not CORE.exists(), reason="the CORE files are not on this machine")
def test_the_real_rows_make_three_types_of_questions(tokenizer):
    tasks = {task.label: task for task in core_tasks(CORE)}
    for label, spans_a_row in dict(winograd=2, jeopardy=1, arc_easy=4).items():
        rows = read_rows(CORE / "eval_data" / tasks[label].file, tasks[label].kind)
        [(spans, gold)] = core_questions(tokenizer, tasks[label], rows, 1)
        ids, start = spans[gold or 0]
        answer = rows[0].get("continuation") or rows[0]["choices"][gold]
        assert len(spans) == spans_a_row and tokenizer.decode(ids[start:]).strip() == answer


# ---- the chat prompt

def test_letters_are_asked_as_the_first_token_of_a_reply(tokenizer):
    rows = [dict(query="Question: Why?", choices=["so", "no"], gold=1),
            dict(query="Which?\nA. x\nB. y\nAnswer: ", choices=["A", "B"], gold=0)]
    (spans, gold), (listed, _) = letter_questions(tokenizer, None, rows, 2)
    ids, start = spans[0]
    assert gold == 1 and tokenizer.decode([spans[n][0][-1] for n in (0, 1)]) == "AB"
    assert start == len(ids) - 1 and tokenizer.decode(ids[:start]).endswith("assistant<|im_sep|>")
    assert "Why?\nA. so\nB. no\nAnswer" in tokenizer.decode(ids)
    assert tokenizer.decode(listed[0][0]).count("B. ") == 1


def scripted(tokenizer, replies, block_size=64):
    """An engine that replies to each question what a dict says."""
    def answer(conversations, max_new_tokens, temperature):
        assert temperature == 0
        return [replies[messages[-1]["content"]] for messages in conversations]
    model = SimpleNamespace(config=SimpleNamespace(block_size=block_size))
    return SimpleNamespace(tokenizer=tokenizer, model=model, answer=answer)


def test_accuracy_is_counted_for_each_kind(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "held_out.jsonl", [
        dict(question="1+1?", answer="2", kind="sums"),
        dict(question="2+2?", answer="4", kind="sums"),
        dict(question="Who?", answer="Ada", kind="identity", check="contains")])
    replies = {"1+1?": "#### 2", "2+2?": "#### 5", "Who?": "I am Ada."}
    result = solve(scripted(tokenizer, replies), path)
    assert result["kinds"] == dict(identity=share_of(1, 1), sums=share_of(1, 2))
    assert result["n"] == 3 and result["accuracy"] == pytest.approx(2 / 3) and result["cut"] == 0


def test_gsm8k_counts_the_number_after_the_last_marks(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [
        dict(question="a?", answer="so 1,000 <<500*2=1000>>\n#### 1,000"),
        dict(question="b?", answer="\n#### 7")])
    assert solve(scripted(tokenizer, {"a?": "#### 1000", "b?": "it is 7"}), path)["accuracy"] == 0.5


def test_a_question_that_leaves_no_room_counts_as_wrong_and_is_said(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(question="a?", answer="1"),
                                                 dict(question="x " * 99, answer="1")])
    result = solve(scripted(tokenizer, {"a?": "#### 1"}), path)
    assert result["accuracy"] == 0.5 and result["n"] == 2 and result["cut"] == 1


def test_a_finished_task_is_skipped_until_weights_or_arguments_change(base_run, tmp_path, capsys):
    run = shutil.copytree(base_run, tmp_path / "run")
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(question=q, answer="1") for q in "abc"])
    said = []
    for flags in ([], [], ["--max_examples", 2], ["--max_examples", 2]):
        run_main(eval_module, "--model", run, "--tasks", path, "--max_new_tokens", 4, *flags)
        said.append("skipped" in capsys.readouterr().out)
    assert said == [False, True, False, True]
    stored = json.loads((run / "eval.json").read_text())[str(path)]
    assert stored["n"] == 2 and stored["stage"] == "pretrain" and stored["seed"] == 1337
    save_weights(run / "model.safetensors", noisy(load_checkpoint(run)[0].config))
    run_main(eval_module, "--model", run, "--tasks", path, "--max_new_tokens", 4, *flags)
    assert "skipped" not in capsys.readouterr().out


def test_results_are_shown_even_if_they_cannot_be_written(base_run, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "\x1b.jsonl", [dict(question="a?", answer="1", kind=kind)
                                                 for kind in ("\x1b[2J", "\ud800")])
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(eval_module, "write_json", full)
    with pytest.raises(SystemExit, match="eval.json cannot be written: No space left on device; "):
        run_main(eval_module, "--model", base_run, "--tasks", path, "--max_new_tokens", 2)
    out = capsys.readouterr().out
    assert ("accuracy 0.0000 ± 0.2165 | \\x1b[2J 0.0000 ± 0.2722 | \\ud800 0.0000 ± 0.2722 | n 2"
            in out and "\x1b" not in out)


@pytest.mark.parametrize("stored", ["[]", "{", '{"%s": 3}', "[" * 200_000])
def test_a_damaged_eval_json_is_named_or_measured_again(stored, base_run, tmp_path):
    run = shutil.copytree(base_run, tmp_path / "run")
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(question="a?", answer="1")])
    (run / "eval.json").write_text(stored.replace("%s", str(path)))
    with contextlib.suppress(SystemExit):
        run_main(eval_module, "--model", run, "--tasks", path, "--max_new_tokens", 2)
        assert json.loads((run / "eval.json").read_text())[str(path)]["n"] == 1


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_model_of_almost_no_context_is_measured_all_the_same(block_size, tokenizer, core_folder):
    config = dataclasses.replace(GPT2, block_size=block_size, vocab_size=tokenizer.n_vocab)
    engine = Engine(noisy(config), tokenizer)
    assert core(engine, core_folder)["n"] == 6
    path = write_jsonl(core_folder / "p.jsonl", [dict(question="a?", answer="1")])
    assert solve(engine, path) == dict(share_of(0, 1), cut=1, kinds=dict(problems=share_of(0, 1)))


def test_a_base_model_is_asked_in_the_chat_prompt_and_that_is_said(base_run, tmp_path, capsys):
    run = shutil.copytree(base_run, tmp_path / "run")
    path = write_jsonl(tmp_path / "test.jsonl", [dict(question="a?", answer="1")])
    folder = tmp_path / "eval_data/world_knowledge"
    write_jsonl(folder / "arc_easy.jsonl", [dict(query="b?", choices=["x", "y"], gold=0)])
    run_main(eval_module, "--model", run, "--tasks", "gsm8k,chat", "--gsm8k", path, "--core_dir",
             tmp_path, "--max_new_tokens", 4)
    out, results = capsys.readouterr().out, json.loads((run / "eval.json").read_text())
    assert out.count("a base model is asked, which has never seen the chat prompt") == 2
    assert results["chat"]["left_out"] == ["arc_challenge", "mmlu", "humaneval"]
    assert list(results["chat"]["tasks"]) == ["arc_easy", "gsm8k"]


@pytest.mark.parametrize("flags, said", [
    (["--tasks", "helaswag"], "helaswag is missing; --tasks takes hellaswag, core, gsm8k"),
    (["--tasks", "hellaswag"], "hellaswag.jsonl is missing; get it"),
    (["--tasks", "core"], "core_tasks.csv is missing; "),
    (["--tasks", "gsm8k", "--gsm8k", "no.jsonl"], "no.jsonl is missing; get test.jsonl"),
    (["--tasks", "broken.jsonl"], "broken.jsonl, line 1: "),
    (["--tasks", "empty.jsonl"], "empty.jsonl is empty; a problem is a line "),
    (["--tasks", "hellaswag", "--core_dir", "."], "hellaswag.jsonl, line 1: there is no query; "),
    (["--tasks", "x", "--max_examples", "-1"], "--max_examples must be at least 1, got -1"),
    (["--tasks", "x", "--max_examples", "0"], "--max_examples must be at least 1, got 0"),
    (["--tasks", "x", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
    (["hellaswag", "--max_examples", "0"], "--max_examples must be at least 1, got 0"),
    (["--tasks", "good.jsonl,"], "--tasks good.jsonl,: a name is empty"),
    (["--tasks", ""], "--tasks : a name is empty"),
    (["--tasks", "good.jsonl", "--model", "none"], "none is not a run's folder; "),
    (["report", "none"], "none is not a run's folder; ")])
def test_a_bad_input_ends_in_one_line_that_says_what_to_do(flags, said, base_run, tmp_path,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "eval_data" / HELLASWAG.file, [dict(ctx="a", endings=["b"], label=0)])
    write_jsonl(tmp_path / "good.jsonl", [dict(question="a?", answer="1")])
    for name, text in dict(broken='{"a": ', empty="\n").items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    model = []
    if flags[0] == "--tasks" and "--model" not in flags:
        model = ["--model", base_run]
    with pytest.raises(SystemExit) as stopped:
        run_main(eval_module, *flags, *model)
    message = str(stopped.value)
    assert said in message and "\n" not in message
    assert ";" in message or message.startswith("--")


def test_a_folder_that_transformers_wrote_is_measured_offline(tmp_path, capsys, monkeypatch):
    """GPT-2's sizes but for the layers, with HF's tokenizer files and without any."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CORE.parent / "tiktoken_cache"))
    try:
        tokenizer = Tokenizer.pretrained("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    run = tmp_path / "hf"
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(run)
    write_jsonl(tmp_path / "eval_data" / HELLASWAG.file, CHOICES)
    tokens = {}
    for with_tokenizer in (False, True):
        if with_tokenizer:
            tokenizer.export_hf(tmp_path / "made.json")
            transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(tmp_path / "made.json")).save_pretrained(run)
        run_main(eval_module, "--model", run, "--tasks", "hellaswag", "--core_dir", tmp_path)
        tokens[with_tokenizer] = json.loads((run / "eval.json").read_text())["hellaswag"]
        (run / "eval.json").unlink()
    assert tokens[True] == tokens[False] and tokens[True]["n"] == 2
    assert "accuracy " in capsys.readouterr().out
