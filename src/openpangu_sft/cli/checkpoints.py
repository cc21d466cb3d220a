"""Commands of checkpoints: convert, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from openpangu_sft.cli.options import iteration_in, iteration_option, option, show, show_chosen, stage, without_torch
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import print_rows, print_table, say, stdout
from openpangu_sft.util.errors import UserError, explain_os_error

FROM = option("--from", "source", type=Path, metavar="DIR", help="another checkpoint, a run, or a LoRA adapter")
DTYPE = option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="of the result  [default: unchanged]")
FORM = click.Choice(["llama", "openpangu", "peft"])
ONLY = click.Choice(["tensors", "manifest"])
LOGITS = ("in", "prompt", "tokens", "logit", "difference", "same", "check")


@stage("convert", "--set parallel.tensor=2 --set parallel.pipeline=2")
@FROM
@iteration_option
@DTYPE
def convert_command(recipe: Recipe, source: Optional[Path], iteration: Optional[str], dtype: Optional[str]) -> None:
    """Convert a checkpoint to Megatron-core.

    From Hugging Face in paths.hf, or from any other, to the recipe's TP and PP.
    """
    from openpangu_sft.checkpoint.convert import run_convert

    show_chosen(recipe)
    chosen = iteration_in(source or recipe.path("run"), iteration)
    show("mcore checkpoint", recipe.path("mcore"), run_convert(recipe, source, chosen, dtype))


@stage("export", "--iteration 400 --form openpangu")
@FROM
@iteration_option
@DTYPE
@option("--form", type=FORM, default="llama", show_default=True, help="export format")
def export_command(
    recipe: Recipe, source: Optional[Path], iteration: Optional[str], dtype: Optional[str], form: str
) -> None:
    """Export the run's newest checkpoint to Hugging Face.

    llama loads with stock transformers and vLLM; openpangu has the original's configuration and remote code. Both have
    LoRA adapters merged; peft is the adapters alone.
    """
    without_torch()
    from openpangu_sft.checkpoint.export import run_export

    chosen = iteration_in(source or recipe.path("run"), iteration)
    show("Hugging Face checkpoint", recipe.path("export"), run_export(recipe, source, chosen, form, dtype))


@stage("verify", "--mcore /cache/ckpts/pangu_model_mcore --tensors")
@option("--hf", type=Path, metavar="DIR", help="Hugging Face checkpoint  [default: paths.hf]")
@option("--mcore", type=Path, metavar="DIR", help="Megatron-core checkpoint or run  [default: paths.mcore]")
@iteration_option
@option(
    "--manifest", "only", variable="ONLY", type=ONLY, flag_value="manifest", help="check mcore files' checksums only"
)
@option("--tensors", "only", variable="ONLY", type=ONLY, flag_value="tensors", help="compare the tensors only")
def verify_command(
    recipe: Recipe, hf: Optional[Path], mcore: Optional[Path], iteration: Optional[str], only: Optional[str]
) -> None:
    """Check that two checkpoints are the same model.

    Compares every tensor bit for bit, then the logits of two prompts: Hugging Face against megatron-core.
    The last line, on stdout, is PASS or FAIL.
    """
    hf, mcore = hf or recipe.path("hf"), mcore or recipe.path("mcore")
    try:
        if only == "manifest":
            from openpangu_sft.verify.tensors import check_manifest

            print_table(f"files: {mcore}", check_manifest(mcore))
        else:
            _compare(recipe, hf, mcore, iteration_in(mcore, iteration), only == "tensors")
    except (UserError, OSError) as error:
        if not all(path.is_dir() for path in (mcore if only == "manifest" else hf, mcore)):
            raise  # without a checkpoint there is no verdict
        known = error if isinstance(error, UserError) else explain_os_error(error)
        say(f"openpangu-sft: {known}")
        stdout().print("FAIL")
        raise click.exceptions.Exit(1) from None
    stdout().print("PASS")


def _compare(recipe: Recipe, hf: Path, mcore: Path, iteration: Optional[int], only_tensors: bool) -> None:
    from openpangu_sft.verify.tensors import compare_tensors

    compared = compare_tensors(recipe, hf, mcore, iteration)
    print_table(f"tensors: {hf} and {mcore}", compared.figures)
    if only_tensors:
        return
    from openpangu_sft.verify.logits import compare_logits  # imports torch and transformers

    rows = compare_logits(recipe, hf, compared)
    print_rows(
        "logits: Hugging Face against megatron-core 0.6.0 with the project's patch, on this CPU",
        LOGITS,
        [
            (
                row.precision,
                row.prompt,
                f"{row.tokens}",
                f"{row.largest_logit:.3f}",
                f"{row.largest_difference:.1e}",
                f"{row.same_token:.0%}",
                f"{row.measure:.2g} {'≤' if row.passed else '>'} {row.limit:.2g}",
            )
            for row in rows
        ],
    )
    say(
        "logit, difference: maximum. same: positions with the same most probable token. check: in fp32 the difference "
        "relative to the logit; in bf16 Megatron's distance from fp32 relative to Hugging Face's own."
    )
    if failed := [row for row in rows if not row.passed]:
        what = f"gives other logits than {hf} in {failed[0].precision}, {failed[0].prompt} prompt"
        remedy = "see the table; compare the versions of transformers and megatron-core"
        raise UserError(what, where=mcore, remedy=remedy)
