"""Which samples share a pack: all of them, once each, as full as best fit makes them, and shuffled."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpangu_sft.dataset.packing import Plan, greedy_packs, plan_packs


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The plain greedy knapsack: into each pack the longest sample that still fits, until none does."""
    left, packs = sorted(lengths), []
    while left:
        pack: list[int] = []
        while (place := bisect.bisect_right(left, room - sum(pack)) - 1) >= 0:
            pack.append(left.pop(place))
        packs.append(pack)
    return packs


def plain(plan: Plan) -> list[list[int]]:
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(plan.order)
    return [pack.tolist() for pack in plan]


def check(lengths: list[int], seq_length: int, seed: int) -> None:
    packs = plain(plan_packs(lengths, seq_length, seed))
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(pack for pack in packs)
    assert all(sum(lengths[number] for number in pack) <= seq_length for pack in packs)
    greedy = len(best_fit(lengths, seq_length))
    assert len(packs) <= greedy
    assert greedy_packs(np.array(lengths, np.int32), seq_length) == greedy
    assert packs == plain(plan_packs(np.array(lengths), seq_length, seed))


@given(st.data(), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_any_lengths(data: st.DataObject, seq_length: int, seed: int) -> None:
    length = data.draw(st.sampled_from([st.integers(1, seq_length), st.integers(1, max(seq_length // 4, 1))]))
    check(data.draw(st.lists(length, max_size=60)), seq_length, seed)


DRAWS = {
    "heavy tail": lambda random: 1 + random.pareto(1.1, 3000) * 20,
    "lognormal": lambda random: random.lognormal(5, 1.2, 3000),
    "all equal": lambda random: np.full(1000, 700),
    "all full": lambda random: np.full(500, 2048),
    "all tiny": lambda random: np.ones(5000),
    "three fit as a rule": lambda random: random.uniform(500, 1000, 3000),
    "none below a tenth": lambda random: 200 + random.lognormal(5, 1, 3000),
    "two fit as a rule": lambda random: np.where(random.rand(3000) < 0.5, 1250, 750) + random.normal(0, 75, 3000),
    "two sizes": lambda random: random.choice([1025, 1023], 1000),
    "uniform": lambda random: random.uniform(1, 2048, 3000),
}


@pytest.mark.parametrize("name", DRAWS)
def test_distributions(name: str) -> None:
    lengths = np.clip(DRAWS[name](np.random.RandomState(5)), 1, 2048).astype(int).tolist()
    check(lengths, 2048, 1234)


def test_packs_of_real_sizes_are_nearly_full() -> None:
    lengths = np.clip(np.random.RandomState(3).lognormal(6, 1, 20000), 1, 32768).astype(int)
    assert lengths.sum() / (len(plan_packs(lengths, 32768, 0)) * 32768) > 0.99


def test_one_seed_gives_one_plan_and_another_seed_another() -> None:
    lengths = np.random.RandomState(1).randint(1, 200, 500)
    plans = [plain(plan_packs(lengths, 512, seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert sorted(map(sorted, plans[0])) != sorted(map(sorted, plans[2]))  # other company, not only another order


def test_samples_in_a_pack_are_not_sorted_by_length_or_number() -> None:
    lengths = np.random.RandomState(1).randint(1, 100, 20000)
    packs = [pack for pack in plan_packs(lengths, 512, 7) if len(pack) >= 4]
    assert len(packs) > 1000
    for values in (lambda pack: lengths[pack], lambda pack: pack):
        steps = np.concatenate([np.diff(values(pack)) for pack in packs])
        assert 0.45 < np.mean(steps[steps != 0] > 0) < 0.55


def test_packs_are_not_sorted_by_their_samples() -> None:
    """Best fit plans the longest first; training must not see them in that order."""
    lengths = np.random.RandomState(1).randint(1, 512, 5000)
    longest = [lengths[pack].max() for pack in plan_packs(lengths, 512, 7)]
    rising = np.mean(np.diff(longest) > 0)
    assert 0.3 < rising < 0.7
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.1


def test_every_pack_has_long_samples_and_short_ones() -> None:
    """The greedy way puts the longest together and the shortest together, and training sees one kind at a time."""
    lengths = np.clip(np.random.RandomState(1).lognormal(4, 1, 30000), 1, 4096).astype(int)
    typical = lengths.mean()
    ours = np.array([lengths[pack].mean() for pack in plan_packs(lengths, 4096, 7)])
    greedy = np.array([np.mean(pack) for pack in best_fit(lengths.tolist(), 4096)])
    between = (ours > typical / 2) & (ours < typical * 2)
    assert between.mean() > 0.95
    assert ((greedy > typical / 2) & (greedy < typical * 2)).mean() < 0.6  # what this guards against


def test_samples_of_one_length_are_dealt_at_random() -> None:
    packs = plan_packs([10] * 1000, 100, 3)
    assert sum(np.ptp(pack) > 500 for pack in packs) > 90  # else neighbours in the file would share a pack


def test_no_samples_no_packs() -> None:
    assert plain(plan_packs([], 8, 0)) == []
