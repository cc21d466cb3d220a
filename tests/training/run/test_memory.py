"""Device memory of a run, measured and compared."""

from __future__ import annotations

import pytest
import torch

from openpangu_sft.training.run.memory import DeviceMemory, measure

GIB = 1 << 30


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
