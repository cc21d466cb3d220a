"""The directory of a run: which checkpoint training goes on from, which ones stay, and the data as upstream sees it."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import Optional

from openpangu_sft.checkpoint.mcore import iteration_directory, rank_file
from openpangu_sft.checkpoint.sharding import layout_of, rank_parameter_count
from openpangu_sft.dataset.index_file import PREFIX
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import newest_whole

OPTIMIZER = "distrib_optim.pt"
"""Beside the model's file of every rank where --use-distributed-optimizer is set."""


def link_data(run: Path, dataset: Path, digest: str) -> Path:
    """A folder with links to the packed files, for upstream to write its shuffle index into.

    Upstream names that index by seed and number of samples alone, and takes what is there. With a folder for every
    content of the data, an index is never that of other data.

    Returns:
        The prefix for --data-path.
    """
    folder = run / f"data-{digest[:16]}"
    for stale in run.glob("data-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)  # several machines do so at once
    folder.mkdir(exist_ok=True)
    for file in dataset.glob(f"{PREFIX}_packed_*"):
        with contextlib.suppress(FileExistsError):
            (folder / file.name).symlink_to(file)
    return folder / PREFIX


def newest_complete(recipe: Recipe, is_main: bool) -> Optional[int]:
    """The newest iteration of the run whose checkpoint is there with all its files; see retention.newest_whole.

    Upstream writes the tracker file when a checkpoint is done.
    """
    return newest_whole(recipe.path("run"), lambda iteration: is_complete(recipe, iteration), is_main)


def is_complete(recipe: Recipe, iteration: int) -> bool:
    """Whether every rank's files are there to their end, where torch.save writes a zip archive's directory."""
    directory, layout = iteration_directory(recipe.path("run"), iteration), layout_of(recipe.model, recipe.parallel)
    files = [directory / rank_file(*rank, layout.pipeline) for rank in layout.ranks()]
    files += [file.with_name(OPTIMIZER) for file in files]
    return all(file.is_file() and zipfile.is_zipfile(file) for file in files)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: the weights, and fp32 weights and Adam's two moments in the optimizer's file.

    Of every rank: with a pipeline the last stage writes tied embeddings once more.
    """
    layout = layout_of(recipe.model, recipe.parallel)
    parameters = sum(rank_parameter_count(recipe.model, layout, *rank) for rank in layout.ranks())
    return parameters * ((2 if recipe.train.precision == "bf16" else 4) + 12)
