"""Verification of a LoRA checkpoint: its base is that of paths.hf, bit for bit, whatever the adapters are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adapters import save_adapter
from conftest import MakeRecipe
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.verify.logits import compare_logits
from openpangu_sft.verify.tensors import compare_tensors
from refusals import refusal_of

LORA = ("train.engine=mindspeed", "parallel.devices_per_node=4", "train.global_batch_size=4", "train.lora.rank=4")


@pytest.fixture
def trained(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Of TP 2 and PP 2, with adapters that are not 0, without a manifest."""
    recipe = make_recipe(*LORA, "train.lora.alpha=6", "parallel.tensor=2", "parallel.pipeline=2")
    run_convert(recipe, save_adapter(recipe, tmp_path / "adapter"))
    (recipe.path("mcore") / "manifest.json").unlink()
    return recipe


def flip(recipe: Recipe, name: str) -> None:
    """Changes the lowest bit of a tensor's last element."""
    path = recipe.path("mcore") / "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path)
    content["model"][name].view(torch.int32).view(-1)[-1] ^= 1
    torch.save(content, path)


def test_an_untouched_base_is_equal(trained: Recipe) -> None:
    flip(trained, "decoder.layers.0.mlp.linear_fc2.lora_A.default.weight")
    figures = compare_tensors(trained, trained.path("hf"), trained.path("mcore")).figures
    assert figures["tensors equal"] == "28 of 28"
    assert figures["LoRA adapters"].startswith("rank 4, alpha 6, on q_proj, k_proj, ")


@pytest.mark.parametrize("name", ["mlp.linear_fc2.base_layer.weight", "self_attention.linear_qkv.base_layer.bias"])
def test_a_bit_of_the_base_is_found(trained: Recipe, name: str) -> None:
    flip(trained, f"decoder.layers.0.{name}")
    message = refusal_of(compare_tensors, trained, trained.path("hf"), trained.path("mcore"))
    assert "in 1 blocks of tensors, the first: model.layers.1." in message


def test_in_another_dtype_only_rounding_differs(trained: Recipe, tmp_path: Path, patched: Path) -> None:
    shutil.rmtree(trained.path("mcore"))
    run_convert(trained, tmp_path / "adapter", dtype="bf16")
    compared = compare_tensors(trained, trained.path("hf"), trained.path("mcore"))
    assert "after rounding Hugging Face's float32 to bfloat16" in compared.figures["values equal"]
    assert all(row.passed for row in compare_logits(trained, trained.path("hf"), compared))


def test_megatron_gives_the_logits_of_the_base(trained: Recipe, patched: Path) -> None:
    compared = compare_tensors(trained, trained.path("hf"), trained.path("mcore"))
    rows = compare_logits(trained, trained.path("hf"), compared)
    assert all(row.passed for row in rows)
