"""Device memory of a run by part, the phases of an iteration in which the parts meet, and whether a device holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GIB = 1 << 30
SPARE = 0.1
"""Share of a device left for what is not counted: the context of CANN or CUDA, operator workspaces and allocator
fragmentation. A choice, not a measurement; docs/plan.md."""


class Part(NamedTuple):
    """What takes memory: name, size in bytes, and the formula in words."""

    name: str
    size: int
    how: str


class Phase(NamedTuple):
    """A point of an iteration with many live tensors beside the static ones."""

    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes, without static parts."""
        return total(self.parts)


class Memory(NamedTuple):
    """Memory of the fullest device of a run.

    Args:
        static: held from the first iteration to the last.
        phases: each iteration passes through all of them; the largest decides.
        outside: held by other libraries beside torch's tensors, as far as it is documented.
        stage: pipeline stage of that device, from 0.
    """

    static: tuple[Part, ...]
    phases: tuple[Phase, ...]
    outside: tuple[Part, ...]
    stage: int = 0

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> int:
        """Peak bytes of tensors."""
        return total(self.static) + self.fullest.size

    @property
    def needed(self) -> int:
        """Bytes: the peak, and what is held outside."""
        return self.peak + total(self.outside)

    def left(self, gib: float) -> float:
        """Bytes left on a device of so many GiB, apart from the spare share; negative where they do not suffice."""
        return gib * GIB * (1 - SPARE) - self.needed

    def verdict(self, gib: float) -> str:
        """For a device of so many GiB: yes, tight (it fits, but leaves less than the spare share) or no."""
        if self.left(gib) >= 0:
            return "yes"
        return "tight" if self.needed <= gib * GIB else "no"


def total(parts: Sequence[Part]) -> int:
    """Bytes of some parts."""
    return sum(part.size for part in parts)
