"""One shard: the samples of some spans of the inputs, encoded, spread over packs and written.

Everything here runs in several processes and gives the same bytes for any number of them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from rich.markup import escape

from openpangu_sft.artifacts.artifact import sum_counts
from openpangu_sft.conversations.conversation import BadSample, Sample, parse_sample, reason_class
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.dataset.encode import Encoded, Limits, TooLong, encode_samples, input_ids_of, labels_of
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION, Ids, PackedWriter
from openpangu_sft.dataset.packing import Plan, plan_packs
from openpangu_sft.dataset.pool import ordered_map
from openpangu_sft.dataset.spans import Span, SpanReader, lines_before, spans_of
from openpangu_sft.dataset.spool import Spool, TokenRun
from openpangu_sft.dataset.validation import is_validation
from openpangu_sft.recipe.sections import Data
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.console import progress
from openpangu_sft.util.errors import UserError, naming

REJECTS = "rejects.jsonl"
VALUES_AT_ONCE = 1 << 20
"""Tokens in the rows that a process writes at once."""


@dataclass
class Refused:
    """A sample that is not trained on: its line in the span, why, the record or its text, and whether it is dropped."""

    line: int
    reason: str
    record: Any
    dropped: bool


@dataclass
class SpanResult:
    """What became of the lines of a span.

    Args:
        run: the samples that are encoded.
        trained: int64 [samples], tokens of each that are targets.
        validation: bool [samples].
    """

    span: Span
    lines: int
    run: TokenRun
    trained: npt.NDArray[np.int64]
    validation: npt.NDArray[np.bool_]
    truncated: int = 0
    refused: list[Refused] = field(default_factory=list)


def write_shard(
    data: Data, tokenizer: Tokenizer, spans: Sequence[Span], staging: Path, prefix: str = PREFIX
) -> dict[str, Any]:
    """Makes the files of a shard in a directory.

    Args:
        data: the recipe's section.
        spans: what to read, one after another.
        staging: the directory; it is there.
        prefix: of the files' names.

    Returns:
        Counts for its manifest; read = packed + rejected + dropped. With data.validation_share also those of the
        validation split, under the name validation, which then are part of the sum.

    Raises:
        UserError: a bad sample (unless data.on_bad_sample is skip), a span without a record, or no sample is left.
    """
    with Spool(staging / "spool") as spool:
        encoded = [_encode(data, tokenizer, span, spool, staging / REJECTS) for span in spans]
        counts = sum_counts([counts for counts, _ in encoded])
        lengths, validation = spool.finish(), np.concatenate([mask for _, mask in encoded])
        named = spans[0].file if len(spans) == 1 else spans[0].file.parent
        if not lengths.size:
            raise UserError("no sample is left to train on", where=named, remedy="look at the data")
        packer = _Packer(data, tokenizer.pad_id, spool, lengths, staging)
        counts.update(packer.write(prefix, np.flatnonzero(~validation), named.name))
        if data.validation_share:
            counts["validation"].update(packer.write(VALIDATION, np.flatnonzero(validation), named.name))
    return counts


def _encode(
    data: Data, tokenizer: Tokenizer, span: Span, spool: Spool, rejects: Path
) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
    """Encodes the lines of a span into the spool; returns counts, and which of the samples are for validation."""
    counts: Counter[str] = Counter()
    validation_counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    validation = [np.empty(0, np.bool_)]
    first_line = -1
    spans = spans_of(span, data.workers)
    workers = min(data.workers, len(spans)) or 1
    encode = _EncodeSpan(tokenizer, data, spool)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(f"encoding {escape(span.file.name)}", span.end - span.begin))
        results = stack.enter_context(contextlib.closing(ordered_map(encode, spans, workers)))
        for result in results:
            if result.refused:
                first_line = (
                    first_line if first_line >= 0 else lines_before(span)
                )  # read through once, and only if asked
                with naming(rejects), rejects.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                    for refused in result.refused:
                        _note(refused, span.file, first_line + counts["lines"] + refused.line, data, stream)
                        reasons[reason_class(refused.reason)] += 1
            spool.add(result.run)
            validation.append(result.validation)
            dropped = sum(refused.dropped for refused in result.refused)
            counts.update(lines=result.lines, rejected=len(result.refused) - dropped, dropped=dropped)
            counts.update(truncated=result.truncated)
            for counter, chosen in ((counts, ~result.validation), (validation_counts, result.validation)):
                counter.update(packed=int(chosen.sum()), trained_tokens=int(result.trained[chosen].sum()))
            advance(result.span.end - result.span.begin, "")
    read = counts["packed"] + validation_counts["packed"] + counts["rejected"] + counts["dropped"]
    if not read:
        raise UserError("holds no records", where=span.file, remedy="fill it, or move it away")
    names = ("packed", "rejected", "dropped", "truncated", "trained_tokens")
    found = {"read": read, **{name: counts[name] for name in names}, "reasons": dict(sorted(reasons.items()))}
    if data.validation_share:
        found["validation"] = {name: validation_counts[name] for name in ("packed", "trained_tokens")}
    return found, np.concatenate(validation)


def _note(refused: Refused, file: Path, line: int, data: Data, stream: Any) -> None:
    """Writes a sample that is left out into the rejects file.

    Raises:
        UserError: bad ones are not to be left out.
    """
    if data.on_bad_sample == "refuse" and not refused.dropped:
        remedy = "mend it, or set data.on_bad_sample=skip"
        raise UserError(refused.reason, where=f"{file}:{line}", remedy=remedy)
    entry = {"file": file.name, "place": str(line), "reason": refused.reason, "record": refused.record}
    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


class _EncodeSpan:
    """Encodes the samples of a span into the spool's file of the process that it is called in."""

    def __init__(self, tokenizer: Tokenizer, data: Data, spool: Spool) -> None:
        self._tokenizer, self._limits, self._spool = tokenizer, Limits.of(data), spool
        self._share, self._seed = data.validation_share, data.seed

    def __call__(self, span: Span) -> SpanResult:
        reader = SpanReader(span)
        records = list(reader)
        outcomes = encode_samples([_sample(raw) for raw in records], self._tokenizer, self._limits)
        encoded = [outcome for outcome in outcomes if isinstance(outcome, Encoded)]
        trained = np.array([np.count_nonzero(sample.marked >= 0) for sample in encoded], np.int64)
        validation = np.zeros(len(encoded), np.bool_)
        if self._share:
            start_id = self._tokenizer.start_id
            validation[:] = [is_validation(sample.marked, start_id, self._share, self._seed) for sample in encoded]
        result = SpanResult(span, reader.lines, self._spool.write(encoded), trained, validation)
        result.truncated = sum(outcome.truncated for outcome in encoded)
        for raw, outcome in zip(records, outcomes):
            if isinstance(outcome, BadSample):
                dropped = isinstance(outcome, TooLong) and self._limits.too_long == "drop"
                line = int(raw.place[1:])
                result.refused.append(Refused(line, str(outcome), raw.text or raw.content, dropped))
        return result


