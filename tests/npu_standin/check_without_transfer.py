"""The stand-in where torch_npu.contrib.transfer_to_npu has not been imported, so cuda is not the NPU.

Run by test_npu_standin.py, in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_npu

NO_GPU = "a GPU answers here"


def test_the_npu_is_there() -> None:
    assert torch_npu.npu.is_available()
    assert torch.zeros(2, device="npu:0").npu().device.type == "cpu"
    assert torch.device("npu", 1).index == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason=NO_GPU)
def test_cuda_is_not() -> None:
    """On an NPU code that forgets transfer_to_npu stops here as well."""
    for call in (
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.zeros(2).to("cuda:0"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.nn.Linear(1, 1).cuda(),
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason=NO_GPU)
def test_nccl_is_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)


def test_hccl_is_a_backend(tmp_path: Path) -> None:
    torch.distributed.init_process_group("hccl", init_method=f"file://{tmp_path}/y", rank=0, world_size=1)
    assert torch.distributed.get_backend() == "hccl"
    torch.distributed.destroy_process_group()


def test_scripts_are_compiled() -> None:
    assert isinstance(torch.jit.script(torch.nn.Linear(1, 1)), torch.jit.ScriptModule)
