"""
train_gpt2.cu, the whole trainer, run on the CPU by tests/cuda_emulator: its losses, gradients and
files against train_gpt2.py and float64 PyTorch, ranks against one rank, mutants against the checks.

    make test_train_gpt2cu                                  # the slow ones, too
    DEVICE=1 pytest tests/test_train_gpt2cu.py              # the same comparisons on this GPU

Bounds are two to four times what was measured; fp32 differs from Python in the order of sums, bf16
has 8 bits.
"""
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import eval as eval_module
import train_gpt2
from conftest import DOCUMENTS, ROOT, noisy, run_main, slow, write_shard
from cuda_emulator.rewrite import build as build_emulation
from model import GPTConfig, file_tensors, load_checkpoint, save_checkpoint
from sample import Engine

SOURCE = (ROOT / "train_gpt2.cu").read_text(encoding="utf-8")
FLAGS = ["--total_batch_size", 160, "--batch_size", 2, "--lr", 1e-3, "--seed", 5]

DEVICE = os.environ.get("DEVICE") == "1"
pytestmark = pytest.mark.skipif(
    not DEVICE and not (shutil.which("g++") and platform.machine() == "x86_64"),
    reason="the emulation takes g++ on x86-64")
emulated = pytest.mark.skipif(DEVICE, reason="only the emulator can do it")


def make(folder, *variables, source=SOURCE):
    """`make train_gpt2cu` in a folder of its own, with the libraries that came with PyTorch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt2.cu").write_text(source, encoding="utf-8")
    shutil.copy(ROOT / "Makefile", folder)
    wheel = Path(torch.__file__).parents[1] / "nvidia"
    return subprocess.run(["make", "train_gpt2cu", *variables], cwd=folder, capture_output=True,
                          text=True, env={"WHEEL": str(wheel), **os.environ})


def build(folder, *options, precision="BF16", source=SOURCE):
    """The trainer, by nvcc for the GPU or by g++ for the emulator, which `options` are for."""
    if DEVICE:
        done = make(folder, f"PRECISION={precision}", source=source)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return folder / "train_gpt2cu"
    folder.mkdir(parents=True, exist_ok=True)
    build_emulation(source, folder / "train_gpt2cu", *["-DFP32"] * (precision == "FP32"),
                  *(options or ["-O2"]))
    return folder / "train_gpt2cu"


@pytest.fixture(scope="session")
def bf16(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="session")
def fp32(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fp32"), precision="FP32")


@pytest.fixture(scope="session")
def cuda_data(data, tokenizer, tmp_path_factory):
    """The shards of `data`, with the vocabulary's size and bytes, which the CUDA trainer reads. No
    tokenizer: samples would take the emulator longer than the training."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("cuda") / "data",
                             ignore=shutil.ignore_patterns("tokenizer"))
    (folder / "index.json").write_text(json.dumps(dict(tokenizer=dict(n_vocab=tokenizer.n_vocab))))
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes().astype(np.int32))
    return folder


@pytest.fixture(scope="session")
def init(tokenizer, tmp_path_factory):
    """A checkpoint of heads of 64, and T that is no multiple of a tile."""
    run = tmp_path_factory.mktemp("init")
    config = GPTConfig(block_size=80, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=128)
    save_checkpoint(run, noisy(config, std=0.05), tokenizer)
    return run


def train(binary, data, out, *flags, code=0, **environment):
    done = subprocess.run([str(part) for part in (binary, "--data", data, "--out", out, *flags)],
                          capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, **environment))
    assert done.returncode == code, done.stdout[-500:] + done.stderr[-500:]
    return done.stderr if code else rows_of(out)


def rows_of(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "step" in row]


def column(rows, key):
    return np.array([row[key] for row in rows if key in row])


