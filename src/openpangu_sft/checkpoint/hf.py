"""Hugging Face checkpoints: config.json and safetensors, single, sharded with an index, or sharded without one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from openpangu_sft.checkpoint.files.arrays import Array, same_bits
from openpangu_sft.checkpoint.files.safetensors import map_safetensors
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.checkpoint.weights import Weights, require_tensors, weights_of_arrays
from openpangu_sft.recipe.model_config import AGAIN, PUBLISHED, not_hf, read_object
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE = re.compile(r"[^/]*\.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_FP32_ROUNDING = 2.0**-18
"""Largest relative error of base^(-2i/d) computed in fp32: 32 units in the last place, as devices differ."""


def open_hf(directory: Path, model: Model) -> Weights:
    """Opens all weights; values are read on use.

    Raises `UserError` where a tensor is missing, unexpected or of another shape, or contradicts tie_word_embeddings or
    the rope base.
    """
    found: dict[str, Array] = {}
    for path in weight_files(directory):
        for name, array in map_safetensors(path).items():
            if name in found:
                raise UserError(f"tensor {name} is in another shard too", where=path, remedy=AGAIN)
            found[name] = array
    prefix = next((name[: -len(_EMBEDDING)] for name in found if name.endswith(f".{_EMBEDDING}")), "")
    if prefix and _EMBEDDING not in found:  # of DistributedDataParallel, DeepSpeed, torch.compile, or PEFT
        inner = "merge_and_unload()." if prefix == "base_model.model." else prefix
        what = f"the names of its tensors begin with {prefix}: what wraps the model was saved"
        raise UserError(what, where=directory, remedy=f"save the model itself: model.{inner}save_pretrained(…)")
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


def _leave_out_frequencies(found: dict[str, Array], model: Model, directory: Path) -> None:
    """Drops RoPE's inverse frequencies, which the official 7B stores for each layer, if they follow from the config.

    They may have been computed in fp32 on any device, and rounded to the dtype that they are stored in.
    """
    exact = model.rotary_base ** (-np.arange(0, model.kv_channels, 2) / model.kv_channels)
    for name in [name for name in found if _FREQUENCIES.fullmatch(name)]:
        tensor = found.pop(name)
        close = _FP32_ROUNDING * exact + np.spacing(exact.astype(tensor.dtype)).astype(np.float64)
        if tensor.shape != exact.shape or not (np.abs(tensor.astype(np.float64) - exact) <= close).all():  # NaN too
            what = f"tensor {name} is not what rope base {model.rotary_base:.10g} and head size "
            what += f"{model.kv_channels} of config.json give"
            raise UserError(what, where=directory, remedy=PUBLISHED)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; `UserError` for none, a missing shard, or only `.bin` files."""
    index, names = directory / INDEX, [WEIGHTS]
    if index.is_file() and (directory / WEIGHTS).is_file():
        raise UserError(f"there are two sets of weights, {WEIGHTS} and {INDEX}", where=directory, remedy="remove one")
    if index.is_file():
        shards = read_object(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or not all(map(_FILE.fullmatch, names)):
            raise UserError("weight_map names no files", where=index, remedy=AGAIN)
    elif not (directory / WEIGHTS).is_file():
        names = _without_index(directory)
    for path in (paths := [directory / name for name in names]):
        if not path.is_file():
            raise UserError("shard is missing", where=path, remedy="download the checkpoint again")
        with path.open("rb") as stream:
            if stream.read(24) == b"version https://git-lfs.":
                raise UserError("is only a Git LFS pointer", where=path, remedy="get the file itself (git lfs pull)")
    return paths


def _without_index(directory: Path) -> list[str]:
    """Shards without an index: their names give their number; opening them checks the tensors."""
    shards = sorted(path.name for path in directory.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    if not shards and list(directory.glob("pytorch_model*.bin")):
        what = "only .bin weights, which transformers 4.53.2 refuses to load with torch 2.1"
        raise UserError(what, where=directory, remedy="take the safetensors files")
    if not shards:
        raise not_hf(directory, UserError(f"no weights here ({WEIGHTS})", where=directory, remedy="check paths.hf"))
    counts = sorted({shard.split("-")[-1][:5] for shard in shards})
    if len(counts) > 1:
        what = f"has shards of {' and of '.join(map(str, map(int, counts)))}, and no {INDEX} that says which to take"
        raise UserError(what, where=directory, remedy="remove those of one set")
    for number in range(1, int(counts[0]) + 1):
        name = f"model-{number:05d}-of-{counts[0]}.safetensors"
        if name not in shards:
            raise UserError(f"shard is missing, and so is {INDEX}", where=directory / name, remedy="download both")
    return shards
