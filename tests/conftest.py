"""
What the tests of several stages share: a small tokenizer, a folder of token shards, functions that
run a stage's main() in this process or on two forked ranks, and mutants. Everything is tiny, works
offline and runs on the CPU, on one thread: then every sum is added up in the same order, and two
runs can be compared bit by bit.
"""
import contextlib
import inspect
import multiprocessing
import os
import pydoc
import random
import signal
import socket
import statistics
import sys
import textwrap
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

from bpe import Tokenizer
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

torch.set_num_threads(1)

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 make test runs it")

def documents(*modules):
    """The docstrings in these modules, short ones first: real English that every machine has."""
    found = []
    for module in modules:
        for value in vars(module).values():
            if getattr(value, "__module__", "") == module.__name__ and inspect.getdoc(value):
                found.append(inspect.getdoc(value))
    return sorted(found, key=len)


DOCUMENTS = documents(statistics, random, pydoc)
SIZES = dict(block_size=32, vocab_size=65, n_layer=4, n_head=2, n_embd=32)
GPT2 = GPTConfig(**SIZES)
MODERN = GPTConfig.preset("d4", **SIZES)    # windows "SSSL": layers 0, 1, 2 see only 8 tokens back


def noisy(config, seed=0, std=0.2):
    """A model in eval mode in which every parameter matters: normal noise with deviation `std` is
    added to all, since in a new model biases and projections are zero."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Writes a shard: 256 int32 of header, then the tokens as uint16 (version 1) or uint32. A count
    other than the number of tokens makes a damaged shard."""
    if count is None:
        count = len(tokens)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, count
    dtype = {1: np.uint16}.get(version, np.uint32)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with 400 tokens. The model pads tables of that vocabulary to 512 rows."""
    return Tokenizer.train(DOCUMENTS, 400)


@pytest.fixture(scope="session")
def data(tokenizer, tmp_path_factory):
    """A folder with a tokenizer and shards, as prepare_fineweb.py writes them: one shard of 700
    tokens for validation, and shards of 3300 and 5000 tokens for training."""
    folder = tmp_path_factory.mktemp("data")
    ids = [i for text in DOCUMENTS for i in (tokenizer.eot, *tokenizer.encode_ordinary(text))]
    tokenizer.save(folder / "tokenizer")
    parts = dict(val_000=ids[:700], train_000=ids[700:4000], train_001=ids[4000:9000])
    for name, part in parts.items():
        write_shard(folder / f"demo_{name}.bin", part)
    return folder


@pytest.fixture(scope="session")
def base_run(tokenizer, tmp_path_factory):
    """The run folder of an untrained GPT-2 with two layers."""
    run = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2,
                          n_embd=32))
    save_checkpoint(run, model, tokenizer)
    return run


@pytest.fixture(scope="session")
def sft_run(base_run, tokenizer, tmp_path_factory):
    """The same model under the name of an assistant."""
    run = tmp_path_factory.mktemp("sft")
    model, _ = load_checkpoint(base_run)
    save_checkpoint(run, model, tokenizer, stage="sft")
    return run


def run_main(module, *flags):
    """Runs `python module.py flags…` in this process, and restores argv and signal handlers."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    argv = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, flags)]
    try:
        module.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_ranks(module, *flags, world_size=2, exit_code=0, seconds=60):
    """Runs `torchrun --nproc_per_node=2 module.py flags…`, with forks of this process as ranks, so
    that they need not import torch again. Each rank must end with exit_code within `seconds`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def rank_main(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run_main(module, *flags)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.time() + seconds
    for process in ranks:
        process.join(max(0, deadline - time.time()))
    codes = [process.exitcode for process in ranks]         # None for a rank that still runs
    for process in ranks:
        process.kill()
    assert codes == [exit_code] * world_size, codes


@contextlib.contextmanager
def in_fp64():
    """A context in which fp32 computations are done in fp64, in forked ranks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def stop_at(monkeypatch, module, name, call, number=signal.SIGTERM):
    """Sends this process the signal `number` when module.name is called for the `call`-th time."""
    original = getattr(module, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def assert_same_files(run, other, *names):
    """The files of these names in two folders must be equal to the byte."""
    for name in names:
        equal = (Path(run) / name).read_bytes() == (Path(other) / name).read_bytes()
        assert equal, name      # pytest would spend minutes on showing a difference of the bytes


def mutate(monkeypatch, owner, name, old, new):
    """Replaces owner.name by a mutant: the same function with `old` in its source changed to `new`.
    `old` must occur once."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(old)
    assert found == 1, f"{name} holds {old!r} {found} times; adapt the mutant to the code"
    scope = {}
    exec(source.replace(old, new), vars(sys.modules[function.__module__]), scope)
    monkeypatch.setattr(owner, name, scope[name])