def difference(a, b):
    """The relative distance of two arrays."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# ---- against PyTorch

def python_gradients(init, data, T=None, rows=2, seed=5):
    """Of the first batch, by float64 PyTorch: {name: gradient}, as they stand in a file."""
    model = load_checkpoint(init)[0].double()
    model.compute_dtype = torch.float64
    shards = train_gpt2.Shards(data, "train")
    x, y = train_gpt2.Loader(shards, T or model.config.block_size, seed).batch(0, rows, "cpu")
    logits = model.logits(model.hidden(x)).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits.double(), y.flatten()).backward()
    for p in model.parameters():
        p.data = p.grad
    return {name: tensor.float().numpy() for name, tensor in file_tensors(model)}


TENSORS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
           "ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias", "ln_2.weight",
           "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")


def cuda_gradients(run, gradients):
    """Adam's first moment after one step is a tenth of the clipped gradient: the same, by name."""
    m = load_file(next((run / "state").glob("step_*/rank_00000.safetensors")))["m"]
    norm, offset, found = column(rows_of(run), "norm")[0], 0, {}
    for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias",
                 *(f"h.0.{name}" for name in TENSORS)):
        name = f"transformer.{name}"
        g = gradients[name]
        part = m[offset:offset + g.size].reshape(g.shape)
        found[name] = part * 10 * max(1, norm)
        rows = -(-len(g) // 64) * 64 if "wte" in name else len(g)
        offset += -(-rows * g[0].size // 128) * 128
    return found


def worst_gradient(binary, init, data, out, *flags, T=None, **environment):
    flags = [*flags, *(["--seq_len", T, "--total_batch_size", 2 * T] if T else [])]
    train(binary, data, out, "--init_from", init, "--max_steps", 1, "--eval_every", 9, *FLAGS,
          *flags, **environment)
    expected = python_gradients(init, data, T)
    found = cuda_gradients(out, expected)
    return max(difference(found[name], expected[name]) for name in found)


def test_every_gradient_is_pytorchs_in_fp32(fp32, init, cuda_data, tmp_path):
    assert worst_gradient(fp32, init, cuda_data, tmp_path) < 2e-6         # measured 6e-7


def test_rows_may_be_shorter_than_the_models_positions(fp32, init, cuda_data, tmp_path):
    assert worst_gradient(fp32, init, cuda_data, tmp_path, T=40) < 2e-6


@pytest.mark.parametrize("flags", [[], ["--recompute", 2], ["--attention", "mma"]])
def test_every_gradient_is_pytorchs_in_bf16(bf16, init, cuda_data, tmp_path, flags):
    assert worst_gradient(bf16, init, cuda_data, tmp_path, *flags) < 0.02       # measured 0.008


def test_heads_of_128_and_small_ones_have_pytorchs_gradients(bf16, cuda_data, tokenizer, tmp_path):
    for NH, C in ((1, 128), (2, 64)):
        config = GPTConfig(block_size=72, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=NH,
                           n_embd=C)
        init, run = tmp_path / f"init{C}", tmp_path / f"run{C}"
        save_checkpoint(init, noisy(config, std=0.05), tokenizer)
        flags = ["--total_batch_size", 144]
        assert worst_gradient(bf16, init, cuda_data, run, *flags) < 0.02


@emulated
@pytest.mark.parametrize("last", ["1", "4"])
def test_epilogues_that_cublaslt_lacks_are_done_by_kernels_of_our_own(last, bf16, init, cuda_data,
                                                                      tmp_path):
    """It has plain matmuls alone, or also those that add a bias."""
    worst = worst_gradient(bf16, init, cuda_data, tmp_path, CUEMU_LAST_EPILOGUE=last)
    assert worst < 0.02


@emulated
def test_sizes_without_any_kernel_end_in_one_line(bf16, init, cuda_data, tmp_path):
    error = train(bf16, cuda_data, tmp_path, "--init_from", init, "--max_steps", 1, *FLAGS,
                  CUEMU_LAST_EPILOGUE="-1", code=1)
    assert "cuBLASLt has no kernel for a 384 x 160 x 128 matmul" in error
    assert error.count("\n") == 1 and error.count(";") == 1


@slow
@emulated
def test_a_build_with_sanitizers_finds_nothing(init, cuda_data, tmp_path):
    """Addresses outside of a tensor or of shared memory, and undefined behaviour, end the run."""
    binary = build(tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    train(binary, cuda_data, tmp_path / "run", "--init_from", init, "--max_steps", 1, *FLAGS)


@pytest.fixture(scope="session")
def python_run(init, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("python")
    run_main(train_gpt2, "--data", data, "--out", run, "--init_from", init, "--device", "cpu",
             "--bf16", 0, "--max_steps", 10, "--eval_every", 5, *FLAGS)
    return run


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_ten_steps_are_those_of_train_gpt2_py(precision, bound, init, cuda_data, python_run,
                                              tmp_path, request):
    rows = train(request.getfixturevalue(precision), cuda_data, tmp_path, "--init_from", init,
                 "--max_steps", 10, "--eval_every", 5, *FLAGS)
    python_rows = rows_of(python_run)
    for key in ("loss", "norm", "lr", "val_loss"):
        assert difference(column(rows, key), column(python_rows, key)) < bound, key
    if precision == "fp32":
        assert column(rows, "val_bpb")[-1] == pytest.approx(column(python_rows, "val_bpb")[-1])
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path, python_run))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        start = load_file(init / "model.safetensors")[name]
        moved = difference(ours[name] - start, tensor - start)
        assert moved < 40 * bound or "c_attn.bias" in name, name     # keys' biases have gradient 0


WORDS = [word for text in DOCUMENTS[:40] for word in re.findall(" ?[A-Za-z]+", text)][:200]


def test_the_order_of_rows_is_train_gpt2_pys_and_words_are_the_tokenizers(data, tokenizer, tmp_path):
    source = SOURCE.replace("int main(", "int trainer_main(") + """
        int main(int n_words, char** words) {
            const int64_t SEEDS[] = {1337, 0, -1, 1ll << 40};
            uint32_t order[1000];
            int ids[64];
            Vocabulary vocabulary = read_vocabulary(words[1], 400);
            for (int epoch = 0; epoch < 4; epoch++) {
                shuffle_rows(SEEDS[epoch], epoch, order, 1000);
                for (uint32_t row : order) { printf("%u ", row); }
            }
            for (int i = 2; i < n_words; i++) {
                int n = encode_word(&vocabulary, words[i], strlen(words[i]), ids);
                for (int k = 0; k < n; k++) { printf("%d ", ids[k]); }
            }
        }"""
    program = build(tmp_path, "-O0", source=source)
    printed = subprocess.run([program, data, *WORDS], capture_output=True, text=True).stdout
    expected = []
    for epoch, seed in enumerate((1337, 0, -1, 2 ** 40)):
        expected += train_gpt2.shuffled_rows(1000, seed, epoch).tolist()
    expected += [i for word in WORDS for i in tokenizer.encode_ordinary(word)]
    assert list(map(int, printed.split())) == expected


# ---- ranks, thread orders, resuming

SHORT = ["--max_steps", 2, "--eval_every", 9]


def same_bits(run, other):
    return (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# What needs a barrier in attention: three tiles of keys, by mma.sync and by wgmma; in norms: more
# than a warp of channels, and more pairs of rows than there are blocks. The last is dN.
TILES = ["--config", "n_layer=1", "n_head=1", "n_embd=64", "block_size=136", "--total_batch_size",
         136, "--batch_size", 1]
BUSY = [[*TILES, "--attention", "mma"], [*TILES, "--attention", "wgmma"],
        ["--config", "n_layer=1", "n_head=2", "n_embd=272", "block_size=8", "--total_batch_size",
         520, "--batch_size", 65],
        ["--config", "n_layer=1", "n_head=1", "n_embd=128", "block_size=8", "--total_batch_size",
         16, "--batch_size", 2, "--model", "d1"]]
BARRIERS = [line for line, text in enumerate(SOURCE.splitlines(), 1) if "__syncthreads();" in text]


def bits_by_order(binary, data, out, flags, **environment):
    """Threads forward, backward (copies land at once), shuffled (copies land at the wait)."""
    for order in "012":
        command = [binary, "--data", data, "--out", out / order, *flags, "--max_steps", 1]
        done = subprocess.run([*map(str, command)], capture_output=True,
                              env=dict(os.environ, CUEMU_ORDER=order, **environment))
        weights = out / order / "model.safetensors"
        yield weights.read_bytes() if done.returncode == 0 else done.stderr


@emulated
@pytest.mark.parametrize("flags", BUSY[:2] + [pytest.param(busy, marks=slow) for busy in BUSY[2:]])
def test_three_orders_of_threads_give_the_same_bits(flags, bf16, cuda_data, tmp_path):
    assert len(set(bits_by_order(bf16, cuda_data, tmp_path, flags))) == 1


@slow
@emulated
def test_without_any_one_barrier_they_do_not(bf16, cuda_data, tmp_path):
    right = [next(bits_by_order(bf16, cuda_data, tmp_path / "all", flags)) for flags in BUSY]
    assert len(BARRIERS) == 17
    for line in BARRIERS:
        found = (bits == expected for flags, expected in zip(BUSY, right)
                 for bits in bits_by_order(
                     bf16, cuda_data, tmp_path / f"{line} {BUSY.index(flags)}", flags,
                     CUEMU_WITHOUT_BARRIER=str(line)))
        assert not all(found), line


TINY = ["--config", "n_layer=1", "n_head=1", "n_embd=64", "block_size=32", "--total_batch_size", 64,
        "--batch_size", 2]
two_gpus = pytest.mark.skipif(DEVICE and torch.cuda.device_count() < 2,
                              reason="NCCL wants a GPU a rank")


def train_on(n_ranks, binary, data, out, *flags, stop_after=None):
    """Under torchrun's variables; SIGTERM to all ranks when this line has come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] - 1
    environment = dict(os.environ, WORLD_SIZE=str(n_ranks), MASTER_PORT=str(port))
    command = [str(part) for part in (binary, "--data", data, "--out", out, *flags)]
    ranks = [subprocess.Popen(command, env=dict(environment, RANK=str(r), LOCAL_RANK=str(r)),
                              stdout=subprocess.PIPE, text=True) for r in range(n_ranks)]
    for line in ranks[0].stdout:
        if stop_after and line.startswith(stop_after):
            for rank in ranks:
                rank.terminate()
    assert {rank.wait(60) for rank in ranks} == {130 if stop_after else 0}


def assert_same_training(run, other):
    for key in ("loss", "norm"):
        assert difference(column(rows_of(run), key), column(rows_of(other), key)) < 1e-6
    one, two = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert max(difference(one[name], two[name]) for name in one) < 5e-4     # measured 1.2e-4


@two_gpus
def test_two_ranks_train_as_one_does(fp32, init, cuda_data, tmp_path):
    for n_ranks in (1, 2):
        train_on(n_ranks, fp32, cuda_data, tmp_path / str(n_ranks), "--init_from", init, *SHORT,
                 *FLAGS, "--batch_size", 1)
    assert_same_training(tmp_path / "2", tmp_path / "1")


@two_gpus
def test_a_stopped_run_resumes_on_another_number_of_ranks(fp32, cuda_data, tmp_path):
    """A layer of 128 channels has 1549 * 128 parameters, which two ranks pad and one does not."""
    flags = [*TINY, "--max_steps", 4, "--eval_every", 9, "--batch_size", 1]
    flags[3] = "n_embd=128"
    train(fp32, cuda_data, tmp_path / "whole", *flags)
    for first, then in ((1, 2), (2, 1)):
        out = tmp_path / str(first)
        train_on(first, fp32, cuda_data, out, *flags, stop_after="step 1/4")
        train_on(then, fp32, cuda_data, out, *flags, "--resume")
        assert_same_training(out, tmp_path / "whole")


def test_a_resumed_run_ends_with_the_same_bits(bf16, init, cuda_data, tmp_path):
    flags = ["--init_from", init, "--max_steps", 3, "--eval_every", 9, "--save_every", 2, *FLAGS]
    train(bf16, cuda_data, tmp_path / "whole", *flags)
    assert [path.name for path in (tmp_path / "whole" / "state").iterdir()] == ["step_000003"]
    program = subprocess.Popen([str(part) for part in (
        bf16, "--data", cuda_data, "--out", tmp_path / "killed", *flags)], stdout=subprocess.PIPE,
        text=True)
    for line in program.stdout:
        if line.startswith("step 2/3"):
            break
    while not (tmp_path / "killed" / "state" / "step_000002" / "state.json").exists():
        assert program.poll() is None
    program.kill()
    program.wait()
    train(bf16, cuda_data, tmp_path / "killed", *flags, "--resume")
    assert same_bits(tmp_path / "killed", tmp_path / "whole")


TIMED = [*TINY, "--max_steps", 3, "--eval_every", 9, "--deterministic", 0]


@pytest.fixture(scope="session")
def timed(bf16, cuda_data, tmp_path_factory):
    """A run that found algorithm 1 faster, stopped after its first step; tests copy it."""
    run = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUEMU_FASTEST", "1")
        train_on(1, bf16, cuda_data, run, *TIMED, stop_after="step 1/3")
    return run


@emulated
def test_a_resumed_run_keeps_the_kernels_that_were_fastest(bf16, timed, cuda_data, tmp_path):
    """Both algorithms are right, but they sum in another order."""
    for fastest in "01":
        train(bf16, cuda_data, tmp_path / fastest, *TIMED, CUEMU_FASTEST=fastest)
    run = shutil.copytree(timed, tmp_path / "resumed")
    train(bf16, cuda_data, run, *TIMED, "--resume", CUEMU_FASTEST="0")
    assert same_bits(run, tmp_path / "1") and not same_bits(run, tmp_path / "0")
    train(bf16, cuda_data, tmp_path / "not timed", *TIMED, "--deterministic", 1, CUEMU_FASTEST="1")
    assert same_bits(tmp_path / "not timed", tmp_path / "0")


@emulated
@pytest.mark.parametrize("old, new, found", [
    (b"", b"", "not one whole JSON object"), (b'"sizes": [192', b'"sizes": [x', "is damaged"),
    (b"0000000000000001", b"1", "is damaged"),
    (b"0000000000000001", b"0000000000000007", "cannot run on this GPU")])
def test_a_damaged_choice_of_kernels_is_one_line(old, new, found, bf16, timed, cuda_data, tmp_path):
    run = shutil.copytree(timed, tmp_path / "run")
    damaged(next(run.glob("state/*/matmuls_00000.json")), old, new)
    error = train(bf16, cuda_data, run, *TIMED, "--resume", code=1)
    assert found in error and error.count("\n") == 1 and error.count(";") == 1


@emulated
@pytest.mark.parametrize("old, new", [(b"CPU", b"TPU"), (b"_version", b"_versiom")])
def test_the_kernels_of_another_gpu_are_chosen_again(old, new, bf16, timed, cuda_data, tmp_path):
    run = shutil.copytree(timed, tmp_path / "run")
    damaged(next(run.glob("state/*/matmuls_00000.json")), old, new)
    command = [bf16, "--data", cuda_data, "--out", run, *TIMED, "--resume"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and "the kernels of matmuls are chosen again" in done.stdout
    assert b"TPU" not in next(run.glob("state/*/matmuls_00000.json")).read_bytes()


def test_a_state_of_another_format_is_refused_in_one_line(bf16, init, cuda_data, tmp_path):
    flags = ["--init_from", init, *SHORT, *FLAGS]
    train(bf16, cuda_data, tmp_path, *flags)
    state = next((tmp_path / "state").glob("*/state.json"))
    state.write_text(state.read_text().replace('"format_version": 2', '"format_version": 1'))
    error = train(bf16, cuda_data, tmp_path, *flags, "--resume", code=1)
    assert "a saved state of format 1, but only format 2" in error
    assert error.count("\n") == 1 and error.count(";") == 1


def test_a_resumed_run_keeps_its_settings(bf16, init, cuda_data, tmp_path):
    flags = ["--init_from", init, *SHORT, *FLAGS]
    train(bf16, cuda_data, tmp_path, *flags)
    for flag, value, found in (("--seed", 6, "seed 5, not 6"), ("--lr", 0.5, "lr 0.001, not 0.5")):
        error = train(bf16, cuda_data, tmp_path, *flags, "--resume", flag, value, code=1)
        assert found in error and error.count("\n") == 1


# ---- saving: kills, a full disk, two processes, damaged files

@pytest.fixture(scope="session")
def killed_binary(tmp_path_factory):
    """A trainer that dies just before its file number KILL_AT, counted from 0, gets its name."""
    start = "static void finish(FILE* file, const char* path) {\n"
    assert SOURCE.count(start) == 1
    injected = start + """
        static int n_files = 0;
        if (n_files++ == environment("KILL_AT", -1)) { raise(SIGKILL); }
    """
    return build(tmp_path_factory.mktemp("killed"), source=SOURCE.replace(start, injected))


@pytest.fixture(scope="session")
def finished(bf16, init, cuda_data, tmp_path_factory):
    """A run of two steps; tests copy it and damage the copy."""
    run = tmp_path_factory.mktemp("finished")
    train(bf16, cuda_data, run, "--init_from", init, *SHORT, *FLAGS)
    return run


def assert_refused(binary, data, out, *flags, found):
    error = train(binary, data, out, *SHORT, *FLAGS, *flags, code=1)
    assert found in error and error.count("\n") == 1 and error.count(";") == 1, error


@emulated
@pytest.mark.parametrize("kill_at", range(9))
def test_a_run_that_is_killed_in_a_save_ends_with_the_same_model(kill_at, killed_binary, finished,
                                                                init, cuda_data, tmp_path):
    """The log, and for each of two steps a shard, the model, config.json and state.json."""
    flags = ["--init_from", init, *SHORT, *FLAGS, "--save_every", 1]
    train(killed_binary, cuda_data, tmp_path, *flags, code=-9, KILL_AT=str(kill_at))
    train(killed_binary, cuda_data, tmp_path, *flags, "--resume")
    assert same_bits(tmp_path, finished)
    for name in ("config.json", "state/step_000002/rank_00000.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.parametrize("damage", ["no model", "half a model", "no config", "half a config",
                                    "older config"])
def test_a_resume_at_the_last_step_repairs_the_checkpoint(damage, bf16, finished, init, cuda_data,
                                                          tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    model, config = run / "model.safetensors", run / "config.json"
    if damage == "half a model":
        model.write_bytes(model.read_bytes()[:5000])
    elif damage == "half a config":
        config.write_text(config.read_text()[:-4])
    elif damage == "older config":
        config.write_text(config.read_text().replace('"step": 2', '"step": 1'))
    else:
        (model if damage == "no model" else config).unlink()
    train(bf16, cuda_data, run, "--init_from", init, *SHORT, *FLAGS, "--resume")
    assert same_bits(run, finished)
    meta = load_checkpoint(run)[1]
    assert (meta["stage"], meta["step"]) == ("pretrain", 2)


def test_nothing_that_is_not_finite_is_saved_or_loaded(bf16, finished, init, cuda_data, tmp_path):
    """A learning rate of 1e38 times dN's larger rates is beyond fp32."""
    flags = [*TINY, "--model", "d1", "--lr", 1e38, "--max_steps", 2, "--total_batch_size", 64]
    error = train(bf16, cuda_data, tmp_path / "run", *flags, "--save_every", 1, code=1)
    assert "step 1: " in error and "not finite, so nothing is saved; try a lower --lr" in error
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "log.jsonl"}
    error = train(bf16, cuda_data, tmp_path / "other", *flags, "--eval_every", 1, code=1)
    assert "step 1: val_loss" in error and "must be finite" in error
    broken = shutil.copytree(init, tmp_path / "init")
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-4:] = np.float32(np.nan).tobytes()
    (broken / "model.safetensors").write_bytes(weights)
    assert_refused(bf16, cuda_data, tmp_path / "new", "--init_from", broken, found="not finite")


def test_the_newest_state_is_that_of_the_most_steps_and_the_only_one_kept(tmp_path):
    source = SOURCE.replace("int main(", "int trainer_main(") + """
        int main(int, char** words) {
            char folder[4096];
            arguments.out = words[1];
            printf("%lld", (long long)newest_state());
            state_folder(folder, atoll(words[2]));
            delete_other_states(folder);
        }"""
    program, run = build(tmp_path / "build", "-O0", source=source), tmp_path / "run [1]*"
    for name in ("step_100000", "step_999999", "step_1000000", "step_2000000.part", "step_x"):
        (run / "state" / name).mkdir(parents=True)
        (run / "state" / name / "state.json").touch()
    for kept, newest in ((1_000_000, b"1000000"), (100_000, b"1000000")):
        (run / "state" / "step_100000").mkdir(exist_ok=True)
        assert subprocess.run([program, run, str(kept)], capture_output=True).stdout == newest
        assert [path.name for path in (run / "state").iterdir()] == [f"step_{kept}"]


@emulated
def test_a_run_trains_in_one_process_at_a_time(bf16, finished, init, cuda_data, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    with open(run / "lock", "r+") as file:      # as training.py locks it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flags = ["--init_from", init, "--resume"]
        assert_refused(bf16, cuda_data, run, *flags, found="another process is training in")
    train(bf16, cuda_data, run, *SHORT, *FLAGS, *flags)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_model_without_a_state_is_not_overwritten(resume, bf16, init, cuda_data, tmp_path):
    run = shutil.copytree(init, tmp_path / "run")
    assert_refused(bf16, cuda_data, run, "--init_from", run, *resume,
                   found="holds a model but no saved state")
    assert same_bits(run, init)
    (run / "config.json").unlink()
    assert_refused(bf16, cuda_data, run, "--init_from", init, *resume, found="another --out")


FULL = ["model.safetensors", "config.json", "state/step_000002/state.json",
        "state/step_000002/rank_00000.safetensors"]


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(name, bf16, init, cuda_data,
                                                             tmp_path):
    part = tmp_path / f"{name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.symlink_to("/dev/full")
    found = f"{name} cannot be written: No space left"
    assert_refused(bf16, cuda_data, tmp_path, "--init_from", init, found=found)
    assert not (tmp_path / name).exists() and not part.is_symlink()
    train(bf16, cuda_data, tmp_path, "--init_from", init, *SHORT, *FLAGS, "--resume")


@pytest.mark.parametrize("blocks, name", [(1, "log.jsonl"), (100, "rank_00000.safetensors")])
def test_a_limit_of_file_sizes_and_an_out_that_is_a_file_end_in_one_line(blocks, name, bf16, init,
                                                                        cuda_data, tmp_path):
    limited = tmp_path / "limited"
    limited.write_text(f"#!/bin/sh\nulimit -f {blocks}\nexec '{bf16}' \"$@\"\n")
    limited.chmod(0o755)
    found = f"{name} cannot be written: File too large"
    assert_refused(limited, cuda_data, tmp_path / "run", "--init_from", init, found=found)
    assert_refused(bf16, cuda_data, limited, "--init_from", init, found="choose another --out")


def damaged(path, old, new):
    """Replaces a piece of a file by another, or writes `new` if `old` is ""."""
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, 1) if old else new)


