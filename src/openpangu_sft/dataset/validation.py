"""The validation split: which samples are kept out of training, decided by the first question, not by place.

Where the same question occurs twice, in any files and under any system prompts, both samples are on the same side:
otherwise validation loss would partly measure memorised answers. Later questions of a conversation do not count.
Adding samples changes nothing about those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from openpangu_sft.dataset.encode import Encoded
from openpangu_sft.dataset.roles import BEGINS, ROLES

BITS = 64
USER, ASSISTANT = (BEGINS + ROLES.index(role) + 1 for role in ("user", "assistant"))
"""Roles of the start tokens of turns."""


def is_validation(sample: Encoded, header: Sequence[int], share: float, seed: int) -> bool:
    """Whether a sample belongs to the validation split.

    Args:
        sample: its first user turn counts, which is encoded by itself: the same question has the same tokens after
            every system prompt. A conversation without one counts as a whole; one that is trained as several samples
            is where the last of them belongs.
        header: token ids of the assistant's header: earlier versions hashed it with the question.
        share: of the distinct first questions, 0 to 1. A hash decides, so the share of a few samples may differ.
        seed: data.seed; another seed chooses other samples.
    """
    begins = np.flatnonzero(sample.roles >= BEGINS)
    roles, question = sample.roles[begins], sample.marked
    asked = np.flatnonzero(roles == USER)
    if asked.size:  # an answer follows; with data.control_tokens=allow a question may hold start tokens
        answer = asked[0] + int(np.argmax(roles[asked[0] :] == ASSISTANT))
        question = question[begins[answer - 1] : begins[answer]]
    hashed = np.concatenate([question, ~np.asarray(header)]).astype("<i4").tobytes()
    digest = blake2b(hashed, digest_size=BITS // 8, key=seed.to_bytes(8, "little")).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)
