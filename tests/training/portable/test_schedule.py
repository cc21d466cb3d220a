"""Learning rate and weight decay groups."""

from __future__ import annotations

import pytest
import torch

from conftest import ROOT, MakeRecipe
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.training.portable.schedule import learning_rate, parameter_groups


def test_the_published_schedule_at_its_corners() -> None:
    train = load_recipe(ROOT / "recipes/openpangu-1b.yaml").train
    assert learning_rate(train, 1) == 0.0  # Megatron steps its schedule after the optimizer
    assert learning_rate(train, 2) == pytest.approx(2e-5 / 200)
    assert learning_rate(train, 101) == pytest.approx(1e-5)
    assert learning_rate(train, 201) == pytest.approx(2e-5)
    assert learning_rate(train, 401) == pytest.approx((2e-5 + 2e-6) / 2)  # half of the cosine
    assert learning_rate(train, 600) > 2e-6
    assert learning_rate(train, 601) == pytest.approx(2e-6)
    assert learning_rate(train, 1000) == 2e-6


def test_without_warm_up_the_first_iteration_has_the_full_rate(make_recipe: MakeRecipe) -> None:
    train = make_recipe("train.lr_warmup_iterations=0").train
    assert learning_rate(train, 1) == train.lr


@pytest.mark.parametrize(
    ("style", "halfway", "near_the_end"),
    [("linear", 5.5e-4, 1e-3 - 9e-4 * 0.95), ("constant", 1e-3, 1e-3), ("WSD", 1e-3, 1e-4 + 9e-4 * 0.25)],
)
def test_after_the_warm_up(make_recipe: MakeRecipe, style: str, halfway: float, near_the_end: float) -> None:
    given = ["train.lr=1e-3", "train.min_lr=1e-4", "train.iterations=125"]
    given += ["train.lr_warmup_iterations=0", "train.lr_warmup_ratio=0.2"]
    train = make_recipe(*given, f"train.lr_decay_style={style}", "train.lr_wsd_decay_ratio=0.16").train
    assert train.warmup == 25
    assert learning_rate(train, 6) == pytest.approx(2e-4)
    assert learning_rate(train, 26) == pytest.approx(1e-3)
    assert learning_rate(train, 76) == pytest.approx(halfway)
    assert learning_rate(train, 121) == pytest.approx(near_the_end)


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    decayed, free = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (2, 3)]
    assert decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in free["params"]] == [(3,), (3,), (2,)]
    assert free["weight_decay"] == 0.0
