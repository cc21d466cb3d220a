"""Whether the NPUs are large enough for the recipe, by the estimate of `make plan`."""

from __future__ import annotations

from openpangu_sft.doctor.finding import Finding, ok, skipped, warning
from openpangu_sft.doctor.subject import Subject
from openpangu_sft.plan.memory import memory_of, verdict
from openpangu_sft.plan.parts import GIB
from openpangu_sft.plan.search import nearest_that_fits


def npu_memory(subject: Subject) -> Finding:
    """Memory of the smallest NPU that would be used; a warning, as the plan was never compared with an NPU."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    sizes = [chip.total for chip in subject.used if chip.total]
    if not sizes:
        return skipped("not known, see NPUs")
    gib = min(sizes) / 1024
    memory = memory_of(subject.recipe)
    found, expected = f"{gib:.4g} GiB", f"{memory.needed / GIB:.1f} GiB by make plan, and a tenth left"
    if verdict(memory, gib) == "yes":
        return ok(f"{found}; {memory.needed / GIB:.1f} needed by make plan")
    nearest = nearest_that_fits(subject.recipe, gib)
    if not nearest:
        return warning(found, "take more devices, or a shorter data.seq_length", expected)
    then = ", then make convert" if nearest.converts else ""
    return warning(found, f'SET="{" ".join(nearest.settings)}"{then}; see make plan', expected)
