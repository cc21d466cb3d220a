"""Commands that report: evaluate, report, plan, doctor."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Callable, Optional

import click

from openpangu_sft.cli.options import option, stage
from openpangu_sft.evaluate.record import EVALUATION, Evaluation, checkpoint_name, compared, perplexity
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import console, print_rows, print_table, stdout
from openpangu_sft.util.errors import printable


@stage("evaluate", "--iteration all --prompts prompts.txt")
@option("--prompts", type=Path, metavar="FILE", help="questions, one per line in a .txt, or conversations")
@option("--iteration", metavar="N", help="of the run, best, or all  [default: the newest]")
@option("--bench", default="", metavar="TASKS", help="of lm-evaluation-harness, or YAML files of tasks, with commas")
def evaluate_command(recipe: Recipe, prompts: Optional[Path], iteration: Optional[str], bench: str) -> None:
    """Loss, answers and benchmarks, before and after."""
    from openpangu_sft.evaluate.stage import run_evaluate

    tasks = filter(None, map(str.strip, bench.split(",")))
    _show(run_evaluate(recipe, prompts, iteration, [*tasks]), recipe.path("run"))


@stage("report", "--run /cache/sft_outputs --with /cache/sft_lower_lr")
@option("--run", type=Path, metavar="DIRECTORY", help="a run  [default: paths.run]")
@option("--with", "other", type=Path, metavar="DIRECTORY", help="a second run to compare with")
@option("--html", type=Path, metavar="FILE", help="output page  [default: report.html in the run]")
def report_command(recipe: Recipe, run: Optional[Path], other: Optional[Path], html: Optional[Path]) -> None:
    """Write an HTML report of a run, or compare two.

    Curves, data, answers and provenance.
    """
    from openpangu_sft.report.page import run_report

    print(printable(str(run_report(recipe, run, other, html))))


def _show(evaluation: Evaluation, run: Path) -> None:
    """Prints loss and score of each checkpoint, then every question with the first and the last answer."""
    console, title, scores = stdout(), f"{len(evaluation.questions):,} questions", evaluation.scores
    if validation := evaluation.held_out:
        title = f"{validation['packed']:,} validation samples, {validation['trained_tokens']:,} trained tokens, {title}"
    table = [("checkpoint", "loss", "perplexity", "score")]
    for one in evaluation.results:
        loss = ("", "") if one.loss is None else (f"{one.loss:.4f}", perplexity(one.loss))
        table.append((checkpoint_name(one.iteration), *loss, scores.get(one.iteration, "")))
    filled = [column for column in zip(*table) if any(column[1:])]
    if len(filled) > 1:
        head, *rows = zip(*filled)
        print_rows(title, head, rows, console)
    for label, values in evaluation.benchmarks.items():
        print_table(label, {checkpoint_name(number): value for number, value in values.items()}, console)
    for question, verdicts, lines in compared({"": evaluation}):
        heading = ": ".join(filter(None, (question.source, *verdicts.values())))
        console.print(f"\n{heading}", style="bold", soft_wrap=True)
        reference = ("expected" if question.score else "reference", question.reference)
        for name, text in [*question.turns, *([reference] if question.reference else []), *lines.items()]:
            console.print(f"{name}: {text or '(nothing)'}", soft_wrap=True)
    console.print(f"\nfull results: {run / EVALUATION}", soft_wrap=True)


def _between(least: float, most: float) -> Callable[[str], float]:
    """The type of an option: a number in a range; NaN is in none."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        raise click.BadParameter(f"{text!r} is not a number from {least:g} to {most:g}")

    return number


@stage("plan", "--memory 64 --set train.recompute.granularity=none")
@option("--memory", type=_between(0.1, 1e5), help="GiB per device  [default: 32 and 64; on a CPU this machine's]")
@option("--tokens-per-second", type=_between(0.001, 1e12), help="of the whole run  [default: measured so far]")
@option("--json", "as_text", is_flag=True, help="print all figures as JSON, sizes in bytes")
def plan_command(recipe: Recipe, memory: Optional[float], tokens_per_second: Optional[float], as_text: bool) -> None:
    """Estimate memory, disk and time before a run."""
    from openpangu_sft.plan.estimate import device_memory
    from openpangu_sft.plan.report import Report, as_json
    from openpangu_sft.plan.show import show_report

    report = Report(recipe, [memory] if memory else device_memory(recipe), tokens_per_second)
    if as_text:
        print(json.dumps(as_json(report), ensure_ascii=False, indent=1))
    else:
        show_report(report, stdout())


@stage("doctor", "--recipe recipes/demo.yaml --json")
@option("--json", "as_text", is_flag=True, help="print one JSON object")
@click.pass_context
def doctor_command(context: click.Context, recipe: Recipe, as_text: bool) -> None:
    """Check this machine against the recipe.

    Each problem comes with a remedy. The exit code is 1 if a check failed, 0 with warnings. Changes nothing (checksums
    of a checkpoint with checklist.chk are cached in paths.cache).
    """
    from openpangu_sft.doctor.checks import as_json, print_findings, run_checks, where
    from openpangu_sft.doctor.machine import Context, Machine, State

    machine = Machine(Path(os.environ.get("HOST_ROOT") or "/"))
    subject = Context(recipe, machine)
    with console.status("") as status:  # shown on a terminal only
        findings = run_checks(subject, lambda name: status.update(f"checking: {name}"))
    if as_text:
        print(as_json(where(subject), findings, subject.npus.chips if subject.wants_npus else ()))
    else:
        print_findings(stdout(), where(subject), findings)
    context.exit(int(any(finding.state == State.FAILED for finding in findings)))
