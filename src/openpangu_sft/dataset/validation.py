"""The validation split: which samples are kept out of training, decided by the first question, not by place.

Where the same question occurs twice, in any files and under any system prompts, both samples are on the same side:
otherwise validation loss would partly measure memorised answers. Later questions of a conversation do not count.
Adding samples changes nothing about those that are there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from openpangu_sft.dataset.encode import Encoded
from openpangu_sft.dataset.roles import BEGINS, ROLES

BITS = 64


def is_validation(sample: Encoded, share: float, seed: int) -> bool:
    """Whether a sample belongs to the validation split.

    Args:
        sample: its first user turn counts, which is encoded by itself: the same question has the same tokens after
            every system prompt. A conversation without one counts as a whole; one that is trained as several samples
            is where the last of them belongs.
        share: of the distinct first questions, 0 to 1. A hash decides, so the share of a few samples may differ.
        seed: data.seed; another seed chooses other samples.
    """
    begins = np.flatnonzero(sample.roles >= BEGINS)
    asked = int(np.argmax(sample.roles[begins] == BEGINS + ROLES.index("user") + 1))
    question = sample.marked
    if sample.roles[begins[asked]] == BEGINS + ROLES.index("user") + 1:
        question = question[begins[asked] : begins[asked + 1]]  # an answer follows
    key = seed.to_bytes(8, "little")
    digest = blake2b(question.astype("<i4").tobytes(), digest_size=BITS // 8, key=key).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)
