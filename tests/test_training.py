"""
training.py: the optimizers equal PyTorch's AdamW and a slow Muon in float64, the saved state is
all that a resumed run needs, and the run log keeps its grammar.
"""
import json
import math
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat_sft
import model as model_module
import rl_grpo
import train_gpt2
import training
from conftest import GPT2, MODERN, ROOT, assert_same_files, mutate, noisy, run_main
from model import GPT, load_checkpoint
from training import (Optimizer, Ranks, RunLog, as_matrices, load_state, make_optimizer, polar,
                      read_log, save_run)
from test_model import TEXT, text_only


# ---- the optimizer

def test_adamw_equals_pytorchs():
    ours = noisy(GPT2)
    optimizer = make_optimizer(ours, lr=3e-3)
    params = list(noisy(GPT2).parameters())
    oracle = torch.optim.AdamW([dict(params=[p for p in params if p.ndim > 1], weight_decay=0.1),
                                dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)],
                               lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    for scale in (1.0, 0.5) * 5:
        for p, q in zip(ours.parameters(), params):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = optimizer.average_grads()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(params, 1.0).item(), rel=1e-5)
        for group in oracle.param_groups:
            group["lr"] = 3e-3 * scale
        optimizer.step(scale, grad_scale=min(1.0, 1 / (norm + 1e-6)))
        oracle.step()
    for p, q in zip(ours.parameters(), params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (3, 16, 64), (2, 1)])
def test_polar_pushes_singular_values_to_one_and_keeps_directions(shape):
    torch.manual_seed(0)
    G = torch.randn(shape) * 1e-3
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    found = torch.diagonal(U.mT @ polar(G) @ Vh.mT, dim1=-2, dim2=-1)
    large = S > 0.05 * S.amax(-1, keepdim=True)
    assert large.float().mean() > 0.9 and ((found[large] - 1).abs() < 0.2).all()


def twin_muon(W, grads, lr, decay, momentum):
    """Muon for one matrix in float64, from the papers' formulas: the weights after all steps."""
    m, n = W.shape
    W = W.double().clone()
    buffer = torch.zeros(m, n).double()
    variance = torch.zeros(max(m, n)).double()
    along = 1 if m >= n else 0
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        X = (1 - momentum) * grad.double() + momentum * buffer
        X = X / (1.01 * X.square().sum().sqrt() + 1e-6)
        for a, b, c in training.POLAR_EXPRESS:
            X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
        variance = 0.9 * variance + 0.1 * X.square().mean(along)
        scaled = X / variance.unsqueeze(along).sqrt()
        u = scaled * X.norm() / scaled.norm()
        for i in range(m):
            for j in range(n):
                update = u[i, j]
                if u[i, j] * W[i, j] >= 0:
                    update = update + decay * W[i, j]
                W[i, j] -= lr * max(1, m / n) ** 0.5 * update
    return W


def check_muon():
    torch.manual_seed(0)
    shapes = dict(c_attn=(18, 6), c_fc=(24, 6), c_proj=(6, 24), value_gate=(2, 5))
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    grads = {name: torch.randn(3, *shape) for name, shape in shapes.items()}
    expected = {}
    for name, p in params.items():
        K = 3 if name == "c_attn" else 1        # queries, keys and values are matrices of their own
        parts = zip(p.detach().chunk(K, -2), grads[name].chunk(K, -2))
        expected[name] = torch.cat([twin_muon(W, g, 0.02, 0.5, 0.9) for W, g in parts])
    optimizer = Optimizer([dict(kind="muon", params=params, lr=0.01, weight_decay=1.0)])
    for step in range(3):
        for name, p in params.items():
            p.grad = 4 * grads[name][step]
        optimizer.step(lr_scale=2.0, grad_scale=0.25, momentum=0.9, decay_scale=0.5)
    for name, p in params.items():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-3, atol=1e-4)


def test_muon_equals_its_slow_twin():
    check_muon()


def test_muon_is_compiled_once_whatever_the_rates():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = dict(counters)
    compiled = torch.compile(training.muon, dynamic=False, backend="eager")
    stacks = [*torch.randn(3, 2, 4, 6), torch.rand(2, 1, 6)]
    for lr in (0.1, 0.2, 0.3):
        numbers = [torch.tensor(lr), torch.tensor(lr / 2), torch.tensor(1 - lr)]
        for found, wanted in zip(compiled(*stacks, *numbers), training.muon(*stacks, *numbers)):
            torch.testing.assert_close(found, wanted)
    assert counters["unique_graphs"] - before.get("unique_graphs", 0) == 1