@pytest.mark.parametrize("old, new, found", [
    (b"", b"", "not one whole JSON object"), (b"", b"[" * 200_000, "not one whole JSON object"),
    (b"", b'{"a":' * 200_000 + b"}" * 200_000, "a saved state of format 0"),
    (b'"norms"', b"\0", "not one whole JSON object"), (b"}\n", b"", "not one whole JSON object"),
    (b'"step": 2', b'"step": 3', "step must be an integer from 2 to 2, got 3"),
    (b'"position": 4', b'"position": 1e12', "position must be an integer"),
    (b'"world_size": 1', b'"world_size": 0', "world_size must be"),
    (b'"world_size": 1', b'"world_size": 2', "masters is cut short"),
    (b'"optimizer_steps": 2', b'"optimizer_steps": -1', "optimizer_steps must be"),
    (b'"losses": [', b'"losses": [x', "losses must be a list"),
    (b'"losses": [', b'"losses": [' + b"1, " * 200, "losses must be a list"),
    (b'"norms": [', b'"norms": [nan, ', "norms must be a list"),
    (b'"norms"', b'"n"', "norms must be a list")])
def test_a_damaged_state_json_is_one_line(old, new, found, bf16, finished, init, cuda_data,
                                         tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    damaged(run / "state" / "step_000002" / "state.json", old, new)
    assert_refused(bf16, cuda_data, run, "--init_from", init, "--resume", found=found)


@pytest.mark.parametrize("old, new", [
    (b"", b""), (b"", b"\xff" * 16), (b"", b"\x20" + 7 * b"\0" + b"{" * 32), (b"F32", b"I64"),
    (b'"dtype"', b'"dtypo"'), (b"data_offsets", b"data_offsots"), (b"[0,", b"[9,"),
    (b"[0,", b"[-9,"), (b'"masters"', b'"monsters"'), (b'"v"', b'"w"')])
def test_a_damaged_rank_file_is_one_line(old, new, bf16, finished, init, cuda_data, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "state" / "step_000002" / "rank_00000.safetensors"
    damaged(path, old, new)
    assert_refused(bf16, cuda_data, run, "--init_from", init, "--resume", found=str(path))
    path.unlink()
    os.mkfifo(path)
    assert_refused(bf16, cuda_data, run, "--init_from", init, "--resume", found=str(path))


@pytest.mark.parametrize("old, new", [
    (b"", b"[]"), (b"", b"{" * 100_000), (b"}\n}", b""), (b'"n_head": 2', b'"n_head": 0'),
    (b'"n_head": 2', b'"n_head": "2"'), (b'"n_head": 2', b'"n_head": null'),
    (b'"n_layer": 1', b'"n_layer": 1000000'), (b'"n_layer": 1', b'"n_layer": -1'),
    (b'"n_embd": 128', b'"n_embd": 128.5'), (b'"n_positions"', b'"n_"'),
    (b'"vocab_size": 400', b'"vocab_size": 99999999999999999999')])
def test_a_damaged_config_json_is_one_line(old, new, bf16, init, cuda_data, tmp_path):
    broken = shutil.copytree(init, tmp_path / "init")
    damaged(broken / "config.json", old, new)
    run = tmp_path / "run"
    assert_refused(bf16, cuda_data, run, "--init_from", broken, found=str(broken))
    assert not run.exists()


@pytest.mark.parametrize("name, old, new", [
    ("index.json", b"400", b"-1"), ("index.json", b"}", b""), ("token_bytes.npy", b"\1\0\0\0", b""),
    ("demo_train_001.bin", b"", None), ("hellaswag.bin", b"\x0f\0\0\0", b"\xff" * 4)])
def test_damaged_data_are_one_line(name, old, new, bf16, init, cuda_data, core_dir, tmp_path):
    folder = shutil.copytree(cuda_data, tmp_path / "data")
    shutil.copy(core_dir / "hellaswag.bin", folder)
    if new is None:
        write_shard(folder / name, [400] * 5000)        # the vocabulary ends with 399
    else:
        damaged(folder / name, old, new)
    flags = ["--core_dir", folder] if name == "hellaswag.bin" else []
    assert_refused(bf16, folder, tmp_path / "run", "--init_from", init, *flags, found=name)


def test_damaged_lines_of_a_log_are_left_out(bf16, init, cuda_data, tmp_path):
    flags = ["--init_from", init, *SHORT, *FLAGS]
    train(bf16, cuda_data, tmp_path, *flags)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b'{"step": 1, \0\n\n{"step": 1\n' + whole + b'{"step": 2, "lo')
    train(bf16, cuda_data, tmp_path, *flags, "--resume")
    assert log.read_bytes() == whole


# ---- the log

DN_KERNELS = "rmsnorm|add$|rotary|value_embed|gate|relu2|momentum|line_|norm|muon"


def launches():
    """{row of the profile: the kernel that it is of}, from the calls of launch()."""
    found = {}
    for row, kernel in re.findall(r"launch\(\{(\S+),[^;]*?(\w+)_kernel\b", SOURCE):
        names = [row.strip('"')]
        if row.startswith("Activation::"):
            names = re.findall(rf'\b{row.removeprefix("Activation::")} = "(\w+)"', SOURCE)
        found |= dict.fromkeys(names, kernel)
    return found


def test_every_kernel_is_launched_by_launch_and_so_has_a_row_in_the_profile():
    kernels = re.findall(r"__global__ void\s[^;{]*?(\w+)_kernel\(", SOURCE)
    assert len(kernels) == SOURCE.count("__global__") and set(launches().values()) == set(kernels)
    assert SOURCE.count("<<<") == 1


@pytest.mark.parametrize("precision, other", [
    ("bf16", f"plain_|attention_(forward|backward)|gelu_backward|add_bias|{DN_KERNELS}"),
    ("fp32", f"(hopper_)?attention_(forward|backward)|add_bias|{DN_KERNELS}")])
def test_a_profile_has_every_kernel_and_the_bytes_it_moves(precision, other, cuda_data, tmp_path,
                                                           request):
    binary = request.getfixturevalue(precision)
    done = subprocess.run([binary, "--data", cuda_data, "--out", tmp_path, "--max_steps", "12",
                           "--profile", "--recompute", "1", *map(str, TINY)], capture_output=True,
                          text=True)
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "%" in line}
    launched = launches().keys() - {"round_parameters", "fp8_measure", "fp8_quantise"}
    expected = {name for name in launched if not re.match(other, name)}
    assert len(expected) >= 16 and expected <= table.keys()
    width, BTC = {"bf16": 2, "fp32": 4}[precision], 64 * 64
    # three norms: 4 BTC each, but 2 where nothing is added
    assert float(table["layernorm_forward"][4]) == pytest.approx(10 * BTC * width / 1e6, abs=6e-4)
    parameters = sum(p.size for p in load_file(tmp_path / "model.safetensors").values())
    assert 0 < float(table["adamw"][4]) * 1e6 / (28 + width) - parameters < 64 * 64


