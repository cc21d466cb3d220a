"""Inspects an existing packed dataset, ours or MindSpeed-LLM's: what it holds, and what is wrong with it.

Nothing is written. The files are read once, block after block, so that memory does not grow with the dataset.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.markup import escape

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest
from openpangu_sft.artifacts.checks import absolute, wrong_files
from openpangu_sft.dataset.index_file import (
    FIELDS,
    PREFIX,
    VALIDATION,
    Index,
    field_path,
    index_blocks,
    read_index,
    read_values,
    row_blocks,
)
from openpangu_sft.dataset.index_rules import entry_findings, of_rows, rows_where, same_rows
from openpangu_sft.dataset.roles import ROLES, UNKNOWN, count_turns, read_roles
from openpangu_sft.dataset.row_rules import PackedRules
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import progress
from openpangu_sft.util.errors import UserError

BLOCK_TOKENS = 1 << 20
"""Tokens of each field that are in memory together, or one row if it is longer."""

CONSEQUENCES = {
    "unnumbered": " and no segment numbers: MindSpeed-LLM would cut attention at every message end (openPangu's eos "
    "ends every message), so an answer never sees its question",
    "no_target": ": the loss of such a row is 0/0 and stops the run",
}
"""Of breaches whose harm does not speak for itself."""


@dataclass
class Report:
    """What was found.

    Args:
        path: the dataset, as a user would name it.
        figures: by name, for the screen.
        findings: what is wrong.
    """

    path: str
    figures: dict[str, str] = field(default_factory=dict)
    findings: list[UserError] = field(default_factory=list)


def run_inspect(recipe: Recipe, dataset: Optional[Path] = None) -> Report:
    """Checks a dataset.

    Args:
        recipe: gives model.vocab_size, and data.seq_length for a dataset without a manifest.
        dataset: a directory, a path prefix or one of the six files; `paths.dataset` if there is none.

    Raises:
        UserError: there is no dataset, there are several, or the manifest is of something else.
    """
    place = find_dataset(absolute(dataset) if dataset else recipe.path("dataset"))
    manifest = place.manifest
    report = Report(str(place))
    report.figures["made by"] = "other software: there is no manifest"
    if manifest:
        report.figures["made by"] = f"openpangu-sft {escape(str(manifest.version))} ({manifest.kind})"
    _inspect(recipe, place, report)
    if place.validation:
        validation = Report(str(place.validation))
        _inspect(recipe, place.validation, validation)
        report.figures.update({f"validation: {name}": value for name, value in validation.figures.items()})
        report.findings += validation.findings
    if manifest:
        _check_files(place, manifest, report)
    return report


def _inspect(recipe: Recipe, place: Place, report: Report) -> None:
    """Checks six files against each other and against the manifest's counts."""
    if place.counts.get("packs") == 0:  # all samples of a small shard are for validation
        report.figures["rows"] = "0"
        return
    indexes, readable = _read_indexes(place, report)
    if "input_ids" in indexes:
        _check_lengths(indexes["input_ids"], place, recipe, report)
    rules = PackedRules(recipe.model.vocab_size, trusted=place.manifest is not None)
    if readable:
        _check_rows(indexes, rules, place, report)
        if place.manifest:
            _check_counts(place, rules, report)


def _read_indexes(place: Place, report: Report) -> tuple[dict[str, Index], bool]:
    """The indexes that are sound enough to look at, and whether the rows of all fields can be read."""
    indexes: dict[str, Index] = {}
    readable = True
    for name in FIELDS:
        missing = [path for suffix in ("bin", "idx") if not (path := place.file(name, suffix)).is_file()]
        if missing:
            report.findings += [UserError("is missing", where=path, remedy=place.remedy) for path in missing]
            readable = False
            continue
        try:
            indexes[name] = read_index(place.file(name, "idx"), place.remedy)
        except UserError as finding:
            report.findings.append(finding)
            readable = False
            continue
        findings, sound = entry_findings(indexes[name], place.remedy)
        report.findings += findings
        readable = readable and sound
    if "labels" in indexes and indexes["labels"].dtype.kind == "u":
        what = f"has values of type {indexes['labels'].dtype.name}, which cannot hold -100"
        report.findings.append(UserError(what, where=indexes["labels"].path, remedy=place.remedy))
        readable = False
    if indexes:
        first, *others = indexes.values()
        report.figures["rows"] = f"{first.rows:,}"
        unlike = [finding for other in others for finding in same_rows(first, other, place.remedy)]
        report.findings += unlike
        readable = readable and not unlike
    return indexes, readable


