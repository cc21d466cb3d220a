"""Curves as inline SVG: colours that are readable on light and on dark pages, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from openpangu_sft.report.run import Run

MOST_POINTS = 2000  # in a curve; of a longer run the mean of neighbours is drawn
COLOURS = ("#3f7fe0", "#e0762a")  # of the first run and of the second
QUIET = "#7a8494"  # axes and text: 3.8 to 1 on white, 4.2 to 1 on the page's dark

Array = npt.NDArray[Any]


def charts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and SVG of each chart: loss, learning rate, gradient norm, speed."""

    def values(name: str) -> list[list[float]]:
        return [[row[name] for row in run.metrics] for run in runs]

    dots = "; dots: validation loss" if any(run.validation_losses for run in runs) else ""
    return [
        (f"Loss per trained token{dots}", _draw("loss", runs, values("loss"), losses=True)),
        ("Gradient norm", _draw("norm", runs, values("grad_norm"))),
        ("Learning rate", _draw("rate", runs, values("lr"))),
        ("Tokens/s", _draw("tokens/s", runs, [run.speed for run in runs])),
    ]


def thinned(run: Run, values: Sequence[float]) -> tuple[Array, Array]:
    """Iterations and values of a curve, one of each iteration; of a long run neighbours are one point, their mean."""
    begins = np.arange(0, len(values), -(-len(values) // MOST_POINTS))
    means = np.add.reduceat(np.array(values, np.float64), begins) / np.diff([*begins, len(values)])
    return np.array([run.metrics[begin]["iteration"] for begin in begins]), means


def _draw(label: str, runs: Sequence[Run], values: Sequence[Sequence[float]], losses: bool = False) -> str:
    """A curve for each run; of losses with dots, their validation losses, and on an axis that need not begin at 0."""
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure

    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), QUIET)
    style |= {"xtick.color": QUIET, "ytick.color": QUIET, "svg.fonttype": "none", "svg.hashsalt": label}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axis = figure.subplots()
        for run, curve, colour in zip(runs, values, COLOURS):
            iterations, numbers = thinned(run, curve)
            # NaN leaves a gap; beyond 1e300 there would be no numbers left for the axis
            axis.plot(iterations, np.where(abs(numbers) < 1e300, numbers, np.nan), color=colour, linewidth=1.4)
            if marks := [one for one in run.validation_losses if losses and abs(one[1]) < 1e300]:
                axis.plot(*zip(*marks), "o", color=colour, markersize=5)
        if not losses:
            axis.set_ylim(bottom=min(axis.dataLim.y0, 0))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue(), label)


def _inline(document: str, label: str) -> str:
    """The svg element alone; its identifiers differ from those of other charts."""
    svg = document[document.index("<svg") :]
    own = re.sub(r"\W", "", label)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
