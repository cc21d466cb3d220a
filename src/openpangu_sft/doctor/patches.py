"""Whether the upstream sources are there, of this clone's pins, patched, and as they were made. Changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from openpangu_sft.artefact import MANIFEST, parse_manifest, sha256_of
from openpangu_sft.doctor.finding import Finding, failed, ok, skipped
from openpangu_sft.doctor.subject import Subject
from openpangu_sft.mindspeed.sources import compiled_helper, require_pinned
from openpangu_sft.upstream import PATCHES, SOURCES


def sources(subject: Subject, target: Path = SOURCES, patches: Path = PATCHES) -> Finding:
    """MindSpeed-LLM and what it needs, for the mindspeed engine.

    Raises:
        UserError: they are not there, or of other pins.
    """
    if subject.recipe.train.engine != "mindspeed":
        return skipped(f"not needed: train.engine={subject.recipe.train.engine}")
    require_pinned(target, patches)
    manifest = parse_manifest(target / MANIFEST, "run make sources")
    changed = [name for name, entry in manifest.files.items() if not _same(target / name, entry["sha256"])]
    if changed:
        found = f"{changed[0]} in {target} is missing or has been changed" + _more(len(changed) - 1)
        return failed(found, f"remove {target}, and run make sources", "as make sources has left it")
    if not compiled_helper(target).is_file() and not shutil.which("g++", path=subject.machine.environment.get("PATH")):
        return failed("Megatron-LM's helper is not compiled, and g++ is not installed", "install g++")
    patched = ", ".join(f"{name} {len(chosen['patches'])}" for name, chosen in manifest.settings.items())
    return ok(f"{len(manifest.files):,} files as made; patches: {patched}")


def _same(file: Path, digest: str) -> bool:
    try:
        return sha256_of(file) == digest
    except OSError:
        return False


def _more(count: int) -> str:
    return f", and {count} more" if count else ""
