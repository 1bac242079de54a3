"""
train_gpt2.cu's dN, run on the CPU by tests/cuda_emulator: gradients against float64 PyTorch, steps
of Muon and Adam against train_gpt2.py, ranks against one rank, mutants against the checks.

    make test_train_gpt2cu                                  # the slow ones, too

Muon divides by small singular values and decays by signs, Adam begins with a sign: a change of 6e-8
in the initial weights moves train_gpt2.py's own parameters of ten steps by up to 5 % of their way,
bf16 by 21 % (medians), and the loss by 0.05 %. So one step is compared by nearly all its elements.
"""
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import recipe
import train_gpt2
from bpe import Tokenizer
from conftest import DOCUMENTS, noisy, run_main, write_shard
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from training import default_lr, make_optimizer
from test_train_gpt2cu import (DN_KERNELS, SOURCE, TINY, bf16, build, column, difference, emulated,
                               fp32, launches, python_gradients, pytestmark, rows_of, same_bits,
                               slow, train, train_on)

V = 401                             # odd: the last Pack of logits is not full
FLAGS = ["--total_batch_size", 160, "--batch_size", 2, "--seed", 5, "--eval_every", 99]
BETA_1 = dict(wte=0.8, lm_head=0.8, value_embeds=0.8, resid_scalars=0.8, x0_scalars=0.96,
              backout_scalar=0.8, h=0.85)       # Muon's first momentum is no beta, but the same


@pytest.fixture(scope="session")
def dn_tokenizer():
    return Tokenizer.train(DOCUMENTS, V)


@pytest.fixture(scope="session")
def dn_data(data, dn_tokenizer, tmp_path_factory):
    """Shards of a vocabulary of 401, of which 70 tokens to evaluate on."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("dn") / "data")
    (folder / "index.json").write_text(json.dumps(dict(tokenizer=dict(n_vocab=V))))
    np.save(folder / "token_bytes.npy", dn_tokenizer.token_bytes().astype(np.int32))
    dn_tokenizer.save(folder / "tokenizer")
    path = folder / "demo_val_000.bin"
    write_shard(path, np.fromfile(path, np.uint16)[512:582])
    return folder


def checkpoint(folder, dn_tokenizer, **sizes):
    """Of three layers, two see 20 tokens back and two have value embeddings."""
    usual = dict(block_size=80, vocab_size=V, n_layer=3, n_head=2, n_embd=128, windows="SSL")
    save_checkpoint(folder, noisy(GPTConfig.preset("d4", **usual | sizes), std=0.05), dn_tokenizer)
    return folder


@pytest.fixture(scope="session")
def dn_init(dn_tokenizer, tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dn_init"), dn_tokenizer)


@pytest.fixture(scope="session")
def dn_small(dn_tokenizer, tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dn_small"), dn_tokenizer, n_head=1, n_embd=64)


# ---- gradients

def cuda_gradients(run):
    """The first moment after one step is a share of the gradient. Tensors lie in a rank's state in
    the order of the file, padded as in memory."""
    m = load_file(next((run / "state").glob("step_*/rank_00000.safetensors")))["m"]
    with open(run / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    found, offset = {}, 0
    for name, entry in header.items():
        rows, *columns = entry["shape"]
        g = m[offset:offset + rows * int(np.prod(columns))].reshape(entry["shape"])
        found[name] = g / (1 - BETA_1[name.removeprefix("transformer.").split(".")[0]])
        rows = -(-rows // 64) * 64 if rows == V else rows
        offset += -(-rows * int(np.prod(columns)) // 128) * 128
    return found


def gradient_errors(binary, init, data, out, *flags, T=None):
    """{name: relative error} of the first step's gradients; a backout's that is 0 is left out."""
    T = T or load_checkpoint(init)[0].config.block_size
    train(binary, data, out, "--init_from", init, "--max_steps", 1, *FLAGS, "--total_batch_size",
          2 * T, "--seq_len", T, *flags)
    expected, found = python_gradients(init, data, T), cuda_gradients(out)
    assert set(found) == set(expected)
    return {name: difference(found[name], expected[name]) for name in found
            if np.linalg.norm(expected[name]) > 1e-7}


def test_every_gradient_is_pytorchs_in_fp32(fp32, dn_init, dn_data, tmp_path):
    errors = gradient_errors(fp32, dn_init, dn_data, tmp_path)
    assert len(errors) == 21 and max(errors.values()) < 6e-6             # measured 2e-6


def test_rows_may_be_shorter_than_the_models_positions(fp32, dn_init, dn_data, tmp_path):
    errors = gradient_errors(fp32, dn_init, dn_data, tmp_path, T=40)
    assert len(errors) == 21 and max(errors.values()) < 6e-6


@pytest.mark.parametrize("flags", [[], ["--attention", "mma"]])
@pytest.mark.parametrize("sizes", [
    {}, dict(block_size=200, n_layer=2, n_head=1, windows="S"),
    dict(block_size=72, n_layer=1, n_head=3, n_embd=96)])
def test_every_gradient_is_pytorchs_in_bf16(bf16, dn_tokenizer, dn_data, tmp_path, sizes, flags):
    """Also of heads of 128, where of four tiles of keys the last queries skip two, and of small
    ones. PyTorch's own bf16: 1.6 % at most, and 3.3 % for the scalars, which are sums over all."""
    init = checkpoint(tmp_path / "init", dn_tokenizer, **sizes)
    errors = gradient_errors(bf16, init, dn_data, tmp_path / "run", "--recompute", 2, *flags)
    for name, error in errors.items():
        assert error < (0.15 if "scalar" in name else 0.03), name       # measured 0.06 and 0.014


