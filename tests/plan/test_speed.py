"""make plan's time: from a run's own speed only where that run was made as the recipe says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.plan.report import Report, speed_of
from openpangu_sft.plan.show import show_report
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.metrics import DeviceMemory, Row, append
from openpangu_sft.training.run.provenance import RECIPE, record_start
from plan.test_estimate import published

ITERATION = 128 * 32768


def log(run: Path, *seconds: float, after: int = 0) -> None:
    """Iterations of the published batch that took so long."""
    for number, each in enumerate(seconds, after + 1):
        figures = {"loss": 1.0, "lr": 1e-5, "grad_norm": 1.0, "tokens": ITERATION, "seconds": each}
        append(run, Row(iteration=number, **figures))


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    """The published recipe, and a run that was made with it."""
    recipe = published(f"paths.run={tmp_path}")
    record_start(recipe, Manifest("run"), 0, ["sft"])
    return recipe


def again(made: Recipe, *overrides: str) -> Recipe:
    """The recipe of that run with overrides."""
    return published(f"paths.run={made.paths.run}", *overrides)


def test_no_run(tmp_path: Path) -> None:
    assert speed_of(published(f"paths.run={tmp_path}"), None) == (None, "unknown", None)


def test_no_iteration_yet(made: Recipe) -> None:
    assert speed_of(made, None) == (None, "unknown", None)


def test_a_run_of_the_same_recipe_is_measured(made: Recipe) -> None:
    log(made.path("run"), 100, 20, 20, 60, float("nan"))
    assert speed_of(made, None) == (ITERATION / 20, "measured, median of 3 iterations", None)
    assert speed_of(made, 5.0) == (5.0, "given", None)
    report = Report(made, [64])
    assert report.seconds == pytest.approx(600 * 20)


@pytest.mark.parametrize(
    "override",
    ["train.lr=1e-5", "train.iterations=700", "train.save_interval=10", "train.device_tflops=200", "data.workers=3"],
)
def test_what_changes_no_speed_may_differ(made: Recipe, override: str) -> None:
    log(made.path("run"), 20, 20)
    assert speed_of(again(made, override), None).tokens == ITERATION / 20


@pytest.mark.parametrize(
    ("overrides", "key", "was"),
    [
        (["train.global_batch_size=256", "data.seq_length=16384", "parallel.nodes=4"], "parallel.nodes", "1"),
        (["data.seq_length=16384"], "data.seq_length", "32768"),
        (["parallel.nodes=4"], "parallel.nodes", "1"),
        (["train.global_batch_size=256"], "train.global_batch_size", "128"),
        (["train.micro_batch_size=2"], "train.micro_batch_size", "1"),
        (["train.precision=fp32"], "train.precision", "bf16"),
        (["train.device=cpu"], "train.device", "auto"),
        (["train.engine=transformers", "parallel.context=1"], "train.engine", "mindspeed"),
        (["train.recompute.num_layers=5"], "train.recompute.num_layers", "26"),
        (["train.lora.rank=8"], "train.lora.rank", "0"),
        (["train.upstream_flags=[--use-cp-send-recv-overlap]"], "train.upstream_flags", "[]"),
        (["parallel.context=4"], "parallel.context", "2"),
        (["parallel.tensor=2"], "parallel.tensor", "1"),
        (["parallel.pipeline=2"], "parallel.pipeline", "1"),
        (["model.num_layers=27"], "model.num_layers", "26"),
    ],
)
def test_a_run_of_another_recipe_says_nothing(made: Recipe, overrides: list[str], key: str, was: str) -> None:
    log(made.path("run"), *[20.0] * 10)
    other = again(made, *overrides)
    speed = speed_of(other, None)
    assert speed.tokens is None
    assert speed.source.startswith("unknown, as the run in ")
    assert f"{key}={was}" in speed.source
    report = Report(other, [64])
    assert report.seconds is None
    batch, length = other.train.global_batch_size, other.data.seq_length
    assert report.least_seconds == pytest.approx(600 * batch * length / report.highest_rate)


def test_a_run_that_says_no_recipe(made: Recipe) -> None:
    """Of 0.4.0 or before."""
    run = made.path("run")
    log(run, 20, 20)
    (run / RECIPE).unlink()
    speed = speed_of(made, None)
    assert speed.tokens is None
    assert RECIPE in speed.source
    (run / RECIPE).write_text("train: {", "utf-8")
    assert speed_of(made, None).tokens is None


def test_iterations_before_the_last_start_may_have_had_other_settings(made: Recipe) -> None:
    run = made.path("run")
    log(run, 20, 20, 20)
    other = again(made, "train.recompute.num_layers=5")
    record_start(other, Manifest("run"), 3, ["sft"])
    assert speed_of(other, None) == (None, "unknown", None)
    log(run, 10, 10, 10, after=3)
    assert speed_of(other, None) == (ITERATION / 10, "measured, median of 2 iterations", None)


def test_device_memory_that_a_run_measured(made: Recipe) -> None:
    log(made.path("run"), 20, 20)
    memory = DeviceMemory(peak=41 << 30, left=17 << 30, total=61 << 30)
    figures = {"loss": 1.0, "lr": 1e-5, "grad_norm": 1.0, "tokens": ITERATION, "seconds": 20.0}
    append(made.path("run"), Row(iteration=3, memory=memory, **figures))
    assert speed_of(made, None).memory == memory
    screen = Console(file=io.StringIO(), width=400)
    show_report(Report(made, [64]), screen)
    assert ": peak 41.0 GiB of tensors measured, 17.0 of 61.0 GiB left" in screen.file.getvalue()  # type: ignore[attr-defined]
