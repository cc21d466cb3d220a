"""Costs of a training step of the mindspeed engine by formula, without tensor and pipeline parallelism."""

from __future__ import annotations

from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.model.flops import recomputed_layers
from openpangu_sft.recipe.schema import Recipe

SCALE = 16
"""Hidden sizes, and lengths of packs, segments and chunks of logits, of the 1B at 32K to those of the small model."""


def flops_per_token(recipe: Recipe, pairs: float, logits: float) -> float:
    """FLOPs of the matrix products: twice as many in the backward pass, and a recomputed layer's forward pass again.

    Args:
        pairs: of query and key that attention computes, per token.
        logits: share of the tokens at which they are computed.
    """
    model = recipe.model
    heads, groups = (count * model.kv_channels for count in (model.num_attention_heads, model.num_query_groups))
    matrices = model.hidden_size * (2 * heads + 2 * groups + 3 * model.ffn_hidden_size)
    passes = 3 * model.num_layers + recomputed_layers(recipe, model.num_layers)
    vocabulary = layout_of(model, recipe.parallel).padded_vocab_size
    return passes * (2 * matrices + 4 * heads * pairs) + 6 * vocabulary * model.hidden_size * logits
