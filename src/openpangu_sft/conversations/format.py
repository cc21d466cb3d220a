"""The stage `format`: raw conversations to samples files.

Every record is written, or rejected with its reason: read = written + rejected in each file.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from openpangu_sft.artifacts.artifact import Manifest, sha256_of, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart, stamps_of, unchanged
from openpangu_sft.conversations.conversation import Rules, reason_class
from openpangu_sft.conversations.fields import compact_json
from openpangu_sft.conversations.files import read_records
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.preference import BAD_EXAMPLE, LeftOut
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.conversations.sources import Input, Mixer, inputs_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

REJECTS = "rejects"  # subdirectory for rejects: every file beside the samples is read by preprocess

RECORDS_PER_STEP = 200

_SHAPING = "source_format sources columns encoding on_bad_sample ignore_keys turns preference deduplicate"
SETTINGS = set(_SHAPING.split())  # keys of the recipe's section data that shape samples


def run_format(recipe: Recipe) -> Manifest:
    """Converts raw conversations into samples in `paths.samples`, one samples file per raw file; returns its manifest.

    In its counts read + added = written + rejected + left_out, and + duplicates if these are dropped; data.sources add
    and leave out. Raises `UserError` where there is nothing to read, for a bad record (unless data.on_bad_sample is
    skip), or only bad ones; an earlier result is kept then.
    """
    data, target = recipe.data, recipe.path("samples")
    rules = Rules(data)
    paths = {f"data.sources[{number}]": source.path for number, source in enumerate(data.sources)}
    for name, path in (paths or {"paths.raw": recipe.paths.raw}).items():
        require_apart(name, recipe.paths.under_cache(path), "paths.samples", target)
    shaping = SETTINGS | {"seed"} if data.sources else SETTINGS
    settings = {f"data.{key}": value for key, value in data.model_dump(include=shaping).items()}
    manifest = Manifest("samples", settings=settings)
    inputs = inputs_of(recipe, rules)
    with staged_directory(target, manifest) as staging:
        _fill(staging, inputs, recipe, manifest)
        notes = {"ignored_keys": rules.keys.counts, "changes": rules.changes}
        manifest.counts.update({name: dict(sorted(counted.items())) for name, counted in notes.items()})
        if not manifest.counts["written"]:
            raise _no_sample(manifest.counts, inputs[0].file.path.parent)
    return manifest


def _no_sample(counts: Mapping[str, Any], where: Path) -> UserError:
    weights = "left out by the weights of data.sources"
    reason, times = Counter({**counts["reasons"], weights: counts.get("left_out", 0)}).most_common(1)[0]
    remedies = {weights: "raise them", BAD_EXAMPLE: "add good examples"}
    remedy = remedies.get(reason, "set data.on_bad_sample=refuse to see where it begins")
    what = f"none of the {counts['read']} records is a sample; {times} x {reason}"
    return UserError(what, where=where, remedy=remedy)


def _fill(staging: Path, inputs: list[Input], recipe: Recipe, manifest: Manifest) -> None:
    """Writes the samples of all files and fills in the manifest."""
    reasons: Counter[str] = Counter()
    mixer = Mixer(recipe.data)
    per_file: dict[str, dict[str, int]] = {}
    with byte_progress("format", sum(item.file.path.stat().st_size for item in inputs)) as advance:
        for item in inputs:
            path, mixer.counts = item.file.path, Counter()
            with unchanged(stamps_of([path])), _Output(staging, item) as output:
                manifest.inputs[item.name] = sha256_of(path)
                done = read = 0
                for read, record in enumerate(read_records(path, recipe.data.encoding), 1):
                    reason = _convert_into(output, record, item, mixer, recipe)
                    if reason:
                        reasons[reason_class(reason)] += 1
                    if read % RECORDS_PER_STEP == 0:
                        advance(record.position - done, item.name)
                        done = record.position
                advance(path.stat().st_size - done, item.name)
            mixed = ("duplicates", "added", "left_out") if recipe.data.sources else ("duplicates",)
            per_file[item.name] = {"read": read, "written": output.written, "rejected": output.rejected}
            per_file[item.name].update({key: mixer.counts[key] for key in mixed})
    for number, convert in enumerate(dict.fromkeys(item.convert for item in inputs)):
        if convert.unseen:
            key = f"data.sources[{number}].columns" if recipe.data.sources else "data.columns"
            what = f"no record has the column {min(convert.unseen)}"
            raise UserError(what, where=key, remedy="check its name against a record")
    totals = sum_counts(list(per_file.values()))
    manifest.counts = {**totals, "reasons": dict(sorted(reasons.items())), "files": per_file}


def _convert_into(output: _Output, raw: RawRecord, item: Input, mixer: Mixer, recipe: Recipe) -> str:
    """Writes one record as a sample or as a reject, or refuses it; returns the reason of a reject."""
    before = (rules := item.convert.rules).keys.counts.copy(), rules.changes.copy()
    try:
        if raw.unreadable:
            raise BadSample(raw.unreadable)
        output.samples(mixer.lines(item.convert(raw.content), item, raw.place))
    except BadSample as error:
        rules.keys.counts, rules.changes = before  # which are those of the records that are written
        if recipe.data.on_bad_sample == "refuse" and not isinstance(error, LeftOut):
            remedy = "fix it, or set data.on_bad_sample=skip to leave such records out"
            raise UserError(str(error), where=f"{item.file.path}{raw.place}", remedy=remedy) from None
        output.reject(raw, str(error))
        return str(error)
    return ""


class _Output(contextlib.ExitStack):
    """The samples file and the rejects file of one raw file, each created with its first line."""

    def __init__(self, directory: Path, item: Input) -> None:
        super().__init__()
        self._directory, self._item = directory, item
        self._streams: dict[str, BinaryIO] = {}
        self.written = self.rejected = 0

    def samples(self, lines: list[bytes]) -> None:
        for line in lines:
            self._write(".", line)
        self.written += len(lines)

    def reject(self, raw: RawRecord, reason: str) -> None:
        """Writes file, place, reason and the record, or its text where it could not be read."""
        entry: dict[str, Any] = {"file": self._item.name, "place": raw.place.lstrip(":"), "reason": reason}
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
            self._streams[below] = self.enter_context((self._directory / below / self._item.samples).open("wb"))
        self._streams[below].write(line + b"\n")
