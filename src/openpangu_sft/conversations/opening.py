"""Opens raw text files, compressed or not, and names their encoding where it is not that of the recipe."""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, AnyStr, Callable

import pyarrow

from openpangu_sft.util.errors import UserError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # suffixes of compressed files and pyarrow's names of their codecs

LONGEST_LINE = 1 << 28  # bytes or characters of a line: more is no record, but the work of a decompression bomb

UTF8 = "utf-8"
BOM = "\ufeff"  # the byte order mark, which may precede a text
LOST = re.compile("[\udc80-\udcff]")  # A byte that could not be decoded, in Python's error handler surrogateescape

_BUFFER = 1 << 16
_EVIDENCE = 6  # bytes: three Chinese characters in GB18030, two in UTF-8
_COMMON_GB_CHARACTERS = re.compile(rb"(?:[\xa1-\xa3\xb0-\xd7][\xa1-\xfe])+")  # punctuation and level 1 of GB 2312


@contextlib.contextmanager
def open_raw(path: Path, encoding: str) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """Opens a raw file of text: its uncompressed bytes, and how many bytes of the file on the disk have been read.

    Raises `UserError` where it begins in another encoding or, while it is read, the compressed content is damaged.
    """
    codec = COMPRESSED.get(path.suffix.lower())
    with path.open("rb") as file:
        stream = io.BufferedReader(pyarrow.CompressedInputStream(file, codec), _BUFFER) if codec else file
        try:
            found = guess(stream.peek(1))
            name = codecs.lookup(encoding).name
            if name == UTF8 if found == "gb18030" else not name.startswith(found):
                label = "GB18030 (GBK)" if found == "gb18030" else found.upper()
                remedy = f"save it as {encoding.upper()}, or set data.encoding={found} for all raw files"
                raise UserError(f"looks like {label}, not {encoding.upper()}", where=path, remedy=remedy)
            yield stream, file.tell
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the content
                raise
            what = f"damaged, or not {codec}: {error}"
            raise UserError(what, where=path, remedy="copy it again, or compress it again") from None


def guess(head: bytes) -> str:
    """The encoding of a text by its first bytes: utf-8, gb18030, utf-16 and utf-32 with a mark; empty if not clear."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    texts = (head, head.decode(errors="ignore").encode())
    high, utf8 = (len(text) - len(text.decode("ascii", "ignore")) for text in texts)  # bytes that are not ASCII
    if high < _EVIDENCE:
        return ""
    if utf8 > high / 2:  # by chance about a fifth of GB18030
        return UTF8
    return "gb18030" if sum(map(len, _COMMON_GB_CHARACTERS.findall(head))) > 0.7 * high else ""


def text_of(stream: io.BufferedReader, encoding: str, newline: str = "\n") -> io.TextIOWrapper:
    """The text of a stream; `LOST` matches bytes that cannot be decoded, where the encoding lets decoding go on."""
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)


def text_lines(stream: io.BufferedReader, path: Path, encoding: str, newline: str = "\n") -> Iterator[str]:
    """The lines of the text of a stream, without a byte order mark; see `text_of` and `lines_of`."""
    lines = lines_of(text_of(stream, encoding, newline), path)
    yield from (line.removeprefix(BOM) for line in islice(lines, 1))
    yield from lines


def lost(text: str, encoding: str) -> str:
    """The reason why a text cannot be used that holds a byte which could not be decoded; else empty."""
    try:
        text.encode()  # several times as fast as a search
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF  # of the surrogate that stands for it
        return f"not {encoding.upper()}: byte 0x{byte:02x} at character {error.start + 1}"
    return ""


def lines_of(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a stream with their ends; raises `UserError` for one above `LONGEST_LINE`, or not decodable."""
    number = 1
    try:
        while line := stream.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                what, remedy = f"a line of {LONGEST_LINE >> 20} MB or more", "write one record on each line"
                raise UserError(what, where=f"{path}:{number}", remedy=f"{remedy}; an array belongs into a .json file")
            yield line
            number += 1
    except UnicodeError as error:
        raise UserError(f"{error}, near line {number}", where=path, remedy="correct data.encoding") from None
