"""Stage convert: any checkpoint to a Megatron-core checkpoint of the recipe's layout, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.artifact import Manifest, staged_directory
from openpangu_sft.artifacts.checks import require_apart, require_room, unchanged
from openpangu_sft.checkpoint.files.arrays import DTYPES
from openpangu_sft.checkpoint.lora import require_shared, with_adapters
from openpangu_sft.checkpoint.mcore import FIRST, iteration_directory, rank_file, write_rank, write_tracker
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.sharding import layout_of, parameter_count
from openpangu_sft.checkpoint.source import open_checkpoint
from openpangu_sft.checkpoint.weights import Resharder, require_equal, warn_of_cast
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import tokenizer_digest
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError


def run_convert(
    recipe: Recipe, source: Optional[Path] = None, iteration: Optional[int] = None, dtype: Optional[str] = None
) -> Manifest:
    """Stage convert: to `paths.mcore`, in the layout of `parallel`.

    Args:
        source: a Hugging Face checkpoint, a LoRA adapter, a Megatron-core checkpoint of any layout, or a run; by
            default `paths.hf`.
        iteration: of a Megatron-core checkpoint or run; by default the newest.
        dtype: fp32, bf16 or fp16; by default that of the source.

    Raises `UserError` where the checkpoint does not fit the recipe, the disk has no room, or what was written differs.
    """
    path, target, model = source or recipe.path("hf"), recipe.path("mcore"), recipe.model
    checkpoint = open_checkpoint(recipe, path, iteration, "check paths.hf" if source is None else "check the path")
    require_apart("the source" if source else "paths.hf", path, "paths.mcore", target)
    layout = layout_of(model, recipe.parallel)
    weights, adapter = checkpoint.weights, recipe.train.lora.adapter
    if adapter:
        weights = checkpoint.weights.stored
        if not weights.adapter:
            weights = with_adapters(weights, model, adapter, recipe.train.seed)
        require_shared(weights, model, path)
        if weights.adapter != adapter:
            what = f"has LoRA adapters of {weights.adapter}; the recipe says {adapter}"
            raise UserError(what, where=path, remedy="set train.lora to these, or merge them with make export first")
    resharder = Resharder(weights, model, DTYPES[dtype] if dtype else None)
    ranks = {rank: resharder.mcore(layout, *rank) for rank in layout.ranks()}
    size = sum(tensor.nbytes for tensors in ranks.values() for tensor in tensors.values())
    manifest = Manifest("mcore", settings=mcore_settings(recipe))
    with (
        staged_directory(target, manifest) as staging,
        unchanged(checkpoint.stamps),
        ThreadPoolExecutor(1) as pool,
        byte_progress("convert", 2 * size) as advance,
    ):
        require_room(target, size)
        digests = pool.submit(checkpoint.digests)  # shares the reads of the copy
        directory = iteration_directory(staging, FIRST.iteration)
        directory.mkdir()
        for rank, tensors in ranks.items():
            entry = write_rank(directory, model, layout, rank, tensors, FIRST, advance, adapter)
            manifest.files[f"{directory.name}/{rank_file(*rank, layout.pipeline)}"] = entry
        write_tracker(staging, FIRST.iteration)
        written = open_mcore(staging, model).weights.stored
        require_equal(resharder, written, directory, advance)
        base = {name: checkpoint.base(name) for name in ("weights", "config", "tokenizer")}
        manifest.inputs = {**{name: digest for name, digest in base.items() if digest}, **digests.result()}
        manifest.inputs.setdefault("tokenizer", tokenizer_digest(recipe.path("hf")))
        manifest.counts = {"parameters": parameter_count(model), "ranks": len(ranks), "layout": str(layout)}
        manifest.counts["dtype"] = "+".join(written.dtypes())
    warn_of_cast(resharder)
    return manifest


def mcore_settings(recipe: Recipe) -> dict[str, object]:
    """The settings that shape a Megatron-core checkpoint: convert records them, sft requires them."""
    keys = ("tensor", "pipeline", "num_layer_list", "make_vocab_size_divisible_by")
    parallel = {f"parallel.{key}": getattr(recipe.parallel, key) for key in keys}
    lora = {"train.lora": recipe.train.lora.model_dump()}
    return {**{f"model.{key}": value for key, value in recipe.model.model_dump().items()}, **parallel, **lora}
