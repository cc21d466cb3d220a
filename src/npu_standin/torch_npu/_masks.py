"""Which keys a query may attend to, by sparse_mode and atten_mask of npu_fusion_attention."""

from __future__ import annotations

import functools
from typing import Optional

import torch

from ._operators import require

UNLIMITED = 2147483647  # the default of pre_tockens and next_tockens

COMPRESSED = 2048  # modes 2, 3 and 4 take a triangle of this size for any lengths

FULL, ALL, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = range(5)


def allowed(
    shape: tuple[int, int, int, int],
    mask: Optional[torch.Tensor],
    sparse_mode: int,
    pre_tockens: int,
    next_tockens: int,
) -> Optional[torch.Tensor]:
    """Where attention is allowed.

    Source: torch_npu's documentation of npu_fusion_attention. Query i may look back pre_tockens keys and ahead
    next_tockens; i is counted from the upper left corner in mode 0, from the lower right one in modes 3 and 4, where
    the last query stands on the last key.

    Args:
        shape: b, n, sq, sk of the scores.
        mask: bool or uint8, true where attention is blocked; None for nowhere.
        sparse_mode: 0 the mask, within the band; 1 the mask; 2 causal from the upper left; 3 causal from the lower
            right; 4 band from the lower right.

    Returns:
        bool, broadcastable to [b, n, sq, sk]; None for everywhere.
    """
    if sparse_mode not in (FULL, ALL, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND):
        raise NotImplementedError(f"sparse_mode {sparse_mode}: only modes 0 to 4 are implemented")
    if mask is None:
        # The NPU would ignore the mode and let every query see every key.
        require(sparse_mode == FULL, f"sparse_mode {sparse_mode} without atten_mask: the NPU would mask nothing")
        return None
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, not bool or uint8")
    b, _, sq, sk = shape
    if sparse_mode in (FULL, ALL):
        shapes = [(sq, sk), (1, 1, sq, sk), (b, 1, sq, sk), shape]
        require(mask.shape in shapes, f"atten_mask of shape {list(mask.shape)} for b, n, sq, sk of {list(shape)}")
        permitted = ~mask.bool()
        if sparse_mode == FULL and (pre_tockens, next_tockens) != (UNLIMITED, UNLIMITED):
            band = _band(sq, sk, pre_tockens, next_tockens, corner=0)
            # The NPU may or may not compute what is outside the band, by block.
            require(not (permitted & ~band).any(), "atten_mask lets through what pre_tockens and next_tockens exclude")
        return permitted
    triangle = mask.shape == (COMPRESSED, COMPRESSED) and torch.equal(mask.bool(), _triangle())
    require(triangle, f"sparse_mode {sparse_mode} takes a {COMPRESSED}×{COMPRESSED} mask, true above the diagonal")
    if sparse_mode == LEFT_UP_CAUSAL:
        return _band(sq, sk, UNLIMITED, 0, corner=0)
    if sparse_mode == RIGHT_DOWN_CAUSAL:
        return _band(sq, sk, UNLIMITED, 0, corner=sk - sq)
    require(pre_tockens + next_tockens >= 0, f"pre_tockens {pre_tockens} and next_tockens {next_tockens} do not meet")
    return _band(sq, sk, pre_tockens, next_tockens, corner=sk - sq)


def _band(sq: int, sk: int, pre_tockens: int, next_tockens: int, corner: int) -> torch.Tensor:
    """[sq, sk], true where key j is within reach of query i, which is aligned with key i + corner."""
    query = torch.arange(sq).view(-1, 1) + corner
    key = torch.arange(sk).view(1, -1)
    return (key <= query + next_tockens) & (key >= query - pre_tockens)


@functools.lru_cache(maxsize=1)
def _triangle() -> torch.Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
