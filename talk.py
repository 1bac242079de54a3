"""
The talk's claims, each measured on your own models.

    python talk.py                                  # all, on the newest runs, into talk.json
    python talk.py --runs runs/demo-small-base runs/demo-small-sft runs/demo-small-honest \
        runs/demo-small-rl --data data/demo-small
    python talk.py coin                             # one, with what was asked and what came back

    in:  runs of train_gpt2.py, chat_sft.py and rl_grpo.py; a folder of prepare_fineweb.py
    out: <last run>/talk.json, which report.py shows; a line for each claim

The claims stand below in the talk's order, each with its sentence. claims_data.py, claims_base.py,
claims_assistant.py and claims_reasoner.py hold the function that measures each, and claims.py the
rule that tells from numbers and their standard errors whether it was shown. Models of any size are
measured by the same functions. Where a part is missing, the line says which command makes it.

A claim is measured once for the same weights; --again measures all anew. After an interruption the
same command continues.
"""
import argparse
import difflib
import functools
import hashlib
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

if __name__ == "__main__":      # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import claims_assistant
import claims_base
import claims_data
import claims_reasoner
from claims import NotMeasured

SEED = 1337             # of what is drawn and asked
VAL_TOKENS = 2 ** 14    # of unseen text that claims read, at most
GPU_HOUR_USD = 3.0      # an H100, as the talk has it
CORE_HOUR_USD = 0.05    # a core of a rented CPU

@dataclass(frozen=True)
class Claim:
    """measure(models) → Finding; it raises NotMeasured if a part is missing."""
    name: str
    sentence: str
    measure: Callable

CLAIMS = [
    Claim("funnel", "Of what is crawled, a few per cent is left as text worth learning.",
          claims_data.funnel),
    Claim("tokens", "Tokens compress: the larger the vocabulary, the more bytes in each.",
          claims_data.tokens),
    Claim("loss", "The loss starts at ln V and falls, and noise becomes English.",
          claims_data.loss),
    Claim("compressor", "A base model compresses text it never saw better than gzip and xz.",
          claims_base.compressor),
    Claim("coin", "Sampling tosses a biased coin, and the temperature says how biased.",
          claims_base.coin),
    Claim("no_assistant", "A base model continues a question instead of answering it.",
          claims_base.no_assistant),
    Claim("few_shot", "Examples in the prompt teach a base model a task.",
          claims_base.few_shot),
    Claim("regurgitation", "What was read often is recited word for word.",
          claims_base.regurgitation),
    Claim("universes", "Asked about the future, a base model dreams another one each time.",
          claims_base.universes),
    Claim("hallucination", "An assistant that only saw answers makes them up, unsure within.",
          claims_assistant.hallucination),
    Claim("probing", "Asking it what it knows and teaching \"I don't know\" cures that.",
          claims_assistant.probing),
    Claim("memories", "Weights recall vaguely; what stands in the context is read off.",
          claims_assistant.memories),
    Claim("search", "With search it answers from an invented fact, without it cannot.",
          claims_assistant.search),
    Claim("identity", "It is who its conversations or a system message say, in this chat alone.",
          claims_assistant.identity),
    Claim("think", "Models need tokens to think: in steps they are right, in one leap they guess.",
          claims_reasoner.think),
    Claim("arithmetic", "Mental arithmetic fails where the Python tool does not.",
          claims_reasoner.arithmetic),
    Claim("letters", "Tokens are not letters: counting them fails in one leap; Python counts.",
          claims_reasoner.letters),
    Claim("jagged", "9.11 against 9.9 fails beside harder things that succeed.",
          claims_reasoner.jagged),
    Claim("discovery", "SFT imitates, RL discovers: longer thoughts, more right answers.",
          claims_reasoner.discovery),
    Claim("beyond", "Practice reaches problems longer than any that a teacher showed.",
          claims_reasoner.beyond),
    Claim("rlhf", "RLHF: the score of a stand-in rises, the truth turns, a KL penalty holds it.",
          claims_reasoner.rlhf),
    Claim("cost", "The whole costs less than $100, most of it for pretraining.",
          claims_data.cost),
    Claim("modalities", "Images and sound are tokens too, for the same trainer.",
          claims_data.modalities),
    Claim("test_time", "A few gradient steps on a document lower the loss on its rest.",
          claims_base.test_time),
]

