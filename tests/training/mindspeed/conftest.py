"""One model and one dataset, to train on them in MindSpeed-LLM and in our own engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
import torch

from checkpoint_files import set_config, write_hf
from conftest import ROOT, TINY, conversation, write_samples
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.stage import run_sft

ITERATIONS = 5

SETTINGS = [
    "model.num_layers=3",
    "data.seq_length=96",
    "train.global_batch_size=8",
    f"train.iterations={ITERATIONS}",
    "train.lr_warmup_iterations=1",
]

MakeRun = Callable[..., Recipe]
Engine = Callable[..., tuple[list[float], ...]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> list[str]:
    """Overrides that name one model with random weights and one dataset of conversations."""
    cache = tmp_path_factory.mktemp("training")
    overrides = [*TINY, *SETTINGS, f"paths.cache={cache}", f"paths.hf={cache / 'hf'}"]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
    generator = torch.Generator().manual_seed(1)  # norms and biases too, so that none can be lost unnoticed
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3 + (0.5 if "norm" in name else 0)
        for name, shape in hf_shapes(recipe.model).items()
    }
    write_hf(recipe.path("hf"), tiny_hf, tensors)
    set_config(recipe.path("hf"), num_hidden_layers=recipe.model.num_layers)
    drawn, talks = random.Random(1), []
    for number in range(150):
        contents = [f"{drawn.choice('问答说')} {number * drawn.randint(1, 9)}" for _ in range(2 * drawn.randint(1, 3))]
        talks.append(conversation(*contents, system=drawn.choice(["", "简短"])))
    write_samples(recipe.path("samples") / "talks.jsonl", talks)
    run_preprocess(recipe)
    run_merge(recipe)
    return overrides


@pytest.fixture
def make_run(shared: list[str], tmp_path: Path) -> MakeRun:
    """Gives recipes for a run of the shared model, in a dtype, on the shared dataset, cut as overrides say."""

    def make(*overrides: str, dtype: Optional[str] = None) -> Recipe:
        own = [f"paths.mcore={tmp_path / 'mcore'}", f"paths.run={tmp_path / 'run'}"]
        recipe = load_recipe(ROOT / "recipes/demo.yaml", [*shared, *own, *overrides])
        run_convert(recipe, dtype=dtype)
        return recipe

    return make


@pytest.fixture(scope="module")
def engine(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Losses and gradient norms of our engine's run, by its settings."""
    done: dict[tuple[str, ...], tuple[list[float], ...]] = {}

    def run(*settings: str) -> tuple[list[float], ...]:
        if settings not in done:
            place = tmp_path_factory.mktemp("engine")
            own = [f"paths.mcore={place / 'mcore'}", f"paths.run={place / 'run'}"]
            recipe = load_recipe(ROOT / "recipes/demo.yaml", [*shared, *own, *settings])
            run_convert(recipe)
            run_sft(recipe, [])
            entries = read_metrics(recipe.path("run"))
            done[settings] = tuple([entry[name] for entry in entries] for name in ("loss", "grad_norm"))
        return done[settings]

    return run
