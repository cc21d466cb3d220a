"""Labels of each position, shifted before context parallelism slices a row."""

from __future__ import annotations

import torch

from openpangu_sft.tokenizer.tokenizer import IGNORED


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Labels, int64 [packs, seq_length], shifted left by one: a position gets the next token's, the last one -100."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
