"""A source that is written to while it is read: a result that may be of two checkpoints is not put in place."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.test_export import make_run
from conftest import TINY, MakeRecipe
from openpangu_sft.checkpoint import convert, export
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from refusals import refusal_of, without_progress
from stage_process import LARGER, Stage, larger_base, stopped_while_writing, sums

SIZE = 52_000_000
"""Bytes of the larger model."""
MODEL_FILE = "iter_0000003/mp_rank_00/model_optim_rng.pt"
CHANGED = "changed while it was read -> run the stage again when it is whole"


def overwrite(path: Path) -> None:
    """In place, like a restarted download: every byte moves, and the size stays."""
    content = path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(content[:-4000] + bytes(4000))


def replace(path: Path) -> None:
    """Another file under the same name, as git or rsync do it. What is mapped stays the old one."""
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


def touch_config(path: Path) -> None:
    (path.parent / "config.json").write_text((path.parent / "config.json").read_text("utf-8") + " ", "utf-8")


CHANGES = [overwrite, replace, remove]


@pytest.mark.parametrize("change", [*CHANGES, touch_config])
@pytest.mark.parametrize("moment", ["before it is compared", "after it was compared"])
def test_convert_refuses_what_changed_meanwhile(
    tmp_path: Path,
    tiny_hf: Path,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    moment: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_hf, source)
    recipe = make_recipe(f"paths.hf={source}")
    run_convert(recipe)
    before = sums(recipe.path("mcore"))
    compare = convert.require_equal

    def compare_and_change(*arguments: object) -> None:
        if moment == "after it was compared":
            compare(*arguments)  # type: ignore[arg-type]
        change(source / WEIGHTS)
        if moment == "before it is compared":
            compare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "require_equal", compare_and_change)
    file = source / ("config.json" if change is touch_config else WEIGHTS)
    assert refusal_of(run_convert, recipe) == f"{file}: {CHANGED}"
    assert sums(recipe.path("mcore")) == before


@pytest.mark.parametrize("change", CHANGES)
def test_export_refuses_a_run_that_changed_meanwhile(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    recipe = make_recipe()
    make_run(recipe)
    file = recipe.path("run") / MODEL_FILE
    monkeypatch.setattr(export, "require_equal", lambda *_: change(file))
    assert refusal_of(run_export, recipe) == f"{file}: {CHANGED}"
    assert not recipe.path("export").exists()


def test_a_run_may_go_on_while_it_is_exported(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer iterations are put beside the exported one, and the tracker names them."""
    recipe = make_recipe()
    make_run(recipe, 3)
    compare = export.require_equal

    def train_and_compare(*arguments: object) -> None:
        make_run(recipe, 6)
        compare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "require_equal", train_and_compare)
    assert run_export(recipe).counts["iteration"] == 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    return larger_base(tmp_path_factory.mktemp("larger") / "hf", tiny_hf)


def test_a_source_that_is_cut_short_ends_the_stage(base: Path, tmp_path: Path) -> None:
    """Or the kernel does it, with SIGBUS, which Python cannot prevent. Nothing wrong is left; a next run clears up."""
    source = tmp_path / "source"
    shutil.copytree(base, source)
    target = tmp_path / "mcore"
    stage = Stage("convert", [*TINY, *LARGER, f"paths.hf={source}", f"paths.mcore={target}"])
    shards = sorted(source.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in shards}
    process = stopped_while_writing(stage, target, 1_000_000, SIZE * 3 // 4)
    for path in shards:
        os.truncate(path, 1000)
    process.send_signal(signal.SIGCONT)
    said = process.communicate()[1]
    assert process.returncode in (1, -signal.SIGBUS)
    if process.returncode == 1:
        assert said.endswith(f": {CHANGED}\n")
    assert not target.exists()
    assert stage.refusal().startswith(f"{shards[0]}: damaged: ")
    for path, content in whole.items():
        path.write_bytes(content)
    assert stage.run().returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "mcore", ".mcore.lock"}


def test_a_source_that_is_replaced_in_a_real_run(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    target = tmp_path / "mcore"
    stage = Stage("convert", [*TINY, *LARGER, f"paths.hf={source}", f"paths.mcore={target}"])
    process = stopped_while_writing(stage, target, 1_000_000, SIZE * 3 // 4)
    replace(source / "model-00002-of-00003.safetensors")
    process.send_signal(signal.SIGCONT)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert without_progress(said) == f"openpangu-sft: {source}/model-00002-of-00003.safetensors: {CHANGED}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".mcore.lock"}