def test_as_matrices_is_a_view_of_queries_keys_and_values():
    W = torch.arange(48.0).view(12, 4)
    assert as_matrices(W).shape == (3, 4, 4) and torch.equal(as_matrices(W)[1], W[4:8])
    assert as_matrices(W).data_ptr() == W.data_ptr() and as_matrices(W.T).shape == (1, 4, 12)


def test_weights_decay_only_where_the_update_shrinks_them():
    moved = []
    for decay in (0.0, 0.3):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 5))
        p.grad = torch.randn(6, 5)
        before = p.detach().clone()
        Optimizer([dict(kind="muon", params={"w": p}, lr=0.1, weight_decay=decay)]).step()
        moved.append(p.detach() - before)
    update = moved[0]
    decayed = moved[1] - moved[0]
    shrinks = update * before < 0
    torch.testing.assert_close(decayed, -0.1 * (6 / 5) ** 0.5 * 0.3 * before * shrinks)
    assert 0.2 < shrinks.float().mean() < 0.8


@pytest.mark.parametrize("config", [GPT2, MODERN, replace(MODERN, norm_scales="amf"),
                                    replace(MODERN, rope=False, tied_head=True)],
                         ids=["gpt2", "modern", "norm scales", "some of both"])
def test_every_parameter_is_in_one_group_and_moves(config):
    model = noisy(config)
    optimizer = make_optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.groups) == len(before)
    model(TEXT, TEXT.roll(-1, 1)).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("knob", [dict(lr_scale=0.5), dict(momentum=0.5), dict(decay_scale=0.0)],
                         ids=str)
def test_every_scheduled_number_reaches_the_weights(knob):
    after = []
    for settings in ({}, knob):
        model = noisy(MODERN)
        optimizer = make_optimizer(model)
        for _ in range(2):      # the first update is one direction whatever the momentum
            model(TEXT, TEXT.roll(-1, 1)).backward()
            optimizer.step(**settings)
        after.append(model.h[0].mlp.c_fc.weight.detach())
    assert (after[0] - after[1]).abs().max() > 1e-6


# ---- the state

def save(run, optimizer, model, **state):
    save_run(run, Ranks(), optimizer, model, None, "pretrain", **state)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_state_restores_weights_optimizer_and_random_numbers(config, tmp_path):
    def start():
        torch.manual_seed(0)
        model = GPT(replace(config, dropout=0.1))
        return model, make_optimizer(model)

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(TEXT, TEXT.roll(-1, 1)).backward()
            optimizer.step()
        return model(TEXT)

    model, optimizer = start()
    train(model, optimizer, 2)
    save(tmp_path, optimizer, model, step=1, position=10, settings={})
    save(tmp_path, optimizer, model, step=2, position=20, settings=dict(a=1))
    expected = train(model, optimizer, 3)
    model, optimizer = start()
    state = load_state(tmp_path, True, Ranks(), optimizer, model, dict(a=1))
    assert (state["step"], state["position"]) == (2, 20)
    assert torch.equal(train(model, optimizer, 3), expected)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000002"]


SETTINGS = dict(seed=1, lr=None)


@pytest.fixture
def load(tmp_path):
    """A run with one saved state in tmp_path → load_state for it."""
    model = GPT(GPT2)
    optimizer = make_optimizer(model)
    save(tmp_path, optimizer, model, step=2, position=20, settings=SETTINGS)
    return lambda resume, settings: load_state(tmp_path, resume, Ranks(), optimizer, model,
                                               settings)


def test_state_of_another_version_is_one_line(load, tmp_path):
    path = tmp_path / "state" / "step_000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(format_version=99)))
    with pytest.raises(SystemExit, match="state of format 99;.*;"):
        load(True, SETTINGS)


@pytest.mark.parametrize("settings", [dict(seed=2, lr=None), dict(seed=1, lr=0.1), dict(task="x")],
                         ids=str)
def test_state_of_other_settings_is_one_line(load, settings):
    with pytest.raises(SystemExit, match="another .*;.*;"):
        load(True, settings)


