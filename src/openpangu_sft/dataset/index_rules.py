"""The rules for the `.idx` files of a packed dataset: what is wrong with one, and whether three have the same rows."""

from __future__ import annotations

from typing import Callable

import numpy as np

from openpangu_sft.dataset.index_file import Index, index_blocks
from openpangu_sft.dataset.segments import Flags
from openpangu_sft.util.errors import UserError


def entry_findings(index: Index, remedy: str) -> tuple[list[UserError], bool]:
    """Checks the entries of an index, with each other and with the size of the `.bin`.

    Returns:
        What is wrong, and whether the rows can be read all the same.
    """

    def negative(begin: int, end: int) -> Flags:
        return np.less(index.lengths[begin:end], 0)

    def misplaced(begin: int, end: int) -> Flags:
        # Each row against the one before it, so that one wrong length is not counted with all rows after it.
        expected = np.zeros(end - begin, np.int64)
        if end - begin > 1 or begin:
            first = max(begin - 1, 0)
            after = index.offsets[first : end - 1] + index.lengths[first : end - 1].astype(np.int64) * itemsize
            expected[len(expected) - len(after) :] = after
        return np.not_equal(index.offsets[begin:end], expected)

    def no_document(begin: int, end: int) -> Flags:
        return np.not_equal(index.documents[begin:end], np.arange(begin, end))

    itemsize, rows = index.dtype.itemsize, index.rows
    if not rows:
        return [UserError("holds no rows", where=index.path, remedy=remedy)], False
    layout = [
        (negative, lambda row: f"length {index.lengths[row]}"),
        (misplaced, lambda row: f"byte offset {index.offsets[row]} does not follow from the row before it"),
    ]
    findings = [
        UserError(what, where=index.path, remedy=remedy)
        for test, describe in layout
        for what in rows_where(test, rows, rows, describe)
    ]
    readable = not findings
    if len(index.documents) != rows + 1:
        what = f"{len(index.documents)} document boundaries, expected {rows + 1}: every row is a document"
        findings.append(UserError(what, where=index.path, remedy=remedy))
    else:

        def boundary(row: int) -> str:
            return f"document boundary {index.documents[row]}, expected {row}: every row is a document"

        boundaries = rows_where(no_document, rows + 1, rows, boundary)
        findings += [UserError(what, where=index.path, remedy=remedy) for what in boundaries]
    if readable:
        size, expected = index.data.stat().st_size, index.values() * itemsize
        if size != expected:
            state = "is cut short" if size < expected else "is longer than its index says"
            findings.append(UserError(f"{state}: {size} bytes, expected {expected}", where=index.data, remedy=remedy))
            readable = size > expected
    return findings, readable


def same_rows(one: Index, other: Index, remedy: str) -> list[UserError]:
    """Checks that two fields have the same rows, as far as their lengths say."""

    def unlike(begin: int, end: int) -> Flags:
        return np.not_equal(one.lengths[begin:end], other.lengths[begin:end])

    if one.rows != other.rows:
        what = f"{other.rows} rows, but {one.path.name} has {one.rows}"
        return [UserError(what, where=other.path, remedy=remedy)]

    def describe(row: int) -> str:
        return f"{other.lengths[row]} tokens, but {one.lengths[row]} in {one.path.name}"

    return [
        UserError(what, where=other.path, remedy=remedy) for what in rows_where(unlike, one.rows, one.rows, describe)
    ]


def of_rows(count: int, total: int) -> str:
    """How many rows a finding is about."""
    return f"{count:,} of {total:,} rows"


def rows_where(test: Callable[[int, int], Flags], entries: int, rows: int, describe: Callable[[int], str]) -> list[str]:
    """Counts the entries of an index for which a test is true.

    Args:
        test: of the entries begin..end - 1.
        entries: how many there are; document boundaries are one more than rows.
        rows: how many rows the index has.
        describe: what is wrong with an entry.

    Returns:
        One text, which counts them and describes the first; none where there is no such entry.
    """
    count, first = 0, -1
    for begin, end in index_blocks(entries):
        found = test(begin, end)
        if found.any():
            first = begin + int(found.argmax()) if first < 0 else first
            count += int(found.sum())
    return [f"{of_rows(count, rows)}, first row {first}: {describe(first)}"] if count else []
