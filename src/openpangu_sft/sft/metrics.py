"""What training leaves to look at: one line per iteration in metrics.jsonl, and the loss curve as PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS, CURVE = "metrics.jsonl", "loss.png"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All iterations so far: iteration, loss, lr, grad_norm, tokens, seconds. A line cut off by a crash is left out."""
    path = run / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_until(run: Path, iteration: int) -> None:
    """Drops what was logged after the iteration that training continues from."""
    kept = [row for row in read_metrics(run) if row["iteration"] <= iteration]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    (run / METRICS).write_text(text, "utf-8")


def append(run: Path, row: dict[str, Any]) -> None:
    """Adds an iteration."""
    with (run / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def draw_curve(run: Path) -> Path:
    """Draws loss and learning rate over iterations into loss.png."""
    import matplotlib

    matplotlib.use("agg")  # no display
    from matplotlib import pyplot

    rows = read_metrics(run)
    iterations = [row["iteration"] for row in rows]
    figure, loss_axis = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    loss_axis.plot(iterations, [row["loss"] for row in rows], color="tab:blue", linewidth=1.5)
    loss_axis.set(xlabel="iteration", title=f"{run.name}: loss per trained token")
    loss_axis.set_ylabel("loss", color="tab:blue")
    loss_axis.set_ylim(bottom=0)
    loss_axis.grid(alpha=0.3)
    rate_axis = loss_axis.twinx()
    rate_axis.plot(iterations, [row["lr"] for row in rows], color="tab:orange", linewidth=1, linestyle="--")
    rate_axis.set_ylabel("learning rate", color="tab:orange")
    rate_axis.set_ylim(bottom=0)
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    path = run / CURVE
    figure.savefig(path)
    pyplot.close(figure)
    return path
