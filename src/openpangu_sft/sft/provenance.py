"""What a run was made with, for whoever asks later: the whole recipe, and a line for every start of training.

run/recipe.yaml     the recipe with its overrides: sft can be run from it again
run/starts.jsonl    time, iteration, command, versions; added to each time that training goes on
"""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from ruamel.yaml import YAML

from openpangu_sft import __version__, ascend_files
from openpangu_sft.artefact import MANIFEST, parse_manifest, write_durably
from openpangu_sft.errors import UserError
from openpangu_sft.recipe import Recipe

RECIPE, STARTS = "recipe.yaml", "starts.jsonl"
PACKAGES = ("torch", "torch-npu", "transformers", "numpy", "sentencepiece")
IMAGE = "OPENPANGU_SFT_IMAGE"
"""Set by scripts/run.sh in a container: the image's name and id."""


def record_start(recipe: Recipe, iteration: int, command_line: Sequence[str], sources: Optional[Path] = None) -> None:
    """Notes that training begins, or goes on, in `paths.run`.

    Args:
        iteration: that it goes on from.
        command_line: of openpangu-sft.
        sources: where MindSpeed-LLM lies, for the engine that runs it; commits and patches are noted.
    """
    run = recipe.path("run")
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(recipe.model_dump(), stream)
    head = f"# The recipe of this run, overrides included: make sft RECIPE=… repeats it. openpangu-sft {__version__}.\n"
    write_durably(run / RECIPE, head + stream.getvalue())
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "iteration": iteration,
        "command": ["openpangu-sft", *command_line],
        "versions": versions(),
        "image": os.environ.get(IMAGE, ""),
        "sources": _commits(sources) if sources else {},
    }
    with (run / STARTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(start, ensure_ascii=False) + "\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """All starts so far; none for a run of version 0.4.0 or before. A line that is cut off is left out."""
    found = []
    path = run / STARTS
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def versions() -> dict[str, str]:
    """Of this program, Python, the packages that decide what comes out, and of driver and CANN where they are."""
    found = {"openpangu-sft": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, **ascend_files.versions(os.environ)}


def _commits(directory: Path) -> dict[str, str]:
    """Commit and patches of each of upstream's repositories."""
    try:
        settings = parse_manifest(directory / MANIFEST, "").settings
    except (OSError, UserError):
        return {}
    return {
        name: " + ".join([chosen["commit"], *(f"{name}/{Path(patch).stem}" for patch in chosen["patches"])])
        for name, chosen in settings.items()
    }
