"""Sources of conversations: `reader` takes records out of files; `alpaca`, `sharegpt`, `openai` make samples of them.

Here is what they share: strict JSON, fields that may be absent, and the way tools become a system prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from openpangu_sft.conversations.conversation import BadSample, Sample, parse_sample


class NotFinite(ValueError):
    """A number that JSON does not know: NaN, Infinity, or one too large for a float."""


def refuse_constant(text: str) -> NoReturn:
    """Hook for the JSON decoder: Python's accepts NaN and Infinity, and writes them, but little else reads them."""
    raise NotFinite(f"number that JSON does not know: {text}")


def finite_float(text: str) -> float:
    """Hook for the JSON decoder: 1e999 becomes infinity without a word otherwise."""
    value = float(text)
    if math.isinf(value):
        refuse_constant(text if len(text) <= 20 else text[:20] + "…")
    return value


JSON = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite_float)
"""Decodes what RFC 8259 allows. Of a key that comes twice the last one counts."""


def parse_json(text: str) -> Any:
    """Decodes one JSON value.

    Raises:
        BadSample: not JSON, with the column (and the line, if there are several), or more than Python can hold.
    """
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
    """The reason behind an error of the JSON decoder that is not about syntax."""
    return "nested too deeply" if isinstance(error, RecursionError) else "holds a number with thousands of digits"


def compact_json(value: object) -> str:
    """JSON without spaces and without escapes for letters, so that equal values always give equal text.

    Raises:
        BadSample: the value has no JSON form (from parquet: NaN, bytes, dates).
    """
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadSample(f"has no JSON form: {error}") from None
    except RecursionError as error:
        raise BadSample(too_much(error)) from None


def kind_of(value: object) -> str:
    """The JSON kind of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    names.update({int: "a number", float: "a number"})
    return names.get(type(value), f"a {type(value).__name__}")


def keys_of(record: Mapping[Any, Any]) -> str:
    """The keys of an object, for messages: as many as help, and printable on every terminal."""
    names = [repr(key).strip("'") for key in record]
    return ", ".join(names[:10] + (["…"] if len(names) > 10 else [])) or "none"


def optional_text(record: Mapping[str, Any], key: str) -> str | None:
    """The text under a key, or None where it is missing or null (parquet has no other way to say missing).

    Raises:
        BadSample: something else is there.
    """
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise BadSample(f"{key} is {kind_of(value)}, not a text")
    return value


def required_list(record: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key that may not be empty.

    Raises:
        BadSample: missing, of another kind, or empty.
    """
    value = record.get(key)
    if not isinstance(value, list):
        raise BadSample(f"{key} is {kind_of(value) if key in record else 'missing'}, not a list")
    if not value:
        raise BadSample(f"{key} is empty")
    return value


def tools_prompt(record: Mapping[str, Any], key: str = "tools") -> list[str]:
    """The system prompt that lists the tools, or none: one text, the list as compact JSON and nothing around it.

    openPangu's published recipe has no wording for tools, so none is made up here. Both forms that are in use are
    taken: the list itself, and a text that holds it as JSON. Whoever chats with the tuned model has to give the tools
    in the same form.

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
    """Puts a sample together under the rules of `parse_sample`.

    Args:
        prompts: system prompts; none becomes one empty prompt, which is what chat writes too.
        messages: objects with role and content.
        raw_number: place of the first message in the raw record, from 1; behind system turns the rules' own count
            differs from what the user sees, and the reason says so.

    Raises:
        BadSample: a rule is broken.
    """
    try:
        return parse_sample({"meta_prompt": prompts or [""], "data": messages})
    except BadSample as error:
        counted = f" (counted from turn {raw_number} on, after the system prompt)" if raw_number > 1 else ""
        raise BadSample(f"{error}{counted}") from None
