"""
What a GPU can do at most, and where the time of a training step goes.

    python bench/kernels.py ceilings --device cuda      # matmuls, copies
    python bench/kernels.py attention --device cuda     # each kernel this torch has
    python bench/kernels.py profile --device cuda       # the 15 longest kernels of a step, and gaps

out: tables, and the same as one line of JSON

FLOP of attention are counted as FlashAttention's papers count them: 4 T² HS a head forward, half of
it under a causal mask, and 2.5 times that backward; a window's are those of the keys in reach.
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
from model import flash_attention_3, fp8_matmul, sdpa, to_fp8, varlen_attention
from train import SHAPES, micro_batch, train_step

def median_ms(function, device, repeats):
    return statistics.median(in_turns({"": function}, repeats, warmup=3, device=device)[""])

# ---- Ceilings ------------------------------------------------------------------------------------

def ceilings(args):
    """{name: rate}: TFLOP/s of large matmuls of random numbers, TB/s of a copy, read and write."""
    device, found = args.device, {}
    for N in (64, 128) if args.quick else (2048, 4096, 8192):
        a, b = torch.randn(2, N, N, device=device, dtype=torch.bfloat16)
        found[f"bf16 matmul {N}³, TFLOP/s"] = (2 * N ** 3 / 1e9
                                              / median_ms(lambda: a @ b, device, args.repeats))
    try:
        a8, b8 = to_fp8(a, torch.float8_e4m3fn), to_fp8(b, torch.float8_e4m3fn)
        ms = median_ms(lambda: fp8_matmul(a8, b8, fast_accum=device != "cpu"), device, args.repeats)
        found[f"fp8 matmul {N}³, TFLOP/s"] = 2 * N ** 3 / 1e9 / ms
    except RuntimeError as error:
        found["fp8 matmul"] = f"failed: {str(error).splitlines()[0][:90]}"
    source = torch.ones(2 ** 20 if args.quick else 2 ** 31, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    ms = median_ms(lambda: copy.copy_(source), device, args.repeats)
    found["copy, TB/s"] = 2 * source.numel() / 1e9 / ms
    table(["ceiling", "rate"], found.items())
    return found

# ---- Attention -----------------------------------------------------------------------------------

def attention(args):
    """Forward, and forward and backward, of each kernel that runs and agrees with sdpa."""
    B, NH, shapes = (1, 2, [(16, 64, 64), (16, 64, 16)]) if args.quick else (
        16, 12, [(64, 1024, 1024), (128, 2048, 2048), (128, 2048, 512)])
    dtype, rows = torch.bfloat16, []
    for HS, T, window in shapes:
        q, k, v = torch.randn(3, B, T, NH, HS, device=args.device, dtype=dtype).unbind()
        inputs = [t.requires_grad_() for t in (q, k, v)]
        gradient, scale = torch.randn_like(q), HS ** -0.5
        keys = sum(min(t + 1, window + 1) for t in range(T))
        gflop = 4 * B * NH * HS * keys / 1e9
        wanted = sdpa(*inputs, window, scale).detach()
        for kernel in (sdpa, varlen_attention, flash_attention_3):
            def forward():
                with torch.no_grad():
                    return kernel(*inputs, window, scale)
            def both():
                torch.autograd.grad(kernel(*inputs, window, scale), inputs, gradient)
            row = dict(kernel=kernel.__name__, HS=HS, T=T, window=window if window < T else "all")
            rows.append(row)
            try:
                error = ((forward() - wanted).float().norm() / wanted.float().norm()).item()
                assert error < 0.02, f"differs from sdpa by {error:.1%}"
                ms, both_ms = (median_ms(f, args.device, args.repeats) for f in (forward, both))
                row |= dict(forward_ms=ms, forward_tflops=gflop / ms, both_ms=both_ms,
                            both_tflops=3.5 * gflop / both_ms)
            except Exception as error:      # a kernel that is not there must not end the bench
                row["missing"] = str(error).strip().splitlines()[0][:60]
    keys = ("kernel", "HS", "T", "window", "forward_ms", "forward_tflops", "both_ms", "both_tflops",
            "missing")
    table([f"{B} rows, {NH} heads", "HS", "T", "window", "forward ms", "TFLOP/s",
           "and backward ms", "TFLOP/s", ""], [[row.get(key, "") for key in keys] for row in rows])
    return rows

# ---- Profile -------------------------------------------------------------------------------------

def profile(args):
    """{shape: {"ms", "busy_ms", "kernels": [(name, calls, ms)]}} of a step of train_gpt2.py."""
    cuda, found = "cuda" in args.device, {}
    activity = torch.profiler.ProfilerActivity
    for name, shape in chosen_shapes(args, SHAPES)[1].items():
        arm = Ours(shape, max_steps=100, device=args.device, fp8=args.fp8,
                   windows=best_windows(shape, args.device) if cuda else "L")
        batch = torch.randint(0, shape.V, (2, shape.step_tokens // shape.T, shape.T),
                              device=args.device)
        rows, steps = micro_batch(arm, shape, args.device), 3
        step = lambda: train_step(arm, 0, *batch, rows)
        ms = median_ms(step, args.device, steps)
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as trace:
            for _ in range(steps):
                step()
            if cuda:
                torch.cuda.synchronize()
        of = (lambda event: event.self_device_time_total) if cuda else (
            lambda event: event.self_cpu_time_total)
        events = sorted(trace.key_averages(), key=of, reverse=True)
        kernels = [(event.key, event.count / steps, of(event) / 1000 / steps) for event in events]
        busy = sum(kernel[2] for kernel in kernels)
        found[name] = dict(ms=ms, busy_ms=busy, kernels=kernels[:15])
        table([f"{name}: {ms:.1f} ms a step, {max(0, 1 - busy / ms):.0%} gaps", "calls a step",
               "ms a step", "share"], [[kernel[:80].replace("|", "/"), calls, ms_, f"{ms_ / busy:.1%}"]
                                       for kernel, calls, ms_ in kernels[:15]])
        del arm
        torch._dynamo.reset()
    return found

def main():
    parser = argparse.ArgumentParser(description="ceilings, attention kernels, a step's profile")
    parser.add_argument("part", choices=("ceilings", "attention", "profile"))
    shape_flags(parser, repeats=20, timed="calls")
    parser.add_argument("--fp8", type=int, default=0, help="of profile: 1: multiply in 8 bits")
    args = parser.parse_args()
    found = {"ceilings": ceilings, "attention": attention, "profile": profile}[args.part](args)
    finish(args.part, device=args.device, **{args.part: found})

if __name__ == "__main__":
    main()
