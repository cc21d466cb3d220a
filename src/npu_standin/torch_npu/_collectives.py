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

from ._devices import replace
from ._operators import require

Tensors = Sequence[torch.Tensor]

REDUCED_AS = {torch.bool: torch.uint8, torch.int16: torch.int32}
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
    replace(ProcessGroup, _reduce_scatter_base=reduce_scatter_base, _allgather_base=allgather_base)


def transfer() -> None:
    """The effect of importing torch_npu.contrib.transfer_to_npu: nccl is hccl."""
    plain = distributed_c10d.init_process_group

    @functools.wraps(plain)
    def init_process_group(backend: Optional[str] = None, *args: Any, **kwargs: Any) -> Any:
        return plain("hccl" if backend == "nccl" else backend, *args, **kwargs)

    replace(dist, init_process_group=init_process_group, is_nccl_available=lambda: True)
    replace(distributed_c10d, init_process_group=init_process_group)


def allreduce(self: ProcessGroup, tensors: Tensors, opts: Any = None, *_: Any) -> DoneWork:
    """Of tensors of any real dtype, each in place; gloo refuses others, and means."""
    options = AllreduceOptions()  # a sum
    if opts is not None:
        options.reduceOp = opts.reduceOp
    for tensor in tensors:
        wide = tensor.detach().to(REDUCED_AS.get(tensor.dtype, tensor.dtype)).contiguous()
        _plain["allreduce"](self, [wide], options).wait()
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
    for given, tensor in zip(outputs, inputs):
        require(len(given) == self.size(), f"all_gather: {len(given)} outputs in a group of {self.size()}")
        for output in given:
            _check("all_gather", output, tensor, 1)
        mine = _bytes(tensor)
        parts = [torch.empty_like(mine) for _ in given]
        _plain["allgather"](self, [parts], [mine]).wait()
        for output, part in zip(given, parts):
            output.detach().copy_(part.view(output.dtype).view(output.shape))
    return DoneWork()


def allgather_base(self: ProcessGroup, output: torch.Tensor, mine: torch.Tensor, *_: Any) -> DoneWork:
    """all_gather_into_tensor."""
    _check("all_gather_into_tensor", output, mine, self.size())
    return allgather(self, [output.view(self.size(), mine.numel()).unbind()], [mine])


def reduce_scatter_base(
    self: ProcessGroup, output: torch.Tensor, given: torch.Tensor, opts: Any = None, *_: Any
) -> DoneWork:
    """reduce_scatter_tensor: all of it is reduced, and each rank keeps its part."""
    _check("reduce_scatter", given, output, self.size())
    whole = given.detach().clone(memory_format=torch.contiguous_format)
    allreduce(self, [whole], opts)
    output.detach().copy_(whole.view(self.size(), *output.shape)[self.rank()])
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


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _check(name: str, whole: torch.Tensor, part: torch.Tensor, parts: int) -> None:
    """Raises ValueError where a tensor does not consist of so many others."""
    sizes = f"{whole.numel()} values of {whole.dtype} are not {parts} times {part.numel()} of {part.dtype}"
    require((whole.numel(), whole.dtype) == (parts * part.numel(), part.dtype), f"{name}: {sizes}")