def _check_lengths(index: Index, place: Place, recipe: Recipe, report: Report) -> None:
    """All rows have one length, the manifest's or else the recipe's."""
    if not index.rows:
        return
    if place.manifest:
        expected, says = place.manifest.settings.get("data.seq_length"), "the manifest"
    else:
        expected, says = recipe.data.seq_length, "the recipe"
    blocks = [index.lengths[begin:end] for begin, end in index_blocks(index.rows)]
    shortest, longest = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
    if shortest == longest:
        report.figures["seq_length"] = f"{shortest:,}"
        if shortest != expected:
            remedy = place.remedy if place.manifest else f"set data.seq_length={shortest}, or preprocess again"
            what = f"rows have {shortest} tokens, {says} has data.seq_length = {expected}"
            report.findings.append(UserError(what, where=index.path, remedy=remedy))
        return
    report.figures["seq_length"] = f"{shortest:,} to {longest:,}"
    for what in rows_where(
        lambda begin, end: np.not_equal(index.lengths[begin:end], expected if isinstance(expected, int) else -1),
        index.rows,
        index.rows,
        lambda row: (
            f"{index.lengths[row]} tokens, {says} has data.seq_length = {expected}; every row must have as many"
        ),
    ):
        report.findings.append(UserError(what, where=index.path, remedy=place.remedy))


def _check_rows(indexes: dict[str, Index], rules: PackedRules, place: Place, report: Report) -> None:
    """Reads all rows, and tells what rules they break."""
    lengths = indexes["input_ids"].lengths
    with progress(f"checking {escape(place.directory.name)}", len(lengths)) as advance:
        for begin, end in row_blocks(indexes["input_ids"], BLOCK_TOKENS):
            input_ids, mask, labels = (read_values(indexes[name], begin, end) for name in FIELDS)
            rules.add(begin, lengths[begin:end], input_ids, mask, labels)
            advance(end - begin, "")
    rules.finish()
    report.figures["turns"] = _turns(place, indexes["input_ids"], report)
    values = indexes["input_ids"].values()
    unknown = "unknown: attention_mask holds no segment numbers"
    report.figures.update(
        {
            "tokens": f"{rules.tokens:,}",
            "packs full": f"{rules.tokens / max(values, 1):.1%}",
            "share trained": f"{rules.trained / max(rules.tokens, 1):.1%}",
            "segments": f"{rules.segments:,}" if rules.numbered else unknown,
            "longest segment": f"{rules.longest:,}" if rules.numbered else unknown,
        }
    )
    remedies = {
        "vocabulary": f"check model.vocab_size and the tokenizer, or {place.remedy}",
        "unnumbered": "preprocess again with make preprocess",
    }
    for rule, breach in rules.breaches.items():
        if breach.rows:
            what = f"{of_rows(breach.rows, len(lengths))}, {breach.first}{CONSEQUENCES.get(rule, '')}"
            where = place.file(breach.field, "bin")
            report.findings.append(UserError(what, where=where, remedy=remedies.get(rule, place.remedy)))


def _turns(place: Place, index: Index, report: Report) -> str:
    """Turns by role, as the roles beside the six files have them."""
    try:
        roles = read_roles(place.directory, place.prefix, 1, index.values())
    except UserError as finding:
        report.findings.append(finding)
        return "unknown: see the finding"
    if roles is None:
        return UNKNOWN
    blocks = [roles[0, begin : begin + BLOCK_TOKENS] for begin in range(0, roles.size, BLOCK_TOKENS)]
    counts = np.sum([count_turns(block) for block in blocks], axis=0)
    return ", ".join(f"{count:,} {role}" for role, count in zip(ROLES, counts))


def _check_files(place: Place, manifest: Manifest, report: Report) -> None:
    """Every file is the one that the manifest describes."""
    places = [place, place.validation] if place.validation else [place]
    own = {each.file(name, suffix).name for each in places for name in FIELDS for suffix in ("bin", "idx")}
    for name in sorted(own - set(manifest.files)):
        what = f"does not list {name}"
        report.findings.append(UserError(what, where=place.directory / MANIFEST, remedy=place.remedy))
    report.findings += wrong_files(place.directory, manifest, place.remedy, own)


def _check_counts(place: Place, rules: PackedRules, report: Report) -> None:
    found = {"packs": rules.rows, "tokens": rules.tokens, "trained_tokens": rules.trained, "packed": rules.segments}
    names = {"packs": "rows", "tokens": "tokens", "trained_tokens": "trained tokens", "packed": "segments"}
    for key, count in found.items():
        if place.counts.get(key) != count:
            what = f"says {key} = {place.counts.get(key)}, found {count} {names[key]}"
            report.findings.append(UserError(what, where=place.directory / MANIFEST, remedy=place.remedy))


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
        manifest: of the artifact that it is; None for a dataset that other software wrote.
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
    def validation(self) -> Optional[Place]:
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
