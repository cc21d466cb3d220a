"""Memory of an NPU that trains with MindSpeed-LLM 1.0.0 and the flags of training/mindspeed/flags.py.

Pure, except for HCCL_BUFFSIZE. docs/plan.md names upstream's file and function for each part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, Optional

from openpangu_sft.checkpoint.sharding import Layout, layout_of, rank_parameter_count
from openpangu_sft.model.flops import micro_batches, recomputed_layers
from openpangu_sft.plan.memory import Memory, Part, Phase, kept_by_layers, loss_parts
from openpangu_sft.recipe.lora import LINEARS
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.flags import repeats_kv_heads
from openpangu_sft.util.errors import UserError

MASK = 2048 * 2048  # bytes of each layer's mask for npu_fusion_attention in layout TND (flash_attention_forward)
HELD = 3384 << 20
"""Bytes in use on an NPU before any process starts: the most that npu-smi shows for an idle one with 64 GB in the
recordings of tests/npu_smi; others have 2824 MB and more. docs/plan.md compares with torch_npu."""
HCCL_MIB = 200  # HCCL_BUFFSIZE by default
STATISTICS = 8  # npu_fusion_attention keeps maximum and sum of every row so many times, in fp32 (its documentation)


def buffer_mib() -> int:
    """HCCL_BUFFSIZE in MiB, HCCL_MIB unless it is set; raises `UserError` for a value that HCCL does not take.

    HCCL multiplies it by 1024 x 1024 (externalinput_pub.h, HCCL_CCL_COMM_FIXED_CALC_BUFFER_SIZE).
    """
    given = os.environ.get("HCCL_BUFFSIZE", str(HCCL_MIB))
    if not (given.isascii() and given.isdigit() and int(given)):
        remedy = "export a number above 0, or unset it"
        raise UserError(f"{given!r} is not a size in MB", where="HCCL_BUFFSIZE", remedy=remedy)
    return int(given)


def mindspeed_memory(recipe: Recipe, mib: Optional[int] = None, published: bool = False) -> Memory:
    """The fullest pipeline stage of a recipe, with HCCL's buffers of `mib` MiB, by default HCCL_BUFFSIZE.

    The published step has logits of all positions.
    """
    layout = layout_of(recipe.model, recipe.parallel)
    count, mib = communicators(recipe), mib or buffer_mib()
    outside = (
        Part("HCCL buffers", count * 2 * mib << 20, f"{count} communicators x 2 x HCCL_BUFFSIZE, {mib} MiB"),
        Part("the NPU itself", HELD, "in use before any process, by npu-smi"),
    )
    stages = [
        Memory(_static(recipe, layout, stage), tuple(_phases(recipe, layout, stage, published)), outside, stage)
        for stage in range(layout.pipeline)
    ]
    return max(stages, key=lambda memory: memory.needed)


def rank_parameters(recipe: Recipe, stage: int = 0, trained: bool = False) -> int:
    """Parameters on one device of a pipeline stage, or the trained ones; equal on all tensor ranks."""
    layout = layout_of(recipe.model, recipe.parallel)
    return rank_parameter_count(recipe.model, layout, 0, stage, recipe.train.lora.adapter, trained)


def shards(recipe: Recipe) -> int:
    """Number of devices that the optimizer's state is sharded over: data times context parallel."""
    return recipe.parallel.data * recipe.parallel.context


def communicators(recipe: Recipe) -> int:
    """HCCL groups of one device, without those of a single member."""
    parallel = recipe.parallel
    groups = [parallel.world, shards(recipe), parallel.data]  # all devices; gradients and weights; losses
    groups += [parallel.context, parallel.tensor, parallel.pipeline]
    groups += [parallel.pipeline] * recipe.model.tie_word_embeddings  # the embedding's
    return sum(size > 1 for size in groups)


