"""OpenAI messages, as in chat completions and in OpenAI's fine-tuning files.

Source of the format: OpenAI's API reference for chat completions and for supervised fine-tuning input (messages, tools,
weight; functions and function_call are the older names of tools and tool_calls).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.conversation import BadSample, Sample, kind_of
from openpangu_sft.conversations.fields import (
    compact_json,
    make_sample,
    parse_json,
    required_list,
    tools_prompt,
    turn_role,
)

SYSTEM = ("system", "developer")
ROLE_OF = {"user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}


def convert(record: Mapping[str, Any]) -> Sample:
    """Converts {"messages": [{"role", "content", "tool_calls"?}, …], "tools"?}.

    Each leading system or developer message becomes a system prompt, followed by one for the tools (see
    `tools_prompt`). The content of an assistant that calls tools is its calls as compact JSON:
    [{"name":…,"arguments":{…}}]. Other keys (name, tool_call_id, …) are ignored: a sample has no field for them.

    Raises:
        BadSample: an unknown role, content other than text, unreadable calls, a call and a text in one message, or an
            answer with weight 0.
    """
    messages, leading = required_list(record, "messages"), 0
    prompts: list[str] = []
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        role = turn_role(message, f"message {number}", "role", "content", (*SYSTEM, *ROLE_OF))
        if role in SYSTEM:
            if turns:
                raise BadSample(f"message {number} ({role}) stands inside the conversation: move it to the beginning")
            prompts.append(_required_content(message, number))
            leading = number
        else:
            content = _answer(message, number) if role == "assistant" else _required_content(message, number)
            turns.append({"role": ROLE_OF[role], "content": content})
    return make_sample(prompts + _tools(record), turns, leading + 1)


def _required_content(message: Mapping[str, Any], number: int) -> str:
    text = _content(message, number)
    if text is None:
        raise BadSample(f"message {number} has no content")
    return text


def _content(message: Mapping[str, Any], number: int) -> str | None:
    """The text of a message, its text parts joined; None where it is missing or null."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadSample(f"content of message {number} is {kind_of(content)}, not a text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = reprlib.repr(kind) if kind != "text" else "a text part without text"
            raise BadSample(f"message {number} has content other than text: {found}, and only text can be trained")
        texts.append(part["text"])
    return "".join(texts)


def _answer(message: Mapping[str, Any], number: int) -> str:
    """An assistant's text, or its calls."""
    if message.get("weight", 1) not in (1, None):
        raise BadSample(
            f"message {number} has weight {reprlib.repr(message['weight'])}: every answer of a sample is trained on"
        )
    text, calls = _content(message, number), _calls(message, number)
    if not calls:
        if text is None:
            raise BadSample(f"message {number} (assistant) has neither content nor tool calls")
        return text
    if text:
        raise BadSample(f"message {number} has both a text and tool calls: a sample has room for one of them")
    return compact_json(calls)


def _calls(message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The calls of a message as [{"name", "arguments"}, …], in their order."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise BadSample(f"tool_calls of message {number} is {kind_of(calls)}, not a list")
    functions: list[object] = [call.get("function") if isinstance(call, dict) else None for call in calls or []]
    if message.get("function_call") is not None:
        functions.append(message["function_call"])
    return [_call(function, number) for function in functions]


def _call(function: object, number: int) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample(f"a call of message {number} names no function: expected name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except BadSample as error:
            raise BadSample(f"arguments of a call of message {number} cannot be read: {error}") from None
    if not isinstance(arguments, dict):
        found = kind_of(arguments) if "arguments" in function else "missing"
        raise BadSample(f"arguments of a call of message {number} is no object: {found}")
    return {"name": function["name"], "arguments": arguments}


def _tools(record: Mapping[str, Any]) -> list[str]:
    tools, functions = tools_prompt(record), tools_prompt(record, "functions")
    if tools and functions:
        raise BadSample("has both tools and functions: keep one of them")
    return tools or functions
