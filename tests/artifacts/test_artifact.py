"""Artifacts are there whole or not at all, whatever happens to the process, the disk or the user's own files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from checkpoint_files import stored
from conftest import MakeRecipe, SmallDisk
from openpangu_sft.artifacts.artifact import (
    MANIFEST,
    Manifest,
    only_one_run,
    read_manifest,
    require_settings,
    sha256_of,
    staged_directory,
    write_manifest,
)
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.files.torch_write import write_torch_file
from openpangu_sft.util.errors import UserError, explain_os_error
from refusals import refusal_of

ROOT_USER = os.geteuid() == 0


def make(target: Path, content: str, kind: str = "dataset") -> Manifest:
    """Puts a small artifact in place: a file, and one in a directory."""
    manifest = Manifest(kind, settings={"content": content})
    with staged_directory(target, manifest) as staging:
        (staging / "a.txt").write_text(content, "utf-8")
        (staging / "below").mkdir()
        (staging / "below/b.txt").write_text(content * 1000, "utf-8")
    return manifest


def whole(target: Path, kind: str = "dataset") -> str:
    """The content of an artifact by `make`, every byte of it checked."""
    manifest = read_manifest(target, kind, "")
    assert set(manifest.files) == {"a.txt", "below/b.txt"}
    for name, entry in manifest.files.items():
        assert entry == {"bytes": (target / name).stat().st_size, "sha256": sha256_of(target / name)}
    content = (target / "a.txt").read_text("utf-8")
    assert manifest.settings == {"content": content}
    assert (target / "below/b.txt").read_text("utf-8") == content * 1000
    return content


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def in_child(action: Callable[[], object], uid: Optional[int] = None) -> tuple[int, str]:
    """Runs something in a process of its own; gives how that ended (as os.waitpid) and what it raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        message = ""
        try:
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            action()
        except OSError as error:
            message = f"OSError {explain_os_error(error)}"
        except BaseException as error:
            message = f"{type(error).__name__} {error}"
        finally:
            os.write(writer, message.encode())
            os._exit(1 if message else 0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        message = stream.read()
    return os.waitpid(pid, 0)[1], message


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out/result"


# Put in place.


def test_an_artifact_with_its_manifest_is_put_in_place(target: Path) -> None:
    manifest = make(target, "new")
    assert whole(target) == "new"
    assert read_manifest(target, "dataset", "") == manifest
    assert names_in(target) == {"a.txt", "below", MANIFEST}
    assert names_in(target.parent) == {"result", ".result.lock"}


def test_the_manifest_may_be_completed_inside_the_block(target: Path) -> None:
    manifest = Manifest("dataset")
    with staged_directory(target, manifest):
        manifest.counts["packs"] = 3
    assert read_manifest(target, "dataset", "").counts == {"packs": 3}


def test_a_later_result_replaces_an_earlier_one_entirely(target: Path) -> None:
    with staged_directory(target, Manifest("dataset")) as staging:
        (staging / "only-before").touch()
    make(target, "new")
    assert whole(target) == "new"
    assert names_in(target) == {"a.txt", "below", MANIFEST}
    assert names_in(target.parent) == {"result", ".result.lock"}


def test_an_empty_directory_is_filled(target: Path) -> None:
    target.mkdir(parents=True)
    make(target, "new")
    assert whole(target) == "new"


def test_nothing_is_in_the_target_before_the_block_has_ended(target: Path) -> None:
    make(target, "old")
    with staged_directory(target, Manifest("dataset")) as staging:
        assert not any(staging.iterdir())
        (staging / "a.txt").write_text("half", "utf-8")
        assert whole(target) == "old"


def test_equal_content_gives_equal_bytes_and_digests(tmp_path: Path) -> None:
    first, second, other = make(tmp_path / "1", "same"), make(tmp_path / "2", "same"), make(tmp_path / "3", "other")
    assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / "2" / MANIFEST).read_bytes()
    assert first.digest == second.digest != other.digest
    shuffled = Manifest("dataset", files=dict(reversed(list(first.files.items()))))
    assert shuffled.digest == first.digest
    renamed = Manifest("dataset", files={f"x{name}": entry for name, entry in first.files.items()})
    assert renamed.digest != first.digest


