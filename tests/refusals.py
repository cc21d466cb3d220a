"""The message of a refusal, and what a stage prints besides progress."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from openpangu_sft.util.errors import UserError

_PROGRESS = re.compile(r".+\): \d+/\d+( .*)?$")


def without_progress(said: str) -> str:
    """A stage's output without progress, of which a busy machine gets a line now and then."""
    return "".join(line for line in said.splitlines(keepends=True) if not _PROGRESS.match(line))


def refusal_of(action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one-line message of the `UserError` that a call raises; it has a remedy."""
    error = _raised(action, *arguments, **options)
    assert error.remedy
    return str(error)


def message_of(action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one-line message of the `UserError` that a call raises, for the few without a remedy."""
    return str(_raised(action, *arguments, **options))


def _raised(action: Callable[..., object], *arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value
