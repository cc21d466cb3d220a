"""What a run has left, read for its report. Only metrics are required."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Optional

from openpangu_sft.artifacts.artifact import Manifest, read_manifest
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.evaluate.record import Evaluation, read_evaluation
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.run.provenance import read_starts
from openpangu_sft.util.errors import UserError


@dataclass(frozen=True)
class Run:
    """A run."""

    name: str  # on the page
    path: Path
    manifest: Manifest
    metrics: list[dict[str, Any]]  # of each iteration: iteration, loss, lr, grad_norm, tokens, seconds
    starts: list[dict[str, Any]]  # see training/run/provenance.py; empty for a run of version 0.4.0 or before
    evaluation: Optional[Evaluation]  # None before make evaluate

    @cached_property
    def speed(self) -> list[float]:
        """Tokens/s of each iteration, as the engine counts them; NaN where its time is not known."""
        return [row["tokens"] / row["seconds"] if row["seconds"] > 0 else math.nan for row in self.metrics]

    @property
    def median_speed(self) -> float:
        """Tokens/s; the first iteration, which warms up, does not count if there are more."""
        known = [speed for speed in self.speed[1:] or self.speed if math.isfinite(speed)]
        return median(known) if known else math.nan

    @property
    def epochs(self) -> float:
        """Epochs trained so far."""
        packs = len(self.metrics) * self.manifest.settings["train.global_batch_size"]
        return float(packs / max(self.manifest.counts["packs"], 1))

    @property
    def validation(self) -> dict[str, int]:
        """Counts of the validation split; empty without one."""
        found: dict[str, int] = self.manifest.counts.get(VALIDATION, {})
        return found

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """Iteration and loss of every evaluation, in training or after it; 0 is before training."""
        found = {row["iteration"]: row["validation"] for row in self.metrics if "validation" in row}
        for result in self.evaluation.results if self.evaluation else []:
            if result.loss is not None:
                found[result.iteration] = result.loss
        return sorted(found.items())

    @property
    def overfitted(self) -> bool:
        """Whether validation loss has risen while training loss has fallen."""
        losses = [loss for _, loss in self.validation_losses]
        return len(losses) > 1 and losses[-1] > losses[0] and self.metrics[-1]["loss"] < self.metrics[0]["loss"]


def read_run(path: Path, name: str = "") -> Run:
    """Reads a run, which is called by the name of its directory by default.

    Raises `UserError` where there is none, it has no iteration yet, or a file of it is damaged.
    """
    manifest = read_manifest(path, "run", "give the directory of a run, paths.run of its recipe")
    metrics = read_metrics(path)
    if not metrics:
        raise UserError("no iteration yet", where=path, remedy="run make sft, or check paths.run")
    return Run(name or path.name, path, manifest, metrics, read_starts(path), read_evaluation(path))