# ---- steps

@pytest.fixture(scope="session")
def python_runs(dn_init, dn_small, dn_data, tmp_path_factory):
    """One step of 128 channels, and ten steps of 64."""
    runs = {1: dn_init, 10: dn_small}
    for steps, init in runs.items():
        runs[steps] = tmp_path_factory.mktemp(f"python{steps}")
        run_main(train_gpt2, "--data", dn_data, "--out", runs[steps], "--init_from", init,
                 "--device", "cpu", "--bf16", 0, "--max_steps", steps, *FLAGS)
    return runs


def moves(run, init):
    start = load_file(init / "model.safetensors")
    return {name: tensor - start[name]
            for name, tensor in load_file(run / "model.safetensors").items()}


def strange_elements(run, other, init):
    """The largest share of a tensor's elements that moved otherwise, by .1 % of the typical way."""
    theirs = moves(other, init)
    return max(np.mean(np.abs(ours - theirs[name]) > 1e-3 * np.sqrt(np.mean(theirs[name] ** 2)))
               for name, ours in moves(run, init).items())


def test_a_step_is_that_of_train_gpt2_py_and_python_reads_it(fp32, dn_init, dn_data, python_runs,
                                                             tmp_path):
    rows = train(fp32, dn_data, tmp_path, "--init_from", dn_init, "--max_steps", 1, *FLAGS)
    assert strange_elements(tmp_path, python_runs[1], dn_init) < 0.005
    tokens = torch.from_numpy(train_gpt2.Shards(dn_data, "val").read(0, 70))
    model = load_checkpoint(tmp_path)[0].use("cpu", bf16=False)
    loss = model(tokens[None, :-1], tokens[None, 1:]).item()
    assert column(rows, "val_loss")[-1] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("precision, bound, moved", [("fp32", 2e-3, 0.1), ("bf16", 2e-2, 0.4)])
def test_ten_steps_are_those_of_train_gpt2_py(precision, bound, moved, dn_small, dn_data,
                                              python_runs, tmp_path, request):
    rows = train(request.getfixturevalue(precision), dn_data, tmp_path, "--init_from", dn_small,
                 "--max_steps", 10, *FLAGS)
    python_rows = rows_of(python_runs[10])
    for key, times in (("loss", 1), ("norm", 4), ("lr", 1e-6), ("val_loss", 1)):
        error = difference(column(rows, key), column(python_rows, key))
        assert error < times * bound, (key, error)
    ours, theirs = moves(tmp_path, dn_small), moves(python_runs[10], dn_small)
    assert np.median([difference(ours[name], theirs[name]) for name in ours]) < moved


