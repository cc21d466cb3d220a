"""Which samples share a pack: greedy best fit over lengths, deterministic, shuffled by seed.

Pure planning: knows lengths only. A pack is filled with the longest sample that still fits, again and again, which is
what MindSpeed-LLM's greedy_knapsack does (after LLaMA-Factory), so packs are as full as there. Which of the samples of
one length goes where, their order in the pack and the order of the packs are drawn from the seed, so that no pack holds
one topic only and none is sorted by length.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def plan_packs(lengths: Sequence[int], seq_length: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Spreads samples over packs.

    Args:
        lengths: tokens of each sample, 1 to seq_length.
        seq_length: tokens of a pack.
        seed: of all shuffling.

    Returns:
        For each pack the indices of its samples, in their order in the pack. Every sample is in exactly one pack.

    Raises:
        ValueError: a length is outside 1 to seq_length.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size == 0:
        return []
    if sizes.min() < 1 or sizes.max() > seq_length:
        raise ValueError(f"lengths must lie in 1..{seq_length}, found {sizes.min()}..{sizes.max()}")
    random = np.random.RandomState(seed)
    shuffled = random.permutation(sizes.size)
    # samples of one length lie together, in random order; each length's group is used up from its front
    by_length = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    distinct, first = np.unique(sizes[by_length], return_index=True)
    left = np.diff(np.append(first, sizes.size)).tolist()
    front: list[int] = first.tolist()
    available: list[int] = distinct.tolist()  # lengths that have samples left, ascending
    group: list[int] = list(range(len(available)))  # their positions in `left` and `front`

    packs: list[npt.NDArray[np.int64]] = []
    while available:
        room, chosen = seq_length, []
        while (position := bisect.bisect_right(available, room) - 1) >= 0:
            length, which = available[position], group[position]
            count = min(left[which], room // length)
            chosen.append(by_length[front[which] : front[which] + count])
            front[which] += count
            left[which] -= count
            room -= length * count
            if not left[which]:
                del available[position], group[position]
        packs.append(random.permutation(np.concatenate(chosen)))
    order = random.permutation(len(packs))
    return [packs[number] for number in order]
