"""
train_gpt2.py: the loader gives every token once, a run that was killed goes on bit by bit, and two
ranks train what one does. Runs are of 12 steps on the manuals of conftest.py.
"""
import doctest
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recipe
import train_gpt2
from bpe import Tokenizer
from conftest import (GPT2, MODERN, ROOT, assert_same_files, in_fp64, mutate, noisy, run_main, run_ranks,
                      stop_at, write_shard)
from exchange import Exchange
from model import GPT, GPTConfig, load_checkpoint
from test_model import RECIPE, text_only
from recipe import is_spike, memory_bytes, plan_batch, schedule
from train_gpt2 import Loader, Shards, compressors_bpb, evaluate, shuffled_rows
from training import Optimizer, Ranks, RunLog, finish, make_optimizer, read_log

HERE = dict(cwd=ROOT, capture_output=True, text=True)
PRESETS = dict(adamw=["--model", "gpt2"], muon=["--model", "d4"])


def flags(data, out, preset="muon", **changes):
    config = dict(n_embd=32, n_head=2, block_size=changes.pop("block_size", 32))
    given = {**dict(batch_size=2, total_batch_size=256, max_steps=12, eval_every=6, save_every=6),
             **changes}
    return [*PRESETS[preset], "--config", *(f"{key}={value}" for key, value in config.items()),
            "--data", data, "--out", out,
            *(text for key, value in given.items() for text in (f"--{key}", value))]


def shapeless(flags):
    """For --init_from, which brings its own --config."""
    return flags[:2] + flags[flags.index("--data"):]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """{preset: run}, 12 steps without interruption in this process."""
    runs = {preset: tmp_path_factory.mktemp(preset) for preset in PRESETS}
    for preset, run in runs.items():
        run_main(train_gpt2, *flags(data, run, preset))
    return runs


def logged(run, key):
    return {row["step"]: row[key] for row in read_log(run) if key in row and "step" in row}


# ---- data

@pytest.fixture
def counting(tmp_path):
    """Tokens 0 … 999 in three shards of both versions."""
    parts = [(range(10), 1), (range(10, 700), 2), (range(700, 1000), 1)]
    for number, (part, version) in enumerate(parts):
        write_shard(tmp_path / f"x_train_{number}.bin", list(part), version=version)
    return Shards(tmp_path, "train")


def check_every_token_once(shards):
    loader, T = Loader(shards, 7, seed=5), 7
    rows = [loader.row(position) for position in range(loader.n_rows)]
    assert all((np.diff(row) == 1).all() and len(row) == T + 1 for row in rows)
    targets = np.concatenate([row[1:] for row in rows])
    assert sorted(targets) == list(range(1, loader.n_rows * T + 1)) and loader.n_rows == 999 // 7


def test_an_epoch_gives_every_token_once(counting):
    check_every_token_once(counting)


def test_order_depends_on_seed_and_epoch_and_a_position_is_one_integer(counting):
    loader, n = Loader(counting, 7, seed=5), 142
    rows = [loader.row(position)[0] for position in range(2 * n)]
    again = Loader(counting, 7, seed=5)
    for position in (2 * n - 1, 3, n):
        assert again.row(position)[0] == rows[position]
    other = [Loader(counting, 7, seed=6).row(position)[0] for position in range(n)]
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(other)
    assert rows[:n] != rows[n:] and rows[:n] != other and rows[:n] != sorted(rows[:n])


def slow_shuffled_rows(n_rows, seed, epoch):
    """shuffled_rows with Python's own integers, a row at a time."""
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
        return z ^ z >> 31

    start = mix((mix(seed % 2 ** 64) + epoch) % 2 ** 64)
    keys = [mix((start + (row + 1) * 0x9E3779B97F4A7C15) % 2 ** 64) for row in range(n_rows)]
    return sorted(range(n_rows), key=keys.__getitem__)


@pytest.mark.parametrize("seed", [0, 1337, -1, 2 ** 64 - 1])
def test_shuffled_rows_are_those_of_their_slow_twin(seed):
    for epoch in range(3):
        assert shuffled_rows(500, seed, epoch).tolist() == slow_shuffled_rows(500, seed, epoch)


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated():
    n = 2000
    orders = [shuffled_rows(n, seed, epoch) for seed in range(8) for epoch in range(8)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = [np.argsort(order) for order in orders]        # where each row is read
    between = np.corrcoef([np.arange(n), *places]) - np.eye(len(orders) + 1)
    assert np.abs(between).max() < 5 / n ** 0.5             # five standard deviations
    following = [np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders]
    assert np.abs(following).max() < 5 / n ** 0.5
    same = sum((a == b).sum() for a, b in zip(orders, orders[1:]))
    assert 25 < same < 110                                  # one in n, so 63 of all


def test_batch_holds_rows_and_the_tokens_after_them(counting):
    loader = Loader(counting, 7, seed=5)
    x, y = loader.batch(140, 4, "cpu")      # over the end of the epoch
    assert x.shape == y.shape == (4, 7) and (y == x + 1).all() and x.dtype == torch.int64
    assert x[:, 0].tolist() == [loader.row(140 + b)[0] for b in range(4)]


def test_shards_are_read_across_their_borders(counting):
    rng = np.random.default_rng(0)
    assert counting.n_tokens == 1000
    random_ranges = np.sort(rng.integers(0, 1000, (50, 2)), axis=1)
    for start, end in [(0, 1000), (9, 11), (699, 701), *random_ranges]:
        if start < end:
            assert counting.read(start, end - start).tolist() == list(range(start, end))


@pytest.mark.parametrize("header, words", [
    (dict(magic=20240801), "magic 20240801"), (dict(version=7), "version 7"),
    (dict(count=101), "1224 bytes, but its header promises 1226"), (dict(count=99), "promises")])
def test_bad_shard_is_one_line(header, words, tmp_path):
    write_shard(tmp_path / "x_train_0.bin", range(100), **header)
    with pytest.raises(SystemExit, match=words) as error:
        Shards(tmp_path, "train")
    assert "x_train_0.bin" in str(error.value) and "; " in str(error.value)
    assert "python shards.py" in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_too_short_shards_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="python shards.py --data"):
        Shards(tmp_path, "train")
    (tmp_path / "x_train_0.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="0 bytes"):
        Shards(tmp_path, "train")
    write_shard(tmp_path / "x_train_0.bin", range(8))
    with pytest.raises(SystemExit, match="lower --seq_len"):
        Loader(Shards(tmp_path, "train"), 8, seed=0)


@pytest.mark.parametrize("name", ["pretrain", "my_train", "train_data", "eval", "val", "retrieval",
                                  "medieval", "x"])
def test_no_name_of_a_data_set_mixes_its_splits(name, tmp_path):
    for number, split in enumerate(["val", "train", "train"]):
        write_shard(tmp_path / f"{name}_{split}_{number:06d}.bin", [number] * 10)
    assert set(Shards(tmp_path, "val").read(0, 10)) == {0}
    train = Shards(tmp_path, "train")
    assert train.n_tokens == 20 and set(train.read(0, 20)) == {1, 2}


def test_llm_cs_names_without_digits_are_found_and_an_index_has_the_last_word(tmp_path):
    write_shard(tmp_path / "tiny_shakespeare_train.bin", range(10))
    write_shard(tmp_path / "tiny_shakespeare_val.bin", range(3))
    assert (Shards(tmp_path, "train").n_tokens, Shards(tmp_path, "val").n_tokens) == (10, 3)
    rows = [dict(file="tiny_shakespeare_train.bin", split="val")]
    (tmp_path / "index.json").write_text(json.dumps(dict(shards=rows)))
    assert Shards(tmp_path, "val").n_tokens == 10
    with pytest.raises(SystemExit, match="no shards of the train split"):
        Shards(tmp_path, "train")


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"shards": [3]}', '{"shards": [{}]}',
                                  '{"shards": 5}'])
