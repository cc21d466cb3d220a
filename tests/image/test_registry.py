"""A real registry: bases are pinned by its digests, an image is built from them and pushed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.engine import ROOT, Engine

CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {storage}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
DOCKERFILE = """ARG BASE={registry}/base:1
ARG CPU_BASE={registry}/base:1
ARG BUILD_BASE={registry}/base:1
FROM ${{CPU_BASE}} AS cpu
COPY versions.json sbom.json provenance.json /opt/openpangu/
ARG COMMIT
LABEL org.opencontainers.image.revision="${{COMMIT}}"
CMD ["none"]
"""


@pytest.fixture
def registry(engine: Engine, place: Path) -> Iterator[str]:
    """The address of a new registry."""
    if not (program := shutil.which("docker-registry")):
        pytest.skip("no docker-registry is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = place / "registry.yml"
    config.write_text(CONFIG.format(storage=place / "storage", port=port))
    server = subprocess.Popen([program, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def folder(engine: Engine, registry: str, place: Path) -> Iterator[Path]:
    """A small project with the real scripts, and a base in the registry."""
    folder = place / "project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "locks", folder / "locks")
    (folder / "locks/bases.txt").unlink(missing_ok=True)
    (folder / "VERSION").write_text("0-registry\n")
    (folder / "Dockerfile").write_text(DOCKERFILE.format(registry=registry))
    for name in ("versions.json", "sbom.json", "provenance.json"):
        (folder / name).write_text("{}\n")
    base = f"{registry}/base:1"
    subprocess.run([engine.client, "import", "-", base], input=_empty_tar(place), check=True, capture_output=True)
    engine("push", base)
    engine("rmi", base)
    yield folder
    for image in engine("images", "--format", "{{.Repository}}:{{.Tag}}@{{.ID}}").splitlines():
        if registry in image or "0-registry" in image:
            subprocess.run([engine.client, "rmi", "--force", image.split("@")[1]], capture_output=True)


def _empty_tar(place: Path) -> bytes:
    (place / "etc").mkdir()
    return subprocess.run(["tar", "-C", str(place), "-c", "etc"], check=True, capture_output=True).stdout


def script(engine: Engine, folder: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [f"scripts/image/{name}"],
        cwd=folder,
        env={**engine.environment, "TARGET": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def commit(folder: Path) -> str:
    (folder / ".gitignore").write_text("/dist/\n/.sources/\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return head.stdout.strip()


def test_locked_by_digest_built_and_pushed(engine: Engine, registry: str, folder: Path) -> None:
    done = script(engine, folder, "lock_bases.sh")
    assert done.returncode == 0, done.stderr
    lines = (folder / "locks/bases.txt").read_text().splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["BASE", "CPU_BASE", "BUILD_BASE"]
    (pinned,) = {line.split()[1] for line in lines}
    assert pinned.startswith(f"{registry}/base:1@sha256:")

    # the tag moves; the build stays with the digest
    subprocess.run([engine.client, "import", "-", f"{registry}/base:1"], input=_other_tar(folder), check=True)
    engine("push", f"{registry}/base:1")
    made = commit(folder)
    done = script(engine, folder, "build.sh")
    assert done.returncode == 0, done.stderr
    image = engine.inspect("openpangu-sft:0-registry-cpu")
    engine("pull", pinned)
    assert image["RootFS"]["Layers"][0] == engine.inspect(pinned)["RootFS"]["Layers"][0]
    assert (folder / "dist/openpangu-sft-0-registry-cpu.versions.json").read_text() == "{}\n"

    done = script(engine, folder, "push.sh", REGISTRY=f"{registry}/team/")
    assert done.returncode == 0, done.stderr
    machine = image["Architecture"]
    for tag in (f"0-registry-cpu-{machine}", f"0-registry-cpu-{made[:12]}-{machine}"):
        remote = f"{registry}/team/openpangu-sft:{tag}"
        assert f"push: {remote}\n" in done.stderr
        engine("rmi", remote)
        engine("pull", remote)
        assert engine.inspect(remote)["Id"] == image["Id"]


def _other_tar(folder: Path) -> bytes:
    return subprocess.run(["tar", "-C", str(folder), "-c", "locks"], check=True, capture_output=True).stdout


def test_uncommitted_changes_are_not_pushed(engine: Engine, registry: str, folder: Path) -> None:
    commit(folder)
    (folder / "versions.json").write_text('{"changed": true}\n')
    assert script(engine, folder, "build.sh").returncode == 0
    done = script(engine, folder, "push.sh", REGISTRY=registry)
    assert done.returncode == 1
    assert "-changed, which cannot be looked up -> commit, make image TARGET=cpu, and push again" in done.stderr


def test_a_base_that_cannot_be_pulled(engine: Engine, registry: str, folder: Path) -> None:
    commit(folder)
    missing = f"{registry}/other:1"
    done = script(engine, folder, "build.sh", BASE=missing)
    assert done.returncode == 1
    assert f"openpangu-sft: cannot pull the base {missing} -> choose another one with BASE=" in done.stderr
    done = script(engine, folder, "lock_bases.sh", CPU_BASE=missing)
    assert done.returncode == 1
    assert f"cannot pull {missing} -> choose another one with CPU_BASE=" in done.stderr
    assert not [file for file in (folder / "locks").iterdir() if file.name.startswith("bases.txt")]


def test_a_push_that_is_refused(engine: Engine, folder: Path) -> None:
    commit(folder)
    assert script(engine, folder, "build.sh").returncode == 0
    done = script(engine, folder, "push.sh", REGISTRY="127.0.0.1:9/team")
    assert done.returncode == 1
    assert "could not be pushed (see above) -> docker login 127.0.0.1:9?" in done.stderr
    done = script(engine, folder, "push.sh")
    assert "REGISTRY is not given -> make push REGISTRY=" in done.stderr
