"""
A step of reinforcement learning, beside TRL's GRPOTrainer: how long it takes to write the replies,
to reward them and to learn from them.

    python bench/rl.py                          # a minute on a quiet CPU
    python bench/rl.py --device cuda            # 1 GPU

in:  trl, transformers and datasets, if this Python has them; else they are reported as not measured
out: a table a shape, and the same as one line of JSON

Both begin with the same GPT-2, answer the same questions with as many replies of as many tokens,
and get the reward of the same function; nobody stops early. The objective is rl_grpo.py's: no
division by the group's deviation, no KL, one update. TRL generates with transformers, not with
vLLM, which would be a third contender. It knows no dN; there ours stands alone.

Before anything is timed, the gradient of our step must be that of a policy gradient in float64,
written down row by row; and of TRL's own replies, rewards and loss must come our advantages and,
clipped, our gradient.
"""
import argparse
import contextlib
import copy
import importlib.util
import itertools
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bpe import PATTERNS, SPECIAL_TOKENS, Tokenizer
from contenders import Shape
from measure import Clock, chosen_shapes, finish, ratio, shape_flags, spread, table
from model import GPT, file_tensor, save_checkpoint
from training import Optimizer, Ranks
from rl_grpo import advantages, learn, rollout_tensors
from sample import Completion, Engine

SHAPES = {      # where: {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"gpt2": Shape(False, 4, 256, 4, 4096, 256, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 1024, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 512, 128, 1),
              "d2": Shape(True, 2, 64, 2, 512, 128, 1)}}
SIZES = {"cpu": (4, 8, 48), "cuda": (16, 16, 128), "quick": (2, 4, 8)}  # prompts, group, new tokens
LEARNING = SimpleNamespace(updates=1, clip=0.2, kl=0.0, lr=1e-5)        # flags of rl_grpo.py

