"""Convert and export on disks without room and in places that cannot take a result: one line, nothing half-written."""

from __future__ import annotations

import gc
import os
import re
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from checkpoint.test_export import make_run
from checkpoint_files import set_config, write_hf
from conftest import TINY, MakeRecipe, SmallDisk
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint import convert, export
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import explain_os_error
from openpangu_sft.verify.tensors import check_manifest
from parameter_ids import named_by
from refusals import refusal_of
from stage_process import Stage, sums

RUN: dict[str, Callable[[Recipe], Manifest]] = {"mcore": run_convert, "export": run_export}
PAGE = 4096
KIND = pytest.mark.parametrize("kind", list(RUN))


@pytest.fixture
def trained(make_recipe: MakeRecipe) -> Recipe:
    """A recipe with a run: results are of 260 KB and some more."""
    recipe = make_recipe()
    make_run(recipe)
    return recipe


def at(recipe: Recipe, kind: str, place: Path) -> Recipe:
    paths = recipe.paths.model_copy(update={kind: str(place)})
    return recipe.model_copy(update={"paths": paths})


def explained(stage: Callable[[Recipe], Manifest], recipe: Recipe) -> None:
    """Runs a stage as the command line does: errors of the operating system become a `UserError`."""
    try:
        stage(recipe)
    except OSError as error:
        raise explain_os_error(error) from None


def refusal(recipe: Recipe, kind: str) -> str:
    message = refusal_of(explained, RUN[kind], recipe)
    gc.collect()  # the frames of the traceback hold mapped files, and so their room on the disk
    return message


# Room.


@KIND
def test_no_room_is_said_before_any_work(trained: Recipe, small_disk: SmallDisk, kind: str) -> None:
    disk = small_disk(200)
    recipe = at(trained, kind, disk / "result")
    message = refusal(recipe, kind)
    assert re.fullmatch(
        rf"{disk}/result: needs 0\.3 MB, 0\.2 MB are free on this disk "
        r"-> free some space, or choose another path in the recipe",
        message,
    )
    assert {path.name for path in disk.iterdir()} == {".result.lock"}


@KIND
def test_old_and_new_need_room_together(trained: Recipe, small_disk: SmallDisk, kind: str) -> None:
    disk = small_disk(700)
    recipe = at(trained, kind, disk / "result")
    RUN[kind](recipe)
    before = sums(disk / "result")
    (disk / "other").write_bytes(b"x" * 200_000)
    assert "needs 0.3 MB" in refusal(recipe, kind)
    assert sums(disk / "result") == before
    (disk / "other").unlink()
    RUN[kind](recipe)
    assert sums(disk / "result") == before


@KIND
def test_what_a_killed_run_left_is_not_in_the_way(trained: Recipe, small_disk: SmallDisk, kind: str) -> None:
    """It is hidden, and as large as the result: users would not find what fills the disk."""
    disk = small_disk(450)
    (disk / ".result.staging").mkdir()
    (disk / ".result.staging" / "half").write_bytes(b"x" * 300_000)
    RUN[kind](at(trained, kind, disk / "result"))
    assert {path.name for path in disk.iterdir()} == {".result.lock", "result"}
    check_manifest(disk / "result")


