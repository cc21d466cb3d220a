"""The command line: one command per stage, each reading one recipe.

Run as: openpangu-sft sft --recipe recipes/demo.yaml --set train.iterations=100
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NoReturn, Optional

import click
from rich.console import Console
from rich.table import Table

from openpangu_sft import __version__
from openpangu_sft.artefact import Manifest, sum_counts
from openpangu_sft.errors import Interrupted, UserError, explain_os_error, printable
from openpangu_sft.progress import console
from openpangu_sft.recipe import Recipe
from openpangu_sft.recipe_file import load_recipe
from openpangu_sft.sft.launch import worker_rank

SHARDS_ON_A_SCREEN = 12
DEFAULT_RECIPE = "recipes/openpangu-1b.yaml"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """Fine-tune openPangu: one command per stage, each reading one recipe.

    \b
    Example: openpangu-sft sft --recipe recipes/demo.yaml --set train.iterations=100
    """


def stage(name: str, default_recipe: str = DEFAULT_RECIPE) -> Callable[[Callable[..., None]], click.Command]:
    """Declares a command with the options that every stage has."""

    def declare(function: Callable[..., None]) -> click.Command:
        recipe = click.option(
            "-r", "--recipe", "recipe_file", type=Path, default=default_recipe, show_default=True, help="a YAML file"
        )
        override = click.option(
            "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key; may be repeated"
        )
        return app.command(name)(recipe(override(function)))

    return declare


@stage("format")
def format_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Raw conversations to samples."""
    from openpangu_sft.format_stage import run_format

    recipe = load_recipe(recipe_file, overrides)
    _show("samples", recipe.path("samples"), run_format(recipe))


@stage("preprocess")
@click.option("--shard", metavar="K/N", help="divide the inputs into N parts and make the K-th: for many machines")
def preprocess_command(recipe_file: Path, overrides: tuple[str, ...], shard: Optional[str]) -> None:
    """Samples to packed shards, one per file.

    \b
    Example: openpangu-sft preprocess --shard 3/16
    """
    _without_torch()
    from openpangu_sft.dataset.preprocess import run_preprocess
    from openpangu_sft.dataset.spans import parse_part

    recipe = load_recipe(recipe_file, overrides)
    shards = run_preprocess(recipe, *parse_part(shard))
    if len(shards) > SHARDS_ON_A_SCREEN:
        made_now = sum(made for _, _, made in shards)
        console.print(
            f"{len(shards):,} shards: {made_now:,} made, {len(shards) - made_now:,} unchanged", soft_wrap=True
        )
    for part, manifest, made in shards if len(shards) <= SHARDS_ON_A_SCREEN else ():
        counts = manifest.counts
        what = f"{counts['packed']:,} samples in {counts['packs']:,} packs" if made else "unchanged, not made again"
        console.print(f"shard of {part.source}: {what}", markup=False, soft_wrap=True)
    if not shards:
        console.print(f"part {shard} of the inputs holds no lines: nothing to do", soft_wrap=True)
    else:
        total = Manifest("shards", counts=sum_counts([manifest.counts for _, manifest, _ in shards]))
        _show("shards", recipe.path("shards"), total, recipe)


@stage("merge")
def merge_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """All shards to the one dataset that training reads."""
    from openpangu_sft.dataset.merge import run_merge

    recipe = load_recipe(recipe_file, overrides)
    _show("dataset", recipe.path("dataset"), run_merge(recipe), recipe)


@stage("preview")
@click.option("--sample", type=int, metavar="N", help="show this one; counted from 1 through the packs in their order")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="how many samples  [default: 3; with --sample: 1]"
)
@click.option("--html", type=Path, metavar="FILE", help="the page  [default: preview.html in paths.cache]")
def preview_command(
    recipe_file: Path, overrides: tuple[str, ...], sample: Optional[int], count: Optional[int], html: Optional[Path]
) -> None:
    """What training will see: numbers and samples, token by token."""
    _without_torch()
    from openpangu_sft.preview.stage import run_preview
    from openpangu_sft.preview.terminal import show

    preview, page = run_preview(load_recipe(recipe_file, overrides), sample, count, html)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without Chinese must not end it
    show(preview, Console(highlight=False))
    console.print(f"page: {printable(str(page))}", soft_wrap=True, markup=False)


@stage("convert")
def convert_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Hugging Face checkpoint to Megatron-core checkpoint."""
    from openpangu_sft.checkpoint.convert import run_convert

    recipe = load_recipe(recipe_file, overrides)
    _show("mcore checkpoint", recipe.path("mcore"), run_convert(recipe))


@stage("sft")
def sft_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune; run again, it goes on where it was."""
    from openpangu_sft.sft.stage import run_sft

    recipe = load_recipe(recipe_file, overrides)
    run_sft(recipe, ["sft", "--recipe", str(recipe_file), *(part for key in overrides for part in ("--set", key))])
    if not worker_rank():
        _show_run(recipe)


