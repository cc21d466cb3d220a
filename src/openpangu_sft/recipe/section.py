"""What the sections of a recipe share: their base, their ranges, and the error of values that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Field(gt=0)
NotNegative = Field(ge=0)
UpTo1000 = Field(gt=0, le=1000)
"""For values that are looped over before a run: a few zeros too many would cost hours and all memory."""
Seed = Field(ge=0, lt=2**32)  # range of numpy's generator, which shuffles samples and packs


class Conflict(ValueError):
    """Values that are not allowed, or not together; `keys` are theirs."""

    def __init__(self, what: str, remedy: str, *keys: str) -> None:
        super().__init__(f"{what} -> {remedy}")
        self.what, self.remedy, self.keys = what, remedy, keys


def usable_path(value: str, key: str) -> str:
    """The value; raises `Conflict` unless it can be a path."""
    if not value.strip() or "\0" in value:
        raise Conflict(f"{key} {value!r} is not a path", "write one, or leave the key out for the default", key)
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise Conflict(f"{key} {value!r} begins with an unknown home directory", "write it out", key) from None
    return value


class Section(BaseModel):
    """A group of settings. Unknown keys are errors, and types are not converted."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        json.dumps(value, default=str, ensure_ascii=False).encode()  # YAML can escape half a character
        return value

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value
