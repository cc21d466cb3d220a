"""Hugging Face checkpoints: config.json and safetensors, single or sharded with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpangu_sft.checkpoint.files.arrays import Array, same_bits
from openpangu_sft.checkpoint.files.safetensors import map_safetensors
from openpangu_sft.checkpoint.hf_files import weight_files
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.checkpoint.weights import Weights, require_tensors, weights_of_arrays
from openpangu_sft.recipe.model_config import AGAIN, CONFIG, PUBLISHED, as_version_4, read_config, require_stated
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_FP32_ROUNDING = 2.0**-18
"""Largest relative error of base^(-2i/d) computed in fp32: 32 units in the last place, as devices differ."""
_WRAPPERS = {
    "module.": "model.module.save_pretrained(…), as DistributedDataParallel or DeepSpeed wraps it",
    "_orig_mod.": "model._orig_mod.save_pretrained(…), as torch.compile wraps it",
    "base_model.model.": "model.merge_and_unload().save_pretrained(…), as PEFT wraps it",
}
"""Prefixes that wrappers put before the names of all tensors, and how to save without."""


def require_model(directory: Path, model: Model) -> dict[str, Any]:
    """Reads config.json with transformers 4.53.2's keys; `UserError` names those that differ from the recipe's."""
    config = read_config(directory)
    require_stated(model.model_dump(), config, directory / CONFIG)
    return as_version_4(config)


def open_hf(directory: Path, model: Model) -> Weights:
    """Opens all weights; values are read on use.

    Raises `UserError` where a tensor is missing, unexpected or of another shape, or contradicts tie_word_embeddings or
    the rope base.
    """
    found: dict[str, Array] = {}
    for path in weight_files(directory):
        for name, array in map_safetensors(path, AGAIN).items():
            if name in found:
                raise UserError(f"tensor {name} is in another shard too", where=path, remedy=AGAIN)
            found[name] = array
    _require_bare_names(found, directory)
    _leave_out_frequencies(found, model, directory)
    head, embedding = found.get(_HEAD), found.get(_EMBEDDING)
    if model.tie_word_embeddings and head is not None and embedding is not None:
        if not same_bits(head, embedding):
            what = f"tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}"
            raise UserError(what, where=directory, remedy="set it to false in config.json and in the recipe")
        del found[_HEAD]
    if not model.tie_word_embeddings and head is None:
        what = f"tensor {_HEAD} is missing, but tie_word_embeddings is false"
        remedy = "is it right in config.json? Without the key it is false; the 1B has true, the 7B has false"
        raise UserError(what, where=directory, remedy=remedy)
    remedy = "is this openPangu-Embedded, downloaded in full, with its own config.json?"
    require_tensors(found, hf_shapes(model), directory, remedy)
    return weights_of_arrays(found, directory)


def _require_bare_names(found: Mapping[str, Array], directory: Path) -> None:
    """Refuses the state dict of a wrapper, recognised by the name of the embedding."""
    prefix = next((name[: -len(_EMBEDDING)] for name in found if name.endswith(f".{_EMBEDDING}")), "")
    if prefix and _EMBEDDING not in found:
        remedy = next((how for mark, how in _WRAPPERS.items() if prefix.startswith(mark)), "without what wraps it")
        what = f"the names of its tensors begin with {prefix}: what wraps the model was saved"
        raise UserError(what, where=directory, remedy=f"save the model itself: {remedy}")


def _leave_out_frequencies(found: dict[str, Array], model: Model, directory: Path) -> None:
    """Drops RoPE's inverse frequencies, which the official 7B stores for each layer, if they follow from the config.

    They may have been computed in fp32 on any device, and rounded to the dtype that they are stored in.
    """
    exact = model.rotary_base ** (-np.arange(0, model.kv_channels, 2) / model.kv_channels)
    for name in [name for name in found if _FREQUENCIES.fullmatch(name)]:
        tensor = found.pop(name)
        if tensor.shape != exact.shape:
            what = f"tensor {name} has shape {tensor.shape}, head size {model.kv_channels} gives {exact.shape}"
            raise UserError(what, where=directory, remedy=PUBLISHED)
        unit: Array = np.spacing(exact.astype(tensor.dtype)).astype(np.float64)
        wrong = ~(np.abs(tensor.astype(np.float64) - exact) <= _FP32_ROUNDING * exact + unit)  # NaN is wrong too
        if wrong.any():
            at = int(wrong.argmax())
            what = f"tensor {name}[{at}] is {float(tensor[at]):.7g}; rope base {model.rotary_base:.10g} and head size "
            what += f"{model.kv_channels} of config.json give {exact[at]:.7g}"
            raise UserError(what, where=directory, remedy=PUBLISHED)
