"""The checkpoints of a run: their size, the one that training resumes from, and which ones are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Callable, Optional

from openpangu_sft.checkpoint.mcore import iteration_directory, write_tracker
from openpangu_sft.checkpoint.mcore_reader import latest_iteration
from openpangu_sft.checkpoint.sharding import layout_of, rank_parameter_count
from openpangu_sft.recipe.model_config import TRACKER
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.metrics import validation_losses
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

MOST_AT_START = 2  # checkpoints that must have room before training starts; disk may be added during a run of days


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of a checkpoint: weights, and of those that are trained fp32 values and two moments.

    The transformers engine writes fp32 values beside the model's only where that is bf16. Summed over ranks: with
    pipeline parallelism the last stage writes tied embeddings again.
    """
    model, adapter, layout = recipe.model, recipe.train.lora.adapter, layout_of(recipe.model, recipe.parallel)
    weights, trained = (
        sum(rank_parameter_count(model, layout, *rank, adapter, which) for rank in layout.ranks())
        for which in (False, True)
    )
    if recipe.train.precision == "bf16":
        return weights * 2 + trained * 12
    return weights * 4 + trained * (12 if recipe.train.engine == "mindspeed" else 8)


def bytes_at_start(recipe: Recipe) -> int:
    """Disk that must be free before training starts: for the checkpoints to keep and the one being written."""
    kept = recipe.train.keep_checkpoints or max(1, recipe.train.iterations // recipe.train.save_interval)
    return checkpoint_bytes(recipe) * (min(kept, MOST_AT_START) + 1)


def iterations(run: Path) -> list[int]:
    """Iterations that have a checkpoint directory, complete or not."""
    names = (path.name[len("iter_") :] for path in run.glob("iter_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def newest_whole(run: Path, is_whole: Callable[[int], bool], is_main: bool) -> Optional[int]:
    """The iteration that training resumes from, or None for a new run. The main process corrects the tracker file.

    Checkpoints newer than the tracker file says are incomplete, or were left out on purpose. Without a tracker file
    either the first checkpoint was interrupted, or the file was lost. `is_whole`: whether an iteration's checkpoint has
    all its files. Raises `UserError` where there are checkpoints but none is whole: a new run would overwrite them.
    """
    named = latest_iteration(run) if (run / TRACKER).is_file() else None
    there = iterations(run)
    for iteration in reversed(there):
        if (named is None or iteration <= named) and is_whole(iteration):
            if iteration != named and is_main:
                what = f"iteration {named} is not complete in" if named is not None else f"there is no {TRACKER} in"
                say(f"{what} {run}: resuming from {iteration}")
                write_tracker(run, iteration)
            return iteration
    if named or len(there) > 1:
        raise UserError("no checkpoint here is complete", where=run, remedy="choose another paths.run")
    return None


def best_iteration(run: Path) -> Optional[int]:
    """The checkpoint with the lowest validation loss of those that were evaluated during training, if any."""
    losses = validation_losses(run)
    evaluated = [iteration for iteration in iterations(run) if iteration in losses]
    return min(evaluated, key=losses.__getitem__, default=None)


def stops_early(recipe: Recipe, losses: Mapping[int, float]) -> str:
    """Why train.early_stop ends training, or nothing; `losses` on validation data are by iteration, in order."""
    best, patience = min(losses, key=losses.__getitem__, default=0), recipe.train.early_stop.patience
    since = sum(iteration > best for iteration in losses)
    if not patience or since < patience:
        return ""
    lowest = f"lowest at iteration {best:,} ({losses[best]:.4f}), {since} evaluations ago"
    return f"stopped early: validation loss was {lowest}"


def nothing_to_do(recipe: Recipe, done: int) -> str:
    """Why a run does not go on after the iteration that it would resume from; empty where it does."""
    if words := stops_early(recipe, validation_losses(recipe.path("run"), done)):
        return words
    more = "raise train.iterations or train.epochs to continue"
    return f"this run has {done} iterations already: {more}" if done >= recipe.train.iterations else ""


def prune(run: Path, keep: Optional[int], newest: int, best: bool = False) -> None:
    """Removes all checkpoints up to `newest`, the last complete one, but the `keep` newest of them, and the `best`."""
    for left_over in run.glob(".iter_*.removed"):
        shutil.rmtree(left_over)
    if keep is None:
        return
    finished = [iteration for iteration in iterations(run) if iteration <= newest]
    kept = {*finished[-keep:], best_iteration(run) if best else None}
    for iteration in sorted({*finished} - kept):
        directory = iteration_directory(run, iteration)
        doomed = directory.with_name(f".{directory.name}.removed")  # never taken for a checkpoint while half removed
        directory.rename(doomed)
        shutil.rmtree(doomed)
