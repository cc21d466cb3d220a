"""`make bench-train`: the transformers engine against TRL's SFTTrainer and the plain Hugging Face Trainer.

The demo's packs train a small and a mid-sized model of openPangu's architecture, in a process of its own each time, the
engines in turn. docs/benchmarks.md describes what exactly is measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Optional

import click
from pydantic import TypeAdapter

from benchmarks.measure import machine, print_table, run_measured
from benchmarks.train_once import ENGINES, PROFILED, TRL, WARM_UP, Steps, demo_recipe, packs
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.conversations.format import run_format
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.demo.run import prepare
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.util.errors import UserError

MODELS = {
    "demo": ["train.iterations=14"],
    "mid-sized": [
        "model.num_layers=6",
        "model.hidden_size=512",
        "model.ffn_hidden_size=2048",
        "model.num_attention_heads=8",
        "model.num_query_groups=4",
        "model.kv_channels=64",
        "train.iterations=6",
        "train.lr_warmup_iterations=2",
    ],
}
NEWEST_TRL = "0.20.0"
"""The newest that accepts transformers 4.53.2."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.option("--trl", type=Path, help="directory into which pip has installed TRL: docs/benchmarks.md")
@click.option("--repeat", default=3, type=click.IntRange(1), help="number of measurements")
@click.option("--threads", default=1, type=click.IntRange(1), help="of torch; 1: processor seconds are counted")
@click.option("--only", type=click.Choice(list(MODELS)), help="measure this model alone")
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="for every model")
def main(trl: Optional[Path], repeat: int, threads: int, only: Optional[str], overrides: tuple[str, ...]) -> None:
    """Measures trained tokens per second, and prints a Markdown table for each model."""
    trl_version = next((found.version for found in distributions(name="trl", path=[str(trl)])), None)
    if trl is None or trl_version is None:
        remedy = f"pip install --no-deps --target DIRECTORY trl=={NEWEST_TRL}, then TRL=DIRECTORY"
        raise UserError("TRL is not installed here", where=trl, remedy=remedy)
    software = f"{machine('torch', 'transformers', 'accelerate')}, trl {trl_version}; {threads} threads"
    print(f"{software}; load before: {os.getloadavg()[0]:.1f}", flush=True)
    environment = {"PYTHONPATH": str(trl.absolute()), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as made:
        for name in [only] if only else MODELS:
            settings = [*MODELS[name], *overrides, f"paths.cache={Path(made, name)}", "train.device=cpu"]
            _compare(name, settings, repeat, environment)


def _compare(name: str, settings: list[str], repeat: int, environment: dict[str, str]) -> None:
    recipe = demo_recipe(settings)
    for stage in (prepare, run_format, run_preprocess, run_merge, run_convert):
        stage(recipe)
    trained = _timed_targets(recipe)
    print(f"\n{name} model: {parameter_count(recipe.model):,} parameters; {trained:,} trained tokens\n", flush=True)
    runs: dict[str, list[Steps]] = {engine: [] for engine in ENGINES}
    for turn in range(repeat):
        for engine in ENGINES:
            run = recipe.path("run").with_name(f"{engine}-{turn}")
            command = ["-m", "benchmarks.train_once", engine, *settings, f"paths.run={run}"]
            output = run_measured(command, run.with_suffix(".log"), **environment).output
            runs[engine].append(TypeAdapter(Steps).validate_json(output.splitlines()[-1]))
            print(f"{engine}: {trained / sum(runs[engine][-1].seconds):,.0f} tokens/s", file=sys.stderr, flush=True)
    print_table(table(runs, trained))


def table(runs: dict[str, list[Steps]], trained: int) -> list[list[str]]:
    """Header and rows: each engine's run of least seconds, and ratios to TRL's. `trained`: timed targets of a run."""
    rows = [["engine", "tokens/s", "x TRL", "of medians", "in matrix products", "mean loss", "all runs, tokens/s"]]
    its = [sum(run.seconds) for run in runs[TRL]]
    for engine, its_runs in runs.items():
        mine, best = [sum(run.seconds) for run in its_runs], min(its_runs, key=lambda run: sum(run.seconds))
        ratios = [f"{min(its) / min(mine):.2f}", f"{median(its) / median(mine):.2f}"]
        every = ", ".join(f"{trained / seconds:,.0f}" for seconds in mine)
        share = f"{best.matrices:.0%}"
        rows.append([engine, f"{trained / min(mine):,.0f}", *ratios, share, f"{best.loss:.4f}", every])
    return rows


def _timed_targets(recipe: Recipe) -> int:
    """Trained tokens of the timed iterations."""
    batch, rows = recipe.train.global_batch_size, packs(recipe)
    timed = rows[batch * WARM_UP : batch * (recipe.train.iterations - PROFILED)]
    return sum(label != IGNORED for row in timed for label in row["labels"][1:])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench-train: {error}")
