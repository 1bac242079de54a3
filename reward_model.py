r"""
A reward model: preferences → a model that scores replies, in place of the person who ranked them.

    python rl_grpo.py reward_model --model runs/demo-sft --data prefs.jsonl --out runs/demo-reward
    torchrun --standalone --nproc_per_node=8 reward_model.py --model runs/d24-sft \
        --data harmless-base.jsonl.gz oasst_trees.jsonl.gz --out runs/d24-reward            # 8 GPUs
    python rl_grpo.py --reward model:runs/demo-reward --kl 0.1 --max_kl 10 \
        --model runs/demo-sft --task prompts.jsonl --out runs/demo-rlhf                     # RLHF

    in:  an assistant's run; preferences (preferences.py), which `rl_grpo.py rank` can make
    out: <run>/model.safetensors, config.json, tokenizer, log.jsonl, state/ for --resume

The assistant's own network reads a prompt with a reply, and a new head turns what stands at the
last token into one number. By the model of Bradley and Terry, reply a is preferred to b with
probability σ(r_a - r_b), so the loss of a pair is -ln σ(r_better - r_worse). Only differences are
learnt. All K (K - 1) / 2 pairs of a ranking are compared after one forward pass over its K replies.

The score is a stand-in for what people like, and it is right only where replies look like those
that people ranked. A policy that is trained against it for long leaves that region: the score still
rises while the replies become worse. Watch --gold and the KL, and stop early (--max_kl).

Papers: Bradley and Terry (1952), Stiennon et al. (arXiv 2009.01325), InstructGPT (2203.02155), Gao
et al. on overoptimisation (2210.10760).
Differs from InstructGPT: the learning rate falls linearly, and the scores are scaled to mean 0 and
standard deviation 1 over replies that were trained on, so that --kl means the same for any model.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model import GPT, Linear, load_checkpoint
from problems import CheckerReward
from sample import check_above_0, check_at_least, find_run, load_tokenizer
from training import (Optimizer, RunLog, already_trained, catch_signals, check_finite, contents,
                      finish, init_ranks, load_state, save_run)

ROWS = 64               # replies in one forward and backward pass, or one ranking that has more
SCALE_ROWS = 512        # replies over which scores get mean 0 and standard deviation 1

# ---- The model and its loss ----------------------------------------------------------------------

class RewardModel(GPT):
    """A GPT that gives each row one number instead of logits: model(idx, last) → rewards (B,).

    idx int64 (B, T), padded on the right with anything; last int64 (B,): where each row's last
    token stands. The head begins as in Stiennon et al.: N(0, 1 / (C + 1)).
    """
    model_types = ("deepdive_reward",)

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head                # no token is predicted
        self.score = Linear(config.n_embd, 1, bias=False)
        torch.nn.init.normal_(self.score.weight, std=(config.n_embd + 1) ** -0.5)

    def forward(self, idx, last):
        hidden = self.hidden(idx)                                               # (B, T, C)
        at_end = hidden[torch.arange(len(idx), device=idx.device), last]        # (B, C)
        return self.score(at_end).float()[:, 0]

def with_reward_head(gpt, seed):
    """An assistant → a RewardModel with its weights and a new head, on the same device."""
    torch.manual_seed(seed)
    model = RewardModel(gpt.config)
    missing, _ = model.load_state_dict(gpt.state_dict(), strict=False)
    assert missing == ["score.weight"], missing
    return model.use(gpt.wte.weight.device)

def ranking_loss(rewards, better, worse, weights):
    """Bradley-Terry: rewards (N,); pairs of indices better, worse (P,) and their weights (P,) → the
    weighted sum of -ln σ(r_better - r_worse), in nats.

    >>> one = torch.tensor([1.0])
    >>> ranking_loss(torch.tensor([2.0, 2.0]), torch.tensor([0]), torch.tensor([1]), one)
    tensor(0.6931)
    """
    return (weights * F.softplus(rewards[worse] - rewards[better])).sum()

# ---- Preferences → rows of tokens ----------------------------------------------------------------

@dataclass
class Ranking:
    """A preference as tokens."""
    rows: list              # ids of the prompt with each reply
    pairs: list             # [(index of the better reply, index of the worse one)]
    lengths: list           # characters of each reply
    hash: float             # of the prompt, from 0 to 1: equal prompts have the same

def reply_ids(tokenizer, messages, reply):
    """The ids of a prompt and a reply, which end with <|im_end|>: there the head reads."""
    return tokenizer.render([*messages, dict(role="assistant", content=reply)])[0]

def rankings(preferences, tokenizer, block_size, log):
    """Preferences → Rankings. Replies that make more than block_size tokens with their prompt are
    left out, and how many is logged. Raises SystemExit if no pair is left."""
    found = []
    n_pairs = too_long = 0
    for preference in preferences:
        rows = [reply_ids(tokenizer, preference.messages, reply) for reply in preference.replies]
        fits = [i for i, row in enumerate(rows) if len(row) <= block_size]
        too_long += len(rows) - len(fits)
        place = {i: n for n, i in enumerate(fits)}
        pairs = [(place[i], place[j]) for i, j in preference.pairs() if i in place and j in place]
        if pairs:
            found.append(Ranking([rows[i] for i in fits], pairs,
                                 [len(preference.replies[i]) for i in fits],
                                 hash_of(preference.messages)))
            n_pairs += len(pairs)
    log.say(f"{len(found)} rankings with {n_pairs} pairs; left out: {too_long} replies of more "
            f"than {block_size} tokens with their prompt")
    if not found:
        raise SystemExit("no pair of replies is left to compare; give other --data, or a model "
                         "with a larger block_size")
    return found

def hash_of(messages):
    """A number from 0 to 1, equal for equal prompts."""
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64

def hold_out(found, fraction):
    """→ (Rankings to train on, Rankings to evaluate on). The hash of its prompt decides, so that
    all rankings of a prompt are on one side. Raises SystemExit if one side is empty."""
    held = [ranking for ranking in found if ranking.hash < fraction]
    train = [ranking for ranking in found if ranking.hash >= fraction]
    if not train or not held:
        raise SystemExit(f"--val_fraction {fraction} leaves {len(train)} rankings to train on and "
                         f"holds out {len(held)}; change it, or give more --data")
    return train, held

def rows_tensors(rows, pad, device):
    """Rows of ids → idx (N, T) int64, padded on the right, and last (N,), as RewardModel wants."""
    last = torch.tensor([len(row) - 1 for row in rows])
    idx = torch.full((len(rows), int(last.max()) + 1), pad)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = torch.tensor(row)
    return idx.to(device), last.to(device)

def pair_tensors(batch, device):
    """Rankings whose rows stand one after another → better, worse int64 (P,), weights (P,). The
    pairs of a ranking share a weight of 1, so that a prompt with more replies counts no more."""
    better = []
    worse = []
    weights = []
    first = 0
    for ranking in batch:
        better += [first + i for i, _ in ranking.pairs]
        worse += [first + j for _, j in ranking.pairs]
        weights += [1 / len(ranking.pairs)] * len(ranking.pairs)
        first += len(ranking.rows)
    return (torch.tensor(better, device=device), torch.tensor(worse, device=device),
            torch.tensor(weights, device=device))

def in_parts(batch):
    """Cuts a list of Rankings into lists that have at most ROWS replies, or a single ranking."""
    parts = [[]]
    for ranking in batch:
        n_rows = sum(len(other.rows) for other in parts[-1])
        if parts[-1] and n_rows + len(ranking.rows) > ROWS:
            parts.append([])
        parts[-1].append(ranking)
    return parts

def batch_at(step, size, count, seed):
    """The indices of the `size` rankings of a step, out of `count`, each epoch in its own order."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        order = random.Random(f"{seed} {epoch}").sample(range(count), count)
        indices.append(order[place])
    return indices

