"""
The attention kernels of train_gpt2.cu for tensor cores, mma.sync's and Hopper's wgmma, by
themselves: outputs and gradients against float64 PyTorch, orders of threads, mutants; and ten steps
of training.

    make test_train_gpt2cu                                  # the slow ones, too
    DEVICE=1 pytest tests/test_train_gpt2cu_attention.py    # the same comparisons on this GPU
"""
import os
import re
import subprocess

import pytest
import torch

from test_train_gpt2cu import (DEVICE, FLAGS, SOURCE, bf16, build, column, cuda_data, difference,
                               emulated, fp32, init, pytestmark, python_run, rows_of, slow, train)

KINDS = ["mma", "wgmma"]
SHARPNESS = 1.44
hopper = pytest.mark.skipif(DEVICE and torch.cuda.get_device_capability() != (9, 0),
                            reason="wgmma takes a GPU of compute capability 9.0")

# A file of qkv and dy → a file of y, dqkv and lse, as the kernels of one kind compute them
MAIN = """
int main(int, char** words) {
    int sizes[5];
    for (int i = 0; i < 5; i++) { sizes[i] = atoi(words[4 + i]); }
    AttentionSizes s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], 1.44f};
    int64_t n = (int64_t)s.bytes() / 2, rows = n / s.HS;
    floatX* host = (floatX*)malloc(8 * n);
    float* host_lse = (float*)malloc(4 * rows);
    FILE* in = fopen(words[2], "rb");
    if (fread(host, 2, 4 * n, in) != 4 * n) { die("the input is too short"); }
    floatX *qkv = allocate_x(3 * n), *dy = allocate_x(n), *y = allocate_x(n);
    floatX* dqkv = allocate_x(3 * n);
    float *lse = allocate_float(rows), *delta = allocate_float(rows);
    CHECK_CUDA(cudaMemcpy(qkv, host, 6 * n, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(dy, host + 3 * n, 2 * n, cudaMemcpyHostToDevice));
    use_wgmma = strcmp(words[1], "wgmma") == 0;
    attention_forward(y, lse, qkv, s, 0);
    attention_backward(dqkv, delta, dy, y, lse, qkv, {}, s, 0);
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(host, y, 2 * n, cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(host + n, dqkv, 6 * n, cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(host_lse, lse, 4 * rows, cudaMemcpyDeviceToHost));
    FILE* out = fopen(words[3], "wb");
    fwrite(host, 2, 4 * n, out);
    fwrite(host_lse, 4, rows, out);
    fclose(out);
}"""


def build_kernels(folder, source=SOURCE, *options):
    return build(folder, *options, source=source.replace("int main(", "int trainer_main(") + MAIN)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return build_kernels(tmp_path_factory.mktemp("kernels"))


def inputs(sizes):
    """qkv (B, T, 3, NH, HS) and dy (B, T, NH, HS) in bf16"""
    B, T, NH, HS, _ = sizes
    generator = torch.Generator().manual_seed(T)
    return (torch.randn(B, T, 3, NH, HS, generator=generator).bfloat16(),
            torch.randn(B, T, NH, HS, generator=generator).bfloat16())


def float64(sizes):
    """{y, dq, dk, dv, lse}, lse (B, NH, T) as a logarithm to base 2"""
    B, T, NH, HS, window = sizes
    qkv, dy = (x.double() for x in inputs(sizes))
    qkv.requires_grad_()
    q, k, v = qkv.transpose(1, 3).unbind(2)             # (B, NH, T, HS)
    t = torch.arange(T)
    back = t[:, None] - t
    scores = q @ k.mT * SHARPNESS / HS ** 0.5
    scores = scores.masked_fill((back < 0) | (back > window), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2)
    y.backward(dy)
    lse = scores.logsumexp(-1) / torch.tensor(2.0).log()
    return dict(zip(("dq", "dk", "dv"), qkv.grad.unbind(2)), y=y.detach(), lse=lse.detach())


def run(binary, kind, sizes, folder, **environment):
    """The bytes of y, dqkv and lse"""
    B, T, NH, HS, _ = sizes
    paths = folder / "in", folder / f"out_{kind}"
    joined = torch.cat([x.flatten() for x in inputs(sizes)])
    paths[0].write_bytes(joined.view(torch.int16).numpy().tobytes())
    done = subprocess.run([str(word) for word in (binary, kind, *paths, *sizes)], timeout=60,
                          capture_output=True, text=True, env=dict(os.environ, **environment))
    assert done.returncode == 0, done.stderr
    return paths[1].read_bytes()


