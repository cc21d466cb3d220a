"""What a run was made with: the whole recipe, and a line for every start of training.

run/recipe.yaml     the recipe with its overrides; sft can be run with it again
run/starts.jsonl    time, iteration, command, versions; a line is added whenever training resumes
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from pydantic import BaseModel
from ruamel.yaml import YAML

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest, write_manifest
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.recipe.schema import ChosenRecipe, Recipe
from openpangu_sft.util import ascend
from openpangu_sft.util.console import say
from openpangu_sft.util.jsonl import add_line, read_lines

RECIPE, STARTS = "recipe.yaml", "starts.jsonl"
PACKAGES = ("torch", "torch-npu", "transformers", "numpy", "sentencepiece")
IMAGE = "OPENPANGU_SFT_IMAGE"  # set by scripts/run.sh in a container: the image's name and id


class Start(BaseModel):
    """Training begins or resumes."""

    time: str  # UTC, in ISO 8601
    iteration: int  # resumed after; 0 for a new run
    command: list[str]
    versions: dict[str, str]  # of this program, packages, driver and CANN
    image: str = ""  # name and id; empty outside a container
    sources: dict[str, str] = {}  # commit and patches of each upstream repository; of the mindspeed engine only
    changed: dict[str, str] = {}  # settings that were others when the run last started: "2e-05 -> 1e-05"


def record_start(
    recipe: Recipe, manifest: Manifest, iteration: int, command_line: Sequence[str], sources: Optional[Path] = None
) -> None:
    """Writes manifest and recipe to `paths.run`, and adds a `Start`; `sources` is the folder of upstream's sources."""
    run, changed = recipe.path("run"), dict[str, str]()
    if (run / MANIFEST).is_file():
        earlier = parse_manifest(run / MANIFEST, "").settings
        pairs = {key: (earlier.get(key, value), value) for key, value in manifest.settings.items()}
        changed = {key: f"{one} -> {other}" for key, (one, other) in pairs.items() if one != other}
    write_manifest(run, manifest)
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(recipe.model_dump(), stream)
    head = f"# The recipe of this run, overrides included: make sft RECIPE=… repeats it. openpangu-sft {__version__}.\n"
    if isinstance(recipe, ChosenRecipe):
        head += f"# {recipe.chosen}\n"
    write_durably(run / RECIPE, head + stream.getvalue())
    start = Start(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        iteration=iteration,
        command=["openpangu-sft", *command_line],
        versions=versions(),
        image=os.environ.get(IMAGE, ""),
        sources=_commits(parse_manifest(sources / MANIFEST, "")) if sources else {},
        changed=changed,
    )
    for key, values in changed.items():
        say(f"{key} changes: {values}")
    add_line(run / STARTS, start.model_dump())


def read_starts(run: Path) -> list[dict[str, Any]]:
    """All starts so far, with the fields of `Start`, none in a run of 0.4.0; raises `UserError` for another line."""
    return read_lines(run / STARTS, Start)


def versions() -> dict[str, str]:
    """Versions of this program, Python, the packages that affect results, and driver and CANN if installed."""
    found = {"openpangu-sft": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {**found, **ascend.versions(os.environ)}


def _commits(sources: Manifest) -> dict[str, str]:
    return {
        name: " + ".join([chosen["commit"], *(f"{name}/{Path(patch).stem}" for patch in chosen["patches"])])
        for name, chosen in sources.settings.items()
    }
