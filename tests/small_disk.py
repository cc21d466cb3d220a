"""Small disks that fill up: mounted, or imitated where this user may not mount.

root mounts a tmpfs. A plain user does so in a user namespace, for which the test runs in a process of its own. Most
containers and every chroot forbid both: there, writing is limited in Python.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import pytest

PAGE = 4096
NO_RIGHT = "no right to mount here: not root, and no user namespaces (in a container or a chroot, as a rule)"
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000  # unshare(2)


class SmallDisk:
    """Makes one small disk at `directory`.

    Args:
        directory: made by the call.
        monkeypatch: undoes an imitation.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.monkeypatch = directory, monkeypatch

    def __call__(self, kib: int, real: bool = False) -> Path:
        """The directory of a disk of so many KiB; `real`: skips the test rather than imitate it."""
        self.directory.mkdir()
        if means() != "imitation":
            command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(self.directory)]
            subprocess.run(command, check=True)
        elif real:
            pytest.skip(NO_RIGHT)
        else:
            imitate(self.directory, kib * 1024, self.monkeypatch)
        return self.directory

    def remove(self) -> None:
        """Unmounts it; what was mounted in a namespace is gone with that."""
        if self.directory.is_mount():
            subprocess.run(["umount", str(self.directory)], check=True)


@lru_cache
def means() -> str:
    """How this user gets a small disk: mount, namespace or imitation."""
    for name, options in (("mount", []), ("namespace", ["--user", "--map-root-user"])):
        command = ["unshare", *options, "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(command, capture_output=True).returncode == 0:
                return name
    return "imitation"


def run_in_namespace(test: Callable[[], object]) -> None:
    """Runs a test in a forked process that is root in a user namespace; its outcome becomes that of the caller.

    In a fork, as a process with threads cannot enter one.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as stream:
            stream.write(pickle.dumps(_outcome(test)))
            stream.flush()
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as stream:
            content = stream.read()
    finally:
        os.kill(pid, signal.SIGKILL)  # where pytest-timeout ended the wait
        os.waitpid(pid, 0)
    assert content, "the test's process died"
    outcome, text = pickle.loads(content)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)


def _outcome(test: Callable[[], object]) -> tuple[str, str]:
    try:
        _enter_namespace()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # libgomp's threads are not in a fork
        test()
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""


def _enter_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def imitate(directory: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets files below `directory` take no more than `size` bytes together, in whole pages.

    It holds for what Python's own files write, in this process and its forks; os.statvfs says what is free.
    """
    real_open, real_statvfs = io.open, os.statvfs

    def inside(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and directory in Path(path).absolute().parents

    def free_pages() -> int:
        taken = sum(-(-path.stat().st_size // PAGE) for path in directory.rglob("*") if path.is_file())
        return max(0, size // PAGE - taken)

    class LimitedFile(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            pages = -(-os.fstat(self.fileno()).st_size // PAGE) + free_pages()
            room = pages * PAGE - self.tell()
            if room <= 0 < view.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(view[: max(0, room)])

    def limited(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        if not inside(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *arguments, **options)
        raw = LimitedFile(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        text = [*arguments, *(options.get(name) for name in ("encoding", "errors", "newline")[len(arguments) :])]
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text[:3])

    def statvfs(path: Any) -> os.statvfs_result:
        if not inside(path) and Path(path).absolute() != directory:
            return real_statvfs(path)
        pages = free_pages()
        return os.statvfs_result((PAGE, PAGE, size // PAGE, pages, pages, 0, 0, 0, 0, 255))

    monkeypatch.setattr(io, "open", limited)
    monkeypatch.setattr(builtins, "open", limited)
    monkeypatch.setattr(os, "statvfs", statvfs)
