"""Runs a command and measures its seconds and the peak memory of all its processes together.

Memory is the sum of PSS over the command's processes, from /proc/PID/smaps_rollup, sampled every 0.2 s. Not of RSS:
forked workers share most pages with their parent, and RSS counts these once per process; PSS divides a page by the
number of processes that share it. PSS includes pages of mapped files, which the kernel can reclaim at any time; the sum
without them is reported too.
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
"""Pause after a sample, in multiples of its duration: sampling walks the page tables."""


class Measured(NamedTuple):
    """Wall-clock seconds, peak bytes of PSS with and without pages of mapped files, and stdout of a command."""

    seconds: float
    peak: int
    peak_without_files: int
    output: str = ""

    def then(self, other: Measured) -> Measured:
        """This command followed by another one."""
        without_files = max(self.peak_without_files, other.peak_without_files)
        return Measured(self.seconds + other.seconds, max(self.peak, other.peak), without_files)


class Memory(threading.Thread):
    """Samples the memory of all processes of a session: the command is started in its own."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.peak = self.peak_without_files = 0
        self._over = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            began = time.perf_counter()
            sums = [_pss(process) for process in _processes(self.session)]
            self.peak = max(self.peak, sum(pss for pss, _ in sums))
            self.peak_without_files = max(self.peak_without_files, sum(pss - files for pss, files in sums))
            pause = max(SECONDS_BETWEEN_SAMPLES, COST_LIMIT * (time.perf_counter() - began))

    def stop(self) -> None:
        self._over.set()
        self.join()


def run_measured(command: Sequence[str], log: Path, **environment: str) -> Measured:
    """Runs `python COMMAND` in the repository's root, with stderr in a log and additional variables.

    Raises:
        UserError: it failed; the message has its last lines.
    """
    os.sync()  # earlier writes must not slow down this command
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
    """The machine and its software in one line, without anything that identifies its owner."""
    cores = len(os.sched_getaffinity(0))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    model = names[0] if names else platform.machine()
    return f"{cores} cores, {model}, {gigabytes:.0f} GB; Python {platform.python_version()}, {software}"


def print_table(rows: list[list[str]]) -> None:
    """Prints a Markdown table; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def _processes(session: int) -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # the process may have ended
                after_name = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                if int(after_name[3]) == session:
                    yield entry


def _pss(process: Path) -> tuple[int, int]:
    """Bytes of PSS of a process, and those of file pages."""
    fields = {"Pss:": 0, "Pss_File:": 0}
    for line in _lines(process / "smaps_rollup"):
        name, _, rest = line.partition(" ")
        if name in fields:
            fields[name] = 1024 * int(rest.split()[0])
    return fields["Pss:"], fields["Pss_File:"]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:  # the process has ended, or the system has no such file
        return []
