"""Export of what is no run's newest checkpoint: an earlier iteration, any layout, a Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint.test_export import make_run
from checkpoint.test_mcore_reader import TP2_PP2
from checkpoint_files import assert_same_bits, read_hf, write_hf
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.hf_export import OPENPANGU, SAME_IDS
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.recipe.schema import Recipe
from pangu_base import TRUSTED, make_pangu_base
from pangu_base import own_module_cache as own_module_cache  # a fixture
from refusals import refusal_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(str(recipe.path("export") / WEIGHTS))


def test_an_earlier_iteration(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    early, late = make_run(recipe, 3, seed=1), make_run(recipe, 6, seed=2)
    assert run_export(recipe, iteration=3).counts["iteration"] == 3
    assert_same_bits(weights(recipe), early)
    assert run_export(recipe).counts["iteration"] == 6
    assert_same_bits(weights(recipe), late)
    said = "iteration 5 is not there -> take another one: ITERATION=6"
    assert refusal_of(run_export, recipe, iteration=5) == f"{recipe.path('run')}/iter_0000005: {said}"
    assert_same_bits(weights(recipe), late)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_another_dtype_is_that_of_torch(make_recipe: MakeRecipe, dtype: str) -> None:
    recipe = make_recipe()
    trained = make_run(recipe)
    counts = run_export(recipe, dtype=dtype).counts
    assert_same_bits(weights(recipe), {name: tensor.to(DTYPES[dtype]) for name, tensor in trained.items()})
    config = json.loads((recipe.path("export") / "config.json").read_text("utf-8"))
    assert config["torch_dtype"] == counts["dtype"] == str(DTYPES[dtype]).split(".")[1]
    loaded = AutoModelForCausalLM.from_pretrained(str(recipe.path("export")), torch_dtype="auto")
    assert loaded.dtype == DTYPES[dtype]


@pytest.mark.parametrize("ours", [True, False])
def test_a_megatron_checkpoint_of_another_layout(make_recipe: MakeRecipe, tiny_hf: Path, ours: bool) -> None:
    """With this project's manifest, or without, as MindSpeed-LLM leaves it."""
    run_convert(make_recipe(*TP2_PP2))
    recipe = make_recipe()
    mcore = recipe.path("mcore")
    if not ours:
        (mcore / MANIFEST).unlink()
        (mcore / "iter_0000001").rename(mcore / "iter_0002000")
        (mcore / "latest_checkpointed_iteration.txt").write_text("2000", "utf-8")
    manifest = run_export(recipe, mcore)
    assert_same_bits(weights(recipe), read_hf(tiny_hf, recipe.model))
    assert manifest.counts == {
        "parameters": 64864, "dtype": "float32", "form": "llama", "fast_tokenizer": SAME_IDS,
        **({} if ours else {"iteration": 2000}),
    }  # fmt: skip
    assert ("weights" in manifest.inputs) == ours
    card = (recipe.path("export") / "README.md").read_text("utf-8")
    assert f"# {mcore.name.replace('_', chr(92) + '_')}\n" in card
    assert "fine-tuned" not in card
    assert ("iterations | 2,000" in card) == (not ours)


def test_a_hugging_face_checkpoint_is_only_renamed(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """Without any training: the original itself, in one file instead of shards, for machines without an NPU."""
    base = make_pangu_base(tmp_path / "openPangu", tiny_hf)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(str(base / WEIGHTS)).items()}
    write_hf(tmp_path / "sharded" / "openPangu", base, tensors, shards=3)
    original = tmp_path / "sharded/openPangu"
    recipe = make_recipe(f"paths.hf={original}", TRUSTED)
    manifest = run_export(recipe, original)
    assert_same_bits(weights(recipe), tensors)
    assert manifest.inputs == hf_digests(original)
    assert manifest.settings == {}
    loaded = AutoModelForCausalLM.from_pretrained(str(recipe.path("export")), torch_dtype="auto")
    assert (type(loaded).__name__, loaded.dtype) == ("LlamaForCausalLM", torch.bfloat16)
    assert "has no iterations, so none is 1" in refusal_of(run_export, recipe, original, iteration=1)


def test_back_to_the_form_of_the_original(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """Its tokenizer's files are others than the base's by then; what counts is that it gives the same ids."""
    base = make_pangu_base(tmp_path / "openPangu-back", tiny_hf)
    first = make_recipe(f"paths.hf={base}", TRUSTED)
    trained = make_run(first)
    run_export(first)
    recipe = make_recipe(f"paths.hf={base}", TRUSTED, "paths.export=back")
    run_export(recipe, first.path("export"), form=OPENPANGU)
    assert_same_bits(weights(recipe), trained)
    for name in ("tokenizer_config.json", "modeling_openpangu_dense.py"):
        assert (recipe.path("export") / name).read_bytes() == (base / name).read_bytes()


def test_weights_are_not_given_a_tokenizer_that_is_not_theirs(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_hf, other)
    path = other / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "add_bos_token": False}), "utf-8")
    recipe = make_recipe()
    assert refusal_of(run_export, recipe, other) == (
        f"{other}: its tokenizer gives other ids than that of paths.hf, for '' -> check paths.hf"
    )
    assert not recipe.path("export").exists()
    path.write_text(json.dumps({**config, "add_bos_token": True, "more": 1}), "utf-8")
    run_export(recipe, other)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (other / name).unlink()
    (other / "special_tokens_map.json").unlink()
    run_export(recipe, other)  # weights alone


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty directory"])
def test_what_is_no_checkpoint(tmp_path: Path, make_recipe: MakeRecipe, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "a file":
        source.write_bytes(b"x")
    elif kind == "an empty directory":
        source.mkdir()
    message = refusal_of(run_export, make_recipe(), source)
    assert message.startswith(f"{source}: ")
    assert message.endswith(" -> check the path")
