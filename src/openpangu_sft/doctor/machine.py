"""This machine as the checks see it: its files below a root, its environment, and programs that may not answer.

A tool of a broken card may wait for ever inside the driver, so every program has a time after which it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

KILLED_SECONDS = 2.0
"""How long a killed program is waited for: one that the driver holds does not end."""


@dataclass(frozen=True)
class Ran:
    """What a program has answered.

    Args:
        text: its output, errors among it.
        problem: why there is no answer that counts; empty where it ended with 0.
    """

    text: str
    problem: str = ""


class Machine:
    """Where files are looked for, and with which environment.

    Args:
        root: what stands for /; another one for tests, as with HOST_ROOT of scripts/npus.sh.
        environment: the variables that count (this process's).
    """

    def __init__(self, root: Path = Path("/"), environment: Optional[Mapping[str, str]] = None) -> None:
        self.root = root
        self.environment = dict(os.environ if environment is None else environment)

    def path(self, name: str) -> Path:
        """An absolute path of the machine, below the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> Optional[str]:
        """A file's text; None where there is none to be read."""
        try:
            return self.path(name).read_text("utf-8", errors="replace")
        except OSError:
            return None

    def program(self, name: str, *elsewhere: str) -> Optional[str]:
        """Where a program is: on PATH, or in one of the folders that are not on everybody's."""
        found = shutil.which(name, path=self.environment.get("PATH", os.defpath))
        places = [found, *(str(self.path(folder) / name) for folder in elsewhere)]
        return next((place for place in places if place and os.access(place, os.X_OK)), None)

    def run(self, *command: str, seconds: float, environment: Optional[Mapping[str, str]] = None) -> Ran:
        """Runs a program that must have ended after so many seconds, with all that it has started."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**self.environment, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            return Ran("", f"{command[0]} does not start: {error.strerror}")
        try:
            text = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            return Ran("", f"no answer within {seconds:.0f} s; {_kill(process)}")
        except BaseException:  # Ctrl-C: it is in a session of its own
            _kill(process)
            raise
        code = process.returncode
        if code < 0:
            return Ran(text, f"ended by {_signal_name(-code)}")
        return Ran(text, f"exit code {code}" if code else "")


def _kill(process: subprocess.Popen[str]) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.communicate(timeout=KILLED_SECONDS)
    except subprocess.TimeoutExpired:
        return "killed, and it does not end: the driver holds it"
    return "killed"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
