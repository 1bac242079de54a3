"""
How a layer multiplies while it is trained: in bf16 on a CPU that has a unit for it, or, with
train_gpt2.py --fp8 1, in 8 bits on a GPU that has them (H100 or later). GPT.use asks
find_product, which chooses. And how it multiplies while a batch of texts is written on a CPU, with
weights that were packed for it.

    >>> x = torch.tensor([[1.0, -448.0]])
    >>> x8, scale = to_fp8(x, torch.float8_e4m3fn)
    >>> x8.float() * scale
    tensor([[   1., -448.]])

A product is a function: x (M, K), weight (N, K) → x Wᵀ (M, N), in the dtype of x.

Papers: FP8 formats for deep learning (arXiv 2209.05433).
Differs from the paper: a tensor has one scale, which is taken from itself, not from earlier steps.
"""
import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# ---- bf16 ----------------------------------------------------------------------------------------

def bf16_product(x, weight):
    """Both factors are rounded to bf16, the sums are fp32's, and so it is with the gradients. A
    model in fp64 is there to check others with, so it is left as exact as it is."""
    if x.dtype == torch.float64:
        return F.linear(x, weight)
    return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)

@functools.cache
def find_bf16(device):
    """Whether training multiplies in bf16 on this device, and a line for the log that says why.

    AMX, the matrix unit of Intel's server CPUs since 2023, makes a layer's three products 1.5 to
    2.6 times as fast. AVX512-BF16 without AMX was measured to make them half as fast."""
    if "cuda" in device and torch.cuda.is_bf16_supported():
        return True, "everything in bf16; --bf16 0: in fp32"
    if "cuda" in device:
        return False, "everything in fp32: this GPU lacks bf16"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)     # not in older versions
    if has_amx():
        return True, "matmuls of training in bf16, because this CPU has AMX; --bf16 0: in fp32"
    return False, "matmuls in fp32: without AMX, bf16 is slower on a CPU"

@contextmanager
def matmul_precision(precision):
    """Within, an fp32 matmul of a CPU with AMX may round its inputs to bf16, if this is "medium";
    None changes nothing. Attention must stay outside: its small matmuls would become slower."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

# ---- 8 bits --------------------------------------------------------------------------------------

def to_fp8(x, dtype):
    """x / scale in 8 bits, and the scale: one number, with which the largest value just fits."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale

def fp8_matmul(a, b, fast_accum=False):
    """a (M, K) @ b (N, K)ᵀ → bf16 (M, N); a and b are pairs that to_fp8 returned."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=torch.bfloat16,
                            use_fast_accum=fast_accum)

class Fp8Matmul(torch.autograd.Function):
    """y = x Wᵀ    dx = dy W    dW = dyᵀ x, each with 8-bit operands and sums in fp32.

    x (M, K), W (N, K); M, K and N are multiples of 16. e4m3 has 3 bits of mantissa; gradients need
    the range of e5m2. Backward keeps the 8-bit x, which takes half of bf16's memory.
    """
    @staticmethod
    def forward(ctx, x, weight):
        x8 = to_fp8(x, torch.float8_e4m3fn)
        weight8 = to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        return fp8_matmul(x8, weight8, fast_accum=True).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        dy8, dy_scale = to_fp8(dy, torch.float8_e5m2)
        transposed = weight.t().contiguous(), weight_scale      # fp8_matmul wants rows along K
        dx = fp8_matmul((dy8, dy_scale), transposed)
        dW = fp8_matmul((dy8.t().contiguous(), dy_scale), (x.t().contiguous(), x_scale))
        return dx.to(dy.dtype), dW.to(dy.dtype)

def fp8_product(x, weight):
    return Fp8Matmul.apply(x, weight)

# ---- The choice ----------------------------------------------------------------------------------

def find_product(device, bf16, fp8):
    """The product of the large matrices while training; None: F.linear in the dtype of the input,
    which is bf16 on a GPU that has it."""
    if fp8:     # torch.compile must not look inside: the code it makes of these parts is slower
        torch._dynamo.allow_in_graph(Fp8Matmul)
        return fp8_product
    if bf16 and "cuda" not in device:
        return bf16_product
    return None

# ---- Packed weights ------------------------------------------------------------------------------

PACKED_ROWS = 8             # a product of fewer rows is faster with the weights as they are, and
PACKED_WEIGHTS = 2 ** 17    # so is that of a smaller matrix: a call of oneDNN's takes 10 µs more

def pack(weight, bias, rows):
    """weight (N, K), bias (N,) or None → a function x (…, K) → x Wᵀ + b, which oneDNN computes. It
    orders the weights as its kernel for `rows` rows reads them, once, where F.linear does so at
    each call."""
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def product(x):
        if x.shape[:-1].numel() < PACKED_ROWS:
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")

    return product

@functools.cache
def can_pack():
    """Whether this PyTorch has oneDNN's product, and it agrees with F.linear."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PACKED_ROWS, 64, generator=generator, dtype=torch.float32)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float32)
    bias = torch.randn(32, generator=generator, dtype=torch.float32)
    try:
        found = pack(weight, bias, len(x))(x)
    except (AttributeError, RuntimeError, NotImplementedError):     # a build without oneDNN
        return False
    return torch.allclose(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)

@contextmanager
def packed(model, rows):
    """Within, the weights of the model must not change, and its large matrices are packed where
    that is faster: on a CPU in fp32, if `rows` rows are written at a time, or more."""
    chosen = []
    if rows >= PACKED_ROWS and can_pack():
        chosen = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)
                  and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
                  and layer.weight.numel() >= PACKED_WEIGHTS]
    try:
        for layer in chosen:
            layer.forward = pack(layer.weight, layer.bias, rows)        # instead of its class's
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)
