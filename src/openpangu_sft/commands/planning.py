"""Command before a run: plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.commands.base import stage
from openpangu_sft.recipe_file import load_recipe
from openpangu_sft.tables import stdout

MEMORY = (32.0, 64.0)
"""GiB of the NPUs that there are."""


class Number(click.ParamType):
    """A number in a range; not a number is in none."""

    name = "number"

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def convert(self, value: str, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most:
            self.fail(f"{value!r} is not a number from {self.least:g} to {self.most:g}", param, ctx)
        return number


@stage("plan")
@click.option("--memory", type=Number(0.1, 1e5), help="GiB of a device; default: 32 and 64, both shown")
@click.option(
    "--tokens-per-second", type=Number(0.001, 1e12), help="of the whole run; default: what the run has measured so far"
)
@click.option("--json", "as_text", is_flag=True, help="all figures as JSON on stdout, sizes in bytes")
def plan_command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    memory: Optional[float],
    tokens_per_second: Optional[float],
    as_text: bool,
) -> None:
    """Before a run: what it will need.

    Memory by part and whether it fits, epochs, disk, time.

    \b
    Example: openpangu-sft plan --memory 64 --set train.recompute.granularity=none
    """
    from openpangu_sft.plan.report import as_json, make_report
    from openpangu_sft.plan.show import show_report

    report = make_report(load_recipe(recipe_file, overrides), [memory] if memory else MEMORY, tokens_per_second)
    if as_text:
        print(json.dumps(as_json(report), ensure_ascii=False, indent=1))
    else:
        show_report(report, stdout())