# ---- The runs and the data -----------------------------------------------------------------------

class Models:
    """What claims are measured on. Runs are asked for by role: base, sft (the first that was
    fine-tuned), honest (the last, which has learnt to say that it does not know), rl. Each is
    loaded when a claim asks for it first."""

    def __init__(self, runs, data=None, conversations=None, device="auto", gpu_hour_usd=None,
                 core_hour_usd=CORE_HOUR_USD):
        self.runs = runs                    # {role: folder}
        self.data = data                    # of prepare_fineweb.py
        self.conversations = conversations  # a folder of files of held-out problems
        self.device = device
        self.gpu_hour_usd = gpu_hour_usd or GPU_HOUR_USD
        self.core_hour_usd = core_hour_usd
        self.seed = SEED

    def run(self, *roles):
        """The folder of the first of these roles that is there."""
        for role in roles:
            if role in self.runs:
                return self.runs[role]
        remedy = dict(base="train_gpt2.py", sft="chat_sft.py", honest="chat_sft.py probe",
                      rl="rl_grpo.py")[roles[0]]
        raise NotMeasured(f"there is no run of {remedy}; name one after --runs")

    @functools.lru_cache
    def engine_of(self, run):
        """The Engine of a run's folder; a model is loaded once."""
        from model import load_checkpoint
        from sample import Engine, choose_device, load_tokenizer
        tokenizer = load_tokenizer(run)
        model, _ = load_checkpoint(run, choose_device(self.device), tokenizer.n_vocab)
        return Engine(model.for_inference(), tokenizer)

    def engine(self, *roles):
        """The Engine of the first of these roles that is there."""
        return self.engine_of(self.run(*roles))

    @functools.lru_cache
    def search(self):
        """The function that looks a query up in the data and the notes of the conversations."""
        from search import build_index
        folders = [self.data_folder()]
        if self.conversations and Path(self.conversations, "notes").is_dir():
            folders.append(Path(self.conversations, "notes"))
        block_size = self.engine("honest", "sft", "rl").model.config.block_size
        return build_index(folders, max_chars=block_size).look_up

    def log(self, *roles):
        """The rows of a run's log."""
        from training import read_log
        return read_log(self.run(*roles))

    def data_folder(self):
        """The folder of data; NotMeasured without one."""
        if not self.data or not Path(self.data).is_dir():
            raise NotMeasured("there is no folder of data; name it with --data")
        return Path(self.data)

    def index(self):
        """index.json of the data; {} if its shards were not made by prepare_fineweb.py."""
        from problems import read_json
        return read_json(self.data_folder() / "index.json")

    @functools.lru_cache
    def shards(self, split):
        """The tokens of a split, as the trainer reads them; NotMeasured if there are none."""
        from train_gpt2 import Shards
        try:
            return Shards(str(self.data_folder()), split)
        except SystemExit as error:
            raise NotMeasured(str(error)) from None

    @functools.lru_cache
    def val_documents(self):
        """Unseen documents, as lists of ids without <|endoftext|>, of VAL_TOKENS in all."""
        shards = self.shards("val")
        eot = self.engine("base").tokenizer.eot
        documents = [[]]
        for i in shards.read(0, min(shards.n_tokens, VAL_TOKENS)).tolist():
            if i == eot:
                documents.append([])
            else:
                documents[-1].append(i)
        return [ids for ids in documents if ids]

    def problems(self, name, *kinds, most=None):
        """The problems of these kinds in a file of the conversations, `most` of each at most."""
        from problems import read_problems
        path = Path(self.conversations or "", name)
        if not self.conversations or not path.is_file():
            raise NotMeasured(f"{path} is missing; make demo writes it, or name its folder "
                              "with --conversations")
        found = {}
        for problem in read_problems(path):
            if not kinds or problem["kind"] in kinds:
                found.setdefault(problem["kind"], []).append(problem)
        if not found:
            raise NotMeasured(f"{path} has no problem of kind {' or '.join(kinds)}")
        return [problem for of_kind in found.values() for problem in of_kind[:most]]

    def held_out(self, kind, most=None):
        """Held-out problems of a kind; [] if there are none."""
        try:
            return self.problems("held_out.jsonl", kind, most=most)
        except NotMeasured:
            return []

    def replies(self, roles, conversations, begun=(), max_new_tokens=48, search=None, python=True):
        """Greedy replies to conversations, as texts; "" to one that does not fit into the context.
        begun: the ids with which each reply begins, as if the model had written them. search: the
        tool's function, if there is one. python: whether there is that tool."""
        from sample import Engine, run_python
        kept = self.engine(*roles)
        engine = Engine(kept.model, kept.tokenizer, python=python and run_python, search=search)
        prompts = {}
        for number, conversation in enumerate(conversations):
            if isinstance(conversation, str):
                conversation = [dict(role="user", content=conversation)]
            ids, _ = engine.tokenizer.render(conversation, for_completion=True)
            if len(ids) + len(begun) < engine.model.config.block_size:
                prompts[number] = [*ids, *begun]
        completions = engine.generate(list(prompts.values()), max_new_tokens, temperature=0)
        found = [""] * len(conversations)
        for number, completion in zip(prompts, completions):
            found[number] = engine.tokenizer.decode(begun) + engine.reply_text(completion)
        return found

    def log_probs(self, roles, spans):
        """Spans (ids, start) → for each span the mean log-probability of ids[start:] in nats."""
        from likelihood import mean_log_probs
        return mean_log_probs(self.engine(*roles).model, spans)