@emulated
def test_schedules_are_those_of_train_gpt2_py(tmp_path):
    source = SOURCE.replace("int main(", "int trainer_main(") + """
        int main() {
            arguments.model = "d12", arguments.config = "", arguments.batch_size = 1;
            Config config = choose_config(32768);
            arguments.seq_len = config.block_size;
            plan_batch(config, 1);
            for (int step = 0; step < arguments.max_steps; step += 40) {
                Update u = plan_update(config, step, 1);
                printf("%.17g %.17g %.17g ", u.lr, u.momentum, u.muon_decay * u.decay_scale);
            }
            printf("%lld %lld %.17g ", (long long)arguments.max_steps,
                   (long long)arguments.total_batch_size, flops_per_token(config, 2048));
            for (int tokens : {1 << 12, 1 << 16, 1 << 18, 1 << 20}) {
                arguments.lr = 0, arguments.total_batch_size = tokens;
                plan_batch(config, 1);
                printf("%.17g ", arguments.lr);
            }
        }"""
    program = build(tmp_path, "-O0", source=source)
    printed = subprocess.run([program], capture_output=True, text=True).stdout
    *updates, max_steps, batch, flops = map(float, printed.split()[:-4])
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("d12", vocab_size=32768))
    args = type("Arguments", (), dict(total_batch_size=0, batch_size=1, seq_len=None, max_steps=None,
                                      ratio=None))
    recipe.plan_batch(model, args, 1, 1)
    assert (max_steps, batch) == (args.max_steps, args.total_batch_size)
    assert flops == model.flops_per_token()
    rates = [default_lr(model.config, tokens) for tokens in (2 ** 12, 2 ** 16, 2 ** 18, 2 ** 20)]
    assert [*map(float, printed.split()[-4:])] == pytest.approx(rates, rel=1e-12)
    muon = make_optimizer(model, batch_tokens=args.total_batch_size).groups[0]
    for i, step in enumerate(range(0, args.max_steps, 40)):
        lr_scale, momentum, decay_scale = recipe.schedule(step, args.max_steps, True)
        expected = lr_scale * muon["lr"], momentum, decay_scale * muon["weight_decay"]
        assert updates[3 * i:3 * i + 3] == pytest.approx(expected, rel=1e-12)


# ---- ranks, thread orders, resuming, the profile

@emulated
def test_orders_of_threads_give_the_same_bits(bf16, dn_small, dn_data, tmp_path):
    for order in "012":
        train(bf16, dn_data, tmp_path / order, "--init_from", dn_small, "--max_steps", 2, *FLAGS,
              CUEMU_ORDER=order)
        assert same_bits(tmp_path / order, tmp_path / "0")


@emulated
def test_two_ranks_train_as_one_does_and_resume_each_other(fp32, dn_small, dn_data, tmp_path):
    """Of three layers' matrices one rank owns two. A sum of two is the same in any order."""
    flags = ["--init_from", dn_small, *FLAGS, "--batch_size", 1, "--max_steps", 3]
    train(fp32, dn_data, tmp_path / "one", *flags)
    for first, then in ((1, 2), (2, 1)):
        out = tmp_path / f"from_{first}"
        train_on(first, fp32, dn_data, out, *flags, stop_after="step 1/3")
        train_on(then, fp32, dn_data, out, *flags, "--resume")
        assert same_bits(out, tmp_path / "one")


def test_a_resumed_run_ends_with_the_same_bits(bf16, dn_small, dn_data, tmp_path):
    flags = ["--init_from", dn_small, "--max_steps", 3, *FLAGS]
    train(bf16, dn_data, tmp_path / "whole", *flags)
    train_on(1, bf16, dn_data, tmp_path / "stopped", *flags, stop_after="step 1/3")
    train(bf16, dn_data, tmp_path / "stopped", *flags, "--resume")
    assert same_bits(tmp_path / "stopped", tmp_path / "whole")


def test_a_profile_has_every_kernel_of_dn(bf16, dn_data, tmp_path):
    flags = ["--model", "d1", *map(str, TINY), "--max_steps", "12", "--profile"]
    done = subprocess.run([bf16, "--data", dn_data, "--out", tmp_path, *flags],
                          capture_output=True, text=True)
    shown = {line.split()[0] for line in done.stdout.splitlines() if "%" in line}
    expected = {name for name in launches() if re.match(DN_KERNELS, name)}
    expected.remove("rotary_backward")          # the fast kernels of attention do it
    assert len(expected) == 14 and expected <= shown


# ---- checkpoints, and a user's mistakes

def test_a_new_model_begins_as_pythons_and_python_reads_it(bf16, dn_data, tmp_path):
    rows = train(bf16, dn_data, tmp_path, "--model", "d3", "--config", "n_embd=128", "n_head=2",
                 "block_size=80", "windows=SL", "--max_steps", 1, "--lr", 1e-30, *FLAGS)
    model, meta = load_checkpoint(tmp_path)
    assert abs(column(rows, "val_loss")[0] - np.log(V)) < 0.1 and meta["step"] == 1
    config = GPTConfig.preset("d3", vocab_size=V, n_embd=128, n_head=2, block_size=80, windows="SL")
    assert model.config == config
    torch.manual_seed(0)
    for (name, ours), theirs in zip(model.state_dict().items(), GPT(config).state_dict().values()):
        spread = theirs.std() if theirs.numel() > 1 else 0
        assert abs(ours.mean() - theirs.mean()) <= 6 * spread / ours.numel() ** 0.5 + 1e-6, name
        if ours.numel() > 100:
            for of, bound in ((torch.std, 0.02), (torch.max, 0.3), (torch.min, 0.3)):
                assert of(ours).item() == pytest.approx(of(theirs).item(), rel=bound), name


