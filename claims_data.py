"""
The talk's claims about data, tokens, training and money: what goes into a model.

    python talk.py funnel tokens loss cost modalities

    in:  talk.py's Models       out: a Finding for each claim

Each function is one claim: its docstring says what is asked, what is counted, and against what.
"""
import json
import math
import os
import re
import tempfile
from pathlib import Path

from claims import (Check, Finding, Measured, NotMeasured, difference, distinct_ngrams, mean,
                    one_line, ratio, share_of)

WORD = re.compile("[a-z']+")

# ---- The crawl -----------------------------------------------------------------------------------

FEW_PER_CENT = Measured(0.10, unit="%")     # "a few per cent" means less than this
LATER_STEPS = ("tokenize",)                 # of the funnel, which keep all of the text

def funnel(models):
    """What is crawled shrinks to a few per cent of good text.

    Counted: the bytes of all HTML in the crawl, and the bytes of text that the last filter kept.
    Against: 10 %. These are counts of everything, so they have no standard error.
    """
    steps = [step for step in models.index().get("funnel", []) if step["step"] not in LATER_STEPS]
    inputs = models.index().get("settings", {}).get("inputs", [])
    crawled = crawled_bytes([*sorted((models.data_folder() / "warc").glob("*.warc*")), *inputs])
    if not steps or not crawled:
        raise NotMeasured("the data has no crawl; python prepare_fineweb.py --source crawl or warc "
                          "makes one")
    kept = steps[-1]
    left = Measured(kept["bytes"] / crawled, unit="%")
    texts = [f"{step['step']}: {step['in']:,} pages in, {step['kept']:,} kept" for step in steps]
    for reason, samples in list(models.index().get("samples", {}).items())[:8]:
        texts += [f"{reason}: {one_line(sample['text'])}" for sample in samples[:1]
                  if sample["text"]]
    said = (f"{crawled / 1e6:.1f} MB of HTML in {steps[0]['in']:,} pages became "
            f"{kept['bytes'] / 1e6:.2f} MB of text in {kept['kept']:,} documents, {left}")
    pages = Measured(kept["kept"] / steps[0]["in"], unit="%")
    return Finding(said, [Check("less than 10% of the bytes are left", FEW_PER_CENT, left)],
                   dict(bytes_left=left, pages_left=pages), texts)

def crawled_bytes(paths):
    """The bytes of HTML in those of these files that are WARC files and are here."""
    from warc import parse_record, read_warc
    n = 0
    for path in map(Path, paths):
        if ".warc" not in path.name or not path.is_file():
            continue
        for record, _ in read_warc(path):
            page = record and parse_record(*record)[0]
            if page:
                n += len(page["html"].encode(errors="replace"))
    return n

# ---- Tokens --------------------------------------------------------------------------------------

def tokens(models):
    """Tokens compress text: the larger the vocabulary, the more bytes a token stands for.

    Counted: bytes a token on unseen documents, by a vocabulary of 512, 1,024, … tokens; a smaller
    one is the first merges of ours. Against: half the vocabulary, on the same documents. OpenAI's
    tokenizers stand beside it if their files are on this machine.
    """
    own = models.engine("base").tokenizer
    texts = [own.decode(ids) for ids in models.val_documents()]
    n_bytes = [len(text.encode()) for text in texts]
    n_merged = len(own.ranks)
    sizes = [2 ** k for k in range(9, 20) if 2 ** k < n_merged]
    figures = {"256": Measured(1.0)}
    checks = []
    before = n_bytes
    for size in [*sizes, n_merged]:
        counts = [len(ids) for ids in cut(own, size).encode_batch(texts)]
        figures[f"{size}"] = ratio(n_bytes, counts)
        checks.append(Check(f"a vocabulary of {size} saves tokens in a document",
                          difference(before, counts)))
        before = counts
    missing = []
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        theirs = on_disk(name)
        if theirs:
            counts = [len(ids) for ids in theirs.encode_batch(texts)]
            figures[name] = ratio(n_bytes, counts)
        else:
            missing.append(name)
    said = "bytes a token by vocabulary: " + ", ".join(f"{n}: {m}" for n, m in figures.items())
    if missing:
        said += f"; {', '.join(missing)} not measured: set TIKTOKEN_CACHE_DIR to their folder"
    text = texts[0][:100]
    shown = [f"{n}: " + "|".join(own.decode([i]) for i in cut(own, n).encode_ordinary(text))
             for n in (256, n_merged)]
    return Finding(said, checks, figures, list(map(one_line, shown)))

def cut(tokenizer, size):
    """The tokenizer as it was when it had learnt `size` tokens, special ones apart."""
    ranks = {token: i for token, i in tokenizer.ranks.items() if i < size}
    return type(tokenizer)(ranks, tokenizer.pattern, tokenizer.special, f"first {size}")

def on_disk(name):
    """OpenAI's tokenizer if its file lies in tiktoken's cache; None if it would be downloaded."""
    from bpe import Tokenizer
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        return Tokenizer.pretrained(name)
    except SystemExit:
        return None

# ---- Training ------------------------------------------------------------------------------------

LN_V_WITHIN = 0.1       # nats between the first loss and ln V that still count as equal
N_TEXTS = 24            # that a model writes to be judged

