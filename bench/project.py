"""
From the speed of kernels, or of one GPU, to hours and dollars on 8×H100. Predicted, not measured.

    python bench/project.py                                 # published runs, then bench/rates.csv
    python bench/project.py --models d24 --rates mine.csv   # rates of your own
    python bench/project.py --measured data/bench/gpu       # and what bench/gpu.sh measured

in:  bench/rates.csv, rows (set, rate, value, from): sets of rates of kernels, each rate with where
     it comes from; the reports of bench/gpu.sh, of which a profile of train_gpt2cu is one more set
out: tables, and the same as one line of JSON

A step of a run on 8 GPUs is the sum of these parts. FLOP and bytes are counted from the model's
shape, and each is divided by a rate of the set:
    matmuls      6 FLOP for each weight and token, the blocks' and the head's
    attention    4 FLOP for each channel and pair of a token and a key that it sees; backward 2.5
                 times as many
    memory       what norms, activations, rotary positions, embeddings and the classifier read and
                 write, for each token
    launches     the gaps between kernels
    optimizer    an eighth of the states, and Muon's matmuls, because states are sharded
    network      gradients in fp32 to their owner and parameters in bf16 back, each byte at the
                 network's rate. It is either added or hidden behind the passes
From a measured row of one GPU instead, `passes` are its ms per token without the optimizer, and on
an H100 the share of them that waits for memory takes 4.8/3.35 times as long as on an H200.

For published runs the speed on 8×H100 is known. The hours computed from it, for the tokens that
train_gpt2.py would take, must be within 5 % of the published hours. Hours are of training alone, as
theirs are: without evaluation and compiling.
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from measure import finish, table
from model import GPT, GPTConfig
from recipe import RECIPES, SPEEDRUN_VOCAB, plan_batch

H100_FLOPS = 989e12             # dense bf16, from the data sheets, as are the memories' speeds
H200_TB_S = 4.8
H100_TB_S = 3.35
DENSE_KERNELS = ("gemm", "nvjet", "cutlass", "flash", "fmha", "attention", "xmma", "matmul")
GPUS = 8

def plan(name, ratio=None, **overrides):
    """What train_gpt2.py would do with --model NAME, or with --recipe NAME: steps, tokens a step,
    and the model's size. With a ratio: so many tokens for each weight that multiplies a token."""
    if name in RECIPES:
        ratio = ratio or RECIPES[name]["ratio"]
        overrides = dict(overrides, vocab_size=SPEEDRUN_VOCAB)
        name = RECIPES[name]["model"]
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name, **overrides))
    args = SimpleNamespace(max_steps=None, total_batch_size=None, batch_size=1, seq_len=None,
                           ratio=ratio)
    plan_batch(model, args, world_size=GPUS, most_rows=1)
    return SimpleNamespace(steps=args.max_steps, batch=args.total_batch_size, config=model.config,
                           params=model.num_params(), flops=model.flops_per_token(),
                           matmul_params=model.matmul_params(),
                           tokens=args.max_steps * args.total_batch_size)

def published_run(run, preset, tok_s, hours, source):
    return SimpleNamespace(run=run, preset=preset, tok_s=tok_s, hours=hours, source=source)

PUBLISHED = (       # on 8×H100; tok_s is of one GPU
    published_run("llm.c 124M", "gpt2", 2 ** 19 / 8 / 0.140, 45 / 60,
                  "140 ms a step: modded-nanogpt, records/track_1_short/2024-10-13_llmc"),
    published_run("llm.c 1558M", "gpt2-xl", 2 ** 20 / 8 / 2.80, 24.0,
                  "2.80 s a step: llm.c, scripts/run_gpt2_1558M.sh and discussion 677"),
    published_run("nanochat d24, run 6, fp8", "d24", 122_900, 1.65,
                  "nanochat, dev/LEADERBOARD.md and its log"))

# ---- From the rates of kernels to a step ---------------------------------------------------------

RATES = ("block_matmuls_tflops", "head_matmuls_tflops", "attention_forward_tflops",
         "attention_backward_tflops", "memory_tb_s", "launch_us", "network_gb_s")

