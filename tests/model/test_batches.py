"""Order and shape of what training reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_packs
from openpangu_sft.dataset.segments import positions_within, segment_bounds
from openpangu_sft.model.batches import PackedDataset, micro_batches, training_order


def test_segment_bounds_cover_the_pack_and_end_where_the_number_changes() -> None:
    assert segment_bounds(np.array([1, 1, 2, 2, 2, 3, 0, 0], np.int32)) == [(0, 2), (2, 5), (5, 6), (6, 8)]
    assert segment_bounds(np.array([1, 1, 1], np.int32)) == [(0, 3)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 5))
def test_positions_count_from_zero_in_every_segment(lengths: list[int], padding: int) -> None:
    numbers = [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
    positions = positions_within(segment_bounds(np.array(numbers, np.int32)))
    expected = [position for length in [*lengths, padding] for position in range(length)]
    assert positions.tolist() == expected


def test_training_order_is_that_of_mindspeed_llm() -> None:
    # drawn once with its _build_shuffle_idx: RandomState(1234), three shuffles of range(5), one generator
    random = np.random.RandomState(1234)
    epochs = []
    for _ in range(3):
        epoch = np.arange(0, 5, 1)
        random.shuffle(epoch)
        epochs += epoch.tolist()
    assert training_order(5, 12, seed=1234).tolist() == epochs


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_training_order_holds_whole_epochs_and_enough_of_them(packs: int, samples: int, seed: int) -> None:
    order = training_order(packs, samples, seed)
    assert len(order) % packs == 0
    assert samples <= len(order) < samples + packs
    for epoch in order.reshape(-1, packs):
        assert sorted(epoch) == list(range(packs))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_replicas_share_every_global_batch_without_overlap(
    replicas: int, micro_batch: int, accumulated: int, iteration: int
) -> None:
    global_batch = replicas * micro_batch * accumulated
    order = np.arange(10 * global_batch)
    dealt = [micro_batches(order, iteration, global_batch, micro_batch, rank, replicas) for rank in range(replicas)]
    assert all(len(batches) == accumulated for batches in dealt)
    # step by step, rank by rank: Megatron's order
    seen = [pack for step in range(accumulated) for batches in dealt for pack in batches[step]]
    assert seen == order[(iteration - 1) * global_batch : iteration * global_batch].tolist()


def test_a_batch_holds_what_was_written(tmp_path: pytest.TempPathFactory) -> None:
    first, second = np.array([1, 5, 6], np.int32), np.array([1, 7], np.int32)
    short = (second, np.array([-100, 7], np.int32))
    write_packs(tmp_path, [[(first, np.array([-100, -100, 6], np.int32)), short], [short]], 8, pad_id=0)
    dataset = PackedDataset(tmp_path, 8)
    assert len(dataset) == 2
    batch = dataset.batch(np.array([1, 0]), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 7, 0, 0, 0, 0, 0, 0], [1, 5, 6, 1, 7, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 7] + [-100] * 6, [-100, -100, 6, -100, 7, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.segments == [[(0, 2), (2, 8)], [(0, 3), (3, 5), (5, 8)]]
