"""Values of the names in a checkpoint file. Reading gives `Inert` records; values are built from them afterwards.

Every value is checked here before numpy sees it: numeric dtypes only, a buffer exactly as long as shape and item size
require, tensors within their storage, bounded depth, number and size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from math import prod
from pickle import UnpicklingError
from typing import Any, Callable, Literal, Optional

import numpy as np

from openpangu_sft.checkpoint.files.arrays import Array, DType
from openpangu_sft.checkpoint.files.torch_write import NAMED_DTYPES, STORAGES

STORAGE = "storage"  # name of the record of a persistent id. Names in a file have a dot, so none equals it

_INERT = ("megatron", "mindspeed", "mindspeed_llm")
_MOST_VALUES = 1_000_000  # a checkpoint of the 7B has about 10,000
_DEEPEST = 50  # and a depth of 12
_MOST_DIMENSIONS = 32  # of a numpy array
_LARGEST_KEY = 1 << 16  # indices of parameters; Python's hash of larger integers can be made to collide


class Refused(UnpicklingError):
    """A type that a checkpoint does not need."""


class Inert:
    """A class or function that a file names, with its module; with `args`, a call of it. Data: nothing of it runs."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Optional[tuple[Any, ...]] = None) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: Optional[dict[Any, Any]] = None

    def __call__(self, *args: Any) -> Inert:
        """The record of a call, as pickle's REDUCE and NEWOBJ ask for it."""
        if self.args is not None:
            raise UnpicklingError(f"calls the result of {self.name}")
        return Inert(self.name, args)

    def __setstate__(self, state: Any) -> None:
        """Stores the state that BUILD sets."""
        self.state = state

    def append(self, item: Any) -> None:
        """Called for subclasses of list, whose items are dropped."""

    extend = append


def named(module: str, name: str) -> Inert:
    """The record of a name; raises `Refused` where no checkpoint needs it."""
    # Protocol 2 writes Python 2's name of the module; numpy 2 has another one too
    full = f"{module.replace('__builtin__', 'builtins').replace('numpy._core.', 'numpy.core.')}.{name}"
    if full not in _MAKERS and full not in _CONSTANTS and not _is_inert(module):
        raise Refused(f"{module}.{name}")
    return Inert(full)


def _is_inert(name: str) -> bool:
    return name.split(".")[0] in _INERT


def is_key(key: object) -> bool:
    """Whether a dict may have this key: many of these kinds with one hash cannot be made."""
    return type(key) is str or (type(key) is int and 0 <= key < _LARGEST_KEY)


class Builder:
    """Builds the values that a file with these records describes.

    Tensors and bytes may take eight times the file's size in bytes, since views may overlap.
    """

    def __init__(self, records: Mapping[str, Array], size: int) -> None:
        self._records = records
        self._values, self._bytes = _MOST_VALUES, 8 * size

    def build(self, value: Any, depth: int = 0) -> Any:
        """A copy with every record replaced by its value; `UnpicklingError` for wrong arguments or too much of it."""
        self._values -= 1
        if depth > _DEEPEST or self._values < 0:
            raise UnpicklingError("nested too deeply" if depth > _DEEPEST else "too many values")
        if type(value) is dict:
            return {key: self.build(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.build(item, depth + 1) for item in value])
        return self._record(value, depth) if type(value) is Inert else value

    def _record(self, record: Inert, depth: int) -> Any:
        if record.args is None:
            constant = _CONSTANTS.get(record.name)
            return Inert(record.name) if constant is None else constant
        built = Inert(record.name, self.build(record.args, depth + 1))
        built.state, built.items = self.build(record.state, depth + 1), self.build(record.items, depth + 1)
        if record.name == STORAGE:
            return self._storage(built)
        if record.name in _CONSTANTS:
            raise UnpicklingError(f"calls {record.name}")
        made = _MAKERS[record.name](built) if record.name in _MAKERS else built
        self._bytes -= made.nbytes if isinstance(made, np.ndarray) else len(made) if isinstance(made, bytes) else 0
        if self._bytes < 0:
            raise UnpicklingError("tensors of many times the file's size")
        return made

    def _storage(self, record: Inert) -> Inert:
        """Of ("storage", dtype, key, device, elements): its state becomes [elements], a view of the mapped file."""
        kind, dtype, key, _, elements = record.args or ()
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or type(elements) is not int:
            raise UnpicklingError("a persistent id that names no storage")
        data = self._records[f"data/{key}"]
        if data.nbytes != elements * dtype.itemsize:
            raise UnpicklingError(f"record data/{key} is not what the pickle says")
        record.state = data.view(dtype)
        return record


