"""
The budgets of the project's style, kept by tests: short files and functions, few flags, imports
that run one way, and a README, docstrings and a Makefile whose commands exist.
"""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in SCRIPTS}
MODULES = {"torch", "numpy", "tiktoken", "requests", "safetensors", "tqdm",
           "regex", "urllib3"}      # requirements.txt; tiktoken and requests bring the last two
ALLOWED = {                         # which of the project's files each may import
    "bpe": set(), "model": set(), "crawl": set(), "download": {"crawl"},
    "corpus": {"bpe", "crawl"}, "prepare_fineweb": {"corpus", "crawl", "download"},
    "optim": {"model"}, "sample": {"model", "bpe"},
    "train_gpt2": {"model", "optim", "bpe", "sample", "eval"},
    **dict.fromkeys(("chat_sft", "rl_grpo"), {"model", "optim", "bpe", "sample"}),
    **dict.fromkeys(("eval", "serve"), {"model", "bpe", "sample"})}
PROSE = [path for name in ("README.md", "Makefile", "requirements.txt", "requirements-extra.txt",
                           ".ci/run") for path in [ROOT / name] if path.exists()]

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- budgets

@each_script
def test_a_script_has_at_most_700_lines_of_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 700
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []


def functions(node):
    """Functions and methods; one within another counts with it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child.name, child.end_lineno - child.lineno + 1
        else:
            yield from functions(child)


@each_script
def test_a_function_has_at_most_60_lines_but_for_main(path):
    assert [(f, n) for f, n in functions(tree(path)) if n > 60 and f != "main"] == []


def parsers(path):
    """{parser: its flags' add_argument calls}; add = parser.add_argument is looked through."""
    found, also = {}, {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign) and getattr(node.value, "attr", "") == "add_argument":
            also[node.targets[0].id] = node.value.value.id
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = also.get(getattr(node.func, "id", None))
            if getattr(node.func, "attr", "") == "add_argument":
                name = getattr(node.func.value, "id", "parser")
            if name and str(getattr(node.args[0], "value", "")).startswith("--"):
                found.setdefault(name, []).append(node)
    return found


@each_script
def test_a_parser_has_at_most_20_flags_in_snake_case_each_with_help(path):
    for name, flags in parsers(path).items():
        assert len(flags) <= 20, (name, len(flags))
        for flag in flags:
            assert re.fullmatch("--[a-z][a-z0-9_]*", flag.args[0].value), flag.args[0].value
            assert "help" in [k.arg for k in flag.keywords], flag.args[0].value


def test_flags_are_found_at_all():
    """The test above must not pass because it looks at nothing."""
    counts = {path.stem: sum(map(len, parsers(path).values())) for path in SCRIPTS}
    assert counts["train_gpt2"] >= 15 and counts["bpe"] >= 5 and counts["model"] == 0
    assert dict(functions(ast.parse("def f():\n  def g():\n    pass\n  x\nclass C:\n  def m(): 1"
                                    ))) == dict(f=4, m=1)


# ---- imports

def imported(path, top_level=False):
    nodes = tree(path).body if top_level else list(ast.walk(tree(path)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@each_script
def test_imports_run_one_way_as_the_design_allows(path):
    assert path.stem in ALLOWED, f"DESIGN.md knows no {path.name}"
    assert imported(path) & NAMES - {path.stem} <= ALLOWED[path.stem]


@each_script
def test_reading_a_stage_takes_few_files(path):
    closure, waiting = set(), {path.stem}
    while waiting:
        closure.add(waiting.pop())
        waiting |= {name for done in closure for name in imported(ROOT / f"{done}.py") & NAMES}
        waiting -= closure
    assert len(closure) <= (6 if "eval" in closure - {path.stem} else 5), closure


@each_script
def test_the_core_needs_only_what_requirements_txt_installs(path):
    others = imported(path, top_level=True) - set(sys.stdlib_module_names) - NAMES
    assert others <= MODULES, "import optional modules inside of the function that uses them"


def test_requirements_are_those_modules_and_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    assert set(pins) == MODULES - {"regex", "urllib3"} and all(pins.values())


def is_main_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


@each_script
def test_nothing_runs_on_import(path):
    """Imports, definitions, constants, and `if __name__ == "__main__"`."""
    passive = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign,
               ast.AnnAssign)
    odd = [ast.unparse(node)[:60] for node in tree(path).body[1:]
           if not isinstance(node, passive) and not is_main_guard(node)]
    assert odd == [] and ast.get_docstring(tree(path))


# ---- text

@pytest.mark.parametrize("path", [*SCRIPTS, *PROSE], ids=lambda path: path.name)
def test_nothing_is_left_to_do_and_no_path_is_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"TODO|FIXME|XXX|/(?:home|root|Users|work|mnt|tmp)/\w+|[A-Z]:\\\w+", text)
    assert found == []
    assert path.name != "README.md" or not re.search("^[A-Z_]{4,}$", text, re.M), "a placeholder"


def check_commands(text):
    """Each `python X.py`, `torchrun … X.py` names a script, with flags it has; → how many."""
    runner = r"(?:python3?|torchrun|\$\(PY\))"
    commands = re.findall(runner + r"((?: (?!python)\S+)*? (\w+)\.py\b[^\n`#]*)",
                          text.replace("\\\n", " "))
    for command, name in commands:
        assert name in NAMES, f"no {name}.py for: python{command}"
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"(?<=\s)--\w+", command.partition(".py")[2]):
            assert f'"{flag}"' in source, f"{name}.py has no {flag}"
    return len(commands)


def targets():
    """The Makefile's rules."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z_0-9]+):(?!=)", text, re.M)), text


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert check_commands(text) >= 5
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    made = re.findall(r"^make (\w+)", blocks, re.M) + re.findall(r"`make (\w+)", text)
    assert made and set(made) <= targets()[0], set(made) - targets()[0]


def test_files_and_names_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
    for name, symbol in re.findall(r"`(\w+)\.py: (\w+)", text):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        defined = rf"^(?:(?:def|class) {symbol}\b|{symbol} *=)"
        assert re.search(defined, source, re.M), f"{name}.py defines no {symbol}"


@each_script
def test_commands_of_a_docstring_exist(path):
    check_commands(ast.get_docstring(tree(path)))


def test_makefile_is_short_and_its_commands_and_phony_targets_exist():
    rules, text = targets()
    assert len(text.splitlines()) <= 90 and check_commands(text) >= 8
    phony = re.search(r"^\.PHONY: (.*)", text, re.M)[1].split()
    assert set(phony) <= rules, f"no rule makes {set(phony) - rules}: make would do nothing"


@pytest.mark.parametrize("text", [
    "python nothing.py", "python sample.py --promt x", "torchrun --nproc_per_node=8 nothing.py",
    "$(PY) sample.py --model x \\\n  --nothing 3"])
def test_a_command_that_does_not_exist_is_noticed(text):
    assert check_commands("python sample.py --prompt x --top 3") == 1
    with pytest.raises(AssertionError):
        check_commands(text)
