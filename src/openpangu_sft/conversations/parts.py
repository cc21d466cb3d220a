"""The content of one message: a text, or typed parts of it.

Source of the formats: OpenAI (text, refusal, input_text, output_text), Anthropic (text, thinking, tool_use,
tool_result), Gemini (text, thought, functionCall, functionResponse), LLaMA-Factory v1 (text, reasoning, tool_call; each
with a value).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from openpangu_sft.conversations.calls import call_text
from openpangu_sft.conversations.fields import compact_json, expect, filled, given, json_or, kind_of, one_of
from openpangu_sft.conversations.keys import EMPTY, MEDIA, BadSample, Keys

_TEXT = ("text", "value", "content", "refusal")
_THINKING = ("thinking", "reasoning", "text", "value", "content")
_HELD_CALL = ("functionCall", "function_call", "value")
_CALL = (*_HELD_CALL, "name", "input", "arguments", "parameters", "args", "function")
_RESPONSE = ("functionResponse", "function_response")
_RESPONDED = frozenset(("name", "id", "response"))
_RESULT = (*_RESPONSE, "content", "value")


@dataclass
class Parts:
    """What the parts of a content are: text (None for none; `between` two), thinking, calls and results of tools."""

    text: Optional[str] = None
    between: str = field(default="\n", compare=False)
    thinking: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


def read_parts(content: object, name: str, keys: Keys, between: str = "\n") -> Parts:
    """Reads a message's content: a text, null, or a list of parts; raises `BadSample` for a part of another kind."""
    if content is None or isinstance(content, str):
        return Parts(content)
    found = Parts(between=between)
    for part in expect(list, content, f"content of {name}", "a text"):
        _add(found, {"type": "text", "text": part} if isinstance(part, str) else part, name, keys)
    return found


def is_parts(content: object) -> bool:
    """Whether a value is a list of typed parts; a tool's result may be another list of objects."""
    types = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return any(isinstance(kind, str) and (kind in _KINDS or kind in MEDIA) for kind in types)


def _add(found: Parts, value: object, name: str, keys: Keys) -> None:
    part = expect(dict, value, f"a part of {name}", "an object with type and text")
    kind = part.get("type")
    if kind in EMPTY:
        kind = next(iter(filled(part, (*_HELD_CALL[:2], *_RESPONSE))), "text")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadSample(f"{name} has content other than text: {reprlib.repr(kind)}, and only text can be trained")
    if part.get("thought") not in (None, False, True):
        raise BadSample(f"thought in a part of {name} is {kind_of(part['thought'])}, not true or false")
    reader, known = _KINDS["thinking" if kind in _TEXT and part.get("thought") else kind]
    reader(found, keys.known(f"a part of {name}", part, known, required=True), name, keys)


def _text(found: Parts, part: Mapping[str, Any], name: str, _: Keys) -> None:
    text = _string(part, name, _TEXT)
    if found.calls and text.strip():
        raise BadSample(f"{name} has text after a call: put the text before the calls")
    found.text = found.between.join(filter(None, (found.text, text)))


def _thinking(found: Parts, part: Mapping[str, Any], name: str, _: Keys) -> None:
    if found.text or found.calls:
        raise BadSample(f"{name} has thinking after its text or a call: put it first")
    found.thinking.append(_string(part, name, _THINKING))


def _call(found: Parts, part: Mapping[str, Any], name: str, keys: Keys) -> None:
    call: Any = {key: value for key, value in part.items() if key in _CALL}
    if filled(part, _HELD_CALL):
        _, call = one_of(part, filled(part, _CALL), f"a part of {name}")
    found.calls.append(call_text(json_or(call, f"a call of {name}"), keys))


def _result(found: Parts, part: Mapping[str, Any], name: str, keys: Keys) -> None:
    key, result = one_of(part, given(part, _RESULT), f"a part of {name}")
    if key in _RESPONSE and isinstance(result, dict) and "response" in result:
        result = keys.known(f"a {key} of {name}", result, _RESPONDED, required=True)["response"]
    if is_parts(result):
        inner = read_parts(result, f"a tool's result in {name}", keys)
        if inner != Parts(inner.text):
            raise BadSample(f"a tool's result in {name} has parts other than text")
        result = inner.text
    found.results.append((result or "") if result is None or isinstance(result, str) else compact_json(result))


_Reader = Callable[[Parts, Mapping[str, Any], str, Keys], None]
_KINDS: dict[str, tuple[_Reader, frozenset[str]]] = {
    **dict.fromkeys(("text", "input_text", "output_text", "refusal"), (_text, frozenset(("type", "thought", *_TEXT)))),
    **dict.fromkeys(("thinking", "reasoning"), (_thinking, frozenset(("type", "thought", *_THINKING)))),
    **dict.fromkeys(("tool_use", "tool_call", *_HELD_CALL[:2]), (_call, frozenset(("type", "thought", *_CALL)))),
    **dict.fromkeys(("tool_result", *_RESPONSE), (_result, frozenset(("type", "thought", *_RESULT)))),
}


def _string(part: Mapping[str, Any], name: str, names: tuple[str, ...]) -> str:
    key, value = one_of(part, given(part, names), f"a part of {name}")
    return expect(str, value, f"{key or names[0]} of a part of {name}", "a text")
