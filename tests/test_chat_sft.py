"""
chat_sft.py: what is learnt is what the assistant says and nothing else, no conversation is cut or
lost, and a run goes on bit by bit whatever the number of ranks.
"""
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import chat_sft
from chat_sft import Loader, add_gradients, fitting, hold_out, pack, pack_slowly, row_tensors
from conftest import (GPT2, assert_same_files, in_fp64, mutate, noisy, run_main, run_ranks,
                      stop_at)
from dialogs import Conversations, read_conversations
from problems import problems_that_fit, read_problems
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from sample import Engine
from training import Ranks, make_optimizer, read_log, save_run

GOLDEN = [dict(role="system", content="Be brief."), dict(role="user", content="6*7? <|im_end|>"),
          dict(role="assistant", content=[
              dict(type="think", text="hm"), dict(type="python", text="6*7"),
              dict(type="output", text="42"), dict(type="text", text="It is 42.")]),
          dict(role="user", content="Thanks"), dict(role="assistant", content="Bye")]


def turn(question, answer):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def write_conversations(path, conversations):
    lines = (json.dumps(dict(messages=messages)) + "\n" for messages in conversations)
    path.write_text("".join(lines), encoding="utf-8")
    return path


# ---- masks and targets

def supervised(tokenizer, ids, targets):
    """The text of the targets that count, its pieces apart."""
    runs, text = [], ""
    for target in [*targets, -1]:
        if target >= 0:
            text += tokenizer.decode([target])
        elif text:
            runs, text = [*runs, text], ""
    return runs


def check_golden_mask(tokenizer):
    """Only what the assistant says, tool calls and end tokens included, is a target."""
    rendered = [tokenizer.render(GOLDEN)]
    x, y = row_tensors([0], Conversations.of(rendered), 200, tokenizer.special["<|pad|>"])
    assert supervised(tokenizer, x, y.tolist()) == [
        "<|think|>hm<|/think|><|python|>6*7<|/python|>", "It is 42.<|im_end|>", "Bye<|im_end|>"]
    assert tokenizer.decode(x[:len(rendered[0][0])].tolist()) == (
        "<|endoftext|><|im_start|>system<|im_sep|>Be brief.<|im_end|>"
        "<|im_start|>user<|im_sep|>6*7? <|im_end|><|im_end|><|im_start|>assistant<|im_sep|>"
        "<|think|>hm<|/think|><|python|>6*7<|/python|><|output|>42<|/output|>It is 42.<|im_end|>"
        "<|im_start|>user<|im_sep|>Thanks<|im_end|><|im_start|>assistant<|im_sep|>Bye<|im_end|>")


def test_only_what_the_assistant_says_is_learnt(tokenizer):
    check_golden_mask(tokenizer)


def check_row_tensors():
    conversations = Conversations.of([([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6, 7], [0, 1, 0])])
    x, y = row_tensors([1, 0], conversations, 9, 0)
    assert x.tolist() == [5, 6, 7, 1, 2, 3, 4, 0, 0]
    assert y.tolist() == [6, -1, -1, -1, 3, 4, -1, -1, -1]
    x, y = row_tensors([0], conversations, 3, 0)                # a row that is exactly full
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [-1, 3, 4])


def test_target_at_t_is_token_t_plus_1_where_the_mask_is_1():
    check_row_tensors()


# ---- packing

