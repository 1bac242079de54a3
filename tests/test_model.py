"""
model.py against its oracles: transformers' GPT-2, PyTorch's cross-entropy and AdamW, a table of
the recipe's sizes, and slow twins in float64. The mutants at the end are wrong formulas that a
check above them must notice.
"""
import doctest
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import loss as loss_module
import model as model_module
import precision
from conftest import GPT2, MODERN, mutate, noisy
from loss import CrossEntropy, loss_and_gradient
from model import (GPT, GPT2_SIZES, GPTConfig, KVCache, Linear, find_compiler, find_kernel,
                   load_checkpoint, save_checkpoint, sdpa)
from precision import Fp8Matmul, bf16_product, find_bf16, fp8_matmul, fp8_product, to_fp8
from reward_model import rows_tensors, with_reward_head
from training import Optimizer, make_optimizer

T = GPT2.block_size
TEXT = torch.randint(0, 65, (3, T), generator=torch.Generator().manual_seed(1))


def test_docstring_examples_are_true():
    torch.manual_seed(0)
    for module in (model_module, loss_module):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


# ---- the architecture

def small(name):
    """The preset's shape with layers divided by 6 and heads of 4 channels instead of 64."""
    L, NH, C = GPT2_SIZES[name]
    return dict(n_layer=L // 6, n_head=NH, n_embd=C // 16)


def hf_model(name, seed=0):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=24, **small(name))).eval()
    with torch.no_grad():
        for p in model.parameters():        # biases and norms too, which begin at 0 and 1
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_logits_of_a_transformers_gpt2_are_ours(name, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    ours, meta = load_checkpoint(tmp_path)
    idx = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        expected, found = theirs(idx).logits, ours(idx)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    assert meta["stage"] == "pretrain"


def test_transformers_computes_the_same_reward(tmp_path):
    model = with_reward_head(noisy(GPT2), seed=0).eval()
    save_checkpoint(tmp_path, model, stage="reward")
    theirs = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=65, n_positions=32, n_embd=32, n_layer=4, n_head=2, num_labels=1,
        pad_token_id=64)).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    rows = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8]]
    idx, last = rows_tensors(rows, 64, "cpu")
    torch.testing.assert_close(theirs(idx).logits[:, 0], model(idx, last), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_transformers_opens_our_checkpoint(name, tmp_path):
    ours = noisy(GPTConfig(vocab_size=101, block_size=24, **small(name)), std=0.1)
    save_checkpoint(tmp_path, ours)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.attn_pdrop == theirs.config.embd_pdrop == ours.config.dropout
    idx = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        assert (theirs.eval()(idx).logits - ours(idx)).abs().max() < 1e-4


def test_checkpoint_holds_hf_names_without_the_tied_head(tmp_path):
    save_checkpoint(tmp_path, noisy(GPT2))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert shapes["transformer.wte.weight"] == (65, 32)             # without the 63 padding rows
    assert shapes["transformer.h.3.mlp.c_fc.weight"] == (32, 128)   # (in, out), as in TensorFlow
    assert len(shapes) == 2 + 4 * 12 + 2 and "lm_head.weight" not in shapes


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_checkpoint_round_trip_is_exact(config, tmp_path, tokenizer):
    before = noisy(config)
    save_checkpoint(tmp_path, before, tokenizer, stage="sft", step=7, val_bpb=1.5)
    after, meta = load_checkpoint(tmp_path)
    assert torch.equal(before(TEXT), after.eval()(TEXT))
    assert (meta["stage"], meta["step"], meta["val_bpb"]) == ("sft", 7, 1.5)
    assert meta["run"] == str(tmp_path)


@pytest.mark.parametrize("name, params", dict(zip(GPT2_SIZES, (
    124_439_808, 354_823_168, 774_030_080, 1_557_611_200))).items())
def test_gpt2_presets_have_openais_parameter_counts(name, params):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    L, C = model.config.n_layer, model.config.n_embd        # padding rows do not count
    blocks = L * (12 * C ** 2 + 13 * C)
    assert model.num_params() == params == 50257 * C + 1024 * C + blocks + 2 * C


# The recipe per depth: millions of parameters in the blocks and in all, GFLOP a token, heads,
# learning rate scales for batch and width, Muon's weight decay, and the batch in tokens.
RECIPE = {
    4: (3.1, 36.7, 0.080, 2, 0.707, 1.732, 1.890, 2**18),
    6: (10.6, 73.5, 0.168, 3, 0.707, 1.414, 0.940, 2**18),
    8: (25.2, 126, 0.296, 4, 0.707, 1.225, 0.520, 2**18),
    12: (84.9, 286, 0.760, 6, 1, 1, 0.280, 2**19),
    20: (393, 897, 2.886, 10, 1.414, 0.775, 0.100, 2**20),
    24: (680, 1384, 4.775, 12, 1.414, 0.707, 0.060, 2**20),
    26: (864, 1682, 5.991, 13, 1.414, 0.679, 0.048, 2**20)}


@pytest.mark.parametrize("depth", RECIPE)
def test_modern_presets_have_the_recipes_sizes_and_rates(depth):
    block, total, gflop, heads, batch_scale, width_scale, decay, batch = RECIPE[depth]
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(f"d{depth}"))
        muon, head, wte, *_ = make_optimizer(model, batch_tokens=batch).groups
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith("h."))
    assert in_blocks / 1e6 == pytest.approx(block, rel=0.02)
    assert model.num_params() / 1e6 == pytest.approx(total, rel=0.003)
    assert model.flops_per_token() / 1e9 == pytest.approx(gflop, rel=0.005)
    assert (model.config.n_head, model.config.n_embd) == (heads, 128 * heads)
    assert muon["lr"] == pytest.approx(0.02 * batch_scale, rel=1e-3)
    assert wte["lr"] == pytest.approx(0.3 * batch_scale * width_scale, rel=1e-3)
    assert head["lr"] == pytest.approx(0.008 * batch_scale * width_scale, rel=1e-3)
    assert muon["weight_decay"] == pytest.approx(decay, rel=0.03)


