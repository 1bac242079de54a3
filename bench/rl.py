"""
A step of reinforcement learning, beside TRL's GRPOTrainer: how long it takes to write the replies,
to reward them and to learn from them.

    python bench/rl.py                          # a minute on a quiet CPU
    python bench/rl.py --device cuda            # 1 GPU

in:  trl, transformers and datasets; if this Python lacks one, TRL is reported as not measured
out: a table for each shape, and all of them as one line of JSON

Both start from the same GPT-2, write the same number of replies of the same length to the same
questions, and use the same reward function; no reply stops early. The objective is that of
rl_grpo.py: no division by the group's deviation, no KL, one update. TRL generates with
transformers, not with vLLM, which would be a third contender. TRL has no dN, so for dN only ours is
measured.

Before anything is timed, two checks run. The gradient of our step must equal that of a policy
gradient in float64, written row by row. And from TRL's own replies and rewards our code must
compute TRL's advantages and its clipped gradient.
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

SHAPES = {      # device or "quick": {name: modern, L, C, NH, V, T, tokens of a training step}
    "cpu": {"gpt2": Shape(False, 4, 256, 4, 4096, 256, 1)},
    "cuda": {"gpt2": Shape(False, 12, 768, 12, 50257, 1024, 1),
             "d12": Shape(True, 12, 768, 6, 32768, 2048, 1),
             "d24": Shape(True, 24, 1536, 12, 32768, 2048, 1)},
    "quick": {"gpt2": Shape(False, 2, 64, 2, 512, 128, 1),
              "d2": Shape(True, 2, 64, 2, 512, 128, 1)}}
SIZES = {"cpu": (4, 8, 48), "cuda": (16, 16, 128), "quick": (2, 4, 8)}  # prompts, group, new tokens
LEARNING = SimpleNamespace(updates=1, loss="dapo", clip=(0.2, 0.2), kl=0.0, lr=1e-5)   # rl_grpo.py

def tokenizer_of(n_vocab):
    """A vocabulary of bytes and pairs of bytes. Its size takes time, its content does not."""
    n_pairs = n_vocab - 256 - len(SPECIAL_TOKENS)
    tokens = [bytes([byte]) for byte in range(256)]
    for pair in itertools.islice(itertools.product(range(256), repeat=2), n_pairs):
        tokens.append(bytes(pair))
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(ranks, PATTERNS["gpt4"], special, "pairs")

def questions(n):
    """n questions of equal length, because transformers' GPT-2 counts padding as positions."""
    return [f"A farmer has {100 + i} sheep and buys {999 - i} more. How many are there?"
            for i in range(n)]

def reward(text):
    """Distinct characters as a share of all, so that hardly two replies are worth the same."""
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
        self.model = GPT(shape.config()).use(device).eval()
        self.ranks = Ranks(device=device)
        self.optimizer = optimizer_of(self.model, self.ranks)
        self.tokenizer = tokenizer_of(shape.V)
        self.prompts = self.tokenizer.encode_batch(questions(n_prompts))
        never = SimpleNamespace(special=defaultdict(lambda: -1))    # no token ends a reply
        self.engine = Engine(self.model, never, python=None)
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

class KeepsGradients(Optimizer):
    """Keeps the clipped gradients instead of updating the parameters."""

    def step(self, lr_scale, grad_scale):
        self.grads = {name: p.grad * grad_scale for name, p in self.params.items()}
        for p in self.params.values():
            p.grad = None

def our_gradient(model, ids, mask, advantage, device):
    """The gradient that learn() uses, clipped to a norm of 1."""
    ranks = Ranks(device=device)
    optimizer = optimizer_of(model, ranks, KeepsGradients)
    learn(model, optimizer, ranks, ids, mask, advantage, LEARNING, 1.0, None)
    return optimizer.grads

