"""The stage `format`: raw conversations to samples files.

Every record is written, or rejected with its reason: read = written + rejected in each file.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from rich.markup import escape

from openpangu_sft.artifacts.artifact import Manifest, sha256_of, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart
from openpangu_sft.conversations.conversation import Sample, reason_class
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.conversations.fields import compact_json
from openpangu_sft.conversations.files import RawFile, raw_files, read_records
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.preference import LeftOut
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

REJECTS = "rejects"
"""Subdirectory for rejects: every file beside the samples is read by preprocess."""

RECORDS_PER_STEP = 200

SETTINGS = ("source_format", "encoding", "on_bad_sample", "ignore_keys", "turns", "preference", "columns")
"""Keys of the recipe's section data that shape samples."""


def run_format(recipe: Recipe) -> Manifest:
    """Converts the raw conversations in `paths.raw` into samples in `paths.samples`, one samples file per raw file.

    Returns:
        The manifest of the samples. `counts` has read, written, rejected, the same per file, rejections by reason,
        keys that were left out, and changes to turns.

    Raises:
        UserError: nothing to read, a bad record (unless data.on_bad_sample is skip), or only bad records. An earlier
            result in `paths.samples` is kept then.
    """
    raw, target = recipe.path("raw"), recipe.path("samples")
    require_apart("paths.raw", raw, "paths.samples", target)
    manifest = Manifest("samples", settings={f"data.{key}": getattr(recipe.data, key) for key in SETTINGS})
    outputs = _outputs(raw_files(raw))
    with staged_directory(target, manifest) as staging:
        _fill(staging, outputs, recipe, manifest)
        if not manifest.counts["written"]:
            reason, times = Counter(manifest.counts["reasons"]).most_common(1)[0]
            what = f"none of the {manifest.counts['read']} records is a sample; {times} x {reason}"
            raise UserError(what, where=raw, remedy="set data.on_bad_sample=refuse to see where it begins")
    return manifest


def _fill(staging: Path, outputs: dict[str, RawFile], recipe: Recipe, manifest: Manifest) -> None:
    """Writes the samples of all files and fills in the manifest."""
    reasons: Counter[str] = Counter()
    converter = Converter(recipe.data)
    per_file: dict[str, dict[str, int]] = {}
    sizes = {name: file.path.stat().st_size for name, file in outputs.items()}
    with byte_progress("format", sum(sizes.values())) as advance:
        for name, file in outputs.items():
            path = file.path
            before = path.stat()
            manifest.inputs[file.name] = sha256_of(path)
            with _Output(staging, name) as output:
                done = 0
                for record in read_records(path, recipe.data.encoding):
                    reason = _convert_into(output, record, file, converter, recipe)
                    if reason:
                        reasons[reason_class(reason)] += 1
                    read = output.written + output.rejected
                    if read % RECORDS_PER_STEP == 0:
                        advance(record.position - done, escape(file.name))
                        done = record.position
                advance(sizes[name] - done, escape(file.name))
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise UserError("changed while it was read", where=path, remedy="run the stage again")
            per_file[file.name] = {"read": read, "written": output.written, "rejected": output.rejected}
    if converter.unseen:
        what = f"no record has the column {min(converter.unseen)}"
        raise UserError(what, where="data.columns", remedy="check its name against a record")
    totals = sum_counts(list(per_file.values()))
    rules = converter.rules
    notes = {"reasons": reasons, "ignored_keys": rules.keys.counts, "changes": rules.changes}
    manifest.counts = {**totals, **{name: dict(sorted(counted.items())) for name, counted in notes.items()}}
    manifest.counts["files"] = per_file


def _convert_into(output: _Output, raw: RawRecord, file: RawFile, convert: Converter, recipe: Recipe) -> str:
    """Writes one record as a sample or as a reject, or refuses it; returns the reason of a reject."""
    try:
        if raw.unreadable:
            raise BadSample(raw.unreadable)
        output.sample(convert(raw.content))
    except BadSample as error:
        if recipe.data.on_bad_sample == "refuse" and not isinstance(error, LeftOut):
            remedy = "fix it, or set data.on_bad_sample=skip to leave such records out"
            raise UserError(str(error), where=f"{file.path}{raw.place}", remedy=remedy) from None
        output.reject(raw, file, str(error))
        return str(error)
    return ""


class _Output(contextlib.ExitStack):
    """The samples file and the rejects file of one raw file, each created with its first line."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__()
        self._directory, self._name = directory, name
        self._streams: dict[str, BinaryIO] = {}
        self.written = self.rejected = 0

    def sample(self, sample: Sample) -> None:
        self._write(".", json.dumps(sample.to_json(), ensure_ascii=False).encode())
        self.written += 1

    def reject(self, raw: RawRecord, file: RawFile, reason: str) -> None:
        """Writes file, place, reason and the record, or its text where it could not be read."""
        entry: dict[str, Any] = {"file": file.name, "place": raw.place.lstrip(":"), "reason": reason}
        key, value = ("text", raw.text) if raw.unreadable else ("record", raw.content)
        try:
            line = compact_json({**entry, key: value})
        except BadSample:  # a value from parquet that JSON does not have
            line = compact_json({**entry, "text": reprlib.repr(value)})
        self._write(REJECTS, line.encode("utf-8", "backslashreplace"))  # an unpaired surrogate becomes its JSON escape
        self.rejected += 1

    def _write(self, below: str, line: bytes) -> None:
        if below not in self._streams:
            (self._directory / below).mkdir(exist_ok=True)
            self._streams[below] = self.enter_context((self._directory / below / self._name).open("wb"))
        self._streams[below].write(line + b"\n")


def _outputs(files: list[RawFile]) -> dict[str, RawFile]:
    """Raw files by the name of their samples file, which no two may share."""
    outputs: dict[str, RawFile] = {}
    for file in files:
        other = outputs.setdefault(file.samples, file)
        if other is not file:
            what = f"{other.name} and {file.name} would both become {file.samples}"
            raise UserError(what, where=file.path.parent, remedy="rename one of them")
    return outputs
