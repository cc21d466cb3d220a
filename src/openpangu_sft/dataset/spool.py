"""Encoded samples on disk until it is known which pack each goes into: memory grows by bytes per sample, not per token.

Each process that encodes has a file of its own, so that no token goes through the process that waits for them all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openpangu_sft.util.errors import naming

ITEM = 4
"""Bytes of a marked token."""


class TokenRun(NamedTuple):
    """Samples that lie one behind the other in a file of the spool.

    Args:
        file: its name.
        begin: of the first sample, in bytes.
        lengths: int32 [samples], in tokens.
    """

    file: str
    begin: int
    lengths: npt.NDArray[np.int32]


class Spool:
    """A directory of files with the marked tokens of samples; int32, nothing between them.

    To be used in a `with` block, which removes it in the end.

    Args:
        directory: is made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self._stretches: list[TokenRun] = []
        self._descriptors: list[int] = []

    def write(self, samples: Sequence[npt.NDArray[np.int32]]) -> TokenRun:
        """Appends samples to the file of this process."""
        name = str(os.getpid())
        path = self._directory / name
        lengths = np.array(list(map(len, samples)), np.int32)
        with naming(path), path.open("ab") as stream:
            begin = stream.tell()
            stream.writelines(sample.data for sample in samples)
        return TokenRun(name, begin, lengths)

    def add(self, stretch: TokenRun) -> None:
        """Takes over what a process has written; this order numbers the samples, from 0."""
        self._stretches.append(stretch)

    def finish(self) -> npt.NDArray[np.int32]:
        """Ends writing; returns the length of every sample in tokens."""
        files = sorted({stretch.file for stretch in self._stretches})
        empty = [np.empty(0, np.int32)]
        self._lengths = np.concatenate(empty + [stretch.lengths for stretch in self._stretches])
        self._file = np.repeat(
            np.array([files.index(stretch.file) for stretch in self._stretches], np.int16),
            [len(stretch.lengths) for stretch in self._stretches],
        )
        begins = [
            stretch.begin + ITEM * (np.cumsum(stretch.lengths, dtype=np.int64) - stretch.lengths)
            for stretch in self._stretches
        ]
        self._begin = np.concatenate([np.empty(0, np.int64), *begins])
        self._descriptors = [os.open(self._directory / file, os.O_RDONLY) for file in files]
        self._stretches = []
        return self._lengths

    def read(self, sample: int, into: npt.NDArray[np.int32]) -> None:
        """Reads the tokens of a sample; several processes may do so at once."""
        descriptor, begin = self._descriptors[self._file[sample]], int(self._begin[sample])
        # not mapped into memory: what is mapped counts as used as long as the kernel likes
        count = os.preadv(descriptor, [into.data.cast("B")], begin)
        assert count == ITEM * len(into), "the spool was cut short"

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        shutil.rmtree(self._directory, ignore_errors=True)
