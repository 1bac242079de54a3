"""
Inference beside its peers: the time to the first token, and tokens per second after it.

    python bench/sample.py                                      # two minutes on a quiet CPU
    python bench/sample.py --device cuda --shapes gpt2 d12      # 1 GPU

in:  .peers/nanoGPT and .peers/nanochat; transformers, if this Python has it; a peer that is not
     there is reported as not measured
out: a table for each shape, and the same as one line of JSON

All contenders have the same weights. Before they are timed, each must write the same greedy tokens
in fp32. Then they take turns and sample at temperature 1, in fp32 on a CPU and in bf16 on a GPU.
Prefill is the time to the first token; decoding is the time of the others, one after another.

A step of decoding must read every weight, and the keys and values so far. The share of the
bandwidth is the time that this reading would take, at the rate at which this machine copies memory,
divided by the time that the step took.
"""
import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from contenders import PEERS, Shape, nanochat_model, nanochat_weights
from measure import chosen_shapes, finish, in_turns, missing, ratio, shape_flags, spread, table
from model import GPT, save_checkpoint
from sample import Engine

SHAPES = {      # where: {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"gpt2": Shape(False, 4, 256, 4, 50257, 1024, 1),
            "d4": Shape(True, 4, 256, 2, 32768, 1024, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 4096, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 4096, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 4096, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 500, 128, 1),
              "d2": Shape(True, 2, 64, 2, 500, 128, 1)}}
LENGTHS = {     # where: (lengths of prompts to prefill, rows to decode, their prompt, new tokens)
    "cpu": ([512], [1, 16], 64, 16), "cuda": ([1024, 2048], [1, 16, 128], 64, 128),
    "quick": ([32], [1, 3], 8, 6)}

# A tokenizer without tokens that end a text: everybody writes as many tokens as they are asked for.
ENDLESS = SimpleNamespace(special=defaultdict(lambda: -1), encode_special=lambda name: -1,
                          get_bos_token_id=lambda: -1)

# ---- Contenders: generate(prompt, rows, new_tokens, greedy) → the new ids of each row ------------

class Ours:
    """The weights are large enough that every layer matters and that tokens do not repeat."""

    def __init__(self, shape, device):
        torch.manual_seed(1)
        self.model = GPT(shape.config())
        with torch.no_grad():
            for p in self.model.parameters():
                std = 0.1
                if p.ndim > 1:
                    std = 2 * shape.C ** -0.5
                p.add_(torch.randn_like(p), alpha=std)
        self.dtype = self.model.use(device).compute_dtype
        self.engine = Engine(self.model, ENDLESS, python=None)

    def set_precision(self, fp32):
        """Computes in fp32, or from now on in the dtype of inference."""
        if fp32:
            self.model.compute_dtype = torch.float32
        else:
            self.model.compute_dtype = self.dtype
            self.model.for_inference()

    def generate(self, prompt, rows, new_tokens, greedy=False):
        completions = self.engine.generate([prompt], new_tokens, rows,
                                           temperature=temperature(greedy))
        return [completion.ids for completion in completions]

def temperature(greedy):
    return 0.0 if greedy else 1.0

class NanoGPT:
    """It has no cache, so for each token it reads all earlier ones again. Its GELU is exact and
    ours is GPT-2's approximation; the difference is too small to change a token here."""

    def __init__(self, ours, shape, device):
        spec = importlib.util.spec_from_file_location("nanogpt", PEERS / "nanoGPT" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.device = device
        config = module.GPTConfig(shape.T, ours.config.padded_vocab, shape.L, shape.NH, shape.C)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = module.GPT(config).to(device).eval()
        weights = {}
        for name, p in ours.state_dict().items():
            if name != "lm_head.weight":
                name = f"transformer.{name}"
            weights[name] = p
        self.model.load_state_dict(weights)

    def set_precision(self, fp32):
        self.bf16 = "cuda" in str(self.device) and not fp32

    def generate(self, prompt, rows, new_tokens, greedy=False):
        idx = torch.tensor([prompt], device=self.device).repeat(rows, 1)
        top_k = 1 if greedy else None
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            ids = self.model.generate(idx, new_tokens, top_k=top_k)
        return ids[:, len(prompt):].tolist()

class Transformers:
    def __init__(self, ours, shape, device):
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
        logging.disable_progress_bar()
        self.dtype = ours.compute_dtype
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, ours)
            self.model = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
        self.model.generation_config.eos_token_id = None

    def set_precision(self, fp32):
        if fp32:
            self.model.to(torch.float32)
        else:
            self.model.to(self.dtype)

    def generate(self, prompt, rows, new_tokens, greedy=False):
        idx = torch.tensor([prompt], device=self.model.device).repeat(rows, 1)
        how = dict(do_sample=False)
        if not greedy:
            how = dict(do_sample=True, top_k=0)
        ids = self.model.generate(idx, attention_mask=torch.ones_like(idx), pad_token_id=0,
                                  max_new_tokens=new_tokens, **how)
        return ids[:, len(prompt):].tolist()

