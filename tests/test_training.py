"""
training.py: the optimizers equal PyTorch's AdamW and a slow Muon in float64, the saved state is
all that a resumed run needs, and the run log keeps its grammar.
"""
import json
from dataclasses import replace

import pytest
import torch

import training
from conftest import GPT2, MODERN, mutate, noisy
from model import GPT
from training import (Optimizer, Ranks, RunLog, as_matrices, load_state, make_optimizer, polar,
                      read_log, save_state)
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


@pytest.mark.parametrize("config", [GPT2, MODERN, replace(MODERN, rope=False, tied_head=True)],
                         ids=["gpt2", "modern", "some of both"])
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
    save_state(tmp_path, Ranks(), optimizer, model, step=1, position=10, settings={})
    save_state(tmp_path, Ranks(), optimizer, model, step=2, position=20, settings=dict(a=1))
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
    save_state(tmp_path, Ranks(), optimizer, model, step=2, position=20, settings=SETTINGS)
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
    assert load(True, SETTINGS) is None and load(False, SETTINGS) is None


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
