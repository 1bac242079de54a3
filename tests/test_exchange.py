"""
exchange.py: gradients leave while backward computes the layers below, in one order on all ranks,
and parameters are waited for just before they are read. The collectives are played by a recorder;
test_train_gpt2.py has real ranks.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import exchange
import train_gpt2
from conftest import GPT2, MODERN, mutate, noisy
from exchange import FIRST, HEAD, Exchange, bucket_of
from model import GPT, run_layer
from test_model import TEXT, text_only
from train_gpt2 import training_hidden
from training import Ranks, make_optimizer

LAYERS = range(MODERN.n_layer)
both = pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])


@pytest.fixture
def sent(monkeypatch):
    """[(name of the collective, tensor, owner)], and ("wait", tensor) for what was waited for."""
    events = []

    def collective(kind, tensor, owner, async_op):
        assert async_op
        events.append((kind, tensor, owner))
        return SimpleNamespace(wait=lambda: events.append(("wait", tensor, owner)))

    fake = SimpleNamespace(reduce=partial(collective, "reduce"),
                           broadcast=partial(collective, "broadcast"))
    monkeypatch.setattr(exchange, "dist", fake)
    return events


def start(config):
    """A model and its optimizer on rank 0 of 2."""
    model = noisy(config).train()
    return model, make_optimizer(model, Ranks(0, 2))


def buckets_of(events, kind, optimizer):
    """The buckets of the tensors in these events, in their order, without repetitions."""
    found = []
    names = {}
    for name, p in optimizer.params.items():
        names[p.data_ptr()] = name
        if p.grad is not None:
            names[p.grad.data_ptr()] = name
    for event, tensor, _ in events:
        bucket = bucket_of(names[tensor.data_ptr()])
        if event == kind and bucket not in found[-1:]:
            found.append(bucket)
    return found


def test_a_bucket_is_a_layer_with_its_value_embedding():
    names = ["h.0.ln_1.weight", "value_embeds.11.weight", "h.11.mlp.c_fc.weight", "lm_head.weight",
             "wte.weight", "ln_f.weight", "resid_scalars"]
    assert list(map(bucket_of, names)) == [0, 11, 11, HEAD, FIRST, FIRST, FIRST]


def check_leaving(config, sent):
    """When a layer's gradients leave, those of the layers below do not exist yet."""
    model, optimizer = start(config)
    missing = []
    original = exchange.dist.reduce

    def reduce(tensor, owner, async_op):
        missing.append([n for n in LAYERS if model.h[n].mlp.c_fc.weight.grad is None])
        return original(tensor, owner, async_op)

    exchange.dist.reduce = reduce
    hidden = training_hidden(model, optimizer.exchange, Ranks(0, 2))
    loss = model.loss(hidden(TEXT), TEXT.roll(-1, 1))
    optimizer.exchange.expect()
    loss.backward()
    in_backward = len(sent)
    optimizer.reduce_grads()
    assert in_backward == len(optimizer.params) == sum(event == "reduce" for event, *_ in sent)
    order = [HEAD, *reversed(LAYERS), FIRST]
    if config.tied_head:
        order.remove(HEAD)
    assert buckets_of(sent, "reduce", optimizer) == order
    assert [0, 1, 2] in missing and [0, 1] in missing and [0] in missing and [] in missing


@both
def test_gradients_leave_layer_by_layer_while_backward_goes_on(config, sent):
    check_leaving(config, sent)


