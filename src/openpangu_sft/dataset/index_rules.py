"""The rules for the `.idx` files of a packed dataset: what is wrong with one, and whether two have the same rows."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from openpangu_sft.dataset.index_file import Index
from openpangu_sft.dataset.segments import Flags
from openpangu_sft.util.errors import UserError


def entry_findings(index: Index, remedy: str) -> tuple[list[UserError], bool]:
    """Checks the entries of an index, with each other and with the size of the `.bin`.

    Returns what is wrong, and whether the rows can be read all the same.
    """
    rows, lengths, offsets, documents = index.rows, index.lengths, index.offsets, index.documents
    if not rows:
        return [UserError("holds no rows", where=index.path, remedy=remedy)], False
    # Each row against the one before it, so that one wrong length is not counted with all rows after it.
    follows = np.append(0, offsets[:-1] + lengths[:-1].astype(np.int64) * index.dtype.itemsize)
    layout = [
        rows_where(lengths < 0, rows, lambda row: f"length {lengths[row]}"),
        rows_where(
            offsets != follows, rows, lambda row: f"byte offset {offsets[row]} does not follow from the row before it"
        ),
    ]
    wrong = list(filter(None, layout))
    readable = not wrong
    if len(documents) != rows + 1:
        wrong.append(f"{len(documents)} document boundaries, expected {rows + 1}: every row is a document")
    elif found := rows_where(
        documents != np.arange(rows + 1),
        rows,
        lambda row: f"document boundary {documents[row]}, expected {row}: every row is a document",
    ):
        wrong.append(found)
    findings = [UserError(what, where=index.path, remedy=remedy) for what in wrong]
    if readable:
        size, expected = index.data.stat().st_size, index.values() * index.dtype.itemsize
        if size != expected:
            state = "is cut short" if size < expected else "is longer than its index says"
            findings.append(UserError(f"{state}: {size} bytes, expected {expected}", where=index.data, remedy=remedy))
            readable = size > expected
    return findings, readable


def unlike_rows(one: Index, other: Index) -> Optional[str]:
    """How the rows of two fields differ, as far as their lengths say."""
    if one.rows != other.rows:
        return f"{other.rows} rows, but {one.path.name} has {one.rows}"
    return rows_where(
        one.lengths != other.lengths,
        one.rows,
        lambda row: f"{other.lengths[row]} tokens, but {one.lengths[row]} in {one.path.name}",
    )


def of_rows(count: int, total: int) -> str:
    """How many rows a finding is about."""
    return f"{count:,} of {total:,} rows"


def rows_where(wrong: Flags, rows: int, describe: Callable[[int], str]) -> Optional[str]:
    """Counts the wrong entries, bool [entries], of an index and describes the first; None where there is none."""
    found = np.flatnonzero(wrong)
    return f"{of_rows(found.size, rows)}, first row {found[0]}: {describe(found[0])}" if found.size else None