# Errors and interruptions inside the block.


def half_written_then(staging: Path, error: BaseException) -> None:
    (staging / "a.txt").write_text("half", "utf-8")
    raise error


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), UserError("x"), MemoryError()])
def test_an_error_leaves_the_earlier_result_and_nothing_else(target: Path, error: BaseException, earlier: bool) -> None:
    if earlier:
        make(target, "old")
    with pytest.raises(type(error)) as caught, staged_directory(target, Manifest("dataset")) as staging:
        half_written_then(staging, error)
    assert caught.value is error
    assert names_in(target.parent) == {".result.lock", *(["result"] if earlier else [])}
    assert not earlier or whole(target) == "old"


def test_a_real_ctrl_c(target: Path) -> None:
    make(target, "old")

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with staged_directory(target, Manifest("dataset")) as staging:
            (staging / "a.txt").write_text("half", "utf-8")
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

    assert in_child(interrupted)[1].startswith("KeyboardInterrupt")
    assert whole(target) == "old"
    assert names_in(target.parent) == {"result", ".result.lock"}


def test_ctrl_c_between_the_two_renames_puts_the_earlier_result_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(target, "old")
    rename = Path.rename

    def interrupt_second(self: Path, other: Path) -> Path:
        if self.name == ".result.staging":
            assert not target.exists()
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        make(target, "new")
    assert target.is_dir()  # at once; read_manifest would do it too
    assert whole(target) == "old"
    assert names_in(target.parent) == {"result", ".result.lock"}


def kill_before_operation(number: int) -> None:
    """From now on this process kills itself before its n-th file operation (Python's audit events see them all)."""
    left = number

    def hook(event: str, arguments: Any) -> None:
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("earlier", [True, False])
def test_sigkill_before_any_file_operation(tmp_path: Path, earlier: bool) -> None:
    """What is in place is the earlier or the new result, whole; the next stage can read it; the next run cleans up."""
    found: list[str] = []
    number = 0
    status = -1
    while status != 0:
        number += 1
        target = tmp_path / str(number) / "result"
        if earlier:
            make(target, "old")

        def run(target: Path = target, number: int = number) -> None:
            kill_before_operation(number)
            make(target, "new")

        status, message = in_child(run)
        assert (status, message) in ((signal.SIGKILL, ""), (0, ""))
        if target.exists():
            found.append(json.loads((target / MANIFEST).read_text("utf-8"))["settings"]["content"])
        else:
            found.append("hidden" if (target.parent / ".result.retired").exists() else "none")
        if earlier or target.exists():
            expected = "old" if found[-1] == "hidden" else found[-1]
            assert whole(target) == expected  # what the next stage does, hidden or not
            with pytest.raises(ValueError, match="refused"), staged_directory(target, Manifest("dataset")):
                raise ValueError("refused")
            assert whole(target) == expected
        make(target, "newer")
        assert whole(target) == "newer"
        assert names_in(target.parent) == {"result", ".result.lock"}
    collapsed = [state for state, before in zip(found, [None, *found]) if state != before]
    assert collapsed == (["old", "hidden", "new"] if earlier else ["none", "new"])
    assert len(found) > 15


def test_a_run_killed_between_the_renames_and_a_new_empty_directory(target: Path) -> None:
    """Somebody makes the directory anew before the next run: the earlier result must not be lost."""
    make(target, "old")
    target.rename(target.parent / ".result.retired")
    target.mkdir()
    with pytest.raises(ValueError, match="fails"), staged_directory(target, Manifest("dataset")):
        raise ValueError("fails")
    assert whole(target) == "old"


def test_a_run_killed_between_the_renames_and_a_file_in_the_way(target: Path) -> None:
    make(target, "old")
    target.rename(target.parent / ".result.retired")
    target.write_text("mine", "utf-8")
    assert "is in the way: not a directory" in refusal_of(make, target, "new")
    target.unlink()
    assert whole(target) == "old"


# Never in the place of anything else.


