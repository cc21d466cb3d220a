"""What every command has: the recipe's options, and a table of what it did."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Callable, Optional

import click

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import print_table

DEFAULT_RECIPE = "recipes/openpangu-1b.yaml"


class UnknownCommand(click.UsageError):
    """A command that there is not; `near` is the most similar one, if any is."""

    def __init__(self, name: str, near: Optional[str], context: click.Context) -> None:
        self.near = near
        super().__init__(f"no such command: {name}", context)


class Commands(click.Group):
    """A group that answers a mistyped command with the nearest one, as click does for options."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[Optional[str], Optional[click.Command], list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            raise UnknownCommand(args[0], close[0] if close else None, ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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


def without_torch() -> None:
    """Keeps transformers from importing torch: a tokenizer needs none, and it takes seconds and 200 MB."""
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no torch


def show(title: str, path: Path, manifest: Manifest, recipe: Optional[Recipe] = None) -> None:
    """What a stage did, on one screen."""
    counts, rows = manifest.counts, dict[str, str]()
    for name, value in counts.items():
        if name != "validation":
            rows[name.replace("_", " ")] = readable(value)
        if name == "packed" and (held_out := counts.get("validation")):
            rows["held out"] = f"{held_out['packed']:,} in {held_out['packs']:,} packs: {held_out['tokens']:,} tokens"
    if recipe and "packs" in counts:
        rows["packs full"] = f"{counts['tokens'] / (counts['packs'] * recipe.data.seq_length):.1%}"
        rows["share trained"] = f"{counts['trained_tokens'] / counts['tokens']:.1%}"
    print_table(f"{title}: {path}", rows)


def readable(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {readable(inner)}" for name, inner in value.items()) or "none"
    return str(value)
