"""npu_fusion_attention and its gradient, written out: scores, mask, softmax, values, all in memory and in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from ._layouts import check_tensors, heads_first, layout_again, segments
from ._masks import ALL, FULL, UNLIMITED, allowed
from ._operators import require
from ._trace import trace

STATISTICS = 8
"""The NPU repeats each row's maximum and sum so many times."""

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
        key: likewise, with as many heads or fewer: each serves several of the query's, next to each other.
        value: like key.
        head_num: n of the query.
        input_layout: of the three.
        pse: not implemented.
        padding_mask: not implemented, neither by the NPU.
        atten_mask: true where attention does not go; its shape depends on the mode (_masks.py).
        scale: of the scores.
        keep_prob: 1, as dropout is not implemented.
        pre_tockens: how far back a query sees, in modes 0 and 4.
        next_tockens: how far ahead, likewise.
        inner_precise: 0, 1 or 2: of no effect here, where rows that are all masked always give 0.
        prefix: not implemented.
        actual_seq_qlen: for TND alone, where each segment of the query ends: for lengths 2, 0, 3 it is 2, 2, 5.
        actual_seq_kvlen: likewise of key and value. Nothing is attended to across segments.
        sparse_mode: what atten_mask, pre_tockens and next_tockens mean (_masks.py).
        gen_mask_parallel: how dropout is drawn, so of no effect.
        sync: likewise.

    Returns:
        The result, like query; maximum and sum of each row of the softmax in fp32, [b, n, s, 8] or for TND [t, n, 8],
        without a gradient; an empty tensor; three times 0, which belong to dropout.
    """
    _refuse(pse, padding_mask, prefix, keep_prob, inner_precise)
    trace(
        layout=input_layout,
        query=list(query.shape),
        key=list(key.shape),
        atten_mask=None if atten_mask is None else list(atten_mask.shape),
        sparse_mode=sparse_mode,
        pre_tockens=pre_tockens,
        next_tockens=next_tockens,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
    )
    size = check_tensors(query, key, value, head_num, input_layout)
    if input_layout != "TND":
        lengths = actual_seq_qlen, actual_seq_kvlen
        require(lengths == (None, None), f"actual_seq_qlen and actual_seq_kvlen with layout {input_layout}")
        q, k, v = (heads_first(x, input_layout, size) for x in (query, key, value))
        where = allowed(_scores_shape(q, k), atten_mask, sparse_mode, pre_tockens, next_tockens)
        result, maximum, total = _attend(q, k, v, where, scale)
        return _outputs(layout_again(result, input_layout), maximum, total)
    if atten_mask is not None and sparse_mode in (FULL, ALL):
        raise NotImplementedError(f"atten_mask in sparse_mode {sparse_mode} with layout TND")
    pieces = []
    for rows, columns in segments(query, key, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[rows], key[columns], value[columns]))
        where = allowed(_scores_shape(q, k), atten_mask, sparse_mode, pre_tockens, next_tockens)
        pieces.append([x[0].transpose(0, 1) for x in _attend(q, k, v, where, scale)])
    result, maximum, total = (torch.cat(parts) for parts in zip(*pieces))
    return _outputs(result, maximum, total)


def npu_fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Optional[torch.Tensor] = None,
    padding_mask: Optional[torch.Tensor] = None,
    atten_mask: Optional[torch.Tensor] = None,
    softmax_max: torch.Tensor,
    softmax_sum: torch.Tensor,
    softmax_in: Optional[torch.Tensor] = None,
    attention_in: torch.Tensor,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Optional[Sequence[int]] = None,
    sparse_mode: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """The gradients, given each row's maximum and sum over all keys, of which `key` may be a part.

    So a ring of machines adds them up: called at mindspeed/core/context_parallel/ring_context_parallel.py, in layout
    SBH. Source: torch_npu's documentation of npu_fusion_attention, of which it is the backward.

    Args:
        query: as in npu_fusion_attention, and so all that are not named here; TND is not implemented.
        key: likewise.
        value: likewise.
        dy: the gradient of the result, like query.
        head_num: n of the query.
        input_layout: of all of them.
        pse: not implemented.
        padding_mask: not implemented.
        atten_mask: as in npu_fusion_attention.
        softmax_max: of each row over all keys, [b, n, s, 8].
        softmax_sum: likewise.
        softmax_in: not implemented.
        attention_in: the result over all keys, like query.
        scale_value: of the scores.
        keep_prob: 1.
        pre_tockens: as in npu_fusion_attention.
        next_tockens: likewise.
        inner_precise: of no effect.
        seed: of dropout, so of no effect; likewise offset and numels.
        offset: see seed.
        numels: see seed.
        prefix: not implemented.
        sparse_mode: as in npu_fusion_attention.

    Returns:
        The gradients of query, key and value, and None for pse.
    """
    _refuse(pse, padding_mask, prefix, keep_prob, inner_precise)
    if softmax_in is not None or input_layout == "TND":
        raise NotImplementedError("npu_fusion_attention_grad with softmax_in or layout TND")
    size = check_tensors(query, key, value, head_num, input_layout)
    require(dy.shape == attention_in.shape == query.shape, "dy and attention_in are not like query")
    tensors = (query, key, value, dy, attention_in)
    q, k, v, g, result = (heads_first(x, input_layout, size).float() for x in tensors)
    statistics = (*q.shape[:3], STATISTICS)
    require(softmax_max.shape == softmax_sum.shape == statistics, f"softmax_max and _sum are not {list(statistics)}")
    where = allowed(_scores_shape(q, k), atten_mask, sparse_mode, pre_tockens, next_tockens)
    each = q.shape[1] // k.shape[1]
    k_each, v_each = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    scores = _masked(q @ k_each.transpose(-1, -2) * scale_value, where)
    total = softmax_sum[..., :1]
    p = torch.exp(scores - softmax_max[..., :1]) / torch.where(total == 0, torch.ones_like(total), total)
    ds = p * (g @ v_each.transpose(-1, -2) - (g * result).sum(-1, keepdim=True)) * scale_value
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g
    dk, dv = (x.view(x.shape[0], -1, each, *x.shape[2:]).sum(2) for x in (dk, dv))
    dq, dk, dv = (layout_again(x, input_layout).to(query.dtype) for x in (ds @ k_each, dk, dv))
    return dq, dk, dv, None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Optional[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [b, n, sq, d], k and v with fewer heads, to the result, and maximum and sum of each row, [b, n, sq, 1]."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    scores = _masked(q.float() @ k.float().transpose(-1, -2) * scale, where)
    maximum = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = torch.exp(scores - maximum)
    total = p.sum(-1, keepdim=True)
    result = p / torch.where(total == 0, torch.ones_like(total), total) @ v.float()
    return result.to(q.dtype), maximum, total.detach()


def _masked(scores: torch.Tensor, where: Optional[torch.Tensor]) -> torch.Tensor:
    return scores if where is None else scores.masked_fill(~where, float("-inf"))


def _scores_shape(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def _outputs(result: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor) -> Attention:
    maximum, total = (x.repeat_interleave(STATISTICS, -1) for x in (maximum, total))
    return result, maximum, total, torch.empty(0), 0, 0, 0


def _refuse(
    pse: Optional[torch.Tensor],
    padding_mask: Optional[torch.Tensor],
    prefix: Optional[Sequence[int]],
    keep_prob: float,
    inner_precise: int,
) -> None:
    """Raises for what is not implemented."""
    for name, given in (("pse", pse), ("padding_mask", padding_mask), ("prefix", prefix)):
        if given is not None:
            raise NotImplementedError(f"attention with {name}")
    if keep_prob != 1:
        raise NotImplementedError(f"attention dropout: keep_prob {keep_prob}")
    require(inner_precise in (0, 1, 2), f"inner_precise {inner_precise}")
