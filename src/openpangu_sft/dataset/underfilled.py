"""The underfilled packs of a shard, read as segments: merge packs those of all shards again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.encode import Encoded, input_ids_of, labels_of
from openpangu_sft.dataset.index_file import Ids, field_path, read_rows
from openpangu_sft.dataset.packs import VALUES_AT_ONCE
from openpangu_sft.dataset.roles import AGAIN, read_roles
from openpangu_sft.dataset.segments import Int64s, segment_runs
from openpangu_sft.util.errors import UserError

PADDING = 0.01  # share of padding from which on a pack is underfilled


class Underfilled:
    """The underfilled rows of a shard. One block of rows at a time is in memory.

    If there are none, only `rows` may be asked for.

    Attributes:
        rows: int64, their numbers, ascending.
    """

    def __init__(self, shard: Path, prefix: str, seq_length: int) -> None:
        self._shard, self._prefix, self._seq_length = shard, prefix, seq_length
        self.rows: Int64s = np.empty(0, np.int64)
        if field_path(shard, prefix, "attention_mask", "bin").stat().st_size:
            self.rows = np.flatnonzero(self._map("attention_mask")[:, -max(1, int(PADDING * seq_length))] == 0)

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each segment: int32 [segments]."""
        return np.concatenate([(ends - begins).astype(np.int32) for _, (_, begins, ends) in self._blocks()])

    def segments(self) -> Iterator[Encoded]:
        """Reads the segments; roles are 0 where the shard has none.

        Raises:
            UserError: a label is neither the token nor -100.
        """
        ids_of, labels_from = self._map("input_ids"), self._map("labels")
        roles_of = read_roles(self._shard, self._prefix, len(ids_of), self._seq_length)
        for block, runs in self._blocks():
            ids, labels = ids_of[block], labels_from[block]
            marked = np.where(labels < 0, ~ids, ids)
            if (input_ids_of(marked) != ids).any() or (labels_of(marked) != labels).any():
                where = field_path(self._shard, self._prefix, "labels", "bin")
                raise UserError("has a label that is neither its token nor -100", where=where, remedy=AGAIN)
            roles = np.zeros(ids.shape, np.uint8) if roles_of is None else roles_of[block]
            for row, begin, end in np.stack(runs, axis=1).tolist():
                yield Encoded(marked[row, begin:end], roles[row, begin:end])

    def pad_id(self) -> int:
        """The token of padding."""
        return int(self._map("input_ids")[self.rows[0], -1])

    def _map(self, field: str) -> Ids:
        return read_rows(self._shard, self._prefix, field, self._seq_length)

    def _blocks(self) -> Iterator[tuple[Int64s, tuple[Int64s, Int64s, Int64s]]]:
        """Numbers of rows, and the segments in them: row of the block, first column, past-the-last column."""
        numbers, step = self._map("attention_mask"), max(1, VALUES_AT_ONCE // self._seq_length)
        for begin in range(0, len(self.rows), step):
            block = self.rows[begin : begin + step]
            yield block, segment_runs(numbers[block])
