"""SIGINT and SIGTERM, for work that saves its state before it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Callable, Optional


@contextlib.contextmanager
def on_signals(handler: Callable[[int], object]) -> Iterator[None]:
    """Calls `handler` with the number of each SIGINT and SIGTERM received inside the block. Main thread only."""

    def call(number: int, frame: Optional[FrameType]) -> None:
        handler(number)

    previous = {number: signal.signal(number, call) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
