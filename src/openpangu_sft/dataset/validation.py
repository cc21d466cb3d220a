"""The validation split: which samples are kept out of training, decided by the first question, not by place.

Where the same question occurs twice, in any files and under any system prompts, both samples are on the same side:
otherwise validation loss would partly measure memorised answers. Later questions of a conversation do not count.
Adding samples changes nothing about those that are there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from openpangu_sft.dataset.encode import Marked

BITS = 64


def is_validation(marked: Marked, start_id: int, share: float, seed: int) -> bool:
    """Whether a sample belongs to the validation split.

    Args:
        marked: int32 [tokens]. The first user turn counts, which is encoded by itself: the same question has the same
            tokens after every system prompt.
        start_id: the token that begins a turn.
        share: of the distinct first questions, 0 to 1. A hash decides, so the share of a few samples may differ.
        seed: data.seed; another seed chooses other samples.
    """
    answer = int(np.argmax(marked >= 0))
    question, _ = np.flatnonzero(marked[:answer] == ~start_id)[-2:]  # the other is the assistant's header
    key = seed.to_bytes(8, "little")
    digest = blake2b(marked[question:answer].astype("<i4").tobytes(), digest_size=BITS // 8, key=key).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)
