"""Thinking: every way to write it, and what is no thinking."""

from __future__ import annotations

from typing import Any

import pytest

from converting import answer, chat, convert, refused, says, user
from openpangu_sft.conversations.calls import split_answer
from parameter_ids import named_by, shortened

F = '[{"name":"f","arguments":{"x":1}}]'


@pytest.mark.parametrize(
    "text",
    [
        "[unused11][unused12]",
        "a[unused11][][unused12]",
        "a[unused11] [unused12]",
        'a[unused11]{"name": "f"}[unused12]',
        f"a[unused11]{F}[unused12]b",
        f"a[unused11]{F}[unused12][unused11]{F}[unused12]",
        f"[unused11]{F}",
        "[unused16]t",
        "t[unused17]a",
        "a[unused16]t[unused17]",
        "[unused16]t[unused16]u[unused17]a",
        "[unused10]",
    ],
    ids=shortened,
)
def test_other_uses_of_the_models_tokens_stay_text(text: str) -> None:
    """So that data.control_tokens, not this rule, decides about them."""
    assert split_answer(text) == (None, text, "")


def test_the_models_tokens_are_text_in_other_roles() -> None:
    text = "[unused16]t[unused17]a"
    assert convert({"messages": [says("user", text), says("assistant", "a")]}).data[0] == user(text)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"reasoning_content": "t", "content": "a"}, id="deepseek"),
        pytest.param({"thinking": "t", "content": "a"}, id="trl"),
        pytest.param({"reasoning": "t", "content": "a"}, id="openrouter"),
        pytest.param({"content": "<think>\nt\n</think>\n\na"}, id="r1"),
        pytest.param({"content": "\n<think>t</think>a"}, id="r1-close"),
        pytest.param({"content": "[unused16]t[unused17]a"}, id="own"),
        pytest.param(
            {"content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"}]},
            id="anthropic",
        ),
        pytest.param({"content": [{"type": "reasoning", "value": "t"}, {"type": "text", "value": "a"}]}, id="v1"),
        pytest.param({"parts": [{"text": "t", "thought": True}, {"text": "a"}]}, id="gemini"),
        pytest.param({"content": [{"type": "text", "text": "t", "thought": True}, "a"]}, id="typed-thought"),
        pytest.param({"reasoning_content": "t", "thinking": "t", "content": "<think>\nt\n</think>a"}, id="all-agree"),
        pytest.param({"reasoning_content": None, "thinking": "", "reasoning": "t", "content": "a"}, id="nulls"),
    ],
)
def test_ways_to_write_thinking(given: dict[str, Any]) -> None:
    assert convert(chat({"role": "assistant", **given})).data == (user(), answer("a", "t"))


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning_content": "", "content": "a"},
        {"thinking": None, "content": "a"},
        {"reasoning_content": " \n", "content": "a"},
        {"content": "<think>\n\n</think>\n\na"},
    ],
)
def test_empty_thinking_is_none(given: dict[str, Any]) -> None:
    assert convert(chat({"role": "assistant", **given})).data == (user(), answer("a"))


@pytest.mark.parametrize(
    ("given", "reason"),
    named_by(
        1,
        ({"reasoning_content": "t", "thinking": "u", "content": "a"}, "has its thinking twice"),
        ({"reasoning_content": "t", "content": "<think>u</think>a"}, "has its thinking twice"),
        ({"reasoning_content": ["t"], "content": "a"}, "reasoning_content of message 2 is a list, not a text"),
        ({"content": "<think>t"}, "message 2: has <think> or </think> out of place"),
        ({"content": "t</think>a"}, "message 2: has <think> or </think> out of place"),
        ({"content": "<think>t</think>a<think>u</think>b"}, "out of place"),
        ({"content": "a<think>t</think>"}, "out of place"),
        ({"reasoning_content": "t"}, "message 2 (assistant) has neither content nor tool calls"),
        ({"content": "<think>t</think>"}, "message 2 (assistant) is empty"),
        ({"content": "", "reasoning_content": "t"}, "message 2 (assistant) is empty"),
        ({"role": "user", "content": "b", "thinking": "t"}, "(user) has 'thinking': only an assistant's"),
    ),
)
def test_thinking_that_is_refused(given: dict[str, Any], reason: str) -> None:
    assert reason in refused(chat({"role": "assistant", **given}))


def test_think_tags_are_text_where_they_are_no_thinking() -> None:
    question = says("user", "<think>t</think>a")
    assert convert({"messages": [question, says("assistant", "Write <think> first.")]}).data == (
        user("<think>t</think>a"),
        answer("Write <think> first."),
    )