def test_a_directory_of_the_user_is_never_replaced(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine", "utf-8")
    message = refusal_of(make, target, "new")
    assert message == f"{target}: is not empty and was not made by this stage -> choose another path in the recipe"
    assert (target / "thesis.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize("name", ["notes.txt", ".notes", "below/notes.txt", "more/notes.txt"])
def test_a_file_of_the_user_inside_an_artifact_is_never_lost(target: Path, name: str) -> None:
    make(target, "old")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine", "utf-8")
    message = refusal_of(make, target, "new")
    assert message.startswith(f"{target / name}: was not made by this stage")
    assert (target / name).read_text("utf-8") == "mine"
    assert whole(target) == "old"
    (target / name).unlink()
    make(target, "new")
    assert whole(target) == "new"


def test_an_artifact_of_another_kind_is_never_replaced(target: Path) -> None:
    make(target, "old", "mcore")
    message = refusal_of(make, target, "new")
    assert message == f"{target}: holds mcore, not dataset -> choose another path in the recipe"
    assert whole(target, "mcore") == "old"


@pytest.mark.parametrize("text", ["", "{", "[]", '"dataset"', '{"kind": "dataset", "files": []}', '{"name": "my app"}'])
def test_a_manifest_of_somebody_else_is_not_taken_for_ours(target: Path, text: str) -> None:
    """manifest.json is a common name."""
    target.mkdir(parents=True)
    (target / MANIFEST).write_text(text, "utf-8")
    assert "not a manifest" in refusal_of(make, target, "new")
    assert (target / MANIFEST).read_text("utf-8") == text


@pytest.mark.parametrize("what", ["file", "link to directory", "link to file", "dangling link", "pipe"])
def test_what_is_no_directory_is_refused(target: Path, tmp_path: Path, what: str) -> None:
    target.parent.mkdir()
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine", "utf-8")
    if what == "file":
        target.write_text("mine", "utf-8")
    elif what == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / what.split()[-1])
    before = target.lstat().st_mode
    message = refusal_of(make, target, "new")
    assert message == f"{target}: is in the way: not a directory -> remove it or choose another path"
    assert target.lstat().st_mode == before
    assert (tmp_path / "file").read_text("utf-8") == "mine"
    assert not any((tmp_path / "directory").iterdir())


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file/result", tmp_path / "file/more/result"):
        with pytest.raises(OSError) as caught:  # noqa: PT011 (the message follows)
            make(target, "new")
        assert str(explain_os_error(caught.value)).startswith(f"{tmp_path / 'file'}")


# One run at a time.


def test_a_second_process_is_refused(target: Path) -> None:
    message = f"{target}: another run is writing here -> wait for it or choose another path"
    with staged_directory(target, Manifest("dataset")) as staging:
        (staging / "a.txt").write_text("first", "utf-8")
        assert in_child(lambda: make(target, "second")) == (256, f"UserError {message}")
        assert refusal_of(make, target, "second") == message  # from the same process, too
        assert (staging / "a.txt").read_text("utf-8") == "first"
    make(target, "third")


def test_the_lock_of_a_killed_process_is_free(target: Path) -> None:
    def killed() -> None:
        with staged_directory(target, Manifest("dataset")):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed)[0] == signal.SIGKILL
    assert names_in(target.parent) == {".result.lock", ".result.staging"}
    make(target, "new")
    assert whole(target) == "new"