@pytest.fixture(scope="session")
def core_dir(data, tmp_path_factory):
    """Of each question the first five words of a text, and four ends of texts to choose from."""
    folder = tmp_path_factory.mktemp("core")
    words = [text.split()[:14] for text in DOCUMENTS[-12:]]
    rows = [dict(query=" ".join(words[i][:5]), gold=i % 4, choices=[
        " ".join(words[i - i % 4 + k][5:7 + i % 3 + k]) for k in range(4)]) for i in range(12)]
    path = folder / "eval_data" / eval_module.HELLASWAG.file
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(eval_module, "hellaswag", "--core_dir", folder, "--tokenizer", data / "tokenizer",
             "--max_examples", 11)
    return folder


@pytest.mark.parametrize("block_size", [24, 80])        # longer than some questions, or than all
def test_hellaswag_is_as_accurate_as_by_eval_py(block_size, fp32, data, cuda_data, core_dir,
                                                tokenizer, tmp_path):
    config = GPTConfig(block_size=block_size, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1,
                       n_embd=64)
    save_checkpoint(tmp_path / "init", noisy(config, std=0.3), tokenizer)
    rows = train(fp32, cuda_data, tmp_path, "--init_from", tmp_path / "init", "--core_dir",
                 core_dir, "--max_steps", 1, "--lr", 0.1, "--batch_size", 6, "--total_batch_size",
                 6 * block_size)
    path = core_dir / "eval_data" / eval_module.HELLASWAG.file
    for run, found in zip((tmp_path / "init", tmp_path), column(rows, "hellaswag"), strict=True):
        engine = Engine(load_checkpoint(run)[0], tokenizer)
        result = eval_module.run_task(engine, eval_module.HELLASWAG, path, 11)
        assert (result["cut"] > 0) == (block_size == 24) and found == result["accuracy"]