def test_only_a_complete_state_counts_and_it_is_not_written_over(load, tmp_path):
    assert load(True, SETTINGS)["step"] == 2
    with pytest.raises(SystemExit, match="overwrite.*--resume"):
        load(False, SETTINGS)
    (tmp_path / "state" / "step_000002").rename(tmp_path / "state" / "step_000002.part")
    assert load(True, SETTINGS) is None
    with pytest.raises(SystemExit, match="holds a model but no saved state"):
        load(False, SETTINGS)


class Killed(BaseException):
    pass


def kill_at(patch, call):
    """Raises Killed before the n-th time that saving touches the disk."""
    calls = []

    def counted(original):
        def function(*args, **kwargs):
            calls.append(original)
            if len(calls) == call:
                raise Killed
            return original(*args, **kwargs)
        return function

    for owner, name in [(training, "save_file"), (model_module, "save_file"),
                        (training.os, "replace"), (training.os, "fsync"),
                        (training.shutil, "rmtree")]:
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("call", range(1, 16))
def test_a_kill_at_any_moment_of_saving_leaves_a_run_that_can_be_finished(call, tmp_path):
    def train(steps):
        torch.manual_seed(0)
        model = GPT(GPT2)
        optimizer = make_optimizer(model)
        resume = (tmp_path / "state").exists()
        state = load_state(tmp_path, resume, Ranks(), optimizer, model, {}) or dict(step=0)
        for step in range(state["step"] + 1, steps + 1):
            model(TEXT, TEXT.roll(-1, 1)).backward()
            optimizer.step()
            save(tmp_path, optimizer, model, step=step, settings={})
        return state["step"]

    train(1)
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        kill_at(patch, call)
        train(2)
    assert load_checkpoint(tmp_path)[1]["step"] >= train(2) >= 1
    assert load_checkpoint(tmp_path)[1]["step"] == 2
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000002"]


def test_the_kills_above_reach_the_end_of_saving(tmp_path):
    model = GPT(GPT2)
    optimizer = make_optimizer(model)
    save(tmp_path, optimizer, model, step=1, settings={})
    for call, is_killed in ((14, True), (16, False)):
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            kill_at(patch, call)
            save(tmp_path, optimizer, model, step=2, settings={})
            assert not is_killed


def trainers(base_run, data, folder):
    """{trainer: flags, without --out}: runs of a few steps that save at each."""
    ask = [dict(role="user", content="red"), dict(role="assistant", content="#### even")]
    (folder / "chat.jsonl").write_text((json.dumps(dict(messages=ask)) + "\n") * 20)
    (folder / "task.jsonl").write_text(json.dumps(dict(question="red", answer="even")) + "\n")
    return {train_gpt2: ["--model", "gpt2", "--config", "n_embd=32", "n_head=2", "block_size=32",
                         "n_layer=1", "--data", data, "--total_batch_size", 64, "--max_steps", 3,
                         "--save_every", 1],
            chat_sft: ["--model", base_run, "--data", folder / "chat.jsonl", "--batch_size", 1,
                       "--held_out", folder / "task.jsonl", "--save_every", 1],
            rl_grpo: ["--model", base_run, "--task", folder / "task.jsonl", "--max_steps", 2,
                      "--prompts", 1, "--group_size", 2, "--max_new_tokens", 4,
                      "--save_every", 1]}


