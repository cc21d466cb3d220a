"""Text files and renames that survive a crash of the machine."""

from __future__ import annotations

import os
from pathlib import Path

from openpangu_sft.util.errors import naming


def write_durably(path: Path, text: str) -> None:
    """Writes a text file atomically: after any interruption it has the new content or the earlier one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
