"""
talk.py: numbers have the standard errors that the formulas give, a verdict follows from them alone,
each claim counts what its sentence says, and what is missing is said.
"""
import inspect
import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import claims
import claims_assistant
import claims_base
import claims_data
import claims_reasoner
import talk
from claims import (Check, Finding, Measured, NotMeasured, chi_squared, difference, mean, ratio,
                    share)
from conftest import run_main


# ---- numbers, errors, verdicts

def test_the_error_of_a_share_is_laplaces_and_never_0():
    assert share(5, 8).error == pytest.approx(math.sqrt(0.6 * 0.4 / 10))
    assert share(0, 10).value == 0 and share(0, 10).error > 0.05
    assert share(10, 10).error == pytest.approx(share(0, 10).error)


def test_the_errors_are_the_deviations_of_what_repeated_draws_give():
    """The oracle is a simulation: 2,000 samples of 40 documents."""
    rng = random.Random(0)
    means, ratios, errors = [], [], []
    for _ in range(2000):
        lengths = [rng.uniform(1, 9) for _ in range(40)]
        bits = [length * rng.gauss(2, 0.5) for length in lengths]
        means.append(mean(bits).value)
        ratios.append(ratio(bits, lengths).value)
        errors.append((mean(bits).error, ratio(bits, lengths).error))
    for values, error in zip((means, ratios), zip(*errors)):
        deviation = math.sqrt(sum((v - sum(values) / 2000) ** 2 for v in values) / 1999)
        assert sum(error) / 2000 == pytest.approx(deviation, rel=0.06)


def test_a_difference_of_pairs_knows_that_they_are_pairs():
    paired = difference([10.1, 20.1, 30.2], [10, 20, 30])
    assert paired.value == pytest.approx(0.4 / 3) and paired.error < 0.04
    with pytest.raises(ValueError):
        difference([1], [1, 2])


def test_chi_squared_is_pearsons_with_the_p_value_of_the_tables():
    """3.841 and 18.307 are the 5 % points of 1 and 10 degrees of freedom."""
    for freedom, point in ((1, 3.841459), (10, 18.307038)):
        bins = [10.0] * (freedom + 1)
        counts = [10 + math.sqrt(5 * point), 10 - math.sqrt(5 * point), *bins[2:]]
        statistic, found, p = chi_squared(counts, bins)
        assert (found, statistic) == (freedom, pytest.approx(point))
        assert p == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("gap, error, verdict", [
    (0.21, 0.1, "shown"), (0.19, 0.1, "not at this size"), (-1.0, 0.1, "not at this size"),
    (0.1, 0.0, "shown"), (0.0, 0.0, "not at this size"), (9.0, math.inf, "not at this size")])
def test_a_verdict_is_two_standard_errors_of_every_check(gap, error, verdict):
    passing = Check("sure", Measured(5.0, 1.0), Measured(1.0, 1.0))
    check = Check("unsure", Measured(1 + gap, error), Measured(1.0))
    assert Finding("", [check]).verdict == verdict
    assert Finding("", [passing, check]).verdict == ("shown" if check.passes else "partly shown")
    assert str(check).startswith("passes" if verdict == "shown" else "fails")


# ---- what is counted

def test_a_share_of_pairs_of_words_falls_where_a_text_repeats_itself():
    assert claims.distinct_ngrams("a b c d".split(), 2) == 1
    assert claims.distinct_ngrams("a b a b a b".split(), 2) == 2 / 5


def test_recited_tokens_are_counted_up_to_the_first_wrong_one():
    assert claims.matched_tokens([4, 5, 9, 7], [4, 5, 6, 7]) == 2
    assert claims.matched_tokens([4], [4, 5]) == 1 and claims.matched_tokens([], [4]) == 0


def test_the_bins_of_the_coin_hold_all_draws_and_5_or_more_are_expected():
    order = [0.5, 0.3, 0.15, 0.03, 0.02]
    counts, expected = claims_base.binned(Counter({0: 60, 2: 20, 4: 20}), order, order)
    assert counts == [60, 0, 20, 20] and expected == pytest.approx([50, 30, 15, 5])


def test_a_smaller_vocabulary_is_the_first_merges(tokenizer):
    text = "the function returns the number"
    small = claims_data.cut(tokenizer, 300)
    ids = small.encode_ordinary(text)
    assert max(ids) < 300 and small.decode(ids) == text
    lengths = [len(claims_data.cut(tokenizer, n).encode_ordinary(text)) for n in (256, 300, 400)]
    assert lengths[0] == len(text) > lengths[1] > lengths[2]


