"""`auto` in a recipe: which sizes are open, and the valid recipes that plan/choose.py chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from pydantic import ValidationError

from openpangu_sft.recipe.schema import Recipe

AUTO = "auto"
SECTIONS = ("parallel", "train.recompute")
"""Sections whose value may be auto as a whole."""
SPLIT = ("tensor", "pipeline", "context")


def with_auto_split(parallel: Any) -> dict[str, Any]:
    """The section for `parallel: auto`: sizes are chosen; devices stay as given, by default one server with 8."""
    kept = parallel if isinstance(parallel, dict) else {}
    return {"devices_per_node": 8, **kept, **dict.fromkeys(SPLIT, AUTO), "num_layer_list": None}


def recompute_is_auto(content: Mapping[str, Any]) -> bool:
    """Whether a recipe's content leaves `train.recompute` open."""
    return isinstance(content.get("train"), dict) and content["train"].get("recompute") == AUTO


def valid_splits(content: Mapping[str, Any]) -> list[Recipe]:
    """Every recipe that a content allows, one where no size is auto; without recomputation where that is auto.

    Tensor and context parallel groups stay within a machine. If there is none, raises `ValidationError`, that
    of the fewest splits.
    """
    if recompute_is_auto(content):
        content = {**content, "train": {**content["train"], "recompute": {}}}
    parallel: Any = content.get("parallel")
    free = [name for name in SPLIT if isinstance(parallel, dict) and parallel.get(name) == AUTO]
    if not free:
        return [Recipe.model_validate(content)]
    devices = parallel.get("devices_per_node")
    most = devices if isinstance(devices, int) and devices <= 1000 else 0  # more are refused
    sizes = [size for size in range(1, most + 1) if not most % size]
    found, refusals = [], []
    for chosen in product(sizes or [1], repeat=len(free)):
        try:
            found.append(Recipe.model_validate({**content, "parallel": {**parallel, **dict(zip(free, chosen))}}))
        except ValidationError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return [one for one in found if one.parallel.tensor * one.parallel.context <= devices] or found
