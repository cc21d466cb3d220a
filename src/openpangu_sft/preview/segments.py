"""Rows of a dataset to samples, turns and tokens as people read them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Optional

import numpy as np

from openpangu_sft.dataset.index_file import Ids
from openpangu_sft.dataset.statistics import Rows, Statistics
from openpangu_sft.dataset.turns import ROLES, Pieces, TurnRoles, byte_of, following_ids
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.util.errors import printable

NEWLINE, SPACE = "↵", "·"


@dataclass(frozen=True)
class Token:
    """One token.

    Args:
        number: its id.
        text: what it stands for, with marks for spaces and line ends; nothing in it acts on a terminal.
        trained: whether it is a target.
        control: whether it is one of the tokenizer's added tokens.
        completes: the character that is whole with this byte-fallback token; empty for all others.
    """

    number: int
    text: str
    trained: bool
    control: bool = False
    completes: str = ""

    @property
    def ends_line(self) -> bool:
        """Whether the text goes on in a new line."""
        return self.text.endswith(NEWLINE)


@dataclass(frozen=True)
class Turn:
    """What one role says: its start token and what follows, and bos in front of the first."""

    role: str
    tokens: list[Token]

    @property
    def trained(self) -> int:
        """Number of tokens that are targets."""
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class Segment:
    """One sample, and where it lies.

    Args:
        sample: its number in the dataset, from 1.
        pack: from 1.
        position: its segment number in the pack, from 1.
        offset: position of its first token in the pack, from 0.
        turns: in their order.
    """

    sample: int
    pack: int
    position: int
    offset: int
    turns: list[Turn]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def trained(self) -> int:
        """Number of tokens that are targets."""
        return sum(turn.trained for turn in self.turns)


class SegmentReader:
    """Reads samples out of a dataset.

    Args:
        rows: of the dataset.
        statistics: of the same rows.
        tokenizer: that the dataset was made with.
    """

    def __init__(self, rows: Rows, statistics: Statistics, tokenizer: Tokenizer) -> None:
        self._rows, self._statistics = rows, statistics
        self._start_id, self._added = tokenizer.start_id, set(tokenizer.hf.added_tokens_decoder)
        self._pieces = Pieces(tokenizer)
        self._roles = TurnRoles(self._pieces)

    def read(self, sample: int) -> Segment:
        """One sample, counted from 1 through the packs in their order."""
        row, begin, end = self._rows.locate(sample - 1, self._statistics)
        input_ids, labels = self._rows.input_ids[row, begin:end], self._rows.labels[row, begin:end]
        tokens = self.tokens(input_ids, labels)
        starts = np.flatnonzero(input_ids == self._start_id)
        following = following_ids(input_ids[None], np.zeros_like(starts), starts)
        roles = [ROLES[number] for number in self._roles.find(following)] or [ROLES[-1]]
        edges = [0, *starts[1:].tolist(), len(tokens)]
        turns = [Turn(role, tokens[first:last]) for role, first, last in zip(roles, edges, edges[1:])]
        return Segment(sample, row + 1, int(self._rows.segments[row, begin]), begin, turns)

    def tokens(self, input_ids: Ids, labels: Ids) -> list[Token]:
        """Tokens for people.

        Args:
            input_ids: int32 [tokens].
            labels: int32 [tokens].
        """
        found = []
        character = b""  # the bytes of it so far
        for number, label in zip(input_ids.tolist(), labels.tolist()):
            piece = self._pieces[number]
            byte = byte_of(piece)
            # a character has at most four bytes, and the first of them is never one that continues
            continues = byte is not None and 0x80 <= byte < 0xC0 and len(character) < 4
            character = (character if continues else b"") + (bytes([byte]) if byte is not None else b"")
            control = number in self._added
            text = printable(piece) if control else _shown(piece, byte)
            completes = _completed(character) if text != NEWLINE else ""
            found.append(Token(number, text, label != IGNORED, control, completes))
        return found


def _shown(piece: str, byte: Optional[int]) -> str:
    """A piece with its spaces and line ends made visible."""
    if byte == ord("\n"):
        return NEWLINE
    return printable(piece.replace("▁", SPACE).replace(" ", SPACE).replace("\n", NEWLINE))


def _completed(character: bytes) -> str:
    """The character of these bytes, by number where nothing would be seen; empty where it is not whole."""
    try:
        mark = character.decode()
    except UnicodeDecodeError:
        return ""
    unseen = not mark.isprintable() or mark == " " or unicodedata.category(mark or " ").startswith("M")
    return f"U+{ord(mark):04X}" if mark and unseen else mark
