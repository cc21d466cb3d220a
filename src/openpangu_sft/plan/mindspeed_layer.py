"""What one layer of MindSpeed-LLM 1.0.0 keeps for its backward pass, with the flags that a recipe becomes. Pure.

Every tensor is one that an operator saves. What the NPU's own ones save is in op-plugin (op_plugin/config/
derivatives.yaml); their order is in MindSpeed-LLM (mindspeed_llm/core/transformer/transformer_layer.py). Two that are
views of one storage count once. tests/test_plan_upstream.py compares with what upstream's layer saves.
"""

from __future__ import annotations

from typing import NamedTuple

from openpangu_sft.recipe import Recipe

STATISTICS = 8
"""npu_fusion_attention keeps maximum and sum of every row eight times over, in fp32 (its documentation)."""


class Shape(NamedTuple):
    """Sizes of a layer on one device.

    Args:
        tokens: of all packs of a micro batch, in this device's part of the sequence.
        positions: of one pack, in this device's part.
        element: bytes of a weight and of an activation.
        tensor: tensor parallel size; with sequence parallelism, which flags.py sets beside it.
    """

    tokens: int
    positions: int
    element: int
    tensor: int


def shape_of(recipe: Recipe) -> Shape:
    """The sizes that a recipe gives."""
    positions = recipe.data.seq_length // recipe.parallel.context
    element = 2 if recipe.train.precision == "bf16" else 4
    return Shape(recipe.train.micro_batch_size * positions, positions, element, recipe.parallel.tensor)


def layer_input(recipe: Recipe) -> int:
    """Bytes of a layer's input: all that is kept of a layer whose activations are computed again."""
    shape = shape_of(recipe)
    return shape.tokens * recipe.model.hidden_size * shape.element // shape.tensor


def layer_activations(recipe: Recipe) -> int:
    """Bytes that one layer keeps, its input included."""
    shape = shape_of(recipe)
    return _norms(recipe, shape) + _attention(recipe, shape) + _mlp(recipe, shape)


def layer_gradients(recipe: Recipe) -> int:
    """Bytes of gradients at the widest point of a layer's backward pass, the one of npu_swiglu.

    There are the gradients of its output (f) and of its input (2 f), and the one that goes around the MLP (h). What
    linear_fc2 has kept (f) is gone by then.
    """
    model, shape = recipe.model, shape_of(recipe)
    return shape.tokens * (2 * model.ffn_hidden_size + model.hidden_size) * shape.element // shape.tensor


def _norms(recipe: Recipe, shape: Shape) -> int:
    """npu_rms_norm keeps its input and, in fp32, a number a token; the linear behind it keeps its output."""
    return 2 * shape.tokens * (2 * recipe.model.hidden_size * shape.element + 4) // shape.tensor


def _attention(recipe: Recipe, shape: Shape) -> int:
    model, parallel = recipe.model, recipe.parallel
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    copied = model.num_query_groups not in (model.num_attention_heads, parallel.tensor)
    sliced, several = parallel.context > 1, recipe.train.micro_batch_size > 1

    kept = heads + 2 * groups  # linear_qkv's output: npu_rotary_mul keeps the key, a view of it
    kept += heads * copied  # so is the query where a device has one group, or each group one head
    kept += heads  # npu_fusion_attention: query,
    if sliced:
        kept += 2 * heads  # key and value, repeated for every head before ulysses exchanges them
    else:
        kept += groups + groups * several  # key; the value is a view of linear_qkv's output, but of one pack only
    kept += heads  # and its result, which linear_proj takes as it is,
    kept += heads * sliced  # or as ulysses has exchanged it
    statistics = 2 * STATISTICS * 4 * model.num_attention_heads
    angles = 4 * shape.positions * model.kv_channels * shape.element  # cos and sin, for query and key; on every TP rank
    return shape.tokens * (kept * shape.element + statistics) // shape.tensor + angles


def _mlp(recipe: Recipe, shape: Shape) -> int:
    """npu_swiglu keeps gate and up, linear_fc2 its product."""
    return 3 * shape.tokens * recipe.model.ffn_hidden_size * shape.element // shape.tensor
