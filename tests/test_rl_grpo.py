"""
rl_grpo.py: the objective against REINFORCE written out by hand, the clip and the KL from their
definitions, the mask token by token; and a model that can only guess learns which guess pays.
"""
import copy
import doctest
import itertools
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import chat_sft
import rl_grpo
import tasks
from bpe import Tokenizer
from conftest import (GPT2, MODERN, assert_same_files, in_fp64, mutate, noisy, run_main, run_ranks,
                      stop_at)
from dialogs import Conversations
from model import file_tensor, file_tensors, load_checkpoint, save_checkpoint
from rl_grpo import (PromptCache, SharedPrompts, advantages, is_well_formed, keep_gradients, learn,
                     pass_at_k, policy_loss, read_answers, rollout, rollout_tensors,
                     sampled_entropy, spread_out, thinking_pays, thinking_tokens, token_logprobs,
                     write_answers)
from sample import Completion, Engine
from training import Optimizer, Ranks, init_ranks, read_log

COLOURS = dict(red="red even", blue="blue odd", green="green odd", black="black even")


# ---- advantages

def test_docstring_example_is_true():
    result = doctest.testmod(rl_grpo)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("size", [2, 3, 7])
def test_advantages_of_a_group_sum_to_zero_and_of_a_tied_group_are_zero(size):
    rewards = torch.rand(50, size, generator=torch.Generator().manual_seed(0)).round()
    rewards[0], rewards[1] = 1.0, 0.0
    for divide_by_std in (False, True):
        found = advantages(rewards, divide_by_std)
        assert found.sum(1).abs().max() < 1e-5 and (found[:2] == 0).all()
    std = found[(rewards.std(1) > 0)].std(1)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=4e-4, atol=0)


# ---- the objective

def some_logprobs(seed=0, N=4, T=6):
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(N, T, generator=generator)


def check_reinforce():
    """At ratio 1 the gradient is that of -Σ A log π over sampled tokens."""
    logprobs, A = some_logprobs().requires_grad_(), torch.tensor([0.5, -0.5, 0.0, 2.0])
    mask = (some_logprobs(1) > -1.5).float()
    loss, _ = policy_loss(logprobs, logprobs.detach(), None, A, mask, clip=(0.2, 0.2), kl=0.0)
    loss.backward()
    assert torch.equal(logprobs.grad, -A[:, None] * mask) and 5 < mask.sum() < 20


def test_on_policy_gradient_is_plain_reinforce():
    check_reinforce()


def check_clip():
    """The clip takes the gradient away only where the ratio has already moved A's way, too far."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
    for A, live in ((1.0, ratio < 1.2), (-1.0, ratio > 0.8)):
        logprobs = ratio.log()[None].requires_grad_()
        loss, _ = policy_loss(logprobs, torch.zeros(1, 7), None, torch.tensor([A]),
                              torch.ones(1, 7), clip=(0.2, 0.2), kl=0.0)
        loss.backward()
        expected = torch.where(live, -A * ratio, 0.0)       # d(-ratio A) / d log π = -ratio A
        torch.testing.assert_close(logprobs.grad[0], expected)
        limit = ratio.clamp(max=1.2) if A > 0 else ratio.clamp(min=0.8)
        assert loss.item() == pytest.approx((-A * limit).sum().item())


def test_clip_acts_only_outside_and_on_the_side_it_should():
    check_clip()


def check_k3():
    """Never negative, 0 for equal models; its mean under π is KL(π ‖ π_ref), exactly."""
    logits, ref_logits = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).double()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    zero, ones = torch.zeros(5).double(), torch.ones(5, 40).double()
    for i in range(40):
        _, k3 = policy_loss(logp[:, i:i + 1], logp[:, i:i + 1], ref[:, i:i + 1], zero,
                            ones[:, :1], (0.2, 0.2), 0.7)
        assert k3 >= 0
    _, mean = policy_loss(logp, logp, ref, zero, logp.exp(), (0.2, 0.2), 0.7)
    torch.testing.assert_close(mean, (logp.exp() * (logp - ref)).sum())
    loss, equal = policy_loss(logp, logp, logp, zero, ones, (0.2, 0.2), 0.7)
    assert equal == 0 and loss == 0
    loss, _ = policy_loss(logp, logp, ref, zero, logp.exp(), (0.2, 0.2), 0.7)
    torch.testing.assert_close(loss, 0.7 * mean)


def test_k3_is_an_estimate_of_the_kl_that_is_never_negative():
    check_k3()


def check_gradient_of_the_kl():
    """The mean gradient under π, over all tokens, is that of KL(π ‖ π_ref) itself."""
    logits, ref_logits = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).double()
    logits.requires_grad_()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    [expected] = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    loss, _ = policy_loss(logp, logp.detach(), ref, torch.zeros(5), logp.detach().exp(), (0.2, 0.2),
                          0.7)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], 0.7 * expected)


def test_the_gradient_of_the_kl_term_is_that_of_the_kl():
    check_gradient_of_the_kl()


def test_without_a_reference_there_is_no_kl():
    logprobs, A = some_logprobs(), torch.tensor([1.0, 0.0, -1.0, 2.0])
    loss, k3 = policy_loss(logprobs, logprobs, None, A, torch.ones(4, 6), (0.2, 0.2), kl=9.0)
    assert k3 == 0 and loss.item() == pytest.approx(-12.0)


# ---- tokens and masks

def written():
    """Two completions behind prompts of 2 and 4 tokens; in the first a tool said 8, 9."""
    return [[1, 2], [1, 2, 3, 4]], [
        Completion([5, 6, 8, 9, 7], [True, True, False, False, True], "stop"),
        Completion([5], [True], "length")]


def check_mask():
    ids, mask = rollout_tensors(*written(), pad=99)
    assert ids.tolist() == [[1, 2, 5, 6, 8, 9, 7], [1, 2, 3, 4, 5, 99, 99]]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]]


def test_mask_never_covers_prompt_padding_or_tool_output():
    check_mask()


def test_token_logprobs_are_those_of_the_next_tokens(base_run):
    model, _ = load_checkpoint(base_run)
    ids = torch.randint(0, 400, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    expected = model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask
    found = token_logprobs(model, ids, mask, rows=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def groups_of_replies(model, seed):
    """Three groups that share prompts, of which one fills the context: ids (N, T + 1), mask (N, T),
    with tool outputs between sampled tokens."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(least, most, size):
        return torch.randint(least, most, (size,), generator=generator).tolist()

    prompts, completions = [], []
    for length in (1, 9, model.config.block_size - 6):
        prompt = numbers(1, 65, length)
        for size in numbers(1, 6, 4) if length > 9 else numbers(1, 20, 4):
            prompts.append(prompt)
            completions.append(Completion(numbers(1, 65, size), [True, *numbers(0, 2, size - 1)]))
    ids, mask = rollout_tensors(prompts, completions, pad=0)
    return ids, mask[:, 1:]


