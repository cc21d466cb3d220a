"""Curves as inline SVG: colours that are readable on light and on dark pages, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from openpangu_sft.report.run import Run

MOST_POINTS = 2000  # in a curve; of a longer run the mean of neighbours is drawn
COLOURS = ("#3f7fe0", "#e0762a")  # of the first run and of the second
QUIET = "#7a8494"  # axes and text: 3.8 to 1 on white, 4.2 to 1 on the page's dark


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    colour: str
    iterations: npt.NDArray[np.int64]  # [points]
    values: npt.NDArray[np.float64]  # [points]
    marks: Sequence[tuple[int, float]] = ()  # (iteration, value) of single points, drawn as dots: validation loss


def charts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and SVG of each chart: loss, learning rate, gradient norm, speed."""
    coloured = list(zip(runs, COLOURS))

    def curves(name: str) -> list[Curve]:
        return [thinned(run, colour, [row[name] for row in run.metrics]) for run, colour in coloured]

    losses = [replace(curve, marks=run.validation_losses) for run, curve in zip(runs, curves("loss"))]
    dots = "; dots: validation loss" if any(run.validation_losses for run in runs) else ""
    return [
        (f"Loss per trained token{dots}", _draw("loss", losses, from_zero=False)),
        ("Gradient norm", _draw("norm", curves("grad_norm"))),
        ("Learning rate", _draw("rate", curves("lr"))),
        ("Tokens/s", _draw("tokens/s", [thinned(run, colour, run.speed) for run, colour in coloured])),
    ]


def thinned(run: Run, colour: str, values: Sequence[float]) -> Curve:
    """A curve of a run's values, one for each iteration; of a long run neighbours are one point, their mean."""
    iterations = np.array([row["iteration"] for row in run.metrics], np.int64)
    numbers = np.array(values, np.float64)
    step = -(-len(numbers) // MOST_POINTS)
    if step > 1:
        begins = np.arange(0, len(numbers), step)
        sizes = np.diff([*begins, len(numbers)])
        numbers, iterations = np.add.reduceat(numbers, begins) / sizes, iterations[begins]
    return Curve(colour, iterations, numbers)


def _draw(label: str, curves: Sequence[Curve], from_zero: bool = True) -> str:
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure

    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), QUIET)
    style |= {"xtick.color": QUIET, "ytick.color": QUIET, "svg.fonttype": "none", "svg.hashsalt": label}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axis = figure.subplots()
        for curve in curves:
            axis.plot(curve.iterations, curve.values, color=curve.colour, linewidth=1.4)
            if curve.marks:
                axis.plot(*zip(*curve.marks), "o", color=curve.colour, markersize=5)
        axis.set(xlabel="iteration", ylabel=label)
        values = [value for curve in curves for value in (*curve.values, *(mark for _, mark in curve.marks))]
        # NaN leaves a gap; beyond 1e300 there would be no numbers left for the axis
        finite = [value for value in values if abs(value) < 1e300]
        lowest, highest = min(finite, default=0), max(finite, default=1)
        if from_zero:
            axis.set_ylim(min(lowest, 0), highest * 1.05 if highest > 0 else 1)
        else:
            margin = 0.05 * (highest - lowest) or 0.05 * abs(highest) or 1
            axis.set_ylim(lowest - margin, highest + margin)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue(), label)


def _inline(document: str, label: str) -> str:
    """The svg element alone, as wide as its container; its identifiers differ from those of other charts."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"|height="[^"]*pt" width="[^"]*pt"', 'width="100%"', svg, count=1)
    own = re.sub(r"\W", "", label)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