def twin_modern(model, idx):
    """dN's architecture in float64, from its formulas; RoPE rotates complex numbers."""
    config = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    B, T = idx.shape
    L, NH = config.n_layer, config.n_head
    HS = config.n_embd // NH

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turned(x):      # (B, T, NH, HS): channel i and i + HS/2 are one complex number
        angles = torch.arange(T)[:, None] * 100_000.0 ** (-torch.arange(0, HS, 2).double() / HS)
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), -angles)[:, None]
        return 1.2 * norm(torch.cat((z.real, z.imag), -1))

    x = x0 = norm(w["wte.weight"][idx])
    t, s = torch.arange(T)[:, None], torch.arange(T)
    for layer in range(L):
        x = w["resid_scalars"][layer] * x + w["x0_scalars"][layer] * x0
        y, h = norm(x), f"h.{layer}."
        q, k, v = (y @ w[h + "attn.c_attn.weight"].T).view(B, T, 3, NH, HS).unbind(2)
        if layer % 2 == (L - 1) % 2:
            gate = 3 * torch.sigmoid(y[..., :12] @ w[h + "attn.value_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][idx].view(B, T, NH, HS)
        scores = torch.einsum("bthc,bshc->bhts", turned(q), turned(k)) / HS ** 0.5
        window = config.block_size if layer == L - 1 or layer % 4 == 3 else config.block_size // 4
        scores = scores.masked_fill((s > t) | (s < t - window), -math.inf)
        y = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).reshape(B, T, NH * HS)
        x = x + y @ w[h + "attn.c_proj.weight"].T
        h += "mlp."
        x = x + (norm(x) @ w[h + "c_fc.weight"].T).relu().square() @ w[h + "c_proj.weight"].T
        if layer == L // 2:
            middle = x
    z = norm(x - w["backout_scalar"] * middle) @ w["lm_head.weight"][:config.vocab_size].T
    return 15 * torch.tanh(z / 15)


def check_modern_twin():
    model = noisy(replace(MODERN, n_layer=6))
    expected = twin_modern(model, TEXT)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(TEXT).double(), expected, rtol=0, atol=2e-4)


def test_modern_logits_equal_the_recipes_formulas():
    check_modern_twin()


def test_windows_are_sssl_and_the_last_layer_sees_all():
    config = GPTConfig.preset("d10")
    assert [config.window(layer) for layer in range(10)] == 2 * [512, 512, 512, 2048] + [512, 2048]
    assert [config.has_value_embed(layer) for layer in range(10)] == 5 * [False, True]


@pytest.mark.parametrize("name", ["gpt3", "d", "d0", "dx", "12"])
def test_unknown_preset_is_one_line(name):
    with pytest.raises(SystemExit, match="not a preset.*try --model"):
        GPTConfig.preset(name)


@pytest.mark.parametrize("field, value", dict(
    rope=False, qk_norm=False, relu2=False, tied_head=True, value_embeds=False, backout=False,
    residual_scalars=False, softcap=0.0, windows="L").items())
def test_every_switch_of_the_recipe_changes_the_logits(field, value):
    whole = noisy(MODERN)
    other = GPT(replace(MODERN, **{field: value})).eval()
    other.load_state_dict(whole.state_dict(), strict=False)
    assert (whole(TEXT) - other(TEXT)).abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    model = noisy(replace(GPT2, dropout=0.5))
    assert torch.equal(model(TEXT), model(TEXT))
    model.train()
    assert not torch.equal(model(TEXT), model(TEXT))


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_no_parameter_is_left_uninitialised(config):
    models = []
    for poison in (float("nan"), 1e30):
        models.append(GPT(config))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, p in models[-1].named_parameters():
                models[-1].init_parameter(name, p.fill_(poison))
    for (name, p), (_, q) in zip(*(m.named_parameters() for m in models)):
        assert torch.equal(p, q) and p.abs().max() < 10, name


def test_modern_model_begins_with_uniform_predictions_and_identity_blocks():
    torch.manual_seed(0)
    model = GPT(MODERN)
    assert all((block.attn.c_proj.weight == 0).all() and (block.mlp.c_proj.weight == 0).all()
               for block in model.h)
    assert model(TEXT, TEXT).item() == pytest.approx(math.log(65), rel=0.01)


