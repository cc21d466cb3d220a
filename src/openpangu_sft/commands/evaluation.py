"""Commands that look at what training has made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.commands.base import stage
from openpangu_sft.errors import printable
from openpangu_sft.evaluate.record import EVALUATION, Evaluation, Result
from openpangu_sft.recipe_file import load_recipe
from openpangu_sft.tables import print_rows, stdout


@stage("evaluate")
@click.option("--prompts", type=Path, metavar="FILE", help="questions: .txt, a line each, or conversations")
@click.option("--iteration", metavar="N", help="of the run, or all  [default: the newest]")
def evaluate_command(
    recipe_file: Path, overrides: tuple[str, ...], prompts: Optional[Path], iteration: Optional[str]
) -> None:
    """Loss on held-out conversations, and answers.

    Before training and after.

    \b
    Example: openpangu-sft evaluate --iteration all --prompts prompts.txt
    """
    from openpangu_sft.evaluate.stage import run_evaluate

    recipe = load_recipe(recipe_file, overrides)
    _show(run_evaluate(recipe, prompts, iteration), recipe.path("run"))


@stage("report")
@click.option("--run", type=Path, metavar="DIRECTORY", help="of a run  [default: paths.run of the recipe]")
@click.option("--with", "other", type=Path, metavar="DIRECTORY", help="of a second run, to show beside it")
@click.option("--html", type=Path, metavar="FILE", help="the page  [default: report.html in the run]")
def report_command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    run: Optional[Path],
    other: Optional[Path],
    html: Optional[Path],
) -> None:
    """One page about a run, or about two.

    Curves, data, answers, and what made it; or two runs side by side.

    \b
    Example: openpangu-sft report --run /cache/sft_outputs --with /cache/sft_lower_lr
    """
    from openpangu_sft.report.stage import run_report

    print(run_report(load_recipe(recipe_file, overrides), run, other, html))


def _show(evaluation: Evaluation, run: Path) -> None:
    """Prints a line for each checkpoint, then what was asked and answered first and last."""
    console = stdout()
    held_out = evaluation.held_out
    if held_out:
        print_rows(
            f"{held_out['packed']:,} held-out samples, {held_out['trained_tokens']:,} trained tokens",
            ("checkpoint", "loss", "perplexity"),
            [(_name(result), *_loss(result.loss)) for result in evaluation.results],
            console,
        )
    answered = evaluation.answered
    ends = answered[:: max(1, len(answered) - 1)][:2]  # what it began with, and the newest
    for number, question in enumerate(evaluation.questions):
        lines = [(role, content) for role, content in question.turns]
        lines += [("reference", question.reference)] if question.reference else []
        lines += [(_name(result), result.answers[number]) for result in ends]
        console.print(f"\n{question.source}", style="bold", markup=False)
        for name, text in lines:
            console.print(f"{name}: {_readable(text) or '(nothing)'}", markup=False, soft_wrap=True)
    console.print(f"\nall of it: {printable(str(run / EVALUATION))}", markup=False, soft_wrap=True)


def _name(result: Result) -> str:
    return f"iteration {result.iteration}" if result.iteration else "before training"


def _loss(loss: Optional[float]) -> tuple[str, str]:
    if loss is None:
        return "", ""
    if not math.isfinite(loss):
        return f"{loss}", f"{loss}"
    return f"{loss:.4f}", f"{math.exp(loss):,.2f}" if loss < 50 else "above 10^21"


def _readable(text: str) -> str:
    """A text with its lines, and without what a terminal would act on."""
    return "\n".join(printable(line) for line in text.split("\n"))
