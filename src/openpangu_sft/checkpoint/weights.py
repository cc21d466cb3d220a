"""A model's weights by Hugging Face name, whether in safetensors files or spread over Megatron ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Optional

import numpy as np

from openpangu_sft.checkpoint.files.arrays import CHUNK, DTYPES, Array, DType, Shape, first_difference
from openpangu_sft.checkpoint.sharding import Block, whole
from openpangu_sft.recipe.sections import Adapter
from openpangu_sft.util.errors import UserError


class Part(NamedTuple):
    """A block of a tensor, its values in the block's shape, and the file that they come from."""

    block: Block
    array: Array
    where: object


class Weights:
    """All tensors of a model, covered by parts. Values are read on use: parts are views of mapped files.

    With an `adapter` there are tensors A and B beside the weights, named as by `sharding.part_name`. Raises
    `UserError`, with the remedy `repair`, where a part that is on several ranks is not the same on all of them.
    """

    adapter: Optional[Adapter] = None

    def __init__(
        self, parts: Iterable[Part], repair: str = "make the checkpoint again", adapter: Optional[Adapter] = None
    ) -> None:
        self.adapter = adapter
        self._parts: dict[str, dict[Block, Part]] = {}
        for part in parts:
            first = self._parts.setdefault(part.block.name, {}).setdefault(part.block, part)
            other = next(iter(self._parts[part.block.name].values()))
            if other.array.dtype != part.array.dtype:
                what = f"part of {part.block.name} is {part.array.dtype}, another is {other.array.dtype}"
                raise UserError(f"{what} ({other.where})", where=part.where, remedy=repair)
            if first is not part and (found := difference(part, first.array)):
                raise UserError(f"{found} ({first.where}): all ranks hold it", where=part.where, remedy=repair)

    @property
    def stored(self) -> Weights:
        """What the checkpoint holds: adapters, if any, are not merged."""
        return self

    def names(self) -> list[str]:
        """Hugging Face names."""
        return list(self._parts)

    def dtype(self, name: str) -> DType:
        """The dtype of one tensor."""
        return next(iter(self._parts[name].values())).array.dtype

    def dtypes(self) -> list[str]:
        """All dtypes, sorted, by the names that config.json uses."""
        return sorted({str(self.dtype(name)) for name in self._parts})

    def parts(self, name: str) -> Iterator[Part]:
        """The parts of a tensor."""
        return iter(self._parts[name].values())

    def read(self, block: Block) -> Array:
        """The values of a block: a view of one part where possible, else a copy. Read only."""
        parts = self._parts[block.name]
        for part in parts.values():
            view: Array = part.array[block.within(part.block)]
            if view.shape == block.shape:
                return view
        gathered = np.empty(block.shape, self.dtype(block.name))
        for part in parts.values():
            gathered[part.block.within(block)] = part.array[block.within(part.block)]
        return gathered

    def chunks(self, block: Block) -> Iterator[Array]:
        """The values of a block in C order, in consecutive contiguous arrays."""
        for rows in row_blocks(block, self.dtype(block.name)):
            yield np.ascontiguousarray(self.read(rows))


def row_blocks(block: Block, dtype: DType) -> Iterator[Block]:
    """A block, cut by rows into blocks of about `CHUNK` bytes."""
    step = max(1, CHUNK * block.rows // max(1, math.prod(block.shape) * dtype.itemsize))
    for begin in range(0, block.rows, step):
        yield block._replace(row=block.row + begin, rows=min(step, block.rows - begin))


def weights_of_arrays(arrays: Mapping[str, Array], where: object = None, adapter: Optional[Adapter] = None) -> Weights:
    """Weights of whole tensors."""
    return Weights((Part(whole(name, array.shape), array, where) for name, array in arrays.items()), adapter=adapter)


def require_tensors(found: Mapping[str, Array], expected: Mapping[str, Shape], where: object, remedy: str) -> None:
    """`UserError` names the first tensor that is missing, unexpected, of another shape than expected, or quantized."""
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"tensor {name} is missing", where=where, remedy=remedy)
        if found[name].shape != shape:
            what = f"tensor {name} has shape {found[name].shape}, expected {shape}"
            raise UserError(what, where=where, remedy=remedy)
    for name, tensor in found.items():
        if name not in expected:
            raise UserError(f"unexpected tensor {name}", where=where, remedy=remedy)
        if tensor.dtype not in DTYPES.values():
            what = f"tensor {name} is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES.values()))}"
            raise UserError(what, where=where, remedy="take a checkpoint that is not quantized")


def difference(part: Part, other: Array) -> Optional[str]:
    """The first difference between a part and another array of its block, in words; None where every bit is equal."""
    if part.array.dtype != other.dtype:
        return f"{part.block.name} is {part.array.dtype} here, {other.dtype} there"
    index = first_difference(part.array, other)
    if index is None:
        return None
    origin = (part.block.row, part.block.column)
    place = ", ".join(str(position + begin) for position, begin in zip(index, origin))
    return f"{part.block.name}[{place}] is {part.array[index]} here, {other[index]} there"
