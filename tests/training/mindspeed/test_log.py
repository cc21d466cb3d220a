"""What upstream prints, read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpangu_sft.training.mindspeed.log import (
    MEMORY_IS_FULL,
    NO_CHECKPOINT,
    SAVED,
    error_of,
    iteration_of,
    report_of,
    warning,
)
from openpangu_sft.training.run.metrics import Row
from parameter_ids import named_by
from upstream_log import FULL_DEVICE, ITERATION


def row(iteration: int, loss: float, **others: float) -> Row:
    return Row(
        **{"iteration": iteration, "loss": loss, "lr": 1e-5, "grad_norm": 1, "tokens": 1, "seconds": 1, **others}
    )


def test_an_iteration() -> None:
    assert iteration_of(ITERATION, 100) == row(12, 5.590752, lr=1e-4, grad_norm=1.683, tokens=100, seconds=0.7155)


def test_an_iteration_without_a_loss() -> None:
    cut = ITERATION.replace("lm loss: 5.590752E+00 | ", "")
    found = iteration_of(cut, 1)
    assert found is not None
    assert math.isnan(found.loss)


@pytest.mark.parametrize("number", ["0", "1234567890123", "x"])
def test_a_number_that_is_no_iteration(number: str) -> None:
    assert iteration_of(ITERATION.replace("12/", f"{number}/"), 1) is None


@given(st.text())
def test_any_other_line_is_none(text: str) -> None:
    if "iteration" not in text:
        assert iteration_of(text, 1) is None


@pytest.mark.parametrize(
    ("line", "said"),
    named_by(
        0,
        ('openpangu-sft reports {"memory": {"peak": 3}}\n', {"memory": {"peak": 3}}),
        ('INFO:openpangu-sft reports {"micro_batches": [3, 16]}\n', {"micro_batches": [3, 16]}),
        ('openpangu-sft reports {"validation": Infinity}\n', {"validation": math.inf}),
        ('openpangu-sft reports {"micro_batches": [3, 16]}openpangu-sft\n', {}),
        ('openpangu-sft reports {"memory": {"pea openpangu-sft: no room}\n', {}),
        ("another line", {}),
    ),
)
def test_what_our_hooks_report(line: str, said: dict[str, object]) -> None:
    assert report_of(line) == said


@pytest.mark.parametrize(
    ("line", "full"),
    [(FULL_DEVICE, True), ("EL0004: Failed to allocate memory.", True), ("ValueError: memory", False)],
    ids=["torch_npu", "driver", "other"],
)
def test_a_device_that_is_full(line: str, full: bool) -> None:
    error = error_of(line)
    assert error
    assert bool(MEMORY_IS_FULL.search(error)) == full


def test_saved() -> None:
    found = SAVED.search("  successfully saved checkpoint at iteration      12 to /cache/run\n")
    assert found
    assert found[1] == "12"
    assert not SAVED.search("saving checkpoint at iteration      12 to /cache/run in torch format\n")


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: could not find the metadata file /x/latest_checkpointed_iteration.txt ",
        "    will not load any checkpoints and will start from random",
        "could not load the checkpoint /x/iter_0000001/mp_rank_00_001/model_optim_rng.pt",
    ],
    ids=["no tracker file", "nothing loaded", "unreadable checkpoint"],
)
def test_a_start_from_random_weights(line: str) -> None:
    assert NO_CHECKPOINT.search(line)


def test_a_start_from_a_checkpoint() -> None:
    assert not NO_CHECKPOINT.search("  successfully loaded checkpoint from /x at iteration 0")


@pytest.mark.parametrize(
    ("line", "error"),
    named_by(
        0,
        ("RuntimeError: HCCL timeout\n", "RuntimeError: HCCL timeout"),
        ("[rank1]: torch.distributed.DistBackendError: gone", "torch.distributed.DistBackendError: gone"),
        (
            "openpangu-sft: x.bin: has no segment numbers -> run make preprocess\n",
            "x.bin: has no segment numbers -> run make preprocess",
        ),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", None),
        ("    raise ValueError('x')", None),
        ("iteration 3", None),
    ),
)
def test_errors(line: str, error: str) -> None:
    assert error_of(line) == error


def losses(*values: float) -> list[str]:
    rows = [row(number, loss) for number, loss in enumerate(values, 1)]
    said = (warning(each, rows[:at]) for at, each in enumerate(rows))
    return [text for text in said if text]


def test_a_spike_is_named_once_and_a_steady_loss_never() -> None:
    steady = [2.0 + 0.1 * (number % 3) for number in range(40)]
    assert losses(*steady) == []
    assert losses(*steady, 6.5, *steady) == ["iteration 41: loss 6.500 after 2.100 (median of 20)"]


def test_no_number_is_named() -> None:
    assert losses(2.0, math.nan) == ["iteration 2: loss nan, gradient norm 1.0"]
    row = Row(iteration=3, loss=2.0, lr=1e-5, grad_norm=1.0, tokens=4, seconds=1.0, validation=math.inf)
    assert warning(row, []) == "iteration 3: loss 2.0, gradient norm 1.0, validation loss inf"


def test_a_small_loss_may_double() -> None:
    assert losses(*[0.1] * 30, 0.9) == []
