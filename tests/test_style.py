"""
The project's style, kept by tests: short files and functions, few flags, statements that do one
thing, imports that run one way, and a README, docstrings and a Makefile whose commands exist.
"""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(ROOT.glob("*.py"))
SCRIPTS = [*STAGES, *sorted(ROOT.glob("demo/*.py"))]
NAMES = {path.stem for path in STAGES}
MODULES = {"torch", "numpy", "tiktoken", "requests", "safetensors", "tqdm", "protego", "w3lib",
           "webencodings",          # requirements.txt
           "regex", "urllib3"}      # tiktoken and requests bring them
ALLOWED = {                         # which of the project's files each may import
    "bpe": set(), "model": set(), "download": set(), "corpus": set(), "python_tool": set(),
    "exchange": set(), "precision": set(), "loss": set(), "warc": set(), "filters": set(),
    "crawl": {"download", "warc"},
    "prose": {"corpus", "download"}, "shards": {"bpe", "corpus", "download"},
    "prepare_fineweb": {"corpus", "crawl", "download", "filters", "warc"},
    "training": {"model"}, "problems": {"bpe"}, "sample": {"bpe", "model"},
    "engine": {"model"}, "dispatch": {"engine"}, "api": {"engine"},
    "page": {"api", "engine"}, "serve": {"api", "dispatch", "model", "page"},
    "show": set(), "chat": {"show"}, "few_shot": set(), "checkers": set(),
    "tasks": {"problems", "subjects"}, "contamination": {"corpus"},
    "search": {"corpus"}, "subjects": set(), "probe": {"model", "problems", "sample", "subjects"},
    "likelihood": {"engine", "model"},
    "eval": {"model", "problems", "sample", "training"}, "preferences": {"dialogs", "problems"},
    "reward_model": {"model", "problems", "sample", "training"},
    **dict.fromkeys(("rank", "best_of_n"), {"model", "problems", "sample"}),
    "report": {"problems", "records", "story", "svg"}, "records": {"problems"},
    "story": {"problems", "records", "svg"}, "svg": set(), "inspection": set(),
    "dialogs": {"bpe", "problems"},
    "claims": set(), **dict.fromkeys(("claims_data", "claims_base", "claims_assistant",
                                      "claims_reasoner"), {"claims"}),
    "talk": {"claims", "claims_data", "claims_base", "claims_assistant", "claims_reasoner"},
    "recipe": {"training"}, "train_gpt2": {"bpe", "model", "recipe", "sample", "training"},
    **dict.fromkeys(("chat_sft", "rl_grpo"), {"bpe", "model", "problems", "sample", "training"}),
    "web": set(), "kinds": {"subjects"}, "conversations": {"bpe", "subjects"},
    "lookups": {"bpe", "problems", "search", "subjects"},
    **dict.fromkeys(("run", "look", "narrator", "rlhf"), set())}
OPTIONAL = {                        # imported by the function that needs it, if it is called
    "bpe": {"corpus"},
    "sample": {"chat", "download", "engine", "few_shot", "precision", "search", "show"},
    "problems": {"checkers", "claims"}, "checkers": {"sample"}, "tasks": {"dialogs"},
    "rl_grpo": {"chat_sft", "dialogs", "preferences", "reward_model", "tasks"},
    **dict.fromkeys(("rank", "best_of_n"), {"preferences", "reward_model"}),
    "reward_model": {"preferences"},
    "chat": {"search"}, "chat_sft": {"dialogs", "show"}, "dialogs": {"download"},
    "api": {"show"}, "page": {"bpe", "search"}, "serve": {"chat", "sample", "search"},
    "eval": {"contamination", "likelihood", "search"}, "contamination": {"bpe", "shards"},
    "probe": {"search"},
    "training": {"exchange"}, "model": {"loss", "precision"}, "train_gpt2": {"eval", "precision"},
    "prepare_fineweb": {"inspection", "shards"}, "report": {"best_of_n"},
    "records": {"training"}, "story": {"best_of_n", "bpe", "claims"},
    "inspection": {"crawl"},
    "claims_data": {"bpe", "likelihood", "model", "warc"},
    "claims_base": {"claims_data", "engine", "few_shot", "likelihood", "problems"},
    "claims_assistant": {"claims_base", "problems"},
    "claims_reasoner": {"problems", "training"},
    "talk": {"likelihood", "model", "problems", "sample", "search", "train_gpt2", "training"}}
PROSE = [path for name in ("README.md", "Makefile", "requirements.txt", "requirements-extra.txt",
                           ".ci/run", "docs/files.md", "docs/talk.md")
         for path in [ROOT / name] if path.exists()]

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- budgets

@each_script
def test_a_script_has_at_most_800_lines_of_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 800
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


# ---- density: one statement does one thing

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def conditionals(node):
    return [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]


def nested_conditionals(source):
    return [one.lineno for one in conditionals(source) if len(conditionals(one)) > 1]


