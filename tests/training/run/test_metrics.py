"""metrics.jsonl and the loss curve; device memory of a run, measured and compared."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from openpangu_sft.training.run.metrics import DeviceMemory, Row, append, draw_curve, keep_until, measure, read_metrics
from refusals import refusal_of

GIB = 1 << 30


def row(iteration: int) -> dict[str, float]:
    return {"iteration": iteration, "loss": 3.0 / iteration, "lr": 1e-5, "grad_norm": 1.0, "tokens": 8, "seconds": 0.1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for iteration in range(1, 6):
        append(tmp_path, Row(**row(iteration)))
    return tmp_path


def test_what_is_appended_is_read(run: Path) -> None:
    assert read_metrics(run) == [row(iteration) for iteration in range(1, 6)]
    assert read_metrics(run / "nowhere") == []


def test_a_line_cut_off_by_a_crash_is_left_out(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [entry["iteration"] for entry in read_metrics(run)] == [1, 2, 3, 4]


def test_continuing_drops_what_came_after_the_checkpoint(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 6, "lo')
    keep_until(run, 3)
    append(run, Row(**row(4)))
    assert [entry["iteration"] for entry in read_metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"garbage", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1, 2]", "valid dictionary"),
        (b"{}", "iteration: Field required"),
        (json.dumps({**row(3), "loss": "abc"}).encode(), "loss: Input should be a valid number"),
        (json.dumps({**row(3), "iteration": 10**30}).encode(), "iteration: "),
    ],
    ids=["not JSON", "not UTF-8", "list", "no keys", "loss is a text", "iteration above 2^63"],
)
def test_a_line_that_is_no_iteration_is_named_and_nothing_is_lost(run: Path, line: bytes, said: str) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    damaged = b"\n".join([*lines[:2], line, *lines[3:]])
    path.write_bytes(damaged)
    for action in (lambda: read_metrics(run), lambda: keep_until(run, 5), lambda: draw_curve(run)):
        message = refusal_of(action)
        assert message.startswith(f"{path}:3: ")
        assert said in message
    assert path.read_bytes() == damaged


def test_a_line_that_is_cut_off_goes_before_another_is_added(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    append(run, Row(**row(6)))
    assert [entry["iteration"] for entry in read_metrics(run)] == [1, 2, 3, 4, 6]
    path.write_bytes(b'{"iter')
    append(run, Row(**row(1)))
    assert read_metrics(run) == [row(1)]


def test_the_curve_is_a_picture_with_both_lines(run: Path) -> None:
    picture = matplotlib.image.imread(draw_curve(run))
    height, width = picture.shape[:2]
    assert (width, height) == (960, 540)
    for colour in ((31, 119, 180), (255, 127, 14)):  # tab:blue, the loss; tab:orange, the learning rate
        distance = np.abs(picture[:, :, :3] * 255 - colour).max(axis=2)
        assert (distance < 8).sum() > 100


def test_the_loss_axis_fits_the_losses(tmp_path: Path) -> None:
    for iteration in range(1, 6):
        append(tmp_path, Row(**{**row(iteration), "loss": 10 + iteration / 100}))
    inside = matplotlib.image.imread(draw_curve(tmp_path))[:, 150:-150, :3] * 255  # without the blue label
    rows, _ = np.nonzero(np.abs(inside - (31, 119, 180)).max(axis=2) < 8)
    assert np.ptp(rows) > 300


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 61 GiB: 20 of tensors at the peak, 30 reserved for them, 5 held by other libraries."""
    answers = {"mem_get_info": (26 * GIB, 61 * GIB), "max_memory_allocated": 20 * GIB, "memory_reserved": 30 * GIB}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)


@pytest.mark.usefixtures("device")
def test_what_the_allocator_does_not_use_is_left() -> None:
    assert measure("cpu") == DeviceMemory(peak=20 * GIB, left=36 * GIB, total=61 * GIB)


def test_the_peak_is_shown_beside_the_planned_one(capsys: pytest.CaptureFixture[str]) -> None:
    memory = DeviceMemory(peak=41 * GIB, left=17 * GIB, total=61 * GIB)
    for planned in (45 * GIB + GIB // 2, 0):
        memory.show(planned)
    assert capsys.readouterr().err.splitlines() == [
        "device memory: peak 41.0 GiB of tensors measured, 17.0 of 61.0 GiB left; planned: 45.5 GiB",
        "device memory: peak 41.0 GiB of tensors measured, 17.0 of 61.0 GiB left",
    ]


def test_little_left_is_a_warning_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    DeviceMemory(peak=55 * GIB, left=3 * GIB, total=61 * GIB).show(0)
    said = capsys.readouterr().err.splitlines()[1]
    assert said.startswith("less than 5% of a device is left: a later iteration may run out of memory -> recompute")
