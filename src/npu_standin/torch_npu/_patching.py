"""Changing torch, all of it through one function."""

from __future__ import annotations

from typing import Any


def replace(owner: Any, **values: Any) -> None:
    """Sets attributes of a module or class. A type checker would refuse to have torch's functions assigned to."""
    for name, value in values.items():
        setattr(owner, name, value)
