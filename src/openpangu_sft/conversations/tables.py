"""Reads records from tables: CSV, parquet and Arrow. A row is a record; an empty cell is an absent field."""

from __future__ import annotations

import contextlib
import csv
import errno
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from openpangu_sft.conversations.opening import COMPRESSED, LONGEST_LINE, UTF8, lost, open_raw, text_lines
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.util.errors import UserError

ROWS_AT_ONCE = 256

_ARROW_FILE = b"ARROW1"  # the first bytes of Arrow's file format; its stream format has none
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_csv(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """CSV (RFC 4180) with a header: every cell is a text. One row is in memory.

    Raises `UserError` for no usable header, or broken quotes, after which the next row cannot be found.
    """
    csv.field_size_limit(LONGEST_LINE)
    with open_raw(path, encoding) as (stream, position):
        rows = csv.reader(text_lines(stream, path, encoding, newline=""), strict=True)
        number = 1
        try:
            names: list[str] = []
            for cells in rows:
                if not names:
                    names = _header(path, cells, encoding) if cells else []
                elif cells:
                    reason = lost("".join(cells), encoding)
                    if len(cells) != len(names):
                        reason = f"{len(cells)} cells, and the header has {len(names)}"
                    content = None if reason else {name: cell for name, cell in zip(names, cells) if cell}
                    yield RawRecord(f":{number}", position(), content, reason, repr(cells) if reason else "")
                number = rows.line_num + 1
        except csv.Error as error:
            remedy = "put quotes around cells with quotes or line ends, and double the quotes inside"
            raise UserError(f"not valid CSV: {error}", where=f"{path}:{number}", remedy=remedy) from None


def _header(path: Path, cells: list[str], encoding: str) -> list[str]:
    # pandas writes its index without a name; the key is known to be harmless
    names = ["index", *cells[1:]] if cells[0] == "" and len(cells) > 1 else cells
    what = lost("".join(names), encoding)
    if len(names) == 1 and (mark := next(filter(names[0].count, ";\t"), "")):
        what = f"columns are separated by {mark!r}, not by commas"
    elif "" in names:
        what = f"column {names.index('') + 1} has no name"
    elif len(set(names)) < len(names):
        what = f"has the column {Counter(names).most_common(1)[0][0]!r} twice"
    if what:
        raise UserError(what, where=f"{path}:1", remedy="correct the header, or write the file again")
    return names


def read_parquet(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """Parquet; raises `UserError` where it is damaged, or another format. A batch of rows is in memory.

    Parquet stores every field of a structure in every row, null where there was none: nulls are removed at every depth.
    """
    size = path.stat().st_size
    with _mapped(path, "parquet") as source, parquet.ParquetFile(source) as file:
        total, row = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            yield from _rows(path, batch, row, size * (row + batch.num_rows) // total)
            row += batch.num_rows


def read_arrow(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """Arrow's file or stream format, mapped, as `datasets.save_to_disk` writes it; nulls and errors as in parquet."""
    size, row, position = path.stat().st_size, 0, 0
    with _mapped(path, "Arrow") as source:
        is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            position = min(position + batch.get_total_buffer_size(), size)
            yield from _rows(path, batch, row, position)
            row += batch.num_rows
        if not is_file:
            source.seek(source.tell() - len(_END_OF_STREAM))
            if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
                raise ValueError("the stream ends without its end mark: it may be cut off")


@contextlib.contextmanager
def _mapped(path: Path, kind: str) -> Iterator[pyarrow.NativeFile]:
    """The file's content, unpacked into a temporary file where it is compressed; explains errors of reading it."""
    try:
        if not (codec := COMPRESSED.get(path.suffix.lower())):
            with pyarrow.memory_map(str(path)) as source:
                yield source
            return
        with path.open("rb") as packed, tempfile.NamedTemporaryFile() as unpacked:
            shutil.copyfileobj(pyarrow.CompressedInputStream(packed, codec), unpacked)
            unpacked.flush()
            with pyarrow.memory_map(unpacked.name) as source:
                yield source
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: column names that are not UTF-8
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error.filename = tempfile.gettempdir()  # where it is unpacked
            raise
        raise UserError(f"not readable as {kind}: {error}", where=path, remedy="write it again") from None


def _rows(path: Path, batch: Any, first: int, position: int, at_once: int = ROWS_AT_ONCE) -> Iterator[RawRecord]:
    """The records of a batch whose first row has this number; one row that cannot be read spoils no other."""
    names = batch.schema.names
    if len(set(names)) < len(names):
        what = f"has the column {Counter(names).most_common(1)[0][0]!r} twice"
        raise UserError(what, where=path, remedy="keep one of them")
    for row in range(0, batch.num_rows, at_once):
        part = batch.slice(row, at_once)
        try:
            part.validate(full=True)  # damaged offsets would be read from anywhere in memory
            contents = [_without_null(content) for content in part.to_pylist(maps_as_pydicts="strict")]
        except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
            # a text that is not UTF-8, a date out of range, a key of a map given twice
            if at_once > 1:
                yield from _rows(path, part, first + row, position, at_once=1)
            else:
                place, reason = f":row {first + row}", f"not readable: {error}"
                yield RawRecord(place, position, unreadable=reason, text=f"columns: {names}")
        else:
            for number, content in enumerate(contents, first + row):
                yield RawRecord(f":row {number}", position, content)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