class Nanochat:
    """Its smear of the previous token, which ours does not have, starts at zero and stays there."""

    def __init__(self, ours, shape, device):
        self.dtype = ours.compute_dtype
        self.model = nanochat_model(shape, device).eval()
        from nanochat import engine, flash_attention, gpt
        self.modules = engine, gpt
        self.engine = engine.Engine(self.model, ENDLESS)
        self.flash_attention = flash_attention
        self.has_flash_attention_3 = flash_attention.USE_FA3
        self.model.load_state_dict(self.model.state_dict() | nanochat_weights(ours))

    def set_precision(self, fp32):
        model = self.model
        dtype = self.dtype
        if fp32:
            dtype = torch.float32
        for module in self.modules:
            module.COMPUTE_DTYPE = dtype
        self.flash_attention.USE_FA3 = self.has_flash_attention_3 and not fp32
        model.cos, model.sin = model._precompute_rotary_embeddings(
            model.rotary_seq_len, 2 * model.cos.shape[-1])
        for embedding in (model.transformer.wte, model.value_embeds):
            embedding.to(dtype)

    def generate(self, prompt, rows, new_tokens, greedy=False):
        ids, _ = self.engine.generate_batch(prompt, rows, max_tokens=new_tokens,
                                            temperature=temperature(greedy))
        return [row[len(prompt):] for row in ids]

def contenders(shape, device):
    """→ ({label: contender}, ours first; {label: why it is not measured})."""
    found = {"ours": Ours(shape, device)}
    absent = {}
    peers = {"transformers": Transformers, "nanoGPT": NanoGPT}
    if shape.modern:
        peers = {"nanochat": Nanochat}
    for label, make in peers.items():
        if label == "transformers" and not importlib.util.find_spec(label):
            absent[label] = f"not measured: pip install {label}"
        elif label != "transformers" and not (PEERS / label).is_dir():
            absent[label] = missing(label)
        else:
            found[label] = make(found["ours"].model, shape, device)
    return found, absent

# ---- Measuring -----------------------------------------------------------------------------------

def check(found, prompt, rows, new_tokens):
    """All contenders write the same greedy tokens in fp32, and as many as they are asked for."""
    for contender in found.values():
        contender.set_precision(fp32=True)
    wanted = found["ours"].generate(prompt, rows, new_tokens, greedy=True)
    for label, contender in found.items():
        assert contender.generate(prompt, rows, new_tokens, greedy=True) == wanted, label
        contender.set_precision(fp32=False)
        assert len(contender.generate(prompt, rows, new_tokens)[-1]) == new_tokens, label
    different = len(set(wanted[0]))
    assert different > new_tokens // 4, "the text repeats: a broken cache might go unnoticed"

