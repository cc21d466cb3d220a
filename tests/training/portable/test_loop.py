"""Failures of the portable engine's training."""

from __future__ import annotations

import torch

from openpangu_sft.training.portable.loop import _failures_named
from refusals import refusal_of


def test_a_full_device_is_one_line_with_what_to_do() -> None:
    def fail() -> None:
        with _failures_named([]):
            raise torch.cuda.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacty of 79.15 GiB of which 3.25 "
                "MiB is free. If reserved but unallocated memory is large try setting max_split_size_mb"
            )

    assert refusal_of(fail).startswith(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacty of 79.15 GiB of which 3.25 MiB is "
        "free. -> recompute more (train.recompute)"
    )
