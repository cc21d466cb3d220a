"""The whole plan of a recipe as plain values, for the tables and for --json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from statistics import median
from typing import Any, NamedTuple, Optional

from pydantic import BaseModel

from openpangu_sft.artifacts.artifact import MANIFEST, read_manifest
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.model.flops import highest_rate
from openpangu_sft.plan.choose import Choice, all_splits, choice_of, ranking
from openpangu_sft.plan.estimate import Course, course_of, disk_of, memory_of, tokens_per_iteration, warnings
from openpangu_sft.plan.memory import Part
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import ChosenRecipe, Recipe
from openpangu_sft.training.run.metrics import DeviceMemory, read_metrics
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


class Report:
    """The plan of a recipe: from the dataset's manifest, the run's metrics and recipe, and nothing else."""

    def __init__(self, recipe: Recipe, gibs: Sequence[float], tokens_per_second: Optional[float] = None) -> None:
        """Without tokens/s of the whole run those are taken that a run with these settings in paths.run has measured.

        Raises `UserError` where the dataset is incomplete.
        """
        directory = recipe.path("dataset")
        self.counts: Optional[dict[str, Any]] = None  # of the dataset; None without one, and so is `course`
        self.course: Optional[Course] = None
        self.warnings: list[str] = []
        if (directory / MANIFEST).is_file():
            dataset = read_manifest(directory, "dataset", "run make preprocess and make merge again")
            made, wanted = dataset.settings.get("data.seq_length"), recipe.data.seq_length
            if made != wanted:
                self.warnings = [f"the dataset has packs of {made} tokens, data.seq_length is {wanted} -> make merge"]
            self.counts, self.course = dataset.counts, course_of(recipe, dataset.counts)
            self.warnings += warnings(recipe, dataset.counts)
        self.recipe, self.memory, self.disk = recipe, memory_of(recipe), disk_of(recipe)
        self.parameters = parameter_count(recipe.model)  # without adapters
        self.trained = parameter_count(recipe.model, recipe.train.lora.adapter, trained=True)
        self.now = choice_of(recipe)  # the recipe as it is
        # by memory of a device in GiB: each split, in the order of `auto`
        self.best = {gib: ranking(all_splits(recipe), True, gib) for gib in gibs}
        self.speed, self.highest_rate = speed_of(recipe, tokens_per_second), highest_rate(recipe)
        self.tokens = tokens_per_iteration(recipe, self.counts)  # of an iteration, as the engine counts them
        tokens, known = recipe.train.iterations * self.tokens, self.speed.tokens
        self.seconds = tokens / known if known else None  # of all iterations, at the known rate
        self.least_seconds = tokens / self.highest_rate  # of all iterations, at MFU 100 %


def speed_of(recipe: Recipe, given: Optional[float]) -> Speed:
    """The given tokens/s, or those of the run in paths.run where it has the recipe's settings."""
    if given:
        return Speed(given, "given")
    run = recipe.path("run")
    rows = [row for row in read_metrics(run) if row["tokens"] and row["seconds"] > 0]
    if not rows:
        return Speed(None, UNKNOWN)
    try:
        made = dict(_settings(load_recipe(run / RECIPE)))
    except UserError as error:
        return Speed(None, f"{UNKNOWN}, as {run / RECIPE} is no recipe of this version: {error.what}")
    for key, value in _settings(recipe):
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


def _settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for key in DECISIVE:
        value = attrgetter(key)(recipe)
        yield from ((f"{key}.{name}", each) for name, each in value) if isinstance(value, BaseModel) else [(key, value)]


def as_json(report: Report) -> dict[str, Any]:
    """Texts, numbers and lists only; sizes in bytes."""
    recipe, memory, speed = report.recipe, report.memory, report.speed
    known = recipe.train.iterations
    return {
        "engine": recipe.train.engine,
        "parallel": {**recipe.parallel.model_dump(), "data": recipe.parallel.data},
        "parameters": report.parameters,
        "trained_parameters": report.trained,
        "memory": {
            "stage": memory.stage,
            "always": _bytes(memory.static),
            "moments": {phase.name: _bytes(phase.parts) for phase in memory.phases},
            "outside": _bytes(memory.outside),
            "peak": memory.peak,
            "needed": memory.needed,
            "fits": {f"{gib:g}": memory.verdict(gib) for gib in report.best},
            "measured": speed.memory.model_dump() if speed.memory else None,
        },
        "chosen": recipe.chosen if isinstance(recipe, ChosenRecipe) else None,
        "now": _decisive(report.now),
        "auto": {f"{gib:g}": [_decisive(one) for one in found if one.fits(gib)] for gib, found in report.best.items()},
        "dataset": report.counts,
        "course": report.course._asdict() if report.course else None,
        "warnings": report.warnings,
        "iterations": known or None,  # not known with train.epochs before the dataset is merged
        "checkpoints": report.disk._asdict() if known else None,
        "time": {
            "tokens_per_second": speed.tokens,
            "source": speed.source,
            "tokens_per_iteration": report.tokens,
            "seconds": report.seconds if known else None,
            "least_seconds": report.least_seconds if known else None,
            "highest_tokens_per_second": report.highest_rate,
        },
    }


def _decisive(choice: Choice) -> dict[str, Any]:
    sizes = {name: getattr(choice.recipe.parallel, name) for name in ("data", "context", "tensor", "pipeline")}
    recompute = choice.recipe.train.recompute.model_dump()
    figures = {"flops_per_token": choice.flops, "bytes_sent": choice.sent, "work": choice.work}
    return {**sizes, "recompute": recompute, "needed": choice.memory.needed, **figures}


def _bytes(parts: Sequence[Part]) -> dict[str, int]:
    return {part.name: part.size for part in parts}
