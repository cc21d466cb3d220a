"""Strict JSON that keeps what it reads: numbers as they are written, no duplicate keys; and fields of records."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Optional, TypeVar

from openpangu_sft.conversations.keys import EMPTY, BadSample

_Kind = TypeVar("_Kind")


class Number(float):
    """A number with a point or an exponent, and its text: 1.50 stays 1.50."""

    text: str


def _refuse_constant(text: str) -> NoReturn:
    raise BadSample(f"number that JSON does not know: {text}")


def _number(text: str) -> Number:
    value = Number(text)
    if math.isinf(value):  # 1e999: Python would take it for infinity
        _refuse_constant(text if len(text) <= 20 else text[:20] + "…")
    value.text = text
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadSample(f"has the key {ascii(twice)[:80]} twice: keep one of them")
    return found


JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_number, object_pairs_hook=_object)
"""Accepts what RFC 8259 allows; raises `BadSample` for what Python accepts with a loss: NaN, 1e999, a key twice."""

WITH_DUPLICATES = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_number)


def parse_json(text: str, decoder: json.JSONDecoder = JSON) -> Any:
    """Decodes one JSON value; raises `BadSample` with the position of an error."""
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise BadSample(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(too_much(error)) from None


def too_much(error: Exception) -> str:
    """The reason of a JSON decoder's error that is not about syntax."""
    return "nested too deeply" if isinstance(error, RecursionError) else "holds a number with thousands of digits"


def compact_json(value: object) -> str:
    """JSON without spaces and escapes, its numbers as read; raises `BadSample` for NaN, bytes, dates, deep nesting."""
    try:
        return _compact(value)
    except (TypeError, ValueError) as error:
        raise BadSample(f"has no JSON form: {error}") from None
    except RecursionError as error:
        raise BadSample(too_much(error)) from None


def _compact(value: object) -> str:
    if isinstance(value, Number):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{_compact(str(key))}:{_compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_compact, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def json_or(value: object, name: str, decoder: json.JSONDecoder = JSON) -> Any:
    """The value, read from JSON where it is a text; raises `BadSample` where that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, decoder)
    except BadSample as error:
        raise BadSample(f"{name} is a text that cannot be read: {error}") from None


def kind_of(value: object) -> str:
    """The JSON type of a value, for messages; the Python type of what JSON does not have (from parquet)."""
    known = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a text"}
    return known.get(type(value), f"a {'number' if isinstance(value, (int, float)) else type(value).__name__}")


def keys_of(record: Mapping[Any, Any]) -> str:
    """The first ten keys of an object, printable, for messages."""
    names = [repr(key).strip("'")[:40] for key in record]
    return ", ".join(names[:10] + (["…"] if len(names) > 10 else [])) or "none"


def expect(kind: type[_Kind], value: object, name: str, wanted: str) -> _Kind:
    """The value, if it is of a type; else raises `BadSample`: name is …, not wanted."""
    if not isinstance(value, kind):
        raise BadSample(f"{name} is {kind_of(value)}, not {wanted}".lstrip())
    return value


def optional_text(record: Mapping[str, Any], key: str, name: str = "") -> Optional[str]:
    """The text under a key, None if missing or null (as in parquet), else raises `BadSample`; name: of the record."""
    value = record.get(key)
    return value if value is None else expect(str, value, f"{key} of {name}" if name else key, "a text")


def filled(record: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Those of the keys that hold something."""
    return [key for key in keys if record.get(key) not in EMPTY]


def given(record: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Those of the keys that are not null: an empty text may be meant."""
    return [key for key in keys if record.get(key) is not None]


def one_of(record: Mapping[str, Any], found: Sequence[str], name: str = "") -> tuple[str, Any]:
    """The one key found and its value, "" and None where there is none; raises `BadSample` for several."""
    if len(found) > 1:
        raise BadSample(f"{name} has {' and '.join(found)}: keep one of them".lstrip())
    return (found[0], record[found[0]]) if found else ("", None)