def check_shared_prompts(config):
    """Log probabilities and gradients of the slow twin, in fp64; in parts of 5 rows."""
    with in_fp64():
        model, twin = noisy(config).double(), noisy(config).double()
        ids, mask = groups_of_replies(model, seed=0)
        weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
        expected = token_logprobs(twin, ids, mask.double())
        (expected * weight).sum().backward()
        batch = SharedPrompts(ids, mask.double(), config.block_size, rows=5)
        cache = PromptCache(model, batch.prompts)
        for part in batch.parts:
            found = cache.logprobs(part)
            torch.testing.assert_close(found[part.mask > 0], expected[part.rows][mask[part.rows] > 0])
            (found[part.mask > 0] * weight[part.rows][mask[part.rows] > 0]).sum().backward()
        cache.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    return batch


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_prompts_that_rows_share_are_read_once_and_change_nothing(config):
    batch = check_shared_prompts(config)
    assert len(batch.prompts) == 3 and len(batch.parts) == 3
    longest = [part.mask.shape[1] for part in batch.parts]
    assert longest == sorted(longest) and longest[0] < longest[-1]


@pytest.mark.parametrize("owner, name, old, new", [
    (SharedPrompts, "__init__", "block_size - longest", "block_size"),
    (SharedPrompts, "__init__", "at[:, :-1] >= end[part, None]", "at[:, :-1] < 0"),
    (PromptCache, "append", "self.model.config.block_size", "0"),
    (PromptCache, "append", "[self.part.prompt], v)", "[self.part.prompt * 0], v)"),
    (PromptCache, "logprobs", "self.pos = part.start", "self.pos = 0 * part.start")], ids=str)
def test_the_check_of_shared_prompts_notices_a_mutant(owner, name, old, new, monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, IndexError)):
        check_shared_prompts(MODERN)


FLAGS = dict(updates=1, loss="dapo", clip=(0.2, 0.2), kl=0.0, max_new_tokens=8)


def grads_of_learn(model, prompts, completions, advantage, reference=None, keep=None, **changes):
    optimizer = Optimizer([dict(kind="adamw", params=dict(model.named_parameters()), lr=1e-3,
                                betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)])
    optimizer.step = lambda *_, **__: None                  # which would clear the gradients
    ids, mask = rollout_tensors(prompts, completions, pad=0)
    args = SimpleNamespace(**{**FLAGS, **changes})
    loss, norm, kl = learn(model, optimizer, Ranks(), ids, mask, advantage, args, 1.0, reference,
                           keep)
    return {name: p.grad for name, p in model.named_parameters()}, loss, norm, kl


