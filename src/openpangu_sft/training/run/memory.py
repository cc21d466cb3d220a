"""Device memory measured once in a start of training, and what to do where little is left."""

from __future__ import annotations

from pydantic import BaseModel

from openpangu_sft.util.console import console, say

MEASURED_AFTER = 2
"""Iterations of a start: Adam's moments are allocated at the end of the first one."""
LOW = 0.05
"""Share of a device below which a warning is printed: later allocations fragment. A choice, not a measurement."""
REMEDY = "recompute more (train.recompute), split the model further (parallel) or lower data.seq_length; see make plan"

_MIB, _GIB = 1 << 20, 1 << 30


class DeviceMemory(BaseModel):
    """In bytes, of the device where each is worst."""

    peak: int  # of tensors, since the start
    left: int  # of the device beside this peak and what other libraries hold: HCCL, CANN, CUDA
    total: int  # of the device, as its driver counts

    def __str__(self) -> str:
        left = f"{self.left / _GIB:.1f} of {self.total / _GIB:.1f} GiB left"
        return f"peak {self.peak / _GIB:.1f} GiB of tensors measured, {left}"

    def show(self, planned: int) -> None:
        """Beside the planned peak of tensors in bytes, 0 if it is not known; with a warning where little is left."""
        say(f"device memory: {self}" + (f"; planned: {planned / _GIB:.1f} GiB" if planned else ""))
        if self.left < LOW * self.total:
            what = f"less than {LOW:.0%} of a device is left: a later iteration may run out of memory"
            console.print(f"{what} -> {REMEDY}", style="yellow", soft_wrap=True)


def measure(device: str = "cuda") -> DeviceMemory:
    """Memory of torch.cuda's current device, the worst over all processes, which exchange it on `device`.

    The caching allocator's unused blocks count as left: it returns them before it fails.
    """
    import torch
    from torch import distributed

    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    left = free + torch.cuda.memory_reserved() - peak
    # in MiB, which fp32 holds exactly: HCCL has no maximum of int64
    worst = torch.tensor([peak // _MIB, -left // _MIB, -total // _MIB], dtype=torch.float32, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(worst, distributed.ReduceOp.MAX)
    peak, left, total = (int(mib) * _MIB for mib in worst.tolist())
    return DeviceMemory(peak=peak, left=-left, total=-total)
