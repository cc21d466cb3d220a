"""A machine with NPUs, made of recordings: files below a root of its own, and an npu-smi that repeats one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, MakeRecipe
from openpangu_sft.doctor.machine import Context, Finding, Machine

Check = Callable[[Context], Finding]
MakeContext = Callable[..., Context]

RECORDED = Path(__file__).parent / "npu_smi"
TOOLKIT = "/usr/local/Ascend/ascend-toolkit/latest"
SYSTEM = ("proc", "sys", "dev/shm")
"""The real ones, until something is written there."""
DRIVER = "/usr/local/Ascend/driver"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text("utf-8")


class FakeMachine:
    """The root, and the environment of a process on it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.programs = directory / "bin"
        self.programs.mkdir(parents=True)
        self.environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "HOST_ROOT": str(self.root),
            "HCCL_IF_BASE_PORT": "20000",  # none of those that the system gives to whoever asks for any
            "DOCKER": "no-docker",
        }
        (self.root / "dev").mkdir(parents=True)
        for system in SYSTEM:
            (self.root / system).symlink_to(f"/{system}")

    def write(self, path: str, text: str = "") -> Path:
        """Writes a file; of the real system's folders then nothing is seen any more."""
        file = self.root / path.lstrip("/")
        for system in SYSTEM:
            if self.root / system in file.parents and (self.root / system).is_symlink():
                (self.root / system).unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        return file

    def program(self, name: str, script: str) -> None:
        file = self.programs / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def add_npus(self, recording: str, count: int = 8, board: str = "board.txt", code: int = 0) -> None:
        """An npu-smi and the device files."""
        info, of_board = (shlex.quote(str(RECORDED / name)) for name in (recording, board))
        self.program("npu-smi", f'case "$*" in info) cat {info} ;; *) cat {of_board} ;; esac\nexit {code}')
        for name in ["davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{number}" for number in range(count))]:
            self.write(f"/dev/{name}")

    def add_stack(self, driver: str = "driver_24.1.rc3.info", cann: str = "cann_8.0.RC3.info") -> None:
        """Driver, firmware and CANN, with its environment."""
        self.write(f"{DRIVER}/version.info", recorded(driver))
        self.write("/usr/local/Ascend/firmware/version.info", recorded("firmware_24.1.rc3.info"))
        self.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", recorded(cann))
        self.write("/usr/local/Ascend/ascend-toolkit/set_env.sh")
        self.write(f"{TOOLKIT}/lib64/libhccl.so")
        self.write(f"{DRIVER}/lib64/driver/libascend_hal.so")
        self.environment["ASCEND_TOOLKIT_HOME"] = TOOLKIT
        self.environment["LD_LIBRARY_PATH"] = f"{TOOLKIT}/lib64:{DRIVER}/lib64/driver"

    def add_torch_npu(self, version: str = "2.1.0.post8") -> None:
        """The stand-in in the place of torch_npu, installed under its name."""
        info = self.root / f"site/torch_npu-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n")
        self.environment["PYTHONPATH"] = f"{info.parent}:{ROOT / 'src/npu_standin'}"

    def doctor(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the command, as make does."""
        return subprocess.run(
            [sys.executable, "-m", "openpangu_sft", "doctor", "--recipe", "recipes/demo.yaml", *arguments],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )


def states(finished: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """State of each check, of the output of doctor --json."""
    return {entry["check"]: entry["state"] for entry in checks(finished)}


def checks(finished: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads(finished.stdout)
    found: list[dict[str, Any]] = content["checks"]
    return found


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


NODES = ["parallel.nodes=2", "train.global_batch_size=16"]
ON_NPUS = ["train.engine=mindspeed", "parallel.devices_per_node=8", "train.global_batch_size=8"]


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    """A machine made of recordings, with nothing on it yet."""
    return FakeMachine(tmp_path / "fake")


@pytest.fixture
def context(fake: FakeMachine, make_recipe: MakeRecipe) -> Callable[..., Context]:
    """Makes a recipe for eight NPUs, with overrides, on the fake machine as it is now."""

    def make(*overrides: str, **environment: str) -> Context:
        machine = Machine(fake.root, {**fake.environment, **environment})
        return Context(make_recipe(*ON_NPUS, "train.device=auto", *overrides), machine)

    return make