def _sample(raw: RawRecord) -> Union[Sample, BadSample]:
    try:
        return BadSample(raw.unreadable) if raw.unreadable else parse_sample(raw.content)
    except BadSample as error:
        return error


class _Packer:
    """Spreads samples of the spool over packs and writes them.

    Args:
        lengths: int32 [samples], of all that the spool holds, in tokens.
        staging: the directory to write into.
    """

    def __init__(self, data: Data, pad_id: int, spool: Spool, lengths: Ids, staging: Path) -> None:
        self._data, self._pad_id, self._spool, self._lengths, self._staging = data, pad_id, spool, lengths, staging

    def write(self, prefix: str, samples: npt.NDArray[np.int64], named: str) -> dict[str, int]:
        """Writes the six files of some samples, none included.

        Args:
            prefix: of the files' names.
            samples: int64 [chosen], their numbers in the spool.
            named: for the progress.

        Returns:
            How many packs and tokens.
        """
        data, lengths = self._data, self._lengths[samples]
        plan = plan_packs(lengths, data.seq_length, data.seed)
        plan = Plan(samples[plan.order].astype(np.int32), plan.bounds)
        writer = PackedWriter(self._staging, prefix, len(plan), data.seq_length, with_roles=True)
        rows = _Rows(data.seq_length, self._pad_id, self._spool, self._lengths, plan, writer)
        step = max(1, VALUES_AT_ONCE // data.seq_length)
        blocks = [range(begin, min(begin + step, len(plan))) for begin in range(0, len(plan), step)]
        written = ordered_map(rows, blocks, min(data.workers, len(blocks)) or 1)
        with progress(f"writing {escape(named)}", len(plan)) as advance, contextlib.closing(written):
            for block in written:
                advance(len(block), "")
        return {"packs": len(plan), "tokens": int(lengths.sum(dtype=np.int64))}


class _Rows:
    """Writes rows: the samples of their packs out of the spool, then padding."""

    def __init__(
        self,
        seq_length: int,
        pad_id: int,
        spool: Spool,
        lengths: Ids,
        plan: Plan,
        writer: PackedWriter,
    ) -> None:
        self._seq_length, self._pad_id = seq_length, pad_id
        self._spool, self._lengths, self._plan, self._writer = spool, lengths, plan, writer

    def __call__(self, rows: range) -> range:
        marked = np.full((len(rows), self._seq_length), ~self._pad_id, np.int32)
        numbers, roles = np.zeros_like(marked), np.zeros(marked.shape, np.uint8)
        for row, pack in enumerate(rows):
            begin = 0
            for number, (sample, length) in enumerate(self._samples(pack), 1):
                inside = slice(begin, begin := begin + length)
                self._spool.read(sample, marked[row, inside], roles[row, inside])
                numbers[row, inside] = number
        ids, labels = input_ids_of(marked), labels_of(marked)
        self._writer.write(rows.start, input_ids=ids, attention_mask=numbers, labels=labels, roles=roles)
        return rows

    def _samples(self, pack: int) -> Iterator[tuple[int, int]]:
        samples = self._plan[pack]
        return zip(samples.tolist(), self._lengths[samples].tolist())
