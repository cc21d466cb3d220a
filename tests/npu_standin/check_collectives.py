"""Collectives of the stand-in, in two real processes connected by upstream's call.

Run by test_npu_standin.py, in a process of its own, which starts the two.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch_npu
from torch_npu.contrib import transfer_to_npu  # noqa: F401

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
BYTES = [*DTYPES, torch.bool, torch.uint8, torch.complex64]

CHECKS: dict[str, Callable[[int], None]] = {}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    """Registers what both ranks run."""
    CHECKS[function.__name__] = function
    return function


def refused(call: Callable[[], Any], said: str, kind: Any = (ValueError, RuntimeError)) -> None:
    """Asserts that a call raises on every rank before anything is sent."""
    with pytest.raises(kind, match=said):
        call()


@check
def group_is_hccl(rank: int) -> None:
    assert dist.get_backend() == dist.get_backend(dist.new_group([0, 1])) == "hccl"
    assert dist.get_backend(dist.new_group([0, 1], backend="gloo")) == "gloo"
    assert dist.is_nccl_available()
    assert torch.cuda.device_count() == 2


@check
def all_reduce(rank: int) -> None:
    for dtype in DTYPES:
        values = torch.tensor([1.0, -2.0, 3.0])
        mine = (values * (rank + 1)).to(dtype)
        given = mine.t()
        dist.all_reduce(given)
        assert given.tolist() == [3, -6, 9], dtype
        assert mine.tolist() == [3, -6, 9], dtype  # in place
        for operation, expected in ((dist.ReduceOp.MAX, [2, -2, 6]), (dist.ReduceOp.MIN, [1, -4, 3])):
            mine = (values * (rank + 1)).to(dtype)
            dist.all_reduce(mine, op=operation)
            assert mine.tolist() == expected, (dtype, operation)
        mine = (values * (rank + 1)).to(dtype)
        dist.all_reduce(mine, op=dist.ReduceOp.PRODUCT)
        assert mine.tolist() == [2, 8, 18], dtype


@check
def all_reduce_of_views(rank: int) -> None:
    whole = torch.full((3, 4), float(rank + 1))
    dist.all_reduce(whole[:, 1])
    assert whole[:, 1].tolist() == [3.0] * 3
    assert whole[:, 0].tolist() == [float(rank + 1)] * 3
    dist.all_reduce(torch.empty(0))
    parameter = torch.nn.Parameter(torch.ones(2))
    dist.all_reduce(parameter)
    assert parameter.tolist() == [2.0, 2.0]
    pair = torch.tensor([1 + 2j])
    dist.all_reduce(pair)
    assert pair.tolist() == [2 + 4j]


@check
def booleans_are_or_and(rank: int) -> None:
    for operation, expected in ((dist.ReduceOp.MAX, [True, True]), (dist.ReduceOp.MIN, [False, True])):
        mine = torch.tensor([bool(rank), True])
        dist.all_reduce(mine, op=operation)
        assert mine.tolist() == expected


@check
def in_a_group_of_one(rank: int) -> None:
    alone = [dist.new_group([member]) for member in range(2)][rank]
    mine = torch.tensor([1.5]).bfloat16()
    dist.all_reduce(mine, group=alone)
    output = torch.empty(1).bfloat16()
    dist.all_gather_into_tensor(output, mine, group=alone)
    assert output.tolist() == mine.tolist() == [1.5]


@check
def broadcast(rank: int) -> None:
    for dtype in BYTES:
        for source in (0, 1):
            mine = torch.full((3, 2), source if rank == source else 1 - source).to(dtype)[:, 1]
            dist.broadcast(mine, source)
            assert mine.tolist() == torch.full((3,), source).to(dtype).tolist(), dtype


@check
def all_gather(rank: int) -> None:
    for dtype in BYTES:
        mine = torch.arange(4).view(2, 2).to(dtype).t() if rank else torch.zeros(2, 2).to(dtype)
        expected = torch.stack([torch.zeros(2, 2).to(dtype), torch.arange(4).view(2, 2).to(dtype).t()])
        outputs = [torch.empty(2, 2).to(dtype) for _ in range(2)]
        dist.all_gather(outputs, mine)
        assert torch.equal(torch.stack(outputs), expected), dtype
        for gather in (dist.all_gather_into_tensor, dist._all_gather_base):
            output = torch.empty(4, 2).to(dtype)
            gather(output, mine)
            assert torch.equal(output.view(2, 2, 2), expected), dtype


@check
def reduce_scatter(rank: int) -> None:
    for dtype in DTYPES:
        for scatter in (dist.reduce_scatter_tensor, dist._reduce_scatter_base):
            output, given = torch.empty(2).to(dtype), torch.arange(4).to(dtype)
            scatter(output, given)
            assert output.tolist() == [[0, 2], [4, 6]][rank], dtype
            assert given.tolist() == [0, 1, 2, 3], dtype
    output = torch.empty(1)
    dist.reduce_scatter_tensor(output, torch.tensor([1.0, 3.0]) * (rank + 1), op=dist.ReduceOp.MAX)
    assert output.tolist() == [[2.0], [6.0]][rank]


@check
def all_to_all(rank: int) -> None:
    for dtype in BYTES:
        mine = (torch.arange(4) + 10 * rank).to(dtype)
        output = torch.empty(4).to(dtype)
        dist.all_to_all_single(output, mine)
        assert torch.equal(output, torch.tensor([[0, 1, 10, 11], [2, 3, 12, 13]][rank]).to(dtype)), dtype
        # rank 0 sends 1 row and 2 rows, rank 1 sends 3 and none
        rows = torch.arange(6).view(3, 2).to(dtype)
        sent, received = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
        output = torch.empty(sum(received), 2).to(dtype)
        dist.all_to_all_single(output, rows, received, sent)
        assert torch.equal(output, torch.cat([rows[:1], rows]) if rank == 0 else rows[1:]), dtype


@check
def all_to_all_where_one_gets_nothing(rank: int) -> None:
    """As a mixture of experts may have it."""
    output = torch.empty(3 * rank, 2)
    dist.all_to_all_single(output, torch.full((rank + 1, 2), float(rank)), [rank, 2 * rank], [0, rank + 1])
    assert output.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]][: 3 * rank]


@check
def all_to_all_as_ulysses(rank: int) -> None:
    """Sequences to heads and back, as context parallel does: [s / 2, b, n, d] to [s, b, n / 2, d]."""
    whole = torch.arange(4 * 2 * 6).view(4, 2, 6, 1).bfloat16()
    given = whole[2 * rank : 2 * rank + 2].reshape(2, 2, 2, 3, 1).permute(2, 0, 1, 3, 4).contiguous()
    output = torch.empty_like(given)
    dist.all_to_all_single(output, given)
    assert torch.equal(output.reshape(4, 2, 3, 1), whole[:, :, 3 * rank : 3 * rank + 3])


@check
def point_to_point(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        mine, other = torch.full((3,), rank + 1).to(dtype), torch.empty(3).to(dtype)
        operations = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert other.tolist() == [2 - rank] * 3
        for sender in range(2):  # and as a pipeline does
            if rank == sender:
                dist.isend(mine, 1 - rank).wait()
            else:
                dist.irecv(other, 1 - rank).wait()
        assert other.tolist() == [2 - rank] * 3


@check
def what_is_gloos_own(rank: int) -> None:
    dist.barrier()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    one = [{"from": rank}]
    dist.broadcast_object_list(one, 1)
    assert one == [{"from": 1}]
    mine = torch.tensor([1.0 + rank])
    dist.reduce(mine, 0)
    assert rank or mine.item() == 3
    gathered = [torch.empty(1), torch.empty(1)] if rank == 0 else None
    dist.gather(torch.tensor([float(rank)]), gathered)
    assert gathered is None or [piece.item() for piece in gathered] == [0, 1]


@check
def asynchronous_callers_get_a_work_that_is_done(rank: int) -> None:
    mine = torch.ones(2)
    output = torch.empty(4)
    for work in (
        dist.all_reduce(mine, async_op=True),
        dist.broadcast(mine, 0, async_op=True),
        dist.all_gather_into_tensor(output, mine, async_op=True),
        dist.reduce_scatter_tensor(mine, output, async_op=True),
        dist.all_to_all_single(mine, mine.clone(), async_op=True),
    ):
        assert work.wait() is True
        assert work.wait(timedelta(seconds=1)) is True


@check
def gradients_go_through(rank: int) -> None:
    """A column-parallel product as Megatron-LM has it: all-reduce in the backward pass."""

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
            return gradient

    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4, 3, generator=generator), torch.randn(3, 6, generator=generator)
    x.requires_grad_()
    mine = Copy.apply(x) @ weight[:, 3 * rank : 3 * rank + 3]
    ours = torch.autograd.grad((mine**2).sum(), x)[0]
    expected = torch.autograd.grad(((x @ weight) ** 2).sum(), x)[0]
    torch.testing.assert_close(ours, expected)


@check
def what_does_not_fit_is_refused(rank: int) -> None:
    one, two, half = torch.ones(1), torch.ones(2), torch.ones(1).bfloat16()
    group = dist.group.WORLD  # torch.distributed itself sums complex numbers as pairs
    refused(lambda: group.allreduce([torch.ones(2, dtype=torch.complex64)]), "Invalid scalar type")
    refused(lambda: dist.all_reduce(one, op=dist.ReduceOp.AVG), "AVG")
    refused(lambda: dist.all_gather_into_tensor(one, one), "all_gather_into_tensor: 1 values of .* not 2 times 1")
    refused(lambda: dist.all_gather_into_tensor(two, half), "bfloat16")
    refused(lambda: dist.all_gather([one], one), "1 outputs in a group of 2")
    refused(lambda: dist.all_gather([one, two], one), "all_gather: 2 values")
    refused(lambda: dist.reduce_scatter_tensor(two, two), "2 values of torch.float32 are not 2 times 2")
    refused(lambda: dist.reduce_scatter_tensor(one, torch.ones(2).bfloat16()), "bfloat16")
    refused(lambda: dist.all_to_all_single(torch.ones(3), torch.ones(3)), "3 rows in equal parts")
    refused(lambda: dist.all_to_all_single(torch.ones(3), two), "3 rows in equal parts")
    refused(lambda: dist.all_to_all_single(two, two, [1, 1], [1, 2]), r"2 rows in \[1, 2\]")
    refused(lambda: dist.all_to_all_single(two, two, [2], [1, 1]), r"2 rows in \[2\]")
    refused(lambda: dist.all_to_all_single(two, two.bfloat16()), "bfloat16")
    refused(lambda: dist.all_to_all_single(torch.ones(2, 1), torch.ones(2, 2)), "rows of")
    dist.barrier()  # nothing that was refused has left the two apart


def work(rank: int, folder: str) -> None:
    """One of the two processes: runs every check, and writes what each said."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name need not resolve
    torch.cuda.set_device(rank)
    dist.init_process_group(  # as megatron/training/initialize.py does
        backend="nccl",
        init_method=f"file://{folder}/rendezvous",
        world_size=2,
        rank=rank,
        timeout=timedelta(seconds=600),
    )
    said = {}
    for name, function in CHECKS.items():
        try:
            function(rank)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
            break  # the two may be apart now: what follows would only wait
    Path(folder, str(rank)).write_text(json.dumps(said), "utf-8")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank said of each check."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [json.loads((folder / str(rank)).read_text("utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_both_ranks(said: list[dict[str, str]], name: str) -> None:
    assert [answers.get(name, "not reached") for answers in said] == ["", ""], "\n".join(
        answers.get(name, "") for answers in said
    )


def test_it_is_the_stand_in() -> None:
    assert "standin" in torch_npu.__version__
    assert "npu_standin" in str(Path(sys.modules["torch_npu"].__file__ or "").resolve())
