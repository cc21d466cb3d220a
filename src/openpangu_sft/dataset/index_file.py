"""Megatron's indexed dataset files: a `.bin` of raw int32 values and an `.idx` that says where each sequence lies.

Beside them lie roles, uint8 [packs, seq_length], as token ids alone do not tell the role: 0 is padding, 1 to 5 are the
positions in `ROLES`, counted from 1; `BEGINS` is added at each start token. Datasets of version 0.5.0 and of other
software have no such file: their roles are unknown.

Layout of the `.idx`, little endian, as megatron/core/datasets/indexed_dataset.py (core_r0.6.0) writes and reads it:
9 bytes magic, uint64 version 1, uint8 type code (4 is int32), uint64 sequences, uint64 document boundaries, then
int32 lengths, int64 byte offsets, int64 document boundaries (0 first). Here every sequence is a document of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import ROLES_SUFFIX
from openpangu_sft.tokenizer.template import HEADERS
from openpangu_sft.util.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
INT32_CODE = 4
HEADER = struct.Struct("<9sQBQQ")
PREFIX = "data"  # of the files in a shard and in a dataset; Megatron's --data-path is directory/data
VALIDATION = "validation"  # of the files of the validation split, where the recipe has data.validation_share

ROLES = tuple(HEADERS)
BEGINS = 128

AGAIN = "run make preprocess and make merge again"
UNKNOWN = f"unknown: this dataset records none; {AGAIN} to see roles"

Ids = npt.NDArray[np.int32]
Roles = npt.NDArray[np.uint8]

FIELDS = ("input_ids", "attention_mask", "labels")


def field_path(directory: Path, prefix: str, field: str, suffix: str) -> Path:
    """The path of one of the six files of a packed dataset, named as MindSpeed-LLM looks for them."""
    return directory / f"{prefix}_packed_{field}_document.{suffix}"


def roles_path(directory: Path, prefix: str) -> Path:
    return directory / f"{prefix}{ROLES_SUFFIX}"


def index_bytes(rows: int, seq_length: int) -> bytes:
    """The content of the `.idx` of `rows` sequences of `seq_length` int32 values each."""
    lengths = np.full(rows, seq_length, "<i4")
    offsets = np.arange(rows, dtype="<i8") * (4 * seq_length)
    documents = np.arange(rows + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, INT32_CODE, rows, rows + 1)
    return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()


@dataclass(frozen=True)
class Index:
    """The content of an `.idx`, mapped into memory."""

    path: Path  # of the `.idx`
    lengths: npt.NDArray[np.int32]  # [rows], values in each row
    offsets: npt.NDArray[np.int64]  # [rows], bytes before each row in the `.bin`
    documents: npt.NDArray[np.int64]  # [documents + 1], rows before each document

    @property
    def data(self) -> Path:
        """The path of the `.bin`."""
        return self.path.with_suffix(".bin")


def read_index(path: Path, remedy: str) -> Index:
    """Maps an `.idx` into memory. Its entries are not checked: inspect does that.

    Raises `UserError` where it is not an index of int32 values of Megatron's, or not as long as its header says.
    """
    size = path.stat().st_size
    if size < HEADER.size:
        raise UserError(f"is cut short: {size} bytes", where=path, remedy=remedy)
    content = np.memmap(path, "u1", "r")
    *kind, rows, documents = HEADER.unpack(content[: HEADER.size].tobytes())
    if kind != [MAGIC, VERSION, INT32_CODE]:
        what = "is not an index of Megatron's with int32 values: magic, version or type code in its header is another"
        raise UserError(what, where=path, remedy=remedy)
    expected = HEADER.size + 12 * rows + 8 * documents
    if size != expected:
        state = "is cut short" if size < expected else "is longer than its header says"
        what = f"{state}: {size} bytes, expected {expected} for {rows} rows and {documents} document boundaries"
        raise UserError(what, where=path, remedy=remedy)
    return Index(
        path,
        np.frombuffer(content, "<i4", rows, HEADER.size),
        np.frombuffer(content, "<i8", rows, HEADER.size + 4 * rows),
        np.frombuffer(content, "<i8", documents, HEADER.size + 12 * rows),
    )


def read_rows(directory: Path, prefix: str, field: str, seq_length: int) -> Ids:
    """Maps one field of a packed dataset of ours into memory: int32 [rows, seq_length], read only.

    Raises `UserError` where it has no rows, or its index is not that of rows of this length; inspect says more.
    """
    data, index = (field_path(directory, prefix, field, suffix) for suffix in ("bin", "idx"))
    rows, rest = divmod(data.stat().st_size, 4 * seq_length)
    if not rows or rest:
        raise UserError(f"does not hold rows of {seq_length} tokens", where=data, remedy=AGAIN)
    if index.read_bytes() != index_bytes(rows, seq_length):
        what = f"is not the index of {rows} rows of {seq_length} tokens, which {data.name} holds"
        raise UserError(what, where=index, remedy=AGAIN)
    return np.memmap(data, "<i4", "r", shape=(rows, seq_length))


def read_roles(directory: Path, prefix: str, rows: int, seq_length: int) -> Optional[Roles]:
    """Maps roles into memory: uint8 [rows, seq_length], read only; None where the dataset has none.

    Raises `UserError` where the file is of another size.
    """
    path = roles_path(directory, prefix)
    if not path.is_file():
        return None
    if path.stat().st_size != rows * seq_length:
        raise UserError(f"does not hold {rows} rows of {seq_length} roles", where=path, remedy=AGAIN)
    return np.memmap(path, "u1", "r", shape=(rows, seq_length))


def role_of(value: int) -> str:
    """The name of a token's role; raises `UserError` if the value is none that preprocess writes."""
    if not 1 <= value % BEGINS <= len(ROLES):
        raise UserError(f"a token's role is {value}, which preprocess never writes", remedy=AGAIN)
    return ROLES[value % BEGINS - 1]


