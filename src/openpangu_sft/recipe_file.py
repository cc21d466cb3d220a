"""Recipe files: YAML 1.2 (where 2e-5 is a number) plus overrides, to a checked `Recipe` or one line of complaint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from openpangu_sft.errors import UserError
from openpangu_sft.recipe import Recipe


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: texts like `train.lr=1e-5`; the value is read as YAML.

    Raises:
        UserError: not readable, not YAML, an unknown key, a wrong type, or settings that cannot work together.
    """
    if not path.is_file():
        raise UserError("no such recipe file", where=path, remedy="give one with RECIPE=…")
    try:
        content = YAML(typ="rt").load(path.read_text("utf-8"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"not valid YAML: {error.problem}", where=f"{path}{line}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", where=path) from None
    if not isinstance(content, dict):
        raise UserError("holds no settings", where=path, remedy="start from recipes/openpangu-1b.yaml")
    given: set[str] = set()
    for override in overrides:
        given.add(_apply(content, override))
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _first_complaint(error, content, given, path) from None


def _apply(content: dict[str, Any], override: str) -> str:
    """Puts one `dotted.key=value` into the content and returns the key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value", remedy="write e.g. train.lr=1e-5")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"value of override {override!r} is not valid YAML") from None
    section = content
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[last] = value
    return key


def _first_complaint(error: ValidationError, content: Any, given: set[str], path: Path) -> UserError:
    detail = error.errors(include_url=False)[0]
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    where = f"--set {key}" if key in given else f"{path}{_line(content, location)}"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return UserError(f"unknown key {key}", where=where, remedy=remedy)
    if detail["type"] == "missing":
        return UserError(f"key {key} is missing", where=path, remedy="add it; see docs/recipe.md")
    if detail["type"] == "value_error":  # our own validators, which name key, value and remedy
        return UserError(detail["msg"].replace("Value error, ", ""), where=path)
    return UserError(f"{key} = {detail['input']!r}: {detail['msg']}", where=where, remedy="see docs/recipe.md")


def _line(content: Any, location: list[str]) -> str:
    """`:line` of a key in the file, or nothing where it is not known (for instance for overrides)."""
    for part in location[:-1]:
        if not isinstance(content, Mapping) or part not in content:
            return ""
        content = content[part]
    positions = getattr(getattr(content, "lc", None), "data", None) or {}
    return f":{positions[location[-1]][0] + 1}" if location and location[-1] in positions else ""


def _known_keys(location: list[str]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return sorted(section.model_fields) if issubclass(section, BaseModel) else []