def _static(recipe: Recipe, layout: Layout, stage: int) -> tuple[Part, ...]:
    parameters, trained = (rank_parameters(recipe, stage, which) for which in (False, True))
    element, layers = shape_of(recipe).element, layout.stages[stage]
    state, what = (12, "fp32 weights and Adam's two moments") if element == 2 else (8, "Adam's two moments")
    replicas = shards(recipe)
    optimizer = -(-trained // replicas) * state
    of_adapters = f"{trained:,} of adapters " if trained < parameters else ""
    static = [
        Part("weights", parameters * element, f"{parameters:,} x {element} bytes"),
        Part("gradients", trained * 4, f"{of_adapters}x 4: accumulated in fp32"),
        Part("optimizer state", optimizer, f"x {state} / {replicas} (DP x CP): {what}"),
        Part("attention masks", layers * MASK, f"{layers} layers x 2048 x 2048 bytes"),
    ]
    if recipe.parallel.tensor > 1:
        gathered = layer_input(recipe) * recipe.parallel.tensor
        static.append(Part("gathered sequence", gathered, "one buffer, as tensor parallel ranks hold parts of it"))
    return tuple(static)


def _phases(recipe: Recipe, layout: Layout, stage: int, published: bool) -> Iterator[Phase]:
    """End of the forward pass (in stages without the loss, of their layers), and backward pass of the layer with most
    live tensors. Layers keep what they do for all micro batches in flight in the schedule of one forward, one backward.
    """
    shape, hidden, frozen = shape_of(recipe), recipe.model.hidden_size, recipe.train.lora.rank > 0
    layers, columns = layout.stages[stage], layout.padded_vocab_size // layout.tensor
    in_flight, again = min(layout.pipeline - stage, micro_batches(recipe)), recomputed_layers(recipe, layers)
    kept = kept_by_layers(layers, again, layer_input(recipe), layer_activations(recipe), in_flight)
    vocabulary = columns * hidden * shape.element  # bytes of the embedding's gradient, before it is accumulated in fp32

    loss, backward = [kept], [kept]
    if stage == layout.pipeline - 1:
        # the last norm keeps its input, the output layer its own
        final = 2 * layer_input(recipe) + 4 * shape.tokens // shape.tensor
        loss.append(Part("kept by the last norm", final, "its input and output"))
        # in bf16 a logit is there once more in fp32, and as softmax; in fp32 the copy is the logit itself
        logit = 2 + 4 + 4 if shape.element == 2 else 4 + 4
        if published:
            size = shape.tokens * columns * logit
            loss.append(Part("logits", size, f"{columns:,} x {shape.tokens:,} x {logit}: of all positions"))
        else:
            loss += loss_parts(shape.tokens, columns, hidden, shape.element, logit, frozen)
    yield Phase("loss", tuple(loss))

    if again == layers:
        one = layer_activations(recipe) - layer_input(recipe)
        backward.append(Part("one layer again", one, "what it keeps, computed from its input"))
    backward.append(_widest(recipe))
    if recipe.model.tie_word_embeddings and not frozen and layout.pipeline == 1:  # one weight has two gradients
        backward.append(Part("output layer's gradient", vocabulary, "waits for the embedding's"))
    yield Phase("backward", tuple(backward))

    if stage == 0 and layout.pipeline > 1 and not frozen:  # without a pipeline the loss takes more
        yield Phase("embedding", (Part("embedding's gradient", vocabulary, "before it is added in fp32"),))


class Shape(NamedTuple):
    """Sizes of a layer on one device."""

    tokens: int  # of a micro batch, in this device's part of the sequence
    positions: int  # of one pack, likewise
    element: int  # bytes of a weight and of an activation
    tensor: int  # tensor parallel size, with sequence parallelism (flags.py)


def shape_of(recipe: Recipe) -> Shape:
    positions = recipe.data.seq_length // recipe.parallel.context
    element = 2 if recipe.train.precision == "bf16" else 4
    return Shape(recipe.train.micro_batch_size * positions, positions, element, recipe.parallel.tensor)


def layer_input(recipe: Recipe) -> int:
    """Bytes of a layer's input, which is all that a recomputed layer keeps."""
    shape = shape_of(recipe)
    return shape.tokens * recipe.model.hidden_size * shape.element // shape.tensor


def layer_activations(recipe: Recipe) -> int:
    """Bytes that one layer keeps, its input included.

    A linear layer keeps its input for the gradient of its weight, or of its adapter's A; B keeps A's output.
    """
    model, shape, adapter = recipe.model, shape_of(recipe), recipe.train.lora.adapter
    linears = set(adapter.linears if adapter else LINEARS)
    norms = (2 + len(linears & {"linear_qkv", "linear_fc1"})) * model.hidden_size  # their inputs, and outputs
    wide = 2 + _keeps_product(recipe)  # npu_swiglu keeps gate and up
    inner = adapter.rank * len(linears) if adapter else 0
    kept = norms + _attention(recipe, "linear_proj" in linears) + wide * model.ffn_hidden_size + inner
    # in fp32: a number for each norm, and of npu_fusion_attention
    statistics = 2 * 4 + 2 * STATISTICS * 4 * model.num_attention_heads
    angles = 4 * shape.positions * model.kv_channels * shape.element  # cos and sin, for query and key; on every TP rank
    return shape.tokens * (kept * shape.element + statistics) // shape.tensor + angles


def _widest(recipe: Recipe) -> Part:
    """What a layer does not keep, at its widest point, the gradient that bypasses the MLP (h) included.

    In the backward pass at npu_swiglu gradients of its output (f) and input (2 f), and linear_fc2's input (f) where it
    has been recomputed; one that was kept is freed. In the forward pass, where linear_fc1 has an adapter, the outputs
    of both and the scaled one or the sum (6 f), less what is kept of the MLP afterwards.
    """
    model, shape, adapter = recipe.model, shape_of(recipe), recipe.train.lora.adapter
    kept, recomputed = _keeps_product(recipe), recipe.train.recompute.activation
    name, how, wide = "gradients in a layer", "at npu_swiglu, where they are widest", 3 - kept + recomputed
    if adapter and "linear_fc1" in adapter.linears:
        name, how, wide = "outputs in a layer", "of linear_fc1 and its adapter, and their sum", 4 - kept
    size = shape.tokens * (wide * model.ffn_hidden_size + model.hidden_size) * shape.element // shape.tensor
    return Part(name, size, how)


def _keeps_product(recipe: Recipe) -> bool:
    """Whether linear_fc2 keeps its input, the product of gate and up: for its gradient, or its adapter's."""
    adapter = recipe.train.lora.adapter
    return (not adapter or "linear_fc2" in adapter.linears) and not recipe.train.recompute.activation


def _attention(recipe: Recipe, result_kept: bool) -> int:
    """Numbers that attention keeps per token; linear_proj may keep its input."""
    model, parallel = recipe.model, recipe.parallel
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    copied = model.num_query_groups not in (model.num_attention_heads, parallel.tensor)
    sliced, several = parallel.context > 1, recipe.train.micro_batch_size > 1

    kept = heads + 2 * groups  # linear_qkv's output: npu_rotary_mul keeps the key, a view of it
    kept += heads * copied  # so is the query where a device has one group, or each group one head
    kept += heads  # npu_fusion_attention: query,
    if sliced:
        kept += 2 * (heads if repeats_kv_heads(recipe) else groups)  # key and value, as ulysses exchanges them
    else:
        kept += groups + groups * several  # key; the value is a view of linear_qkv's output, but of one pack only
    kept += heads  # and its result, which linear_proj takes as it is,
    return kept + heads * (sliced and result_kept)  # or as ulysses has exchanged it