def test_a_damaged_index_is_one_line(text, tmp_path):
    (tmp_path / "index.json").write_text(text)
    write_shard(tmp_path / "x_train_0.bin", range(9))
    if text == "[]":
        assert Shards(tmp_path, "train").n_tokens == 9
        return
    with pytest.raises(SystemExit, match="index.json is not an index of shards .*; remove it"):
        Shards(tmp_path, "train")


def indexed(tmp_path, tokenizer, ids=range(300)):
    """A folder as shards.py writes it: both splits hold `ids`."""
    tokenizer.save(tmp_path / "tokenizer")
    rows = []
    for split in ("train", "val"):
        path = tmp_path / f"x_{split}_0.bin"
        write_shard(path, list(ids))
        rows.append(dict(file=path.name, split=split,
                         sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    index = dict(tokenizer=dict(sha256=tokenizer.sha256), shards=rows)
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def test_shards_that_another_tokenizer_made_or_that_were_changed_are_refused(tokenizer, tmp_path):
    data = indexed(tmp_path / "data", tokenizer)
    run_main(train_gpt2, *flags(data, tmp_path / "run", max_steps=1))
    with open(data / "x_train_0.bin", "r+b") as file:
        file.seek(1030)
        file.write(b"\1\1")
    with pytest.raises(SystemExit, match="x_train_0.bin is not the file that index.json describes;"):
        run_main(train_gpt2, *flags(data, tmp_path / "other"))
    Tokenizer.train(["another text"] * 9, 300).save(data / "tokenizer")
    with pytest.raises(SystemExit, match="made the shards, but .*; bring that one back"):
        run_main(train_gpt2, *flags(data, tmp_path / "other"))


def test_a_token_beyond_the_vocabulary_names_its_shard(tokenizer, tmp_path):
    data = indexed(tmp_path / "data", tokenizer, [*range(200), 400, *range(100)])
    with pytest.raises(SystemExit, match="x_(val|train)_0.bin holds token 400, .* has 400;"):
        run_main(train_gpt2, *flags(data, tmp_path / "run", max_steps=3))


def test_init_from_a_run_with_another_tokenizer_is_refused(data, base_run, tmp_path):
    run = shutil.copytree(base_run, tmp_path / "run")
    Tokenizer.train(["another text"] * 9, 300).save(run)
    with pytest.raises(SystemExit, match="--init_from .* has the tokenizer .*; tokenize the data"):
        run_main(train_gpt2, *shapeless(flags(data, tmp_path / "out")), "--init_from", run)


@pytest.mark.parametrize("split, ids, said", [
    ("val", [], "holds 0 tokens"), ("val", [1], "holds 1 tokens"), ("train", [1], "holds 1 tokens")])
def test_a_split_too_short_to_predict_anything_is_named(split, ids, said, tmp_path):
    write_shard(tmp_path / f"x_{split}_0.bin", ids)
    with pytest.raises(SystemExit, match=said):
        Shards(tmp_path, split)


def test_a_val_split_without_text_and_a_tiny_context_do_not_end_a_run(tokenizer, tmp_path):
    data = indexed(tmp_path / "data", tokenizer)
    write_shard(data / "x_val_0.bin", [tokenizer.eot] * 20)
    (data / "index.json").unlink()
    for block_size in (1, 4):
        run = tmp_path / str(block_size)
        run_main(train_gpt2, *flags(data, run, block_size=block_size, max_steps=1))
        assert logged(run, "val_loss") and not logged(run, "val_bpb")


# ---- validation

def twin_evaluate(model, tokens, tokenizer, T):
    """Window after window, token after token."""
    nats, text_nats, text_bytes = [], 0.0, 0
    for start in range(0, len(tokens) - 1, T):
        row = tokens[start:start + T + 1]
        logprobs = model(torch.tensor([row[:-1]])).double().log_softmax(-1)[0]
        for t, target in enumerate(row[1:]):
            nats.append(-logprobs[t, target].item())
            if target != tokenizer.eot:
                text_nats += nats[-1]
                text_bytes += len(tokenizer.decode_bytes([target]))
    return sum(nats) / len(nats), text_nats / text_bytes / math.log(2)


def check_evaluate(data, tokenizer, max_tokens=None):
    model = noisy(GPTConfig(**{**vars(GPT2), "vocab_size": 400}))
    shards = Shards(data, "val")
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).long()
    tokens = shards.read(0, min(shards.n_tokens, (max_tokens or 10**9) + 1)).tolist()
    assert tokenizer.eot in tokens[1:]
    found = evaluate(model, shards, token_bytes, 32, 3, Ranks(), max_tokens)
    assert found == pytest.approx(twin_evaluate(model, tokens, tokenizer, 32), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [None, 500, 10**9])
def test_val_loss_and_bits_per_byte_equal_their_slow_twin(data, tokenizer, max_tokens):
    check_evaluate(data, tokenizer, max_tokens)


def test_ranks_share_the_validation_text_out(data, tokenizer):
    model, shards = noisy(GPTConfig(**{**vars(GPT2), "vocab_size": 400})), Shards(data, "val")
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).long()

    class Fake(Ranks):
        def sum(self, *values):
            sums.append(values)
            return values

    def sums_of(world_size):
        for rank in range(world_size):
            evaluate(model, shards, token_bytes, 32, 3, Fake(rank, world_size))
        return np.sum([sums.pop() for _ in range(world_size)], axis=0)

    sums = []
    assert sums_of(3) == pytest.approx(sums_of(1), rel=1e-6)


