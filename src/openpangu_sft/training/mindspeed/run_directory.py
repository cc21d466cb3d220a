"""The directory of a run as upstream sees it: its data, and the checkpoint that training resumes from."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Optional

from openpangu_sft.checkpoint.files.torch_read import is_whole
from openpangu_sft.checkpoint.mcore import OPTIMIZER_FILE, iteration_directory, rank_file
from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import newest_whole


def link_data(run: Path, dataset: Path, digest: str) -> Path:
    """Makes a folder with links to the packed files, in which upstream writes its shuffle index; returns --data-path.

    Upstream names the index by seed and number of samples only, and reuses an existing one. With one folder per
    content of the data it never reuses the index of other data.
    """
    folder = run / f"data-{digest[:16]}"
    for stale in run.glob("data-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)  # several nodes may do so at once
    folder.mkdir(exist_ok=True)
    for file in (*dataset.glob(f"{PREFIX}_packed_*"), *dataset.glob(f"{VALIDATION}_packed_*")):
        with contextlib.suppress(FileExistsError):
            (folder / file.name).symlink_to(file)
    return folder / PREFIX


def newest_complete(recipe: Recipe, is_main: bool) -> Optional[int]:
    """The newest iteration of the run with all files of all ranks; see retention.newest_whole."""
    run, layout = recipe.path("run"), layout_of(recipe.model, recipe.parallel)

    def is_complete(iteration: int) -> bool:
        models = [iteration_directory(run, iteration) / rank_file(*rank, layout.pipeline) for rank in layout.ranks()]
        files = [*models, *(model.with_name(OPTIMIZER_FILE) for model in models)]
        return all(file.is_file() and is_whole(file) for file in files)

    return newest_whole(run, is_complete, is_main)