def test_a_file_system_without_locks_is_one_line(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    target.parent.mkdir()
    monkeypatch.setattr(fcntl, "flock", no_flock)
    message = refusal_of(only_one_run(target).__enter__)
    assert message == f"{target.parent}: this file system has no locks (flock) -> mount it with them or use another"


# Disks and permissions.


@contextlib.contextmanager
def small_files_only(limit: int) -> Iterator[None]:
    """No file may become larger than so many bytes: a full disk for everybody, root or not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def one_line(error: OSError) -> str:
    message = str(explain_os_error(error))
    assert len(message.splitlines()) == 1
    return message


def text_beyond_the_limit(path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(1000):
            stream.write("x" * 1000)


def bytes_beyond_the_limit(path: Path) -> None:
    path.write_bytes(b"x" * 1_000_000)


def large_tensor(path: Path) -> None:
    write_torch_file({"w": stored(np.zeros(250_000))}, path)


def many_tensors(path: Path) -> None:
    write_torch_file([stored(np.zeros(1000)) for _ in range(250)], path)


WRITERS = [text_beyond_the_limit, bytes_beyond_the_limit, large_tensor, many_tensors]


@pytest.mark.parametrize("write", WRITERS)
def test_too_large_a_file(target: Path, write: Callable[[Path], None]) -> None:
    make(target, "old")
    with (
        pytest.raises(OSError) as caught,  # noqa: PT011
        small_files_only(100_000),
        staged_directory(target, Manifest("dataset")) as staging,
    ):
        write(staging / "large")
    assert caught.value.errno == errno.EFBIG
    assert one_line(caught.value).startswith(f"{target.parent}/")
    assert "File too large for this disk or its limit (ulimit -f)" in one_line(caught.value)
    assert whole(target) == "old"
    assert names_in(target.parent) == {"result", ".result.lock"}


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk(small_disk: SmallDisk, write: Callable[[Path], None]) -> None:
    tmpfs = small_disk(256)
    target = tmpfs / "result"
    make(target, "old")
    with pytest.raises(OSError) as caught, staged_directory(target, Manifest("dataset")) as staging:  # noqa: PT011
        write(staging / "large")
    assert caught.value.errno == errno.ENOSPC
    assert re.fullmatch(
        re.escape(str(tmpfs)) + r"/\S+: no room left on the disk -> free some space, then run the stage again",
        one_line(caught.value),
    )
    assert whole(target) == "old"
    assert names_in(tmpfs) == {"result", ".result.lock"}


def test_a_disk_that_fills_up_at_any_point(small_disk: SmallDisk) -> None:
    """From the first file to the manifest: with each page less that is free, earlier or new result, whole."""
    tmpfs = small_disk(256)
    target, filler = tmpfs / "result", tmpfs / "filler"
    outcomes = []
    make(target, "old")
    free = shutil.disk_usage(tmpfs).free // 4096
    for pages in range(free + 1):
        filler.write_bytes(b"x" * 4096 * (free - pages))
        message = ""
        try:
            make(target, f"new{pages}")
        except OSError as error:
            message = one_line(error)
        outcomes.append(not message)
        assert whole(target) == ("old" if message else f"new{pages}")
        assert not message or (str(tmpfs) in message and "no room left on the disk" in message)
        assert names_in(tmpfs) == {"result", ".result.lock", "filler"}
        if not message:
            break
    assert not outcomes[0]
    assert outcomes[-1]
    assert outcomes.count(False) >= 3


def test_convert_and_export_on_a_full_disk(small_disk: SmallDisk, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """The writers of torch and safetensors hide the error's number; the user sees it all the same."""
    tmpfs = small_disk(256)
    from checkpoint.test_export import make_run

    make_run(make_recipe())
    recipe = make_recipe(f"paths.mcore={tmpfs / 'mcore'}", f"paths.export={tmpfs / 'export'}")
    for run in (run_convert, run_export):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            run(recipe)
        assert caught.value.errno == errno.ENOSPC
        assert str(tmpfs) in one_line(caught.value)
    assert {path.name for path in tmpfs.iterdir()} == {".mcore.lock", ".export.lock"}


def test_convert_and_export_with_too_large_a_file(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    from checkpoint.test_export import make_run

    recipe = make_recipe()
    make_run(recipe)
    for run, name in ((run_convert, "mcore"), (run_export, "export")):
        with pytest.raises(OSError) as caught, small_files_only(100_000):  # noqa: PT011
            run(recipe)
        assert caught.value.errno == errno.EFBIG
        assert str(tmp_path) in one_line(caught.value)
        assert not recipe.path(name).exists()


def test_a_mount_point_is_refused_before_any_work(small_disk: SmallDisk) -> None:
    tmpfs = small_disk(256, real=True)
    message = refusal_of(make, tmpfs, "new")
    assert message.startswith(f"{tmpfs}: is a mount point")


def test_a_file_system_mounted_read_only(small_disk: SmallDisk) -> None:
    tmpfs = small_disk(256, real=True)
    make(tmpfs / "result", "old")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(tmpfs)], check=True)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        make(tmpfs / "result", "new")
    assert "this file system is read-only" in one_line(caught.value)
    assert str(tmpfs) in one_line(caught.value)
    assert whole(tmpfs / "result") == "old"


