"""The stage `format`: raw conversations to samples files, from paths.raw or from data.sources mixed by weight.

Every record is written, or rejected with its reason: read = written + rejected in each file.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from openpangu_sft.artifacts.artifact import Manifest, sha256_of, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart, stamps_of, unchanged
from openpangu_sft.conversations.conversation import Rules, Sample, reason_class
from openpangu_sft.conversations.convert import BAD_EXAMPLE, Converter, LeftOut
from openpangu_sft.conversations.files import RawFile, raw_files, read_records
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.readers import RawRecord, reject_line
from openpangu_sft.recipe.data import Data, Source
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

REJECTS = "rejects"  # subdirectory for rejects: every file beside the samples is read by preprocess

RECORDS_PER_STEP = 200

_SHAPING = "source_format sources columns encoding on_bad_sample ignore_keys turns preference deduplicate"
SETTINGS = set(_SHAPING.split())  # keys of the recipe's section data that shape samples


@dataclass(frozen=True)
class Input:
    file: RawFile
    name: str  # in manifests and rejects; with data.sources it begins with the number of its source, from 1
    samples: str  # name of its samples file
    source: Source
    convert: Converter


def inputs_of(recipe: Recipe, rules: Rules) -> list[Input]:
    """All raw files in the order of their sources; raises `UserError` for two that would become one samples file."""
    data = recipe.data
    sources = data.sources or [Source(path=recipe.paths.raw, format=data.source_format, columns=data.columns)]
    inputs: dict[str, Input] = {}
    for number, source in enumerate(sources, 1):
        convert = Converter(data.model_copy(update={"source_format": source.format, "columns": source.columns}), rules)
        prefix = f"{number}-" if data.sources else ""
        for file in raw_files(recipe.paths.under_cache(source.path)):
            new = Input(file, prefix + file.name, prefix + file.samples, source, convert)
            other = inputs.setdefault(new.samples, new)
            if other is not new:
                what = f"{other.name} and {new.name} would both become {new.samples}"
                raise UserError(what, where=file.path.parent, remedy="rename one of them")
    return list(inputs.values())


class Mixer:
    """Decides how often each sample is written; memory grows by some 70 bytes for each."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._seen: set[bytes] = set()
        self.counts: Counter[str] = Counter()  # duplicates; samples added and left out by weight

    def lines(self, sample: Sample, item: Input, place: str) -> list[bytes]:
        """The lines of a samples file for one sample: none, one, or several that are equal.

        File, place of the record and data.seed decide about a fraction of a weight; other sources do not.
        """
        source = item.source
        drawn = blake2b(f"{self._data.seed} {source.path} {item.file.name}{place}".encode(), digest_size=8).digest()
        times = int(source.weight) + (int.from_bytes(drawn, "little") / 2**64 < source.weight % 1)
        if not times:  # before duplicates: another source may use the same conversation
            self.counts["left_out"] += 1
            return []
        if source.system and not any(sample.meta_prompt):
            sample = replace(sample, meta_prompt=(source.system,))
        line = json.dumps(sample.to_json(), ensure_ascii=False).encode() + b"\n"
        digest = blake2b(line, digest_size=16).digest()
        if digest in self._seen:
            self.counts["duplicates"] += 1
            if self._data.deduplicate == "exact":
                return []
        self._seen.add(digest)
        self.counts["added"] += times - 1
        return [line] * times


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
            weights = "left out by the weights of data.sources"
            reasons = Counter({**manifest.counts["reasons"], weights: manifest.counts.get("left_out", 0)})
            reason, times = reasons.most_common(1)[0]
            remedies = {weights: "raise them", BAD_EXAMPLE: "add good examples"}
            remedy = remedies.get(reason, "set data.on_bad_sample=refuse to see where it begins")
            what = f"none of the {manifest.counts['read']} records is a sample; {times} x {reason}"
            raise UserError(what, where=inputs[0].file.path.parent, remedy=remedy)
    return manifest


def _fill(staging: Path, inputs: list[Input], recipe: Recipe, manifest: Manifest) -> None:
    reasons: Counter[str] = Counter()
    mixer = Mixer(recipe.data)
    counted = ("read", "written", "rejected", "duplicates", *(("added", "left_out") if recipe.data.sources else ()))
    per_file: dict[str, dict[str, int]] = {}
    (staging / REJECTS).mkdir()
    with byte_progress("format", sum(item.file.path.stat().st_size for item in inputs)) as advance:
        for item in inputs:
            path, done, counts = item.file.path, 0, Counter[str]()
            mixer.counts, made = counts, [staging / item.samples, staging / REJECTS / item.samples]
            with unchanged(stamps_of([path])), made[0].open("wb") as samples, made[1].open("wb") as rejects:
                manifest.inputs[item.name] = sha256_of(path)
                for record in read_records(path, recipe.data.encoding):
                    lines, reason = _convert(record, item, mixer, recipe)
                    samples.writelines(lines)
                    counts["read"] += 1
                    counts["written"] += len(lines)
                    if reason:
                        rejects.write(reject_line(record, item.name, record.place.lstrip(":"), reason))
                        counts["rejected"] += 1
                        reasons[reason_class(reason)] += 1
                    if counts["read"] % RECORDS_PER_STEP == 0:
                        advance(record.position - done, item.name)
                        done = record.position
                advance(path.stat().st_size - done, item.name)
            for file in made:
                if not file.stat().st_size:
                    file.unlink()
            per_file[item.name] = {key: counts[key] for key in counted}
    for number, convert in enumerate(dict.fromkeys(item.convert for item in inputs)):
        if convert.unseen:
            key = f"data.sources[{number}].columns" if recipe.data.sources else "data.columns"
            what = f"no record has the column {min(convert.unseen)}"
            raise UserError(what, where=key, remedy="check its name against a record")
    totals = sum_counts(list(per_file.values()))
    if not totals["rejected"]:
        (staging / REJECTS).rmdir()
    manifest.counts = {**totals, "reasons": dict(sorted(reasons.items())), "files": per_file}


def _convert(raw: RawRecord, item: Input, mixer: Mixer, recipe: Recipe) -> tuple[list[bytes], str]:
    """The lines of a record's sample, and the reason of a reject; raises `UserError` where it stops the stage."""
    before = (rules := item.convert.rules).keys.counts.copy(), rules.changes.copy()
    try:
        if raw.unreadable:
            raise BadSample(raw.unreadable)
        return mixer.lines(item.convert(raw.content), item, raw.place), ""
    except BadSample as error:
        rules.keys.counts, rules.changes = before  # which are those of the records that are written
        if recipe.data.on_bad_sample == "refuse" and not isinstance(error, LeftOut):
            remedy = "fix it, or set data.on_bad_sample=skip to leave such records out"
            raise UserError(str(error), where=f"{item.file.path}{raw.place}", remedy=remedy) from None
        return [], str(error)
