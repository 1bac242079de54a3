"""
train_gpt2.cu --fp8 1, run on the CPU by tests/cuda_emulator: its 8-bit numbers, products, gradients
and steps against precision.py and train_gpt2.py --fp8 1, mutants against the checks.

    make test_train_gpt2cu                                  # the slow ones, too
"""
import subprocess

import numpy as np
import pytest
import torch

import precision
import train_gpt2
from conftest import run_main
from precision import to_fp8
from test_train_gpt2cu import (SOURCE, TINY, bf16, build, column, cuda_data, difference, emulated,
                               fp32, init, pytestmark, rows_of, same_bits, slow, train, train_on)
from test_train_gpt2cu_dn import dn_data, dn_init, dn_tokenizer

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def run_program(folder, main, *words, source=SOURCE):
    """The standard output of `main`, compiled in the place of the trainer's main."""
    source = source.replace("int main(", "int trainer_main(") + main
    program = build(folder, "-O1", source=source)
    return subprocess.run([program, *map(str, words)], capture_output=True, check=True).stdout


# ---- the emulator's 8-bit numbers

def grid():
    """Each bf16, each number halfway between two neighbours of 8 bits, and both sides of it."""
    whole = torch.arange(2 ** 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    parts = [whole]
    for dtype in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
        codes = codes[codes.isfinite()].sort().values
        halfway = (codes[1:] + codes[:-1]) / 2
        parts += [halfway, halfway.nextafter(codes[1:]), halfway.nextafter(codes[:-1])]
    return torch.cat(parts)


@emulated
def test_the_emulators_conversions_to_and_from_8_bits_are_pytorchs(tmp_path):
    """A GPU's conversion saturates; PyTorch's does so only after a clamp."""
    x = grid()
    x.numpy().tofile(tmp_path / "numbers")
    printed = run_program(tmp_path, """
        int main(int, char** words) {
            float x;
            for (FILE* file = fopen(words[1], "rb"); fread(&x, 4, 1, file) == 1;) {
                for (auto kind : {__NV_E4M3, __NV_E5M2}) {
                    auto code = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kind);
                    float value = cuemu::fp8_value(code, kind);
                    fwrite(&value, 4, 1, stdout);
                }
            }
        }""", tmp_path / "numbers")
    found = torch.from_numpy(np.frombuffer(printed, np.float32).reshape(-1, 2).copy())
    for column, dtype in enumerate((E4M3, E5M2)):
        most = torch.finfo(dtype).max
        expected = x.clamp(-most, most).to(dtype).float()
        assert len(x) > 66_000
        torch.testing.assert_close(found[:, column], expected, rtol=0, atol=0, equal_nan=True)


def test_a_quotient_is_the_nearest_float_wherever_its_8_bits_are_not_0(tmp_path):
    """Of each bf16 and scales of all sizes; 2⁻¹⁸ is far below the smallest number of e5m2."""
    printed = run_program(tmp_path, """
        __global__ void compare_kernel(unsigned* wrong, float scale) {
            float x = __uint_as_float(thread_in_grid() << 16);
            float expected = __fdiv_rn(x, scale);
            if (!(fabsf(expected) < 65536.0f && fabsf(expected) > 0x1p-18f)) { return; }
            float found = divided(x, scale, __fdiv_rn(1.0f, scale));
            atomicMax(wrong, __float_as_uint(found) != __float_as_uint(expected));
        }
        int main() {
            unsigned* wrong = (unsigned*)allocate(sizeof(unsigned));
            for (int i = 0; i < 500; i++) {
                float scale = expf(uniform(1, i) * 60 - 38);
                launch({"compare"}, {256, 256, NULL}, compare_kernel, wrong, scale);
            }
            unsigned any;
            CHECK_CUDA(cudaMemcpy(&any, wrong, sizeof any, cudaMemcpyDeviceToHost));
            printf("%u", any);
        }""")
    assert printed == b"0"


# ---- products

BT, C, OC = 176, 144, 576           # BT and C are no multiples of the 128 that a block rounds
PRODUCTS = """
    static FILE* numbers;
    static void read_to(void* to, size_t bytes) {
        void* here = malloc(bytes);
        if (fread(here, 1, bytes, numbers) != bytes) { die("the numbers end early"); }
        CHECK_CUDA(cudaMemcpy(to, here, bytes, cudaMemcpyHostToDevice));
    }
    static void print(const void* from, size_t bytes) {
        void* here = malloc(bytes);
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(cudaMemcpy(here, from, bytes, cudaMemcpyDeviceToHost));
        fwrite(here, 1, bytes, stdout);
    }
    static void print(Fp8Tensor t, size_t size) {
        print(t.scale, 4), print(t.rows, size), print(t.columns, size);
    }
    int main(int, char** words) {
        const int BT = 176, C = 144, OC = 4 * C;
        numbers = fopen(words[1], "rb");
        Ranks ranks = {};
        ranks.world_size = 1;
        Model model = make_model({BT, 64, 1, 1, C}, 1, BT, 0, &ranks, true);
        floatX *x = allocate_x(BT * C), *dy = allocate_x(BT * OC), *y = allocate_x(BT * OC);
        floatX *bias = allocate_x(OC), *w = model.parameters + layer_offset(&model, 0, FC_W);
        float* dw = allocate_float(C * OC);
        read_to(x, BT * C * 2), read_to(w, C * OC * 2), read_to(dy, BT * OC * 2);
        read_to(bias, OC * 2), read_to(dw, C * OC * 4);
        quantise_weights(&model);
        forget_largest(&model);
        Fp8Linear* fp8 = &model.fp8[FC_W];
        fp8->x.measured = fp8->dy.measured = false;
        linear_forward(y, x, w, bias, {BT, C, OC}, model.stream, fp8);
        print(y, BT * OC * 2), print(fp8->x, BT * C), print(fp8->w, C * OC);
        linear_backward_weight(dw, NULL, NULL, x, dy, {BT, C, OC}, model.stream, fp8);
        linear_backward_input(x, dy, w, {BT, C, OC}, model.stream, fp8);
        print(x, BT * C * 2), print(dw, C * OC * 4), print(fp8->dy, BT * OC);
    }"""


def operands():
    """x, w, dy, bias in bf16, and a dw in fp32 to add to. Some x are too small for e4m3."""
    torch.manual_seed(3)
    x = torch.randn(BT, C) * 10 ** -torch.rand(BT, C).mul(5)
    w, dy, bias = torch.randn(C, OC) * 0.02, torch.randn(BT, OC) * 1e-6, torch.randn(OC)
    return [t.bfloat16() for t in (x, w, dy, bias)] + [torch.randn(C, OC) * 1e-5]


def printed_products(folder, source=SOURCE):
    """What PRODUCTS prints: y, x8, w8, dx, dw, dy8. An 8-bit tensor is (scale, x8, x8ᵀ)."""
    data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in operands())
    (folder / "numbers").write_bytes(data)
    printed = torch.frombuffer(bytearray(run_program(folder, PRODUCTS, folder / "numbers",
                                                     source=source)), dtype=torch.uint8)
    def take(dtype, *shape):
        nonlocal printed
        size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
        part, printed = printed[:size], printed[size:]
        return part.clone().view(dtype).view(shape)
    def take_8_bits(dtype, rows, columns):
        return take(torch.float32, 1), take(dtype, rows, columns), take(dtype, columns, rows)
    return (take(torch.bfloat16, BT, OC), take_8_bits(E4M3, BT, C), take_8_bits(E4M3, C, OC),
            take(torch.bfloat16, BT, C), take(torch.float32, C, OC), take_8_bits(E5M2, BT, OC))


