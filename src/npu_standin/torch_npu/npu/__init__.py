"""torch_npu.npu, which is also torch.npu, and torch.cuda after transfer_to_npu: devices that are the CPU.

Each process has as many NPUs as torchrun has started processes on the machine (LOCAL_WORLD_SIZE). They share one random
generator with the CPU. There is one stream, and every call has completed when it returns. Memory is not counted: 0 is
in use.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch

DeviceLike = Union[int, str, torch.device, None]

MEMORY = 64 << 30  # an Ascend 910B's; it is not a limit

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
globals().update({f"{kind}Tensor": getattr(torch, f"{kind}Tensor") for kind in _KINDS})

_current = 0


def _yes(*_: Any, **__: Any) -> bool:
    return True


def _no(*_: Any, **__: Any) -> bool:
    return False


def _nothing(*_: Any, **__: Any) -> int:
    """Nothing to do, and no bytes in use."""
    return 0


is_available = is_initialized = is_bf16_supported = _yes
is_current_stream_capturing = _is_in_bad_fork = _no
init = _lazy_init = synchronize = ipc_collect = empty_cache = set_compile_mode = set_stream = _nothing
memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _nothing
memory_cached = max_memory_cached = reset_peak_memory_stats = reset_max_memory_allocated = _nothing


def device_count() -> int:
    """One NPU for each process on this machine: upstream takes the rank modulo it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def current_device() -> int:
    return _current


def set_device(device: DeviceLike) -> None:
    """Raises RuntimeError where there is no such NPU."""
    global _current
    given = None if device is None else torch.device(device).index
    index = _current if given is None else given
    if not 0 <= index < device_count():
        raise RuntimeError(f"there is no NPU {index} among {device_count()}")
    _current = index


def get_device_name(device: DeviceLike = None) -> str:
    """It begins like an Ascend 910B's, which upstream checks."""
    return "Ascend910B-CPU-standin"


def get_device_capability(device: DeviceLike = None) -> tuple[int, int]:
    """Enough for every check in Megatron-LM."""
    return 9, 0


@contextlib.contextmanager
def device(device: DeviceLike) -> Iterator[None]:
    """Makes a device current within a block."""
    outside = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(outside)


class Event:
    """It has happened when record() returns."""

    record = wait = synchronize = _nothing
    query = _yes

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        pass


class Stream:
    """The one stream; all its work is done."""

    wait_stream = wait_event = synchronize = _nothing
    query = _yes

    def __init__(self, device: DeviceLike = None, priority: int = 0) -> None:
        pass

    def record_event(self, event: Optional[Event] = None) -> Event:
        return event or Event()


_stream = Stream()


def current_stream(device: DeviceLike = None) -> Stream:
    return _stream


default_stream = current_stream
stream = contextlib.nullcontext  # makes a stream current, which changes nothing

default_generators: dict[int, torch.Generator] = collections.defaultdict(lambda: torch.default_generator)
"""The CPU's generator at every index."""

manual_seed = manual_seed_all = torch.default_generator.manual_seed


def get_rng_state(device: DeviceLike = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: DeviceLike = None) -> None:
    torch.default_generator.set_state(state)


def _lazy_call(function: Callable[[], Any], **_: Any) -> None:
    """Delays a call until the device is initialized, which it is; Megatron-LM's random.py imports it."""
    function()


def memory_stats(device: DeviceLike = None) -> dict[str, int]:
    """0 for every name."""
    return collections.defaultdict(int)


def mem_get_info(device: DeviceLike = None) -> tuple[int, int]:
    """Free and total bytes."""
    return MEMORY, MEMORY
