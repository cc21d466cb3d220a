"""Reads files of torch.save as data: none of their code runs, and torch is not needed.

A checkpoint is a pickle, and a pickle may name any function to be called on loading. This reader makes only numbers,
texts, lists, tuples, dicts and records of names (inert.py); a name that no Megatron checkpoint needs is refused.
"""

from __future__ import annotations

import errno
import io
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from openpangu_sft.checkpoint.files.arrays import Array
from openpangu_sft.checkpoint.files.inert import STORAGE, Builder, Inert, Refused, is_key, named
from openpangu_sft.util.errors import UserError, naming

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: signature, length of the name and of the extra field. These two and the data follow."""
_ENCRYPTED = 1
_LARGEST = 4 << 20
"""Limit in bytes of the pickle, and of the list of records: the 7B's, with optimizer, have less than a tenth."""

_PythonUnpickler: Any = pickle._Unpickler
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_WRITTEN = """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_LIST APPEND
    APPENDS EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET
    LONG_BINGET"""
"""With the three that `_Unpickler` defines, the opcodes of protocol 2, which torch.save writes."""


class _Steps(dict[int, Any]):
    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"opcode {_NAMES.get(code, code)}: not in protocol 2, torch.save's default")


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """The unpickler in Python, with few opcodes. Only `Inert` on its stack can be called, or has a state."""

    dispatch = _Steps(
        {code: _PythonUnpickler.dispatch[code] for code, name in _NAMES.items() if name in _WRITTEN.split()}
    )

    find_class = staticmethod(named)

    def persistent_load(self, pid: Any) -> Inert:
        if type(pid) is not tuple:
            raise pickle.UnpicklingError("a persistent id that names no storage")
        return Inert(STORAGE, pid)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._put([self.stack.pop()], [value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(items[::2], items[1::2])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            record, target = target, target.items or {}
            record.items = target
        if type(target) is not dict or len(keys) != len(values) or not all(map(is_key, keys)):
            raise pickle.UnpicklingError("a key that is neither a name nor a small number")
        target.update(zip(keys, values))

    dispatch[pickle.NEWOBJ[0]] = _PythonUnpickler.load_reduce  # a new object is recorded as a call
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


class _Stream(io.FileIO):
    """A file of which zipfile reads at most `_LARGEST` bytes at once, whatever the end record claims."""

    def read(self, size: Any = -1, /) -> bytes:
        if size is not None and size > _LARGEST:
            raise zipfile.BadZipFile("too many records")
        return super().read(size) or b""


def _records(path: Path, content: Array) -> dict[str, Array]:
    """The bytes of every record, by its name in the file.

    Raises `UnpicklingError` where records overlap or share a name, or one is compressed or not where the list says, and
    `Refused` for a TorchScript archive, which has Python code.
    """
    with _Stream(path) as stream, zipfile.ZipFile(stream) as archive:
        entries, list_begins = archive.infolist(), archive.start_dir
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise Refused("TorchScript")
    found: dict[str, Array] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        begin = entry.header_offset + _LOCAL_HEADER.size
        signature, *lengths = _LOCAL_HEADER.unpack_from(content.data, entry.header_offset)
        own_name = content[begin : begin + lengths[0]].tobytes()
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise pickle.UnpicklingError(f"record {name} is compressed or encrypted")
        own_place = entry.header_offset >= end and entry.compress_size == entry.file_size and name not in found
        if not own_place or signature != b"PK\3\4" or own_name != name.encode():
            raise pickle.UnpicklingError(f"record {name} is not the one of the list")
        begin += sum(lengths)
        end = begin + entry.file_size
        if end > list_begins:
            raise pickle.UnpicklingError(f"record {name} has no end")
        found[name] = content[begin:end]
        if name.endswith("/data.pkl") and zlib.crc32(found[name].data) != entry.CRC:
            raise pickle.UnpicklingError(f"record {name} has another sum")
    root = entries[0].filename.split("/")[0] if entries else ""
    return {name[len(root) + 1 :]: data for name, data in found.items() if name.startswith(f"{root}/")}


def is_whole(path: Path) -> bool:
    """Whether a file is complete: torch.save writes the list of records last."""
    with path.open("rb") as stream:
        try:
            return zipfile.is_zipfile(stream)
        except zipfile.BadZipFile:
            return False


def load_checkpoint_file(path: Path) -> Any:
    """Loads a file of torch.save; its tensors are read-only numpy arrays, views of the mapped file.

    Raises `UserError` for a file that is not one (of torch 1.6 or later), is damaged, or asks for a type that no
    checkpoint needs; unlike torch.load it refuses TorchScript archives.
    """
    if not is_whole(path):
        raise UserError("is cut short or no checkpoint of torch 1.6 or later", where=path, remedy="make it again")
    try:
        with naming(path):
            with path.open("rb") as stream:
                content = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            records = _records(path, content)
            if "byteorder" in records and records["byteorder"][:8].tobytes() != b"little":
                what, remedy = "was written on a big-endian machine", "write it on a little-endian one"
                raise UserError(what, where=path, remedy=remedy)
            pickled = records["data.pkl"]
            if len(pickled) > _LARGEST:
                raise pickle.UnpicklingError("its pickle is larger than any checkpoint's")
            return Builder(records, len(content)).build(_Unpickler(io.BytesIO(pickled.tobytes())).load())
    except Refused as error:
        what = f"asks for {error} on loading, which no checkpoint needs"
        raise UserError(what, where=path, remedy="do not use this file") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes pickle and zipfile raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a record at a negative offset
            raise
        first_line = (str(error).splitlines() or [""])[0][:200] or repr(error)
        raise UserError(f"is damaged or no checkpoint ({first_line})", where=path, remedy="make it again") from None