def count_turns(roles: Roles) -> npt.NDArray[np.int64]:
    """int64 [roles], turns of each role."""
    return np.bincount(roles[roles >= BEGINS] % BEGINS, minlength=len(ROLES) + 1)[1 : len(ROLES) + 1]


class Rows:
    """The three fields of a packed dataset, and its roles where it has them, mapped into memory."""

    def __init__(self, directory: Path, seq_length: int, prefix: str = PREFIX) -> None:
        fields = (read_rows(directory, prefix, field, seq_length) for field in FIELDS)
        self.input_ids, self.segments, self.labels = fields
        self.roles = read_roles(directory, prefix, len(self), seq_length)

    def __len__(self) -> int:
        return min(len(self.input_ids), len(self.segments), len(self.labels))


def read_values(index: Index, begin: int, end: int) -> Ids:
    """Reads rows begin..end - 1, of one length: int32 [rows, seq_length]; not mapped, so that only they are in memory.

    Raises `UserError` where the file is shorter by now.
    """
    count = int(index.lengths[begin:end].sum(dtype=np.int64))
    found = np.fromfile(index.data, "<i4", count, offset=int(index.offsets[begin]))
    if len(found) != count:
        raise UserError("was cut short while it was read", where=index.data, remedy="wait until nothing writes it")
    return found.reshape(end - begin, -1)


class PackedWriter:
    """The six files of a packed dataset, and its roles. Several processes may write rows, in any order.

    `attention_mask` holds segment numbers 1, 2, 3… and 0 for padding, as later MindSpeed-LLM versions do with
    --neat-pack: where a segment ends must be known, and openPangu's eos ends every message, not every sample.
    `files` has path and dtype of each field's values; roles are a field.
    """

    def __init__(self, directory: Path, prefix: str, rows: int, seq_length: int) -> None:
        self.seq_length = seq_length
        for field in FIELDS:
            field_path(directory, prefix, field, "idx").write_bytes(index_bytes(rows, seq_length))
        self.files = {field: (field_path(directory, prefix, field, "bin"), "<i4") for field in FIELDS}
        self.files["roles"] = roles_path(directory, prefix), "u1"
        for path, dtype in self.files.values():
            with path.open("wb") as stream:
                stream.truncate(rows * seq_length * np.dtype(dtype).itemsize)

    def write(self, first_row: int, **fields: npt.NDArray[Any]) -> None:
        """Writes rows from `first_row` on: input_ids, attention_mask and labels (int32), roles (uint8).

        Each is [rows, seq_length].
        """
        for field, values in fields.items():
            path, dtype = self.files[field]
            with path.open("r+b") as stream:
                stream.seek(first_row * self.seq_length * np.dtype(dtype).itemsize)
                stream.write(np.ascontiguousarray(values, dtype).data)
