"""What settings of a recipe cannot work together, each complaint with the keys, their values and what to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Optional

from openpangu_sft.recipe.sections import Paths, Sections
from openpangu_sft.util.errors import SizesUnknown


def complaints(recipe: Sections) -> list[str]:
    """What cannot work together across sections, most basic first."""
    data, parallel, train = recipe.data, recipe.parallel, recipe.train
    found: list[Optional[str]] = []
    with suppress(SizesUnknown):  # checked when there is a checkpoint that says them
        found.extend(_sizes(recipe))
    found += [
        _divides(
            "parallel.tensor x parallel.pipeline x parallel.context",
            parallel.tensor * parallel.pipeline * parallel.context,
            "parallel.nodes x parallel.devices_per_node",
            parallel.world,
        ),
        _divides("parallel.context", parallel.context, "data.seq_length", data.seq_length),
        _divides(
            "train.micro_batch_size x data-parallel replicas",
            train.micro_batch_size * max(parallel.data, 1),
            "train.global_batch_size",
            train.global_batch_size,
        ),
    ]
    if train.recompute.granularity == "full" and not train.recompute.num_layers:
        found.append(
            "train.recompute.granularity full with train.recompute.num_layers 0 recomputes nothing "
            "-> set train.recompute.num_layers to the number of layers, or train.recompute.granularity=none"
        )
    if train.engine == "transformers" and parallel.world != parallel.data:
        found.append(
            f"parallel.tensor {parallel.tensor}, parallel.pipeline {parallel.pipeline}, parallel.context "
            f"{parallel.context}: train.engine transformers is data parallel only -> set all three to 1"
        )
    found.append(_overlap(recipe.paths))
    return [complaint for complaint in found if complaint]


def _sizes(recipe: Sections) -> Iterator[Optional[str]]:
    """What does not go with the model's sizes."""
    model, data, parallel, recompute = recipe.model, recipe.data, recipe.parallel, recipe.train.recompute
    for name in ("num_query_groups", "ffn_hidden_size"):
        yield _divides("parallel.tensor", parallel.tensor, f"model.{name}", getattr(model, name))
    yield _stages(recipe)
    split, heads = parallel.tensor * parallel.context, model.num_attention_heads
    yield _divides("parallel.tensor x parallel.context", split, "model.num_attention_heads", heads)
    if data.seq_length > model.max_position_embeddings:
        yield (
            f"data.seq_length {data.seq_length} is above model.max_position_embeddings "
            f"{model.max_position_embeddings} -> lower data.seq_length"
        )
    if recompute.num_layers > model.num_layers:
        yield (
            f"train.recompute.num_layers {recompute.num_layers} is above model.num_layers {model.num_layers} "
            "-> lower it"
        )


def _divides(small_key: str, small: int, large_key: str, large: int) -> Optional[str]:
    if large % small == 0:
        return None
    return f"{large_key} {large} is not a multiple of {small_key} {small} -> change one of them"


def _stages(recipe: Sections) -> Optional[str]:
    """Whether every pipeline stage has layers, and all layers have a stage."""
    layers, stages, given = recipe.model.num_layers, recipe.parallel.pipeline, recipe.parallel.num_layer_list
    if given is None:
        if layers % stages == 0:
            return None
        return (
            f"model.num_layers {layers} is not a multiple of parallel.pipeline {stages} -> change one of them, "
            "or give parallel.num_layer_list"
        )
    if len(given) != stages or sum(given) != layers or min(given, default=0) < 1:
        return (
            f"parallel.num_layer_list {given} does not spread model.num_layers {layers} over parallel.pipeline "
            f"{stages} -> give {stages} numbers above 0 that add up to {layers}"
        )
    return None


def _overlap(paths: Paths) -> Optional[str]:
    """Two stages that would write over each other: a stage replaces its directory as a whole.

    `paths.raw` may be any of them: whoever has samples already does not need it.
    """
    places = {name: Path(os.path.normpath(paths[name])) for name in type(paths).model_fields}
    del places["cache"], places["raw"]
    for outer, inner in permutations(places, 2):
        if places[outer] == places[inner] or places[outer] in places[inner].parents:
            relation = "is" if places[outer] == places[inner] else "lies in"
            return (
                f"paths.{inner} {places[inner]} {relation} paths.{outer} {places[outer]}: making one would remove the "
                f"other -> give paths.{inner} a directory of its own"
            )
    return None
