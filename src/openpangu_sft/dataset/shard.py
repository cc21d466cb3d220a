"""One shard: the samples of some spans of the inputs, encoded, spread over packs and written.

All of it runs in several processes, and gives the same bytes for any number of them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import sum_counts
from openpangu_sft.conversations.conversation import Rules, Sample, parse_sample, reason_class
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.dataset.encode import Encoded, TooLong, encode_samples, input_ids_of, labels_of
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION, Ids, PackedWriter
from openpangu_sft.dataset.packing import Plan, plan_packs
from openpangu_sft.dataset.pool import ordered_map
from openpangu_sft.dataset.spans import Span, lines_before, read_span, spans_of
from openpangu_sft.dataset.spool import Spool, TokenRun
from openpangu_sft.dataset.validation import is_validation
from openpangu_sft.dataset.views import training_views
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.console import byte_progress, progress
from openpangu_sft.util.errors import UserError, naming

REJECTS = "rejects.jsonl"
ADDED = "samples added for answers with thinking"
VALUES_AT_ONCE = 1 << 20  # tokens that a process reads or writes at once


class Refused(NamedTuple):
    """A sample that is left out: line in the span, reason, the record or its text, and whether it is dropped."""

    line: int
    reason: str
    record: Any
    dropped: bool


class SpanResult(NamedTuple):
    """What became of the lines of a span."""

    lines: int
    run: TokenRun  # the samples that are encoded
    trained: npt.NDArray[np.int64]  # [samples], tokens of each that are targets
    validation: npt.NDArray[np.bool_]  # [samples]
    truncated: int  # conversations
    refused: list[Refused]
    ignored_keys: Counter[str]
    changes: Counter[str]


def write_shard(
    data: Data, tokenizer: Tokenizer, spans: Sequence[Span], staging: Path, prefix: str = PREFIX
) -> dict[str, Any]:
    """Makes the files of a shard from spans, in their order, in a directory; `prefix` begins the files' names.

    Returns counts for its manifest: read = packed + rejected + dropped, less the samples added for thinking, and with
    data.validation_share, under the name validation, those of the validation split, which then are part of it. Raises
    `UserError` for a bad sample (unless data.on_bad_sample is skip), a span without a record, or if no sample is left.
    """
    with Spool(staging / "spool") as spool:
        encoded = [_encode(data, tokenizer, span, spool, staging / REJECTS) for span in spans]
        counts = sum_counts([counts for counts, _ in encoded])
        lengths, validation = spool.finish(), np.concatenate([mask for _, mask in encoded])
        named = spans[0].file if len(spans) == 1 else spans[0].file.parent
        if not lengths.size:
            raise UserError("no sample is left to train on", where=named, remedy="check the data")
        splits = [(prefix, counts, ~validation)]
        if data.validation_share:
            splits.append((VALIDATION, counts["validation"], validation))
        for name, counted, side in splits:
            samples = np.flatnonzero(side)
            chosen = lengths[samples]
            plan = plan_packs(chosen, data.seq_length, data.seed)
            plan = Plan(samples[plan.order].astype(np.int32), plan.bounds)
            writer = PackedWriter(staging, name, len(plan), data.seq_length)
            title = f"writing {named.name} (packs)"
            write_packs(title, spool, lengths, plan, writer, tokenizer.pad_id, data.workers)
            counted.update(packs=len(plan), tokens=int(chosen.sum(dtype=np.int64)))
    return counts


def _encode(
    data: Data, tokenizer: Tokenizer, span: Span, spool: Spool, rejects: Path
) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
    """Encodes the lines of a span into the spool; returns counts, and which of the samples are for validation."""
    counts: Counter[str] = Counter()
    validation_counts: Counter[str] = Counter()
    notes: dict[str, Counter[str]] = {name: Counter() for name in ("reasons", "ignored_keys", "changes")}
    validation = [np.empty(0, np.bool_)]
    first_line: Optional[int] = None
    spans = spans_of(span, data.workers)
    workers = min(data.workers, len(spans)) or 1
    encode = partial(_encode_span, tokenizer, data, spool)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(byte_progress(f"encoding {span.file.name}", span.end - span.begin))
        results = stack.enter_context(contextlib.closing(ordered_map(encode, spans, workers)))
        for result, part in zip(results, spans):
            if result.refused:
                first_line = lines_before(span) if first_line is None else first_line  # reads the file through: once
                with naming(rejects), rejects.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                    for refused in result.refused:
                        _note(refused, span.file, first_line + counts["lines"] + refused.line, data, stream)
                        notes["reasons"][reason_class(refused.reason)] += 1
            notes["ignored_keys"].update(result.ignored_keys)
            notes["changes"].update(result.changes)
            spool.add(result.run)
            validation.append(result.validation)
            dropped = sum(refused.dropped for refused in result.refused)
            rejected = len(result.refused) - dropped
            counts.update(lines=result.lines, rejected=rejected, dropped=dropped, truncated=result.truncated)
            for counter, chosen in ((counts, ~result.validation), (validation_counts, result.validation)):
                counter.update(packed=int(chosen.sum()), trained_tokens=int(result.trained[chosen].sum()))
            advance(part.end - part.begin, "")
    added = notes["changes"][ADDED]
    read = counts["packed"] + validation_counts["packed"] + counts["rejected"] + counts["dropped"] - added
    if not read:
        raise UserError("holds no records", where=span.file, remedy="fill it, or move it away")
    names = ("packed", "rejected", "dropped", "truncated", "trained_tokens")
    found: dict[str, Any] = {"read": read, **{name: counts[name] for name in names}}
    found.update({name: dict(sorted(counted.items())) for name, counted in notes.items()})
    if data.validation_share:
        found["validation"] = {name: validation_counts[name] for name in ("packed", "trained_tokens")}
    return found, np.concatenate(validation)


def _note(refused: Refused, file: Path, line: int, data: Data, stream: Any) -> None:
    """Writes a sample that is left out into the rejects file; raises `UserError` if bad ones are not to be left out."""
    if data.on_bad_sample == "refuse" and not refused.dropped:
        raise UserError(refused.reason, where=f"{file}:{line}", remedy="fix it, or set data.on_bad_sample=skip")
    entry = {"file": file.name, "place": str(line), "reason": refused.reason, "record": refused.record}
    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _encode_span(tokenizer: Tokenizer, data: Data, spool: Spool, span: Span) -> SpanResult:
    """Encodes the samples of a span into the spool's file of the process that it is called in."""
    lines, rules = list(read_span(span)), Rules(data)
    read = [(raw, _views(raw, data, rules)) for raw in lines if raw]
    outcomes = iter(encode_samples([view for _, views in read for view in views], tokenizer, data))
    encoded, validation, refused = list[Encoded](), list[bool](), list[Refused]()
    truncated = 0
    for raw, views in read:
        kept = _kept(list(islice(outcomes, len(views))), data)
        if isinstance(kept, BadSample):
            own = Rules(data)
            _views(raw, data, own)  # once more, to take back what it has added to the counts
            rules.keys.counts.subtract(own.keys.counts)
            rules.changes.subtract(own.changes)
            dropped = isinstance(kept, TooLong) and data.too_long == "drop"
            refused.append(Refused(int(raw.place[1:]), str(kept), raw.text or raw.content, dropped))
            continue
        encoded += kept
        share = data.validation_share
        validation += [share > 0 and is_validation(kept[-1], tokenizer.header, share, data.seed)] * len(kept)
        truncated += len(kept) < len(views) or any(sample.truncated for sample in kept)
        rules.changes[ADDED] += len(kept) - 1
    trained = np.array([np.count_nonzero(sample.marked >= 0) for sample in encoded], np.int64)
    sides = np.array(validation, np.bool_)
    run = spool.write(encoded)
    return SpanResult(len(lines), run, trained, sides, truncated, refused, +rules.keys.counts, +rules.changes)


