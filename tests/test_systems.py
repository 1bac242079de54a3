"""
Other systems than Linux, as far as Linux can play them: Windows without fork and limits, macOS with
a limit less, and an Apple GPU without fp64.
"""
import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crawl
import engine
import loss
import sample
import training
from model import GPT, GPTConfig
from training import Ranks, init_ranks, make_optimizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("demo/*.py"))]
UNIX_MODULES = ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline")
UNIX_CALLS = ("fork", "killpg", "sched_getaffinity", "setsid", "geteuid", "getuid", "statvfs")

# What Python imports first: a Unix that lacks what Windows lacks.
WINDOWS = f"""
import multiprocessing, os, subprocess, sys, types
for name in {UNIX_MODULES}:
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda file, mode, size: None)
for name in {UNIX_CALLS}:
    delattr(os, name)
multiprocessing.set_start_method("spawn")
popen = subprocess.Popen.__init__
def init(self, *args, preexec_fn=None, **kwargs):
    assert preexec_fn is None, "preexec_fn is not supported on Windows platforms"
    popen(self, *args, **kwargs)
subprocess.Popen.__init__ = init
"""


@pytest.fixture
def windows(tmp_path):
    """Runs Python with these words where the system lacks what Windows lacks → what it printed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WINDOWS)

    def run(*words):
        env = dict(os.environ, PYTHONPATH=str(tmp_path / "site"), OMP_NUM_THREADS="1")
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr
    return run


# ---- Windows

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_module_of_unix_alone_is_imported_at_the_top(path):
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.split(".")[0])
    assert set(names) & set(UNIX_MODULES) == set()


def test_every_stage_is_imported_and_the_python_tool_runs_without_fork_and_limits(windows):
    names = ", ".join(path.stem for path in ROOT.glob("*.py"))
    said = windows("-c", f"import {names}; print(sample.run_python('6 * 7'), "
                   "sample.run_python('while True: pass', timeout=0.5))")
    assert "42 TimeoutError: no result after 0.5 s" in said
    assert "does not limit its processor time, memory, output" in said


def test_pages_are_filtered_and_tokenized_by_processes_that_are_spawned(windows, tmp_path):
    code = ("import warc, sys; head = b'HTTP/1.1 200 OK\\r\\nContent-Type: text/html\\r\\n\\r\\n'; "
            "open(sys.argv[1], 'wb').write(b''.join(warc.warc_record('response', f'http://a.b/{i}', "
            "head + b'<p>' + b'This is the page that we read and they wrote. ' * 9 + b'%d' % i) "
            "for i in range(3)))")
    windows("-c", code, tmp_path / "a.warc")
    said = windows("prepare_fineweb.py", "--source", "warc", tmp_path / "a.warc", "--out",
                   tmp_path / "d", "--extractor", "plain", "--quality", "annotate", "--workers", 2)
    assert "does not limit the memory" in said and re.search("extract_text +3 +3 ", said)


def test_a_tiny_model_is_trained_without_unix(windows, data, tmp_path):
    said = windows("train_gpt2.py", "--data", data, "--out", tmp_path / "run", "--max_steps", 2,
                   "--model", "d1", "--config", "n_embd=16", "n_head=2", "block_size=16",
                   "--total_batch_size", 32, "--device", "cpu")
    assert "step 2/2 | loss" in said and (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_is_locked_where_there_is_only_msvcrt(monkeypatch, tmp_path):
    def taken(file, mode, size):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    for locking, wanted in ((lambda *_: None, True), (taken, False)):
        monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2,
                                                                         locking=locking))
        assert training.lock_run(tmp_path / "run") is wanted


# ---- macOS

def test_the_python_tool_runs_where_the_limit_of_memory_is_refused(monkeypatch):
    import resource
    setrlimit = resource.setrlimit

    def refuses_memory(what, limits):
        if what == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        setrlimit(what, limits)

    monkeypatch.setattr(resource, "setrlimit", refuses_memory)
    sample.enclosure.cache_clear()
    assert sample.run_python("6 * 7") == "42"
    assert sample.enclosure()[1].endswith("this system does not limit its memory")
    sample.enclosure.cache_clear()


def test_the_extractor_runs_in_a_spawned_child_on_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    extractor = crawl.Extractor("plain")
    page = {"html": f"<p>{'This is a page that we read and they wrote. ' * 9}", "url": "u"}
    assert extractor(page)[0]["text"].startswith("This is a page")
    assert not crawl.Extractor.limits_memory()
    extractor.close()


# ---- Apple's GPUs

def test_device_mps_is_taken_where_it_is_and_refused_in_a_line_elsewhere(monkeypatch):
    for found in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=found: found)
        if found:
            assert sample.choose_device("mps") == "mps" and init_ranks("mps").device == "mps"
            continue
        for choose in (sample.choose_device, init_ranks):
            with pytest.raises(SystemExit, match="^--device mps: .* try --device cpu$"):
                choose("mps")


def test_device_mps_is_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one GPU, but torchrun started 2"):
        init_ranks("mps")


class No64(TorchDispatchMode):
    """Fails if the device "meta", which plays the GPU, gets a tensor in fp64."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                assert leaf.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("is_modern", [True, False])
def test_no_step_of_training_needs_fp64_on_the_gpu(monkeypatch, is_modern):
    cpu = torch.Tensor.cpu
    monkeypatch.setitem(loss.CHUNK_LOGITS, "meta", loss.CHUNK_LOGITS["mps"])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: cpu(torch.ones_like(self, device="cpu")))
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    if is_modern:
        config = GPTConfig.preset("d2", n_embd=32, n_head=2, block_size=16, vocab_size=64)
    net = GPT(config).use("meta")
    optimizer = make_optimizer(net, Ranks(device="mps"))
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with No64():
        net(ids, ids).backward()
        assert optimizer.average_grads() > 0
        optimizer.step(lr_scale=0.5, grad_scale=0.5)
    with pytest.raises(AssertionError), No64():
        torch.zeros(1, device="meta").double()


def test_sums_and_draws_of_mps_are_made_on_the_cpu():
    assert Ranks(device="mps").sum(1.5, 2) == [1.5, 2.0]
    assert engine.drawing_device(torch.device("mps")) == torch.device("cpu")
    assert engine.drawing_device(torch.device("cuda:1")) == torch.device("cuda:1")
