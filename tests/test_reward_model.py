"""
reward_model.py, preferences.py, rank.py and what they add to rl_grpo.py: the loss against values
worked out by hand, gradients against differences, a row of each public set, and a person at a fake terminal.
"""
import doctest
import gzip
import itertools
import json
import math
import random

import pytest
import torch

import best_of_n
import preferences
import rank
import report
import reward_model
import rl_grpo
from conftest import MODERN, assert_same_files, mutate, noisy, run_main, run_ranks, stop_at
from demo import rlhf
from model import load_checkpoint
from preferences import Preference, as_preferences, read_preferences
from rank import Quit, as_ranking, ask_person, order_by, parse_order
from reward_model import (ModelReward, Ranking, RewardModel, add_gradients, batch_at, evaluate,
                          in_parts, pair_accuracy, pair_tensors, ranking_loss, rewards_of,
                          with_reward_head)
from test_style import check_commands
from training import Ranks, read_log


@pytest.mark.parametrize("module", [preferences, rank, reward_model, best_of_n, rlhf],
                         ids=lambda m: m.__name__)
def test_docstring_examples_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- the loss

def check_loss_by_hand():
    """Two rankings: of two replies, and of three of which the last two tie."""
    batch = [Ranking([[1], [2]], [(0, 1)], [], 0.0),
             Ranking([[1], [2], [3]], [(0, 1), (0, 2)], [], 0.0)]
    better, worse, weights = pair_tensors(batch, "cpu")
    rewards = torch.tensor([1.0, 0.0, 0.5, -0.5, 2.0])
    expected = math.log(1 + math.e ** -1) + (math.log(1 + math.e ** -1)
                                             + math.log(1 + math.e ** 1.5)) / 2
    found = ranking_loss(rewards, better, worse, weights).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_ranking_loss_is_that_worked_out_by_hand():
    check_loss_by_hand()


def test_a_ranking_of_k_is_the_mean_over_its_pairs():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, generator=generator)
    pairs = Preference([], list("abcde"), [3, 0, 4, 1, 2]).pairs()
    assert len(pairs) == 5 * 4 // 2
    better, worse, weights = pair_tensors([Ranking([[]] * 5, pairs, [], 0.0)], "cpu")
    one = torch.ones(1)
    alone = [ranking_loss(rewards[[i, j]], torch.tensor([0]), torch.tensor([1]), one)
             for i, j in pairs]
    torch.testing.assert_close(ranking_loss(rewards, better, worse, weights),
                               torch.stack(alone).mean())


def test_gradient_of_the_loss_is_that_of_differences():
    rewards = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    better, worse = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 1])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, better, worse, weights),
                                    rewards.requires_grad_())


@pytest.mark.parametrize("name, old, new, check", [
    ("ranking_loss", "rewards[worse] - rewards[better]", "rewards[better] - rewards[worse]",
     check_loss_by_hand),
    ("pair_tensors", "first += len(ranking.rows)", "first += 1", check_loss_by_hand),
    ("pair_tensors", "1 / len(ranking.pairs)", "1.0", check_loss_by_hand)])
def test_a_mutant_of_the_loss_is_noticed(name, old, new, check, monkeypatch):
    mutate(monkeypatch, reward_model, name, old, new)
    monkeypatch.setitem(globals(), name, getattr(reward_model, name))
    with pytest.raises(AssertionError):
        check()


# ---- the model

def noisy_reward_model():
    model = with_reward_head(noisy(MODERN), seed=0).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


ROWS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8], [9, 7, 9, 3]]


def check_last_token():
    """Each row by itself, unpadded, gives what it gives among longer ones, whatever the padding."""
    model = noisy_reward_model()
    alone = [model(torch.tensor([row]), torch.tensor([len(row) - 1])).item() for row in ROWS]
    for pad in (0, 64):
        assert rewards_of(model, ROWS, pad) == pytest.approx(alone, abs=1e-4)
        assert rewards_of(model, ROWS, pad, size=2) == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 0.5


def test_the_head_sees_the_last_token_of_each_reply_whatever_the_padding():
    check_last_token()


@pytest.mark.parametrize("owner, name, old, new", [
    (RewardModel, "forward", "hidden[torch.arange(len(idx), device=idx.device), last]",
     "hidden[:, -1]"),
    (reward_model, "rewards_of", "found[i] = reward", "found[start] = reward")], ids=str)
