"""The numbers of a preview: read in blocks of rows, some bytes per sample in memory; then in words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.dataset.index_file import ROLES, UNKNOWN, VALIDATION, Ids, Rows, count_turns
from openpangu_sft.dataset.segments import blocks, segment_runs
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.util.console import progress
from openpangu_sft.util.errors import printable

BARS = 16  # most bars in a histogram, each 1, 2, 5, 10, 20… wide
QUANTILES = (0, 0.5, 1)  # the smallest value, the median and the largest value


@dataclass(frozen=True)
class Statistics:
    seq_length: int
    trained_tokens: int
    lengths: Ids  # int32 [samples], tokens of each
    samples: Ids  # int32 [packs], samples in each
    fill: Ids  # int32 [packs], tokens of each without its padding
    turns: dict[str, int]  # by role; empty where roles are unknown

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.fill.sum(dtype=np.int64))


class Figure(NamedTuple):
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each range, or have a role: counts by label."""

    title: str
    across: str  # label of the axis
    upwards: str  # likewise
    bars: dict[str, int]
    ticks: tuple[str, ...] = ()  # at the left end, the middle and the right end of the axis across
    note: str = ""

    @property
    def highest(self) -> int:
        return max(self.bars.values())


class Figures(NamedTuple):
    """All numbers: single ones, the two histograms, turns by role."""

    single: list[Figure]
    lengths: Histogram
    fill: Histogram
    roles: Histogram


def measure(rows: Rows) -> Statistics:
    """Reads a whole dataset once."""
    seq_length = rows.input_ids.shape[1]
    found: list[list[Ids]] = []
    turns, trained = np.zeros(len(ROLES), np.int64), 0
    with progress("reading the dataset (packs)", len(rows)) as advance:
        for numbers in blocks(len(rows), seq_length):
            block = slice(numbers.start, numbers.stop)
            segments = np.asarray(rows.segments[block])
            row, begins, ends = segment_runs(segments)
            counts = (ends - begins, np.bincount(row, minlength=len(segments)), np.count_nonzero(segments, axis=1))
            found.append([count.astype(np.int32) for count in counts])
            trained += int(np.count_nonzero(rows.labels[block] != IGNORED))
            if rows.roles is not None:
                turns += count_turns(np.asarray(rows.roles[block]))
            advance(len(segments), "")
    counted = dict(zip(ROLES, turns.tolist())) if rows.roles is not None else {}
    lengths, samples, fill = map(np.concatenate, zip(*found))
    return Statistics(seq_length, trained, lengths, samples, fill, counted)


def figures_of(statistics: Statistics, manifest: Manifest) -> Figures:
    """Numbers in words: the dataset's own, and what its manifest says was read and rejected."""
    samples, packs, seq_length = len(statistics.lengths), len(statistics.fill), statistics.seq_length
    tokens, trained, room, counts = statistics.tokens, statistics.trained_tokens, packs * seq_length, manifest.counts
    read = ["read", "rejected", *(name for name in ("dropped", "truncated") if counts[name])]
    single = [
        Figure("samples", f"{samples:,}", ", ".join(f"{counts[name]:,} {name}" for name in read)),
        Figure("packs", f"{packs:,}", f"{seq_length:,} tokens each"),
        Figure("tokens", f"{tokens:,}", f"and {room - tokens:,} padding"),
        Figure("trained tokens", f"{trained:,}", f"{trained / tokens:.1%} of the tokens"),
        Figure("packing efficiency", f"{tokens / room:.1%}", f"{samples / packs:.1f} samples per pack"),
    ]
    if validation := counts.get(VALIDATION):
        note = f"samples kept out of training: {validation['packs']:,} packs, {validation['tokens']:,} tokens"
        single.append(Figure("validation", f"{validation['packed']:,}", note))
    if reasons := counts.get("reasons"):
        most_first = sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
        note = ", ".join(f"{printable(reason)}: {number:,}" for reason, number in most_first)
        single.append(Figure("reasons", f"{sum(reasons.values()):,}", note))
    roles = {role: number for role, number in statistics.turns.items() if number}
    turns = Histogram("Turns by role", "role", "turns", roles, note="" if statistics.turns else UNKNOWN)
    return Figures(single, _lengths(statistics.lengths), _fill(statistics.fill, seq_length), turns)


def _lengths(lengths: Ids) -> Histogram:
    shortest, median, longest = np.quantile(lengths, QUANTILES, method="lower").tolist()
    widths = (int(digit * 10**power) for power in count() for digit in (1, 2, 5))
    width = next(width for width in widths if longest <= BARS * width)
    edges = list(range(0, longest + width, width))
    labels = [f"{edge + 1:,}–{edge + width:,}" if width > 1 else f"{edge + 1:,}" for edge in edges[:-1]]
    note = f"shortest {shortest:,}, median {median:,}, mean {lengths.mean():,.1f}, longest {longest:,}"
    ticks = ("0", f"{edges[-1] / 2:,.1f}".replace(".0", ""), f"{edges[-1]:,}")
    return Histogram("Sample length", "tokens in a sample", "samples", _bars(lengths, edges, labels), ticks, note)


def _fill(fill: Ids, whole: int) -> Histogram:
    labels = [f"{tenth}–{tenth + 10}%" for tenth in range(0, 100, 10)]
    bars = _bars(fill, [round(whole * tenth / 10) for tenth in range(11)], labels)
    least, middle, most = np.quantile(fill, QUANTILES, method="lower") / whole
    note = f"emptiest {least:.1%}, median {middle:.1%}, fullest {most:.1%}"
    across, ticks = "share of a pack that is not padding", ("0%", "50%", "100%")
    return Histogram("Packs by efficiency", across, "packs", bars, ticks, note)


def _bars(values: Ids, edges: list[int], labels: list[str]) -> dict[str, int]:
    """How many whole numbers lie above each edge and not above the next, by label."""
    counts, _ = np.histogram(values, np.array(edges) + 1)
    return dict(zip(labels, counts.tolist()))