def test_samples_are_what_the_model_finds_likely(fp32, data, cuda_data, tokenizer, tmp_path):
    """A model whose positions alone decide what comes next: the tokens of a text, in order."""
    folder = shutil.copytree(cuda_data, tmp_path / "data")
    shutil.copytree(data / "tokenizer", folder / "tokenizer")
    text = tokenizer.encode_ordinary(DOCUMENTS[-1])[:56]
    model = noisy(GPTConfig(block_size=56, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1,
                            n_embd=32), std=0)
    with torch.no_grad():
        model.wpe.weight.copy_(1e3 * model.wte.weight[text])
        model.ln_f.weight.fill_(500)
    save_checkpoint(tmp_path / "init", model, tokenizer)
    train(fp32, folder, tmp_path / "run", "--init_from", tmp_path / "init", "--max_steps", 1,
          "--total_batch_size", 56, "--batch_size", 1, "--lr", 1e-9)
    samples = [row["sample"] for row in rows_of(tmp_path / "run") if "sample" in row]
    firsts = [len(tokenizer.encode_ordinary(prompt)) for prompt in ("The", "Return the")]
    assert samples == 2 * [prompt + tokenizer.decode(text[n:n + 48])
                           for prompt, n in zip(("The", "Return the"), firsts)]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eot and config["resid_pdrop"] == 0


