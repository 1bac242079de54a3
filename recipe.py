r"""
The recipe of a pretraining run: its learning rates over the steps, how many tokens it reads and how
many of them at a time, what fits in the memory, and which steps are left out.

    >>> schedule(0, 1000, modern=True)[0]               # the share of the peak lr in the first step
    0.025

`--recipe speedrun` is the cheapest way that is known to a CORE of 0.2565, which is GPT-2 1558M's.
It follows nanochat's pull request 830, which was closed unmerged: d22, 9.4 tokens a parameter, a
vocabulary of 49,152, multiplied in 8 bits. From pull request 733 comes a learning rate that falls
to 0 in the last 85 % of the steps. By their author's measurements six runs of 830 reached 0.2618 ±
0.0023, in 82 minutes on 8×H100. Ours is not measured. It lacks that model's smear, which mixes
neighbouring tokens across the border of documents, and its scales of some norms: which norms they
are is not known here, and on a d4 scales gained nothing (bench/RESULTS.md, norm_scales).

    parameters in matmuls   22 · 12 · 1408² in the blocks + 49,152 · 1408 in the head = 593 million
    tokens                  9.4 · 593 million = 5.57 billion, 5,312 steps of 2²⁰
    FLOP                    6 · 593 million + 12 · 1408 · 20,480 keys = 3.90 billion a token,
                            2.17e19 in all, which 8×H100 at their bf16 peak do in 46 minutes

python bench/project.py --models speedrun divides that by the rates of kernels. With the network
hidden it predicts 1.75 hours, $42.0 at $3 for a GPU hour, by train_gpt2.cu's kernels in bf16, and
1.18 hours, $28.2, with wgmma and fp8. The shards must be of that vocabulary:

    python bpe.py train --input data/fineweb/documents --vocab_size 49152 \
        --out data/fineweb/tokenizer
    python shards.py --data data/fineweb --tokenizer data/fineweb/tokenizer
    torchrun --standalone --nproc_per_node=8 train_gpt2.py \
        --recipe speedrun --data data/fineweb --out runs/speedrun

Papers: MiniCPM (2404.06395) for the trapezoidal schedule, Chinchilla (2203.15556) for tokens per
parameter, Power Lines (2505.13738) for batch size against tokens.
Differs from the papers: the constants are nanochat's for dN and llm.c's for gpt2 … gpt2-xl.
"""
import math

import torch

from training import D12_MATMUL_PARAMS

# ---- Known runs ----------------------------------------------------------------------------------

# flags of train_gpt2.py, and warmdown, the share of the steps in which the learning rate falls
RECIPES = {"speedrun": dict(model="d22", ratio=9.4, final_lr=0.0, fp8=1, warmdown=0.85)}
SPEEDRUN_VOCAB = 49152      # tokens; the shards bring it

# ---- Learning rates, their schedule, the batch size ----------------------------------------------

