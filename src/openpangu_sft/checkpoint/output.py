"""A file that is given front to back, while threads write it, take its sha256 and flush it to the disk."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Optional, Union

import numpy as np

from openpangu_sft.checkpoint.arrays import Array

Entry = dict[str, Any]
"""What a manifest says of a file: bytes and sha256."""
Advance = Callable[[int, str], object]
"""What progress() gives: called with bytes done and a note."""

FLUSHED_EVERY = 1 << 27
"""Bytes. Waiting with the flush until the end would leave the disk idle meanwhile."""
MOST_PENDING = 8
"""Chunks that file and sum may lag behind: they are kept alive for them."""


def nothing(units: int, note: str = "") -> None:
    """No progress shown."""


class OutputFile:
    """A new file, as zipfile and others write to it.

    Whatever is given to `write` must not be changed afterwards: it is written, and its sum is taken, a little later.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._sum = hashlib.sha256()
        self._bytes = self._flushed = 0
        self._writing, self._summing, self._flushing = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._flush: Optional[Future[None]] = None
        self.entry: Entry = {}
        """Manifest entry of the finished file: bytes and sha256."""

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        try:
            if error is None:
                self._settle(0)
                os.fsync(self._stream.fileno())
                if self._flush:
                    self._flush.result()
                self.entry = {"bytes": self._bytes, "sha256": self._sum.hexdigest()}
        finally:
            for thread in (self._writing, self._summing, self._flushing):
                thread.shutdown(cancel_futures=True)
            self._stream.close()

    def write(self, data: Union[bytes, Array]) -> int:
        """Appends; returns the number of bytes. An error may be raised by a later call, or at the end."""
        view = memoryview(data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data)
        self._pending.append((self._writing.submit(self._append, view), self._summing.submit(self._sum.update, view)))
        self._settle(MOST_PENDING)
        return view.nbytes

    def flush(self) -> None:
        """Asked for by those who take it for a file."""

    def _settle(self, most: int) -> None:
        """Waits until no more than so many chunks are pending."""
        while len(self._pending) > most:
            for future in self._pending.popleft():
                future.result()

    def _append(self, view: memoryview) -> None:
        """Writes a chunk; the writing thread's work."""
        rest = view
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._bytes += view.nbytes
        if self._bytes - self._flushed >= FLUSHED_EVERY and (self._flush is None or self._flush.done()):
            if self._flush:
                self._flush.result()
            self._flushed = self._bytes
            self._flush = self._flushing.submit(os.fdatasync, self._stream.fileno())
