"""
The talk's claims about the base model: a compressor that dreams documents.

    python talk.py compressor coin no_assistant few_shot regurgitation

    in:  talk.py's Models       out: a Finding for each claim

Each function is one claim: its docstring says what is asked, what is counted, and against what.
"""
import copy
import gzip
import lzma
import math
import random
from collections import Counter

from claims import (Check, Finding, Measured, NotMeasured, chi_squared, difference,
                    matched_tokens, mean, one_line, ratio, share_of)

# ---- Compression ---------------------------------------------------------------------------------

def compressor(models):
    """A base model is a compressor, better than those that look for repeated strings.

    Asked: unseen documents, in windows as long as the context. Counted: bits a byte, which is what
    an arithmetic coder would need with the model's probabilities. Against: gzip -9 and xz -9e on
    all of the same text in one piece, which favours them.
    """
    engine = models.engine("base")
    documents = models.val_documents()
    texts = [engine.tokenizer.decode_bytes(ids) for ids in documents]
    bits = [bits_of(models, ids) for ids in documents]
    ours = ratio(bits, list(map(len, texts)))
    whole = b"".join(texts)
    others = dict(gzip=gzip.compress(whole, 9),
                  xz=lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME))
    figures = {name: Measured(8 * len(data) / len(whole)) for name, data in others.items()}
    checks = [Check(f"{name} needs more bits a byte than the model", figures[name], ours)
             for name in figures]
    said = (f"{ours} bits a byte of {len(whole):,} unseen bytes; gzip -9 {figures['gzip']}, xz -9e "
            f"{figures['xz']}")
    by_need = sorted(zip(bits, texts), key=lambda pair: pair[0] / len(pair[1]))
    texts = [f"{n / len(text):.2f} bits a byte: {one_line(text.decode(errors='replace'))}"
             for n, text in (*by_need[:2], *by_need[-2:])]
    return Finding(said, checks, dict(model=ours, **figures), texts)

def bits_of(models, ids):
    """The bits that the base model needs for a document: -log2 of its probability. The document is
    read in windows; each sees the last token before it."""
    engine = models.engine("base")
    T = engine.model.config.block_size
    whole = [engine.tokenizer.eot, *ids]
    spans = [(whole[i:i + T + 1], 1) for i in range(0, len(whole) - 1, T)]
    nats = [-mean_log_prob * (len(span) - 1) for mean_log_prob, (span, _)
            in zip(models.log_probs(("base",), spans), spans)]
    return sum(nats) / math.log(2)

# ---- Sampling ------------------------------------------------------------------------------------

DRAWS = 200
LEAST_EXPECTED = 5      # in a bin of the χ² test
ACCEPTED = Measured(0.01)

def coin(models):
    """Sampling tosses a biased coin; the temperature flattens or sharpens it.

    Asked: the token after "Return the", 200 times. Counted: how often each came. Against: 200 times
    the softmax (χ², p at least 0.01) and, so that the test can fail, 200 tosses of the coin at
    twice the temperature (p below 0.01). The entropy of the softmax must rise with the temperature.
    """
    from engine import next_token_probs
    engine = models.engine("base")
    prompt = "Return the"
    logits = next_logits(engine, prompt)
    drawn = Counter(completion.ids[0] for completion in
                    engine.generate([prompt], 1, num_samples=DRAWS, seed=models.seed))
    p_of = {temperature: next_token_probs(logits, temperature)[0]
            for temperature in (0.25, 0.5, 1.0, 1.5, 2.0)}
    fits, wrong = (chi_squared(*binned(drawn, p_of[t].tolist(), p_of[1.0].tolist()))
                   for t in (1.0, 2.0))
    entropy = {t: Measured(-(p[p > 0] * p[p > 0].log2()).sum().item(), unit="bits")
               for t, p in p_of.items()}
    checks = [Check("the softmax is not refuted: p-value above 0.01", Measured(fits[2]), ACCEPTED),
             Check("a flatter softmax is refuted: p-value below 0.01", ACCEPTED,
                    Measured(wrong[2]))]
    hotter = list(entropy)
    checks += [Check(f"the entropy is larger at temperature {b:g} than at {a:g}", entropy[b],
                     entropy[a]) for a, b in zip(hotter, hotter[1:])]
    texts = [f"{engine.tokenizer.decode([i])!r}: drawn {n} times of {DRAWS}, probability "
             f"{p_of[1.0][i]:.3f}" for i, n in drawn.most_common(6)]
    said = (f"{len(drawn)} different tokens in {DRAWS} draws, χ² {fits[0]:.1f} at {fits[1]} "
            f"degrees of freedom, p {fits[2]:.2f} (of a flatter coin {wrong[2]:.1g}); entropy "
            + ", ".join(f"{h.value:.2f}" for h in entropy.values()) + " bits at temperature "
            + ", ".join(f"{t:g}" for t in entropy))
    return Finding(said, checks, {f"entropy_{t:g}": h for t, h in entropy.items()}, texts)

