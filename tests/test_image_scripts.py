"""What the image is described and compared by."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from openpangu_sft import __version__

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts/image"


def tree(*entries: dict[str, Any]) -> str:
    """The list of an archive of these entries."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for entry in entries:
            content = entry.pop("content", b"")
            info = tarfile.TarInfo(entry.pop("name"))
            info.size = len(content)
            for key, value in entry.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    done = subprocess.run(
        [sys.executable, SCRIPTS / "tree.py"], input=archive.getvalue(), capture_output=True, check=True
    )
    return done.stdout.decode()


def test_a_tree_does_not_depend_on_the_order_of_its_archive() -> None:
    first, second = {"name": "b", "content": b"1"}, {"name": "a", "type": tarfile.DIRTYPE}
    assert tree(dict(first), dict(second)) == tree(second, first)


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"other"},
        {"mode": 0o755},
        {"uid": 1},
        {"gid": 1},
        {"mtime": 1},
        {"name": "g"},
        {"type": tarfile.SYMTYPE, "linkname": "x"},
    ],
)
def test_every_difference_of_a_file_is_one_of_the_tree(change: dict[str, Any]) -> None:
    file = {"name": "f", "content": b"first", "mode": 0o644}
    assert tree({**file}) != tree({**file, **change})


def test_what_the_engine_puts_there_is_left_out() -> None:
    assert tree({"name": "etc/hosts", "content": b"1"}, {"name": ".dockerenv"}) == ""


def test_an_image_is_described(tmp_path: Path) -> None:
    packages = [{"type": "library", "name": "torch", "version": "2.1.0", "bom-ref": "torch"}]
    (tmp_path / "packages.json").write_text(json.dumps({"bomFormat": "CycloneDX", "components": packages}))
    pin = {"commit": "c" * 40, "patches": ["megatron-lm/0001-x.patch"]}
    (tmp_path / "sources.json").write_text(json.dumps({"settings": {"megatron-lm": pin}}))
    command = [sys.executable, SCRIPTS / "describe.py", "npu", "a" * 40, "base:1@sha256:00", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert (versions["target"], versions["commit"], versions["base"]) == ("npu", "a" * 40, "base:1@sha256:00")
    assert versions["packages"] == {"torch": "2.1.0"}
    assert versions["upstream"] == {"megatron-lm": pin}
    sbom = json.loads((tmp_path / "sbom.json").read_text())
    assert [component["name"] for component in sbom["components"]] == ["torch", "base image", "CPython", "megatron-lm"]
    assert sbom["components"][-1]["pedigree"]["patches"][0]["diff"]["url"] == "patches/megatron-lm/0001-x.patch"


class Index:
    """A package index with one wheel of uv, which wants a name and a password."""

    def __init__(self) -> None:
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("uv-9.9.9.data/scripts/uv", "#!/bin/sh\necho uv\n")
        self.wheel = wheel.getvalue()
        machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
        self.name = f"uv-9.9.9-py3-none-manylinux_2_17_{machine}.whl"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = f'<a href="../../files/{outer.name}#sha256=0">x</a>'.encode()
                allowed = self.headers.get("Authorization") == "Basic dXNlcjpwQHNz"  # user:p@ss
                content = {"/simple/uv/": page, f"/files/{outer.name}": outer.wheel}.get(self.path)
                self.send_response(401 if not allowed else 200 if content else 404)
                self.end_headers()
                self.wfile.write(content or b"" if allowed else b"")

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://user:p%40ss@127.0.0.1:{self.server.server_port}/simple"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    yield index
    index.server.shutdown()


def fetch_uv(index: Index, directory: Path, sha256: str) -> subprocess.CompletedProcess[str]:
    lock = directory / "uv.txt"
    lock.write_text(f"uv==9.9.9 \\\n    --hash=sha256:{sha256}\n")
    command = [sys.executable, SCRIPTS / "fetch_uv.py", index.address, lock, directory]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_uv_comes_from_an_index_with_a_password(index: Index, tmp_path: Path) -> None:
    done = fetch_uv(index, tmp_path, hashlib.sha256(index.wheel).hexdigest())
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([tmp_path / "uv"], capture_output=True, text=True, check=True).stdout == "uv\n"


def test_another_uv_than_the_locks_is_not_taken(index: Index, tmp_path: Path) -> None:
    done = fetch_uv(index, tmp_path, "0" * 64)
    assert done.returncode == 1
    assert "is not what" in done.stderr
    assert "p%40ss" not in done.stderr
    assert not (tmp_path / "uv").exists()


def test_compose_starts_this_version() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"VERSION:-([^}]*)}", text)) == {__version__}


def said_without_an_engine(folder: Path, script: str, **given: str) -> str:
    """The message of a script that is refused where no Docker engine answers."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "VERSION").write_text("1\n")
    environment = {"PATH": "/usr/bin:/bin", "DOCKER": "false", **given}
    command = [folder / "scripts/image" / script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("push.sh", {}, "REGISTRY is not given -> make push REGISTRY=registry.example.org/team"),
        ("save.sh", {"LEVEL": "11"}, "LEVEL=11 is no number from 1 to 9 -> leave it out for 6"),
        ("save.sh", {"LEVEL": "-9"}, "LEVEL=-9 is no number from 1 to 9 -> leave it out for 6"),
        ("build.sh", {"TARGET": "gpu"}, "TARGET=gpu is neither npu nor cpu -> take one of them"),
    ],
)
def test_a_bad_value_is_said_before_the_engine_is_asked(
    tmp_path: Path, script: str, given: dict[str, str], message: str
) -> None:
    assert said_without_an_engine(tmp_path, script, **given) == f"openpangu-sft: {message}\n"


@pytest.mark.parametrize("script", ["build.sh", "save.sh", "load.sh", "push.sh", "diff.sh", "lock_bases.sh"])
def test_no_engine_is_said(script: str, tmp_path: Path) -> None:
    assert said_without_an_engine(tmp_path, script, REGISTRY="x").startswith(
        "openpangu-sft: no Docker engine answers ('false version' says why) -> install and start one"
    )
