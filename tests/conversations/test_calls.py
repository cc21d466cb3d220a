"""Tool calls: every way to write them, and what each becomes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from converting import answer, chat, convert, converter, refused, says, tool, user
from openpangu_sft.conversations.calls import CALLS, THINKING, answer_of, split_answer, split_tags, split_thinking
from openpangu_sft.conversations.conversation import Message, parse_sample
from openpangu_sft.conversations.keys import BadSample
from parameter_ids import named_by, shortened

F = '[{"name":"f","arguments":{"x":1}}]'
FG = '[{"name":"f","arguments":{"x":1}},{"name":"g","arguments":{}}]'
CALL_F = {"name": "f", "arguments": {"x": 1}}
CALL_G = {"name": "g", "arguments": {}}
TAG_F, TAG_G = (f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in (CALL_F, CALL_G))


def function(name: str, arguments: object) -> dict[str, Any]:
    """An entry of OpenAI's tool_calls."""
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in (("human", "q"), *turns)]}


def test_a_call_its_result_and_the_answer() -> None:
    record = chat(
        says("assistant", None, tool_calls=[function("f", '{"x":1}')]),
        says("tool", "12", tool_call_id="c1"),
        says("assistant", "a"),
    )
    assert convert(record).data == (user(), answer("", calls=F), tool("12"), answer())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(says("assistant", None, tool_calls=[function("f", '{"x":1}')]), answer("", calls=F), id="openai"),
        pytest.param(says("assistant", tool_calls=[function("f", {"x": 1})]), answer("", calls=F), id="object"),
        pytest.param(
            says("assistant", "a", tool_calls=[function("f", {"x": 1})]), answer("a", calls=F), id="text-and-call"
        ),
        pytest.param(
            says("assistant", "", tool_calls=[function("f", {"x": 1}), function("g", "{}")]),
            answer("", calls=FG),
            id="two",
        ),
        pytest.param(
            says("assistant", "", tool_calls=[{"type": "function", **CALL_F}]), answer("", calls=F), id="flat"
        ),
        pytest.param(says("assistant", "", tool_calls=json.dumps([CALL_F])), answer("", calls=F), id="json-text"),
        pytest.param(
            says("assistant", None, function_call={"name": "f", "arguments": '{"x":1}'}),
            answer("", calls=F),
            id="legacy",
        ),
        pytest.param(
            says("assistant", None, function_call=CALL_F, tool_calls=None), answer("", calls=F), id="legacy-and-null"
        ),
        pytest.param(
            says("assistant", None, function_call=CALL_F, tool_calls=[CALL_F]), answer("", calls=F), id="twice-the-same"
        ),
        pytest.param(says("assistant", "a", tool_calls=[], function_call={}), answer("a"), id="empty"),
        pytest.param(says("assistant", TAG_F), answer("", calls=F), id="hermes"),
        pytest.param(says("assistant", f"a\n{TAG_F}\n{TAG_G}\n"), answer("a", calls=FG), id="hermes-two-and-text"),
        pytest.param(says("assistant", f"<think>t</think>\n{TAG_F}"), answer("", "t", F), id="hermes-thinking"),
        pytest.param(says("function_call", json.dumps(CALL_F)), answer("", calls=F), id="turn"),
        pytest.param(says("tool_call", CALL_F), answer("", calls=F), id="turn-object"),
        pytest.param(says("tool_call", [CALL_F, CALL_G]), answer("", calls=FG), id="turn-list"),
        pytest.param(says("function_call", TAG_F), answer("", calls=F), id="turn-hermes"),
        pytest.param(says("function_call", f"a\n{TAG_F}"), answer("a", calls=F), id="turn-hermes-and-text"),
        pytest.param(
            says("function_call", f"<think>\nt\n</think>\n{json.dumps(CALL_F)}"), answer("", "t", F), id="turn-think"
        ),
        pytest.param(
            says("tool_call", json.dumps(CALL_F), reasoning_content="t"), answer("", "t", F), id="turn-reasoning"
        ),
        pytest.param(
            says(
                "assistant",
                [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}],
            ),
            answer("a", calls=F),
            id="anthropic",
        ),
        pytest.param(
            {"role": "model", "parts": [{"text": "a"}, {"functionCall": {"name": "f", "args": {"x": 1}}}]},
            answer("a", calls=F),
            id="gemini",
        ),
        pytest.param(
            {"role": "model", "parts": [{"function_call": {"name": "f", "args": {"x": 1}}, "thought_signature": "s"}]},
            answer("", calls=F),
            id="gemini-python",
        ),
        pytest.param(
            says("assistant", [{"type": "tool_call", "value": json.dumps(CALL_F)}]), answer("", calls=F), id="v1"
        ),
        pytest.param(
            says("assistant", [{"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x":1}'}]),
            answer("", calls=F),
            id="responses-part",
        ),
        pytest.param(says("assistant", f"a[unused11]{F}[unused12]"), answer("a", calls=F), id="own"),
        pytest.param(
            says("assistant", f"[unused16]t[unused17]a[unused11]{F}[unused12]"), answer("a", "t", F), id="own-all"
        ),
        pytest.param(
            says(
                "assistant",
                '[unused11][{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\":1}"}}][unused12]',
            ),
            answer("", calls=F),
            id="own-with-openai-calls",
        ),
        pytest.param(
            says("assistant", '[unused11][{"name": "g", "arguments": null}][unused12]'),
            answer("", calls='[{"name":"g","arguments":{}}]'),
            id="own-null",
        ),
    ],
)
def test_ways_to_write_a_call(given: dict[str, Any], expected: Message) -> None:
    assert convert(chat(given)).data == (user(), expected)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([("function_call", CALL_F), ("function_call", CALL_G)], id="two-turns"),
        pytest.param([("function_call", CALL_F), ("gpt", TAG_G)], id="turn-and-tag"),
        pytest.param([("gpt", TAG_F), ("gpt", TAG_G)], id="two-answers"),
        pytest.param(
            [("function_call", json.dumps([CALL_F])), ("function_call", json.dumps(CALL_G))], id="list-and-one"
        ),
    ],
)
def test_adjacent_calls_are_one_list(turns: list[tuple[str, Any]]) -> None:
    end = [("observation", "12"), ("observation", "7"), ("gpt", "a")]
    assert convert(sharegpt(*turns, *end)).data == (user(), answer("", calls=FG), tool("12"), tool("7"), answer())