def tokenizer_of(n_vocab):
    """Bytes, and pairs of bytes up to this size: what is in a vocabulary costs nobody time."""
    n_pairs = n_vocab - 256 - len(SPECIAL_TOKENS)
    pairs = itertools.islice(itertools.product(range(256), repeat=2), n_pairs)
    tokens = [*((byte,) for byte in range(256)), *pairs]
    ranks = {bytes(token): i for i, token in enumerate(tokens)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(ranks, PATTERNS["gpt4"], special, "pairs")

def questions(n):
    """Of one length: transformers' GPT-2 counts the positions of padding, too."""
    return [f"A farmer has {100 + i} sheep and buys {999 - i} more. How many are there?"
            for i in range(n)]

def reward(text):
    """The share of distinct characters: two replies are never worth the same."""
    return len(set(text)) / max(1, len(text))

# ---- Ours ----------------------------------------------------------------------------------------

def optimizer_of(model, ranks, kind=Optimizer):
    return kind([dict(kind="adamw", lr=LEARNING.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                      params=dict(model.named_parameters()))], ranks)

class Ours:
    """One step of rl_grpo.py's main()."""

    def __init__(self, shape, sizes, device):
        torch.manual_seed(1)
        n_prompts, self.group_size, self.new_tokens = sizes
        self.model, self.ranks = GPT(shape.config()).use(device).eval(), Ranks(device=device)
        self.tokenizer, self.optimizer = tokenizer_of(shape.V), optimizer_of(self.model, self.ranks)
        self.prompts = self.tokenizer.encode_batch(questions(n_prompts))
        self.engine = Engine(self.model, SimpleNamespace(special=defaultdict(lambda: -1)),
                             python=None)       # no token ends a reply
        self.seed = 0

    def step(self, mark):
        self.seed += 1
        completions = self.engine.generate(self.prompts, self.new_tokens, self.group_size,
                                           seed=self.seed)
        mark()
        rewards = torch.tensor([reward(self.tokenizer.decode(c.ids)) for c in completions])
        mark()
        ids, mask = rollout_tensors([p for p in self.prompts for _ in range(self.group_size)],
                                    completions, pad=0)
        assert mask.sum() == len(completions) * self.new_tokens, "a reply was cut short"
        advantage = advantages(rewards.view(-1, self.group_size)).flatten()
        learn(self.model, self.optimizer, self.ranks, ids, mask, advantage, LEARNING, 1.0, None)

# ---- Is it right? --------------------------------------------------------------------------------

class Kept(Optimizer):
    """Keeps the gradients, clipped, instead of following them."""

    def step(self, lr_scale, grad_scale):
        self.grads = {name: p.grad * grad_scale for name, p in self.params.items()}
        for p in self.params.values():
            p.grad = None

def our_gradient(model, ids, mask, advantage, device):
    """What learn() would follow, clipped to 1."""
    ranks = Ranks(device=device)
    optimizer = optimizer_of(model, ranks, Kept)
    learn(model, optimizer, ranks, ids, mask, advantage, LEARNING, 1.0, None)
    return optimizer.grads

def policy_gradient(model, ids, mask, advantage):
    """In float64, a row at a time: of Σ A log p(token), over the tokens that were sampled in groups
    that are not tied, divided by how many they are; then clipped to 1."""
    model, V = copy.deepcopy(model).double(), model.config.vocab_size
    model.compute_dtype, tokens = torch.float64, mask[advantage != 0].sum()
    for row, sampled, A in zip(ids, mask, advantage.double()):
        hidden = model.hidden(row[None, :-1])[0]
        z = hidden @ model.lm_head.weight[:V].T
        if s := model.config.softcap:
            z = s * torch.tanh(z / s)
        logprobs = (z - z.logsumexp(-1, keepdim=True))[torch.arange(len(row) - 1), row[1:]]
        (-A * (logprobs * sampled[1:]).sum() / tokens).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    return {name: p.grad * min(1.0, 1.0 / (norm + 1e-6)) for name, p in model.named_parameters()}

def assert_equal(ours, theirs, tolerance):
    """Of all gradients together: how far they are apart, as a share of their length."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    apart = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    length = sum(gradient.double().square().sum() for gradient in theirs.values())
    assert (apart / length).sqrt() < tolerance, f"gradients are {(apart / length).sqrt():.1e} apart"

def check_gradient(ours):
    """Our step against float64, on a CPU: two groups, one of them tied; one reply is shorter."""
    model, prompts = copy.deepcopy(ours.model).use("cpu"), [ours.prompts[0]] * 6
    done = Engine(model, ours.engine.tokenizer, python=None).generate(prompts[:1], 8, 6)
    done[1] = Completion(done[1].ids[:5], done[1].sampled[:5])
    ids, mask = rollout_tensors(prompts, done, pad=0)
    advantage = advantages(torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])).flatten()
    torch.testing.assert_close(advantage, torch.tensor([-1 / 3, 2 / 3, -1 / 3, 0, 0, 0]))
    assert_equal(our_gradient(model, ids, mask, advantage, "cpu"),
                 policy_gradient(model, ids, mask, advantage), 1e-4)

def check_against_trl(ours, trainer, gradients, device):
    """Of its replies must come its advantages, and of its batch its gradient."""
    batch = trainer.batch       # in random order
    asked = [ours.prompts.index(row) for row in batch["prompt_ids"].tolist()]
    order = sorted(range(len(asked)), key=lambda i: asked[i])
    texts = trainer.processing_class.batch_decode(batch["completion_ids"][order],
                                                  skip_special_tokens=True)
    rewards = torch.tensor([reward(text) for text in texts], device=device)
    advantage = advantages(rewards.view(-1, ours.group_size)).flatten()
    torch.testing.assert_close(advantage, batch["advantages"][order])
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)[order]
    mask = torch.cat((torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]), 1)[order]
    V = ours.model.config.vocab_size
    mine = our_gradient(ours.model, ids, mask.float(), advantage, device)
    assert_equal(dict(file_tensor(name, gradient, V) for name, gradient in mine.items()), gradients,
                 1e-4 if ours.model.compute_dtype == torch.float32 else 0.05)

# ---- TRL -----------------------------------------------------------------------------------------

def trl_trainer(ours, shape, steps, device, folder):
    """Its GRPOTrainer with our model and tokenizer. It leaves a mark behind its generating and
    behind its rewarding, and keeps what it learns from."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer
    logging.disable_progress_bar()

    class Marked(GRPOTrainer):
        def _generate(self, *args, **options):
            outcome = super()._generate(*args, **options)
            self.mark()
            return outcome

        def _calculate_rewards(self, *args, **options):
            outcome = super()._calculate_rewards(*args, **options)
            self.mark()
            return outcome

        def _compute_loss(self, model, inputs):
            self.batch = inputs
            return super()._compute_loss(model, inputs)

    save_checkpoint(folder, ours.model)
    ours.tokenizer.export_hf(f"{folder}/tokenizer.json")
    texts, cuda = questions(len(ours.prompts)), "cuda" in device
    config = GRPOConfig(
        output_dir=folder, max_steps=steps, num_generations=ours.group_size, temperature=1.0,
        per_device_train_batch_size=len(texts) * ours.group_size, shuffle_dataset=False,
        max_completion_length=ours.new_tokens, generation_kwargs=dict(
            min_new_tokens=ours.new_tokens),
        beta=0.0, loss_type="bnpo", scale_rewards="none", epsilon=LEARNING.clip,
        learning_rate=LEARNING.lr, lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0,
        gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return Marked(
        GPT2LMHeadModel.from_pretrained(folder, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        args=config, reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        train_dataset=Dataset(InMemoryTable.from_pydict(dict(prompt=texts)), fingerprint="texts"),
        processing_class=PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json",
                                                 eos_token="<|endoftext|>", pad_token="<|pad|>"))

# ---- Measuring -----------------------------------------------------------------------------------

class Times:
    """Of each contender's steps: [generate, reward, learn] in ms; MB it needs, on a GPU."""

    def __init__(self, device):
        self.clock, self.cuda, self.ms, self.memory_mb = Clock(device), "cuda" in device, {}, {}

    def begin(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.clock.mark()

    def end(self, label):
        self.clock.mark()
        self.ms.setdefault(label, []).append(self.clock.ms())
        if self.cuda:
            self.memory_mb[label] = (torch.cuda.max_memory_allocated() - self.before) / 1e6

    def step(self, ours):
        self.begin()
        ours.step(self.clock.mark)
        self.end("ours")

def in_turns_with_trl(ours, shape, times, steps, device):
    """TRL's trainer makes its steps, and before each of them we make one. Its first step comes
    before our first: there the models are equal, and its gradient is checked."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step:
                times.step(ours)
            times.begin()

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if not state.global_step:
                gradients = {name: p.grad for name, p in model.named_parameters()}
                check_against_trl(ours, trainer, gradients, device)

        def on_step_end(self, args, state, control, **_):
            times.end("TRL")

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(ours, shape, steps, device, folder)
        trainer.mark = times.clock.mark
        trainer.add_callback(Turns())
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()

def rows_of(times, n_replies, warmup):
    rows = []
    for label, ms in times.ms.items():
        ms = ms[-(len(times.ms["ours"]) - warmup):]
        steps = [sum(step) for step in ms]
        rows.append(dict(contender=label, all_ms=ms, ms=statistics.median(steps),
                         spread=spread(steps), phases=[*map(statistics.median, zip(*ms))],
                         replies_s=1000 * n_replies / statistics.median(steps),
                         memory_mb=times.memory_mb.get(label)))
    ours = next([sum(step) for step in row["all_ms"]] for row in rows if row["contender"] == "ours")
    for row in rows:
        row["ours_faster_by"] = None if row["contender"] == "ours" else (
            ratio([sum(step) for step in row["all_ms"]], ours))
    return sorted(rows, key=lambda row: row["contender"] != "ours")

def main():
    parser = argparse.ArgumentParser(description="a GRPO step, beside TRL's")
    shape_flags(parser, repeats=5, timed="steps")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    n_prompts, group_size, new_tokens = SIZES[where]
    absent = [name for name in ("trl", "transformers", "datasets")
              if importlib.util.find_spec(name) is None]
    report, warmup = {}, 1
    for name, shape in shapes.items():
        times = Times(args.device)
        ours = Ours(shape, SIZES[where], args.device)
        check_gradient(ours)
        why = ("not measured: it knows no dN" if shape.modern else
               f"not measured: pip install {' '.join(absent)}" if absent else None)
        if why:
            for _ in range(warmup + args.repeats):
                times.step(ours)
        else:
            in_turns_with_trl(ours, shape, times, 1 + warmup + args.repeats, args.device)
        rows = rows_of(times, n_prompts * group_size, warmup)
        table([f"{name}: {shape.L} layers, {shape.C} channels; {n_prompts} x {group_size} replies "
               f"of {new_tokens} tokens", "generate ms", "reward ms", "learn ms", "step ms",
               "spread", "replies/s", "MB beside the models", "ours is faster by"],
              [[row["contender"], *row["phases"], row["ms"], row["spread"], row["replies_s"],
                row["memory_mb"], row["ours_faster_by"]] for row in rows]
              + [["TRL", why, *[None] * 7]] * bool(why))
        report[name] = dict(rows=rows, not_measured=why)
    finish("rl", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
