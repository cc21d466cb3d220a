"""SIGINT and SIGTERM, for work that saves its state before it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Callable


@contextlib.contextmanager
def on_signals(handler: Callable[[int], object]) -> Iterator[None]:
    """Calls `handler` with the number of each SIGINT and SIGTERM received inside the block. Main thread only."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda given, frame: handler(given)) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
