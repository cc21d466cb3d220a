"""Metrics of a run: one line per iteration in metrics.jsonl, and the loss curve loss.png."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, Field

from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.training.run.memory import DeviceMemory
from openpangu_sft.util.console import console
from openpangu_sft.util.jsonl import add_line, read_lines

METRICS, CURVE = "metrics.jsonl", "loss.png"


class Row(BaseModel):
    """An iteration, from 1. With the mindspeed engine loss and norm may be NaN."""

    iteration: Annotated[int, Field(ge=1, lt=2**53)]
    loss: float  # mean cross-entropy of trained tokens, in nats
    lr: float
    grad_norm: float  # before clipping
    tokens: Annotated[int, Field(ge=0, lt=2**53)]  # of all devices
    seconds: float
    memory: Optional[DeviceMemory] = None  # in the iteration in which it is measured
    validation: Optional[float] = None  # loss on the validation split after it, where it is evaluated

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.tokens / self.seconds:,.0f} tokens/s"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All iterations so far, each with the fields of `Row`; raises `UserError` if a line is not an iteration."""
    return read_lines(run / METRICS, Row)


def validation_losses(run: Path, last: float = math.inf) -> dict[int, float]:
    """Losses on the validation split during training that are finite, by iteration, up to the `last`."""
    found = {row["iteration"]: row.get("validation") for row in read_metrics(run) if row["iteration"] <= last}
    return {iteration: loss for iteration, loss in found.items() if loss is not None and math.isfinite(loss)}


def show_validation(losses: Mapping[int, float]) -> None:
    """Prints the last of the losses on the validation split, by iteration, on a line that stays."""
    last, best = max(losses), min(losses, key=losses.__getitem__)
    lowest = "the lowest so far" if best == last else f"lowest: {losses[best]:.4f} at iteration {best:,}"
    console.print(f"iteration {last:,}: validation loss {losses[last]:.4f} ({lowest})")


def keep_until(run: Path, iteration: int) -> None:
    """Drops what was logged after the iteration that training resumes from."""
    kept = [row for row in read_metrics(run) if row["iteration"] <= iteration]
    write_durably(run / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def append(run: Path, row: Row) -> None:
    """Adds an iteration."""
    add_line(run / METRICS, {**row.model_dump(exclude_none=True), "seconds": round(row.seconds, 4)})


def draw_curve(run: Path) -> Path:
    """Draws loss and learning rate over iterations into loss.png. The loss axis fits the data, not 0."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    rows = read_metrics(run)
    iterations = [row["iteration"] for row in rows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    loss_axis = figure.subplots()
    loss_axis.plot(iterations, [row["loss"] for row in rows], color="tab:blue", linewidth=1.5)
    loss_axis.set(xlabel="iteration", title=f"{run.name}: loss per trained token")
    loss_axis.set_ylabel("loss", color="tab:blue")
    loss_axis.grid(alpha=0.3)
    rate_axis = loss_axis.twinx()
    rate_axis.plot(iterations, [row["lr"] for row in rows], color="tab:orange", linewidth=1, linestyle="--")
    rate_axis.set_ylabel("learning rate", color="tab:orange")
    rate_axis.set_ylim(bottom=0)
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    path = run / CURVE
    figure.savefig(path)
    return path