def errors(binary, kind, sizes, folder, expected, **environment):
    B, T, NH, HS, _ = sizes
    n = B * T * NH * HS
    output = bytearray(run(binary, kind, sizes, folder, **environment))
    halves = torch.frombuffer(output, dtype=torch.bfloat16, count=4 * n).double()
    found = dict(zip(("dq", "dk", "dv"), halves[n:].view(B, T, 3, NH, HS).unbind(2)))
    found["y"] = halves[:n].view(B, T, NH, HS)
    found["lse"] = torch.frombuffer(output, dtype=torch.float32, offset=8 * n).view(B, NH, T)
    sizes_of = {name: expected[name].norm() for name in expected}
    for name in ("dq", "dk"):               # 0 where a query sees only one key
        if sizes_of[name] < 1e-9:
            sizes_of[name] = sizes_of["dv"]
    return {name: ((found[name] - expected[name]).norm() / sizes_of[name]).item()
            for name in expected}


def are_right(found):
    """Measured: 1.1e-7 for lse, which is fp32, and 4.7e-3. NaN is below no bound."""
    return all(error < (1e-6 if name == "lse" else 7e-3) for name, error in found.items())


# Rows that end within a tile, at its end, and one later; windows that end there and in between
ALL = 9999
SIZES = [(1, 1, 1, 64, ALL), (2, 65, 2, 64, ALL), (2, 129, 1, 128, ALL), (1, 63, 3, 128, ALL),
         *((1, 320, 1, HS, window) for HS in (64, 128)
           for window in (0, 1, 63, 64, 126, 128, 190, 254, ALL))]


@hopper
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_are_float64s_as_closely_as_mma_syncs(sizes, kernels, tmp_path):
    expected = float64(sizes)
    old, new = (errors(kernels, kind, sizes, tmp_path, expected) for kind in KINDS)
    assert are_right(old) and are_right(new)
    for name, error in new.items():
        assert error < 1.05 * old[name] + 1e-7, name                # measured: 1.01 times


@emulated
@pytest.mark.parametrize("HS", [64, 128])
def test_three_orders_of_threads_give_the_same_bits(HS, kernels, tmp_path):
    sizes = (1, 300, 1, HS, 150)
    found = {run(kernels, "wgmma", sizes, tmp_path, CUEMU_ORDER=order) for order in "012"}
    assert len(found) == 1


@slow
@hopper
@pytest.mark.parametrize("old, new", [
    ("STAGES = 2;", "STAGES = 3;"), ("KEY_TILE = HS == 64 ? 64 : 128", "KEY_TILE = 64"),
    ("KEY_TILE = HS == 64 ? 64 : 128", "KEY_TILE = HS == 64 ? 128 : 64")])
def test_other_stages_and_tiles_compute_the_same(old, new, tmp_path):
    assert SOURCE.count(old) == 1
    binary = build_kernels(tmp_path, SOURCE.replace(old, new))
    for sizes in SIZES[1:8:3] + SIZES[-3:]:
        found = errors(binary, "wgmma", sizes, tmp_path, float64(sizes))
        assert are_right(found), (sizes, found)


# ---- mutants: a wait that is missing, a mask or a matrix that is shifted

