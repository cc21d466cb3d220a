"""What a check finds: its state, what is there, what was expected, and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Callable

from openpangu_sft.util.errors import LONGEST, SizesUnknown, UserError, explain_os_error, printable


class State(str, enum.Enum):
    """How a finding is to be taken; only FAILED makes the exit code 1."""

    OK = "ok"
    WARNING = "warning"
    """Training may run; whether it does cannot be said from here."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not needed by this recipe, or not to be known because of another line."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Args:
        state: how it is to be taken.
        found: what is there; more lines than one where there are several things.
        expected: what the recipe needs, where that is not said by `found`.
        remedy: what to do, as an imperative.
        check: its name; given by whoever runs the check.
    """

    state: State
    found: str
    expected: str = ""
    remedy: str = ""
    check: str = ""


def ok(found: str) -> Finding:
    return Finding(State.OK, found)


def warning(found: str, remedy: str, expected: str = "") -> Finding:
    return Finding(State.WARNING, found, expected, remedy)


def failed(found: str, remedy: str, expected: str = "") -> Finding:
    return Finding(State.FAILED, found, expected, remedy)


def skipped(why: str) -> Finding:
    return Finding(State.SKIPPED, why)


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Runs a check; whatever it raises is its finding, so that no check takes the others down with it."""
    try:
        found = check()
    except SizesUnknown as error:
        found = skipped(f"not known: {error.what} in {error.where}")
    except UserError as error:
        found = _refused(error)
    except OSError as error:
        found = _refused(explain_os_error(error), "see what the system's log says of it: dmesg")
    except Exception as error:
        found = failed(f"this check has ended with {type(error).__name__}: {error}", "report it: it should not")
    return replace(found, check=name, found=_shown(found.found))


def _refused(refusal: UserError, otherwise: str = "") -> Finding:
    where = f"{refusal.where}: " if refusal.where is not None else ""
    return failed(f"{where}{refusal.what}", refusal.remedy or otherwise)


def _shown(text: str) -> str:
    """Texts of files and programs, line by line, without what a terminal would act on."""
    return "\n".join(printable(line) for line in text[:LONGEST].splitlines())