def loss(models):
    """The loss starts at ln V and falls; what the model writes turns from noise into English.

    Asked: a model with the same configuration before any training, and the base model: their loss
    on unseen documents, and 24 texts of each. Counted: nats a token; the share of words that stand
    in the training text. Against: ln V; the untrained model.
    """
    trained = models.engine("base")
    new = untrained(trained, models.seed)
    spans = [([trained.tokenizer.eot, *ids][:trained.model.config.block_size], 1)
             for ids in models.val_documents()[:64]]
    from likelihood import mean_log_probs
    first, last = (mean([-nats for nats in mean_log_probs(engine.model, spans)])
                   for engine in (new, trained))
    ln_v = Measured(math.log(trained.model.config.vocab_size))
    known = set(WORD.findall(training_text(models)))
    wrote = {name: written(engine, models.seed) for name, engine in
             (("before", new), ("after", trained))}
    english = {name: share_of(word in known for word in words) for name, words in wrote.items()}
    checks = [Check("the first loss is within 0.1 nats of ln V", Measured(LN_V_WITHIN),
                  Measured(abs(first.value - ln_v.value), first.error)),
             Check("the loss falls", first, last),
             Check("more of the words are words after training", english["after"],
                  english["before"])]
    by_step = [f"step {row['step']}: {one_line(row['sample'])} (different pairs of words: "
               f"{distinct_ngrams(row['sample'].split(), 2):.0%})"
               for row in models.log("base") if "sample" in row]
    said = (f"loss {first} before the first step, ln V {ln_v}; {last} after the last; words of the "
            f"training text: {english['before']}, then {english['after']}")
    return Finding(said, checks, dict(first_loss=first, last_loss=last, ln_v=ln_v, **english),
                   by_step)

def untrained(engine, seed):
    """An engine of the same configuration and tokenizer whose model has not been trained."""
    import torch

    from model import GPT
    torch.manual_seed(seed)
    model = GPT(engine.model.config).to(engine.device())
    return type(engine)(model.eval(), engine.tokenizer)

def training_text(models, n_tokens=2_000_000):
    """The first tokens of the training text, in lower case."""
    shards = models.shards("train")
    ids = shards.read(0, min(shards.n_tokens, n_tokens)).tolist()
    return models.engine("base").tokenizer.decode(ids).lower()

def written(engine, seed):
    """The words of N_TEXTS texts of 40 tokens, without the first and last word of each, which may
    be parts of words."""
    words = []
    for completion in engine.generate([[engine.tokenizer.eot]], 40, num_samples=N_TEXTS,
                                      temperature=0.8, seed=seed):
        words += WORD.findall(engine.tokenizer.decode(completion.ids).lower())[1:-1]
    return words

# ---- Money ---------------------------------------------------------------------------------------

HUNDRED_USD = Measured(100.0, unit="USD")

def cost(models):
    """The whole costs less than $100, and most of it is pretraining.

    Counted: the seconds in the log of each stage, times its GPUs or cores, times a rate of rent.
    Against: $100; the stages after pretraining together. These are counts, without an error.
    """
    costs = {}
    seconds = sum(step.get("seconds", 0) for step in models.index().get("funnel", []))
    if seconds:
        costs["data"] = seconds / 3600 * models.core_hour_usd   # summed over workers
    for role in models.runs:
        costs[role] = stage_usd(models.log(role), models.gpu_hour_usd, models.core_hour_usd)
    if not costs.get("base"):
        raise NotMeasured("the base model has no log with its time; train it with train_gpt2.py")
    figures = {stage: Measured(usd, unit="USD") for stage, usd in costs.items()}
    total = Measured(sum(costs.values()), unit="USD")
    after = Measured(total.value - costs["base"] - costs.get("data", 0.0), unit="USD")
    said = ("; ".join(f"{stage} ${usd:.4f}" for stage, usd in costs.items())
            + f"; together ${total.value:.4f} at ${models.gpu_hour_usd:g} a GPU hour and "
            f"${models.core_hour_usd:g} a core hour")
    return Finding(said, [Check("the whole costs less than $100", HUNDRED_USD, total),
                          Check("pretraining costs more than what comes after it",
                                figures["base"], after)], dict(figures, total=total))

def stage_usd(log, gpu_hour_usd, core_hour_usd):
    """What a run cost: its last `usd` if it logged that, else its time at the rates. The log's
    header names the device, such as "cpu x 2"."""
    logged = [row["usd"] for row in log if row.get("usd")]
    if logged:
        return logged[-1]
    seconds = max((row.get("seconds", 0) for row in log), default=0)
    device = next((row["header"].get("device", "") for row in log if "header" in row), "")
    name, _, number = str(device).rpartition(" x ")
    units = int(number) if number.isdecimal() else 1
    rate = gpu_hour_usd
    if (name or str(device)).startswith("cpu"):
        rate = core_hour_usd
    return seconds / 3600 * units * rate

# ---- Other tokens --------------------------------------------------------------------------------

def modalities(models):
    """Images and sound are tokens too: the same trainer makes a model of them.

    Read: what bench/modalities.py measured of two models that train_gpt2.py itself trained on the
    tokens of small images and of sounds. Counted: bits a pixel of unseen images and bits a slice of
    unseen sounds. Against: PNG; the entropy of the slices' frequencies.
    """
    path = Path(models.run("base")).parent / "modalities" / "modalities.json"
    if not path.is_file():
        raise NotMeasured(f"run python bench/modalities.py --out {path.parent}")
    found = {name: Measured(*pair) for name, pair in json.loads(path.read_text())["bits"].items()}
    checks = [Check("fewer bits a pixel than PNG", found["png"], found["images"]),
              Check("fewer bits a slice of sound than their frequencies", found["frequencies"],
                    found["sound"])]
    said = (f"{found['images']} bits a pixel of unseen images, PNG {found['png']}; "
            f"{found['sound']} bits a slice of unseen sound, frequencies {found['frequencies']}")
    return Finding(said, checks, found)
