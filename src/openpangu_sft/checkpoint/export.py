"""Stage export: the newest checkpoint of a run as a Hugging Face checkpoint that loads as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openpangu_sft.artefact import Manifest, read_manifest, require_apart, staged_directory
from openpangu_sft.checkpoint.convert import to_hf, weights_digest
from openpangu_sft.checkpoint.hf import llama_config, require_model, write_checkpoint
from openpangu_sft.checkpoint.layout import parameter_count
from openpangu_sft.checkpoint.mcore import MODEL_FILE, dtype_name, iteration_directory, latest_iteration, read_model
from openpangu_sft.errors import UserError
from openpangu_sft.progress import progress
from openpangu_sft.recipe import Recipe
from openpangu_sft.tokenizer import tokenizer_digest


def run_export(recipe: Recipe) -> Manifest:
    """Stage export: `paths.run` to `paths.export`, with configuration and tokenizer from `paths.hf`.

    Raises:
        UserError: the run has no finished checkpoint, or it began from another model or tokenizer.
    """
    run, source, target = recipe.path("run"), recipe.path("hf"), recipe.path("export")
    config = require_model(source, recipe.model)
    if not run.is_dir():
        raise UserError("no such directory", where=run, remedy="run make sft")
    require_apart("paths.hf", source, "paths.export", target)
    directory = iteration_directory(run, latest_iteration(run, "run make sft"))
    checkpoint = read_manifest(directory, "checkpoint", "run make sft")
    _require_input(checkpoint, "hf.tokenizer", tokenizer_digest(source), directory)
    _require_input(checkpoint, "hf.hf", weights_digest(source), directory)
    inputs = {"checkpoint": checkpoint.digest, **checkpoint.inputs}
    manifest = Manifest("hf", settings=checkpoint.settings, inputs=inputs)
    with progress("export", 2) as advance, staged_directory(target, manifest) as staging:
        advance(0, "reading")
        tensors = to_hf(read_model(directory / MODEL_FILE, recipe.model), recipe.model)
        dtype = dtype_name(tensors["model.embed_tokens.weight"].dtype)
        manifest.counts = {**checkpoint.counts, "parameters": parameter_count(recipe.model), "dtype": dtype}
        advance(1, "writing")
        exported: dict[str, Any] = {**llama_config(config), "torch_dtype": dtype}
        write_checkpoint(staging, exported, tensors, source)
    return manifest


def _require_input(checkpoint: Manifest, name: str, found: str, directory: Path) -> None:
    if checkpoint.inputs.get(name) != found:
        what = "tokenizer" if name.endswith("tokenizer") else "weights"
        raise UserError(
            f"began from a checkpoint with other {what} than paths.hf", where=directory, remedy="check paths.hf"
        )
