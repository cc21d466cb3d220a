"""Megatron's indexed files: byte for byte as described, and damage is told."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_packs
from openpangu_sft.dataset.index_file import FIELDS, field_path, read_rows
from refusals import refusal_of

Segment = tuple[np.ndarray, np.ndarray]


def segment(tokens: list[int], trained: int) -> Segment:
    """Tokens of which the last ones are trained."""
    labels = [-100] * (len(tokens) - trained) + tokens[len(tokens) - trained :]
    return np.array(tokens, np.int32), np.array(labels, np.int32)


def write(directory: Path, packs: list[list[Segment]], seq_length: int = 8) -> None:
    write_packs(directory, packs, seq_length, pad_id=7)


def read_plainly(stem: Path) -> list[list[int]]:
    """Reads an indexed dataset value by value, as the format is described."""
    index, data = stem.with_suffix(".idx").read_bytes(), stem.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", index, 9) == (1,)  # version
    assert index[17] == 4  # int32
    sequences, documents = struct.unpack_from("<QQ", index, 18)
    place = 34
    lengths = struct.unpack_from(f"<{sequences}i", index, place)
    place += 4 * sequences
    offsets = struct.unpack_from(f"<{sequences}q", index, place)
    place += 8 * sequences
    boundaries = struct.unpack_from(f"<{documents}q", index, place)
    assert place + 8 * documents == len(index)
    assert list(boundaries) == list(range(sequences + 1))
    assert len(data) == 4 * sum(lengths)
    return [list(struct.unpack_from(f"<{length}i", data, offset)) for length, offset in zip(lengths, offsets)]


PACKS = [
    [segment([1, 2, 3], 1), segment([4, 5], 2)],
    [segment([10, 11, 12, 13, 14, 15, 16, 17], 3)],
    [segment([9], 1), segment([9], 1), segment([9], 1)],
]
ROWS = {
    "input_ids": [[1, 2, 3, 4, 5, 7, 7, 7], [10, 11, 12, 13, 14, 15, 16, 17], [9, 9, 9, 7, 7, 7, 7, 7]],
    "attention_mask": [[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8, [1, 2, 3, 0, 0, 0, 0, 0]],
    "labels": [[-100, -100, 3, 4, 5, -100, -100, -100], [-100] * 5 + [15, 16, 17], [9, 9, 9] + [-100] * 5],
}


def test_the_files_are_named_as_mindspeed_llm_looks_for_them(tmp_path: Path) -> None:
    write(tmp_path, PACKS)
    names = ["input_ids", "attention_mask", "labels"]
    expected = {f"data_packed_{name}_document.{suffix}" for name in names for suffix in ("bin", "idx")}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "data_roles.bin"}


@pytest.mark.parametrize("field", FIELDS)
def test_layout(tmp_path: Path, field: str) -> None:
    write(tmp_path, PACKS)
    assert read_plainly(tmp_path / f"data_packed_{field}_document") == ROWS[field]
    assert read_rows(tmp_path, "data", field, 8).tolist() == ROWS[field]


@pytest.mark.parametrize("field", FIELDS)
def test_megatron_core_reads_the_same(tmp_path: Path, field: str) -> None:
    indexed_dataset = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="wheels: x86-64, Python 3.10+"
    )
    write(tmp_path, PACKS)
    dataset = indexed_dataset.IndexedDataset(str(tmp_path / f"data_packed_{field}_document"))
    assert [row.tolist() for row in dataset] == ROWS[field]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(15, 20))
def test_any_packs(tmp_path_factory: pytest.TempPathFactory, packs: list[list[int]], seq_length: int) -> None:
    directory = tmp_path_factory.mktemp("packs")
    write(directory, [[segment([2**31 - 1] * length, 1) for length in pack] for pack in packs], seq_length)
    for field in FIELDS:
        rows = read_plainly(directory / f"data_packed_{field}_document")
        assert read_rows(directory, "data", field, seq_length).tolist() == rows
    for row, pack in zip(rows, packs):
        assert sum(label != -100 for label in row) == len(pack)


def patch(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + value + content[offset + len(value) :]


DAMAGED_INDEX: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[:33],
    lambda content: content[:34],
    lambda content: content[:-1],
    lambda content: content + b"\0",
    patch(0, b"N"),
    patch(9, b"\2"),
    patch(17, b"\5"),
    patch(17, b"\10"),  # uint16, which Megatron takes for small vocabularies
    patch(18, struct.pack("<Q", 2)),
    patch(18, struct.pack("<Q", 2**63)),
    patch(26, struct.pack("<Q", 3)),
    patch(34 + 4, struct.pack("<i", 9)),
    patch(34 + 12 + 8, struct.pack("<q", 0)),  # the second row would be the first
    patch(34 + 36 + 8, struct.pack("<q", 2)),
]


@pytest.mark.parametrize("number", range(len(DAMAGED_INDEX)))
def test_a_damaged_index(tmp_path: Path, number: int) -> None:
    write(tmp_path, PACKS)
    path = tmp_path / "data_packed_labels_document.idx"
    path.write_bytes(DAMAGED_INDEX[number](path.read_bytes()))
    what = "is not the index of 3 rows of 8 tokens, which data_packed_labels_document.bin holds"
    remedy = "run make preprocess and make merge again"
    assert refusal_of(read_rows, tmp_path, "data", "labels", 8) == f"{path}: {what} -> {remedy}"
    assert len(read_rows(tmp_path, "data", "input_ids", 8)) == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-4], ".bin: does not hold rows of 8 tokens"),
        (lambda content: content + b"\0" * 32, ".idx: is not the index of 4 rows of 8 tokens"),
        (lambda _: b"", ".bin: does not hold rows of 8 tokens"),
    ],
    ids=["cut short", "a row too many", "empty"],
)
def test_damaged_data(tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    write(tmp_path, PACKS)
    path = tmp_path / "data_packed_labels_document.bin"
    path.write_bytes(damage(path.read_bytes()))
    assert said in refusal_of(read_rows, tmp_path, "data", "labels", 8)


def test_rows_of_another_length(tmp_path: Path) -> None:
    write(tmp_path, PACKS)
    assert "is not the index of 6 rows of 4 tokens" in refusal_of(read_rows, tmp_path, "data", "labels", 4)


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert "does not hold rows of 8 tokens" in refusal_of(read_rows, tmp_path, "data", "labels", 8)


def test_what_is_read_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, PACKS)
    with pytest.raises(ValueError, match="read-only"):
        read_rows(tmp_path, "data", "labels", 8)[0] = 1


def test_paths(tmp_path: Path) -> None:
    assert field_path(tmp_path, "data", "labels", "idx") == tmp_path / "data_packed_labels_document.idx"