def policy_gradient(model, ids, mask, advantage):
    """The slow twin of our_gradient, in float64, one row at a time.

        loss = -Σ A · log p(token) / n

    The sum goes over the n tokens that were sampled in groups that are not tied. The gradient is
    clipped to a norm of 1.
    """
    model = copy.deepcopy(model).double()
    model.compute_dtype = torch.float64
    V = model.config.vocab_size
    softcap = model.config.softcap
    tokens = mask[advantage != 0].sum()
    for row, sampled, A in zip(ids, mask, advantage.double()):
        hidden = model.hidden(row[None, :-1])[0]
        z = hidden @ model.lm_head.weight[:V].T
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        logprobs = (z - z.logsumexp(-1, keepdim=True))[torch.arange(len(row) - 1), row[1:]]
        (-A * (logprobs * sampled[1:]).sum() / tokens).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    return {name: p.grad * min(1.0, 1.0 / (norm + 1e-6)) for name, p in model.named_parameters()}

def assert_equal(ours, theirs, tolerance):
    """Asserts that the distance between all gradients is below `tolerance` times their norm."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    apart = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    length = sum(gradient.double().square().sum() for gradient in theirs.values())
    distance = (apart / length).sqrt()
    assert distance < tolerance, f"gradients are {distance:.1e} apart"

def check_gradient(ours):
    """Our step against float64, on a CPU: two groups, one of them tied; one reply is shorter."""
    model = copy.deepcopy(ours.model).use("cpu")
    prompts = [ours.prompts[0]] * 6
    done = Engine(model, ours.engine.tokenizer, python=None).generate(prompts[:1], 8, 6)
    done[1] = Completion(done[1].ids[:5], done[1].sampled[:5])
    ids, mask = rollout_tensors(prompts, done, pad=0)
    advantage = advantages(torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])).flatten()
    torch.testing.assert_close(advantage, torch.tensor([-1 / 3, 2 / 3, -1 / 3, 0, 0, 0]))
    assert_equal(our_gradient(model, ids, mask, advantage, "cpu"),
                 policy_gradient(model, ids, mask, advantage), 1e-4)

def check_against_trl(ours, trainer, gradients, device):
    """From TRL's replies our code must compute its advantages, from its batch its gradient."""
    batch = trainer.batch       # TRL shuffles it
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
    named = dict(file_tensor(name, gradient, V) for name, gradient in mine.items())
    tolerance = 1e-4 if ours.model.compute_dtype == torch.float32 else 0.05
    assert_equal(named, gradients, tolerance)

# ---- TRL -----------------------------------------------------------------------------------------

def marked_trainer():
    """TRL's GRPOTrainer, which calls self.mark() after it generated and after it computed rewards,
    and keeps the batch from which it learns."""
    from trl import GRPOTrainer

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

    return Marked

def trl_trainer(ours, steps, device, folder):
    """The marked trainer with our model and our tokenizer, which go through files in `folder`."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging
    from trl import GRPOConfig
    logging.disable_progress_bar()
    save_checkpoint(folder, ours.model)
    ours.tokenizer.export_hf(f"{folder}/tokenizer.json")
    texts = questions(len(ours.prompts))
    cuda = "cuda" in device
    config = GRPOConfig(
        output_dir=folder, max_steps=steps, num_generations=ours.group_size, temperature=1.0,
        per_device_train_batch_size=len(texts) * ours.group_size, shuffle_dataset=False,
        max_completion_length=ours.new_tokens, generation_kwargs=dict(
            min_new_tokens=ours.new_tokens),
        beta=0.0, loss_type="bnpo", scale_rewards="none", epsilon=LEARNING.clip[0],
        learning_rate=LEARNING.lr, lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0,
        gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return marked_trainer()(
        GPT2LMHeadModel.from_pretrained(folder, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        args=config, reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        train_dataset=Dataset(InMemoryTable.from_pydict(dict(prompt=texts)), fingerprint="texts"),
        processing_class=PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json",
                                                 eos_token="<|endoftext|>", pad_token="<|pad|>"))

# ---- Measuring -----------------------------------------------------------------------------------

class Times:
    """ms: {contender: [[generate, reward, learn] of each step]}; memory_mb on a GPU: {contender: MB
    beside the models}."""

    def __init__(self, device):
        self.clock = Clock(device)
        self.cuda = "cuda" in device
        self.ms = {}
        self.memory_mb = {}

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

def in_turns_with_trl(ours, times, steps, device):
    """TRL's trainer runs its steps, and ours runs one before each of them except the first. In
    TRL's first step the two models are still equal, so its gradient is checked there."""
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
        trainer = trl_trainer(ours, steps, device, folder)
        trainer.mark = times.clock.mark
        trainer.add_callback(Turns())
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()