def test_compressors_see_the_text_of_the_shards(data, tokenizer):
    shards = Shards(data, "val")
    text = tokenizer.decode(shards.read(0, shards.n_tokens)).replace("<|endoftext|>", "").encode()
    found = compressors_bpb(shards, tokenizer)
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert 1 < found["xz"] < 8


def test_known_words_are_those_of_the_training_text_in_lower_case(data, tokenizer):
    shards = Shards(data, "train")
    known = train_gpt2.known_words(shards, tokenizer)
    text = tokenizer.decode(shards.read(0, shards.n_tokens)).replace("<|endoftext|>", " ").lower()
    assert set(re.findall("[a-z]+", text)) >= {word for word in known if "'" not in word} - {
        "endoftext"} and len(known) > 50 and all(word == word.lower() for word in known)


def test_the_share_of_known_words_leaves_out_the_two_ends_of_a_sample(tokenizer):
    ids = tokenizer.encode_ordinary("ly The cat doesn't zzqy. sa")
    rows = []
    engine = SimpleNamespace(
        tokenizer=tokenizer, prompt_ids=lambda prompt: [1],
        model=SimpleNamespace(config=SimpleNamespace(block_size=8)),
        generate=lambda *_, num_samples, **__: [SimpleNamespace(ids=ids)] * num_samples)
    log = SimpleNamespace(say=lambda text, **row: rows.append(row))
    train_gpt2.show_samples(log, 7, engine, {"the", "cat", "doesn't", "sa", "ly"})
    assert rows[-1] == dict(step=7, known_words=0.75)


# ---- schedules and batch arithmetic

def test_the_recipes_example_is_true():
    result = doctest.testmod(recipe)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("step, expected", {
    0: (1 / 700, 0.95, 1), 349: (0.5, 0.95, 1), 699: (1, 0.95, 1), 700: (1, 0.95, 1),
    10350: (0.5, 0.95, 1), 20000: (0, 0.95, 1)}.items())
def test_gpt2_schedule_is_linear_warmup_then_cosine_to_zero(step, expected):
    assert schedule(step, 20000, modern=False) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", {
    0: (1 / 40, 0.85, 1),
    19: (0.5, 0.85 + 0.12 * 19 / 400, 0.5 + 0.5 * math.cos(math.pi * 19 / 4000)),
    200: (1, 0.91, 0.5 + 0.5 * math.cos(math.pi / 20)),
    1400: (1, 0.97, 0.5 + 0.5 * math.cos(math.pi * 0.35)),
    2000: (0.05 + 0.95 * 2000 / 2600, 0.90 + 0.07 * 2000 / 2600, 0.5),
    4000: (0.05, 0.90, 0)}.items())
def test_modern_schedule_is_the_recipes(step, expected):
    assert schedule(step, 4000, modern=True) == pytest.approx(expected)


@pytest.mark.parametrize("modern", [False, True])
def test_the_learning_rate_falls_to_the_share_that_is_asked_for(modern):
    scales = [schedule(step, 1000, modern, final_lr=0.2)[0] for step in range(1000)]
    plain = [schedule(step, 1000, modern, final_lr=0.0)[0] for step in range(1000)]
    assert scales[-1] == pytest.approx(0.2, abs=0.002) and plain[-1] == pytest.approx(0, abs=0.002)
    assert scales[200] == plain[200] == 1 if modern else scales[200] > plain[200]
    for scale, without in zip(scales[100:], plain[100:]):
        assert scale == pytest.approx(0.2 + 0.8 * without)


def test_the_learning_rate_falls_in_the_share_of_the_steps_that_is_asked_for():
    for warmdown, begins in ((None, 350), (0.85, 150)):
        falling = [step for step in range(40, 1000)
                   if schedule(step, 1000, True, 0.0, warmdown)[0] < 1]
        assert falling == list(range(begins + 1, 1000))


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("max_steps", [1, 2, 9, 50])
def test_short_schedules_stay_within_bounds(modern, max_steps):
    for step in range(max_steps):
        lr_scale, momentum, decay_scale = schedule(step, max_steps, modern)
        assert 0 < lr_scale <= 1 and 0.85 <= momentum <= 0.97 and 0 < decay_scale <= 1


def batch_flags(**given):
    flags = dict(total_batch_size=None, batch_size=None, seq_len=None, max_steps=None, ratio=None)
    return SimpleNamespace(**{**flags, **given})