def check_learn(base_run):
    """Each reply scored by itself, unpadded, with log_softmax; one mean over sampled tokens."""
    prompts, completions = written()
    advantage = torch.tensor([0.5, -1.0])
    found, loss, norm, kl = grads_of_learn(load_checkpoint(base_run)[0], prompts, completions,
                                           advantage)
    model, _ = load_checkpoint(base_run)
    total = count = 0
    for p, c, A in zip(prompts, completions, advantage):
        logp = model(torch.tensor([p + c.ids])).log_softmax(-1)[0]
        for i, (token, sampled) in enumerate(zip(c.ids, c.sampled)):
            total, count = total - sampled * A * logp[len(p) + i - 1, token], count + sampled
    (total / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert count == 4 and norm == pytest.approx(expected, rel=1e-4) and kl is None
    assert loss == pytest.approx(-advantage.repeat_interleave(torch.tensor([3, 1])).mean().item())


def updated_twice(model, then, reference, ids, mask, advantage, **changes):
    """The loss and gradients of learn's second update, in which the model has the weights of
    `then`; the first one only says what the policy was."""
    optimizer = Optimizer([dict(kind="adamw", params=dict(model.named_parameters()))])

    def step(*_, **__):
        if optimizer.steps == 0:
            model.load_state_dict(then.state_dict())
            optimizer.zero_grad()
        optimizer.steps += 1

    optimizer.step = step
    args = SimpleNamespace(**{**FLAGS, "updates": 2, **changes})
    loss, *_ = learn(model, optimizer, Ranks(), ids, mask, advantage, args, 1.0, reference)
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trl_batch():
    """Three groups of four replies of up to 8 tokens, with tool outputs in them. No group is tied.
    The prompts are equally long, because transformers' GPT-2 counts padding as positions."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.tensor([[1., 0, 0, 1], [0, 0.5, 1, 0], [1, 1, 0, 1]])
    prompts, completions = [], []
    for _ in rewards:
        prompt = torch.randint(1, 60, (5,), generator=generator).tolist()
        for n in torch.randint(1, 9, (4,), generator=generator).tolist():
            ids = torch.randint(1, 60, (n,), generator=generator).tolist()
            sampled = torch.randint(0, 2, (n,), generator=generator).bool().tolist()
            prompts.append(prompt)
            completions.append(Completion(ids, [True, *sampled[1:]]))
    return prompts, completions, rewards


def trl_trainer(model, reference, tokenizer, prompts, completions, rewards, folder, **options):
    """TRL's GRPOTrainer, whose model "writes" these replies. It always computes in fp32."""
    from datasets import Dataset
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    class Fixed(GRPOTrainer):
        def _generate(self, asked):
            sampled = [[int(s) for s in c.sampled] for c in completions]
            return (prompts, [c.ids for c in completions], sampled, [""] * len(asked), None, {}, None,
                    None)

    save_checkpoint(folder, model, tokenizer)
    tokenizer.export_hf(folder / "hf.json")
    config = GRPOConfig(output_dir=str(folder), num_generations=4, num_iterations=2, use_cpu=True,
                        per_device_train_batch_size=12, max_completion_length=8, temperature=1.0,
                        bf16=False, report_to="none", gradient_checkpointing=False, **options)
    trainer = Fixed(
        GPT2LMHeadModel.from_pretrained(folder), args=config,
        reward_funcs=lambda **_: rewards.flatten().tolist(),
        train_dataset=Dataset.from_dict(dict(prompt=["?"])),
        processing_class=PreTrainedTokenizerFast(tokenizer_file=str(folder / "hf.json"),
                                                 eos_token="<|endoftext|>", pad_token="<|pad|>"))
    trainer.current_gradient_accumulation_steps = 1
    if trainer.ref_model:
        load_into(trainer.ref_model, reference)
    return trainer


@torch.no_grad()
def load_into(theirs, ours):
    """Gives transformers' GPT-2 the weights of ours."""
    tensors = dict(file_tensors(ours))
    for name, p in theirs.named_parameters():
        p.copy_(tensors[name])


@pytest.mark.parametrize("loss, std, kl", [
    ("grpo", True, 0.3), ("dr_grpo", False, 0.0), ("bnpo", False, 0.3), ("dapo", True, 0.0)])
def test_loss_and_gradients_are_those_of_trl(loss, std, kl, trl_batch, tokenizer, tmp_path):
    pytest.importorskip("trl")
    prompts, completions, rewards = trl_batch
    models = [noisy(replace(GPT2, vocab_size=tokenizer.n_vocab), seed, 0.05) for seed in range(3)]
    trainer = trl_trainer(models[0], models[2], tokenizer, *trl_batch, tmp_path, loss_type=loss,
                          beta=kl, epsilon=0.1, epsilon_high=0.25,
                          scale_rewards="group" if std else "none")
    batch = trainer._generate_and_score_completions([dict(prompt="?")] * 12)
    load_into(trainer.model, models[1])
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    ids, mask = rollout_tensors(prompts, completions, pad=0)
    reference = models[2].double() if kl else None
    with in_fp64():
        found, grads = updated_twice(models[0].double(), models[1].double(), reference, ids,
                                     mask.double(), advantages(rewards, std).flatten().double(),
                                     loss=loss, kl=kl, clip=(0.1, 0.25))
    assert abs(found - expected.item()) < 1e-6
    ours = dict(file_tensor(name, grad, tokenizer.n_vocab) for name, grad in grads.items())
    apart = sum((ours[name] - theirs[name]).square().sum() for name in ours).sqrt()
    assert apart < 1e-6 * sum(grad.square().sum() for grad in ours.values()).sqrt()


def test_learn_follows_the_policy_gradient_of_the_sampled_tokens(base_run):
    check_learn(base_run)


def test_tied_groups_contribute_nothing(base_run):
    prompts, completions = written()
    alone, *_ = grads_of_learn(load_checkpoint(base_run)[0], prompts[:1], completions[:1],
                               torch.tensor([0.5]))
    beside, *_ = grads_of_learn(load_checkpoint(base_run)[0], prompts, completions,
                                torch.tensor([0.5, 0.0]))
    for name in alone:
        torch.testing.assert_close(beside[name], alone[name], rtol=1e-4, atol=1e-7)
    model, _ = load_checkpoint(base_run)
    none, loss, norm, _ = grads_of_learn(model, prompts, completions, torch.zeros(2))
    assert loss == norm == 0 and all((grad == 0).all() for grad in none.values())


def test_tied_groups_have_the_gradient_of_the_kl_when_it_is_asked_for(base_run):
    model, _ = load_checkpoint(base_run)
    reference = copy.deepcopy(model)
    _, _, norm, kl = grads_of_learn(model, *written(), torch.zeros(2), reference, kl=0.5)
    assert norm == kl == 0                                  # equal models are not pulled
    with torch.no_grad():
        model.ln_f.weight.mul_(1.5)
    grads, loss, norm, kl = grads_of_learn(model, *written(), torch.zeros(2), reference, kl=0.5)
    assert kl > 0 and norm > 0 and loss == pytest.approx(0.5 * kl)
    with torch.no_grad():                                   # downhill is back to the reference
        for name, p in model.named_parameters():
            p.sub_(0.01 / norm * grads[name])
    assert grads_of_learn(model, *written(), torch.zeros(2), reference, kl=0.5)[3] < kl


def rewarded(tokenizer, replies):
    """Rewards of four replies, (text, finish), to two problems: their answers are 7 and 8."""
    completions = []
    for text, finish in replies:
        ids = tokenizer.encode(text, allowed_special="all")
        if finish == "stop":
            ids = [*ids, tokenizer.special["<|im_end|>"]]
        completions.append(Completion(ids, [True] * len(ids), finish))
    engine = Engine(SimpleNamespace(), tokenizer)
    engine.generate = lambda *_, **__: completions
    problems = [dict(messages=[dict(role="user", content="?")], answer=a, check="final")
                for a in "78"]
    args = SimpleNamespace(max_new_tokens=9, group_size=2)
    prompts, _, rewards = rollout(engine, problems, args, seed=0)
    assert len(prompts) == 4
    return rewards.tolist()


def test_replies_that_were_cut_off_earn_nothing(tokenizer):
    replies = [("#### 7", "stop"), ("#### 7", "length"), ("", "stop"), ("#### 7", "stop")]
    assert rewarded(tokenizer, replies) == [[1, 0], [0, 0]]


def test_an_answer_that_is_only_thought_earns_nothing(tokenizer):
    replies = [("<|think|>is it #### 8<|/think|>It is #### 7", "stop"),
               ("It is <|think|>#### 7", "stop"), ("<|think|>x<|/think|>#### 8", "stop"),
               ("#### 7<|think|>#### 8<|/think|>", "stop")]
    assert rewarded(tokenizer, replies) == [[1, 0], [1, 0]]


@pytest.mark.parametrize("text, tokens, is_good", [
    ("<|think|>ab<|/think|>c", 2, True), ("<|think|><|/think|>c", 0, False), ("abc", 0, False),
    ("<|think|>ab<|/think|>", 2, False), ("<|think|>abc", 3, False), ("", 0, False),
    ("a<|think|>b<|/think|>c", 1, False), ("<|think|>a<|think|>b<|/think|>c", 2, False),
    ("<|think|>a<|/think|>b<|/think|>c", 1, False), ("<|/think|>a<|think|>b", 2, False)])
def test_a_reply_is_well_formed_if_it_thinks_once_and_then_speaks(text, tokens, is_good, tokenizer):
    text = text.replace("b<|", " b<|").replace("bc", " b c")         # a letter is a token
    ids = [*tokenizer.encode(text, allowed_special="all"), tokenizer.special["<|im_end|>"]]
    assert is_well_formed(ids, tokenizer.special) is is_good
    assert thinking_tokens(ids[:-1], tokenizer.special) == tokens - text.startswith("<|/think")


# ---- what must not be lost

def check_keep(base_run):
    """weight times the gradient of the mean loss of the supervised tokens of the step's rows."""
    rendered = [([1, 2, 3 + i, 4, 5 + i], [0, 0, 1, 0, 1]) for i in range(2 * rl_grpo.KEEP_ROWS)]
    loader = chat_sft.Loader(Conversations.of(rendered), 4, 0, 99)
    rows = [rendered[c][0] for p in range(rl_grpo.KEEP_ROWS)
            for c in loader.row(rl_grpo.KEEP_ROWS + p)]
    found, expected = load_checkpoint(base_run)[0], load_checkpoint(base_run)[0]
    loss = keep_gradients(found, [(loader, 0.3)], 1, Ranks())
    logp = expected(torch.tensor(rows)).log_softmax(-1)
    mean = -sum(logp[i, t - 1, row[t]] for i, row in enumerate(rows) for t in (2, 4)) / 2 / len(rows)
    (0.3 * mean).backward()
    assert loss == pytest.approx(mean.item(), rel=1e-4)
    for one, other in zip(found.parameters(), expected.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_what_is_kept_adds_the_gradient_of_its_rows_with_its_weight(base_run):
    check_keep(base_run)


def test_keep_acts_in_every_update(base_run):
    calls = []
    grads_of_learn(load_checkpoint(base_run)[0], *written(), torch.tensor([0.5, -1.0]), updates=3,
                   keep=lambda: calls.append(1))
    assert len(calls) == 3


# ---- measuring

def test_pass_at_k_is_the_share_of_subsets_with_a_right_reply():
    for n, k in itertools.product((4, 6), (1, 2, 4)):
        for right in range(n + 1):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(share)


def test_the_entropy_is_that_of_the_tokens_that_were_sampled(base_run):
    model, _ = load_checkpoint(base_run)
    ids, mask = rollout_tensors(*written(), pad=99)
    logp = model(ids).log_softmax(-1)
    each = -(logp.exp() * logp).sum(-1)
    nats, tokens = sampled_entropy(model, ids, mask)
    assert tokens == 4 and nats == pytest.approx((each[:, :-1] * mask[:, 1:]).sum().item(), rel=1e-4)


def test_answers_after_a_step_are_forgotten_and_the_ends_are_shown(tmp_path):
    assert read_answers(tmp_path, 9) == [] and spread_out(list(range(21)), 3) == [0, 10, 20]
    rows = [dict(step=step, reply="\ud800 é") for step in (0, 5, 10)]
    write_answers(tmp_path, rows)
    assert [row["step"] for row in read_answers(tmp_path, 5)] == [0, 5]


def test_thinking_pays_compares_short_replies_with_long_ones():
    assert thinking_pays([1, 0, 1, 1], [2, 4, 18, 20]) == (11, 0.5, 1.0)
    assert thinking_pays([1.0, 0.0], [5, 5]) == (5, 0.5, 0.0)


# ---- runs

@pytest.fixture(scope="module")
def assistant(base_run, tmp_path_factory):
    """A model that was taught to call each colour "even" as often as "odd"."""
    folder = tmp_path_factory.mktemp("assistant")
    rows = [dict(messages=[dict(role="user", content=colour),
                           dict(role="assistant", content=f"#### {colour} {reply}")])
            for _ in range(8) for colour in COLOURS for reply in ("even", "odd")]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(chat_sft, "--model", base_run, "--data", folder / "sft.jsonl", "--out", folder / "sft",
             "--epochs", 12, "--lr", 1e-2, "--batch_size", 4)
    return folder / "sft"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    rows = [dict(question=colour, answer=answer, kind="colours")
            for colour, answer in COLOURS.items()]
    path = tmp_path_factory.mktemp("task") / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(assistant, task, out, **changes):
    given = {**dict(max_steps=6, prompts=4, group_size=4, max_new_tokens=16, lr=1e-3, save_every=4),
             **changes}
    return ["--model", assistant, "--task", task, "--out", out,
            *(text for key, value in given.items() for text in (f"--{key}", value))]


def logged(run, key):
    return [row[key] for row in read_log(run) if key in row]


@pytest.fixture(scope="module")
def whole(assistant, task, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    run_main(rl_grpo, *flags(assistant, task, run))
    return run


def check_bandit(assistant, task, run, *more):
    """Four questions, of which each has one right answer of two: from a half to nearly all."""
    run_main(rl_grpo, *flags(assistant, task, run, max_steps=40, group_size=16, lr=3e-3,
                             eval_every=20, save_every=99), *more)
    rewards = logged(run, "reward")
    assert rewards[0] < 0.75 and sum(rewards[-5:]) / 5 > 0.9, rewards


def test_a_model_that_can_only_guess_learns_which_guess_pays(assistant, task, tmp_path):
    check_bandit(assistant, task, tmp_path, "--held_out", task)
    model, meta = load_checkpoint(tmp_path)
    replies = Engine(model, Tokenizer.load(tmp_path)).answer(list(COLOURS), temperature=0)
    assert replies == [f"#### {answer}" for answer in COLOURS.values()]
    assert (meta["stage"], meta["step"], meta["base"]) == ("rl", 40, str(assistant))
    accuracy = logged(tmp_path, "accuracy")
    assert len(accuracy) == 3 and accuracy[-1] == 1.0 > accuracy[0]


@pytest.mark.parametrize("more", [["--updates", 3, "--lr", 1.5e-3], ["--loss", "grpo+std"], ["--kl", 0.01]],
                         ids=str)
def test_grpos_own_terms_learn_too(more, assistant, task, tmp_path):
    check_bandit(assistant, task, tmp_path, *more)
    assert len(logged(tmp_path, "kl")) == (40 if "--kl" in more else 0)


@pytest.mark.parametrize("more", [[], ["--updates", 2, "--kl", 0.1]], ids=str)
def test_stopped_run_resumes_bit_by_bit(more, assistant, task, whole, tmp_path, monkeypatch):
    if more:
        whole = tmp_path / "whole"
        run_main(rl_grpo, *flags(assistant, task, whole), *more)
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        stop_at(patch, rl_grpo, "rollout", call=3)
        run_main(rl_grpo, *flags(assistant, task, run), *more)
    assert error.value.code == 130 and len(logged(run, "reward")) == 3
    run_main(rl_grpo, *flags(assistant, task, run), *more, "--resume")
    assert_same_files(run, whole, "model.safetensors", "config.json")
    assert logged(run, "reward") == logged(whole, "reward")


def test_what_is_kept_and_read_is_the_same_after_a_resume(assistant, task, tmp_path, monkeypatch):
    more = ["--held_out", task, "--eval_every", 2, "--format_reward", 0.5, "--keep",
            f"{assistant.parent / 'sft.jsonl'}:0.5"]
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "whole"), *more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, rl_grpo, "rollout", call=3)
        run_main(rl_grpo, *flags(assistant, task, tmp_path / "run"), *more)
    with pytest.raises(SystemExit, match="another contents_of_keep and keep"):
        run_main(rl_grpo, *flags(assistant, task, tmp_path / "run"), *more[:-2], "--resume")
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "run"), *more, "--resume")
    assert_same_files(tmp_path / "run", tmp_path / "whole", "model.safetensors", "answers.jsonl")
    for key in ("keep_loss", "entropy", "pass_1", "well_formed"):
        assert logged(tmp_path / "run", key) == logged(tmp_path / "whole", key) != []
    assert [row["step"] for row in read_answers(tmp_path / "run", 99)] == [
        step for step in (0, 2, 4, 6) for _ in COLOURS]


