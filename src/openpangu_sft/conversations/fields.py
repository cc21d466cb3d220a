"""What the formats share: strict JSON, optional fields, and tools as a system prompt."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from openpangu_sft.conversations.conversation import BadSample, Sample, kind_of, parse_sample


class NotFinite(ValueError):
    """A number that JSON does not know: NaN, Infinity, or one too large for a float."""


def _refuse_constant(text: str) -> NoReturn:
    raise NotFinite(f"number that JSON does not know: {text}")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e999: Python would take it for infinity
        _refuse_constant(text if len(text) <= 20 else text[:20] + "…")
    return value


JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float)
"""Accepts what RFC 8259 allows, not Python's NaN and Infinity. Of a duplicate key the last value counts."""


def parse_json(text: str) -> Any:
    """Decodes one JSON value; raises `BadSample` with the position of an error."""
    try:
        return JSON.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise BadSample(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except NotFinite as error:
        raise BadSample(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample(too_much(error)) from None


def too_much(error: Exception) -> str:
    """The reason of a JSON decoder's error that is not about syntax."""
    return "nested too deeply" if isinstance(error, RecursionError) else "holds a number with thousands of digits"


def compact_json(value: object) -> str:
    """JSON without spaces and escaped letters; raises `BadSample` for what JSON does not have (NaN, bytes, dates)."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadSample(f"has no JSON form: {error}") from None
    except RecursionError as error:
        raise BadSample(too_much(error)) from None


def keys_of(record: Mapping[Any, Any]) -> str:
    """The first ten keys of an object, printable, for messages."""
    names = [repr(key).strip("'") for key in record]
    return ", ".join(names[:10] + (["…"] if len(names) > 10 else [])) or "none"


def optional_text(record: Mapping[str, Any], key: str) -> str | None:
    """The text under a key, None where it is missing or null (as in parquet); raises `BadSample` for anything else."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise BadSample(f"{key} is {kind_of(value)}, not a text")
    return value


def required_list(record: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key; raises `BadSample` where it is missing, no list, or empty."""
    value = record.get(key)
    if not isinstance(value, list):
        raise BadSample(f"{key} is {kind_of(value) if key in record else 'missing'}, not a list")
    if not value:
        raise BadSample(f"{key} is empty")
    return value


def turn_role(turn: object, name: str, key: str, content: str, known: Collection[str]) -> str:
    """The role of a turn, under `key`; `name` of the turn and its key `content` are for messages.

    Raises:
        BadSample: the turn is no object, or its role is no text or unknown.
    """
    if not isinstance(turn, dict):
        raise BadSample(f"{name} is {kind_of(turn)}, not an object with {key} and {content}")
    role = turn_text(turn, name, key)
    if role not in known:
        raise BadSample(f"{name} has an unknown role: {reprlib.repr(role)}, known: {', '.join(known)}")
    return role


def turn_text(turn: Mapping[str, Any], name: str, key: str) -> str:
    """The text under a key of a turn; raises `BadSample` where it is missing or no text."""
    text = turn.get(key)
    if not isinstance(text, str):
        found = kind_of(text) if key in turn else f"missing, keys found are {keys_of(turn)}"
        raise BadSample(f"{name} has no text in {key}: {found}")
    return text


def tools_prompt(record: Mapping[str, Any], key: str = "tools") -> list[str]:
    """At most one system prompt: the list of tools as compact JSON, nothing around it.

    openPangu's published recipe has no wording for tools, so none is invented here. Accepts the list itself and a text
    of it as JSON. At inference the tools have to be given in the same form.

    Raises:
        BadSample: neither a list of objects nor a text of one.
    """
    value = record.get(key)
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = parse_json(value)
        except BadSample as error:
            raise BadSample(f"{key} is a text that cannot be read: {error}") from None
    if value is None or value == []:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        found = "a list of something else" if isinstance(value, list) else kind_of(value)
        raise BadSample(f"{key} is {found}, not a list of tool objects")
    return [compact_json(value)]


def make_sample(prompts: list[str], messages: list[dict[str, Any]], raw_number: int = 1) -> Sample:
    """A sample that meets the rules of `parse_sample`.

    Args:
        prompts: system prompts; none becomes one empty prompt, as in chat.
        messages: objects with role and content.
        raw_number: number of the first message in the raw record, from 1. After system turns it differs from the number
            in the reason, which then says so.

    Raises:
        BadSample: a rule is broken.
    """
    try:
        return parse_sample({"meta_prompt": prompts or [""], "data": messages})
    except BadSample as error:
        counted = f" (counted from turn {raw_number} on, after the system prompt)" if raw_number > 1 else ""
        raise BadSample(f"{error}{counted}") from None