def some_conversations(count=300, longest=33, seed=0):
    lengths = torch.randint(2, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return Conversations.of([([i] * n, [0] + [1] * (n - 1))
                             for i, n in enumerate(lengths.tolist())])


def check_pack(T=32):
    lengths = some_conversations(longest=T + 1).lengths()
    rows = pack(lengths, T, seed=1, epoch=0)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(1 <= n <= T + 1 for n in used)
    assert len(rows) <= 1.03 * sum(used) / (T + 1) + 1          # and little of them is padding


def test_packing_neither_splits_nor_drops_nor_repeats_a_conversation():
    check_pack()


def test_packing_is_seeded_and_every_epoch_has_another_order():
    lengths = some_conversations().lengths()
    rows = pack(lengths, 32, 1, 0)
    assert rows == pack(lengths, 32, 1, 0)
    assert rows != pack(lengths, 32, 2, 0) and rows != pack(lengths, 32, 1, 1)


@pytest.mark.parametrize("longest", [3, 9, 33])
def test_packing_makes_the_rows_of_its_slow_twin(longest):
    for seed in range(5):
        lengths = some_conversations(400, longest, seed).lengths()
        assert pack(lengths, 32, seed, 1) == pack_slowly(lengths, 32, seed, 1)


def test_every_conversation_begins_a_row_in_some_epoch():
    """As it does when it is asked: with nothing before it."""
    lengths = some_conversations(60).lengths()
    first = {row[0] for epoch in range(40) for row in pack(lengths, 64, 1, epoch)}
    assert len(first) == 60


def test_a_position_of_the_loader_is_one_integer():
    conversations = some_conversations(40)
    loader = Loader(conversations, 32, 1, 999)
    epochs = [pack(conversations.lengths(), 32, 1, epoch) for epoch in (0, 1)]
    rows = [row for epoch in epochs for row in epoch]
    for position in (len(rows) - 1, 0, len(epochs[0]), len(epochs[0]) - 1):     # in any order
        assert loader.row(position) == rows[position]
    x, y = loader.batch(1, 3, "cpu")
    last = row_tensors(rows[3], conversations, 32, 999)
    assert x.shape == y.shape == (3, 32) and torch.equal(x[2], last[0])
    assert torch.equal(y[2], last[1]) and loader.supervised(1, 3) == (y >= 0).sum()
    loader.row(9 * len(rows))
    assert loader.row(0) == rows[0] and len(loader.packed) == 2     # an old epoch is packed again


# ---- conversations that cannot be used

def quiet(*_, **__):
    return None


def test_too_long_and_unsupervised_conversations_are_left_out_and_counted(tokenizer):
    good, said = turn("Hi", "Yo"), []
    n = len(tokenizer.render(good)[0])
    conversations = Conversations.of([tokenizer.render(messages) for messages in (
        good, turn("Hi", "y" * n), good[:1], good)])
    found = fitting(conversations, n - 1, SimpleNamespace(say=said.append))
    assert len(found) == 2 and said[0].startswith("2 conversations, ")
    assert f"left out: 1 longer than {n} tokens, 1 with nothing to learn" in said[0]
    with pytest.raises(SystemExit, match="none of the 1 conv.* fits into 100 tokens; give other"):
        fitting(conversations.pick([2]), 99, SimpleNamespace(say=quiet))


@pytest.mark.parametrize("messages", [
    [dict(role="robot", content="x")], [dict(content="x")], [dict(role="user")], ["text"], "text",
    7, [dict(role="user", content=7)], [dict(role="assistant", content=[dict(type="sing")])]],
    ids=str)
def test_conversation_that_cannot_be_rendered_is_one_line_with_its_place(messages, tmp_path):
    path = write_conversations(tmp_path / "x.jsonl", [turn("Hi", "Yo"), messages])
    with pytest.raises(SystemExit, match=r"x\.jsonl, line 2: .*; repair the file") as error:
        read_conversations(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "reasoning_content", "weight"])
def test_what_would_be_lost_of_a_message_is_refused(field, tmp_path):
    messages = [dict(role="user", content="Hi"), dict(role="assistant", content="", **{field: 1})]
    path = write_conversations(tmp_path / "x.jsonl", [messages])
    with pytest.raises(SystemExit, match=f"line 1: a message has {field}"):
        read_conversations(str(path))


def test_zipped_conversations_with_a_byte_order_mark_are_read(tmp_path):
    line = json.dumps(dict(messages=turn("Hi", "Yo")))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(f"\ufeff{line}\r\n{line}\r\n\r\n".encode()))
    assert read_conversations(f"{tmp_path}/x.jsonl.gz:1.5") == 3 * [turn("Hi", "Yo")]


