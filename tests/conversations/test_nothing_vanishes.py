"""Keys, parts and settings that could take away a mark or a text without a word."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import MakeRecipe
from converting import chat, convert, converter, refused
from openpangu_sft.conversations.conversation import Message
from refusals import refusal_of

A = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("key", ["weight", "calls", "thinking", "data", "meta_prompt"])
def test_a_record_key_to_ignore_is_not_one_of_the_sample(key: str) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "q"}, {**A, "loss": False}, {"role": "user", "content": "q"}]
    messages += [{**A, "reasoning_content": "t", "tool_calls": [call]}]
    sample = convert({"messages": messages, key: 0.7}, f"ignore_keys=[{key}]")
    assert [message.trained for message in sample.data if message.role == "assistant"] == [False, True]
    assert sample.data[-1] == Message("assistant", "a", "t", '[{"name":"f","arguments":{}}]')


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"text": "a", "thought": "some"}, "thought in a part of message 2 is a text"),
        ({"functionCall": {"name": "f", "args": {}}, "thought": "why"}, "thought in a part of message 2 is a text"),
    ],
)
def test_a_thought_is_true_or_false(part: dict[str, Any], reason: str) -> None:
    record = {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [part]}]}
    assert reason in refused(record)


def test_siblings_of_a_response_are_refused() -> None:
    part = {"functionResponse": {"name": "f", "response": {"x": 1}, "extra": 1}}
    calls, answer = {"functionCall": {"name": "f"}}, {"text": "a"}
    turns = [("user", {"text": "q"}), ("model", calls), ("user", part), ("model", answer)]
    record = {"contents": [{"role": role, "parts": [one]} for role, one in turns]}
    assert "unknown key extra of a functionResponse of message 3" in refused(record)


def test_a_response_that_is_no_thought() -> None:
    result, answer = {"functionResponse": {"name": "f", "response": {"x": 1}}, "thought": False}, {"text": "a"}
    turns = [
        ("user", {"text": "q"}),
        ("model", {"functionCall": {"name": "f"}}),
        ("user", result),
        ("model", answer),
    ]
    record = {"contents": [{"role": role, "parts": [one]} for role, one in turns]}
    assert convert(record).data[2] == Message("tool", '{"x":1}')


def test_the_role_of_a_system_instruction_is_counted() -> None:
    one = converter()
    one(chat(A, systemInstruction={"role": "system", "parts": [{"text": "s"}]}))
    assert one.rules.keys.counts == {"role": 1}


@pytest.mark.parametrize("first", [{"type": "text", "text": "a"}, {"type": "tool_use", "name": "f", "input": {}}])
def test_thinking_comes_first(first: dict[str, Any]) -> None:
    content = [first, {"type": "thinking", "thinking": "t"}]
    assert "thinking after its text or a call" in refused(chat({"role": "assistant", "content": content}))


def test_a_recipient_is_no_harmless_key() -> None:
    assert "unknown key recipient of message 2" in refused(chat({**A, "recipient": "functions.f"}))


@pytest.mark.parametrize("key", ["loss_mask", "trainable", "masked", "train_detail", "loss_scale"])
def test_other_names_of_weights_are_not_to_be_ignored(key: str) -> None:
    reason = refused(chat({**A, key: 0}))
    assert "write weight, 0 or 1" in reason
    assert "ignore_keys" not in reason


def test_ids_in_written_calls_are_not_trained() -> None:
    written = 'a[unused11][{"name":"f","arguments":{},"id":"call_1","type":"function"}][unused12]'
    assert convert(chat({**A, "content": written})).data[-1].calls == '[{"name":"f","arguments":{}}]'


def test_a_column_of_turns_that_is_not_there() -> None:
    one = converter("columns={role: speeker, content: text}")
    one({"messages": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]})
    assert one.unseen == {"speeker"}


def test_two_meanings_for_one_column(make_recipe: MakeRecipe) -> None:
    message = refusal_of(make_recipe, "data.columns={prompt: ask, input: ask}")
    assert "'ask' to prompt and input" in message


@pytest.mark.parametrize("path", ["~nobody-here/x", "a\\0b"])
def test_a_source_that_is_no_path(make_recipe: MakeRecipe, path: str) -> None:
    assert "data.sources" in refusal_of(make_recipe, f'data.sources=[{{"path": "{path}"}}]')
