"""Tokens/s of a run, given or measured by an earlier run with the same settings, and that run's device memory."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from statistics import median
from typing import Any, NamedTuple, Optional

from pydantic import BaseModel

from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.memory import DeviceMemory
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.run.provenance import RECIPE, read_starts
from openpangu_sft.util.errors import UserError

UNKNOWN = "unknown"
DECISIVE = [f"train.{name}" for name in ("engine", "device", "precision", "loss")]
DECISIVE += ["model", "parallel", "data.seq_length", "train.recompute", "train.lora"]
DECISIVE += [f"train.{name}" for name in ("micro_batch_size", "global_batch_size", "upstream_flags")]
"""Settings and whole sections that the speed of a run depends on; the first one that differs is named."""


class Speed(NamedTuple):
    """Tokens/s over all devices, None where unknown; and its source: given, measured, or why it is unknown."""

    tokens: Optional[float]
    source: str
    memory: Optional[DeviceMemory] = None  # measured by the same run, where it had devices


def speed_of(recipe: Recipe, given: Optional[float]) -> Speed:
    """The given tokens/s, or those of the run in paths.run where it has the recipe's settings."""
    if given:
        return Speed(given, "given")
    run = recipe.path("run")
    rows = [row for row in read_metrics(run) if row["tokens"] and row["seconds"] > 0]
    if not rows:
        return Speed(None, UNKNOWN)
    try:
        made = dict(_decisive(load_recipe(run / RECIPE)))
    except UserError as error:
        return Speed(None, f"{UNKNOWN}, as {run / RECIPE} is no recipe of this version: {error.what}")
    for key, value in _decisive(recipe):
        if made[key] != value:
            return Speed(None, f"{UNKNOWN}, as the run in {run} was made with {key}={made[key]}, not {value}")
    # a run may resume with other settings; its recipe is that of its last start
    last = max((start["iteration"] for start in read_starts(run)[-1:]), default=0)
    rows = [row for row in rows if row["iteration"] > last]
    if not rows:
        return Speed(None, UNKNOWN)
    later = rows[1:] or rows  # the first iteration compiles and allocates
    rate = median(row["tokens"] / row["seconds"] for row in later)
    memory = next((DeviceMemory(**row["memory"]) for row in reversed(rows) if "memory" in row), None)
    return Speed(rate, f"measured, median of {len(later)} iterations", memory)


def _decisive(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Settings that the speed of a run depends on, by key."""
    for key in DECISIVE:
        value = attrgetter(key)(recipe)
        yield from ((f"{key}.{name}", each) for name, each in value) if isinstance(value, BaseModel) else [(key, value)]
