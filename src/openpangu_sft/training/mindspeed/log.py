"""Parses the output of MindSpeed-LLM's training: iterations, saved checkpoints, errors. Pure."""

from __future__ import annotations

import math
import re
from collections import deque
from statistics import median
from typing import Optional

from openpangu_sft.training.run.metrics import Row

_ITERATION = re.compile(r"iteration\s+([1-9]\d{0,11})/\s*\d+ \|")
_FIELDS = {
    "seconds": re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)"),
    "lr": re.compile(r"learning rate: (\S+)"),
    "loss": re.compile(r"lm loss: (\S+)"),
    "grad_norm": re.compile(r"grad norm: (\S+)"),
}
_SAVED = re.compile(r"successfully saved checkpoint at iteration\s+(\d+)")
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)): (.+)")
_NO_CHECKPOINT = re.compile(r"could not (find the metadata file|load the checkpoint)|will not load any checkpoints")

SPIKE_WINDOW = 20


def iteration_of(line: str, tokens: int) -> Optional[Row]:
    """The iteration of so many tokens that a line of upstream's training_log reports, or None.

    Format of megatron/training/training.py. The loss is NaN where every micro batch was skipped.
    """
    found = _ITERATION.search(line)
    if not found:
        return None
    values = {name: _number(pattern.search(line)) for name, pattern in _FIELDS.items()}
    values["seconds"] /= 1000
    return Row(iteration=int(found[1]), tokens=tokens, **values)


def saved_iteration(line: str) -> Optional[int]:
    """The iteration whose checkpoint a line reports as saved, or None."""
    found = _SAVED.search(line)
    return int(found[1]) if found else None


def starts_without_checkpoint(line: str) -> bool:
    """Whether upstream reports that it loaded nothing: it would train from random weights and exit with code 0."""
    return bool(_NO_CHECKPOINT.search(line))


def error_of(line: str) -> Optional[str]:
    """The error in the last line of a Python traceback, or in a message of ours, or None."""
    if line.startswith("openpangu-sft: "):
        return line[len("openpangu-sft: ") :].strip()
    found = _ERROR.search(line.strip())
    if not found or found[1].rsplit(".", 1)[-1] in ("ChildFailedError", "SignalException"):
        return None
    return f"{found[1]}: {found[2]}"


class Losses:
    """Warns of unusual iterations."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def warning(self, row: Row) -> Optional[str]:
        """A loss or norm that is not finite, or a loss above twice the median of the last ones and by more than 1."""
        loss, before = row.loss, list(self._recent)
        if not math.isfinite(loss) or not math.isfinite(row.grad_norm):
            return f"iteration {row.iteration}: loss {loss}, gradient norm {row.grad_norm}"
        self._recent.append(loss)
        if len(before) < SPIKE_WINDOW // 2:
            return None
        usual = median(before)
        if loss > 2 * usual and loss > usual + 1:
            return f"iteration {row.iteration}: loss {loss:.3f} after {usual:.3f} (median of {len(before)})"
        return None


def _number(found: Optional[re.Match[str]]) -> float:
    try:
        return float(found[1]) if found else math.nan
    except ValueError:
        return math.nan