# ---- causality, windows, cache

def check_causality(config):
    model = noisy(config)
    changed = TEXT.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 65
    before, after = model(TEXT), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-5)
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-4


def check_window(window):
    """With the identity as values, attention returns its probabilities."""
    S = 2 * window + 1
    q, k = torch.randn(2, 1, 3, S, 8)
    t, s = torch.arange(S)[:, None], torch.arange(S)
    v = torch.eye(S).expand(1, 3, S, S)
    found = model_module.sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window,
                              scale=0.3).transpose(1, 2)
    scores = (0.3 * q @ k.mT).masked_fill((s > t) | (s < t - window), -math.inf)
    assert torch.allclose(found, scores.softmax(-1), atol=1e-6)
    assert ((found > 0).sum(-1) == (t[:, 0] + 1).clamp(max=window + 1)).all()   # w + 1 keys


def check_cache(config):
    """A prefill of rows of different lengths, padded on the right; then one token, two, one …"""
    model = noisy(config)
    lengths = [3, 11, 7]
    cache = KVCache(config, 3, T)
    rows = [TEXT[b, :n] for b, n in enumerate(lengths)]
    prompts = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        expected = model(TEXT)      # row b must continue as if it were alone
        found = [[logits[:n]] for logits, n in zip(model(prompts, cache=cache), lengths)]
        cache.pos = torch.tensor(lengths)
        for count in [1, 2] * 7:
            at = cache.pos[:, None] + torch.arange(count)
            logits = model(TEXT.gather(1, at), cache=cache)
            for b in range(3):
                found[b].append(logits[b])
    for b, n in enumerate(lengths):
        torch.testing.assert_close(torch.cat(found[b]), expected[b, :n + 21], rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_token_changes_nothing_before_it(config):
    check_causality(config)


@pytest.mark.parametrize("window", [1, 4, 7])
def test_window_w_sees_w_plus_one_keys(window):
    check_window(window)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_cached_logits_equal_uncached_for_rows_of_any_length(config):
    check_cache(config)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_cache_rows_can_be_copied_reordered_and_dropped(config):
    model = noisy(config)
    cache = KVCache(config, 3, T)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        model(TEXT[:, :12], cache=cache)
        copy = cache.rows(order)
        expected = model(TEXT[order])
        for t in range(12, 20):
            logits = model(TEXT[order, t:t + 1], cache=copy)
            torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-4)
    assert cache.used == 12 and (cache.pos == 12).all()     # the original has not moved on


def check_last(config):
    """Two reads: rows of different lengths, then five tokens on top, of which some are padding."""
    model = noisy(config)
    cache, whole = KVCache(config, 3, T), KVCache(config, 3, T)
    with torch.inference_mode():
        for start, count, lengths in ((0, 14, [3, 14, 9]), (14, 5, [5, 1, 2])):
            idx = TEXT[:, start:start + count]
            last = torch.tensor(lengths) - 1
            two = torch.stack((last, 0 * last), 1)
            ends, begins = model.hidden(idx, cache.rows([0, 1, 2]), last=two).unbind(1)
            found = model.hidden(idx, cache, last=last)
            torch.testing.assert_close(ends, found[:, 0], rtol=0, atol=1e-4)
            read = model.hidden(idx, whole)
            wanted = read[torch.arange(3), last]
            torch.testing.assert_close(begins, read[:, 0], rtol=0, atol=1e-4)
            torch.testing.assert_close(found, wanted[:, None], rtol=0, atol=1e-4)
            assert torch.equal(cache.k, whole.k) and torch.equal(cache.v, whole.v)
            cache.pos = whole.pos = whole.pos - (count - torch.tensor(lengths))


@pytest.mark.parametrize("config", [GPT2, MODERN, replace(GPT2, n_layer=1),
                                    replace(MODERN, n_layer=1), replace(MODERN, n_layer=2)],
                         ids=["gpt2", "modern", "gpt2 of 1", "modern of 1", "modern of 2"])
def test_the_last_position_alone_reads_what_it_reads_beside_the_others(config):
    check_last(config)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_head_stored_by_columns_computes_the_same(config):
    model = noisy(config)
    before = model(TEXT)
    embedding = model.wte.weight.clone()
    n = model.num_params()
    after = model.for_inference()(TEXT)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert model.lm_head.weight.T.is_contiguous() and torch.equal(model.wte.weight, embedding)
    assert model.wte.weight.is_contiguous() and model.num_params() == n


@pytest.mark.parametrize("change", [
    dict(tied_head=True), dict(rope=False), dict(qk_norm=False), dict(relu2=False),
    dict(value_embeds=False), dict(residual_scalars=False), dict(backout=False), dict(softcap=0.0),
    dict(windows="L")], ids=str)
