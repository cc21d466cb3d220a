"""Curves as SVG that stands inside a page: colours that can be read on light and on dark, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from openpangu_sft.report.run import Run

MOST_POINTS = 2000
"""In a curve; of a longer run neighbours are drawn as their mean."""

COLOURS = ("#3f7fe0", "#e0762a")
"""Of the first run and of the second."""

QUIET = "#7a8494"
"""Axes and text: 3.8 to 1 on white, 4.2 to 1 on the page's dark."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        name: of the run.
        colour: of the line.
        iterations: int64 [points].
        values: float64 [points].
        marks: (iteration, value) of single points, drawn as dots: validation loss.
    """

    name: str
    colour: str
    iterations: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    marks: Sequence[tuple[int, float]] = field(default=())


def charts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and SVG of each chart: loss, learning rate, gradient norm, speed."""
    losses = [_curve(run, colour, "loss", run.validation_losses) for run, colour in zip(runs, COLOURS)]
    dots = "; dots: validation loss" if any(run.validation_losses for run in runs) else ""
    return [
        (f"Loss per trained token{dots}", _draw("loss", losses)),
        ("Gradient norm", _draw("norm", [_curve(run, c, "grad_norm") for run, c in zip(runs, COLOURS)])),
        ("Learning rate", _draw("rate", [_curve(run, c, "lr") for run, c in zip(runs, COLOURS)])),
        ("Tokens a second", _draw("tokens/s", [_speed(run, c) for run, c in zip(runs, COLOURS)])),
    ]


def _curve(run: Run, colour: str, name: str, marks: Sequence[tuple[int, float]] = ()) -> Curve:
    return thinned(run, colour, [row[name] for row in run.metrics], marks)


def _speed(run: Run, colour: str) -> Curve:
    return thinned(run, colour, run.speed)


def thinned(run: Run, colour: str, values: Sequence[float], marks: Sequence[tuple[int, float]] = ()) -> Curve:
    """A curve of a run's values, one for each iteration; of a long run neighbours are one point, their mean."""
    iterations = np.array([row["iteration"] for row in run.metrics], np.int64)
    numbers = np.array(values, np.float64)
    step = -(-len(numbers) // MOST_POINTS)
    if step > 1:
        begins = np.arange(0, len(numbers), step)
        sizes = np.diff([*begins, len(numbers)])
        numbers, iterations = np.add.reduceat(numbers, begins) / sizes, iterations[begins]
    return Curve(run.name, colour, iterations, numbers, marks)


def _draw(label: str, curves: Sequence[Curve]) -> str:
    import matplotlib

    matplotlib.use("agg")  # no display
    from matplotlib import pyplot, ticker

    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), QUIET)
    style |= {"xtick.color": QUIET, "ytick.color": QUIET, "svg.fonttype": "none", "svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
        for curve in curves:
            axis.plot(curve.iterations, curve.values, color=curve.colour, linewidth=1.4)
            if curve.marks:
                axis.plot(*zip(*curve.marks), "o", color=curve.colour, markersize=5)
        axis.set(xlabel="iteration", ylabel=label)
        values = [value for curve in curves for value in (*curve.values, *(mark for _, mark in curve.marks))]
        # a gradient norm that is no number leaves a gap, and above the largest there have to be numbers for the axis
        finite = [value for value in values if abs(value) < 1e300]
        axis.set_ylim(min(0, *finite, 0), max([value * 1.05 for value in finite if value > 0], default=1))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return _inline(stream.getvalue(), label)


def _inline(document: str, label: str) -> str:
    """The svg element alone, as wide as its place; identifiers are made different from those of other charts."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"|height="[^"]*pt" width="[^"]*pt"', 'width="100%"', svg, count=1)
    own = re.sub(r"\W", "", label)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