def read_rates(path):
    """{set: {rate: value}} of a file with rows (set, rate, value, from)."""
    sets = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            value = float(row["value"])
            if row["rate"] not in RATES or value <= 0 or not row["from"]:
                raise SystemExit(f"{path}: {row} is not a positive rate with its origin; the rates "
                                 f"are {', '.join(RATES)}")
            sets.setdefault(row["set"], {})[row["rate"]] = value
    for name, rates in sets.items():
        lacking = [rate for rate in RATES if rate not in rates]
        if lacking:
            raise SystemExit(f"{path}: the set {name} lacks {', '.join(lacking)}; add a row for "
                             "each")
    return sets

def seen_keys(config, layer):
    """Keys that a token sees in a layer, on average over the tokens of a row: the first tokens of
    a row have fewer before them than the window holds."""
    T = config.block_size
    window = min(config.window(layer), T)
    return window - window * (window - 1) / (2 * T)

def memory_bytes_per_token(config):
    """Bytes that kernels other than matmuls and attention read and write for a token, forward and
    backward, in bf16. Counted in passes over C channels, from the kernels of train_gpt2.cu."""
    C = config.n_embd
    L = config.n_layer
    if config.rms_norm:
        # a layer: norms 6 + 4 forward, 7 + 4 backward; ReLU² 8 and 12; rotary 4 and 6; delta 2
        passes = L * (6 + 4 + 7 + 4 + 8 + 12 + 4 + 6 + 2)
        n_embeds = sum(config.has_value_embed(layer) for layer in range(L))
        passes += n_embeds * (3 + 3 + 2) + 20       # value embeddings; the stream's ends
    else:
        # a layer: two norms of 4 forward and 4 backward, sums of biases' gradients 9, delta 2
        passes = L * (2 * 8 + 9 + 2) + 15
    classifier = 2.8 * config.padded_vocab      # the second read of a row partly hits the L2 cache
    return 2 * (passes * C + classifier)

def passes_seconds_per_token(config, rates, block_params):
    """Seconds of forward and backward for a token on one GPU, without launches."""
    C = config.n_embd
    head_params = config.vocab_size * C
    attention_flop = 4 * C * sum(seen_keys(config, layer) for layer in range(config.n_layer))
    return (6 * block_params / rates["block_matmuls_tflops"] / 1e12
            + 6 * head_params / rates["head_matmuls_tflops"] / 1e12
            + attention_flop / rates["attention_forward_tflops"] / 1e12
            + 2.5 * attention_flop / rates["attention_backward_tflops"] / 1e12
            + memory_bytes_per_token(config) / rates["memory_tb_s"] / 1e12)

def optimizer_seconds(run, rates, gpus):
    """A step's update when states are sharded: 30 bytes for each parameter of AdamW, 60 for each of
    Muon, whose orthogonal factors take 300 C³ FLOP a layer; each GPU zeroes all gradients."""
    config = run.config
    block_params = 12 * config.n_layer * config.n_embd ** 2
    state_bytes = 30 * run.params
    polar_flop = 0
    if config.rms_norm:
        state_bytes += 30 * block_params
        polar_flop = 300 * config.n_embd ** 3 * config.n_layer
    own = state_bytes / rates["memory_tb_s"] / 1e12
    own += polar_flop / (0.6 * rates["head_matmuls_tflops"]) / 1e12     # small, in bf16
    return own / gpus + 4 * run.params / rates["memory_tb_s"] / 1e12

def network_seconds(run, rates, gpus):
    """Gradients (4 bytes) to their owners and parameters (2 bytes) back, around a ring."""
    return (4 + 2) * run.params * (gpus - 1) / gpus / rates["network_gb_s"] / 1e9

MICRO_TOKENS = 2 ** 15          # that one GPU computes at a time

def step_from_rates(run, rates, gpus=GPUS):
    """→ (ms of a step without the network, ms of the network)"""
    config = run.config
    block_params = run.matmul_params - config.vocab_size * config.n_embd
    tokens = run.batch / gpus
    launches = 32 * config.n_layer * max(1, tokens / MICRO_TOKENS)
    seconds = tokens * passes_seconds_per_token(config, rates, block_params)
    seconds += launches * rates["launch_us"] / 1e6 + optimizer_seconds(run, rates, gpus)
    return 1000 * seconds, 1000 * network_seconds(run, rates, gpus)

