"""What users give in the place of a checkpoint: each is named for what it is, with its own remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import assert_same_bits, read_hf, write_hf
from conftest import MakeRecipe
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import INDEX, WEIGHTS, open_hf, weight_files
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.model.chat import Chat
from openpangu_sft.recipe.model_config import read_config
from openpangu_sft.verify.tensors import compare_tensors
from refusals import refusal_of

SHARD = "model-{:05d}-of-{:05d}.safetensors"


@pytest.fixture
def sharded(tmp_path: Path, tiny_hf: Path) -> Path:
    """The tiny weights in three shards, without an index."""
    write_hf(tmp_path / "sharded", tiny_hf, load_file(str(tiny_hf / WEIGHTS)), shards=3)
    (tmp_path / "sharded" / INDEX).unlink()
    return tmp_path / "sharded"


def test_all_shards_without_their_index_are_read(sharded: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    assert_same_bits(read_hf(sharded, make_recipe().model), load_file(str(tiny_hf / WEIGHTS)))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_of_some_shards_without_an_index_the_first_missing_one_is_named(sharded: Path, number: int) -> None:
    (sharded / SHARD.format(number, 3)).unlink()
    message = refusal_of(weight_files, sharded)
    assert message.startswith(f"{sharded / SHARD.format(number, 3)}: shard is missing, and so is {INDEX}")
    assert message.endswith("download both")


def test_two_sets_of_shards_without_an_index_are_refused(sharded: Path) -> None:
    shutil.copyfile(sharded / SHARD.format(1, 3), sharded / SHARD.format(1, 2))
    message = refusal_of(weight_files, sharded)
    assert f"{sharded}: has shards of 2 and of 3, and no {INDEX}" in message
    assert message.endswith("remove those of one set")


def test_a_shard_of_something_else_is_found_without_an_index(sharded: Path, make_recipe: MakeRecipe) -> None:
    shutil.copyfile(sharded / SHARD.format(1, 3), sharded / SHARD.format(2, 3))
    assert "is in another shard too" in refusal_of(open_hf, sharded, make_recipe().model)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What PEFT's save_pretrained leaves."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    content = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/models/openPangu-Embedded-1B"}
    (directory / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 32)},
              str(directory / "adapter_model.safetensors"))  # fmt: skip
    return directory


def test_an_adapter_is_named_with_its_base(adapter: Path, make_recipe: MakeRecipe) -> None:
    """In the place of a model; see test_adapter.py for where it may be given."""
    recipe = make_recipe(f"paths.hf={adapter}")
    said = {refusal_of(run_convert, recipe), refusal_of(run_export, recipe), refusal_of(read_config, adapter)}
    (message,) = said
    assert message.startswith(f"{adapter}: is a LoRA adapter, not a model (its base: /models/openPangu-Embedded-1B)")
    assert "give its base as paths.hf" in message


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("module.", "model.module.save_pretrained"),
        ("_orig_mod.", "model._orig_mod.save_pretrained"),
        ("base_model.model.", "model.merge_and_unload().save_pretrained"),
        ("module._orig_mod.", "model.module._orig_mod.save_pretrained"),
        ("policy.", "model.policy.save_pretrained"),
    ],
)
def test_prefixes_of_tensors_are_named(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, prefix: str, remedy: str
) -> None:
    tensors = load_file(str(tiny_hf / WEIGHTS))
    write_hf(tmp_path / "wrapped", tiny_hf, {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    message = refusal_of(run_convert, make_recipe(), tmp_path / "wrapped")
    assert f"{tmp_path / 'wrapped'}: the names of its tensors begin with {prefix}: " in message
    assert f"-> save the model itself: {remedy}" in message


def test_a_megatron_checkpoint_in_the_place_of_a_hugging_face_one(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    mcore = recipe.path("mcore")
    other = make_recipe(f"paths.hf={mcore}", "paths.mcore=other")
    for message in (refusal_of(compare_tensors, recipe, mcore, mcore), refusal_of(run_export, other)):
        assert message.startswith(f"{mcore}: is a Megatron-core checkpoint; a Hugging Face one is needed")
        assert f"make export FROM={mcore}" in message


def test_a_hugging_face_checkpoint_in_the_place_of_a_megatron_one(tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    message = refusal_of(compare_tensors, recipe, tiny_hf, tiny_hf)
    assert message.startswith(f"{tiny_hf}: is a Hugging Face checkpoint; a Megatron-core one is needed")
    assert message.endswith(f"-> make convert FROM={tiny_hf}")


def test_one_iteration_in_the_place_of_a_checkpoint(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    directory = recipe.path("mcore") / "iter_0000001"
    for message in (
        refusal_of(run_convert, recipe, directory),
        refusal_of(Chat, recipe, directory),
        refusal_of(open_mcore, directory, recipe.model),
    ):
        assert message.startswith(f"{directory}: is one iteration of a ")
        assert message.endswith(f"-> give the directory that contains it: {recipe.path('mcore')}")
