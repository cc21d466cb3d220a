"""The parts of a device's memory, each with its size and how it is counted; and the moments in which they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GIB = 1 << 30


class Part(NamedTuple):
    """What takes memory, and how much.

    Args:
        name: for the table.
        size: bytes.
        how: the formula in words.
    """

    name: str
    size: int
    how: str


class Phase(NamedTuple):
    """A point of an iteration at which much is alive at once, beside what is static."""

    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """In bytes, without what is static."""
        return total(self.parts)


class Memory(NamedTuple):
    """Memory of the fullest device of a run.

    Args:
        static: what stays from the first iteration to the last.
        moments: of which each iteration passes through all; the largest decides.
        outside: what other libraries hold beside torch's tensors, as far as it is documented.
        stage: the pipeline stage of that device, from 0.
    """

    static: tuple[Part, ...]
    moments: tuple[Phase, ...]
    outside: tuple[Part, ...]
    stage: int = 0

    @property
    def fullest(self) -> Phase:
        """The moment that decides."""
        return max(self.moments, key=lambda moment: moment.size)

    @property
    def peak(self) -> int:
        """Most bytes of tensors at once."""
        return total(self.static) + self.fullest.size

    @property
    def needed(self) -> int:
        """Bytes: the peak, and what is held outside."""
        return self.peak + total(self.outside)


def total(parts: Sequence[Part]) -> int:
    """Bytes of some parts."""
    return sum(part.size for part in parts)
