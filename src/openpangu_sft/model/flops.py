"""Model FLOPs of training per token: 4 for each parameter, and 2 for each that is trained.

That is 2 in the forward pass, 2 for the gradient of a layer's input, and 2 for the gradient of its weight: 6 in full
fine-tuning, 4 for the frozen weights of LoRA.

As in PaLM, appendix B, without the term for attention, whose length differs from segment to segment.
"""

from __future__ import annotations

from openpangu_sft.checkpoint.sharding import layout_of, parameter_count
from openpangu_sft.recipe.schema import Recipe


def highest_rate(recipe: Recipe) -> float:
    """Tokens/s at an MFU of 100 %, an upper bound of any run: model FLOPs at the peak of all devices
    (`train.device_tflops`).
    """
    model, adapter = recipe.model, recipe.train.lora.adapter
    work = 4 * parameter_count(model, adapter) + 2 * parameter_count(model, adapter, trained=True)
    return recipe.parallel.world * recipe.train.device_tflops * 1e12 / work


def flops_per_token(recipe: Recipe, trained: float = 1.0) -> float:
    """FLOPs of an iteration per token, recomputation included: a recomputed layer takes its forward 2 again.

    Args:
        trained: share of the tokens that are targets: output layer and loss are computed for them only.
    """
    stages = layout_of(recipe.model, recipe.parallel).stages
    layers = sum(_layers_flops(recipe, stage) for stage in stages)
    return layers + trained * _output_flops(recipe)


def idle(recipe: Recipe) -> float:
    """Time of a pipeline's iteration relative to that of equal stages that never wait: (m + PP - 1) / m, and the share
    of the slowest stage. 1 without a pipeline.
    """
    stages = [_layers_flops(recipe, layers) for layers in layout_of(recipe.model, recipe.parallel).stages]
    stages[-1] += _output_flops(recipe)
    waiting = recipe.parallel.pipeline - 1
    return (1 + waiting / micro_batches(recipe)) * max(stages) * len(stages) / sum(stages)


def micro_batches(recipe: Recipe) -> int:
    """Of an iteration, in each data-parallel replica."""
    return recipe.train.global_batch_size // (recipe.train.micro_batch_size * recipe.parallel.data)


def recomputed_layers(recipe: Recipe, layers: int) -> int:
    """Recomputed layers of a pipeline stage with so many: its first ones."""
    recompute = recipe.train.recompute
    return min(recompute.num_layers, layers) if recompute.granularity == "full" else 0


def layer_parameters(recipe: Recipe, trained: bool = False) -> int:
    """Parameters of one layer and its adapters, or the trained ones."""
    one, none = (recipe.model.model_copy(update={"num_layers": layers}) for layers in (1, 0))
    one_layer, rest = (parameter_count(model, recipe.train.lora.adapter, trained) for model in (one, none))
    return one_layer - rest


def _layers_flops(recipe: Recipe, layers: int) -> int:
    """Of a pipeline stage's layers, per token."""
    each, again = layer_parameters(recipe), recomputed_layers(recipe, layers)
    return layers * (4 * each + 2 * layer_parameters(recipe, trained=True)) + again * 2 * each


def _output_flops(recipe: Recipe) -> int:
    return (4 if recipe.train.lora.adapter else 6) * recipe.model.vocab_size * recipe.model.hidden_size
