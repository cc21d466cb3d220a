"""npu_fusion_attention as plain torch expressions: scores, mask, softmax and values, all in memory and in fp32.

Only layout TND with sparse_mode 4, which MindSpeed-LLM takes with the published flags: --reset-position-ids and
--use-flash-attn (mindspeed_llm/training/arguments.py:163, core/transformer/dot_product_attention.py:315).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Optional

import torch

from ._operators import DTYPES, require

UNLIMITED = 2147483647  # the default of pre_tockens and next_tockens
COMPRESSED = 2048  # mode 4 takes a triangle of this size for any lengths
STATISTICS = 8  # the NPU repeats each row's maximum and sum this many times

Attention = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: Optional[torch.Tensor] = None,
    padding_mask: Optional[torch.Tensor] = None,
    atten_mask: Optional[torch.Tensor] = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: Optional[Sequence[int]] = None,
    actual_seq_qlen: Optional[Sequence[int]] = None,
    actual_seq_kvlen: Optional[Sequence[int]] = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> Attention:
    """softmax(query @ keyᵀ * scale, masked) @ value within each segment; autograd gives the gradients of all three.

    Source: torch_npu's documentation of npu_fusion_attention. Called at
    mindspeed_llm/core/transformer/dot_product_attention.py:389.

    Args:
        query: [t, n, d].
        key, value: likewise, with as many heads or fewer: each serves several adjacent heads of the query.
        head_num: n of the query.
        pse, padding_mask, prefix: not implemented (padding_mask not by the NPU either).
        atten_mask: bool or uint8, [2048, 2048], true above the diagonal.
        keep_prob: 1, as dropout is not implemented.
        pre_tockens, next_tockens: how many keys back and ahead a query sees; the last query stands on the last key.
        inner_precise: 0, 1 or 2; no effect here, where fully masked rows always give 0.
        actual_seq_qlen: the ends of the query's segments: for lengths 2, 0, 3 it is 2, 2, 5.
        actual_seq_kvlen: likewise of key and value. Attention never crosses segments.
        gen_mask_parallel, sync: of dropout; no effect.

    Returns:
        The result, like query; maximum and sum of each row of the softmax in fp32, [t, n, 8], without a gradient; an
        empty tensor; three times 0, which belong to dropout.

    Raises:
        NotImplementedError: an argument asks for what is not implemented.
        ValueError: arguments contradict each other or the NPU's documentation.
    """
    if (input_layout, sparse_mode) != ("TND", 4):
        raise NotImplementedError(f"attention in layout {input_layout} with sparse_mode {sparse_mode}: only TND with 4")
    for name, given in (("pse", pse), ("padding_mask", padding_mask), ("prefix", prefix)):
        if given is not None:
            raise NotImplementedError(f"attention with {name}")
    if keep_prob != 1:
        raise NotImplementedError(f"attention dropout: keep_prob {keep_prob}")
    require(inner_precise in (0, 1, 2), f"inner_precise {inner_precise}")
    require(pre_tockens + next_tockens >= 0, f"pre_tockens {pre_tockens} and next_tockens {next_tockens} do not meet")
    _check_tensors(query, key, value, head_num)
    _check_mask(atten_mask)
    outputs = []
    for rows, columns in _segments(query, key, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = (x.transpose(0, 1) for x in (query[rows], key[columns], value[columns]))
        seen = _band(q.shape[1], k.shape[1], pre_tockens, next_tockens)
        outputs.append([x.transpose(0, 1) for x in _attend(q, k, v, seen, scale)])
    result, maximum, total = (torch.cat(parts) for parts in zip(*outputs))
    return result, maximum, total, torch.empty(0), 0, 0, 0


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int) -> None:
    """The constraints in torch_npu's documentation."""
    tensors = (query, key, value)
    dtypes = {tensor.dtype for tensor in tensors}
    require(len(dtypes) == 1 and dtypes <= set(DTYPES), f"query, key, value of {[x.dtype for x in tensors]}")
    shapes = [list(tensor.shape) for tensor in tensors]
    require(all(len(shape) == 3 for shape in shapes), f"query, key, value of shapes {shapes} in layout TND")
    require(key.shape == value.shape, f"key of shape {shapes[1]}, value of {shapes[2]}")
    require(query.shape[1] == head_num, f"head_num {head_num} for query of shape {shapes[0]}")
    require(query.shape[2] == key.shape[2], f"heads of {query.shape[2]} and {key.shape[2]}")
    heads = key.shape[1]
    require(heads > 0 and head_num % heads == 0, f"{heads} heads of key for {head_num} of query")


def _check_mask(mask: Optional[torch.Tensor]) -> None:
    if mask is None:  # the NPU would ignore the mode and let every query see every key
        raise ValueError("sparse_mode 4 without atten_mask: the NPU would mask nothing")
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, not bool or uint8")
    triangle = mask.shape == (COMPRESSED, COMPRESSED) and torch.equal(mask.bool(), _triangle())
    require(triangle, f"sparse_mode 4 takes a {COMPRESSED}×{COMPRESSED} mask, true above the diagonal")


@functools.lru_cache(maxsize=1)
def _triangle() -> torch.Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)


def _segments(
    query: torch.Tensor, key: torch.Tensor, ends: Optional[Sequence[int]], kv_ends: Optional[Sequence[int]]
) -> Iterator[tuple[slice, slice]]:
    """Each segment of a packed row in query and key, without those of length 0."""
    if ends is None or kv_ends is None:
        raise ValueError("layout TND without actual_seq_qlen and actual_seq_kvlen")
    require(len(ends) == len(kv_ends), f"{len(ends)} segments of query and {len(kv_ends)} of key")
    for name, given, rows in (("actual_seq_qlen", ends, len(query)), ("actual_seq_kvlen", kv_ends, len(key))):
        require(all(type(end) is int for end in given), f"{name} has other than integers: {given}")
        require(list(given) == sorted(given), f"{name} does not rise: {given}")
        require(len(given) > 0 and given[0] >= 0 and given[-1] == rows, f"{name} ends at {given[-1:]}, {rows} rows")
    for begin, end, kv_begin, kv_end in zip([0, *ends], ends, [0, *kv_ends], kv_ends):
        require(begin == end or kv_begin < kv_end, f"a segment has queries {begin} to {end} and no keys")
        if begin < end:
            yield slice(begin, end), slice(kv_begin, kv_end)


def _band(sq: int, sk: int, back: int, ahead: int) -> torch.Tensor:
    """[sq, sk], true where key j is within reach of query i, which is aligned with key i + sk - sq."""
    query = torch.arange(sq).view(-1, 1) + sk - sq
    key = torch.arange(sk).view(1, -1)
    return (key <= query + ahead) & (key >= query - back)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [n, sq, d], k and v with fewer heads, to the result, and maximum and sum of each row, [n, sq, 8]."""
    each = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    maximum = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = torch.exp(scores - maximum)
    total = p.sum(-1, keepdim=True)
    result = p / torch.where(total == 0, torch.ones_like(total), total) @ v.float()
    maximum, total = (x.repeat_interleave(STATISTICS, -1) for x in (maximum, total.detach()))
    return result.to(q.dtype), maximum, total
