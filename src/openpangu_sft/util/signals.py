"""SIGINT and SIGTERM, for work that saves its state before it ends; processes that end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Callable, Optional


def interrupt_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt with their number, unless the caller had them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Optional[FrameType]) -> None:
    importing = frame
    while importing:
        if importing.f_code.co_filename.startswith("<frozen importlib"):  # in there libraries swallow it, or fail on it
            later = threading.Timer(0.1, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        importing = importing.f_back
    raise KeyboardInterrupt(number)


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


def end_with_parent() -> None:
    """Called in a new process: the kernel ends it with the thread that started it, even if that is killed."""
    pr_set_pdeathsig = 1  # prctl(2)
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def signal_children(process: int, number: int) -> bool:
    """Sends a signal to the children of a process; False if it has none."""
    children: list[str] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            children += (task / "children").read_text().split()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), number)
    return bool(children)
