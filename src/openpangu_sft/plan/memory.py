"""Memory of the recipe's engine, and whether a device of some size holds it. Pure."""

from __future__ import annotations

from openpangu_sft.plan.mindspeed_memory import mindspeed_memory
from openpangu_sft.plan.parts import GIB, Memory
from openpangu_sft.plan.transformers_memory import transformers_memory
from openpangu_sft.recipe.schema import Recipe

SPARE = 0.1
"""Share of a device that is left to what is not counted: the context of CANN or CUDA, workspaces of operators, and
gaps in the allocator's memory. A choice, not a measurement; docs/plan.md."""


def memory_of(recipe: Recipe) -> Memory:
    """What the fullest device of a run holds."""
    return mindspeed_memory(recipe) if recipe.train.engine == "mindspeed" else transformers_memory(recipe)


def fits(memory: Memory, gib: float) -> bool:
    """Whether it fits a device of so many GiB, and leaves what has to be left."""
    return memory.needed <= room(gib)


def room(gib: float) -> float:
    """Bytes that a run may take on a device of so many GiB."""
    return gib * GIB * (1 - SPARE)


def verdict(memory: Memory, gib: float) -> str:
    """In one word: yes, tight (it fits, but leaves less than has to be left), or no."""
    if fits(memory, gib):
        return "yes"
    return "tight" if memory.needed <= gib * GIB else "no"
