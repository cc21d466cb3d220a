"""The content of one message: a text, or typed parts of it.

Source of the formats: OpenAI (text, refusal, input_text, output_text), Anthropic (text, thinking, tool_use,
tool_result), Gemini (text, thought, functionCall, functionResponse), LLaMA-Factory v1 (text, reasoning, tool_call; each
with a value).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from openpangu_sft.conversations.calls import call_text
from openpangu_sft.conversations.fields import compact_json, json_or, kind_of
from openpangu_sft.conversations.keys import BadSample, Keys

_TEXTS = frozenset(("text", "input_text", "output_text"))
_LISTED = "type text value content thinking reasoning refusal name input signature is_error annotations thought"
_KNOWN = frozenset((*_LISTED.split(), "thoughtSignature", "functionCall", "functionResponse"))


@dataclass
class Parts:
    """What the parts of a content are: text (None where there is none), thinking, calls and results of tools."""

    text: Optional[str] = None
    thinking: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


def read_parts(content: object, name: str, keys: Keys) -> Parts:
    """Reads the content of a message.

    Args:
        content: a text, a list of parts, or null.
        name: of the message, for messages.

    Raises:
        BadSample: a part that is no text, thinking, call or result.
    """
    if content is None or isinstance(content, str):
        return Parts(content)
    if not isinstance(content, list):
        raise BadSample(f"content of {name} is {kind_of(content)}, not a text")
    found = Parts()
    for part in content:
        _add(found, {"type": "text", "text": part} if isinstance(part, str) else part, name, keys)
    return found


def _add(found: Parts, part: object, name: str, keys: Keys) -> None:
    if not isinstance(part, dict):
        raise BadSample(f"a part of {name} is {kind_of(part)}, not an object with type and text")
    kind = part.get("type") or next(
        (key for key in ("functionCall", "functionResponse") if key in part),
        "thinking" if part.get("thought") else "text",
    )
    if kind not in _READERS:
        raise BadSample(f"{name} has content other than text: {reprlib.repr(kind)}, and only text can be trained")
    _READERS[kind](found, keys.known(f"a part of {name}", part, _KNOWN), name)


def _text(found: Parts, part: Mapping[str, Any], name: str) -> None:
    found.text = (found.text or "") + _string(part, name, "text", "value", "content", "refusal")


def _thinking(found: Parts, part: Mapping[str, Any], name: str) -> None:
    found.thinking.append(_string(part, name, "thinking", "reasoning", "text", "value", "content"))


def _call(found: Parts, part: Mapping[str, Any], name: str) -> None:
    call = next((part[key] for key in ("functionCall", "value") if key in part), part)
    found.calls.append(call_text(json_or(call, f"a call of {name}")))


def _result(found: Parts, part: Mapping[str, Any], name: str) -> None:
    result = next((part[key] for key in ("functionResponse", "content", "value") if key in part), "")
    if isinstance(result, dict) and "response" in result:
        result = result["response"]
    if isinstance(result, list) and all(isinstance(item, dict) and item.get("type") == "text" for item in result):
        result = "".join(_string(item, name, "text") for item in result)
    found.results.append(result if isinstance(result, str) else compact_json(result))


_READERS = {
    **dict.fromkeys((*_TEXTS, "refusal"), _text),
    **dict.fromkeys(("thinking", "reasoning"), _thinking),
    **dict.fromkeys(("tool_use", "tool_call", "functionCall"), _call),
    **dict.fromkeys(("tool_result", "functionResponse"), _result),
}


def _string(part: Mapping[str, Any], name: str, *names: str) -> str:
    value = next((part[key] for key in names if part.get(key) is not None), None)
    if not isinstance(value, str):
        raise BadSample(f"a part of {name} has no text in {names[0]}: {kind_of(value)}")
    return value
