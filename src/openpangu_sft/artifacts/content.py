"""What a manifest may hold: those of other people's artifacts are data."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt


def _below(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or ".." in parts:
        raise ValueError("is no path below the artifact")
    return name


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Counts(_Open):
    """Those that are reckoned with."""

    packs: NonNegativeInt = 0
    packed: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    trained_tokens: NonNegativeInt = 0
    read: NonNegativeInt = 0
    rejected: NonNegativeInt = 0
    dropped: NonNegativeInt = 0
    truncated: NonNegativeInt = 0
    reasons: dict[str, NonNegativeInt] = {}
    ignored_keys: dict[str, NonNegativeInt] = {}
    changes: dict[str, NonNegativeInt] = {}
    validation: _Counts = None  # type: ignore[assignment]


class _Settings(_Open):
    """Those that are reckoned with."""

    seq_length: NonNegativeInt = Field(default=0, alias="data.seq_length")
    iterations: NonNegativeInt = Field(default=0, alias="train.iterations")
    global_batch_size: NonNegativeInt = Field(default=0, alias="train.global_batch_size")


class _Entry(_Open):
    bytes: NonNegativeInt
    sha256: str


class Content(BaseModel):
    """A manifest as JSON; see `Manifest`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: str
    settings: _Settings = Field(default_factory=_Settings)
    inputs: dict[str, str] = {}
    counts: _Counts = Field(default_factory=_Counts)
    files: dict[Annotated[str, AfterValidator(_below)], _Entry] = {}
    version: str = ""
