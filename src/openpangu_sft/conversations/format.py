"""The stage `format`: raw conversations to samples files.

Every record is written, or rejected with its reason: read = written + rejected in each file.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Callable

from openpangu_sft.artifacts.artifact import Manifest, sha256_of, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart
from openpangu_sft.conversations import alpaca, openai, sharegpt
from openpangu_sft.conversations.conversation import BadSample, Sample, kind_of, parse_sample, reason_class
from openpangu_sft.conversations.fields import compact_json, keys_of
from openpangu_sft.conversations.readers import RawRecord, raw_files, read_records
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

REJECTS = "rejects"
"""Subdirectory for rejects: every file beside the samples is read by preprocess."""

CONVERTERS: dict[str, Callable[[dict[str, Any]], Sample]] = {
    "samples": parse_sample,
    "alpaca": alpaca.convert,
    "sharegpt": sharegpt.convert,
    "openai": openai.convert,
}
KEY_OF = {"samples": "meta_prompt", "alpaca": "instruction", "sharegpt": "conversations", "openai": "messages"}
"""The key by which a record's format is recognised where data.source_format is auto."""

RECORDS_PER_STEP = 200


def run_format(recipe: Recipe) -> Manifest:
    """Converts the raw conversations in `paths.raw` into samples in `paths.samples`, one samples file per raw file.

    Returns:
        The manifest of the samples. `counts` has read, written, rejected, the same per file, and rejections by reason.

    Raises:
        UserError: nothing to read, a bad record (unless data.on_bad_sample is skip), or only bad records. An earlier
            result in `paths.samples` is kept then.
    """
    raw, target = recipe.path("raw"), recipe.path("samples")
    require_apart("paths.raw", raw, "paths.samples", target)
    data = recipe.data
    settings = {"data.source_format": data.source_format, "data.on_bad_sample": data.on_bad_sample}
    manifest = Manifest("samples", settings=settings)
    outputs = _outputs(raw_files(raw))
    with staged_directory(target, manifest) as staging:
        _fill(staging, outputs, recipe, manifest)
        if not manifest.counts["written"]:
            reason, times = Counter(manifest.counts["reasons"]).most_common(1)[0]
            what = f"none of the {manifest.counts['read']} records is a sample; {times} x {reason}"
            raise UserError(what, where=raw, remedy="set data.on_bad_sample=refuse to see where it begins")
    return manifest


def convert_record(record: object, source_format: str) -> Sample:
    """Converts one record, any JSON value, of a raw file.

    Args:
        source_format: a key of `CONVERTERS`, or "auto" to recognise it by the record's keys.

    Raises:
        BadSample: it cannot be converted.
    """
    if not isinstance(record, dict):
        raise BadSample(f"is {kind_of(record)}, not an object")
    return CONVERTERS[_detect(record) if source_format == "auto" else source_format](record)


def _detect(record: dict[str, Any]) -> str:
    found = [name for name, key in KEY_OF.items() if record.get(key) is not None]
    if len(found) > 1:
        raise BadSample(f"fits more than one format: {', '.join(found)}; set data.source_format to the right one")
    if not found:
        known = ", ".join(f"{name} ({key})" for name, key in KEY_OF.items())
        raise BadSample(f"unknown format: keys found are {keys_of(record)}; formats known are {known}")
    return found[0]


def _fill(staging: Path, outputs: dict[str, Path], recipe: Recipe, manifest: Manifest) -> None:
    """Writes the samples of all files and fills in the manifest."""
    reasons: Counter[str] = Counter()
    per_file: dict[str, dict[str, int]] = {}
    sizes = {name: path.stat().st_size for name, path in outputs.items()}
    with byte_progress("format", sum(sizes.values())) as advance:
        for name, path in outputs.items():
            before = path.stat()
            manifest.inputs[path.name] = sha256_of(path)
            with _Output(staging, name) as output:
                done = 0
                for record in read_records(path):
                    reason = _convert_into(output, record, path, recipe)
                    if reason:
                        reasons[reason_class(reason)] += 1
                    read = output.written + output.rejected
                    if read % RECORDS_PER_STEP == 0:
                        advance(record.position - done, path.name)
                        done = record.position
                advance(sizes[name] - done, path.name)
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise UserError("changed while it was read", where=path, remedy="run the stage again")
            per_file[path.name] = {"read": read, "written": output.written, "rejected": output.rejected}
    totals = sum_counts(list(per_file.values()))
    manifest.counts = {**totals, "reasons": dict(sorted(reasons.items())), "files": per_file}


def _convert_into(output: _Output, raw: RawRecord, path: Path, recipe: Recipe) -> str:
    """Writes one record as a sample or as a reject, or refuses it; returns the reason of a reject."""
    try:
        if raw.unreadable:
            raise BadSample(raw.unreadable)
        output.sample(convert_record(raw.content, recipe.data.source_format))
    except BadSample as error:
        if recipe.data.on_bad_sample == "refuse":
            remedy = "fix it, or set data.on_bad_sample=skip to leave such records out"
            raise UserError(str(error), where=f"{path}{raw.place}", remedy=remedy) from None
        output.reject(raw, path, str(error))
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

    def reject(self, raw: RawRecord, path: Path, reason: str) -> None:
        """Writes file, place, reason and the record, or its text where it could not be read."""
        entry: dict[str, Any] = {"file": path.name, "place": raw.place.lstrip(":"), "reason": reason}
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


def _outputs(files: list[Path]) -> dict[str, Path]:
    """Raw files by the name of their samples file, which no two may share."""
    outputs: dict[str, Path] = {}
    for file in files:
        name = f"{file.stem}.jsonl"
        if name in outputs:
            what = f"{outputs[name].name} and {file.name} would both become {name}"
            raise UserError(what, where=file.parent, remedy="rename one of them")
        outputs[name] = file
    return outputs
