"""Parts of torch_npu or CANN that torch lacks: names for imports, compiled operators, the gradient scaler."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.utils.cpp_extension

from ._devices import replace


class Unsupported:
    """What upstream uses at import only: has every attribute, and raises NotImplementedError when it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Unsupported:
        if name.startswith("__"):  # Python's own questions, hasattr(…, "__iter__") for one
            raise AttributeError(name)
        return Unsupported(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is not in the stand-in for torch_npu (src/npu_standin)")


def install() -> None:
    _module("acl")  # CANN's pyACL, which only mixture of experts and adaptive recompute call
    _module("torch_npu.utils")
    _module("torch_npu.utils.collect_env", get_cann_version=lambda: "8.0.RC3")  # pairs with torch_npu 2.1.0.post8
    # mindspeed/op_builder/*.py registers operators with a graph compiler when it is imported
    _module("torchair", register_fx_node_ge_converter=lambda *_: lambda function: function)
    _module("torchair.ge")
    # there is no CANN to compile operators with; MindSpeed loads some of them when it is imported
    replace(torch.utils.cpp_extension, load=lambda name, *_, **__: Unsupported(f"compiled operator {name}"))
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


def _module(name: str, **attributes: Any) -> None:
    """A module whose other attributes are refused when they are called."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    replace(module, __getattr__=Unsupported(name).__getattr__, **attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        replace(sys.modules[parent], **{child: module})
