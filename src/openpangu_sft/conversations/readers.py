"""Reads records from JSON lines, JSON arrays and parquet, each with its place in the file.

An unreadable record is reported as one, and reading continues after it; a file that is broken as a whole is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import pyarrow
from pyarrow import parquet

from openpangu_sft.conversations.conversation import BadSample
from openpangu_sft.conversations.fields import JSON, NotFinite, parse_json, too_much
from openpangu_sft.util.errors import UserError, read_utf8

UTF8_BOM = b"\xef\xbb\xbf"
ROWS_AT_ONCE = 256

_BLANK = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # such bytes of a file name in Python; no manifest can hold them
_LENIENT = json.JSONDecoder()


@dataclass(frozen=True)
class RawRecord:
    """One record of a raw file.

    Args:
        place: suffix of the file's name: ":12" (line, from 1), "[3]" (index, from 0) or ":row 5" (from 0).
        position: bytes of the file read so far, for the progress bar; an estimate except for JSON lines.
        content: any JSON value.
        unreadable: why there is no content, else empty.
        text: the record as in the file where there is no content.
    """

    place: str
    position: int
    content: object = None
    unreadable: str = ""
    text: str = ""


def raw_files(path: Path) -> list[Path]:
    """The files to read: `path` itself, or all files in it but hidden ones, sorted by name.

    Raises:
        UserError: nothing is there, or an entry cannot be read: none is silently skipped.
    """
    known = ", ".join(READERS)
    if not path.exists():
        raise UserError(
            "no raw conversations here", where=path, remedy=f"put files there ({known}) or set paths.raw to yours"
        )
    inside = sorted(path.iterdir(), key=lambda entry: entry.name) if path.is_dir() else [path]
    files = [entry for entry in inside if not entry.name.startswith(".")]
    if not files:
        raise UserError("holds no raw conversations", where=path, remedy=f"put files there: {known}")
    for file in files:
        if _NOT_UTF8.search(file.name):
            raise UserError(f"holds a file whose name is not UTF-8: {file.name!a}", where=path, remedy="rename it")
        if file.is_dir():
            raise UserError("is a directory: only files are read", where=file, remedy="move its files up, or it away")
        if not file.is_file():
            raise UserError("is not a regular file, or is a broken link", where=file, remedy="move it away")
        if file.suffix.lower() not in READERS:
            raise UserError(
                f"unknown kind of file {file.suffix or '(no suffix)'}",
                where=file,
                remedy=f"known are {known}: convert it, or move it away",
            )
    return files


def read_records(path: Path) -> Iterator[RawRecord]:
    """The records of one file in their order; raises `UserError` where it is broken as a whole or holds none."""
    record = None
    for record in READERS[path.suffix.lower()](path):
        yield record
    if record is None:
        raise UserError("holds no records", where=path, remedy="fill it, or move it away")


def read_lines(path: Path) -> Iterator[RawRecord]:
    """JSON lines: a value per line in UTF-8; accepts blank lines, CRLF and a byte order mark. One line is in memory."""
    position = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if record := record_of_line(line, number, position, first=number == 1):
                yield record


def record_of_line(line: bytes, number: int, position: int, first: bool) -> Optional[RawRecord]:
    """The record of a line of a JSON lines file; None if it is blank.

    Args:
        line: with its line feed, which only the last line may lack.
        number: of the line, from 1.
        position: of its end in the file, in bytes.
        first: whether a byte order mark may precede it.
    """
    if first:
        line = line.removeprefix(UTF8_BOM)
    place = f":{number}"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
            reason = "the last line is cut off, inside a character"
        return RawRecord(
            place, position, unreadable=reason, text=line.decode("utf-8", "backslashreplace").rstrip("\r\n")
        )
    if not line.strip():
        return None
    try:
        return RawRecord(place, position, parse_json(text))
    except BadSample as error:
        reason = str(error)
    if not text.endswith("\n") and reason.startswith("not valid JSON"):
        reason = f"the last line is cut off, or not JSON: {reason}"
    elif text.strip() == "[":
        reason = "not valid JSON: an array over several lines; if the file is one array, name it .json"
    return RawRecord(place, position, unreadable=reason, text=text.rstrip("\r\n"))


def read_array(path: Path) -> Iterator[RawRecord]:
    """A JSON array in UTF-8, with or without a byte order mark. The file's text and one record are in memory.

    Raises:
        UserError: not UTF-8, no array, or a syntax error, after which the next record cannot be found.
    """
    text, size = read_utf8(path), path.stat().st_size
    position = _skip_blank(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise _no_array(path, text, position)
    begin = _skip_blank(text, position + 1)
    index, mark = 0, text[begin : begin + 1]
    end = begin
    while mark != "]":
        record, end = _element(path, text, begin, index)
        yield RawRecord(f"[{index}]", size * end // len(text), **record)
        end = _skip_blank(text, end)
        mark = text[end : end + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            raise _broken(path, text, end, f"expecting , or ] after record [{index}], {found}")
        begin, index = _skip_blank(text, end + 1), index + 1
    if (rest := _skip_blank(text, end + 1)) < len(text):
        raise _broken(path, text, rest, "something follows the array")


def _element(path: Path, text: str, began: int, index: int) -> tuple[dict[str, Any], int]:
    """Content of the record that begins here, as fields of `RawRecord`, and the position of its end."""
    try:
        try:
            content, end = JSON.raw_decode(text, began)
            return {"content": content}, end
        except NotFinite as error:  # Python's own decoder accepts it, so the next record can be found
            end = _LENIENT.raw_decode(text, began)[1]
            return {"unreadable": str(error), "text": text[began:end]}, end
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())
        ending = ": the file ends inside it" if cut else ""
        raise _broken(path, text, error.pos, f"{error.msg} in record [{index}]{ending}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(too_much(error), where=f"{path}[{index}]", remedy="take this record out") from None


def _broken(path: Path, text: str, position: int, reason: str) -> UserError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return UserError(f"not valid JSON: {reason} (column {column})", where=f"{path}:{line}", remedy="fix the file")


def _no_array(path: Path, text: str, position: int) -> UserError:
    try:
        end = _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return _broken(path, text, position, "expecting an array of records, [ first")
    if text[position] == "{" and text[_skip_blank(text, end) :].startswith("{"):
        return UserError("holds JSON lines, not an array", where=path, remedy=f"rename it to {path.stem}.jsonl")
    return UserError("is not an array of records", where=path, remedy="put the records into one list: [{…}, {…}]")


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def read_parquet(path: Path) -> Iterator[RawRecord]:
    """Parquet: a record per row. A batch of rows is in memory.

    Parquet stores every field of a structure in every row, null where there was none: nulls are removed at every depth.

    Raises:
        UserError: not parquet, or damaged.
    """
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            total, row = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for index in range(batch.num_rows):
                    yield _row(batch.slice(index, 1), f":row {row}", size * (row + 1) // total)
                    row += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: column names that are not UTF-8
        raise UserError(f"not readable as parquet: {error}", where=path, remedy="write it again") from None


def _row(one: Any, place: str, position: int) -> RawRecord:
    try:
        return RawRecord(place, position, _without_null(one.to_pylist()[0]))
    except (ValueError, OverflowError) as error:  # parquet checks neither that texts are UTF-8 nor the range of dates
        return RawRecord(place, position, unreadable=f"not readable: {error}", text=f"columns: {one.schema.names}")


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    ".jsonl": read_lines,
    ".json": read_array,
    ".parquet": read_parquet,
}