def test_any_part_of_the_recipe_can_be_left_out(change):
    torch.manual_seed(0)
    model = GPT(replace(MODERN, **change))
    counting = torch.arange(T)[None] % 5
    losses = []
    optimizer = make_optimizer(model, lr=0.005, batch_tokens=2 ** 8)
    for _ in range(20):
        loss = model(counting[:, :-1], counting[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(65), rel=0.05) and losses[-1] < 0.5 * losses[0]


# ---- attention kernels, 8-bit matmuls

def test_a_kernel_is_taken_only_if_it_gives_what_sdpa_gives():
    def window_off_by_one(q, k, v, window, scale):
        return sdpa(q, k, v, window - 1, scale)

    def missing(*args, **kwargs):
        raise ImportError("no such module\nfor two lines")

    def right(q, k, v, window, scale):
        return sdpa(q, k, v, window, scale)

    def wordless(*args, **kwargs):
        raise AssertionError

    kernel, why = find_kernel("cpu", (missing, window_off_by_one, right))
    assert kernel is right and why.startswith("missing: no such module; window_off_by_one: differs")
    assert find_kernel("cpu", (wordless,)) == (sdpa, "wordless: AssertionError(); sdpa is used")
    kernel, why = find_kernel("cpu", (missing, window_off_by_one))
    assert kernel is sdpa and why.endswith("sdpa is used")


def test_kernels_that_need_a_gpu_are_refused_on_a_cpu_with_a_reason():
    kernel, why = find_kernel("cpu")
    assert kernel is sdpa and why.count(";") == 2 and "flash_attention_3: " in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it works")
def test_where_compiling_fails_functions_stay_as_they_are_and_it_is_said_why():
    for device, reason in {"cpu": "eager: compiling for cpu", "cuda": "eager: torch.compile fails"}.items():
        compile, why = find_compiler(device)
        assert compile(sdpa) is sdpa and why.startswith(reason) and "\n" not in why


@pytest.mark.parametrize("config", [GPT2, MODERN])
def test_frozen_in_16_bits_it_computes_the_same(config):
    model = noisy(config)
    model.compute_dtype = torch.bfloat16
    before = model(TEXT)
    assert torch.equal(model.for_inference()(TEXT), before)
    assert model.wte.weight.dtype == torch.bfloat16 and not before.isnan().any()


def test_dropout_and_a_cache_do_not_call_the_fast_kernel():
    model = noisy(replace(MODERN, dropout=0.5))
    for block in model.h:
        block.attn.kernel = None        # calling it would raise
    model(TEXT[:, :4], cache=KVCache(model.config, 3, T))
    model.train()(TEXT)
    with pytest.raises(TypeError):
        model.eval()(TEXT)


@pytest.mark.parametrize("config, fp8", [(GPT2, 0), (MODERN, 0), (MODERN, 1)],
                         ids=["gpt2", "modern", "fp8"])
def test_training_compiles_to_one_graph_once(config, fp8):
    """No inductor, which takes a minute: graph breaks and recompilations are seen without it."""
    torch._dynamo.reset()
    model = noisy(config).use("cpu", fp8=fp8).train()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True, backend=graphs)
    optimizer = make_optimizer(model)
    for _ in range(4):
        loss = model.loss(hidden(TEXT), TEXT)
        torch.testing.assert_close(loss, model(TEXT, TEXT), rtol=1e-4, atol=0)
        loss.backward()
        optimizer.average_grads()
        optimizer.step(0.1)
    assert graphs.frame_count == 1


def check_fp8(shape):
    """Against fp32: e4m3 rounds by up to 1/16, e5m2 by up to 1/8, and a sum averages the errors."""
    torch.manual_seed(0)
    M, K, N = shape
    x = torch.randn(M, K, requires_grad=True)
    W = torch.randn(N, K, requires_grad=True)
    dy = torch.randn(M, N)
    found = torch.autograd.grad(Fp8Matmul.apply(x, W), (x, W), dy)
    for a, b in zip((Fp8Matmul.apply(x, W), *found), (x @ W.T, dy @ W, dy.T @ x)):
        assert a.dtype == torch.float32 and 0.001 < (a - b).norm() / b.norm() < 0.08


def check_bf16(product):
    """bf16 keeps 8 bits of each factor, so that it rounds by up to 1/256."""
    torch.manual_seed(0)
    x = torch.randn(64, 48, requires_grad=True)
    W = torch.randn(32, 48, requires_grad=True)
    dy = torch.randn(64, 32)
    found = torch.autograd.grad(product(x, W), (x, W), dy)
    for a, b in zip((product(x, W), *found), (x @ W.T, dy @ W, dy.T @ x)):
        assert a.dtype == torch.float32 and 1e-4 < (a - b).norm() / b.norm() < 0.01


def test_bf16_product_and_its_gradients_are_near_fp32s():
    check_bf16(bf16_product)


def test_bf16_multiplies_large_matrices_only_while_training():
    config = replace(MODERN, n_embd=128, n_head=1)
    torch.manual_seed(0)
    model = GPT(config).use("cpu", bf16=True)
    for p in model.parameters():
        p.data = p.data + 0.02 * torch.randn_like(p)
    fast = model(TEXT, TEXT)
    exact = model.eval()(TEXT)
    model.use("cpu", bf16=False)
    torch.testing.assert_close(model(TEXT), exact, rtol=0, atol=0)
    plain = model.train()(TEXT, TEXT)
    assert fast != plain and abs(fast - plain) < 0.003 * plain


