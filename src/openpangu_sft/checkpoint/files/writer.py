"""Writes a file front to back while threads compute its sha256 and flush it to the disk."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from openpangu_sft.checkpoint.files.arrays import Array

Entry = dict[str, Any]  # A file's entry in a manifest: bytes and sha256
Advance = Callable[[int, str], object]  # progress callback: bytes done and a note

FLUSHED_EVERY = 1 << 27  # bytes. A single flush at the end would leave the disk idle until then
MOST_PENDING = 8  # chunks that the sum may lag behind; they are kept in memory until then


def nothing(units: int, note: str = "") -> None:
    """No progress shown."""


class OutputFile:
    """A new file. Data given to `write` must not be changed afterwards: its sum is computed a little later.

    It cannot seek, so zipfile puts sizes and sums after a record and not before it, as torch does.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._sum = hashlib.sha256()
        self.position = self._flushed = 0
        self._summing, self._flushing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._flushes: list[Future[None]] = []
        self.entry: Entry = {}  # complete once the file is closed

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._stream.fileno())
                for future in (*self._pending, *self._flushes):
                    future.result()
                self.entry = {"bytes": self.position, "sha256": self._sum.hexdigest()}
        finally:
            self._summing.shutdown()
            self._flushing.shutdown()
            self._stream.close()

    def write(self, data: Union[bytes, Array]) -> int:
        """Appends; returns the number of bytes."""
        rest = view = memoryview(data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self.position += view.nbytes
        self._pending.append(self._summing.submit(self._sum.update, view))
        if len(self._pending) > MOST_PENDING:
            self._pending.popleft().result()
        if self.position - self._flushed >= FLUSHED_EVERY:
            self._flushed = self.position
            self._flushes.append(self._flushing.submit(os.fdatasync, self._stream.fileno()))
        return view.nbytes

    def flush(self) -> None:
        """Called by zipfile."""
