"""Writes and reads raw files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow

from openpangu_sft.conversations import opening
from openpangu_sft.conversations.files import read_records
from openpangu_sft.conversations.readers import RawRecord
from refusals import refusal_of

TALK = {"instruction": "二加二等于几？", "output": "等于四。"}
OTHER = {"instruction": "三加三等于几？", "output": "等于六。"}
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in (TALK, OTHER))


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix not in opening.COMPRESSED:
        return content
    return gzip.compress(content) if suffix == ".gz" else pyarrow.compress(content, codec="zstd", asbytes=True)


def put(path: Path, content: bytes | str, encoding: str = "utf-8") -> Path:
    """Writes a file, compressed as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(compressed(raw, path.suffix))
    return path


def read(path: Path, encoding: str = "utf-8") -> list[RawRecord]:
    return list(read_records(path, encoding))


def contents(path: Path, encoding: str = "utf-8") -> list[Any]:
    records = read(path, encoding)
    assert not any(record.unreadable for record in records)
    return [record.content for record in records]


def refusal(path: Path, encoding: str = "utf-8") -> str:
    return refusal_of(read, path, encoding)