def test_a_call_belongs_to_the_text_before_it() -> None:
    assert convert(sharegpt(("gpt", "a"), ("function_call", CALL_F))).data == (user(), answer("a", calls=F))
    assert "follows assistant" in refused(
        {"messages": [says("user", "q"), says("assistant", "a", weight=0), says("tool_call", CALL_F)]}
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"lat": 31.230416666666667123, "price": 1.50, "n": 1E3, "id": 12345678901234567890123}',
        '{"x": 1, "x": 2}',
        '{"city": "\\u5317\\u4eac"}',
        '{"a":null,"b":[null],"c":-0}',
        '{\n  "x": 1\n}',
    ],
    ids=shortened,
)
def test_the_text_of_arguments_is_kept(text: str) -> None:
    for call in (
        says("assistant", None, tool_calls=[function("f", text)]),
        says("assistant", None, function_call={"name": "f", "arguments": f" {text}\n"}),
        says("assistant", [{"type": "tool_call", "value": {"name": "f", "arguments": text}}]),
        says("function_call", {"name": "f", "arguments": text}),
    ):
        sample = convert(chat(call))
        assert sample.data[1].calls == f'[{{"name":"f","arguments":{text}}}]'
        assert parse_sample(sample.to_json()) == sample


@pytest.mark.parametrize("nothing", [None, "", " \n", "null", "{}", {}, ...], ids=repr)
def test_no_arguments(nothing: object) -> None:
    given = {"name": "f"} if nothing is ... else {"name": "f", "arguments": nothing}
    for call in (says("assistant", None, tool_calls=[{"function": given}]), says("function_call", given)):
        assert convert(chat(call)).data[1].calls == '[{"name":"f","arguments":{}}]'


