"""Joins the rows of shards to one dataset: full packs are copied, underfilled ones of all shards are packed again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openpangu_sft.dataset.index_file import PackedWriter
from openpangu_sft.dataset.packing import plan_packs
from openpangu_sft.dataset.packs import write_packs
from openpangu_sft.dataset.segments import Int64s
from openpangu_sft.dataset.spool import Spool
from openpangu_sft.dataset.underfilled import Underfilled
from openpangu_sft.recipe.data import Data
from openpangu_sft.util.console import byte_progress


def join_shards(shards: Sequence[Path], staging: Path, prefix: str, packs: int, data: Data) -> dict[str, int]:
    """Writes the rows of all shards, one after another, then the underfilled ones, packed again.

    Args:
        shards: their directories.
        staging: where the files are made; roles are 0 unless all shards have them.
        prefix: of the files' names.
        packs: rows of all shards.
        data: seq_length, seed and workers are used.

    Returns:
        Counts: packs after and before, and how many were packed again: none where that would not save one.

    Raises:
        UserError: a shard is damaged.
    """
    underfilled = [Underfilled(shard, prefix, data.seq_length) for shard in shards]
    rows = [each.rows for each in underfilled]
    candidates = [each for each in underfilled if each.rows.size]
    # a single shard was planned as a whole: nothing to gain
    lengths = [np.empty(0, np.int32), *(each.lengths() for each in candidates if len(shards) > 1)]
    plan = plan_packs(np.concatenate(lengths), data.seq_length, data.seed)
    if not 0 < len(plan) < sum(map(len, rows)):
        rows, plan = [each[:0] for each in rows], plan_packs([], data.seq_length, data.seed)
    again = sum(map(len, rows))
    kept = packs - again
    writer = PackedWriter(staging, prefix, kept + len(plan), data.seq_length)
    _copy(shards, rows, writer)
    if again:
        with Spool(staging / "spool") as spool:
            for each in candidates:
                spool.add(spool.write(each.segments()))
            title, pad_id = "merge, underfilled packs (packs)", candidates[0].pad_id()
            write_packs(title, spool, spool.finish(), plan, writer, pad_id, data.workers, kept)
    return {"packs": kept + len(plan), "packs_in_shards": packs, "packed_again": again}


def _copy(shards: Sequence[Path], left_out: Sequence[Int64s], writer: PackedWriter) -> None:
    """Copies the rows of all shards except those left out of each, by number; roles only if all shards have them."""
    widths = {
        path: writer.seq_length * np.dtype(dtype).itemsize
        for path, dtype in writer.files.values()
        if all((shard / path.name).is_file() for shard in shards)
    }
    total = sum((shard / path.name).stat().st_size for shard in shards for path in widths)
    total -= sum(map(len, left_out)) * sum(widths.values())
    with byte_progress("merge", total) as advance, ThreadPoolExecutor(len(widths)) as pool:

        def copy(target: Path, width: int) -> None:
            with target.open("r+b") as merged:
                for shard, rows in zip(shards, left_out):
                    with (shard / target.name).open("rb") as stream:
                        ends = [*(rows * width).tolist(), stream.seek(0, os.SEEK_END)]
                        for begin, end in zip([0, *((rows + 1) * width).tolist()], ends):
                            stream.seek(begin)
                            while block := stream.read(min(1 << 20, end - stream.tell())):
                                merged.write(block)
                                advance(len(block), "")

        list(pool.map(copy, widths, widths.values()))