def packed_assignments(source):
    """Several targets from a tuple literal, a conditional or a comprehension."""
    packed = (ast.Tuple, ast.IfExp, *COMPREHENSIONS)
    return [node.lineno for node in ast.walk(source) if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, packed)]


def is_boolean(node):
    """A comparison, a negation, or a name that says so."""
    negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    named = isinstance(node, ast.Name) and node.id.startswith(("is_", "has_"))
    return negation or named or isinstance(node, ast.Compare)


def booleans_as_numbers(source):
    """n * is_last, [x] * (a == b). A comparison of tensors is a mask, so beside it must stand a
    literal."""
    literal = (ast.Constant, ast.List, ast.JoinedStr)
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add, ast.Sub)):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if is_boolean(one) and (isinstance(other, literal)
                                        or not isinstance(one, ast.Compare)):
                    found.append(node.lineno)
    return found


def riddles(source):
    """Walrus in a comprehension, **{… if …}, a lambda kept in a name, a list only to be unpacked,
    next(iter(…))."""
    found = []
    for node in ast.walk(source):
        if isinstance(node, COMPREHENSIONS):
            found += [one.lineno for one in ast.walk(node) if isinstance(one, ast.NamedExpr)]
        if isinstance(node, ast.Call):
            found += [node.lineno for keyword in node.keywords
                      if keyword.arg is None and conditionals(keyword.value)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
            found.append(node.lineno)
        if isinstance(node, ast.Starred) and isinstance(node.value, (ast.List, ast.ListComp)):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("next(iter("):
            found.append(node.lineno)
    return found


@each_script
def test_a_statement_does_one_thing(path):
    source, per_100_lines = tree(path), len(path.read_text(encoding="utf-8").splitlines()) / 100
    assert nested_conditionals(source) == []
    assert len(conditionals(source)) <= 2 * per_100_lines, "conditional expressions"
    assert len(packed_assignments(source)) <= max(1, per_100_lines), packed_assignments(source)
    assert booleans_as_numbers(source) == []
    assert riddles(source) == []


@pytest.mark.parametrize("check, dense, plain", [
    (nested_conditionals, "a if b else c if d else e", "a if b else c"),
    (packed_assignments, "a, b = 1, 2", "a, b = f()"),
    (packed_assignments, "a, b = (f(i) for i in x)", "B, T = x.shape"),
    (booleans_as_numbers, "n = 16 * (not last)", "n = 16 * last_rows"),
    (booleans_as_numbers, "n = rows * is_last", "n = W * (U * W >= 0)"),
    (booleans_as_numbers, "n = ['a'] * (x > 0)", "n = ['a'] * x"),
    (riddles, "f(**({'a': 1} if b else {}))", "f(**settings)"),
    (riddles, "f = lambda: 1", "f(key=lambda x: x)"),
    (riddles, "[y for x in z if (y := f(x))]", "while y := f(x): pass"),
    (riddles, "f(*[g(x) for x in z])", "f(*z)"),
    (riddles, "next(iter(x))", "next(x)")])
def test_a_dense_statement_is_noticed(check, dense, plain):
    assert check(ast.parse(dense)) and not check(ast.parse(plain))


# ---- flags

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
def test_a_parser_has_at_most_24_flags_in_snake_case_each_with_help(path):
    for name, flags in parsers(path).items():
        assert len(flags) <= 24, (name, len(flags))
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
    assert path.stem in ALLOWED, f"no room is planned for {path.name}"
    assert imported(path, top_level=True) & NAMES - {path.stem} <= ALLOWED[path.stem]
    optional = OPTIONAL.get(path.stem, set())
    assert imported(path) & NAMES - {path.stem} <= ALLOWED[path.stem] | optional


@each_script
def test_reading_a_stage_takes_at_most_6_files(path):
    """What is imported when it starts; an optional part is imported when it is asked for."""
    closure, waiting = set(), {path.stem} & NAMES
    while waiting:
        closure.add(waiting.pop())
        for done in closure:
            waiting |= imported(ROOT / f"{done}.py", top_level=True) & NAMES
        waiting -= closure
    assert len(closure) <= 6, closure


def test_no_import_goes_in_a_circle():
    """Not even one within a function."""
    above = {path.stem: imported(path) & NAMES - {path.stem} for path in STAGES}
    while above:
        bottom = {name for name, needs in above.items() if not needs & above.keys()}
        assert bottom, above
        above = {name: needs for name, needs in above.items() if name not in bottom}


def test_prepare_fineweb_imports_at_most_12_names_of_ours():
    nodes = [node for node in ast.walk(tree(ROOT / "prepare_fineweb.py"))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    ours = [alias.name for node in nodes for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0] in NAMES]
    assert 4 <= len(ours) <= 12, ours


@each_script
def test_nothing_shipped_starts_or_reads_the_tests(path):
    """A path such as ROOT / "tests" / "…", or "tests/…"."""
    assert not re.search(r"""/ ["']tests["']|["'\s]tests/""", path.read_text(encoding="utf-8"))


@each_script
def test_the_core_needs_only_what_requirements_txt_installs(path):
    ours = NAMES | {"demo"} | {neighbour.stem for neighbour in path.parent.glob("*.py")}
    others = imported(path, top_level=True) - set(sys.stdlib_module_names) - ours
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
    passive = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
               ast.Assign, ast.AugAssign, ast.AnnAssign)
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