@pytest.mark.parametrize("depth, steps", {4: 352, 6: 708, 8: 1280, 12: 1680, 20: 3320, 24: 5568,
                                          26: 7007}.items())
def test_plan_batch_gives_the_recipes_batch_and_steps(depth, steps):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(f"d{depth}"))
    args = batch_flags()
    accumulated = plan_batch(model, args, world_size=8, most_rows=16)
    assert args.total_batch_size == RECIPE[depth][-1]
    assert args.max_steps == pytest.approx(steps, rel=0.005)
    assert accumulated * args.batch_size * 2048 * 8 == args.total_batch_size


@pytest.mark.parametrize("name, tokens, steps", [("gpt2", 2 ** 19, 19073), ("gpt2-xl", 2 ** 20, 32000)])
def test_plan_batch_of_gpt2_is_that_of_llm_cs_runs(name, tokens, steps):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    args = batch_flags()
    plan_batch(model, args, world_size=8, most_rows=16)
    assert args.total_batch_size == tokens
    assert args.max_steps == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize("name", ["gpt2", "d12"])
def test_a_ratio_is_tokens_for_each_weight_of_a_matmul(name):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    args = batch_flags(ratio=9.4)
    plan_batch(model, args, world_size=8, most_rows=16)
    tokens = args.max_steps * args.total_batch_size
    assert tokens == pytest.approx(9.4 * model.matmul_params(), rel=1e-3)


def test_a_recipe_sets_flags_and_flags_that_are_given_count_more(monkeypatch):
    given = ["train_gpt2.py", "--data", "d", "--out", "o", "--recipe", "speedrun"]
    monkeypatch.setattr(sys, "argv", given)
    args = train_gpt2.parse_args()
    assert (args.model, args.ratio, args.final_lr, args.fp8) == ("d22", 9.4, 0.0, 1)
    assert args.warmdown == 0.85
    monkeypatch.setattr(sys, "argv", [*given, "--model", "d24", "--fp8", "0", "--max_steps", "9"])
    args = train_gpt2.parse_args()
    assert (args.model, args.max_steps, args.final_lr, args.fp8) == ("d24", 9, 0.0, 0)


def test_ratio_and_max_steps_exclude_each_other(data, tmp_path):
    with pytest.raises(SystemExit, match="^--ratio and --max_steps both .*; leave one out"):
        run_main(train_gpt2, *flags(data, tmp_path), "--ratio", 3)


@pytest.mark.parametrize("given", [
    dict(total_batch_size=500000, batch_size=4), dict(total_batch_size=1),
    dict(total_batch_size=700, batch_size=8)], ids=str)
def test_indivisible_batch_is_one_line_that_names_a_valid_one(given):
    model = GPT(GPT2)
    with pytest.raises(SystemExit, match="must be a multiple.*; try --total_batch_size") as error:
        plan_batch(model, batch_flags(**given), world_size=3, most_rows=16)
    valid = int(str(error.value).split()[-1])
    args = batch_flags(**{**given, "total_batch_size": valid})
    assert plan_batch(model, args, world_size=3, most_rows=16) >= 1


# ---- runs

@pytest.mark.parametrize("preset", PRESETS)
def test_first_val_loss_is_near_ln_v_and_training_lowers_it(whole, preset):
    val_loss = logged(whole[preset], "val_loss")
    assert val_loss[0] == pytest.approx(math.log(400), rel=0.05)
    assert val_loss[12] < val_loss[6] < val_loss[0]
    model, meta = load_checkpoint(whole[preset])
    assert (meta["stage"], meta["step"]) == ("pretrain", 12) and model.config.n_embd == 32


def test_killed_run_resumes_bit_by_bit(data, whole, tmp_path):
    """6 steps are saved, 2 more are lost with SIGKILL; both processes are fresh ones."""
    kill = """
import os, signal, train_gpt2
schedule = train_gpt2.schedule
def killed(step, *args, **kwargs):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return schedule(step, *args, **kwargs)
train_gpt2.schedule = killed
train_gpt2.main()"""
    command = [str(f) for f in flags(data, tmp_path)]
    killed = subprocess.run([sys.executable, "-c", kill, *command], **HERE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(logged(tmp_path, "loss")) == 8
    resumed = subprocess.run([sys.executable, "train_gpt2.py", *command, "--resume"], **HERE)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_files(tmp_path, whole["muon"], "model.safetensors", "config.json")
    assert logged(tmp_path, "loss") == logged(whole["muon"], "loss")


@pytest.mark.parametrize("preset", PRESETS)
def test_sigterm_saves_and_resume_goes_on_bit_by_bit(data, whole, preset, tmp_path, monkeypatch,
                                                     capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        stop_at(patch, train_gpt2, "schedule", call=4)
        run_main(train_gpt2, *flags(data, tmp_path, preset))
    step = max(logged(tmp_path, "loss"))
    assert error.value.code and step in (4, 5) and "--resume" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "state").iterdir()] == [f"step_{step:06d}"]
    run_main(train_gpt2, *flags(data, tmp_path, preset), "--resume")
    assert_same_files(tmp_path, whole[preset], "model.safetensors", "config.json")


def test_resumed_log_is_the_log_of_the_uninterrupted_run(data, whole, tmp_path, monkeypatch):
    def rows(run):
        return [[row.get(key) for key in ("step", "loss", "val_loss", "sample")]
                for row in read_log(run) if "step" in row]

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, train_gpt2, "schedule", call=6)      # stops where a val loss is due
        run_main(train_gpt2, *flags(data, tmp_path))
    run_main(train_gpt2, *flags(data, tmp_path), "--resume")
    assert rows(tmp_path) == rows(whole["muon"])


