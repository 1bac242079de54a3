"""
demo/lookups.py on a few documents: what it teaches is to copy, and what it tests was never taught.
"""
import json
import random
import re

import pytest

import search
from conftest import run_main
from demo import lookups
from problems import read_lines, read_problems
from search import CAN_SEARCH, NOTHING
from subjects import ASKED, is_held_out


def name_of(n):
    return f"pack{n % 7}.mod{n % 5}.part{n}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A folder of documents and what is written from them → (conversations of search, of rag, the
    folder)."""
    folder = tmp_path_factory.mktemp("lookups")
    (folder / "documents").mkdir()
    tokenizer.save(folder / "tokenizer")
    rows = [dict(text=f"{name_of(n)}(x)\nReturn the {n}th part of the whole list.\nMore of it.")
            for n in range(90)]
    (folder / "documents" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sums = dict(messages=[lookups.user("What is 2 + 3?"), lookups.assistant("It is #### 5.")])
    (folder / "sums.jsonl").write_text(json.dumps(sums) + "\n")
    run_main(lookups, "--data", folder, "--out", folder, "--examples", 600, "--held_out", 9)
    return [read(folder / "search.jsonl"), read(folder / "rag.jsonl"), folder]


def read(path):
    return read_lines(path, lambda row: row["messages"], "")


def lookups_of(conversations):
    """(question, query, what was found, answer) of each turn in which something is looked up."""
    for messages in conversations:
        for question, reply in zip(messages, messages[1:]):
            if isinstance(reply["content"], list):
                assert [p["type"] for p in reply["content"]] == ["search", "output", "text"]
                yield question["content"], *(part["text"] for part in reply["content"])


def test_the_query_is_copied_from_the_question_and_the_answer_from_the_passage(made):
    looked_up = list(lookups_of(made[0]))
    assert len(looked_up) > 480 < len(made[0])
    for question, query, found, answer in looked_up:
        assert query in question and query[0] == " "
        assert answer in found or found == NOTHING
    for messages in made[1]:
        question, answer = (message["content"] for message in messages)
        assert answer in question.partition("Question:")[0]


def test_no_held_out_subject_is_taught_and_none_that_is_taught_is_tested(made):
    text = json.dumps(made[:2])
    taught = set(re.findall(r"pack\d+\.mod\d+\.part\d+", text))
    held = {name_of(n) for n in range(90) if is_held_out(name_of(n))}
    assert held and not taught & held
    tests = read_problems(made[2] / "held_out_search.jsonl")
    asked = set(re.findall(r"pack\d+\.mod\d+\.part\d+", json.dumps(tests)))
    assert asked <= held and len(asked) == 9
    assert not any(name in text for name in lookups.NAMES)


def test_other_questions_come_under_the_same_system_message_and_are_not_looked_up(made):
    assert all(messages[0]["content"].endswith(CAN_SEARCH) for messages in made[0])
    others = [m for m in made[0] if not list(lookups_of([m]))]
    assert others and all(m[-1]["content"] == "It is #### 5." for m in others)
    lasts = [m[-1]["content"] for m in made[0] if len(m) > 3]
    assert "It is #### 5." in lasts and any(isinstance(last, list) for last in lasts)


def test_sometimes_nothing_is_found_and_then_the_assistant_does_not_know(made):
    answers = {answer for _, _, passage, answer in lookups_of(made[0]) if passage == NOTHING}
    assert len(answers) >= 3 and all("know" in a or "not learnt" in a for a in answers)


def test_invented_facts_are_found_in_their_folder(made):
    index = search.build_index([made[2] / "notes"], 256)
    notes = [p for p in read_problems(made[2] / "held_out_search.jsonl") if p["kind"] == "notes"]
    assert len(notes) == len(lookups.NAMES)
    assert all(index.look_up(p["question"]) == p["answer"] for p in notes)


def test_the_same_seed_writes_the_same_conversations(made, tmp_path):
    (tmp_path / "sums.jsonl").write_bytes((made[2] / "sums.jsonl").read_bytes())
    run_main(lookups, "--data", made[2], "--out", tmp_path, "--examples", 600, "--held_out", 9)
    for name in ("search.jsonl", "rag.jsonl", "held_out_search.jsonl"):
        assert (tmp_path / name).read_bytes() == (made[2] / name).read_bytes()


def test_several_things_are_looked_up_in_one_conversation_and_each_in_its_own_passage(made):
    several = [list(lookups_of([messages])) for messages in made[0]]
    assert {1, 2} <= set(map(len, several))
    for looked_up in several:
        for _, query, found, _ in looked_up:
            assert found == NOTHING or query.split()[-1] in found


def test_every_token_of_letters_may_be_copied(made, tokenizer):
    words = lookups.letters_of_tokens(tokenizer)
    assert all(word.isalpha() for word in words) and len(words) == len(set(words))
    assert {"the", "function"} & set(words)


def test_a_passage_holds_its_answer_whatever_its_length(made, tokenizer):
    names = {name_of(n): (f"Return the {n}th part of the whole list.", "") for n in range(9)}
    long = {name: (sentence, f"{name}({'a' * 90})\n{sentence} {'More. ' * 40}")
            for name, (sentence, _) in names.items()}
    material = lookups.Material(long, tokenizer)
    rng = random.Random(0)
    for _ in range(500):
        name, passage, answer = lookups.fact(material, rng)
        assert name in passage or name.split()[0] in passage
        assert answer in passage and any(asked.format(f=name) for asked in ASKED)
