"""Input of the conversion benchmark: a random checkpoint in openPangu's format, as large as the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpangu_sft.checkpoint.files.arrays import BF16, CHUNK, Array, Shape, Stored
from openpangu_sft.checkpoint.files.safetensors import write_safetensors
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.recipe.model_config import CONFIG, pangu_config
from openpangu_sft.recipe.sections import Model

SCALE = 0.02
"""Standard deviation of the weights, as at the start of training."""


def write_random_model(directory: Path, model: Model, seed: int) -> Path:
    """Writes bfloat16 weights, config.json and a tokenizer's configuration without the tokenizer into a new directory.

    Equal arguments give equal files. Returns the file of the weights.
    """
    random = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    write_safetensors({name: _drawn(shape, random) for name, shape in hf_shapes(model).items()}, directory / WEIGHTS)
    config = pangu_config(model, eos_id=2, dtype="bfloat16")  # nothing is generated: any eos is valid
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (directory / "tokenizer_config.json").write_text("{}\n", "utf-8")  # nothing is encoded
    return directory / WEIGHTS


def _drawn(shape: Shape, random: np.random.Generator) -> Stored:
    """A tensor generated while it is written."""

    def chunks() -> Iterator[Array]:
        left = int(np.prod(shape))
        while left:
            count = min(left, CHUNK // BF16.itemsize)
            yield (random.standard_normal(count, np.float32) * np.float32(SCALE)).astype(BF16)
            left -= count

    return Stored(BF16, shape, chunks)
