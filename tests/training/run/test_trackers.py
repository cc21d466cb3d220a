"""Trackers: what TensorBoard, SwanLab and Weights & Biases themselves read of a run."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import PATIENCE, MakeRecipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run import trackers
from openpangu_sft.training.run.metrics import Row
from refusals import refusal_of

VARIABLES = [f"{name}_{what}" for name in ("WANDB", "SWANLAB") for what in ("MODE", "API_KEY", "BASE_URL", "API_HOST")]


@pytest.fixture
def recipe_of(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRecipe:
    """Recipes of runs of this test, without the settings of whoever runs it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return lambda *overrides: make_recipe(f"paths.run={tmp_path / 'tracked'}", *overrides)


def rows(*iterations: int) -> list[Row]:
    return [
        Row(
            iteration=one,
            loss=1 / one,
            lr=1e-3 * one,
            grad_norm=2.0,
            tokens=300,
            seconds=2,
            validation=0.5 if one == 2 else None,
        )
        for one in iterations
    ]


def send(recipe: Recipe, *iterations: int, begun: int = 0) -> Path:
    """Sends iterations to the recipe's trackers; returns the run's directory."""
    with trackers.tracked(recipe, begun) as track:
        for row in rows(*iterations):
            track(row)
    return recipe.path("run")


def wait_for(path: Path, content: bytes) -> None:
    """Their own processes may write after they have answered that the run is finished."""
    end = time.monotonic() + PATIENCE
    while content not in path.read_bytes():
        assert time.monotonic() < end, path
        time.sleep(0.1)


def test_tensorboard_by_default_and_nothing_twice_after_a_resume(recipe_of: MakeRecipe) -> None:
    recipe = recipe_of()
    assert recipe.train.trackers == ["tensorboard"]
    send(recipe, 1, 2, 3, 4)
    folder = send(recipe, 3, 4, 5, begun=2) / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "train/grad_norm",
        "train/loss",
        "train/lr",
        "train/tokens_per_second",
        "validation/loss",
    ]
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({one: 1 / one for one in range(1, 6)})
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(2, 0.5)]
    assert events.Scalars("train/tokens_per_second")[0].value == 150


def test_without_a_key_both_services_record_offline(recipe_of: MakeRecipe) -> None:
    run = send(recipe_of("train.trackers=[swanlab,wandb]"), 1, 2)
    (wandb,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    (swanlab,) = (run / "swanlab").glob("run-*/run-*.swanlab")
    for path in (wandb, swanlab):
        wait_for(path, b"validation/loss")
    assert not (run / "tensorboard").exists()


def test_with_a_key_and_no_server_they_record_offline(
    recipe_of: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    run = send(recipe_of("train.trackers=[wandb]"), 1)
    assert list((run / "wandb").glob("offline-run-*"))
    assert "wandb records offline: http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_with_a_key_and_a_server_they_record_online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert trackers._mode("wandb", address) == "online"  # it answers 501
        server.shutdown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers._mode("wandb", address) == "offline"


def test_only_what_is_named_is_imported(recipe_of: MakeRecipe, tmp_path: Path) -> None:
    code = "import sys, openpangu_sft.training.stage; assert not {'wandb', 'swanlab', 'tensorboardX'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, env={**os.environ})


def test_a_tracker_that_is_not_installed_is_named(recipe_of: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    said = refusal_of(trackers.require_trackers, recipe_of("train.trackers=[wandb]"))
    remedy = "install it (pip install wandb), or take it out of train.trackers"
    assert said == f"train.trackers wandb: wandb is not installed -> {remedy}"


@pytest.mark.parametrize(("tracker", "mode"), [("wandb", "online"), ("swanlab", "cloud"), ("swanlab", "online")])
def test_online_without_a_key_would_ask_for_it(
    recipe_of: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tracker: str, mode: str
) -> None:
    name = tracker.upper()
    monkeypatch.setenv(f"{name}_MODE", mode)
    said = refusal_of(trackers.require_trackers, recipe_of(f"train.trackers=[{tracker}]"))
    assert said == f"{name}_MODE={mode} without {name}_API_KEY -> export {name}_API_KEY, or unset {name}_MODE"
