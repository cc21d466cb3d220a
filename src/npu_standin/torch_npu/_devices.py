"""Requests to torch for an NPU are given the CPU."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

FILLED = ["empty", "zeros", "ones", "full", "rand", "randn", "randint"]
FACTORIES = [*FILLED, *(f"{name}_like" for name in FILLED), "tensor", "as_tensor", "arange", "linspace", "randperm"]
METHODS = ["to", "new_tensor", "new_empty", "new_zeros", "new_ones", "new_full"]

_types = {"npu", "privateuseone"}
"""Kinds of device that are the NPU; "cuda" too, once transfer_to_npu has been imported, and not before."""


def replace(owner: Any, **values: Any) -> None:
    """Sets attributes of a module or class; a type checker refuses assignments to torch's functions."""
    for name, value in values.items():
        setattr(owner, name, value)


def to_cpu(device: Any) -> Any:
    """The CPU for an NPU given as a name, torch.device or index; other values unchanged."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    kind = device.split(":")[0] if isinstance(device, str) else getattr(device, "type", None)
    return torch.device("cpu") if kind in _types else device


def install(npu: types.ModuleType) -> None:
    """Installs torch.npu."""
    torch.utils.rename_privateuse1_backend("npu")  # so that torch.device("npu") is a device
    replace(torch, npu=npu)
    sys.modules["torch.npu"] = npu
    replace(torch, **{name: _with_device(getattr(torch, name)) for name in FACTORIES})
    replace(torch.Tensor, **{name: _with_device(getattr(torch.Tensor, name), to=name == "to") for name in METHODS})
    replace(torch.nn.Module, to=_with_device(torch.nn.Module.to, to=True), npu=_itself)
    replace(torch.Tensor, npu=_itself, pin_memory=_itself, is_npu=property(lambda tensor: True))
    replace(torch.Tensor, type=_with_npu_name(torch.Tensor.type))


def transfer(npu: types.ModuleType) -> None:
    """The effect of importing torch_npu.contrib.transfer_to_npu: "cuda" is the NPU, and torch.cuda is torch.npu.

    torch.jit.script does nothing, as the real one has it.
    """
    _types.add("cuda")
    values = {name: value for name, value in vars(npu).items() if not isinstance(value, types.ModuleType)}
    replace(torch.cuda, **{name: values[name] for name in values.keys() & vars(torch.cuda) if name[:2] != "__"})
    replace(torch.Tensor, cuda=_itself)
    replace(torch.nn.Module, cuda=_itself)
    replace(torch.jit, script=lambda obj=None, *_, **__: (lambda function: function) if obj is None else obj)


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _with_device(function: Callable[..., Any], to: bool = False) -> Callable[..., Any]:
    """A function of torch with `device` translated; a method `to` has it as its first argument, or not at all."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if to and len(args) > 1:
            args = (args[0], to_cpu(args[1]), *args[2:])
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # torch pins for CUDA alone
        return function(*args, **kwargs)

    return call


def _with_npu_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type with an NPU tensor's answer, torch.npu.FloatTensor.

    MindSpeed rewrites that to torch.cuda.FloatTensor, which Megatron-LM's optimizers check.
    """

    @functools.wraps(function)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = function(self, *args, **kwargs)
        return answer.replace("torch.", "torch.npu.", 1) if isinstance(answer, str) else answer

    return call
