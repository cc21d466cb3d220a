"""Comparison of a written checkpoint with its source: bit by bit, some rows at a time, never joining a whole tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import MakeRecipe
from openpangu_sft.checkpoint import weights
from openpangu_sft.checkpoint.files.arrays import Array
from openpangu_sft.checkpoint.sharding import Block, hf_shapes
from openpangu_sft.checkpoint.weights import Part, Resharder, Weights, require_equal, row_blocks, weights_of_arrays
from openpangu_sft.recipe.sections import Model
from refusals import refusal_of

PIECE = 1000
"""Bytes of a piece in these tests: some rows of the tiny model."""
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(weights, "CHUNK", PIECE)
    return make_recipe().model


def random_arrays(model: Model) -> dict[str, Array]:
    random = np.random.default_rng(1)
    return {name: random.standard_normal(shape, np.float32) for name, shape in hf_shapes(model).items()}


def on_two_ranks(arrays: dict[str, Array]) -> Weights:
    """The halves of every tensor in parts of their own."""
    parts = []
    for name, array in arrays.items():
        half = len(array) // 2
        for rows in (slice(0, half), slice(half, len(array))):
            part = array[rows]
            columns = part.shape[1] if part.ndim > 1 else None
            parts.append(Part(Block(name, rows.start, len(part), 0, columns), part, f"rank of row {rows.start}"))
    return Weights(parts)


@pytest.mark.parametrize("block", [Block("w", 5, 301, 0, 32), Block("w", 0, 7), Block("w", 2, 3, 4, 6000)])
def test_pieces_cover_a_block_in_order(block: Block, model: Model) -> None:
    found = list(row_blocks(block, np.dtype(np.float32)))
    edges = [piece.row for piece in found] + [block.row + block.rows]
    assert edges[0] == block.row
    assert [piece.rows for piece in found] == np.diff(edges).tolist()
    assert all(piece._replace(row=block.row, rows=block.rows) == block for piece in found)
    row = 4 * math.prod(block.shape[1:])
    assert all(piece.rows * row <= max(PIECE, row) for piece in found)


def test_equal_weights_are_compared_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_arrays(model)
    resharder = Resharder(on_two_ranks(arrays), model)
    asked: list[Block] = []
    seen: list[int] = []
    read = resharder.weights.read
    monkeypatch.setattr(resharder.weights, "read", lambda block: asked.append(block) or read(block))
    require_equal(resharder, weights_of_arrays(arrays), "here", lambda size, note: seen.append(size))
    assert max(4 * math.prod(block.shape) for block in asked) <= PIECE
    assert sum(seen) == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize(
    ("name", "row"), [(EMBEDDING, 0), (EMBEDDING, 1535), ("model.layers.1.mlp.up_proj.weight", 30)]
)
@pytest.mark.parametrize("spread", ["source", "result"])
def test_the_first_bit_that_differs_is_named(model: Model, name: str, row: int, spread: str) -> None:
    arrays = random_arrays(model)
    written = {**arrays, name: arrays[name].copy()}
    written[name].view(np.uint32)[row, 7] ^= 1
    source, result = (on_two_ranks if spread == this else weights_of_arrays for this in ("source", "result"))
    message = refusal_of(require_equal, Resharder(source(arrays), model), result(written), "here")
    values = f"is {written[name][row, 7]} here, {arrays[name][row, 7]} there"
    assert message == f"here: differs from its source: {name}[{row}, 7] {values} -> check disk and memory"
