"""A host with a Docker engine that only notes what it is called with, for scripts/run.sh and scripts/compose.sh."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = """#!/bin/bash
case "$1 $2" in
'version --format') exit "${NO_ENGINE:-0}" ;;
'image inspect') [[ " ${IMAGES:-} " == *" $3 "* ]] && echo sha256:abc ;;
'info --format') echo "${RUNTIMES:-{\\"runc\\":{\\}\\}}" ;;
'run '*) shift; printf '%s\\0' "$@" >"$CALLS"; exit "${FAKE_EXIT:-0}" ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
NPU, CPU = "openpangu-sft:1.2.3-npu", "openpangu-sft:1.2.3-cpu"


class Host:
    """An offline bundle's folder on a host with this Docker engine, these images and these files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"  # what HOST_ROOT names
        self.folder = directory / "folder"
        self.calls = directory / "calls"
        (self.folder / "scripts/image").mkdir(parents=True)
        for script in ("run.sh", "npus.sh", "compose.sh", "image/names.sh"):
            shutil.copy(ROOT / "scripts" / script, self.folder / "scripts" / script)
        (self.folder / "VERSION").write_text("1.2.3\n")
        docker = directory / "docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        self.environment = {"PATH": os.environ["PATH"], "DOCKER": str(docker), "CALLS": str(self.calls)}
        self.environment["HOST_ROOT"] = str(self.root)

    def add(self, *paths: str) -> None:
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).touch()

    def add_npus(self, count: int) -> None:
        self.add("dev/davinci_manager", "dev/devmm_svm", "dev/hisi_hdc", *(f"dev/davinci{n}" for n in range(count)))

    def script(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "scripts" / name), *arguments]
        both = {**self.environment, **environment}
        return subprocess.run(command, cwd=self.folder, env=both, text=True, capture_output=True, check=False)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.script("run.sh", "openpangu-sft", *arguments, **environment)

    def called_with(self) -> list[str]:
        return self.calls.read_text().split("\0")[:-1]

    def given(self, option: str) -> list[str]:
        """The values of one of docker run's options."""
        call = self.called_with()
        return [call[number + 1] for number, word in enumerate(call) if word == option]

    def mounts(self) -> list[tuple[str, str]]:
        """What is mounted from where to where, read as the engine does: CSV, a field for each key."""
        found = []
        for value in self.given("--mount"):
            fields = dict(field.split("=", 1) for field in next(csv.reader([value])))
            assert fields.pop("type") == "bind"
            found.append((fields.pop("source"), fields.pop("target")))
            assert not fields
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)