def rates_of_profile(kernels, V):
    """The rates in a profile of train_gpt2cu: rows (kernel, calls, ms, share, GB/s, TFLOP/s, …). A
    matmul with V as a side is the head's. What the profile does not show is as in bench/rates.csv.
    """
    flop = dict.fromkeys(RATES, 0.0)        # in TFLOP/s times ms; for memory, TB/s times ms
    ms = dict.fromkeys(RATES, 0.0)
    head_side = -(-V // 64) * 64
    for kernel, _, kernel_ms, _, gb_s, tflops, _ in kernels:
        words = kernel.split()
        rate = "memory_tb_s"
        done = gb_s / 1000 * kernel_ms
        if words[0] == "matmul":
            rate = "block_matmuls_tflops"
            if str(head_side) in words:
                rate = "head_matmuls_tflops"
        elif words[0].startswith("attention_backward"):
            rate = "attention_backward_tflops"
        elif words[0] == "attention_forward":
            rate = "attention_forward_tflops"
        if rate != "memory_tb_s":
            done = tflops * kernel_ms
        flop[rate] += done
        ms[rate] += kernel_ms
    flop["attention_backward_tflops"] *= 5 / 7      # of its 7 matmuls 5 are counted
    measured = {rate: flop[rate] / ms[rate] for rate in RATES if flop[rate] > 0}
    return read_rates(ROOT / "bench" / "rates.csv")["train_gpt2.cu"] | measured

# ---- From one GPU to a step ----------------------------------------------------------------------

def node_step_ms(row, run, args):
    """ms of a step of `run` on 8×H100, from a row of bench/train.py or bench/trainers.py."""
    share = row.get("optimizer_share") or 0.0
    per_token = row["ms"] * (1 - share) / row["step_tokens"]
    slower = 1.0
    if args.on == "H200":
        slower = H200_TB_S / H100_TB_S
    passes = per_token * run.batch / 8 * (1 + args.memory_bound * (slower - 1))
    optimizer = row["ms"] * share / 8 * slower
    network = 2 * 4 * run.params * 7 / 8 / args.network / 1e9 * 1000
    return passes + optimizer + network

def read_reports(folder):
    """The reports of bench/gpu.sh in a folder; each says on which machine it was measured."""
    paths = sorted(Path(folder).glob("*.json"))
    return [json.loads(path.read_text()) for path in paths if path.name != "gpu.json"]

def gpu_of(reports):
    """The GPU of the reports' machine: an H100 if it says so, else an H200."""
    if any("H100" in report.get("machine", "") for report in reports):
        return "H100"
    return "H200"

def measured_rows(reports):
    """(run, row) of each contender that bench/gpu.sh measured on one GPU at a run's shape."""
    for report in reports:
        for name, rows in report.get("speed", {}).items():
            for row in rows:
                if "ms" in row and row.get("ranks", 1) == 1:
                    yield name, row

def memory_bound_share(reports):
    """The share of a step's busy time in kernels that are neither matmul nor attention, or None."""
    shapes = {}
    for report in reports:
        shapes |= report.get("profile", {})
    if not shapes:
        return None
    shape = shapes.get("d24") or list(shapes.values())[-1]
    dense = 0.0
    for kernel, _, ms in shape["kernels"]:
        if any(word in kernel.lower() for word in DENSE_KERNELS):
            dense += ms
    return 1 - dense / shape["busy_ms"]

# ---- Tables --------------------------------------------------------------------------------------

def published(node_usd):
    """A row for each published run: the hours we compute beside its own."""
    rows = []
    for known in PUBLISHED:
        run = plan(known.preset)
        hour_tok_s = run.tokens / GPUS / 3600
        rows.append(dict(
            run=known.run, tokens=run.tokens, tok_s=known.tok_s,
            mfu=run.flops * known.tok_s / H100_FLOPS,
            computed=run.tokens / (GPUS * known.tok_s) / 3600, hours=known.hours,
            source=known.source, usd=known.hours * node_usd, hour_tok_s=hour_tok_s,
            hour_mfu=run.flops * hour_tok_s / H100_FLOPS))
    table(["published run on 8×H100", "tokens", "tok/s a GPU", "MFU", "hours", "published",
           "off by", "$", "tok/s for one hour", "MFU", "from"],
          [[row["run"], f"{row['tokens']:.3g}", round(row["tok_s"]), f"{row['mfu']:.1%}",
            row["computed"], row["hours"], f"{row['computed'] / row['hours'] - 1:+.1%}",
            row["usd"], round(row["hour_tok_s"]), f"{row['hour_mfu']:.0%}", row["source"]]
           for row in rows])
    return rows

def predicted(node_usd, sets, args):
    """A row for each model and set of rates: a run on 8×H100, with the network hidden or not."""
    rows = []
    for name in args.models:
        run = plan(name, args.ratio)
        for label, rates in sets.items():
            ms, network_ms = step_from_rates(run, rates)
            tok_s = run.batch / GPUS / (ms + network_ms) * 1000
            hidden = run.steps * ms / 3.6e6
            added = run.steps * (ms + network_ms) / 3.6e6
            rows.append(dict(
                run=name, rates=label, tokens=run.tokens, step_ms=ms, network_ms=network_ms,
                tok_s=tok_s, mfu=run.flops * tok_s / H100_FLOPS, hours_hidden=hidden,
                hours=added, usd_hidden=hidden * node_usd, usd=added * node_usd))
    table(["predicted on 8×H100", "rates", "tokens", "ms a step", "network ms", "tok/s a GPU",
           "MFU", "hours", "$", "hours, network hidden", "$"],
          [[row["run"], row["rates"], f"{row['tokens']:.3g}", row["step_ms"], row["network_ms"],
            round(row["tok_s"]), f"{row['mfu']:.0%}", row["hours"], row["usd"],
            row["hours_hidden"], row["usd_hidden"]] for row in rows])
    return rows

def measured(node_usd, reports, args):
    """A row for each contender that was measured on one GPU: its run on 8×H100."""
    rows = []
    for name, row in measured_rows(reports):
        run = plan(name)
        ms = node_step_ms(row, run, args)
        hours = run.steps * ms / 3.6e6
        rows.append(dict(
            run=name, contender=row["contender"], tokens=run.tokens, step_ms=ms, hours=hours,
            usd=hours * node_usd, mfu=run.flops * run.batch / (8 * H100_FLOPS * ms / 1000)))
    if rows:
        print(f"\nFrom one {args.on} to 8×H100 at ${node_usd:.0f} an hour; {args.memory_bound:.0%} "
              f"of the passes wait for memory; the network moves {args.network:.0f} GB/s, and "
              "nothing hides it.")
        table(["run", "who", "tokens", "ms a step", "MFU", "hours", "$"],
              [[row["run"], row["contender"], f"{row['tokens']:.3g}", row["step_ms"],
                f"{row['mfu']:.0%}", row["hours"], row["usd"]] for row in rows])
    return rows

def main():
    parser = argparse.ArgumentParser(description="hours and dollars on 8×H100")
    parser.add_argument("--models", nargs="+", default=["d22", "d24", "d26"], help="presets, or "
                        "recipes of recipe.py")
    parser.add_argument("--ratio", type=float, help="tokens a parameter (default: train_gpt2.py's)")
    parser.add_argument("--rates", default=ROOT / "bench" / "rates.csv", help="sets of rates")
    parser.add_argument("--measured", help="folder of bench/gpu.sh's reports")
    parser.add_argument("--on", choices=("H100", "H200"),
                        help="the GPU it was measured on (default: what the reports say)")
    parser.add_argument("--gpu_hour_usd", type=float, default=3.0, help="price of one GPU hour")
    parser.add_argument("--memory_bound", type=float, help="share of the passes that waits for "
                        "memory (default: the profile's, or 0.2)")
    parser.add_argument("--network", type=float, default=300, help="GB/s of NVLink that arrive")
    args = parser.parse_args()
    node_usd = GPUS * args.gpu_hour_usd
    sets = read_rates(args.rates)
    report = dict(published=published(node_usd), measured=[])
    if args.measured:
        reports = read_reports(args.measured)
        args.on = args.on or gpu_of(reports)
        args.memory_bound = args.memory_bound or memory_bound_share(reports) or 0.2
        report["measured"] = measured(node_usd, reports, args)
        for name, row in measured_rows(reports):
            if row.get("kernels"):
                V = plan(name).config.vocab_size
                sets[f"measured, {name} on an {args.on}"] = rates_of_profile(row["kernels"], V)
    report["predicted"] = predicted(node_usd, sets, args)
    finish("project", **report)

if __name__ == "__main__":
    main()
