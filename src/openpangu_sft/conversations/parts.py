"""The content of one message: a text, or typed parts of it.

Source of the formats: OpenAI (text, refusal, input_text, output_text), Anthropic (text, thinking, tool_use,
tool_result), Gemini (text, thought, functionCall, functionResponse), LLaMA-Factory v1 (text, reasoning, tool_call; each
with a value).
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any, Optional

from openpangu_sft.conversations.calls import call_text
from openpangu_sft.conversations.fields import compact_json, expect, filled, given, json_or, kind_of, one_of
from openpangu_sft.conversations.keys import EMPTY, MEDIA, BadSample, Keys

_HELD_CALL = ("functionCall", "function_call", "value")
_RESPONSE = ("functionResponse", "function_response")
_KEYS = {
    "text": ("text", "value", "content", "refusal"),
    "thinking": ("thinking", "reasoning", "text", "value", "content"),
    "call": (*_HELD_CALL, "name", "input", "arguments", "parameters", "args", "function"),
    "result": (*_RESPONSE, "content", "value"),
}
"""Keys that hold what a part says, by what it is."""
_KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text", "refusal"), "text"),
    **dict.fromkeys(("thinking", "reasoning"), "thinking"),
    **dict.fromkeys(("tool_use", "tool_call", *_HELD_CALL[:2]), "call"),
    **dict.fromkeys(("tool_result", *_RESPONSE), "result"),
}
"""What a part is, by its type."""
_KNOWN = {kind: frozenset(("type", "thought", *keys)) for kind, keys in _KEYS.items()}
_RESPONDED = frozenset(("name", "id", "response"))


@dataclass
class Parts:
    """What the parts of a content are: text (None for none), thinking, calls and results of tools."""

    text: Optional[str] = None
    thinking: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


def read_parts(content: object, name: str, keys: Keys, between: str = "\n") -> Parts:
    """Reads a message's content: a text, null, or a list of parts, whose texts are joined by `between`.

    Raises `BadSample` for a part of another kind, or parts in another order than thinking, text, calls.
    """
    if content is None or isinstance(content, str):
        return Parts(content)
    found = Parts()
    for value in expect(list, content, f"content of {name}", "a text"):
        part = {"type": "text", "text": value} if isinstance(value, str) else value
        kind = _kind(expect(dict, part, f"a part of {name}", "an object with type and text"), name)
        part = keys.known(f"a part of {name}", part, _KNOWN[kind], required=True)
        if kind == "call":
            call: Any = {key: value for key, value in part.items() if key in _KEYS["call"]}
            if filled(part, _HELD_CALL):
                _, call = one_of(part, filled(part, _KEYS["call"]), f"a part of {name}")
            found.calls.append(call_text(json_or(call, f"a call of {name}"), keys))
            continue
        key, said = one_of(part, given(part, _KEYS[kind]), f"a part of {name}")
        if kind == "result":
            found.results.append(_result(key, said, name, keys))
            continue
        text = expect(str, said, f"{key or _KEYS[kind][0]} of a part of {name}", "a text")
        if kind == "thinking":
            if found.text or found.calls:
                raise BadSample(f"{name} has thinking after its text or a call: put it first")
            found.thinking.append(text)
        elif found.calls and text.strip():
            raise BadSample(f"{name} has text after a call: put the text before the calls")
        else:
            found.text = between.join(filter(None, (found.text, text)))
    return found


def is_parts(content: object) -> bool:
    """Whether a value is a list of typed parts; a tool's result may be another list of objects."""
    types = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return any(isinstance(kind, str) and (kind in _KINDS or kind in MEDIA) for kind in types)


def _kind(part: dict[str, Any], name: str) -> str:
    kind = part.get("type")
    if kind in EMPTY:
        kind = next(iter(filled(part, (*_HELD_CALL[:2], *_RESPONSE))), "text")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadSample(f"{name} has content other than text: {reprlib.repr(kind)}, and only text can be trained")
    if part.get("thought") not in (None, False, True):
        raise BadSample(f"thought in a part of {name} is {kind_of(part['thought'])}, not true or false")
    return "thinking" if _KINDS[kind] == "text" and part.get("thought") else _KINDS[kind]


def _result(key: str, result: object, name: str, keys: Keys) -> str:
    if key in _RESPONSE and isinstance(result, dict) and "response" in result:
        result = keys.known(f"a {key} of {name}", result, _RESPONDED, required=True)["response"]
    if is_parts(result):
        inner = read_parts(result, f"a tool's result in {name}", keys)
        if inner != Parts(inner.text):
            raise BadSample(f"a tool's result in {name} has parts other than text")
        result = inner.text
    return (result or "") if result is None or isinstance(result, str) else compact_json(result)
