"""Compares a Megatron-core checkpoint with its manifest, by sha256, and with a Hugging Face one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from openpangu_sft.artifacts.artifact import MANIFEST, parse_manifest
from openpangu_sft.artifacts.checks import wrong_files
from openpangu_sft.checkpoint.files.arrays import DType
from openpangu_sft.checkpoint.hf import open_hf
from openpangu_sft.checkpoint.lora import base_of
from openpangu_sft.checkpoint.mcore_reader import McoreCheckpoint, open_mcore
from openpangu_sft.checkpoint.sharding import hf_shapes, parameter_count
from openpangu_sft.checkpoint.weights import differences, rounded_to
from openpangu_sft.recipe.model_config import require_model
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

REMEDY = "convert again with make convert"


class Compared(NamedTuple):
    """The open Megatron-core checkpoint, the dtype to compare in where theirs differ, and figures for the user."""

    mcore: McoreCheckpoint
    rounded: Optional[DType]
    figures: dict[str, str]


def check_manifest(directory: Path) -> dict[str, str]:
    """Compares the sha256 of every file of a checkpoint with its manifest; returns figures for the user.

    Raises `UserError` where there is no manifest, and for the first file that is not what it describes.
    """
    files = size = 0
    for path in (directory / MANIFEST, *sorted(directory.glob(f"iter_*/{MANIFEST}"))):
        if not path.is_file():
            continue
        manifest = parse_manifest(path, REMEDY)
        for finding in wrong_files(path.parent, manifest, REMEDY):
            raise finding
        files += len(manifest.files)
        size += sum(entry["bytes"] for entry in manifest.files.values())
    if not files:
        raise UserError(f"there is no {MANIFEST} with sums", where=directory, remedy="it was not made by this project")
    return {"files": f"{files:,}", "MB": f"{size / 1e6:,.0f}", "sha256": "every file is as it was made"}


def compare_tensors(recipe: Recipe, hf: Path, mcore: Path, iteration: Optional[int] = None) -> Compared:
    """Compares every tensor of two checkpoints, bit for bit; where the dtypes differ, rounds one to the other's.

    Of a LoRA checkpoint it compares the weights beside the adapters, which training does not change.
    Raises `UserError` where one of them cannot be read, and for the first element that differs.
    """
    require_model(hf, recipe.model)
    weights = open_hf(hf, recipe.model)
    opened = open_mcore(mcore, recipe.model, iteration, "run make convert")
    base = base_of(opened.weights)
    wanted = rounded_to(weights, recipe.model, base, opened.directory)
    with byte_progress("comparing", sum(path.stat().st_size for path in opened.files)) as advance:
        found = list(differences(wanted, base, advance))
    cast = f", after rounding Hugging Face's {'+'.join(weights.dtypes())} to {wanted.dtype}" if wanted.dtype else ""
    if found and wanted.dtype and len(weights.dtypes()) == 1:  # an export may have been rounded
        other = rounded_to(base, recipe.model, weights, hf)
        if not any(differences(other, weights)):
            wanted, found = other, []
            cast = f", after rounding Megatron-core's {'+'.join(base.dtypes())} to {other.dtype}"
    if found:
        trained = opened.manifest and "dataset" in opened.manifest.inputs and not opened.weights.stored.adapter
        remedy = "training changes them: give the run's own export as HF" if trained else REMEDY
        what = f"differs from {hf} in {len(found):,} blocks of tensors, the first: {found[0]}"
        raise UserError(what, where=opened.directory, remedy=remedy)
    count = len(hf_shapes(recipe.model))
    figures = {
        "Megatron-core": f"{opened.layout}, iteration {opened.iteration}",
        "dtype": "+".join(base.dtypes()),
        "tensors equal": f"{count:,} of {count:,}",
        "values equal": f"{parameter_count(recipe.model):,}, every bit{cast}",
    }
    if adapter := opened.weights.stored.adapter:
        figures["LoRA adapters"] = f"{adapter}: not compared, nor in the logits"
    return Compared(opened, wanted.dtype, figures)
