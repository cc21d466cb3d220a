"""The commands that get what the mindspeed engine is made of, and prove it without an NPU."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.cli.options import app, stage
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.util.console import console, print_table


@app.command("sources")
def sources_command() -> None:
    """MindSpeed-LLM and what it needs, pinned and patched.

    The commits of patches/upstream.toml, with the patches applied, in the folder .sources of this clone.
    MEGATRON_LM_URL, MINDSPEED_URL and MINDSPEED_LLM_URL name other places to fetch from.

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


@stage("slurm")
def slurm_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """A Slurm script for several machines, on stdout.

    As many as parallel.nodes says.

    \b
    Example: openpangu-sft slurm --set parallel.nodes=4 > sft.sbatch
    """
    from openpangu_sft.training.mindspeed.cluster import slurm

    settings = [f"SET={' '.join(overrides)}"] if overrides else []
    recipe = load_recipe(recipe_file, overrides)
    print(slurm(recipe, ["make", "sft", f"RECIPE={recipe_file.absolute()}", *settings], Path.cwd()), end="")


def _object_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """An object's name as Kubernetes has them: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/"""
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    if len(value) > 253 or not re.fullmatch(rf"{label}(\.{label})*", value):
        rule = (
            "up to 253 lower-case letters, digits, '-' and '.', a letter or digit at each end (an RFC 1123 subdomain)"
        )
        raise click.BadParameter(f"{reprlib.repr(value)} is no name in Kubernetes: {rule}")
    return value


@stage("kubernetes")
@click.option(
    "--claim", required=True, callback=_object_name, help="the PersistentVolumeClaim that is /cache in every pod"
)
@click.option("--image", help="as the cluster can pull it (this version's npu image)")
def kubernetes_command(recipe_file: Path, overrides: tuple[str, ...], claim: str, image: Optional[str]) -> None:
    """A Kubernetes (Volcano) job, on stdout.

    It trains on parallel.nodes machines.

    \b
    Example: openpangu-sft kubernetes --claim pangu --set parallel.nodes=4 > sft.yaml
    """
    from openpangu_sft.training.mindspeed.cluster import volcano

    given = {"image": image} if image else {}
    print(volcano(load_recipe(recipe_file, overrides), claim, **given), end="")


@app.command("smoke")
@click.option("--cache", type=Path, default=Path(".cache/smoke"), show_default=True, help="where; it is emptied first")
def smoke_command(cache: Path) -> None:
    """MindSpeed-LLM on a CPU compared with ours, in minutes.

    Its own commands and ours, side by side, on the stand-in for NPUs: a small model through preprocess, merge, convert,
    training in every parallel way, resume and export; what both sides make is compared.

    \b
    Example: openpangu-sft smoke --cache /tmp/smoke
    """
    from openpangu_sft.demo.smoke import Smoke

    Smoke(cache.absolute()).run()
