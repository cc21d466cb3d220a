"""openPangu-Embedded-7B as it is published, with RoPE's frequencies among its weights, taken through every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_files import assert_same_bits, random_checkpoint, read_hf, read_mcore, write_hf
from conftest import SHARED, MakeRecipe, conversation, write_samples
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import INDEX, WEIGHTS, open_hf
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.evaluate.stage import run_evaluate
from openpangu_sft.model.chat import Chat
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.stage import run_sft
from openpangu_sft.verify.logits import hugging_face_logits
from openpangu_sft.verify.tensors import compare_tensors
from published_7b import FREQUENCIES, SIZES, inverse_frequencies, make_published_7b, weight_map
from refusals import refusal_of

QUESTION = (Message("user", "你好"),)


def test_names_and_shards_are_those_of_the_real_index(make_recipe: MakeRecipe) -> None:
    published = SHARED / "data/openpangu_7b" / INDEX
    if not published.is_file():
        pytest.skip("the index of openPangu-Embedded-7B is not here (shared/data/openpangu_7b)")
    index = json.loads(published.read_text("utf-8"))
    assert weight_map(make_recipe(*SIZES).model) == index["weight_map"]


def test_the_whole_way(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        *SIZES, f"paths.hf={tmp_path / '7B'}", "data.validation_share=0.2", "train.iterations=3",
        "train.save_interval=3", "chat.max_new_tokens=3",
    )  # fmt: skip
    tensors = make_published_7b(tmp_path / "7B", tiny_hf, recipe.model)
    run_convert(recipe)
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), tensors)
    assert compare_tensors(recipe, recipe.path("hf"), recipe.path("mcore")).figures["tensors equal"] == "445 of 445"
    assert hugging_face_logits(recipe, recipe.path("hf"), [[1, 5, 9]], "fp32")[0].shape == (3, 1536)

    samples = [conversation(f"第 {n} 个问题是什么？", f"这是第 {n} 个回答。") for n in range(40)]
    write_samples(recipe.path("samples") / "all.jsonl", samples)
    run_preprocess(recipe)
    run_merge(recipe)
    run_sft(recipe, ["sft"])
    assert len(run_evaluate(recipe).results) == 2
    run_export(recipe)

    exported = load_file(str(recipe.path("export") / WEIGHTS))
    assert set(exported) == set(tensors)
    model, found = AutoModelForCausalLM.from_pretrained(
        str(recipe.path("export")), output_loading_info=True, local_files_only=True
    )
    assert not any(found.values())
    assert torch.equal(model.model.rotary_emb.inv_freq, inverse_frequencies(16e6, 8))
    capfd.readouterr()
    before, same = (Chat(recipe, recipe.path(name)).reply(QUESTION) for name in ("hf", "mcore"))
    assert before == same
    assert Chat(recipe, recipe.path("export")).reply(QUESTION) == Chat(recipe, recipe.path("run")).reply(QUESTION)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def base(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> Path:
    """A checkpoint of two layers, tied, that a test adds tensors to."""
    shutil.copytree(tiny_hf, tmp_path / "base")
    return tmp_path / "base"


def with_tensors(recipe: Recipe, **more: torch.Tensor) -> Recipe:
    file = str(recipe.path("hf") / WEIGHTS)
    save_file({**load_file(file), **more}, file)
    return recipe


FOUR = inverse_frequencies(4e6, 8)
"""Of the tiny model."""


@pytest.mark.parametrize("name", [FREQUENCIES.format(1), "model.rotary_emb.inv_freq"], ids=["layer", "model"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frequencies_of_any_precision_are_compared_and_left_out(
    base: Path, tiny_hf: Path, make_recipe: MakeRecipe, name: str, dtype: torch.dtype
) -> None:
    recipe = with_tensors(make_recipe(f"paths.hf={base}"), **{name: FOUR.to(dtype)})
    assert_same_bits(read_hf(base, recipe.model), read_hf(tiny_hf, recipe.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_smallest_frequencies(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, dtype: torch.dtype) -> None:
    """Of the 7B's, 8e-8 is the smallest: in fp16 the step from one value to the next is 6e-8 there."""
    recipe = make_recipe("model.rotary_base=16000000.0", "model.kv_channels=128", f"paths.hf={tmp_path / 'base'}")
    tensors = random_checkpoint(recipe.model, lambda _: torch.float32)
    write_hf(tmp_path / "base", tiny_hf, {**tensors, FREQUENCIES.format(0): inverse_frequencies(16e6, 128).to(dtype)})
    assert_same_bits(read_hf(tmp_path / "base", recipe.model), tensors)


def wrong(change: str) -> torch.Tensor:
    if change == "a little more":
        return FOUR * torch.tensor([1, 1, 1 + 1e-5, 1])
    if change == "not a number":
        return torch.tensor([1, float("nan"), 0, 0])
    return {
        "another base": inverse_frequencies(16e6, 8),
        "another base, in bf16": inverse_frequencies(3.8e6, 8).bfloat16(),
        "scaled": FOUR / 4,
        "no frequencies": torch.zeros(4, dtype=torch.int64),
    }[change]


@pytest.mark.parametrize(
    "change",
    ["another base", "another base, in bf16", "scaled", "a little more", "not a number", "no frequencies"],
)
def test_frequencies_that_contradict_the_configuration_are_refused(
    base: Path, make_recipe: MakeRecipe, change: str
) -> None:
    recipe = with_tensors(make_recipe(f"paths.hf={base}"), **{FREQUENCIES.format(1): wrong(change)})
    message = refusal_of(run_convert, recipe)
    assert message.startswith(f"{base}: tensor {FREQUENCIES.format(1)} is not what rope base ")
    assert "rope base 4000000 and head size 8 of config.json give" in message
    assert message.endswith("-> take the published config.json")
    assert not recipe.path("mcore").exists()


def test_frequencies_of_another_head_size_are_refused(base: Path, make_recipe: MakeRecipe) -> None:
    recipe = with_tensors(make_recipe(f"paths.hf={base}"), **{FREQUENCIES.format(0): inverse_frequencies(4e6, 16)})
    message = refusal_of(open_hf, base, recipe.model)
    assert f"tensor {FREQUENCIES.format(0)} is not what rope base " in message