@pytest.fixture(scope="module")
def whole_in_fp64(data, tmp_path_factory):
    """{preset: run}, the runs of `whole` in fp64."""
    runs = {preset: tmp_path_factory.mktemp(f"{preset}-fp64") for preset in PRESETS}
    with in_fp64():
        for preset, run in runs.items():
            run_main(train_gpt2, *flags(data, run, preset))
    return runs


def assert_nearly_equal(run, other, steps=4, rel=1e-5):
    """The losses and gradient norms of the first `steps` steps agree.

    The runs add the same numbers in different orders. In fp32 Muon amplifies that rounding: it
    scales up singular values near zero, so that only the first steps agree, to 1e-5. In fp64 all
    12 steps and the weights must agree, to 1e-9.
    """
    for key in ("loss", "norm"):
        values, others = logged(run, key), logged(other, key)
        assert list(values) == list(others) == list(range(1, 13))
        found, wanted = (list(row.values())[:steps] for row in (values, others))
        assert found == pytest.approx(wanted, rel=rel), key


def assert_equal_in_fp64(run, other):
    assert_nearly_equal(run, other, steps=12, rel=1e-9)
    weights, wanted = (load_file(r / "model.safetensors") for r in (run, other))
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9)


def test_two_ranks_under_torchrun_train_what_one_does_with_muon(data, whole, tmp_path):
    command = [str(f) for f in flags(data, tmp_path)]       # 2 rows on 2 ranks, accumulated twice
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", "train_gpt2.py", *command], **HERE)
    assert done.returncode == 0, done.stderr
    assert_nearly_equal(tmp_path, whole["muon"])


@pytest.mark.parametrize("preset, world_size, runs_ahead", [
    ("adamw", 2, False), ("adamw", 4, True), ("muon", 2, True), ("muon", 4, False)])
def test_ranks_train_what_one_does(preset, world_size, runs_ahead, data, whole_in_fp64, tmp_path,
                                   monkeypatch):
    """2 rows at a time: one rank accumulates 4, two 2, four 1. runs_ahead: as on GPUs."""
    monkeypatch.setattr(Ranks, "runs_ahead", runs_ahead)
    with in_fp64():
        run_ranks(train_gpt2, *flags(data, tmp_path, preset), world_size=world_size)
    assert_equal_in_fp64(tmp_path, whole_in_fp64[preset])


def test_gradients_may_travel_in_bf16(data, whole, tmp_path):
    """It rounds them to 0.4 %, so the ranks do not train exactly what one does."""
    run_ranks(train_gpt2, *flags(data, tmp_path), "--bf16", 2)
    assert_nearly_equal(tmp_path, whole["muon"], steps=2, rel=0.01)
    with pytest.raises(AssertionError):
        assert_nearly_equal(tmp_path, whole["muon"])


def test_state_of_two_ranks_can_be_resumed_by_one(data, whole_in_fp64, tmp_path, monkeypatch):
    with in_fp64(), monkeypatch.context() as patch:
        stop_at(patch, train_gpt2, "schedule", call=4)
        run_ranks(train_gpt2, *flags(data, tmp_path), exit_code=130)
    assert len(list((tmp_path / "state").glob("*/rank_*"))) == 2
    with in_fp64():
        run_main(train_gpt2, *flags(data, tmp_path), "--resume")
    assert_equal_in_fp64(tmp_path, whole_in_fp64["muon"])


@pytest.mark.parametrize("runs_ahead, stopped", [(False, 5), (True, 6)])
def test_ranks_leave_together_when_one_is_signalled_at_a_bad_moment(runs_ahead, stopped, data,
                                                                    tmp_path, monkeypatch):
    """After the ranks have told each other whether to stop, and before they look at the answer."""
    def signalled(step, *args, **kwargs):
        if step == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *args, **kwargs)

    monkeypatch.setattr(train_gpt2, "schedule", signalled)
    monkeypatch.setattr(Ranks, "runs_ahead", runs_ahead)
    run_ranks(train_gpt2, *flags(data, tmp_path, eval_every=100), exit_code=130, seconds=20)
    assert max(logged(tmp_path, "loss")) == stopped


def test_a_signal_in_the_last_step_does_not_make_a_finished_run_a_failure(data, tmp_path,
                                                                         monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, Loader, "batch", call=8)     # of 2 steps with 4 batches each
        run_main(train_gpt2, *flags(data, tmp_path, max_steps=2))
    assert load_checkpoint(tmp_path)[1]["step"] == 2


def test_saved_run_is_not_overwritten(data, whole):
    before = (whole["muon"] / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="overwrite.*--resume"):
        run_main(train_gpt2, *flags(data, whole["muon"]))
    assert (whole["muon"] / "model.safetensors").read_bytes() == before
    run_main(train_gpt2, *flags(data, whole["muon"]), "--resume")      # trained: nothing to do
    assert (whole["muon"] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", [
    dict(seed=1), dict(max_steps=30), dict(total_batch_size=128), dict(lr=0.1), dict(seq_len=16),
    dict(block_size=16), dict(final_lr=0)], ids=str)
def test_resume_with_other_settings_is_refused(data, whole, change):
    with pytest.raises(SystemExit, match="another .*;.*;"):
        run_main(train_gpt2, *flags(data, whole["muon"], **change), "--resume")


def test_numbers_that_are_not_finite_stop_the_run_before_saving(data, tmp_path, monkeypatch):
    nan = torch.tensor(math.nan, requires_grad=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="finite.*;.*lower --lr"):
        patch.setattr(GPT, "loss", lambda *args, **kwargs: nan)
        patch.setattr(train_gpt2, "evaluate", lambda *args, **kwargs: (math.log(400), 0.0))
        patch.setattr(train_gpt2.Engine, "generate", lambda *a, **k: [SimpleNamespace(ids=[])])
        run_main(train_gpt2, *flags(data, tmp_path))
    assert not (tmp_path / "state").exists() and not (tmp_path / "model.safetensors").exists()