def test_the_header_says_what_it_takes_to_repeat_a_run(bf16, cuda_data, tmp_path):
    train(bf16, cuda_data, tmp_path / 'a "b" \n', "--max_steps", 1, *TINY)
    log = (tmp_path / 'a "b" \n' / "log.jsonl").read_text()
    header = json.loads(log.splitlines()[0])["header"]
    assert header["flags"]["out"] == str(tmp_path / 'a "b" \n') in header["command"]
    assert header["flags"]["lr"] == 6e-4 and header["flags"]["init_from"] is None
    assert header["params"] == 400 * 64 + 32 * 64 + 12 * 64 * 64 + 13 * 64 + 2 * 64


# ---- checkpoints, and a user's mistakes

def test_a_new_models_loss_is_that_of_a_guess_and_python_reads_it(bf16, cuda_data, tokenizer,
                                                                  tmp_path):
    rows = train(bf16, cuda_data, tmp_path, "--config", "n_layer=1", "n_head=1", "n_embd=64",
                 "block_size=32", "--max_steps", 1, "--total_batch_size", 64, "--batch_size", 2)
    model, meta = load_checkpoint(tmp_path)
    assert abs(column(rows, "val_loss")[0] - np.log(tokenizer.n_vocab)) < 0.1
    assert meta["stage"] == "pretrain" and meta["step"] == 1
    assert 0.018 < model.wte.weight[:tokenizer.n_vocab].std() < 0.022