# ---- claims on tiny models: what they ask, and that they can fail

class Played:
    """Models whose replies are played: a function of (roles, question, how the reply begins)."""

    seed = 1

    def __init__(self, tokenizer, reply, problems=()):
        self.tokenizer = tokenizer
        self.reply = reply
        self.rows = problems

    def engine(self, *roles):
        return self

    def problems(self, name, *kinds, most=None):
        return [row for row in self.rows if row["kind"] in kinds]

    def held_out(self, kind, most=None):
        return self.problems("", kind)

    def replies(self, roles, conversations, begun=(), max_new_tokens=48, search=None, python=True):
        begun = self.tokenizer.decode(begun)
        found = []
        for conversation in conversations:
            if not isinstance(conversation, str):
                conversation = conversation[-1]["content"]
            found.append(begun + self.reply(conversation, begun, python))
        return found


def calculator(question, begun, python):
    """Knows sums if it may write freely, products if it may use Python; else it says 7."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if "+" in question and not begun:
        return f"The sum is #### {sum(numbers)}."
    if "*" in question and python and not begun:
        return f"<|python|>x<|/python|><|output|>1<|/output|>It is #### {math.prod(numbers)}."
    return " 7."


def test_tokens_to_think_pay_only_for_who_needs_them(tokenizer):
    found = claims_reasoner.think(Played(tokenizer, calculator))
    assert found.verdict == "shown" and found.figures["steps_3_digit_sums"].value == 1
    assert found.figures["leap_3_digit_sums"].value == 0
    at_once = Played(tokenizer, lambda question, begun, python: calculator(question, "", python))
    assert claims_reasoner.think(at_once).verdict == "not at this size"


def test_a_product_counts_only_if_it_is_right_after_the_tool(tokenizer):
    found = claims_reasoner.arithmetic(Played(tokenizer, calculator))
    assert found.verdict == "shown" and found.figures["called"].value == 1
    blind = Played(tokenizer, lambda question, begun, python: " 7.")
    assert claims_reasoner.arithmetic(blind).verdict == "not at this size"


def test_in_one_leap_a_reply_begins_where_answers_part(tokenizer):
    """The space before a number is a token of its own here, so it is given; one before a word
    belongs to the word, so it is not."""
    begun = []
    models = Played(tokenizer, lambda question, begin, python: begun.append(begin) or "")
    claims_reasoner.in_one_leap(models, ["?"], "It is ####", ["3", "44"])
    claims_reasoner.in_one_leap(models, ["?"], "It is ####", ["the", "for"])
    assert begun == ["It is #### ", "It is ####"]


@pytest.mark.parametrize("question, found", [
    ("How many e are in lemmas?", ("e", "lemmas")), ("Count the s in csusm", ("s", "csusm")),
    ("how many times is the letter r in strawberry", ("r", "strawberry")), ("Why?", None)])
def test_a_question_to_count_names_its_letter_and_its_word(question, found):
    assert claims_reasoner.letter_and_word(question) == found


def test_a_new_chat_has_forgotten_the_sum_before(tokenizer):
    asked = []

    class Chats(Played):
        def replies(self, roles, conversations, **_):
            asked.extend(conversations)
            sums = [sum(int(n) for message in chat for n in re.findall(r"\d+", message["content"])
                        if message["role"] == "user") for chat in conversations]
            return [f"#### {total}" for total in sums]
    in_chat, in_new_chat = claims_assistant.remembered_sums(Chats(tokenizer, None))
    assert (in_chat.value, in_new_chat.value) == (1, 0) and len(asked) == 3 * claims_assistant.CHATS


def invented_names(reply):
    """The verdict on an assistant that knows `known` and replies this about every other name."""
    rows = [dict(kind="known", question="What is known?", answer="It is known.",
                 checker="overlap", messages=[dict(role="user", content="What is known?")])] * 20
    rows += [dict(row, kind="made up", answer="", question="What is zork?",
                  messages=[dict(role="user", content="What is zork?")]) for row in rows]
    return rows, lambda question, *_: "It is known." if "known" in question else reply


@pytest.mark.parametrize("reply, verdict, answered", [
    ("It returns a list.", "shown", 1.0), ("I don't know.", "partly shown", 0.0),
    ("<|search|>zork<|/search|>", "partly shown", 0.0)])
def test_who_refuses_or_searches_does_not_hallucinate(tokenizer, monkeypatch, reply, verdict,
                                                      answered):
    rows, answer = invented_names(reply)
    monkeypatch.setattr(claims_assistant, "own_log_probs", lambda models, asked, replies:
                        [-1.0 + (asked[0]["kind"] == "known")] * len(replies))
    found = claims_assistant.hallucination(Played(tokenizer, answer, rows))
    assert (found.verdict, found.figures["invented_answered"].value) == (verdict, answered)


# ---- real, tiny models

@pytest.fixture(scope="module")
def models(base_run, sft_run, data):
    return talk.Models(dict(base=base_run, sft=sft_run), data, None, "cpu")


def test_the_bits_of_a_document_are_those_of_its_probability_in_windows(models):
    """The oracle: the model's own loss over each window of the context's length."""
    engine = models.engine("base")
    ids = models.val_documents()[-1]
    whole = torch.tensor([engine.tokenizer.eot, *ids])
    nats = 0.0
    for start in range(0, len(ids), 64):
        window = whole[start:start + 65][None]
        nats += engine.model(window[:, :-1], window[:, 1:]).item() * (window.shape[1] - 1)
    assert claims_base.bits_of(models, ids) == pytest.approx(nats / math.log(2), rel=1e-5)


def test_val_documents_are_the_shard_without_its_separators(models):
    eot = models.engine("base").tokenizer.eot
    documents = models.val_documents()
    joined = [i for ids in documents for i in (eot, *ids)]
    assert joined == models.shards("val").read(0, 700).tolist() and all(documents)


def test_an_untrained_model_starts_at_ln_v_and_its_coin_is_fair(models):
    found = claims_data.loss(SimpleNamespace(**{name: getattr(models, name) for name in (
        "engine", "seed", "val_documents", "shards")}, log=lambda role: []))
    first = found.checks[0]
    assert first.passes and found.verdict == "partly shown"     # it has not learnt anything
    assert claims_base.coin(models).checks[0].passes


def test_weights_are_restored_after_training_on_a_document(models, monkeypatch):
    monkeypatch.setattr(models, "val_documents", lambda: [list(range(80)), [5, 6] * 40])
    lowered, restored = claims_base.test_time(models).checks
    assert restored.passes and 0 < lowered.larger.value < 1


def test_what_is_planted_often_is_recited(models, monkeypatch):
    """An untrained model that reads nothing else."""
    monkeypatch.setattr(claims_base, "ORDINARY_ROWS", 0)
    monkeypatch.setattr(claims_base, "STEPS", 30)
    engine = models.engine("base")
    row = [engine.tokenizer.eot, 9, 8, 7, 6]
    reader = type(engine)(claims_base.read_on(models, [row] * 60, lr=1e-2), engine.tokenizer)
    assert reader.generate([row[:2]], 3, temperature=0)[0].ids == row[2:]
    assert engine.generate([row[:2]], 3, temperature=0)[0].ids != row[2:]


def test_the_best_of_noise_is_not_above_its_mean():
    """The oracle: the highest of windows of pure noise, measured on the scores that chose it, is
    0.7 above the mean; measured on the others it is not."""
    rng = random.Random(0)
    best = [claims_reasoner.at_its_best([rng.gauss(1, 1) for _ in range(50)]).value
            for _ in range(300)]
    assert mean(best).value == pytest.approx(1, abs=0.1)
    assert claims_reasoner.at_its_best([0] * 10 + [5] * 10 + [1] * 20).value == 5


@pytest.mark.parametrize("reward, gold, held, verdict", [
    (2.0, 0.2, 0.9, "shown"), (2.0, 0.9, 0.9, "partly shown"), (0.0, 0.9, 0.5, "not at this size")])
def test_rlhf_is_shown_if_the_reward_rises_and_the_gold_turns(tmp_path, reward, gold, held,
                                                              verdict):
    noise = [0.01 * (i % 3) for i in range(40)]
    for name, last in (("without-kl", gold), ("with-kl", held)):
        rows = [dict(step=i, reward=(i // 20) * reward + n, gold=(0.9, last)[i // 20] + n)
                for i, n in enumerate(noise)]
        (tmp_path / "demo-rlhf" / name).mkdir(parents=True)
        (tmp_path / "demo-rlhf" / name / "log.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows))
    models = SimpleNamespace(run=lambda *roles: tmp_path / "demo-honest")
    assert claims_reasoner.rlhf(models).verdict == verdict


@pytest.mark.parametrize("pass_1, verdict", [
    (0.9, "shown"), (0.5, "partly shown"), (0.02, "not at this size")])
def test_practice_goes_beyond_if_one_try_beats_sixteen_of_before(tmp_path, pass_1, verdict):
    """The chains of six arrows, which were taught, do not count."""
    def test(step, arrows, right, k):
        return dict(step=step, kind=f"{arrows} arrows", n=32, accuracy=right, sampled=32,
                    pass_1=right, pass_16=k)
    rows = [test(0, 6, 1.0, 1.0), test(0, 8, 0.0, 0.6), test(0, 10, 0.0, 0.4),
            test(9, 6, 0.0, 0.0), test(9, 8, pass_1, 1.0), test(9, 10, pass_1, 1.0)]
    folder = tmp_path / "demo-beyond" / "seed_0" / "rl"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = SimpleNamespace(run=lambda *roles: tmp_path / "demo-honest")
    assert claims_reasoner.beyond(models).verdict == verdict


@pytest.mark.parametrize("log, usd", [
    ([dict(header=dict(device="cpu x 2")), dict(step=1, seconds=1800)], 0.05),
    ([dict(header=dict(device="NVIDIA H100 x 8")), dict(step=1, seconds=3600)], 24.0),
    ([dict(header=dict(device="cuda")), dict(step=1, seconds=3600, usd=7.5)], 7.5), ([], 0.0)])
def test_a_stage_costs_its_time_on_its_cores_or_gpus_or_what_it_logged(log, usd):
    assert claims_data.stage_usd(log, 3.0, 0.05) == pytest.approx(usd)


# ---- the sitting

def test_a_sitting_measures_each_claim_once_and_writes_talk_json(models, tmp_path, monkeypatch,
                                                                 capsys):
    calls = []

    def measure(models):
        calls.append(1)
        return Finding("x", [Check("a", Measured(2.0, math.inf), Measured(1.0))])

    def missing(models):
        calls.append(2)
        raise NotMeasured("run this")

    monkeypatch.setattr(talk, "CLAIMS", [talk.Claim("one", "One.", measure),
                                         talk.Claim("two", "Two.", missing)])
    for again in (False, False, True):
        talk.sitting(models, [tmp_path], again)
    assert calls == [1, 2, 2, 1, 2]         # what was not measured is tried again
    found = json.loads((tmp_path / "talk.json").read_text())["claims"]
    assert [entry["verdict"] for entry in found] == ["not at this size", "not measured"]
    assert found[1]["said"] == "run this" and "of 2 claims" in capsys.readouterr().out


def test_a_missing_part_is_not_measured_and_says_what_makes_it(models):
    for claim in talk.CLAIMS:
        if claim.name in ("funnel", "probing", "memories", "search", "discovery", "rlhf",
                          "beyond", "modalities", "jagged"):
            entry = talk.measure(claim, models)
            assert entry["verdict"] in ("not measured", "not at this size"), entry
    with pytest.raises(NotMeasured, match="chat_sft"):
        models.run("honest")


def test_an_unknown_claim_names_the_nearest(monkeypatch):
    with pytest.raises(SystemExit, match="tokns is not a claim; did you mean tokens"):
        run_main(talk, "tokns")
    assert talk.chosen(["5", "funnel"])[0][1].name == "coin"
    with pytest.raises(SystemExit, match="99"):
        talk.chosen(["99"])


def test_roles_follow_stages_and_a_run_brings_its_bases(tmp_path):
    chain = []
    for name, stage in (("a", "pretrain"), ("b", "sft"), ("c", "sft"), ("d", "rl")):
        run = tmp_path / name
        run.mkdir()
        about = dict(stage=stage, base=str(chain[-1]) if chain else None)
        (run / "config.json").write_text(json.dumps(dict(deepdive=about)))
        (run / "model.safetensors").write_bytes(bytes(8))
        chain.append(run)
    assert talk.newest(tmp_path) == chain[-1]
    assert talk.with_bases(chain[-1:]) == talk.with_bases([chain[0], chain[3]]) == chain
    assert talk.roles_of(chain) == dict(zip(("base", "sft", "honest", "rl"), chain))
    assert talk.roles_of(chain[:2]) == dict(base=chain[0], sft=chain[1])


def test_every_claim_is_a_function_of_40_lines_at_most_that_says_against_what():
    for claim in talk.CLAIMS:
        lines = inspect.getsource(claim.measure).splitlines()
        assert len(lines) <= 40, (claim.name, len(lines))
        assert re.search(r"Against:", claim.measure.__doc__), claim.name
    assert len(talk.CLAIMS) == len({claim.name for claim in talk.CLAIMS}) == 24
