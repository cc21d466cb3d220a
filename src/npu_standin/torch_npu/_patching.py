"""All changes to torch go through one function."""

from __future__ import annotations

from typing import Any


def replace(owner: Any, **values: Any) -> None:
    """Sets attributes of a module or class; a type checker refuses assignments to torch's functions."""
    for name, value in values.items():
        setattr(owner, name, value)