@pytest.mark.parametrize("flag, value", [
    ("batch_size", 0), ("total_batch_size", 0), ("save_every", 0), ("seed", -1), ("epochs", 0),
    ("epochs", "nan"), ("lr", 0), ("lr", "inf"), ("lr", -1)])
def test_a_flag_out_of_range_is_one_line_before_any_work(flag, value, tmp_path):
    with pytest.raises(SystemExit, match=f"--{flag} must be (above|at least) .*, got {value}"):
        run_main(chat_sft, "--data", "x.jsonl", "--out", tmp_path / "run", f"--{flag}", value)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_must_read_the_same_conversations(base_run, eight, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(Path(eight).read_bytes())
    run_main(chat_sft, *flags(base_run, data, tmp_path / "run", epochs=1))
    data.write_bytes(b"\n".join(data.read_bytes().split(b"\n")[:4]))
    with pytest.raises(SystemExit, match="another contents_of_data"):
        run_main(chat_sft, *flags(base_run, data, tmp_path / "run", epochs=1), "--resume")


def test_a_resumed_run_must_read_its_files_in_the_same_order(base_run, eight, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(Path(eight).read_bytes())
    run_main(chat_sft, *flags(base_run, eight, tmp_path / "run", epochs=1), "--data", eight, other)
    with pytest.raises(SystemExit, match="another data"):
        run_main(chat_sft, *flags(base_run, eight, tmp_path / "run", epochs=1), "--resume",
                 "--data", other, eight)


def test_held_out_questions_that_do_not_fit_are_counted(tokenizer, tmp_path):
    said = []
    rows = [dict(question=q, answer="1", kind="sum", check="final") for q in ("1?", "1? " * 60)]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = SimpleNamespace(say=said.append)
    found = problems_that_fit(path, read_problems(path), tokenizer, 64, log)
    assert [p["question"] for p in found] == ["1?"]
    assert "1 of 2 questions are longer than 63 tokens" in said[0]


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"message": []}', '{"messages": '])
def test_bad_line_of_conversations_is_named_by_its_number(line, tmp_path):
    path = write_conversations(tmp_path / "x.jsonl", [turn("a\u2028b", "b")] * 2)
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="x.jsonl, line 4: .*;.*;.*chat_sft.py make"):
        read_conversations(str(path))


@pytest.mark.parametrize("weight, indices", {
    "": [0, 1, 2, 3], ":1": [0, 1, 2, 3], ":2": [0, 1, 2, 3] * 2, ":0.5": [0, 2], ":.25": [0],
    ":1.5": [0, 1, 2, 3, 0, 2], ":0": []}.items())
def test_weight_behind_a_file_repeats_or_cuts_it(weight, indices, tmp_path):
    path = write_conversations(tmp_path / "x.jsonl", [turn("a\u2028b", str(i)) for i in range(4)])
    found = read_conversations(f"{path}{weight}")
    assert [int(messages[1]["content"]) for messages in found] == indices


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="missing.jsonl.*;.*;"):
        read_conversations(str(tmp_path / "missing.jsonl:2"))


# ---- runs

# longer than half a row: each is learnt where it will be asked, at the beginning
EIGHT = [turn(f"What is {word}?", f"{word} is {number}. There is no more that I can say.")
         for number, word in enumerate("red blue green black white brown pink grey".split(), 21)]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("eight") / "eight.jsonl", EIGHT)


def flags(base_run, data, out, **changes):
    given = {**dict(batch_size=4, total_batch_size=4 * 64, epochs=6, lr=3e-3, save_every=4),
             **changes}
    return ["--model", base_run, "--data", data, "--out", out,
            *(text for key, value in given.items() for text in (f"--{key}", value))]


