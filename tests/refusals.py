"""What is said where something has to be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from openpangu_sft.errors import UserError


def refusal_of(action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one line that a call is refused with; it says what to do."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.remedy
    return str(caught.value)