def schedule(step, max_steps, modern, final_lr=None, warmdown=None):
    """The shape of a run, for step 0 … max_steps - 1 → (lr_scale, momentum, decay_scale).

    The two scales multiply each parameter group's own lr and weight decay; momentum is Muon's.
    final_lr: the share of the peak to which the lr falls; default: 0.05 for dN, 0 for GPT-2.
    warmdown: the share of the steps in which it falls, linearly; default: 0.65. For dN alone.
    """
    if final_lr is None:
        final_lr = 0.05 if modern else 0.0
    if not modern:      # llm.c's GPT-2: linear warm-up, then a cosine down
        warmup = min(700, max_steps // 10)
        if step < warmup:
            return (step + 1) / warmup, 0.95, 1.0
        angle = math.pi * (step - warmup) / max(1, max_steps - warmup)
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(angle)), 0.95, 1.0
    warmup = min(40, max_steps // 10)
    left = min(1.0, (max_steps - step) / ((warmdown or 0.65) * max_steps))
    lr_scale = min(1.0, (step + 1) / max(1, warmup)) * (final_lr + (1 - final_lr) * left)
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    if left < 1:
        momentum = 0.90 + (momentum - 0.90) * left
    decay_scale = 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return lr_scale, momentum, decay_scale

GPT2_MATMUL_PARAMS = 12 * 12 * 768 ** 2 + 50257 * 768     # of the 124M model

def plan_batch(model, args, world_size, most_rows):
    """Decides how many steps a run takes and how a step is split → grad_accum_steps.

    Sets args.total_batch_size (tokens), args.batch_size (rows) and args.max_steps where the user
    left them out, in place. args.ratio: tokens for each weight that multiplies a token, or None.
    most_rows: how many rows of a rank fit in its memory.
    Raises SystemExit if total_batch_size cannot be split evenly.
    """
    config = model.config
    size = model.matmul_params()
    T = args.seq_len or config.block_size
    if config.rms_norm:     # 8 tokens a parameter reach GPT-2 at d24; batch ∝ tokens^0.383
        tokens = (args.ratio or 8) * size
        batch_scale = (size / D12_MATMUL_PARAMS) ** 0.383
    else:   # powers through llm.c's runs: 10B tokens for 124M, 33.6B by twice the batch for 1558M
        tokens = 1e10 * (size / GPT2_MATMUL_PARAMS) ** 0.48
        if args.ratio:
            tokens = args.ratio * size
        batch_scale = (size / GPT2_MATMUL_PARAMS) ** 0.27
    if not args.total_batch_size:
        args.total_batch_size = 2 ** round(math.log2(2 ** 19 * batch_scale))
    if not args.batch_size:     # the most rows that fit and that divide the batch
        rows = args.total_batch_size // (T * world_size)
        args.batch_size = max(n for n in range(1, most_rows + 1) if rows % n == 0)
    micro_tokens = args.batch_size * T * world_size
    if args.total_batch_size % micro_tokens:
        nearest = max(1, round(args.total_batch_size / micro_tokens)) * micro_tokens
        raise SystemExit(f"--total_batch_size {args.total_batch_size} must be a multiple of "
                         f"batch_size*seq_len*world_size = {micro_tokens}; try "
                         f"--total_batch_size {nearest}")
    if args.max_steps is None:
        args.max_steps = max(1, round(tokens / args.total_batch_size))
    return args.total_batch_size // micro_tokens

# ---- What fits in the memory, and how fast a GPU is at most --------------------------------------

def memory_bytes(model, T, world_size):
    """An estimate of the memory that training takes on a rank → (fixed bytes, bytes per row).

    Fixed: weights, gradients and this rank's share of the optimizer's moments in fp32, and the
    weights once more in the dtype of the matmuls. Per row: activations, 34 C bytes per token and
    layer in 16 bits (arXiv 2205.05198, equation 2, without its T x T term).
    """
    config = model.config
    width = model.compute_dtype.itemsize
    params = sum(p.numel() for p in model.parameters())
    moments = 2 * params
    if config.rms_norm:     # Muon keeps one moment for the weights of the blocks, Adam two
        moments -= sum(p.numel() for p in model.h.parameters())
    fixed = 4 * (2 * params + moments // world_size) + params * width
    row = 34 * config.n_embd * T * config.n_layer * width // 2
    return fixed, row

def most_rows(model, T, world_size, device):
    """The rows that a rank should take at a time, at most. On a GPU: what fits in its memory, up to
    32. On a CPU: 2048 tokens, whose activations stay in the cache."""
    if "cuda" not in device:
        return max(1, 2048 // T)
    fixed, row = memory_bytes(model, T, world_size)
    free = 0.85 * torch.cuda.mem_get_info()[0] - 2 ** 30        # for the loss's chunk and cuBLAS
    return max(1, min(32, int((free - fixed) // row)))

PEAK_FLOPS = {      # dense bf16 FLOP/s, from the data sheets; the first name that fits counts
    "H100 PCIE": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "4090": 165e12, "3090": 71e12}

def peak_flops(device):
    """The GPU's peak in FLOP/s, or None on a CPU or a GPU that is not in PEAK_FLOPS."""
    if "cuda" not in device:
        return None
    name = torch.cuda.get_device_name().upper()
    for known, flops in PEAK_FLOPS.items():
        if known in name:
            return flops
    return None

# ---- Which steps are left out --------------------------------------------------------------------

SPIKE_WINDOW = 128      # steps; llm.c's window
SPIKE_Z = 7.0           # standard deviations; what llm.c's run of GPT-2 1558M was given

def is_spike(window, values):
    """Whether a step must leave the weights alone → a tensor, so that the device decides while
    nobody waits for it. It must if its loss or its norm is not finite, or stands out of those of
    the last SPIKE_WINDOW steps: above their mean by SPIKE_Z standard deviations.

    window (2, n): losses and norms of the last steps; values (2,): this step's.
    """
    is_bad = ~values.isfinite().all()
    if window.shape[1] == SPIKE_WINDOW:
        mean = window.mean(1)
        deviation = window.std(1, correction=0)
        is_bad |= (values - mean > SPIKE_Z * deviation).any()
    return is_bad
