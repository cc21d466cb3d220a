"""Parses the output of MindSpeed-LLM's training: iterations, saved checkpoints, errors. Pure."""

from __future__ import annotations

import math
import re
from collections import deque
from statistics import median
from typing import NamedTuple, Optional

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
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


class Iteration(NamedTuple):
    """One line of upstream's training_log (megatron/training/training.py)."""

    number: int
    loss: float
    """Per trained token; NaN where every micro batch was skipped."""
    lr: float
    grad_norm: float
    seconds: float


def iteration_of(line: str) -> Optional[Iteration]:
    """The iteration that a line reports, or None."""
    found = _ITERATION.search(line)
    if not found:
        return None
    values = {name: _number(pattern.search(line)) for name, pattern in _FIELDS.items()}
    seconds = values["seconds"] / 1000
    return Iteration(int(found[1]), values["loss"], values["lr"], values["grad_norm"], seconds)


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

    def warning(self, iteration: Iteration) -> Optional[str]:
        """A loss or norm that is not finite, or a loss above twice the median of the last ones and by more than 1."""
        loss, before = iteration.loss, list(self._recent)
        if not math.isfinite(loss) or not math.isfinite(iteration.grad_norm):
            return f"iteration {iteration.number}: loss {loss}, gradient norm {iteration.grad_norm}"
        self._recent.append(loss)
        if len(before) < SPIKE_WINDOW // 2:
            return None
        usual = median(before)
        if loss > 2 * usual and loss > usual + 1:
            return f"iteration {iteration.number}: loss {loss:.3f} after {usual:.3f} (median of {len(before)})"
        return None


def _number(found: Optional[re.Match[str]]) -> float:
    try:
        return float(found[1]) if found else math.nan
    except ValueError:
        return math.nan
