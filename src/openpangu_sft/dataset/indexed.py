"""Megatron's indexed dataset files: a `.bin` of raw int32 values and an `.idx` that says where each sequence lies.

Layout of the `.idx`, little endian, as megatron/core/datasets/indexed_dataset.py (core_r0.6.0) writes and reads it:
9 bytes magic, uint64 version 1, uint8 type code (4 is int32), uint64 sequences, uint64 document boundaries, then
int32 lengths, int64 byte offsets, int64 document boundaries (0 first). Here every sequence is a document of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from openpangu_sft.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
INT32_CODE = 4
HEADER = struct.Struct("<9sQBQQ")
FIELDS = ("input_ids", "attention_mask", "labels")


def field_path(directory: Path, prefix: str, field: str, suffix: str) -> Path:
    """The path of one of the six files of a packed dataset, named as MindSpeed-LLM looks for them."""
    return directory / f"{prefix}_packed_{field}_document.{suffix}"


def write_index(path: Path, rows: int, seq_length: int) -> None:
    """Writes the `.idx` of a file of `rows` sequences of `seq_length` int32 values each."""
    path.write_bytes(index_bytes(rows, seq_length))


def index_bytes(rows: int, seq_length: int) -> bytes:
    """The content of the `.idx` of `rows` sequences of `seq_length` int32 values each."""
    lengths = np.full(rows, seq_length, "<i4")
    offsets = np.arange(rows, dtype="<i8") * (4 * seq_length)
    documents = np.arange(rows + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, INT32_CODE, rows, rows + 1)
    return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()


def read_rows(directory: Path, prefix: str, field: str, seq_length: int) -> npt.NDArray[np.int32]:
    """Maps one field of a packed dataset into memory.

    Returns:
        int32 [rows, seq_length], read only.

    Raises:
        UserError: not such a file, or rows of another length.
    """
    path = field_path(directory, prefix, field, "idx")
    remedy = "run make preprocess and make merge again"
    content = path.read_bytes()
    if len(content) < HEADER.size:
        raise UserError("is cut short", where=path, remedy=remedy)
    magic, version, code, rows, _ = HEADER.unpack_from(content)
    if (magic, version, code) != (MAGIC, VERSION, INT32_CODE):
        raise UserError("is not an int32 index of Megatron's", where=path, remedy=remedy)
    if rows < 1 or len(content) != HEADER.size + 20 * rows + 8:
        raise UserError(f"is cut short or damaged: {len(content)} bytes for {rows} rows", where=path, remedy=remedy)
    lengths = np.frombuffer(content, "<i4", rows, HEADER.size)
    if (lengths != seq_length).any():
        found = lengths[lengths != seq_length][0]
        raise UserError(f"has a row of {found} tokens, expected {seq_length}", where=path, remedy=remedy)
    if content != index_bytes(rows, seq_length):
        raise UserError("is damaged", where=path, remedy=remedy)
    data = field_path(directory, prefix, field, "bin")
    if data.stat().st_size != 4 * rows * seq_length:
        raise UserError(f"does not hold {rows} rows of {seq_length} tokens", where=data, remedy=remedy)
    return np.memmap(data, "<i4", "r", shape=(rows, seq_length))


class PackedWriter:
    """Writes packs row by row into the three `.bin` files of a dataset, and the `.idx` files when it is closed.

    `attention_mask` holds segment numbers 1, 2, 3… and 0 for padding, as later MindSpeed-LLM versions do with
    --neat-pack: where a segment ends must be known, and openPangu's eos ends every message, not every sample.
    """

    def __init__(self, directory: Path, prefix: str, seq_length: int, pad_id: int) -> None:
        self._directory, self._prefix, self._seq_length, self._pad_id = directory, prefix, seq_length, pad_id
        self._streams: dict[str, BinaryIO] = {
            field: field_path(directory, prefix, field, "bin").open("wb") for field in FIELDS
        }
        self.rows = 0

    def write(self, segments: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]], ignored: int) -> None:
        """Writes one pack of (input_ids, labels) segments; they must fit into seq_length."""
        row = {
            "input_ids": np.full(self._seq_length, self._pad_id, "<i4"),
            "attention_mask": np.zeros(self._seq_length, "<i4"),
            "labels": np.full(self._seq_length, ignored, "<i4"),
        }
        begin = 0
        for number, (input_ids, labels) in enumerate(segments, 1):
            end = begin + len(input_ids)
            assert end <= self._seq_length, "the packs were planned with another seq_length"
            row["input_ids"][begin:end] = input_ids
            row["attention_mask"][begin:end] = number
            row["labels"][begin:end] = labels
            begin = end
        for field, stream in self._streams.items():
            stream.write(row[field].tobytes())
        self.rows += 1

    def close(self) -> None:
        """Finishes the files."""
        for field, stream in self._streams.items():
            stream.close()
            write_index(field_path(self._directory, self._prefix, field, "idx"), self.rows, self._seq_length)
