"""The numbers of a preview, in the words and order of terminal and page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.dataset.roles import UNKNOWN
from openpangu_sft.dataset.statistics import Distribution, Statistics
from openpangu_sft.util.errors import printable

BARS = 16  # most bars in a histogram


class Figure(NamedTuple):
    """One number, and what explains it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """How many values lie in a range, or have a role."""

    label: str
    count: int


@dataclass(frozen=True)
class Histogram:
    """Bars and their labels."""

    title: str
    across: str  # label of the axis
    upwards: str  # likewise
    bars: list[Bar]
    ticks: tuple[str, ...] = ()  # at the left end, the middle and the right end of the axis across
    note: str = ""

    @property
    def highest(self) -> int:
        return max(bar.count for bar in self.bars)


class Figures(NamedTuple):
    """All numbers: single ones, the two histograms, turns by role."""

    single: list[Figure]
    lengths: Histogram
    fill: Histogram
    roles: Histogram


def figures_of(statistics: Statistics, manifest: Manifest) -> Figures:
    """Numbers in words: the dataset's own, and what its manifest says was read and rejected."""
    samples, packs, room = statistics.samples, statistics.packs, statistics.packs * statistics.seq_length
    tokens, trained = statistics.tokens, statistics.trained_tokens
    single = [
        Figure("samples", f"{samples:,}", _reading(manifest.counts)),
        Figure("packs", f"{packs:,}", f"{statistics.seq_length:,} tokens each"),
        Figure("tokens", f"{tokens:,}", f"and {room - tokens:,} padding"),
        Figure("trained tokens", f"{trained:,}", f"{trained / tokens:.1%} of the tokens"),
        Figure("packing efficiency", f"{tokens / room:.1%}", f"{samples / packs:.1f} samples per pack"),
    ]
    if validation := manifest.counts.get(VALIDATION):
        note = f"samples kept out of training: {validation['packs']:,} packs, {validation['tokens']:,} tokens"
        single.append(Figure("validation", f"{validation['packed']:,}", note))
    if reasons := manifest.counts.get("reasons"):
        single.append(Figure("reasons", f"{sum(reasons.values()):,}", _listed(reasons)))
    return Figures(single, _lengths(statistics.lengths), _fill(statistics), _roles(statistics.turns))


def _reading(counts: dict[str, Any]) -> str:
    """What became of the samples that were read."""
    names = ["read", "rejected", *(name for name in ("dropped", "truncated") if counts[name])]
    return ", ".join(f"{counts[name]:,} {name}" for name in names)


def _listed(reasons: dict[str, int]) -> str:
    most_first = sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{printable(reason)}: {count:,}" for reason, count in most_first)


def _lengths(lengths: Distribution) -> Histogram:
    shortest, median, longest = lengths.quantiles
    width = _round_width(longest)
    edges = list(range(0, longest + width, width))
    labels = [f"{edge + 1:,}–{edge + width:,}" if width > 1 else f"{edge + 1:,}" for edge in edges]
    bars = list(map(Bar, labels, lengths.between(edges)))
    mean = lengths.sum / lengths.total
    note = f"shortest {shortest:,}, median {median:,}, mean {mean:,.1f}, longest {longest:,}"
    ticks = ("0", f"{edges[-1] / 2:,.1f}".replace(".0", ""), f"{edges[-1]:,}")
    return Histogram("Sample length", "tokens in a sample", "samples", bars, ticks, note)


def _round_width(span: int) -> int:
    """The smallest of 1, 2, 5, 10, 20… that gives at most `BARS` bars."""
    widths = (int(digit * 10**power) for power in count() for digit in (1, 2, 5))
    return next(width for width in widths if span <= BARS * width)


def _fill(statistics: Statistics) -> Histogram:
    fill, whole = statistics.fill, statistics.seq_length
    edges = [round(whole * tenth / 10) for tenth in range(11)]
    bars = [Bar(f"{10 * tenth}–{10 * tenth + 10}%", packs) for tenth, packs in enumerate(fill.between(edges))]
    least, middle, most = (value / whole for value in fill.quantiles)
    note = f"emptiest {least:.1%}, median {middle:.1%}, fullest {most:.1%}"
    across, ticks = "share of a pack that is not padding", ("0%", "50%", "100%")
    return Histogram("Packing efficiency", across, "packs", bars, ticks, note)


def _roles(turns: dict[str, int]) -> Histogram:
    bars = [Bar(role, count) for role, count in turns.items() if count]
    return Histogram("Turns by role", "role", "turns", bars, note="" if turns else UNKNOWN)