# ---- Which runs ----------------------------------------------------------------------------------

ROLES = dict(pretrain=("base",), sft=("sft", "honest"), rl=("rl",))

def described(run):
    """(stage, folder of the run that it began from or None) of a run's config.json."""
    try:
        about = json.loads(Path(run, "config.json").read_bytes())["deepdive"]
        return about["stage"], about.get("base")
    except (OSError, ValueError, KeyError, TypeError):
        return "pretrain", None     # GPT-2's weights come without a stage

def roles_of(runs):
    """Folders of runs → {role: folder}. Of several fine-tuned runs the first is `sft` and the last
    `honest`; of other stages the last one counts."""
    roles = {}
    for run in runs:
        stage, _ = described(run)
        if stage == "sft" and "sft" in roles:
            roles["honest"] = run
        else:
            roles[ROLES.get(stage, ("base",))[0]] = run
    return roles

def newest(root="runs"):
    """The newest run of the latest stage under root/."""
    from sample import find_run
    for stage in ("rl", "sft", "pretrain"):
        try:
            return find_run(None, (stage,), root)
        except SystemExit:
            pass
    raise SystemExit(f"{root}/ holds no run of train_gpt2.py or of a later stage; make demo trains "
                     "small ones; or name yours after --runs")

def with_bases(runs):
    """Folders of runs → the same, each after the runs that it began from, if these are here."""
    found = []
    for run in runs:
        chain = []
        while run and Path(run).is_dir() and Path(run) not in [*found, *chain]:
            chain.insert(0, Path(run))
            _, run = described(run)
        found += chain
    return found

def data_of(run):
    """The folder of data that a base model's log names, if it is here; else None."""
    try:
        with open(Path(run, "log.jsonl"), encoding="utf-8") as lines:
            folder = json.loads(next(lines))["header"]["flags"]["data"]
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None
    return folder if isinstance(folder, str) and Path(folder).is_dir() else None

# ---- Measuring -----------------------------------------------------------------------------------

def measure(claim, models):
    """→ the claim's entry in talk.json."""
    started = time.process_time()
    entry = dict(name=claim.name, sentence=claim.sentence, verdict="not measured", checks=[],
                 figures={}, texts=[])
    try:
        finding = claim.measure(models)
    except NotMeasured as missing:
        entry["said"] = str(missing)
    else:
        entry.update(said=finding.said, verdict=finding.verdict, texts=finding.texts,
                     checks=list(map(str, finding.checks)))
        for name, measured in finding.figures.items():
            entry["figures"][name] = [finite(measured.value), finite(measured.error)]
    entry["seconds"] = round(time.process_time() - started, 2)
    return entry

def finite(number):
    """The number, or None for what JSON cannot hold."""
    return number if math.isfinite(number) else None

def weights_of(runs, data):
    """16 hex digits that change with the weights and logs of the runs, and with the data."""
    sha = hashlib.sha256(str(data).encode())
    for run in runs:
        for path in [*sorted(Path(run).glob("model*.safetensors")), Path(run, "log.jsonl")]:
            if path.is_file():
                with open(path, "rb") as file:
                    sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]