def test_a_head_that_looks_elsewhere_is_noticed(owner, name, old, new, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    monkeypatch.setitem(globals(), "rewards_of", reward_model.rewards_of)
    with pytest.raises(AssertionError):
        check_last_token()


def test_the_gradients_are_those_of_one_row_at_a_time():
    model = noisy_reward_model()
    batch = [Ranking(ROWS[:3], [(0, 1), (0, 2), (1, 2)], [], 0.0),
             Ranking(ROWS[2:], [(1, 0)], [], 0.0)]
    loss = add_gradients(model, batch, 2, 0, Ranks())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    r = [model(torch.tensor([row]), torch.tensor([len(row) - 1])) for row in ROWS]
    pairs = [(0, 1, 6), (0, 2, 6), (1, 2, 6), (3, 2, 2)]        # better, worse, 1 / weight
    expected = sum(-(r[i] - r[j]).sigmoid().log() / n for i, j, n in pairs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and "score.weight" in found
    for name, grad in found.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad, rtol=1e-3,
                                   atol=1e-6, msg=name)


def test_a_batch_is_cut_between_rankings_only():
    batch = [Ranking([[1]] * n, [], [], 0.0) for n in (30, 30, 30, 100, 2)]
    parts = in_parts(batch)
    assert [len(part) for part in parts] == [2, 1, 1, 1] and sum(parts, []) == batch


def test_each_epoch_visits_every_ranking_once():
    visited = [i for step in range(6) for i in batch_at(step, 5, 10, seed=0)]
    for epoch in range(3):
        assert sorted(visited[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert visited[:10] != visited[10:20]


# ---- measuring

def test_accuracy_averages_over_prompts_with_chance_for_ties_and_length_beside_it(monkeypatch):
    held = [Ranking([[2], [1]], [(0, 1)], [5, 9], 0.0),                     # right, shorter
            Ranking([[1], [1]], [(0, 1)], [9, 5], 0.0),                     # tied, longer
            Ranking([[1], [2], [3]], [(0, 1), (0, 2), (1, 2)], [1, 1, 1], 0.0)]     # all wrong
    monkeypatch.setattr(reward_model, "rewards_of",
                        lambda model, rows, pad, size: [float(row[0]) for row in rows])
    found = evaluate(None, held, 0, Ranks())
    assert found["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["longer_wins"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert found["accuracy_error"] == pytest.approx(0.5 / 3 ** 0.5)         # sd of 1, 0.5, 0
    assert pair_accuracy([(0, 1)], [1.0, 2.0]) == 0


# ---- files of others

PUBLIC = [
    ("hh-rlhf", dict(chosen="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: I go.",
                     rejected="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: No."),
     ["Hi", "Yes?", "Go"], ["I go.", "No."], [0, 1]),
    ("oasst pairs", dict(source="oasst", lang="en", prompt=[dict(role="user", content="Hi")],
                         chosen="Hello", rejected="What?", ranks=[0, 2]),
     ["Hi"], ["Hello", "What?"], [0, 1]),
    ("PandaLM", dict(idx=0, instruction="Say", input="hi", response1="ho", response2="hi",
                     annotator1=2, annotator2=0, annotator3=2), ["Say\n\nhi"], ["ho", "hi"], [1, 0]),
    ("LLMBar", dict(subset="Natural", input="Say hi", output_1="hi", output_2="ho", label=1),
     ["Say hi"], ["hi", "ho"], [0, 1]),
    ("Alpaca with chosen", dict(instruction="Fix it.", input="He go", output="He goes",
                                rejected="Stupid: he goes", chosen="He goes"),
     ["Fix it.\n\nHe go"], ["He goes", "Stupid: he goes"], [0, 1]),
    ("ours", dict(prompt="Hi", ranking=["a", ["b", "c"]]), ["Hi"], ["a", "b", "c"], [0, 1, 1]),
    ("TRL", dict(prompt=[dict(role="user", content="Hi")],
                 chosen=[dict(role="assistant", content="a")],
                 rejected=[dict(role="assistant", content="b")]), ["Hi"], ["a", "b"], [0, 1])]


@pytest.mark.parametrize("row, said, replies, ranks", [case[1:] for case in PUBLIC],
                         ids=[case[0] for case in PUBLIC])
def test_a_row_of_each_public_set_is_read_as_it_is(row, said, replies, ranks):
    found, = as_preferences(row)
    assert [message["content"] for message in found.messages] == said
    assert [message["role"] for message in found.messages] == ["user", "assistant", "user"][:len(said)]
    assert (found.replies, found.ranks) == (replies, ranks)


def test_replies_judged_one_by_one_are_compared_where_prompts_are_equal(tmp_path):
    context = json.dumps([dict(role="agent", text="Yes?"), dict(role="user", text="Tea"),
                          dict(role="agent", api=dict(menu="tea")),
                          dict(role="api", response=dict(items=["tea"]))])
    rows = [dict(context=context, generation=json.dumps(dict(role="agent", text=text)), reward=r)
            for text, r in (("Here", 1.0), ("No", 0.0), ("Never", 0.0))]
    rows.append(dict(rows[0], context=json.dumps([dict(role="user", text="Milk")])))
    write(tmp_path / "tm.jsonl", rows)
    (found,), lines = read_preferences([tmp_path / "tm.jsonl"])
    assert [m["role"] for m in found.messages] == ["assistant", "user", "assistant", "tool"]
    assert found.pairs() == [(0, 1), (0, 2)] and "1 have nothing to compare" in lines[0]


def test_every_ranked_message_of_a_tree_is_a_preference():
    def says(role, text, rank=None, replies=()):
        return dict(role=role, text=text, rank=rank, replies=list(replies))
    again = says("prompter", "More", None, [says("assistant", "c", 1), says("assistant", "d", 0)])
    tree = says("prompter", "Hi", None, [says("assistant", "a", 1, [again]),
                                         says("assistant", "b", 0)])
    found = as_preferences(dict(tree_state="ready", prompt=tree))
    assert [(p.replies, p.ranks, len(p.messages)) for p in found] == [
        (["a", "b"], [1, 0], 1), (["c", "d"], [1, 0], 3)]


def write(path, rows):
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row, error", [
    (dict(a=1, b=2), "line 1: the columns a, b are none of: prompt, ranking .*"),
    (dict(prompt="Hi", ranking="abc"), "line 1: ranking must be a list"),
    (dict(prompt="Hi", chosen="a", rejected=3), "line 1: rejected must be a text, got 3"),
    (dict(chosen="Hi", rejected="Ho"), "line 1: chosen must begin with"),
    (dict(prompt="Hi", chosen="a", rejected="a"), "no preference that can be used .1 have equal"),
    (dict(input="x", output_1="a", output_2="b", label=3), "label must be 1 or 2, got 3")])
def test_a_row_that_cannot_be_used_is_named_with_its_reason(row, error, tmp_path):
    path = write(tmp_path / "x.jsonl.gz", [row])
    with pytest.raises(SystemExit, match=error):
        read_preferences([path])


def test_a_vote_without_a_majority_is_left_out():
    row = dict(instruction="x", input="", response1="a", response2="b", annotator1=0, annotator2=1,
               annotator3=2)
    with pytest.raises(preferences.LeftOut, match="ties"):
        as_preferences(row)


# ---- runs

@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    """Rankings by the number of b, which are not longer than others."""
    replies = ["a b b b", "a a a b", "a a a a a a a"]
    rows = [dict(prompt=f"Question {n}", ranking=replies[n % 2:]) for n in range(60)]
    return write(tmp_path_factory.mktemp("prefs") / "prefs.jsonl", rows)


def reward_flags(sft_run, prefs, out, **changes):
    given = {**dict(lr=3e-3, batch_size=8, eval_every=4, save_every=3, val_fraction=0.2), **changes}
    return ["--model", sft_run, "--data", prefs, "--out", out,
            *(text for key, value in given.items() for text in (f"--{key}", value))]


@pytest.fixture(scope="module")
def trained(sft_run, prefs, tmp_path_factory):
    run = tmp_path_factory.mktemp("reward")
    run_main(reward_model, *reward_flags(sft_run, prefs, run, epochs=4))
    return run


def rows_with(run, key):
    return [row for row in read_log(run) if key in row]


def test_a_taste_is_learnt_though_the_longer_reply_is_worse(trained):
    figures = rows_with(trained, "longer_wins")
    assert figures[-1]["accuracy"] > 0.95 and figures[-1]["longer_wins"] < 0.5
    assert figures[-1]["val_loss"] < figures[0]["val_loss"]


def test_scores_have_mean_0_and_standard_deviation_1(trained):
    reward = ModelReward(trained, "cpu")
    problems = [dict(messages=[dict(role="user", content=f"Question {n}")]) for n in range(60)]
    best = reward.score(problems[::2], ["a b b b"] * 30)
    middle = reward.score(problems, ["a a a b"] * 60)
    worst = reward.score(problems, ["a a a a a a a"] * 60)
    scores = torch.tensor(best + middle + worst)
    assert min(best) > max(worst) and scores.mean().abs() < 0.2 and 0.8 < scores.std() < 1.2


@pytest.mark.parametrize("call", [2, 5])
def test_a_stopped_run_resumes_bit_by_bit(call, sft_run, prefs, tmp_path, monkeypatch):
    run_main(reward_model, *reward_flags(sft_run, prefs, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        stop_at(patch, reward_model, "add_gradients", call=call)
        run_main(reward_model, *reward_flags(sft_run, prefs, tmp_path / "run"))
    assert error.value.code == 130
    run_main(reward_model, *reward_flags(sft_run, prefs, tmp_path / "run"), "--resume")
    assert_same_files(tmp_path / "run", tmp_path / "whole", "model.safetensors", "config.json")


def test_two_ranks_train_the_same_reward_model(sft_run, prefs, tmp_path):
    flags = dict(val_fraction=0.2, save_every=99, eval_every=99)
    run_main(reward_model, *reward_flags(sft_run, prefs, tmp_path / "one", **flags))
    run_ranks(reward_model, *reward_flags(sft_run, prefs, tmp_path / "two", **flags))
    one, two = (rows_with(tmp_path / name, "norm") for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    one, two = (rows_with(tmp_path / name, "accuracy")[-1] for name in ("one", "two"))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)


def test_other_stages_refuse_a_reward_model_and_it_refuses_theirs(trained, sft_run):
    with pytest.raises(SystemExit, match="a deepdive_reward model .* only gpt2 and deepdive"):
        load_checkpoint(trained)
    with pytest.raises(SystemExit, match="a gpt2 model .* only deepdive_reward"):
        ModelReward(sft_run, "cpu")


@pytest.mark.parametrize("flag, value", [("epochs", 0), ("lr", "nan"), ("batch_size", 0),
                                         ("val_fraction", 0), ("val_fraction", 1), ("seed", -1)])
def test_a_flag_out_of_range_is_one_line(flag, value, tmp_path):
    with pytest.raises(SystemExit, match=f"--{flag} must be (above|at least) .*, got {value}"):
        run_main(reward_model, "--data", "x.jsonl", "--out", tmp_path / "run", f"--{flag}", value)


# ---- RL against it

def rl_flags(sft_run, prompts, out, *more):
    return ["--model", sft_run, "--task", prompts, "--out", out, "--max_steps", 4, "--prompts", 2,
            "--group_size", 4, "--max_new_tokens", 8, "--eval_every", 2, "--save_every", 99, *more]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [dict(prompt=f"Question {n}") for n in range(8)]
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text("def count(problem, reply):\n    return reply.count('e')\n"
                    "def nothing(problem, reply):\n    return None\n")
    return path


def test_rl_takes_the_scores_of_a_reward_model_and_follows_gold_and_kl(
        sft_run, trained, prompts, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelReward, "cut_off", None)       # an untrained model never ends
    run_main(rl_grpo, *rl_flags(sft_run, prompts, tmp_path / "rl"), "--reward", f"model:{trained}",
             "--gold", f"{judge}:count", "--kl", 0.1, "--lr", 1e-3)
    steps = rows_with(tmp_path / "rl", "reward")
    assert len(steps) == 4 and all("gold" in row and row["gold"] >= 0 for row in steps)
    assert steps[0]["kl_reply"] == pytest.approx(0, abs=1e-4) and steps[-1]["kl_reply"] > 0
    kept = rows_with(tmp_path / "rl", "replies")
    assert [row["step"] for row in kept] == [0, 2, 3] and len(kept[0]["replies"]) == 4       # the last ones, too


def test_max_kl_stops_with_a_line_and_saves_and_a_resume_does_not_go_on(
        sft_run, prompts, judge, tmp_path, capsys):
    flags = [*rl_flags(sft_run, prompts, tmp_path / "rl"), "--reward", f"{judge}:count",
             "--max_kl", 1e-3, "--lr", 1e-2]
    run_main(rl_grpo, *flags)
    assert "--max_kl 0.001: the replies of step" in capsys.readouterr().out
    _, meta = load_checkpoint(tmp_path / "rl")
    assert meta["step"] == len(rows_with(tmp_path / "rl", "reward")) < 4
    before = (tmp_path / "rl" / "model.safetensors").read_bytes()
    run_main(rl_grpo, *flags, "--resume")
    assert (tmp_path / "rl" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("spec, error", [
    ("judge", "--reward must be checker, model:RUN or FILE.py:FUNCTION, got judge"),
    ("nothing.py:f", "--reward nothing.py:f: there is no file nothing.py"),
    ("{judge}:absent", "defines no function absent"),
    ("{judge}:nothing", "must return a finite number, got None")])
def test_a_reward_that_cannot_be_used_is_one_line(spec, error, sft_run, prompts, judge, tmp_path):
    with pytest.raises(SystemExit, match=error):
        run_main(rl_grpo, *rl_flags(sft_run, prompts, tmp_path), "--reward",
                 spec.format(judge=judge))


# ---- best of n, and where the gold turns

def test_best_of_n_is_the_mean_over_all_choices_of_n():
    generator = torch.Generator().manual_seed(0)
    rewards, golds = torch.randn(2, 7, generator=generator).tolist()
    for n in range(1, 8):
        best = [max(choice, key=lambda i: rewards[i])
                for choice in itertools.combinations(range(7), n)]
        expected = [sum(scores[i] for i in best) / len(best) for scores in (rewards, golds)]
        assert best_of_n.best_of_n(rewards, golds, n) == pytest.approx(expected)


def test_the_kl_of_best_of_n_is_0_for_one_and_exact_for_distinct_rewards():
    assert best_of_n.kl_of(1) == 0
    # of M equally likely replies the i-th best is taken with probability ((i+1)/M)^n - (i/M)^n
    M, n = 20_000, 8
    p = [((i + 1) / M) ** n - (i / M) ** n for i in range(M)]
    assert best_of_n.kl_of(n) == pytest.approx(sum(x * math.log(x * M) for x in p if x), abs=1e-3)


def test_best_of_n_measures_both_objectives(sft_run, prompts, judge, tmp_path):
    run_main(best_of_n, "--model", sft_run, "--task", prompts, "--reward", f"{judge}:count",
             "--gold", f"{judge}:count", "--samples", 5, "--prompts", 5, "--max_new_tokens", 6,
             "--out", tmp_path / "best_of_n.jsonl")
    rows = best_of_n.read_best_of_n(tmp_path)
    assert [row[0] for row in rows] == [1, 2, 4] and [row[2] for row in rows] == [row[3] for row in rows]
    assert float(rows[-1][2]) > float(rows[0][2])


def test_the_gold_turns_where_it_is_highest():
    golds = [0, 2, 3, 2, 1]
    rows = [dict(step=n, kl_reply=n / 2, gold=gold, reward=n) for n, gold in enumerate(golds)]
    assert best_of_n.turning_point(rows) == (rows[2], rows[4])
    assert best_of_n.turning_rows(best_of_n.turning_point(rows)) == [
        ("highest gold", 2, "1.00", "2.00", "3.00"), ("the last", 4, "2.00", "4.00", "1.00")]
    assert best_of_n.turning_point([]) is None


def test_the_report_shows_both_objectives_the_turn_and_the_replies(tmp_path):
    run = tmp_path / "rlhf"
    run.mkdir()
    rows = [dict(step=n, reward=n / 4, gold=-n / 5, kl_reply=n / 9, seconds=1.0) for n in range(9)]
    rows += [dict(step=n, kl_reply=float(n), replies=[dict(reply=f"A <b>{word}</b>", reward=1.5, gold=0.5)])
             for n, word in ((0, "list"), (8, "pelican"))]
    write(run / "log.jsonl", rows)
    write(run / "best_of_n.jsonl", [dict(n=4, kl=0.64, reward=1.25, gold=0.75)])
    run_main(report, run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("by KL in nats a reply", "rlhf, gold", "highest gold", "0.64", "1.25",
                 "A &lt;b&gt;list&lt;/b&gt;", "A &lt;b&gt;pelican&lt;/b&gt;", "8.0 nats away"):
        assert text in page, text


# ---- the demo

def test_the_demos_judge_likes_a_funny_word_or_two_in_a_sentence():
    best = "A pelican finds a banana."
    for worse in ("A list finds a banana.", "A list finds a tree.", "A pelican finds a banana banana.",
                  "pelican banana.", "A pelican finds a banana", "",
                  "A pelican finds a banana with a kazoo and calls a trousers."):
        assert rlhf.funny({}, worse) < rlhf.funny({}, best) == 2, worse
    jokes = [rlhf.joke("list", "tree", random.Random(seed)) for seed in range(200)]
    assert {rlhf.funny({}, text) for text in jokes} >= {0, 1, 2} and all(
        rlhf.funny({}, text) >= 0 for text in jokes)


def test_the_demos_commands_exist_and_carry_its_names(tmp_path):
    names = dict(model="m", out=tmp_path, steps=5, seed=1)
    commands = [command.format(**names) for command in rlhf.COMMANDS]
    assert check_commands("\n".join(commands)) == len(commands) == 8


# ---- a person's ranks

@pytest.mark.parametrize("typed, order", [("2 1 3", [[1], [0], [2]]), ("2, 3, 1", [[1], [2], [0]]),
                                          ("3>1 = 2", [[2], [0, 1]]), ("1=2=3", [[0, 1, 2]])])
def test_an_order_may_be_typed_in_several_ways(typed, order):
    assert parse_order(typed, 3) == order


@pytest.mark.parametrize("typed, error", [
    ("2 1", "no place for 3; every reply needs one"), ("2 1 4", "4 is not the number of a reply; they are 1 to 3"),
    ("1 1 2 3", "reply 1 stands there twice"), ("best", "best is not the number"),
    ("1 = 2 = 3 =", "= is not the number"), ("", "no place for 1 and 2 and 3")])
def test_a_wrong_order_is_explained(typed, error):
    with pytest.raises(ValueError, match=error):
        parse_order(typed, 3)


def type_in(monkeypatch, *lines):
    """A person who types these lines and then closes the terminal."""
    waiting = list(lines)

    def answer(prompt=""):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    return waiting


def test_a_person_is_asked_again_until_the_order_is_right(monkeypatch, capsys):
    type_in(monkeypatch, "3 4", "2 1", "q")
    assert ask_person(["a", "b"]) == [[1], [0]]
    assert "3 is not the number of a reply" in capsys.readouterr().out
    with pytest.raises(Quit):
        ask_person(["a", "b"])
    with pytest.raises(Quit):
        ask_person(["a", "b"])


def test_ranks_are_kept_and_only_the_rest_is_asked(sft_run, prompts, tmp_path, monkeypatch, capsys):
    flags = ["--model", sft_run, "--prompts", prompts, "--out", tmp_path / "out.jsonl", "--samples",
             2, "--max_new_tokens", 6]
    type_in(monkeypatch, "2 1", "s", "1=2", "q")
    run_main(rank, *flags)
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"prompt": [{"role": "us')              # as a kill leaves it
    assert len(type_in(monkeypatch, *["1 2"] * 9)) == 9
    run_main(rank, *flags)
    assert "3 of 8 prompts are ranked" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked = [row["prompt"][0]["content"] for row in rows]
    assert asked == [f"Question {n}" for n in range(8)] and len(rows[1]["ranking"][0]) == 2
    found, _ = read_preferences([tmp_path / "out.jsonl"])
    assert len(found) == 6                                  # two were ties


def test_a_scripted_judge_ranks_and_a_stopped_one_continues_alike(sft_run, prompts, judge, tmp_path):
    flags = ["--model", sft_run, "--prompts", prompts, "--samples", 3, "--max_new_tokens", 6,
             "--judge", f"{judge}:count"]
    run_main(rank, *flags, "--out", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    run_main(rank, *flags, "--out", tmp_path / "part.jsonl")
    assert_same_files(tmp_path, tmp_path, "part.jsonl")
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for line in lines:
        ranking = [[one] if isinstance(one, str) else one for one in json.loads(line)["ranking"]]
        counts = [{reply.count("e") for reply in tied} for tied in ranking]
        assert all(len(same) == 1 for same in counts)
        assert counts == sorted(counts, key=max, reverse=True)


def test_equal_scores_tie():
    assert as_ranking(["a", "b", "c"], order_by([1.0, 3.0, 1.0])) == ["b", ["a", "c"]]
