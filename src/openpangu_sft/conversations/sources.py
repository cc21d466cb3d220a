"""Where raw conversations come from, and how often each is used: paths.raw, or data.sources mixed by weight."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b

from openpangu_sft.conversations.conversation import Rules, Sample
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.conversations.files import RawFile, raw_files
from openpangu_sft.recipe.data import Data, Source
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError


@dataclass(frozen=True)
class Input:
    """A raw file with the settings of its source."""

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
        times = int(source.weight)
        times += _draw(f"{self._data.seed} {source.path} {item.file.name}{place}") < source.weight % 1
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


def _draw(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
