"""Stages convert (Hugging Face to Megatron-core) and export (back), bit for bit.

Tensors are moved in whole rows by the table in layout.py; nothing is computed, so nothing is rounded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from openpangu_sft.artefact import Manifest, sha256_of, staged_directory
from openpangu_sft.checkpoint.hf import read_weights, require_model, weight_files
from openpangu_sft.checkpoint.layout import hf_shapes, mcore_tensors, parameter_count
from openpangu_sft.checkpoint.mcore import Tensors, dtype_name, iteration_directory, write_model, write_tracker
from openpangu_sft.errors import UserError
from openpangu_sft.progress import progress
from openpangu_sft.recipe import Model, Recipe
from openpangu_sft.tokenizer import tokenizer_digest

FIRST_ITERATION = 1
"""Upstream's converter writes iter_0000001, and training with --finetune starts counting anew from there."""


def to_mcore(tensors: Tensors, model: Model) -> Tensors:
    """Hugging Face tensors to Megatron-core tensors. Each is a copy with its own memory.

    Raises:
        UserError: tensors that Megatron-core joins have different dtypes.
    """
    result: Tensors = {}
    for target in mcore_tensors(model):
        parts = [tensors[name][begin : begin + size] for name, begin, size in target.rows]
        if len({part.dtype for part in parts}) > 1:  # torch.cat would convert them without a word
            dtypes = {rows.name: dtype_name(part.dtype) for rows, part in zip(target.rows, parts)}
            raise UserError(
                f"{target.name} would join tensors of different dtypes: "
                + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()),
                remedy="convert the Hugging Face checkpoint to one dtype first",
            )
        result[target.name] = torch.cat(parts)
    return result


def to_hf(tensors: Tensors, model: Model) -> Tensors:
    """Megatron-core tensors to Hugging Face tensors."""
    dtypes = {rows.name: tensors[source.name].dtype for source in mcore_tensors(model) for rows in source.rows}
    result = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in hf_shapes(model).items()}
    for source in mcore_tensors(model):
        position = 0
        for name, begin, size in source.rows:
            result[name][begin : begin + size] = tensors[source.name][position : position + size]
            position += size
    return result


def weights_digest(directory: Path) -> str:
    """sha256 over config.json and the weights of a Hugging Face checkpoint."""
    digest = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def run_convert(recipe: Recipe) -> Manifest:
    """Stage convert: `paths.hf` to `paths.mcore`.

    Raises:
        UserError: the checkpoint does not fit the recipe, or TP or PP is not 1.
    """
    source, target, model = recipe.path("hf"), recipe.path("mcore"), recipe.model
    for key in ("tensor", "pipeline"):
        if getattr(recipe.parallel, key) != 1:
            raise UserError(
                f"parallel.{key} = {getattr(recipe.parallel, key)}: convert writes TP 1, PP 1 only in this version",
                remedy=f"set parallel.{key}=1",
            )
    require_model(source, model)
    manifest = Manifest("mcore", settings=mcore_settings(recipe))
    with progress("convert", 3) as advance, staged_directory(target, manifest) as staging:
        advance(0, "checking sums")
        manifest.inputs = {"hf": weights_digest(source), "tokenizer": tokenizer_digest(source)}
        advance(1, "reading")
        tensors = to_mcore(read_weights(source, model), model)
        dtypes = sorted({dtype_name(tensor.dtype) for tensor in tensors.values()})
        manifest.counts = {"parameters": parameter_count(model), "tensors": len(tensors), "dtype": "+".join(dtypes)}
        advance(1, "writing")
        write_model(iteration_directory(staging, FIRST_ITERATION), model, tensors, FIRST_ITERATION, 0)
        write_tracker(staging, FIRST_ITERATION)
    return manifest


def mcore_settings(recipe: Recipe) -> dict[str, object]:
    """The settings that shape a Megatron-core checkpoint: recorded by convert, required by sft."""
    parallel = {"parallel.tensor": recipe.parallel.tensor, "parallel.pipeline": recipe.parallel.pipeline}
    return {**{f"model.{key}": value for key, value in recipe.model.model_dump().items()}, **parallel}
