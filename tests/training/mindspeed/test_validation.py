"""The loss on the validation split during training is that of our engine and of make evaluate, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.evaluate.stage import run_evaluate
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed import start
from openpangu_sft.training.run.metrics import validation_losses
from openpangu_sft.training.run.retention import iterations
from openpangu_sft.training.stage import run_sft
from posttrain import several
from upstream import require_compiler


@pytest.fixture(scope="module")
def with_validation(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for the shared model and conversations, a fifth of which is validation data."""
    place = tmp_path_factory.mktemp("validation")
    overrides = [*shared, "data.validation_share=0.2", f"paths.shards={place / 'shards'}"]
    overrides += [f"paths.dataset={place / 'dataset'}", "train.eval_interval=2", "train.iterations=4"]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
    run_preprocess(recipe)
    run_merge(recipe)
    return overrides


def trained(overrides: list[str], place: Path, *more: str) -> Recipe:
    own = [f"paths.mcore={place / 'mcore'}", f"paths.run={place / 'run'}"]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", [*overrides, *own, *more])
    run_convert(recipe)
    run_sft(recipe, [])
    return recipe


@pytest.fixture(scope="module")
def ours(with_validation: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    recipe = trained(with_validation, tmp_path_factory.mktemp("ours"))
    losses = validation_losses(recipe.path("run"))
    (evaluated,) = [one.loss for one in run_evaluate(recipe).results if one.iteration == 4]
    assert losses[4] == pytest.approx(evaluated, rel=1e-6)
    return losses


@pytest.mark.parametrize(
    "layout",
    [
        several(1),
        several(1, "train.micro_batch_size=2", "train.loss=micro_batch"),
        several(2),
        several(2, "parallel.context=2"),
        several(2, "parallel.tensor=2"),
        several(2, "parallel.pipeline=2", "parallel.num_layer_list=[2, 1]"),
    ],
    ids=["one", "micro-batch", "DP", "CP", "TP", "PP"],
)
def test_it_is_that_of_our_engine(
    upstream: Path,
    with_validation: list[str],
    ours: dict[int, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: list[str],
) -> None:
    require_compiler()
    monkeypatch.setattr(start, "SOURCES", upstream)
    recipe = trained(with_validation, tmp_path, "train.device=cpu", *layout)
    found = validation_losses(recipe.path("run"))
    if recipe.train.loss == "token":
        assert found == pytest.approx(ours, rel=1e-5)
    (evaluated,) = [one.loss for one in run_evaluate(recipe).results if one.iteration == 4]
    assert found[4] == pytest.approx(evaluated, rel=1e-5)


def test_training_stops_early_and_keeps_the_best(
    upstream: Path,
    with_validation: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    require_compiler()
    monkeypatch.setattr(start, "SOURCES", upstream)
    settings = ["train.iterations=40", "train.lr=1", "train.min_lr=1", "train.lr_warmup_iterations=3"]
    settings += ["train.eval_interval=1", "train.save_interval=1", "train.keep_checkpoints=1", "train.keep_best=true"]
    settings += ["train.early_stop.patience=2", "train.device=cpu", "train.engine=mindspeed"]
    recipe = trained(with_validation, tmp_path, *settings)
    losses = validation_losses(recipe.path("run"))
    best = min(losses, key=losses.__getitem__)
    assert len(losses) < 40
    assert iterations(recipe.path("run")) == [best, max(losses)]
    assert f"stopped early: validation loss was lowest at iteration {best}" in capfd.readouterr().err
    run_sft(recipe, [])  # it does not go on
    assert validation_losses(recipe.path("run")) == losses
