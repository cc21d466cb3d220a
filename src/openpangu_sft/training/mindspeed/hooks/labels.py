"""What each position has to predict, before context parallelism cuts a row into slices."""

from __future__ import annotations

import torch

from openpangu_sft.tokenizer.tokenizer import IGNORED


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Shifts labels left by one: each position gets the label of the token behind it, the last one none.

    Args:
        labels: int64 [packs, seq_length]; -100 where a token is not a target.

    Returns:
        int64 of the same shape.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
