"""Encoded samples on disk until it is known which pack each goes into: memory grows by 8 bytes a sample only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from openpangu_sft.tokenizer import Encoded


class Spool:
    """Appends encoded samples to a file and gives them back by number.

    Args:
        path: of the temporary file; int32, per sample its input_ids and then its labels.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._lengths: list[int] = []

    def append(self, encoded: Encoded) -> None:
        """Adds a sample."""
        self._stream.write(encoded.input_ids.tobytes())
        self._stream.write(encoded.labels.tobytes())
        self._lengths.append(len(encoded.input_ids))

    def finish(self) -> npt.NDArray[np.int64]:
        """Ends writing; returns the length of every sample in tokens."""
        self._stream.close()
        lengths = np.array(self._lengths, np.int64)
        self._begins = np.concatenate([[0], np.cumsum(2 * lengths)])
        self._values = np.memmap(self._path, np.int32, "r") if lengths.size else np.empty(0, np.int32)
        return lengths

    def __getitem__(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        both = self._values[self._begins[number] : self._begins[number + 1]]
        half = len(both) // 2
        return both[:half], both[half:]

    def remove(self) -> None:
        """Deletes the file."""
        self._values = np.empty(0, np.int32)
        self._path.unlink()
