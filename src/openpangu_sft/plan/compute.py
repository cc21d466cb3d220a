"""Operations of an iteration, and the tokens a second that they allow at most. Pure."""

from __future__ import annotations

from openpangu_sft.checkpoint.layout import hf_shapes, layout_of, parameter_count
from openpangu_sft.mindspeed.engine import model_flops_utilisation
from openpangu_sft.recipe import Recipe


def work(recipe: Recipe) -> float:
    """Operations of an iteration, relative to one that computes nothing twice.

    6 a parameter and token, as model_flops_utilisation counts them: 2 in the forward pass, 4 in the backward pass. A
    layer that is computed again takes its 2 once more; they are the first ones of each pipeline stage. Attention's own
    part, which depends on the data, is left out.
    """
    recompute = recipe.train.recompute
    again = recompute.num_layers if recompute.granularity == "full" else 0
    layers = sum(min(again, stage) for stage in layout_of(recipe.model, recipe.parallel).stages)
    return 1 + 2 * layers * layer_parameters(recipe) / (6 * parameter_count(recipe.model))


def layer_parameters(recipe: Recipe) -> int:
    """Parameters of one layer."""
    one = recipe.model.model_copy(update={"num_layers": 1})
    shapes = (shape for name, shape in hf_shapes(one).items() if name.startswith("model.layers."))
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


def highest_rate(recipe: Recipe) -> float:
    """Tokens a second that no run can pass: train.device_tflops used in full by all devices (MFU 100 %)."""
    return 1 / model_flops_utilisation(recipe, 1.0)
