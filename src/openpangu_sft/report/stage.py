"""`make report`: reads one run, or two, and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.artifacts.checks import absolute, page_place
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.page import render_report
from openpangu_sft.report.run import read_run
from openpangu_sft.util.errors import UserError

PAGE, COMPARISON = "report.html", "comparison.html"


def run_report(
    recipe: Recipe, run: Optional[Path] = None, other: Optional[Path] = None, html: Optional[Path] = None
) -> Path:
    """Writes the report of a run (default: `paths.run`), or of two to be compared; returns its path.

    Its default is report.html in the first run, comparison.html with two. Raises `UserError` where a run is missing,
    has no iteration yet or is damaged, or the page must not be written there.
    """
    places = [absolute(run or recipe.path("run")), *([absolute(other)] if other else [])]
    if other and places[0].resolve() == places[1].resolve():
        raise UserError("is the same run twice", where=other, remedy="name another one with WITH=…")
    runs = [read_run(place, name) for place, name in zip(places, _names(places))]
    page = page_place(html, places[0] / (COMPARISON if other else PAGE), inside=places[0])
    write_durably(page, render_report(runs))
    return page


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the absolute paths that differ."""
    ends = (["/".join(place.parts[1:][-length:]) for place in places] for length in count(1))
    return next(names for names in ends if len(set(names)) == len(names))
