"""Memory of an NPU that trains with MindSpeed-LLM 1.0.0 and the flags of mindspeed/flags.py.

Pure, but for HCCL_BUFFSIZE. Where it is counted from: docs/plan.md has file and function of upstream for each part.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from openpangu_sft.checkpoint.sharding import Layout, layout_of, rank_parameter_count
from openpangu_sft.plan.memory import Memory, Part, Phase
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError

MASK = 2048 * 2048
"""Bytes of the mask that each layer makes for npu_fusion_attention in layout TND (flash_attention_forward)."""

HELD = 3384 << 20
"""Bytes of an NPU that are in use before any process is: the most that npu-smi says of an idle one with 64 GB in the
recordings of tests/npu_smi; of others it is 2824 MB and more. docs/plan.md compares with what torch_npu says."""


def buffer_mib() -> int:
    """HCCL_BUFFSIZE in MiB, 200 unless it is set.

    HCCL multiplies it by 1024 x 1024 (externalinput_pub.h, HCCL_CCL_COMM_FIXED_CALC_BUFFER_SIZE).

    Raises:
        UserError: it is none that HCCL takes.
    """
    given = os.environ.get("HCCL_BUFFSIZE", "200")
    if not (given.isascii() and given.isdigit() and int(given)):
        raise UserError(
            f"{given!r} is no size in MB", where="HCCL_BUFFSIZE", remedy="export a number above 0, or unset it"
        )
    return int(given)


def mindspeed_memory(recipe: Recipe) -> Memory:
    """The fullest pipeline stage of a recipe."""
    layout = layout_of(recipe.model, recipe.parallel)
    stages = [_stage(recipe, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda memory: memory.needed)


def rank_parameters(recipe: Recipe, stage: int = 0) -> int:
    """Parameters on one device of a pipeline stage; all tensor ranks have as many."""
    layout = layout_of(recipe.model, recipe.parallel)
    return rank_parameter_count(recipe.model, layout, 0, stage)


def shards(recipe: Recipe) -> int:
    """Over how many devices the optimizer's state is spread: data and context parallel together."""
    return recipe.parallel.data * recipe.parallel.context


def communicators(recipe: Recipe) -> int:
    """Groups of more than one device that one device exchanges with over HCCL."""
    parallel = recipe.parallel
    groups = {
        "all devices": parallel.world,
        "gradients and weights": parallel.data * parallel.context,
        "losses": parallel.data,
        "context": parallel.context,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "embedding": parallel.pipeline if recipe.model.tie_word_embeddings else 1,
    }
    return sum(size > 1 for size in groups.values())