@stage("export")
def export_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """The run's newest checkpoint to Hugging Face."""
    from openpangu_sft.checkpoint.export import run_export

    recipe = load_recipe(recipe_file, overrides)
    _show("Hugging Face checkpoint", recipe.path("export"), run_export(recipe))


@stage("chat")
@click.option("-p", "--prompt", help="one question; without it, a dialogue")
@click.option("--system", default="", help="system prompt")
@click.option("-m", "--model", type=Path, help="checkpoint, Hugging Face or mcore; default: the newest there is")
def chat_command(
    recipe_file: Path, overrides: tuple[str, ...], prompt: Optional[str], system: str, model: Optional[Path]
) -> None:
    """Ask a checkpoint."""
    recipe = load_recipe(recipe_file, overrides)
    from openpangu_sft.chat import Chat, converse, default_checkpoint
    from openpangu_sft.sample import Message

    talker = Chat(recipe, model.absolute() if model else default_checkpoint(recipe))
    if prompt is not None:
        print(talker.reply((Message("user", prompt),), system))
        return
    if sys.stdin.isatty():
        console.print("Empty line: a new conversation. Ctrl-D: the end.")
    for answer in converse(talker, _typed_lines(), system):
        print(answer, flush=True)


@stage("inspect")
@click.argument("dataset", required=False, type=Path)
def inspect_command(recipe_file: Path, overrides: tuple[str, ...], dataset: Optional[Path]) -> None:
    """Check a packed dataset, ours or MindSpeed-LLM's.

    DATASET is a directory or a path prefix; without it, the recipe's paths.dataset.
    """
    from openpangu_sft.dataset.inspection import run_inspect

    report = run_inspect(load_recipe(recipe_file, overrides), dataset)
    _print_table(f"packed dataset: {report.path}", report.figures)
    for finding in report.findings:
        console.print(str(finding), soft_wrap=True, markup=False)
    if report.findings:
        count = len(report.findings)
        raise UserError("1 finding" if count == 1 else f"{count} findings", where=report.path, remedy="see above")


@stage("demo", default_recipe="recipes/demo.yaml")
def demo_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Every stage with a small model, on this machine."""
    from openpangu_sft.demo.run import run_demo

    run_demo(load_recipe(recipe_file, overrides), recipe_file, overrides)


def main() -> NoReturn:
    """Entry point: whatever the user can mend is one line on stderr and exit code 1."""
    # Threads that wait actively take the cores from those they wait for: several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    if worker_rank() is None:
        sys.exit(_run())
    try:
        code = _run()
    except BaseException:
        traceback.print_exc()
        code = 1
    # Past the destructors: torch 2.1 joins gloo's threads with the GIL held, and now and then one of them wants it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    """Runs the command; returns the exit code."""
    try:
        code = app(standalone_mode=False)  # an exit code where --help or --version ended it
    except UserError as error:
        return _say(str(error), 1)
    except OSError as error:
        return _say(str(explain_os_error(error)), 1)
    except Interrupted as stop:
        code = 128 + stop.signal_number
        return code if worker_rank() else _say(str(stop), code)  # one line for all processes of a run
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted; nothing half-written is left", 128 + signal.SIGINT)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit as request:  # of torchrun's agent
        return request.code if isinstance(request.code, int) else 1
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    print(f"openpangu-sft: {message}", file=sys.stderr)
    return code


def _without_torch() -> None:
    """Keeps transformers from importing torch: a tokenizer needs none, and it takes seconds and 200 MB."""
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no torch


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _show(title: str, path: Path, manifest: Manifest, recipe: Optional[Recipe] = None) -> None:
    """What a stage did, on one screen."""
    rows = {name.replace("_", " "): _readable(value) for name, value in manifest.counts.items()}
    if recipe and "packs" in manifest.counts:
        counts = manifest.counts
        rows["packs full"] = f"{counts['tokens'] / (counts['packs'] * recipe.data.seq_length):.1%}"
        rows["tokens trained"] = f"{counts['trained_tokens'] / counts['tokens']:.1%}"
    _print_table(f"{title}: {path}", rows)


def _show_run(recipe: Recipe) -> None:
    from openpangu_sft.sft.metrics import CURVE, read_metrics

    run = recipe.path("run")
    metrics = read_metrics(run)
    rows = {
        "iterations": f"{metrics[-1]['iteration']:,}",
        "loss": f"{metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}",
        "seconds": f"{sum(row['seconds'] for row in metrics):,.1f}",
        "loss curve": str(run / CURVE),
    }
    _print_table(f"run: {run}", rows)


def _readable(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_readable(inner)}" for name, inner in value.items()) or "none"
    return str(value)


def _print_table(title: str, rows: dict[str, str]) -> None:
    console.print(title, style="bold", soft_wrap=True, markup=False)
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
