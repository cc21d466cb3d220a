"""`make smoke`: that it compares, and that all of it agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.dataset.index_file import FIELDS, field_path
from openpangu_sft.demo.smoke import FIRST, LAST, MARK, WAYS, empty, require_close, require_same_dataset
from openpangu_sft.training.mindspeed.sources import SOURCES
from refusals import refusal_of
from upstream import require_compiler

REFERENCE = [7.0, 6.5, 6.0]


@pytest.mark.parametrize(
    "found",
    [
        [7.0 * (1 + 2 * FIRST), 6.5, 6.0],
        [7.0, 6.5, 6.0 * (1 - 2 * LAST)],
        [7.0, 6.5 * (1 + 2 * LAST), 6.0],
        [7.0, 6.5],
        [7.0, 6.5, float("nan")],
        [],
    ],
)
def test_losses_that_are_off(found: list[float]) -> None:
    assert "some way: losses" in refusal_of(require_close, "some way", found, REFERENCE)


def test_losses_that_agree() -> None:
    assert require_close("some way", [7.0, 6.5 * (1 + LAST / 2), 6.0], REFERENCE) == pytest.approx(LAST / 2)


def test_files_that_differ(tmp_path: Path) -> None:
    for field in FIELDS:
        for suffix in ("bin", "idx"):
            for prefix in ("one", "other"):
                field_path(tmp_path, prefix, field, suffix).write_bytes(b"12")
    require_same_dataset(tmp_path, "one", tmp_path, "other")
    field_path(tmp_path, "other", FIELDS[-1], "idx").write_bytes(b"13")
    assert "differs from" in refusal_of(require_same_dataset, tmp_path, "one", tmp_path, "other")


def test_only_its_own_directory_is_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    empty(mine)
    (mine / "left").touch()
    empty(mine)
    assert [path.name for path in mine.iterdir()] == [MARK]
    (tmp_path / "theirs").mkdir()
    assert "is not from make smoke" in refusal_of(empty, tmp_path / "theirs")


def test_everything_agrees(tmp_path: Path) -> None:
    if not (SOURCES / MANIFEST).is_file():
        pytest.skip("the upstream sources are not at hand: no make sources here")
    require_compiler()
    done = subprocess.run(
        [sys.executable, "-m", "openpangu_sft", "smoke", "--cache", str(tmp_path / "smoke")],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compared = (
        "preprocess: their bytes",
        "merge: their bytes",
        "convert, TP 1: their",
        "convert, TP 4: their",
        "resume",
    )
    for what in (*compared, *WAYS, "untied: training, TP 4 x CP 2", "untied: export, chat"):
        assert what in done.stderr
    assert (tmp_path / "smoke/export/model.safetensors").is_file()
