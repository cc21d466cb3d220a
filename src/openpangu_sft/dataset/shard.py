"""One shard: the samples of some spans of the inputs, encoded, spread over packs and written.

All of it runs in several processes, and gives the same bytes for any number of them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import blocks_of, sum_counts
from openpangu_sft.conversations.conversation import Rules, Sample, parse_sample, reason_class
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.readers import RawRecord, reject_line
from openpangu_sft.dataset.encode import Encoded, TooLong, encode_samples, input_ids_of, labels_of, training_views
from openpangu_sft.dataset.index_file import BEGINS, PREFIX, ROLES, VALIDATION, PackedWriter
from openpangu_sft.dataset.packing import Plan, plan_packs
from openpangu_sft.dataset.pool import ordered_map
from openpangu_sft.dataset.segments import blocks
from openpangu_sft.dataset.spans import Span, read_span, spans_of
from openpangu_sft.dataset.spool import Spool, TokenRun
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.console import byte_progress, progress
from openpangu_sft.util.errors import UserError, naming

REJECTS = "rejects.jsonl"
NOTES = ("reasons", "ignored_keys", "changes")
ADDED = "samples added for answers with thinking"
BITS = 64
USER, ASSISTANT = (BEGINS + ROLES.index(role) + 1 for role in ("user", "assistant"))
"""Roles of the start tokens of turns."""


class Refused(NamedTuple):
    """A sample that is left out: its record, whose place is the line in the span, why, and whether it is dropped."""

    raw: RawRecord
    reason: str
    dropped: bool


class SpanResult(NamedTuple):
    """What became of the lines of a span."""

    lines: int
    run: TokenRun  # the samples that are encoded
    validation: npt.NDArray[np.bool_]  # [samples]
    refused: list[Refused]
    counts: dict[str, Counter[str]]  # of each side, and `NOTES`


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
        spool.finish()
        validation = np.concatenate([mask for _, mask in encoded])
        named = spans[0].file if len(spans) == 1 else spans[0].file.parent
        if not validation.size:
            raise UserError("no sample is left to train on", where=named, remedy="check the data")
        splits = [(prefix, counts, ~validation)]
        if data.validation_share:
            splits.append((VALIDATION, counts[VALIDATION], validation))
        for name, counted, side in splits:
            samples = np.flatnonzero(side)
            plan = plan_packs(spool.lengths[samples], data.seq_length, data.seed)
            plan = Plan(samples[plan.order].astype(np.int32), plan.bounds)
            writer = PackedWriter(staging, name, len(plan), data.seq_length)
            write_packs(f"writing {named.name} (packs)", spool, plan, writer, tokenizer.pad_id, data.workers)
            counted.update(packs=len(plan), tokens=int(spool.lengths[samples].sum(dtype=np.int64)))
    return counts


def _encode(
    data: Data, tokenizer: Tokenizer, span: Span, spool: Spool, rejects: Path
) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
    """Encodes the lines of a span into the spool; returns counts, and which of the samples are for validation."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in (PREFIX, VALIDATION, *NOTES)}
    validation = [np.empty(0, np.bool_)]
    lines, before = 0, None
    spans = spans_of(span, data.workers)
    encode = partial(_encode_span, tokenizer, data, spool)
    results = ordered_map(encode, spans, min(data.workers, len(spans)) or 1)
    with byte_progress(f"encoding {span.file.name}", span.end - span.begin) as advance, contextlib.closing(results):
        for result, part in zip(results, spans):
            if result.refused:
                if before is None:  # reads the file through: once
                    before = sum(block.count(b"\n") for block in blocks_of(span.file, end=span.begin))
                with naming(rejects), rejects.open("ab") as stream:
                    for raw, reason, dropped in result.refused:
                        line = before + lines + int(raw.place[1:])
                        if data.on_bad_sample == "refuse" and not dropped:
                            remedy = "fix it, or set data.on_bad_sample=skip"
                            raise UserError(reason, where=f"{span.file}:{line}", remedy=remedy)
                        stream.write(reject_line(raw, span.file.name, str(line), reason))
            lines += result.lines
            spool.runs.append(result.run)
            validation.append(result.validation)
            for name, counted in result.counts.items():
                counts[name].update(counted)
            advance(part.end - part.begin, "")
    training, held_out = counts[PREFIX], counts[VALIDATION]
    if not training["read"]:
        raise UserError("holds no records", where=span.file, remedy="fill it, or move it away")
    names = ("read", "packed", "rejected", "dropped", "truncated", "trained_tokens")
    found: dict[str, Any] = {name: training[name] for name in names}
    found.update({name: dict(sorted(counts[name].items())) for name in NOTES})
    if data.validation_share:
        found[VALIDATION] = {name: held_out[name] for name in ("packed", "trained_tokens")}
    return found, np.concatenate(validation)


