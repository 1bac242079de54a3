"""
Past one node: the bytes that ranks send in a step of train_gpt2.cu, and the time that hides them. A
simulation, nothing is measured.

    python bench/scale.py                                   # d24 with its own batch, 8 … 1024 GPUs
    python bench/scale.py --model d24 --batch_tokens 8388608
    python bench/scale.py --model d34 --ranks 8 64 512 --buckets 64

in:  bench/rates.csv, a set of which gives the speed of the passes; the links' speeds, as flags
out: tables, and the same as one line of JSON

A node has 8 GPUs on NVLink. Each GPU has a network card of its own (InfiniBand, 400 Gb/s), so that
NCCL lays 8 rings through all GPUs, each of which carries an eighth of the bytes and leaves a node
through another card. On a ring of R ranks n bytes are summed in R - 1 hops, in each of which a rank
sends n / R; so a rank sends n (R - 1) / R, and all cards of a node together send as much. Gathering
is the same the other way. A hop also has a delay, which does not shrink with the bytes.

Buckets are those of the tensor table of train_gpt2.cu. The gradients of a layer are sent when its
backward pass is done, beside the backward pass of the layers below it; those of the embeddings and
the head are sent last. Each bucket's new parameters are sent while the next one is updated. What is
left when the passes or the updates are over is not hidden. A step's tokens are the recipe's for any
number of ranks, so more ranks have less to compute, but as much to send.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import finish, table
from project import passes_seconds_per_token, plan, read_rates

NODE_GPUS = 8
GRADIENT_BYTES = 4              # fp32
PARAMETER_BYTES = 2             # bf16
MEMORY_GB = 80                  # of an H100

def buckets_of(config):
    """[(name, parameters, layer)] in the order of the tensor table; layer None: of no layer."""
    C = config.n_embd
    table_params = config.padded_vocab * C
    if config.rms_norm:
        found = [("wte", table_params, None), ("lm_head", table_params, None)]
        layer_params = 12 * C * C
    else:
        found = [("wte, wpe, ln_f", table_params + (config.block_size + 2) * C, None)]
        layer_params = 12 * C * C + 13 * C
    for layer in range(config.n_layer):
        found.append((f"h.{layer}", layer_params, layer))
        if config.rms_norm and config.has_value_embed(layer):
            found.append((f"value_embeds.{layer}", table_params, layer))
    return found

def sent_bytes(n_bytes, ranks):
    """→ (bytes that a GPU sends to its neighbour, bytes that a node's cards send together), when n
    bytes are summed to their owners, or gathered from them."""
    by_gpu = n_bytes * (ranks - 1) / ranks
    if ranks <= NODE_GPUS:
        return by_gpu, 0.0
    return by_gpu, by_gpu

def transfer_ms(n_bytes, ranks, links):
    """The slower of NVLink and the cards, and the delays of all hops around the ring."""
    if ranks == 1:
        return 0.0
    by_gpu, by_node = sent_bytes(n_bytes, ranks)
    between = 0                                     # hops that leave a node
    if ranks > NODE_GPUS:
        between = -(-ranks // NODE_GPUS)
    hops_us = between * links.network_hop_us + (ranks - 1 - between) * links.nvlink_hop_us
    seconds = max(by_gpu / links.nvlink_gb_s, by_node / (NODE_GPUS * links.card_gb_s)) / 1e9
    return 1000 * seconds + hops_us / 1000

def reduced_at(buckets, backward_ms, ranks, links):
    """Simulates the backward pass of the last micro-step → [(name, when its gradients are complete,
    when their sums are there)], in ms after the beginning of the pass. One stream sends the buckets
    one after another."""
    n_layers = 1 + max(layer for _, _, layer in buckets if layer is not None)
    by_time = []
    for name, params, layer in buckets:
        complete = backward_ms
        if layer is not None:
            complete = backward_ms * (n_layers - layer) / n_layers
        by_time.append((complete, layer is None, name, params))
    free = 0.0
    sums = []
    for complete, _, name, params in sorted(by_time, key=lambda bucket: bucket[:2]):
        free = max(free, complete) + transfer_ms(GRADIENT_BYTES * params, ranks, links)
        sums.append((name, complete, free))
    return sums

def gathered_at(run, buckets, rates, ranks, links):
    """Simulates the update → (ms until this rank has updated its parts, ms until all parameters are
    there). A rank updates its part of every table, and the matrices of whole layers if there are no
    more ranks than layers; Muon cannot divide a layer among ranks."""
    stream_tb_s = rates["memory_tb_s"]
    C = run.config.n_embd
    updated = 0.0
    free = 0.0
    for name, params, layer in buckets:
        if not run.config.rms_norm or not name.startswith("h."):
            updated += 30 * params / ranks / stream_tb_s / 1e9      # AdamW: bytes a parameter
        elif layer % ranks == 0:                                    # rank 0 has the most layers
            updated += 60 * params / stream_tb_s / 1e9              # Muon: bytes, then matmuls
            updated += 300 * C ** 3 / (0.6 * rates["head_matmuls_tflops"]) / 1e9
        free = max(free, updated) + transfer_ms(PARAMETER_BYTES * params, ranks, links)
    return updated, free

def simulate(run, rates, ranks, links):
    """One step on so many ranks → its figures, or None if a rank has less than a row."""
    config = run.config
    rows = run.batch / config.block_size / ranks
    if rows < 1:
        return None
    micro_rows = min(rows, 2 ** 15 / config.block_size)
    block_params = run.matmul_params - config.vocab_size * config.n_embd
    token_ms = 1000 * passes_seconds_per_token(config, rates, block_params)
    passes = rows * config.block_size * token_ms
    backward = micro_rows * config.block_size * token_ms * 2 / 3     # twice the forward's FLOP
    buckets = buckets_of(config)
    reduce_end = reduced_at(buckets, backward, ranks, links)[-1][2]
    updated, gathered = gathered_at(run, buckets, rates, ranks, links)
    params = sum(size for _, size, _ in buckets)
    by_gpu, by_node = sent_bytes((GRADIENT_BYTES + PARAMETER_BYTES) * params, ranks)
    step = passes + reduce_end - backward + gathered
    return dict(ranks=ranks, rows=rows, gpu_gb=by_gpu / 1e9, node_gb=by_node / 1e9,
                passes_ms=passes, update_ms=updated, reduce_open_ms=reduce_end - backward,
                gather_open_ms=gathered - updated, step_ms=step, tok_s=1000 * run.batch / step)

def show_ranks(run, rates, args):
    """A row for each number of ranks"""
    found = []

    def rows():
        for ranks in args.ranks:
            row = simulate(run, rates, ranks, args)
            if row is None:
                yield [ranks, "a rank has less than a row", *[None] * 9]
                continue
            found.append(row)
            per_gpu = row["tok_s"] / ranks
            first = found[0]["tok_s"] / found[0]["ranks"]
            yield [ranks, row["rows"], row["gpu_gb"], row["node_gb"], row["passes_ms"],
                   row["update_ms"], row["reduce_open_ms"], row["gather_open_ms"], row["step_ms"],
                   round(row["tok_s"]), f"{per_gpu / first:.0%}"]

    table(["GPUs", "rows of a GPU", "GB a GPU sends", "GB a node's cards send", "passes ms",
           "update ms", "sums not hidden, ms", "gathering not hidden, ms", "ms a step", "tok/s",
           "of the first's tok/s a GPU"], rows())
    return found

def show_buckets(run, rates, args):
    """A row for each bucket, with the time that hides it"""
    config = run.config
    rows = min(run.batch / config.block_size / args.buckets, 2 ** 15 / config.block_size)
    block_params = run.matmul_params - config.vocab_size * config.n_embd
    token_ms = 1000 * passes_seconds_per_token(config, rates, block_params)
    backward = rows * config.block_size * token_ms * 2 / 3
    buckets = buckets_of(config)
    sizes = {name: params for name, params, _ in buckets}
    table([f"bucket, on {args.buckets} GPUs", "MB of gradients", "MB a GPU sends", "ms to send",
           "complete after ms", "summed after ms"],
          [[name, GRADIENT_BYTES * sizes[name] / 1e6,
            sent_bytes(GRADIENT_BYTES * sizes[name], args.buckets)[0] / 1e6,
            transfer_ms(GRADIENT_BYTES * sizes[name], args.buckets, args), complete, summed]
           for name, complete, summed in reduced_at(buckets, backward, args.buckets, args)])
    print(f"\nThe backward pass of the last micro-step takes {backward:.1f} ms.")

def conclusion(run, found):
    """Where ZeRO-1 stops being enough, in words"""
    params = sum(size for _, size, _ in buckets_of(run.config))
    kept_gb = (GRADIENT_BYTES + PARAMETER_BYTES) * params / 1e9
    most = 0.8 * MEMORY_GB / (GRADIENT_BYTES + PARAMETER_BYTES)
    slow = [row for row in found
            if row["reduce_open_ms"] + row["gather_open_ms"] > 0.2 * row["step_ms"]]
    limit = "for all of these numbers of GPUs"
    if slow:
        limit = f"below {slow[0]['ranks']} GPUs"
    return ("ZeRO-1 divides the optimizer's states alone. Each GPU keeps all weights and "
            f"gradients: here {kept_gb:.1f} GB; they fill four fifths of {MEMORY_GB} GB at "
            f"{most:.1f} billion parameters, and a larger model needs its gradients (ZeRO-2) and "
            "weights (ZeRO-3, FSDP) divided, too. What is sent but not hidden stays under a fifth "
            f"of a step {limit}, with {run.batch:,} tokens a step. More GPUs need a larger batch, "
            "or a model that is divided within a layer.")

def main():
    parser = argparse.ArgumentParser(description="bytes between ranks, past one node")
    parser.add_argument("--model", default="d24", help="a preset")
    parser.add_argument("--ranks", nargs="+", type=int, help="numbers of GPUs",
                        default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--buckets", type=int, default=64, help="GPUs of the table by bucket")
    parser.add_argument("--batch_tokens", type=int, help="tokens a step (default: the recipe's)")
    parser.add_argument("--rates", default="train_gpt2.cu", help="a set of bench/rates.csv")
    parser.add_argument("--nvlink_gb_s", type=float, default=300, help="GB/s a GPU sends")
    parser.add_argument("--card_gb_s", type=float, default=40, help="GB/s a network card sends")
    parser.add_argument("--nvlink_hop_us", type=float, default=1.0, help="delay of a hop")
    parser.add_argument("--network_hop_us", type=float, default=5.0, help="delay between nodes")
    args = parser.parse_args()
    if min([args.buckets, *args.ranks]) < 1:
        raise SystemExit("--ranks and --buckets must be at least 1; try --ranks 8 64")
    sets = read_rates(ROOT / "bench" / "rates.csv")
    if args.rates not in sets:
        raise SystemExit(f"--rates {args.rates} is not a set of bench/rates.csv; choose from "
                         f"{', '.join(sets)}")
    run = plan(args.model)
    if args.batch_tokens:
        run = SimpleNamespace(**vars(run) | dict(batch=args.batch_tokens))
    print(f"{args.model}: {run.params:,} parameters, {run.batch:,} tokens a step, kernels as in "
          f"{args.rates}")
    found = show_ranks(run, sets[args.rates], args)
    show_buckets(run, sets[args.rates], args)
    said = conclusion(run, found)
    print(f"\n{said}")
    finish("scale", model=args.model, batch=run.batch, ranks=found, conclusion=said)

if __name__ == "__main__":
    main()
