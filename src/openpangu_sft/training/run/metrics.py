"""Metrics of a run: one line per iteration in metrics.jsonl, and the loss curve loss.png.

And what is measured on the way: device memory, once in a start of training, and how far a step is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, Field

from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.util.console import console, say
from openpangu_sft.util.jsonl import add_line, read_lines

METRICS, CURVE = "metrics.jsonl", "loss.png"

MEASURED_AFTER = 2
"""Iterations of a start after which memory is measured: Adam's moments are allocated at the end of the first one."""
LOW_MEMORY = 0.05
"""Share of a device below which a warning is printed: later allocations fragment. A choice, not a measurement."""
LESS_MEMORY = "recompute more (train.recompute), split the model further (parallel) or lower data.seq_length"
LESS_MEMORY += "; see make plan"
SLOW = 5.0
"""Seconds after which the micro batches of a step are shown."""

_MIB, _GIB = 1 << 20, 1 << 30


class DeviceMemory(BaseModel):
    """In bytes, of the device where each is worst."""

    peak: int  # of tensors, since the start
    left: int  # of the device beside this peak and what other libraries hold: HCCL, CANN, CUDA
    total: int  # of the device, as its driver counts

    def __str__(self) -> str:
        left = f"{self.left / _GIB:.1f} of {self.total / _GIB:.1f} GiB left"
        return f"peak {self.peak / _GIB:.1f} GiB of tensors measured, {left}"

    def show(self, planned: int) -> None:
        """Beside the planned peak of tensors in bytes, 0 if it is not known; with a warning where little is left."""
        say(f"device memory: {self}" + (f"; planned: {planned / _GIB:.1f} GiB" if planned else ""))
        if self.left < LOW_MEMORY * self.total:
            what = f"less than {LOW_MEMORY:.0%} of a device is left: a later iteration may run out of memory"
            console.print(f"{what} -> {LESS_MEMORY}", style="yellow", soft_wrap=True)


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


def measure(device: str = "cuda") -> DeviceMemory:
    """Memory of torch.cuda's current device, the worst over all processes, which exchange it on `device`.

    The caching allocator's unused blocks count as left: it returns them before it fails.
    """
    import torch
    from torch import distributed

    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    left = free + torch.cuda.memory_reserved() - peak
    # in MiB, which fp32 holds exactly: HCCL has no maximum of int64
    worst = torch.tensor([peak // _MIB, -left // _MIB, -total // _MIB], dtype=torch.float32, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(worst, distributed.ReduceOp.MAX)
    peak, left, total = (int(mib) * _MIB for mib in worst.tolist())
    return DeviceMemory(peak=peak, left=-left, total=-total)


class Step:
    """The micro batches of one iteration. One that has none yet has not begun, or is not known."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, note: str = "") -> None:
        """`note` is that of the step before."""
        self.began, self.done, self.size, self._note = time.monotonic(), 0, 0, note
        self._first = 0, self.began  # micro batches done when they were first counted, and when that was

    def update(self, done: int, size: int) -> str:
        """So many of its micro batches are done; returns a note for the progress bar."""
        if not self.done:
            self._first = done, time.monotonic()
        self.done, self.size = done, size
        slow = time.monotonic() - self.began > SLOW
        return ", ".join(filter(None, [self._note, f"micro-batch {done}/{size}" if slow else ""]))

    def stopping(self) -> str:
        """What to tell after the first signal."""
        seconds = 0.0
        if self.done and (since := self.done - self._first[0]):
            seconds = (time.monotonic() - self._first[1]) / since * (self.size - self.done)
        when = f", in about {seconds:.0f} s" if seconds >= 1 else ""
        return f"stopping: saves after this step{when} (again: stops now, unsaved)"
