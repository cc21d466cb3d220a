"""Tensors as numpy arrays, bfloat16 included (ml_dtypes), so that conversion needs no torch.

Importing torch takes as long as copying the 1B model.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, Callable, NamedTuple, Optional

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DType = np.dtype[Any]
Shape = tuple[int, ...]

BF16: DType = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, DType] = {"fp32": np.dtype(np.float32), "bf16": BF16, "fp16": np.dtype(np.float16)}
"""Dtypes of weights, by the names that recipes use; any other one belongs to a quantized checkpoint."""

CHUNK = 1 << 20  # bytes that are moved or compared at once: few enough for a processor's cache


class Stored(NamedTuple):
    """A tensor to be written; `chunks` gives its elements in C order, in consecutive contiguous arrays."""

    dtype: DType
    shape: Shape
    chunks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def slabs(array: Array) -> Iterator[Array]:
    """Views of an array's rows, in order, of about `CHUNK` bytes each."""
    if array.nbytes <= CHUNK or not array.ndim:
        yield array
        return
    rows = max(1, CHUNK * len(array) // array.nbytes)
    for begin in range(0, len(array), rows):
        yield array[begin : begin + rows]


def first_difference(one: Array, other: Array) -> Optional[tuple[int, ...]]:
    """Index of the first element that has other bits, or None; both arrays have one shape and dtype."""
    integers = f"u{one.dtype.itemsize}"  # which have no NaN and no two zeros
    one, other = one.view(integers), other.view(integers)
    for part, counterpart in zip(slabs(one), slabs(other)):
        if (part != counterpart).any():
            return tuple(map(int, np.unravel_index(int((one != other).argmax()), one.shape)))
    return None


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    return one.shape == other.shape and one.dtype == other.dtype and first_difference(one, other) is None
