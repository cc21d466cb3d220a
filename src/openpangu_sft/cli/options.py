"""What commands share: the recipe's options, the Make variables behind options, and the table of a stage's counts."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import click

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import ChosenRecipe, Recipe
from openpangu_sft.recipe.sections import UnknownModel
from openpangu_sft.tokenizer.remote_code import YES
from openpangu_sft.util.console import console, print_table, say
from openpangu_sft.util.errors import UserError, printable

PREFIX = "OPENPANGU_"
"""The Makefile exports its variables under this prefix: DTYPE as OPENPANGU_DTYPE. An empty one counts as not given."""
_exported: set[str] = set()

BEST = "best"
COUNTED = ("reasons", "ignored_keys", "changes")  # counts by name, of which `show` prints the highest
ENTRIES_ON_A_SCREEN = 6


class Command(click.Command):
    """Child processes of a command take their options from their command line only."""

    def invoke(self, ctx: click.Context) -> Any:
        for variable in _exported:
            os.environ.pop(variable, None)
        return super().invoke(ctx)


class Commands(click.Group):
    """Typos in a command get a "did you mean", as click does for options."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[Optional[str], Optional[click.Command], list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            raise click.NoSuchOption(args[0], f"no such command: {args[0]}", close, ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """Fine-tune openPangu-Embedded: one command per stage, each reading one recipe.

    \b
    Example: openpangu-sft sft --recipe recipes/demo.yaml --set train.iterations=100
    """


def exported(variable: str) -> str:
    """The environment variable in which the Makefile hands on one of its variables."""
    _exported.add(PREFIX + variable)
    return PREFIX + variable


def option(*names: str, variable: str = "", **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that is also a Make variable, by default of the same name: --dry-run is DRY_RUN."""
    long = next(name for name in names if name.startswith("--"))
    return click.option(*names, envvar=exported(variable or long[2:].upper().replace("-", "_")), **settings)


def stage(
    name: str, example: str, default_recipe: str = "recipes/openpangu-1b.yaml"
) -> Callable[[Callable[..., None]], click.Command]:
    """Declares a command that is given its `Recipe`, from --recipe and --set; `example` has arguments for its help."""

    def declare(function: Callable[..., None]) -> click.Command:
        help_text = f"{inspect.getdoc(function)}\n\n\b\nExample: openpangu-sft {name} {example}"

        @option("-r", "--recipe", "recipe_file", type=Path, default=default_recipe, show_default=True, help="YAML file")
        @option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a key; repeatable")
        @option("--yes", is_flag=True, help="run the tokenizer's Python files unasked")
        @functools.wraps(function)
        def command(recipe_file: Path, overrides: tuple[str, ...], yes: bool, **given: Any) -> None:
            os.environ.update({YES: "1"} if yes else {})
            function(load_recipe(recipe_file, overrides, _choose), **given)

        return app.command(name, help=help_text)(command)

    return declare


def _choose(recipes: Sequence[Recipe], recompute: bool) -> Recipe:
    from openpangu_sft.plan.choose import choose

    return choose(recipes, recompute)


def iteration_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--iteration: a number, or best; see `iteration_in`."""

    def number(text: str) -> str:
        if text == BEST or text.isdecimal():
            return text
        raise click.BadParameter(f"{text!r} is neither the number of an iteration nor {BEST}")

    return option("--iteration", type=number, metavar="N", help="of a run, or best  [default: the newest]")(function)


def iteration_in(run: Path, given: Optional[str]) -> Optional[int]:
    """The iteration that is meant by --iteration; None: the newest."""
    if given != BEST:
        return None if given is None else int(given)
    from openpangu_sft.training.run.retention import best_iteration

    if (found := best_iteration(run)) is None:
        remedy = "name a run with evaluations (train.eval_interval), or give a number"
        raise UserError("no checkpoint here was evaluated during training", where=run, remedy=remedy)
    say(f"iteration {found} has the lowest validation loss")
    return found


def show_chosen(recipe: Recipe) -> None:
    """Prints what `auto` took, on stderr; raises `UserError` where nothing was chosen, as sizes are unknown."""
    if isinstance(recipe, ChosenRecipe):
        if isinstance(recipe.model, UnknownModel):
            raise recipe.model.reason
        console.print(recipe.chosen, soft_wrap=True)


def recipe_arguments() -> list[str]:
    """--recipe, --set and --yes as the current command was given them."""
    given = click.get_current_context().params
    sets = (word for override in given["overrides"] for word in ("--set", override))
    return ["--recipe", str(given["recipe_file"]), *sets, *(["--yes"] if given["yes"] else [])]


def without_torch() -> None:
    """Keeps transformers from importing torch, which takes seconds and 200 MB: the tokenizer does not need it."""
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that torch is missing


def show(title: str, path: Path, manifest: Manifest, recipe: Optional[Recipe] = None) -> None:
    """Prints a stage's counts on one screen; those of each file are in the manifest only."""
    counts, rows = manifest.counts, dict[str, str]()
    for name, value in counts.items():
        if name == "files":
            rows[name] = f"{len(value):,}"
        elif name in COUNTED and value:
            rows[name.replace("_", " ")] = _most(value)
        elif name not in ("validation", *COUNTED):
            rows[name.replace("_", " ")] = readable(value)
        if name == "packed" and (validation := counts.get("validation")):
            rows["validation"] = (
                f"{validation['packed']:,} in {validation['packs']:,} packs: {validation['tokens']:,} tokens"
            )
    if recipe and "packs" in counts:
        rows["packing efficiency"] = packing_efficiency(counts, recipe)
        rows["share trained"] = f"{counts['trained_tokens'] / max(counts['tokens'], 1):.1%}"
    print_table(f"{title}: {path}", rows)


def packing_efficiency(counts: dict[str, Any], recipe: Recipe) -> str:
    return f"{counts['tokens'] / max(counts['packs'] * recipe.data.seq_length, 1):.1%}"


def readable(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(map(readable, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {readable(inner)}" for name, inner in value.items()) or "none"
    return str(value)


def _most(counts: dict[str, int]) -> str:
    """The highest of counts by name."""
    most = [f"{printable(name)}: {count:,}" for name, count in Counter(counts).most_common(ENTRIES_ON_A_SCREEN)]
    more = len(counts) - len(most)
    return ", ".join([*most, f"{more:,} more in manifest.json"] if more else most)
