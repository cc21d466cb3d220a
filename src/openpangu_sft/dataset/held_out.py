"""Which samples are kept out of training, for `make evaluate`: by what a conversation begins with, not by its place.

Where the same question comes twice, in whatever files, both are held out or none is: otherwise the loss on what was
held out would partly be that of answers learnt by heart. More samples change nothing about those that are there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from openpangu_sft.dataset.encode import Marked

BITS = 64


def is_held_out(marked: Marked, share: float, seed: int) -> bool:
    """Whether a sample belongs to the held-out ones.

    Args:
        marked: int32 [tokens], the sample's. What stands before its first trained token counts: the system prompt and
            the first question.
        share: of the distinct beginnings that are held out, 0 to 1. A hash decides, so of a few samples it may be
            another share.
        seed: data.seed; another one holds out others.
    """
    first = int(np.argmax(marked >= 0))
    key = seed.to_bytes(8, "little")
    digest = blake2b(marked[:first].astype("<i4").tobytes(), digest_size=BITS // 8, key=key).digest()
    return bool(int.from_bytes(digest, "little") < share * 2**BITS)
