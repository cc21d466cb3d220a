"""What `auto` takes: of all splits of the model that fit a device, the one that takes least time by formula.

It depends on the recipe alone, so that convert, sft and plan choose alike on any machine: HCCL's buffers are counted at
their default size, and a device has `train.device_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.model.flops import flops_per_token, idle, micro_batches, recomputed_layers
from openpangu_sft.plan.memory import GIB, Memory
from openpangu_sft.plan.mindspeed_memory import HCCL_MIB, layer_input, mindspeed_memory, shape_of
from openpangu_sft.plan.transformers_memory import transformers_memory
from openpangu_sft.recipe.auto import valid_splits, with_auto_split
from openpangu_sft.recipe.schema import ChosenRecipe, Recipe
from openpangu_sft.training.mindspeed.flags import repeats_kv_heads
from openpangu_sft.util.errors import SizesUnknown

BUSY = 0.4
"""Share of a device's peak FLOP/s (train.device_tflops) at which layers are computed."""
LINK = 28e9
"""Bytes/s from one NPU to another: 392 GB/s over 7 links of HCCS, both directions together, by the data sheet. Neither
figure was measured; they weigh work against exchange.
"""


class Choice(NamedTuple):
    """A recipe with all numbers, and what decides between it and others."""

    recipe: Recipe
    memory: Memory
    work: float  # FLOPs per token, and the waiting of a pipeline's stages
    sent: dict[str, int]  # bytes by kind of parallelism, see `bytes_sent`
    seconds: float  # of an iteration, as far as splits differ

    def __str__(self) -> str:
        return f"{split_of(self.recipe)}, recompute {recomputed(self.recipe)}"

    def fits(self, gib: float) -> bool:
        """Whether a device of so many GiB holds it, with the spare share; memory of a CPU is not limited by it."""
        train = self.recipe.train
        on_cpu = train.engine == "transformers" and train.device == "cpu"
        return on_cpu or self.memory.verdict(gib) == "yes"


def split_of(recipe: Recipe) -> str:
    """Parallel sizes in short."""
    parallel = recipe.parallel
    return f"DP {parallel.data}, CP {parallel.context}, TP {parallel.tensor}, PP {parallel.pipeline}"


def recomputed(recipe: Recipe) -> str:
    """Recomputed layers, of each pipeline stage at most, and whether the others recompute their activation function."""
    recompute = recipe.train.recompute
    layers = recompute.num_layers if recompute.granularity == "full" else 0
    return f"{layers}{' + act' if recompute.activation else ''}"


def choose(recipes: Sequence[Recipe], recompute: bool) -> Recipe:
    """The best of the recipes; unchanged while sizes of the model are unknown, as then no stage can use them.

    Args:
        recompute: whether to choose recomputation, too.
    """
    with suppress(SizesUnknown):
        gib = recipes[0].train.device_memory
        best, *others = ranking(recipes, recompute, gib)
        what = f"auto, for devices of {gib:g} GiB: {best}: {best.memory.needed / GIB:.1f} GiB"
        if not best.fits(gib):
            what += "; nothing fits, this takes the least memory"
        elif others and others[0].fits(gib):
            what += f"; next {others[0]}: {others[0].seconds / best.seconds - 1:.0%} slower by formula"
        return ChosenRecipe.model_construct(**dict(best.recipe), chosen=what)
    return recipes[0]


def ranking(recipes: Sequence[Recipe], recompute: bool, gib: float) -> list[Choice]:
    """Each split with the least recomputation that fits a device, best first; those that do not fit come last.

    Less time is better, then less memory.
    """
    choices = [_least(recipe, recompute, gib) for recipe in recipes]

    def order(one: Choice) -> tuple[float, ...]:
        return (0, one.seconds, one.memory.needed) if one.fits(gib) else (1, one.memory.needed)

    return sorted(choices, key=order)


def all_splits(recipe: Recipe) -> list[Recipe]:
    """Those that `parallel: auto` would choose from; without recomputation."""
    content = recipe.model_dump()
    parallel = with_auto_split(content["parallel"])
    return valid_splits({**content, "parallel": parallel, "train": {**content["train"], "recompute": {}}})


def bytes_sent(recipe: Recipe) -> dict[str, int]:
    """Bytes that a device sends for context and tensor parallel layers in an iteration.

    Ulysses exchanges queries, keys and values, and attention's result; sequence parallelism
    gathers the input of attention and MLP and scatters their results, and gathers both inputs again in the backward
    pass. Gradients and weights are not counted: they are exchanged while layers are computed (--overlap-grad-reduce,
    --overlap-param-gather). A recomputed layer repeats its forward pass.
    """
    model, parallel, shape = recipe.model, recipe.parallel, shape_of(recipe)
    exchanged_keys = model.num_attention_heads if repeats_kv_heads(recipe) else model.num_query_groups
    heads = 2 * (model.num_attention_heads + exchanged_keys)
    values = shape.tokens * heads * model.kv_channels * shape.element // parallel.tensor
    exchanged = values * (parallel.context - 1) // parallel.context
    gathered = layer_input(recipe) * (parallel.tensor - 1)
    layers, times = layout_of(model, parallel).stages[0], micro_batches(recipe)
    forward = layers + recomputed_layers(recipe, layers)
    return {"context": (forward + layers) * exchanged * times, "tensor": (4 * forward + 6 * layers) * gathered * times}


def choice_of(recipe: Recipe) -> Choice:
    """The figures of a recipe as it is."""
    mindspeed = recipe.train.engine == "mindspeed"
    memory = mindspeed_memory(recipe, HCCL_MIB) if mindspeed else transformers_memory(recipe)
    work, sent = flops_per_token(recipe) * idle(recipe), bytes_sent(recipe)
    seconds = work * recipe.train.global_batch_size * recipe.data.seq_length / recipe.parallel.world
    seconds /= recipe.train.device_tflops * 1e12 * BUSY
    links = {kind: max(getattr(recipe.parallel, kind) - 1, 1) for kind in sent}  # each to each
    return Choice(recipe, memory, work, sent, seconds + sum(sent[kind] / (LINK * links[kind]) for kind in sent))


def _least(recipe: Recipe, recompute: bool, gib: float) -> Choice:
    """A split with the fewest recomputed layers with which it fits, or with all."""
    choice = choice_of(recipe)
    most = max(layout_of(recipe.model, recipe.parallel).stages) if recompute else -1
    mindspeed = recipe.train.engine == "mindspeed"
    for layers in range(0 if mindspeed else 1, most + 1):
        if choice.fits(gib):
            break
        update = {"granularity": "full" if layers else "none", "num_layers": layers, "activation": mindspeed}
        update = recipe.train.recompute.model_copy(update=update)
        train = recipe.train.model_copy(update={"recompute": update})
        choice = choice_of(recipe.model_copy(update={"train": train}))
    return choice
