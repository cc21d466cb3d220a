"""Which raw files there are, and the reader of each: one file, or directories as the Hugging Face hub lays them out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Callable

from openpangu_sft.conversations.opening import COMPRESSED, LOST, UTF8
from openpangu_sft.conversations.readers import RawRecord, read_json, read_lines
from openpangu_sft.conversations.tables import read_arrow, read_csv, read_parquet
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

READERS: dict[str, Callable[[Path, str], Iterator[RawRecord]]] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
SUFFIXES = (*READERS, *(kind + packed for kind in READERS for packed in COMPRESSED))  # ends of the names of raw files
_KNOWN = f"{', '.join(READERS)}, each also with {' or '.join(COMPRESSED)}"

_ABOUT = ("readme", "license", "licence")
# of `datasets`: the results of `map`, which it keeps beside its data, and metadata; LLaMA-Factory's list of data sets
_OF_DATASETS = re.compile(r"cache-.*\.arrow|(dataset_infos?|dataset_dict|state)\.json")
_SPLITS = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test|eval)(?=[/_.-])")


@dataclass(frozen=True)
class RawFile:
    """A raw file; `name` is its path below paths.raw, with slashes, or its own name if paths.raw is a file."""

    path: Path
    name: str

    @property
    def samples(self) -> str:
        """Name of its samples file: data-train-0.jsonl of data/train-0.parquet."""
        return self.name[: -len(suffix_of(self.path))].replace("/", "-") + ".jsonl"


def suffix_of(path: Path) -> str:
    """The end of a raw file's name, in lower case: .jsonl, .csv.gz; empty for another kind of file."""
    return next((suffix for suffix in SUFFIXES if path.name[1:].lower().endswith(suffix)), "")


def raw_files(path: Path) -> list[RawFile]:
    """The files to read: `path` itself, or all files below it, sorted; what is passed over is printed.

    Raises `UserError` where there is none, or an entry cannot be read.
    """
    if not path.exists():
        remedy = f"put files there ({_KNOWN}) or correct the path (paths.raw, data.sources)"
        raise UserError("no raw conversations here", where=path, remedy=remedy)
    passed: list[str] = []
    found = _below(path, "", (), passed) if path.is_dir() else [RawFile(path, path.name)]
    files = sorted(found, key=lambda file: PurePosixPath(file.name).parts)
    for file in files:
        require_usable(file)
    if passed:
        say(f"passed over: {', '.join(sorted(passed))}")
    if not files:
        raise UserError("holds no raw conversations", where=path, remedy=f"put files there: {_KNOWN}")
    splits = sorted({split for file in files for split in _SPLITS.findall(file.name.lower())})
    if len(files) > 1 and len(splits) > 1:
        say(f"all splits become samples: {', '.join(splits)}; for one, give a directory with its files only")
    return files


def _below(directory: Path, prefix: str, above: tuple[Path, ...], passed: list[str]) -> Iterator[RawFile]:
    """The files in a directory and those in it, in no order; names passed over go to `passed`."""
    above = (*above, directory.resolve())
    for entry in directory.iterdir():
        name = prefix + entry.name
        if _is_about(entry):
            passed.append(name)
        elif not entry.is_dir():
            yield RawFile(entry, name)
        elif entry.resolve() in above:
            raise UserError("is a link to a directory that it lies in", where=entry, remedy="remove it")
        else:
            yield from _below(entry, f"{name}/", above, passed)


def _is_about(entry: Path) -> bool:
    """Whether this is not data, but hidden, a cache, or describes the data."""
    name = entry.name.lower()
    if name.startswith(".") or not entry.is_file():
        return name.startswith(".")
    return bool(_OF_DATASETS.fullmatch(name)) or (name.startswith(_ABOUT) and not suffix_of(entry))


def require_usable(file: RawFile) -> None:
    """Raises `UserError` for a file that cannot be read, or of an unknown kind."""
    what, remedy = "", "move it away"
    if LOST.search(file.name):  # no manifest can hold it
        what, remedy = "has a name that is not UTF-8", "rename it"
    elif not file.path.is_file():
        what = "is not a regular file, or is a broken link"
    elif not suffix_of(file.path):
        what = f"unknown kind of file {''.join(file.path.suffixes[-2:]).lower() or '(no suffix)'}"
        remedy = f"known are {_KNOWN}: unpack or convert it, or move it away"
        if file.path.suffix.lower() == ".txt":
            remedy = "plain text has no roles: write each conversation as a JSON object on a line of a .jsonl file"
    if what:
        raise UserError(what, where=file.path, remedy=remedy)


def read_records(path: Path, encoding: str = UTF8) -> Iterator[RawRecord]:
    """The records of one file in their order; raises `UserError` where it is broken as a whole or holds none."""
    record, kind = None, f".{suffix_of(path).split('.')[1]}"
    for record in READERS[kind](path, encoding):
        yield record
    if record is None:
        raise UserError("holds no records", where=path, remedy="fill it, or move it away")
