"""`make report`: the page of one run, or of two.

Names, settings, questions and answers are untrusted; the charts are ours.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Callable, Optional

from markupsafe import Markup

from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.artifacts.checks import absolute, page_place
from openpangu_sft.evaluate.record import checkpoint_name, compared, perplexity
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.charts import COLOURS, charts_of
from openpangu_sft.report.run import Run, read_run
from openpangu_sft.training.run.provenance import RECIPE
from openpangu_sft.util.errors import UserError
from openpangu_sft.util.html import render_page, share

PAGE, COMPARISON = "report.html", "comparison.html"


@dataclass(frozen=True)
class Row:
    """A line of a table, with a value for each run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the values of the runs differ."""
        return len(set(self.values)) > 1


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
    write_durably(page, _render(runs))
    return page


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the absolute paths that differ."""
    ends = (["/".join(place.parts[1:][-length:]) for place in places] for length in count(1))
    return next(names for names in ends if len(set(names)) == len(names))


def _render(runs: Sequence[Run]) -> str:
    return render_page(
        Path(__file__).with_name("page.html"),
        runs=runs,
        colours=COLOURS,
        tiles=[Row(name, [figure(run) for run in runs]) for name, figure in _TILES.items()],
        charts=[(title, Markup(svg)) for title, svg in charts_of(runs)],
        data=[Row(name, [figure(run) for run in runs]) for name, figure in _DATA.items()],
        validation=_by_iteration([{place: _nats(loss) for place, loss in run.validation_losses} for run in runs]),
        scores=_by_iteration([run.evaluation.scores if run.evaluation else {} for run in runs]),
        benchmarks=_benchmarks(runs),
        answers=compared({run.name: run.evaluation for run in runs}),
        settings=_table([run.manifest.settings for run in runs]),
        inputs=_table([run.manifest.inputs for run in runs]),
        software=_table([_software(run) for run in runs]),
        commands=[_commands(run) for run in runs],
    )


def loss_of(run: Run) -> str:
    return f"{run.metrics[0]['loss']:.4f} → {run.metrics[-1]['loss']:.4f}"


def validation_loss_of(run: Run) -> str:
    losses = [f"{loss:.4f}" for _, loss in run.validation_losses]
    if not losses:
        return "not evaluated" if run.validation else "no validation split"
    return " → ".join(losses[:: max(1, len(losses) - 1)])  # the first and the last


def _duration(run: Run) -> str:
    total = sum(row["seconds"] for row in run.metrics if math.isfinite(row["seconds"]))
    minutes, seconds = divmod(round(total), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _trained(run: Run) -> str:
    lora, count = run.manifest.settings.get("train.lora"), run.manifest.counts.get("trained_parameters")
    rank = lora.get("rank") if isinstance(lora, dict) else 0
    return f"{count:,} (LoRA, rank {rank})" if rank and isinstance(count, int) else "all"


_Figures = dict[str, Callable[[Run], str]]

_TILES: _Figures = {
    "iterations": lambda run: f"{run.metrics[-1]['iteration']:,} of {run.manifest.settings['train.iterations']:,}",
    "loss": loss_of,
    "validation loss": validation_loss_of,
    "tokens/s (median)": lambda run: f"{run.median_speed:,.0f}",
    "time in iterations": _duration,
    "trained parameters": _trained,
}

_DATA: _Figures = {
    "samples": lambda run: f"{run.manifest.counts['packed']:,}",
    "packs": lambda run: f"{run.manifest.counts['packs']:,}",
    "tokens, without padding": lambda run: f"{run.manifest.counts['tokens']:,}",
    "packing efficiency": lambda run: share(
        run.manifest.counts["tokens"], run.manifest.counts["packs"] * run.manifest.settings["data.seq_length"]
    ),
    "trained tokens": lambda run: f"{run.manifest.counts['trained_tokens']:,}",
    "trained share of tokens": lambda run: share(run.manifest.counts["trained_tokens"], run.manifest.counts["tokens"]),
    "epochs": lambda run: f"{run.epochs:.2f}",
    "validation samples": lambda run: f"{run.validation.get('packed', 0):,}",
}


def _by_iteration(figures: Sequence[Mapping[int, str]]) -> list[Row]:
    """A row for each checkpoint that a run has a figure of."""
    numbers = sorted({number for each in figures for number in each})
    return [Row(checkpoint_name(number), [each.get(number, "") for each in figures]) for number in numbers]


def _benchmarks(runs: Sequence[Run]) -> dict[str, list[Row]]:
    found = [run.evaluation.benchmarks if run.evaluation else {} for run in runs]
    return {label: _by_iteration([each.get(label, {}) for each in found]) for each in found for label in each}


def _nats(loss: float) -> str:
    return f"{loss:.4f}" + (f" (perplexity {there})" if (there := perplexity(loss)) else "")


def _table(columns: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each name that any column has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [_value(column[name]) if name in column else "" for column in columns]) for name in names]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_value(inner)}" for name, inner in value.items())
    return str(value)


def _software(run: Run) -> dict[str, str]:
    """Versions of its starts, in order where they changed; without starts, the version that began the run."""
    if not run.starts:
        return {"openpangu-sft": run.manifest.version}
    found: dict[str, dict[str, None]] = {}
    for start in run.starts:
        image = {"image": start["image"]} if start["image"] else {}
        for name, version in {**start["versions"], **image, **start["sources"]}.items():
            found.setdefault(name, {})[version] = None
    return {name: ", then ".join(versions) for name, versions in found.items()}


def _commands(run: Run) -> list[str]:
    """The command of each start, and the one that repeats the run."""
    found = [f"{one['time']}  from iteration {one['iteration']:,}:  {shlex.join(one['command'])}" for one in run.starts]
    if (recipe := run.path / RECIPE).is_file():
        found.append(f"to repeat it:  make sft RECIPE={shlex.quote(str(recipe))} SET=paths.run=…")
    return found
