"""The model of stock transformers, with attention that never crosses from one segment of a pack into the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface, no_init_weights
from transformers.models.llama.modeling_llama import repeat_kv

from openpangu_sft.model.batches import Batch
from openpangu_sft.model.chunked_loss import loss_sum
from openpangu_sft.model.tensors import Tensors
from openpangu_sft.recipe.model_config import llama_config, read_config

SEGMENTS = "segments"


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: float,
    segments: list[list[tuple[int, int]]],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment; registered with transformers under the name "segments".

    One call per segment instead of a mask over the pack, which takes seq_length² memory, most of it masked.

    Args:
        query: [packs, heads, tokens, head_dim].
        key, value: [packs, kv heads, tokens, head_dim].
        segments: for each pack the (begin, end) of its segments, without gaps.

    Returns:
        [packs, tokens, heads, head_dim], and no attention weights.
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    if value.device.type == "cpu":
        # In bf16 the backward pass of torch 2.1's CPU kernel writes out of bounds, which with several threads ends the
        # process (https://github.com/pytorch/pytorch/issues/132871).
        value = value.float()
    query, key = query.to(value.dtype), key.to(value.dtype)  # rope has made them fp32 under autocast
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    packs = []
    for pack, bounds in enumerate(segments):
        parts = [
            functional.scaled_dot_product_attention(
                query[pack : pack + 1, :, begin:end],
                key[pack : pack + 1, :, begin:end],
                value[pack : pack + 1, :, begin:end],
                is_causal=True,
                scale=scaling,
            )
            for begin, end in bounds
        ]
        packs.append(torch.cat(parts, dim=2))
    return torch.cat(packs).transpose(1, 2).contiguous(), None


AttentionInterface.register(SEGMENTS, segment_attention)


def build_model(config_directory: Path, tensors: Tensors, attention: str, device: torch.device) -> LlamaForCausalLM:
    """A model with given weights on a device.

    Args:
        config_directory: contains config.json, in openPangu's own form or Llama's.
        tensors: by Hugging Face name, without lm_head.weight where embeddings are tied. Their dtype is kept.
        attention: "segments" for packs, "eager" for generation ("sdpa" requires torch 2.1.1).
    """
    config = LlamaConfig(**llama_config(read_config(config_directory)), attn_implementation=attention)
    with no_init_weights():
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    torch.nn.Module.to(model, device)
    return model


def tensors_of_model(model: LlamaForCausalLM, dtype: torch.dtype) -> Tensors:
    """The weights by Hugging Face name, cast and on the CPU; tied ones once."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}


class PackLoss(torch.nn.Module):
    """Sum of the cross-entropy over the trained tokens of a micro batch."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum, a scalar in fp32."""
        hidden = self.model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
        ).last_hidden_state
        rows = hidden[:, :-1][batch.trained]
        if torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled():
            rows = rows.bfloat16()
        return loss_sum(rows, self.model.lm_head.weight, batch.targets[batch.trained])
