"""Artifacts: the directories that stages write, complete or absent, each with a manifest of what made it.

A stage writes into a hidden staging directory beside its target. Every file is flushed to the disk, the manifest is
written last, and a rename puts the directory in place. If the stage is killed, the earlier result is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from filelock import FileLock, Timeout
from pydantic import ValidationError

from openpangu_sft import __version__
from openpangu_sft.artifacts.atomic import sync_directory, write_durably
from openpangu_sft.artifacts.content import Content
from openpangu_sft.util.errors import UserError, first_complaint, naming

MANIFEST = "manifest.json"
ROLES_SUFFIX = "_roles.bin"
"""Of files that explain a dataset's tokens and are no part of what is trained on: outside its digest."""
FLUSHED_AT_ONCE = 4
OLD_DEFAULTS = {
    "data.validation_share": 0.0,
    "data.turns": "strict",
    "data.thinking": "last",
    "data.train_on": "all",
    "data.tool_prompt": None,
    "data.ignore_keys": [],
    "train.loss": "micro_batch",
    "train.lora": {"rank": 0},
    "train.lr_warmup_ratio": 0.0,
    "train.lr_wsd_decay_ratio": 0.1,
}
"""Settings that manifests of earlier versions lack, with the values that these versions used."""


@dataclass
class Manifest:
    """What made an artifact. Holds no time and no host name, so that equal inputs give equal bytes.

    `files` has bytes and sha256 of every file by its path below the artifact, and is filled in when it is put in place.
    """

    kind: str  # samples, shard, dataset, mcore, run, hf or sources
    settings: dict[str, Any] = field(default_factory=dict)  # those of the recipe that affect the content, by dotted key
    inputs: dict[str, str] = field(default_factory=dict)  # sha256 of every input, by name
    counts: dict[str, Any] = field(default_factory=dict)  # figures for the next stage and the user
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: str = __version__

    @property
    def digest(self) -> str:
        """sha256 over the checksums of all files but roles: what the next stage records as its input."""
        sums = {name: entry["sha256"] for name, entry in sorted(self.files.items()) if not name.endswith(ROLES_SUFFIX)}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


class _Section(dict[str, Any]):
    """An object of a manifest that was read: raises `UserError` for a key that it lacks."""

    def __init__(self, content: Any = (), complaint: Callable[[str], Exception] = KeyError) -> None:
        super().__init__(content)
        self._complaint = complaint

    def __missing__(self, key: str) -> Any:
        raise self._complaint(f"{key} is missing")


def sha256_of(path: Path, advance: Callable[[int, str], object] = lambda units, note: None, **span: int) -> str:
    """sha256 of a file, or of a span (see `blocks_of`), as hexadecimal; `advance` is called with the bytes read."""
    digest = hashlib.sha256()
    for block in blocks_of(path, **span):
        digest.update(block)
        advance(len(block), "")
    return digest.hexdigest()


def blocks_of(path: Path, begin: int = 0, end: int = sys.maxsize) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, some at a time; fewer where it is shorter."""
    with path.open("rb") as stream:
        stream.seek(begin)
        while block := stream.read(min(1 << 20, end - stream.tell())):
            yield block


def files_digest(files: Iterable[Path], known: Optional[Mapping[Path, str]] = None) -> str:
    """sha256 over names and checksums of files, in the given order; `known` checksums are not computed."""
    text = "".join(f"{path.name} {(known or {}).get(path) or sha256_of(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path, kind: str, remedy: str) -> Manifest:
    """Reads the manifest of a complete artifact and checks the sizes of its files.

    Raises `UserError` where it is missing or of another kind, or a file is missing, cut short or edited; the remedy,
    such as "run make convert", is for one that is missing or damaged.
    """
    path = directory / MANIFEST
    if not directory.exists() and _retired(directory).exists():
        with only_one_run(directory):
            _restore(directory)
    if not path.is_file():
        what = "there is no finished result here" if directory.is_dir() else "no such directory"
        raise UserError(f"{what} (expected: {kind})", where=directory, remedy=remedy)
    manifest = parse_manifest(path, remedy)
    if manifest.kind != kind:
        raise UserError(f"holds {manifest.kind}, expected {kind}", where=directory, remedy="check paths in the recipe")
    require_files(directory, manifest, remedy)
    return manifest


def require_files(directory: Path, manifest: Manifest, remedy: str) -> None:
    """Raises `UserError` for the first file of an artifact that is missing, or of another size."""
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise UserError("a file of this result is missing", where=file, remedy=remedy)
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(f"{size} bytes, expected {entry['bytes']}", where=file, remedy=remedy)


def require_settings(directory: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Raises `UserError` where an artifact was made with other settings than the recipe's: all keys and both values."""
    made_with = {**OLD_DEFAULTS, **made_with}
    differing = [
        f"{key} = {made_with.get(key, 'nothing')}, the recipe says {value}"
        for key, value in wanted.items()
        if key not in made_with or made_with[key] != value
    ]
    if differing:
        raise UserError(f"made with {'; '.join(differing)}", where=directory, remedy=remedy)


