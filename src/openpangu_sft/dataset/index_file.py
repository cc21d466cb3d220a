"""Megatron's indexed dataset files: a `.bin` of raw int32 values and an `.idx` that says where each sequence lies.

Layout of the `.idx`, little endian, as megatron/core/datasets/indexed_dataset.py (core_r0.6.0) writes and reads it:
9 bytes magic, uint64 version 1, uint8 type code (4 is int32), uint64 sequences, uint64 document boundaries, then
int32 lengths, int64 byte offsets, int64 document boundaries (0 first). Here every sequence is a document of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import numpy.typing as npt

from openpangu_sft.util.errors import UserError

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


Flags = npt.NDArray[np.bool_]

INTEGERS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""numpy's name of each type code of Megatron's; 6 and 7 are float64 and float32."""

INDEX_ROWS = 1 << 20
"""Rows of an index that are looked at together."""


@dataclass(frozen=True)
class Index:
    """The content of an `.idx`, mapped into memory.

    Args:
        path: of the `.idx`.
        dtype: of the values in the `.bin`.
        lengths: int32 [rows], values in each row.
        offsets: int64 [rows], bytes before each row in the `.bin`.
        documents: int64 [documents + 1], rows before each document.
    """

    path: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def data(self) -> Path:
        """The path of the `.bin`."""
        return self.path.with_suffix(".bin")

    def values(self) -> int:
        """Number of values in all rows."""
        return sum(int(self.lengths[begin:end].sum(dtype=np.int64)) for begin, end in index_blocks(self.rows))


def read_index(path: Path, remedy: str) -> Index:
    """Maps an `.idx` into memory. Its entries are not checked: see `entry_findings`.

    Raises:
        UserError: not an index of Megatron's, not one of integers, or not as long as its header says.
    """
    size = path.stat().st_size
    if size < HEADER.size:
        raise UserError(f"is cut short: {size} bytes", where=path, remedy=remedy)
    content = np.memmap(path, "u1", "r")
    magic, version, code, rows, documents = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError("is not an index of Megatron's (its first bytes are others)", where=path, remedy=remedy)
    if version != VERSION:
        raise UserError(f"has version {version}, expected {VERSION}", where=path, remedy=remedy)
    if code not in INTEGERS:
        raise UserError(f"has type code {code}, which is no integer type of Megatron's", where=path, remedy=remedy)
    expected = HEADER.size + 12 * rows + 8 * documents
    if size != expected:
        state = "is cut short" if size < expected else "is longer than its header says"
        what = f"{state}: {size} bytes, expected {expected} for {rows} rows and {documents} document boundaries"
        raise UserError(what, where=path, remedy=remedy)
    return Index(
        path,
        np.dtype(INTEGERS[code]),
        np.frombuffer(content, "<i4", rows, HEADER.size),
        np.frombuffer(content, "<i8", rows, HEADER.size + 4 * rows),
        np.frombuffer(content, "<i8", documents, HEADER.size + 12 * rows),
    )