def test_nulls_in_arguments_stay() -> None:
    call = says("assistant", None, tool_calls=[function("move", {"x": 1, "y": None, "label": None})], name=None)
    assert convert(chat(call)).data[1].calls == '[{"name":"move","arguments":{"x":1,"y":null,"label":null}}]'


@pytest.mark.parametrize(
    ("given", "reason"),
    named_by(
        1,
        ({"tool_calls": [{"function": {}}]}, "message 2: a call names no function"),
        ({"tool_calls": ["f"]}, "message 2: a call names no function"),
        ({"tool_calls": [None]}, "message 2: a call names no function"),
        ({"tool_calls": [function("", "{}")]}, "a call names no function"),
        ({"tool_calls": {"f": 1}}, "message 2: tool_calls is an object, not a list"),
        ({"tool_calls": "f()"}, "message 2: tool_calls is a text that cannot be read"),
        (
            {"tool_calls": [function("f", "{")]},
            "arguments of the call of 'f' is a text that cannot be read: ",
        ),
        ({"tool_calls": [function("f", '{"x": 1e999}')]}, "number that JSON does not know: 1e999"),
        ({"tool_calls": [function("f", "[]")]}, "arguments of the call of 'f' is no object: a list"),
        ({"tool_calls": [function("f", 3)]}, "arguments of the call of 'f' is no object: a number"),
        ({"tool_calls": [function("f" * 999, [])]}, "is no object: a list"),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": 1}, "input": {"y": 1}}]},
            "has arguments and input: keep one",
        ),
        ({"tool_calls": [CALL_F], "function_call": CALL_G}, "has its calls twice"),
        ({"tool_calls": [CALL_F], "content": TAG_G}, "has its calls twice"),
        ({"content": "<tool_call>{}"}, "<tool_call> that is not closed"),
        ({"content": f"{TAG_F} and so on"}, "text after it"),
        ({"content": "<tool_call>{'name': 'f'}</tool_call>"}, "message 2: a <tool_call> is a text that cannot be read"),
        ({"role": "function_call", "content": "[]"}, "message 2: has no call"),
        ({"role": "function_call", "content": "null"}, "message 2: has no call"),
        ({"role": "function_call", "content": None}, "message 2: has no call"),
        ({"role": "function_call", "content": "f(x)"}, "message 2: the call is a text that cannot be read"),
        ({"role": "function_call", "content": CALL_F, "tool_calls": [CALL_G]}, "has tool_calls beside a call"),
        ({"role": "user", "content": "a", "tool_calls": [CALL_F]}, "(user) has 'tool_calls': only an assistant's"),
        (
            {"content": [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}]},
            "text after a call",
        ),
        ({"content": [{"type": "tool_call", "name": "g", "value": CALL_F}]}, "has value and name: keep one"),
        ({"content": [{"text": "a", "functionCall": CALL_F}]}, "unknown key text of a part of message 2"),
    ),
)
def test_calls_that_are_refused(given: dict[str, Any], reason: str) -> None:
    assert reason in refused(chat({"role": "assistant", **given}))


def test_ids_of_calls_are_not_counted() -> None:
    found = converter()
    found(chat(says("assistant", None, tool_calls=[{**function("f", "{}"), "index": 0}])))
    assert not found.rules.keys.counts


@pytest.mark.parametrize("repeated", [*CALLS, *THINKING, "<tool_call>", "</tool_call>", "<think>", "</think>"])
@pytest.mark.parametrize("split", [split_answer, answer_of, split_thinking, split_tags])
def test_a_long_answer_takes_linear_time(split: Callable[[str], object], repeated: str) -> None:
    with contextlib.suppress(BadSample):  # a search from each tag to the end would take hours
        split(repeated * 400_000)
