"""Short ids of parametrized tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

LONGEST = 100
"""Characters that a test's id may have, from the test's name on: a report shows it on one line."""

_PARAMETER = 20
"""Characters of an id that `shortened` makes, as pytest escapes them: leaves room for the names of most tests."""


def named_by(column: int, *rows: Sequence[Any]) -> list[Any]:
    """Rows of parameters with one column of theirs as the id: the input, or what is expected."""
    return [pytest.param(*row, id=shortened(row[column])) for row in rows]


def shortened(value: object) -> str:
    """The id of a value: the beginning of its text."""
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    text = text[:_PARAMETER]
    while len(text.encode("unicode_escape")) > _PARAMETER:
        text = text[:-1]
    return text or "empty"


def long_ids(ids: Iterable[str]) -> str:
    """One line that names every test whose id is too long; empty without any.

    Args:
        ids: node ids, e.g. tests/test_x.py::test_y[1-2].
    """
    names = [node.partition("::")[2] for node in ids]
    found = [f"{name[:LONGEST]}… has {len(name)}" for name in names if len(name) > LONGEST]
    limit = f"test ids have at most {LONGEST} characters from the test's name on"
    return f'{limit}: {"; ".join(found)} -> shorten them with pytest.param(…, id="…") or ids=…' if found else ""
