"""Offline bundles: saved, loaded and used without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from image.engine import CPU, Engine
from openpangu_sft import __version__


@pytest.fixture(scope="module")
def saved(engine: Engine, cpu_image: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive written by make save."""
    dist = tmp_path_factory.mktemp("dist")
    done = engine.make("save", "TARGET=cpu", DIST=str(dist), LEVEL="1")
    assert done.returncode == 0, done.stderr
    archives = sorted(dist.iterdir())
    assert [path.suffix for path in archives] == [".tar", ".sha256"]
    return archives[0]


def test_saved_removed_loaded_and_run(engine: Engine, saved: Path, user: SimpleNamespace) -> None:
    there = user.cache.parent / "there"
    there.mkdir()
    commands = [["sha256sum", "--check", f"{saved.name}.sha256"], ["tar", "-xf", saved.name]]
    for file in (saved, Path(f"{saved}.sha256")):
        os.link(file, there / file.name)
    for command in commands:
        subprocess.run(command, cwd=there, check=True, capture_output=True)
    (there / saved.name).unlink()
    folder = there / saved.stem
    wanted = {"README.md", "SHA256SUMS", "VERSION", "LICENSE", "Makefile", "docker-compose.yml", "image.tar.gz"}
    wanted |= {"sbom.json", "versions.json", "recipes", "scripts"}
    assert {path.name for path in folder.iterdir()} == wanted

    engine("tag", CPU, "openpangu-test/kept")  # otherwise its layers would be rebuilt
    try:
        engine("rmi", CPU)
        assert not engine.has(CPU)
        done = engine.make("load", folder=folder)
        assert done.returncode == 0, done.stderr
        assert engine.has(CPU)
        subprocess.run(["chown", "-R", f"{user.uid}:{user.gid}", str(there)], check=False)
        done = subprocess.run(
            [*user.become, "make", "format", "RECIPE=recipes/demo.yaml", "SET=paths.cache=/cache/x"],
            cwd=folder,
            env=user.environment,
            capture_output=True,
            text=True,
        )
        assert "openpangu-sft: /cache/x/raw" in done.stderr  # it runs, and reports the missing data
    finally:
        if not engine.has(CPU):
            engine("tag", "openpangu-test/kept", CPU)
        engine("rmi", "openpangu-test/kept")


def test_help_of_a_bundle_names_its_targets(engine: Engine, saved: Path, place: Path) -> None:
    subprocess.run(["tar", "-xf", str(saved), "-C", str(place), "--exclude", "image.tar.gz"], check=True)
    done = engine.make(folder=place / saved.stem)
    assert done.returncode == 0
    assert "\n  preprocess " in done.stdout
    said = (place / saved.stem / "README.md").read_text()
    assert f"# openpangu-sft {__version__}, cpu, " in said
    assert "@" not in said
    assert len(said.splitlines()) < 60


def test_a_damaged_archive_is_not_loaded(engine: Engine, saved: Path, place: Path) -> None:
    broken = place / saved.name
    shutil.copy(saved, broken)
    with broken.open("r+b") as file:
        file.seek(broken.stat().st_size // 2)
        file.write(b"\0" * 8)
    done = engine.make("load", f"FROM={broken}")
    assert done.returncode != 0
    assert f"{saved.name}.sha256 is missing -> copy it too" in done.stderr
    shutil.copy(f"{saved}.sha256", place)
    done = engine.make("load", f"FROM={broken}")
    assert f"{broken} does not match its sha256 sum -> copy it again" in done.stderr
    subprocess.run(["tar", "-xf", str(broken), "-C", str(place)], check=True)
    done = engine.make("load", f"FROM={place / saved.stem}")
    assert "is incomplete or damaged (see above) -> copy it again" in done.stderr
    assert "image.tar.gz" in done.stderr
    assert {path.name for path in place.iterdir()} == {saved.name, f"{saved.name}.sha256", saved.stem}


def test_a_save_on_a_full_disk_leaves_no_files(engine: Engine, cpu_image: SimpleNamespace, place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        done = engine.make("save", "TARGET=cpu", DIST=str(disk), LEVEL="1")
        assert done.returncode != 0
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
