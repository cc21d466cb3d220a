"""Packs for training, in the order of MindSpeed-LLM 1.0.0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openpangu_sft.dataset.index_file import Rows
from openpangu_sft.dataset.segments import positions_within, segment_bounds
from openpangu_sft.tokenizer.tokenizer import IGNORED

_Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """A micro batch of packs.

    Args:
        input_ids, labels, position_ids: int64 [packs, seq_length]. Labels are -100 where a token is not a target,
            positions count from 0 in every segment.
        rows: int64, ascending: trained positions of the packs, one pack after another, each before its target.
        segments: for each pack the (begin, end) of its segments and of its padding, in order, without gaps.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    segments: list[list[tuple[int, int]]]

    @staticmethod
    def of(ids: _Ids, labels: _Ids, segments: list[list[tuple[int, int]]], device: torch.device) -> Batch:
        """A micro batch on a device; `ids` and `labels` are [packs, seq_length]."""
        rows = np.flatnonzero(np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED) != IGNORED)
        positions = np.stack([positions_within(bounds) for bounds in segments])
        three = torch.from_numpy(np.stack([ids, labels, positions]).astype(np.int64)).to(device)
        return Batch(three[0], three[1], three[2], torch.from_numpy(rows).to(device), segments)

    @property
    def targets(self) -> torch.Tensor:
        """What each trained position predicts: int64 [rows]."""
        return self.labels.flatten()[self.rows + 1]


class PackedDataset(Rows):
    """A dataset of stage merge; with the prefix VALIDATION its validation split."""

    def trained_tokens(self, packs: npt.NDArray[np.int64]) -> int:
        """Number of targets in packs."""
        return int((self.labels[packs, 1:] != IGNORED).sum())

    def batch(self, packs: npt.NDArray[np.int64], device: torch.device) -> Batch:
        """Collects packs into a micro batch on a device."""
        bounds = [segment_bounds(self.segments[pack]) for pack in packs]
        return Batch.of(self.input_ids[packs], self.labels[packs], bounds, device)


def training_order(packs: int, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """At least `samples` indices of packs: whole epochs, shuffled one after another by one generator.

    The same numbers as MindSpeed-LLM's _build_index_mappings (decoder_packed_mtf_dataset.py), so that both engines see
    the same data in the same order.
    """
    random = np.random.RandomState(seed)
    return np.concatenate([random.permutation(packs) for _ in range(-(-samples // packs))])


def micro_batches(
    order: npt.NDArray[np.int64], iteration: int, global_batch: int, micro_batch: int, rank: int, replicas: int
) -> list[npt.NDArray[np.int64]]:
    """The micro batches of one of the `replicas` in an iteration, as by Megatron's MegatronPretrainingSampler.

    Args:
        order: from `training_order`.
        iteration: counted from 1.
    """
    first = (iteration - 1) * global_batch
    step = micro_batch * replicas
    begins = range(first + rank * micro_batch, first + global_batch, step)
    return [order[begin : begin + micro_batch] for begin in begins]