def test_a_line_says_whether_training_multiplies_in_bf16():
    has_bf16, why = find_bf16("cpu")
    assert ("--bf16 0" in why) == has_bf16


def test_fp8_matmul_and_its_gradients_are_near_fp32s():
    check_fp8((64, 48, 32))


def test_fp8_adds_the_bias_as_fp32_does():
    layer, x = Linear(64, 32), torch.zeros(16, 64)      # of zeros only the bias is left
    layer.product = fp8_product
    assert layer.training and torch.equal(layer(x), layer.bias.expand(16, 32))


def fp8_matmul_in_fp32(a, b, fast_accum=False):
    """fp8_matmul from its formula; PyTorch's takes a second for each matmul on a CPU."""
    (a, a_scale), (b, b_scale) = a, b
    return (a.float() @ b.float().T * a_scale * b_scale).bfloat16()


def test_fp8_matmul_is_the_product_of_the_8_bit_numbers():
    torch.manual_seed(0)
    a = to_fp8(torch.randn(48, 64), torch.float8_e4m3fn)
    b = to_fp8(torch.randn(32, 64), torch.float8_e5m2)
    torch.testing.assert_close(fp8_matmul(a, b), fp8_matmul_in_fp32(a, b), rtol=2 ** -7, atol=1e-4)


def test_fp8_reaches_the_large_matrices_and_trains(monkeypatch):
    monkeypatch.setattr(precision, "fp8_matmul", fp8_matmul_in_fp32)
    config = replace(MODERN, n_embd=128, n_head=1)
    losses = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = GPT(config).use("cpu", fp8=fp8, bf16=False)
        found = {m.product for m in model.h.modules() if isinstance(m, Linear)}
        assert found == {None, fp8_product if fp8 else None}
        optimizer = make_optimizer(model, lr=0.002)
        for _ in range(8):
            loss = model(TEXT[:, :-1], TEXT[:, 1:])
            loss.backward()
            losses.append(loss.item())
            optimizer.average_grads()
            optimizer.step()
    plain, in_8_bits = torch.tensor(losses).view(2, 8)
    assert in_8_bits[-1] < in_8_bits[0] - 0.3 and not torch.equal(plain, in_8_bits)
    torch.testing.assert_close(plain, in_8_bits, rtol=0.01, atol=0)


def test_norm_scales_multiply_what_their_norms_return_and_begin_at_one():
    torch.manual_seed(0)
    plain = GPT(MODERN)
    torch.manual_seed(0)
    scaled = GPT(replace(MODERN, norm_scales="amf"))
    assert torch.equal(plain(TEXT), scaled(TEXT))
    x = torch.randn(3, 32)
    for norm in (scaled.h[1].ln_1, scaled.h[2].ln_2, scaled.ln_f):
        with torch.no_grad():
            norm.weight.normal_()
        expected = x / x.square().mean(-1, keepdim=True).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected)
    for letter, name in (("a", "ln_1"), ("m", "ln_2")):
        model = GPT(replace(MODERN, norm_scales=letter))
        assert [f"h.{n}.{name}.weight" for n in range(4)] == [
            name for name, p in model.named_parameters() if ".ln_" in name]


# ---- weights are cast once a step

class CountCasts(TorchDispatchMode):
    """Counts how often a matrix of a model changes its dtype."""
    def __init__(self, model):
        super().__init__()
        self.matrices = {p.data_ptr() for p in model.parameters()
                         if p.ndim == 2 and min(p.shape) >= 128}
        self.n_casts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
        if function in source and args[source[function]].data_ptr() in self.matrices:
            self.n_casts += 1
        return function(*args, **kwargs or {})


