"""Finds the packed dataset that a path means: a directory, a path prefix or one of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest
from openpangu_sft.dataset.index_file import AGAIN, FIELDS, PREFIX, VALIDATION, Index, field_path, read_index
from openpangu_sft.util.errors import UserError

NAMES = re.compile(rf"(?P<prefix>.+)_packed_({'|'.join(FIELDS)})_document(\.(bin|idx))?", re.DOTALL)


@dataclass(frozen=True)
class PackedFiles:
    """The files of a packed dataset: directory/{prefix}_packed_…."""

    directory: Path
    prefix: str
    manifest: Optional[Manifest] = None  # of the artifact that it is; None for a dataset that other software wrote

    def __str__(self) -> str:
        return str(self.directory if self.manifest and self.prefix == PREFIX else self.directory / self.prefix)

    @property
    def counts(self) -> dict[str, Any]:
        """What the manifest counts of this dataset; empty without one."""
        counts = self.manifest.counts if self.manifest else {}
        return counts.get(VALIDATION, {}) if self.prefix == VALIDATION else counts

    @property
    def splits(self) -> list[PackedFiles]:
        """Itself, and the validation split beside it."""
        held_out = self.prefix == PREFIX and self.counts.get(VALIDATION, {}).get("packs")
        return [self, PackedFiles(self.directory, VALIDATION, self.manifest)] if held_out else [self]

    @property
    def remedy(self) -> str:
        """For damage in its files."""
        if not self.manifest:
            return "preprocess the samples again with make preprocess, or copy the files again"
        return "run make preprocess again" if self.manifest.kind == "shard" else AGAIN

    def file(self, name: str, suffix: str) -> Path:
        return field_path(self.directory, self.prefix, name, suffix)

    def index(self, name: str) -> Index:
        """The index of a field; raises `UserError` as `read_index`."""
        return read_index(self.file(name, "idx"), self.remedy)


def find_dataset(path: Path) -> PackedFiles:
    """Finds the one dataset that a path means; `UserError` for none, several, or a manifest of something else."""
    match = NAMES.fullmatch(path.name)
    directory, prefix = path.parent, match["prefix"] if match else path.name
    inside = [PREFIX] if (path / MANIFEST).is_file() else _prefixes(path)
    if len(inside) > 1:
        what = f"holds several datasets: {', '.join(inside)}"
        raise UserError(what, where=path, remedy=f"name one: {path / inside[0]}")
    if inside:
        directory, prefix = path, inside[0]
    elif prefix not in _prefixes(directory):
        what = "no packed dataset here" if path.exists() else "no such dataset"
        remedy = "give its directory, or its path up to _packed_input_ids_document.bin"
        raise UserError(what, where=path, remedy=remedy)
    if prefix not in (PREFIX, VALIDATION) or not (directory / MANIFEST).is_file():
        return PackedFiles(directory, prefix)
    manifest = parse_manifest(directory / MANIFEST, AGAIN)
    if manifest.kind not in ("dataset", "shard"):
        remedy = "give a directory that make merge or make preprocess has left"
        raise UserError(f"holds {manifest.kind}, expected dataset or shard", where=directory, remedy=remedy)
    return PackedFiles(directory, prefix, manifest)


def _prefixes(directory: Path) -> list[str]:
    matches = (NAMES.fullmatch(path.name) for path in directory.glob("*_packed_*_document.*"))
    return sorted({match["prefix"] for match in matches if match})