@pytest.mark.parametrize("flags, found", [
    (["--model", "d0"], "d1, d2"),
    (["--model", "d2", "--config", "n_embd=96", "n_head=1"], "power of two"),
    (["--init_from", '"relu2": false'], "8 of dN's 9 parts"),
    (["--init_from", '"norm_scales": "f"'], "learned scales in its RMSNorms")])
def test_a_mistake_ends_in_one_line_that_names_the_remedy(bf16, dn_init, dn_data, tmp_path, flags,
                                                          found):
    if flags[0] == "--init_from":
        mixed = shutil.copytree(dn_init, tmp_path / "mixed")
        name = re.match('"\\w+"', flags[1])[0]
        text = (mixed / "config.json").read_text()
        (mixed / "config.json").write_text(re.sub(f'{name}: [^,\\s]+', flags[1], text))
        flags = ["--init_from", mixed]
    error = train(bf16, dn_data, tmp_path / "run", "--max_steps", 1, *FLAGS, *flags, code=1)
    assert found in error and error.count("\n") == 1 and error.count(";") == 1


# ---- mutants: each must be seen by a check above

GRADIENT_MUTANTS = [
    ("fp32", "dz *= 1.0f - (y / softcap) * (y / softcap);", ""),
    ("fp32", "s = max(0, at.t - sizes.window)", "s = max(0, at.t - sizes.window + 1)"),
    ("mma", "(unsigned)(query - key) <= (unsigned)window", "(unsigned)(query - key) < window"),
    ("mma", "return max(0, query - window) / TILE;", "return query / TILE;"),
    ("fp32", "float gate = 3.0f / (1.0f + expf(-z));", "float gate = 2.0f / (1.0f + expf(-z));"),
    ("fp32", "gate * (1.0f - gate / 3.0f)", "gate * (1.0f - gate)"),
    ("fp32", "high[i] * cosine[i] - low[i] * sine[i]", "high[i] * cosine[i] + low[i] * sine[i]"),
    ("fp32", "(low[i] - t_low[i] * mean) * rstd", "low[i] * rstd"),
    ("mma", "(*d_low - (float)low[i] * mean) * rstd", "*d_low * rstd"),
    ("mma", "*d_high = dr2 * cosine + dr1 * sine", "*d_high = dr2 * cosine - dr1 * sine"),
    ("wgmma", "(k + group, warp_row + r, n)", "(k + group, r, n)"),
    ("wgmma", "(q + group, warp_row + r, n)", "(q + group, r, n)"),
    ("wgmma", "(n % 8 ^ r % 8) * 8", "n % 8 * 8"),
    ("fp32", "if (l == L / 2) {", "if (l == L / 2 + 1) {"),
    ("fp32", "de.set(i, de[i] + mu * ds);", "de.set(i, mu * ds);")]
STEP_MUTANTS = [
    ("nesterov = g + muon.momentum * (m - g);", "nesterov = m;"),
    ("1.0f / (1.01f * sqrtf(block_sum(sum)) + 1e-6f)", "1.0f / (2.0f * sqrtf(block_sum(sum)))"),
    ("which == VALUE_GATE ? rows >= columns : rows > columns", "rows <= columns"),
    ("u * w >= 0.0f ?", "u * w < 0.0f ?"),
    ("sqrtf(fmaxf(1, out_by_in))", "1.0f"),
    ("const AdamGroup X0_ADAM = {0.5f", "const AdamGroup X0_ADAM = {0.2f")]


def mutant(folder, old, new, precision="fp32"):
    assert SOURCE.count(old) == 1, old
    return build(folder, "-O1", precision=precision.upper(), source=SOURCE.replace(old, new))


@slow
@emulated
@pytest.mark.parametrize("kernels, old, new", GRADIENT_MUTANTS)
def test_a_mutant_changes_a_gradient(kernels, old, new, dn_init, dn_data, tmp_path):
    precision = "fp32" if kernels == "fp32" else "bf16"
    flags = [] if kernels == "fp32" else ["--attention", kernels]
    binary = mutant(tmp_path, old, new, precision)
    errors = gradient_errors(binary, dn_init, dn_data, tmp_path, *flags)
    worst = max(error for name, error in errors.items() if "scalar" not in name)
    assert worst > (0.05 if precision == "bf16" else 5e-4)      # ten and a hundred times the noise


@slow
@emulated
@pytest.mark.parametrize("old, new", STEP_MUTANTS)
def test_a_mutant_changes_a_step(old, new, dn_init, dn_data, python_runs, tmp_path):
    train(mutant(tmp_path, old, new), dn_data, tmp_path, "--init_from", dn_init, "--max_steps", 1,
          *FLAGS)
    assert strange_elements(tmp_path, python_runs[1], dn_init) > 0.2
