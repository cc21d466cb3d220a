"""Which samples share a pack: deterministic, as full as best fit makes them, and mixed by a seed.

Pure planning: knows lengths only. MindSpeed-LLM's greedy_knapsack (after LLaMA-Factory) fills each pack with the
longest sample that still fits, repeatedly. Its packs are full, but the first ones hold only the longest samples and
the last ones the shortest. Here a pack also begins with the longest sample left; then samples are drawn by the seed;
best fit fills the rest. Where that takes more packs than the greedy way, fewer are drawn, and finally none, which is
the greedy way itself: a plan never takes more packs.
"""

from __future__ import annotations

import bisect
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]  # numbers of samples and packs: half the memory of numpy's default, and enough for 2^31

UNDRAWN = 0.03  # share of the tokens left to best fit alone, at the end, when there is little choice


@dataclass(frozen=True)
class Plan:
    order: Ints  # int32 [samples]; every sample once, pack after pack, in their order in the pack
    bounds: npt.NDArray[np.int64]  # [packs + 1]; pack p holds `order[bounds[p] : bounds[p + 1]]`

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> Ints:
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]


def plan_packs(lengths: npt.ArrayLike, seq_length: int, seed: int) -> Plan:
    """Spreads samples, of 1 to seq_length tokens each, over packs of seq_length; the seed is that of all shuffling."""
    sizes = np.asarray(lengths, np.int32)
    if sizes.size == 0:
        return Plan(np.empty(0, np.int32), np.zeros(1, np.int64))
    random = np.random.RandomState(seed)  # the one generator whose numbers never change with numpy's version
    shuffled = random.permutation(np.arange(sizes.size, dtype=np.int32))
    stock = BinPacker(sizes[shuffled], seq_length)
    most = greedy_packs(sizes, seq_length)
    mean = int(sizes.mean())
    for reserve in (mean // 2, 2 * mean, seq_length):  # with the last one nothing fits beside it, so nothing is drawn
        places, counts = stock.pack(reserve)
        if len(counts) <= most:
            break
    return _shuffled(shuffled[places], counts, random)


def greedy_packs(lengths: npt.NDArray[np.int32], seq_length: int) -> int:
    """How many packs the greedy way takes. Equal packs are counted, not built, so it is quick."""
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)
    sizes, left = distinct.tolist(), counts[distinct].tolist()
    packs = 0
    while sizes:
        room, place, chosen = seq_length, len(sizes), []
        while (place := bisect.bisect_right(sizes, room, 0, place) - 1) >= 0:
            count = min(left[place], room // sizes[place])
            chosen.append((place, count))
            room -= count * sizes[place]
        times = min(left[place] // count for place, count in chosen)
        packs += times
        for place, count in chosen:  # longest first, so that deleting moves none that follows
            left[place] -= times * count
            if not left[place]:
                del sizes[place], left[place]
    return packs


class BinPacker:
    """Samples in a drawn order, in which `sizes` holds their tokens (int32 [samples]), and by length.

    Those of one length leave from both ends of their group: drawn and longest ones from the front, gap fillers from
    the back.
    """

    def __init__(self, sizes: npt.NDArray[np.int32], seq_length: int) -> None:
        self._seq_length, self._tokens = seq_length, int(sizes.sum())
        occurring = np.bincount(sizes, minlength=seq_length + 1)
        distinct = np.flatnonzero(occurring)
        counts = occurring[distinct]
        first = np.cumsum(counts) - counts
        fitting = np.cumsum(occurring > 0)
        self._by_length = np.argsort(sizes, kind="stable").astype(np.int32)
        place_in_group = np.empty(sizes.size, np.int32)
        before = np.repeat(first.astype(np.int32), counts)
        place_in_group[self._by_length] = np.arange(sizes.size, dtype=np.int32) - before
        # arrays and not lists: ten million Python integers would take most of a gigabyte
        self._group = array("i", (fitting - 1).astype(np.int32)[sizes].tobytes())
        self._place = array("i", place_in_group.tobytes())
        self._sizes, self._first, self._counts = distinct.tolist(), first.tolist(), counts.tolist()
        # by room: how many of the lengths fit, so that the longest is the last of them
        self._fitting = fitting.tolist()

    def pack(self, reserve: int) -> tuple[Ints, Ints]:
        """The samples' places in the drawn order, pack after pack, and the number of samples in each pack.

        A drawn sample must leave room for `reserve` tokens to best fit.
        """
        sizes, first, groups, places = self._sizes, self._first, self._group, self._place
        front, back = [0] * len(sizes), list(self._counts)
        # nearest[g] leads to the next group from g - 1 downwards that has samples left; 0 says that none has
        nearest = list(range(len(sizes) + 1))
        dealt, ends = array("i"), array("i")
        drawn, samples, tokens = 0, len(groups), self._tokens
        undrawn = UNDRAWN * tokens
        while tokens:
            longest = _find(nearest, len(sizes)) - 1
            dealt.append(first[longest] + front[longest])
            front[longest] += 1
            if front[longest] == back[longest]:
                nearest[longest + 1] = longest
            room = self._seq_length - sizes[longest]
            if tokens > undrawn:
                while drawn < samples:
                    group = groups[drawn]
                    if front[group] <= places[drawn] < back[group]:  # else it is in a pack already
                        if sizes[group] + reserve > room:
                            break
                        dealt.append(first[group] + front[group])
                        front[group] += 1
                        if front[group] == back[group]:
                            nearest[group + 1] = group
                        room -= sizes[group]
                    drawn += 1
            while room and (fitting := _find(nearest, self._fitting[room])):
                group = fitting - 1
                back[group] -= 1
                dealt.append(first[group] + back[group])
                if front[group] == back[group]:
                    nearest[fitting] = group
                room -= sizes[group]
            tokens -= self._seq_length - room
            ends.append(len(dealt))
        counts = np.diff(np.frombuffer(ends, np.int32), prepend=np.int32(0))
        return self._by_length[np.frombuffer(dealt, np.int32)], counts


def _find(nearest: list[int], start: int) -> int:
    """Follows a chain to its end and shortens it (union-find by path halving)."""
    while (following := nearest[start]) != start:
        nearest[start] = nearest[following]
        start = nearest[start]
    return start


def _shuffled(samples: Ints, counts: Ints, random: np.random.RandomState) -> Plan:
    new_place = random.permutation(np.arange(len(counts), dtype=np.int32))
    mixed = random.permutation(np.arange(len(samples), dtype=np.int32))
    pack_of = np.repeat(new_place, counts)[mixed]
    order = samples[mixed][np.argsort(pack_of, kind="stable")]
    sizes = np.empty_like(counts)
    sizes[new_place] = counts
    return Plan(order, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
