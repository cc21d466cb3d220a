"""LoRA adapters as files: those of stock peft are opened, merged, trained on; what cannot be is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import ALL, FILE, PREFIX, merged_by_hand, save_adapter
from checkpoint_files import assert_same_bits, read_hf, read_mcore, write_hf
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.hf_export import PEFT
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.source import hf_digests, open_checkpoint
from openpangu_sft.recipe.lora import Adapter
from refusals import refusal_of

LORA = ("train.lora.rank=4", "train.lora.alpha=6")
CONFIG = "adapter_config.json"
Q_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """Stock peft's, of all projections, with one A for q, k, v and one for gate, up."""
    return save_adapter(make_recipe(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("targets", "shared"), [(ALL, True), (ALL, False), (["q_proj", "v_proj"], False), (["up_proj"], False)]
)
def test_any_adapter_of_stock_peft_is_merged(
    make_recipe: MakeRecipe, tmp_path: Path, targets: list[str], shared: bool
) -> None:
    recipe = make_recipe()
    path = save_adapter(recipe, tmp_path / "adapter", targets, shared)
    counts = run_export(recipe, path).counts
    assert counts["lora"] == {"rank": 4, "alpha": 6.0, "targets": targets}
    wanted = merged_by_hand(read_hf(recipe.path("hf"), recipe.model), path)
    assert_same_bits(load_file(str(recipe.path("export") / WEIGHTS)), wanted)


def test_training_begins_from_it(make_recipe: MakeRecipe, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(*LORA)
    manifest = run_convert(recipe, adapter)
    assert "names its base" in capsys.readouterr().err
    sums = hf_digests(recipe.path("hf"))
    assert {name: manifest.inputs[name] for name in sums} == sums
    assert "adapter" in manifest.inputs
    stored = open_mcore(recipe.path("mcore"), recipe.model).weights.stored
    assert stored.adapter == Adapter(4, 6.0, tuple(ALL))


def test_full_fine_tuning_begins_from_it_merged(make_recipe: MakeRecipe, adapter: Path) -> None:
    recipe = make_recipe()
    run_convert(recipe, adapter)
    assert not open_mcore(recipe.path("mcore"), recipe.model).weights.stored.adapter
    wanted = merged_by_hand(read_hf(recipe.path("hf"), recipe.model), adapter)
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), wanted)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["v_proj"], ["gate_proj"]])
def test_megatron_shares_a(make_recipe: MakeRecipe, tmp_path: Path, targets: list[str]) -> None:
    recipe = make_recipe(*LORA)
    path = save_adapter(recipe, tmp_path / "own", targets, shared=False)
    message = refusal_of(run_convert, recipe, path)
    assert message.startswith(f"{path}: q, k, v, or gate, up, are not adapted together with one A, which Megatron")
    assert "make export FROM" in message
    assert refusal_of(run_export, recipe, path, form=PEFT) == message
    assert not recipe.path("mcore").exists()


def test_another_shape_than_the_recipes(make_recipe: MakeRecipe, adapter: Path) -> None:
    message = refusal_of(run_convert, make_recipe("train.lora.rank=4", "train.lora.alpha=8"), adapter)
    assert "has LoRA adapters of rank 4, alpha 6, on q_proj, k_proj" in message
    assert "the recipe says rank 4, alpha 8, on q_proj" in message


def test_it_has_no_iterations(make_recipe: MakeRecipe, adapter: Path) -> None:
    assert "has no iterations" in refusal_of(run_export, make_recipe(), adapter, 3)


# Refusals.


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is {'q_proj': 2}"),
        ({"layers_to_transform": [0]}, "layers_to_transform is [0]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"of_a_later_peft": {"on": True}}, "of_a_later_peft is {'on': True}"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r is 0, lora_alpha 6"),
        ({"r": "3"}, "r is '3', lora_alpha 6"),
        ({"lora_alpha": -1}, "r is 4, lora_alpha -1"),
        ({"lora_alpha": float("nan")}, "r is 4, lora_alpha nan"),
        ({"r": 5}, "lora_A.weight has shape (4, 32), expected (5, 32)"),
    ],
)
def test_configurations(make_recipe: MakeRecipe, adapter: Path, change: dict[str, Any], complaint: str) -> None:
    content = {**json.loads((adapter / CONFIG).read_text("utf-8")), **change}
    (adapter / CONFIG).write_text(json.dumps(content), "utf-8")
    message = refusal_of(open_checkpoint, make_recipe(), adapter)
    assert message.startswith(str(adapter))
    assert complaint in message