@pytest.fixture
def not_writable() -> Iterator[tuple[Path, Optional[int]]]:
    """A directory in which nothing can be made, and the user for whom that holds (root may do anything)."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o555)
    yield directory, 65534 if ROOT_USER else None
    directory.chmod(0o755)
    shutil.rmtree(directory)


@pytest.mark.parametrize("below", ["result", "more/result"])
def test_a_parent_that_is_not_writable(not_writable: tuple[Path, Optional[int]], below: str) -> None:
    directory, uid = not_writable
    message = in_child(lambda: make(directory / below, "new"), uid)[1]
    assert re.fullmatch(rf"OSError {directory}/\S+: no permission -> check the owner and mode of this path", message), (
        message
    )
    assert not any(directory.iterdir())


def test_a_result_of_another_user_stays(not_writable: tuple[Path, Optional[int]]) -> None:
    directory, uid = not_writable
    directory.chmod(0o755)
    make(directory / "result", "old")
    directory.chmod(0o555)
    message = in_child(lambda: make(directory / "result", "new"), uid)[1]
    assert message.startswith(f"OSError {directory}/")
    assert "no permission" in message
    assert whole(directory / "result") == "old"


def test_write_durably_leaves_the_earlier_text_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "tracker"
    write_durably(path, "1")
    with pytest.raises(OSError) as caught, small_files_only(100):  # noqa: PT011
        write_durably(path, "2" * 1000)
    assert one_line(caught.value).startswith(f"{path}: ")
    assert path.read_text("utf-8") == "1"
    assert names_in(tmp_path) == {"tracker"}
    write_durably(path, "3")
    assert path.read_text("utf-8") == "3"


# Manifests.


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    assert refusal_of(read_manifest, tmp_path / "no", "mcore", "run make convert") == (
        f"{tmp_path / 'no'}: no such directory (expected: mcore) -> run make convert"
    )
    assert refusal_of(read_manifest, tmp_path, "mcore", "run make convert") == (
        f"{tmp_path}: there is no finished result here (expected: mcore) -> run make convert"
    )


def test_a_manifest_of_another_kind(target: Path) -> None:
    make(target, "new")
    message = refusal_of(read_manifest, target, "mcore", "run make convert")
    assert message == f"{target}: holds dataset, expected mcore -> check paths in the recipe"


def test_a_missing_or_cut_file_is_named(target: Path) -> None:
    make(target, "new")
    file = target / "below/b.txt"
    file.write_text("new" * 999, "utf-8")
    message = refusal_of(read_manifest, target, "dataset", "run make merge")
    assert message == f"{file}: 2997 bytes, expected 3000 -> run make merge"
    file.unlink()
    message = refusal_of(read_manifest, target, "dataset", "run make merge")
    assert message == f"{file}: a file of this result is missing -> run make merge"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"kind": "dataset", "colour": 1}',
        b'{"kind": "dataset", "files": 3}',
        b'{"kind": "dataset", "files": {"a": {}}}',
        b'{"kind": "dataset", "files": {"a": [1]}}',
        b'{"kind": "dataset", "settings": []}',
        pytest.param(b"[" * 100_000, id="nested"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    message = refusal_of(read_manifest, tmp_path, "dataset", "run make merge")
    assert message.startswith(f"{tmp_path / MANIFEST}: not a manifest: ")
    assert message.endswith(" -> run make merge")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "Input should be an object"),
        ("{}", "kind: Field required"),
        ('{"kind": "dataset", "wide": 1}', "wide: Extra inputs are not permitted"),
        ('{"kind": "dataset", "inputs": {"a": 1}}', "inputs.a: Input should be a valid string"),
        ('{"kind": "dataset", "counts": {"packs": "3"}}', "counts.packs: Input should be a valid integer"),
        ('{"kind": "dataset", "counts": {"packs": true}}', "counts.packs: Input should be a valid integer"),
        ('{"kind": "dataset", "counts": {"tokens": -1}}', "counts.tokens: Input should be greater than or equal to 0"),
        ('{"kind": "shard", "counts": {"read": "a"}}', "counts.read: Input should be a valid integer"),
        ('{"kind": "shard", "counts": {"reasons": {"a": "b"}}}', "counts.reasons.a: Input should be a valid integer"),
        ('{"kind": "dataset", "counts": {"validation": null}}', "counts.validation: Input should be an object"),
        (
            '{"kind": "run", "settings": {"train.iterations": "9"}}',
            "settings.train.iterations: Input should be a valid",
        ),
        ('{"kind": "dataset", "files": {"a": {"bytes": 3, "sha256": 4}}}', "files.a.sha256: Input should be a valid"),
        *(
            (f'{{"kind": "dataset", "files": {{"{name}": {{"bytes": 3, "sha256": "4"}}}}}}', "is no path below the")
            for name in ("/etc/passwd", "..", "../a", "a/../../b", "a/..", "", ".", "./a", "a//b")
        ),
    ],
)
def test_what_a_manifest_lacks_is_said_in_its_own_words(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    message = refusal_of(read_manifest, tmp_path, "dataset", "run make merge")
    assert message.startswith(f"{tmp_path / MANIFEST}: not a manifest: ")
    assert said in message
    assert message.endswith(" -> run make merge")
    assert message.isprintable()


@pytest.mark.parametrize("name", ["a b", "一\u3000二", "a\xa0b", "a\nb", "\U0001f468\u200d\U0001f469", "a\x1b[31m"])
def test_a_file_of_any_name_is_found_again(tmp_path: Path, name: str) -> None:
    with staged_directory(tmp_path / "target", Manifest("samples")) as staging:
        (staging / name).write_text("x")
    assert list(read_manifest(tmp_path / "target", "samples", "").files) == [name]


def test_a_manifest_that_is_read_and_written_has_the_same_bytes(tmp_path: Path) -> None:
    counts = {"read": 3, "other": 1, "validation": {"tokens": 2, "packs": 1}, "packs": 1}
    write_manifest(tmp_path, Manifest("dataset", {"z": 1, "data.seq_length": 8}, {"b": "1"}, counts))
    before = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path, read_manifest(tmp_path, "dataset", ""))
    assert (tmp_path / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("key", ["packs", "anything"])
def test_a_missing_key_is_found_where_it_is_used(tmp_path: Path, key: str) -> None:
    (tmp_path / MANIFEST).write_text('{"kind": "dataset", "counts": {"validation": {}}}')
    manifest = read_manifest(tmp_path, "dataset", "run make merge")
    for section in (manifest.counts, manifest.settings, manifest.inputs, manifest.counts["validation"]):
        with pytest.raises(UserError, match=f"manifest.json: not a manifest: {key} is missing -> run make merge"):
            section[key]


def test_other_settings_are_found(tmp_path: Path) -> None:
    made_with = {"model.num_layers": 2, "tokenizer": "aa", "data.seed": 1}
    require_settings(tmp_path, made_with, {"model.num_layers": 2, "tokenizer": "aa"}, "")
    for wanted, what in (
        ({"model.num_layers": 2, "tokenizer": "bb"}, "made with tokenizer = aa, the recipe says bb"),
        ({"model.num_layers": 3}, "made with model.num_layers = 2, the recipe says 3"),
        ({"model.vocab_size": 5}, "made with model.vocab_size = nothing, the recipe says 5"),
        (
            {"model.num_layers": 3, "data.seed": 1, "tokenizer": "bb"},
            "made with model.num_layers = 2, the recipe says 3; tokenizer = aa, the recipe says bb",
        ),
    ):
        message = refusal_of(require_settings, tmp_path, made_with, wanted, "run make convert again")
        assert message == f"{tmp_path}: {what} -> run make convert again"