def add_gradients(model, batch, total, pad, ranks):
    """Adds the gradients of this rank's rankings, of the `total` of a step, to the parameters →
    this rank's part of the loss, which is one mean over all rankings of the step."""
    loss = 0.0
    for part in in_parts(batch) if batch else []:
        rows = [row for ranking in part for row in ranking.rows]
        better, worse, weights = pair_tensors(part, ranks.device)
        rewards = model(*rows_tensors(rows, pad, ranks.device))
        part_loss = ranking_loss(rewards, better, worse, weights / total)
        (part_loss * ranks.world_size).backward()       # average_grads() divides by it
        loss += part_loss.item()
    return loss

# ---- Measuring -----------------------------------------------------------------------------------

@torch.inference_mode()
def rewards_of(model, rows, pad, size=ROWS):
    """Rows of ids → their rewards, a list of floats. `size` rows pass through the model at a
    time, those of about the same length together."""
    device = model.wte.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), size):
        chosen = order[start:start + size]
        rewards = model(*rows_tensors([rows[i] for i in chosen], pad, device))
        for i, reward in zip(chosen, rewards.tolist()):
            found[i] = reward
    return found

def pair_accuracy(pairs, scores):
    """The share of pairs in which the better reply has the higher score; a tie counts a half.

    >>> pair_accuracy([(0, 1), (0, 2)], [3.0, 1.0, 3.0])
    0.75
    """
    points = 0.0
    for better, worse in pairs:
        if scores[better] > scores[worse]:
            points += 1
        elif scores[better] == scores[worse]:
            points += 0.5
    return points / len(pairs)