def _encode_span(tokenizer: Tokenizer, data: Data, spool: Spool, span: Span) -> SpanResult:
    """Encodes the samples of a span into the spool's file of the process that it is called in."""
    lines = list(read_span(span))
    read = [(raw, rules := Rules(data), _views(raw, data, rules)) for raw in lines if raw]
    outcomes = iter(encode_samples([view for _, _, views in read for view in views], tokenizer, data))
    encoded, validation, refused = list[Encoded](), list[bool](), list[Refused]()
    counts: dict[str, Counter[str]] = {name: Counter() for name in (PREFIX, VALIDATION, *NOTES)}
    counts[PREFIX]["read"] = len(read)
    for raw, rules, views in read:
        kept = _kept(list(islice(outcomes, len(views))), data)
        if isinstance(kept, BadSample):
            dropped = isinstance(kept, TooLong) and data.too_long == "drop"
            refused.append(Refused(raw, str(kept), dropped))
            counts[PREFIX]["dropped" if dropped else "rejected"] += 1
            counts["reasons"][reason_class(str(kept))] += 1
            continue
        share = data.validation_share
        held_out = share > 0 and is_validation(kept[-1], tokenizer.header, share, data.seed)
        side = counts[VALIDATION if held_out else PREFIX]
        side["packed"] += len(kept)
        side["trained_tokens"] += sum(np.count_nonzero(sample.marked >= 0) for sample in kept)
        counts[PREFIX]["truncated"] += len(kept) < len(views) or any(sample.truncated for sample in kept)
        encoded += kept
        validation += [held_out] * len(kept)
        counts["ignored_keys"].update(rules.keys.counts)
        counts["changes"].update(+rules.changes)
        if len(kept) > 1:
            counts["changes"][ADDED] += len(kept) - 1
    return SpanResult(len(lines), spool.write(encoded), np.array(validation, np.bool_), refused, counts)


def is_validation(sample: Encoded, header: Sequence[int], share: float, seed: int) -> bool:
    """Whether a sample is kept out of training: decided by its first question, not by place or chance.

    Where the same question occurs twice, in any files and under any system prompts, both samples are on the same side:
    otherwise validation loss would partly measure memorised answers. Later questions of a conversation do not count.
    Adding samples changes nothing about those that are there.

    Args:
        sample: its first user turn counts, which is encoded by itself: the same question has the same tokens after
            every system prompt. A conversation without one counts as a whole; one that is trained as several samples
            is where the last of them belongs.
        header: token ids of the assistant's header: earlier versions hashed it with the question.
        share: of the distinct first questions, 0 to 1. A hash decides, so the share of a few samples may differ.
        seed: data.seed; another seed chooses other samples.
    """
    begins = np.flatnonzero(sample.roles >= BEGINS)
    roles, question = sample.roles[begins], sample.marked
    asked = np.flatnonzero(roles == USER)
    if asked.size:  # an answer follows; with data.control_tokens=allow a question may hold start tokens
        answer = asked[0] + int(np.argmax(roles[asked[0] :] == ASSISTANT))
        question = question[begins[answer - 1] : begins[answer]]
    hashed = np.concatenate([question, ~np.asarray(header)]).astype("<i4").tobytes()
    digest = blake2b(hashed, digest_size=BITS // 8, key=seed.to_bytes(8, "little")).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)


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
    title: str, spool: Spool, plan: Plan, writer: PackedWriter, pad_id: int, workers: int, first_row: int = 0
) -> None:
    """Writes a plan's packs as rows from `first_row` on: samples, by their number in the spool, then padding.

    `title` is that of the progress.
    """

    def write_rows(packs: range) -> range:
        marked = np.full((len(packs), writer.seq_length), ~pad_id, np.int32)
        numbers, roles = np.zeros_like(marked), np.zeros(marked.shape, np.uint8)
        for row, pack in enumerate(packs):
            begin, packed = 0, plan[pack]
            for number, (sample, length) in enumerate(zip(packed.tolist(), spool.lengths[packed].tolist()), 1):
                inside = slice(begin, begin := begin + length)
                spool.read(sample, marked[row, inside], roles[row, inside])
                numbers[row, inside] = number
        ids, labels = input_ids_of(marked), labels_of(marked)
        writer.write(first_row + packs.start, input_ids=ids, attention_mask=numbers, labels=labels, roles=roles)
        return packs

    parts = blocks(len(plan), writer.seq_length)
    written = ordered_map(write_rows, parts, min(workers, len(parts)) or 1)
    with progress(title, len(plan)) as advance, contextlib.closing(written):
        for block in written:
            advance(len(block), "")