ALIASES = {"chat_sft.py probe": "probe", "chat_sft.py make": "demo/conversations",
           "rl_grpo.py reward_model": "reward_model", "rl_grpo.py rank": "rank",
           "rl_grpo.py best_of_n": "best_of_n"}


def check_commands(text):
    """Each `python X.py`, `torchrun … X.py` names a script, with flags it has; → how many."""
    runner = r"(?:python3?|torchrun|\$\(PY\))"
    commands = re.findall(runner + r"((?: (?!python)\S+)*? ((?:\w+/)?\w+)\.py\b[^\n`#]*)",
                          text.replace("\\\n", " "))
    for command, name in commands:
        assert (ROOT / f"{name}.py").exists(), f"no {name}.py for: python{command}"
        begun = re.search(r"\w+\.py \w+|$", command)[0]
        source = (ROOT / f"{ALIASES.get(begun, name)}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"(?<=\s)--\w+", command.partition(".py")[2]):
            assert f'"{flag}"' in source, f"{name}.py has no {flag}"
    return len(commands)


def targets():
    """The Makefile's rules."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z_0-9]+):(?!=)", text, re.M)), text


def pages():
    """The text of the README and of the pages in docs/ that it leads to."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def test_commands_of_the_readme_and_of_docs_exist():
    text = pages()
    assert check_commands(text) >= 20
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    made = re.findall(r"^make (\w+)", blocks, re.M) + re.findall(r"`make (\w+)", text)
    assert made and set(made) <= targets()[0], set(made) - targets()[0]


def test_files_and_names_of_the_readme_and_of_docs_exist():
    for page in (ROOT / "README.md", ROOT / "docs" / "files.md"):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert links and [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:\w+/)?\w+)\.py: (\w+)", pages())
    assert len(named) >= 20
    for name, symbol in named:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        defined = rf"^(?:(?:async def|def|class) {symbol}\b|{symbol} *=)"
        assert re.search(defined, source, re.M), f"{name}.py defines no {symbol}"


def test_a_page_says_what_each_script_imports():
    """A row: | [file](file) | step | in → out | imports, optional: those of single functions |."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\.py\].*\| ([^|]+) \|$", text, re.M)
    assert {name for name, _ in rows} == NAMES
    for name, cell in rows:
        said, _, optional = cell.partition(", optional: ")
        top = imported(ROOT / f"{name}.py", top_level=True) & NAMES
        rest = imported(ROOT / f"{name}.py") & NAMES - top
        assert (set(said.replace("–", "").split()), set(optional.split())) == (top, rest), name


MEASURED = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?) ?(?:ms|s|min|minutes|MB|M|tok/s|%|×|points|"
                      r"million|bits)(?!\w)")


def check_measured(text, results):
    """Each number with a unit, outside of code, stands in bench/RESULTS.md; → how many there are."""
    prose = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)|8×H100", "", text, flags=re.S)
    numbers = MEASURED.findall(prose)
    for number in numbers:
        plain = number.replace(",", "")
        assert re.search(rf"(?<![\d.]){re.escape(plain)}(?![\d])", results.replace(",", "")), (
            f"{number} is not in bench/RESULTS.md")
    return len(numbers)


def test_numbers_of_the_readme_were_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    assert check_measured(text, results) >= 10
    with pytest.raises(AssertionError):
        check_measured("It takes 123.45 ms a step.", results)


@each_script
def test_commands_of_a_docstring_exist(path):
    check_commands(ast.get_docstring(tree(path)))


def test_commands_of_the_demo_exist():
    commands = [ast.literal_eval(node.value) for node in ast.walk(tree(ROOT / "demo" / "run.py"))
                if isinstance(node, ast.keyword) and node.arg == "commands"
                or isinstance(node, ast.Assign) and node.targets[0].id in ("NEXT", "PAGE")]
    assert check_commands("\n".join(sum(commands, []))) >= 8 + 5 + 1


def test_makefile_is_short_and_its_commands_and_phony_targets_exist():
    rules, text = targets()
    assert len(text.splitlines()) <= 60 and check_commands(text) >= 1
    phony = re.search(r"^\.PHONY: (.*)", text, re.M)[1].split()
    assert set(phony) <= rules, f"no rule makes {set(phony) - rules}: make would do nothing"


@pytest.mark.parametrize("text", [
    "python nothing.py", "python sample.py --promt x", "torchrun --nproc_per_node=8 nothing.py",
    "$(PY) sample.py --model x \\\n  --nothing 3"])
def test_a_command_that_does_not_exist_is_noticed(text):
    assert check_commands("python sample.py --prompt x --top 3") == 1
    with pytest.raises(AssertionError):
        check_commands(text)