def asked_in(file):
    """[(seed, question)] of a run, in order, which noted() wrote."""
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


@pytest.fixture
def noted(monkeypatch, tmp_path):
    """Each question that a rank asks is written to a file of that name."""
    original = rl_grpo.rollout

    def rollout(engine, problems, args, seed, reward):
        with open(noted.file, "a") as file:
            file.write("".join(json.dumps([seed, p["question"]]) + "\n" for p in problems))
        return original(engine, problems, args, seed, reward)

    def noted(name):
        noted.file = tmp_path / name
        return noted.file

    monkeypatch.setattr(rl_grpo, "rollout", rollout)
    return noted


@pytest.mark.parametrize("name, call", [("rollout", 6), ("learn", 5), ("policy_loss", 4),
                                        ("save_run", 2)], ids=str)
def test_a_run_killed_anywhere_resumes_bit_by_bit_and_asks_each_problem_once(
        name, call, assistant, task, tmp_path, noted):
    more = dict(prompts=3, group_size=2, refill=2, save_every=2)
    whole_asked, killed_asked, resumed_asked = (noted(n) for n in ("whole", "killed", "resumed"))
    noted("whole")
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "a", **more))
    noted("killed")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, rl_grpo, name, call, signal.SIGKILL)
        run_ranks(rl_grpo, *flags(assistant, task, tmp_path / "b", **more), world_size=1,
                  exit_code=-signal.SIGKILL)
    noted("resumed")
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "b", **more), "--resume")
    assert_same_files(tmp_path / "b", tmp_path / "a", "model.safetensors", "config.json")
    whole = asked_in(whole_asked)
    killed, resumed = asked_in(killed_asked), asked_in(resumed_asked)
    assert whole[:len(killed)] == killed and whole[len(whole) - len(resumed):] == resumed
    assert len(killed) + len(resumed) >= len(whole) > 6 * 3         # some groups were tied


