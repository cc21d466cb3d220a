"""The handler of the published command makes what stage preprocess makes, and refuses what it refuses."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.hooks.handler import FIXED, PanguInstructionHandler
from parameter_ids import named_by


def samples(count: int) -> list[Any]:
    return [conversation(f"问题 {number}", f"答案 {number} " * (number % 5 + 1)) for number in range(count)]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    recipe = make_recipe("data.seq_length=96")
    write_samples(recipe.path("samples") / "talks.jsonl", samples(60))
    run_preprocess(recipe)
    return recipe


def flags(recipe: Recipe, source: Path, prefix: Path, **others: Any) -> Namespace:
    """As preprocess_data.py parses the published command."""
    published = {"pack": True, "seq_length": recipe.data.seq_length, "workers": 2, "seed": 1234, **FIXED}
    places = {"input": str(source), "output_prefix": str(prefix), "tokenizer_name_or_path": str(recipe.path("hf"))}
    return Namespace(**{**published, **places, **others})


def handle(arguments: Namespace) -> PanguInstructionHandler:
    """What preprocess_data.py calls."""
    handler = PanguInstructionHandler(arguments, PanguInstructionHandler.inputs(arguments), None, None)
    handler.serialize_to_disk()
    return handler


def error_line(arguments: Namespace, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, where the command has to end with exit code 1."""
    with pytest.raises(SystemExit) as caught:
        handle(arguments)
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("openpangu-sft: ")
    return line


def packed(directory: Path, prefix: str) -> dict[str, bytes]:
    """The six files by their names after the prefix; nothing else but the lock is there."""
    files = {path.name: path for path in directory.iterdir() if path.suffix not in (".lock", ".json")}
    if (directory / "manifest.json").is_file():  # made by a stage, which keeps roles too
        del files[f"{prefix}_roles.bin"]
    assert all(name.startswith(f"{prefix}_packed_") for name in files)
    return {name[len(prefix) :]: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("source", ["talks.jsonl", "."])
def test_the_same_bytes_as_preprocess(recipe: Recipe, tmp_path: Path, source: str) -> None:
    (tmp_path / "out").mkdir()
    handler = handle(flags(recipe, recipe.path("samples") / source, tmp_path / "out/demo"))
    assert packed(tmp_path / "out", "demo") == packed(recipe.path("shards") / "talks", "data")
    assert len(packed(tmp_path / "out", "demo")) == 6
    assert all(Path(path).is_file() for path in handler.output_idx_files.values())


def test_several_files_become_one_dataset(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_samples(tmp_path / "parts/a.jsonl", samples(60)[:25])
    write_samples(tmp_path / "parts/b.jsonl", samples(60)[25:])
    handle(flags(recipe, tmp_path / "parts", tmp_path / "out/demo"))
    assert packed(tmp_path / "out", "demo") == packed(recipe.path("shards") / "talks", "data")


def test_a_bad_sample_leaves_what_was_there(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    handle(flags(recipe, recipe.path("samples"), tmp_path / "out/demo"))
    before = packed(tmp_path / "out", "demo")
    write_samples(tmp_path / "bad.jsonl", [*samples(3), {"data": []}])
    line = error_line(flags(recipe, tmp_path / "bad.jsonl", tmp_path / "out/demo"), capsys)
    assert f'{tmp_path}/bad.jsonl:4: meta_prompt is missing: write "meta_prompt": [""] for none -> ' in line
    assert "data.… are settings of make preprocess" in line
    assert packed(tmp_path / "out", "demo") == before


def test_an_empty_file_among_others_is_named(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    write_samples(tmp_path / "parts/a.jsonl", samples(5))
    write_samples(tmp_path / "parts/b.jsonl", [])
    line = error_line(flags(recipe, tmp_path / "parts", tmp_path / "out/demo"), capsys)
    assert f"{tmp_path}/parts/b.jsonl: holds no records" in line
    assert not packed(tmp_path / "out", "demo")


@pytest.mark.parametrize(
    ("others", "said"),
    named_by(
        0,
        ({"pack": False}, "--pack: is missing"),
        ({"seq_length": None}, "--seq-length: is missing"),
        ({"seq_length": 4}, "--seq-length 4: Input should be greater than or equal to 8"),
        ({"workers": 0}, "--workers 0: "),
        ({"append_eod": True}, "--append-eod: is not supported by PanguInstructionHandler -> leave it out"),
        ({"n_subs": 2}, "--n-subs: "),
        ({"map_keys": {"a": "b"}}, "--map-keys: "),
        ({"input": "nowhere"}, "nowhere: no such directory"),
        ({"output_prefix": "nowhere/"}, "nowhere/: is a directory"),
    ),
)
def test_what_it_cannot_do_is_refused(
    recipe: Recipe, tmp_path: Path, others: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_line(flags(recipe, recipe.path("samples"), tmp_path / "demo", **others), capsys)