def test_training_goes_on_from_another_runs_weights(data, whole, tmp_path):
    run_main(train_gpt2, *shapeless(flags(data, tmp_path, max_steps=1)), "--init_from",
             whole["muon"])
    expected = twin_val_loss(data, whole["muon"])
    assert logged(tmp_path, "val_loss")[0] == pytest.approx(expected, rel=1e-5)


def test_rows_may_be_shorter_than_the_models_positions(data, whole, tmp_path, capsys):
    run_main(train_gpt2, *shapeless(flags(data, tmp_path, max_steps=1, seq_len=16)), "--init_from",
             whole["muon"])
    expected = twin_val_loss(data, whole["muon"], T=16)
    assert logged(tmp_path, "val_loss")[0] == pytest.approx(expected, rel=1e-5)
    assert load_checkpoint(tmp_path)[0].config.block_size == 32
    assert "256 tokens a step = 2 rows x 16 tokens x 1 ranks x 8 accumulated" in capsys.readouterr().out


def test_a_shape_that_is_not_the_checkpoints_is_one_line(data, whole, tmp_path):
    start = flags(data, tmp_path, seq_len=33), "--init_from", whole["muon"]
    with pytest.raises(SystemExit, match="--config n_embd=32 cannot be .*--init_from.*; leave"):
        run_main(train_gpt2, *start[0], *start[1:])
    with pytest.raises(SystemExit, match="--seq_len must be 1 to 32, .*, got 33"):
        run_main(train_gpt2, *shapeless(start[0]), *start[1:])


def twin_val_loss(data, run, T=32):
    model, _ = load_checkpoint(run)
    rows = Shards(data, "val").read(0, 700)
    rows = [torch.from_numpy(rows[None, s:s + T + 1]) for s in range(0, 699, T)]
    return torch.cat([model(row[:, :-1], row[:, 1:], reduction="none") for row in rows],
                     1).mean().item()


# ---- a step in which nobody waits for the device

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@contextmanager
def counted_waits(patch):
    """Counts, within the training step, how often Python asks for a number of the device. This is
    what a GPU would be waited for; a CPU is treated as one here."""
    counts, inside = [], []

    @contextmanager
    def watched(ranks, step, phase):
        inside.append(phase == "training")
        with failures(ranks, step, phase):
            yield
        inside.pop()

    def noted(name, original):
        def function(tensor, *args, **kwargs):
            if inside and inside[-1]:
                counts.append(name)
            return original(tensor, *args, **kwargs)
        return function

    def read(outcome):
        inside.append(False)
        numbers = original_read(outcome)
        inside.pop()
        return numbers

    failures, original_read = train_gpt2.named_failures, train_gpt2.Outcome.read
    patch.setattr(train_gpt2, "named_failures", watched)
    patch.setattr(train_gpt2.Outcome, "read", read)
    for name in WAITS:
        patch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    yield counts


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_waits_for_nothing_and_trains_the_same(preset, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, counted_waits(patch) as counts:
        patch.setattr(Ranks, "runs_ahead", True)
        run_main(train_gpt2, *flags(data, tmp_path, preset))
    assert counts == []
    assert_same_files(tmp_path, whole[preset], "model.safetensors", "config.json")
    for key in ("loss", "norm", "lr"):
        assert logged(tmp_path, key) == logged(whole[preset], key)


def test_a_step_that_waits_is_noticed(data, tmp_path, monkeypatch):
    mutate(monkeypatch, train_gpt2, "is_spike", "is_bad |=", "is_bad.item(); is_bad |=")
    monkeypatch.setattr(recipe, "SPIKE_WINDOW", 3)
    with monkeypatch.context() as patch, counted_waits(patch) as counts:
        patch.setattr(train_gpt2, "SPIKE_WINDOW", 3)
        run_main(train_gpt2, *flags(data, tmp_path, max_steps=5))
    assert "item" in counts


def test_numbers_are_read_when_the_next_step_has_been_handed_out(data, tmp_path, monkeypatch):
    def handed_out(step, *args, **kwargs):
        calls.append(("handed out", step + 1))
        return schedule(step, *args, **kwargs)

    def read(outcome):
        calls.append(("read", outcome.step))
        return original(outcome)

    calls, original = [], train_gpt2.Outcome.read
    monkeypatch.setattr(Ranks, "runs_ahead", True)
    monkeypatch.setattr(train_gpt2, "schedule", handed_out)
    monkeypatch.setattr(train_gpt2.Outcome, "read", read)
    run_main(train_gpt2, *flags(data, tmp_path, max_steps=4, eval_every=3))
    assert [step for word, step in calls] == [1, 2, 1, 3, 2, 3, 4, 4]   # 3 is read before val_loss


@pytest.mark.parametrize("preset", PRESETS)
def test_a_device_that_skips_a_step_leaves_everything_as_it_was(preset):
    model = noisy(GPT2 if preset == "adamw" else MODERN)
    optimizer = make_optimizer(model, Ranks())
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "runs_ahead", True)
        for is_bad in (False, True, False):
            for number, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, math.nan if is_bad else 1e-3 * number)
            optimizer.step(skip=torch.tensor(is_bad))
            tensors = [*model.parameters(), *optimizer.state.values()]
            outcomes.append([tensor.detach().clone() for tensor in tensors])
    for first, second, third in zip(*outcomes):
        assert torch.equal(first, second) and third.isfinite().all()
    assert int(optimizer.steps) == 2
    assert any(not torch.equal(second, third) for _, second, third in zip(*outcomes))


# ---- spikes, failures, memory, profile, benchmarks on the way

def test_a_spike_is_skipped_and_logged_and_training_goes_on(data, tmp_path, monkeypatch):
    def loss_of(self, x, targets, *args):
        calls.append(1)
        return ours(self, x, targets, *args) * (50.0 if len(calls) == 4 * 8 + 1 else 1.0)

    calls, ours = [], GPT.loss
    for module in (recipe, train_gpt2):
        monkeypatch.setattr(module, "SPIKE_WINDOW", 8)
    monkeypatch.setattr(GPT, "loss", loss_of)
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args, **kwargs: (math.log(400), 0.0))
    run_main(train_gpt2, *flags(data, tmp_path))
    assert [row["step"] for row in read_log(tmp_path) if row.get("skipped")] == [9]
    assert logged(tmp_path, "loss")[9] > 20 and logged(tmp_path, "loss")[12] < 6


