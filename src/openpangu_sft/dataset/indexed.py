"""Megatron's indexed dataset files: a `.bin` of raw int32 values and an `.idx` that says where each sequence lies.

Layout of the `.idx`, little endian, as megatron/core/datasets/indexed_dataset.py (core_r0.6.0) writes and reads it:
9 bytes magic, uint64 version 1, uint8 type code (4 is int32), uint64 sequences, uint64 document boundaries, then
int32 lengths, int64 byte offsets, int64 document boundaries (0 first). Here every sequence is a document of its own.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openpangu_sft.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
INT32_CODE = 4
HEADER = struct.Struct("<9sQBQQ")
PREFIX = "data"
"""Of the files in a shard and in a dataset: Megatron's --data-path is directory/data."""
VALIDATION = "validation"
"""Of those that hold what is kept out of training, where the recipe has data.validation_share."""

Ids = npt.NDArray[np.int32]

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
    """The six files of a packed dataset. Rows may be written in any order, and by several processes at once.

    `attention_mask` holds segment numbers 1, 2, 3… and 0 for padding, as later MindSpeed-LLM versions do with
    --neat-pack: where a segment ends must be known, and openPangu's eos ends every message, not every sample.

    Args:
        directory: of the files.
        prefix: of their names.
        rows: how many there will be.
        seq_length: tokens in a row.
    """

    def __init__(self, directory: Path, prefix: str, rows: int, seq_length: int) -> None:
        self._seq_length = seq_length
        self._files = {field: field_path(directory, prefix, field, "bin") for field in FIELDS}
        for field, path in self._files.items():
            with path.open("wb") as stream:
                stream.truncate(4 * rows * seq_length)
            write_index(field_path(directory, prefix, field, "idx"), rows, seq_length)

    def write(self, first_row: int, **fields: npt.NDArray[np.int32]) -> None:
        """Writes some rows that follow each other.

        Args:
            first_row: the number of the first one.
            fields: int32 [rows, seq_length] each: input_ids, attention_mask and labels.
        """
        for field, path in self._files.items():
            with path.open("r+b") as stream:
                stream.seek(4 * first_row * self._seq_length)
                stream.write(np.ascontiguousarray(fields[field], "<i4").data)