def gradients_of_two_steps(casts, config, bf16_everywhere):
    """Two steps of three micro-steps → (all their gradients, how many casts)."""
    torch.manual_seed(0)
    model = GPT(config).use("cpu", bf16=True)
    if bf16_everywhere:                     # as on a GPU
        model.compute_dtype = torch.bfloat16
        for module in model.modules():
            if isinstance(module, Linear):
                module.product, module.factors = None, torch.bfloat16
    found = []
    with CountCasts(model) as counter:
        for _ in range(2):
            if casts:
                model.cast_weights()
            for micro_step in range(3):
                model(TEXT.roll(micro_step, 1), TEXT).backward()
            found += [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
    return found, counter.n_casts


@pytest.mark.parametrize("preset, bf16_everywhere", [(GPT2, True), (GPT2, False), (MODERN, True),
                                                     (MODERN, False)])
def test_weights_are_cast_once_a_step_and_the_gradients_are_the_same_bits(preset, bf16_everywhere):
    config = replace(preset, n_embd=128, n_layer=2, vocab_size=130)
    each_time, n_each = gradients_of_two_steps(False, config, bf16_everywhere)
    once, n_once = gradients_of_two_steps(True, config, bf16_everywhere)
    assert all(torch.equal(a, b) for a, b in zip(each_time, once))
    n_matrices = 4 * 2 + int(bf16_everywhere)           # of the blocks, and the head
    assert (n_each, n_once) == (2 * 3 * n_matrices, 2 * n_matrices)


def test_a_copy_is_not_read_after_its_step():
    model = GPT(MODERN).use("cpu", bf16=False)
    model.lm_head.factors = torch.bfloat16
    model.cast_weights()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        fresh = model(TEXT)
        assert fresh.abs().max() > 0.1 and torch.equal(fresh, model.eval()(TEXT))


# ---- the loss

def check_cross_entropy(softcap, chunk=17, masked=0.3):
    config = replace(GPT2, softcap=softcap)
    torch.manual_seed(0)
    x = 3 * torch.randn(100, 32)
    weight = torch.randn(config.padded_vocab, 32)
    targets = torch.randint(0, 65, (100,)).masked_fill(torch.rand(100) < masked, -1)
    x64 = x.double().requires_grad_()
    weight64 = weight.double().requires_grad_()
    z = x64 @ weight64[:65].T
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(z, targets, ignore_index=-1, reduction="sum")
    expected = expected / max(1, (targets >= 0).sum())
    (3 * expected).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "chunk_rows", lambda x, V: chunk)
        x.requires_grad_()
        weight.requires_grad_()
        loss = CrossEntropy.apply(x, weight, weight.detach(), targets, config,
                                  loss_module.loss_and_gradient)
        (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-4, atol=1e-6)
    assert (weight.grad[65:] == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("chunk", [1, 17, 1000])
def test_loss_and_gradients_equal_pytorchs(softcap, chunk):
    check_cross_entropy(softcap, chunk)


def check_overflow(_):
    """Logits of 200, whose exp is infinite in fp32, and a padding row with a larger one."""
    z = torch.tensor([[200.0, 190.0, 300.0]])
    loss, dz = loss_module.loss_and_gradient(z, torch.tensor([[1]]), torch.ones(1, 1), V=2, s=0)
    share = 1 / (1 + math.exp(-10))
    assert loss.item() == pytest.approx(10 - math.log(share), rel=1e-4)
    torch.testing.assert_close(dz, torch.tensor([[share, -share, 0.0]]))


def test_large_logits_do_not_overflow_and_padding_does_not_count():
    check_overflow(None)


def test_the_loss_compiles_into_one_graph_and_keeps_its_values():
    for dtype, softcap in [(torch.float32, 0.0), (torch.bfloat16, 15.0)]:
        z = torch.randn(4, 128).to(dtype)
        rest = torch.randint(0, 100, (4, 1)), torch.rand(4, 1), 100, softcap
        compiled = torch.compile(loss_and_gradient, fullgraph=True, backend="aot_eager")
        for found, wanted in zip(compiled(z.clone(), *rest), loss_and_gradient(z.clone(), *rest)):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_all_masked_batch_has_loss_zero_and_no_gradient(config):
    model = noisy(config)
    loss = model(TEXT, torch.full_like(TEXT, -1))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_mean_loss_is_the_mean_of_the_losses(config):
    model = noisy(config)
    targets = TEXT.roll(-1, 1).masked_fill(TEXT < 20, -1)
    losses = model(TEXT, targets, reduction="none")
    assert losses.shape == TEXT.shape and (losses[targets < 0] == 0).all()
    mean = losses.sum().item() / (targets >= 0).sum().item()
    assert model(TEXT, targets).item() == pytest.approx(mean)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_one_batch_can_be_learnt_by_heart(config):
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = make_optimizer(model, lr=1e-2)
    for _ in range(60):
        loss = model(TEXT[:, :-1], TEXT[:, 1:])
        loss.backward()
        optimizer.step(grad_scale=min(1.0, 1 / optimizer.average_grads()), decay_scale=0.0)
    assert loss.item() < 0.1


def test_bf16_keeps_fp32_masters_in_which_a_small_update_survives():
    model = GPT(GPT2)
    model.compute_dtype = torch.bfloat16
    optimizer = Optimizer([dict(kind="adamw", params={"w": model.ln_f.weight}, lr=1e-4,
                                betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)])
    assert model.hidden(TEXT).dtype == torch.bfloat16
    model(TEXT, TEXT).backward()
    optimizer.step()
    step = (1 - model.ln_f.weight).abs()        # Adam's first step is lr; 1 - 1e-4 is 1 in bf16
    torch.testing.assert_close(step, torch.full_like(step, 1e-4), rtol=0.01, atol=0)


# ---- vocabulary and checkpoints

@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("vocab_size", [65, 70, 200])
def test_growing_the_vocabulary_keeps_the_old_logits(config, vocab_size, tmp_path):
    before = noisy(config)
    save_checkpoint(tmp_path, before)
    after = load_checkpoint(tmp_path, vocab_size=vocab_size)[0].eval()
    logits = after(TEXT)
    torch.testing.assert_close(logits[..., :65], before(TEXT), rtol=1e-5, atol=1e-5)
    assert logits.shape[-1] == vocab_size
    assert (after.lm_head.weight is after.wte.weight) == config.tied_head
    mean = before.wte.weight[:65].mean(0)
    torch.testing.assert_close(after.wte.weight[65:vocab_size], mean.expand(vocab_size - 65, -1))
    assert (after.wte.weight[vocab_size:] == 0).all()


def edit_config(run, **changes):
    described = json.loads((run / "config.json").read_text())
    described["deepdive"].update(changes)
    (run / "config.json").write_text(json.dumps(described))


def edit_weights(run, **changes):
    """Replaces tensors, or removes those that become None."""
    tensors = load_file(run / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, run / "model.safetensors")


def edit_field(**changes):
    return lambda run: edit_config(run, model=vars(GPT2) | changes)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


LN = "transformer.ln_f.weight"
DAMAGES = {
    "cut": lambda run: cut(run / "model.safetensors"),
    "no weights": lambda run: (run / "model.safetensors").unlink(),
    "a pipe": lambda run: (cut(run / "model.safetensors"), (run / "model.safetensors").unlink(),
                           os.mkfifo(run / "model.safetensors")),
    "cut config": lambda run: cut(run / "config.json"),
    "no config": lambda run: (run / "config.json").unlink(),
    "deep config": lambda run: (run / "config.json").write_text("[" * 200_000),
    "a list": lambda run: (run / "config.json").write_text("[]"),
    "binary config": lambda run: (run / "config.json").write_bytes(b"\xff\xfe{}"),
    "version": lambda run: edit_config(run, format_version=99),
    "listed metadata": lambda run: (run / "config.json").write_text(
        '{"model_type": "gpt2", "deepdive": []}'),
    "listed model": lambda run: edit_config(run, model=[1, 2]),
    "llama": lambda run: (run / "config.json").write_text('{"model_type": "llama"}'),
    "no sizes": lambda run: (run / "config.json").write_text('{"model_type": "gpt2"}'),
    "fewer layers": edit_field(n_layer=3), "more layers": edit_field(n_layer=5),
    "width": edit_field(n_embd=64), "vocabulary": edit_field(vocab_size=66),
    "no heads": edit_field(n_head=0), "a text": edit_field(n_head="2"),
    "null": edit_field(n_head=None), "negative": edit_field(n_embd=-32),
    "too many layers": edit_field(n_layer=10 ** 6), "too wide": edit_field(n_embd=2 ** 40),
    "unknown field": edit_field(colour=1), "null bias": edit_field(bias=None),
    "rope no": edit_field(rope="no"), "softcap": edit_field(softcap=-1),
    "uneven heads": edit_field(n_head=3),
    "nan softcap": edit_field(softcap=math.nan), "windows": edit_field(windows="XQ"),
    "no windows": edit_field(windows=""), "odd rope": edit_field(rope=True, n_head=32),
    "dropout": edit_field(dropout=1.5), "missing": lambda run: edit_weights(run, **{LN: None}),
    "int64": lambda run: edit_weights(run, **{LN: torch.ones(32).long()}),
    "bool": lambda run: edit_weights(run, **{LN: torch.ones(32).bool()}),
    "complex": lambda run: edit_weights(run, **{LN: torch.ones(32).cfloat()}),
    "nan": lambda run: edit_weights(run, **{LN: torch.full((32,), math.nan)})}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_checkpoint_is_one_line_that_names_its_file(damage, tmp_path):
    save_checkpoint(tmp_path, GPT(GPT2))
    damage(tmp_path)
    with pytest.raises(SystemExit) as error:
        load_checkpoint(tmp_path)
    said = str(error.value)
    assert said.startswith((f"{tmp_path}/config.json", f"{tmp_path}/model.safetensors"))
    assert "; " in said and "\n" not in said and len(said) < 400


@pytest.mark.parametrize("field, value", {
    "activation_function": "relu", "layer_norm_epsilon": 1e-2, "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "n_inner": 64}.items())
def test_a_field_of_hf_that_computes_something_else_is_refused_by_name(field, value, tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=24, **small("gpt2"),
                                        **{field: value}))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=f"config.json: {field} is {value}, .*; "):
        load_checkpoint(tmp_path)


def test_an_untied_head_of_hf_is_read_and_written(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=24, **small("gpt2"),
                                        tie_word_embeddings=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_checkpoint(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", ours)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    idx = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        for found in (ours.eval()(idx), again.eval()(idx).logits):
            assert (found - theirs(idx).logits).abs().max() < 1e-4


def test_a_checkpoint_of_hf_in_parts_is_read_and_a_missing_part_is_one_line(tmp_path):
    theirs = hf_model("gpt2")
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2 and not (tmp_path / "model.safetensors").exists()
    idx = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        assert (load_checkpoint(tmp_path)[0](idx) - theirs(idx).logits).abs().max() < 1e-4
    parts[1].unlink()
    with pytest.raises(SystemExit, match="is missing; .*; take"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [
    dict(rope=True), dict(rms_norm=True, bias=False), dict(qk_norm=True), dict(relu2=True),
    dict(value_embeds=True), dict(residual_scalars=True), dict(backout=True), dict(softcap=15.0),
    dict(windows="SSSL"), dict(bias=False)], ids=str)
def test_only_a_gpt2_calls_itself_gpt2(change, tmp_path):
    for config, kind in ((GPT2, "gpt2"), (replace(GPT2, **change), "deepdive")):
        save_checkpoint(tmp_path, GPT(config))
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
        assert load_checkpoint(tmp_path)[0].config == config


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    save_checkpoint(tmp_path, GPT(GPT2))
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT(GPT2)
    model.h[1].mlp.c_fc.weight.data[3, 3] = math.inf
    with pytest.raises(SystemExit, match="h.1.mlp.c_fc.weight is not finite"):
        save_checkpoint(tmp_path, model)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- mutants: each must be caught by the check beside it

def text_only(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("owner, name, old, new, check, argument", [
    (model_module, "visible", "t - s <= window", "t - s < window", check_window, 4),
    (model_module, "visible", "s <= t", "s <= t + 1", check_window, 4),
    (model_module, "sdpa", "window < q.shape[2] - 1", "window < 0", check_window, 4),
    (model_module, "sdpa", "is_causal=mask is None", "is_causal=False", check_causality, GPT2),
    (KVCache, "append", "pos[:, None, :, None]", "self.used + 0 * pos[:, None, :, None]",
     check_cache, GPT2),
    (KVCache, "append", "device=k.device), window)", "device=k.device), 8)", check_cache, MODERN),
    (GPT, "hidden", "pos + cache.pos.view(len(idx), -1)", "pos + cache.used", check_cache, MODERN),
    (GPT, "hidden", "middle = take(middle, last)", "middle = middle[:, -1:]", check_last, MODERN),
    (model_module.Attention, "forward", "take(pos, last)", "pos[:, -1:]", check_last, GPT2),
    (model_module.Attention, "forward", "take(mask[:, 0], last)", "mask[:, 0, :1]", check_last,
     GPT2),
    (model_module.Block, "forward", "x = take(x, last)", "x = x[:, -1:]", check_last, GPT2),
    (loss_module, "loss_and_gradient", "dy.addcmul_(dy, t.square_(), value=-1)", "pass",
     check_cross_entropy, 3.0),
    (loss_module, "loss_and_gradient", "share / sum_exp", "1 / sum_exp", check_cross_entropy, 0.0),
    (loss_module, "loss_and_gradient", "(1 - (y_target / s).square())", "1", check_cross_entropy,
     3.0),
    (Fp8Matmul, "backward", "weight.t().contiguous(), weight_scale", "weight, weight_scale",
     check_fp8, (32, 32, 32)),
    (precision, "to_fp8", "x.float() / scale", "x.float()", check_fp8, (64, 48, 32)),
    (loss_module.CrossEntropy, "forward", "dW.addmm_(dz.T, x[part])", "dW = dz.T @ x[part]",
     check_cross_entropy, 0.0),
    (loss_module, "loss_and_gradient", "dy[:, :V].sum", "dy.sum", check_cross_entropy, 3.0),
    (loss_module, "loss_and_gradient", "y[:, :V].amax", "y[:, -1:].amax", check_overflow, None),
    (loss_module, "loss_and_gradient", "dy[:, V:] = 0", "pass", check_cross_entropy, 0.0),
    (loss_module.CrossEntropy, "backward", "dx * grad", "dx", check_cross_entropy, 0.0)],
    ids=text_only)
def test_checks_notice_a_mutant(owner, name, old, new, check, argument, monkeypatch):
    check(argument)
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises(AssertionError):
        check(argument)


@pytest.mark.parametrize("owner, name, old, new", [
    (model_module.Attention, "forward", "1.2 ** 2 * scale", "scale"),
    (model_module.Attention, "forward", "3 * torch.sigmoid", "2 * torch.sigmoid"),
    (model_module, "rotate", "x2 * cos - x1 * sin", "x2 * cos + x1 * sin"),
    (model_module, "rotary_table", "base=100_000", "base=10_000"),
    (model_module, "rms_norm", "float32", "bfloat16"),
    (GPTConfig, "window", "layer < self.n_layer - 1", "layer < self.n_layer"),
    (GPTConfig, "has_value_embed", "(self.n_layer - 1) % 2", "0"),
    (GPT, "hidden", "layer == config.n_layer // 2", "layer == 0"),
    (GPT, "logits", "[..., :self.config.vocab_size]", "")], ids=text_only)
def test_the_modern_twin_notices_a_mutant(owner, name, old, new, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, KeyError)):
        check_modern_twin()


@pytest.mark.parametrize("owner, name, old, new", [
    (model_module, "file_tensor", "p = p.T", "pass"),
    (model_module.MLP, "forward", 'approximate="tanh"', 'approximate="none"'),
    (model_module.Norm, "forward", "eps=1e-5", "eps=1e-2"),
    (model_module.Block, "forward", "return x +", "return")], ids=text_only)
def test_transformers_notices_a_mutant(owner, name, old, new, monkeypatch, tmp_path):
    theirs = hf_model("gpt2")
    theirs.save_pretrained(tmp_path)
    mutate(monkeypatch, owner, name, old, new)
    idx = torch.randint(0, 101, (2, 24))
    with pytest.raises((AssertionError, SystemExit)), torch.no_grad():
        found = load_checkpoint(tmp_path)[0](idx)
        torch.testing.assert_close(found, theirs(idx).logits, rtol=0, atol=1e-4)
