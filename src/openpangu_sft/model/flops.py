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


def flops_per_token(recipe: Recipe, trained: float = 1.0) -> float:
    """FLOPs of an iteration per token, recomputation included: a recomputed layer takes its forward 2 again.

    Args:
        trained: share of the tokens that are targets: output layer and loss are computed for them only.
    """
    model, stages = recipe.model, layout_of(recipe.model, recipe.parallel).stages
    again = sum(recomputed_layers(recipe, stage) for stage in stages)
    output = model.vocab_size * model.hidden_size
    return (6 * model.num_layers + 2 * again) * layer_parameters(recipe) + 6 * trained * output


def idle(recipe: Recipe) -> float:
    """Time of a pipeline's iteration relative to that of equal stages that never wait: (m + PP - 1) / m, and the share
    of the slowest stage. 1 without a pipeline.
    """
    parallel, output = recipe.parallel, 6 * recipe.model.vocab_size * recipe.model.hidden_size
    each = layer_parameters(recipe)
    stages = [(6 * n + 2 * recomputed_layers(recipe, n)) * each for n in layout_of(recipe.model, parallel).stages]
    stages[-1] += output
    waiting = parallel.pipeline - 1
    return (1 + waiting / micro_batches(recipe)) * max(stages) * len(stages) / sum(stages)


def micro_batches(recipe: Recipe) -> int:
    """Of an iteration, in each data-parallel replica."""
    return recipe.train.global_batch_size // (recipe.train.micro_batch_size * recipe.parallel.data)


def recomputed_layers(recipe: Recipe, layers: int) -> int:
    """Recomputed layers of a pipeline stage with so many: its first ones."""
    recompute = recipe.train.recompute
    return min(recompute.num_layers, layers) if recompute.granularity == "full" else 0


def layer_parameters(recipe: Recipe) -> int:
    """Parameters of one layer."""
    one, none = (recipe.model.model_copy(update={"num_layers": layers}) for layers in (1, 0))
    return parameter_count(one) - parameter_count(none)
