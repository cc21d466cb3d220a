"""Commands of the data: format, preprocess, merge, preview, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.artifacts.artifact import Manifest, sum_counts
from openpangu_sft.cli.options import exported, option, packing_efficiency, show, stage, without_torch
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import print_table, say, stdout

SHARDS_ON_A_SCREEN = 12


@stage("format", "--set paths.raw=/data/raw --set data.on_bad_sample=skip")
def format_command(recipe: Recipe) -> None:
    """Convert raw conversations to samples."""
    from openpangu_sft.conversations.format import run_format
    from openpangu_sft.tokenizer.tool_prompt import ToolPrompt

    ToolPrompt(recipe.data.tool_prompt)  # not used here, but a mistake in it is found before the conversion
    show("samples", recipe.path("samples"), run_format(recipe))


@stage("preprocess", "--shard 3/16")
@option("--shard", metavar="K/N", help="process part K of N of the inputs, to spread them over machines")
def preprocess_command(recipe: Recipe, shard: Optional[str]) -> None:
    """Tokenize and pack samples, one shard per file."""
    without_torch()
    from openpangu_sft.dataset.preprocess import run_preprocess
    from openpangu_sft.dataset.spans import parse_part

    shards = run_preprocess(recipe, *parse_part(shard))
    if not shards:
        say(f"part {shard} of the inputs holds no lines: nothing to do")
        return
    if len(shards) > SHARDS_ON_A_SCREEN:
        now = sum(made for _, _, made in shards)
        say(f"{len(shards):,} shards: {now:,} made, {len(shards) - now:,} unchanged")
    else:
        for part, manifest, made in shards:
            packed = f"{manifest.counts['packed']:,} samples in {manifest.counts['packs']:,} packs"
            what = packed if made else "unchanged, not made again"
            say(f"shard of {part.source}: {what}")
    total = Manifest("shards", counts=sum_counts([manifest.counts for _, manifest, _ in shards]))
    show("shards", recipe.path("shards"), total, recipe)


@stage("merge", "--set paths.shards=/data/shards")
def merge_command(recipe: Recipe) -> None:
    """Join all shards into the dataset for training."""
    from openpangu_sft.dataset.merge import run_merge

    counts = run_merge(recipe).counts
    packs = f"{counts['packs']:,} packs ({packing_efficiency(counts, recipe)} full), {counts['tokens']:,} tokens"
    if validation := counts.get("validation"):
        packs += f"; validation: {validation['packs']:,} packs, {validation['tokens']:,} tokens"
    if saved := sum(split["packs_in_shards"] - split["packs"] for split in (counts, validation) if split):
        packs += f"; {saved:,} saved by packing underfilled packs of the shards again"
    say(f"dataset: {recipe.path('dataset')}: {packs}")


@stage("preview", "--sample 42 --html sample42.html")
@option("--sample", type=int, metavar="N", help="show sample N, counted from 1 in the order of the packs")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="samples  [default: 3; with --sample: 1]")
@option("--html", type=Path, metavar="FILE", help="output page  [default: preview.html in paths.cache]")
def preview_command(recipe: Recipe, sample: Optional[int], count: Optional[int], html: Optional[Path]) -> None:
    """Show what training will see, token by token."""
    without_torch()
    from openpangu_sft.preview.stage import run_preview
    from openpangu_sft.preview.terminal import show as show_preview

    preview, page = run_preview(recipe, sample, count, html)
    show_preview(preview, stdout())
    say(f"page: {page}")


@stage("inspect", "/cache/finetune_dataset/shards/demo")
@click.argument("dataset", required=False, type=Path, envvar=exported("DATASET"))
def inspect_command(recipe: Recipe, dataset: Optional[Path]) -> None:
    """Check a packed dataset, also MindSpeed-LLM's.

    DATASET is a directory or a path prefix; by default paths.dataset of the recipe.
    """
    from openpangu_sft.dataset.inspect import run_inspect

    report = run_inspect(recipe, dataset)
    print_table(f"packed dataset: {report.path}", report.figures)
    for finding in report.findings:
        say(str(finding))
    stdout().print(report.verdict)
    if report.findings:
        sys.exit(1)
