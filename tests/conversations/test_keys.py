"""Keys of records, messages and parts: understood, harmless and counted, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converting import chat, convert, converter, refused, says
from openpangu_sft.conversations.keys import HARMLESS, MEDIA, BadSample

ANSWER = says("assistant", "a")
CALL = {"name": "f", "arguments": {}}
# The same unknown key in every place that has keys.
PLACES: dict[str, Any] = {
    "openai": lambda extra: chat(ANSWER, **extra),
    "sharegpt": lambda extra: {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        **extra,
    },
    "alpaca": lambda extra: {"instruction": "q", "output": "a", **extra},
    "samples": lambda extra: {"meta_prompt": [""], "data": [says("user", "q"), ANSWER], **extra},
    "message": lambda extra: chat({**ANSWER, **extra}),
    "question": lambda extra: {"messages": [{**says("user", "q"), **extra}, ANSWER]},
    "turn": lambda extra: {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **extra}],
    },
    "sample-message": lambda extra: {"meta_prompt": "", "data": [says("user", "q"), {**ANSWER, **extra}]},
    "part": lambda extra: chat(says("assistant", [{"type": "text", "text": "a", **extra}])),
    "history": lambda extra: {
        "instruction": "q",
        "output": "a",
        "history": [says("user", "q"), {**ANSWER, **extra}],
    },
    "call": lambda extra: chat(says("assistant", None, tool_calls=[{"type": "function", "function": CALL, **extra}])),
    "function": lambda extra: chat(says("assistant", None, tool_calls=[{"function": {**CALL, **extra}}])),
    "tool-call-tag": lambda extra: chat(says("function_call", {**CALL, **extra})),
    "sample-call": lambda extra: {
        "meta_prompt": "",
        "data": [says("user", "q"), {**ANSWER, "calls": [{**CALL, **extra}]}],
    },
    "tool-use": lambda extra: chat(says("assistant", [{"type": "tool_use", "name": "f", "input": {}, **extra}])),
    "thinking-part": lambda extra: chat(
        says("assistant", [{"type": "thinking", "thinking": "t", **extra}, {"type": "text", "text": "a"}])
    ),
    "system-parts": lambda extra: chat(ANSWER, system={"parts": [{"text": "s"}], **extra}),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_refused_ignored_or_empty(place: str) -> None:
    record = PLACES[place]
    reason = refused(record({"mood": "grim"}))
    assert "unknown key mood" in reason
    assert "data.ignore_keys=[mood]" in reason
    plain = convert(record({}))
    ignoring = converter("ignore_keys=[mood]")
    assert ignoring(record({"mood": "grim"})) == plain
    assert ignoring.rules.keys.counts["mood"] == 1
    for empty in (None, "", [], {}):
        assert convert(record({"mood": empty})) == plain


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [0, False, 0.5, " ", [None], {"a": None}], ids=repr)
def test_what_is_not_empty_does_not_vanish(place: str, value: object) -> None:
    assert "unknown key mood" in refused(PLACES[place]({"mood": value}))


@given(st.sampled_from(sorted(PLACES)), st.text(max_size=8), st.integers() | st.text(min_size=1, max_size=3))
def test_no_key_with_content_vanishes(place: str, key: str, value: object) -> None:
    record = PLACES[place]({})
    extended = PLACES[place]({key: value})
    found = converter()
    try:
        sample = found(extended)
    except BadSample:
        return
    assert found.rules.keys.counts[key] == 1 or sample != convert(record) or extended == record


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_a_harmless_key_is_counted_where_it_holds_something(key: str) -> None:
    found = converter()
    found(chat(ANSWER, **{key: "x"}))
    found(chat(ANSWER, **{key: None}))
    assert found.rules.keys.counts == {key: 1}


@pytest.mark.parametrize("key", sorted(MEDIA))
def test_media_are_refused(key: str) -> None:
    assert "the model reads text only" in refused(chat(ANSWER, **{key: ["quay/1.jpg"]}))
    assert convert(chat(ANSWER, **{key: []})) == convert(chat(ANSWER))


def test_ignored_keys_win_over_what_is_known() -> None:
    found = converter("ignore_keys=[label,reasoning_content,images]")
    record = {"messages": [says("user", "q", images=["x"]), {**ANSWER, "reasoning_content": "t"}], "label": False}
    assert found(record) == convert(chat(ANSWER))
    assert found.rules.keys.counts == {"images": 1, "label": 1, "reasoning_content": 1}


def test_ignored_keys_leave_calls_and_parts_whole() -> None:
    call = {"type": "tool_use", "name": "f", "input": {"x": 1}, "input_size": 3}
    record = chat(says("assistant", [{"type": "text", "text": "a"}, call], name="n"), text="t", input="i")
    found = converter("ignore_keys=[name,input,text,type,input_size]")
    assert found(record).data[1].to_json() == {
        "role": "assistant",
        "content": "a",
        "calls": '[{"name":"f","arguments":{"x":1}}]',
    }
    assert found.rules.keys.counts == {"name": 1, "text": 1, "input": 1, "input_size": 1}


def test_an_ignored_format_leaves_the_other() -> None:
    record = chat(ANSWER, instruction="q", output="b")
    reason = refused(record)
    assert "fits more than one format: instruction, output (alpaca) and messages (openai)" in reason
    assert "data.ignore_keys=[messages]" in reason
    assert convert(record, "ignore_keys=[messages]").data[1].content == "b"


def test_odd_keys_are_named_in_one_line() -> None:
    assert "unknown key a\\nb" in refused(chat(ANSWER, **{"a\nb": 1}))
    assert "unknown key \\ud800" in refused(chat(ANSWER, **{"\ud800": 1}))
    assert len(refused(chat(ANSWER, **{"x" * 9999: 1}))) < 400


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        pytest.param(None, "is null, not an object", id="null"),
        pytest.param([1], "is a list, not an object", id="list"),
        pytest.param({}, "unknown format: keys found are none", id="empty"),
        pytest.param({"a": 1, "b": 2}, "keys found are a, b; known are messages, ", id="unknown"),
        pytest.param({"n" * 999 + str(n): 0 for n in range(99)}, "name your columns in data.columns", id="many"),
        pytest.param({"messages": []}, "messages is empty", id="no-messages"),
        pytest.param({"messages": None}, "messages is null, not a list", id="null-messages"),
        pytest.param({"conversations": ""}, "conversations is a text that cannot be read", id="blank"),
        pytest.param({"instruction": "", "output": ""}, "message 1 (user) is empty", id="empty-alpaca"),
        pytest.param({"chat": "USER: hi\n\n\nASSISTANT: hello"}, "as one text in chat", id="chat"),
        pytest.param({"text": "### Human: hi### Assistant: hello"}, "as one text in text", id="text"),
    ],
)
def test_a_record_of_no_known_format(record: object, reason: str) -> None:
    assert reason in refused(record)


def test_empty_columns_of_another_format_do_not_matter() -> None:
    """As in merged data sets: every record has the columns of all."""
    record = chat(ANSWER, conversations=[], instruction="", output=None, system="", tools=None)
    assert convert(record) == convert(chat(ANSWER))
    assert convert({"instruction": "q", "output": "a", "messages": [], "meta_prompt": None}) == convert(chat(ANSWER))


def test_a_fixed_format_is_not_guessed() -> None:
    record = {"instruction": "q", "output": "a"}
    assert (
        refused(record, "source_format=openai")
        == "unknown key instruction: "
        + refused(chat(ANSWER, instruction="q"), "source_format=openai").partition(": ")[2]
    )
    assert "meta_prompt is missing" in refused({}, "source_format=samples")
    assert "messages is missing" in refused({}, "source_format=openai")
