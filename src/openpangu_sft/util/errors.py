"""UserError: what is wrong, where, and the remedy; and what other errors become for the user."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST = 1000  # characters of a message that are shown: a name from a damaged file may have any length
TEXT = "\n\t\xa0\u3000\u200c\u200d"  # what running text has, no terminal acts on, and `str.isprintable` denies


class UserError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with code 1.

    Args:
        what: the problem, with the offending value.
        where: file, file:line, recipe key or tensor name; printed first.
        remedy: an imperative; printed last.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes: by default exceptions are pickled with positional arguments only."""
        return partial(UserError, where=self.where, remedy=self.remedy), (self.what,)

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where is not None else ""
        suffix = f" -> {self.remedy}" if self.remedy else ""
        what = self.what if len(self.what) <= LONGEST else f"{self.what[:LONGEST]}…"
        line = " ".join(filter(None, f"{prefix}{what}{suffix}".splitlines()))
        return printable(line)


class SizesUnknown(UserError):
    """The recipe takes sizes of the model from a checkpoint that does not provide them (yet)."""


def printable(text: str, keep: str = "") -> str:
    """A text from a file with control characters escaped, so that no terminal or browser acts on them.

    Line breaks are escaped too, unless they are among those to `keep`, as in `TEXT`.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() or mark in keep else repr(mark)[1:-1] for mark in text)


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark; raises `UserError` with the line that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # `object` is without the byte order mark, like `start`
        what = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
        raise UserError(what, where=f"{path}:{line}", remedy="save the file as UTF-8") from None


def first_complaint(error: ValidationError) -> str:
    """The first error of a validation, after its key."""
    detail = error.errors(include_url=False)[0]
    key = ".".join(map(str, detail["loc"]))
    return f"{key}: {detail['msg']}" if key else detail["msg"]


class Interrupted(Exception):
    """A signal stopped the stage after it had saved its state."""

    def __init__(self, signal_number: int, state: str) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {state}")


_NO_ROOM = ("no room left on the disk", "free some space, then run the stage again")
_NO_PERMISSION = ("no permission", "check the owner and mode of this path")
_EXPLAINED = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: ("File too large for this disk or its limit (ulimit -f)", "raise the limit or use another disk"),
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: ("this file system is read-only", "choose another path in the recipe, or mount it writable"),
    errno.ENOENT: ("no such file or directory", "check the path in the recipe"),
    errno.ENOTDIR: ("a part of this path is not a directory", "check the path in the recipe"),
    errno.EEXIST: ("is in the way", "remove it or choose another path in the recipe"),
}


def explain_os_error(error: OSError) -> UserError:
    """Turns an error of the operating system into a `UserError` with a remedy."""
    what, remedy = _EXPLAINED.get(error.errno or 0, (error.strerror or str(error), ""))
    return UserError(what, where=error.filename, remedy=remedy)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Adds a path to errors of the operating system that have none: those of writes to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
