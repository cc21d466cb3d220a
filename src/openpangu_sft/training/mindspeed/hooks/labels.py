"""Labels of each position, shifted before context parallelism slices a row."""

from __future__ import annotations

import torch

from openpangu_sft.tokenizer.tokenizer import IGNORED


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Shifts labels left by one: each position gets the label of the next token, the last one -100 (ignored).

    Args:
        labels: int64 [packs, seq_length]; -100 where a token is not a target. So is the result.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
