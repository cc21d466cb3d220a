"""Finds a packed dataset by what a user calls it: a directory, a path prefix like Megatron's, or one of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from openpangu_sft.artefact import MANIFEST, Manifest, parse_manifest
from openpangu_sft.dataset.indexed import FIELDS, PREFIX, VALIDATION, field_path
from openpangu_sft.errors import UserError

NAMES = re.compile(rf"(?P<prefix>.+)_packed_({'|'.join(FIELDS)})_document(\.(bin|idx))?", re.DOTALL)

REMEDIES = {
    "shard": "run make preprocess again",
    "dataset": "run make preprocess and make merge again",
    "": "preprocess the samples again with make preprocess, or copy the files again",
}
"""What to do about a damaged dataset, by its kind; one without a manifest has none."""


@dataclass
class Place:
    """Where a dataset lies.

    Args:
        directory, prefix: its files are directory/{prefix}_packed_….
        manifest: of the artefact that it is; None for a dataset that other software wrote.
    """

    directory: Path
    prefix: str
    manifest: Optional[Manifest] = None

    def __str__(self) -> str:
        return str(self.directory if self.manifest and self.prefix == PREFIX else self.directory / self.prefix)

    @property
    def counts(self) -> dict[str, Any]:
        """What the manifest counts of this dataset; empty without one."""
        counts = self.manifest.counts if self.manifest else {}
        return counts.get(VALIDATION, {}) if self.prefix == VALIDATION else counts

    @property
    def held_out(self) -> Optional[Place]:
        """What was kept out of training and lies beside it."""
        if self.prefix == PREFIX and self.counts.get(VALIDATION, {}).get("packs"):
            return Place(self.directory, VALIDATION, self.manifest)
        return None

    @property
    def remedy(self) -> str:
        """What to do where its files are damaged."""
        return REMEDIES[self.manifest.kind if self.manifest else ""]

    def file(self, name: str, suffix: str) -> Path:
        """The path of one of its six files."""
        return field_path(self.directory, self.prefix, name, suffix)


def find_dataset(path: Path) -> Place:
    """Finds the one dataset that a path means.

    Raises:
        UserError: there is none, there are several, or the manifest is of something else.
    """
    inside = _prefixes(path) if path.is_dir() else []
    if path.is_dir() and ((path / MANIFEST).is_file() or inside == [PREFIX]):
        return Place(path, PREFIX, _manifest(path))
    if len(inside) > 1:
        raise UserError(
            f"holds several datasets: {', '.join(inside)}", where=path, remedy=f"name one: {path / inside[0]}"
        )
    if inside:
        return Place(path, inside[0])
    match = NAMES.fullmatch(path.name)
    prefix = match["prefix"] if match else path.name
    if prefix in _prefixes(path.parent):
        return Place(path.parent, prefix, _manifest(path.parent) if prefix in (PREFIX, VALIDATION) else None)
    what = "no packed dataset here" if path.exists() else "no such dataset"
    remedy = "give its directory, or its path up to _packed_input_ids_document.bin"
    raise UserError(what, where=path, remedy=remedy)


def _prefixes(directory: Path) -> list[str]:
    """The prefixes of all datasets in a directory of which any file is there."""
    if not directory.is_dir():
        return []
    matches = (NAMES.fullmatch(path.name) for path in directory.glob("*_packed_*_document.*"))
    return sorted({match["prefix"] for match in matches if match})


def _manifest(directory: Path) -> Optional[Manifest]:
    if not (directory / MANIFEST).is_file():
        return None
    manifest = parse_manifest(directory / MANIFEST, REMEDIES["dataset"])
    if manifest.kind not in ("dataset", "shard"):
        remedy = "give a directory that make merge or make preprocess has left"
        raise UserError(f"holds {manifest.kind}, expected dataset or shard", where=directory, remedy=remedy)
    return manifest
