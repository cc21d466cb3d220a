"""Files that change while a stage reads them, so that its result may mix old and new content."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Optional

from openpangu_sft.util.errors import UserError

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and mtime in ns of a file: another one once it has been written to or replaced."""


def stamps_of(files: Iterable[Path]) -> dict[Path, Optional[Stamp]]:
    """The stamps of files; None where there is none."""
    return {file: _stamp(file) for file in files}


@contextlib.contextmanager
def unchanged(before: Mapping[Path, Optional[Stamp]]) -> Iterator[None]:
    """Requires at the end of the block that files have their earlier stamps.

    Raises `UserError` for a file that changed; in place of an error of the block too, as this is its cause.
    """
    try:
        yield
    finally:
        for file, stamp in before.items():
            if _stamp(file) != stamp:
                raise UserError("changed while it was read", where=file, remedy="run the stage again when it is whole")


def _stamp(file: Path) -> Optional[Stamp]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
