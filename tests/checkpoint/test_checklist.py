"""The vendor's own sums beside the weights: checked once, before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoint_files import set_config, write_hf
from conftest import SHARED, MakeRecipe
from doctor_machines import MakeContext, context, fake
from openpangu_sft.artifacts import artifact as artifact
from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.checkpoint import checklist
from openpangu_sft.checkpoint.checklist import CHECKLIST, REMEMBERED, _listed
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.doctor import resources
from openpangu_sft.doctor.machine import Finding, State, guarded
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of

__all__ = ["context", "fake"]

SHARD = "model-00002-of-00002.safetensors"


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(directory: Path) -> None:
    """Writes the list of all files in a directory, and of some that are not downloaded, as the vendor does."""
    lines = [
        f"{sum_of(path)} *./{path.relative_to(directory)}"
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != CHECKLIST
    ]
    lines.append(f"{'0' * 64} *./inference/vllm_ascend/tokenizer_config.json")
    (directory / CHECKLIST).write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture
def base(tmp_path: Path, tiny_hf: Path) -> Path:
    """A checkpoint in two shards, with its list."""
    write_hf(tmp_path / "base", tiny_hf, load_file(str(tiny_hf / WEIGHTS)), shards=2)
    publish(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def recipe(base: Path, make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(f"paths.hf={base}")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_sums_are_taken_once(
    base: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat() for path in base.rglob("*")}
    assert run_convert(recipe).inputs == hf_digests(base)
    assert f"{CHECKLIST}: 6 of 6 files are as published\n" in capsys.readouterr().err
    assert {path: path.stat() for path in base.rglob("*")}.keys() == before.keys()

    def refuse(path: Path, *_: object) -> str:
        assert path.suffix != ".safetensors" or path.parent != base, f"{path} was read again"
        return sha256_of(path)

    wanted = hf_digests(base)
    monkeypatch.setattr(artifact, "sha256_of", refuse)
    monkeypatch.setattr(checklist, "sha256_of", lambda path, *_: pytest.fail(f"{path} was read again"))
    assert run_convert(recipe).inputs == wanted
    assert f"{CHECKLIST}: 6 of 6 files are as published\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", [SHARD, "tokenizer.model"])
def test_a_damaged_file_is_refused_before_anything_is_written(base: Path, recipe: Recipe, name: str) -> None:
    original, expected = (base / name).read_bytes(), sum_of(base / name)
    flip(base / name)
    for _ in range(2):  # the second time from memory
        message = refusal_of(run_convert, recipe)
        assert message.startswith(f"{base / name}: is not the published file: sha256 {sum_of(base / name)[:12]}…")
        assert f"{CHECKLIST} has {expected[:12]}…" in message
        assert "-> download it again" in message
    assert not recipe.path("mcore").exists()
    (base / name).write_bytes(original)  # as a new download does
    run_convert(recipe)


def test_a_file_that_is_written_again_is_read_again(base: Path, recipe: Recipe) -> None:
    run_convert(recipe)
    before = (base / SHARD).stat()
    flip(base / SHARD)
    assert "is not the published file" in refusal_of(run_convert, recipe)
    assert (base / SHARD).stat().st_size == before.st_size


def test_a_changed_configuration_is_said(base: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    set_config(base, attention_dropout=0.5)
    run_convert(recipe)
    assert f"{CHECKLIST}: 5 of 6 files are as published; changed: config.json\n" in capsys.readouterr().err


def test_files_that_are_not_listed_do_not_count_as_published(
    base: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (base / CHECKLIST).read_text("utf-8").splitlines()
    (base / CHECKLIST).write_text("\r\n".join(["# made by hand", *lines[:1], "", "abc *./config.json"]), "utf-8")
    (name,) = _listed(base / CHECKLIST)
    assert name == "config.json"
    flip(base / SHARD)
    run_convert(recipe)
    shards = f"model-00001-of-00002.safetensors, {SHARD}"
    assert f"{CHECKLIST}: 1 of 6 files are as published; not listed: {shards}, " in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_in_another_encoding_is_read_or_refused(base: Path, recipe: Recipe, encoding: str) -> None:
    (base / CHECKLIST).write_text((base / CHECKLIST).read_text("utf-8"), encoding)
    if encoding == "utf-8-sig":
        assert {"config.json", SHARD} < set(_listed(base / CHECKLIST))
        flip(base / SHARD)
        assert "is not the published file" in refusal_of(run_convert, recipe)
        return
    assert refusal_of(run_convert, recipe).startswith(f"{base / CHECKLIST}: has no line")


def test_content_that_changes_under_the_same_time_is_read_again(base: Path, recipe: Recipe) -> None:
    run_convert(recipe)
    before = (base / SHARD).stat()
    flip(base / SHARD)
    os.utime(base / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t and cp -p do
    assert "is not the published file" in refusal_of(run_convert, recipe)


def test_without_a_list_nothing_is_said_or_remembered(
    base: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / CHECKLIST).unlink()
    run_convert(recipe)
    assert CHECKLIST not in capsys.readouterr().err
    assert not (recipe.path("mcore").parent / REMEMBERED).exists()


def test_links_as_the_hub_downloads_them(base: Path, tmp_path: Path, recipe: Recipe) -> None:
    for path in list(base.iterdir()):
        blob = tmp_path / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        shutil.move(str(path), blob)
        path.symlink_to(blob)
    run_convert(recipe)
    flip(base / SHARD)
    assert f"{base / SHARD}: is not the published file" in refusal_of(run_convert, recipe)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{", '{"a": [1, 2]}', '{"a": [1, 2, 3, null]}', '{"a": []}'])
def test_a_damaged_memory_is_taken_for_none(tmp_path: Path, recipe: Recipe, content: str) -> None:
    (tmp_path / REMEMBERED).write_text(content, "utf-8")
    run_convert(recipe)
    assert len(json.loads((tmp_path / REMEMBERED).read_text("utf-8"))) == 6


def test_where_nothing_can_be_remembered(
    base: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(f"paths.hf={base}", f"paths.cache={tmp_path / 'none'}", f"paths.mcore={tmp_path / 'mcore'}")
    run_convert(recipe)
    assert "as published" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_doctor(base: Path, context: MakeContext) -> None:
    def found() -> Finding:
        return guarded("checkpoint", lambda: resources.published(context(f"paths.hf={base}")))

    assert (found().state, found().found) == (State.OK, f"{CHECKLIST}: 6 of 6 files are as published")
    set_config(base, attention_dropout=0.5)
    assert found().state == State.WARNING
    assert "changed: config.json" in found().found
    whole = (base / CHECKLIST).read_text("utf-8")
    (base / CHECKLIST).write_text(whole.replace(" *./model-", " *./folder/model-"), "utf-8")
    assert (found().state, f"not listed: model-00001-of-00002.safetensors, {SHARD}" in found().found) == (
        State.WARNING,
        True,
    )
    (base / CHECKLIST).write_text(whole, "utf-8")
    flip(base / SHARD)
    assert found().state == State.FAILED
    assert str(base / SHARD) in found().found
    assert "download it again" in found().remedy
    (base / CHECKLIST).unlink()
    assert found().state == State.SKIPPED
    assert guarded("checkpoint", lambda: resources.published(context("paths.hf=nowhere"))).state == State.SKIPPED


def test_the_published_list() -> None:
    published = SHARED / "data/openpangu_7b"
    if not (published / CHECKLIST).is_file():
        pytest.skip("the list of openPangu-Embedded-7B is not here (shared/data/openpangu_7b)")
    listed = _listed(published / CHECKLIST)
    assert len(listed) == 36
    here = [path for path in published.iterdir() if path.name in listed]
    assert len(here) >= 5
    assert all(sha256_of(path) == listed[path.name] for path in here)
    assert {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)} < set(listed)
