"""Whether the files of an artefact are those that its manifest describes: every byte is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.markup import escape

from openpangu_sft.artefact import Manifest, sha256_of
from openpangu_sft.errors import UserError
from openpangu_sft.progress import byte_progress


def wrong_files(directory: Path, manifest: Manifest, remedy: str, known: Collection[str] = ()) -> list[UserError]:
    """What is missing, of another size, or of another content than when it was made.

    Args:
        directory: the artefact.
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
