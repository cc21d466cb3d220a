"""CANN's pyACL, which MindSpeed imports, but calls only for mixture of experts and adaptive recompute."""

from typing import Any

from torch_npu._unsupported import Unsupported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unsupported(f"acl.{name}")
