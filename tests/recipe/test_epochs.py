"""train.epochs instead of train.iterations, and a warm-up as a share."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from openpangu_sft.artifacts.artifact import Manifest, write_manifest
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.sections import Train
from openpangu_sft.training.stage import run_manifest
from refusals import refusal_of


def train_of(cache: Path, *overrides: str) -> Train:
    return load_recipe(ROOT / "recipes/openpangu-1b.yaml", [f"paths.cache={cache}", *overrides]).train


def write_dataset(cache: Path, packs: int) -> None:
    directory = cache / "finetune_dataset/merged"
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, Manifest("dataset", settings={}, inputs={}, counts={"packs": packs}))


@pytest.mark.parametrize(
    ("packs", "epochs", "iterations"), [(1280, "3", 30), (1281, "3", 31), (100, "0.5", 1), (12800, "1.1", 110)]
)
def test_iterations_follow_from_the_packs(tmp_path: Path, packs: int, epochs: str, iterations: int) -> None:
    write_dataset(tmp_path, packs)
    train = train_of(tmp_path, f"train.epochs={epochs}", "train.lr_warmup_ratio=0.1")
    assert (train.iterations, train.warmup) == (iterations, iterations // 10)


def test_without_a_dataset_they_are_not_known(tmp_path: Path) -> None:
    train = train_of(tmp_path, "train.epochs=3", "train.lr_warmup_ratio=0.03")
    assert (train.epochs, train.iterations, train.warmup) == (3.0, 0, 0)


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, 1280)
    overrides = [f"paths.cache={tmp_path}", "train.epochs=3"]
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml", overrides)  # other stages do not mind
    said = refusal_of(run_manifest, recipe)
    assert "a warm-up of 200 iterations leaves too few of train.iterations 30 -> lower the warm-up" in said


def test_an_override_replaces_the_other_key_of_the_file(tmp_path: Path) -> None:
    assert train_of(tmp_path, "train.epochs=3", "train.lr_warmup_ratio=0.1").lr_warmup_iterations == 0
    assert train_of(tmp_path, "train.iterations=700").iterations == 700
    given = ("train.epochs=3", "train.iterations=10", "train.lr_warmup_iterations=0")
    said = refusal_of(train_of, tmp_path, *given)
    assert "train.epochs 3 and train.iterations 10 exclude each other -> give one" in said
    assert "are 0 -> give one" in refusal_of(train_of, tmp_path, "train.iterations=0")


def test_wsd_needs_room_for_its_decay(tmp_path: Path) -> None:
    wsd = ("train.lr_decay_style=WSD", "train.lr_wsd_decay_ratio=0.7")
    assert "lower the warm-up" in refusal_of(train_of, tmp_path, *wsd)
    assert train_of(tmp_path, *wsd[:1]).lr_wsd_decay_ratio == 0.1
