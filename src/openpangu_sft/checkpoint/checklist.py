"""checklist.chk: the sha256 sums that openPangu is published with, as sha256sum writes them (`<sum> *./<path>`).

A file's sum is computed once and cached, with its size and times, in `paths.cache`: the checkpoint's directory may be
read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.checkpoint.files.writer import Advance, nothing
from openpangu_sft.checkpoint.hf import weight_files
from openpangu_sft.recipe.model_config import CONFIG
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import tokenizer_files
from openpangu_sft.util.console import byte_progress
from openpangu_sft.util.errors import UserError

CHECKLIST = "checklist.chk"
REMEMBERED = ".sha256.json"
"""In `paths.cache`: by absolute path, [size in bytes, mtime in ns, ctime in ns, sha256]. ctime cannot be set back."""
_MEMORY = TypeAdapter(dict[str, tuple[int, int, int, str]])
SUMMED_AT_ONCE = 4

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_BINARY = (".safetensors", ".model")  # not edited by hand: a different one is damaged


class Published(NamedTuple):
    """How the files of a checkpoint compare with its checklist."""

    files: int  # of the model; 0 where there is no list
    differing: dict[str, list[str]]  # names of those that are not as published, by kind: changed, not listed
    sums: dict[Path, str]  # sha256 of the listed files

    def __str__(self) -> str:
        notes = "".join(f"; {kind}: {', '.join(names)}" for kind, names in self.differing.items() if names)
        same = self.files - sum(map(len, self.differing.values()))
        return f"{CHECKLIST}: {same} of {self.files} files are as published{notes}"


def check_published(recipe: Recipe, directory: Path, bar: bool = True) -> Published:
    """Compares weights, configuration and tokenizer of a Hugging Face checkpoint with its checklist, if it has one.

    Raises `UserError` for the first file of weights, or the tokenizer's model, that is not the published one, and for a
    checklist that lists nothing. `bar`: show progress while sums are computed.
    """
    listed = _listed(directory / CHECKLIST)
    files = [*weight_files(directory), directory / CONFIG, *tokenizer_files(directory)] if listed else []
    sums = _sums([path for path in files if path.name in listed], recipe.paths.under_cache(REMEMBERED), bar)
    wrong = [path for path, found in sums.items() if found != listed[path.name]]
    for path in wrong:
        if path.suffix in _BINARY:
            what = f"is not the published file: sha256 {sums[path][:12]}…, {CHECKLIST} has {listed[path.name][:12]}…"
            raise UserError(what, where=path, remedy=f"download it again; if it is meant to differ, remove {CHECKLIST}")
    unlisted = [path.name for path in files if path.name not in listed]
    return Published(len(files), {"changed": [path.name for path in wrong], "not listed": unlisted}, sums)


def _listed(path: Path) -> dict[str, str]:
    """sha256 by name, of the files beside the list; lines for files in folders are ignored later."""
    if not path.is_file():
        return {}
    matches = (_LINE.fullmatch(line.strip()) for line in path.read_text("utf-8-sig", errors="replace").splitlines())
    listed = {match[2]: match[1].lower() for match in matches if match}
    if not listed:
        raise UserError("has no line `<sha256> *./<file>`", where=path, remedy="download it again, or remove it")
    return listed


def _sums(files: Sequence[Path], memory: Path, bar: bool) -> dict[Path, str]:
    """sha256 of files; those that have not changed since they were last summed are not read."""
    known: dict[str, tuple[int, int, int, str]] = {}
    with contextlib.suppress(OSError, ValueError):  # then all are read
        known = _MEMORY.validate_json(memory.read_bytes())
    found = {path: path.stat() for path in files}
    stamps = {path: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found.items()}
    keys = {path: os.path.realpath(path) for path in files}
    new = [path for path in files if known.get(keys[path], ())[:-1] != stamps[path]]
    size = sum(stamps[path][0] for path in new)
    shown: AbstractContextManager[Advance] = byte_progress("sha256", size) if bar else contextlib.nullcontext(nothing)
    with shown as advance, ThreadPoolExecutor(SUMMED_AT_ONCE) as pool:
        for path, digest in zip(new, pool.map(lambda path: sha256_of(path, advance), new)):
            known[keys[path]] = (*stamps[path], digest)
    if new:
        with contextlib.suppress(OSError):  # then they are read again next time
            write_durably(memory, json.dumps(known, indent=1) + "\n")
    return {path: known[keys[path]][-1] for path in files}
