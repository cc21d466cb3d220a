"""Images built once for all tests here, with the Make targets that users call."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from image.engine import CANARY, CPU, NPU, ROOT, Engine, find_docker, require_sources, torch_build

collect_ignore = [] if os.environ.get("ARCH") else ["test_emulated.py"]  # make test-image ARCH=arm64


@pytest.fixture(scope="session")
def engine() -> Engine:
    client = find_docker()
    if client is None:
        pytest.skip("no Docker engine answers: install docker.io and start dockerd")
    return Engine(client)


@pytest.fixture(scope="session")
def bases(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        return engine.bases(tmp_path_factory.mktemp("bases"))
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def lent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings given to every build that must not end up in the image."""
    index = os.environ.get("PYPI_INDEX", "https://pypi.org/simple").replace("://", f"://user:{CANARY}@")
    trusted = Path(os.environ.get("CA") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    ca = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.write_text(f"{trusted.read_text()}\n# {CANARY}\n")  # text between certificates is allowed
    return {"PYPI_INDEX": index, "CA": str(ca), "NO_PROXY": f"{CANARY}.example"}


@pytest.fixture(scope="session")
def given(bases: dict[str, str], lent: dict[str, str]) -> dict[str, str]:
    return {"TORCH": torch_build(), "BUILD_BASE": bases["BUILD_BASE"], **lent}


@pytest.fixture(scope="session")
def cpu_image(engine: Engine, bases: dict[str, str], given: dict[str, str]) -> SimpleNamespace:
    """The cpu image, built twice without a cache by make image-diff; its name and the output."""
    done = engine.make("image-diff", "TARGET=cpu", BASE=bases["CPU_BASE"], **given)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return SimpleNamespace(name=CPU, said=done.stdout)


@pytest.fixture(scope="session")
def npu_image(engine: Engine, bases: dict[str, str], given: dict[str, str]) -> str:
    """The npu image on a base without CANN, if the upstream sources are available."""
    require_sources()
    done = engine.make("image", "TARGET=npu", BASE=bases["BASE"], **given)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return NPU


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory accessible to every user, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="openpangu-image-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def user(engine: Engine, place: Path) -> SimpleNamespace:
    """An ordinary user with access to the engine, with their own clone and cache."""
    uid, gid = (4711, 4712) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    clone, cache = place / "clone", place / "cache"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for changed in subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines():
        if (ROOT / changed).is_file():
            (clone / changed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / changed, clone / changed)
    cache.mkdir()
    socket_group = Path("/var/run/docker.sock").stat().st_gid if Path("/var/run/docker.sock").exists() else gid
    become = []
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{uid}:{gid}", str(clone), str(cache)], check=True)
        become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", f"--groups={gid},{socket_group}", "--"]
        assert not any(entry.pw_uid == uid for entry in pwd.getpwall())
    environment = {**engine.environment, "HOME": str(place), "GIT_CONFIG_COUNT": "1"}
    environment.update(GIT_CONFIG_KEY_0="safe.directory", GIT_CONFIG_VALUE_0="*", CACHE=str(cache), RUNTIME="docker")

    def popen(*command: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen([*become, *command], cwd=clone, env=environment, text=True, **options)  # type: ignore[call-overload]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*become, *command], cwd=clone, env=environment, text=True, capture_output=True, check=False
        )

    return SimpleNamespace(
        uid=uid, gid=gid, clone=clone, cache=cache, become=become, run=run, popen=popen, environment=environment
    )
