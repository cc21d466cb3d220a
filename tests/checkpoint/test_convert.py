"""Stage convert: bit-exact from Hugging Face to Megatron-core and back, in the format that Megatron loads."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint.test_sharding import layouts, models
from checkpoint_files import (
    Tensors,
    assert_same_bits,
    random_bits,
    random_checkpoint,
    read_hf,
    read_mcore,
    set_config,
    write_hf,
)
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import read_manifest, require_settings
from openpangu_sft.checkpoint.convert import mcore_settings, run_convert
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.mcore_reader import latest_iteration, parts_of
from openpangu_sft.checkpoint.sharding import Layout, extra_state_names, mcore_tensors, parameter_count, single
from openpangu_sft.checkpoint.weights import Part, Resharder, Weights
from openpangu_sft.model.tensors import tensors_of, to_array, to_tensor, weights_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Model
from refusals import refusal_of

FILE = "iter_0000001/mp_rank_00/model_optim_rng.pt"


def mixed(name: str) -> torch.dtype:
    """Norms in fp32, biases in fp16, the rest in bf16: no fused tensor of mcore mixes them."""
    if "norm" in name:
        return torch.float32
    return torch.float16 if name.endswith("bias") else torch.bfloat16


DTYPES_OF: dict[str, Callable[[str], torch.dtype]] = {
    "fp32": lambda name: torch.float32,
    "bf16": lambda name: torch.bfloat16,
    "fp16": lambda name: torch.float16,
    "mixed": mixed,
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtypes", list(DTYPES_OF))
def test_round_trip_is_bit_exact(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, dtypes: str, shards: int
) -> None:
    tensors = random_checkpoint(make_recipe().model, DTYPES_OF[dtypes])
    write_hf(tmp_path / "base", tiny_hf, tensors, shards)
    recipe = make_recipe(f"paths.hf={tmp_path / 'base'}")
    manifest = run_convert(recipe)
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), tensors)
    assert manifest.counts["dtype"] == {
        "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "mixed": "bfloat16+float16+float32"
    }[dtypes]  # fmt: skip


def test_random_bits_include_special_values() -> None:
    bits = random_bits((1 << 17,), torch.bfloat16, 0)
    assert bits.isnan().any()
    assert bits.isinf().any()
    assert (bits == 0).any()
    assert len(bits[bits.isnan()].view(torch.int16).unique()) > 20


def to_mcore(tensors: Tensors, model: Model, layout: Optional[Layout] = None, tp: int = 0, pp: int = 0) -> Tensors:
    """The mcore tensors of one rank, as the writer saves them."""
    made = Resharder(weights_of(tensors), model).mcore(layout or single(model), tp, pp)
    return {
        name: torch.cat([to_tensor(chunk).reshape(-1) for chunk in tensor.chunks()]).reshape(tensor.shape)
        for name, tensor in made.items()
    }


def rank_parts(tensors: Tensors, model: Model, layout: Layout, rank: tuple[int, int]) -> list[Part]:
    """The tensors of one rank, split into Hugging Face tensors as the reader does it."""
    made = to_mcore(tensors, model, layout, *rank)
    table = mcore_tensors(model, layout, *rank)
    return [part for entry in table for part in parts_of(entry.blocks, to_array(made[entry.name]), Path("x"))]


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(list(DTYPES_OF)))
def test_round_trip_of_any_size_in_any_layout(data: st.DataObject, dtypes: str) -> None:
    model = data.draw(models())
    layout = data.draw(layouts(model))
    tensors = random_checkpoint(model, DTYPES_OF[dtypes])
    parts = [part for rank in layout.ranks() for part in rank_parts(tensors, model, layout, rank)]
    assert_same_bits(tensors_of(Weights(parts), model), tensors)


@settings(deadline=None, max_examples=30)
@given(models())
def test_fused_tensors_equal_a_reference_implementation(model: Model) -> None:
    tensors = random_checkpoint(model, DTYPES_OF["fp32"])
    converted = {name: tensor.view(torch.int32) for name, tensor in to_mcore(tensors, model).items()}
    tensors = {name: tensor.view(torch.int32) for name, tensor in tensors.items()}
    groups, head = model.num_query_groups, model.kv_channels
    for layer in range(model.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ["weight", "bias"] if model.add_qkv_bias else ["weight"]:
            tail = [model.hidden_size] if kind == "weight" else []
            q, k, v = (tensors[f"{there}self_attn.{name}_proj.{kind}"] for name in "qkv")
            wanted = torch.cat([part.reshape(groups, -1, head, *tail) for part in (q, k, v)], dim=1)
            found = converted[f"{here}self_attention.linear_qkv.{kind}"]
            assert torch.equal(found, wanted.reshape(-1, *tail))
            # the reverse: megatron/core/transformer/attention.py splits the output of the fused layer so
            split = found.reshape(groups, -1, *tail).split(
                [model.num_attention_heads // groups * head, head, head], dim=1
            )
            for part, original in zip(split, (q, k, v)):
                assert torch.equal(part.reshape(-1, *tail), original)
        gate, up = converted[f"{here}mlp.linear_fc1.weight"].chunk(2)
        assert torch.equal(gate, tensors[f"{there}mlp.gate_proj.weight"])
        assert torch.equal(up, tensors[f"{there}mlp.up_proj.weight"])
        for mcore, hf in [
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
            ("input_layernorm.weight", "input_layernorm.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        ]:
            assert torch.equal(converted[here + mcore], tensors[there + hf])
    assert torch.equal(converted["embedding.word_embeddings.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(converted["decoder.final_layernorm.weight"], tensors["model.norm.weight"])


def test_the_directory_has_the_files_that_megatron_loads(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    root = recipe.path("mcore")
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"latest_checkpointed_iteration.txt", FILE, "manifest.json"}
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"1"
    assert latest_iteration(root) == 1
    content = torch.load(root / FILE)  # without options, as in megatron/training/checkpointing.py
    assert set(content) == {"args", "checkpoint_version", "iteration", "model", "num_floating_point_operations_so_far"}
    assert content["checkpoint_version"] == 3.0
    assert content["iteration"] == 1
    assert content["num_floating_point_operations_so_far"] == 0
    layout = single(recipe.model)
    named = {tensor.name for tensor in mcore_tensors(recipe.model, layout, 0, 0)}
    assert {name for name, value in content["model"].items() if value is not None} == named
    assert {name for name, value in content["model"].items() if value is None} == set(extra_state_names(layout, 0))


def test_args_contain_the_fields_that_megatron_checks(make_recipe: MakeRecipe) -> None:
    """The fields that check_checkpoint_args and load_checkpoint of Megatron-LM core_r0.6.0 read."""
    recipe = make_recipe()
    run_convert(recipe)
    args = torch.load(recipe.path("mcore") / FILE)["args"]
    assert type(args) is Namespace
    compared = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "add_position_embedding": True,
        "max_position_embeddings": 1024,
        "padded_vocab_size": 1536,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    assert {name: getattr(args, name) for name in compared} == compared
    described = {
        "ffn_hidden_size": 48,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "position_embedding_type": "rope",
        "rotary_base": 4000000.0,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "add_dense_bias": True,
        "untie_embeddings_and_output_weights": False,
        "params_dtype": torch.float32,
    }
    assert {name: getattr(args, name) for name in described} == described


def test_saved_tensors_own_their_storage(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """torch.save writes the whole storage of a view: without views, the file is as large as its tensors."""
    for name, tied in (("tied", True), ("untied", False)):
        recipe = make_recipe(f"model.tie_word_embeddings={str(tied).lower()}", f"paths.hf={tmp_path / name}")
        write_hf(tmp_path / name, tiny_hf, random_checkpoint(recipe.model, DTYPES_OF["fp32"]))
        set_config(tmp_path / name, tie_word_embeddings=tied)
        recipe = recipe.model_copy(update={"paths": recipe.paths.model_copy(update={"mcore": f"mcore_{name}"})})
        run_convert(recipe)
        file = recipe.path("mcore") / FILE
        size = 4 * parameter_count(recipe.model)
        assert size <= file.stat().st_size < size + 30_000
        tensors = [tensor for tensor in torch.load(file)["model"].values() if tensor is not None]
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_the_manifest_has_counts_and_equal_inputs_give_equal_bytes(make_recipe: MakeRecipe) -> None:
    first, second = make_recipe(), make_recipe("paths.mcore=again")
    manifest = run_convert(first)
    run_convert(second)
    assert manifest.counts == {
        "parameters": parameter_count(first.model), "ranks": 1, "layout": "TP 1, PP 1", "dtype": "float32"
    }  # fmt: skip
    for file in (FILE, "latest_checkpointed_iteration.txt", "manifest.json"):
        assert (first.path("mcore") / file).read_bytes() == (second.path("mcore") / file).read_bytes()
    assert read_manifest(first.path("mcore"), "mcore", "run make convert") == manifest


def test_the_next_stage_detects_changed_settings(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    made_with = run_convert(recipe).settings
    require_settings(recipe.path("mcore"), made_with, mcore_settings(recipe), "run make convert again")
    other = make_recipe("model.norm_epsilon=1e-6")
    wanted = mcore_settings(other)
    assert refusal_of(require_settings, recipe.path("mcore"), made_with, wanted, "run make convert again") == (
        f"{recipe.path('mcore')}: made with model.norm_epsilon = 1e-05, the recipe says 1e-06 -> run make convert again"
    )


# Errors: one line with what is wrong, where, and the fix; nothing is written.


def refusal(recipe: Recipe) -> str:
    """The error message of a conversion, which leaves no result."""
    message = refusal_of(run_convert, recipe)
    assert not recipe.path("mcore").exists()
    return message


@pytest.fixture
def copy(tmp_path: Path, tiny_hf: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny_hf, directory)
    return directory


Q = "model.layers.1.self_attn.q_proj.weight"
O_BIAS = "model.layers.0.self_attn.o_proj.bias"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (Q, None, f"tensor {Q} is missing"),
        (O_BIAS, None, f"tensor {O_BIAS} is missing"),
        (Q, torch.zeros(32, 31), f"tensor {Q} has shape (32, 31), expected (32, 32)"),
        (Q, torch.zeros(32), f"tensor {Q} has shape (32,), expected (32, 32)"),
        (Q, torch.zeros(32, 32, dtype=torch.int8), f"tensor {Q} is int8, expected one of float32, bfloat16, float16"),
        (
            Q,
            torch.zeros(32, 32, dtype=torch.bfloat16),
            "decoder.layers.1.self_attention.linear_qkv.weight would join tensors of different dtypes: "
            f"{Q} bfloat16, model.layers.1.self_attn.k_proj.weight float32",
        ),
        ("model.layers.0.mlp.gate_proj.bias", torch.zeros(48), "unexpected tensor model.layers.0.mlp.gate_proj.bias"),
        ("model.layers.2.input_layernorm.weight", torch.zeros(32), "unexpected tensor model.layers.2.input_layernorm"),
        ("lm_head.weight", torch.zeros(1536, 32), "tie_word_embeddings is true, but lm_head.weight differs"),
        ("lm_head.weight", torch.zeros(1536, 32).half(), "tie_word_embeddings is true, but lm_head.weight differs"),
        ("lm_head.weight", torch.tensor(0.0), "tie_word_embeddings is true, but lm_head.weight differs"),
        ("model.embed_tokens.weight", None, "tensor model.embed_tokens.weight is missing"),
    ],
    ids=[
        "missing weight",
        "missing bias",
        "wrong shape",
        "one dimension",
        "int8",
        "mixed dtypes",
        "unexpected bias",
        "unexpected layer",
        "untied lm_head",
        "untied fp16 lm_head",
        "scalar lm_head",
        "missing embedding",
    ],
)
def test_wrong_tensors_are_refused(
    copy: Path, make_recipe: MakeRecipe, name: str, value: Optional[torch.Tensor], complaint: str
) -> None:
    tensors = load_file(str(copy / WEIGHTS))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, str(copy / WEIGHTS))
    message = refusal(make_recipe(f"paths.hf={copy}"))
    assert complaint in message
    assert str(copy) in message or "dtypes" in message


def test_tied_embeddings_with_an_equal_lm_head_are_accepted(copy: Path, make_recipe: MakeRecipe) -> None:
    tensors = load_file(str(copy / WEIGHTS))
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, str(copy / WEIGHTS))
    recipe = make_recipe(f"paths.hf={copy}")
    run_convert(recipe)
    assert "output_layer.weight" not in torch.load(recipe.path("mcore") / FILE)["model"]


def test_untied_embeddings_without_lm_head_are_refused(copy: Path, make_recipe: MakeRecipe) -> None:
    set_config(copy, tie_word_embeddings=False)
    message = refusal(make_recipe(f"paths.hf={copy}", "model.tie_word_embeddings=false"))
    assert "tensor lm_head.weight is missing, but tie_word_embeddings is false" in message


def test_a_config_without_tie_word_embeddings_is_refused(copy: Path, make_recipe: MakeRecipe) -> None:
    set_config(copy, tie_word_embeddings=...)
    message = refusal(make_recipe(f"paths.hf={copy}"))
    assert "model.tie_word_embeddings is True in the recipe, not given here: the class's default is false" in message
    assert message.endswith("-> take the published config.json")


def test_a_failed_conversion_keeps_the_earlier_result(copy: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(f"paths.hf={copy}")
    run_convert(recipe)
    before = (recipe.path("mcore") / FILE).read_bytes()
    (copy / WEIGHTS).write_bytes(b"")
    refusal_of(run_convert, recipe)
    assert (recipe.path("mcore") / FILE).read_bytes() == before
    read_manifest(recipe.path("mcore"), "mcore", "")


def test_reading_preserves_dtypes(tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    assert_same_bits(read_hf(tiny_hf, make_recipe().model), load_file(str(tiny_hf / WEIGHTS)))
