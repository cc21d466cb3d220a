"""Tool definitions: every way to write them, and what each becomes."""

from __future__ import annotations

import json

import pytest

from converting import chat, convert, refused, says
from openpangu_sft.conversations.conversation import parse_sample
from parameter_ids import named_by

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": 1.5}}}
TOOL_TEXT = '[{"type":"function","function":{"name":"f","parameters":{"type":"object","default":1.5}}}]'
FLAT = {"name": "f", "parameters": {}}
FLAT_TEXT = '[{"name":"f","parameters":{}}]'


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        pytest.param([TOOL], TOOL_TEXT, id="list"),
        pytest.param(json.dumps([TOOL], indent=2), TOOL_TEXT, id="json-text"),
        pytest.param([json.dumps(TOOL)], TOOL_TEXT, id="list-of-json-texts"),
        pytest.param(TOOL, TOOL_TEXT, id="one"),
        pytest.param({"f": TOOL}, TOOL_TEXT, id="mapping"),
        pytest.param(json.dumps({"f": TOOL}), TOOL_TEXT, id="mapping-text"),
        pytest.param({"f": {"parameters": {}}}, FLAT_TEXT, id="mapping-names-it"),
        pytest.param([{"functionDeclarations": [FLAT]}], FLAT_TEXT, id="gemini"),
        pytest.param({"function_declarations": [FLAT]}, FLAT_TEXT, id="gemini-python"),
        pytest.param(json.dumps([{"functionDeclarations": [FLAT]}]), FLAT_TEXT, id="gemini-text"),
        *(pytest.param(nothing, "", id=repr(nothing)) for nothing in (None, "", " ", "[]", "null", [], {}, "{}")),
    ],
)
def test_tools(tools: object, text: str) -> None:
    answered = says("assistant", "a")
    for record in (chat(answered, tools=tools), {"instruction": "q", "output": "a", "functions": tools}):
        sample = convert(record)
        assert (sample.meta_prompt, sample.tools) == (("",), text)
        assert parse_sample(sample.to_json()) == sample


@pytest.mark.parametrize(
    ("tools", "reason"),
    named_by(
        1,
        ("{not json", "tools is a text that cannot be read: not valid JSON"),
        ("[NaN]", "tools is a text that cannot be read: number that JSON does not know: NaN"),
        ('[{"a": 1, "a": 2}]', "has the key 'a' twice"),
        (["f"], "an entry of tools is a text that cannot be read"),
        ([1], "tools is a list of something else, not a list of tool objects"),
        ([None], "tools is a list of something else"),
        ([{"functionDeclarations": 5}, 1], "tools is a list of something else"),
        ({"f": 1}, "tools is a list of something else"),
        (5, "tools is a number, not a list of tool objects"),
        ([{"default": float("nan")}], "has no JSON form"),
        ([{"default": b"x"}], "has no JSON form"),
        ([{"name": "\ud800"}], "tools holds half a character"),
    ),
)
def test_tools_that_are_refused(tools: object, reason: str) -> None:
    assert reason in refused(chat(says("assistant", "a"), tools=tools))


def test_numbers_in_tools_stay_as_they_are() -> None:
    text = '[{"name":"f","default":1.50,"limit":1E3}]'
    assert convert(chat(says("assistant", "a"), tools=text)).tools == text


def test_two_lists_of_tools_are_refused() -> None:
    record = chat(says("assistant", "a"), tools=[TOOL], functions=[FLAT])
    assert "has tools and functions: keep one of them" in refused(record)
    assert convert({**record, "functions": []}).tools == TOOL_TEXT
