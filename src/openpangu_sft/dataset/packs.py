"""Writes planned packs from a spool, in several processes."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.encode import input_ids_of, labels_of
from openpangu_sft.dataset.index_file import PackedWriter
from openpangu_sft.dataset.packing import Plan
from openpangu_sft.dataset.pool import ordered_map
from openpangu_sft.dataset.spool import Spool
from openpangu_sft.util.console import progress

VALUES_AT_ONCE = 1 << 20  # tokens that a process reads or writes at once


def write_packs(
    title: str,
    spool: Spool,
    lengths: npt.NDArray[np.int32],
    plan: Plan,
    writer: PackedWriter,
    pad_id: int,
    workers: int,
    first_row: int = 0,
) -> None:
    """Writes packs as rows that follow each other: samples of the spool, then padding.

    Args:
        title: of the progress.
        lengths: int32 [samples], of all that the spool holds, in tokens.
        plan: of samples by their number in the spool.
        first_row: the row of the first pack.
    """

    def write_rows(packs: range) -> range:
        """Writes some packs."""
        marked = np.full((len(packs), writer.seq_length), ~pad_id, np.int32)
        numbers, roles = np.zeros_like(marked), np.zeros(marked.shape, np.uint8)
        for row, pack in enumerate(packs):
            begin, packed = 0, plan[pack]
            for number, (sample, length) in enumerate(zip(packed.tolist(), lengths[packed].tolist()), 1):
                inside = slice(begin, begin := begin + length)
                spool.read(sample, marked[row, inside], roles[row, inside])
                numbers[row, inside] = number
        ids, labels = input_ids_of(marked), labels_of(marked)
        writer.write(first_row + packs.start, input_ids=ids, attention_mask=numbers, labels=labels, roles=roles)
        return packs

    step = max(1, VALUES_AT_ONCE // writer.seq_length)
    blocks = [range(begin, min(begin + step, len(plan))) for begin in range(0, len(plan), step)]
    written = ordered_map(write_rows, blocks, min(workers, len(blocks)) or 1)
    with progress(title, len(plan)) as advance, contextlib.closing(written):
        for block in written:
            advance(len(block), "")
