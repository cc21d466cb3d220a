"""Inspects a packed dataset, ours or MindSpeed-LLM's: what it holds, and what is wrong with it.

Nothing is written. The files are read once, block by block: memory grows by some bytes per row, not per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.artifacts.checks import absolute, wrong_files
from openpangu_sft.dataset.find import PackedFiles, find_dataset
from openpangu_sft.dataset.index_file import FIELDS, ROLES, UNKNOWN, Index, count_turns, read_roles, read_values
from openpangu_sft.dataset.row_rules import FIELD_OF, PackedRules
from openpangu_sft.dataset.segments import blocks
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import progress
from openpangu_sft.util.errors import UserError, printable

CONSEQUENCES = {
    "unnumbered": " and no segment numbers: MindSpeed-LLM would cut attention at every message end (openPangu's eos "
    "ends every message), so an answer never sees its question",
    "no_target": ": the loss of such a row is 0/0 and stops the run",
}
"""Of breaches whose harm is not obvious."""


@dataclass
class Report:
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
    for split in files.splits:
        checked = _Split(recipe, split)
        report.findings += checked.inspect()
        label = "validation: " if split is not files else ""
        report.figures.update({f"{label}{name}": value for name, value in checked.figures.items()})
    if files.manifest:
        own = {each.file(name, suffix).name for each in files.splits for name in FIELDS for suffix in ("bin", "idx")}
        for name in sorted(own - set(files.manifest.files)):
            where = files.directory / MANIFEST
            report.findings.append(UserError(f"does not list {name}", where=where, remedy=files.remedy))
        report.findings += wrong_files(files.directory, files.manifest, files.remedy, own)
    return report


class _Split:
    """Checks six files against each other and against the manifest's counts: training data, or the validation split."""

    def __init__(self, recipe: Recipe, files: PackedFiles) -> None:
        self._recipe, self._files = recipe, files
        self.figures: dict[str, str] = {}
        self._findings: list[UserError] = []

    def _add(self, what: str, where: Path, remedy: str = "") -> None:
        self._findings.append(UserError(what, where=where, remedy=remedy or self._files.remedy))

    def inspect(self) -> list[UserError]:
        if self._files.counts.get("packs") == 0:  # all samples of a small shard are for validation
            self.figures["rows"] = "0"
            return []
        indexes = {name: index for name in FIELDS if (index := self._index(name))}
        for index in indexes.values():
            self._check_index(index, first := next(iter(indexes.values())))
            self.figures["rows"] = f"{len(first.lengths):,}"
        sound = not self._findings
        index = indexes.get("input_ids")
        if index and index.lengths.size and self._check_lengths(index.lengths, index.path) and sound:
            self._check_rows(indexes)
        return self._findings

    def _index(self, name: str) -> Optional[Index]:
        """The index of a field, if its files are there and it can be read at all."""
        missing = [path for suffix in ("bin", "idx") if not (path := self._files.file(name, suffix)).is_file()]
        for path in missing:
            self._add("is missing", path)
        try:
            return None if missing else self._files.index(name)
        except UserError as finding:
            self._findings.append(finding)
            return None

    def _check_index(self, index: Index, first: Index) -> None:
        """Compares the entries of an index with each other, those of another field, and the size of the `.bin`."""
        lengths, offsets = index.lengths, index.offsets
        if not (rows := len(lengths)):
            self._add("holds no rows", index.path)
            return
        # Each row against the one before it, so that one wrong length is not counted with all rows after it.
        wrong = np.flatnonzero(offsets != np.append(0, offsets[:-1] + 4 * lengths[:-1].astype(np.int64)))
        if wrong.size:
            what = f"byte offset {offsets[wrong[0]]} does not follow from the row before it"
            self._add(f"{wrong.size:,} of {rows:,} rows, first row {wrong[0]}: {what}", index.path)
        if not np.array_equal(index.documents, np.arange(rows + 1)):
            self._add(f"document boundaries are not 0 to {rows}: every row is a document", index.path)
        size, expected = index.data.stat().st_size, 4 * int(lengths.sum(dtype=np.int64))
        if size != expected:
            state = "is cut short" if size < expected else "is longer than its index says"
            self._add(f"{state}: {size} bytes, expected {expected}", index.data)
        if not np.array_equal(lengths, first.lengths):
            what = f"{rows} rows of {_tokens(lengths)} tokens, but {first.path.name} has"
            self._add(f"{what} {len(first.lengths)} of {_tokens(first.lengths)}", index.path)

    def _check_lengths(self, lengths: npt.NDArray[np.int32], path: Path) -> bool:
        """Whether all rows have one length; a finding where it is not the manifest's or else the recipe's."""
        manifest, remedy = self._files.manifest, ""
        expected = manifest.settings.get("data.seq_length") if manifest else self._recipe.data.seq_length
        self.figures["seq_length"], alike = _tokens(lengths), len(np.unique(lengths)) == 1
        if not alike or lengths[0] != expected:
            if alike and not manifest:
                remedy = f"set data.seq_length={lengths[0]}, or preprocess again"
            says = "the manifest" if manifest else "the recipe"
            self._add(f"rows have {_tokens(lengths)} tokens, {says} has data.seq_length = {expected}", path, remedy)
        return alike and lengths[0] > 0

    def _check_rows(self, indexes: dict[str, Index]) -> None:
        files, (rows, seq_length) = self._files, (len(indexes["labels"].lengths), int(indexes["labels"].lengths[0]))
        rules = PackedRules(self._recipe.model.vocab_size, trusted=files.manifest is not None)
        with progress(f"checking {files.directory.name} (packs)", rows) as advance:
            for block in blocks(rows, seq_length):
                rules.add(block.start, *(read_values(indexes[name], block.start, block.stop) for name in FIELDS))
                advance(len(block), "")
        rules.finish()
        self.figures["turns"] = self._turns(rows, seq_length)
        figures = {
            "tokens": f"{rules.tokens:,}",
            "packing efficiency": f"{rules.tokens / (rows * seq_length):.1%}",
            "trained tokens": f"{rules.trained / max(rules.tokens, 1):.1%}",
            "segments": f"{rules.segments:,}",
        }
        if rules.breaches["unnumbered"].rows:
            figures = dict.fromkeys(figures, "unknown: attention_mask holds no segment numbers")
        self.figures |= figures
        remedies = {
            "vocabulary": f"check model.vocab_size and the tokenizer, or {files.remedy}",
            "unnumbered": "preprocess again with make preprocess",
        }
        for rule, breach in rules.breaches.items():
            if breach.rows:
                what = f"{breach.rows:,} of {rows:,} rows, {breach.first}{CONSEQUENCES.get(rule, '')}"
                self._add(what, files.file(FIELD_OF[rule], "bin"), remedies.get(rule, ""))
        if files.manifest:
            keys = ("packs", "tokens", "trained_tokens", "packed")
            nouns = ("rows", "tokens", "trained tokens", "segments")
            for key, noun, count in zip(keys, nouns, (rules.rows, rules.tokens, rules.trained, rules.segments)):
                if files.counts.get(key) != count:
                    what = f"says {key} = {files.counts.get(key)}, found {count} {noun}"
                    self._add(what, files.directory / MANIFEST)

    def _turns(self, rows: int, seq_length: int) -> str:
        try:
            roles = read_roles(self._files.directory, self._files.prefix, rows, seq_length)
        except UserError as finding:
            self._findings.append(finding)
            return "unknown: see the finding"
        if roles is None:
            return UNKNOWN
        counts = np.sum([count_turns(roles[block.start : block.stop]) for block in blocks(rows, seq_length)], axis=0)
        return ", ".join(f"{count:,} {role}" for role, count in zip(ROLES, counts))


def _tokens(lengths: npt.NDArray[np.int32]) -> str:
    """How many tokens rows have: all of them, or the shortest to the longest; empty where there are none."""
    return " to ".join(f"{length:,}" for length in np.unique([lengths.min(), lengths.max()])) if lengths.size else ""
