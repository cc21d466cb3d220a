"""Pickles written opcode by opcode, and the zip file that torch.save puts around one."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Sequence
from io import BytesIO

PROTO = b"\x80\x02"


def text(value: str) -> bytes:
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    """An integer."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)[:255]
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    """A class or function, by its name with dots."""
    module, _, own = name.rpartition(".")
    return b"c" + f"{module}\n{own}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    """A tuple of any length."""
    return b"(" + b"".join(values) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    """A call."""
    return named(name) + tuple_of(*arguments) + b"R"


def encoded(data: bytes) -> bytes:
    """Bytes, as protocol 2 has them."""
    return call("_codecs.encode", text(data.decode("latin1")), text("latin1"))


def storage(key: str = "0", elements: int = 4, kind: str = "FloatStorage") -> bytes:
    """A persistent id."""
    return tuple_of(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(elements)) + b"Q"


def tensor(of: bytes, offset: int, size: Sequence[int], stride: Sequence[int]) -> bytes:
    """A tensor as torch.save writes it."""
    shape, steps = (tuple_of(*map(number, values)) for values in (size, stride))
    more = b"\x89" + call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of, number(offset), shape, steps, more)


def dtype(name: str, order: str = "<", fields: Sequence[bytes] = (b"N", b"N", b"N")) -> bytes:
    """numpy's dtype; fields: subdtype, names and fields of its state. The flags, which say “objects”, are cleared."""
    size = number(-1 if fields[1] == b"N" else int(name.strip("V") or 0))
    state = tuple_of(number(3), text(order), *fields, size, number(-1 if fields[1] == b"N" else 1), number(0))
    return call("numpy.dtype", text(name), b"\x89", b"\x88") + state + b"b"


def state_of_array(of: bytes, shape: Sequence[int], data: bytes) -> bytes:
    """Sets dtype, shape and content of a numpy array; data: opcodes."""
    return tuple_of(number(1), tuple_of(*map(number, shape)), of, b"\x89", data) + b"b"


def array(of: bytes, shape: Sequence[int], data: bytes) -> bytes:
    """numpy's array, as its `__reduce__` writes it."""
    made = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), tuple_of(number(0)), encoded(b"b"))
    return made + state_of_array(of, shape, data)


def write_zip(
    pickled: bytes, records: Iterable[tuple[str, bytes]] = (("data/0", bytes(16)),), deflated: int = 0
) -> bytes:
    """A file around a pickle, as torch.save writes it; the first `deflated` records are compressed."""
    stream = BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # two records of one name
        for place, (name, data) in enumerate([("data.pkl", pickled), *records, ("version", b"3\n")]):
            kind = zipfile.ZIP_DEFLATED if place < deflated else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, kind)
    return stream.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    """Those of a whole file, without the name of the archive."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