def _kept(outcomes: Sequence[Union[Encoded, BadSample]], data: Data) -> Union[list[Encoded], BadSample]:
    """What is packed of one conversation: all views, the shorter ones with data.too_long=truncate, or none and why."""
    encoded = [outcome for outcome in outcomes if isinstance(outcome, Encoded)]
    bad = [outcome for outcome in outcomes if isinstance(outcome, BadSample)]
    cut = data.too_long == "truncate" and encoded and all(isinstance(reason, TooLong) for reason in bad)
    return bad[0] if bad and not cut else encoded


def _views(raw: RawRecord, data: Data, rules: Rules) -> Sequence[Union[Sample, BadSample]]:
    """The samples of one line, or the one reason why there is none."""
    try:
        if raw.unreadable:
            raise BadSample(raw.unreadable)
        sample = parse_sample(raw.content, rules)
        views = training_views(sample, data)
    except BadSample as error:
        return [error]
    if data.thinking == "drop":
        rules.changes["thinking of answers left out"] += sum(message.thinking is not None for message in sample.data)
    return views


def write_packs(
    title: str,
    spool: Spool,
    lengths: Ids,
    plan: Plan,
    writer: PackedWriter,
    pad_id: int,
    workers: int,
    first_row: int = 0,
) -> None:
    """Writes a plan's packs as rows from `first_row` on: samples, by their number in the spool, then padding.

    Lengths, int32 [samples], are those of all that the spool holds, in tokens; `title` is that of the progress.
    """

    def write_rows(packs: range) -> range:
        marked = np.full((len(packs), writer.seq_length), ~pad_id, np.int32)
        numbers, roles = np.zeros_like(marked), np.zeros(marked.shape, np.uint8)
        for row, pack in enumerate(packs):
            begin, packed = 0, plan[pack]
            for number, (sample, length) in enumerate(zip(packed.tolist(), lengths[packed].tolist()), 1):
                inside = slice(begin, begin := begin + length)
                spool.read(sample, marked[row, inside], roles[row, inside])
                numbers[row, inside] = number
        ids, labels = input_ids_of(marked), labels_of(marked)
        writer.write(first_row + packs.start, input_ids=ids, attention_mask=numbers, labels=labels, roles=roles)
        return packs

    step = max(1, VALUES_AT_ONCE // writer.seq_length)
    blocks = [range(begin, min(begin + step, len(plan))) for begin in range(0, len(plan), step)]
    written = ordered_map(write_rows, blocks, min(workers, len(blocks)) or 1)
    with progress(title, len(plan)) as advance, contextlib.closing(written):
        for block in written:
            advance(len(block), "")
