"""auto in a recipe: what it leaves open, and what overrides make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of

OPENPANGU, FAST, DEMO = (ROOT / f"recipes/{name}.yaml" for name in ("openpangu-1b", "openpangu-1b-fast", "demo"))
ALL = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (1, 2, 4), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
"""TP, PP and CP of the 1B on 8 devices: 6 groups, 26 layers and 12 heads."""


def left_open(path: Path, *overrides: str) -> tuple[list[tuple[int, int, int]], bool]:
    """The splits to choose from, and whether recomputation is to be chosen."""
    seen: list[Any] = []

    def choose(recipes: Sequence[Recipe], recompute: bool) -> Recipe:
        seen.append((recipes, recompute))
        return recipes[0]

    recipe = load_recipe(path, overrides, choose)
    recipes, recompute = seen[0] if seen else ([recipe], False)
    return [(one.parallel.tensor, one.parallel.pipeline, one.parallel.context) for one in recipes], recompute


@pytest.mark.parametrize(
    ("overrides", "splits", "recompute"),
    [
        ((), [(1, 1, 2)], False),
        (("parallel=auto",), ALL, False),
        (("train.recompute=auto",), [(1, 1, 2)], True),
        (("parallel.context=auto",), [(1, 1, 1), (1, 1, 2), (1, 1, 4)], False),
        (("parallel=auto", "parallel.tensor=2"), [split for split in ALL if split[0] == 2], False),
        (("parallel=auto", "parallel.devices_per_node=2"), [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)], False),
        (("train.recompute=auto", "train.recompute.granularity=none"), [(1, 1, 2)], False),
        (("parallel=auto", "train.global_batch_size=4"), [split for split in ALL if split not in [ALL[0]]], False),
        (("parallel=auto", "train.engine=transformers"), [(1, 1, 1)], False),
    ],
    ids=["none", "all", "recompute", "context", "tensor given", "two", "recompute given", "small batch", "portable"],
)
def test_what_is_left_open(overrides: tuple[str, ...], splits: list[tuple[int, int, int]], recompute: bool) -> None:
    assert left_open(OPENPANGU, *overrides) == (splits, recompute)


def test_of_a_file() -> None:
    assert left_open(FAST) == (ALL, True)
    found = load_recipe(FAST, choose=lambda recipes, _: recipes[0])
    assert (found.parallel.nodes, found.parallel.devices_per_node) == (1, 8)
    assert found.train.recompute.granularity == "none"
    assert left_open(FAST, "parallel.tensor=1", "parallel.pipeline=1", "parallel.context=2")[0] == [(1, 1, 2)]
    granularity, layers = "train.recompute.granularity=full", "train.recompute.num_layers=3"
    for given in ((granularity, layers), (layers, granularity), (layers,)):
        assert not left_open(FAST, *given)[1]
        recompute = load_recipe(FAST, given, lambda recipes, _: recipes[0]).train.recompute
        assert (recompute.granularity, recompute.num_layers) == ("full", 3)


def test_an_override_keeps_devices_and_padding() -> None:
    given = ["parallel.nodes=2", "parallel.make_vocab_size_divisible_by=4", "parallel.num_layer_list=[26]"]
    recipe = load_recipe(OPENPANGU, [*given, "parallel=auto"], lambda recipes, _: recipes[-1])
    parallel = recipe.parallel
    assert (parallel.world, parallel.make_vocab_size_divisible_by, parallel.num_layer_list) == (16, 4, None)
    assert parallel.tensor * parallel.context <= 8  # tensor and context parallel groups stay within a machine


def test_the_fast_recipe_is_the_published_one_but_for_its_split_and_run() -> None:
    published, fast = load_recipe(OPENPANGU), load_recipe(FAST, ["parallel.context=2"], lambda recipes, _: recipes[0])
    differing = {name for name in Recipe.model_fields if getattr(published, name) != getattr(fast, name)}
    assert differing <= {"paths", "train"}
    assert fast.train.model_copy(update={"recompute": published.train.recompute}) == published.train
    assert fast.paths.model_copy(update={"run": published.paths.run}) == published.paths


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train=auto",), "--set train: train is a section"),
        (("parallel=fast",), "--set parallel: parallel is a section"),
        (("parallel.tensor=automatic",), "--set parallel.tensor: parallel.tensor = 'automatic': Input should be"),
        (("parallel=auto", "parallel.tensor=3"), "8 is not a multiple of parallel.tensor x"),
        (
            ("parallel=auto", "parallel.devices_per_node=x"),
            "--set parallel.devices_per_node: parallel.devices_per_node",
        ),
        (("parallel=auto", "parallel.devices_per_node=1000000000000"), "less than or equal to 1000"),
        (("parallel=auto", "train.lr=x"), "--set train.lr: train.lr = 'x'"),
        (
            ("train.recompute=auto", "train.recompute.activation=true"),
            "--set train.recompute.activation: train.recompute is auto, which chooses this too -> set",
        ),
        (("parallel=auto",), "the recipe holds auto, which is not chosen here -> give numbers"),
    ],
    ids=["section", "word", "size", "indivisible", "devices", "very many", "elsewhere", "part", "nobody chooses"],
)
def test_what_is_refused(overrides: tuple[str, ...], said: str) -> None:
    assert said in refusal_of(load_recipe, OPENPANGU, overrides)
