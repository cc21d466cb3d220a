"""Reads files that torch.save wrote as data: no code of theirs runs, and torch is not asked.

A checkpoint is a pickle, and a pickle may name any function to be called on loading. Here only the names that a
Megatron checkpoint needs are resolved, those of torch to functions of this module. Megatron's and MindSpeed's own
classes (enums in the saved arguments) become inert stand-ins; every other name is refused.
"""

from __future__ import annotations

import errno
import mmap
import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from openpangu_sft.checkpoint.arrays import Array, DType
from openpangu_sft.checkpoint.torch_file import NAMED_DTYPES, STORAGES
from openpangu_sft.errors import UserError, naming

_ALLOWED = {
    "argparse": {"Namespace"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "bytes"},
    "__builtin__": {"set", "bytes"},  # their module's name in pickle protocol 2, which torch.save writes
    "_codecs": {"encode"},  # how protocol 2 writes bytes
    "_io": {"BytesIO"},  # extra state of Transformer Engine's layers
    "numpy": {"dtype", "ndarray"},  # state of numpy's random generator, and numbers in the arguments
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
}
_INERT = ("megatron", "mindspeed", "mindspeed_llm")
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip record: length of the name and of the extra field. The data follow behind these two."""


class Refused(pickle.UnpicklingError):
    """A type that a checkpoint does not need."""


class Inert:
    """Stands for an object of a class that is not loaded; what the pickle puts into it is dropped."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Of a subclass of dict."""

    def extend(self, items: Any) -> None:
        """Of a subclass of list."""


class Storage(NamedTuple):
    """Memory of one or more tensors: a record of the file.

    Args:
        values: [elements] of the storage's dtype, a view of the mapped file.
    """

    values: Array


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Array:
    """torch._utils._rebuild_tensor_v2: a view of a storage; offset and strides are in elements."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise pickle.UnpicklingError("a tensor without a storage")
    values = storage.values
    if 0 not in size and offset + sum((extent - 1) * step for extent, step in zip(size, stride)) >= len(values):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[min(offset, len(values)) :], size, steps)


def _parameter(data: Array, *rest: object) -> Array:
    """torch._utils._rebuild_parameter: for us the tensor alone."""
    return data


_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): partial(Inert, "device"),
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in NAMED_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: _Archive) -> None:
        super().__init__(archive.open("data.pkl"))
        self._archive = archive
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module.replace("__builtin__", "builtins"), name)
        if (module, name) in _TORCH:
            return _TORCH[module, name]
        if module.split(".")[0] in _INERT:
            return Inert
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """A storage, from ("storage", dtype, key, device, elements)."""
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a persistent id that names no storage")
        if key not in self._storages:
            self._storages[key] = Storage(self._archive.record(f"data/{key}", dtype, elements))
        return self._storages[key]


class _Archive:
    """A file of torch's zip format, mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._content = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        self._zip = zipfile.ZipFile(path)
        self._root = self._zip.namelist()[0].split("/")[0] if self._zip.namelist() else ""

    def __contains__(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._zip.NameToInfo

    def open(self, name: str) -> IO[bytes]:
        """A record as a stream."""
        return self._zip.open(f"{self._root}/{name}")

    def record(self, name: str, dtype: DType, elements: int) -> Array:
        """A record as an array, not copied."""
        entry = self._zip.getinfo(f"{self._root}/{name}")
        self._zip.open(entry).close()  # compares the record's own header with the list that sent us here
        lengths = _LOCAL_HEADER.unpack_from(self._content.data, entry.header_offset)
        begin = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        size = elements * dtype.itemsize
        data = self._content[begin : begin + size]
        if entry.compress_type != zipfile.ZIP_STORED or {data.nbytes, entry.file_size, entry.compress_size} != {size}:
            raise pickle.UnpicklingError(f"record {name} is not what the pickle says")
        return data.view(dtype)

    def close(self) -> None:
        """Closes the zip; what is mapped stays until nothing refers to it."""
        self._zip.close()


def is_whole(path: Path) -> bool:
    """Whether a file has its end: torch.save writes the list of records last."""
    with path.open("rb") as stream:
        try:
            return zipfile.is_zipfile(stream)
        except zipfile.BadZipFile:
            return False


def load_checkpoint_file(path: Path) -> Any:
    """Loads a file that torch.save wrote; its tensors are read-only numpy arrays, views of the mapped file.

    Two things that torch.load reads as well are refused: TorchScript archives, and the format of torch before 1.6.

    Raises:
        UserError: not such a file, cut short, or it asks for a type that a checkpoint does not need.
    """
    if not is_whole(path):
        raise UserError("is cut short or no checkpoint of torch 1.6 or later", where=path, remedy="make it again")
    try:
        with naming(path):
            archive = _Archive(path)
            try:
                if "constants.pkl" in archive:
                    raise Refused("TorchScript")
                if "byteorder" in archive and archive.open("byteorder").read(8) != b"little":
                    raise UserError("was written on a big-endian machine", where=path, remedy="write it on another one")
                return _Unpickler(archive).load()
            finally:
                archive.close()
    except Refused as error:
        raise UserError(
            f"asks for {error} on loading, which no checkpoint needs", where=path, remedy="do not use this file"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged file makes pickle and zipfile raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a record at a place below zero
            raise
        first_line = (str(error).splitlines() or [""])[0][:200] or repr(error)
        raise UserError(f"is damaged or no checkpoint ({first_line})", where=path, remedy="make it again") from None
