"""Who is_main in a turn, told from token ids alone: a dataset holds nothing else.

A header is encoded together with the content behind it, so its ids are not always the same. What can be relied on is
the text: the bytes of the tokens that follow a start token begin with one of the headers.
"""

from __future__ import annotations

import re
from typing import Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.index_file import Ids
from openpangu_sft.tokenizer.template import HEADERS
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.errors import UserError

ROLES = (*HEADERS, "unknown")
"""Roles in the order in which they are counted; the last one is a turn that begins with no header."""

WIDTH = 1 + max(len(header.encode()) for header in HEADERS.values())
"""Tokens after a start token that tell the role at the latest: a byte each, and a space that some tokenizers put in."""

_UNKNOWN, _OPEN = len(HEADERS), -1
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Pieces:
    """The tokens of a vocabulary as SentencePiece writes them: ▁ is a space, <0xE4> a byte of a character.

    Args:
        tokenizer: whose vocabulary it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, number: int) -> str:
        """The piece of a token id.

        Raises:
            UserError: the tokenizer has no such id.
        """
        try:
            return str(self._tokenizer.hf.convert_ids_to_tokens(number))
        except (IndexError, OverflowError):
            what = f"token id {number} of the dataset is not in this tokenizer"
            raise UserError(
                what, where=self._tokenizer.directory, remedy="run make preprocess and make merge"
            ) from None

    def content(self, number: int) -> bytes:
        """UTF-8 of a token; a byte-fallback token has one byte of it."""
        byte = byte_of(self[number])
        return self[number].replace("▁", " ").encode() if byte is None else bytes([byte])


def byte_of(piece: str) -> Optional[int]:
    """The byte that a byte-fallback piece stands for; None for every other piece."""
    found = _BYTE.fullmatch(piece)
    return int(found.group(1), 16) if found else None


class TurnRoles:
    """Finds roles for many turns at once.

    Turns are told apart by as few ids as it takes, and each distinct beginning is decoded once. There are not more of
    these than a header's own tokens times the vocabulary, however large the dataset.

    Args:
        pieces: of the dataset's tokenizer.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._known: dict[tuple[int, ...], int] = {}

    def find(self, following: Ids) -> npt.NDArray[np.int64]:
        """The role of each turn.

        Args:
            following: int32 [turns, WIDTH], the ids after each start token.

        Returns:
            int64 [turns], positions in `ROLES`.
        """
        found = np.full(len(following), _OPEN, np.int64)
        left = np.arange(len(following))  # turns whose role is not known yet
        beginnings: list[tuple[int, ...]] = [()]
        which = np.zeros(len(following), np.int64)  # the position of each of these turns' beginning
        for column in following.T:
            if not left.size:
                break
            # one number for a beginning and the id behind it: rows of ids would take several times longer to sort
            pairs = which << 32 | column[left].astype(np.uint32)
            distinct, which = np.unique(pairs, return_inverse=True)
            beginnings = [(*beginnings[pair >> 32], pair & 0xFFFFFFFF) for pair in distinct.tolist()]
            found[left] = np.array([self._role(ids) for ids in beginnings])[which]
            still_open = found[left] == _OPEN
            left, which = left[still_open], which[still_open]
        found[left] = _UNKNOWN
        return found

    def _role(self, ids: tuple[int, ...]) -> int:
        """The position of a role; _OPEN where further ids decide."""
        if ids not in self._known:
            text = b"".join(map(self._pieces.content, ids)).lstrip(b" ")
            headers = [header.encode() for header in HEADERS.values()]
            fits = [number for number, header in enumerate(headers) if text.startswith(header)]
            undecided = any(header.startswith(text) for header in headers)
            self._known[ids] = fits[0] if fits else _OPEN if undecided else _UNKNOWN
        return self._known[ids]


def following_ids(input_ids: Ids, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Ids:
    """The ids after each start token.

    Args:
        input_ids: int32 [rows, seq_length].
        rows: int64 [turns], of the start tokens.
        columns: int64 [turns], of the start tokens.

    Returns:
        int32 [turns, WIDTH]; past the end of a row its last id comes again.
    """
    behind = columns[:, None] + np.arange(1, WIDTH + 1)
    found: Ids = input_ids[rows[:, None], np.minimum(behind, input_ids.shape[1] - 1)]
    return found