def losses(run):
    return {row["step"]: row["loss"] for row in read_log(run) if "loss" in row}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Answers of 1 to 30 tokens, so that rows differ in how much of them is learnt."""
    conversations = [turn(f"Say a {i} times.", "a " * (1 + 7 * i % 20)) for i in range(24)]
    return write_conversations(tmp_path_factory.mktemp("mixed") / "mixed.jsonl", conversations)


@pytest.fixture(scope="module")
def whole(base_run, mixed, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    run_main(chat_sft, *flags(base_run, mixed, run))
    assert len(losses(run)) >= 8
    return run


def test_eight_conversations_are_learnt_and_replies_end_by_themselves(base_run, eight, tmp_path):
    problems = tmp_path / "held_out.jsonl"
    problems.write_text("".join(json.dumps(dict(
        question=q["content"], answer=a["content"].split(".")[0], check="contains",
        kind="eight")) + "\n" for q, a in EIGHT))
    run_main(chat_sft, *flags(base_run, eight, tmp_path / "run", epochs=60, lr=1e-2,
                              save_every=999), "--held_out", problems)
    model, meta = load_checkpoint(tmp_path / "run")
    tokenizer = chat_sft.Tokenizer.load(tmp_path / "run")
    prompts = [tokenizer.render(m[:1], for_completion=True)[0] for m in EIGHT]
    found = Engine(model, tokenizer).generate(prompts, 50, temperature=0)
    expected = [f"{m[1]['content']}<|im_end|>" for m in EIGHT]
    assert [tokenizer.decode(c.ids) for c in found] == expected
    assert {c.finish for c in found} == {"stop"} and meta["stage"] == "sft"
    accuracy = [row["accuracy"] for row in read_log(tmp_path / "run") if "accuracy" in row]
    assert accuracy == [dict(eight=0.0), dict(eight=1.0)]


def test_stopped_run_resumes_bit_by_bit(base_run, mixed, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        stop_at(patch, Loader, "batch", call=5)
        run_main(chat_sft, *flags(base_run, mixed, tmp_path))
    assert error.value.code == 130 and "--resume" in capsys.readouterr().out
    assert max(losses(tmp_path)) == 5
    run_main(chat_sft, *flags(base_run, mixed, tmp_path), "--resume")
    assert_same_files(tmp_path, whole, "model.safetensors", "config.json")
    assert losses(tmp_path) == losses(whole)


def assert_same_run(run, other):
    """But for the order in which sums are added."""
    assert losses(run).keys() == losses(other).keys()
    assert list(losses(run).values()) == pytest.approx(list(losses(other).values()), rel=1e-4)
    norms = [next(row["norm"] for row in read_log(r) if "norm" in row) for r in (run, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    weights, others = (load_file(r / "model.safetensors") for r in (run, other))
    for name, tensor in weights.items():
        assert (tensor - others[name]).norm() < 2e-3 * tensor.norm() + 1e-4, name


@pytest.mark.parametrize("batch_size", [1, 2])
def test_loss_does_not_depend_on_the_micro_batch(base_run, mixed, whole, batch_size, tmp_path):
    run_main(chat_sft, *flags(base_run, mixed, tmp_path, batch_size=batch_size))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_two_ranks_learn_what_one_does(base_run, mixed, whole, batch_size, tmp_path):
    run_ranks(chat_sft, *flags(base_run, mixed, tmp_path, batch_size=batch_size))
    assert_same_run(tmp_path, whole)


def test_loss_is_the_mean_over_the_supervised_tokens_of_the_step(base_run, mixed, whole):
    model, _ = load_checkpoint(base_run)
    tokenizer = chat_sft.Tokenizer.load(base_run)
    rendered = Conversations.of([tokenizer.render(m) for m in read_conversations(str(mixed))])
    rows = pack(rendered.lengths(), 64, 1337, 0)[:4]
    x, y = map(torch.stack, zip(*(row_tensors(row, rendered, 64, 0) for row in rows)))
    logprobs = model(x).log_softmax(-1)
    picked = [-logprobs[b, t, y[b, t]] for b in range(4) for t in range(64) if y[b, t] >= 0]
    assert losses(whole)[1] == pytest.approx((sum(picked) / len(picked)).item(), rel=1e-5)


# ---- one mean over the supervised tokens of a step

class Part(Ranks):
    """One of several ranks, whose sums are left for the test to add up."""
    def sum(self, *values):
        return list(values)


def step_of(conversations, batch_size, world_size, rows=8):
    """The loss and the gradients of a step of 8 rows, on ranks that work one after the other."""
    model = noisy(GPT2)
    loader = Loader(conversations, 32, 1, 0)
    loss = sum(add_gradients(model, model.hidden, loader, 0, rows, batch_size,
                             Part(rank, world_size)).item() for rank in range(world_size))
    return loss, {name: p.grad / world_size for name, p in model.named_parameters()}


def test_ranks_and_micro_steps_do_not_change_the_loss_or_a_gradient():
    conversations = some_conversations(60)
    with in_fp64():
        loss, gradients = step_of(conversations, 8, 1)
        for batch_size, world_size in ((2, 1), (4, 2), (1, 2), (2, 4)):
            other, others = step_of(conversations, batch_size, world_size)
            assert other == pytest.approx(loss, rel=1e-12)
            for name, gradient in gradients.items():
                assert (gradient - others[name]).norm() <= 1e-9 * gradient.norm() + 1e-15, name


def test_a_step_with_nothing_to_learn_is_0_and_not_nan():
    silent = Conversations.of([([5] * 20, [0] * 20)] * 8)
    loss, gradients = step_of(silent, 2, 2)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    half = Conversations.joined([silent, some_conversations(20)])
    assert all(gradient.isfinite().all() for gradient in step_of(half, 1, 2)[1].values())


# ---- held-out conversations

def test_held_out_conversations_do_not_depend_on_the_order_and_copies_go_with_them():
    conversations = some_conversations(400)
    train, held = hold_out(conversations, 0.2, SimpleNamespace(say=quiet))
    assert len(train) + len(held) == 400 and 50 < len(held) < 110
    twice = conversations.pick([*range(399, -1, -1), 7, *range(50)])
    train_2, held_2 = hold_out(twice, 0.2, SimpleNamespace(say=quiet))
    assert set(held_2.hashes) == set(held.hashes) and set(train_2.hashes) == set(train.hashes)
    assert not set(train_2.hashes) & set(held_2.hashes)


def test_held_out_conversations_have_a_limit_and_leave_some_to_train_on(monkeypatch):
    conversations = some_conversations(100)
    with pytest.raises(SystemExit, match="--val_fraction 0.999.* all 100 conversations; lower it"):
        hold_out(conversations, 0.9999, SimpleNamespace(say=quiet))
    monkeypatch.setattr(chat_sft, "VAL_TOKENS", 90)
    train, held = hold_out(conversations, 0.9999, SimpleNamespace(say=quiet))
    assert 60 < held.lengths().sum() <= 90 and len(train) + len(held) == 100


def test_val_loss_is_the_mean_over_supervised_tokens_and_ranks_share_it():
    model, held = noisy(GPT2), some_conversations(30)
    whole = chat_sft.evaluate(model, held, 32, 0, 3, Ranks())
    parts = [chat_sft.evaluate(model, held, 32, 0, 4, Part(rank, 2)) for rank in (0, 1)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5) and model.training
    rows = pack(held.lengths(), 32, 0, 0)
    x, y = map(torch.stack, zip(*(row_tensors(row, held, 32, 0) for row in rows)))
    assert model(x, y).item() == pytest.approx(whole, rel=1e-5)


def test_val_loss_and_stop_rate_are_logged_and_a_resume_keeps_the_split(base_run, mixed, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(chat_sft, "STOP_TOKENS", 8)
    run = flags(base_run, mixed, tmp_path, epochs=2, val_fraction=0.3, eval_every=2)
    run_main(chat_sft, *run)
    rows = [row for row in read_log(tmp_path) if "val_loss" in row]
    assert [row["step"] for row in rows][:2] == [0, 2] and rows[-1]["step"] == max(losses(tmp_path))
    assert all(0 <= row["stop_rate"] <= 1 for row in rows)
    with pytest.raises(SystemExit, match="another val_fraction"):
        run_main(chat_sft, *flags(base_run, mixed, tmp_path, epochs=2), "--resume")


# ---- warm start

def test_warm_start_takes_over_the_momenta_and_says_if_there_are_none(base_run, tokenizer,
                                                                      tmp_path):
    model, _ = load_checkpoint(base_run)
    optimizer = make_optimizer(model)
    model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizer.average_grads()
    optimizer.step()
    save_run(tmp_path, Ranks(), optimizer, model, tokenizer, "pretrain", step=1, settings={})
    said, fresh = [], make_optimizer(load_checkpoint(tmp_path)[0])
    chat_sft.warm_start(tmp_path, fresh, Ranks(), SimpleNamespace(say=said.append))
    assert fresh.steps == 1 and fresh.state.keys() == optimizer.state.keys()
    assert all(torch.equal(fresh.state[name], found) for name, found in optimizer.state.items())
    n = len(fresh.state)
    chat_sft.warm_start(base_run, make_optimizer(model), Ranks(), SimpleNamespace(say=said.append))
    assert said[0].startswith(f"{n} of {n} momenta") and "has no saved state" in said[1]


def test_finished_runs_are_kept_and_other_settings_refused(base_run, mixed, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="overwrite.*--resume"):
        run_main(chat_sft, *flags(base_run, mixed, whole))
    with pytest.raises(SystemExit, match="another lr;.*;"):
        run_main(chat_sft, *flags(base_run, mixed, whole, lr=0.1), "--resume")
    run_main(chat_sft, *flags(base_run, mixed, whole), "--resume")
    assert (whole / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("tokens", [100, 64, 4 * 64 + 128, 1])
def test_indivisible_batch_is_one_line_that_names_a_valid_one(base_run, eight, tokens, tmp_path):
    with pytest.raises(SystemExit, match="must be a multiple.*; try --total_batch_size") as error:
        run_main(chat_sft, *flags(base_run, eight, tmp_path, total_batch_size=tokens))
    assert int(str(error.value).split()[-1]) % (4 * 64) == 0


def test_a_model_without_our_tokens_learns_them(tokenizer, eight, tmp_path):
    """As with OpenAI's GPT-2, whose vocabulary ends before <|im_start|>."""
    model = GPT(GPTConfig(64, tokenizer.n_vocab - 12, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(tmp_path / "base", model)
    tokenizer.save(tmp_path / "base")
    run_main(chat_sft, *flags(tmp_path / "base", eight, tmp_path / "run", epochs=1))
    assert load_checkpoint(tmp_path / "run")[0].config.vocab_size == tokenizer.n_vocab


def test_show_prints_the_learnt_in_green(tmp_path, tokenizer, eight, capsys):
    tokenizer.save(tmp_path)
    chat_sft.show(SimpleNamespace(file=str(eight), tokenizer=tmp_path, count=2))
    green = re.findall(r"\033\[32m([^\033]*)", capsys.readouterr().out)
    assert "".join(green) == "".join(f"{m[1]['content']}<|im_end|>" for m in EIGHT[:2])


# ---- mutants

@pytest.mark.parametrize("name, old, new, check", [
    ("row_tensors", "targets[1:]", "targets[:-1]", check_row_tensors),
    ("row_tensors", "(conversations.mask[tokens],", "(1 - conversations.mask[tokens],",
     check_row_tensors),
    ("pack", "row.append(best)", "row.append(0)", check_pack),
    ("pack", "room = T + 1", "room = T + 2", check_pack),
    ("pack", "waiting.pop(place - 1)", "waiting.pop(0)", check_pack)], ids=lambda value: str(value)[:20])
def test_checks_notice_a_mutant(name, old, new, check, monkeypatch):
    check()
    mutate(monkeypatch, chat_sft, name, old, new)
    monkeypatch.setitem(globals(), name, getattr(chat_sft, name))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("old, new", [
    ("loader.supervised(first, batch_size) / supervised", "batch_size / total_rows"),
    ("ranks.rank * batch_size", "0"), ("* ranks.world_size).backward()", ").backward()")], ids=str)
def test_two_ranks_notice_a_mutant(old, new, base_run, mixed, whole, tmp_path, monkeypatch):
    mutate(monkeypatch, chat_sft, "add_gradients", old, new)
    run_ranks(chat_sft, *flags(base_run, mixed, tmp_path, batch_size=1))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, whole)
