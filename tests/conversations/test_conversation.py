"""The rules for samples: each with its message, and nothing else ever comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openpangu_sft.conversations.conversation import BadSample, Message, Sample, parse_sample
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
    (record(user(""), assistant("")), ("",), "ua"),
    ({**record(user(), assistant()), "id": 7, "source": "x"}, ("",), "ua"),
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
    (record(user(), assistant(), meta_prompt=["", "a\ud800"]), "meta_prompt 2 holds half a character: '\\ud800'"),
    (record(user(), assistant(), meta_prompt="\udfff"), "meta_prompt 1 holds half a character: '\\udfff'"),
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
    (record(user("a\udc00b"), assistant()), "content of message 1 holds half a character: '\\udc00', a surrogate"),
    (
        record({"role": "system", "content": "S"}, user(), assistant()),
        "message 1 has role system: move its content into",
    ),
    (record({"role": "gpt", "content": "S"}), "message 1 has unknown role 'gpt': use user, assistant, tool"),
    (record({"role": "User", "content": "S"}), "message 1 has unknown role 'User'"),
    (record({"role": "x" * 9999, "content": "S"}), "message 1 has unknown role 'xxxxxxxxxxxx...xxx"),
    (record(assistant()), "message 1 (assistant) comes first: expected user"),
    (record(tool(), assistant()), "message 1 (tool) comes first: expected user"),
    (record(user(), user(), assistant()), "message 2 (user) follows user: expected assistant"),
    (record(user(), tool(), assistant()), "message 2 (tool) follows user: expected assistant"),
    (record(user(), assistant(), assistant()), "message 3 (assistant) follows assistant: expected user or tool"),
    (record(user(), assistant(), tool(), user()), "message 4 (user) follows tool: expected tool or assistant"),
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


TEXT = st.text(st.characters(), max_size=6)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
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


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(text)), Message("assistant", draw(text))]
        for _ in range(draw(st.integers(0, 2))):
            tools = [Message("tool", draw(text)) for _ in range(draw(st.integers(1, 2)))]
            messages += [*tools, Message("assistant", draw(text))]
    return Sample(tuple(draw(st.lists(text, min_size=1, max_size=3))), tuple(messages))


@given(samples())
def test_round_trip_through_a_file(sample: Sample) -> None:
    line = json.dumps(sample.to_json(), ensure_ascii=False).encode("utf-8")
    assert parse_sample(json.loads(line)) == sample