def test_the_configuration_of_a_later_peft(make_recipe: MakeRecipe, adapter: Path) -> None:
    """Keys and values as peft 0.18 writes them where nothing but rank and alpha is asked for."""
    later = {
        "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "init_lora_weights": True, "layer_replication": None,
        "lora_bias": False, "peft_version": "0.18.0", "qalora_group_size": 16, "target_parameters": None,
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    content = {**json.loads((adapter / CONFIG).read_text("utf-8")), **later}
    (adapter / CONFIG).write_text(json.dumps(content), "utf-8")
    assert open_checkpoint(make_recipe(), adapter).weights.stored.adapter == Adapter(4, 6.0, tuple(ALL))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({Q_A: None}, "tensor model.layers.0.self_attn.q_proj.lora_A.weight is missing"),
        ({Q_A: torch.zeros(4, 40)}, "q_proj.lora_A.weight has shape (4, 40), expected (4, 32)"),
        ({Q_A: torch.zeros(4, 32, dtype=torch.int8)}, "q_proj.lora_A.weight is int8"),
        ({f"{PREFIX}lm_head.lora_A.weight": torch.zeros(4, 32)}, "unexpected tensor lm_head.lora_A.weight"),
        ({f"{PREFIX}model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "unexpected tensor model.layers.0"),
        ({"x": torch.zeros(1)}, "unexpected tensor x"),
    ],
)
def test_tensors(make_recipe: MakeRecipe, adapter: Path, change: dict[str, Any], complaint: str) -> None:
    tensors = {**load_file(str(adapter / FILE)), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, str(adapter / FILE))
    message = refusal_of(open_checkpoint, make_recipe(), adapter)
    assert message.startswith(f"{adapter / FILE}: ")
    assert complaint in message


def test_no_tensors(make_recipe: MakeRecipe, adapter: Path) -> None:
    save_file({}, str(adapter / FILE))
    assert "holds no LoRA adapters" in refusal_of(open_checkpoint, make_recipe(), adapter)


def test_an_adapter_of_fewer_layers(make_recipe: MakeRecipe, adapter: Path) -> None:
    tensors = load_file(str(adapter / FILE))
    save_file({name: value for name, value in tensors.items() if ".layers.1." not in name}, str(adapter / FILE))
    message = refusal_of(open_checkpoint, make_recipe(), adapter)
    assert "tensor model.layers.1.self_attn.o_proj.lora_A.weight is missing" in message
    assert message.endswith("is it an adapter of the model in paths.hf?")


def test_a_pickle_is_not_opened(make_recipe: MakeRecipe, adapter: Path) -> None:
    (adapter / FILE).rename(adapter / "adapter_model.bin")
    message = refusal_of(open_checkpoint, make_recipe(), adapter)
    assert "only adapter_model.bin, a pickle" in message
    assert "safe_serialization=True" in message


def test_no_file_at_all(make_recipe: MakeRecipe, adapter: Path) -> None:
    (adapter / FILE).unlink()
    assert f"there is no {FILE}" in refusal_of(open_checkpoint, make_recipe(), adapter)


def test_its_base_is_needed_as_a_model(make_recipe: MakeRecipe, adapter: Path) -> None:
    recipe = make_recipe(f"paths.hf={adapter}")
    message = refusal_of(run_export, recipe, adapter)
    assert "is a LoRA adapter, not a model" in message
    assert message.endswith("give its base as paths.hf, and the adapter as FROM or MODEL")


def test_one_of_this_project_knows_its_base_by_its_sums(
    make_recipe: MakeRecipe, tiny_hf: Path, adapter: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(*LORA)
    run_convert(recipe, adapter)
    run_export(recipe, recipe.path("mcore"), form=PEFT)
    tensors = load_file(str(tiny_hf / WEIGHTS))
    tensors["model.norm.weight"][0] += 1
    write_hf(tmp_path / "other", tiny_hf, tensors)
    other = make_recipe(f"paths.hf={tmp_path / 'other'}")
    message = refusal_of(open_checkpoint, other, recipe.path("export"))
    assert message.startswith(f"{recipe.path('export')}: is an adapter of other weights than those of paths.hf")
    open_checkpoint(recipe, recipe.path("export"))
    open_checkpoint(other, adapter)  # peft records no sums
    shutil.copyfile(adapter / FILE, recipe.path("export") / FILE)
    manifest = json.loads((recipe.path("export") / MANIFEST).read_text("utf-8"))
    manifest["files"][FILE]["bytes"] += 1
    (recipe.path("export") / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    assert "bytes, expected" in refusal_of(open_checkpoint, recipe, recipe.path("export"))


def test_an_edited_configuration_of_the_same_size_is_noticed(make_recipe: MakeRecipe, adapter: Path) -> None:
    recipe = make_recipe(*LORA)
    run_convert(recipe, adapter)
    run_export(recipe, recipe.path("mcore"), form=PEFT)
    file = recipe.path("export") / CONFIG
    text = file.read_text("utf-8")
    file.write_text(text.replace('"lora_alpha": 6', '"lora_alpha": 7'), "utf-8")
    assert f"{file}: was changed after it was made" in refusal_of(open_checkpoint, recipe, recipe.path("export"))
    file.write_text(text, "utf-8")
    open_checkpoint(recipe, recipe.path("export"))
