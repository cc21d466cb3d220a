"""Runs a command and measures its seconds and the most memory that it and all its processes held at once.

Memory is the sum of PSS over the command's processes, from /proc/PID/smaps_rollup, sampled every 0.2 s. Not of RSS:
forked workers share most of their pages with the process that made them, and RSS would count these once for each.
PSS divides every page by the number of those who share it. PSS holds pages of mapped files as well, which the kernel
can take back at any time; the sum without them is given beside it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from openpangu_sft.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN_SAMPLES = 0.2
COST_LIMIT = 30
"""A sample that takes long (it walks the page tables) is followed by a pause this many times as long."""


class Measured(NamedTuple):
    """What a command took.

    Args:
        seconds: from its start to its end.
        peak: most bytes of PSS at once.
        peak_without_files: the same without pages of mapped files.
        output: what it wrote to stdout.
    """

    seconds: float
    peak: int
    peak_without_files: int
    output: str = ""

    def then(self, other: Measured) -> Measured:
        """This command and another one after it."""
        without_files = max(self.peak_without_files, other.peak_without_files)
        return Measured(self.seconds + other.seconds, max(self.peak, other.peak), without_files)


class Memory(threading.Thread):
    """Samples the memory of a session until told to stop.

    Args:
        session: its id; the command is started in a session of its own, so all its processes are found by it.
    """

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.peak = self.peak_without_files = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Samples; the thread's own function."""
        pause = 0.0
        while not self._over.wait(pause):
            began = time.perf_counter()
            sums = [_pss(process) for process in _processes(self.session)]
            self.peak = max(self.peak, sum(pss for pss, _ in sums))
            self.peak_without_files = max(self.peak_without_files, sum(pss - files for pss, files in sums))
            pause = max(SECONDS_BETWEEN_SAMPLES, COST_LIMIT * (time.perf_counter() - began))

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join()


def run_measured(command: Sequence[str], log: Path, **environment: str) -> Measured:
    """Runs a command to its end.

    Args:
        command: what follows `python`; run in the repository's root.
        log: where its stderr goes.
        environment: more variables.

    Raises:
        UserError: it failed; its last lines are in the message.
    """
    os.sync()  # what was written before is not to be paid for by this command
    with log.open("w", encoding="utf-8") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,
        )
        memory = Memory(process.pid)
        memory.start()
        try:
            output = process.communicate()[0]
            seconds = time.perf_counter() - began
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            memory.stop()
    if process.returncode:
        said = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
        raise UserError(f"{' '.join(command[:3])} ended with exit code {process.returncode}:\n{said}")
    return Measured(seconds, memory.peak, memory.peak_without_files, output)


def machine(*packages: str) -> str:
    """What matters of the machine and of its software, in one line; nothing that tells whose it is."""
    cores = len(os.sched_getaffinity(0))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    model = names[0] if names else platform.machine()
    return f"{cores} cores, {model}, {gigabytes:.0f} GB; Python {platform.python_version()}, {software}"


def print_table(rows: list[list[str]]) -> None:
    """Prints a Markdown table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def _processes(session: int) -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may be gone
                behind_name = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                if int(behind_name[3]) == session:
                    yield entry


def _pss(process: Path) -> tuple[int, int]:
    """Bytes of PSS of a process, and how many of them are pages of files."""
    fields = {"Pss:": 0, "Pss_File:": 0}
    for line in _lines(process / "smaps_rollup"):
        name, _, rest = line.partition(" ")
        if name in fields:
            fields[name] = 1024 * int(rest.split()[0])
    return fields["Pss:"], fields["Pss_File:"]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:  # the process is gone, or the system does not have the file
        return []
