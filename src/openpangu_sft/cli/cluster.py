"""Commands of the mindspeed engine: its sources, its comparison on a CPU, and jobs for several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from openpangu_sft.cli.options import app, option, show_chosen, stage
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import console, print_table


@app.command("sources")
def sources_command() -> None:
    """Fetch MindSpeed-LLM and its dependencies.

    Checks out the commits of patches/upstream.toml in .sources and applies the patches. MEGATRON_LM_URL, MINDSPEED_URL
    and MINDSPEED_LLM_URL override the repositories.

    \b
    Example: MINDSPEED_URL=/srv/mirrors/MindSpeed openpangu-sft sources
    """
    from openpangu_sft.training.mindspeed.sources import SOURCES, make_sources

    manifest, made = make_sources()
    rows = {}
    for name, chosen in manifest.settings.items():
        rows[name] = f"{chosen['commit'][:12]}, {manifest.counts[name]['files']:,} files"
        if chosen["patches"]:
            rows[name] += f", patched: {', '.join(Path(patch).stem for patch in chosen['patches'])}"
    print_table(f"sources: {SOURCES}", rows)
    if not made:
        console.print("unchanged, not made again")


@stage("slurm", "--set parallel.nodes=4 > sft.sbatch")
@click.pass_context
def slurm_command(context: click.Context, recipe: Recipe) -> None:
    """Print a Slurm script for parallel.nodes machines."""
    from openpangu_sft.training.mindspeed.cluster import slurm

    command = ["make", "sft", f"RECIPE={context.params['recipe_file'].absolute()}"]
    if overrides := context.params["overrides"]:
        command.append(f"SET={' '.join(overrides)}")
    print(slurm(recipe, command, Path.cwd()), end="")


@stage("kubernetes", "--claim pangu --set parallel.nodes=4 > sft.yaml")
@option("--claim", required=True, help="PersistentVolumeClaim mounted at /cache in every pod")
@click.option("--image", help="image that the cluster can pull  [default: this version's npu image]")
def kubernetes_command(recipe: Recipe, claim: str, image: Optional[str]) -> None:
    """Print a Kubernetes (Volcano) job for parallel.nodes machines."""
    from openpangu_sft.training.mindspeed.cluster import volcano

    show_chosen(recipe)
    given = {"image": image} if image else {}
    print(volcano(recipe, claim, **given), end="")


@app.command("smoke")
@click.option(
    "--cache", type=Path, default=Path(".cache/smoke"), show_default=True, help="working directory, emptied first"
)
def smoke_command(cache: Path) -> None:
    """Compare MindSpeed-LLM's own commands with ours on a CPU.

    Takes a small model through preprocess, merge, convert, training with every kind of parallelism, resume and export,
    with MindSpeed-LLM on the NPU stand-in, and compares the results. Takes minutes.

    \b
    Example: openpangu-sft smoke --cache /tmp/smoke
    """
    from openpangu_sft.demo.smoke import Smoke

    Smoke(cache.absolute()).run()