def test_gradients_leave_in_time_when_layers_are_compiled(sent, monkeypatch):
    """A model that was compiled as a whole would give all gradients at its end."""
    torch._dynamo.reset()
    compiler = partial(torch.compile, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(train_gpt2, "find_compiler", lambda device: (compiler, ""))
    check_leaving(MODERN, sent)


def test_only_the_announced_backward_sends(sent):
    model, optimizer = start(MODERN)
    model(TEXT, TEXT.roll(-1, 1)).backward()
    assert sent == []
    optimizer.exchange.expect()
    model(TEXT, TEXT.roll(-1, 1)).backward()
    n_sent = len(sent)
    optimizer.reduce_grads()
    optimizer.zero_grad()
    model(TEXT, TEXT.roll(-1, 1)).backward()
    assert n_sent == len(optimizer.params) and len(sent) == 2 * n_sent      # and as many waits


def test_gradients_that_nobody_announced_leave_when_they_are_collected(sent):
    model, optimizer = start(MODERN)
    model(TEXT, TEXT.roll(-1, 1)).backward()
    optimizer.average_grads = None
    optimizer.reduce_grads()
    assert buckets_of(sent, "reduce", optimizer) == [HEAD, *reversed(LAYERS), FIRST]


@pytest.mark.parametrize("seed", range(3))
def test_buckets_leave_in_one_order_whatever_is_finished_first(seed, sent):
    model, optimizer = start(MODERN)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    names = list(optimizer.params)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    optimizer.exchange.expect()
    for i in order:
        optimizer.exchange.finished(names[i], None)
    assert buckets_of(sent, "reduce", optimizer) == [HEAD, *reversed(LAYERS), FIRST]


def check_waiting(sent, monkeypatch):
    """A layer's parameters are waited for after the layer before it was computed."""
    model, optimizer = start(MODERN)

    def computed(block, *inputs):
        sent.append(("layer", block.attn.layer, None))
        return run_layer(block, *inputs)

    monkeypatch.setattr(train_gpt2, "run_layer", computed)
    hidden = training_hidden(model, optimizer.exchange, Ranks(0, 2))
    expected = hidden(TEXT)
    sent.clear()
    model(TEXT, TEXT.roll(-1, 1)).backward()
    optimizer.step(lr_scale=0.0, decay_scale=0.0, wait=False)
    assert {kind for kind, *_ in sent} == {"broadcast"}
    torch.testing.assert_close(hidden(TEXT), expected)
    seen = [("wait", bucket_of(name)) for name in optimizer.params]
    names = {p.data_ptr(): name for name, p in optimizer.params.items()}
    seen = []
    for kind, what, _ in sent:
        if kind == "wait":
            what = bucket_of(names[what.data_ptr()])
        if kind != "broadcast" and (kind, what) not in seen:
            seen.append((kind, what))
    layers = [(kind, n) for n in LAYERS for kind in ("wait", "layer")]
    assert seen == [("wait", FIRST), *layers, ("wait", HEAD)]


def test_a_layers_parameters_are_waited_for_when_it_is_their_turn(sent, monkeypatch):
    check_waiting(sent, monkeypatch)


def test_a_step_of_another_trainer_waits_for_all_parameters(sent):
    model, optimizer = start(GPT2)
    model(TEXT, TEXT.roll(-1, 1)).backward()
    optimizer.step(0.1)
    waited = {tensor.data_ptr() for kind, tensor, _ in sent if kind == "wait"}
    assert waited == {p.data_ptr() for p in model.parameters()}


def test_weights_are_cast_when_they_are_new():
    model = GPT(MODERN).use("cpu", bf16=False)
    optimizer = make_optimizer(model)
    hidden = training_hidden(model, optimizer.exchange, Ranks())
    calls = []
    model.cast_weights = lambda part=None: calls.append(part)
    for steps in range(1, 3):
        for _ in range(3):      # micro-steps
            model.loss(hidden(TEXT), TEXT).backward()
        assert calls == [None] * steps
        optimizer.step(wait=False)
        optimizer.exchange.wait()       # for an evaluation


@both
def test_one_rank_sends_nothing(config, sent):
    model = noisy(config).train()
    optimizer = make_optimizer(model)
    optimizer.exchange.expect()
    model(TEXT, TEXT.roll(-1, 1)).backward()
    assert optimizer.average_grads() > 0
    optimizer.step()
    assert sent == []


def test_layers_of_one_kind_share_a_compiled_graph_and_give_the_same_gradients():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled = torch.compile(run_layer, dynamic=False, fullgraph=True, backend="aot_eager")
    models = [noisy(MODERN).train() for _ in range(2)]
    for model, function in zip(models, (run_layer, compiled)):
        model.loss(model.hidden(TEXT, run_layer=function), TEXT).backward()
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p.grad, q.grad)
    kinds = {(MODERN.window(n), MODERN.has_value_embed(n)) for n in LAYERS}
    assert counters["unique_graphs"] - before <= len(kinds) + 1     # x of the first needs no x0's


@pytest.mark.parametrize("name, old, new, check", [
    ("expect", "reversed(self.buckets)", "self.buckets", "leaving"),
    ("send_gradients", "if missing and not", "if not", "leaving"),
    ("wait_for", "work.wait()", "pass", "waiting"),
    ("finished", "self.send_gradients()", "pass", "leaving")], ids=text_only)
def test_checks_notice_a_mutant(name, old, new, check, sent, monkeypatch):
    mutate(monkeypatch, Exchange, name, old, new)
    with pytest.raises(AssertionError):
        if check == "leaving":
            check_leaving(MODERN, sent)
        else:
            check_waiting(sent, monkeypatch)
