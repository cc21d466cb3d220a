"""Adds two tensors on every device that training would use, in a process of its own: an import may crash or hang.

Run as: python -m openpangu_sft.doctor.probe npu 8
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MARK = "probe:"  # prefix of the result line: torch_npu prints warnings of its own


def main(kind: str, count: int) -> None:
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
    main(sys.argv[1], int(sys.argv[2]))
