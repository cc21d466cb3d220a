"""What a run is, printed before it begins."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.plan.estimate import course_of, disk_of, warnings
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import console, print_table


def show_header(recipe: Recipe, counts: dict[str, Any]) -> None:
    """Prints a table on stderr, and a line for what was perhaps not meant. `counts` are those of the dataset."""
    print_table("make sft", header(recipe, counts))
    for line in warnings(recipe, counts):
        console.print(line, style="yellow")


def header(recipe: Recipe, counts: dict[str, Any]) -> dict[str, str]:
    """What a run is made of, how long it is, where it writes and how it is stopped."""
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
    rate = f"{train.lr:g}, warm-up of {train.warmup:,} step{'s' * (train.warmup != 1)}, {train.lr_decay_style}"
    if train.lr_decay_style != "constant":
        rate += f" to {train.min_lr:g}"
    free = shutil.disk_usage(next(path for path in (run, *run.parents) if path.is_dir())).free
    tokens = round(course.tokens / train.iterations)
    interval, held_out = train.eval_interval, counts.get(VALIDATION, {}).get("packs", 0)
    validation = (
        {"validation": f"every {interval:,} steps on {held_out:,} pack{'s' * (held_out != 1)}"} if interval else {}
    )
    return {
        "model": model,
        "engine": engine,
        "data": f"{data}, {share:.1%} trained",
        "steps": f"{train.iterations:,} of {train.global_batch_size:,} packs ({tokens:,} tokens)",
        "epochs": f"{course.epochs:,.2f}",
        "learning rate": rate,
        **validation,
        "checkpoints": f"every {train.save_interval:,} steps, {disk.kept:,} kept: {disk.most / 1e9:,.3g} GB at most; "
        f"{free / 1e9:,.3g} GB free",
        "writes to": os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run),
        "to stop": "Ctrl-C: saves after the step; make sft again resumes",
    }
