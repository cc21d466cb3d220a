"""Questions and answers in columns of their own, and columns with the user's names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from converting import answer, chat, convert, converter, refused, says, user
from openpangu_sft.conversations.conversation import Message
from parameter_ids import named_by

A = says("assistant", "a")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a", "system": None, "history": None, "tools": ""},
        {"instruction": "", "input": "q", "output": "a"},
        {"instruction": None, "input": "q", "output": "a"},
        {"input": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [says("user", "q")], "completion": [A]},
        {"prompt": [says("user", "q")], "completion": A},
        {"prompt": "q", "completion": [A]},
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "context": "", "response": "a", "category": "qa"},
        {"query": "q", "response": "a", "history": []},
        {"question": "q", "answer": "a"},
        {"question": "q", "answers": "a"},
        {"instruction": "q", "prompt": "", "output": "a", "response": None, "answer": ""},
    ],
)
def test_names_of_columns(record: dict[str, Any]) -> None:
    sample = convert(record)
    assert (sample.meta_prompt, sample.data) == (("",), (user(), answer()))


def test_the_input_follows_the_instruction_after_a_newline() -> None:
    assert convert({"instruction": "q", "input": "r", "output": "a"}).data[0] == user("q\nr")
    assert convert({"instruction": "q", "context": "r", "response": "a"}).data[0] == user("q\nr")


@pytest.mark.parametrize(
    "history",
    [
        [["b", "c"]],
        json.dumps([["b", "c"]]),
        [says("user", "b"), says("assistant", "c")],
        [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}],
    ],
)
def test_history(history: object) -> None:
    record = {"instruction": "q", "output": "a", "history": history}
    assert convert(record).data == (user("b"), answer("c"), user(), answer())


@pytest.mark.parametrize("history", [None, "", [], "[]"])
def test_no_history(history: object) -> None:
    assert len(convert({"query": "q", "response": "a", "history": history}).data) == 2


@pytest.mark.parametrize(
    "answers",
    [
        [{"name": "f", "arguments": {"x": 1}}],
        '[{"name": "f", "arguments": {"x": 1}}]',
        {"name": "f", "arguments": {"x": 1}},
    ],
)
def test_xlam(answers: object) -> None:
    record = {"id": 0, "query": "q", "answers": answers, "tools": '[{"name": "f", "parameters": {}}]'}
    sample = convert(record)
    assert sample.data == (user(), answer("", calls='[{"name":"f","arguments":{"x":1}}]'))
    assert sample.tools == '[{"name":"f","parameters":{}}]'


def test_tools_and_tags_beside_columns() -> None:
    record = {"instruction": "q", "output": "<think>t</think>a", "tools": [{"name": "f"}]}
    sample = convert(record)
    assert (sample.tools, sample.data[1]) == ('[{"name":"f"}]', answer("a", "t"))
    text = '{"name": "f", "arguments": {}}'
    assert convert({"instruction": "q", "output": text}).data[1] == answer(text)


@pytest.mark.parametrize(
    ("change", "reason"),
    named_by(
        1,
        ({"output": ...}, "has no answer: keys found are instruction; name its column in data.columns.response"),
        ({"output": None}, "has no answer"),
        ({"output": 4}, "output is a number, not a text"),
        ({"output": ["a", "b"]}, "output is a list, not a text: give each record one answer"),
        ({"output": []}, "output is a list, not a text"),
        ({"output": {"text": "a"}}, "output is an object, not a text"),
        ({"response": "b"}, "has output and response: say in data.columns which is which, or in data.ignore_keys"),
        ({"prompt": "q"}, "has instruction and prompt: say in data.columns"),
        ({"input": "r", "context": "s"}, "has input and context: say in data.columns"),
        ({"instruction": ...}, "has no question: instruction, prompt, query, question and input, context are missing"),
        ({"instruction": ["q"]}, "message 1 is a text, not an object"),
        ({"instruction": {"q": 1}}, "instruction is an object, not a text"),
        ({"instruction": [says("user", "q")], "input": "r"}, "instruction is a list, not a text"),
        ({"input": {"r": 1}}, "input is an object, not a text"),
        ({"input": 0}, "input is a number, not a text"),
        ({"output": ..., "answers": {"text": ["a"], "answer_start": [0]}}, "answers is an object, not a text"),
        ({"output": ..., "answers": ["a"]}, "answers is a list, not a text"),
        ({"output": ..., "answers": "[]"}, "message 2: has no call"),
        ({"output": ..., "answers": "[broken"}, "message 2: the call is a text that cannot be read"),
        ({"history": "b"}, "history is a text that cannot be read"),
        ({"history": {"b": "c"}}, "history is an object, not a list of [user, assistant] pairs"),
        ({"history": 5}, "history is a number, not a list"),
        ({"history": [["b", "c"], ["d"]]}, "round 2 of history is not a pair of texts [user, assistant]"),
        ({"history": [["b", None]]}, "round 1 of history is not a pair"),
        ({"history": ["bc"]}, "round 1 of history is not a pair"),
        ({"history": [["b", ""]]}, "message 2 (assistant) is empty"),
        ({"target": "a"}, "unknown key target"),
    ),
)
def test_columns_that_are_refused(change: dict[str, Any], reason: str) -> None:
    record = {"instruction": "q", "output": "a", **change}
    assert reason in refused({key: value for key, value in record.items() if value is not ...})


# --- data.columns


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        ("{prompt: ask, response: reply}", {"ask": "q", "reply": "a"}),
        ("{messages: talk}", {"talk": [says("user", "q"), A]}),
        (
            "{messages: talk, role: who, content: what}",
            {"talk": [{"who": "user", "what": "q"}, {"who": "gpt", "what": "a"}]},
        ),
        ("{prompt: a, response: prompt}", {"a": "q", "prompt": "a"}),
        ("{messages: talk}", {"talk": [says("user", "q"), A], "messages": None}),
        ("{messages: talk}", {"messages": None, "talk": [says("user", "q"), A]}),
        ("{role: who}", {"messages": [{"who": "user", "role": None, "content": "q"}, A]}),
    ],
)
def test_names_of_the_users(columns: str, record: dict[str, Any]) -> None:
    found = converter(f"columns={columns}")
    assert found(record) == convert(chat(A))
    assert not found.unseen


def test_all_columns_can_be_named() -> None:
    columns = "{prompt: p, input: i, response: r, system: s, history: h, tools: t}"
    record = {"p": "q", "i": "x", "r": "a", "s": "sys", "h": [["b", "c"]], "t": [{"name": "f"}]}
    sample = convert(record, f"columns={columns}")
    assert (sample.meta_prompt, sample.tools) == (("sys",), '[{"name":"f"}]')
    assert sample.data == (user("b"), answer("c"), user("q\nx"), answer())


@pytest.mark.parametrize(
    ("columns", "record", "reason"),
    named_by(
        2,
        (
            "{messages: talk}",
            {"talk": [], "messages": [A]},
            "has talk (data.columns.messages) and messages: ignore or rename one of them",
        ),
        (
            "{role: who}",
            {"messages": [{"who": "user", "role": "gpt", "content": "q"}]},
            "has who (data.columns.role) and role",
        ),
        ("{response: reply}", {"prompt": "q", "reply": 4}, "response is a number, not a text"),
    ),
)
def test_names_of_the_users_that_are_refused(columns: str, record: dict[str, Any], reason: str) -> None:
    assert reason in refused(record, f"columns={columns}")


def test_a_column_that_no_record_has_is_known() -> None:
    found = converter("columns={response: reply}")
    assert found({"prompt": "q", "completion": "a"}).data == (user(), Message("assistant", "a"))
    assert found.unseen == {"reply"}


def test_an_ignored_key_makes_room_for_a_column() -> None:
    record = {"output": "b", "reply": "a", "instruction": "q"}
    assert convert(record, "columns={response: reply}", "ignore_keys=[output]") == convert(chat(A))
