"""Checks on output paths (overlap, free space), inputs that change while they are read, sums of an artifact's files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, sha256_of
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and mtime in ns of a file: another one once it has been written to or replaced."""


def require_apart(one_key: str, one: Path, other_key: str, other: Path) -> None:
    """Raises `UserError` for paths that are the same or of which one lies in the other; follows symbolic links."""
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    if first == second or first in second.parents or second in first.parents:
        what = f"{one_key} and {other_key} are the same or lie in each other: {one}, {other}"
        raise UserError(what, remedy=f"give {other_key} a directory of its own")


def require_room(target: Path, size: int) -> None:
    """Raises `UserError` where the disk of `target`, which need not exist, has less than `size` bytes free.

    An earlier result is kept until the new one is complete, so both need room.
    """
    disk = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(disk).free
    if free < size:
        what = f"needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on this disk"
        raise UserError(what, where=target, remedy="free some space, or choose another path in the recipe")


def absolute(path: Path) -> Path:
    """A path of the user's, absolute, with `~` expanded; raises `UserError` for `~name` of an unknown user."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise UserError("begins with an unknown home directory", where=path, remedy="write it out") from None


def page_place(given: Optional[Path], default: Path, inside: Optional[Path] = None) -> Path:
    """The absolute path of a page to write. A file there is replaced, so only .html is accepted.

    Raises `UserError` for another name, a page `given` by the user whose directory does not exist, and one in an
    artifact, unless that is `inside`: a run, which no stage replaces.
    """
    html, remedy = absolute(given or default), "name another file with HTML=…"
    if html.suffix.lower() not in (".html", ".htm"):
        raise UserError("does not end in .html", where=html, remedy=remedy)
    if html.is_dir():
        raise UserError("is a directory", where=html, remedy=remedy)
    for parent in html.parents:
        if (parent / MANIFEST).is_file() and parent != inside:
            raise UserError(f"lies in {parent}, which a stage replaces as a whole", where=html, remedy=remedy)
    if given and not html.parent.is_dir():
        raise UserError("there is no such directory for the page", where=html.parent, remedy=f"make it, or {remedy}")
    return html


def wrong_files(directory: Path, manifest: Manifest, remedy: str, known: Collection[str] = ()) -> list[UserError]:
    """Findings on files of an artifact that are missing or differ from its manifest in size or checksum.

    The absence of `known` files, which are named as in the manifest, has been reported already.
    """
    present = {name: directory / name for name in manifest.files if (directory / name).is_file()}
    wrong = [(directory / name, "is missing") for name in sorted({*manifest.files} - {*present} - {*known})]
    total = sum(path.stat().st_size for path in present.values())
    with byte_progress(f"sha256 of {directory.name}", total) as advance:
        for name, path in present.items():
            size, entry = path.stat().st_size, manifest.files[name]
            if size != entry["bytes"]:
                wrong.append((path, f"{size} bytes, the manifest has {entry['bytes']}"))
            elif sha256_of(path, advance) != entry["sha256"]:
                wrong.append((path, "its content is not what the manifest describes (sha256)"))
    return [UserError(what, where=path, remedy=remedy) for path, what in wrong]


def stamps_of(files: Iterable[Path]) -> dict[Path, Optional[Stamp]]:
    """The stamps of files; None where there is none."""
    found: dict[Path, Optional[Stamp]] = dict.fromkeys(files)
    for file in found:
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            found[file] = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found


@contextlib.contextmanager
def unchanged(before: Mapping[Path, Optional[Stamp]]) -> Iterator[None]:
    """Requires at the end of the block that files have their earlier stamps.

    Raises `UserError` for a file that changed; in place of an error of the block too, as this is its cause.
    """
    try:
        yield
    finally:
        for file, stamp in stamps_of(before).items():
            if stamp != before[file]:
                raise UserError("changed while it was read", where=file, remedy="run the stage again when it is whole")