def evaluate(model, held, pad, ranks):
    """Held-out Rankings → figures: val_loss; the accuracy over pairs, averaged over prompts, with
    its standard error; and that of the rule that the longer reply is better. Chance is 0.5. The
    pairs of a prompt are not independent, so prompts are what the standard error counts."""
    totals = [0.0] * 4
    mine = held[ranks.rank::ranks.world_size]
    for ranking in mine:
        scores = rewards_of(model, ranking.rows, pad, size=len(ranking.rows))
        better, worse, weights = pair_tensors([ranking], "cpu")
        accuracy = pair_accuracy(ranking.pairs, scores)
        totals[0] += ranking_loss(torch.tensor(scores), better, worse, weights).item()
        totals[1] += accuracy
        totals[2] += accuracy ** 2
        totals[3] += pair_accuracy(ranking.pairs, ranking.lengths)
    loss, accuracy, square, by_length = (total / len(held) for total in ranks.sum(*totals))
    error = math.sqrt(max(0.0, square - accuracy ** 2) / max(1, len(held) - 1))
    return dict(val_loss=loss, accuracy=accuracy, accuracy_error=error, longer_wins=by_length)

def scale_of(model, train, pad):
    """The mean and the standard deviation of the rewards of the first SCALE_ROWS replies."""
    rows = [row for ranking in train[:SCALE_ROWS] for row in ranking.rows][:SCALE_ROWS]
    rewards = torch.tensor(rewards_of(model, rows, pad), dtype=torch.float64)
    return dict(reward_mean=rewards.mean().item(), reward_std=rewards.std().item() + 1e-6)

# ---- Rewards for rl_grpo.py: score(problems, replies) → a list of floats -------------------------

class ModelReward:
    """The scores of a reward model, in standard deviations of the replies that it was trained on.
    cut_off is the score of a reply that did not end, which no person has ranked."""
    cut_off = -3.0

    def __init__(self, run, device):
        found = find_run(run, ("reward",))
        self.model, self.meta = load_checkpoint(found, device, architecture=RewardModel)
        self.model.eval()
        self.tokenizer = load_tokenizer(found)
        self.mean = self.meta.get("reward_mean")
        self.std = self.meta.get("reward_std")
        if not isinstance(self.mean, float) or not isinstance(self.std, float) or self.std <= 0:
            raise SystemExit(f"{found}/config.json has no reward_mean and reward_std; train the "
                             "reward model again")
        # of the weights, for the settings of a run that --resume must not change
        self.contents = contents(self.model.score.weight.flatten().tolist())

    def score(self, problems, replies):
        """A problem has "messages"; replies are texts. Raises SystemExit if a score is not finite.
        """
        rows = [reply_ids(self.tokenizer, problem["messages"], reply.strip())
                for problem, reply in zip(problems, replies)]
        fits = [i for i, row in enumerate(rows) if len(row) <= self.model.config.block_size]
        scores = [self.cut_off] * len(rows)
        pad = self.tokenizer.special["<|pad|>"]
        for i, reward in zip(fits, rewards_of(self.model, [rows[i] for i in fits], pad)):
            scores[i] = (reward - self.mean) / self.std
        if not all(map(math.isfinite, scores)):
            raise SystemExit(f"{self.meta['run']} gives a score that is not finite; its weights "
                             "are damaged; train the reward model again")
        return scores

class PythonReward:
    """A function of yours, (problem, reply) → a number, from FILE.py:FUNCTION: a scripted judge."""
    cut_off = None          # the function sees a reply that did not end as it is

    def __init__(self, flag, spec):
        path, _, name = spec.rpartition(":")
        self.spec = f"--{flag} {spec}"
        if not Path(path).is_file():
            raise SystemExit(f"{self.spec}: there is no file {path}; give FILE.py:FUNCTION")
        self.contents = contents(Path(path).read_text(encoding="utf-8"))
        found = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise SystemExit(f"{self.spec}: {path} defines no function {name}")

    def score(self, problems, replies):
        scores = []
        for problem, reply in zip(problems, replies):
            score = self.function(problem, reply)
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                raise SystemExit(f"{self.spec} must return a finite number, got {score}")
            scores.append(float(score))
        return scores

def load_reward(flag, spec, device):
    """What --reward, --gold or --judge names: checker, model:RUN or FILE.py:FUNCTION → an object
    with score()."""
    if spec.startswith("model:"):
        return ModelReward(spec.removeprefix("model:"), device)
    if spec == "checker":
        return CheckerReward()
    if ".py:" in spec:
        return PythonReward(flag, spec)
    raise SystemExit(f"--{flag} must be checker, model:RUN or FILE.py:FUNCTION, got {spec}")

