"""Numbers over a whole packed dataset, read in blocks of rows: some bytes per sample in memory, no loop per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpangu_sft.dataset.index_file import FIELDS, PREFIX, Ids, read_rows
from openpangu_sft.dataset.roles import ROLES, count_turns, read_roles
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.util.console import progress

BLOCK_TOKENS = 1 << 20  # tokens in a block


@dataclass(frozen=True)
class Statistics:
    """What a packed dataset holds."""

    seq_length: int
    trained_tokens: int
    lengths: Ids  # int32 [samples], tokens of each
    samples: Ids  # int32 [packs], samples in each
    fill: Ids  # int32 [packs], tokens of each without its padding
    turns: dict[str, int]  # by role; empty where roles are unknown

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.fill.sum(dtype=np.int64))


class Rows:
    """The three fields of a packed dataset, and its roles where it has them, mapped into memory."""

    def __init__(self, directory: Path, seq_length: int, prefix: str = PREFIX) -> None:
        fields = (read_rows(directory, prefix, field, seq_length) for field in FIELDS)
        self.input_ids, self.segments, self.labels = fields
        self.roles = read_roles(directory, prefix, len(self), seq_length)

    def __len__(self) -> int:
        return min(len(self.input_ids), len(self.segments), len(self.labels))


def measure(rows: Rows) -> Statistics:
    """Reads a whole dataset once."""
    seq_length = rows.input_ids.shape[1]
    step = max(1, BLOCK_TOKENS // seq_length)
    found: list[list[Ids]] = []
    turns, trained = np.zeros(len(ROLES), np.int64), 0
    with progress("reading the dataset (packs)", len(rows)) as advance:
        for first in range(0, len(rows), step):
            block = slice(first, first + step)
            segments = np.asarray(rows.segments[block])
            numbers, begins, ends = segment_runs(segments)
            counts = (ends - begins, np.bincount(numbers, minlength=len(segments)), np.count_nonzero(segments, axis=1))
            found.append([count.astype(np.int32) for count in counts])
            trained += int(np.count_nonzero(rows.labels[block] != IGNORED))
            if rows.roles is not None:
                turns += count_turns(np.asarray(rows.roles[block]))
            advance(len(segments), "")
    counted = dict(zip(ROLES, turns.tolist())) if rows.roles is not None else {}
    lengths, samples, fill = map(np.concatenate, zip(*found))
    return Statistics(seq_length, trained, lengths, samples, fill, counted)
