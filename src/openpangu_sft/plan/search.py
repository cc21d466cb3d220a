"""Other values of recompute, context, tensor and pipeline parallel and micro batch: what fits, and what computes less.

Every candidate is a recipe of its own, checked by the recipe's own rules, and measured by the same formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Optional

from pydantic import ValidationError

from openpangu_sft.model.flops import work
from openpangu_sft.plan.memory import fits, memory_of
from openpangu_sft.plan.parts import Memory
from openpangu_sft.recipe.schema import Recipe

KEYS = {
    "parallel.context": "context",
    "parallel.tensor": "tensor",
    "parallel.pipeline": "pipeline",
}


class Candidate(NamedTuple):
    """Another recipe.

    Args:
        settings: what is changed, as SET takes it.
        keys: what of it is changed: names as `changed` takes them.
        recipe: with that.
        memory: of its fullest device.
        work: operations of an iteration, relative to one without recomputation.
    """

    settings: tuple[str, ...]
    keys: frozenset[str]
    recipe: Recipe
    memory: Memory
    work: float

    @property
    def splits(self) -> int:
        """Over how many devices a pack is split: what they exchange grows with it, and is not in `work`."""
        parallel = self.recipe.parallel
        return parallel.context * parallel.tensor * parallel.pipeline

    @property
    def converts(self) -> bool:
        """Whether the checkpoint has to be converted again, as it is cut otherwise."""
        return bool(self.keys & {"tensor", "pipeline"})


def changed(recipe: Recipe, **values: int) -> Optional[Candidate]:
    """A recipe with other values, or None where they cannot work together.

    Args:
        recipe: to begin with.
        values: of context, tensor, pipeline, micro_batch_size and recompute (layers that are computed again).
    """
    content: dict[str, Any] = recipe.model_dump()
    parallel, train, settings = content["parallel"], content["train"], []
    before = {name: parallel[name] for name in KEYS.values()}
    before |= {"micro_batch_size": train["micro_batch_size"], "recompute": recomputed(recipe)}
    after = {**before, **values}
    for key, name in KEYS.items():
        if after[name] != before[name]:
            parallel[name] = after[name]
            settings.append(f"{key}={after[name]}")
            if name == "pipeline" and parallel["num_layer_list"]:
                parallel["num_layer_list"] = None
                settings.append("parallel.num_layer_list=null")
    if after["micro_batch_size"] != before["micro_batch_size"]:
        train["micro_batch_size"] = after["micro_batch_size"]
        settings.append(f"train.micro_batch_size={after['micro_batch_size']}")
    if after["recompute"] != before["recompute"]:
        granularity = "full" if after["recompute"] else "none"
        if granularity != train["recompute"]["granularity"]:
            settings.append(f"train.recompute.granularity={granularity}")
        if after["recompute"]:
            settings.append(f"train.recompute.num_layers={after['recompute']}")
        train["recompute"] |= {"granularity": granularity, "num_layers": after["recompute"]}
    try:
        other = Recipe.model_validate(content)
    except ValidationError:
        return None
    keys = frozenset(name for name in before if after[name] != before[name])
    return Candidate(tuple(settings), keys, other, memory_of(other), work(other))


def recomputed(recipe: Recipe) -> int:
    """Layers (of each pipeline stage) that are computed again."""
    return recipe.train.recompute.num_layers if recipe.train.recompute.granularity == "full" else 0


def single_changes(recipe: Recipe) -> Iterator[Candidate]:
    """One setting changed at a time: no recompute and all of it, twice and half of the others."""
    parallel, micro = recipe.parallel, recipe.train.micro_batch_size
    wanted: list[dict[str, int]] = [{"recompute": 0}, {"recompute": recipe.model.num_layers}]
    if recipe.train.engine == "mindspeed":
        for name in KEYS.values():
            size = getattr(parallel, name)
            wanted += [{name: size * 2}, *([{name: size // 2}] if size % 2 == 0 else [])]
    wanted += [{"micro_batch_size": micro * 2}, *([{"micro_batch_size": micro // 2}] if micro % 2 == 0 else [])]
    for values in wanted:
        candidate = changed(recipe, **values)
        if candidate and candidate.settings:
            yield candidate


def nearest_that_fits(recipe: Recipe, gib: float) -> Optional[Candidate]:
    """The recipe that fits with the fewest keys changed; of several, the one that computes least and splits least."""
    return min(_that_fit(recipe, gib), key=_effort, default=None)


def lighter_that_fit(recipe: Recipe, gib: float) -> list[Candidate]:
    """Recipes that fit, compute less or split a pack over fewer devices, and do more of neither.

    For each set of keys that may be changed the best; those alone that none with fewer changes beats. The micro batch
    stays: how much faster another one is cannot be said without measuring.
    """
    now = changed(recipe)
    assert now is not None, "a recipe is checked before it comes here"
    found: dict[frozenset[str], Candidate] = {}
    for one in _that_fit(recipe, gib):
        better = one.keys and one.work <= now.work and _splits_no_more(one.recipe, recipe)
        if "micro_batch_size" in one.keys or not better:
            continue
        if one.keys not in found or (one.work, one.splits) < (found[one.keys].work, found[one.keys].splits):
            found[one.keys] = one
    best: list[Candidate] = []
    for one in sorted(found.values(), key=_effort):
        if all((one.work, one.splits) < (other.work, other.splits) for other in best):
            best.append(one)
    return best


def _that_fit(recipe: Recipe, gib: float) -> Iterator[Candidate]:
    """What fits of all valid combinations with this many devices.

    Of each with as many layers computed again as now, and with the fewest. The more layers are computed again, the
    less memory it takes and the more work it is, so no other number is better.
    """
    parallel, micro = recipe.parallel, recipe.train.micro_batch_size
    sizes = _divisors(parallel.world) if recipe.train.engine == "mindspeed" else [1]
    for context, tensor, pipeline, batch in product(sizes, sizes, sizes, _divisors(micro)):
        if parallel.world % (context * tensor * pipeline):
            continue
        other = partial(changed, recipe, context=context, tensor=tensor, pipeline=pipeline, micro_batch_size=batch)
        if other() is None:  # the rules do not ask for the number of layers
            continue
        few, many = 0, recipe.model.num_layers
        while few < many:
            middle = (few + many) // 2
            if _fits(other(recompute=middle), gib):
                many = middle
            else:
                few = middle + 1
        yield from (one for one in (other(), other(recompute=few)) if one and _fits(one, gib))


def _fits(candidate: Optional[Candidate], gib: float) -> bool:
    return candidate is not None and fits(candidate.memory, gib)


def _splits_no_more(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one.parallel, name) <= getattr(other.parallel, name) for name in KEYS.values())


def _effort(candidate: Candidate) -> tuple[int, bool, float, int, int]:
    """What is less is nearer."""
    return len(candidate.keys), candidate.converts, candidate.work, candidate.splits, candidate.memory.needed


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
