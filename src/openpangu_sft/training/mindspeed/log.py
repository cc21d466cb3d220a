"""Parses the output of MindSpeed-LLM's training: iterations, saved checkpoints, errors. Pure."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from statistics import median
from typing import Any, Optional

from openpangu_sft.training.run.metrics import Row

_ITERATION = re.compile(r"iteration\s+([1-9]\d{0,11})/\s*\d+ \|")
_FIELDS = {
    "seconds": re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)"),
    "lr": re.compile(r"learning rate: (\S+)"),
    "loss": re.compile(r"lm loss: (\S+)"),
    "grad_norm": re.compile(r"grad norm: (\S+)"),
}
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|EL0004): (.+)")
_REPORT = re.compile(r"openpangu-sft reports (\{.*\})$")

SAVED = re.compile(r"successfully saved checkpoint at iteration\s+(\d+)")
NO_CHECKPOINT = re.compile(r"could not (find the metadata file|load the checkpoint)|will not load any checkpoints")
"""Nothing was loaded: upstream would train from random weights and exit with code 0."""

MEMORY_IS_FULL = re.compile("out of memory|^EL0004")
"""An error of torch, of torch_npu (“NPU out of memory. Tried to allocate …”), or of the NPU's driver."""

SPIKE_WINDOW = 20


def iteration_of(line: str, tokens: int) -> Optional[Row]:
    """The iteration of so many tokens that a line of upstream's training_log reports, or None.

    Format of megatron/training/training.py. The loss is NaN where every micro batch was skipped.
    """
    found = _ITERATION.search(line)
    if not found:
        return None
    values: dict[str, Any] = {name: _number(pattern.search(line)) for name, pattern in _FIELDS.items()}
    values["seconds"] /= 1000
    return Row(iteration=int(found[1]), tokens=tokens, **values)


def report_of(line: str) -> dict[str, Any]:
    """What a line of `report` in hooks/loss.py says: micro_batches, memory or validation; of another line nothing."""
    found = _REPORT.search(line.rstrip())
    with contextlib.suppress(ValueError):  # another process has printed into it
        return dict(json.loads(found[1])) if found else {}
    return {}


def error_of(line: str) -> Optional[str]:
    """The error in the last line of a Python traceback, or in a message of ours, or None."""
    if line.startswith("openpangu-sft: "):
        return line[len("openpangu-sft: ") :].strip()
    found = _ERROR.search(line.strip())
    if not found or found[1].rsplit(".", 1)[-1] in ("ChildFailedError", "SignalException"):
        return None
    return f"{found[1]}: {found[2]}"


def warning(row: Row, before: Sequence[Row]) -> Optional[str]:
    """A loss or norm that is not finite, or a loss above twice the median of the last ones and by more than 1."""
    values = {"loss": row.loss, "gradient norm": row.grad_norm}
    if row.validation is not None:
        values["validation loss"] = row.validation
    if not all(map(math.isfinite, values.values())):
        return f"iteration {row.iteration}: {', '.join(f'{name} {value}' for name, value in values.items())}"
    losses = [earlier.loss for earlier in before if math.isfinite(earlier.loss)][-SPIKE_WINDOW:]
    usual = median(losses) if len(losses) >= SPIKE_WINDOW // 2 else math.inf
    if row.loss > max(2 * usual, usual + 1):
        return f"iteration {row.iteration}: loss {row.loss:.3f} after {usual:.3f} (median of {len(losses)})"
    return None


def _number(found: Optional[re.Match[str]]) -> float:
    try:
        return float(found[1]) if found else math.nan
    except ValueError:
        return math.nan
