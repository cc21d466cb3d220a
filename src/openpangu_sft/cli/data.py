"""Commands of the data path: from raw conversations to the dataset that training reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.artifacts.artifact import Manifest, sum_counts
from openpangu_sft.cli.options import show, stage, without_torch
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.util.console import console, print_table, stdout
from openpangu_sft.util.errors import printable

SHARDS_ON_A_SCREEN = 12


@stage("format")
def format_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Raw conversations to samples.

    \b
    Example: openpangu-sft format --set paths.raw=/data/raw --set data.on_bad_sample=skip
    """
    from openpangu_sft.conversations.format import run_format

    recipe = load_recipe(recipe_file, overrides)
    show("samples", recipe.path("samples"), run_format(recipe))


@stage("preprocess")
@click.option("--shard", metavar="K/N", help="divide the inputs into N parts and make the K-th: for many machines")
def preprocess_command(recipe_file: Path, overrides: tuple[str, ...], shard: Optional[str]) -> None:
    """Samples to packed shards, one per file.

    \b
    Example: openpangu-sft preprocess --shard 3/16
    """
    without_torch()
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
        show("shards", recipe.path("shards"), total, recipe)


@stage("merge")
def merge_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """All shards to the one dataset that training reads.

    \b
    Example: openpangu-sft merge --set paths.shards=/data/shards
    """
    from openpangu_sft.dataset.merge import run_merge

    recipe = load_recipe(recipe_file, overrides)
    show("dataset", recipe.path("dataset"), run_merge(recipe), recipe)


@stage("preview")
@click.option("--sample", type=int, metavar="N", help="show this one; counted from 1 through the packs in their order")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="how many samples  [default: 3; with --sample: 1]"
)
@click.option("--html", type=Path, metavar="FILE", help="the page  [default: preview.html in paths.cache]")
def preview_command(
    recipe_file: Path, overrides: tuple[str, ...], sample: Optional[int], count: Optional[int], html: Optional[Path]
) -> None:
    """What training will see: numbers and samples, token by token.

    \b
    Example: openpangu-sft preview --sample 42 --html sample42.html
    """
    without_torch()
    from openpangu_sft.preview.stage import run_preview
    from openpangu_sft.preview.terminal import show as show_preview

    preview, page = run_preview(load_recipe(recipe_file, overrides), sample, count, html)
    show_preview(preview, stdout())
    console.print(f"page: {printable(str(page))}", soft_wrap=True, markup=False)


@stage("inspect")
@click.argument("dataset", required=False, type=Path)
def inspect_command(recipe_file: Path, overrides: tuple[str, ...], dataset: Optional[Path]) -> None:
    """Check a packed dataset, ours or MindSpeed-LLM's.

    DATASET is a directory or a path prefix; without it, the recipe's paths.dataset.

    \b
    Example: openpangu-sft inspect /cache/finetune_dataset/shards/demo
    """
    from openpangu_sft.dataset.inspect import run_inspect

    report = run_inspect(load_recipe(recipe_file, overrides), dataset)
    print_table(f"packed dataset: {report.path}", report.figures)
    for finding in report.findings:
        console.print(str(finding), soft_wrap=True, markup=False)
    console.print(report.verdict)
    if report.findings:
        sys.exit(1)
