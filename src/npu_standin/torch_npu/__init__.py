"""A stand-in for Huawei's torch_npu on a machine without an NPU: ../README.md says what it is, and what it is not.

Importing it changes torch in this process, as importing the real one does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import _companions, _devices, npu
from ._attention import npu_fusion_attention
from ._collectives import register_hccl
from ._operators import npu_apply_adam_w, npu_rms_norm, npu_rotary_mul, npu_swiglu

__all__ = ["npu", "npu_apply_adam_w", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

__version__ = "2.1.0.post8+standin"


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch_npu.{name} is not in the stand-in for torch_npu (src/npu_standin)")


# MindSpeed builds paths of headers from it before anything is compiled.
os.environ.setdefault("ASCEND_HOME_PATH", str(Path(__file__).parent))

_companions.install()
_devices.install(npu)
register_hccl()
