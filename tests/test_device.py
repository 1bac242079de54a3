"""
What only a GPU can get wrong: precision, kernels, compiling. bench/gpu.sh runs these tests on one;
TEST_DEVICE=cpu runs them on a CPU, which tests the tests themselves.
"""
import os

import pytest
import torch

import train_gpt2
from conftest import run_main
from model import GPT, GPTConfig, find_kernel, sdpa
from recipe import SPIKE_WINDOW, is_spike, schedule
from sample import Engine
from test_train_gpt2 import logged
from train_gpt2 import Outcome, sum_over_ranks
from training import Ranks, make_optimizer

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"

pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no GPU")

SIZES = dict(n_layer=3, vocab_size=500, block_size=256, n_embd=256)
CONFIGS = {"gpt2": GPTConfig(**SIZES, n_head=4),
           "modern": GPTConfig.preset("d3", **SIZES, n_head=2)}


def batch():
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(0, 500, (8, 256 if CUDA else 16), generator=generator)
    return idx, idx.roll(-1, 1)


def model_on(device, config, **options):
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model.use(device, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_fp32_on_a_cpu(name):
    here = model_on("cpu", CONFIGS[name])
    there = model_on(DEVICE, CONFIGS[name])
    losses = []
    for model, device in ((here, "cpu"), (there, DEVICE)):
        x, y = (t.to(device) for t in batch())
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)      # bf16 has 8 bits
    for (key, p), q in zip(here.named_parameters(), there.parameters()):
        error = (p.grad - q.grad.cpu()).norm() / p.grad.norm()
        assert error < 0.05, (key, error.item())


def test_the_chosen_kernel_sees_the_keys_that_plain_attention_sees():
    kernel, why = find_kernel(DEVICE)
    print(why)
    q, k, v = torch.randn(3, 2, 512, 2, 128, device=DEVICE).bfloat16().unbind()
    for window in (0, 1, 128, 512):
        found, wanted = (f(q, k, v, window, 0.1).float() for f in (kernel, sdpa))
        assert (found - wanted).norm() < 0.02 * wanted.norm(), window


@pytest.mark.parametrize("name, compiled, fp8", [
    ("gpt2", False, False), ("gpt2", True, False), ("modern", False, False),
    ("modern", True, False), ("modern", True, True)])
def test_fifty_steps_learn_a_batch_and_are_compiled_once(name, compiled, fp8):
    if fp8 and not CUDA:
        pytest.skip("a CPU multiplies 8-bit numbers slowly; test_model.py has smaller tests")
    torch._dynamo.reset()
    model = model_on(DEVICE, CONFIGS[name], fp8=fp8).train()
    optimizer = make_optimizer(model, lr=None if name == "modern" else 2e-3)
    hidden = model.hidden
    if compiled and CUDA:
        hidden = torch.compile(model.hidden, dynamic=False)
    x, y = (t.to(DEVICE) for t in batch())
    losses, graphs = [], []
    for step in range(50):
        loss = model.loss(hidden(x), y)
        loss.backward()
        norm = optimizer.average_grads()
        lr_scale, momentum, decay_scale = schedule(step, 50, name == "modern")
        optimizer.step(lr_scale, min(1.0, 1 / norm), momentum, decay_scale)
        losses.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert losses[-1] < losses[0] - 1 and losses[-1] == losses[-1], losses[::7]
    assert graphs[-1] == graphs[3], graphs


@pytest.mark.parametrize("name", CONFIGS)
def test_an_optimizers_step_is_that_of_a_cpu(name):
    models = model_on("cpu", CONFIGS[name]), model_on(DEVICE, CONFIGS[name])
    before = [p.detach().clone() for p in models[0].parameters()]
    for model in models:
        torch.manual_seed(2)
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.device)
        make_optimizer(model).step()
    for old, p, q in zip(before, *(model.parameters() for model in models)):
        moved = p.detach() - old
        on_device = q.detach().cpu() - old
        assert (moved - on_device).norm() <= 0.05 * moved.norm()        # Muon's polar() in bf16


@pytest.mark.parametrize("preset", ["gpt2", "d3"])
def test_training_resumes_to_the_bit(preset, data, tmp_path):
    def train(out, *more):
        run_main(train_gpt2, "--model", preset, "--config", "n_layer=2", "n_head=2", "n_embd=256",
                 "block_size=64", "--data", data, "--out", out, "--total_batch_size", 512,
                 "--max_steps", 6, "--eval_every", 3, "--save_every", 3, "--deterministic", 1,
                 "--device", DEVICE, *more)
        return logged(out, "loss")

    try:
        whole = train(tmp_path / "whole")
        run = tmp_path / "cut"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt2, "is_spike", stop_after(4))
            with pytest.raises(KeyboardInterrupt):
                train(run)
        assert train(run, "--resume") == whole
    finally:
        torch.use_deterministic_algorithms(False)


def stop_after(step):
    calls = []

    def is_spike(window, values):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return torch.zeros((), dtype=torch.bool, device=values.device)
    return is_spike


@pytest.mark.skipif(not CUDA, reason="only a CUDA GPU says who waits for it")
@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_waits_for_the_gpu(name):
    model = model_on(DEVICE, CONFIGS[name]).train()
    ranks = Ranks(device=DEVICE)
    optimizer = make_optimizer(model, ranks)
    x, y = (t.to(DEVICE) for t in batch())
    window = torch.ones(2, SPIKE_WINDOW, dtype=torch.float64, device=DEVICE)
    for mode in (0, 0, "error", "error"):       # the first steps compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = model.loss(model.hidden(x), y)
            loss.backward()
            totals = sum_over_ranks(ranks, loss.detach(), optimizer.reduce_grads(), 0)
            skip = is_spike(window, totals[:2])
            optimizer.step(0.1, (1 / totals[1]).clamp(max=1), skip=skip)
            outcome = Outcome(1, 0.0, 0.1, totals)
        finally:
            torch.cuda.set_sync_debug_mode(0)
        assert outcome.read()[1] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_generation_is_that_of_the_whole_text(name, tokenizer):
    model = model_on(DEVICE, CONFIGS[name]).eval()
    model.compute_dtype = torch.float32         # so that ties are not broken by rounding
    ids = list(range(5, 25))
    reply = Engine(model, tokenizer).generate([ids], 20, temperature=0)[0].ids
    with torch.inference_mode():
        for n in range(len(reply)):
            logits = model(torch.tensor([ids + reply[:n]], device=DEVICE))[0, -1]
            most = logits[:tokenizer.n_vocab].max()     # the engine offers only the tokenizer's
            assert logits[reply[n]] >= most - 1e-3, n
