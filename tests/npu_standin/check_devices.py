"""Devices of the stand-in, with torch_npu.contrib.transfer_to_npu as all of upstream imports it.

Run by test_npu_standin.py, in a process of its own.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Optional

import pytest
import torch
import torch.utils.cpp_extension
import torch_npu
from torch_npu.contrib import transfer_to_npu  # noqa: F401
from torch_npu.utils import register_asd_hook
from torch_npu.utils.collect_env import get_cann_version

NAMES: list[Any] = ["npu", "npu:0", "cuda", "cuda:0", 0]


@pytest.mark.parametrize("device", [*NAMES, torch.device("cuda", 0), torch.device("npu:0")])
def test_every_npu_is_the_cpu(device: Any) -> None:
    like = torch.ones(2)
    made = [
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.empty(2, device=device, pin_memory=True),
        torch.zeros((2, 3), dtype=torch.bool, device=device),
        torch.full((2,), 1.5, device=device),
        torch.arange(3, device=device),
        torch.randn(2, device=device),
        torch.randperm(3, device=device),
        torch.empty_like(like, device=device),
        like.to(device),
        like.to(device, torch.float64),
        like.to(device=device, dtype=torch.int32),
        like.new_zeros(2, device=device),
        like.new_tensor([1.0], device=device),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).to(device=device).bias,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[10].dtype == torch.float64
    assert made[11].dtype == torch.int32


def test_other_devices_and_dtypes_stay() -> None:
    assert torch.ones(2, device="meta").to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
    assert torch.nn.Linear(2, 2).to(torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        torch.ones(2, device="nonsense")


def test_moving_a_tensor_or_a_module_changes_nothing() -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor
    assert tensor.npu(0) is tensor
    assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor
    assert tensor.pin_memory() is tensor
    assert tensor.is_npu
    assert module.cuda(0) is module
    assert module.npu() is module


def test_types_have_the_npus_names() -> None:
    """MindSpeed makes torch.cuda.FloatTensor of it (mindspeed/core/memory/…), which Megatron-LM compares with."""
    assert torch.ones(1).type() == "torch.npu.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.npu.BFloat16Tensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64
    assert torch.cuda.FloatTensor is torch.npu.FloatTensor is torch.FloatTensor
    assert torch.cuda.IntTensor([1, 2]).tolist() == [1, 2]


def test_the_current_device_is_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream takes it modulo device_count (mindspeed_llm/core/datasets/blended_megatron_dataset_builder.py)."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == 4
    for device, index in ((3, 3), ("npu:1", 1), ("cuda", 1), (torch.device("cuda", 2), 2), (None, 2)):
        torch.cuda.set_device(device)
        assert torch.cuda.current_device() == torch_npu.npu.current_device() == index
    with torch.cuda.device(0):
        assert torch.npu.current_device() == 0
    assert torch.npu.current_device() == 2
    with pytest.raises(RuntimeError, match="no NPU 4 among 4"):
        torch.cuda.set_device(4)
    torch.cuda.set_device(0)


def test_cuda_is_the_npu() -> None:
    assert torch.npu is torch_npu.npu is sys.modules["torch.npu"]
    assert torch.cuda.is_available()
    assert torch.cuda.get_device_name(0).startswith("Ascend910B")
    assert torch.cuda.is_bf16_supported()
    assert torch.cuda.memory_allocated() == torch.cuda.memory_stats()["anything"] == 0
    assert torch.cuda.mem_get_info() == (64 << 30, 64 << 30)
    for nothing in ("synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        getattr(torch.cuda, nothing)()
    assert get_cann_version() == "8.0.RC3"


def test_streams_have_done_their_work() -> None:
    event, stream = torch.cuda.Event(enable_timing=True), torch.npu.Stream()
    event.record()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(stream.record_event())
    assert event.query()
    assert stream.query()


def test_there_is_one_random_generator() -> None:
    torch.cuda.manual_seed(5)
    drawn = torch.rand(3)
    torch.cuda.manual_seed_all(5)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_own_optimizers_work(kind: Any) -> None:
    """torch's CUDA build asks the device whether it captures a graph, and there is no device."""
    parameter = torch.nn.Parameter(torch.ones(2, device="cuda"))
    parameter.grad = torch.ones(2)
    kind([parameter], lr=0.1).step()
    assert (parameter < 1).all()


def test_scripts_stay_python() -> None:
    def function(x: Any) -> Any:
        return x

    assert torch.jit.script(function) is function
    assert torch.jit.script()(function) is function


def test_operators_are_not_compiled() -> None:
    """They are asked for at import, and refused when called."""
    operators = torch.utils.cpp_extension.load(name="x", sources=["/somewhere/mindspeed/ops/csrc/x.cpp"])
    with pytest.raises(NotImplementedError, match=r"operator x\.mul is not in the stand-in"):
        operators.mul(1)


def test_torchair_is_there_for_imports() -> None:
    from torchair import ge, register_fx_node_ge_converter
    from torchair.ge import Tensor

    assert register_fx_node_ge_converter(None)(len) is len
    assert Optional[Tensor]  # an annotation
    with pytest.raises(NotImplementedError, match=r"torchair\.ge\.custom_op"):
        ge.custom_op("x")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: importlib.import_module("acl").rt.malloc(1), "acl.rt.malloc"),
        (lambda: register_asd_hook(1, 2), "register_asd_hook"),
    ],
)
def test_what_is_only_named_is_refused_when_called(call: Any, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} is not in the stand-in"):
        call()


@pytest.mark.parametrize("name", ["npu_grouped_matmul", "npu_prompt_flash_attention", "profiler"])
def test_what_is_not_there_is_said(name: str) -> None:
    assert not hasattr(torch_npu, name)
    with pytest.raises(AttributeError, match=f"torch_npu.{name} is not in the stand-in"):
        getattr(torch_npu, name)
    with pytest.raises(AttributeError, match=r"'torch_npu\.npu' has no attribute 'set_per_process_memory_fraction'"):
        torch_npu.npu.set_per_process_memory_fraction(0.5)


def test_every_module_imports() -> None:
    for name in ("apex", "apex.optimizers", "torch_npu.contrib", "torch_npu.utils"):
        importlib.import_module(name)
