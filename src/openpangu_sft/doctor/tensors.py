"""Whether torch (and torch_npu) import and add two tensors on every device that training would use.

A process of its own does so, as an import may crash or hang: python -m openpangu_sft.doctor.tensors npu 8
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from typing import Any

from openpangu_sft.doctor.machine import Context, Finding, Ran, failed, ok
from openpangu_sft.training.mindspeed.sources import STAND_IN

MARK = "probe:"  # prefix of the result line: torch_npu prints warnings of its own
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
    command = (sys.executable, "-m", "openpangu_sft.doctor.tensors", kind, str(count))
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


def probe(kind: str, count: int) -> None:
    """Prints a line of JSON: versions and devices, or the step that failed and its error.

    Args:
        kind: npu, cuda, cpu, auto (cuda or cpu), or standin, which must be on Python's path.
        count: devices 0 to count - 1 are used; cpu is one.
    """
    result: dict[str, Any] = {}
    step = "import torch"
    try:
        import torch

        result["torch"] = torch.__version__
        if kind in ("npu", "standin"):
            step = "import torch_npu"
            result["torch_npu"] = getattr(importlib.import_module("torch_npu"), "__version__", "")
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        names = ["cpu"] if kind in ("cpu", "standin") else [f"{kind}:{number}" for number in range(count)]
        result["devices"] = []
        for name in names:
            step = f"add two tensors on {name}"
            total = torch.tensor([1.0, 2.0], device=name) + torch.tensor([3.0, 4.0], device=name)
            if total.tolist() != [4.0, 6.0]:
                raise ArithmeticError(f"1 + 3, 2 + 4 gave {total.tolist()}")
            result["devices"].append(name)
    except BaseException as error:  # an extension may raise anything; the caller reports it
        result.update(step=step, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    probe(sys.argv[1], int(sys.argv[2]))
