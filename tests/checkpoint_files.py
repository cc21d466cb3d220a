"""Checkpoints that tests make, read back as torch's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from safetensors.torch import save_file

from openpangu_sft.checkpoint.files.arrays import Array, Stored, slabs
from openpangu_sft.checkpoint.hf import INDEX, WEIGHTS, open_hf
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.sections import Model

Tensors = dict[str, torch.Tensor]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def stored(array: Array) -> Stored:
    """An array, to be written as it is."""
    return Stored(array.dtype, array.shape, lambda: map(np.ascontiguousarray, slabs(array)))


def read_hf(directory: Path, model: Model) -> Tensors:
    """All tensors of a Hugging Face checkpoint."""
    return tensors_of(open_hf(directory, model), model)


def read_mcore(root: Path, model: Model, iteration: Optional[int] = None) -> Tensors:
    """The tensors of a Megatron-core checkpoint, by Hugging Face name."""
    return tensors_of(open_mcore(root, model, iteration).weights, model)


def hf_sizes(model: Model) -> dict[str, Any]:
    """A model's sizes under their names in config.json."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern, so NaN payloads, infinities, denormals and -0.0 too."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator).to(BITS[dtype])
    special = torch.tensor([-(2**31) if dtype == torch.float32 else -(2**15)]).to(BITS[dtype])  # -0.0
    bits.view(-1)[:1] = special
    return bits.view(dtype)


def random_checkpoint(model: Model, dtype_of: Callable[[str], torch.dtype]) -> Tensors:
    """Tensors of any bits for every name."""
    shapes = sorted(hf_shapes(model).items())
    return {name: random_bits(shape, dtype_of(name), seed) for seed, (name, shape) in enumerate(shapes)}


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    """Equal names, dtypes and bits."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(BITS[tensor.dtype]), tensor.view(BITS[tensor.dtype])), name


def write_hf(directory: Path, base: Path, tensors: Tensors, shards: int = 1) -> None:
    """A checkpoint with the base's configuration and tokenizer and other weights, in one file or in shards."""
    shutil.copytree(base, directory, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    if shards == 1:
        save_file(tensors, str(directory / WEIGHTS), metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, str(directory / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}), "utf-8")


def set_config(directory: Path, **changes: Any) -> None:
    """Changes keys of config.json; `...` takes one out."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), "utf-8")
