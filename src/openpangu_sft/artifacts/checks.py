"""Whether a place can take a result, asked before any work: not on top of something else, and with room enough."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Optional

from rich.markup import escape

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, sha256_of
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError


def require_apart(one_key: str, one: Path, other_key: str, other: Path) -> None:
    """Refuses two places of which one would be lost, or read, when the other is written. Follows symbolic links.

    Raises:
        UserError: they are the same, or one lies in the other.
    """
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    if first == second or first in second.parents or second in first.parents:
        raise UserError(
            f"{one_key} and {other_key} are the same or lie in each other: {one}, {other}",
            remedy=f"give {other_key} a directory of its own",
        )


def require_room(target: Path, size: int) -> None:
    """Refuses to begin what would fill the disk. An earlier result stays until the new one is there, so both need room.

    Args:
        target: what is to be written; it need not exist.
        size: in bytes.

    Raises:
        UserError: names what is needed and what is free.
    """
    place = target.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(
            f"needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on this disk",
            where=target,
            remedy="free some space, or choose another path in the recipe",
        )


def absolute(path: Path) -> Path:
    """A path that the user has given, with `~` replaced.

    Raises:
        UserError: it is the home directory of nobody.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise UserError("begins with the home directory of nobody", where=path, remedy="write it out") from None


def page_place(given: Optional[Path], default: Path, inside: Optional[Path] = None) -> Path:
    """Where a page goes. Whatever is there already is replaced, so it must be a page's place.

    Args:
        given: what the user has asked for; its directory must be there.
        default: otherwise.
        inside: a run, which no stage replaces as a whole.

    Returns:
        The absolute path.

    Raises:
        UserError: not the name of a page, its directory is not there, or a stage would remove it.
    """
    html, remedy = absolute(given or default), "name another file with HTML=…"
    if html.suffix.lower() not in (".html", ".htm"):
        raise UserError("does not end in .html", where=html, remedy=remedy)
    if html.is_dir():
        raise UserError("is a directory", where=html, remedy=remedy)
    for parent in html.parents:
        if (parent / MANIFEST).is_file() and parent != inside:
            what = f"lies in {parent}, which a stage replaces as a whole"
            raise UserError(what, where=html, remedy=remedy)
    if given and not html.parent.is_dir():
        raise UserError("there is no such directory for the page", where=html.parent, remedy=f"make it, or {remedy}")
    return html


def wrong_files(directory: Path, manifest: Manifest, remedy: str, known: Collection[str] = ()) -> list[UserError]:
    """What is missing, of another size, or of another content than when it was made.

    Args:
        directory: the artifact.
        manifest: its own.
        remedy: what to do about a finding.
        known: names whose absence has been reported already.
    """
    findings = []
    present = {name: directory / name for name in manifest.files if (directory / name).is_file()}
    for name in sorted(set(manifest.files) - set(present) - set(known)):
        findings.append(UserError("is missing", where=directory / name, remedy=remedy))
    total = sum(path.stat().st_size for path in present.values())
    with byte_progress(f"sha256 of {escape(directory.name)}", total) as advance:
        for name, path in present.items():
            size, entry = path.stat().st_size, manifest.files[name]
            if size != entry["bytes"]:
                what = f"{size} bytes, the manifest has {entry['bytes']}"
                findings.append(UserError(what, where=path, remedy=remedy))
            elif sha256_of(path, advance) != entry["sha256"]:
                what = "its content is not what the manifest describes (sha256)"
                findings.append(UserError(what, where=path, remedy=remedy))
    return findings
