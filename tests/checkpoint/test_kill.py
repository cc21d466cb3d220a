"""SIGKILL at many moments of convert and export: what is in place is whole, and the next run clears up and succeeds."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from conftest import TINY
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.verify.tensors import check_manifest
from refusals import without_progress
from stage_process import LARGER, TP2_PP2, Stage, bytes_below, larger_base, stopped_while_writing, sums

STEPS = [0.0, 0.05, 0.3, 0.6, 0.9, 1.0]
"""Shares of the result that are written when the kill comes; at 1.0 the files are being compared."""
DELAYS = [0.1, 0.3]
"""Seconds after the start: before there is anything, or anywhere."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    return larger_base(tmp_path_factory.mktemp("larger") / "hf", tiny_hf)


@pytest.fixture(scope="module")
def mcore(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of TP 2, PP 2: four files."""
    cache = tmp_path_factory.mktemp("mcore")
    ran = Stage("convert", [*TINY, *LARGER, *TP2_PP2, f"paths.hf={base}", f"paths.cache={cache}"]).run()
    assert ran.returncode == 0, ran.stderr
    return cache / "ckpts/pangu_model_mcore"


def stage_of(kind: str, base: Path, mcore: Path, target: Path, *more: str) -> Stage:
    overrides = [*TINY, *LARGER, f"paths.hf={base}", f"paths.{'mcore' if kind == 'convert' else 'export'}={target}"]
    if kind == "convert":
        return Stage("convert", [*overrides, *TP2_PP2, *more])
    return Stage("export", [*overrides, *more], "--from", mcore, "--form", "openpangu")  # which imports no torch


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("kind", ["convert", "export"])
def test_sigkill_at_many_moments(base: Path, mcore: Path, tmp_path: Path, kind: str, earlier: bool) -> None:
    wanted = stage_of(kind, base, mcore, tmp_path / "wanted" / "result")
    assert wanted.run().returncode == 0
    undisturbed = sums(tmp_path / "wanted" / "result")
    size = bytes_below(tmp_path / "wanted")
    target = tmp_path / "out" / "result"
    before, older_copy = {}, None
    if earlier:  # another content, so that old and new cannot be taken for each other
        other = tmp_path / "other"
        shutil.copytree(base, other)
        config = (other / "config.json").read_text("utf-8")
        (other / "config.json").write_text(config.replace("{", '{"older": true, ', 1), "utf-8")
        source = other if kind == "convert" else base
        older = stage_of(kind, source, source, target)
        assert older.run().returncode == 0
        before = sums(target)
        older_copy = shutil.copytree(target, tmp_path / "older")
        assert before[MANIFEST] != undisturbed[MANIFEST]
    stage = stage_of(kind, base, mcore, target)
    while_writing = 0
    steps = STEPS if earlier else STEPS[::2]
    for step in [*steps, *DELAYS]:
        if step in DELAYS:
            process = stage.start()
            time.sleep(step)
        else:
            process = stopped_while_writing(stage, target, step * size * 0.999, earlier=older_copy)
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate()[0] == "", "it had ended already"
        assert process.returncode == -signal.SIGKILL
        left = {path.name for path in target.parent.iterdir()} if target.parent.exists() else set()
        while_writing += ".result.staging" in left
        assert left <= {".result.staging", ".result.lock", *(["result"] if earlier else [])}
        assert not [
            path for path in target.parent.rglob(MANIFEST) if ".result.staging" not in path.parts and not earlier
        ]
        if earlier:
            assert sums(target) == before
            check_manifest(target)
    assert while_writing >= len(steps)
    ran = stage.run()
    assert ran.returncode == 0, ran.stderr
    assert sums(target) == undisturbed
    assert {path.name for path in target.parent.iterdir()} == {"result", ".result.lock"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_leaves_nothing(base: Path, mcore: Path, tmp_path: Path, number: int) -> None:
    stage = stage_of("convert", base, mcore, tmp_path / "result")
    process = stopped_while_writing(stage, tmp_path / "result", 10_000_000)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert (
        without_progress(process.communicate()[1]).strip() == "openpangu-sft: interrupted; nothing half-written is left"
    )
    assert process.returncode == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == {".result.lock"}


def test_two_at_once_into_one_place(base: Path, mcore: Path, tmp_path: Path) -> None:
    """The second one is refused, whatever it writes; the first one continues."""
    target = tmp_path / "result"
    stage = stage_of("convert", base, mcore, target)
    first = stopped_while_writing(stage, target, 1_000_000)
    try:
        for kind in ("convert", "export"):
            message = stage_of(kind, base, mcore, target).refusal()
            assert message == f"{target}: another run is writing here -> wait for it or choose another path"
    finally:
        first.send_signal(signal.SIGCONT)
    assert without_progress(first.communicate()[1]).startswith("mcore checkpoint: ")
    assert first.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"result", ".result.lock"}
    check_manifest(target)
