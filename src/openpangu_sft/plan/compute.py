"""Operations of an iteration, and the time that follows from tokens a second. Pure, but for reading a run's metrics."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple, Optional

from openpangu_sft.checkpoint.layout import hf_shapes, parameter_count
from openpangu_sft.mindspeed.engine import model_flops_utilisation
from openpangu_sft.recipe import Recipe
from openpangu_sft.sft.metrics import read_metrics


class Speed(NamedTuple):
    """Tokens a second of a whole run, over all devices.

    Args:
        tokens: a second; None where nobody knows.
        source: given, measured or unknown.
        per_iteration: tokens of an iteration, counted as the rate counts them.
    """

    tokens: Optional[float]
    source: str
    per_iteration: float


def work(recipe: Recipe) -> float:
    """Operations of an iteration, relative to one that computes nothing twice.

    6 a parameter and token, as model_flops_utilisation counts them: 2 in the forward pass, 4 in the backward pass. A
    layer that is computed again takes its 2 once more. Attention's own part, which depends on the data, is left out.
    """
    recompute = recipe.train.recompute
    layers = recompute.num_layers if recompute.granularity == "full" else 0
    if recipe.train.engine == "mindspeed":
        stages = recipe.parallel.num_layer_list or [recipe.model.num_layers // recipe.parallel.pipeline]
        layers = min(layers, max(stages)) * recipe.parallel.pipeline
    layers = min(layers, recipe.model.num_layers)
    return 1 + 2 * layers * layer_parameters(recipe) / (6 * parameter_count(recipe.model))


def layer_parameters(recipe: Recipe) -> int:
    """Parameters of one layer."""
    shapes = (shape for name, shape in hf_shapes(recipe.model).items() if name.startswith("model.layers.0."))
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


def highest_rate(recipe: Recipe) -> float:
    """Tokens a second that no run can pass: train.device_tflops used in full by all devices (MFU 100 %)."""
    return 1 / model_flops_utilisation(recipe, 1.0)


def speed_of(recipe: Recipe, given: Optional[float], counts: Optional[dict[str, Any]]) -> Speed:
    """The rate that is given, or that of the run's metrics so far.

    Args:
        recipe: for paths.run.
        given: tokens a second, from the command line.
        counts: of the dataset's manifest, if there is one.
    """
    batch, seq_length = recipe.train.global_batch_size, recipe.data.seq_length
    # the portable engine counts padding, the other does not know where it is and takes the data's mean
    padded = counts is None or recipe.train.engine == "transformers"
    per_iteration = batch * (seq_length if padded or counts is None else counts["tokens"] / counts["packs"])
    if given:
        return Speed(given, "given", per_iteration)
    rows = [row for row in read_metrics(recipe.path("run")) if row.get("tokens") and row.get("seconds")]
    if not rows:
        return Speed(None, "unknown", per_iteration)
    later = rows[1:] or rows  # the first iteration compiles and allocates
    rate = median(row["tokens"] / row["seconds"] for row in later)
    return Speed(rate, f"measured, median of {len(later)} iterations", median(row["tokens"] for row in later))