@KIND
@pytest.mark.parametrize("short", [1, 5, 60, 1000])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path,
    trained: Recipe,
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    short: int,
    earlier: bool,
) -> None:
    """Somebody else writes after the room was looked at, and so many pages are missing at the end."""
    RUN[kind](at(trained, kind, tmp_path / "result"))
    needed = sum(-(-path.stat().st_size // PAGE) for path in (tmp_path / "result").rglob("*") if path.is_file())
    disk = small_disk(800)
    recipe = at(trained, kind, disk / "result")
    if earlier:
        RUN[kind](recipe)
    before = sums(disk)
    for module in (convert, export):
        monkeypatch.setattr(module, "require_room", lambda *_: None)
    (disk / "other").write_bytes(b"x" * (os.statvfs(disk).f_bavail - max(1, needed - short)) * PAGE)
    message = refusal(recipe, kind)
    assert message.startswith(f"{disk}/")
    assert message.endswith(": no room left on the disk -> free some space, then run the stage again")
    (disk / "other").unlink()
    (disk / ".result.lock").unlink()
    before.pop(".result.lock", None)
    assert sums(disk) == before
    RUN[kind](recipe)
    assert sums(disk / "result") == sums(tmp_path / "result")


# The command line, as a user meets it.


@pytest.fixture
def command(tmp_path: Path, tiny_hf: Path) -> Callable[..., Stage]:
    def made(*overrides: str, name: str = "convert") -> Stage:
        return Stage(name, [*TINY, f"paths.hf={tiny_hf}", f"paths.cache={tmp_path}", *overrides])

    return made


def test_a_limit_on_the_size_of_files(tmp_path: Path, command: Callable[..., Stage]) -> None:
    message = command("paths.mcore=result").refusal("ulimit -f 100")
    file = tmp_path / ".result.staging/iter_0000001/mp_rank_00/model_optim_rng.pt"
    what = "File too large for this disk or its limit (ulimit -f) -> raise the limit or use another disk"
    assert message == f"{file}: {what}"
    assert {path.name for path in tmp_path.iterdir()} == {".result.lock"}


def test_a_disk_that_is_mounted_read_only(small_disk: SmallDisk, command: Callable[..., Stage]) -> None:
    disk = small_disk(1000, real=True)
    stage = command(f"paths.mcore={disk / 'result'}")
    assert stage.run().returncode == 0
    before = sums(disk)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
    message = stage.refusal()
    assert message.startswith(f"{disk}/")
    assert message.endswith("this file system is read-only -> choose another path in the recipe, or mount it writable")
    assert sums(disk) == before


@pytest.mark.parametrize(
    ("name", "said"),
    named_by(
        0,
        ("file", "is in the way: not a directory -> remove it or choose another path"),
        ("file/result", "file: is in the way -> remove it or choose another path in the recipe"),
        ("foreign", "is not empty and was not made by this stage -> choose another path in the recipe"),
        ("link", "is in the way: not a directory -> remove it or choose another path"),
    ),
)
@KIND
def test_a_place_that_is_taken(tmp_path: Path, trained: Recipe, kind: str, name: str, said: str) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = {name: digest for name, digest in sums(tmp_path).items() if not name.endswith(".lock")}
    message = refusal(at(trained, kind, tmp_path / name), kind)
    assert said in message
    assert str(tmp_path / name.split("/")[0]) in message
    after = {name: digest for name, digest in sums(tmp_path).items() if not name.endswith(".lock")}
    assert after == before


@pytest.mark.parametrize("relation", ["same", "inside", "around", "link to it", "link above it"])
@KIND
def test_source_and_result_in_each_other(tmp_path: Path, trained: Recipe, kind: str, relation: str) -> None:
    """With --from the recipe's own check of its paths does not see it."""
    source = tmp_path / "up" / "source"
    write_hf(source, trained.path("hf"), {})
    (source / WEIGHTS).write_bytes((trained.path("hf") / WEIGHTS).read_bytes())
    set_config(source, attention_dropout=0.0)
    (tmp_path / "above").symlink_to(tmp_path / "up")
    (tmp_path / "to").symlink_to(source)
    target = {
        "same": source,
        "inside": source / "result",
        "around": tmp_path / "up",
        "link to it": tmp_path / "to",
        "link above it": tmp_path / "above" / "source" / "result",
    }[relation]
    before = sums(source)
    recipe = at(trained, kind, target)
    key = {"mcore": "paths.mcore", "export": "paths.export"}[kind]
    assert refusal_of(RUN[kind], recipe, source) == (
        f"the source and {key} are the same or lie in each other: {source}, {target} "
        f"-> give {key} a directory of its own"
    )
    assert sums(source) == before
