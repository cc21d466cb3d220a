"""Which samples are kept out of training, for `make evaluate`: by the first question, not by place.

Where the same question comes twice, in whatever files and under whatever system prompts, both are held out or none is:
otherwise the loss on what was held out would partly be that of answers learnt by heart. Later questions of a
conversation do not count. More samples change nothing about those that are there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from openpangu_sft.dataset.encode import Marked

BITS = 64


def is_held_out(marked: Marked, start_id: int, share: float, seed: int) -> bool:
    """Whether a sample belongs to the held-out ones.

    Args:
        marked: int32 [tokens], the sample's. Its first user turn counts, which is encoded by itself: the same question
            has the same tokens behind every system prompt.
        start_id: the token that begins a turn.
        share: of the distinct first questions that are held out, 0 to 1. A hash decides, so of a few samples it may be
            another share.
        seed: data.seed; another one holds out others.
    """
    answer = int(np.argmax(marked >= 0))
    question, _ = np.flatnonzero(marked[:answer] == ~start_id)[-2:]  # the other is the assistant's header
    key = seed.to_bytes(8, "little")
    digest = blake2b(marked[question:answer].astype("<i4").tobytes(), digest_size=BITS // 8, key=key).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)
