"""Byte ranges of files: every line in one part and one span, whatever its length."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openpangu_sft.conversations.readers import read_lines
from openpangu_sft.dataset import spans
from openpangu_sft.dataset.spans import Span, parse_part, parts_of, read_span, sha256_of_span, spans_of
from refusals import refusal_of

LINE = st.sampled_from([b"", b" ", b"{}", b"[1]", b'"' + b"x" * 90 + b'"', b'"\xe4\xbd\xa0"', b"\r", b"broken"])
CONTENT = st.tuples(st.booleans(), st.lists(LINE, max_size=30), st.booleans()).map(
    lambda drawn: (b"\xef\xbb\xbf" if drawn[0] else b"") + b"\n".join(drawn[1]) + (b"\n" if drawn[2] else b"")
)


def records(span: Span, first_line: int = 0) -> list[tuple[int, object, str]]:
    return [(first_line + int(raw.place[1:]), raw.content, raw.unreadable) for raw in read_span(span) if raw]


@settings(max_examples=200, deadline=None)
@given(CONTENT, st.integers(1, 40))
@example(b"\n", 1)
@example(b"{}\n{}", 1)
def test_spans_of_any_size_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, step: int
) -> None:
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    path.write_bytes(content)
    found, line = [], 0
    for begin in range(0, len(content), step):
        span = Span(path, begin, min(begin + step, len(content)))
        found += records(span, line)
        line += len(list(read_span(span)))
    assert found == [(int(raw.place[1:]), raw.content, raw.unreadable) for raw in read_lines(path)]
    assert line == content.count(b"\n") + bool(content and not content.endswith(b"\n"))


@settings(max_examples=150, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=4), st.integers(1, 9))
def test_parts_hold_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], parts: int
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    files = [directory / f"{number}.jsonl" for number in range(len(contents))]
    for file, content in zip(files, contents):
        file.write_bytes(content)
    division = parts_of(files, parts)
    assert len({part.name for part in division}) == len(division)
    for file, content in zip(files, contents):
        own = [part for part in division if part.span.file == file]
        assert b"".join(content[part.span.begin : part.span.end] for part in own) == content
        found = [record for part in own for record in records(part.span, content[: part.span.begin].count(b"\n"))]
        assert found == [(int(raw.place[1:]), raw.content, raw.unreadable) for raw in read_lines(file)]
        for part in own:
            assert sha256_of_span(part.span) == hashlib.sha256(content[part.span.begin : part.span.end]).hexdigest()
    numbers = [int(part.part.split("/")[0]) for part in division if part.part and part.span.end]
    assert numbers == sorted(numbers)
    if parts == 1:
        assert [(part.name, part.source, part.part) for part in division] == [(f.stem, f.name, "") for f in files]


def test_parts_are_about_equal(tmp_path: Path) -> None:
    for name, lines in (("a", 1000), ("b", 10), ("c", 500)):
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"x": "0123456789"}\n' * lines)
    division = parts_of(sorted(tmp_path.iterdir()), 4)
    sizes = dict.fromkeys(("1/4", "2/4", "3/4", "4/4"), 0)
    for part in division:
        sizes[part.part] += part.span.end - part.span.begin
    assert max(sizes.values()) - min(sizes.values()) <= 40
    assert [part.name for part in division] == ["a.1-of-4", "a.2-of-4", "a.3-of-4", "b", "c.3-of-4", "c.4-of-4"]
    assert [part.source for part in division][3] == "b.jsonl"


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "a.1-of-2"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"{}\n" * (20 if name == "a" else 2))
    assert "both become the shard a.1-of-2 -> rename one of them" in refusal_of(parts_of, sorted(tmp_path.iterdir()), 2)


def test_a_file_of_one_line_is_not_read_once_for_every_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"' + b"x" * 20_000_000 + b'"')
    monkeypatch.setattr(spans, "LARGEST", 100_000)
    pieces = spans_of(Span(path, 0, path.stat().st_size), workers=1)
    assert len(pieces) > 150
    before = bytes_read()
    assert [len(list(read_span(piece))) for piece in pieces] == [1] + [0] * (len(pieces) - 1)
    assert bytes_read() - before < 5 * path.stat().st_size


def bytes_read() -> int:
    """How much this process has read from files so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.mark.parametrize("text", ["3/16", " 1/1 ", "16/16", None])
def test_a_part(text: str | None) -> None:
    number, parts = (int(value) for value in (text or "1/1").split("/"))
    assert parse_part(text) == (number, parts)


@pytest.mark.parametrize("text", ["0/16", "17/16", "3", "3/", "/3", "a/b", "-1/3", "1/0", "3/16/2", "1.0/2"])
def test_no_part(text: str) -> None:
    message = refusal_of(parse_part, text)
    assert message.startswith(f"--shard: {text!r} is not a part of the inputs: parts are counted 1/16 to 16/16")
    assert ("a job that counts from 0 has to add 1" in message) == (text == "0/16")
