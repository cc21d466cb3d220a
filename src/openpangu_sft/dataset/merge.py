"""Stage merge: the shards of all parts of the inputs, in their order, to the one dataset that training reads.

Full packs are copied, underfilled ones of all shards are packed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from openpangu_sft.artifacts.artifact import Manifest, blocks_of, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart
from openpangu_sft.dataset.encode import Encoded, input_ids_of, labels_of
from openpangu_sft.dataset.index_file import AGAIN, PREFIX, VALIDATION, PackedWriter, Rows, field_path
from openpangu_sft.dataset.packing import plan_packs
from openpangu_sft.dataset.preprocess import data_settings, sample_files, shard_directories, shard_of
from openpangu_sft.dataset.segments import Int64s, blocks, segment_runs
from openpangu_sft.dataset.shard import write_packs
from openpangu_sft.dataset.spans import parts_of
from openpangu_sft.dataset.spool import Spool
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

PADDING = 0.01  # share of padding from which on a pack is underfilled


def run_merge(recipe: Recipe) -> Manifest:
    """Stage merge: `paths.shards` to `paths.dataset`, in the order of the samples files.

    Raises `UserError` where a shard is missing, belongs to no samples, is outdated or was made with other settings; or
    where all samples fall into the validation split, or none where some were to.
    """
    source, target = recipe.path("shards"), recipe.path("dataset")
    require_apart("paths.shards", source, "paths.dataset", target)
    settings = data_settings(recipe)
    files = sample_files(recipe.path("samples"))
    present = shard_directories(source)
    parts = parts_of(files, _divided_into(present, source))
    if left_over := {path.name for path in present} - {part.name for part in parts}:
        remedy = "remove it, or run make preprocess again"
        raise UserError("belongs to no samples file as they are now", where=source / min(left_over), remedy=remedy)
    shards = {source / part.name: shard_of(part, source / part.name, settings) for part in parts}
    manifest = Manifest("dataset", settings, {directory.name: shard.digest for directory, shard in shards.items()})
    manifest.counts = sum_counts([shard.counts for shard in shards.values()])
    splits = {PREFIX: manifest.counts}
    if recipe.data.validation_share:
        splits[VALIDATION] = manifest.counts["validation"]
    for prefix, counts in splits.items():
        if not counts["packs"]:  # a hash decides, so few samples may give an empty side
            which, change = ("all", "lower") if prefix == PREFIX else ("none", "raise")
            samples = sum(each["packed"] for each in splits.values())
            what = f"{which} of the {samples:,} samples falls into the validation split"
            remedy = f"{change} data.validation_share, or set another data.seed, and run make preprocess again"
            raise UserError(what, where=source, remedy=remedy)
    with staged_directory(target, manifest) as staging:
        for prefix, counts in splits.items():
            counts.update(join_shards(list(shards), staging, prefix, counts["packs"], recipe.data))
    return manifest


def _divided_into(shards: dict[Path, Manifest], source: Path) -> int:
    """How many parts the inputs were divided into, according to the shards; raises `UserError` if they disagree."""
    found: dict[int, Path] = {}
    for path, shard in shards.items():
        found.setdefault(int(str(shard.settings.get("shard", "")).partition("/")[2] or 1), path)
    if len(found) > 1:
        (one, path), (other, other_path) = sorted(found.items())[:2]
        what = f"shards of different divisions: {path.name} is of {one}, {other_path.name} is of {other}"
        raise UserError(what, where=source, remedy=f"remove those of one division, or {source}, and preprocess again")
    return next(iter(found), 1)


class Underfilled:
    """The underfilled rows of a shard, a block in memory at a time; if there are none, ask for `numbers` only."""

    def __init__(self, shard: Path, prefix: str, seq_length: int) -> None:
        self._labels, self._seq_length = field_path(shard, prefix, "labels", "bin"), seq_length
        # not kept open: there may be more shards than files that a process may open
        self._rows = partial(Rows, shard, seq_length, prefix)
        self.numbers: Int64s = np.empty(0, np.int64)  # of the rows, ascending
        if self._labels.stat().st_size:
            self.numbers = np.flatnonzero(self._rows().segments[:, -max(1, int(PADDING * seq_length))] == 0)

    def segments(self) -> Iterator[Encoded]:
        """Their segments; raises `UserError` for a label that is neither the token there nor -100."""
        rows = self._rows()
        assert rows.roles is not None  # see `shard_of`
        for part in blocks(len(self.numbers), self._seq_length):
            block = self.numbers[part.start : part.stop]
            ids, labels, roles = rows.input_ids[block], rows.labels[block], rows.roles[block]
            marked = np.where(labels < 0, ~ids, ids)
            if (input_ids_of(marked) != ids).any() or (labels_of(marked) != labels).any():
                raise UserError("has a label that is neither its token nor -100", where=self._labels, remedy=AGAIN)
            for row, begin, end in np.stack(segment_runs(rows.segments[block]), axis=1).tolist():
                yield Encoded(marked[row, begin:end], roles[row, begin:end])

    def pad_id(self) -> int:
        return int(self._rows().input_ids[self.numbers[0], -1])


def join_shards(shards: Sequence[Path], staging: Path, prefix: str, packs: int, data: Data) -> dict[str, int]:
    """Writes the `packs` rows of all shards, one after another, then the underfilled ones, packed again.

    Files are made in `staging`. Returns packs after and before, and how many were packed again: none where that would
    not save one. Raises `UserError` where a shard is damaged.
    """
    underfilled = [Underfilled(shard, prefix, data.seq_length) for shard in shards]
    rows = [each.numbers for each in underfilled]
    # a single shard was planned as a whole: nothing to gain
    candidates = [each for each in underfilled if each.numbers.size and len(shards) > 1]
    with Spool(staging / "spool") as spool:
        spool.runs = [spool.write(each.segments()) for each in candidates]
        spool.finish()
        plan = plan_packs(spool.lengths, data.seq_length, data.seed)
        if not 0 < len(plan) < sum(map(len, rows)):
            rows, plan = [each[:0] for each in rows], plan_packs([], data.seq_length, data.seed)
        again = sum(map(len, rows))
        kept = packs - again
        writer = PackedWriter(staging, prefix, kept + len(plan), data.seq_length)
        _copy(shards, rows, writer)
        if again:
            title, pad_id = "merge, underfilled packs (packs)", candidates[0].pad_id()
            write_packs(title, spool, plan, writer, pad_id, data.workers, kept)
    return {"packs": kept + len(plan), "packs_in_shards": packs, "packed_again": again}


def _copy(shards: Sequence[Path], left_out: Sequence[Int64s], writer: PackedWriter) -> None:
    """Copies the rows of all shards except those left out of each, by number."""
    widths = {path: writer.seq_length * np.dtype(dtype).itemsize for path, dtype in writer.files.values()}
    total = sum((shard / path.name).stat().st_size for shard in shards for path in widths)
    total -= sum(map(len, left_out)) * sum(widths.values())
    with byte_progress("merge", total) as advance, ThreadPoolExecutor(len(widths)) as pool:

        def copy(target: Path, width: int) -> None:
            with target.open("r+b") as merged:
                for shard, rows in zip(shards, left_out):
                    source = shard / target.name
                    ends = [*(rows * width).tolist(), source.stat().st_size]
                    for begin, end in zip([0, *((rows + 1) * width).tolist()], ends):
                        for block in blocks_of(source, begin, end):
                            merged.write(block)
                            advance(len(block), "")

        list(pool.map(copy, widths, widths.values()))