def next_logits(engine, prompt):
    """The logits of the token after a prompt, (1, V)."""
    import torch
    ids = torch.tensor([engine.prompt_ids(prompt)], device=engine.device())
    with torch.inference_mode():
        return engine.model.logits(engine.model.hidden(ids)[:, -1])[:, :engine.n_vocab].cpu()

def binned(drawn, probs, order):
    """Counts of tokens and a distribution → (counts, expected counts) in bins. The likeliest tokens
    by `order` have a bin each while they are expected 5 times or more by both; the last bin holds
    all others."""
    n = drawn.total()
    counts = []
    expected = []
    for i in sorted(range(len(order)), key=lambda i: -order[i]):
        if n * order[i] < LEAST_EXPECTED:
            break
        counts.append(drawn[i])
        expected.append(n * probs[i])
    return [*counts, n - sum(counts)], [*expected, n - sum(expected)]

# ---- What a base model does with a question ------------------------------------------------------

def no_assistant(models):
    """A base model is no assistant: it continues a question instead of answering it.

    Asked: "What is 2+2?" and 30 sums like it, as a document that begins so; and, in its own
    protocol, the assistant that was made from the model. Counted: right answers in 24 tokens.
    Against: the assistant.
    """
    rng = random.Random(models.seed)
    sums = [(2, 2)] + [(rng.randrange(10), rng.randrange(10)) for _ in range(30)]
    questions = [f"What is {a}+{b}?" for a, b in sums]
    engine = models.engine("base")
    continued = [engine.tokenizer.decode(completion.ids) for completion in
                 engine.generate(questions, 24, temperature=0)]
    replies = models.replies(("honest", "sft", "rl"), questions)
    base, assistant = (
        share_of(contains(text, str(a + b)) for text, (a, b) in zip(said, sums))
        for said in (continued, replies))
    texts = []
    for question, text, reply in list(zip(questions, continued, replies))[:4]:
        texts.append(f"{question}  base: {one_line(text)}")
        texts.append(f"{question}  assistant: {one_line(reply)}")
    return Finding(f"of {len(sums)} sums the base model's continuation holds the answer in {base}, "
                   f"the assistant's reply in {assistant}",
                   [Check("the assistant is right more often than its base", assistant, base)],
                   dict(base=base, assistant=assistant), texts)

def contains(text, answer):
    """Whether a number is one of the numbers of a text, or words are among its words."""
    from problems import is_correct
    return is_correct(text, dict(answer=answer, checker="contains"))

# ---- In-context learning -------------------------------------------------------------------------

SHOTS = (0, 1, 2, 4, 8)
TASKS = {   # pairs of one rule each; what fits a model of any size stands first
    "copy": [(w, w) for w in "list table value point graph model name file line tree array path "
             "class text error index".split()],
    "plural": [(w, w + "s") for w in "list table value point graph model name file line tree array "
               "path token text error number".split()],
    "opposite": [("true", "false"), ("left", "right"), ("open", "close"), ("first", "last"),
                 ("upper", "lower"), ("start", "end"), ("read", "write"), ("small", "large"),
                 ("hot", "cold"), ("up", "down"), ("in", "out"), ("before", "after"),
                 ("add", "remove"), ("high", "low"), ("on", "off"), ("good", "bad")],
    "French": [("sea", "mer"), ("sun", "soleil"), ("sky", "ciel"), ("cheese", "fromage"),
               ("dog", "chien"), ("cat", "chat"), ("house", "maison"), ("book", "livre"),
               ("water", "eau"), ("bread", "pain"), ("milk", "lait"), ("night", "nuit"),
               ("day", "jour"), ("king", "roi"), ("red", "rouge"), ("white", "blanc")]}
