"""A tiny checkpoint with the names, shards and dtypes of the official 7B: untied, 34 layers, `inv_freq` stored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint_files import Tensors, set_config
from openpangu_sft.checkpoint.hf import INDEX
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.recipe.sections import Model

SIZES = ["model.num_layers=34", "model.tie_word_embeddings=false", "model.rotary_base=16000000.0"]
"""Differences from the tiny model of the other tests."""
FREQUENCIES = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def inverse_frequencies(base: float, head: int) -> torch.Tensor:
    """As transformers computes them, in fp32."""
    return 1.0 / (base ** (torch.arange(0, head, 2, dtype=torch.int64).float() / head))


def shard_of(name: str) -> int:
    """The shard of a tensor in the 7B: layers 9 and 21 are split between two."""
    match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if not match:
        return {"model.embed_tokens.weight": 1, "model.norm.weight": 3, "lm_head.weight": 4}[name]
    layer, rest = int(match[1]), match[2]
    in_front = {9: r"self_attn\..*", 21: r"self_attn\..*|mlp\.(gate|down)_proj\.weight"}.get(layer, ".*")
    return 1 + (layer > 9) + (layer > 21) + (re.fullmatch(in_front, rest) is None)


def weight_map(model: Model) -> dict[str, str]:
    """The weight_map of the index."""
    names = [*hf_shapes(model), *(FREQUENCIES.format(layer) for layer in range(model.num_layers))]
    return {name: f"model-{shard_of(name):05d}-of-00004.safetensors" for name in sorted(names)}


def make_published_7b(directory: Path, tiny_hf: Path, model: Model) -> Tensors:
    """Writes the checkpoint; returns its tensors without the frequencies."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: (0.1 * torch.randn(shape, generator=generator) + ("norm" in name)).bfloat16()
        for name, shape in hf_shapes(model).items()
    }
    shutil.copytree(tiny_hf, directory, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    published = {"head_dim": ..., "torch_dtype": "bfloat16", "transformers_version": "4.53.2"}
    set_config(directory, num_hidden_layers=34, rope_theta=16000000.0, tie_word_embeddings=False, **published)
    exact, shards = inverse_frequencies(model.rotary_base, model.kv_channels), weight_map(model)
    stored = {**tensors, **{name: exact.clone() for name in shards if name.endswith("inv_freq")}}
    for file in sorted(set(shards.values())):
        save_file({name: stored[name] for name in shards if shards[name] == file}, str(directory / file))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}), "utf-8")
    return tensors