# ---- Main ----------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(prog="rl_grpo.py reward_model",
                                     description="train a model that scores replies")
    add = parser.add_argument
    add("--model", help="run folder of an assistant (default: the newest one)")
    add("--data", nargs="+", required=True, help="files of preferences")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue from <out>/state, if there is one")
    add("--epochs", type=float, default=1.0, help="passes over the rankings; more soon overfit")
    add("--batch_size", type=int, default=16, help="rankings of a step, on all ranks together")
    add("--lr", type=float, default=3e-4, help="learning rate of AdamW; it falls linearly to 0")
    add("--val_fraction", type=float, default=0.1, help="share of the prompts that are held out")
    add("--eval_every", type=int, default=50, help="steps between evaluations")
    add("--save_every", type=int, default=100, help="steps between saved states")
    add("--seed", type=int, default=1337, help="seed of the head and of the rankings' order")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    check_at_least(1, args, "batch_size", "eval_every", "save_every")
    check_at_least(0, args, "seed")
    check_above_0(args, "epochs", "lr")
    if not 0 < args.val_fraction < 1:
        raise SystemExit(f"--val_fraction must be above 0 and below 1, got {args.val_fraction}")
    return args

def main():
    from preferences import read_preferences    # a room of its own for what others write
    args = parse_args()
    run = Path(args.out)
    signals = catch_signals()
    ranks = init_ranks(args.device)
    base = find_run(args.model, ("sft", "rl"))
    tokenizer = load_tokenizer(base)
    preferences, left_out = read_preferences(args.data)
    assistant, meta = load_checkpoint(base, ranks.device, vocab_size=tokenizer.n_vocab)
    model = with_reward_head(assistant, args.seed)
    adamw = dict(kind="adamw", lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer([dict(adamw, params=dict(model.named_parameters()))], ranks)
    pad = tokenizer.special["<|pad|>"]

    settings = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
                    val_fraction=args.val_fraction, base=meta["run"],
                    contents_of_data=contents([vars(one) for one in preferences]))
    state = load_state(run, args.resume, ranks, optimizer, model, settings) or {}
    first_step = step = state.get("step", 0)
    log = RunLog(run, 0, ranks, resume_step=state.get("step"))
    for line in left_out:
        log.say(line)
    train, held = hold_out(rankings(preferences, tokenizer, model.config.block_size, log),
                           args.val_fraction)
    max_steps = log.max_steps = max(1, round(args.epochs * len(train) / args.batch_size))
    if step >= max_steps:
        return already_trained(log, run, ranks, model, tokenizer, "reward", step, max_steps,
                               base=meta["run"], **scale_of(model, train, pad))
    log.header(args, model, ranks.device)
    log.say(f"{len(held)} prompts are held out, {len(train)} are trained on")

    def report_accuracy():
        found = evaluate(model, held, pad, ranks)
        log.say(f"step {step:{len(str(max_steps))}d}/{max_steps} | val_loss "
                f"{found['val_loss']:.4f} | held-out pairs {found['accuracy']:.3f} ± "
                f"{found['accuracy_error']:.3f} | the longer one {found['longer_wins']:.3f} | "
                "chance 0.500", step=step, **found)

    def save():
        save_run(run, ranks, optimizer, model, tokenizer, "reward",
                 dict(base=meta["run"], **scale_of(model, train, pad)), step=step,
                 settings=settings)

    started = time.perf_counter()
    stop = False
    while True:
        last = step == max_steps
        if (step % args.eval_every == 0 or last) and (step == 0 or step > first_step):
            report_accuracy()
        if last or stop or (step % args.save_every == 0 and step > first_step):
            save()
        if last or stop:
            break
        tick = time.perf_counter()
        chosen = batch_at(step, args.batch_size, len(train), args.seed)
        mine = [train[i] for i in chosen[ranks.rank::ranks.world_size]]
        loss = add_gradients(model, mine, len(chosen), pad, ranks)
        norm = optimizer.average_grads()
        loss, stops = ranks.sum(loss, len(signals))
        stop = stops > 0
        check_finite(f"step {step}", loss, norm)
        lr_scale = 1 - step / max_steps
        optimizer.step(lr_scale, grad_scale=min(1.0, 1.0 / (norm + 1e-6)))
        step += 1
        seconds_a_step = (time.perf_counter() - started) / (step - first_step)
        log(step, loss=loss, lr=lr_scale * args.lr, norm=norm,
            ms=1000 * (time.perf_counter() - tick), eta=seconds_a_step * (max_steps - step))
    finish(log, run, "reward", step, stopped=stop and not last)

if __name__ == "__main__":
    main()
