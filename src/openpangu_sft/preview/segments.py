"""Rows of a dataset to samples, turns and tokens as people read them."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np

from openpangu_sft.dataset.index_file import Ids, Rows, role_of
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.preview.figures import Statistics
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.util.errors import printable

NEWLINE, SPACE, PART = "↵", "·", "…"
"""How tokens are shown: a line end, a space, a token that ends inside a character."""


class Token(NamedTuple):
    number: int  # its id
    text: str  # what it adds to the text, made visible
    trained: bool  # whether it is a target
    control: bool  # whether it is an added token

    @property
    def ends_line(self) -> bool:
        return self.text.endswith(NEWLINE)


class Turn(NamedTuple):
    """One message: its start token and what follows; the first one has bos too."""

    role: str
    tokens: list[Token]

    @property
    def trained(self) -> int:
        return sum(token.trained for token in self.tokens)


class Segment(NamedTuple):
    sample: int  # its number in the dataset, from 1
    pack: int  # from 1
    position: int  # its segment number in the pack, from 1
    offset: int  # of its first token in the pack, from 0
    turns: list[Turn]

    @property
    def length(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def trained(self) -> int:
        return sum(turn.trained for turn in self.turns)


def read_segment(rows: Rows, statistics: Statistics, tokenizer: Tokenizer, sample: int) -> Segment:
    """One sample, counted from 1 through the packs in their order; the tokenizer is the dataset's own."""
    upto = statistics.samples.cumsum()
    row = int(np.searchsorted(upto, sample))
    _, begins, ends = segment_runs(rows.segments[row : row + 1])
    place = sample - 1 - int(upto[row])  # counted from the end of the row
    begin, end = int(begins[place]), int(ends[place])
    input_ids = rows.input_ids[row, begin:end]
    tokens = shown_tokens(tokenizer, input_ids, rows.labels[row, begin:end])
    starts = np.flatnonzero(input_ids == tokenizer.start_id)
    edges = [0, *starts[1:].tolist(), len(tokens)]
    roles = ["unknown role"] * max(len(starts), 1)
    if rows.roles is not None:
        roles = [role_of(value) for value in rows.roles[row, begin:end][starts].tolist()]
    turns = [Turn(role, tokens[first:last]) for role, first, last in zip(roles, edges, edges[1:])]
    return Segment(sample, row + 1, int(rows.segments[row, begin]), begin, turns)


def shown_tokens(tokenizer: Tokenizer, input_ids: Ids, labels: Ids) -> list[Token]:
    """Tokens for people, from int32 [tokens] each."""
    numbers, added = input_ids.tolist(), set(tokenizer.hf.added_tokens_decoder)
    return [
        Token(number, _shown(text), label != IGNORED, number in added)
        for number, text, label in zip(numbers, tokenizer.texts(numbers), labels.tolist())
    ]


def _shown(text: str) -> str:
    """A text with its spaces, line ends and lone marks made visible; nothing in it acts on a terminal."""
    if not text:
        return PART
    if len(text) == 1 and unicodedata.category(text).startswith("M"):
        return f"U+{ord(text):04X}"
    return printable(text.replace(" ", SPACE).replace("\n", NEWLINE))
