"""The rules for samples: each with its message, and nothing else ever comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from any_sample import JSON, TEXT, samples
from converting import converter
from openpangu_sft.conversations.conversation import Message, Sample, parse_sample
from openpangu_sft.conversations.keys import BadSample
from parameter_ids import named_by


def user(content: object = "问") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: object = "答") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def tool(content: object = "{}") -> dict[str, Any]:
    return {"role": "tool", "content": content}


def record(*messages: object, meta_prompt: object = "") -> dict[str, Any]:
    return {"meta_prompt": meta_prompt, "data": list(messages)}


GOOD: list[tuple[object, tuple[str, ...], str]] = [
    (record(user(), assistant()), ("",), "ua"),
    (record(user(), assistant(), meta_prompt=[""]), ("",), "ua"),
    (record(user(), assistant(), meta_prompt=["一", "", "二"]), ("一", "", "二"), "ua"),
    (record(user(), assistant(), user(), assistant(), meta_prompt="S"), ("S",), "uaua"),
    (record(user(), assistant(), tool(), assistant()), ("",), "uata"),
    (record(user(), assistant(), tool(), tool(), assistant(), user(), assistant()), ("",), "uattaua"),
    (record(user(), assistant(), tool(""), assistant()), ("",), "uata"),
    (record(user(), assistant(), {"role": "function", "content": "{}"}, assistant()), ("",), "uafa"),
    (record({**user(), "weight": None, "calls": None}, {**assistant(), "thinking": None}), ("",), "ua"),
    ({**record(user(), assistant()), "id": 7, "source": "x", "tools": None}, ("",), "ua"),
]


@pytest.mark.parametrize(("content", "meta_prompt", "roles"), GOOD)
def test_good_samples(content: dict[str, Any], meta_prompt: tuple[str, ...], roles: str) -> None:
    sample = parse_sample(content)
    assert sample.meta_prompt == meta_prompt
    assert "".join(message.role[0] for message in sample.data) == roles
    assert [message.content for message in sample.data] == [message["content"] for message in content["data"]]


BAD: list[tuple[object, str]] = [
    (None, "is null, not an object with meta_prompt and data"),
    ([1], "is a list, not an object with meta_prompt and data"),
    ("text", "is a text, not an object"),
    (True, "is a boolean, not an object"),
    (1.5, "is a number, not an object"),
    ({}, 'meta_prompt is missing: write "meta_prompt": [""] for none'),
    ({"data": []}, 'meta_prompt is missing: write "meta_prompt": [""] for none'),
    ({"meta_prompt": [""]}, "data is missing"),
    (record(user(), assistant(), meta_prompt=None), "meta_prompt is null, not a list of texts"),
    (record(user(), assistant(), meta_prompt=3), "meta_prompt is a number, not a list of texts"),
    (record(user(), assistant(), meta_prompt={"0": ""}), "meta_prompt is an object, not a list of texts"),
    (record(user(), assistant(), meta_prompt=[]), 'meta_prompt is an empty list: write [""] for no system prompt'),
    (record(user(), assistant(), meta_prompt=["", None]), "meta_prompt 2 is null, not a text"),
    (record(user(), assistant(), meta_prompt=[["a"]]), "meta_prompt 1 is a list, not a text"),
    (record(user(), assistant(), meta_prompt=["", "a\ud800"]), "meta_prompt holds half a character: '\\ud800'"),
    (record(user(), assistant(), meta_prompt="\udfff"), "meta_prompt holds half a character: '\\udfff'"),
    ({"meta_prompt": "", "data": None}, "data is null, not a list of messages"),
    ({"meta_prompt": "", "data": {}}, "data is an object, not a list of messages"),
    (record(), "data has no messages"),
    (record("hello"), "message 1 is a text, not an object with role and content"),
    (record(user(), None), "message 2 is null, not an object with role and content"),
    (record({"content": "a"}), "role of message 1 is missing, not a text"),
    (record({"role": None, "content": "a"}), "role of message 1 is null, not a text"),
    (record({"role": "user"}), "content of message 1 is missing, not a text"),
    (record(user(), assistant(None)), "content of message 2 is null, not a text"),
    (record(user([{"type": "text", "text": "a"}]), assistant()), "content of message 1 is a list, not a text"),
    (record(user("a\udc00b"), assistant()), "message 1 holds half a character: '\\udc00', a surrogate"),
    (
        record({"role": "system", "content": "S"}, user(), assistant()),
        "message 1 has role system: move its content into",
    ),
    ({**record(user(), assistant()), "mood": 1}, "unknown key mood: if it does not change what is to be learnt, set"),
    (record({**user(), "mood": 1}, assistant()), "unknown key mood of message 1"),
    (record({**user(), "thinking": "t"}, assistant()), "message 1 (user) has thinking: only an assistant's message"),
    (record({**user(), "weight": 0}, assistant()), "message 1 (user) has weight: only an assistant's message may"),
    (record(user(" \n"), assistant()), "message 1 (user) is empty"),
    (record(user(), assistant(" \n")), "message 2 (assistant) is empty: there is nothing to train on but its end"),
    (record(user(), {**assistant(""), "thinking": "t"}), "message 2 (assistant) is empty"),
    (record(user(), {**assistant(), "weight": 0}), "nothing to train on: every answer has weight 0"),
    (record(user(), {**assistant(), "weight": 0.5}), "weight of message 2 is 0.5: tokens are trained on or not"),
    (record(user(), {**assistant(), "weight": "0"}), "weight of message 2 is '0': tokens are trained on or not"),
    (record(user(), {**assistant(), "thinking": 1}), "thinking of message 2 is a number, not a text"),
    (record(user(), {**assistant(), "thinking": "\ud800"}), "thinking of message 2 holds half a character"),
    (record(user(), {**assistant(), "calls": 1}), "message 2: calls is a number, not a list of calls"),
    (record(user(), {**assistant(), "calls": "[]"}), "message 2: calls is an empty list, not a list of calls"),
    (record(user(), {**assistant(), "calls": "f"}), "message 2: calls is a text that cannot be read: not valid JSON"),
    (record(user(), {**assistant(), "calls": ["f"]}), "message 2: a call names no function"),
    (record(user(), {**assistant(), "calls": [{"name": "\ud800"}]}), "a call in message 2 holds half a character"),
    ({**record(user(), assistant()), "tools": 1}, "tools is a number, not a list of tool objects"),
    ({**record(user(), assistant()), "tools": '[{"name": "\\ud800"}]'}, "tools holds half a character"),
    (record({"role": "gpt", "content": "S"}), "message 1 has unknown role 'gpt': use user, assistant, tool, function"),
    (record({"role": "User", "content": "S"}), "message 1 has unknown role 'User'"),
    (record({"role": "x" * 9999, "content": "S"}), "message 1 has unknown role 'xxxxxxxxxxxx...xxx"),
    (record(assistant()), "message 1 (assistant) comes first: expected user"),
    (record(tool(), assistant()), "message 1 (tool) comes first: expected user"),
    (record(user(), user(), assistant()), "message 2 (user) follows user: expected assistant"),
    (record(user(), tool(), assistant()), "message 2 (tool) follows user: expected assistant"),
    (
        record(user(), assistant(), assistant()),
        "message 3 (assistant) follows assistant: expected user or tool or function",
    ),
    (
        record(user(), assistant(), tool(), user()),
        "message 4 (user) follows tool: expected tool or function",
    ),
    (record(user()), "the last message is the user's: a sample must end with an assistant message"),
    (record(user(), assistant(), user()), "the last message is the user's"),
    (record(user(), assistant(), tool()), "the last message is the tool's"),
]


@pytest.mark.parametrize(("content", "reason"), named_by(1, *BAD))
def test_bad_samples(content: object, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse_sample(content)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 200


ROLE = st.sampled_from(["user", "assistant", "tool", "system", "USER"])
MESSAGE = st.one_of(st.fixed_dictionaries({"role": st.one_of(ROLE, JSON), "content": st.one_of(TEXT, JSON)}), JSON)
RECORD = st.fixed_dictionaries(
    {"meta_prompt": st.one_of(TEXT, st.lists(st.one_of(TEXT, JSON), max_size=2), JSON), "data": st.lists(MESSAGE)}
)


@given(st.one_of(JSON, RECORD, st.dictionaries(st.sampled_from(["meta_prompt", "data", "id"]), JSON)))
@example(record(user("\ud800"), assistant()))
def test_any_json_is_a_sample_or_a_bad_one(content: object) -> None:
    try:
        sample = parse_sample(content)
    except BadSample as error:
        reason = str(error)
    else:
        assert isinstance(sample, Sample)
        return
    reason.encode("utf-8")  # goes into logs and files
    assert reason
    assert "\n" not in reason


def test_thinking_calls_weight_and_tools() -> None:
    calls = '[{"name": "f", "arguments": {"x": 1.50}}]'
    answer = {**assistant("a"), "thinking": "t", "calls": calls, "weight": 0}
    content = {**record(user(), answer, tool(), assistant()), "tools": [{"name": "f"}]}
    sample = parse_sample(content)
    assert sample.tools == '[{"name":"f"}]'
    assert sample.data[1] == Message("assistant", "a", "t", calls, trained=False)
    assert sample.to_json() == {**content, "meta_prompt": [""], "tools": '[{"name":"f"}]'}
    listed = {**assistant(""), "calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    assert parse_sample(record(user(), listed)).data[1].calls == '[{"name":"f","arguments":{}}]'


def test_the_models_own_tokens_become_structure_unless_there_is_some() -> None:
    text = '[unused16]t[unused17]a[unused11][{"name": "f", "arguments": {}}][unused12]'
    calls = '[{"name": "f", "arguments": {}}]'
    assert parse_sample(record(user(), assistant(text))).data[1] == Message("assistant", "a", "t", calls)
    for extra in ({"thinking": "t"}, {"calls": calls}):
        assert parse_sample(record(user(), {**assistant(text), **extra})).data[1].content == text


def test_rules_are_shared() -> None:
    rules = converter("ignore_keys=[mood]", "turns=lenient").rules
    for _ in range(2):
        parse_sample({**record(user(), user(), {**assistant(), "mood": 1}), "id": 7}, rules)
    assert rules.keys.counts == {"mood": 2, "id": 2}
    assert rules.changes == {"messages of one user in a row joined": 2}


@given(samples())
def test_round_trip_through_a_file(sample: Sample) -> None:
    line = json.dumps(sample.to_json(), ensure_ascii=False).encode("utf-8")
    assert parse_sample(json.loads(line)) == sample
