"""Doctor's checks of what is read and written: room, rights, and whether a result can be put in its place."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import pytest

from doctor_machines import Check, FakeMachine, MakeContext, context, fake
from openpangu_sft.artifacts.artifact import Manifest, staged_directory
from openpangu_sft.doctor import resources
from openpangu_sft.doctor.machine import Context, Finding, Machine, State, guarded
from refusals import refusal_of

__all__ = ["context", "fake"]

NOBODY = 65534
STAGED = ("samples", "dataset", "mcore", "export")


@pytest.fixture
def cache() -> Iterator[Path]:
    """A folder that another user may enter, as pytest's own may not be."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(directory)


def as_plain_user(check: Callable[[], Finding]) -> Finding:
    """What is found by a user to whom rights apply: root may do anything, so then by another user, in a process."""
    if os.geteuid():
        return guarded("it", check)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writer, pickle.dumps(guarded("it", check)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    os.waitpid(pid, 0)
    found: Finding = pickle.loads(content)
    return found


def give(path: Path, mode: int = 0o755) -> None:
    """Makes a folder of the user by whom things are found."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.geteuid():
        os.chown(path, NOBODY, NOBODY)
    path.chmod(mode)


def here(known: Context) -> Context:
    """The same on this machine: the files of the fake one may not be read by that user."""
    return replace(known, machine=Machine(environment={}))


@pytest.mark.parametrize("name", [*STAGED, "run"])
def test_what_lies_in_a_folder_that_is_not_writable(context: MakeContext, cache: Path, name: str) -> None:
    """Its lock could not be made there, nor what is renamed to it, however writable it is itself."""
    give(cache / "own")
    give(cache / "closed/result")
    give(cache / "closed", 0o555)
    known = here(context(f"paths.cache={cache}/own", f"paths.{name}={cache}/closed/result"))
    found = as_plain_user(lambda: resources.disk(known))
    said = f"paths.{name}: {cache}/closed is not a directory that this user may write to"
    assert (found.state, found.found) == (State.FAILED, said)
    assert found.remedy == "create it and give it to this user, or set paths.cache"
    (cache / "closed").chmod(0o755)
    assert as_plain_user(lambda: resources.disk(known)).state != State.FAILED


@pytest.mark.parametrize(("name", "failed"), [("shards", True), ("run", True), ("samples", False), ("mcore", False)])
def test_a_folder_that_is_not_writable_itself(context: MakeContext, cache: Path, name: str, failed: bool) -> None:
    """What is staged takes its place by a rename, which wants nothing of it."""
    give(cache / "own")
    give(cache / "result", 0o555)
    give(cache)
    known = here(context(f"paths.cache={cache}/own", f"paths.{name}={cache}/result"))
    found = as_plain_user(lambda: resources.disk(known))
    assert (found.state == State.FAILED) == failed, found
    if not failed:

        def put() -> Finding:
            with staged_directory(cache / "result", Manifest(name)):
                return resources.ok("it is put in its place")

        assert as_plain_user(put).state == State.OK


@pytest.mark.parametrize("check", [resources.disk, resources.inputs])
def test_a_folder_that_may_not_be_entered(context: MakeContext, cache: Path, check: Check) -> None:
    give(cache / "closed/cache")
    (cache / "closed").chmod(0o000)
    known = context(f"paths.cache={cache}/closed/cache", f"paths.hf={cache}/closed/hf")
    found = as_plain_user(lambda: check(known))
    assert found.state == State.FAILED
    assert found.found.startswith(f"{cache}/closed/")
    assert (found.found.split(": ")[1], found.remedy) == ("no permission", "check the owner and mode of this path")


def obstacle(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(path.parent)
    else:
        path.mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda asked: asked == path)


@pytest.mark.parametrize("kind", ["mount", "file", "link"])
@pytest.mark.parametrize("name", STAGED)
def test_where_no_result_can_be_put(
    context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """It says what the stage would say."""
    path = tmp_path / "in the way"
    obstacle(path, kind, monkeypatch)
    finding = resources.disk(context(f"paths.{name}={path}"))
    said = refusal_of(staged_directory(path, Manifest(name)).__enter__)
    assert finding.state == State.FAILED
    assert f"{finding.found} -> {finding.remedy}" == f"paths.{name}: {said.replace(': ', ' ', 1)}"


@pytest.mark.parametrize("name", ["run", "shards"])
def test_a_run_and_shards_may_be_mounted(
    context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    obstacle(tmp_path / "mounted", "mount", monkeypatch)
    assert resources.disk(context(f"paths.{name}={tmp_path}/mounted")).state != State.FAILED


def test_disk(fake: FakeMachine, context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.disk(context()).state in (State.OK, State.WARNING)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    finding = resources.disk(context())
    assert (finding.state, "0 MB free for samples" in finding.found) == (State.FAILED, True)
    assert "run " in finding.expected


def test_disk_of_a_container_that_goes_with_it(
    fake: FakeMachine, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resources.disk(context()).state == State.OK
    fake.write("/.dockerenv")
    assert "container's own layer" in resources.disk(context()).found
    monkeypatch.setattr(Context, "in_container", True)
    elsewhere = replace(context(), machine=Machine(Path("/dev/shm"), {}))  # its root is another file system
    assert resources.disk(elsewhere).state == State.OK


def test_a_path_in_the_way(context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = resources.disk(context(f"paths.run={tmp_path}/file/run"))
    assert (finding.state, "paths.run" in finding.found) == (State.FAILED, True)


def test_inputs(context: MakeContext, tmp_path: Path) -> None:
    assert resources.inputs(context()).state == State.WARNING
    (tmp_path / "raw").mkdir()
    assert resources.inputs(context()).state == State.OK
    assert "paths.hf" in resources.inputs(context("paths.hf=nowhere")).found
    assert resources.inputs(context("data.sources=[{path: raw}]")).state == State.OK
    missing = resources.inputs(context("data.sources=[{path: raw}, {path: other}]"))
    assert (missing.state, missing.found) == (State.WARNING, f"data.sources: no conversations in {tmp_path / 'other'}")
