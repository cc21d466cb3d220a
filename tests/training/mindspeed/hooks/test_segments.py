"""Segment numbers to positions, for any pack; what has none is refused before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_packs
from openpangu_sft.dataset.index_file import FIELDS, PREFIX, PackedWriter
from openpangu_sft.training.mindspeed.hooks import segments
from openpangu_sft.training.mindspeed.hooks.labels import next_tokens
from openpangu_sft.training.mindspeed.hooks.segments import check_segments, positions, require_segments
from refusals import refusal_of

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SEQ_LENGTH = 16


def row(lengths: list[int], padding: int) -> list[int]:
    """The segment numbers of a row."""
    return [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding


@given(LENGTHS, st.integers(0, 9))
def test_positions_count_from_0_in_every_segment_and_in_padding(lengths: list[int], padding: int) -> None:
    expected = [position for length in [*lengths, padding] for position in range(length)]
    found = positions(np.array(row(lengths, padding), np.int32))
    assert found.dtype == np.int64
    assert found.tolist() == expected


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=8))
def test_a_row_is_refused_unless_it_is_numbered_so(numbers: list[int]) -> None:
    padding = len(numbers) - len(np.trim_zeros(numbers, "b"))
    content = numbers[: len(numbers) - padding]
    lengths = [content.count(number) for number in range(1, max(content, default=0) + 1)]
    if content and row(lengths, padding) == numbers and all(lengths):
        positions(np.array(numbers, np.int32))
    else:
        with pytest.raises(ValueError, match="no segment numbers"):
            positions(np.array(numbers, np.int32))


def write(directory: Path, masks: list[list[int]]) -> str:
    """Writes packs with these attention_masks and bos (1) where a segment begins; returns their path prefix."""
    mask = np.array(masks, np.int32)
    input_ids = np.where(np.diff(mask, prepend=-1) != 0, 1, 2 + np.arange(mask.shape[1])) * (mask != 0)
    writer = PackedWriter(directory, PREFIX, *mask.shape)
    writer.write(0, input_ids=input_ids.astype(np.int32), attention_mask=mask, labels=input_ids.astype(np.int32))
    return str(directory / PREFIX)


def test_segment_numbers_are_taken(tmp_path: Path) -> None:
    check_segments(write(tmp_path, [row([5, 6], 5), row([16], 0), row([3, 3, 3], 7)]))


def test_rows_of_one_segment_are_taken(tmp_path: Path) -> None:
    check_segments(write(tmp_path, [row([9], 7), row([16], 0)]))


def test_the_published_handlers_dataset_is_refused(tmp_path: Path) -> None:
    """It holds the token ids once more, and 1 in padding."""
    ids = np.arange(1, 13, dtype=np.int32) * 5
    rows = write_packs(tmp_path, [[(ids, ids)]], SEQ_LENGTH, pad_id=0)
    mask = np.where(rows["attention_mask"] == 0, 1, rows["input_ids"])
    PackedWriter(tmp_path, PREFIX, 1, SEQ_LENGTH).write(0, **{**rows, "attention_mask": mask})
    what = refusal_of(check_segments, str(tmp_path / PREFIX))
    assert what.startswith(f"{tmp_path}/data_packed_attention_mask_document.bin: has no segment numbers")
    assert "first row 0: holds token ids -> make it again" in what


def test_ones_everywhere_are_refused(tmp_path: Path) -> None:
    assert "holds 1 everywhere" in refusal_of(check_segments, write(tmp_path, [[1] * SEQ_LENGTH] * 2))


def test_ones_over_several_samples_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path, [row([5, 6], 5), row([8], 8)])
    path = tmp_path / "data_packed_attention_mask_document.bin"
    np.minimum(np.fromfile(path, "<i4"), 1).tofile(path)
    assert "holds 1 throughout, though the row's first token comes again" in refusal_of(check_segments, prefix)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([2] * 8 + [3] * 8, "begins with segment number 2, not 1"),
        ([1] * 8 + [3] * 8, "segment number 3 after 1"),
        ([1] * 8 + [0] * 4 + [2] * 4, "segment number 2 after padding"),
    ],
)
def test_numbers_in_another_order_are_refused(tmp_path: Path, numbers: list[int], said: str) -> None:
    assert said in refusal_of(check_segments, write(tmp_path, [row([8, 8], 0), numbers]))


def test_a_large_dataset_is_looked_at_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "CHECKED_ROWS", 3)
    good, bad = row([8, 8], 0), [2] * SEQ_LENGTH
    check_segments(write(tmp_path, [good, bad, good, bad, good]))
    assert "first row 4" in refusal_of(check_segments, write(tmp_path, [good] * 4 + [bad]))


def test_one_process_of_a_machine_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path, [[2] * SEQ_LENGTH])
    monkeypatch.setenv("LOCAL_RANK", "1")
    require_segments(prefix)
    assert not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as caught:
        require_segments(prefix)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"openpangu-sft: {tmp_path}")


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_file_is_one_line(tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path, [row([8, 8], 0)])
    (tmp_path / f"data_packed_{field}_document.idx").unlink()
    with pytest.raises(SystemExit):
        require_segments(prefix)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data_packed_{field}_document.idx" in line


@given(LENGTHS)
def test_every_position_gets_the_label_behind_it(lengths: list[int]) -> None:
    labels = torch.tensor([lengths, lengths[::-1]])
    shifted = next_tokens(labels)
    assert shifted.tolist() == [[*lengths[1:], -100], [*lengths[::-1][1:], -100]]
    assert shifted.is_contiguous()