@pytest.mark.parametrize("value, expected", [(1.0, False), (2.2, False), (2.3, True)])
def test_a_spike_is_7_deviations_above_a_full_window(value, expected):
    window = torch.tensor([[3.0, 3.4] * 64, [1.0, 1.4] * 64])   # means 3.2, 1.2, deviations 0.2
    values = torch.tensor([3.0, value + 0.35])
    assert is_spike(window, values).item() is expected
    assert is_spike(window.flip(0), values.flip(0)).item() is expected
    assert not is_spike(window[:, 1:], values * 1e9)
    assert is_spike(window[:, 1:], values * math.nan)


def test_a_rank_that_dies_ends_the_others_with_rank_and_phase(data, tmp_path, monkeypatch, capfd):
    def dies(step, *args, **kwargs):
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return schedule(step, *args, **kwargs)

    monkeypatch.setattr(train_gpt2, "schedule", dies)
    with pytest.raises(AssertionError, match=r"\[1, -9\]"):
        run_ranks(train_gpt2, *flags(data, tmp_path), seconds=60)
    # the weights of the update are waited for in the step after it
    assert re.search("rank 0 of 2, step [34], training: ", capfd.readouterr().err)


def test_running_out_of_memory_names_the_flag_to_halve(data, tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nmore")

    monkeypatch.setattr(GPT, "loss", out_of_memory)
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args, **kwargs: (math.log(400), 0.0))
    with pytest.raises(SystemExit, match="rank 0, step 0, training: CUDA.*; halve --batch_size"):
        run_main(train_gpt2, *flags(data, tmp_path))


def test_memory_of_d24_on_8_ranks_is_what_its_parameters_need():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("d24"))
    fixed, row = memory_bytes(model, 2048, 8)
    params = 1384e6         # RECIPE.md §2; Muon keeps one number for 680e6 of them, Adam two
    assert fixed == pytest.approx(4 * (2 * params + (2 * params - 680e6) / 8) + 4 * params, rel=0.01)
    assert row == 34 * 1536 * 2048 * 24 * 2


def test_a_model_that_does_not_begin_at_ln_v_is_stopped(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args, **kwargs: (5.5, 2.0))
    with pytest.raises(SystemExit, match=r"5.5000 before step 1, .* 5.9915, about ln\(400\);"):
        run_main(train_gpt2, *flags(data, tmp_path))


@pytest.mark.parametrize("C, V", [(64, 400), (1024, 400), (1600, 50257)])
def test_the_first_loss_of_a_wide_gpt2_is_expected(C, V):
    torch.manual_seed(0)
    config = GPTConfig(n_embd=C, n_layer=1, n_head=2, vocab_size=V, block_size=64)
    ids = torch.randint(0, V, (4, 65))
    loss = GPT(config).eval()(ids[:, :-1], ids[:, 1:]).item()
    expected = math.log(V) + 0.0002 * C
    assert loss == pytest.approx(expected, rel=0.02)
    train_gpt2.check_first_loss(loss, config)
    with pytest.raises(SystemExit, match="broken"):
        train_gpt2.check_first_loss(1.06 * expected, config)


@pytest.mark.parametrize("flag, value, said", [
    ("eval_every", 0, "at least 1, got 0"), ("eval_every", -1, "at least 1"),
    ("save_every", 0, "at least 1"), ("batch_size", 0, "at least 1"), ("seq_len", 0, "at least 1"),
    ("total_batch_size", 0, "at least 1"), ("lr", 0, "above 0, got 0"), ("lr", "nan", "above 0"),
    ("seed", -1, "at least 0"), ("max_steps", -1, "at least 0"), ("device", "foo", "auto, cpu, cuda or"),
    ("gpu_hour_usd", -1, "at least 0"), ("final_lr", -1, "at least 0"),
    ("ratio", 0, "above 0, got 0")])
def test_a_flag_out_of_range_is_one_line_and_0_is_not_the_default(flag, value, said, data, tmp_path):
    with pytest.raises(SystemExit, match=f"^--{flag} must be {said}"):
        run_main(train_gpt2, *flags(data, tmp_path), f"--{flag}", value)


@pytest.mark.parametrize("given", [
    "n_layer=0", "n_head=0", "n_head=-2", "n_embd=0", "block_size=0", "dropout=1.5", "dropout=nan",
    "softcap=-1", "windows=", "windows=XQ", "norm_scales=x", "rope=maybe", "rope=2", "rope=", "n_embd=6", "n_embd"])
def test_a_shape_that_no_model_has_is_one_line(given, data, tmp_path):
    with pytest.raises(SystemExit, match=f"{given.split('=')[0]}.*(must be|multiple)|rope needs") as error:
        run_main(train_gpt2, "--model", "d2", "--data", data, "--out", tmp_path, "--config",
                 "n_embd=32", "n_head=2", given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, value", [
    ("1", True), ("yes", True), ("TRUE", True), ("On", True), ("0", False), ("no", False),
    ("False", False), ("off", False)])
def test_every_spelling_of_yes_and_no_is_understood(text, value):
    for name, field in GPTConfig.__dataclass_fields__.items():
        if isinstance(field.default, bool):
            assert train_gpt2.parse_config([f"{name}={text}"]) == {name: value}


@pytest.mark.parametrize("moment", ["imports", "header"])
def test_ctrl_c_before_the_first_step_ends_without_a_traceback(moment, data, tmp_path):
    command = [str(f) for f in flags(data, tmp_path)]
    process = subprocess.Popen([sys.executable, "train_gpt2.py", *command], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while moment == "imports" and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)
    while moment == "header" and b"tokens a step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and said == b""


