"""A model's weights as the tensors of a Hugging Face or Megatron-core checkpoint, cast to another dtype on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

from openpangu_sft.checkpoint.files.arrays import Array, CastStats, DType, Shape, Stored, convert_dtype
from openpangu_sft.checkpoint.files.writer import Advance, nothing
from openpangu_sft.checkpoint.lora import Merged
from openpangu_sft.checkpoint.sharding import Block, Layout, hf_shapes, mcore_tensors, whole
from openpangu_sft.checkpoint.weights import Part, Weights, difference, row_blocks
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.console import console
from openpangu_sft.util.errors import UserError

COMPARED_AT_ONCE = 2


class Resharder:
    """Moves weights block by block; only a given dtype changes values. Without one each tensor keeps its own.

    Adapters, if any, are moved too; those of merged weights are not seen.
    """

    def __init__(self, weights: Weights, model: Model, dtype: Optional[DType] = None) -> None:
        self.weights, self.model, self.dtype = weights, model, dtype
        if isinstance(weights, Merged) and dtype:
            self.weights = weights.in_fp32()
        self.cast = CastStats()  # what the cast has lost so far; a block that is on several ranks counts once
        self._counted: set[Block] = set()

    def mcore(self, layout: Layout, tp: int, pp: int) -> dict[str, Stored]:
        """The tensors of a Megatron-core rank; `UserError` if one would join tensors of different dtypes."""
        tensors = mcore_tensors(self.model, layout, tp, pp, self.weights.adapter)
        return {tensor.name: self._stored(tensor.name, tensor.shape, tensor.blocks) for tensor in tensors}

    def hf(self) -> dict[str, Stored]:
        """The tensors of the Hugging Face checkpoint."""
        shapes = hf_shapes(self.model, self.weights.adapter)
        return {name: self._stored(name, shape, [whole(name, shape)]) for name, shape in shapes.items()}

    def read(self, block: Block) -> Array:
        """Values of a block, after any dtype cast."""
        return convert_dtype(self.weights.read(block), self.dtype)[0]

    def _stored(self, name: str, shape: Shape, blocks: Sequence[Block]) -> Stored:
        dtypes = {block.name: self.weights.dtype(block.name) for block in blocks}
        if len(set(dtypes.values())) > 1 and self.dtype is None:
            found = ", ".join(f"{source} {dtype}" for source, dtype in dtypes.items())
            what = f"{name} would join tensors of different dtypes: {found}"
            raise UserError(what, remedy="ask for one dtype with DTYPE=bf16")
        return Stored(self.dtype or dtypes[blocks[0].name], shape, lambda: self._chunks(blocks))

    def _chunks(self, blocks: Sequence[Block]) -> Iterator[Array]:
        for block in blocks:
            counts = block not in self._counted and not block.padding
            self._counted.add(block)
            for chunk in self.weights.chunks(block):
                converted, stats = convert_dtype(chunk, self.dtype)
                if counts:
                    self.cast += stats
                yield converted


def differences(resharder: Resharder, written: Weights, advance: Advance = nothing) -> Iterator[str]:
    """The blocks of a written checkpoint that are not bit for bit their source, each with its first difference.

    What the source has besides is not looked at: readers have required every tensor.
    """

    def compare(part: Part) -> Optional[str]:
        found = difference(part, resharder.read(part.block))
        advance(part.array.nbytes, "checking")
        return found

    parts = [
        Part(rows, part.array[rows.within(part.block)], part.where)
        for name in written.stored.names()
        for part in written.stored.parts(name)
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
    dtypes = {written.dtype(name) for name in written.names()}
    if written.dtypes() == weights.dtypes():
        return Resharder(weights, model)
    if len(dtypes) > 1:
        what = f"has {' and '.join(written.dtypes())}, the Hugging Face checkpoint has {' and '.join(weights.dtypes())}"
        raise UserError(what, where=where, remedy="convert again with make convert")
    return Resharder(weights, model, dtypes.pop())


def warn_of_cast(resharder: Resharder) -> None:
    """Prints what the cast has lost."""
    cast, dtype = resharder.cast, resharder.dtype
    if cast.changed:
        share = f"{cast.changed:,} of {cast.values:,} values"
        infinite = f", {cast.infinite:,} of them became infinite" if cast.infinite else ""
        console.print(f"warning: {share} lost bits in {dtype}{infinite}", soft_wrap=True, markup=False)