def splitmix64(numbers):
    """Its output for each state, as uint64."""
    z = numbers.astype(np.uint64)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def normals(seed, first, n):
    """Box and Muller's numbers first … first + n - 1 of a seed, from pairs of uniform ones."""
    places = np.arange(2 * first + 1, 2 * (first + n) + 1, dtype=np.uint64)
    state = np.uint64(seed * 0xD1342543DE82EF95 % 2 ** 64) + places * np.uint64(0x9E3779B97F4A7C15)
    u = (splitmix64(state) >> np.uint64(11)) * 2.0 ** -53
    return np.sqrt(-2 * np.log(1 - u[::2])) * np.cos(2 * np.pi * u[1::2])


@two_gpus
def test_the_first_weights_are_the_same_normal_numbers_for_any_number_of_ranks(fp32, cuda_data,
                                                                               tmp_path):
    """h.0.mlp.c_fc.weight has 147,456 of them, which two threads draw."""
    flags = ["--config", "n_layer=1", "n_head=3", "n_embd=192", "block_size=8", "--max_steps", 0,
             "--total_batch_size", 16, "--batch_size", 1, "--seed", 5]
    for n_ranks in (1, 2):
        train_on(n_ranks, fp32, cuda_data, tmp_path / str(n_ranks), *flags)
    assert same_bits(tmp_path / "1", tmp_path / "2")
    found = load_file(tmp_path / "1" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    first = (400 + 8 + 2) * 192 + 4 * 192 * 192
    expected = 0.02 * normals(5, first, found.size)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6, atol=1e-9)


