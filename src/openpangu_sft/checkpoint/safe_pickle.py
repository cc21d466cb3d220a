"""Loads a Megatron checkpoint as data: pickled code never runs.

A checkpoint is a pickle, and a pickle may name any function to be called on loading. Here only the types that a
Megatron checkpoint needs are resolved. Megatron's and MindSpeed's own classes (enums in the saved arguments) become
inert stand-ins, so that those packages need not be there; every other name is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from openpangu_sft.errors import UserError

_ALLOWED = {
    "argparse": {"Namespace"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "bytes"},
    "__builtin__": {"set", "bytes"},  # their module's name in pickle protocol 2, which torch.save writes
    "_codecs": {"encode"},  # how protocol 2 writes bytes
    "_io": {"BytesIO"},  # extra state of Transformer Engine's layers
    "numpy": {"dtype", "ndarray"},  # state of numpy's random generator, and numbers in the arguments
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
}
_INERT = ("megatron", "mindspeed", "mindspeed_llm")
_ZIP_MAGIC = b"PK\x03\x04"


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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module.replace("__builtin__", "builtins"), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in _INERT:
            return Inert
        raise Refused(f"{module}.{name}")


def _load(stream: IO[bytes], **options: Any) -> Any:
    return _Unpickler(stream, **options).load()


_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="safe_pickle")


def load_checkpoint_file(path: Path) -> Any:
    """Loads a file that torch.save wrote, tensors on the CPU.

    Two things that torch.load reads as well are refused, since they run code of the file or trust it in other ways:
    TorchScript archives, and the format of torch before 1.6.

    Raises:
        UserError: not such a file, cut short, or it asks for a type that a checkpoint does not need.
    """
    with path.open("rb") as stream:
        if stream.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise UserError("is damaged or no checkpoint of torch 1.6 or later", where=path, remedy="make it again")
        try:
            stream.seek(0)
            if "constants.pkl" in torch._C.PyTorchFileReader(stream).get_all_records():  # type: ignore[attr-defined]
                raise Refused("TorchScript")
            stream.seek(0)
            return torch.load(stream, map_location="cpu", pickle_module=_PICKLE)
        except Refused as error:
            raise UserError(
                f"asks for {error} on loading, which no checkpoint needs", where=path, remedy="do not use this file"
            ) from None
        except OSError:
            raise
        except Exception as error:  # a damaged file makes torch and pickle raise nearly anything
            first_line = (str(error).splitlines() or [""])[0][:200] or repr(error)
            raise UserError(f"is damaged or no checkpoint ({first_line})", where=path, remedy="make it again") from None
