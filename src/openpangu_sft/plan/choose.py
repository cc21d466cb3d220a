"""What `auto` takes: of all splits of the model, the least work that fits a device.

It depends on the recipe alone, so that convert, sft and plan choose alike on any machine: HCCL's buffers are counted at
their default size, and a device has `train.device_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from pydantic import ValidationError

from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.model.flops import flops_per_token, idle, micro_batches, recomputed_layers
from openpangu_sft.plan.estimate import memory_of
from openpangu_sft.plan.memory import GIB, Memory
from openpangu_sft.plan.mindspeed_memory import HCCL_MIB, layer_input, shape_of
from openpangu_sft.recipe.auto import valid_splits, with_auto_split
from openpangu_sft.recipe.schema import ChosenRecipe, Recipe
from openpangu_sft.recipe.sections import Recompute
from openpangu_sft.training.mindspeed.flags import repeats_kv_heads
from openpangu_sft.util.errors import SizesUnknown

FLOPS_PER_BYTE = 5600
"""What an NPU could compute while it sends a byte to another one of its server: 313 TFLOP/s by 56 GB/s, both peaks."""


class Choice(NamedTuple):
    """A recipe with all numbers, and what decides between it and others."""

    recipe: Recipe
    memory: Memory
    flops: float  # per token, and the waiting of a pipeline's stages
    sent: int  # bytes, see `bytes_sent`
    work: float  # FLOPs per token, and those that could be computed while bytes are sent

    def __str__(self) -> str:
        return f"{split_of(self.recipe)}, recompute {recomputed(self.recipe)}"

    def fits(self, gib: float) -> bool:
        """Whether a device of so many GiB holds it, with the spare share; memory of a CPU is not limited by it."""
        train = self.recipe.train
        on_cpu = train.engine == "transformers" and train.device == "cpu"
        return on_cpu or self.memory.verdict(gib) == "yes"


def split_of(recipe: Recipe) -> str:
    parallel = recipe.parallel
    return f"DP {parallel.data}, CP {parallel.context}, TP {parallel.tensor}, PP {parallel.pipeline}"


def recomputed(recipe: Recipe) -> str:
    """Recomputed layers, of each pipeline stage at most, and whether the others recompute activation functions."""
    recompute = recipe.train.recompute
    layers = recompute.num_layers if recompute.granularity == "full" else 0
    return f"{layers} + act." if recompute.activation else str(layers)


def choose(recipes: Sequence[Recipe], recompute: bool) -> Recipe:
    """The best of the recipes, also of its recomputations if asked; while sizes of the model are unknown the first."""
    with suppress(SizesUnknown):
        gib = recipes[0].train.device_memory
        best, *others = ranking(recipes, recompute, gib)
        what = f"auto, for devices of {gib:g} GiB: {best}: {best.memory.needed / GIB:.1f} GiB"
        if not best.fits(gib):
            what += "; nothing fits, this takes the least memory"
        elif others and others[0].fits(gib):
            more = (others[0].memory.needed - best.memory.needed) / GIB
            work = others[0].work / best.work - 1
            what += f"; next {others[0]}: " + (f"{work:.1%} more work" if work > 0 else f"{more:.1f} GiB more")
        return ChosenRecipe.model_construct(**dict(best.recipe), chosen=what)
    return ChosenRecipe.model_construct(**dict(recipes[0]), chosen="")


def ranking(recipes: Sequence[Recipe], recompute: bool, gib: float) -> list[Choice]:
    """Each split with the least recomputation that fits a device, best first; those that do not fit come last.

    Less work is better, then less memory.
    """
    choices = [_least(recipe, recompute, gib) for recipe in recipes]
    return sorted(choices, key=lambda one: (not one.fits(gib), one.work if one.fits(gib) else 0, one.memory.needed))


def all_splits(recipe: Recipe) -> list[Recipe]:
    """Those that `parallel: auto` would choose from, which may be none; without recomputation."""
    content = recipe.model_dump()
    parallel = with_auto_split(content["parallel"])
    try:
        return valid_splits({**content, "parallel": parallel, "train": {**content["train"], "recompute": {}}})
    except ValidationError:  # a split with num_layer_list, or over machines, may be the only one
        return []


def bytes_sent(recipe: Recipe, published: bool = False) -> tuple[int, int]:
    """Bytes of an iteration that a device sends for tensor and context parallel layers: in all, and to each peer.

    Ulysses exchanges queries, keys, values and attention's result, in the published step with keys and values repeated
    for every head; sequence parallelism gathers the input of attention and MLP and scatters their results, and gathers
    both inputs again in the backward pass. Gradients and weights are not counted: they are exchanged while layers are
    computed (--overlap-grad-reduce, --overlap-param-gather). A recomputed layer repeats its forward pass.
    """
    model, parallel, shape = recipe.model, recipe.parallel, shape_of(recipe)
    repeated = published or repeats_kv_heads(recipe)
    heads = 2 * (model.num_attention_heads + (model.num_attention_heads if repeated else model.num_query_groups))
    exchanged = heads * model.kv_channels * shape.tokens * shape.element // (parallel.tensor * parallel.context)
    layers = layout_of(model, parallel).stages[0]
    forward = (layers + recomputed_layers(recipe, layers)) * micro_batches(recipe)
    backward = layers * micro_batches(recipe)
    context = exchanged * (forward + backward)
    tensor = layer_input(recipe) * (4 * forward + 6 * backward)
    peers = parallel.context - 1, parallel.tensor - 1
    return context * peers[0] + tensor * peers[1], context * bool(peers[0]) + tensor * bool(peers[1])


def choice_of(recipe: Recipe) -> Choice:
    memory = memory_of(recipe, HCCL_MIB)
    flops, (sent, to_each) = flops_per_token(recipe) * idle(recipe), bytes_sent(recipe)
    tokens = recipe.train.global_batch_size * recipe.data.seq_length / recipe.parallel.world
    return Choice(recipe, memory, flops, sent, flops + to_each * FLOPS_PER_BYTE / tokens)


def _least(recipe: Recipe, recompute: bool, gib: float) -> Choice:
    """A split with the least recomputation with which it fits, or with all: of activation functions first."""
    choice = choice_of(recipe)
    most = max(layout_of(recipe.model, recipe.parallel).stages) if recompute else -1
    adapter = recipe.train.lora.adapter  # a frozen linear_fc2 does not keep what the activation function gives
    activation = recipe.train.engine == "mindspeed" and (not adapter or "down_proj" in adapter.targets)
    for layers in range(0 if activation else 1, most + 1):
        if choice.fits(gib):
            break
        update = Recompute(granularity="full" if layers else "none", num_layers=layers, activation=activation)
        train = recipe.train.model_copy(update={"recompute": update})
        choice = choice_of(recipe.model_copy(update={"train": train}))
    return choice
