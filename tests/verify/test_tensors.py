"""The command verify: sums, tensors, logits; it passes what is the same and finds what is not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from checkpoint_files import set_config, write_hf
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.cli.checkpoints import verify_command
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError
from openpangu_sft.verify.logits import BF16_LIMIT, FP32_LIMIT, Row, compare_logits
from openpangu_sft.verify.tensors import check_manifest, compare_tensors
from refusals import refusal_of
from split_checkpoint import random_llama

ENGINE = ("train.engine=mindspeed", "parallel.devices_per_node=4", "train.global_batch_size=4")
Converted = Callable[..., Recipe]


@pytest.fixture
def converted(make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path) -> Converted:
    """Gives recipes whose random checkpoint, of which no two values are alike, has been converted."""

    def make(*overrides: str, dtype: torch.dtype = torch.float32) -> Recipe:
        recipe = make_recipe(*ENGINE, f"paths.hf={tmp_path / 'hf'}", *overrides)
        tied = recipe.model.tie_word_embeddings
        state = random_llama(recipe.model).to(dtype).state_dict()
        write_hf(
            recipe.path("hf"), tiny_hf, {k: v.clone() for k, v in state.items() if not tied or k != "lm_head.weight"}
        )
        set_config(recipe.path("hf"), tie_word_embeddings=tied)
        run_convert(recipe)
        return recipe

    return make


def file_of(recipe: Recipe, rank: str) -> Path:
    return recipe.path("mcore") / "iter_0000001" / rank / "model_optim_rng.pt"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


# Sums.


def test_every_flipped_byte_is_found(converted: Converted) -> None:
    recipe = converted("parallel.tensor=2")
    root = recipe.path("mcore")
    assert check_manifest(root)["files"] == "3"
    for file in (
        file_of(recipe, "mp_rank_00"),
        file_of(recipe, "mp_rank_01"),
        root / "latest_checkpointed_iteration.txt",
    ):
        intact = file.read_bytes()
        for position in range(0, len(intact), max(1, len(intact) // 5)):
            damaged = bytearray(intact)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            message = refusal_of(check_manifest, root)
            assert message.startswith(f"{file}: its content is not what the manifest describes")
        file.write_bytes(intact)
    check_manifest(root)


def test_what_has_no_sums_is_not_called_good(converted: Converted) -> None:
    recipe = converted()
    (recipe.path("mcore") / MANIFEST).unlink()
    assert "there is no manifest" in refusal_of(check_manifest, recipe.path("mcore"))


# Tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_checkpoints_are_equal(converted: Converted, dtype: torch.dtype) -> None:
    recipe = converted("parallel.tensor=2", "parallel.pipeline=2", dtype=dtype)
    figures = compare_tensors(recipe, recipe.path("hf"), recipe.path("mcore")).figures
    assert figures["Megatron-core"] == "TP 2, PP 2, iteration 1"
    assert figures["tensors equal"] == "28 of 28"  # 13 a layer, embedding, norm
    assert figures["values equal"] == "64,864, every bit"


def test_a_rounded_checkpoint_is_compared_after_rounding(converted: Converted) -> None:
    recipe = converted()
    shutil.rmtree(recipe.path("mcore"))
    run_convert(recipe, dtype="bf16")
    figures = compare_tensors(recipe, recipe.path("hf"), recipe.path("mcore")).figures
    assert figures["values equal"] == "64,864, every bit, after rounding Hugging Face's float32 to bfloat16"


NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.layers.1.self_attention.linear_qkv.bias",
    "decoder.layers.0.self_attention.linear_proj.bias",
    "decoder.layers.1.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_of_any_tensor_is_found(converted: Converted, name: str) -> None:
    recipe = converted()
    (recipe.path("mcore") / MANIFEST).unlink()

    def change(content: Any) -> None:
        bits = content["model"][name].view(torch.int32).view(-1)
        bits[-1] ^= 1

    edit(file_of(recipe, "mp_rank_00"), change)
    message = refusal_of(compare_tensors, recipe, recipe.path("hf"), recipe.path("mcore"))
    assert re.search(r"in 1 blocks of tensors, the first: model.* here, .* there", message)


# Logits.


@pytest.fixture
def core(patched: Path) -> Path:
    """Skips where megatron-core cannot be had."""
    return patched


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), torch.bfloat16),
        (("parallel.tensor=2", "parallel.pipeline=2", "model.tie_word_embeddings=false"), torch.float32),
    ],
)
def test_the_same_model_gives_the_same_logits(
    converted: Converted, core: Path, overrides: tuple[str, ...], dtype: torch.dtype
) -> None:
    recipe = converted(*overrides, dtype=dtype)
    compared = compare_tensors(recipe, recipe.path("hf"), recipe.path("mcore"))
    rows = compare_logits(recipe, recipe.path("hf"), compared)
    assert [(row.prompt, row.precision) for row in rows] == [
        (prompt, precision) for precision in ("fp32", "bf16") for prompt in ("Chinese", "English")
    ]
    for row in rows:
        assert row.passed, row
        assert row.tokens > 20
        assert row.largest_difference > 0  # two implementations never round alike: it did compare
        assert row.limit == (FP32_LIMIT if row.precision == "fp32" else BF16_LIMIT)


def test_a_checkpoint_and_its_rounded_form_give_the_same_logits(converted: Converted, core: Path) -> None:
    recipe = converted("parallel.tensor=2")
    hf, mcore = recipe.path("hf"), recipe.path("mcore")
    run_convert(recipe, dtype="bf16")
    compared = compare_tensors(recipe, hf, mcore)
    assert all(row.passed for row in compare_logits(recipe, hf, compared))

    run_convert(recipe)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(str(hf / WEIGHTS)).items()}
    save_file(tensors, str(hf / WEIGHTS))  # as an export in bf16
    compared = compare_tensors(recipe, hf, mcore)
    assert compared.figures["values equal"] == "64,864, every bit, after rounding Megatron-core's float32 to bfloat16"
    assert all(row.passed for row in compare_logits(recipe, hf, compared))

    tensors["model.norm.weight"][0] += 1
    save_file(tensors, str(hf / WEIGHTS))
    assert "the first: " in refusal_of(compare_tensors, recipe, hf, mcore)


def test_another_model_gives_other_logits(converted: Converted, core: Path) -> None:
    """A layer's k bias lost: less than rounding changes in bf16, so that fp32 has to find it."""
    recipe = converted()
    compared = compare_tensors(recipe, recipe.path("hf"), recipe.path("mcore"))
    tensors = load_file(str(recipe.path("hf") / WEIGHTS))
    tensors["model.layers.1.self_attn.k_proj.bias"].zero_()
    save_file(tensors, str(recipe.path("hf") / WEIGHTS))
    rows = compare_logits(recipe, recipe.path("hf"), compared)
    assert [row.passed for row in rows if row.precision == "fp32"] == [False, False]


