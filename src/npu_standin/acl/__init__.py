"""CANN's pyACL, which MindSpeed imports, and calls for mixtures of experts and adaptive recomputing alone."""

from typing import Any

from torch_npu._unsupported import Unsupported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unsupported(f"acl.{name}")
