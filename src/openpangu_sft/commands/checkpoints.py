"""Commands of the checkpoint path: convert, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from openpangu_sft.commands.base import show, stage
from openpangu_sft.recipe_file import load_recipe

FROM = click.option("--from", "source", type=Path, metavar="DIR", help="another checkpoint, of any layout, or a run")
ITERATION = click.option("--iteration", type=click.IntRange(0), metavar="N", help="of a run  [default: the newest]")
DTYPE = click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="of the result  [default: as it is]")


@stage("convert")
@FROM
@ITERATION
@DTYPE
def convert_command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    source: Optional[Path],
    iteration: Optional[int],
    dtype: Optional[str],
) -> None:
    """To a Megatron-core checkpoint of the recipe's layout.

    From the Hugging Face checkpoint in paths.hf, or from any other.

    \b
    Example: openpangu-sft convert --set parallel.tensor=2 --set parallel.pipeline=2
    """
    from openpangu_sft.checkpoint.convert import run_convert

    recipe = load_recipe(recipe_file, overrides)
    show("mcore checkpoint", recipe.path("mcore"), run_convert(recipe, source, iteration, dtype))


@stage("export")
@FROM
@ITERATION
@DTYPE
@click.option("--form", type=click.Choice(["llama", "openpangu"]), default="llama", show_default=True, help="see docs")
def export_command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    source: Optional[Path],
    iteration: Optional[int],
    dtype: Optional[str],
    form: str,
) -> None:
    """The run's newest checkpoint to Hugging Face.

    llama loads with stock transformers and vLLM; openpangu has the original's configuration and remote code.

    \b
    Example: openpangu-sft export --iteration 400 --form openpangu
    """
    from openpangu_sft.checkpoint.export import run_export

    recipe = load_recipe(recipe_file, overrides)
    show("Hugging Face checkpoint", recipe.path("export"), run_export(recipe, source, iteration, form, dtype))
