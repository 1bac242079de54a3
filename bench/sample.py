"""
Inference, beside what people would take instead: how long until the first token, and how many
tokens a second after it.

    python bench/sample.py                                      # two minutes on a quiet CPU
    python bench/sample.py --device cuda --shapes gpt2 d12      # 1 GPU

in:  .peers/nanoGPT and .peers/nanochat; transformers, if this Python has it; a peer that is not
     there is reported as not measured
out: a table a shape, and the same as one line of JSON

All have the same weights. Before anything is timed, their greedy tokens in fp32 must be ours. Then
they take turns, and sample at temperature 1: in fp32 on a CPU, in bf16 on a GPU. Prefill is the
time to the first token; decoding is the rest, one token after the other.

A step of decoding reads every weight, and the keys and values so far. How long that alone would
take, at the rate at which this machine copies memory, over how long the step took, is the share of
the bandwidth that is used.
"""
import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from contenders import PEERS, Shape, nanochat_model
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
LENGTHS = {     # where: prompts to prefill; rows that decode at once, their prompt, new tokens
    "cpu": ([512], [1, 16], 64, 16), "cuda": ([1024, 2048], [1, 16, 128], 64, 128),
    "quick": ([32], [1, 3], 8, 6)}

# No token ends a text: whoever asks this tokenizer writes as many as it is asked for.
ENDLESS = SimpleNamespace(special=defaultdict(lambda: -1), encode_special=lambda name: -1,
                          get_bos_token_id=lambda: -1)

# ---- Contenders: generate(prompt, rows, new_tokens, greedy) → the new ids of each row ------------

class Ours:
    """Its weights are of a size at which every layer matters and tokens do not repeat."""

    def __init__(self, shape, device):
        torch.manual_seed(1)
        self.model = GPT(shape.config())
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=2 * shape.C ** -0.5 if p.ndim > 1 else 0.1)
        self.dtype = self.model.use(device).compute_dtype
        self.engine = Engine(self.model, ENDLESS, python=None)

    def exactly(self, fp32):
        """Computes in fp32, or else, from now on, in what it would take."""
        self.model.compute_dtype = torch.float32 if fp32 else self.dtype
        if not fp32:
            self.model.for_inference()

    def generate(self, prompt, rows, new_tokens, greedy=False):
        return [c.ids for c in self.engine.generate([prompt], new_tokens, rows,
                                                    temperature=0.0 if greedy else 1.0)]

class NanoGPT:
    """Without a cache: for each token it reads again all that is before it. Its GELU is exact, ours
    is GPT-2's approximation; they differ by less than what would change a token here."""

    def __init__(self, ours, shape, device):
        spec = importlib.util.spec_from_file_location("nanogpt", PEERS / "nanoGPT" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.GPTConfig(shape.T, ours.config.padded_vocab, shape.L, shape.NH, shape.C)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model, self.device = module.GPT(config).to(device).eval(), device
        self.model.load_state_dict({name if name == "lm_head.weight" else f"transformer.{name}": p
                                    for name, p in ours.state_dict().items()})

    def exactly(self, fp32):
        self.precision = lambda: (torch.autocast("cuda", torch.bfloat16)
                                  if "cuda" in str(self.device) and not fp32
                                  else contextlib.nullcontext())

    def generate(self, prompt, rows, new_tokens, greedy=False):
        idx = torch.tensor([prompt], device=self.device).repeat(rows, 1)
        with self.precision():
            ids = self.model.generate(idx, new_tokens, top_k=1 if greedy else None)
        return ids[:, len(prompt):].tolist()

class Transformers:
    def __init__(self, ours, shape, device):
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, ours)
            self.model = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
        self.model.generation_config.eos_token_id, self.dtype = None, ours.compute_dtype

    def exactly(self, fp32):
        self.model.to(torch.float32 if fp32 else self.dtype)

    def generate(self, prompt, rows, new_tokens, greedy=False):
        idx = torch.tensor([prompt], device=self.model.device).repeat(rows, 1)
        ids = self.model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=not greedy,
                                  max_new_tokens=new_tokens, pad_token_id=0,
                                  **({} if greedy else dict(top_k=0)))
        return ids[:, len(prompt):].tolist()

class Nanochat:
    """Its smear of the previous token, which we have not, begins at zero and stays there."""

    def __init__(self, ours, shape, device):
        self.model, self.dtype = nanochat_model(shape, device).eval(), ours.compute_dtype
        from nanochat import engine, flash_attention, gpt
        self.modules, self.engine = (engine, gpt), engine.Engine(self.model, ENDLESS)
        self.flash_attention, self.fa3 = flash_attention, flash_attention.USE_FA3
        weights = self.model.state_dict()
        for name, p in ours.state_dict().items():
            if name.endswith("c_attn.weight"):
                parts = dict(zip("qkv", p.chunk(3)))
                weights |= {"transformer." + name.replace("c_attn", f"c_{key}"): part
                            for key, part in parts.items()}
            else:
                name = name.replace("value_gate", "ve_gate").replace("_scalar", "_lambda")
                weights["transformer." * name.startswith(("wte", "h.")) + name] = p
        self.model.load_state_dict(weights)

    def exactly(self, fp32):
        model, dtype = self.model, torch.float32 if fp32 else self.dtype
        for module in self.modules:
            module.COMPUTE_DTYPE = dtype
        self.flash_attention.USE_FA3 = self.fa3 and not fp32
        model.cos, model.sin = model._precompute_rotary_embeddings(
            model.rotary_seq_len, 2 * model.cos.shape[-1])
        for embedding in (model.transformer.wte, model.value_embeds):
            embedding.to(dtype)

    def generate(self, prompt, rows, new_tokens, greedy=False):
        ids, _ = self.engine.generate_batch(prompt, rows, max_tokens=new_tokens,
                                            temperature=0.0 if greedy else 1.0)
        return [row[len(prompt):] for row in ids]

