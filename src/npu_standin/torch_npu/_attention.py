"""npu_fusion_attention as plain torch expressions: scores, mask, softmax and values, all in memory and in fp32.

Only causal attention within the segments of a packed row, layout TND with sparse_mode 4, which MindSpeed-LLM takes with
the published flags: --reset-position-ids and --use-flash-attn (mindspeed_llm/training/arguments.py:163,
core/transformer/dot_product_attention.py:315).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from ._operators import DTYPES, require

COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)  # mode 4 takes this triangle for any lengths
STATISTICS = 8  # the NPU repeats each row's maximum and sum this many times

Attention = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Optional[torch.Tensor] = None,
    padding_mask: Optional[torch.Tensor] = None,
    atten_mask: Optional[torch.Tensor] = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    actual_seq_qlen: Sequence[int] = (),
    actual_seq_kvlen: Sequence[int] = (),
    sparse_mode: int = 0,
) -> Attention:
    """softmax(query @ keyᵀ * scale, masked) @ value within each segment; autograd gives the gradients of all three.

    Source: torch_npu's documentation of npu_fusion_attention. Called at
    mindspeed_llm/core/transformer/dot_product_attention.py:389, with these arguments.

    Args:
        query: [t, n, d].
        key, value: likewise, with as many heads or fewer: each serves several adjacent heads of the query.
        head_num: n of the query.
        pse, padding_mask: not implemented (padding_mask not by the NPU either).
        atten_mask: bool or uint8, [2048, 2048], true above the diagonal.
        keep_prob: 1, as dropout is not implemented.
        pre_tockens, next_tockens: how many keys back and ahead a query sees: all back, as no others are implemented,
            and 0 ahead.
        inner_precise: 0, 1 or 2; no effect here.
        actual_seq_qlen: the ends of the segments: for lengths 2, 0, 3 it is 2, 2, 5.
        actual_seq_kvlen: the same, as no others are implemented. Attention never crosses segments.

    Returns:
        The result, like query; maximum and sum of each row of the softmax in fp32, [t, n, 8], without a gradient; an
        empty tensor; three times 0, which belong to dropout.

    Raises:
        NotImplementedError: an argument asks for what is not implemented.
        ValueError: arguments contradict each other or the NPU's documentation.
    """
    if (input_layout, sparse_mode) != ("TND", 4):
        raise NotImplementedError(f"attention in layout {input_layout} with sparse_mode {sparse_mode}: only TND with 4")
    for name, asked in (
        ("pse", pse is not None),
        ("padding_mask", padding_mask is not None),
        (f"dropout: keep_prob {keep_prob}", keep_prob != 1),
        (f"pre_tockens {pre_tockens} of {len(query)}", pre_tockens < len(query)),
        (f"next_tockens {next_tockens}", next_tockens != 0),
        ("other segments of key than of query", list(actual_seq_kvlen) != list(actual_seq_qlen)),
    ):
        if asked:
            raise NotImplementedError(f"attention with {name}")
    require(inner_precise in (0, 1, 2), f"inner_precise {inner_precise}")
    _check_tensors(query, key, value, head_num)
    if atten_mask is None:  # the NPU would ignore the mode and let every query see every key
        raise ValueError("sparse_mode 4 without atten_mask: the NPU would mask nothing")
    require(atten_mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {atten_mask.dtype}, not bool or uint8")
    triangle = torch.equal(atten_mask.bool(), COMPRESSED)
    require(triangle, "sparse_mode 4 takes a 2048×2048 mask, true above the diagonal")
    ends, rows = list(actual_seq_qlen), len(query)
    require(all(type(end) is int for end in ends), f"actual_seq_qlen has other than integers: {ends}")
    require(ends == sorted(ends), f"actual_seq_qlen does not rise: {ends}")
    require(len(ends) > 0 and ends[0] >= 0 and ends[-1] == rows, f"actual_seq_qlen ends at {ends[-1:]}, {rows} rows")
    lengths = [end - begin for begin, end in zip([0, *ends], ends) if begin < end]
    segments = zip(*(torch.split(x.transpose(0, 1), lengths, dim=1) for x in (query, key, value)))
    parts = zip(*(_attend(q, k, v, scale) for q, k, v in segments))
    # contiguous, as on the NPU: what comes next would keep a copy beside it
    result, maximum, total = (torch.cat(part, dim=1).transpose(0, 1).contiguous() for part in parts)
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
    require(query.shape[::2] == key.shape[::2], f"query of shape {shapes[0]}, key of {shapes[1]}")
    heads = key.shape[1]
    require(heads > 0 and head_num % heads == 0, f"{heads} heads of key for {head_num} of query")


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [n, s, d], k and v with fewer heads, to the result, and maximum and sum of each row, [n, s, 8]."""
    each = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    maximum = scores.detach().amax(-1, keepdim=True)
    p = torch.exp(scores - maximum)
    total = p.sum(-1, keepdim=True)
    maximum, sums = (x.repeat_interleave(STATISTICS, -1) for x in (maximum, total.detach()))
    return (p / total @ v.float()).to(q.dtype), maximum, sums
