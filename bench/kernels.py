"""
What a GPU can do at most, and where the time of a training step goes.

    python bench/kernels.py ceilings --device cuda      # matmuls, copies
    python bench/kernels.py attention --device cuda     # each kernel this torch has
    python bench/kernels.py profile --device cuda       # the 15 longest kernels of a step, and gaps

out: tables, and the same as one line of JSON

FLOP of attention are counted as in FlashAttention's papers: 4 T² HS per head forward, half of that
under a causal mask, and 2.5 times as many backward. A window counts only the keys in reach.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from contenders import Ours, best_windows
from measure import chosen_shapes, finish, in_turns, shape_flags, table
from model import find_kernel, flash_attention_3, sdpa, varlen_attention
from precision import fp8_matmul, to_fp8
from train import SHAPES, micro_batch, train_step

def median_ms(function, device, repeats):
    return statistics.median(in_turns({"": function}, repeats, warmup=3, device=device)[""])

# ---- Ceilings ------------------------------------------------------------------------------------

def ceilings(args):
    """{name: rate}: TFLOP/s of large matmuls of random numbers, TB/s read and written by a copy."""
    device = args.device
    sizes = (2048, 4096, 8192)
    copied_bytes = 2 ** 31
    if args.quick:
        sizes = (64, 128)
        copied_bytes = 2 ** 20
    found = {}

    def rates():
        for N in sizes:
            a, b = torch.randn(2, N, N, device=device, dtype=torch.bfloat16)
            ms = median_ms(lambda: a @ b, device, args.repeats)
            yield f"bf16 matmul {N}³, TFLOP/s", 2 * N ** 3 / 1e9 / ms
        try:
            a8 = to_fp8(a, torch.float8_e4m3fn)
            b8 = to_fp8(b, torch.float8_e4m3fn)
            ms = median_ms(lambda: fp8_matmul(a8, b8, fast_accum=device != "cpu"), device,
                           args.repeats)
            yield f"fp8 matmul {N}³, TFLOP/s", 2 * N ** 3 / 1e9 / ms
        except RuntimeError as error:
            yield "fp8 matmul", f"failed: {str(error).splitlines()[0][:90]}"
        source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
        copy = torch.empty_like(source)
        ms = median_ms(lambda: copy.copy_(source), device, args.repeats)
        yield "copy, TB/s", 2 * source.numel() / 1e9 / ms
        yield "attention of train_gpt2.py", find_kernel(device)[1]

    def rows():
        for name, rate in rates():
            found[name] = rate
            yield name, rate

    table(["ceiling", "rate"], rows())      # each row when it is there
    return found

# ---- Attention -----------------------------------------------------------------------------------

def time_kernel(kernel, inputs, window, args):
    """{column: value} of one kernel: ms and TFLOP/s forward, and of forward and backward.
    One that fails or differs from sdpa gets the reason under "missing"."""
    q = inputs[0]
    B, T, NH, HS = q.shape
    scale = HS ** -0.5
    gradient = torch.randn_like(q)
    keys = sum(min(t + 1, window + 1) for t in range(T))
    gflop = 4 * B * NH * HS * keys / 1e9

    def forward():
        with torch.no_grad():
            return kernel(*inputs, window, scale)

    def both():
        torch.autograd.grad(kernel(*inputs, window, scale), inputs, gradient)

    try:
        wanted = sdpa(*inputs, window, scale).detach().float()
        error = ((forward().float() - wanted).norm() / wanted.norm()).item()
        assert error < 0.02, f"differs from sdpa by {error:.1%}"
        ms = median_ms(forward, args.device, args.repeats)
        both_ms = median_ms(both, args.device, args.repeats)
    except Exception as error:      # a kernel that is not installed must not end the bench
        return dict(missing=str(error).strip().splitlines()[0][:60])
    return dict(forward_ms=ms, forward_tflops=gflop / ms, both_ms=both_ms,
                both_tflops=3.5 * gflop / both_ms)

def attention(args):
    """A row for each kernel at each shape."""
    shapes = [(16, 12, 64, 1024, 1024), (16, 12, 128, 2048, 2048), (16, 12, 128, 2048, 512)]
    if args.quick:
        shapes = [(1, 2, 16, 64, 64), (1, 2, 16, 64, 16)]
    keys = ("kernel", "B", "NH", "HS", "T", "window", "forward_ms", "forward_tflops", "both_ms",
            "both_tflops", "missing")
    found = []

    def rows():
        for B, NH, HS, T, window in shapes:
            inputs = torch.randn(3, B, T, NH, HS, device=args.device, dtype=torch.bfloat16)
            inputs = [t.requires_grad_() for t in inputs.unbind()]
            for kernel in (sdpa, varlen_attention, flash_attention_3):
                row = dict(kernel=kernel.__name__, B=B, NH=NH, HS=HS, T=T, window=window)
                found.append(row | time_kernel(kernel, inputs, window, args))
                yield [found[-1].get(key, "") for key in keys]

    table(["kernel", "B", "NH", "HS", "T", "window", "forward ms", "TFLOP/s", "and backward ms",
           "TFLOP/s", ""], rows())          # each row when it is there
    return found

# ---- Profile -------------------------------------------------------------------------------------

def profile_step(shape, args, steps=3):
    """→ {"ms", "busy_ms", "kernels": [(name, calls, ms)]} of one step of train_gpt2.py, the longest
    kernels first."""
    cuda = "cuda" in args.device
    arm = Ours(shape, max_steps=100, device=args.device, fp8=args.fp8,
               windows=best_windows(shape, args.device))
    batch = torch.randint(0, shape.V, (2, shape.step_tokens // shape.T, shape.T),
                          device=args.device)
    rows = micro_batch(arm, shape, args.device)

    def step():
        train_step(arm, 0, *batch, rows)

    ms = median_ms(step, args.device, steps)
    activity = torch.profiler.ProfilerActivity.CPU
    if cuda:
        activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as trace:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in trace.key_averages():
        total_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        kernels.append((event.key, event.count / steps, total_us / 1000 / steps))
    kernels.sort(key=lambda kernel: -kernel[2])
    return dict(ms=ms, busy_ms=sum(ms for _, _, ms in kernels), kernels=kernels[:15])

def profile(args):
    """{shape: what profile_step returns}."""
    found = {}
    for name, shape in chosen_shapes(args, SHAPES)[1].items():
        row = found[name] = profile_step(shape, args)
        gaps = max(0, 1 - row["busy_ms"] / row["ms"])
        table([f"{name}: {row['ms']:.1f} ms a step, {gaps:.0%} gaps", "calls a step", "ms a step",
               "share"],
              [[kernel[:80].replace("|", "/"), calls, ms, f"{ms / row['busy_ms']:.1%}"]
               for kernel, calls, ms in row["kernels"]])
        torch._dynamo.reset()
    return found

PARTS = {"ceilings": ceilings, "attention": attention, "profile": profile}

def main():
    parser = argparse.ArgumentParser(description="ceilings, attention kernels, a step's profile")
    parser.add_argument("part", choices=list(PARTS))
    shape_flags(parser, repeats=20, timed="calls")
    parser.add_argument("--fp8", type=int, default=0, help="profile: 1 multiplies in 8 bits")
    args = parser.parse_args()
    found = PARTS[args.part](args)
    finish(args.part, device=args.device, **{args.part: found})

if __name__ == "__main__":
    main()
