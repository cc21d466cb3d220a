"""Segment numbers of packs: 1, 2, 3… for the samples of a row, 0 for its padding. Numpy only.

They stand in the packed attention_mask files. Where the number changes a segment ends, and attention is cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]

VALUES_AT_ONCE = 1 << 20  # tokens of a field that a process reads or writes at once


def blocks(rows: int, seq_length: int) -> list[range]:
    """Numbers of rows, in blocks of about `VALUES_AT_ONCE` tokens, or of one row if it is longer."""
    step = max(1, VALUES_AT_ONCE // seq_length)
    return [range(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def segment_runs(numbers: Numbers) -> tuple[Int64s, Int64s, Int64s]:
    """The segments of packs, int [packs, seq_length], in order, padding left out.

    Returns three int64 [segments]: row, first column, past-the-last column.
    """
    starts = np.ones(numbers.shape, bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    rows, begins = np.nonzero(starts)
    lengths = np.diff(np.append(rows * numbers.shape[1] + begins, numbers.size))
    real = numbers[rows, begins] != 0
    return rows[real], begins[real], (begins + lengths)[real]


def segment_bounds(numbers: Numbers) -> list[tuple[int, int]]:
    """(begin, end) of each run of one number in a pack, int [seq_length]; padding is the last run."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(zip(edges[:-1], edges[1:]))


def positions_within(bounds: list[tuple[int, int]]) -> Int64s:
    """Position of every token in its segment, int64 [seq_length]."""
    return np.concatenate([np.arange(end - begin) for begin, end in bounds])


def misnumbered(numbers: Numbers) -> tuple[Flags, Flags]:
    """Where numbers, int [..., seq_length], do not count segments: 1 first, then the same or one more, 0 to the end.

    Returns two bool arrays of that shape: a segment after padding; a number out of order.
    """
    before = np.roll(numbers, 1, axis=-1)
    before[..., 0] = 0
    gap = (numbers != 0) & (before == 0)
    gap[..., 0] = False
    order = (numbers != 0) & ~gap & (numbers != before) & (numbers != before + 1)
    return gap, order