FULL = "        wait_until_full(&ring, n);\n"
PAIR = "            wgmma_wait({});\n            wgmma_wait({});\n"
MUTANTS = [
    *((FULL, "", which) for which in range(3)),
    *((FULL, FULL + "leave_place(&ring, n);", which) for which in range(3)),
    ("        wait_until_empty(ring, n);\n", "", 0),
    ("            wait_until_empty(&ring, n);\n", "", 0),
    *((f"    mbarrier_wait(&{what}_here, 0);\n", "", 0) for what in ("q", "keys", "queries")),
    ("            wgmma_wait(p);\n", "", 0), ("            wgmma_wait(sum);\n", "", 0),
    (PAIR.format("p", "ds"), "", 0), (PAIR.format("p", "ds"), "", 1),
    (PAIR.format("dv", "dk"), "", 0), ("            wgmma_wait(dq);\n", "", 0),
    ("mbarrier_init(&ring->empty[i], CONSUMER_WARPS)", "mbarrier_init(&ring->empty[i], 4)", 0),
    ("n / STAGES % 2 ^ 1", "n / STAGES % 2", 0),
    ("expect(full, 2 * PANELS<HS, KEYS>", "expect(full, PANELS<HS, KEYS>", 0),
    ("n_queries - 1 - key <= window;", "n_queries - 2 - key <= window;", 0),
    ("(key + n_keys - 1) <= window;", "(key + n_keys - 1) < window;", 0),
    ("int column = first_column + n * 8", "int column = first_column + 1 + n * 8", 0),
    ("matrix_descriptor(right, K / PANEL)", "matrix_descriptor(right, 0)", 0),
    ("(p, q + group, k_tile)", "(p, q, k_tile)", 0),
    ("(p, k + group, q_tile)", "(p, k, q_tile)", 0),
    ("BLOCK_ROWS + sizes.window) - 1) / QUERIES", "BLOCK_ROWS + sizes.window) - 2) / QUERIES", 0),
    *(("max(0, block_query - sizes.window)", "max(0, block_query + 1 - sizes.window)", which)
      for which in range(2)),
]


def changed(source, old, new, which):
    """`source` with the occurrence number `which` of `old` replaced"""
    parts = source.split(old)
    assert len(parts) > which + 1, old
    return old.join(parts[:which + 1]) + new + old.join(parts[which + 1:])


@slow
@emulated
@pytest.mark.parametrize("old, new, which", MUTANTS)
def test_a_mutant_fails(old, new, which, tmp_path):
    binary = build_kernels(tmp_path, changed(SOURCE, old, new, which), "-O1")
    for sizes in [(1, 300, 1, 64, 70), (1, 500, 1, 128, ALL), (1, 449, 1, 64, 1),
                  (1, 320, 1, 64, 126), (1, 320, 1, 128, 64)]:
        expected = float64(sizes)
        for order in "012":
            try:
                found = errors(binary, "wgmma", sizes, tmp_path, expected, CUEMU_ORDER=order)
            except AssertionError:
                return              # the emulator stopped it
            if not are_right(found):
                return
    pytest.fail("no check has seen it")


# ---- training

@hopper
def test_ten_steps_are_those_of_mma_sync_and_of_train_gpt2_py(bf16, init, cuda_data, python_run,
                                                              tmp_path):
    rows = {kind: train(bf16, cuda_data, tmp_path / kind, "--init_from", init, "--max_steps", 10,
                        "--eval_every", 5, "--attention", kind, *FLAGS) for kind in KINDS}
    for key in ("loss", "norm", "val_loss"):
        new = column(rows["wgmma"], key)
        assert difference(new, column(rows["mma"], key)) < 2e-3, key
        assert difference(new, column(rows_of(python_run), key)) < 2e-2, key


def test_the_log_names_the_kernels_and_a_wrong_name_is_one_line(bf16, init, cuda_data, tmp_path):
    flags = ["--init_from", init, "--max_steps", 1, *FLAGS]
    train(bf16, cuda_data, tmp_path / "mma", *flags, "--attention", "mma")
    assert '"attention": "mma"' in (tmp_path / "mma" / "log.jsonl").read_text()
    error = train(bf16, cuda_data, tmp_path / "run", *flags, "--attention", "flash", code=1)
    assert "--attention must be wgmma or mma, got flash; see --help" in error
    assert error.count("\n") == 1


@emulated
@pytest.mark.parametrize("old, new", [("gpu.major == 9", "gpu.major == 10"),
                                      ("compiled_for_sm_90a = 1;", "compiled_for_sm_90a = 0;")])
def test_without_hopper_or_a_build_for_it_mma_sync_is_used(old, new, init, cuda_data, tmp_path):
    binary = build(tmp_path, "-O1", source=changed(SOURCE, old, new, 0))
    flags = ["--init_from", init, "--max_steps", 1, *FLAGS]
    train(binary, cuda_data, tmp_path / "run", *flags)
    assert '"attention": "mma"' in (tmp_path / "run" / "log.jsonl").read_text()
    error = train(binary, cuda_data, tmp_path / "other", *flags, "--attention", "wgmma", code=1)
    assert "GPU_ARCHS=90a" in error and error.count("\n") == 1
