"""scripts/setup.sh: the interpreter that it takes, its messages, and that it always converges."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = os.environ.get("PYPI_INDEX") or "https://pypi.org/simple"
NOBODY_THERE = "http://127.0.0.1:9/simple"
TOOLS = ("bash", "cat", "dirname", "env", "find", "flock", "head", "ls", "mkdir", "rm", "sha256sum", "stat")


def lock_of(*names: str) -> str:
    """The lines of these packages in the real lock: a lock that installs in a second."""
    lines = (ROOT / "locks/portable.txt").read_text()
    return "".join(re.findall(rf"^(?:{'|'.join(names)})==.*\\\n(?:    .*\n)+", lines, re.MULTILINE))


class Checkout:
    """The files that setup.sh reads, with a small lock, in a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.stamp = self.venv / ".openpangu-sft-setup"
        self.lock = root / "locks/portable.txt"
        for name in ("scripts/setup.sh", "locks/uv.txt", "pyproject.toml"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        (root / "README.md").write_text("a copy for a test\n")
        (root / "src/openpangu_sft").mkdir(parents=True)
        (root / "src/openpangu_sft/__init__.py").write_text('__version__ = "1"\n')
        self.lock.write_text(lock_of("packaging", "setuptools", "wheel", "iniconfig"))

    def start(self, **settings: str) -> subprocess.Popen[str]:
        kept = ("HOME", "PATH", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "PIP_CERT")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        return subprocess.Popen(
            [self.root / "scripts/setup.sh"],
            env={**environment, "PYPI_INDEX": INDEX, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, **settings: str) -> tuple[int, str]:
        """The exit code and what was said."""
        process = self.start(**settings)
        return process.wait(), process.communicate()[1]

    def packages(self) -> set[str]:
        return {path.name.split("-")[0] for path in self.venv.glob("lib/python*/site-packages/*.dist-info")}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH with what the script calls, and no Python."""
    directory = tmp_path / "programs"
    directory.mkdir()
    for name in TOOLS:
        (directory / name).symlink_to(shutil.which(name) or name)
    return directory


@pytest.fixture(scope="module")
def network() -> None:
    try:
        urllib.request.urlopen(f"{INDEX}/uv/", timeout=60).close()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.fixture
def silent_index() -> Iterator[tuple[str, socket.socket]]:
    """An index that accepts connections and never answers, so that its client can be killed at a known moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple", server


def fake_python(path: Path, version: str) -> None:
    """Answers with a version, and has no module venv; without a version it fails like a pyenv shim."""
    answer = f'case "$*" in *sys.version*) echo {version};; *) exit 1;; esac' if version else "exit 127"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("unfit", "said"), [("3.13.0", "3.13.0"), ("", "does not start"), ("2.7.18", "2.7.18")])
def test_no_python_fits(checkout: Checkout, programs: Path, unfit: str, said: str) -> None:
    fake_python(programs / "python3", unfit)
    code, words = checkout.run(PATH=str(programs))
    assert code == 1
    assert words.count("\n") == 1
    assert f"python3 ({said})" in words
    assert "-> install python3 and python3-venv" in words
    assert not checkout.venv.exists()


def test_no_python_at_all(checkout: Checkout, programs: Path) -> None:
    code, words = checkout.run(PATH=str(programs))
    assert code == 1
    assert (
        "CPython 3.9, 3.10 or 3.11 is needed; found for python3 python3.11 python3.10 python3.9: nothing -> " in words
    )


@pytest.mark.parametrize("first", ["3.13.0", ""])
def test_a_later_python_fits_and_has_no_venv(checkout: Checkout, programs: Path, first: str) -> None:
    fake_python(programs / "python3", first)
    fake_python(programs / "python3.10", "3.10.13")
    code, words = checkout.run(PATH=str(programs))
    assert code == 1
    assert words.startswith(f"openpangu-sft: {programs}/python3.10 (3.10.13) cannot make environments")
    assert "python3-venv (or python3.10-venv)" in words


def test_the_named_python_or_none(checkout: Checkout, programs: Path) -> None:
    fake_python(programs / "python3.12", "3.12.1")
    code, words = checkout.run(PYTHON=str(programs / "python3.12"))
    assert code == 1
    assert "python3.12 (3.12.1)" in words
    code, words = checkout.run(PYTHON="no-such-python")
    assert code == 1
    assert "found for no-such-python: nothing" in words


def test_leaves_a_directory_of_others_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "thesis.tex").write_text("years of work")
    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 1
    assert "left as it is" in words
    assert (checkout.venv / "thesis.tex").read_text() == "years of work"


def test_a_link_to_an_environment_is_left_alone(checkout: Checkout) -> None:
    other = checkout.root.with_name("other")
    (other / "bin").mkdir(parents=True)
    (other / checkout.stamp.name).touch()
    checkout.venv.symlink_to(other)
    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 1
    assert f"{checkout.venv} is a symbolic link" in words
    assert (other / "bin").is_dir()


