"""The source of a conversion: a Hugging Face checkpoint, a LoRA adapter, or a Megatron-core one of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, files_digest, read_manifest, sha256_of
from openpangu_sft.artifacts.checks import Stamp, stamps_of
from openpangu_sft.checkpoint.checklist import check_published
from openpangu_sft.checkpoint.hf import open_hf, weight_files
from openpangu_sft.checkpoint.lora import Merged, adapter_files, is_adapter, open_adapter
from openpangu_sft.checkpoint.mcore import MODEL_FILE
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.weights import Weights
from openpangu_sft.recipe.model_config import ADAPTER_CONFIG, CONFIG, TRACKER, not_hf, read_object, require_model
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import tokenizer_files
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError


class CheckpointSource(NamedTuple):
    """An open checkpoint. Its weights are views of mapped files: where one is truncated, SIGBUS may end the process."""

    weights: Weights
    manifest: Optional[Manifest]  # None where another tool made it
    iteration: Optional[int]  # of a Megatron-core checkpoint; None for a Hugging Face one
    digests: Callable[[], dict[str, str]]  # computes the sha256 of its parts, by name; takes as long as reading it
    stamps: Mapping[Path, Optional[Stamp]]  # of its files, from before they were opened

    def base(self, name: str) -> Optional[str]:
        """sha256 of the `weights`, `config` or `tokenizer` that training began with, where that is known."""
        inputs = self.manifest.inputs if self.manifest else {}
        return inputs.get(name) or inputs.get(f"hf.{name}")


def open_checkpoint(
    recipe: Recipe, path: Path, iteration: Optional[int] = None, remedy: str = "check the path"
) -> CheckpointSource:
    """Opens a Hugging Face checkpoint, a Megatron-core one (by default its newest iteration), a run, or a LoRA adapter.

    The weights of an adapter are those of `paths.hf` merged with it. Raises `UserError` where there is none (with this
    remedy), it is damaged, or it does not fit the recipe.
    """
    if not path.is_dir():
        raise UserError("no such directory", where=path, remedy=remedy)
    if (path / TRACKER).is_file():
        before = stamps_of(path.glob(f"*/mp_rank_*/{MODEL_FILE}"))
        opened = open_mcore(path, recipe.model, iteration, remedy)
        stamps, made_by = {file: before.get(file) for file in opened.files}, opened.manifest

        def digests() -> dict[str, str]:
            return {"mcore": made_by.digest if made_by else files_digest(opened.files)}

        return CheckpointSource(opened.weights, made_by, opened.iteration, digests, stamps)
    if iteration is not None:
        raise UserError(f"has no iterations, so none is {iteration}", where=path, remedy="leave ITERATION out")
    return _open_adapter(recipe, path) if is_adapter(path) else _open_hf(recipe, path, remedy)


def _open_hf(recipe: Recipe, path: Path, remedy: str) -> CheckpointSource:
    if not (path / CONFIG).is_file():
        what = f"neither a Hugging Face checkpoint ({CONFIG}) nor a Megatron-core one ({TRACKER})"
        raise not_hf(path, UserError(what, where=path, remedy=remedy))
    stamps = stamps_of([*weight_files(path), path / CONFIG, *tokenizer_files(path)])
    require_model(path, recipe.model)
    weights, published = open_hf(path, recipe.model), check_published(recipe, path)
    if published.files:
        say(str(published))
    return CheckpointSource(weights, None, None, lambda: hf_digests(path, published.sums), stamps)


def _open_adapter(recipe: Recipe, path: Path) -> CheckpointSource:
    """An adapter on the weights of `paths.hf`; one of this project is refused on another base than its own."""
    base = _open_hf(recipe, recipe.path("hf"), "check paths.hf")
    files = adapter_files(path)
    stamps = {**base.stamps, **stamps_of(files)}
    adapter = open_adapter(path, recipe.model)
    manifest, sums = None, dict[str, str]()
    if (path / MANIFEST).is_file():
        manifest, sums = read_manifest(path, "hf", "make it again with make export FORM=peft"), base.digests()
        if sha256_of(path / ADAPTER_CONFIG) != manifest.files[ADAPTER_CONFIG]["sha256"]:
            what, remedy = "was changed after it was made (sha256)", "make it again with make export FORM=peft"
            raise UserError(what, where=path / ADAPTER_CONFIG, remedy=remedy)
        if sums["weights"] != manifest.inputs.get("hf.weights"):
            what = "is an adapter of other weights than those of paths.hf"
            raise UserError(what, where=path, remedy="check paths.hf")
    else:
        named = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        say(f"{path}: names its base {named!r}, not its sums; paths.hf is taken")
    merged = Merged(Weights([*base.weights.parts(), *adapter.parts()], adapter=adapter.adapter))
    return CheckpointSource(
        merged, manifest, None, lambda: {**(sums or base.digests()), "adapter": files_digest(files)}, stamps
    )


def hf_digests(directory: Path, known: Optional[Mapping[Path, str]] = None) -> dict[str, str]:
    """sha256 of a Hugging Face checkpoint's weights, configuration and tokenizer; of some files it may be known."""
    return {
        "weights": files_digest(weight_files(directory), known),
        "config": sha256_of(directory / CONFIG),
        "tokenizer": files_digest(tokenizer_files(directory)),
    }
