"""Inspects a packed dataset, ours or MindSpeed-LLM's: what it holds, and what is wrong with it.

Nothing is written. The files are read once, block by block: memory grows by some bytes per row, not per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest
from openpangu_sft.artifacts.checks import absolute, wrong_files
from openpangu_sft.dataset.find import PackedFiles, find_dataset
from openpangu_sft.dataset.index_file import FIELDS, Index, read_index, read_values, row_blocks
from openpangu_sft.dataset.index_rules import entry_findings, of_rows, rows_where, unlike_rows
from openpangu_sft.dataset.roles import ROLES, UNKNOWN, count_turns, read_roles
from openpangu_sft.dataset.row_rules import PackedRules
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import progress
from openpangu_sft.util.errors import UserError, printable

BLOCK_TOKENS = 1 << 20  # tokens of each field that are in memory together, or one row if it is longer

CONSEQUENCES = {
    "unnumbered": " and no segment numbers: MindSpeed-LLM would cut attention at every message end (openPangu's eos "
    "ends every message), so an answer never sees its question",
    "no_target": ": the loss of such a row is 0/0 and stops the run",
}
"""Of breaches whose harm is not obvious."""


@dataclass
class Report:
    """What was found."""

    path: str  # of the dataset, as a user would name it
    figures: dict[str, str] = field(default_factory=dict)  # by name, for the screen
    findings: list[UserError] = field(default_factory=list)  # what is wrong

    @property
    def verdict(self) -> str:
        """PASS, or FAIL and how much is wrong."""
        count = len(self.findings)
        return f"FAIL: {count} finding{'s' * (count > 1)}" if count else "PASS"


def run_inspect(recipe: Recipe, dataset: Optional[Path] = None) -> Report:
    """Checks a dataset: a directory, a path prefix or one of the six files; by default `paths.dataset`.

    The recipe gives model.vocab_size, and data.seq_length for a dataset without a manifest. Raises `UserError` where
    there is no dataset, there are several, or the manifest is of something else.
    """
    files = find_dataset(absolute(dataset) if dataset else recipe.path("dataset"))
    made_by = "other software: there is no manifest"
    if files.manifest:
        made_by = f"openpangu-sft {printable(str(files.manifest.version))} ({files.manifest.kind})"
    report = Report(str(files), {"made by": made_by})
    report.findings += _Split(recipe, files, report.figures).inspect()
    if files.validation:
        figures: dict[str, str] = {}
        report.findings += _Split(recipe, files.validation, figures).inspect()
        report.figures.update({f"validation: {name}": value for name, value in figures.items()})
    if files.manifest:
        report.findings += _wrong_files(files, files.manifest)
    return report


def _wrong_files(files: PackedFiles, manifest: Manifest) -> list[UserError]:
    """Every file is the one that the manifest describes."""
    splits = [files, files.validation] if files.validation else [files]
    own = {each.file(name, suffix).name for each in splits for name in FIELDS for suffix in ("bin", "idx")}
    unlisted = [
        UserError(f"does not list {name}", where=files.directory / MANIFEST, remedy=files.remedy)
        for name in sorted(own - set(manifest.files))
    ]
    return unlisted + wrong_files(files.directory, manifest, files.remedy, own)


class _Split:
    """Checks six files against each other and against the manifest's counts: training data, or the validation split."""

    def __init__(self, recipe: Recipe, files: PackedFiles, figures: dict[str, str]) -> None:
        self._recipe, self._files, self._figures = recipe, files, figures
        self._findings: list[UserError] = []

    def _add(self, what: str, where: Path, remedy: str = "") -> None:
        self._findings.append(UserError(what, where=where, remedy=remedy or self._files.remedy))

    def inspect(self) -> list[UserError]:
        """Returns what is wrong."""
        if self._files.counts.get("packs") == 0:  # all samples of a small shard are for validation
            self._figures["rows"] = "0"
            return []
        indexes = {name: index for name in FIELDS if (index := self._index(name))}
        readable = len(indexes) == len(FIELDS)
        for index in indexes.values():
            findings, sound = entry_findings(index, self._files.remedy)
            self._findings += findings
            readable &= sound
        if "labels" in indexes and indexes["labels"].dtype.kind == "u":
            what = f"has values of type {indexes['labels'].dtype.name}, which cannot hold -100"
            self._add(what, indexes["labels"].path)
            readable = False
        if indexes:
            first, *others = indexes.values()
            self._figures["rows"] = f"{first.rows:,}"
            for other in others:
                if unlike := unlike_rows(first, other):
                    self._add(unlike, other.path)
                    readable = False
        if "input_ids" in indexes and indexes["input_ids"].rows:
            self._check_lengths(indexes["input_ids"])
        if readable:
            self._check_rows(indexes)
        return self._findings

    def _index(self, name: str) -> Optional[Index]:
        """The index of a field, if its files are there and it can be read at all."""
        missing = [path for suffix in ("bin", "idx") if not (path := self._files.file(name, suffix)).is_file()]
        for path in missing:
            self._add("is missing", path)
        try:
            return None if missing else read_index(self._files.file(name, "idx"), self._files.remedy)
        except UserError as finding:
            self._findings.append(finding)
            return None

    def _check_lengths(self, index: Index) -> None:
        """All rows have one length, the manifest's or else the recipe's."""
        manifest = self._files.manifest
        expected = manifest.settings.get("data.seq_length") if manifest else self._recipe.data.seq_length
        says = "the manifest" if manifest else "the recipe"
        shortest, longest = int(index.lengths.min()), int(index.lengths.max())
        if shortest == longest:
            self._figures["seq_length"] = f"{shortest:,}"
            if shortest != expected:
                remedy = "" if manifest else f"set data.seq_length={shortest}, or preprocess again"
                self._add(f"rows have {shortest} tokens, {says} has data.seq_length = {expected}", index.path, remedy)
            return
        self._figures["seq_length"] = f"{shortest:,} to {longest:,}"
        what = f"tokens, {says} has data.seq_length = {expected}; all rows must have the same length"
        wrong = index.lengths != (expected if isinstance(expected, int) else -1)
        if found := rows_where(wrong, index.rows, lambda row: f"{index.lengths[row]} {what}"):
            self._add(found, index.path)

    def _check_rows(self, indexes: dict[str, Index]) -> None:
        """Reads all rows, and tells which rules they break."""
        index, files = indexes["input_ids"], self._files
        rules = PackedRules(self._recipe.model.vocab_size, trusted=files.manifest is not None)
        with progress(f"checking {files.directory.name} (packs)", index.rows) as advance:
            for begin, end in row_blocks(index, BLOCK_TOKENS):
                input_ids, mask, labels = (read_values(indexes[name], begin, end) for name in FIELDS)
                rules.add(begin, index.lengths[begin:end], input_ids, mask, labels)
                advance(end - begin, "")
        rules.finish()
        unknown = "unknown: attention_mask holds no segment numbers"
        self._figures |= {
            "turns": self._turns(index.values()),
            "tokens": f"{rules.tokens:,}",
            "packing efficiency": f"{rules.tokens / max(index.values(), 1):.1%}",
            "trained tokens": f"{rules.trained / max(rules.tokens, 1):.1%}",
            "segments": f"{rules.segments:,}" if rules.numbered else unknown,
            "longest segment": f"{rules.longest:,}" if rules.numbered else unknown,
        }
        remedies = {
            "vocabulary": f"check model.vocab_size and the tokenizer, or {files.remedy}",
            "unnumbered": "preprocess again with make preprocess",
        }
        for rule, breach in rules.breaches.items():
            if breach.rows:
                what = f"{of_rows(breach.rows, index.rows)}, {breach.first}{CONSEQUENCES.get(rule, '')}"
                self._add(what, files.file(breach.field, "bin"), remedies.get(rule, ""))
        if files.manifest:
            self._check_counts(rules)

    def _turns(self, tokens: int) -> str:
        """Turns by role, as the roles beside the six files have them."""
        try:
            roles = read_roles(self._files.directory, self._files.prefix, 1, tokens)
        except UserError as finding:
            self._findings.append(finding)
            return "unknown: see the finding"
        if roles is None:
            return UNKNOWN
        blocks = [roles[0, begin : begin + BLOCK_TOKENS] for begin in range(0, tokens, BLOCK_TOKENS)]
        counts = np.sum([count_turns(block) for block in blocks], axis=0)
        return ", ".join(f"{count:,} {role}" for role, count in zip(ROLES, counts))

    def _check_counts(self, rules: PackedRules) -> None:
        for key, count, noun in (
            ("packs", rules.rows, "rows"),
            ("tokens", rules.tokens, "tokens"),
            ("trained_tokens", rules.trained, "trained tokens"),
            ("packed", rules.segments, "segments"),
        ):
            if self._files.counts.get(key) != count:
                what = f"says {key} = {self._files.counts.get(key)}, found {count} {noun}"
                self._add(what, self._files.directory / MANIFEST)
