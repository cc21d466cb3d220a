"""Reads records from JSON lines and JSON arrays, each with its place in the file.

An unreadable record is reported as one, and reading continues after it; a file that is broken as a whole is an error.
"""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from openpangu_sft.conversations.fields import JSON, compact_json, parse_json, too_much
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.opening import BOM, LOST, UTF8, lost, open_raw, text_lines, text_of
from openpangu_sft.util.errors import UserError

_BLANK = re.compile(r"[ \t\r\n]*")
_INDENTED = re.compile(rb'(?:\xef\xbb\xbf)?\s*([\[{])[ \t]*\r?\n\s+["{]')
_FIRST_LINE = 1 << 24  # characters that are looked at to tell JSON lines from an array
_LENIENT = json.JSONDecoder()


@dataclass(frozen=True)
class RawRecord:
    """One record of a raw file."""

    place: str  # suffix of the file's name: ":12" (line, from 1), "[3]" (index, from 0) or ":row 5" (from 0)
    position: int  # bytes of the file read so far, for progress: an estimate
    content: object = None  # any JSON value
    unreadable: str = ""  # why there is no content
    text: str = ""  # where there is no content, the record as in the file


def reject_line(raw: RawRecord, file: str, place: str, reason: str) -> bytes:
    """A line of a rejects file: file, place, reason and the record, or its text where it could not be read."""
    entry = {"file": file, "place": place, "reason": reason, "record": raw.text or raw.content}
    try:
        line = compact_json(entry)
    except BadSample:  # a value from parquet that JSON does not have
        line = compact_json({**entry, "record": reprlib.repr(raw.content)})
    return f"{line}\n".encode("utf-8", "backslashreplace")  # an unpaired surrogate becomes its JSON escape


def read_lines(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """JSON lines: a value per line; accepts blank lines, CRLF and a byte order mark. One line is in memory.

    Raises `UserError` where it begins with a value over several lines, or has a line that is too long.
    """
    with open_raw(path, encoding) as (stream, position):
        if found := _INDENTED.match(stream.peek(1)):
            what = f"holds {'an array' if found[1] == b'[' else 'objects'} over several lines, not one on each line"
            step = "name it .json" if found[1] == b"[" else "write each on one line: jq -c . OLD.jsonl > NEW.jsonl"
            raise UserError(what, where=path, remedy=step)
        for number, line in enumerate(text_lines(stream, path, encoding), 1):
            if record := record_of_line(line, number, position(), encoding):
                yield record


def record_of_line(line: str, number: int, position: int, encoding: str = UTF8) -> Optional[RawRecord]:
    """The record of a line (with its line feed) of a JSON lines file, None if it is blank.

    Its number is counted from 1, `position` is that of its end in bytes; see `lost` for bytes that cannot be decoded.
    """
    if not line.strip(" \t\r\n"):
        return None
    if not (reason := lost(line, encoding)):
        try:
            return RawRecord(f":{number}", position, parse_json(line))
        except BadSample as error:
            reason = str(error)
    if "Extra data" in reason and "\r" in line.strip():
        reason = "its lines end with CR alone: write LF, e.g. tr '\\r' '\\n' < OLD.jsonl > NEW.jsonl"
    elif not line.endswith("\n") and reason.startswith("not "):
        reason = f"the last line is cut off, or {reason}"
    elif line.strip() == "[":
        reason = "not valid JSON: an array over several lines; if the file is one array, name it .json"
    text = LOST.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", line.rstrip("\r\n"))
    return RawRecord(f":{number}", position, unreadable=reason, text=text)


def read_json(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """A JSON array, or JSON lines by another name; see `read_lines`. Of an array the text and one record are in memory.

    Raises `UserError` where it is no array, in another encoding, or wrong in syntax: no next record could be found.
    """
    return read_lines(path, encoding) if _has_lines(path, encoding) else _read_array(path, encoding)


def _has_lines(path: Path, encoding: str) -> bool:
    """Whether the first line is an object, and another object begins on the next one."""
    with open_raw(path, encoding) as (stream, _), text_of(stream, encoding) as text:
        lines = filter(str.strip, iter(lambda: text.readline(_FIRST_LINE).removeprefix(BOM), ""))
        try:
            first, following = next(lines, ""), next(lines, "")
        except UnicodeError:  # reported where the file is read
            return False
    return first.startswith("{") and first.rstrip().endswith("}") and following.startswith("{")


def _text(path: Path, encoding: str) -> str:
    with open_raw(path, encoding) as (stream, _):
        raw = stream.read()
    try:
        return raw.decode(encoding).removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"not {encoding.upper()}: byte 0x{raw[error.start]:02x}"
        remedy = "save the file as UTF-8, or set data.encoding to the file's encoding"
        raise UserError(what, where=f"{path}:{line}", remedy=remedy) from None


def _read_array(path: Path, encoding: str) -> Iterator[RawRecord]:
    text, size = _text(path, encoding), path.stat().st_size
    begin, index = _skip_blank(text, 0), 0
    if begin == len(text):
        return
    if text[begin] != "[":
        remedy = "put the records into one list, [{…}, {…}]; of objects one after another jq -s . OLD.json > NEW.json"
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            for name, value in json.loads(text).items():  # one object: the records may be under a key of it
                if isinstance(value, list) and value and value[0].keys().isdisjoint(("role", "from")):
                    key = json.dumps(name)[:80]
                    remedy = f"keep only the list under {key}: jq '.[{key}]' OLD.json > NEW.json"
        raise UserError("is not an array of records", where=path, remedy=remedy)
    end = begin = _skip_blank(text, begin + 1)
    mark = text[begin : begin + 1]
    while mark != "]":
        content, reason, end = _element(path, text, begin, index)
        yield RawRecord(f"[{index}]", size * end // len(text), content, reason, text[begin:end] if reason else "")
        end = _skip_blank(text, end)
        mark = text[end : end + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            raise _broken(path, text, end, f"expecting , or ] after record [{index}], {found}")
        begin, index = _skip_blank(text, end + 1), index + 1
    if (rest := _skip_blank(text, end + 1)) < len(text):
        raise _broken(path, text, rest, "something follows the array")


def _element(path: Path, text: str, begin: int, index: int) -> tuple[object, str, int]:
    """The record that begins here, or why it cannot be used, and the position of its end."""
    try:
        try:
            content, end = JSON.raw_decode(text, begin)
            return content, "", end
        except BadSample as error:  # Python's own decoder accepts it, so the next record can be found
            return None, str(error), _LENIENT.raw_decode(text, begin)[1]
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())
        ending = ": the file ends inside it" if cut else ""
        raise _broken(path, text, error.pos, f"{error.msg} in record [{index}]{ending}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(too_much(error), where=f"{path}[{index}]", remedy="take this record out") from None


def _broken(path: Path, text: str, position: int, reason: str) -> UserError:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return UserError(f"not valid JSON: {reason} (column {column})", where=f"{path}:{line}", remedy="fix the file")


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position