def sum_counts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums the counts of artifacts of one kind; those by name, like reasons, name by name.

    Earlier versions wrote fewer counts: one that is missing is 0.
    """
    total: dict[str, Any] = {}
    for single in counts:
        for name, value in single.items():
            if isinstance(value, dict):
                total[name] = dict(sorted(sum_counts([total.get(name, {}), value]).items()))
            elif isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total


@contextlib.contextmanager
def staged_directory(target: Path, manifest: Manifest) -> Iterator[Path]:
    """Yields an empty staging directory, which replaces `target` when the block ends without an error.

    The manifest may be filled in inside the block, also with entries of files whose checksums are known. Only an
    artifact of the same kind is ever replaced: a mistyped path costs no file of the user's.
    Raises `UserError` where the target is something else, or another process is writing it.
    """
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one_run(target):
            _restore(target)
            _require_replaceable(target, manifest.kind)
            staging, retired = target.parent / f".{target.name}.staging", _retired(target)
            for leftover in (staging, retired):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
                manifest.files = _entries(staging, manifest.files)
                write_manifest(staging, manifest)
                for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
                    sync_directory(directory)
                if target.exists():
                    target.rename(retired)
                staging.rename(target)
                sync_directory(target.parent)
                shutil.rmtree(retired, ignore_errors=True)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                _restore(target)


def _retired(target: Path) -> Path:
    """Path of the earlier result between the two renames."""
    return target.parent / f".{target.name}.retired"


def _restore(target: Path) -> None:
    """Puts the earlier result back if a run was stopped between the two renames."""
    if _retired(target).is_dir():
        try:
            _retired(target).rename(target)  # succeeds only where nothing or an empty directory is
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def require_no_obstacle(target: Path) -> None:
    """Raises `UserError` where no directory can be renamed to: a file, a link, a mount point."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError("is in the way: not a directory", where=target, remedy="remove it or choose another path")
    if target.is_mount():
        what = "is a mount point, so a result cannot be put in its place"
        raise UserError(what, where=target, remedy="mount its parent instead")


def _require_replaceable(target: Path, kind: str) -> None:
    """Raises `UserError` unless the target is absent, empty, or an artifact of this kind without foreign files."""
    require_no_obstacle(target)
    if not target.is_dir() or not any(target.iterdir()):
        return
    remedy = "choose another path in the recipe"
    if not (target / MANIFEST).is_file():
        raise UserError("is not empty and was not made by this stage", where=target, remedy=remedy)
    manifest = parse_manifest(target / MANIFEST, remedy)
    if manifest.kind != kind:
        raise UserError(f"holds {manifest.kind}, not {kind}", where=target, remedy=remedy)
    for name in _files_below(target):
        if name not in manifest.files and name != MANIFEST:
            what = "was not made by this stage, and would be lost with the result it lies in"
            raise UserError(what, where=target / name, remedy="move it away")


def parse_manifest(path: Path, remedy: str) -> Manifest:
    """Reads a manifest of any kind, without a look at its files; raises `UserError` where it is none."""

    def complaint(what: str) -> UserError:
        return UserError(f"not a manifest: {what}", where=path, remedy=remedy)

    try:
        text = path.read_bytes()
        Content.model_validate_json(text)
        content = json.loads(text)  # as it is: a model would put its own fields first
    except ValidationError as error:
        raise complaint(first_complaint(error)) from None
    for name in ("settings", "inputs", "counts"):
        content[name] = _Section(content.get(name, {}), complaint)
    if "validation" in content["counts"]:
        content["counts"]["validation"] = _Section(content["counts"]["validation"], complaint)
    return Manifest(**content)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of an artifact atomically."""
    write_durably(directory / MANIFEST, json.dumps(asdict(manifest), ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def only_one_run(target: Path) -> Iterator[None]:
    """Holds the lock of an output directory, which the kernel releases when the process dies.

    Raises `UserError` where another process holds it, or the file system has no locks.
    """
    lock = FileLock(str(target.parent / f".{target.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        remedy = "wait for it or choose another path"
        raise UserError("another run is writing here", where=target, remedy=remedy) from None
    except NotImplementedError:  # for instance Lustre mounted without flock
        remedy = "mount it with them or use another"
        raise UserError("this file system has no locks (flock)", where=target.parent, remedy=remedy) from None
    with held:
        yield


def _files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _entries(directory: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Flushes the files of a directory to the disk, some at a time; returns their manifest entries."""

    def entry(name: str) -> dict[str, Any]:
        path = directory / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        size = path.stat().st_size
        assert name not in known or known[name]["bytes"] == size, path
        return known.get(name) or {"bytes": size, "sha256": sha256_of(path)}

    names = _files_below(directory)
    with ThreadPoolExecutor(FLUSHED_AT_ONCE) as pool:
        return dict(zip(names, pool.map(entry, names)))
