"""Parts of torch_npu or CANN that torch lacks: small modules, torchair, compiled operators, the gradient scaler."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
import torch.utils.cpp_extension

from ._patching import replace
from ._unsupported import Unsupported

MINDSPEED_OPERATORS = "/mindspeed/ops/"
"""Folder of the C++ of MindSpeed's operators (mindspeed/op_builder: every `sources()` begins with ops/csrc)."""


def install() -> None:
    _module("torch_npu.profiler")  # for --profile
    _module("torch_npu.utils")  # register_asd_hook, which detects silent data corruption with NPU_ASD_ENABLE
    _module("torch_npu.utils.collect_env", get_cann_version=lambda: "8.0.RC3")  # pairs with torch_npu 2.1.0.post8
    _module("torch_npu.utils.flops_count")  # for MindSpeed's search for a parallel layout
    # mindspeed/op_builder/*.py registers operators with a graph compiler when it is imported
    _module("torchair", register_fx_node_ge_converter=lambda *_: lambda function: function)
    _module("torchair.ge", **{name: type(name, (), {}) for name in ("Tensor", "TensorSpec", "DataType")})
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


def _module(name: str, **attributes: Any) -> None:
    """A module whose other attributes are refused when they are called."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    replace(module, __getattr__=Unsupported(name).__getattr__, **attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        replace(sys.modules[parent], **{child: module})
