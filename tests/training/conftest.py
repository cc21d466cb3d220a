"""A dataset and a converted checkpoint to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, TINY, conversation, write_samples
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.load import load_recipe

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> list[str]:
    """Overrides that name a dataset and an mcore checkpoint, made once."""
    cache = tmp_path_factory.mktemp("inputs")
    overrides = [*TINY, f"paths.cache={cache}", f"paths.hf={tiny_hf}"]
    samples = [
        conversation(f"第 {n} 个问题是什么？", f"这是第 {n} 个回答。", system="" if n % 3 else "简短回答")
        for n in range(30)
    ]
    samples += [conversation(f"What is {n} plus one?", f"It is {n + 1}.", "Sure?", "Yes.") for n in range(20)]
    write_samples(cache / "dataset/all.jsonl", samples)
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
    run_preprocess(recipe)
    run_merge(recipe)
    run_convert(recipe)
    return overrides


@pytest.fixture
def options(inputs: list[str], tmp_path: Path) -> Options:
    """Overrides for a run in the test's own directory."""

    def make(*overrides: str) -> list[str]:
        return [*inputs, f"paths.run={tmp_path / 'run'}", *overrides]

    return make