def copy_rate(device):
    """Bytes a second that copying memory reads and writes."""
    n_bytes = 2 ** 28
    if "cuda" in device:
        n_bytes = 2 ** 32
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    ms = in_turns({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"]
    return 1000 * 2 * n_bytes / statistics.median(ms)

def step_bytes(model, rows, prompt_tokens, new_tokens):
    """The bytes that a step of decoding must read, halfway through the new tokens."""
    config = model.config
    cache = 2 * config.n_layer * config.n_embd * rows * (prompt_tokens + new_tokens / 2)
    return model.compute_dtype.itemsize * (model.matmul_params() + cache)

def memory_mb(contender, prompt, rows, new_tokens):
    """On a GPU: the most memory that it takes, without the weights; elsewhere None."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.generate(prompt, rows, new_tokens)
    return (torch.cuda.max_memory_allocated() - before) / 1e6

def time_prefill(found, prompt, repeats, device):
    """→ {label: ms of each repeat to the first token}."""
    calls = {label: partial(contender.generate, prompt, 1, 1)
             for label, contender in found.items()}
    return in_turns(calls, repeats, device=device)

def time_decoding(found, prompt, rows, new_tokens, repeats, device):
    """→ {label: ms per token after the first, of each repeat}: the time of all tokens, less that of
    the first."""
    calls = {}
    for label, contender in found.items():
        for count in (1, new_tokens):
            calls[label, count] = partial(contender.generate, prompt, rows, count)
    ms = in_turns(calls, repeats, device=device)
    decoding = {}
    for label in found:
        pairs = zip(ms[label, new_tokens], ms[label, 1])
        decoding[label] = [(whole - first) / (new_tokens - 1) for whole, first in pairs]
    return decoding

def result_rows(job, ms, n_tokens, reads=None, rate=None, memory=None):
    """ms: {label: [ms]} of one job → rows of the table. n_tokens: the tokens that are read or
    written in each of these times. reads: bytes per step; rate: bytes per second."""
    rows = []
    for label, times in ms.items():
        median = statistics.median(times)
        row = dict(job=job, contender=label, all_ms=times, ms=median, spread=spread(times),
                   memory_mb=memory[label], tok_s=1000 * n_tokens / median, bandwidth=None,
                   ours_faster_by=None)
        if reads:
            row["bandwidth"] = 1000 * reads / rate / median
        if label != "ours":
            row["ours_faster_by"] = ratio(times, ms["ours"])
        rows.append(row)
    return rows

def measure(found, shape, where, device, repeats):
    """→ (the rows of every contender at every length, bytes per second that memory is copied)."""
    prefills, batch_sizes, prompt_tokens, new_tokens = LENGTHS[where]
    prompt = torch.randint(0, shape.V, (max(*prefills, prompt_tokens),)).tolist()
    rate = copy_rate(device)
    rows = []
    for n in prefills:
        print(f"\rprefill {n} tokens", end="", file=sys.stderr)
        ms = time_prefill(found, prompt[:n], repeats, device)
        memory = {label: memory_mb(c, prompt[:n], 1, 1) for label, c in found.items()}
        rows += result_rows(f"prefill {n:,}", ms, n, memory=memory)
    for B in batch_sizes:
        print(f"\rdecode {B} x {new_tokens} tokens", end="", file=sys.stderr)
        start = prompt[:prompt_tokens]
        ms = time_decoding(found, start, B, new_tokens, repeats, device)
        memory = {label: memory_mb(c, start, B, new_tokens) for label, c in found.items()}
        reads = step_bytes(found["ours"].model, B, prompt_tokens, new_tokens)
        rows += result_rows(f"decode {B}", ms, B, reads, rate, memory)
    print("\r", end="", file=sys.stderr)
    return rows, rate

def show(name, shape, rows, rate, absent):
    cells = []
    for row in rows:
        bandwidth = None
        if row["bandwidth"]:
            bandwidth = f"{row['bandwidth']:.0%}"
        cells.append([row["job"], row["contender"], row["ms"], row["spread"],
                      f"{row['tok_s']:,.0f}", bandwidth, row["memory_mb"], row["ours_faster_by"]])
    for label, why in absent.items():
        cells.append([None, label, why, *[None] * 5])
    table([f"{name}: {shape.L} layers, {shape.C} channels, {shape.V:,} tokens", "", "ms", "spread",
           "tok/s", f"of {rate / 1e9:,.0f} GB/s", "MB beside the weights", "ours is faster by"],
          cells)

def main():
    parser = argparse.ArgumentParser(description="prefill and decoding speed, beside peers")
    shape_flags(parser, repeats=9, timed="calls")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    report = {}
    for name, shape in shapes.items():
        found, absent = contenders(shape, args.device)
        _, _, prompt_tokens, new_tokens = LENGTHS[where]
        prompt = torch.randint(0, shape.V, (prompt_tokens,)).tolist()
        check(found, prompt, 2, new_tokens)
        rows, rate = measure(found, shape, where, args.device, args.repeats)
        show(name, shape, rows, rate, absent)
        report[name] = dict(rows=rows, copy_bytes_s=rate, not_measured=absent)
    finish("sample", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