def worst_product(printed):
    """The relative errors of y, dx and dw, where x8, w8 and dy8 are those of precision.py."""
    x, w, dy, bias, dw = operands()
    (x8, x_scale), (w8, w_scale) = to_fp8(x, E4M3), to_fp8(w, E4M3)
    dy8, dy_scale = to_fp8(dy, E5M2)
    y, _, _, dx, dw_found, _ = printed
    errors = [difference(y.float(), x8.float() @ w8.float() * x_scale * w_scale + bias.float()),
              difference(dx.float(), dy8.float() @ w8.float().T * dy_scale * w_scale),
              difference(dw_found - dw, x8.float().T @ dy8.float() * x_scale * dy_scale)]
    return np.max(errors)               # nan, if one is


@pytest.fixture(scope="session")
def printed(tmp_path_factory):
    return printed_products(tmp_path_factory.mktemp("products"))


def test_8_bit_tensors_and_their_transposes_are_precision_pys_to_the_bit(printed):
    x, w, dy, _, _ = operands()
    _, x8, w8, _, _, dy8 = printed
    for found, tensor, dtype in ((x8, x, E4M3), (w8, w, E4M3), (dy8, dy, E5M2)):
        expected, scale = to_fp8(tensor, dtype)
        assert found[0] == scale
        assert torch.equal(found[1].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(found[2].view(torch.uint8), expected.T.contiguous().view(torch.uint8))


def test_the_three_products_are_those_of_the_8_bit_tensors(printed):
    """y and dx are rounded to bf16, and dw is a difference of what it was added to."""
    assert worst_product(printed) < 0.004                                 # measured 0.0017


PRODUCT_MUTANTS = [
    ("bias, {f->w.scale, f->x.scale}", "bias, {f->w.scale, f->w.scale}"),
    ("NULL, NULL, {f->w.scale, f->dy.scale}", "NULL, NULL, {f->x.scale, f->dy.scale}"),
    ("NULL, NULL, {f->dy.scale, f->x.scale}", "NULL, NULL, {f->dy.scale, f->w.scale}"),
    ("set(operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scales.b);", ""),
    (".a_type = CUDA_R_8F_E4M3, .b_type = CUDA_R_8F_E5M2}",
     ".a_type = CUDA_R_8F_E4M3, .b_type = CUDA_R_8F_E4M3}"),
    ("fp8_quantise<__NV_E5M2>(f->dy, dy", "fp8_quantise<__NV_E4M3>(f->dy, dy"),
    ("fabsf(rounded<Function>(value[i]))", "rounded<Function>(value[i])")]


@slow
@emulated
@pytest.mark.parametrize("old, new", PRODUCT_MUTANTS)
def test_a_mutant_changes_a_product(old, new, tmp_path):
    assert SOURCE.count(old) == 1, old
    printed = printed_products(tmp_path, SOURCE.replace(old, new))
    assert not worst_product(printed) < 0.01                              # nan is not, either


@slow
@emulated
def test_gradients_in_e4m3_are_seen(tmp_path):
    """Both the numbers and the product's type: finer, but not what the recipe says."""
    source = SOURCE.replace("fp8_quantise<__NV_E5M2>", "fp8_quantise<__NV_E4M3>")
    source = source.replace("CUDA_R_8F_E5M2", "CUDA_R_8F_E4M3")
    assert worst_product(printed_products(tmp_path, source)) > 0.01


@emulated
@pytest.mark.parametrize("old, new", [
    (".k = n.C, .transpose = TRANSPOSE_A,", ".k = n.C, .transpose = NEITHER,"),
    (".n = n.rows, .k = n.C, .transpose = TRANSPOSE_A", ".n = n.rows - 8, .k = n.C, .transpose = "
     "TRANSPOSE_A")])
def test_the_emulators_cublaslt_refuses_what_a_gpus_does(old, new, tmp_path):
    """8-bit operands with another contiguous index, or with a size that is no multiple of 16."""
    source = SOURCE.replace("int main(", "int trainer_main(") + PRODUCTS
    assert old in source
    binary = build(tmp_path, "-O1", source=source.replace(old, new))
    (tmp_path / "numbers").write_bytes(bytes(4 * 10 ** 6))
    done = subprocess.run([binary, tmp_path / "numbers"], capture_output=True)
    assert done.returncode == 1 and b"matmul in 8 bits; leave --fp8 out" in done.stderr


# ---- the trainer

def fp8_matmul_in_fp32(a, b, fast_accum=False):
    """fp8_matmul from its formula; PyTorch's takes a second for each matmul on a CPU."""
    return (a[0].float() @ b[0].float().T * a[1] * b[1]).bfloat16()


@pytest.fixture(scope="session")
def inits(init, cuda_data, data, dn_init, dn_data):
    """Of each recipe: a model of 128 channels, and the shards for CUDA and for Python."""
    return {"gpt2": (init, cuda_data, data), "dn": (dn_init, dn_data, dn_data)}


STEPS = ["--total_batch_size", 160, "--batch_size", 2, "--seed", 5, "--eval_every", 99,
         "--max_steps", 10]


@pytest.mark.parametrize("recipe", ["gpt2", "dn"])
def test_ten_steps_are_those_of_train_gpt2_py(recipe, inits, bf16, tmp_path, monkeypatch):
    """Measured: loss 0.0005, norm 0.0017, val_loss 0.0005. The same steps with --fp8 0 differ by
    0.0004 in loss and, which tells more, by 0.004 (GPT-2) and 0.012 (dN) in norm."""
    init, cuda_data, data = inits[recipe]
    flags = ["--init_from", init, *STEPS, "--lr", 1e-3]
    rows, wide = (train(bf16, cuda_data, tmp_path / str(fp8), *flags, "--fp8", fp8)
                  for fp8 in (1, 0))
    monkeypatch.setattr(precision, "fp8_matmul", fp8_matmul_in_fp32)
    run_main(train_gpt2, "--data", data, "--out", tmp_path / "python", *flags, "--device", "cpu",
             "--bf16", 0, "--fp8", 1)
    python_rows = rows_of(tmp_path / "python")
    for key, bound in (("loss", 0.0015), ("norm", 0.0035), ("val_loss", 0.0015)):
        error = difference(column(rows, key), column(python_rows, key))
        assert error < bound, (key, error)
    assert difference(column(rows, "norm"), column(wide, "norm")) > 0.0035


@emulated
def test_where_cublaslt_adds_no_bias_in_8_bits_a_kernel_of_our_own_does(inits, bf16, tmp_path):
    """It rounds once more, before the bias is added."""
    init, data, _ = inits["gpt2"]
    flags = ["--init_from", init, *STEPS, "--max_steps", 1, "--fp8", 1]
    with_bias = train(bf16, data, tmp_path / "with", *flags)
    without = train(bf16, data, tmp_path / "without", *flags, CUEMU_LAST_EPILOGUE="1")
    for key in ("loss", "norm"):
        assert difference(column(without, key), column(with_bias, key)) < 0.002, key


# ---- measuring in the kernels that produce a tensor

MEASURED_ALONE = SOURCE.replace("    if (!to.measured) {\n", """
    if (to.measured) { CHECK_CUDA(cudaMemsetAsync(to.largest, 0, 4, stream)); }
    if (true) {
""")


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A trainer that measures every tensor by a kernel of its own, just before it is rounded."""
    assert MEASURED_ALONE != SOURCE
    return build(tmp_path_factory.mktemp("alone"), source=MEASURED_ALONE)


def has_bits_of_alone(binary, alone, inits, recipe, out, recompute=0):
    init, data, _ = inits[recipe]
    flags = ["--init_from", init, *STEPS, "--max_steps", 1, "--total_batch_size", 320, "--fp8", 1]
    train(alone, data, out / "alone", *flags)
    train(binary, data, out / "fused", *flags, "--recompute", recompute)
    return same_bits(out / "fused", out / "alone")


@pytest.mark.parametrize("recipe, recompute", [("gpt2", 1), ("gpt2", 2), ("dn", 0), ("dn", 2)])
def test_who_measures_and_what_is_recomputed_changes_no_bit(recipe, recompute, bf16, alone, inits,
                                                            tmp_path):
    assert has_bits_of_alone(bf16, alone, inits, recipe, tmp_path, recompute)


RAISE = "if (norm.largest != NULL) { raise_largest(norm.largest, magnitude); }"


@slow
@emulated
@pytest.mark.parametrize("recipe, piece, occurrence", [
    ("gpt2", RAISE, 0), ("gpt2", RAISE, 1), ("dn", RAISE, 2), ("dn", RAISE, 3),
    ("gpt2", "if (largest != NULL) { raise_largest(largest, magnitude); }", 0),
    ("dn", "&& !is_middle", 0), ("dn", "    if (train && model->fp8 != NULL) { forget", 0)])
def test_a_tensor_that_is_measured_wrongly_changes_bits(recipe, piece, occurrence, alone, inits,
                                                        tmp_path):
    """The last of them keeps the largest numbers of the micro-step before."""
    parts = SOURCE.split(piece)
    assert occurrence + 1 < len(parts)
    source = piece.join(parts[:occurrence + 1])
    source += "    if (false) { forget" if "forget" in piece else ""
    source += piece.join(parts[occurrence + 1:])
    binary = build(tmp_path, source=source)
    try:
        assert not has_bits_of_alone(binary, alone, inits, recipe, tmp_path)
    except AssertionError as error:
        assert "must be finite" in str(error)       # it did not even run


def test_a_profile_shows_what_is_measured_alone_and_what_is_rounded(bf16, cuda_data, tmp_path):
    """Of x: ln_1, y and ln_2 (C each), act (4C); of dy: dqkv (3C), dfc (4C), dx twice (C). Only y,
    act and dqkv are measured by a kernel of their own, and the weights are (12 C²)."""
    flags = map(str, [*TINY, "--max_steps", 12, "--profile", "--fp8", 1])
    flags = ["n_embd=128" if flag == "n_embd=64" else flag for flag in flags]
    done = subprocess.run([bf16, "--data", cuda_data, "--out", tmp_path, *flags],
                          capture_output=True, text=True, check=True)
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "%" in line}
    tokens, weights = 64 * 128, 12 * 128 ** 2
    for name, calls, bytes_moved in (("fp8_quantise", 12, 4 * (16 * tokens + weights)),
                                     ("fp8_measure", 7, 2 * (8 * tokens + weights))):
        assert int(table[name][1]) == calls
        assert float(table[name][4]) == pytest.approx(bytes_moved / 1e6, abs=6e-4)
    assert done.stdout.count(", 8 bits") == 12      # three products of each of four matrices


# ---- resuming, orders of threads, a user's mistakes

def test_a_resumed_run_ends_with_the_same_bits(inits, bf16, tmp_path):
    init, data, _ = inits["dn"]
    flags = ["--init_from", init, *STEPS, "--max_steps", 3, "--fp8", 1]
    train(bf16, data, tmp_path / "whole", *flags)
    train_on(1, bf16, data, tmp_path / "stopped", *flags, stop_after="step 1/3")
    error = train(bf16, data, tmp_path / "stopped", *flags, "--fp8", 0, "--resume", code=1)
    assert "fp8 1, not 0" in error and error.count("\n") == 1
    train(bf16, data, tmp_path / "stopped", *flags, "--resume")
    assert same_bits(tmp_path / "stopped", tmp_path / "whole")


@emulated
def test_orders_of_threads_give_the_same_bits(inits, bf16, tmp_path):
    init, data, _ = inits["gpt2"]
    for order in "012":
        train(bf16, data, tmp_path / order, "--init_from", init, *STEPS, "--max_steps", 1, "--fp8",
              1, CUEMU_ORDER=order)
        assert same_bits(tmp_path / order, tmp_path / "0")


@emulated
def test_a_gpu_without_8_bit_tensor_cores_and_a_build_in_fp32_end_in_one_line(inits, bf16, fp32,
                                                                             tmp_path):
    init, data, _ = inits["gpt2"]
    flags = ["--init_from", init, *STEPS, "--fp8", 1]
    for binary, capability, found in ((bf16, "86", "compute capability 8.9; leave --fp8 out"),
                                      (fp32, "90", "--fp8 1 takes a build in bf16; run make")):
        error = train(binary, data, tmp_path, *flags, code=1, CUEMU_CAPABILITY=capability)
        assert found in error and error.count("\n") == 1 and error.count(";") == 1
    train(bf16, data, tmp_path, *flags, "--max_steps", 1, CUEMU_CAPABILITY="89")


def test_matrices_below_128_channels_multiply_in_bf16(bf16, cuda_data, tmp_path):
    """As in train_gpt2.py, whose GPT.use leaves them out."""
    for fp8 in (0, 1):
        train(bf16, cuda_data, tmp_path / str(fp8), *TINY, "--max_steps", 1, "--fp8", fp8)
    assert same_bits(tmp_path / "0", tmp_path / "1")
