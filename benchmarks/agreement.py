"""Compares the segments of two packed datasets, regardless of order and packs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.index_file import PREFIX, read_rows
from openpangu_sft.tokenizer.tokenizer import IGNORED

Row = npt.NDArray[np.int32]


class Segments(NamedTuple):
    """The segments of a dataset.

    Args:
        lengths: int64 [segments], in tokens.
        trained: tokens that are targets.
        packs: rows.
        digest: sum over the hashes of all segments, ids and labels: equal for equal multisets.
    """

    lengths: npt.NDArray[np.int64]
    trained: int
    packs: int
    digest: int

    def agrees(self, other: Segments) -> bool:
        mine, its = ((len(found.lengths), found.trained, found.digest) for found in (self, other))
        return mine == its

    def __str__(self) -> str:
        tokens = int(self.lengths.sum())
        digest = f"{self.digest:032x}"[:12]
        return f"{len(self.lengths):,} segments, {tokens:,} tokens, {self.trained:,} trained, hash {digest}"


def read_segments(directory: Path, seq_length: int, bos_id: int = -1, pad_id: int = -1) -> Segments:
    """Reads a packed dataset.

    Args:
        directory: of its six files.
        seq_length: tokens per pack.
        bos_id: the first token of every segment, which occurs nowhere else; -1 if attention_mask has segment numbers.
        pad_id: the padding token, which occurs in no segment; used with bos_id.
    """
    ids, mask, labels = (
        read_rows(directory, PREFIX, name, seq_length) for name in ("input_ids", "attention_mask", "labels")
    )
    lengths: list[int] = []
    trained = digest = 0
    for number in range(len(ids)):
        edges = _numbered(mask[number]) if bos_id < 0 else _opened(ids[number], bos_id, pad_id)
        for begin, end in zip(edges[:-1], edges[1:]):
            segment = hashlib.blake2b(ids[number, begin:end].tobytes(), digest_size=16)
            segment.update(labels[number, begin:end].tobytes())
            digest += int.from_bytes(segment.digest(), "little")
            lengths.append(int(end - begin))
        trained += int(np.count_nonzero(labels[number] != IGNORED))
    return Segments(np.array(lengths, np.int64), trained, len(ids), digest % (1 << 128))


def _numbered(mask: Row) -> npt.NDArray[np.intp]:
    """Starts of the segments and the end of the last one, by segment numbers 1, 2, 3… and 0 for padding."""
    begins = np.flatnonzero(np.diff(mask, prepend=0) > 0)
    return np.append(begins, np.count_nonzero(mask))


def _opened(ids: Row, bos_id: int, pad_id: int) -> npt.NDArray[np.intp]:
    """The same, by the first token of every segment."""
    return np.append(np.flatnonzero(ids == bos_id), np.count_nonzero(ids != pad_id))
