"""Model FLOPs of training: 6 per parameter and token, 2 in the forward pass and 4 in the backward pass.

As in PaLM, appendix B, without the term for attention, whose length differs from segment to segment.
"""

from __future__ import annotations

from openpangu_sft.checkpoint.sharding import layout_of, parameter_count
from openpangu_sft.recipe.schema import Recipe


def model_flops_utilisation(recipe: Recipe, tokens_per_second: float) -> float:
    """MFU: model FLOP/s as a share of the peak of all devices (`train.device_tflops`)."""
    done = 6 * parameter_count(recipe.model) * tokens_per_second
    return done / (recipe.parallel.world * recipe.train.device_tflops * 1e12)


def highest_rate(recipe: Recipe) -> float:
    """Tokens/s at an MFU of 100 %: an upper bound of any run."""
    return 1 / model_flops_utilisation(recipe, 1.0)


def work(recipe: Recipe) -> float:
    """FLOPs of an iteration relative to one without recomputation: a recomputed layer takes its forward 2 again."""
    layers = sum(recomputed_layers(recipe, stage) for stage in layout_of(recipe.model, recipe.parallel).stages)
    return 1 + 2 * layers * layer_parameters(recipe) / (6 * parameter_count(recipe.model))


def recomputed_layers(recipe: Recipe, layers: int) -> int:
    """Recomputed layers of a pipeline stage with so many: its first ones."""
    recompute = recipe.train.recompute
    return min(recompute.num_layers, layers) if recompute.granularity == "full" else 0


def layer_parameters(recipe: Recipe) -> int:
    """Parameters of one layer."""
    one, none = (recipe.model.model_copy(update={"num_layers": layers}) for layers in (1, 0))
    return parameter_count(one) - parameter_count(none)
