"""Not implemented: what upstream uses with --profile raises when it is called."""

from __future__ import annotations

from torch_npu._unsupported import Unsupported


def __getattr__(name: str) -> Unsupported:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unsupported(f"torch_npu.profiler.{name}")
