"""Memory layouts of query, key and value, and the segments of a packed row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional

import torch

from ._operators import DTYPES, require

ORDERS = {"SBH": (1, 2, 0, 3), "BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}
"""Permutations from the layout to b, n, s, d; H is n and d in one."""
BACK = {"SBH": (2, 0, 1, 3), "BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int, layout: str) -> int:
    """Checks the constraints in torch_npu's documentation of npu_fusion_attention; returns the size of a head."""
    require(layout in (*ORDERS, "TND"), f"input_layout {layout}: it is one of {', '.join(ORDERS)}, TND")
    tensors = (query, key, value)
    dtypes = {tensor.dtype for tensor in tensors}
    require(len(dtypes) == 1 and dtypes <= set(DTYPES), f"query, key, value of {[x.dtype for x in tensors]}")
    dimensions = 4 if layout in ("BSND", "BNSD") else 3
    shapes = [list(tensor.shape) for tensor in tensors]
    require(all(len(shape) == dimensions for shape in shapes), f"query, key, value of shapes {shapes} in {layout}")
    require(key.shape == value.shape, f"key of shape {shapes[1]}, value of {shapes[2]}")
    if layout in ("SBH", "BSH"):
        require(query.shape[-1] % head_num == 0, f"head_num {head_num} for {query.shape[-1]} values in a row")
        size = query.shape[-1] // head_num
        require(key.shape[-1] % size == 0, f"heads of {size} for {key.shape[-1]} values in a row of key")
        kv_heads = key.shape[-1] // size
    else:
        heads = layout.index("N")
        require(query.shape[heads] == head_num, f"head_num {head_num} for query of shape {shapes[0]} in {layout}")
        require(query.shape[-1] == key.shape[-1], f"heads of {query.shape[-1]} and {key.shape[-1]}")
        size, kv_heads = query.shape[-1], key.shape[heads]
    require(kv_heads > 0 and head_num % kv_heads == 0, f"{kv_heads} heads of key for {head_num} of query")
    if layout != "TND":
        batch = layout.index("B")
        require(query.shape[batch] == key.shape[batch], f"batches of query and key in {layout}: {shapes[:2]}")
    return size


def heads_first(x: torch.Tensor, layout: str, size: int) -> torch.Tensor:
    """To [b, n, s, d], with heads of that size."""
    if layout in ("SBH", "BSH"):
        x = x.view(*x.shape[:-1], x.shape[-1] // size, size)
    return x.permute(ORDERS[layout])


def layout_again(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The inverse of heads_first."""
    x = x.permute(BACK[layout])
    return x.flatten(2) if layout in ("SBH", "BSH") else x


def segments(
    query: torch.Tensor, key: torch.Tensor, ends: Optional[Sequence[int]], kv_ends: Optional[Sequence[int]]
) -> Iterator[tuple[slice, slice]]:
    """Each segment of a packed row in query and key, both [t, n, d], without those of length 0.

    The ends are actual_seq_qlen and actual_seq_kvlen.
    """
    if ends is None or kv_ends is None:
        raise ValueError("layout TND without actual_seq_qlen and actual_seq_kvlen")
    require(len(ends) == len(kv_ends), f"{len(ends)} segments of query and {len(kv_ends)} of key")
    for name, given, rows in (("actual_seq_qlen", ends, len(query)), ("actual_seq_kvlen", kv_ends, len(key))):
        require(all(type(end) is int for end in given), f"{name} has other than integers: {given}")
        require(list(given) == sorted(given), f"{name} does not rise: {given}")
        require(len(given) > 0 and given[0] >= 0 and given[-1] == rows, f"{name} ends at {given[-1:]}, {rows} rows")
    begins = zip([0, *ends], ends, [0, *kv_ends], kv_ends)
    for begin, end, kv_begin, kv_end in begins:
        require(begin == end or kv_begin < kv_end, f"a segment has queries {begin} to {end} and no keys")
        if begin < end:
            yield slice(begin, end), slice(kv_begin, kv_end)