def test_no_steps_are_not_the_default_but_save_the_first_model(bf16, init, cuda_data, tmp_path):
    rows = train(bf16, cuda_data, tmp_path, "--init_from", init, "--max_steps", 0, *FLAGS)
    assert len(rows) == 1 and "val_loss" in rows[0]
    expected = load_file(init / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert (tensor == expected[name]).all(), name


@pytest.mark.parametrize("flags, found", [
    (["--total_batch_size", 100], "try --total_batch_size 160"),
    (["--model", "d12", "--init_from", ""], "config.json"),
    (["--model", "gpt3"], "d12"),
    (["--init_from", "gpt2-xl"], "python download.py gpt2-xl"),
    (["--seq_len", 81], "try --seq_len 80"),
    (["--config", "n_layer=2"], "leave --config out"),
    (["--model", "gpt2", "--config", "n_layer=1", "softcap=0"], "--config softcap=0"),
    (["--device", "cpu"], "--device is a flag of train_gpt2.py"),
    (["--fp8", 2], "--fp8 must be at most 1, got 2"),
    (["--fp8", 1, "--seq_len", 79, "--total_batch_size", 158], "multiples of 16, got 128 and 158"),
    (["--fp8", 1, "--model", "gpt2", "--config", "n_head=1", "n_embd=136", "block_size=80"],
     "got 136 and 160; leave --fp8 out"),
    (["--layers", 3], "--layers is not a flag"),
    (["--lr", "high"], "--lr must be a number, got high"),
    (["--lr", 0], "--lr must be at least 1e-38, got 0"), (["--lr", -1], "must be at least"),
    (["--lr", "nan"], "at least 1e-38, got nan"), (["--lr", "inf"], "at most 1e+38, got inf"),
    *((["--" + name, value], f"--{name} must be at least 1, got {value}") for value in (0, -1) for
      name in ("batch_size", "seq_len", "total_batch_size", "eval_every", "save_every")),
    (["--max_steps", -1], "must be at least 0"), (["--seed", -1], "must be at least 0"),
    (["--batch_size", "9" * 30], "must be at most"), (["--batch_size", "1e3"], "must be a number"),
    (["--recompute", 3], "must be at most 2"), (["--deterministic", 2], "must be at most 1"),
    (["--gpu_hour_usd", -2], "must be at least 0, got -2"),
    (["--core_dir", "--resume"], "--core_dir has no value"),
    (["--model", "d3x"], "d1, d2"), (["--model", "d99999999999999999999"], "d1, d2"),
    (["--model", "gpt2", "--config", "n_head=0"], "n_head must be an integer from 1 to"),
    (["--model", "gpt2", "--config", "n_layer=2x"], "got 2x; try --config n_layer=12"),
    (["--model", "d1", "--config", "windows=XQ"], "windows must be"),
    (["--model", "d1", "--config", "windows="], "windows must be")])
def test_a_mistake_ends_in_one_line_that_names_the_remedy(bf16, init, cuda_data, tmp_path, flags,
                                                          found):
    start = [] if "--model" in flags else ["--init_from", init]
    error = train(bf16, cuda_data, tmp_path, *start, *SHORT, *FLAGS, *flags, code=1)
    assert found in error and error.count("\n") == 1 and error.count(";") == 1


@pytest.mark.parametrize("name", ["pretrain_{}_{}", "eval_{}_{}", "my_train_{}_{}", "val_{}_{}"])
def test_no_name_of_a_data_set_mixes_its_splits(name, bf16, init, cuda_data, tmp_path):
    folder = shutil.copytree(cuda_data, tmp_path / "data")
    for path in folder.glob("demo_*.bin"):
        _, split, number = path.stem.split("_")
        path.rename(folder / (name.format(split, number) + ".bin"))
    start = "--init_from", init, *SHORT, *FLAGS
    expected = train(bf16, cuda_data, tmp_path / "expected", *start)
    found = train(bf16, folder, tmp_path / "run", *start)
    for key in ("loss", "val_loss"):
        assert column(found, key).tolist() == column(expected, key).tolist()


def test_shards_named_without_digits_are_found_and_a_missing_split_is_named(bf16, init, cuda_data,
                                                                            tmp_path):
    folder = shutil.copytree(cuda_data, tmp_path / "data")
    (folder / "demo_val_000.bin").rename(folder / "tiny_shakespeare_val.bin")
    start = "--init_from", init, *SHORT, *FLAGS
    assert len(column(train(bf16, folder, tmp_path / "run", *start), "val_loss"))
    (folder / "tiny_shakespeare_val.bin").rename(folder / "medieval.bin")
    error = train(bf16, folder, tmp_path / "other", *start, code=1)
    assert "holds 0 tokens of the val split" in error and error.count("\n") == 1


def test_a_truncated_checkpoint_is_refused(bf16, init, cuda_data, tmp_path):
    broken = shutil.copytree(init, tmp_path / "init")
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(30_000)
    error = train(bf16, cuda_data, tmp_path / "run", "--init_from", broken, *SHORT, *FLAGS, code=1)
    assert "cut short" in error


@emulated
@pytest.mark.parametrize("model, recompute, fp8", [
    ("gpt2", 0, 0), ("gpt2", 2, 0), ("d4", 0, 0), ("d4", 1, 0), ("gpt2", 0, 1), ("d4", 1, 1),
    ("d4", 2, 1)])
def test_the_memory_said_is_what_is_allocated(model, recompute, fp8, tmp_path):
    source = SOURCE.replace("allocate(size_t bytes) {", "allocate(size_t bytes) { total += bytes;")
    source = source.replace("static void* allocate", "static double total; static void* allocate")
    source = source.replace("int main(", "int trainer_main(") + f"""
        int main() {{
            double fixed, row;
            Ranks ranks = {{}};
            ranks.world_size = 1;
            arguments.model = "{model}", arguments.config = "n_layer=3 n_head=2 n_embd=128";
            Config config = choose_config(500);
            memory_bytes(config, 256, {recompute}, 1, &fixed, &row, {fp8});
            make_model(config, 40, 256, {recompute}, &ranks, {fp8});
            printf("%.17g", total / (fixed + 40 * row));
        }}"""
    program = build(tmp_path, "-O0", source=source)
    share = float(subprocess.run([program], capture_output=True, text=True).stdout)
    assert 0.8 < share <= 1


# ---- mutants: each must be seen by a check above

MUTANTS = [
    ("fp32", "{ bias_backward(dbias, partials, dy, n.rows, n.OC, stream); }", "{}"),
    ("fp32", "s <= at.t; s++", "s < at.t; s++"),
    ("bf16", "int query = KEYS ? column : row + i / 2 * 8;", "int query = KEYS ? column : row;"),
    ("bf16", "float to_base_2 = rsqrtf((float)HS) * LOG2_E * sizes.sharpness;\n    int query",
     "float to_base_2 = LOG2_E;\n    int query"),
    ("bf16", "sees(first + column, key, sizes.window)",
     "sees(first + column - 1, key, sizes.window)"),
    ("bf16", "    __syncthreads();\n    if (threadIdx.y > 0 || c >= C) { return; }",
     "    if (threadIdx.y > 0 || c >= C) { return; }"),
]


@slow
@emulated
@pytest.mark.parametrize("precision, old, new", MUTANTS)
def test_a_mutant_changes_a_gradient(precision, old, new, init, cuda_data, tmp_path):
    assert SOURCE.count(old) == 1, old
    binary = build(tmp_path / "build", "-O1", precision=precision.upper(),
                   source=SOURCE.replace(old, new))
    try:
        worst = worst_gradient(binary, init, cuda_data, tmp_path / "run", "--attention", "mma")
    except AssertionError:
        return                  # it did not even run
    assert worst > 0.05


# ---- the real compiler

@slow
@pytest.mark.parametrize("variable", ["PRECISION=BF16", "PRECISION=FP32", "NCCL="])
def test_nvcc_builds_it_without_a_warning_or_a_spill(variable, tmp_path):
    done = make(tmp_path, "GPU_ARCHS=80 90 90a", variable)
    printed = done.stdout + done.stderr
    if " is not here; " in printed:
        pytest.skip(printed)
    assert done.returncode == 0 and "warning" not in printed, printed[-2000:]
    assert ("-lnccl" in printed or "nccl" in printed) == (variable != "NCCL=")
    assert printed.count("0 bytes spill stores") >= 3 * len(re.findall("__global__", SOURCE)) - 9
    assert "Performance Loss" not in printed        # of wgmma, if products have to wait for others
    if "FP32" not in variable:
        assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", printed)