def line_of(number, entry):
    """One claim in one line."""
    return (f"{number:2d} {entry['name']:14s}{entry['verdict']:17s}{entry['said']} "
            f"({entry['seconds']:.1f} CPU s)")

def sitting(models, runs, again):
    """Measures all claims in order, prints a line for each, and keeps talk.json up to date.

    talk.json is written after each claim, so that a kill loses one at most. What was measured on
    the same weights is kept, unless `again`; what was not measured is tried again.
    """
    from problems import read_json, write_whole
    out = Path(runs[-1], "talk.json")
    weights = weights_of(runs, models.data)
    before = read_json(out)
    known = {}
    if before.get("weights") == weights and not again:
        known = {entry["name"]: entry for entry in before.get("claims", [])}
    entries = []
    for number, claim in enumerate(CLAIMS, 1):
        entry = known.get(claim.name)
        if entry is None or entry["verdict"] == "not measured":
            entry = measure(claim, models)
        entries.append(entry)
        print(line_of(number, entry), flush=True)
        later = [known[c.name] for c in CLAIMS[number:] if c.name in known]
        write_whole(out, json.dumps(dict(weights=weights, runs=list(map(str, runs)),
                                         data=str(models.data), claims=entries + later),
                                    indent=1).encode())
    verdicts = [entry["verdict"] for entry in entries]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    seconds = sum(entry["seconds"] for entry in entries)
    print(f"{out}: of {len(entries)} claims {counted}; {seconds:.0f} CPU s of measuring")

def show(number, claim, models):
    """Measures one claim, and prints its texts and checks; talk.json stays as it is."""
    entry = measure(claim, models)
    print(claim.sentence)
    for text in entry["texts"]:
        print(f"    {text}")
    for check in entry["checks"]:
        print(f"  {check}")
    print(line_of(number, entry), flush=True)

def chosen(names):
    """Names or numbers of claims → [(number, Claim)]; SystemExit with the nearest names."""
    numbers = {claim.name: n for n, claim in enumerate(CLAIMS, 1)}
    found = []
    for name in names:
        number = numbers.get(name, int(name) if name.isdecimal() else 0)
        if not 1 <= number <= len(CLAIMS):
            near = difflib.get_close_matches(name, numbers, n=3, cutoff=0.5) or numbers
            raise SystemExit(f"{name} is not a claim; did you mean {', '.join(near)}? A number "
                             f"from 1 to {len(CLAIMS)} does as well")
        found.append((number, CLAIMS[number - 1]))
    return found

def parse_args():
    parser = argparse.ArgumentParser(
        description="measure the talk's claims on your own models: "
        + ", ".join(claim.name for claim in CLAIMS))
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="claims to show, with texts (default: all)")
    add("--runs", nargs="+", help="base model, assistants, reasoner (default: the newest); those "
        "that they began from are added")
    add("--data", help="folder of prepare_fineweb.py (default: the base model's)")
    add("--conversations", help="folder of held-out problems (default: DATA/chat)")
    add("--gpu_hour_usd", type=float, help=f"rent of a GPU (default: {GPU_HOUR_USD:g})")
    add("--core_hour_usd", type=float, default=CORE_HOUR_USD, help="rent of a CPU core")
    add("--again", action="store_true", help="measure also what talk.json has for these weights")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()

def main():
    args = parse_args()
    claims = chosen(args.names)
    from sample import find_run
    runs = with_bases([find_run(run) for run in args.runs or [newest()]])
    roles = roles_of(runs)
    data = args.data or data_of(roles.get("base", runs[0]))
    if args.data and not Path(args.data).is_dir():
        raise SystemExit(f"--data {args.data} is not a folder; name one of prepare_fineweb.py")
    conversations = args.conversations or (data and Path(data, "chat"))
    models = Models(roles, data, conversations, args.device, args.gpu_hour_usd,
                    args.core_hour_usd)
    print("runs: " + ", ".join(f"{role} {run}" for role, run in roles.items())
          + f"; data: {data}", flush=True)
    for number, claim in claims:
        show(number, claim, models)
    if not claims:
        sitting(models, runs, args.again)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; talk.json holds the claims that were measured", file=sys.stderr)
        raise SystemExit(130) from None