def test_index_out_of_reach(checkout: Checkout) -> None:
    code, words = checkout.run(PYTHON=sys.executable, PYPI_INDEX=NOBODY_THERE.replace("//", "//me:secret@"))
    assert code == 1
    last = words.splitlines()[-1]
    assert f"could not install locks/uv.txt from {NOBODY_THERE}" in last
    assert "PYPI_INDEX=" in last
    assert checkout.stamp.read_text() == ""


@pytest.mark.usefixtures("network")
def test_makes_once_then_follows_the_lock(checkout: Checkout, tmp_path: Path) -> None:
    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 0, words
    assert checkout.packages() >= {"iniconfig", "openpangu_sft", "setuptools"}
    making, summary = words.splitlines()
    assert making.startswith("setup: making ")
    assert re.fullmatch(r"setup: packages: [34] installed, \d removed", summary)

    # Nothing changed: neither uv nor the index nor an interpreter on PATH is asked.
    uv = checkout.venv / "bin/uv"
    uv.rename(uv.with_name("uv.away"))
    assert checkout.run(PYPI_INDEX=NOBODY_THERE) == (0, "")
    uv.with_name("uv.away").rename(uv)

    # Another lock and no index: fails, and stays unfinished.
    checkout.lock.write_text(lock_of("packaging", "setuptools", "wheel", "pluggy"))
    code, words = checkout.run(PYPI_INDEX=NOBODY_THERE, UV_CACHE_DIR=str(tmp_path / "empty"))
    assert code == 1
    assert "could not install locks/portable.txt" in words.splitlines()[-1]
    assert checkout.stamp.read_text() == ""

    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 0, words
    assert "pluggy" in checkout.packages()
    assert "iniconfig" not in checkout.packages()

    # A finished environment is updated where it is.
    (checkout.venv / "untouched").touch()
    checkout.lock.write_text(lock_of("packaging", "setuptools", "wheel", "iniconfig"))
    code, words = checkout.run()
    assert code == 0, words
    assert words.splitlines()[1:] == ["setup: packages: 1 installed, 1 removed"]
    assert "iniconfig" in checkout.packages()
    assert "pluggy" not in checkout.packages()
    assert (checkout.venv / "untouched").exists()

    # A file whose hash is another one is refused.
    lock = lock_of("packaging", "setuptools", "wheel", "pluggy")
    checkout.lock.write_text(re.sub(r"(?<=sha256:)\w+", lambda found: found[0][::-1], lock))
    code, words = checkout.run()
    assert code == 1
    assert "Hash mismatch" in words
    assert "pluggy" not in checkout.packages()


@pytest.mark.usefixtures("network")
def test_replaces_a_broken_environment(checkout: Checkout) -> None:
    assert checkout.run(PYTHON=sys.executable)[0] == 0
    for name in checkout.venv.glob("bin/python*"):
        name.unlink()
    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 0, words
    assert subprocess.run([checkout.venv / "bin/python", "-c", "import iniconfig, openpangu_sft"]).returncode == 0


@pytest.mark.usefixtures("network")
def test_moved_checkout_gets_its_own_environment(checkout: Checkout) -> None:
    assert checkout.run(PYTHON=sys.executable)[0] == 0
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    script = [moved / "scripts/setup.sh"]
    assert subprocess.run(script, env={**os.environ, "VENV": "", "PYTHON": sys.executable}).returncode == 0
    assert str(moved) in (moved / ".venv/bin/pip").read_text().splitlines()[0]


@pytest.mark.usefixtures("network")
def test_killed_and_waited_for(checkout: Checkout, silent_index: tuple[str, socket.socket], tmp_path: Path) -> None:
    url, server = silent_index
    first = checkout.start(PYTHON=sys.executable, PYPI_INDEX=url)
    connection, _ = server.accept()  # pip asks: the environment is there, and empty
    second = checkout.start(PYTHON=sys.executable)
    assert second.stderr is not None
    assert "waiting for another setup" in second.stderr.readline()
    assert second.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    connection.close()
    assert second.wait() == 0, second.communicate()
    second.communicate()
    assert "iniconfig" in checkout.packages()

    checkout.lock.write_text(lock_of("packaging", "setuptools", "wheel", "pluggy"))
    third = checkout.start(PYPI_INDEX=url, UV_CACHE_DIR=str(tmp_path / "empty"))
    connection, _ = server.accept()  # uv asks, in the middle of an update
    os.killpg(third.pid, signal.SIGKILL)
    third.communicate()
    connection.close()
    assert checkout.stamp.read_text() == ""
    code, words = checkout.run(PYTHON=sys.executable)
    assert code == 0, words
    assert "making" in words  # an interrupted update can leave packages without some of their files
    assert "pluggy" in checkout.packages()
    assert checkout.run() == (0, "")
