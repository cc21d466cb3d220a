"""Stage export: a checkpoint of a run as a Hugging Face checkpoint that loads as it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.artifact import Manifest, sha256_of, staged_directory
from openpangu_sft.artifacts.checks import require_apart, require_room, unchanged
from openpangu_sft.checkpoint import lora
from openpangu_sft.checkpoint.files.arrays import DTYPES
from openpangu_sft.checkpoint.files.safetensors import write_safetensors
from openpangu_sft.checkpoint.hf import WEIGHTS, open_hf
from openpangu_sft.checkpoint.hf_export import LLAMA, PEFT, make_tokenizer_stock, write_companions, write_config
from openpangu_sft.checkpoint.model_card import write_model_card
from openpangu_sft.checkpoint.source import CheckpointSource, open_checkpoint
from openpangu_sft.checkpoint.weights import Resharder, Weights, differences, require_equal, rounded_to, warn_of_cast
from openpangu_sft.recipe.model_config import CONFIG, require_model
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.remote_code import Trust
from openpangu_sft.tokenizer.tokenizer import Tokenizer, tokenizer_digest, tokenizer_files
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

_CARRIED_OVER = ("iteration", "loss", "versions")  # counts of the training that hold for the export too


def run_export(
    recipe: Recipe,
    source: Optional[Path] = None,
    iteration: Optional[int] = None,
    form: str = LLAMA,
    dtype: Optional[str] = None,
) -> Manifest:
    """Stage export: to `paths.export`, with configuration, tokenizer and licence from `paths.hf`.

    Args:
        source: a run, a Megatron-core checkpoint of any layout, a Hugging Face one, or a LoRA adapter; by default
            `paths.run`.
        iteration: of a Megatron-core checkpoint or run; by default the newest.
        form: the export format, llama or openpangu (see hf_export.py), or peft for LoRA adapters alone (lora.py).
        dtype: fp32, bf16 or fp16; by default that of the source.

    Raises `UserError` where there is no finished checkpoint, its training began from another model or tokenizer than
    `paths.hf`, the disk has no room, or what was written is not the same.
    """
    base, target, model = recipe.path("hf"), recipe.path("export"), recipe.model
    config = require_model(base, model)
    require_apart("paths.hf", base, "paths.export", target)
    path = source or recipe.path("run")
    require_apart("the source", path, "paths.export", target)
    checkpoint = open_checkpoint(recipe, path, iteration, "check the path" if source else "run make sft")
    weights, adapter = checkpoint.weights, checkpoint.weights.stored.adapter
    stamps, sums, file = checkpoint.stamps, dict[str, str](), WEIGHTS
    if form == PEFT:  # every bit of the base is compared
        weights, file = weights.stored, lora.ADAPTER_WEIGHTS
        its = _require_base_weights(recipe, weights, path)
        stamps, sums = {**stamps, **its.stamps}, {"hf.weights": its.digests()["weights"]}
    else:
        _require_base(checkpoint, base, path, recipe.tokenizer.trust_remote_code)
    resharder = Resharder(weights, model, DTYPES[dtype] if dtype else None)
    tensors = lora.peft_tensors(resharder.hf()) if form == PEFT else resharder.hf()
    size = sum(tensor.nbytes for tensor in tensors.values())
    made_by = checkpoint.manifest or Manifest("")
    manifest = Manifest("hf", settings=made_by.settings)
    manifest.counts = {name: made_by.counts[name] for name in _CARRIED_OVER if name in made_by.counts}
    if checkpoint.iteration is not None and not checkpoint.manifest:
        manifest.counts["iteration"] = checkpoint.iteration
    dtype_name = str(next(iter(tensors.values())).dtype)
    parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    manifest.counts.update(parameters=parameters, dtype=dtype_name, form=form)
    if adapter:
        manifest.counts["lora"] = {**adapter._asdict(), "targets": list(adapter.targets)}
    with staged_directory(target, manifest) as staging, unchanged(stamps), ThreadPoolExecutor(1) as pool:
        require_room(target, size)
        if adapter and form == PEFT:
            lora.write_adapter_config(staging, adapter, base)
        else:
            write_config(staging, config, base, form, dtype_name)
        write_companions(staging, base, form)
        if form == LLAMA:
            manifest.counts["fast_tokenizer"] = make_tokenizer_stock(staging, base, recipe.tokenizer.trust_remote_code)
        digests = pool.submit(checkpoint.digests)  # shares the reads of the copy
        with byte_progress("export", 2 * size) as advance:
            manifest.files[file] = write_safetensors(tensors, staging / file, advance)
            written = lora.open_adapter(staging, model) if form == PEFT else open_hf(staging, model)
            require_equal(resharder, written, staging, advance)
        manifest.inputs = {**made_by.inputs, **digests.result(), **sums}
        write_model_card(staging, manifest, target.name, base.name, path.absolute().name)
    warn_of_cast(resharder)
    return manifest


def _require_base_weights(recipe: Recipe, weights: Weights, path: Path) -> CheckpointSource:
    """Requires adapters that are beside the weights of `paths.hf`, which it opens."""
    if not weights.adapter:
        raise UserError("has no LoRA adapters", where=path, remedy="export it with FORM=llama")
    lora.require_shared(weights, recipe.model, path)
    base = open_checkpoint(recipe, recipe.path("hf"), remedy="check paths.hf")
    beside = lora.base_of(weights)
    resharder = rounded_to(base.weights, recipe.model, beside, path)
    size = sum(tensor.nbytes for tensor in resharder.hf().values())
    with byte_progress("comparing with paths.hf", size) as advance:
        for found in differences(resharder, beside, advance):
            what = f"its adapters are of other weights than those of paths.hf: {found}"
            raise UserError(what, where=path, remedy="give those as paths.hf, or export it merged, with FORM=llama")
    return base


def _require_base(checkpoint: CheckpointSource, base: Path, path: Path, trust_remote_code: Trust) -> None:
    """Requires that training began with the configuration and tokenizer that are exported with its weights."""
    for name, found in (("tokenizer", tokenizer_digest(base)), ("config", sha256_of(base / CONFIG))):
        recorded = checkpoint.base(name)
        if recorded and recorded != found:
            what = f"began from a checkpoint with another {name} than paths.hf"
            raise UserError(what, where=path, remedy="check paths.hf")
    of_its_own = checkpoint.iteration is None and tokenizer_files(path)
    if of_its_own and tokenizer_digest(path) != tokenizer_digest(base):
        its, bases = Tokenizer(path, trust_remote_code), Tokenizer(base, trust_remote_code)
        if text := bases.first_disagreement(its.hf):
            what = f"its tokenizer gives other ids than that of paths.hf, for {text}"
            raise UserError(what, where=path, remedy="check paths.hf")
