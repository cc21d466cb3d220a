"""Which checkpoints of a run are there, which one training goes on from, and which ones stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Callable, Optional

from openpangu_sft.checkpoint.mcore import iteration_directory, write_tracker
from openpangu_sft.checkpoint.mcore_reader import latest_iteration
from openpangu_sft.recipe.model_config import TRACKER
from openpangu_sft.util.console import console
from openpangu_sft.util.errors import UserError


def iterations(run: Path) -> list[int]:
    """Of which there are directories, whole or not."""
    names = (path.name[len("iter_") :] for path in run.glob("iter_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def newest_whole(run: Path, is_whole: Callable[[int], bool], is_main: bool) -> Optional[int]:
    """The iteration that training goes on from, or None where it begins. The tracker file is put right.

    What is newer than the tracker file says is half-written, or was left behind on purpose. Where there is no tracker
    file, the first checkpoint was cut off while it was written, or somebody has lost the file.

    Args:
        is_whole: whether the checkpoint of an iteration has all its files.
        is_main: whether this process is the one that says what it found and writes the file.

    Raises:
        UserError: there are checkpoints and none to go on from: beginning anew would write over them.
    """
    named = latest_iteration(run) if (run / TRACKER).is_file() else None
    there = iterations(run)
    for iteration in reversed(there):
        if (named is None or iteration <= named) and is_whole(iteration):
            if iteration != named and is_main:
                lost = f"there is no {TRACKER} in {run}: going on from {iteration}"
                cut_off = f"iteration {named} is not whole in {run}: going on from {iteration}"
                console.print(lost if named is None else cut_off, markup=False, soft_wrap=True)
                write_tracker(run, iteration)
            return iteration
    if named or len(there) > 1:
        raise UserError("no checkpoint here is whole", where=run, remedy="choose another paths.run, or remove this one")
    return None


def prune(run: Path, keep: Optional[int], newest: int) -> None:
    """Removes checkpoints but the `keep` newest ones up to `newest`, which is finished."""
    if keep is None:
        return
    finished = [iteration for iteration in iterations(run) if iteration <= newest]
    for iteration in finished[:-keep]:
        directory = iteration_directory(run, iteration)
        doomed = directory.with_name(f".{directory.name}.removed")  # no half of it is ever taken for a checkpoint
        directory.rename(doomed)
        shutil.rmtree(doomed)