def test_nan_does_not_pass() -> None:
    assert not Row("Chinese", "fp32", 1, 1.0, float("nan"), 1.0, float("nan"), FP32_LIMIT).passed


# The command.


def run(recipe: Recipe, *options: str) -> Result:
    model = recipe.model
    given = {"paths.cache": recipe.paths.cache, "paths.hf": recipe.paths.hf}
    given.update(
        {f"model.{key}": value for key, value in model.model_dump().items() if not isinstance(value, (bool, str))}
    )
    given.update({"train.engine": "mindspeed", "data.seq_length": 128})
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    return CliRunner().invoke(verify_command, ["--recipe", "recipes/demo.yaml", *sets, *options])


def test_the_command_shows_tables(converted: Converted, core: Path) -> None:
    recipe = converted()
    result = run(recipe)
    assert result.exit_code == 0, result.exception
    for part in ("every bit", "difference", "fp32", "bf16", "Chinese", "English", "≤ 1e-05", "≤ 1.5"):
        assert part in result.output
    for options, part in (("--manifest", "every file is as it was made"), ("--tensors", "every bit")):
        result = run(recipe, options)
        assert result.exit_code == 0
        assert part in result.output
        assert "difference" not in result.output
        assert result.output.splitlines()[-1] == "PASS"


def error_line(result: Result) -> str:
    """The error, which comes before the verdict."""
    *_, error, verdict = result.output.splitlines()
    assert (result.exit_code, verdict) == (1, "FAIL")
    return error


def test_the_command_fails_where_logits_differ(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("English", "fp32", 5, 1.0, 0.1, 1.0, 0.1, FP32_LIMIT)
    monkeypatch.setattr("openpangu_sft.verify.logits.compare_logits", lambda *_: [row])
    result = run(converted())
    assert "in fp32, English prompt" in error_line(result)
    assert "0.1 > 1e-05" in result.output


@pytest.mark.parametrize("option", ["--manifest", "--tensors"])
def test_the_command_fails_where_a_file_is_missing(converted: Converted, option: str) -> None:
    recipe = converted()
    file_of(recipe, "mp_rank_00").unlink()
    error = error_line(run(recipe, option))
    assert error.startswith("openpangu-sft: ")
    assert "mp_rank_00" in error
    assert " -> " in error


def test_an_adapter_is_not_a_megatron_checkpoint(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}", "utf-8")
    error = error_line(run(converted(), "--tensors", "--mcore", str(tmp_path / "adapter")))
    assert "adapter: is a LoRA adapter; a Megatron-core checkpoint is needed -> make convert FROM=" in error


def test_without_a_checkpoint_there_is_no_verdict(converted: Converted) -> None:
    recipe = converted()
    shutil.rmtree(recipe.path("mcore"))
    result = run(recipe, "--tensors")
    assert isinstance(result.exception, UserError)
    assert "FAIL" not in result.output
