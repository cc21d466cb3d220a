"""MindSpeed-LLM's learning rates are those of our engine, WSD's too: losses and rates of a run on the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpangu_sft.training.mindspeed import start
from openpangu_sft.training.portable.schedule import learning_rate
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.stage import run_sft
from training.mindspeed.conftest import Engine, MakeRun
from upstream import require_compiler


@pytest.mark.parametrize("style", ["linear", "constant", "WSD"])
def test_losses_are_those_of_our_engine(
    upstream: Path, make_run: MakeRun, engine: Engine, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    require_compiler()
    monkeypatch.setattr(start, "SOURCES", upstream)
    settings = (f"train.lr_decay_style={style}", "train.lr_wsd_decay_ratio=0.5", "train.lr=5e-3")
    recipe = make_run(*settings, "train.engine=mindspeed", "train.device=cpu")
    run_sft(recipe, [])
    rows, train = read_metrics(recipe.path("run")), recipe.train
    after = [learning_rate(train, row["iteration"] + 1) for row in rows]  # logged when the schedule has stepped
    assert [row["lr"] for row in rows] == pytest.approx(after, rel=1e-6)
    losses, _ = engine(*settings)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
