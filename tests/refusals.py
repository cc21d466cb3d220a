"""What is said where something has to be refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from openpangu_sft.util.errors import UserError

_PROGRESS = re.compile(r".+: \d+/\d+ .*ETA (\d+ days?, )?[\d:]+$")


def without_progress(said: str) -> str:
    """What a stage has said but for its progress, of which a busy machine gets a line now and then."""
    return "".join(line for line in said.splitlines(keepends=True) if not _PROGRESS.match(line))


def refusal_of(action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one line that a call is refused with; it says what to do."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.remedy
    return str(caught.value)
