"""Parts of torch_npu or CANN that torch lacks: torchair's modules, compiled operators, the gradient scaler."""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
import torch.utils.cpp_extension

from ._patching import replace
from ._unsupported import Unsupported

MINDSPEED_OPERATORS = "/mindspeed/ops/"
"""Folder of the C++ of MindSpeed's operators (mindspeed/op_builder: every `sources()` begins with ops/csrc)."""


def install() -> None:
    if "torchair" not in sys.modules:
        _install_torchair()
    replace(torch.utils.cpp_extension, load=_without_mindspeed(torch.utils.cpp_extension.load))
    replace(torch, _amp_foreach_non_finite_check_and_unscale_=unscale)


@torch.no_grad()
def unscale(gradients: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """Multiplies gradients by inv_scale in place; sets found_inf, one float, to 1 where one of them is not finite.

    Source: torch's documentation of GradScaler; Megatron-LM calls it at megatron/core/optimizer/optimizer.py:285.
    torch 2.1 has it for CUDA only.
    """
    for gradient in gradients:
        if not torch.isfinite(gradient).all():
            found_inf.fill_(1.0)
        gradient.mul_(inv_scale.to(gradient.dtype))


def _without_mindspeed(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of C++ that does not compile MindSpeed's operators, as there is no CANN.

    MindSpeed loads some of them when it is imported, so they are refused only when called.
    """

    @functools.wraps(load)
    def loading(name: str, sources: Union[str, Sequence[str]], *args: Any, **kwargs: Any) -> Any:
        files = [sources] if isinstance(sources, str) else sources
        if any(MINDSPEED_OPERATORS in file for file in files):
            return Unsupported(f"MindSpeed's compiled operator {name}")
        return load(name, sources, *args, **kwargs)

    return loading


def _install_torchair() -> None:
    """Modules that mindspeed/op_builder/*.py imports at the top, to register operators with a graph compiler."""

    def converter(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda function: function

    annotations = {name: type(name, (), {}) for name in ("Tensor", "TensorSpec", "DataType")}
    graph = ("get_default_ge_graph", "next_unique_name", "compat_as_bytes", "get_invalid_desc")
    _module("torchair", register_fx_node_ge_converter=converter)
    _module("torchair.ge", custom_op=Unsupported("torchair.ge.custom_op"), **annotations)
    _module("torchair.ge_concrete_graph")
    _module("torchair.ge_concrete_graph.ge_apis")
    _module(
        "torchair.ge_concrete_graph.fx2ge_converter",
        declare_supported=converter,
        register_fx_node_ge_converter=converter,
    )
    unsupported = {name: Unsupported(f"torchair.ge_concrete_graph.ge_graph.{name}") for name in graph}
    _module("torchair.ge_concrete_graph.ge_graph", **annotations, **unsupported)


def _module(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    replace(module, **attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
