"""
dialogs.py: what others write as conversations is read whole, refused by file and line, or left out
and counted; and its tokens are the same however many processes made them, and from the disk.
"""
import doctest
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import dialogs
import download
from conftest import ROOT
from dialogs import (Conversations, as_conversations, load_conversations, read_conversations,
                     with_calculations)
from sample import run_python
from training import Ranks

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
pytestmark = pytest.mark.usefixtures("own_folder")
USER = dict(role="user", content="Hi")
BOTH = [USER, dict(role="assistant", content="Yo")]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Where sets and tokens are kept."""
    monkeypatch.setattr(dialogs, "FOLDER", tmp_path / "kept")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- rows

@pytest.mark.parametrize("row, said", {
    "ours": (dict(id="1", messages=BOTH), BOTH),
    "smoltalk": (dict(messages=BOTH, source="magpie"), BOTH),
    "ultrachat, no_robots": (dict(prompt="Hi", prompt_id="1", messages=BOTH, category="x"), BOTH),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"},
                                    {"from": "gpt", "value": "Yo"}]}, BOTH),
    "sharegpt with roles": (dict(conversations=BOTH), BOTH),
    "alpaca": (dict(instruction="Hi", input="", output="Yo"), BOTH),
    "dolly": (dict(instruction="Hi", context="", response="Yo", category="x"), BOTH),
    "prompt": (dict(prompt="Hi", completion="Yo"), BOTH),
    "trl": (dict(prompt=BOTH[:1], completion=BOTH[1:]), BOTH),
    "question": (dict(question="Hi", answer="Yo"), BOTH),
    "orca": (dict(system_prompt="Be.", question="Hi", response="Yo"),
             [dict(role="system", content="Be."), *BOTH]),
    "absent columns are null in a .parquet": (dict(instruction="Hi", output="Yo", chosen=None,
                                                   messages=None, rejected=None), BOTH),
    "input": (dict(instruction="Add.", input="1 1", output="2"),
              [dict(role="user", content="Add.\n\n1 1"), dict(role="assistant", content="2")])
    }.values())
def test_rows_of_each_kind_are_read(row, said):
    assert as_conversations(row) == [said]


def test_each_instance_of_self_instruct_is_a_conversation():
    row = dict(instruction="Add.", instances=[dict(input="1 1", output="2"),
                                              dict(input="", output="3")])
    found = as_conversations(row)
    assert [messages[0]["content"] for messages in found] == ["Add.\n\n1 1", "Add."]
    assert [messages[1]["content"] for messages in found] == ["2", "3"]


def test_the_best_path_of_a_tree_is_taken_to_its_last_reply():
    def node(role, text, *replies, **more):
        return dict(role=role, text=text, replies=list(replies), **more)
    best = node("assistant", "good", node("prompter", "why?", node("assistant", "so", rank=None)))
    tree = node("prompter", "Hi", node("assistant", "bad", rank=1), dict(best, rank=0),
                node("assistant", "worst", rank=0, deleted=True), node("assistant", "unranked", best))
    found = as_conversations(dict(message_tree_id="1", tree_state="ready_for_export", prompt=tree))
    assert [m["content"] for m in found[0]] == ["Hi", "good", "why?", "so"]
    tree["replies"][1]["replies"][0]["replies"] = []
    assert len(as_conversations(dict(tree_state="x", prompt=tree))[0]) == 2


def call(name, arguments, number=None):
    return dict(id=number, type="function", function=dict(name=name, arguments=arguments))


def test_thoughts_and_our_tools_become_parts_of_one_turn():
    messages = [USER, dict(role="assistant", content=None, reasoning_content="hm", tool_calls=[
        call("python", '{"code": "6*7"}', "a"), call("search", dict(query="moa"), "b")]),
        dict(role="tool", tool_call_id="b", content="a bird"),
        dict(role="tool", tool_call_id="a", content=[dict(type="text", text="42")]),
        dict(role="assistant", content="42 birds."), USER,
        dict(role="assistant", content="Yo", tool_calls=None, reasoning_content=None)]
    (found,) = as_conversations(dict(messages=messages))
    assert [m["role"] for m in found] == ["user", "assistant", "user", "assistant"]
    assert [(part["type"], part["text"]) for part in found[1]["content"]] == [
        ("think", "hm"), ("python", "6*7"), ("output", "42"), ("search", "moa"),
        ("output", "a bird"), ("text", "42 birds.")]


TOOL = dict(role="tool", content="1")
LEFT_OUT = {
    "calls the tool weather": [USER, dict(role="assistant", tool_calls=[call("weather", "{}")]),
                               TOOL, BOTH[1]],
    "without a result": [USER, dict(role="assistant", tool_calls=[call("python", "1")]), BOTH[1]],
    "other arguments": [USER, dict(role="assistant", tool_calls=[call("python", '{"a": 1}')]),
                        TOOL, BOTH[1]],
    "an empty reply": [USER, dict(role="assistant", content=" ")]}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_what_our_tokens_cannot_say_is_left_out_and_counted(why, tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", dict(messages=BOTH), *2 * [dict(messages=LEFT_OUT[why])])
    assert read_conversations(path) == [BOTH]
    line = capsys.readouterr().out
    assert line.startswith(f"{path}: 2 rows are left out: 2 ") and why in line
    only = write(tmp_path / "only.jsonl", dict(messages=LEFT_OUT[why]))
    with pytest.raises(SystemExit, match=f"only.jsonl has no conversation .*{why}.*; .*repair"):
        read_conversations(only)


@pytest.mark.parametrize("row, why", [
    (dict(text="A document."), "the columns text are none of: messages"), ({}, r"columns \(none\)"),
    (dict(prompt="a", chosen="b", rejected="c"), "chosen and rejected is a preference"),
    (dict(question="a", answer="b", check="final"), "check is a problem to be asked"),
    (dict(conversations=[]), "conversations must be a list"),
    (dict(conversations=[{"from": "human"}]), "there is no value"),
    (dict(instruction="a", output=7), "output must be a text"),
    (dict(messages=[dict(role="assistant", tool_calls="x")]), "tool_calls that are no list"),
    (dict(tree_state="x", prompt=dict(role="king", text="a")), "there is no king")])
def test_a_row_of_no_known_kind_is_one_line_with_its_place(row, why, tmp_path):
    path = write(tmp_path / "x.jsonl", dict(messages=BOTH), row)
    with pytest.raises(SystemExit, match=f"x.jsonl, line 2: .*{why}.*; repair the file") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


# ---- GSM8K's calculator

def test_a_calculation_becomes_a_call_whose_output_is_pythons():
    parts = with_calculations("48/2 = <<48/2=24>>24 clips, 5% = <<5%=0.05>>0.05 #### 24")
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "48/2 = "), ("python", "48/2"), ("output", "24.0"),
        ("text", "24 clips, 5% = 0.05 #### 24")]
    assert run_python(parts[1]["text"], timeout=60) == parts[2]["text"]


@pytest.mark.parametrize("code", ["9**9**9", "a+1", "1/0", "__import__('os')", "(1", "1,2", ""])
def test_only_arithmetic_is_calculated(code):
    assert dialogs.calculate(code) is None
    assert [part["type"] for part in with_calculations(f"x <<{code}=1>>1")] == ["text"]


def test_a_wrong_calculation_is_not_called():
    assert [part["type"] for part in with_calculations("<<2+2=5>>5")] == ["text"]
    assert doctest.testmod(dialogs).failed == 0


# ---- files

def test_files_that_cannot_be_read_are_one_line(tmp_path):
    whole = gzip.compress(json.dumps(dict(messages=BOTH)).encode() * 999)
    lines = b'{"messages": []}\n'
    for name, data, why in (
            ("cut.jsonl.gz", whole[:len(whole) // 2], "after line 0, .*ended"),
            ("no.jsonl.gz", b"abc", "not a gzip file"), ("empty.jsonl", b"", "is empty"),
            ("blank.jsonl", b"\n\n", "it is empty"),
            ("latin.jsonl", "{}é".encode("latin-1"), "line 1: byte 3 is not UTF-8"),
            ("x.parquet", b"PAR1", "x.parquet"), ("x.json", b"{}", "must be a list of rows"),
            ("x.txt", lines, "is none of .jsonl"), ("x.json", b"[1", "it is not JSON")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SystemExit, match=why) as error:
            read_conversations(str(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_a_mistyped_name_lists_the_names(tmp_path):
    for name in ("smolltalk", str(tmp_path)):
        with pytest.raises(SystemExit, match="cannot be read: .*; give a file .*; .*smoltalk, ultra"):
            read_conversations(name)


def test_a_json_list_and_a_parquet_are_read_as_lines_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rows = [dict(messages=BOTH, source="a")] * 3
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = read_conversations(write(tmp_path / "x.jsonl", *rows) + ":0.5")
    assert len(expected) == 2
    for name in ("x.json", "x.parquet"):
        assert read_conversations(f"{tmp_path / name}:0.5") == expected


@needs_shared
@pytest.mark.parametrize("name, count", [
    ("dolly_short_answers", 3791), ("instruction_1100", 1100), ("oasst1_valid_conversations", 953),
    ("oasst_trees", 100), ("taskmaster4_coffee_dialogues", 1520), ("oasst_tree_bestpaths", 100)])
def test_real_files_are_read_whole(name, count):
    found = read_conversations(str(SHARED / "chat" / f"{name}.jsonl.gz"))
    assert len(found) == count and all(m[-1]["role"] == "assistant" for m in found)


@needs_shared
def test_paths_of_real_trees_are_those_that_were_published():
    trees, paths = (read_conversations(str(SHARED / "chat" / f"oasst_{name}.jsonl.gz"))
                    for name in ("trees", "tree_bestpaths"))
    assert trees == paths


@needs_shared
def test_nearly_all_calculations_of_gsm8k_become_calls():
    path = SHARED / "gsm8k" / "train.jsonl"
    marks = path.read_text(encoding="utf-8").count("<<")
    parts = [part for m in read_conversations(str(path)) for part in m[1]["content"]
             if not isinstance(part, str)]
    calls = sum(part["type"] == "python" for part in parts)
    assert len(read_conversations(str(path))) == 7473 and 0.97 * marks < calls < marks
    assert not any("<<" in part["text"] and ">>" in part["text"] for part in parts)


# ---- sets by name

def test_a_set_is_downloaded_once_and_read(tmp_path, monkeypatch):
    asked = []

    def find_files(source, num_shards, out, mirror=None):
        return [dict(name="a.jsonl"), dict(name="b.jsonl")]

    def fetch(file, source, out, mirror=None):
        asked.append((source, out.name))
        return Path(write(tmp_path / file["name"], dict(question="Hi", answer="Yo")))

    monkeypatch.setattr(download, "find_files", find_files)
    monkeypatch.setattr(download, "fetch", fetch)
    assert read_conversations("gsm8k") == [BOTH, BOTH] and asked == [("gsm8k", "gsm8k")] * 2
    with pytest.raises(SystemExit, match="download it first, with python download.py gsm8k"):
        dialogs.find_files("gsm8k", world_size=2)


@pytest.mark.parametrize("name, files, chosen", [
    ("smoltalk", ["data/all/train-00000-of-00009.parquet", "data/all/test-00000-of-00001.parquet"],
     ["train-00000-of-00009.parquet"]),
    ("ultrachat", ["data/train_gen-00000-of-00003-a.parquet", "data/test_sft-0-of-1.parquet",
                   "data/train_sft-00000-of-00003-a.parquet"],
     ["train_sft-00000-of-00003-a.parquet"]),
    ("oasst", ["2023-11-05_oasst2_all.trees.jsonl.gz", "2023-11-05_oasst2_ready.trees.jsonl.gz",
               "2023-11-05_oasst2_ready.messages.jsonl.gz", "data/train-0-of-1.parquet"],
     ["2023-11-05_oasst2_ready.trees.jsonl.gz"])])
def test_of_a_set_the_files_to_train_on_are_chosen(name, files, chosen, monkeypatch):
    def listing(url, parse):
        if "/revision/" in url:
            return "0" * 40, None
        return [(path, 1, None) for path in files], None

    monkeypatch.setattr(download, "listing", listing)
    revision, found = download.hub_files(name, None, None)
    assert [file["name"] for file in found] == chosen and set(dialogs.SETS) <= set(download.NAMES)


# ---- tokens

def same(one, other):
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def some_rows(count):
    return [dict(messages=[dict(role="user", content=f"{i}?"),
                           dict(role="assistant", content=f"{i}! " * (i % 7 + 1))])
            for i in range(count)]


def test_several_processes_make_the_tokens_of_one(tokenizer, tmp_path, monkeypatch):
    path = Path(write(tmp_path / "x.jsonl", *some_rows(60), dict(messages=LEFT_OUT["an empty reply"])))
    whole, line = dialogs.render_file(tokenizer, path, 1.0)
    monkeypatch.setattr(dialogs, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(dialogs, "CORES", 1)
    assert len(list(dialogs.read_blocks(path))) >= 3
    parts, again = dialogs.render_file(tokenizer, path, 1.0)
    assert len(whole) == 60 and same(whole, parts) and line == again and "1 rows are left" in line


def test_conversations_are_what_render_gives(tokenizer):
    rendered = [tokenizer.render(row["messages"]) for row in some_rows(9)]
    both = Conversations.joined([Conversations.of(rendered[:4]), Conversations.of(rendered[4:])])
    assert same(both, Conversations.of(rendered)) and len(set(both.hashes.tolist())) == 9
    for k, (ids, mask) in enumerate(rendered):
        tokens = slice(both.starts[k], both.ends[k])
        assert both.ids[tokens].tolist() == ids and both.mask[tokens].tolist() == mask
        assert both.learnt[k] == sum(mask) and both.lengths()[k] == len(ids)
    assert same(both.pick([2, 2]).pick([1]), both.pick([2]))


def test_tokens_are_kept_for_this_file_and_tokenizer_and_made_again_if_damaged(
        tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dialogs, "LEAST_KEPT", 1)
    path = Path(write(tmp_path / "x.jsonl", *some_rows(20)))
    found, _ = dialogs.rendered_file(tokenizer, path, 1.0)
    (kept,) = (tmp_path / "kept" / "tokens").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(dialogs, "render_file", None)         # must not be called
        assert same(dialogs.rendered_file(tokenizer, path, 1.0)[0], found)
        with pytest.raises(TypeError):
            dialogs.rendered_file(tokenizer, path, 0.5)
    kept.write_bytes(kept.read_bytes()[:-100])
    assert same(dialogs.rendered_file(tokenizer, path, 1.0)[0], found)
    assert "is damaged" in capsys.readouterr().out
    write(path, *some_rows(21))
    assert len(dialogs.rendered_file(tokenizer, path, 1.0)[0]) == 21


def test_copies_and_shares_of_several_files_are_in_order(tokenizer, tmp_path):
    rows = some_rows(6)
    paths = [write(tmp_path / name, *part) for name, part in (("a.jsonl", rows[:4]),
                                                              ("b.jsonl", rows[4:]))]
    found, lines = load_conversations([f"{paths[0]}:1.5", f"{paths[1]}:2"], tokenizer, Ranks())
    order = [0, 1, 2, 3, 0, 2, 4, 5, 4, 5]
    texts = [tokenizer.decode(found.ids[a:b].tolist()) for a, b in zip(found.starts, found.ends)]
    assert [int(text.split("?")[0].rpartition(">")[2]) for text in texts] == order and not lines
    assert len(found.ids) < 2 * sum(len(tokenizer.render(r["messages"])[0]) for r in rows)
    with pytest.raises(SystemExit, match="asks for nothing; give a weight above 0"):
        load_conversations([f"{paths[0]}:0"], tokenizer, Ranks())
