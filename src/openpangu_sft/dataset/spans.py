"""Byte spans of samples files, of whole lines: so several processes and machines share one file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.conversations.readers import RawRecord, record_of_line
from openpangu_sft.util.errors import UserError

LARGEST, SMALLEST = 1 << 19, 1 << 16
"""Bytes of the spans that processes work on, one after another."""

SPANS_PER_WORKER = 4


class Span(NamedTuple):
    """The lines of a file that begin at byte `begin` or later, and before byte `end`."""

    file: Path
    begin: int
    end: int


class Part(NamedTuple):
    """What one shard is made of."""

    name: str  # of the shard
    span: Span  # whole lines
    part: str = ""  # "3/16" where the inputs are divided over machines

    @property
    def source(self) -> str:
        """The name of its input in manifests: a file, or bytes of one."""
        file, begin, end = self.span
        return f"{file.name}[{begin}:{end}]" if self.name != file.stem else file.name


def parts_of(files: Sequence[Path], parts: int = 1) -> list[Part]:
    """Divides the inputs into parts of equal bytes; a file on a border is cut between two lines.

    Raises `UserError` where two shards would have the same name.
    """
    sizes = [file.stat().st_size for file in files]
    total, found, before = sum(sizes), dict[str, Part](), 0
    for file, size in zip(files, sizes):
        borders = [total * number // parts - before for number in range(parts + 1)]
        for number, (begin, end) in enumerate(zip(borders, borders[1:]), 1):
            lines = Span(file, *(_line_begin(file, min(max(place, 0), size)) for place in (begin, end)))
            if lines.begin == lines.end and size:
                continue
            cut = (lines.begin, lines.end) != (0, size)
            name = f"{file.stem}.{number}-of-{parts}" if cut else file.stem
            if name in found:
                what = f"{found[name].span.file.name} and {file.name} would both become the shard {name}"
                raise UserError(what, where=file.parent, remedy="rename one of them")
            found[name] = Part(name, lines, f"{number}/{parts}" if parts > 1 else "")
            if not size:
                break
        before += size
    return list(found.values())


def parse_part(text: Optional[str]) -> tuple[int, int]:
    """Reads "3/16", the third of sixteen parts; without a text, 1/1. Raises `UserError` where there is no such part."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", (text or "1/1").strip())
    if match and 1 <= int(match.group(1)) <= int(match.group(2)):
        return int(match.group(1)), int(match.group(2))
    what = f"{text!r} is not a part of the inputs: parts are counted 1/16 to 16/16"
    if match and match.group(1).strip("0") == "":
        what += "; a job that counts from 0 has to add 1"
    raise UserError(what, where="--shard", remedy="write e.g. SHARD=3/16")


def spans_of(span: Span, workers: int) -> list[Span]:
    """Cuts a span into tasks, several per worker; borders need not be those of lines."""
    size = span.end - span.begin
    step = min(max(size // (SPANS_PER_WORKER * workers), SMALLEST), LARGEST)
    return [Span(span.file, begin, min(begin + step, span.end)) for begin in range(span.begin, span.end, step)]


def read_span(span: Span) -> Iterator[Optional[RawRecord]]:
    """The record of each line of a span, None for a blank one; places are lines counted from 1 at its begin."""
    file, begin, end = span
    position, number = _line_begin(file, begin, end), 0
    with file.open("rb") as stream:
        stream.seek(position)
        while position < end and (line := stream.readline()):
            number += 1
            text = line.decode("utf-8" if position else "utf-8-sig", "surrogateescape")
            position += len(line)
            yield record_of_line(text, number, position)


def sha256_of_span(span: Span) -> str:
    return sha256_of(span.file, begin=span.begin, end=span.end)


def _line_begin(file: Path, place: int, end: Optional[int] = None) -> int:
    """The first position at or after `place` where a line begins; if there is none, `end` or the file's end."""
    if not place:
        return 0
    with file.open("rb") as stream:
        stream.seek(place - 1)
        return place - 1 + len(stream.readline(-1 if end is None else end - place + 1))
