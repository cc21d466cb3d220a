"""The recipe's section data: conversations, from their sources to packs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, Optional

from pydantic import AfterValidator, Field, field_validator

from openpangu_sft.recipe.section import Conflict, Positive, Section, Seed, usable_path

Column = Literal[
    "messages", "role", "content", "prompt", "input", "response", "system", "history", "tools", "chosen", "rejected"
]
"""What a column can be named for."""


Format = Literal["auto", "alpaca", "sharegpt", "openai", "samples"]


def _one_meaning(columns: dict[Column, str]) -> dict[Column, str]:
    """The columns; raises `Conflict` where one of the user's has two meanings."""
    for theirs in columns.values():
        if len(ours := [ours for ours, other in columns.items() if other == theirs]) > 1:
            what = f"data.columns gives {theirs!r} to {' and '.join(ours)}"
            raise Conflict(what, "give each a column of its own", "data.columns")
    return columns


Columns = Annotated[dict[Column, str], AfterValidator(_one_meaning)]


class Source(Section):
    """One source of raw conversations among several."""

    path: Annotated[str, AfterValidator(partial(usable_path, key="data.sources"))]
    """Raw conversations, as paths.raw."""
    format: Format = "auto"
    """As data.source_format."""
    columns: Columns = {}
    """As data.columns."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each conversation is used: 2 is twice, 0.5 is a half of them, chosen by data.seed."""
    system: Optional[str] = None
    """System prompt of conversations that have none."""


class Data(Section):
    """Conversion, tokenization and packing."""

    source_format: Format = "auto"
    """Format of the raw conversations; auto detects it from the keys of each record."""
    encoding: str = "utf-8"
    """Encoding of raw .json, .jsonl and .csv files, as Python names it: gb18030, utf-16."""
    sources: list[Source] = []
    """Several sources in the place of paths.raw, source_format and columns, mixed by weight."""
    deduplicate: Literal["no", "exact"] = "no"
    """Conversations that occur twice, which are counted always: kept, or dropped but for the first."""
    columns: Columns = {}
    """Names of your columns: {prompt: ask, response: reply}, or {messages: talk, role: speaker, content: utterance}."""
    ignore_keys: list[str] = []
    """Keys of records, messages and parts to leave out; a key that is neither known nor harmless is refused."""
    turns: Literal["strict", "lenient"] = "strict"
    """Turns out of order: invalid, or joined, kept, moved or dropped as the template allows, and counted."""
    preference: Literal["refuse", "chosen"] = "refuse"
    """Preference data (DPO, KTO): invalid, or only its chosen side is used."""
    thinking: Literal["last", "all", "drop"] = "last"
    """Thinking: one sample per thinking answer, without earlier thinking; in every answer; or left out."""
    train_on: Literal["all", "last"] = "all"
    """Answers that are trained: all, or only the last of each conversation; those with weight 0 never are."""
    tool_prompt: Optional[str] = None
    """Jinja template of the system prompt for tools, with `tools`, the list of their definitions; see data.md."""
    seq_length: int = Field(ge=8)
    """Sequence length: tokens per pack, for both preprocess and sft."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """Invalid samples: refuse stops the stage; skip counts them and writes them to a rejects file."""
    control_tokens: Literal["refuse", "escape", "allow"] = "refuse"
    """Control tokens inside a message: an invalid sample, plain text, or control tokens (they can forge a turn)."""
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """Samples longer than seq_length: invalid, dropped and counted, or truncated after the last answer that fits."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the conversations used as validation set, not for training; 0.05 is about one in twenty."""
    seed: int = Seed
    """Seed of the order of samples and packs in a shard, and of the validation split."""
    workers: int = Positive
    """Worker processes for tokenization."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError):  # ValueError: a NUL in the name
            key = "data.encoding"
            raise Conflict(f"{key} {value!r} is no text encoding", "use utf-8, gb18030 or utf-16", key) from None
        return value
