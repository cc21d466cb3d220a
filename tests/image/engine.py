"""The Docker engine, and base images to build on if no registry is reachable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional

import pytest

from openpangu_sft import __version__
from openpangu_sft.training.mindspeed.sources import SOURCES, VARIABLES, find_sources

ROOT = Path(__file__).parents[2]
CPU, NPU = f"openpangu-sft:{__version__}-cpu", f"openpangu-sft:{__version__}-npu"
CANARY = "canary-4711"
"""Must not occur in an image: part of a mirror's URL, of the certificates and of a proxy variable."""

REGISTRY_BASES = {"CPU_BASE": "docker.io/library/python:3.9-slim-bullseye"}
REGISTRY_BASES.update(BASE=REGISTRY_BASES["CPU_BASE"], BUILD_BASE="docker.io/library/buildpack-deps:bullseye")
DEBIAN = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
BASE_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
BUILD_PACKAGES = "ca-certificates,curl,gcc,g++,libc6-dev,make,xz-utils,python3-dev"
BUILD_PACKAGES += ",libbz2-dev,libffi-dev,liblzma-dev,libsqlite3-dev,libssl-dev,zlib1g-dev"


def find_docker() -> Optional[str]:
    """A client with a running engine; Debian's own first, because it has BuildKit."""
    for client in (os.environ.get("DOCKER"), "/usr/bin/docker", shutil.which("docker")):
        if client and Path(client).exists() and not subprocess.run([client, "info"], capture_output=True).returncode:
            return client
    return None


class Engine:
    """Calls the client; a failed call raises with its output."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.environment = {**os.environ, "DOCKER": client}
        for name in ("MAKEFLAGS", "MAKELEVEL", "TARGET", "ARCH", "CACHE", "RUNTIME", "NPUS", "HOST_UID", "HOST_GID"):
            self.environment.pop(name, None)

    def __call__(self, *arguments: str, text: Optional[str] = None) -> str:
        done = subprocess.run([self.client, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", name))[0]
        return found

    def has(self, image: str) -> bool:
        return not subprocess.run([self.client, "image", "inspect", image], capture_output=True).returncode

    def make(self, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        both = {**self.environment, **environment}
        return subprocess.run(["make", *arguments], cwd=folder, env=both, capture_output=True, text=True, check=False)

    def bases(self, work: Path, arch: str = "") -> dict[str, str]:
        """Base images for make image, created by debootstrap if no registry is reachable.

        Args:
            arch: amd64 or arm64, if not this machine's.

        Raises:
            LookupError: no base is available.
        """
        given = {name: os.environ[name] for name in REGISTRY_BASES if name in os.environ}
        if given.keys() == REGISTRY_BASES.keys():
            return given
        if answers("https://registry-1.docker.io/v2/"):
            return {**REGISTRY_BASES, **given}
        if not shutil.which("debootstrap") or os.geteuid():
            raise LookupError("no registry is reachable, and debootstrap is missing or not permitted")
        base = self.debootstrap(work, "openpangu-test/base", BASE_PACKAGES, arch)
        build = self.debootstrap(work, "openpangu-test/build", BUILD_PACKAGES, arch)
        return {"BASE": base, "CPU_BASE": base, "BUILD_BASE": build, **given}

    def debootstrap(self, work: Path, image: str, packages: str, arch: str = "", suite: str = "bullseye") -> str:
        """A Debian image, named after its architecture if that is another one; kept between test runs."""
        image += f"-{arch}" if arch else ""
        if self.has(image):
            return image
        root, cache = work / image.replace("/", "-"), work / f"debs{arch}"
        cache.mkdir(exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", f"--cache-dir={cache}"]
        command += [f"--arch={arch}"] if arch else []
        done = subprocess.run([*command, suite, str(root), DEBIAN], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        for unwanted in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / unwanted)
        # Built, not imported: docker import of 20.10 marks every image with this machine's architecture.
        context = work / "context"
        context.mkdir(exist_ok=True)
        subprocess.run(["tar", "-C", str(root), "-cf", str(context / "root.tar"), "."], check=True)
        (context / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        platform = [f"--platform=linux/{arch}"] if arch else []
        environment = {**self.environment, "DOCKER_BUILDKIT": "1"}
        build = [self.client, "build", *platform, "--tag", image, str(context)]
        subprocess.run(build, check=True, capture_output=True, env=environment)
        shutil.rmtree(root)
        shutil.rmtree(context)
        return image


def require_sources() -> None:
    """Skips unless `make sources` has run or variables name the repositories."""
    missing = [name for name in VARIABLES.values() if not os.environ.get(name)]
    if missing and not (SOURCES.is_dir() and find_sources()):
        pytest.skip(f"the upstream sources are not available: no make sources here, and {', '.join(missing)} not set")


def torch_build() -> str:
    """Which torch is available: PyTorch's CPU build, or PyPI's."""
    return os.environ.get("TORCH") or ("cpu" if answers("https://download.pytorch.org/whl/cpu/") else "pypi")


def answers(address: str) -> bool:
    """Whether a request succeeds; a proxy may resolve a name and then refuse the request."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError as error:
        return error.code == 401  # a registry that requires a login
    except OSError:
        return False
    return True
