"""Validation during training: its number, the best checkpoint, and an early end."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PATIENCE, ROOT, MakeRecipe
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.evaluate.stage import run_evaluate
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.metrics import Row, append, validation_losses
from openpangu_sft.training.run.retention import iterations, stops_early
from openpangu_sft.training.stage import run_sft
from refusals import refusal_of
from training.conftest import Options


@pytest.fixture
def validating(options: Options, tmp_path: Path) -> Options:
    """Overrides for runs with a validation split of their own."""

    def make(*more: str) -> list[str]:
        own = ["data.validation_share=0.3", f"paths.shards={tmp_path / 'shards'}", f"paths.dataset={tmp_path / 'data'}"]
        return options(*own, "train.eval_interval=2", *more)

    recipe = recipe_of(make())
    run_preprocess(recipe)
    run_merge(recipe)
    return make


def recipe_of(overrides: list[str]) -> Recipe:
    return load_recipe(ROOT / "recipes/demo.yaml", overrides)


def test_it_is_the_number_of_make_evaluate_with_any_number_of_processes(validating: Options, tmp_path: Path) -> None:
    overrides = validating("train.global_batch_size=4", "parallel.devices_per_node=2")
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "openpangu_sft", "sft", "--recipe", str(ROOT / "recipes/demo.yaml"), *sets]
    subprocess.run(command, check=True, timeout=PATIENCE)
    alone = recipe_of([*validating("train.global_batch_size=4"), f"paths.run={tmp_path / 'alone'}"])
    run_sft(alone, [])
    losses = validation_losses(tmp_path / "alone")
    assert list(losses) == [2, 4, 6]
    assert validation_losses(tmp_path / "run") == pytest.approx(losses, rel=1e-6)
    evaluated = {one.iteration: one.loss for one in run_evaluate(alone, wanted="all").results}
    assert losses[6] == pytest.approx(evaluated[6], rel=1e-6)


def test_the_best_checkpoint_is_kept_and_training_ends_early(
    validating: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.iterations=60", "train.lr=0.5", "train.min_lr=0.5", "train.lr_warmup_iterations=6"]
    settings += ["train.save_interval=2", "train.keep_checkpoints=1", "train.keep_best=true"]
    recipe = recipe_of(validating(*settings, "train.early_stop.patience=3"))
    run_sft(recipe, [])
    losses = validation_losses(recipe.path("run"))
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 * 3 < 60
    assert iterations(recipe.path("run")) == [best, max(losses)]
    said = f"stopped early: validation loss was lowest at iteration {best}"
    shown = capsys.readouterr().err
    assert said in shown
    assert f"iteration 2: validation loss {losses[2]:.4f} (the lowest so far)" in shown
    last = max(losses)
    assert f"iteration {last}: validation loss {losses[last]:.4f} (lowest: {losses[best]:.4f} at iteration" in shown
    run_sft(recipe, [])  # it does not go on
    assert said in capsys.readouterr().err
    assert validation_losses(recipe.path("run")) == losses
    assert [one.iteration for one in run_evaluate(recipe, wanted="best").results] == [0, best]


def test_evaluations_since_the_lowest(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.eval_interval=2", "train.early_stop.patience=2")
    assert (
        stops_early(recipe, {}) == stops_early(recipe, {2: 3.0, 4: 2.0}) == stops_early(recipe, {2: 1.0, 4: 2.0}) == ""
    )
    said = "stopped early: validation loss was lowest at iteration 2 (1.0000), 2 evaluations ago"
    assert stops_early(recipe, {2: 1.0, 4: 2.0, 6: 1.0}) == said
    assert stops_early(make_recipe(), {2: 1.0, 4: 2.0, 6: 1.0}) == ""


def test_what_it_needs(options: Options, make_recipe: MakeRecipe) -> None:
    said = refusal_of(run_sft, recipe_of(options("train.eval_interval=2")), [])
    assert "has no validation split, and train.eval_interval asks for evaluations -> set data.validation_share" in said
    assert "need evaluations -> set train.eval_interval" in refusal_of(make_recipe, "train.keep_best=true")
    keep = ("train.keep_best=true", "train.eval_interval=2", "train.save_interval=3")
    assert "train.save_interval 3 is not a multiple of train.eval_interval 2" in refusal_of(make_recipe, *keep)
    assert "train.eval_interval 7 is above train.iterations 6" in refusal_of(make_recipe, "train.eval_interval=7")


def test_the_last_iteration_is_evaluated_too(validating: Options) -> None:
    recipe = recipe_of(validating("train.eval_interval=4"))
    run_sft(recipe, [])
    assert list(validation_losses(recipe.path("run"))) == [4, 6]


def test_a_loss_that_is_not_a_number_is_never_the_best(validating: Options) -> None:
    wild = ["train.lr=1e22", "train.min_lr=1e21", "train.lr_warmup_iterations=1", "train.save_interval=2"]
    recipe = recipe_of(validating(*wild, "train.keep_best=true"))
    assert "validation loss nan after iteration 2" in refusal_of(run_sft, recipe, [])
    assert iterations(recipe.path("run")) == []  # not saved
    append(recipe.path("run"), Row(iteration=2, loss=1, lr=1, grad_norm=1, tokens=1, seconds=1, validation=math.nan))
    assert validation_losses(recipe.path("run")) == {}
