"""LoRA adapters beside the weights that they adapt: how they begin, and how they are merged."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock

import numpy as np

from openpangu_sft.checkpoint.files.arrays import DTYPES, Array, DType
from openpangu_sft.checkpoint.sharding import Block, hf_shapes, part_name, whole
from openpangu_sft.checkpoint.weights import Part, Weights
from openpangu_sft.recipe.sections import LINEARS, Adapter, Model

FIRST_OF = {name: names[0] for names in LINEARS.values() for name in names}
"""The projection under whose name A is found where several share it."""


def first_name(name: str) -> str:
    """The name under which a shared A is found."""
    projection = name.split(".")[-3]
    return name.replace(f".{projection}.", f".{FIRST_OF.get(projection, projection)}.")


class Merged(Weights):
    """A model with its adapters merged: W + alpha / rank * B A, in fp32, rounded once to W's dtype."""

    def __init__(self, stored: Weights, rounded: bool = True) -> None:
        assert stored.adapter
        self._stored, self._scale, self._rounded = stored, stored.adapter.alpha / stored.adapter.rank, rounded
        self._parts = {name: parts for name, parts in stored._parts.items() if ".lora_" not in name}
        self._merged, self._lock = lru_cache(4)(self._merge), Lock()  # q, k and v are read by turns

    @property
    def stored(self) -> Weights:
        return self._stored

    def in_fp32(self) -> Merged:
        """The same, adapted tensors not rounded: for those who round to another dtype."""
        return Merged(self._stored, rounded=False)

    def dtype(self, name: str) -> DType:
        return super().dtype(name) if self._rounded or not self._adapts(name) else DTYPES["fp32"]

    def read(self, block: Block) -> Array:
        if not self._adapts(block.name):
            return super().read(block)
        with self._lock:  # two threads compare what was written
            merged = self._merged(block.name)
        return merged[block.within(whole(block.name, merged.shape))]

    def _adapts(self, name: str) -> bool:
        return part_name(name, "B") in self._stored._parts

    def _merge(self, name: str) -> Array:
        """The whole tensor: the same bits, whatever part of it is read."""
        own = part_name(name, "A")
        names = own if own in self._stored._parts else first_name(own), part_name(name, "B")
        a, b = (self._whole(part).astype(np.float64) for part in names)
        product = b @ a
        product *= self._scale
        product += self._whole(name).astype(np.float32)
        merged: Array = product.astype(np.float32).astype(self.dtype(name))
        return merged

    def _whole(self, name: str) -> Array:
        rows = max(part.block.row + part.block.rows for part in self._stored.parts(name))
        columns = max(part.block.column + (part.block.columns or 0) for part in self._stored.parts(name))
        return self._stored.read(Block(name, 0, rows, 0, columns))


def base_of(weights: Weights) -> Weights:
    """The weights that adapters are beside, without them."""
    stored = weights.stored
    return Weights(part for name in stored.names() if ".lora_" not in name for part in stored.parts(name))


def merged(weights: Weights) -> Weights:
    """Weights without adapters: merged, or as they are."""
    return Merged(weights) if weights.adapter else weights


def with_adapters(weights: Weights, model: Model, adapter: Adapter, seed: int) -> Weights:
    """Weights with new adapters, which change nothing yet: B is 0, A is uniform within 1 / sqrt(in features).

    That is peft's own beginning (kaiming_uniform_ with a = sqrt(5)). A depends on the seed and its name, not on the
    layout. In the dtype of the weights.
    """

    def parts() -> Iterator[Part]:
        for name in weights.names():
            yield from weights.parts(name)
        for name, shape in hf_shapes(model, adapter).items():
            if ".lora_" in name:
                random = np.random.default_rng([seed, zlib.crc32(name.encode())])
                drawn = random.uniform(-1, 1, shape) / np.sqrt(shape[1]) if ".lora_A." in name else np.zeros(shape)
                dtype = weights.dtype(name.replace(".lora_A", "").replace(".lora_B", ""))
                yield Part(whole(name, shape), drawn.astype(np.float32).astype(dtype), "a new adapter")

    return Weights(parts(), adapter=adapter)
