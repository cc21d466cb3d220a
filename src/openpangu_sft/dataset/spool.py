"""Encoded samples on disk until it is known which pack each goes into: memory grows by bytes per sample, not per token.

Each process that encodes has a file of its own, so that no token passes through the process that waits for them all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openpangu_sft.dataset.encode import Encoded, Marked
from openpangu_sft.dataset.index_file import Ids, Roles
from openpangu_sft.util.errors import naming

ITEM = 5  # bytes of a token: int32 marked, uint8 role


class TokenRun(NamedTuple):
    """Samples that follow each other in a file of the spool."""

    file: str  # its name
    begin: int  # of the first sample, in bytes
    lengths: Ids  # int32 [samples], in tokens


class Spool:
    """A new directory of files with samples: the marked tokens of one, then its roles, then the next sample.

    To be used in a `with` block, which removes it in the end.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self.runs: list[TokenRun] = []  # what processes have written; their order numbers the samples, from 0
        self._descriptors: list[int] = []

    def write(self, samples: Iterable[Encoded]) -> TokenRun:
        """Appends samples to the file of this process."""
        path = self._directory / str(os.getpid())
        lengths = []
        with naming(path), path.open("ab") as stream:
            begin = stream.tell()
            for sample in samples:
                lengths.append(len(sample.marked))
                stream.writelines((sample.marked.data, sample.roles.data))
        return TokenRun(path.name, begin, np.array(lengths, np.int32))

    def finish(self) -> None:
        """Ends writing, and sets `lengths`: int32 [samples], in tokens."""
        files, counts = sorted({run.file for run in self.runs}), [len(run.lengths) for run in self.runs]
        self.lengths: Ids = np.concatenate([np.empty(0, np.int32), *(run.lengths for run in self.runs)])
        self._file = np.repeat(np.array([files.index(run.file) for run in self.runs], np.int16), counts)
        begins = [run.begin + ITEM * (np.cumsum(run.lengths, dtype=np.int64) - run.lengths) for run in self.runs]
        self._begin = np.concatenate([np.empty(0, np.int64), *begins])
        self._descriptors = [os.open(self._directory / file, os.O_RDONLY) for file in files]
        self.runs = []

    def read(self, sample: int, marked: Marked, roles: Roles) -> None:
        """Reads a sample into arrays of its length; several processes may do so at once."""
        descriptor, begin = self._descriptors[self._file[sample]], int(self._begin[sample])
        # not mapped into memory: what is mapped counts as used as long as the kernel likes
        count = os.preadv(descriptor, [marked.data.cast("B"), roles.data], begin)
        assert count == ITEM * len(marked), "the spool was cut short"

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        shutil.rmtree(self._directory, ignore_errors=True)