THINKING = {"<|think|>": 1, "<|/think|>": 2}
FORMED, PLAIN = Completion([1, 5, 2, 6, 7], finish="stop"), Completion([6, 7], finish="stop")


def refilled(rank, world_size, tied, replies, reward_of, asked, format_reward=0.0):
    """sample_groups of 4 of 9 problems from number 2 on. tied: what the ranks say in each round."""
    def rollout(engine, problems, args, seed, reward):
        asked.extend(problems)
        return problems, replies * len(problems), torch.tensor([reward_of(i) for i in problems])

    def add(self, n):
        return [tied.pop(0) if tied else n]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_grpo, "rollout", rollout)
        patch.setattr(Ranks, "sum", add)
        args = SimpleNamespace(prompts=4, refill=3, seed=0, format_reward=format_reward)
        engine = SimpleNamespace(tokenizer=SimpleNamespace(special=THINKING))
        return rl_grpo.sample_groups(engine, range(9), [*range(9)], 2, args, 0, Ranks(rank, world_size))


def test_tied_groups_are_refilled_with_the_next_problems():
    """Problem i is tied if i is even; on 1 and on 2 ranks the same problems are asked."""
    asked = {1: [], 2: []}

    def sample(rank, world_size):
        return refilled(rank, world_size, [2, 1, 1, 0], [PLAIN, PLAIN], lambda i: [i % 2, 0.],
                        asked[world_size])

    chosen, prompts, _, rewards, position = sample(0, 1)
    assert chosen == prompts == [2, 3, 4, 5, 6, 7, 8, 0] and position == 10 and rewards.shape == (8, 2)
    assert (rewards[:, 0] == torch.tensor([0., 1, 0, 1, 0, 1, 0, 0])).all()
    for rank in (0, 1):
        assert sample(rank, 2)[4] == 10
    assert sorted(asked[2]) == sorted(asked[1]) == sorted(prompts)