@pytest.mark.parametrize("trainer", [train_gpt2, chat_sft, rl_grpo], ids=lambda m: m.__name__)
@pytest.mark.parametrize("function", ["write_state", "save_checkpoint", "name_state"])
def test_a_trainer_killed_in_its_last_save_finishes_with_resume(trainer, function, base_run, data,
                                                               tmp_path):
    flags = trainers(base_run, data, tmp_path)[trainer]
    run_main(trainer, *flags, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        original = getattr(training, function)

        def killed(*args, **kwargs):
            newest = training.newest_state(tmp_path / "whole").name
            if (tmp_path / "killed" / "state" / f"{newest}.part" / "state.json").exists() or (
                    function == "write_state" and f"step_{kwargs['step']:06d}" == newest):
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(training, function, killed)
        run_main(trainer, *flags, "--out", tmp_path / "killed")
    run_main(trainer, *flags, "--out", tmp_path / "killed", "--resume")
    assert_same_files(tmp_path / "killed", tmp_path / "whole", "model.safetensors", "config.json")
    rows = [[(row["step"], row.get("when")) for row in read_log(tmp_path / name) if "step" in row]
            for name in ("killed", "whole")]
    assert rows[0] == rows[1]
    assert trainer is not chat_sft or [when for _, when in rows[0] if when] == ["before", "after"]


@pytest.mark.parametrize("trainer", [train_gpt2, chat_sft, rl_grpo], ids=lambda m: m.__name__)
def test_a_resume_of_a_finished_run_writes_its_checkpoint_again(trainer, base_run, data, tmp_path,
                                                               capsys):
    flags = [*trainers(base_run, data, tmp_path)[trainer], "--out", tmp_path / "run"]
    run_main(trainer, *flags)
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()
    run_main(trainer, *flags, "--resume")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
    assert "is written again" in capsys.readouterr().out
    run_main(trainer, *flags, "--resume")
    assert "is written again" not in capsys.readouterr().out


def test_transformers_opens_a_runs_tokenizer_and_model(tokenizer, tmp_path):
    config = replace(GPT2, vocab_size=tokenizer.n_vocab)
    model = noisy(config)
    save_run(tmp_path, Ranks(), make_optimizer(model), model, tokenizer, "pretrain", step=1,
             settings={})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "A naïve  mean:\n\tx = 12.5 <|endoftext|>"
    assert theirs.encode(text) == tokenizer.encode(text, allowed_special="all")
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.eot, tokenizer.eot)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.bos_token_id == loaded.config.eos_token_id == tokenizer.eot
    torch.testing.assert_close(loaded(TEXT).logits, model(TEXT), rtol=0, atol=1e-4)


def break_weights(model, optimizer):
    model.h[0].mlp.c_fc.weight.data[0, 0] = math.nan


def break_state(model, optimizer):
    next(iter(optimizer.state.values())).view(-1)[0] = math.inf


@pytest.mark.parametrize("damage", [break_weights, break_state])
def test_nothing_that_is_not_finite_is_saved(damage, tmp_path):
    model = GPT(GPT2)
    optimizer = make_optimizer(model)
    model(TEXT, TEXT).backward()
    optimizer.step()
    save(tmp_path, optimizer, model, step=1, settings={})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    damage(model, optimizer)
    with pytest.raises(SystemExit, match="step 2: .*not finite.*; try a lower --lr"):
        save(tmp_path, optimizer, model, step=2, settings={})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trainer", [train_gpt2, chat_sft, rl_grpo], ids=lambda m: m.__name__)
def test_a_learning_rate_that_breaks_the_weights_saves_nothing(trainer, base_run, data, tmp_path):
    flags = trainers(base_run, data, tmp_path)[trainer]
    with pytest.raises(SystemExit, match="finite"):
        run_main(trainer, *flags, "--out", tmp_path / "run", "--lr", "1e38")
    if (tmp_path / "run" / "model.safetensors").exists():
        load_checkpoint(tmp_path / "run")       # saved before, and refused if not finite


@pytest.mark.parametrize("steps", [(999_999, 1_000_000), (9, 10), (1_000_000, 12_345_678)])
def test_the_state_with_the_largest_step_is_the_newest(steps, load, tmp_path):
    for step in steps:
        folder = tmp_path / "state" / f"step_{step:06d}"
        shutil.copytree(tmp_path / "state" / "step_000002", folder)
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | dict(step=step)))
    (tmp_path / "state" / "notes.txt").write_text("mine")
    (tmp_path / "state" / "step_999999999.part").mkdir()
    assert load(True, SETTINGS)["step"] == steps[-1]


def test_saving_leaves_files_in_state_that_are_not_its_own(load, tmp_path):
    (tmp_path / "state" / "notes.txt").write_text("mine")
    (tmp_path / "state" / "step_000003.part").mkdir()
    model = GPT(GPT2)
    save(tmp_path, make_optimizer(model), model, step=4, settings=SETTINGS)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["notes.txt", "step_000004"]


