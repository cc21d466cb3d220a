"""Resets attention in MindSpeed-LLM where the segment number in the packed attention_mask file changes.

Upstream resets attention where a position is 0, so positions that count from 0 in every segment are enough. RoPE does
not use them (mindspeed_llm/core/models/common/embeddings/rotary_pos_embedding.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.find import find_dataset
from openpangu_sft.dataset.index_file import FIELDS, read_values
from openpangu_sft.dataset.row_rules import PackedRules
from openpangu_sft.dataset.segments import misnumbered, positions_within, segment_bounds
from openpangu_sft.training.mindspeed.hooks import one_line
from openpangu_sft.util.errors import UserError

CHECKED_ROWS = 1000  # rows checked before training, spread over a larger dataset; takes less than a second

RULES = ("unnumbered", "order", "gap")  # the rules of PackedRules for segment numbers

REMEDY = "make it again: make preprocess, or preprocess_data.py with --handler-name PanguInstructionHandler"


def positions(numbers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The position of every token in its segment, int64 [seq_length]; padding is a segment of its own.

    Raises ValueError where numbers, int [seq_length], are not 1, 2, 3… and 0 for padding: not all rows were checked.
    """
    wrong = np.logical_or(*misnumbered(numbers))
    wrong[0] = numbers[0] != 1
    if wrong.any():
        column = int(np.argmax(wrong))
        found = f"{numbers[column]} at column {column}" + (f" after {numbers[column - 1]}" if column else "")
        raise ValueError(f"a row's attention_mask has no segment numbers 1, 2, 3… and 0: {found} -> {REMEDY}")
    return positions_within(segment_bounds(numbers))


def require_segments(data_prefix: str) -> None:
    """Ends this process with one line where a dataset (--data-path) has no segment numbers, before training begins.

    One process of each node checks; the others wait at upstream's next barrier and end with it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with one_line():
            check_segments(data_prefix)


def check_segments(data_prefix: str) -> None:
    """Checks rows spread over a dataset, or all rows of a small one.

    Raises `UserError` where attention_mask holds token ids, or 1 everywhere, as other software writes it.
    """
    place = find_dataset(Path(data_prefix))
    indexes = [place.index(name) for name in FIELDS]
    lengths = indexes[0].lengths
    rules = PackedRules(np.iinfo(np.int32).max, trusted=place.manifest is not None)
    for row in np.unique(np.linspace(0, len(lengths) - 1, min(CHECKED_ROWS, len(lengths)), dtype=np.int64)).tolist():
        rules.add(row, *(read_values(index, row, row + 1) for index in indexes))
    rules.finish()
    for rule in RULES:
        if rules.breaches[rule].rows:
            what = f"has no segment numbers, so attention would not cover whole samples: {rules.breaches[rule].first}"
            raise UserError(what, where=place.file("attention_mask", "bin"), remedy=REMEDY)
