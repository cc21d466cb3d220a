"""What export writes into config.json and generation_config.json: one dtype, and the eos that ends messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint.test_export import make_run
from checkpoint_files import set_config
from conftest import MakeRecipe
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf_export import LLAMA, OPENPANGU
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from refusals import refusal_of

GENERATION = "generation_config.json"


@pytest.fixture
def base(tmp_path: Path, tiny_hf: Path) -> Path:
    shutil.copytree(tiny_hf, tmp_path / "base")
    return tmp_path / "base"


def set_generation(base: Path, **changes: Any) -> None:
    content = {**json.loads((base / GENERATION).read_text("utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not ...}
    (base / GENERATION).write_text(json.dumps(kept), "utf-8")


def written(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text("utf-8"))


@pytest.mark.parametrize("form", [LLAMA, OPENPANGU])
@pytest.mark.parametrize("given", [2, [2, 7], None, ..., "end"])
def test_another_eos_is_written_right(base: Path, make_recipe: MakeRecipe, form: str, given: Any) -> None:
    right = Tokenizer(base, trust_remote_code=False).end_id
    set_config(base, eos_token_id=given)
    set_generation(base, eos_token_id=given, temperature=0.7)
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    run_export(recipe, form=form)
    for name in ("config.json", GENERATION):
        assert written(recipe.path("export"), name)["eos_token_id"] == right
    assert written(recipe.path("export"), GENERATION)["temperature"] == 0.7


def test_what_is_said_of_another_eos(base: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    right = Tokenizer(base, trust_remote_code=False).end_id
    set_config(base, eos_token_id=[2, 7])
    set_generation(base, eos_token_id=2)
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    capsys.readouterr()
    run_export(recipe)
    said = capsys.readouterr().err
    assert f"{base}/config.json: eos_token_id is [2, 7]; it is exported as {right}, the id of [unused10]\n" in said
    assert f"{base}/{GENERATION}: eos_token_id is 2; it is exported as {right}, the id of [unused10]\n" in said


def test_an_eos_list_that_ends_messages_stays(
    base: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [2, Tokenizer(base, trust_remote_code=False).end_id]
    set_config(base, eos_token_id=given)
    set_generation(base, eos_token_id=given)
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    run_export(recipe)
    assert written(recipe.path("export"), "config.json")["eos_token_id"] == given
    assert (recipe.path("export") / GENERATION).read_bytes() == (base / GENERATION).read_bytes()
    assert "eos_token_id" not in capsys.readouterr().err


def test_stock_transformers_stops_at_the_right_token(base: Path, make_recipe: MakeRecipe) -> None:
    """Without generation_config.json it takes the eos of config.json."""
    right = Tokenizer(base, trust_remote_code=False).end_id
    set_config(base, eos_token_id=2)
    (base / GENERATION).unlink()
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    run_export(recipe)
    assert not (recipe.path("export") / GENERATION).exists()
    model = AutoModelForCausalLM.from_pretrained(str(recipe.path("export")), local_files_only=True)
    assert model.generation_config.eos_token_id == right


def test_a_broken_generation_config_is_refused(base: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    (base / GENERATION).write_text("{", "utf-8")
    assert "not valid JSON" in refusal_of(run_export, recipe)


@pytest.mark.parametrize("form", [LLAMA, OPENPANGU])
@pytest.mark.parametrize(
    "given", [{"dtype": "float32"}, {"dtype": "float16", "torch_dtype": ...}, {"torch_dtype": ...}]
)
def test_one_dtype_is_written_that_of_the_weights(
    base: Path, make_recipe: MakeRecipe, form: str, given: dict[str, Any]
) -> None:
    set_config(base, **given)
    recipe = make_recipe(f"paths.hf={base}", "train.precision=bf16")
    make_run(recipe)
    run_export(recipe, form=form)
    config = written(recipe.path("export"), "config.json")
    assert {key: value for key, value in config.items() if "dtype" in key} == {"torch_dtype": "bfloat16"}
    if form == LLAMA:
        path = str(recipe.path("export"))
        model = AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto", local_files_only=True)
        assert model.dtype == torch.bfloat16