def contenders(shape, device):
    """{label: contender, or why it is not measured}; ours first."""
    ours = Ours(shape, device)
    found = {"ours": ours}
    for label, make in ({"nanochat": Nanochat} if shape.modern else
                        {"transformers": Transformers, "nanoGPT": NanoGPT}).items():
        if label == "transformers":
            here = importlib.util.find_spec(label)
            found[label] = make(ours.model, shape, device) if here else (
                f"not measured: pip install {label}")
        else:
            here = (PEERS / label).is_dir()
            found[label] = make(ours.model, shape, device) if here else missing(label)
    return found

# ---- Measuring -----------------------------------------------------------------------------------

def check(found, prompt, rows, new_tokens):
    """All write the same greedy tokens in fp32, and no shorter text than they were asked for."""
    for contender in found.values():
        contender.exactly(fp32=True)
    wanted = found["ours"].generate(prompt, rows, new_tokens, greedy=True)
    for label, contender in found.items():
        assert contender.generate(prompt, rows, new_tokens, greedy=True) == wanted, label
        contender.exactly(fp32=False)
        assert len(contender.generate(prompt, rows, new_tokens)[-1]) == new_tokens, label
    assert len(set(wanted[0])) > new_tokens // 4, "the text repeats; a broken cache might not show"

def copy_rate(device):
    """Bytes a second that copying memory reads and writes."""
    source = torch.zeros(2 ** (32 if "cuda" in device else 28), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    ms = in_turns({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"]
    return 2000 * len(source) / statistics.median(ms)

def step_bytes(model, rows, prompt_tokens, new_tokens):
    """What a step of decoding has to read, halfway through."""
    config = model.config
    cache = 2 * config.n_layer * config.n_embd * rows * (prompt_tokens + new_tokens / 2)
    return model.compute_dtype.itemsize * (model.matmul_params() + cache)

def memory_mb(contender, *asked):
    """On a GPU: the most it needs beside the weights."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.generate(*asked)
    return (torch.cuda.max_memory_allocated() - before) / 1e6

def measure(found, shape, where, device, repeats):
    """→ rows, one of each contender at each length."""
    prefills, batch_sizes, prompt_tokens, new_tokens = LENGTHS[where]
    prompt = torch.randint(0, shape.V, (max(*prefills, prompt_tokens),)).tolist()
    rate, rows = copy_rate(device), []
    jobs = [(1, n, 1) for n in prefills] + [(B, prompt_tokens, new_tokens) for B in batch_sizes]
    for B, n, new in jobs:
        calls = {(label, count): lambda c=c, count=count: c.generate(prompt[:n], B, count)
                 for label, c in found.items() for count in {1, new}}
        ms = in_turns(calls, repeats, device=device)
        print(f"\r{B} x {n} + {new} tokens", end="", file=sys.stderr)
        for label, c in found.items():
            mine = ms[label, 1] if new == 1 else [
                (whole - first) / (new - 1) for whole, first in zip(ms[label, new], ms[label, 1])]
            reads = step_bytes(found["ours"].model, B, n, new)
            rows.append(dict(
                job=f"prefill {n:,}" if new == 1 else f"decode {B}", contender=label, all_ms=mine,
                ms=statistics.median(mine), spread=spread(mine), memory_mb=memory_mb(c, prompt[:n],
                                                                                     B, new),
                tok_s=1000 * (n if new == 1 else B) / statistics.median(mine),
                bandwidth=None if new == 1 else 1000 * reads / rate / statistics.median(mine)))
    print("\r", end="", file=sys.stderr)
    ours = {row["job"]: row["all_ms"] for row in rows if row["contender"] == "ours"}
    for row in rows:
        row["ours_faster_by"] = None if row["contender"] == "ours" else (
            ratio(row["all_ms"], ours[row["job"]]))
    return rows, rate

def show(name, shape, rows, rate, absent):
    table([f"{name}: {shape.L} layers, {shape.C} channels, {shape.V:,} tokens", "", "ms", "spread",
           "tok/s", f"of {rate / 1e9:,.0f} GB/s", "MB beside the weights",
           "ours is faster by"],
          [[row["job"], row["contender"], row["ms"], row["spread"], f"{row['tok_s']:,.0f}",
            row["bandwidth"] and f"{row['bandwidth']:.0%}", row["memory_mb"],
            row["ours_faster_by"]] for row in rows]
          + [[None, label, why, *[None] * 5] for label, why in absent.items()])

def main():
    parser = argparse.ArgumentParser(description="prefill and decoding speed, beside peers")
    shape_flags(parser, repeats=5, timed="calls")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    report = {}
    for name, shape in shapes.items():
        found = contenders(shape, args.device)
        absent = {label: why for label, why in found.items() if isinstance(why, str)}
        found = {label: c for label, c in found.items() if label not in absent}
        _, _, prompt_tokens, new_tokens = LENGTHS[where]
        prompt = torch.randint(0, shape.V, (prompt_tokens,)).tolist()
        check(found, prompt, 2, new_tokens)
        rows, rate = measure(found, shape, where, args.device, args.repeats)
        show(name, shape, rows, rate, absent)
        report[name] = dict(rows=rows, copy_bytes_s=rate, not_measured=absent)
    finish("sample", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