CHOICES = 4             # so guessing is right in a quarter

def few_shot(models):
    """A base model learns a task from examples in its prompt, with no training.

    Asked: 16 items of each of four tasks, after 0, 1, 2, 4 and 8 examples. Counted: how often the
    right output is more probable a token than three outputs of other items; beside it, its own
    log-probability. Against: no example.
    """
    scores = {shots: few_shot_scores(models, shots) for shots in SHOTS}
    right = {shots: [(task, max(found) == found[0]) for task, found in rows]
             for shots, rows in scores.items()}
    sure = {shots: mean([found[0] for _, found in rows], "nats") for shots, rows in scores.items()}
    shares = {shots: share_of(ok for _, ok in rows) for shots, rows in right.items()}
    gained = difference([float(ok) for _, ok in right[SHOTS[-1]]],
                        [float(ok) for _, ok in right[0]])
    texts = []
    for task in TASKS:
        row = [share_of(ok for name, ok in right[shots] if name == task) for shots in SHOTS]
        texts.append(f"{task}: " + ", ".join(f"{n} shots {m}" for n, m in zip(SHOTS, row)))
    said = (f"right of {CHOICES} choices after " +
            ", ".join(f"{n} examples {m}" for n, m in shares.items()) +
            f"; log p a token of the right output {sure[0]}, then {sure[SHOTS[-1]]}")
    return Finding(said, [Check("8 examples gain right answers, item by item", gained)],
                   {f"shots_{n}": m for n, m in shares.items()}, texts)

def few_shot_scores(models, shots):
    """(task, log-probability a token of the right output and of three others) of every item, after
    this many examples, which are other items."""
    from likelihood import token_spans
    from few_shot import few_shot_prompt
    tokenizer = models.engine("base").tokenizer
    rng = random.Random(models.seed)
    names = []
    pairs = []
    for task, items in TASKS.items():
        for item in items:
            others = rng.sample([other for other in items if other != item],
                                SHOTS[-1] + CHOICES - 1)
            prompt = few_shot_prompt(others[:shots], item[0])
            names.append(task)
            pairs += [(prompt, f" {answer}") for _, answer in [item, *others[SHOTS[-1]:]]]
    found = models.log_probs(("base",), token_spans(tokenizer, pairs))
    return [(task, found[i * CHOICES:(i + 1) * CHOICES]) for i, task in enumerate(names)]

# ---- Memory of what was read ---------------------------------------------------------------------

TIMES = (1, 10, 100)    # a passage is read so often
PASSAGES = 6            # for each of TIMES, and as many that are never read
PASSAGE_TOKENS = 32
BEGINNING = 8           # tokens of a passage that the model is given
STEPS = 50
ORDINARY_ROWS = 3       # of 128 tokens of the training text in each step

def regurgitation(models):
    """What was read often is recited word for word; what was read once is not.

    Asked: made-up passages of 32 tokens, given the first 8, after a copy of the base model has read
    each 1, 10 or 100 times among ordinary training text. Counted: how many tokens are the
    passage's own before the first that is not, by greedy decoding. Against: passages that it read
    a tenth as often, or never.
    """
    engine = models.engine("base")
    rng = random.Random(models.seed)
    words = training_words(models)
    passages = {times: [made_up_passage(engine.tokenizer, words, rng) for _ in range(PASSAGES)]
                for times in (0, *TIMES)}
    rows = [ids for times in TIMES for ids in passages[times] for _ in range(times)]
    rng.shuffle(rows)
    reader = type(engine)(read_on(models, rows), engine.tokenizer)
    recited = {}
    texts = []
    for times, some in passages.items():
        completions = reader.generate([ids[:1 + BEGINNING] for ids in some],
                                      PASSAGE_TOKENS - BEGINNING, temperature=0)
        recited[times] = mean([matched_tokens(completion.ids, ids[1 + BEGINNING:])
                               for completion, ids in zip(completions, some)])
        decode = engine.tokenizer.decode
        texts += [f"read {times} times: {one_line(decode(some[0][1:1 + BEGINNING]), 40)} ▸ "
                  f"{one_line(decode(some[0][1 + BEGINNING:]), 60)}",
                  f"   it continues:   ▸ {one_line(decode(completions[0].ids), 60)}"]
    checks = [Check(f"more is recited if read {b} times than {a} times", recited[b],
                  recited[a]) for a, b in ((1, 10), (10, 100))]
    said = (f"of {PASSAGE_TOKENS - BEGINNING} tokens it recites " +
            ", ".join(f"{m} read {times} times" for times, m in recited.items()))
    return Finding(said, checks, {f"read_{times}": m for times, m in recited.items()}, texts)