STATE_DAMAGES = {
    "no state.json": lambda folder: (folder / "state.json").unlink(),
    "cut state.json": lambda folder: (folder / "state.json").write_text('{"step": 2, '),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "empty": lambda folder: (folder / "state.json").write_text("{}"),
    "deep": lambda folder: (folder / "state.json").write_text("[" * 200_000),
    "binary": lambda folder: (folder / "state.json").write_bytes(b"\xff\x00"),
    "text step": lambda folder: edit_state(folder, step="2"),
    "negative ranks": lambda folder: edit_state(folder, world_size=-1),
    "many ranks": lambda folder: edit_state(folder, world_size=10 ** 9),
    "null steps": lambda folder: edit_state(folder, optimizer_steps=None),
    "no settings": lambda folder: edit_state(folder, settings=None),
    "no rank file": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "cut rank file": lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"12345678"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no moment": lambda folder: edit_rank(folder, "ln_f.weight.exp_avg", None),
    "a moment's shape": lambda folder: edit_rank(folder, "ln_f.weight.exp_avg", torch.zeros(3)),
    "nan": lambda folder: edit_rank(folder, "ln_f.weight.exp_avg", torch.full((32,), math.nan)),
    "no generator": lambda folder: edit_rank(folder, "rng.cpu", None)}


def edit_state(folder, **changes):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))


def edit_rank(folder, name, value):
    tensors = load_file(folder / "rank_00000.safetensors") | {name: value}
    save_file({name: t for name, t in tensors.items() if t is not None},
              folder / "rank_00000.safetensors")


@pytest.mark.parametrize("damage", STATE_DAMAGES.values(), ids=STATE_DAMAGES)
def test_a_damaged_state_is_one_line_that_names_its_place(damage, tmp_path):
    model = GPT(GPT2)
    optimizer = make_optimizer(model)
    model(TEXT, TEXT).backward()
    optimizer.step()
    save(tmp_path, optimizer, model, step=2, settings=SETTINGS)
    damage(tmp_path / "state" / "step_000002")
    model = GPT(GPT2)
    with pytest.raises(SystemExit) as error:
        load_state(tmp_path, True, Ranks(), make_optimizer(model), model, SETTINGS)
    assert str(error.value).startswith(f"{tmp_path}/state/step_000002")
    assert "; " in str(error.value) and "\n" not in str(error.value)


LOCKED = """
import sys, training
print(training.lock_run(sys.argv[1]), flush=True)
sys.stdin.read()
"""


def test_a_run_is_trained_by_one_process_at_a_time_and_a_kill_frees_it(load, tmp_path):
    assert load(True, SETTINGS)["step"] == 2
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "other")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"True\n"
        assert not training.lock_run(tmp_path / "other")
        with pytest.raises(SystemExit, match="another process is training in .*other; "):
            load_state(tmp_path / "other", False, Ranks(), None, None, {})
        other.kill()
    assert training.lock_run(tmp_path / "other")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_without_a_state_is_not_overwritten(name, resume, load, tmp_path):
    shutil.rmtree(tmp_path / "state")
    for other in {"config.json", "model.safetensors"} - {name}:
        (tmp_path / other).unlink()
    with pytest.raises(SystemExit, match="a model but no saved state.*; choose another --out"):
        load(resume, SETTINGS)


@pytest.mark.parametrize("trainer", [train_gpt2, chat_sft, rl_grpo], ids=lambda m: m.__name__)
def test_a_trainer_does_not_overwrite_the_model_it_starts_from(trainer, base_run, data, tmp_path):
    flags = trainers(base_run, data, tmp_path)[trainer]
    if trainer is train_gpt2:
        flags = ["--init_from", base_run, "--data", data, "--total_batch_size", 64]
    before = (base_run / "model.safetensors").read_bytes()
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="holds a model but no saved state"):
            run_main(trainer, *flags, *more, "--out", base_run)
    assert (base_run / "model.safetensors").read_bytes() == before


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name", [
    (training, "save_file"), (model_module, "save_file"), (model_module, "write_json"),
    (training.os, "fsync"), (training, "name_state")],
    ids=lambda value: getattr(value, "__name__", value))
