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
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroup, ProcessGroupGloo
from torch.distributed import distributed_c10d

from ._operators import require
from ._patching import replace

Tensors = Sequence[torch.Tensor]
OneOrMore = Union[torch.Tensor, Tensors]

REDUCED_AS_THEY_ARE = (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8)
REDUCED_AS = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
"""Sums are rounded once, at the end."""

_plain = {name: getattr(ProcessGroup, name) for name in ("allreduce", "broadcast", "allgather", "alltoall_base")}


class DoneWork:
    """A completed work for asynchronous callers."""

    def __init__(self, results: list[torch.Tensor]) -> None:
        self._results = results

    def wait(self, timeout: Optional[timedelta] = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True  # it raised otherwise

    def exception(self) -> None:
        pass

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self._results)
        return future


def register_hccl() -> None:
    """Registers the backend hccl with torch.distributed."""

    def gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
        return ProcessGroupGloo(store, rank, size, timeout=timeout)

    dist.Backend.register_backend("hccl", gloo, devices=["cpu", "npu"])
    replace(
        ProcessGroup,
        allreduce=allreduce,
        broadcast=broadcast,
        allgather=allgather,
        _allgather_base=allgather_base,
        _reduce_scatter_base=reduce_scatter_base,
        reduce_scatter=reduce_scatter,
        alltoall_base=alltoall_base,
    )
    replace(dist, is_hccl_available=lambda: True)


def transfer() -> None:
    """The effect of importing torch_npu.contrib.transfer_to_npu: nccl is hccl."""
    plain = distributed_c10d.init_process_group

    @functools.wraps(plain)
    def init_process_group(backend: Optional[str] = None, *args: Any, **kwargs: Any) -> Any:
        return plain("hccl" if backend == "nccl" else backend, *args, **kwargs)

    replace(dist, init_process_group=init_process_group, is_nccl_available=lambda: True)
    replace(distributed_c10d, init_process_group=init_process_group)


def allreduce(self: ProcessGroup, tensors: OneOrMore, opts: Any = None, *_: Any) -> DoneWork:
    """Of tensors of any real dtype, each in place."""
    several = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    operation: Any = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    mean = operation == dist.ReduceOp.AVG  # which gloo does not have
    options = AllreduceOptions()
    if not mean:  # it is a sum otherwise
        options.reduceOp = operation
    for tensor in several:
        require(not mean or tensor.is_floating_point(), f"all_reduce: the mean of integers, {tensor.dtype}")
        wide = tensor.detach().to(_reduced_as(tensor.dtype)).contiguous()
        _plain["allreduce"](self, [wide], options).wait()
        if mean:
            wide = wide / self.size()
        if wide.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(wide)
    return DoneWork(several)


def broadcast(self: ProcessGroup, tensors: OneOrMore, opts: Any, *_: Any) -> DoneWork:
    """Of tensors of any dtype, as bytes."""
    several = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    for tensor in several:
        if tensor.numel():
            flat = _bytes(tensor)
            _plain["broadcast"](self, [flat], opts).wait()
            tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
    return DoneWork(several)


def allgather(self: ProcessGroup, outputs: Sequence[Tensors], inputs: Tensors, *_: Any) -> DoneWork:
    """Of tensors of any dtype, the same shape everywhere."""
    require(len(outputs) == len(inputs), f"all_gather: {len(inputs)} inputs, {len(outputs)} lists of outputs")
    for given, tensor in zip(outputs, inputs):
        require(len(given) == self.size(), f"all_gather: {len(given)} outputs in a group of {self.size()}")
        for output, part in zip(given, _gathered(self, tensor)):
            _copy("all_gather", output, part)
    return DoneWork([output for given in outputs for output in given])


def allgather_base(self: ProcessGroup, output: torch.Tensor, input: torch.Tensor, *_: Any) -> DoneWork:  # noqa: A002
    """all_gather_into_tensor."""
    parts = torch.cat([part.reshape(-1) for part in _gathered(self, input)])
    _copy("all_gather_into_tensor", output, parts)
    return DoneWork([output])


def reduce_scatter_base(
    self: ProcessGroup,
    output: torch.Tensor,
    input: torch.Tensor,  # noqa: A002
    opts: Any = None,
    *_: Any,
) -> DoneWork:
    """reduce_scatter_tensor: all of it is reduced, and each rank keeps its part."""
    sizes = f"{input.numel()} values to {output.numel()} in a group of {self.size()}"
    require(input.numel() == output.numel() * self.size(), f"reduce_scatter: {sizes}")
    whole = input.detach().clone(memory_format=torch.contiguous_format)
    allreduce(self, whole, opts)
    _copy("reduce_scatter", output, whole.view(self.size(), -1)[self.rank()])
    return DoneWork([output])


def reduce_scatter(
    self: ProcessGroup, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None, *_: Any
) -> DoneWork:
    """Of lists with one tensor for each rank, all of one shape."""
    require(len(outputs) == len(inputs), f"reduce_scatter: {len(outputs)} outputs, {len(inputs)} lists of inputs")
    for output, given in zip(outputs, inputs):
        require(len(given) == self.size(), f"reduce_scatter: {len(given)} inputs in a group of {self.size()}")
        reduce_scatter_base(self, output, torch.stack([tensor.detach() for tensor in given]), opts)
    return DoneWork(list(outputs))


def alltoall_base(
    self: ProcessGroup,
    output: torch.Tensor,
    input: torch.Tensor,  # noqa: A002
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    *options: Any,
) -> DoneWork:
    """all_to_all_single of any dtype, as rows of bytes."""
    require(output.dtype == input.dtype, f"all_to_all: output is {output.dtype}, input {input.dtype}")
    require(output.shape[1:] == input.shape[1:], f"all_to_all: rows of {output.shape[1:]} and {input.shape[1:]}")
    for tensor, splits in ((input, input_splits), (output, output_splits)):  # gloo drops surplus rows
        given = f"{len(tensor)} rows in {list(splits) or 'equal parts'} for a group of {self.size()}"
        whole = splits or [len(tensor) // self.size()] * self.size()
        require(len(whole) == self.size() and sum(whole) == len(tensor), f"all_to_all: {given}")
    row = input.shape[1:].numel() * input.element_size()
    sent, received = (_bytes(tensor).view(len(tensor), row) for tensor in (input, output))
    _plain["alltoall_base"](self, received, sent, output_splits, input_splits, *options).wait()
    output.detach().copy_(received.view(-1).view(output.dtype).view(output.shape))
    return DoneWork([output])


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


def _reduced_as(dtype: torch.dtype) -> torch.dtype:
    if dtype in REDUCED_AS_THEY_ARE:
        return dtype
    require(dtype in REDUCED_AS, f"tensors of {dtype} cannot be reduced")
    return REDUCED_AS[dtype]