@pytest.mark.parametrize("replies, format_reward, rounds", [
    ([FORMED, PLAIN], 0.1, 1), ([FORMED, PLAIN], 0.0, 4), ([FORMED, FORMED], 0.1, 4)])
def test_a_group_that_the_format_reward_unties_is_not_refilled(replies, format_reward, rounds):
    """The update learns from it, because its total rewards differ."""
    asked = []
    *_, position = refilled(0, 1, [], replies, lambda i: [0., 0.], asked, format_reward)
    assert len(asked) == 4 * rounds and position == 2 + 4 * rounds


def test_a_tool_that_does_not_start_ends_the_run_in_one_line(assistant, task, tmp_path, monkeypatch):
    def rollout(engine, problems, args, seed, reward):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(rl_grpo, "rollout", rollout)
    with pytest.raises(SystemExit, match="step 1: a tool of the model does not start: .*unavailable"):
        run_main(rl_grpo, *flags(assistant, task, tmp_path))


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_ends_the_run_before_it_is_learnt(reward, base_run):
    rewards = torch.tensor([[1.0, reward]])
    with pytest.raises(SystemExit, match="[12] replies have an advantage that is not a finite number"):
        grads_of_learn(load_checkpoint(base_run)[0], *written(), advantages(rewards).flatten())


