"""Whether torch (and torch_npu) import and add two tensors: probe.py does so in a process of its own."""

from __future__ import annotations

import json
import os
import re
import sys

from openpangu_sft.doctor.finding import Finding, failed, ok
from openpangu_sft.doctor.machine import Context, Ran
from openpangu_sft.doctor.probe import MARK
from openpangu_sft.training.mindspeed.sources import STAND_IN

SECONDS = 240.0  # importing torch from a cold disk takes half a minute, the first use of each NPU some seconds


def adds(context: Context) -> Finding:
    train, count = context.recipe.train, context.recipe.parallel.devices_per_node
    environment, kind = {}, "npu"
    if train.engine == "transformers":
        kind = train.device
    elif not context.wants_npus:
        before = context.machine.environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(STAND_IN), *([before] if before else [])])
        kind = "standin"
    command = (sys.executable, "-m", "openpangu_sft.doctor.probe", kind, str(count))
    return judge(context.machine.run(*command, seconds=SECONDS, environment=environment), kind, count)


def judge(ran: Ran, kind: str, count: int) -> Finding:
    """The probe's output, for so many devices of a kind, as a finding. Pure."""
    lines = [line for line in ran.text.splitlines() if line.strip()] or [""]
    answer = next((line[len(MARK) :] for line in reversed(lines) if line.startswith(MARK)), "")
    if not answer:
        found = f"{ran.problem or 'no answer'} {lines[-1]}".strip()
        return failed(found, "run python -c 'import torch, torch_npu' yourself")
    result = json.loads(answer)
    if "error" in result:
        return failed(f"{result['step']}: {result['error']}", _remedy(kind, result["step"], result["error"]))
    names = ", ".join(f"{name} {result[name]}".strip() for name in ("torch", "torch_npu") if name in result)
    where = f"each of {count} devices" if result["devices"][1:] else result["devices"][0]
    return ok(f"{names}; 1 + 3 = 4 on {where}")


_CUDA = re.compile(r"CUDA|NVIDIA|\blib(cu|nv|nccl)[a-zA-Z]*[-0-9]*\.so", re.IGNORECASE)
"""CUDA's messages, and the names of its libraries: libcudart.so.12, libcublas.so.12, libnvrtc.so, libnccl.so.2."""


def _remedy(kind: str, step: str, error: str) -> str:
    """CUDA is matched before Ascend, as its messages name drivers and .so files too."""
    if "No module named 'torch_npu'" in error:
        return "see torch_npu"
    if "No module named" in error:
        return "make setup on a host; in a container take the image as it is"
    if kind == "npu" and step.startswith("add"):
        return "see NPU health, NPUs free, device files and driver; as root, dmesg says more"
    if _CUDA.search(error):
        if step.startswith("import"):
            return "this torch is one for CUDA, whose libraries are missing: make setup installs matching packages"
        return "set train.device=cpu, or lower parallel.devices_per_node to the number of GPUs (nvidia-smi)"
    if kind == "npu" and ("libascend_hal" in error or "driver" in error):
        return "put /usr/local/Ascend/driver/lib64, with common and driver in it, on LD_LIBRARY_PATH; see driver"
    if kind == "npu" and (".so" in error or "CANN" in error):
        return "set CANN's environment (source set_env.sh), see CANN"
    return f"run {sys.executable} -c 'import torch' yourself; make setup installs matching packages"
