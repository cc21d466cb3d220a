"""Attention and norm of stock transformers' Llama, computed in fewer passes over memory.

Same weights and results. Beside its matrix products a small layer spends most of its time in RoPE and RMSNorm, which
transformers composes of some 20 operators each, forwards and backwards, and in keys repeated for every head.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch.nn import functional
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm


class SegmentAttention(LlamaAttention):
    """Causal attention inside each segment of a pack."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: list[list[tuple[int, int]]],
        wanted: Optional[torch.Tensor] = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of a layer, by cosine and sine of [packs, tokens, head_dim]: [packs, tokens, hidden_size], or
        [wanted, hidden_size] for the positions that are wanted, one pack after another. For segments see below.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (linear(hidden_states).view(shape) for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (_Rotation.apply(heads, *position_embeddings) for heads in (query, key))  # type: ignore[no-untyped-call]
        result = segment_attention(query, key, value, self.scaling, segments).flatten(2)
        return self.o_proj(result if wanted is None else result.flatten(0, 1).index_select(0, wanted)), None


class LastLayer(LlamaDecoderLayer):
    """The last layer: positions without a target are keys and values there, and need neither projection nor MLP."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, rows: Optional[torch.Tensor] = None, **given: Any
    ) -> tuple[Any, ...]:
        """[rows, hidden_size] for the positions `rows`, one pack after another; without it for all."""
        if rows is None:
            return super().forward(hidden_states, **given)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), wanted=rows, **given)
        hidden = hidden_states.flatten(0, 1).index_select(0, rows) + attended
        return (hidden + self.mlp(self.post_attention_layernorm(hidden)),)


class RMSNorm(LlamaRMSNorm):
    """Root mean square norm."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm of [..., hidden_size]."""
        result: torch.Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return result


def use_segments(model: LlamaModel) -> None:
    """Makes a stock model's layers take `segments` and `rows`; its weights stay where they are."""
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.__class__ = SegmentAttention
        elif isinstance(module, LlamaRMSNorm):
            module.__class__ = RMSNorm
    model.layers[-1].__class__ = LastLayer


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    segments: list[list[tuple[int, int]]],
) -> torch.Tensor:
    """Causal attention inside each segment.

    One call per segment instead of a mask over the pack, which takes seq_length² memory, most of it masked. Heads are
    views, grouped by the key that they share: no key is repeated in memory.

    Args:
        query: [packs, tokens, heads, head_dim].
        key, value: [packs, tokens, kv heads, head_dim].
        segments: for each pack the (begin, end) of its segments, in order, without gaps.

    Returns:
        [packs, tokens, heads, head_dim].
    """
    if value.device.type == "cpu" and value.dtype == torch.bfloat16:
        # In bf16 the backward pass of torch 2.1's CPU kernel writes out of bounds, which with several threads ends the
        # process (https://github.com/pytorch/pytorch/issues/132871).
        value = value.float()
    query, key = query.to(value.dtype), key.to(value.dtype)  # rope has made them fp32 under autocast
    lengths = [end - begin for bounds in segments for begin, end in bounds]
    groups = query.shape[2] // key.shape[2]
    grouped = query.flatten(0, 1).view(-1, key.shape[2], groups, key.shape[3])
    heads = grouped.permute(1, 2, 0, 3)  # [kv heads, groups, tokens, head_dim]
    shared = [tensor.flatten(0, 1).transpose(0, 1)[:, None].expand(-1, groups, -1, -1) for tensor in (key, value)]
    parts = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).permute(2, 0, 1, 3)
        for q, k, v in zip(*(torch.split(tensor, lengths, dim=2) for tensor in (heads, *shared)))
    ]
    return torch.cat(parts).view(query.shape)


class _Rotation(torch.autograd.Function):
    """RoPE of [packs, tokens, heads, head_dim], by cosine and sine of [packs, tokens, head_dim]."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(heads, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(gradient, cosine, sine, -1), None, None


def _rotated(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, direction: int) -> torch.Tensor:
    half = heads.shape[-1] // 2
    sine = sine[:, :, None, :half]  # both halves are equal
    result = heads * cosine[:, :, None]
    result[..., :half].addcmul_(heads[..., half:], sine, value=-direction)
    result[..., half:].addcmul_(heads[..., :half], sine, value=direction)
    return result


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x²) + epsilon) * weight; keeps x and one number for each row."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden * scale
        product = gradient * normed
        mean = (product @ weight).div_(weight.numel()).unsqueeze(-1)
        to_hidden = torch.addcmul(gradient * weight, normed, mean, value=-1).mul_(scale)
        return to_hidden, product.flatten(0, -2).sum(0), None
