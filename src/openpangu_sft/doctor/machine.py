"""What checks share: this machine as they see it (files below a root, environment, programs with a time limit), and
the finding that each gives: its state, what was found and expected, and the remedy.

A tool of a broken card may hang in the driver for ever.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from openpangu_sft.doctor.npu_smi import Chip, Listing, parse_info
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.ascend import text_of, visible
from openpangu_sft.util.errors import LONGEST, SizesUnknown, UserError, explain_os_error, printable

KILLED_SECONDS = 2.0  # wait for a killed program: one that the driver holds does not end
NPU_SMI_SECONDS = 20.0  # a healthy one answers in a second or two
IMAGE = "/opt/openpangu"  # where the project's image has what it adds to its base


class State(str, enum.Enum):
    """Only FAILED makes the exit code 1."""

    OK = "ok"
    WARNING = "warning"  # training may run; this cannot be decided from here
    FAILED = "failed"
    SKIPPED = "skipped"  # not applicable, or blocked by a failed check


@dataclass(frozen=True)
class Finding:
    state: State
    found: str  # what is there, several lines where there are several things; or why it was skipped
    remedy: str = ""  # of a warning or failure: what to do, as an imperative
    expected: str = ""  # what the recipe needs, unless `found` says it
    check: str = ""  # its name, set by `guarded`


ok, warning, failed, skipped = (partial(Finding, state) for state in State)


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Runs a check; an exception becomes its finding, so that no check stops the others."""
    try:
        found = check()
    except SizesUnknown as error:
        found = skipped(f"not known: {error.what} in {error.where}")
    except (UserError, OSError) as error:
        refusal, otherwise = (error, "") if isinstance(error, UserError) else (explain_os_error(error), "see dmesg")
        where = f"{refusal.where}: " if refusal.where is not None else ""
        found = failed(f"{where}{refusal.what}", refusal.remedy or otherwise)
    except Exception as error:
        found = failed(f"this check ended with {type(error).__name__}: {error}", "report this bug")
    shown = "\n".join(printable(line) for line in found.found[:LONGEST].splitlines())  # text of files and programs
    return replace(found, check=name, found=shown)


class Ran(NamedTuple):
    """Output of a program, stderr included, and why it does not count; `problem` is empty after exit code 0."""

    text: str
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """The root is another one in tests, as with HOST_ROOT of scripts/npus.sh; the environment is this process's."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=os.environ.copy)

    def path(self, name: str) -> Path:
        """An absolute path of the machine, below the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> Optional[str]:
        """A file's text; None where it cannot be read."""
        return text_of(self.path(name))

    def program(self, name: str, *elsewhere: str) -> Optional[str]:
        """Path of a program, on PATH or in one of the other folders."""
        folders = [self.environment.get("PATH", os.defpath), *(str(self.path(folder)) for folder in elsewhere)]
        return shutil.which(name, path=os.pathsep.join(folders))

    def run(self, *command: str, seconds: float, environment: Optional[Mapping[str, str]] = None) -> Ran:
        """Runs a program; after so many seconds it is killed with all its children."""
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
        except BaseException:  # Ctrl-C does not reach it: it has its own session
            _kill(process)
            raise
        code = process.returncode
        problem = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return Ran(text, problem if code else "")


def _kill(process: subprocess.Popen[str]) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.communicate(timeout=KILLED_SECONDS)
    except subprocess.TimeoutExpired:
        return "killed, and it does not end: the driver holds it"
    return "killed"


@dataclass(frozen=True)
class Context:
    recipe: Recipe
    machine: Machine

    @property
    def wants_npus(self) -> bool:
        """Whether training uses NPUs; the stand-in does not."""
        return self.recipe.train.engine == "mindspeed" and self.recipe.train.device != "cpu"

    @property
    def in_image(self) -> bool:
        return self.machine.path(f"{IMAGE}/versions.json").is_file()

    @property
    def in_container(self) -> bool:
        marks = any(self.machine.path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
        return self.in_image or marks or "KUBERNETES_SERVICE_HOST" in self.machine.environment

    @cached_property
    def npu_smi(self) -> str:
        """Its path; empty where it is not installed."""
        return self.machine.program("npu-smi", "/usr/local/sbin", "/usr/local/bin") or ""

    @cached_property
    def npus(self) -> Listing:
        if not self.npu_smi:
            remedy = "install the Ascend driver on the host; a container gets npu-smi from it (make does so)"
            return Listing(problem="npu-smi is not installed", remedy=remedy)
        ran = self.ask_npu_smi("info")
        if ran.problem and not ran.text.strip():
            remedy = "a card or the driver hangs: as root, see dmesg; reboot the host"
            return Listing(problem=f"npu-smi info: {ran.problem}", remedy=remedy)
        return parse_info(ran.text)

    @cached_property
    def visible(self) -> tuple[Chip, ...]:
        """The listed chips that CANN shows to a process here."""
        chips = self.npus.chips
        return tuple(chips[index] for index in visible(self.machine.environment, len(chips)))

    @property
    def used(self) -> tuple[Chip, ...]:
        """The chips that training takes: process n takes visible chip n."""
        return self.visible[: self.recipe.parallel.devices_per_node]

    @cached_property
    def device_files(self) -> list[Path]:
        """/dev/davinci0 and so on by number; those that CANN shows to a process here."""
        files = [file for file in self.machine.path("/dev").glob("davinci[0-9]*") if file.name[7:].isdigit()]
        files.sort(key=lambda file: int(file.name[7:]))
        return [files[index] for index in visible(self.machine.environment, len(files))]

    def ask_npu_smi(self, *arguments: str) -> Ran:
        return self.machine.run(self.npu_smi, *arguments, seconds=NPU_SMI_SECONDS)
