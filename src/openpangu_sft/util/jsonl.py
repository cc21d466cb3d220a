"""JSON lines that a run appends to: metrics.jsonl and starts.jsonl.

A process killed while it writes leaves a last line without its end. Such a line is ignored when the file is read, and
removed before the next one is appended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from openpangu_sft.util.errors import UserError, first_complaint, naming


def read_lines(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """All complete lines, each with the fields of `kind` that are not None; none where there is no file.

    Raises `UserError` for the first line that is not of that kind.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(kind.model_validate(json.loads(line)).model_dump(exclude_none=True))
        except (ValueError, RecursionError) as error:  # pydantic's are ValueErrors too
            what = first_complaint(error) if isinstance(error, ValidationError) else f"not JSON: {error}"
            raise UserError(what, where=f"{path}:{number}", remedy="fix this line, or remove it") from None
    return found


def add_line(path: Path, content: Mapping[str, Any]) -> None:
    """Appends a line and closes the file: only a crash of the machine can lose it."""
    with naming(path), path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(content).encode() + b"\n")