def training_words(models):
    """The words of the training text's first 20,000 tokens that occur twice or more, in order."""
    from claims_data import WORD, training_text
    counted = Counter(WORD.findall(training_text(models, 20_000)))
    return sorted(word for word, n in counted.items() if n > 1)

def made_up_passage(tokenizer, words, rng):
    """Random words as a document of PASSAGE_TOKENS tokens after <|endoftext|>: nothing else could
    have taught a model this text."""
    text = " ".join(rng.choice(words) for _ in range(PASSAGE_TOKENS))
    return [tokenizer.eot, *tokenizer.encode_ordinary(text)[:PASSAGE_TOKENS]]

def read_on(models, rows, lr=2e-3):
    """A copy of the base model that has read these rows of ids once more, in STEPS steps, each with
    ORDINARY_ROWS rows of training text beside them."""
    import torch
    model = trainable_copy(models.engine("base").model)
    device = models.engine("base").device()
    shards = models.shards("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    T = min(128, model.config.block_size)
    rng = random.Random(models.seed)
    for step in range(STEPS):
        planted = rows[step::STEPS]
        ordinary = [shards.read(rng.randrange(shards.n_tokens - T), T).tolist()
                    for _ in range(ORDINARY_ROWS)]
        n_targets = sum(len(ids) - 1 for ids in (*planted, *ordinary))
        for same_length in (planted, ordinary):
            if same_length:
                ids = torch.tensor(same_length, device=device)
                share = ids[:, 1:].numel() / n_targets
                (share * model(ids[:, :-1], ids[:, 1:])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

def trainable_copy(model):
    """A copy of a model in fp32 that can be trained.

    From here on numbers below 1e-38 count as 0. AdamW squares gradients, and squares so small would
    make a step on a CPU several times slower.
    """
    import torch
    torch.set_flush_denormal(True)
    device = next(model.parameters()).device
    model = copy.deepcopy(model).float().use(device, bf16=False)
    return model.train().requires_grad_(True)

# ---- What came after the data ends ---------------------------------------------------------------

AFTER_THE_DATA = ("In 2031, the", "In Python 9.0, the function", "The election of 2032 was won by",
                  "The next version of this module will", "Last week, the city of Ares Base",
                  "According to the news of today,")
UNIVERSES = 12          # continuations of each
WITHIN = 0.5            # nats a token that still count as equally confident

def universes(models):
    """Asked about what came after its data, a base model dreams: each time another future, each as
    confident as what it knows.

    Asked: six beginnings about the future, continued 12 times each. Counted: different futures; how
    many admit that they do not know; the log-probability a token of what it wrote. Against: half;
    its continuations of beginnings of unseen documents, less half a nat.
    """
    from problems import declines
    engine = models.engine("base")
    real = [engine.tokenizer.decode(ids[:8]) for ids in models.val_documents() if len(ids) > 40]
    futures = dreams(models, AFTER_THE_DATA)
    known = dreams(models, real[:len(AFTER_THE_DATA)])
    distinct = [text for prompt in AFTER_THE_DATA
                for text in {text for of, text, _ in futures if of == prompt}]
    different = share_of(n < len(distinct) for n in range(len(futures)))
    admits = share_of(declines(text) for _, text, _ in futures)
    sure = {name: mean([log_prob for _, _, log_prob in dreamt], "nats")
            for name, dreamt in dict(future=futures, known=known).items()}
    least = Measured(sure["known"].value - WITHIN, sure["known"].error, "nats")
    checks = [Check("more than half of the futures are different", different, HALF),
              Check("fewer than half admit that they do not know", HALF, admits),
              Check("as confident as about real documents, to half a nat", sure["future"], least)]
    texts = [one_line(f"{prompt}{text}") for prompt, text, _ in
             [*futures[:3], *futures[2 * UNIVERSES:2 * UNIVERSES + 3]]]
    said = (f"of {len(futures)} futures {different} are different, {admits} admit not to know; log "
            f"p a token {sure['future']}, of real documents' {sure['known']}")
    return Finding(said, checks, dict(different=different, admits=admits, **sure), texts)

HALF = Measured(0.5, unit="%")

def dreams(models, prompts):
    """UNIVERSES continuations of each prompt → [(prompt, text, mean log-probability a token)]."""
    engine = models.engine("base")
    prompt_ids = [engine.prompt_ids(prompt) for prompt in prompts]
    completions = engine.generate(prompt_ids, 24, num_samples=UNIVERSES, seed=models.seed)
    repeated = [(prompt, ids) for prompt, ids in zip(prompts, prompt_ids) for _ in range(UNIVERSES)]
    spans = [([*ids, *completion.ids], len(ids))
             for (_, ids), completion in zip(repeated, completions)]
    log_probs = models.log_probs(("base",), spans)
    return [(prompt, engine.tokenizer.decode(completion.ids), log_prob)
            for (prompt, _), completion, log_prob in zip(repeated, completions, log_probs)]

# ---- Learning while it is used -------------------------------------------------------------------

MOST_DOCUMENTS = 12
REST_TOKENS = 96
UPDATES = 5

def test_time(models):
    """Test-time training: a few gradient steps on the document at hand lower the loss on its rest.

    Asked: unseen documents, of each the first half and at most 96 tokens after it. Counted: nats a
    token of these, after 5 steps of AdamW on the first half. Against: the same weights without the
    steps; with the first half in the context instead; both. The weights are restored for each
    document, and the loss must then be the same to the bit.
    """
    engine = models.engine("base")
    half = engine.model.config.block_size // 2
    halves = []
    for ids in models.val_documents():
        cut = min(half, len(ids) // 2)
        if cut >= 32:
            halves.append((ids[:cut], ids[cut:cut + min(REST_TOKENS, half - 1)]))
    if not halves:
        raise NotMeasured("no unseen document has 64 tokens; prepare more text")
    model = trainable_copy(engine.model)
    weights = copy.deepcopy(model.state_dict())
    losses = {name: [] for name in ("neither", "context", "steps", "both", "restored")}
    for first, rest in halves[:MOST_DOCUMENTS]:
        alone, in_context = two_losses(model, engine.tokenizer.eot, first, rest)
        take_steps(model, [engine.tokenizer.eot, *first])
        stepped, both = two_losses(model, engine.tokenizer.eot, first, rest)
        model.load_state_dict(weights)
        restored, _ = two_losses(model, engine.tokenizer.eot, first, rest)
        for name, loss in zip(losses, (alone, in_context, stepped, both, restored)):
            losses[name].append(loss)
    means = {name: mean(values, "nats") for name, values in losses.items()}
    lowered = difference(losses["neither"], losses["steps"], "nats")
    checks = [Check(f"{UPDATES} steps lower the loss of a document's rest", lowered),
              Check("the weights are restored: the loss is the same",
                    Measured(float(losses["neither"] == losses["restored"])))]
    said = (f"nats a token of the rest: {means['neither']}; after {UPDATES} steps "
            f"{means['steps']}, lower by {lowered}; with the text in the context "
            f"{means['context']}; with both {means['both']}")
    return Finding(said, checks, dict(lowered=lowered, **means))

def two_losses(model, eot, first, rest):
    """Nats a token of `rest`: on its own, and with `first` before it in the context."""
    from likelihood import mean_log_probs
    spans = [([eot, *rest], 1), ([eot, *first, *rest], 1 + len(first))]
    return [-log_prob for log_prob in mean_log_probs(model, spans)]

def take_steps(model, ids, lr=3e-4):
    """UPDATES steps of AdamW on one row of ids."""
    import torch
    device = next(model.parameters()).device
    row = torch.tensor([ids], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    for _ in range(UPDATES):
        model(row[:, :-1], row[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
