"""Ids of tests are short, and a long one ends the collection."""

from __future__ import annotations

import re

import pytest

from parameter_ids import LONGEST, long_ids, named_by, shortened


def test_long_ids_are_named() -> None:
    longest = "test_" + "x" * (LONGEST - 5)
    assert not long_ids(["tests/a.py", f"tests/a.py::{longest}"])
    said = long_ids(["tests/a.py::test_c", f"tests/a.py::{longest}x", f"tests/b.py::test_b[{'y' * 1000}]"])
    assert re.fullmatch(r".*: test_x+… has 101; test_b\[y+… has 1008 -> shorten them with .*", said)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "empty"),
        (None, "None"),
        ({"a": 1, "b": []}, "a=1 b=[]"),
        (["sft", "--x"], "sft --x"),
        (b"\xff", "ÿ"),
    ],
)
def test_the_id_of_a_value(value: object, expected: str) -> None:
    assert shortened(value) == expected
    assert shortened(("x" * 1000, value)) == "x" * 20
    assert shortened("问" * 10) == "问" * 3  # \\u95ee each
    assert [row.id for row in named_by(1, (7, value))] == [expected]
