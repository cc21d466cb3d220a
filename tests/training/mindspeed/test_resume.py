"""A run of the mindspeed engine goes on with another number of processes: losses as undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpangu_sft.training.mindspeed import start
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.stage import run_sft
from posttrain import several
from training.mindspeed.conftest import Engine, MakeRun
from upstream import require_compiler

CONSTANT = ("train.lr_decay_style=constant", "train.iterations=8")


def test_one_process_two_and_one_again(
    upstream: Path, make_run: MakeRun, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiler()
    monkeypatch.setattr(start, "SOURCES", upstream)
    steps = (several(1), several(2), several(2, "parallel.context=2"), several(1, "train.micro_batch_size=2"))
    for number, layout in enumerate(steps, 1):
        shorter = ["train.lr_decay_style=constant", f"train.iterations={2 * number}", "train.save_interval=1"]
        recipe = make_run(*shorter, "train.device=cpu", *layout)
        run_sft(recipe, [])
    rows = read_metrics(recipe.path("run"))
    undisturbed, norms = engine(*CONSTANT)
    assert [row["loss"] for row in rows] == pytest.approx(undisturbed, rel=1e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, abs=6e-4)  # upstream prints three decimals