def test_profile_writes_a_trace_and_names_the_longest(data, tmp_path, capsys):
    run_main(train_gpt2, *flags(data, tmp_path), "--profile")
    assert "aten::mm" in capsys.readouterr().out
    assert '"traceEvents"' in (tmp_path / "trace.json").read_text()


@pytest.mark.parametrize("given, words", [
    (["n_embed=3"], "no such field"), (["vocab_size=3"], "no such field"),
    (["n_head=two"], "n_head must be an integer"), (["n_embd=31"], "not a multiple")])
def test_bad_config_is_one_line(data, tmp_path, given, words):
    with pytest.raises(SystemExit, match=words) as error:
        run_main(train_gpt2, "--data", data, "--out", tmp_path, "--config", *given)
    assert "; " in str(error.value) and "\n" not in str(error.value)


def test_config_switches_parts_of_the_recipe_off(data, tmp_path):
    run_main(train_gpt2, *flags(data, tmp_path, max_steps=1)[:-2], "--max_steps", 1, "--config",
             "n_embd=32", "n_head=2", "block_size=32", "backout=0", "softcap=0", "windows=SSSL",
             "norm_scales=mf")
    model, _ = load_checkpoint(tmp_path)
    config = model.config
    assert (config.backout, config.softcap, config.windows) == (False, 0.0, "SSSL")
    assert config.norm_scales == "mf" and (model.ln_f.weight != 1).any()


def test_hellaswag_and_core_are_logged_beside_val_loss(data, tmp_path, monkeypatch):
    CHOICES = [dict(query=f"{n}:", choices=[" a", " b"], gold=n % 2) for n in range(10)]
    folder = tmp_path / "bundle" / "eval_data"
    for name in ("language_understanding/hellaswag.jsonl", "other/task.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "bundle" / "core_tasks.csv").write_text(
        "label,file,type,num_fewshot,continuation_delimiter,random_baseline_percent\n"
        'task,other/task.jsonl,multiple_choice,0,""" """,50\n')
    one, two = tmp_path / "one", tmp_path / "two"
    run_main(train_gpt2, *flags(data, one), "--core_dir", tmp_path / "bundle")
    run_ranks(train_gpt2, *flags(data, two), "--core_dir", tmp_path / "bundle")
    for key in ("hellaswag", "core"):
        assert set(logged(one, key)) == {0, 6, 12} and logged(one, key) == logged(two, key)


@pytest.mark.parametrize("changes", [
    dict(position=10 ** 12), dict(position=None), dict(usd="a"), dict(losses=None),
    dict(losses=["a"]), dict(norms=3)], ids=str)
def test_a_state_whose_values_do_not_fit_is_one_line(changes):
    state = dict(step=3, position=24, usd=0.5, losses=[1.0], norms=[2.0])
    assert train_gpt2.Progress.of(state, 8, "runs/x").position == 24
    with pytest.raises(SystemExit, match="^runs/x/state holds a damaged state.json; remove"):
        train_gpt2.Progress.of(state | changes, 8, "runs/x")


def test_a_run_whose_folder_was_removed_does_not_end_well(tmp_path):
    log = RunLog(tmp_path / "run", 1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SystemExit, match="was removed while it was trained"):
        finish(log, tmp_path / "run", "pretrain", 1, stopped=False)


# ---- mutants

@pytest.mark.parametrize("owner, name, old, new, check", [
    (Loader, "row", "* self.T, self.T + 1", "* (self.T + 1), self.T + 1", "data"),
    (Loader, "row", "self.order[i]", "self.order[0]", "data"),
    (train_gpt2, "val_rows", "row[1:]", "row[:-1]", "val"),
    (train_gpt2, "evaluate", "/ math.log(2)", "", "val"),
    (train_gpt2, "evaluate", "losses[n_bytes > 0]", "losses", "val"),
    (train_gpt2, "evaluate", "range(0, n_targets, T)", "range(0, n_targets - T, T)", "val")], ids=text_only)
def test_checks_notice_a_mutant(owner, name, old, new, check, counting, data, tokenizer,
                                monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    monkeypatch.setitem(globals(), "evaluate", train_gpt2.evaluate)
    with pytest.raises((AssertionError, IndexError)):
        check_every_token_once(counting) if check == "data" else check_evaluate(data, tokenizer)


@pytest.mark.parametrize("owner, name, old, new", [
    (train_gpt2, "main", "+ ranks.rank) * B", "+ 0) * B"),
    (train_gpt2, "main", "micro_step == grad_accum_steps - 1", "micro_step == 0"),
    (Exchange, "send_weights", "self.buckets.items()", "list(self.buckets.items())[:1]"),
    (Optimizer, "reduce_grads", "(mine, self.ranks.world_size)", "(mine, 1)")], ids=text_only)
def test_two_ranks_notice_a_mutant(owner, name, old, new, data, whole, tmp_path, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    run_ranks(train_gpt2, *flags(data, tmp_path))
    with pytest.raises(AssertionError):
        assert_nearly_equal(tmp_path, whole["muon"])


@pytest.mark.parametrize("owner, name, old, new", [
    (train_gpt2.Progress, "of", "cls.__dataclass_fields__", "('step', 'usd', 'losses', 'norms')"),
    (train_gpt2, "load_state", "optimizer.steps =", "steps ="),
    (train_gpt2, "load_state", "optimizer.state.update(", "dict().update(")], ids=text_only)
def test_resuming_notices_a_mutant(owner, name, old, new, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, train_gpt2, "schedule", call=10)
        run_main(train_gpt2, *flags(data, tmp_path, "adamw"))
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, SystemExit)):       # a lost state is refused
        run_main(train_gpt2, *flags(data, tmp_path, "adamw"), "--resume")
        assert_same_files(tmp_path, whole["adamw"], "model.safetensors")
