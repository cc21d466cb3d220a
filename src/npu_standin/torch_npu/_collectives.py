"""The backend hccl, which is gloo; and the collectives and dtypes that gloo of torch 2.1 lacks.

They replace methods of ProcessGroup, below the functions of torch.distributed, so that modules which have already
imported a function like all_gather_into_tensor are covered. Every collective is complete when it returns: asynchronous
callers get a completed work.

Source: torch's documentation of torch.distributed, for NCCL and so for HCCL, which torch_npu puts in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroup, ProcessGroupGloo
from torch.distributed import distributed_c10d

from ._operators import require
from ._patching import replace

Tensors = Sequence[torch.Tensor]

REDUCED_AS = {kind: kind for kind in (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8)}
REDUCED_AS |= {torch.bool: torch.uint8, torch.int16: torch.int32}
REDUCED_AS |= {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums are rounded once, at the end

_plain = {name: getattr(ProcessGroup, name) for name in ("allreduce", "broadcast", "allgather", "alltoall_base")}


class DoneWork:
    """A completed work, which asynchronous callers get."""

    def wait(self, timeout: Optional[timedelta] = None) -> bool:
        return True


def register_hccl() -> None:
    """Registers the backend hccl with torch.distributed."""
    dist.Backend.register_backend("hccl", ProcessGroupGloo, devices=["cpu", "npu"])
    replace(ProcessGroup, allreduce=allreduce, broadcast=broadcast, allgather=allgather, alltoall_base=alltoall_base)
    replace(ProcessGroup, _reduce_scatter_base=reduce_scatter_base)
    replace(ProcessGroup, _allgather_base=allgather_base)
    replace(dist, is_hccl_available=lambda: True)


def transfer() -> None:
    """The effect of importing torch_npu.contrib.transfer_to_npu: nccl is hccl."""
    plain = distributed_c10d.init_process_group

    @functools.wraps(plain)
    def init_process_group(backend: Optional[str] = None, *args: Any, **kwargs: Any) -> Any:
        return plain("hccl" if backend == "nccl" else backend, *args, **kwargs)

    replace(dist, init_process_group=init_process_group, is_nccl_available=lambda: True)
    replace(distributed_c10d, init_process_group=init_process_group)


def allreduce(self: ProcessGroup, tensors: Tensors, opts: Any = None, *_: Any) -> DoneWork:
    """Of tensors of any real dtype, each in place."""
    operation: Any = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    mean = operation == dist.ReduceOp.AVG  # which gloo does not have
    options = AllreduceOptions()
    if not mean:  # it is a sum otherwise
        options.reduceOp = operation
    for tensor in tensors:
        require(tensor.dtype in REDUCED_AS, f"tensors of {tensor.dtype} cannot be reduced")
        require(not mean or tensor.is_floating_point(), f"all_reduce: the mean of integers, {tensor.dtype}")
        wide = tensor.detach().to(REDUCED_AS[tensor.dtype]).contiguous()
        _plain["allreduce"](self, [wide], options).wait()
        if mean:
            wide = wide / self.size()
        if wide.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(wide)
    return DoneWork()


def broadcast(self: ProcessGroup, tensors: Tensors, opts: Any, *_: Any) -> DoneWork:
    """Of tensors of any dtype, as bytes."""
    for tensor in tensors:
        if tensor.numel():
            flat = _bytes(tensor)
            _plain["broadcast"](self, [flat], opts).wait()
            tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
    return DoneWork()


def allgather(self: ProcessGroup, outputs: Sequence[Tensors], inputs: Tensors, *_: Any) -> DoneWork:
    """Of tensors of any dtype, the same shape everywhere."""
    require(len(outputs) == len(inputs), f"all_gather: {len(inputs)} inputs, {len(outputs)} lists of outputs")
    for given, tensor in zip(outputs, inputs):
        require(len(given) == self.size(), f"all_gather: {len(given)} outputs in a group of {self.size()}")
        for output, part in zip(given, _gathered(self, tensor)):
            _copy("all_gather", output, part)
    return DoneWork()


def allgather_base(self: ProcessGroup, output: torch.Tensor, mine: torch.Tensor, *_: Any) -> DoneWork:
    """all_gather_into_tensor."""
    parts = torch.cat([part.reshape(-1) for part in _gathered(self, mine)])
    _copy("all_gather_into_tensor", output, parts)
    return DoneWork()


def reduce_scatter_base(
    self: ProcessGroup, output: torch.Tensor, given: torch.Tensor, opts: Any = None, *_: Any
) -> DoneWork:
    """reduce_scatter_tensor: all of it is reduced, and each rank keeps its part."""
    sizes = f"{given.numel()} values to {output.numel()} in a group of {self.size()}"
    require(given.numel() == output.numel() * self.size(), f"reduce_scatter: {sizes}")
    whole = given.detach().clone(memory_format=torch.contiguous_format)
    allreduce(self, [whole], opts)
    _copy("reduce_scatter", output, whole.view(self.size(), -1)[self.rank()])
    return DoneWork()


def alltoall_base(
    self: ProcessGroup,
    output: torch.Tensor,
    given: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    *options: Any,
) -> DoneWork:
    """all_to_all_single of any dtype, as rows of bytes."""
    require(output.dtype == given.dtype, f"all_to_all: output is {output.dtype}, input {given.dtype}")
    require(output.shape[1:] == given.shape[1:], f"all_to_all: rows of {output.shape[1:]} and {given.shape[1:]}")
    for tensor, splits in ((given, input_splits), (output, output_splits)):  # gloo drops surplus rows
        rows = f"{len(tensor)} rows in {list(splits) or 'equal parts'} for a group of {self.size()}"
        whole = splits or [len(tensor) // self.size()] * self.size()
        require(len(whole) == self.size() and sum(whole) == len(tensor), f"all_to_all: {rows}")
    row = given.shape[1:].numel() * given.element_size()
    sent, received = (_bytes(tensor).view(len(tensor), row) for tensor in (given, output))
    _plain["alltoall_base"](self, received, sent, output_splits, input_splits, *options).wait()
    output.detach().copy_(received.view(-1).view(output.dtype).view(output.shape))
    return DoneWork()


def _gathered(group: ProcessGroup, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor of this shape and dtype."""
    mine = _bytes(tensor)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    _plain["allgather"](group, [parts], [mine]).wait()
    return [part.view(tensor.dtype).view(tensor.shape) for part in parts]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _copy(name: str, output: torch.Tensor, part: torch.Tensor) -> None:
    got = f"{part.numel()} values of {part.dtype}"
    fits = (output.numel(), output.dtype) == (part.numel(), part.dtype)
    require(fits, f"{name}: an output of {output.numel()} values of {output.dtype} for {got}")
    output.detach().copy_(part.view(output.shape))
