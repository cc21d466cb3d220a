"""The rules for the `.idx` files of a packed dataset: what is wrong with one, and whether two have the same rows."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from openpangu_sft.dataset.index_file import Index, index_blocks
from openpangu_sft.dataset.segments import Flags
from openpangu_sft.util.errors import UserError

Test = Callable[[int, int], Flags]
"""Which of the entries begin..end - 1 of an index are wrong."""


def entry_findings(index: Index, remedy: str) -> tuple[list[UserError], bool]:
    """Checks the entries of an index, with each other and with the size of the `.bin`.

    Returns:
        What is wrong, and whether the rows can be read all the same.
    """
    rows, itemsize = index.rows, index.dtype.itemsize

    def misplaced(begin: int, end: int) -> Flags:
        # Each row against the one before it, so that one wrong length is not counted with all rows after it.
        expected = np.zeros(end - begin, np.int64)
        if end - begin > 1 or begin:
            first = max(begin - 1, 0)
            after = index.offsets[first : end - 1] + index.lengths[first : end - 1].astype(np.int64) * itemsize
            expected[len(expected) - len(after) :] = after
        return np.not_equal(index.offsets[begin:end], expected)

    if not rows:
        return [UserError("holds no rows", where=index.path, remedy=remedy)], False
    layout = [
        rows_where(
            lambda begin, end: np.less(index.lengths[begin:end], 0), rows, lambda row: f"length {index.lengths[row]}"
        ),
        rows_where(
            misplaced, rows, lambda row: f"byte offset {index.offsets[row]} does not follow from the row before it"
        ),
    ]
    wrong = list(filter(None, layout))
    readable = not wrong
    if len(index.documents) != rows + 1:
        wrong.append(f"{len(index.documents)} document boundaries, expected {rows + 1}: every row is a document")
    elif found := rows_where(
        lambda begin, end: np.not_equal(index.documents[begin:end], np.arange(begin, end)),
        rows,
        lambda row: f"document boundary {index.documents[row]}, expected {row}: every row is a document",
        entries=rows + 1,
    ):
        wrong.append(found)
    findings = [UserError(what, where=index.path, remedy=remedy) for what in wrong]
    if readable:
        size, expected = index.data.stat().st_size, index.values() * itemsize
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
        lambda begin, end: np.not_equal(one.lengths[begin:end], other.lengths[begin:end]),
        one.rows,
        lambda row: f"{other.lengths[row]} tokens, but {one.lengths[row]} in {one.path.name}",
    )


def of_rows(count: int, total: int) -> str:
    """How many rows a finding is about."""
    return f"{count:,} of {total:,} rows"


def rows_where(test: Test, rows: int, describe: Callable[[int], str], entries: int = 0) -> Optional[str]:
    """Counts the entries for which a test is true and describes the first; None where there is no such entry.

    Args:
        rows: how many rows the index has.
        describe: what is wrong with an entry.
        entries: how many there are, if not as many as rows.
    """
    count, first = 0, -1
    for begin, end in index_blocks(entries or rows):
        found = test(begin, end)
        if found.any():
            first = begin + int(found.argmax()) if first < 0 else first
            count += int(found.sum())
    return f"{of_rows(count, rows)}, first row {first}: {describe(first)}" if count else None