def _stage(recipe: Recipe, layout: Layout, stage: int) -> Memory:
    parameters, element = rank_parameters(recipe, stage), shape_of(recipe).element
    state = 12 if recipe.train.precision == "bf16" else 8
    masks = layout.stages[stage] * MASK
    static = [
        Part("weights", parameters * element, f"{parameters:,} x {element} bytes"),
        Part("gradients", parameters * 4, "x 4: summed up in fp32"),
        Part(
            "optimizer state",
            -(-parameters // shards(recipe)) * state,
            f"x {state} / {shards(recipe)} (DP x CP): "
            + ("fp32 weights and Adam's two moments" if state == 12 else "Adam's two moments"),
        ),
        Part("attention masks", masks, f"{layout.stages[stage]} layers x 2048 x 2048 bytes"),
    ]
    if recipe.parallel.tensor > 1:
        gathered = layer_input(recipe) * recipe.parallel.tensor
        static.append(Part("gathered sequence", gathered, "one buffer, as tensor parallel ranks hold parts of it"))
    phases = [_loss(recipe, layout, stage), _backward(recipe, layout, stage)]
    if stage == 0:
        phases.append(_embedding(recipe, layout))
    count, mib = communicators(recipe), buffer_mib()
    outside = (
        Part("HCCL buffers", count * 2 * mib << 20, f"{count} communicators x 2 x HCCL_BUFFSIZE, {mib} MiB"),
        Part("the NPU itself", HELD, "in use before any process, by npu-smi"),
    )
    return Memory(tuple(static), tuple(phases), outside, stage)


def _loss(recipe: Recipe, layout: Layout, stage: int) -> Phase:
    """At the end of the forward pass; of stages without the loss, the end of their layers."""
    parts = [_kept(recipe, layout, stage)]
    if stage == layout.pipeline - 1:
        parts += [_final(recipe), _logits(recipe, layout)]
    return Phase("loss", tuple(parts))


def _backward(recipe: Recipe, layout: Layout, stage: int) -> Phase:
    """In the backward pass of the layer that has most around it."""
    parts = [_kept(recipe, layout, stage)]
    recomputed = _recomputed(recipe, layout, stage)
    gradients = layer_gradients(recipe)
    if recomputed == layout.stages[stage]:
        again = layer_activations(recipe) - layer_input(recipe)
        parts.append(Part("one layer again", again, "what it keeps, computed from its input"))
    parts.append(Part("gradients in a layer", gradients, "at npu_swiglu, where they are widest"))
    if _waits(recipe, layout):
        parts.append(Part("output layer's gradient", _vocabulary(recipe, layout), "waits for the embedding's"))
    return Phase("backward", tuple(parts))


def _embedding(recipe: Recipe, layout: Layout) -> Phase:
    """At the end of the backward pass, where the two gradients of tied embeddings meet and are added."""
    copies = 3 if _waits(recipe, layout) else 1
    how = f"{copies} times: with the output layer's, and their sum" if copies > 1 else "before it is added in fp32"
    return Phase("embedding", (Part("embedding's gradient", copies * _vocabulary(recipe, layout), how),))


def _waits(recipe: Recipe, layout: Layout) -> bool:
    """Whether one weight has two gradients on this device: the output layer is the embedding."""
    return recipe.model.tie_word_embeddings and layout.pipeline == 1


def _vocabulary(recipe: Recipe, layout: Layout) -> int:
    """Bytes of a gradient of the embedding, before it is added to the sum in fp32."""
    return layout.padded_vocab_size // layout.tensor * recipe.model.hidden_size * shape_of(recipe).element


def _kept(recipe: Recipe, layout: Layout, stage: int) -> Part:
    """What the layers keep of all micro batches that are on their way."""
    layers, recomputed = layout.stages[stage], _recomputed(recipe, layout, stage)
    size = recomputed * layer_input(recipe) + (layers - recomputed) * layer_activations(recipe)
    words = [f"{recomputed} x input"] if recomputed else []
    words += [f"{layers - recomputed} x all of a layer"] if layers > recomputed else []
    flying = _in_flight(recipe, layout, stage)
    how = " + ".join(words) + (f", {flying} micro batches" if flying > 1 else "")
    return Part("kept by the layers", size * flying, how)


def _final(recipe: Recipe) -> Part:
    """The last norm keeps its input, the output layer its own."""
    size = 2 * layer_input(recipe) + 4 * shape_of(recipe).tokens // recipe.parallel.tensor
    return Part("kept by the last norm", size, "its input and output")


def _logits(recipe: Recipe, layout: Layout) -> Part:
    """The logits, their fp32 copy, and the one that becomes their softmax: alive together in the cross-entropy.

    In fp32 the copy is the logits themselves.
    """
    shape, columns = shape_of(recipe), layout.padded_vocab_size // layout.tensor
    bytes_each = 2 + 4 + 4 if shape.element == 2 else 4 + 4
    words = "bf16, fp32 and softmax in fp32" if shape.element == 2 else "fp32, and softmax"
    how = f"{columns:,} x {shape.tokens:,} x {bytes_each}: {words}"
    return Part("logits", shape.tokens * columns * bytes_each, how)


def _recomputed(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Layers of a stage that are computed again: upstream counts from the first layer of each stage."""
    recompute = recipe.train.recompute
    return min(recompute.num_layers, layout.stages[stage]) if recompute.granularity == "full" else 0


def _in_flight(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Micro batches whose activations a stage holds at once, in the schedule of one forward, one backward."""
    train = recipe.train
    micro_batches = train.global_batch_size // (train.micro_batch_size * recipe.parallel.data)
    return min(layout.pipeline - stage, micro_batches)


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
