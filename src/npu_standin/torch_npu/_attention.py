"""npu_fusion_attention as plain torch expressions: scores, mask, softmax and values, all in memory and in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from ._layouts import check_tensors, heads_first, layout_again, segments
from ._masks import ALL, FULL, UNLIMITED, allowed
from ._operators import require
from ._trace import trace

STATISTICS = 8  # the NPU repeats each row's maximum and sum this many times

NO_DROPOUT = (torch.empty(0), 0, 0, 0)

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
    """softmax(query @ keyᵀ * scale, masked) @ value; autograd gives the gradients of all three.

    Source: torch_npu's documentation of npu_fusion_attention. Called at
    mindspeed_llm/core/transformer/dot_product_attention.py:389, with the published flags in layout TND, mode 4.

    Args:
        query: [s, b, n * d] for layout SBH, [b, s, n * d] BSH, [b, s, n, d] BSND, [b, n, s, d] BNSD, [t, n, d] TND.
        key: likewise, with as many heads or fewer: each serves several adjacent heads of the query.
        value: like key.
        head_num: n of the query.
        input_layout: of the three.
        pse, padding_mask, prefix: not implemented (padding_mask not by the NPU either).
        atten_mask: true where attention is blocked; its shape depends on the mode (_masks.py).
        keep_prob: 1, as dropout is not implemented.
        pre_tockens, next_tockens: how many keys back and ahead a query sees, in modes 0 and 4.
        inner_precise: 0, 1 or 2; no effect here, where fully masked rows always give 0.
        actual_seq_qlen: for TND only, the ends of the query's segments: for lengths 2, 0, 3 it is 2, 2, 5.
        actual_seq_kvlen: likewise of key and value. Attention never crosses segments.
        sparse_mode: meaning of atten_mask, pre_tockens and next_tockens (_masks.py).
        gen_mask_parallel, sync: of dropout; no effect.

    Returns:
        The result, like query; maximum and sum of each row of the softmax in fp32, [b, n, s, 8] or for TND [t, n, 8],
        without a gradient; an empty tensor; three times 0, which belong to dropout.

    Raises:
        NotImplementedError: an argument asks for what is not implemented.
        ValueError: arguments contradict each other or the NPU's documentation.
    """
    for name, given in (("pse", pse), ("padding_mask", padding_mask), ("prefix", prefix)):
        if given is not None:
            raise NotImplementedError(f"attention with {name}")
    if keep_prob != 1:
        raise NotImplementedError(f"attention dropout: keep_prob {keep_prob}")
    require(inner_precise in (0, 1, 2), f"inner_precise {inner_precise}")
    trace(
        layout=input_layout,
        query=query.shape,
        key=key.shape,
        atten_mask=None if atten_mask is None else atten_mask.shape,
        sparse_mode=sparse_mode,
        pre_tockens=pre_tockens,
        next_tockens=next_tockens,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
    )
    size = check_tensors(query, key, value, head_num, input_layout)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        where = allowed(shape, atten_mask, sparse_mode, pre_tockens, next_tockens)
        return _attend(q, k, v, where, scale)

    if input_layout != "TND":
        lengths = actual_seq_qlen, actual_seq_kvlen
        require(lengths == (None, None), f"actual_seq_qlen and actual_seq_kvlen with layout {input_layout}")
        q, k, v = (heads_first(x, input_layout, size) for x in (query, key, value))
        result, maximum, total = attend(q, k, v)
        return layout_again(result, input_layout), maximum, total, *NO_DROPOUT
    if atten_mask is not None and sparse_mode in (FULL, ALL):
        raise NotImplementedError(f"atten_mask in sparse_mode {sparse_mode} with layout TND")
    outputs = []
    for rows, columns in segments(query, key, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[rows], key[columns], value[columns]))
        outputs.append([x[0].transpose(0, 1) for x in attend(q, k, v)])
    result, maximum, total = (torch.cat(parts) for parts in zip(*outputs))
    return result, maximum, total, *NO_DROPOUT


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Optional[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [b, n, sq, d], k and v with fewer heads, to the result, and maximum and sum of each row, [b, n, sq, 8]."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if where is not None:
        scores = scores.masked_fill(~where, float("-inf"))
    maximum = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = torch.exp(scores - maximum)
    total = p.sum(-1, keepdim=True)
    result = p / torch.where(total == 0, torch.ones_like(total), total) @ v.float()
    maximum, total = (x.repeat_interleave(STATISTICS, -1) for x in (maximum, total.detach()))
    return result.to(q.dtype), maximum, total
