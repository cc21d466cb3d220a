"""The whole plan of a recipe, as plain values: for the tables, for --json, for whoever else asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, read_manifest
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.model.flops import highest_rate, work
from openpangu_sft.plan.course import Course, Disk, course_of, disk_of, warnings
from openpangu_sft.plan.memory import fits, memory_of, verdict
from openpangu_sft.plan.parts import Memory
from openpangu_sft.plan.search import Candidate, lighter_that_fit, nearest_that_fits, single_changes
from openpangu_sft.plan.speed import Speed, speed_of, tokens_of_an_iteration
from openpangu_sft.recipe.schema import Recipe


class Advice(NamedTuple):
    """For one size of device.

    Args:
        gib: memory of a device.
        verdict: yes, tight or no.
        nearest: what would make it fit, where it does not.
        lighter: what would fit too, and compute less or split less.
    """

    gib: float
    verdict: str
    nearest: Optional[Candidate]
    lighter: list[Candidate]


class Report(NamedTuple):
    """All that is known of a run before it begins.

    Args:
        counts: of the dataset, or None where there is none yet.
        course: what follows from them.
        warnings: one line each.
        tokens: of an iteration, as the engine counts them.
    """

    recipe: Recipe
    parameters: int
    memory: Memory
    work: float
    advice: list[Advice]
    changes: list[Candidate]
    counts: Optional[dict[str, Any]]
    course: Optional[Course]
    warnings: list[str]
    tokens: float
    speed: Speed
    highest_rate: float
    disk: Disk

    @property
    def seconds(self) -> Optional[float]:
        """Of all iterations, at the rate that is known."""
        return self._seconds(self.speed.tokens) if self.speed.tokens else None

    @property
    def least_seconds(self) -> float:
        """Of all iterations at MFU 100 %: no run can be shorter."""
        return self._seconds(self.highest_rate)

    def _seconds(self, rate: float) -> float:
        return self.recipe.train.iterations * self.tokens / rate


def make_report(recipe: Recipe, gibs: Sequence[float], tokens_per_second: Optional[float] = None) -> Report:
    """Works everything out; reads the dataset's manifest, the run's metrics and recipe, and nothing else.

    Args:
        recipe: a checked one.
        gibs: memory of the devices that are asked for, in GiB.
        tokens_per_second: of the whole run; None takes what a run with these settings in paths.run has measured.

    Raises:
        UserError: there is a dataset, but not a whole one.
    """
    dataset = _dataset(recipe)
    counts = dataset.counts if dataset else None
    memory = memory_of(recipe)
    return Report(
        recipe,
        parameter_count(recipe.model),
        memory,
        work(recipe),
        [_advice(recipe, memory, gib) for gib in gibs],
        list(single_changes(recipe)),
        counts,
        course_of(recipe, counts) if counts else None,
        _warnings(recipe, dataset),
        tokens_of_an_iteration(recipe, counts),
        speed_of(recipe, tokens_per_second),
        highest_rate(recipe),
        disk_of(recipe),
    )


def as_json(report: Report) -> dict[str, Any]:
    """The same, of texts, numbers and lists only; sizes in bytes."""
    recipe, memory, speed = report.recipe, report.memory, report.speed
    return {
        "engine": recipe.train.engine,
        "parallel": {**recipe.parallel.model_dump(), "data": recipe.parallel.data},
        "parameters": report.parameters,
        "memory": {
            "stage": memory.stage,
            "always": _bytes(memory.static),
            "moments": {moment.name: _bytes(moment.parts) for moment in memory.moments},
            "outside": _bytes(memory.outside),
            "peak": memory.peak,
            "needed": memory.needed,
            "fits": {f"{advice.gib:g}": advice.verdict for advice in report.advice},
        },
        "work": report.work,
        "changes": [_candidate(change) for change in report.changes],
        "advice": {
            f"{advice.gib:g}": {
                "nearest": _candidate(advice.nearest) if advice.nearest else None,
                "lighter": [_candidate(candidate) for candidate in advice.lighter],
            }
            for advice in report.advice
        },
        "dataset": report.counts,
        "course": report.course._asdict() if report.course else None,
        "warnings": report.warnings,
        "checkpoints": report.disk._asdict(),
        "time": {
            "tokens_per_second": speed.tokens,
            "source": speed.source,
            "tokens_per_iteration": report.tokens,
            "seconds": report.seconds,
            "least_seconds": report.least_seconds,
            "highest_tokens_per_second": report.highest_rate,
        },
    }


def _dataset(recipe: Recipe) -> Optional[Manifest]:
    directory = recipe.path("dataset")
    if not (directory / MANIFEST).is_file():
        return None
    return read_manifest(directory, "dataset", "run make preprocess and make merge again")


def _warnings(recipe: Recipe, dataset: Optional[Manifest]) -> list[str]:
    if dataset is None:
        return []
    found = []
    made = dataset.settings.get("data.seq_length")
    if made != recipe.data.seq_length:
        found.append(
            f"the dataset has packs of {made} tokens, data.seq_length is {recipe.data.seq_length} -> make merge"
        )
    return [*found, *warnings(recipe, dataset.counts)]


def _advice(recipe: Recipe, memory: Memory, gib: float) -> Advice:
    if fits(memory, gib):
        return Advice(gib, verdict(memory, gib), None, lighter_that_fit(recipe, gib))
    return Advice(gib, verdict(memory, gib), nearest_that_fits(recipe, gib), [])


def _bytes(parts: Sequence[Any]) -> dict[str, int]:
    return {part.name: part.size for part in parts}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "set": list(candidate.settings),
        "needed": candidate.memory.needed,
        "work": candidate.work,
        "converts": candidate.converts,
    }