def entry_findings(index: Index, remedy: str) -> tuple[list[UserError], bool]:
    """Checks the entries of an index, with each other and with the size of the `.bin`.

    Returns:
        What is wrong, and whether the rows can be read all the same.
    """

    def negative(begin: int, end: int) -> Flags:
        return np.less(index.lengths[begin:end], 0)

    def misplaced(begin: int, end: int) -> Flags:
        # Each row against the one before it, so that one wrong length is not counted with all rows after it.
        expected = np.zeros(end - begin, np.int64)
        if end - begin > 1 or begin:
            first = max(begin - 1, 0)
            after = index.offsets[first : end - 1] + index.lengths[first : end - 1].astype(np.int64) * itemsize
            expected[len(expected) - len(after) :] = after
        return np.not_equal(index.offsets[begin:end], expected)

    def no_document(begin: int, end: int) -> Flags:
        return np.not_equal(index.documents[begin:end], np.arange(begin, end))

    itemsize, rows = index.dtype.itemsize, index.rows
    if not rows:
        return [UserError("holds no rows", where=index.path, remedy=remedy)], False
    layout = [
        (negative, lambda row: f"length {index.lengths[row]}"),
        (misplaced, lambda row: f"byte offset {index.offsets[row]} does not follow from the row before it"),
    ]
    findings = [
        UserError(what, where=index.path, remedy=remedy)
        for test, describe in layout
        for what in rows_where(test, rows, rows, describe)
    ]
    readable = not findings
    if len(index.documents) != rows + 1:
        what = f"{len(index.documents)} document boundaries, expected {rows + 1}: every row is a document"
        findings.append(UserError(what, where=index.path, remedy=remedy))
    else:

        def boundary(row: int) -> str:
            return f"document boundary {index.documents[row]}, expected {row}: every row is a document"

        boundaries = rows_where(no_document, rows + 1, rows, boundary)
        findings += [UserError(what, where=index.path, remedy=remedy) for what in boundaries]
    if readable:
        size, expected = index.data.stat().st_size, index.values() * itemsize
        if size != expected:
            state = "is cut short" if size < expected else "is longer than its index says"
            findings.append(UserError(f"{state}: {size} bytes, expected {expected}", where=index.data, remedy=remedy))
            readable = size > expected
    return findings, readable


def same_rows(one: Index, other: Index, remedy: str) -> list[UserError]:
    """Checks that two fields have the same rows, as far as their lengths say."""

    def unlike(begin: int, end: int) -> Flags:
        return np.not_equal(one.lengths[begin:end], other.lengths[begin:end])

    if one.rows != other.rows:
        what = f"{other.rows} rows, but {one.path.name} has {one.rows}"
        return [UserError(what, where=other.path, remedy=remedy)]

    def describe(row: int) -> str:
        return f"{other.lengths[row]} tokens, but {one.lengths[row]} in {one.path.name}"

    return [
        UserError(what, where=other.path, remedy=remedy) for what in rows_where(unlike, one.rows, one.rows, describe)
    ]


def index_blocks(entries: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts in which an index is looked at."""
    for begin in range(0, entries, INDEX_ROWS):
        yield begin, min(begin + INDEX_ROWS, entries)


def row_blocks(index: Index, values: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of blocks of rows with at most so many values together; a longer row is a block of its own."""
    begin = 0
    while begin < index.rows:
        limit = int(index.offsets[begin]) + values * index.dtype.itemsize
        later = index.offsets[begin : begin + INDEX_ROWS]
        end = begin + int(np.searchsorted(later, limit, "right")) - 1  # the last of them may reach past the limit
        if begin + len(later) == index.rows and limit >= int(later[-1]) + int(index.lengths[-1]) * index.dtype.itemsize:
            end = index.rows
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def read_values(index: Index, begin: int, end: int) -> npt.NDArray[Any]:
    """Reads rows begin..end - 1 one behind another; read and not mapped, so that no more than a block is in memory.

    Raises:
        UserError: the file is shorter by now.
    """
    count = int(index.lengths[begin:end].sum(dtype=np.int64))
    found = np.fromfile(index.data, index.dtype, count, offset=int(index.offsets[begin]))
    if len(found) != count:
        raise UserError("was cut short while it was read", where=index.data, remedy="wait until nobody writes it")
    return found


def of_rows(count: int, total: int) -> str:
    """How many rows a finding is about."""
    return f"{count:,} of {total:,} rows"


def rows_where(test: Callable[[int, int], Flags], entries: int, rows: int, describe: Callable[[int], str]) -> list[str]:
    """Counts the entries of an index for which a test is true.

    Args:
        test: of the entries begin..end - 1.
        entries: how many there are; document boundaries are one more than rows.
        rows: how many rows the index has.
        describe: what is wrong with an entry.

    Returns:
        One text, which counts them and describes the first; none where there is no such entry.
    """
    count, first = 0, -1
    for begin, end in index_blocks(entries):
        found = test(begin, end)
        if found.any():
            first = begin + int(found.argmax()) if first < 0 else first
            count += int(found.sum())
    return [f"{of_rows(count, rows)}, first row {first}: {describe(first)}"] if count else []
