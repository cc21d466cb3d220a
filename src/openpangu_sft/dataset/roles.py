"""Roles of tokens: one file beside the packed ones, uint8 [packs, seq_length], as token ids alone do not tell the role.

0 is padding, 1 to 4 are the positions in `ROLES`, counted from 1; `BEGINS` is added at each start token. Datasets of
version 0.5.0 and of other software have no such file: their roles are unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import ROLES_SUFFIX
from openpangu_sft.tokenizer.template import HEADERS
from openpangu_sft.util.errors import UserError

ROLES = tuple(HEADERS)
BEGINS = 128

AGAIN = "run make preprocess and make merge again"
UNKNOWN = f"unknown: this dataset records none; {AGAIN} to see roles"

Roles = npt.NDArray[np.uint8]


def roles_path(directory: Path, prefix: str) -> Path:
    """The file of a packed dataset's roles."""
    return directory / f"{prefix}{ROLES_SUFFIX}"


def read_roles(directory: Path, prefix: str, rows: int, seq_length: int) -> Optional[Roles]:
    """Maps roles into memory: uint8 [rows, seq_length], read only; None where the dataset has none.

    Raises `UserError` where the file is of another size.
    """
    path = roles_path(directory, prefix)
    if not path.is_file():
        return None
    if path.stat().st_size != rows * seq_length:
        raise UserError(f"does not hold {rows} rows of {seq_length} roles", where=path, remedy=AGAIN)
    return np.memmap(path, "u1", "r", shape=(rows, seq_length))


def role_of(value: int) -> str:
    """The name of a token's role; raises `UserError` if the value is none that preprocess writes."""
    if not 1 <= value % BEGINS <= len(ROLES):
        raise UserError(f"a token's role is {value}, which preprocess never writes", remedy=AGAIN)
    return ROLES[value % BEGINS - 1]


def count_turns(roles: Roles) -> npt.NDArray[np.int64]:
    """int64 [roles], turns of each role."""
    return np.bincount(roles[roles >= BEGINS] % BEGINS, minlength=len(ROLES) + 1)[1 : len(ROLES) + 1]
