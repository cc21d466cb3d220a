"""Writes files that torch.load reads, without torch, and without all tensors in memory at once.

The format (torch/serialization.py, _save): a zip archive, not compressed, with a pickle that names storages by number,
one record `data/NUMBER` for each storage, its bytes beginning at a multiple of 64, and the format's version, 3.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from io import BytesIO
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, cast

import numpy as np

from openpangu_sft.checkpoint.files.arrays import BF16, DType, Stored
from openpangu_sft.checkpoint.files.writer import Advance, Entry, OutputFile, nothing
from openpangu_sft.util.errors import naming

_KINDS: dict[str, Any] = {"Float": "f4", "BFloat16": BF16, "Half": "f2", "Double": "f8", "Long": "i8", "Int": "i4"}
_KINDS.update({"Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "b1"})
STORAGES: dict[str, DType] = {f"{kind}Storage": np.dtype(dtype) for kind, dtype in _KINDS.items()}
"""torch's storage classes, which stand for dtypes in a file."""
NAMED_DTYPES: dict[str, DType] = {str(dtype): dtype for dtype in STORAGES.values()}  # names of dtypes in torch's module

_PROTOCOL = 2  # what torch.save writes
_ALIGNMENT = 64
_ROOT = "archive"
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20


class _Global(NamedTuple):
    """A function or class of torch, written by name, as torch is not imported."""

    module: str
    name: str

    def __call__(self) -> None:
        """Required by pickle of a function, never called."""


class _Storage(tuple[Any, ...]):
    """torch's reference to a storage: ("storage", its class, its number in the file, device, elements)."""


_PythonPickler: Any = pickle._Pickler
_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_STORAGES = {dtype: _Global("torch", name) for name, dtype in STORAGES.items()}
_DTYPES = {dtype: _Global("torch", name) for name, dtype in NAMED_DTYPES.items()}


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """The pickler in Python: the one in C imports each module that it names."""

    dispatch: ClassVar[dict[type, Any]] = dict(_PythonPickler.dispatch)

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, _PROTOCOL)
        self.tensors: list[Stored] = []

    def save_tensor(self, tensor: Stored) -> None:
        """A tensor with a storage of its own, contiguous."""
        storage = _Storage(("storage", _STORAGES[tensor.dtype], str(len(self.tensors)), "cpu", prod(tensor.shape)))
        self.tensors.append(tensor)
        strides = tuple(prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        arguments: tuple[Any, ...] = (storage, 0, tensor.shape, strides, False, OrderedDict())
        self.save_reduce(_REBUILD, arguments, obj=tensor)

    def save_name(self, value: _Global) -> None:
        """A name; later uses refer to the memo."""
        self.write(b"c" + f"{value.module}\n{value.name}\n".encode("ascii"))
        self.memoize(value)

    dispatch[Stored] = save_tensor
    dispatch[_Global] = save_name
    dispatch[_Storage] = lambda self, storage: self.save_pers(tuple(storage))
    for _kind in {type(dtype) for dtype in NAMED_DTYPES.values()}:
        dispatch[_kind] = lambda self, dtype: self.save(_DTYPES[dtype])


def write_torch_file(content: object, path: Path, advance: Advance = nothing) -> Entry:
    """Writes a file and returns its manifest entry. Tensors in the content are `Stored`, dtypes are numpy's."""
    pickled = BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with (
        naming(path),
        OutputFile(path) as output,
        zipfile.ZipFile(cast("IO[bytes]", output), "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            with _open(archive, output, name, len(data)) as record:
                record.write(data)
        for key, tensor in enumerate(pickler.tensors):
            with _open(archive, output, f"data/{key}", tensor.nbytes) as record:
                for chunk in tensor.chunks():
                    record.write(chunk.reshape(-1).view(np.uint8).data)
                    advance(chunk.nbytes, "")
        with _open(archive, output, "version", 2) as record:
            record.write(b"3\n")
    return output.entry


def _open(archive: zipfile.ZipFile, output: OutputFile, name: str, size: int) -> IO[bytes]:
    """Opens a record whose data begin at a multiple of 64; an extra field pads the header, as torch does."""
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")  # dated 1980: equal content gives equal bytes
    entry.file_size = size  # zipfile decides by it whether the record needs ZIP64
    header = output.position + _LOCAL_HEADER + len(entry.filename) + len(b"FB\0\0")
    large = size * 1.05 > zipfile.ZIP64_LIMIT
    padding = -(header + (_ZIP64_EXTRA if large else 0)) % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return archive.open(entry, "w", force_zip64=large)
