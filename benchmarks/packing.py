"""Speed and efficiency of pack planning, compared with the published greedy best fit."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from typing import NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.packing import plan_packs

SEQ_LENGTHS = (4096, 32768)

Lengths = npt.NDArray[np.int64]


class Packed(NamedTuple):
    """Result of planning: seconds, packing efficiency, number of packs, and that of best fit."""

    seconds: float
    full: float
    packs: int
    best_fit: int


def distributions(samples: int, seq_length: int, seed: int, data: Optional[Lengths] = None) -> dict[str, Lengths]:
    """Sample lengths by distribution, none longer than a pack; `data` has lengths to resample."""
    random = np.random.default_rng(seed)
    short = random.random(samples) < 0.7
    long_ones = random.normal(0.6 * seq_length, 0.05 * seq_length, samples)  # two of them never share a pack
    drawn = {
        "lognormal": random.lognormal(np.log(400), 1, samples),  # median 400, as in chats
        "uniform": random.integers(1, seq_length, samples, endpoint=True),
        "bimodal": np.where(short, random.normal(250, 60, samples), long_ones),
    }
    if data is not None:
        drawn["the data's"] = random.choice(data, samples)
    found: dict[str, Lengths] = {}
    for name, values in drawn.items():
        whole = np.maximum(values, 1).astype(np.int64)
        found[name] = np.resize(whole[whole <= seq_length], samples)  # longer ones cannot be packed: repeat the others
    return found


def measure_packing(lengths: Lengths, seq_length: int, seed: int) -> Packed:
    """Plans packs in this process, checks the plan, and computes the packs of best fit."""
    began = time.perf_counter()
    plan = plan_packs(lengths, seq_length, seed)
    seconds = time.perf_counter() - began
    packs = len(plan.bounds) - 1
    assert np.array_equal(np.bincount(plan.order, minlength=len(lengths)), np.ones(len(lengths))), (
        "not each sample exactly once"
    )
    assert np.add.reduceat(lengths[plan.order], plan.bounds[:-1]).max() <= seq_length, "a pack is too long"
    return Packed(seconds, lengths.sum() / (packs * seq_length), packs, best_fit_packs(lengths, seq_length))


def best_fit_packs(lengths: Lengths, seq_length: int) -> int:
    """Number of packs of greedy best fit: each takes the longest sample that still fits, until none does.

    Exact without iterating over samples: samples of equal length are interchangeable, so counts per length suffice. A
    pack repeats while enough samples of each of its lengths are left, because the longest that fits stays the same.
    """
    counted = np.bincount(lengths)
    available: list[int] = np.flatnonzero(counted).tolist()
    left = {length: int(counted[length]) for length in available}
    packs = 0
    while available:
        room, pack = seq_length, []
        place = bisect_right(available, room)
        while place:
            length = available[place - 1]
            count = min(left[length], room // length)
            pack.append((length, count))
            room -= count * length
            place = min(place - 1, bisect_right(available, room))
        times = min(left[length] // count for length, count in pack)
        packs += times
        for length, count in pack:
            left[length] -= times * count
            if not left[length]:
                del available[bisect_left(available, length)]
    return packs