def test_the_ratio_of_the_first_update_is_exactly_1(base_run, monkeypatch):
    ratios = []
    original = rl_grpo.policy_loss

    def policy_loss(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).exp())
        return original(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(rl_grpo, "policy_loss", policy_loss)
    grads_of_learn(load_checkpoint(base_run)[0], *written(), torch.tensor([1.0, -1.0]), updates=2)
    assert (ratios[0] == 1).all()


def test_finished_run_is_kept_and_other_settings_refused(assistant, task, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="overwrite.*--resume"):
        run_main(rl_grpo, *flags(assistant, task, whole))
    with pytest.raises(SystemExit, match="another clip;.*;"):
        run_main(rl_grpo, *flags(assistant, task, whole, clip=0.3), "--resume")
    run_main(rl_grpo, *flags(assistant, task, whole), "--resume")
    assert (whole / "model.safetensors").read_bytes() == before


def test_a_group_of_one_is_refused(assistant, task, tmp_path):
    with pytest.raises(SystemExit, match="--group_size must be at least 2.* got 1; try --group_size 16"):
        run_main(rl_grpo, *flags(assistant, task, tmp_path, group_size=1))


@pytest.mark.parametrize("flag, value", [
    ("max_steps", 0), ("prompts", 0), ("max_new_tokens", -1), ("updates", 0), ("eval_every", 0),
    ("save_every", 0), ("refill", -1), ("format_reward", -1), ("clip", -1), ("kl", -1), ("seed", -1),
    ("lr", 0), ("lr", "nan")])
def test_a_flag_out_of_range_is_one_line_before_any_work(flag, value, tmp_path):
    with pytest.raises(SystemExit, match=f"--{flag} must be (above|at least) .*, got {value}"):
        run_main(rl_grpo, "--task", "x.jsonl", "--out", tmp_path / "run", f"--{flag}", value)
    assert not (tmp_path / "run").exists()


def test_questions_that_do_not_fit_and_kinds_not_practised_are_counted(assistant, tmp_path, capsys):
    fits = dict(question="red", answer="red even", kind="colour")
    long = dict(question="red " * 200, answer="red even", kind="colour")
    other = dict(question="1?", answer="1", kind="sum")
    for name, rows in (("task", [fits, long]), ("held_out", [fits, long, other])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(rl_grpo, *flags(assistant, tmp_path / "task", tmp_path / "run", max_steps=1,
                             prompts=1), "--held_out", tmp_path / "held_out")
    said = capsys.readouterr().out
    assert "task: 1 of 2 questions are longer" in said and "held_out: 1 of 3 questions are" in said
    assert "held out, not practised: sum 0.000" in said
    (tmp_path / "task").write_text(json.dumps(long))
    with pytest.raises(SystemExit, match="no question of .*task fits into"):
        run_main(rl_grpo, *flags(assistant, tmp_path / "task", tmp_path / "none"))


def test_a_task_by_name_is_practised_and_its_held_out_problems_asked(assistant, tmp_path, capsys,
                                                                     monkeypatch):
    monkeypatch.setattr(tasks.make_task, "__defaults__", (8, 4))
    run_main(rl_grpo, *flags(assistant, "decimals", tmp_path / "run", max_steps=1))
    assert logged(tmp_path / "run", "kind") == ["decimals"] * 2
    with pytest.raises(SystemExit, match="cuntdown is neither a task nor a file; the tasks are"):
        run_main(rl_grpo, *flags(assistant, "cuntdown", tmp_path / "none"))
    with pytest.raises(SystemExit, match="none.jsonl cannot be read: No such file"):
        run_main(rl_grpo, *flags(assistant, "none.jsonl", tmp_path / "none"))


def test_a_resumed_run_must_practise_the_same_problems(assistant, task, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(task.read_bytes())
    run_main(rl_grpo, *flags(assistant, copy, tmp_path / "run", max_steps=1))
    copy.write_bytes(b"\n".join(copy.read_bytes().split(b"\n")[:1]))
    with pytest.raises(SystemExit, match="another contents_of_task"):
        run_main(rl_grpo, *flags(assistant, copy, tmp_path / "run", max_steps=1), "--resume")


def test_all_tied_replies_change_nothing_and_are_warned_of(assistant, tmp_path, capsys):
    task = tmp_path / "hopeless.jsonl"
    task.write_text('{"question": "red", "answer": "never"}\n')
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "run", max_steps=2, prompts=2))
    before, after = (load_file(run / "model.safetensors") for run in (assistant, tmp_path / "run"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert capsys.readouterr().out.count("warning: 100% of the groups are tied") == 2


def test_practice_with_a_checker_that_can_be_fooled_is_warned_of(assistant, tmp_path, capsys):
    task = tmp_path / "gamed.jsonl"
    task.write_text('{"question": "red", "answer": "even", "checker": "contains"}\n')
    run_main(rl_grpo, *flags(assistant, task, tmp_path / "run", max_steps=1, prompts=1))
    assert "a reply that says everything passes the checkers contains" in capsys.readouterr().out


def test_cut_off_replies_are_warned_of(assistant, task, tmp_path, capsys):
    run_main(rl_grpo, *flags(assistant, task, tmp_path, max_steps=1, max_new_tokens=1))
    assert "warning: 100% of the replies were cut off" in capsys.readouterr().out


# ---- ranks

@pytest.fixture
def by_question(monkeypatch, tmp_path):
    """Samples depend on question and step, not on the rank; how many each rank gets is noted."""
    original, steps = rl_grpo.rollout, []

    def replies():
        steps.clear()
        return (tmp_path / "replies").read_text().split()

    def seeded(engine, problems, args, seed, reward):
        steps.append(len(problems) * args.group_size)
        parts = [original(engine, [p], args, len(steps) + 100 * i, reward)
                 for p in problems for i in [sorted(COLOURS).index(p["question"])]]
        prompts, completions, rewards = zip(*parts)
        with open(tmp_path / "replies", "a") as file:
            file.write(f"{len(sum(completions, []))}\n")
        return sum(prompts, []), sum(completions, []), torch.cat(rewards)

    monkeypatch.setattr(rl_grpo, "rollout", seeded)
    return replies


def assert_same_run(run, other):
    for key in ("reward", "reply_tokens", "tied", "truncated"):
        assert logged(run, key) == logged(other, key), key
    assert logged(run, "norm") == pytest.approx(logged(other, "norm"), rel=1e-3)
    weights, others = (load_file(r / "model.safetensors") for r in (run, other))
    for name, tensor in weights.items():
        assert (tensor - others[name]).norm() < 2e-3 * tensor.norm() + 1e-4, name


def check_ranks(assistant, task, tmp_path, by_question):
    more = [*flags(assistant, task, tmp_path / "one", lr=1e-4, kl=0.1), "--keep",
            assistant.parent / "sft.jsonl"]
    run_main(rl_grpo, *more)
    assert by_question() == 6 * ["16"]
    run_ranks(rl_grpo, *more, "--out", tmp_path / "two")        # the later --out counts
    assert by_question() == 6 * ["16"] + 12 * ["8"]
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_two_ranks_learn_what_one_does_from_equal_shares(assistant, task, tmp_path, by_question):
    check_ranks(assistant, task, tmp_path, by_question)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_two_ranks_take_the_step_of_one_on_fixed_replies_in_fp64(kl, trl_batch, tmp_path):
    """Two updates for each loss; two groups go to rank 0 and one to rank 1."""
    prompts, completions, rewards = trl_batch
    ids, mask = rollout_tensors(prompts, completions, pad=0)
    advantage = advantages(rewards).flatten()

    def main():
        ranks = init_ranks("cpu")
        mine = torch.tensor([i // 4 % ranks.world_size == ranks.rank for i in range(12)])
        for loss in rl_grpo.LOSSES:
            model, reference = noisy(MODERN).double(), noisy(MODERN, 1).double()
            optimizer = Optimizer([dict(kind="adamw", params=dict(model.named_parameters()),
                                        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)], ranks)
            args = SimpleNamespace(**{**FLAGS, "updates": 2, "loss": loss, "kl": kl})
            loss_and_norm = learn(model, optimizer, ranks, ids[mine], mask[mine].double(),
                                  advantage[mine].double(), args, 1.0, reference if kl else None)
            if ranks.is_main:
                torch.save((loss_and_norm, model.state_dict()), tmp_path / f"{loss}{ranks.world_size}")

    with in_fp64():
        main()
        run_ranks(SimpleNamespace(main=main, __name__="learn"))
    for loss in rl_grpo.LOSSES:
        one, two = (torch.load(tmp_path / f"{loss}{n}") for n in (1, 2))
        figures = 3 if kl else 2
        assert two[0][:figures] == pytest.approx(one[0][:figures], rel=1e-9, abs=1e-12)
        for name, tensor in one[1].items():
            torch.testing.assert_close(two[1][name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_a_rank_whose_groups_are_all_tied_still_takes_its_step(assistant, tmp_path):
    rows = [dict(question="red", answer="red even"), dict(question="blue", answer="never")]
    task = tmp_path / "half.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(rl_grpo, *flags(assistant, task, tmp_path / "run", prompts=2, group_size=8))
    assert min(logged(tmp_path / "run", "tied")) == 0.5


def test_prompts_that_cannot_be_shared_out_are_refused(assistant, task, tmp_path):
    run_ranks(rl_grpo, *flags(assistant, task, tmp_path, prompts=3), exit_code=1)
    assert not (tmp_path / "log.jsonl").exists()


# ---- mutants

@pytest.mark.parametrize("name, old, new, check", [
    ("policy_loss", "-torch.min(", "-torch.max(", check_clip),
    ("policy_loss", "clamp(1 - low, 1 + high)", "clamp(max=1 + high)", check_clip),
    ("policy_loss", "ref_logprobs - logprobs", "logprobs - ref_logprobs", check_k3),
    ("policy_loss", "log_r.exp() - log_r - 1", "-log_r", check_k3),
    ("policy_loss", "kl * ratio * k3", "kl * k3", check_gradient_of_the_kl),
    ("policy_loss", "losses = -torch.min", "losses = torch.min", check_reinforce),
    ("rollout_tensors", "mask[i, len(p):end] = torch.tensor(c.sampled, dtype=torch.float)",
     "mask[i, len(p):end] = 1", check_mask)], ids=lambda value: str(value)[:20])
def test_checks_notice_a_mutant(name, old, new, check, monkeypatch):
    mutate(monkeypatch, rl_grpo, name, old, new)
    monkeypatch.setitem(globals(), name, getattr(rl_grpo, name))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("name, old, new", [
    ("learn", "mask[:, 1:]", "mask[:, :-1]"), ("learn", "advantage != 0", "advantage > 0"),
    ("learn", "cache.backward()", "pass"), ("token_weights", "max(1, divisors[args.loss])", "1"),
    ("learn", "advantage[part.rows]", "advantage")], ids=str)
def test_check_of_learn_notices_a_mutant(name, old, new, base_run, monkeypatch):
    mutate(monkeypatch, rl_grpo, name, old, new)
    monkeypatch.setitem(globals(), "learn", rl_grpo.learn)
    with pytest.raises(AssertionError):
        check_learn(base_run)


@pytest.mark.parametrize("old, new", [("step * KEEP_ROWS, K", "0, K"), ("ranks, weight)", "ranks)")],
                         ids=str)
def test_check_of_keep_notices_a_mutant(old, new, base_run, monkeypatch):
    mutate(monkeypatch, rl_grpo, "keep_gradients", old, new)
    monkeypatch.setitem(globals(), "keep_gradients", rl_grpo.keep_gradients)
    with pytest.raises(AssertionError):
        check_keep(base_run)


@pytest.mark.parametrize("name, old, new", [
    ("token_weights", "ranks.sum(len(n), n.sum().item(), n[is_live].sum().item())",
     "len(n), n.sum().item(), n[is_live].sum().item()"),
    ("learn", "* ranks.world_size)", ")")], ids=str)
def test_check_of_the_ranks_notices_a_mutant(name, old, new, assistant, task, tmp_path, by_question,
                                             monkeypatch):
    mutate(monkeypatch, rl_grpo, name, old, new)
    with pytest.raises(AssertionError):
        check_ranks(assistant, task, tmp_path, by_question)


def test_the_bandit_notices_a_wrong_sign(assistant, task, tmp_path, monkeypatch):
    mutate(monkeypatch, rl_grpo, "advantages", "rewards - rewards.mean(1, keepdim=True)",
           "rewards.mean(1, keepdim=True) - rewards")
    with pytest.raises(AssertionError):
        check_bandit(assistant, task, tmp_path)
