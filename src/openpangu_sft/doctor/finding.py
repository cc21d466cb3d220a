"""The result of a check: its state, what was found and expected, and the remedy."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

from openpangu_sft.util.errors import LONGEST, SizesUnknown, UserError, explain_os_error, printable


class State(str, enum.Enum):
    """Only FAILED makes the exit code 1."""

    OK = "ok"
    WARNING = "warning"  # training may run; this cannot be decided from here
    FAILED = "failed"
    SKIPPED = "skipped"  # not applicable, or blocked by a failed check


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    state: State
    found: str  # what is there, several lines where there are several things; or why it was skipped
    remedy: str = ""  # of a warning or failure: what to do, as an imperative
    expected: str = ""  # what the recipe needs, unless `found` says it
    check: str = ""  # its name, set by `guarded`


ok, warning, failed, skipped = (partial(Finding, state) for state in State)


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Runs a check; an exception becomes its finding, so that no check stops the others."""
    try:
        found = check()
    except SizesUnknown as error:
        found = skipped(f"not known: {error.what} in {error.where}")
    except (UserError, OSError) as error:
        refusal, otherwise = (error, "") if isinstance(error, UserError) else (explain_os_error(error), "see dmesg")
        where = f"{refusal.where}: " if refusal.where is not None else ""
        found = failed(f"{where}{refusal.what}", refusal.remedy or otherwise)
    except Exception as error:
        found = failed(f"this check ended with {type(error).__name__}: {error}", "report this bug")
    shown = "\n".join(printable(line) for line in found.found[:LONGEST].splitlines())  # text of files and programs
    return replace(found, check=name, found=shown)
