"""Commands of training: sft, curve, chat, demo."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import click

from openpangu_sft.cli.options import iteration_in, iteration_option, option, recipe_arguments, show_chosen, stage
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.launch import worker_rank
from openpangu_sft.util.console import console, print_table, say, stdout
from openpangu_sft.util.errors import UserError, printable


@stage("sft", "--set train.lr=1e-5 --set train.iterations=1000")
@option("--dry-run", is_flag=True, help="only print the environment and command (engine mindspeed)")
@option("--resume", type=click.Choice(["changed"]), help="go on with another learning rate or schedule")
def sft_command(recipe: Recipe, dry_run: bool, resume: Optional[str]) -> None:
    """Fine-tune; rerun to resume."""
    from openpangu_sft.plan.estimate import memory_of
    from openpangu_sft.training.stage import run_manifest, run_sft

    first = worker_rank() is None  # workers repeat this command
    if first:
        show_chosen(recipe)
    if dry_run:
        from openpangu_sft.training.mindspeed.start import dry_run as command_of

        if recipe.train.engine != "mindspeed":
            what = "train.engine transformers trains in this process: there is no command"
            raise UserError(what, remedy="run make sft")
        print(command_of(recipe))
        return
    if first:
        _show_header(recipe, run_manifest(recipe).counts)
    arguments = ["sft", *recipe_arguments(), *(["--resume", resume] if resume else [])]
    run_sft(recipe, arguments, memory_of(recipe).peak, changed=bool(resume))
    if not worker_rank():
        _show_run(recipe)


@stage("curve", "--set paths.run=/cache/sft_outputs")
def curve_command(recipe: Recipe) -> None:
    """Redraw loss.png of a run, also while it trains."""
    from openpangu_sft.training.run.metrics import draw_curve, read_metrics

    run = recipe.path("run")
    if not read_metrics(run):
        raise UserError("no iteration yet", where=run, remedy="run make sft, or check paths.run")
    print(draw_curve(run))


@stage("chat", "--model /cache/ckpts/pangu_model --prompt 你好")
@option("-p", "--prompt", help="one question; by default, a dialogue")
@option("--system", default="", help="system prompt")
@option("--tools", type=Path, metavar="FILE", help="definitions of tools, a JSON list")
@option(
    "-m", "--model", type=Path, help="checkpoint or adapter  [default: paths.export, else paths.run, else paths.hf]"
)
@iteration_option
def chat_command(
    recipe: Recipe,
    prompt: Optional[str],
    system: str,
    tools: Optional[Path],
    model: Optional[Path],
    iteration: Optional[str],
) -> None:
    """Chat with a checkpoint.

    Thinking goes to stderr, the answer and its tool calls to stdout.
    """
    from openpangu_sft.cli.answers import AnswerPrinter, read_tools
    from openpangu_sft.model.chat import Chat, converse, default_checkpoint

    definitions = read_tools(tools) if tools else ""
    run = recipe.path("run") if iteration else default_checkpoint(recipe)
    checkpoint = model.absolute() if model else run
    talker = Chat(recipe, checkpoint, iteration_in(checkpoint, iteration))
    note = f", iteration {talker.iteration}" if talker.iteration is not None else ""
    if not model and checkpoint == recipe.path("hf"):
        note = ", the base model: paths.export and paths.run hold no checkpoint"
    print(printable(f"model: {checkpoint}{note}"), file=sys.stderr, flush=True)
    if prompt is None and sys.stdin.isatty():
        say("Empty line: new conversation. Ctrl-D: quit.")
    stdout()  # a model may write what the locale does not have
    printer = AnswerPrinter()
    lines = iter([prompt]) if prompt is not None else _typed_lines()
    for answer in converse(talker, lines, system, definitions, printer):
        if not isinstance(answer, UserError):
            printer.end(answer)
        elif prompt is not None:
            raise answer
        else:
            say(str(answer))


@stage("demo", "--set paths.cache=/tmp/demo", default_recipe="recipes/demo.yaml")
def demo_command(recipe: Recipe) -> None:
    """Run every stage with a small model."""
    from openpangu_sft.demo.run import run_demo

    run_demo(recipe, recipe_arguments())


def _typed_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _show_header(recipe: Recipe, counts: dict[str, Any]) -> None:
    """Prints what a run is made of, how long it is, where it writes and how it is stopped, and a line for what was
    perhaps not meant. `counts` are those of the dataset.
    """
    from openpangu_sft.checkpoint.sharding import parameter_count
    from openpangu_sft.plan.estimate import course_of, disk_of, warnings

    train, parallel, run = recipe.train, recipe.parallel, recipe.path("run")
    course, disk, adapter = course_of(recipe, counts), disk_of(recipe), train.lora.adapter
    model = f"{recipe.path('hf').name}: {parameter_count(recipe.model):,} parameters"
    if adapter:
        model += f", {parameter_count(recipe.model, adapter, trained=True):,} in adapters trained"
    sizes = {"DP": parallel.data, "CP": parallel.context, "TP": parallel.tensor, "PP": parallel.pipeline}
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    device = "NPU" if train.engine == "mindspeed" and train.device == "auto" else "process"
    engine = f"{train.engine}, {train.precision}, {parallel.world} x {device}{f': {split}' if split else ''}"
    if device == "process":
        engine += f", train.device {train.device}"
    share = counts["trained_tokens"] / counts["tokens"]
    data = f"{counts['packed']:,} conversations in {counts['packs']:,} packs: {counts['tokens']:,} tokens"
    rate = f"{train.lr:g}, warm-up of {train.warmup:,} steps, {train.lr_decay_style}"
    if train.lr_decay_style != "constant":
        rate += f" to {train.min_lr:g}"
    free = shutil.disk_usage(next(path for path in (run, *run.parents) if path.is_dir())).free
    tokens = round(course.tokens / train.iterations)
    rows = {
        "model": model,
        "engine": engine,
        "data": f"{data}, {share:.1%} trained",
        "steps": f"{train.iterations:,} of {train.global_batch_size:,} packs ({tokens:,} tokens)",
        "epochs": f"{course.epochs:,.2f}",
        "learning rate": rate,
        "checkpoints": f"every {train.save_interval:,} steps, {disk.kept:,} kept: {disk.most / 1e9:,.3g} GB at most; "
        f"{free / 1e9:,.3g} GB free",
        "writes to": os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run),
        "to stop": "Ctrl-C: saves after the step; make sft again resumes",
    }
    print_table("make sft", rows)
    for line in warnings(recipe, counts):
        console.print(line, style="yellow", markup=False)


def _show_run(recipe: Recipe) -> None:
    from openpangu_sft.training.run.metrics import CURVE, read_metrics

    run = recipe.path("run")
    metrics = read_metrics(run)
    if not metrics:  # with several machines, only the last one has them
        return
    rows = {
        "iterations": f"{metrics[-1]['iteration']:,}",
        "loss": f"{metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}",
        "seconds": f"{sum(row['seconds'] for row in metrics):,.1f}",
        "loss curve": str(run / CURVE),
    }
    print_table(f"run: {run}", rows)