def test_a_full_disk_is_one_line_and_the_saved_state_is_kept(owner, name, load, tmp_path,
                                                             monkeypatch):
    model = GPT(GPT2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(owner, name, full)
        save(tmp_path, make_optimizer(model), model, step=3, settings=SETTINGS)
    assert str(error.value).startswith(f"{tmp_path} cannot be written: No space left on device; ")
    assert load(True, SETTINGS)["step"] == 2


def test_a_file_in_place_of_the_run_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    for function in (training.lock_run, lambda run: RunLog(run, 3)):
        with pytest.raises(SystemExit, match="run cannot be written: "):
            function(tmp_path / "run")


def test_contents_tell_data_apart_and_not_its_name():
    rows = [dict(question="a", answer="1"), dict(question="b", answer="2")]
    assert training.contents(rows) == training.contents([dict(row) for row in rows])
    assert len({training.contents(other) for other in (rows, rows[:1], rows[::-1], [])}) == 4


@pytest.mark.parametrize("trainer", [chat_sft, rl_grpo], ids=lambda m: m.__name__)
def test_a_run_is_not_resumed_on_other_data_under_the_same_name(trainer, base_run, data, tmp_path):
    flags = [*trainers(base_run, data, tmp_path)[trainer], "--out", tmp_path / "run"]
    run_main(trainer, *flags)
    for path in (tmp_path / "chat.jsonl", tmp_path / "task.jsonl"):
        path.write_text(path.read_text().replace("red", "blue"))
    with pytest.raises(SystemExit, match="was begun with another contents_of_"):
        run_main(trainer, *flags, "--resume")



# ---- the run log

def test_log_line_has_the_one_grammar(tmp_path, capsys):
    RunLog(tmp_path, 19073)(1200, loss=3.421875, lr=5.98e-4, norm=0.2871, ms=512.3, tok_s=1023400.0,
                            mfu=0.412, usd=0.42, eta=4323.9, kl=None)
    assert capsys.readouterr().out.split() == (
        "step 1200/19073 | loss 3.421875 | lr 5.98e-04 | norm 0.2871 | 512.3 ms | 1023400 tok/s | "
        "mfu 41.2% | $0.42 | eta 1:12:03").split()
    assert read_log(tmp_path)[0]["loss"] == 3.421875


def test_resumed_log_drops_what_comes_again_and_a_cut_last_line(tmp_path):
    log = RunLog(tmp_path, 20)
    for step in range(1, 13):
        log(step, loss=float(step))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 13))
    RunLog(tmp_path, 20, resume_step=10)(11, loss=0.0)
    rows = [(row["step"], row["loss"]) for row in read_log(tmp_path)]
    assert rows[-2:] == [(10, 10.0), (11, 0.0)]


@pytest.mark.parametrize("line", [
    b"", b"   ", b"\0\0\0", b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"7", b"[" * 200_000,
    b'{"step": "2"}'], ids=lambda line: line[:12])
def test_a_damaged_line_of_the_log_is_left_out_and_named(line, tmp_path, capsys):
    good = b'{"step": 1, "seconds": 5.0}\n', b'{"step": 3, "seconds": 9.0}\n'
    (tmp_path / "log.jsonl").write_bytes(good[0] + line + b"\n" + good[1])
    assert [row["step"] for row in read_log(tmp_path)] == [1, 3]
    assert ("log.jsonl, line 2 is damaged" in capsys.readouterr().err) == bool(line.strip())
    log = RunLog(tmp_path, 20, resume_step=3)
    log(4, loss=1.0)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 3, 4]
    assert 9.0 <= read_log(tmp_path)[-1]["seconds"] < 10.0


def test_seconds_do_not_depend_on_the_clock_of_the_wall(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 20)
    monkeypatch.setattr(training.time, "time", lambda: 0.0)
    log(1, loss=1.0)
    assert 0.0 <= read_log(tmp_path)[-1]["seconds"] < 10.0 and log.seconds() > 0


# ---- mutants

@pytest.mark.parametrize("owner, name, old, new", [
    (training, "muon", "grad.lerp(buffer, momentum)", "buffer"),
    (training, "muon", "1 - beta2", "beta2"),
    (training, "polar", "1.01", "1.2"),
    (training, "as_matrices", "K = 3 if", "K = 1 if"),
    (training, "muon", "U * W >= 0", "U * W <= 0"),
    (training, "muon", "max(1, W.shape[-2] / W.shape[-1])", "1")], ids=text_only)
def test_muons_twin_notices_a_mutant(owner, name, old, new, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises(AssertionError):
        check_muon()
