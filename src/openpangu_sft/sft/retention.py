"""Which checkpoints of a run are there, and which ones stay (train.keep_checkpoints)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Optional

from openpangu_sft.checkpoint.mcore import iteration_directory


def iterations(run: Path) -> list[int]:
    """Of which there are directories, whole or not."""
    names = (path.name[len("iter_") :] for path in run.glob("iter_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


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
