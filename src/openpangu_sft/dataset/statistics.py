"""Numbers over a whole packed dataset, read in blocks of rows: constant memory, no loop per token."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.index_file import FIELDS, PREFIX, read_rows
from openpangu_sft.dataset.roles import ROLES, count_turns, read_roles
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.util.console import progress

BLOCK_TOKENS = 1 << 20  # tokens in a block

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Distribution:
    """How often each whole number occurs."""

    counts: Counts  # int64 [largest possible number + 1]

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return int(self.counts.sum())

    @property
    def sum(self) -> int:
        """Their sum."""
        return int(self.counts @ np.arange(len(self.counts)))

    @property
    def quantiles(self) -> tuple[int, int, int]:
        """The smallest number, the lower median and the largest number."""
        ranks = (1, (self.total + 1) // 2, self.total)
        smallest, median, largest = np.searchsorted(self.counts.cumsum(), ranks).tolist()
        return smallest, median, largest

    def between(self, edges: list[int]) -> list[int]:
        """How many numbers lie above each edge and not above the next."""
        upto = self.counts.cumsum()[np.minimum(edges, len(self.counts) - 1)]
        found: list[int] = np.diff(upto).tolist()
        return found


@dataclass(frozen=True)
class Statistics:
    """What a packed dataset holds."""

    seq_length: int
    packs: int
    trained_tokens: int
    lengths: Distribution  # tokens of each sample
    fill: Distribution  # tokens of each pack, without its padding
    turns: dict[str, int]  # by role; empty where roles are unknown
    samples_before: list[int]  # in all rows before each block of rows

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.lengths.total

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return self.lengths.sum


class Rows:
    """The three fields of a packed dataset, and its roles where it has them, mapped into memory."""

    def __init__(self, directory: Path, seq_length: int, prefix: str = PREFIX) -> None:
        fields = (read_rows(directory, prefix, field, seq_length) for field in FIELDS)
        self.input_ids, self.segments, self.labels = fields
        self.roles = read_roles(directory, prefix, len(self), seq_length)
        self.seq_length = seq_length
        self.block = max(1, BLOCK_TOKENS // seq_length)

    def __len__(self) -> int:
        return min(len(self.input_ids), len(self.segments), len(self.labels))

    def locate(self, sample: int, statistics: Statistics) -> tuple[int, int, int]:
        """Row, first and past-the-last column of a sample, counted from 0 through the packs in their order."""
        before = bisect_right(statistics.samples_before, sample) - 1
        first = before * self.block
        rows, begins, ends = segment_runs(self.segments[first : first + self.block])
        position = sample - statistics.samples_before[before]
        return first + int(rows[position]), int(begins[position]), int(ends[position])


def measure(rows: Rows) -> Statistics:
    """Reads a whole dataset once."""
    lengths = np.zeros(rows.seq_length + 1, np.int64)
    fill = np.zeros(rows.seq_length + 1, np.int64)
    turns = np.zeros(len(ROLES), np.int64)
    samples_before: list[int] = []
    trained = 0
    with progress("reading the dataset (packs)", len(rows)) as advance:
        for first in range(0, len(rows), rows.block):
            block = slice(first, first + rows.block)
            segments = np.asarray(rows.segments[block])
            samples_before.append(int(lengths.sum()))
            _, begins, ends = segment_runs(segments)
            lengths += np.bincount(ends - begins, minlength=len(lengths))
            fill += np.bincount(np.count_nonzero(segments, axis=1), minlength=len(fill))
            trained += int(np.count_nonzero(rows.labels[block] != IGNORED))
            if rows.roles is not None:
                turns += count_turns(np.asarray(rows.roles[block]))
            advance(len(segments), "")
    counted = dict(zip(ROLES, turns.tolist())) if rows.roles is not None else {}
    return Statistics(
        rows.seq_length, len(rows), trained, Distribution(lengths), Distribution(fill), counted, samples_before
    )
