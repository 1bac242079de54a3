"""
The demo's conversations: no held-out question is taught, every reply is right by recomputation,
conversations have one to four turns, and a question that refers back is answered from what it
refers to.
"""
import gzip
import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from conftest import DOCUMENTS, assert_same_files, mutate
from demo import conversations, kinds
from demo.kinds import held_out
from dialogs import read_conversations
from problems import is_correct, read_problems
from sample import run_python

WORDS = "value number string list file name path index item result error line word text".split()
KINDS = {"identity", "small_talk", "functions", "sums", "tool", "decimals", "bits", "bits_in_steps",
         "spelling", "counting"}


@pytest.fixture(scope="module")
def documents(tmp_path_factory, tokenizer):
    """A hundred documented functions, as the demo's web holds them, some English, a tokenizer."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "documents").mkdir()
    tokenizer.save(folder / "tokenizer")
    texts = [f"{a}tools.find_{b}(x, y=1)\n\nReturn the {b} of the given {a} or nothing.\n\nMore. "
             for a in WORDS for b in WORDS if a != b][:100]
    with gzip.open(folder / "documents" / "train_000.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(0, 100, 10):
            file.write(json.dumps(dict(id=str(i), text="\n".join(texts[i:i + 10]))) + "\n")
        file.write(json.dumps(dict(id="words", text="\n".join(DOCUMENTS))) + "\n")
    return folder


def make(documents, out, **changes):
    settings = dict(data=documents, out=out, tokenizer=None, functions=20, words=400, examples=200,
                    mixed=400, step_by_step=0.2, held_out=40, seed=1)
    conversations.make(SimpleNamespace(**{**settings, **changes}))
    return out


@pytest.fixture(scope="module")
def made(documents, tmp_path_factory):
    return make(documents, tmp_path_factory.mktemp("made"))


def conversations_by_kind(folder):
    return {path.stem: read_conversations(str(path)) for path in sorted(folder.glob("*.jsonl"))
            if path.stem != "held_out" and not path.stem.startswith("practice_")}


def exchanges(folder):
    """(question, reply) of all turns of all conversations."""
    for messages in (m for kind in conversations_by_kind(folder).values() for m in kind):
        turns = [m for m in messages if m["role"] != "system"]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        yield from ((q["content"], a["content"]) for q, a in zip(turns[::2], turns[1::2]))


def text_of(reply):
    return reply if isinstance(reply, str) else reply[-1]["text"]


# ---- held out

def check_nothing_held_out_is_taught(folder):
    taught = {question for question, _ in exchanges(folder)}
    practised = {p["question"] for path in folder.glob("practice_*.jsonl")
                 for p in read_problems(path)}
    problems = [p for p in read_problems(folder / "held_out.jsonl") if p["kind"] != "follow-up"]
    tested = Counter(p["kind"] for p in problems)
    assert not {p["question"] for p in problems} & (taught | practised)
    assert set(tested) == KINDS | {f"{kind}, 2nd turn" for kind in KINDS}
    assert min(tested.values()) >= 2 and len(practised) > 800


def test_no_held_out_question_is_taught_or_practised(made):
    check_nothing_held_out_is_taught(made)


def check_no_wording(folder):
    """Of a sum, its two numbers are held out; of spelling, the word."""
    pairs = {tuple(re.findall(r"\d+", q)) for q, reply in exchanges(folder)
             if text_of(reply).startswith("ones") and "sum" in reply and len(re.findall(r"\d+", q)) == 2}
    words = {reply.partition("#### ")[2].strip(".") for _, reply in exchanges(folder)
             if reply[:11] == "The letters"}
    for p in read_problems(folder / "held_out.jsonl"):
        if p["kind"].startswith("sums"):
            assert tuple(re.findall(r"\d+", p["question"])) not in pairs
        if p["kind"].startswith("spelling"):
            assert p["answer"] not in words


def test_no_wording_of_a_held_out_problem_is_taught(made):
    check_no_wording(made)


def test_held_out_does_not_depend_on_the_seed(documents, made, tmp_path):
    taught = {question for question, _ in exchanges(make(documents, tmp_path, seed=2))}
    tested = {p["question"] for p in read_problems(made / "held_out.jsonl")
              if p["kind"] != "follow-up"}
    assert not taught & tested
    share = sum(held_out(f"{a} + {b}") for a in range(100) for b in range(10)) / 1000
    assert share == pytest.approx(0.2, abs=0.04)


def test_a_held_out_word_has_only_tokens_of_taught_words(tokenizer, documents):
    words = kinds.split_words(conversations.common_words(documents, 400), tokenizer)
    known = Counter(t for w in words.taught for t in set(tokenizer.encode_ordinary(f" {w}")))
    assert len(words.tested) > 10 and not set(words.taught) & set(words.tested)
    for word in words.tested:
        tokens = tokenizer.encode_ordinary(f" {word}")
        assert min(known[t] for t in tokens) >= 1


def test_second_turn_is_asked_after_a_first_one_that_is_not_held_out(made):
    problems = read_problems(made / "held_out.jsonl")
    tested = {p["question"] for p in problems if p["kind"] != "follow-up"}
    for p in problems:
        roles = [m["role"] for m in p["messages"] if m["role"] != "system"]
        if p["kind"].endswith(", 2nd turn"):
            assert roles == ["user", "assistant", "user"]
            assert p["messages"][-3]["content"] not in tested
        assert p["question"] == p["messages"][-1]["content"]


# ---- replies

def steps_of_sum(a, b):
    (a1, a0), (b1, b0) = divmod(a, 10), divmod(b, 10)
    carry = int(a0 + b0 > 9)
    return (f"ones {a0}+{b0}={a0 + b0}, tens {a1}+{b1}={a1 + b1}, {a1 + b1}+{carry}="
            f"{a1 + b1 + carry}. The sum is #### {a + b}.")


def right_reply(question, reply):
    """The reply that a question of its own deserves, by another way than the generator's; None if
    it is of a kind without one."""
    numbers = re.findall(r"\d+(?:\.\d+)?", question)
    if text_of(reply).startswith("ones") and "sum" in reply:
        return steps_of_sum(*map(int, numbers))
    if "larger" in reply:
        larger = max(numbers, key=float)
        return reply if reply.endswith(f"The larger one is #### {larger}.") else larger
    if "number of ones" in question:
        odd = [sum(map(int, numbers[:i + 1])) % 2 for i in range(len(numbers))]
        names = [("even", "odd")[bit] for bit in odd]
        steps = " ".join(f"{bit} {name}" for bit, name in zip(numbers, names))
        at_once = f"It is #### {names[-1]}."
        is_short = reply == at_once and "step" not in question
        return at_once if is_short else f"{steps}. {at_once}"
    asked = r"(?i)(?:(?:can you |how do you )?spell(?: the word)?|what are the letters of) (\w+)[.?]?"
    spelt = re.fullmatch(asked, question)
    if spelt and spelt[1] != "it":
        return f"The letters are #### {' '.join(spelt[1])}."
    return None


def check_replies(folder):
    """Every answer, from its question alone; every step of the steps."""
    checked = Counter()
    refers_back = r"(?i)(And|Now|Plus|What about|How many \w are in it|Spell it)\b.*"
    for question, reply in exchanges(folder):
        if not re.fullmatch(refers_back, question):
            right = right_reply(question, reply)
            assert right is None or reply == right, (question, reply, right)
            checked[question.split()[0].capitalize() if right else None] += 1
    assert checked.total() - checked[None] > 1000 and len(checked) > 6


def test_replies_are_right_by_recomputation(made):
    check_replies(made)


def check_tool(folder):
    for question, reply in exchanges(folder):
        if isinstance(reply, list):
            call, output, text = reply
            assert (call["type"], output["type"]) == ("python", "output")
            assert output["text"] == str(eval(call["text"]))
            assert text["text"] == f"It is #### {output['text']}."
            if not question.lower().startswith("and "):
                assert all(n in call["text"] for n in re.findall(r"\d+", question))


def test_tool_answers_are_right_by_recomputation(made):
    check_tool(made)


def test_a_taught_tool_answer_is_what_the_tool_says(made):
    for kind in ("tool", "counting"):
        for messages in conversations_by_kind(made)[kind][:2]:
            call, output, _ = next(m["content"] for m in messages if m["role"] == "assistant")
            assert run_python(call["text"]) == output["text"]


@pytest.mark.parametrize("reply, expected", [
    (kinds.larger_in_steps("", "9.11", "9.9").reply, "ones 9 and 9 equal, tenths 1 and 9 less. The larger one is #### 9.9."),
    (kinds.larger_in_steps("", "3.2", "3.25").reply,
     "ones 3 and 3 equal, tenths 2 and 2 equal, hundredths 0 and 5 less. The larger one is #### 3.25."),
    (kinds.sum_in_steps("", 67, 58).reply,
     "ones 7+8=15, tens 6+5=11, 11+1=12. The sum is #### 125."),
    (kinds.spelt("", "banana").reply, "The letters are #### b a n a n a.")])
def test_steps_are_those_of_a_known_case(reply, expected):
    assert reply == expected


def test_practised_problems_accept_the_taught_reply(made):
    replies = {q: reply for q, reply in exchanges(made)}
    for path in sorted(made.glob("practice_*.jsonl")):
        for problem in read_problems(path)[:50]:
            assert is_correct(text_of(replies[problem["question"]]), problem), problem
            assert problem["kind"] == path.stem.removeprefix("practice_")


def test_few_bit_problems_are_taught_step_by_step_in_the_asked_share(made, documents, tmp_path):
    for folder, share in ((made, 0.2), (make(documents, tmp_path, step_by_step=1.0), 1.0)):
        replies = [m[-1]["content"] for m in conversations_by_kind(folder)["bits"]]
        steps = sum(not reply.startswith("It is") for reply in replies) / len(replies)
        assert steps == pytest.approx(share, abs=0.1)


# ---- conversations

def test_conversations_have_one_to_four_turns_that_mix_the_kinds(made):
    found = conversations_by_kind(made)
    assert set(found) == KINDS | {"mixed"}
    turns = Counter(sum(m["role"] == "user" for m in messages) for messages in found["mixed"])
    assert set(turns) == {2, 3, 4} and min(turns.values()) > 80
    for kind in KINDS:
        assert {sum(m["role"] == "user" for m in messages) for messages in found[kind]} == {1}


def follow_ups(made, pattern):
    """(reply before, match of the question, reply) of the turns whose question fits."""
    found = []
    for messages in conversations_by_kind(made)["mixed"]:
        for before, question, reply in zip(messages, messages[1:], messages[2:]):
            match = question["role"] == "user" and re.fullmatch(
                f"(?i){pattern}", question["content"])
            if match and before["role"] == "assistant":
                found.append((text_of(before["content"]), match, reply["content"]))
    assert len(found) >= 3
    return found


def test_what_is_added_is_added_to_the_sum_before(made):
    for before, match, reply in follow_ups(made, r"(?:And plus|Plus|Now add|And) (\d+)(?: more)?[?.]?"):
        if "sum is" in before:
            total = int(before.partition("#### ")[2].strip("."))
            assert reply == steps_of_sum(total, int(match[1]))


def test_it_is_the_word_before(made):
    for before, match, reply in follow_ups(made, r"How many (\w) are in it\??"):
        if before.startswith("The letters"):
            word = before.partition("#### ")[2].replace(" ", "").strip(".")
            assert reply[0]["text"] == f'" {word}".count("{match[1].lower()}")'
    for messages in conversations_by_kind(made)["mixed"]:
        words = [re.findall(r'^" (\w+)"', m["content"][0]["text"]) for m in messages
                 if isinstance(m["content"], list)]
        spelt = [reply["content"] for question, reply in zip(messages, messages[1:])
                 if question["content"] in ("Spell it.", "spell it.", "Spell it", "spell it")]
        for reply in spelt:
            assert [reply[20:-1].replace(" ", "")] in words, messages


def test_python_goes_on_with_its_result(made):
    for before, match, reply in follow_ups(made, r"And (plus|minus|times) (\d+)\??"):
        if before.startswith("It is"):
            sign = dict(plus="+", minus="-", times="*")[match[1].lower()]
            assert reply[0]["text"] == f"{before.partition('#### ')[2][:-1]} {sign} {match[2]}"


# ---- functions, identity

def test_functions_are_answered_by_their_own_sentence(made, documents):
    text = "".join(json.loads(line)["text"] for line in
                   gzip.open(documents / "documents" / "train_000.jsonl.gz", "rt"))
    asked = conversations_by_kind(made)["functions"]
    names = {re.search(r"\w+tools\.\w+", m[-2]["content"])[0] for m in asked}
    assert len(names) == 20 and not any(map(held_out, names))
    for messages in asked:
        name = re.search(r"\w+tools\.\w+", messages[-2]["content"])[0]
        assert f"{name}(x, y=1)\n\n{messages[-1]['content']}" in text
    for p in read_problems(made / "held_out.jsonl"):
        assert p["kind"] != "functions" or p["answer"] in text and p["check"] == "overlap"


def test_identity_obeys_the_system_message_in_every_turn(made):
    named = Counter()
    for messages in conversations_by_kind(made)["identity"] + conversations_by_kind(made)["mixed"]:
        said = " ".join(m["content"] for m in messages if m["role"] == "assistant"
                        and isinstance(m["content"], str))
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        name = re.search(r"(?:is|are) ([A-Z]\w+)", system)
        expected = name[1] if name else kinds.NAME
        for found in re.findall(r"(?:I am|name is) (\w+)(?=[.,] |\.$)", said):
            if found not in ("well", "sorry"):
                assert found == expected, messages
                named[found] += 1
    assert named[kinds.NAME] > 100 and len(named) > 5


def test_who_has_another_name_is_often_asked_for_it_in_a_later_turn(made):
    later = Counter()
    for messages in conversations_by_kind(made)["mixed"]:
        name = re.search(r"(?:is|are) ([A-Z]\w+)", messages[0]["content"] * (messages[0]["role"] == "system"))
        if name:
            later["persona"] += 1
            later["asked"] += any(name[1] in str(m["content"]) for m in messages[4::2])
    assert later["asked"] > 0.3 * later["persona"] > 10


def test_frequent_words_of_one_token_are_taught(made, tokenizer, documents):
    words = kinds.split_words(conversations.common_words(documents, 400), tokenizer)
    assert words.whole and not set(words.whole) & set(words.tested)
    assert all(len(tokenizer.encode_ordinary(f" {word}")) == 1 for word in words.whole)


def test_the_test_asks_who_it_is_under_other_names_too(made):
    problems = [p for p in read_problems(made / "held_out.jsonl") if p["kind"].startswith("identity")]
    assert {p["answer"] for p in problems} & set(kinds.PERSONAS)
    assert all(p["answer"] in (p["messages"][0]["content"] + kinds.NAME) for p in problems)


# ---- make

def test_make_is_deterministic(documents, made, tmp_path):
    again = make(documents, tmp_path)
    names = sorted(path.name for path in made.iterdir())
    assert len(names) == 11 + 7 + 1 and names == sorted(path.name for path in again.iterdir())
    assert_same_files(made, again, *names)


def test_too_few_documented_functions_is_one_line(documents, tmp_path):
    with pytest.raises(SystemExit, match="describes .* functions.*; .*lower --functions"):
        make(documents, tmp_path, functions=101)


def test_functions_that_share_a_sentence_count_once(tmp_path):
    (tmp_path / "documents").mkdir()
    text = "".join(f"tools.{name}(x)\n\nReturn one of the values.\n\n" for name in ("a", "b"))
    with gzip.open(tmp_path / "documents" / "train_000.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(dict(id="0", text=text)) + "\n")
    with pytest.raises(SystemExit, match="describes 1 functions .*fewer than --functions 2"):
        conversations.documented_functions(tmp_path, 2)


def test_too_few_words_is_one_line(documents, tmp_path):
    with pytest.raises(SystemExit, match="none of 2 words can be held out.*; .*raise --words"):
        make(documents, tmp_path, words=2)


# ---- mutants

@pytest.mark.parametrize("owner, name, old, new, check", [
    (conversations.Kind, "next", "if exchange.is_test == is_test:", "if True:",
     check_nothing_held_out_is_taught),
    (kinds, "sum_in_steps", 'held_out(f"{a} + {b}")', "held_out(question)", check_no_wording),
    (kinds, "parity", "sum(row[:i + 1])", "sum(row[:i])", check_replies),
    (kinds, "sum_in_steps", "carried = ones // 10", "carried = 0", check_replies),
    (kinds, "larger_in_steps", "max(a, b, key=float)", "max(a, b, key=len)", check_replies),
    (kinds, "counted", "word.count(letter)", "word.count(letter) + 1", check_tool),
    (kinds, "computed", "a - b", "b - a", check_tool)], ids=lambda value: str(value)[:20])
def test_checks_of_make_notice_a_mutant(owner, name, old, new, check, documents, tmp_path,
                                        monkeypatch):
    mutate(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, SystemExit)):
        make(documents, tmp_path)
        check(tmp_path)
