"""The recipe with one setting changed: recompute, context, tensor and pipeline parallel size, micro batch size.

Each is a recipe of its own, checked by the recipe's own rules and estimated by the same formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

from pydantic import ValidationError

from openpangu_sft.model.flops import work
from openpangu_sft.plan.estimate import memory_of
from openpangu_sft.plan.memory import Memory
from openpangu_sft.recipe.schema import Recipe

SPLITS = ("parallel.context", "parallel.tensor", "parallel.pipeline")


class Change(NamedTuple):
    """A changed recipe: its settings as SET takes them, the memory of its fullest device, and its `work`."""

    settings: tuple[str, ...]
    memory: Memory
    work: float

    @property
    def converts(self) -> bool:
        """Whether the checkpoint has to be converted again, as it is sharded otherwise."""
        return any(setting.startswith(SPLITS[1:]) for setting in self.settings)

    def __str__(self) -> str:
        then = ", then make convert" if self.converts else ""
        return f'SET="{" ".join(self.settings)}"{then}'


def changed(recipe: Recipe, values: dict[str, Any]) -> Optional[Change]:
    """A recipe with other values by key; None where the recipe's rules refuse them."""
    content = recipe.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        section = content
        for each in sections:
            section = section[each]
        section[name] = value
    try:
        other = Recipe.model_validate(content)
    except ValidationError:
        return None
    settings = tuple(f"{key}={'null' if value is None else value}" for key, value in values.items())
    return Change(settings, memory_of(other), work(other))


def single_changes(recipe: Recipe) -> list[Change]:
    """All valid ones: no recompute, full recompute, and twice and half of the other sizes."""
    return [change for values in _values(recipe) if (change := changed(recipe, values))]


def _values(recipe: Recipe) -> Iterator[dict[str, Any]]:
    parallel, recompute, layers = recipe.parallel, recipe.train.recompute, recipe.model.num_layers
    full = {} if recompute.granularity == "full" else {"train.recompute.granularity": "full"}
    if not full:
        yield {"train.recompute.granularity": "none"}
    if full or recompute.num_layers != layers:
        yield {**full, "train.recompute.num_layers": layers}
    if recipe.train.engine == "mindspeed":
        for key in SPLITS:
            listed = key == "parallel.pipeline" and parallel.num_layer_list
            for size in _twice_and_half(getattr(parallel, key.partition(".")[2])):
                yield {key: size, **({"parallel.num_layer_list": None} if listed else {})}
    for size in _twice_and_half(recipe.train.micro_batch_size):
        yield {"train.micro_batch_size": size}


def _twice_and_half(size: int) -> list[int]:
    return [size * 2] if size % 2 else [size * 2, size // 2]


def first_that_fits(changes: Iterable[Change], gib: float) -> Optional[Change]:
    """Of those that fit, one without a new conversion first, then the one that computes least."""
    fitting = (change for change in changes if change.memory.verdict(gib) == "yes")
    return min(fitting, key=lambda one: (one.converts, one.work, one.memory.needed), default=None)
