"""A model's weights by Hugging Face name, in whatever files they are, and as the tensors of another checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple, Optional

import numpy as np

from openpangu_sft.checkpoint.files.arrays import CHUNK, DTYPES, Array, DType, Shape, Stored, first_difference
from openpangu_sft.checkpoint.files.writer import Advance, nothing
from openpangu_sft.checkpoint.sharding import Block, Layout, hf_shapes, mcore_tensors, whole
from openpangu_sft.recipe.lora import Adapter
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

COMPARED_AT_ONCE = 2
_MIXED = "the ranks are not of one checkpoint"


class Part(NamedTuple):
    """A block of a tensor, its values in the block's shape, and the file that they come from."""

    block: Block
    array: Array
    where: object


class Weights:
    """All tensors of a model, covered by parts. Values are read on use: parts are views of mapped files.

    With an `adapter` there are tensors A and B beside the weights, named as by `sharding.part_name`. Raises
    `UserError` where a part that is on several ranks is not the same on all of them.
    """

    adapter: Optional[Adapter] = None

    def __init__(self, parts: Iterable[Part], adapter: Optional[Adapter] = None) -> None:
        self.adapter = adapter
        self._parts: dict[str, dict[Block, Part]] = {}
        for part in parts:
            first = self._parts.setdefault(part.block.name, {}).setdefault(part.block, part)
            other = next(iter(self._parts[part.block.name].values()))
            if other.array.dtype != part.array.dtype:
                what = f"part of {part.block.name} is {part.array.dtype}, another is {other.array.dtype}"
                raise UserError(f"{what} ({other.where})", where=part.where, remedy=_MIXED)
            if first is not part and (found := difference(part, first.array)):
                raise UserError(f"{found} ({first.where}): all ranks hold it", where=part.where, remedy=_MIXED)

    @property
    def stored(self) -> Weights:
        """What the checkpoint holds: adapters, if any, are not merged."""
        return self

    def in_fp32(self) -> Weights:
        """The same, what is computed not rounded: for those who round to another dtype."""
        return self

    def names(self) -> list[str]:
        return list(self._parts)

    def dtype(self, name: str) -> DType:
        return next(iter(self._parts[name].values())).array.dtype

    def dtypes(self) -> list[str]:
        """All dtypes, sorted, by the names that config.json uses."""
        return sorted({str(self.dtype(name)) for name in self._parts})

    def parts(self) -> Iterator[Part]:
        return (part for parts in self._parts.values() for part in parts.values())

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


def row_blocks(block: Block, dtype: DType) -> Iterator[Block]:
    """A block, cut by rows into blocks of about `CHUNK` bytes."""
    step = max(1, CHUNK * block.rows // max(1, prod(block.shape) * dtype.itemsize))
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
    place = ", ".join(str(position + begin) for position, begin in zip(index, (part.block.row, part.block.column)))
    return f"{part.block.name}[{place}] is {part.array[index]} here, {other[index]} there"


def convert_dtype(array: Array, dtype: Optional[DType]) -> Array:
    """Rounds to nearest even; keeps an array of this dtype, or where None."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype or array.dtype, copy=False)


class Resharder:
    """Moves weights block by block; only a given dtype changes values. Without one each tensor keeps its own.

    Adapters, if any, are moved too; those of merged weights are not seen.
    """

    def __init__(self, weights: Weights, model: Model, dtype: Optional[DType] = None) -> None:
        self.weights, self.model, self.dtype = weights.in_fp32() if dtype else weights, model, dtype
        self.overflowing: dict[str, None] = {}  # names of tensors in which finite values became infinite, so far

    def mcore(self, layout: Layout, tp: int, pp: int) -> dict[str, Stored]:
        """The tensors of a Megatron-core rank; `UserError` if one would join tensors of different dtypes."""
        tensors = mcore_tensors(self.model, layout, tp, pp, self.weights.adapter)
        return {tensor.name: self._stored(tensor.name, tensor.shape, tensor.blocks) for tensor in tensors}

    def hf(self) -> dict[str, Stored]:
        """The tensors of the Hugging Face checkpoint."""
        shapes = hf_shapes(self.model, self.weights.adapter)
        return {name: self._stored(name, shape, [whole(name, shape)]) for name, shape in shapes.items()}

    def _stored(self, name: str, shape: Shape, blocks: Sequence[Block]) -> Stored:
        dtypes = {block.name: self.weights.dtype(block.name) for block in blocks}
        if len(set(dtypes.values())) > 1 and self.dtype is None:
            found = ", ".join(f"{source} {dtype}" for source, dtype in dtypes.items())
            what = f"{name} would join tensors of different dtypes: {found}"
            raise UserError(what, remedy="ask for one dtype with DTYPE=bf16")
        return Stored(self.dtype or dtypes[blocks[0].name], shape, lambda: self._chunks(blocks))

    def _chunks(self, blocks: Sequence[Block]) -> Iterator[Array]:
        for block in blocks:
            for rows in row_blocks(block, self.weights.dtype(block.name)):
                values = np.ascontiguousarray(self.weights.read(rows))
                converted = convert_dtype(values, self.dtype)
                if converted is not values and (np.isinf(converted) & ~np.isinf(values)).any():
                    self.overflowing[block.name] = None
                yield converted


def differences(resharder: Resharder, written: Weights, advance: Advance = nothing) -> Iterator[str]:
    """The blocks of a written checkpoint that are not bit for bit their source, each with its first difference.

    What the source has besides is not looked at: readers have required every tensor.
    """

    def compare(part: Part) -> Optional[str]:
        found = difference(part, convert_dtype(resharder.weights.read(part.block), resharder.dtype))
        advance(part.array.nbytes, "checking")
        return found

    parts = [
        Part(rows, part.array[rows.within(part.block)], part.where)
        for part in written.stored.parts()
        for rows in row_blocks(part.block, part.array.dtype)  # a tensor on several ranks is never joined whole
    ]
    with ThreadPoolExecutor(COMPARED_AT_ONCE) as pool:
        yield from filter(None, pool.map(compare, parts))


def require_equal(resharder: Resharder, written: Weights, where: object, advance: Advance = nothing) -> None:
    """Compares a checkpoint, read back, with its source; `UserError` names the first element that differs."""
    for found in differences(resharder, written, advance):
        raise UserError(f"differs from its source: {found}", where=where, remedy="check disk and memory")


def rounded_to(weights: Weights, model: Model, written: Weights, where: object) -> Resharder:
    """Weights as `written` holds them: in its dtype, where the two differ; `UserError` where it has several."""
    its, dtypes = written.dtypes(), weights.dtypes()
    if its != dtypes and len(its) > 1:
        what = f"has {' and '.join(its)}, the other checkpoint has {' and '.join(dtypes)}"
        raise UserError(what, where=where, remedy="convert again with make convert")
    return Resharder(weights, model, None if its == dtypes else np.dtype(its[0]))


def warn_of_cast(resharder: Resharder) -> None:
    """Prints where the cast has lost more than bits."""
    if names := list(resharder.overflowing):
        first = ", ".join(names[:3]) + (", and more" if len(names) > 3 else "")
        say(f"warning: in {resharder.dtype} values became infinite in {first}")
