"""The one way a stage says no: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import signal


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 1.

    Args:
        what: the finding, with the offending value.
        where: file, file:line, recipe key or tensor name; printed first when given.
        remedy: what to do, as an imperative; printed last when given.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where is not None else ""
        suffix = f" -> {self.remedy}" if self.remedy else ""
        return f"{prefix}{self.what}{suffix}".replace("\n", " ")


class Interrupted(Exception):
    """A signal came, and the stage has ended in good order: what it did is saved."""

    def __init__(self, signal_number: int, state: str) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {state}")


def explain_os_error(error: OSError) -> UserError:
    """Turns an operating-system error into a `UserError` with the remedy a user can act on."""
    where = error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("no room left on the disk", where=where, remedy="free some space, then run the stage again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError("no permission", where=where, remedy="check the owner and mode of this path")
    if error.errno == errno.ENOENT:
        return UserError("no such file or directory", where=where, remedy="check the path in the recipe")
    return UserError(error.strerror or str(error), where=where)
