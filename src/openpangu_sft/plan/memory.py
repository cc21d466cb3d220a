"""Device memory of a run by part, the phases of an iteration in which the parts meet, and whether a device holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GIB = 1 << 30
CHUNK = 2048
"""Positions whose logits exist at once: model/chunked_loss.py, which imports torch."""
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
    static: tuple[Part, ...]  # held from the first iteration to the last
    phases: tuple[Phase, ...]  # each iteration passes through all of them; the largest decides
    outside: tuple[Part, ...]  # held by other libraries beside torch's tensors, as far as it is documented
    stage: int = 0  # pipeline stage of that device

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


def kept_by_layers(layers: int, recomputed: int, layer_input: int, layer: int, micro_batches: int = 1) -> Part:
    """What layers keep for the backward pass: of a recomputed one its input, of another `layer` bytes."""
    whole = layers - recomputed
    words = [f"{recomputed} x input"] * bool(recomputed) + [f"{whole} x all of a layer"] * bool(whole)
    how = " + ".join(words) + (f", {micro_batches} micro batches" if micro_batches > 1 else "")
    return Part("kept by the layers", (recomputed * layer_input + whole * layer) * micro_batches, how)


def loss_parts(
    rows: int, columns: int, hidden: int, element: int, logit: int, frozen: bool = False
) -> tuple[Part, ...]:
    """Output layer and loss a chunk of rows at a time (model/chunked_loss.py), if every row is trained.

    Rows are positions of a micro batch on this device, columns its part of the vocabulary; `element` is the bytes of a
    number of the hidden states, `logit` those of a logit in all its copies. A frozen output layer has no gradient.
    """
    chunk = min(CHUNK, rows)
    product = 2 + 4 if element == 2 else 4  # in bf16 it is cast where it is added, by a CPU at least
    logits, gradients = columns * chunk * logit, columns * (chunk * element + hidden * product)
    how = f"{columns:,} x {chunk:,} x {logit}: a chunk's, and copies in fp32"
    trained = Part("trained positions", 2 * rows * hidden * element, "the output layer's input and its gradient")
    if frozen:
        return trained, Part("logits", logits, how)
    if gradients > logits:
        how = f"{columns:,} x ({chunk:,} x {element} + {hidden:,} x {product}): a chunk's gradients"
    gradient = Part("output layer's gradient", columns * hidden * 4, f"{columns:,} x {hidden:,} x 4: summed in fp32")
    return trained, gradient, Part("logits", max(logits, gradients), how)