def _arguments(record: Inert, *kinds: type) -> Any:
    """The arguments, which must be of exactly these types."""
    if tuple(map(type, record.args or ())) != kinds:
        raise UnpicklingError(f"{record.name} with other arguments than a checkpoint has")
    return record.args or ()


def _sizes(values: Any) -> bool:
    """Whether these are a shape, or strides."""
    few = type(values) is tuple and len(values) <= _MOST_DIMENSIONS
    return few and all(type(value) is int and value >= 0 for value in values)


def _tensor(record: Inert) -> Array:
    """torch._utils._rebuild_tensor_v2: a view of a storage; offset and strides are in elements."""
    storage, offset, size, stride = (record.args or ())[:4]
    shaped = _sizes((offset,)) and _sizes(size) and _sizes(stride) and len(size) == len(stride)
    if type(storage) is not Inert or storage.name != STORAGE or not shaped:
        raise UnpicklingError("a tensor without a storage")
    values = storage.state
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride))
    if 0 in size:
        return np.empty(size, values.dtype)
    if last >= len(values):
        raise UnpicklingError("a tensor reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(values[offset:], size, [step * values.itemsize for step in stride])


def _numbers(shape: Any, dtype: Any, data: Any, order: Literal["C", "F"] = "C") -> Array:
    """A numpy array of exactly the given bytes."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or not _sizes(shape):
        raise UnpicklingError("an array that is not of numbers")
    if prod(shape) * dtype.itemsize != len(data):
        raise UnpicklingError("an array of another size than its bytes")
    return np.ndarray(shape, dtype, data, order=order)


def _array(record: Inert) -> Array:
    """numpy's _reconstruct and the state set on it: (version, shape, dtype, Fortran order, bytes)."""
    _, shape, dtype, fortran, data = record.state
    return _numbers(shape, dtype, data, "F" if fortran is True else "C")


def _scalar(record: Inert) -> Any:
    """numpy.core.multiarray.scalar: a dtype and the bytes of one number."""
    dtype, data = record.args or ()
    return _numbers((), dtype, data)[()]


def _dtype(record: Inert) -> DType:
    """numpy.dtype, with its byte order as state: numbers without fields, little-endian."""
    name, order = (record.args or (None,))[0], record.state[1]
    if type(name) is not str or name not in _NUMBERS or type(order) is not str or order not in "<|=":
        raise UnpicklingError(f"a dtype that is none of numbers ({name if type(name) is str else 'without a name'})")
    return np.dtype(name)


def _namespace(record: Inert) -> Namespace:
    _arguments(record)
    return Namespace(**record.state) if type(record.state) is dict else Namespace()


def _encode(record: Inert) -> bytes:
    """_codecs.encode: protocol 2 writes bytes as latin1 text."""
    text, encoding = _arguments(record, str, str)
    if encoding != "latin1":
        raise UnpicklingError(f"bytes encoded by {encoding}")
    return bytes(text, "latin1")


def _set(record: Inert) -> set[Any]:
    (items,) = _arguments(record, list)
    if not all(map(is_key, items)):
        raise UnpicklingError("a set of other things than names and small numbers")
    return set(items)


def _member(record: Inert) -> Inert:
    """getattr(Enum, "NAME"): as Python 3.11.0 to 3.11.3 pickle a member of an Enum; nothing else is accepted."""
    args = record.args or ()
    if tuple(map(type, args)) != (Inert, str) or args[0].args is not None or not _is_inert(args[0].name):
        raise Refused("__builtin__.getattr")
    return Inert(args[0].name, args[1:])


_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_CONSTANTS: dict[str, Any] = {
    "numpy.ndarray": None,  # the class that numpy's _reconstruct makes
    **{f"torch.{name}": dtype for name, dtype in {**STORAGES, **NAMED_DTYPES}.items()},
}
"""Names that are not called, and their values."""
_MAKERS: dict[str, Callable[[Inert], Any]] = {
    "argparse.Namespace": _namespace,
    "collections.OrderedDict": lambda record: dict(record.items or {}, *_arguments(record)),
    "builtins.set": _set,
    "builtins.bytes": lambda record: bytes(*_arguments(record)),
    "builtins.getattr": _member,
    "_codecs.encode": _encode,
    "_io.BytesIO": lambda record: record,  # extra state of Transformer Engine's layers
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "torch.Size": lambda record: _arguments(record, tuple)[0],
    "torch.device": lambda record: record,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda record: _arguments(record, np.ndarray, bool, dict)[0],
}
"""Names that are called, and the value of the call. Classes of Megatron and MindSpeed stay records."""