def rows_of(times, n_replies, warmup):
    """→ one row of figures for each contender, ours first; the first `warmup` steps are left out.
    TRL's step that is checked is left out, too."""
    n_steps = len(times.ms["ours"]) - warmup
    steps = {}
    for label, ms in times.ms.items():
        steps[label] = [sum(phases) for phases in ms[-n_steps:]]
    rows = []
    for label, ms in times.ms.items():
        ms = ms[-n_steps:]
        phases = [statistics.median(phase) for phase in zip(*ms)]
        step = statistics.median(steps[label])
        row = dict(contender=label, all_ms=ms, ms=step, spread=spread(steps[label]), phases=phases,
                   replies_s=1000 * n_replies / step, memory_mb=times.memory_mb.get(label),
                   ours_faster_by=None)
        if label != "ours":
            row["ours_faster_by"] = ratio(steps[label], steps["ours"])
        rows.append(row)
    return sorted(rows, key=lambda row: row["contender"] != "ours")

def why_not_measured(shape):
    """Why TRL is not measured on a shape, or None."""
    if shape.modern:
        return "not measured: TRL has no dN"
    absent = [name for name in ("trl", "transformers", "datasets")
              if importlib.util.find_spec(name) is None]
    return f"not measured: pip install {' '.join(absent)}" if absent else None

def show_shape(name, shape, sizes, rows, why):
    """Prints the table of one shape. why: the reason that TRL is not measured, or None."""
    n_prompts, group_size, new_tokens = sizes
    head = [f"{name}: {shape.L} layers, {shape.C} channels; {n_prompts} x {group_size} replies "
            f"of {new_tokens} tokens", "generate ms", "reward ms", "learn ms", "step ms", "spread",
            "replies/s", "MB beside the models", "ours is faster by"]
    lines = [[row["contender"], *row["phases"], row["ms"], row["spread"], row["replies_s"],
              row["memory_mb"], row["ours_faster_by"]] for row in rows]
    if why:
        lines.append(["TRL", why, *[None] * 7])
    table(head, lines)

def main():
    parser = argparse.ArgumentParser(description="a GRPO step, beside TRL's")
    shape_flags(parser, repeats=5, timed="steps")
    args = parser.parse_args()
    where, shapes = chosen_shapes(args, SHAPES)
    sizes = SIZES[where]
    n_prompts, group_size, _ = sizes
    warmup = 1
    report = {}
    for name, shape in shapes.items():
        times = Times(args.device)
        ours = Ours(shape, sizes, args.device)
        check_gradient(ours)
        why = why_not_measured(shape)
        if why:
            for _ in range(warmup + args.repeats):
                times.step(ours)
        else:       # TRL's first step has no step of ours beside it
            in_turns_with_trl(ours, times, 1 + warmup + args.repeats, args.device)
        rows = rows_of(times, n_prompts * group_size, warmup)
        show_shape(name, shape, sizes, rows, why)
        report[name] = dict(rows=rows, not_measured=why)
    finish("rl", device=args.device, shapes=report)

if __name__ == "__main__":
    main()
