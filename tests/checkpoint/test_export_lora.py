"""Export of a LoRA checkpoint: merged, or as an adapter that stock peft loads; and back, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import ALL, FILE, base_model, merged_by_hand, peft_model, save_adapter
from checkpoint.test_export import logits
from checkpoint.test_model_card import parts_of, table_of
from checkpoint_files import assert_same_bits, random_bits, read_hf, write_hf
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.hf_export import LLAMA, PEFT
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.recipe.model_config import CONFIG
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of

LORA = ("train.engine=mindspeed", "parallel.devices_per_node=4", "train.global_batch_size=4", "train.lora.rank=4")
LORA += ("train.lora.alpha=6",)
GROUPS = (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layout(tensor: int, pipeline: int) -> list[str]:
    return [*LORA, f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]


def adapter_of(recipe: Recipe, form: str = PEFT, dtype: str = "") -> dict[str, torch.Tensor]:
    run_export(recipe, recipe.path("mcore"), form=form, dtype=dtype or None)
    return load_file(str(recipe.path("export") / (FILE if form == PEFT else WEIGHTS)))


@pytest.fixture
def bf16_base(make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path) -> str:
    """The override that makes the base a bf16 one."""
    tensors = {name: value.bfloat16() for name, value in load_file(str(tiny_hf / WEIGHTS)).items()}
    write_hf(tmp_path / "bf16", tiny_hf, tensors)
    return f"paths.hf={tmp_path / 'bf16'}"


def test_what_a_cast_of_the_merged_weights_loses_is_said(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(str(tiny_hf / WEIGHTS))
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 7e4
    write_hf(tmp_path / "large", tiny_hf, tensors)
    recipe = make_recipe(*layout(1, 1), f"paths.hf={tmp_path / 'large'}")
    run_convert(recipe)
    adapter_of(recipe, LLAMA, "fp16")
    assert "became infinite in model.layers.0.mlp.down_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("made_here", [True, False], ids=["ours", "upstream's"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_the_merge_is_exact(
    make_recipe: MakeRecipe, tmp_path: Path, tensor: int, pipeline: int, made_here: bool
) -> None:
    recipe = make_recipe(*layout(tensor, pipeline))
    path = save_adapter(recipe, tmp_path / "adapter")
    run_convert(recipe, path)
    if not made_here:
        as_upstream_saves(recipe.path("mcore"))
    assert_same_bits(adapter_of(recipe, LLAMA), merged_by_hand(read_hf(recipe.path("hf"), recipe.model), path))


def as_upstream_saves(root: Path) -> None:
    """Without a manifest, and with the entries that Megatron's layers add."""
    (root / MANIFEST).unlink()
    for file in root.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(file)
        linears = [name.removesuffix("weight") for name in content["model"] if ".base_layer.weight" in name]
        assert linears
        content["model"].update(dict.fromkeys((f"{name}_extra_state" for name in linears), None))
        torch.save(content, file)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_merged_bf16_checkpoint_is_rounded_once(
    make_recipe: MakeRecipe, bf16_base: str, tmp_path: Path, dtype: str
) -> None:
    recipe = make_recipe(*layout(2, 2), bf16_base)
    path = save_adapter(recipe, tmp_path / "adapter", dtype=torch.bfloat16)
    run_convert(recipe, path)
    wanted = merged_by_hand(read_hf(recipe.path("hf"), recipe.model), path, DTYPES[dtype])
    assert_same_bits(adapter_of(recipe, LLAMA, dtype), wanted)
    if dtype == "bf16":
        assert_same_bits(adapter_of(recipe, LLAMA), wanted)


@pytest.mark.parametrize("original", [True, False], ids=["on the original base", "on the exported base"])
def test_stock_peft_gives_the_logits_of_the_merged_export(
    make_recipe: MakeRecipe, tmp_path: Path, original: bool
) -> None:
    recipe = make_recipe(*layout(2, 1))
    run_convert(recipe, save_adapter(recipe, tmp_path / "adapter"))
    adapter_of(recipe)
    merged = make_recipe(*layout(2, 1), "paths.export=merged")
    adapter_of(merged, LLAMA)
    base = base_model(recipe)
    untrained = logits(base)
    if not original:
        exported = make_recipe("paths.export=base")
        run_export(exported, recipe.path("hf"))
        base = AutoModelForCausalLM.from_pretrained(str(exported.path("export")), local_files_only=True)
    found = logits(peft_model(base, recipe.path("export")))
    wanted = logits(AutoModelForCausalLM.from_pretrained(str(merged.path("export")), local_files_only=True))
    assert (found - wanted).abs().max() < 1e-6
    assert (found - untrained).abs().max() > 0.1  # of logits below 1


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sets(st.sampled_from(range(4)), min_size=1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 16),
)
def test_from_an_adapter_and_back_every_bit_is_the_same(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    tensor: int,
    pipeline: int,
    groups: set[int],
    dtype: torch.dtype,
    rank: int,
) -> None:
    """Any bits: NaN payloads, infinities, -0.0 too."""
    targets = [name for group in sorted(groups) for name in GROUPS[group]]
    recipe = make_recipe(*layout(tensor, pipeline), f"train.lora.rank={rank}", f"train.lora.targets={targets}")
    path = save_adapter(recipe, tmp_path / "adapter", targets, rank=rank)
    seeds = {name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
             if ".lora_A." in name else name for name in load_file(str(path / FILE))}  # fmt: skip
    tensors = {
        name: random_bits(tuple(value.shape), dtype, sum(map(ord, seeds[name])))
        for name, value in load_file(str(path / FILE)).items()
    }
    save_file(tensors, str(path / FILE))
    run_convert(recipe, path)
    assert_same_bits(adapter_of(recipe), tensors)
    written = (recipe.path("export") / FILE).read_bytes()
    again = make_recipe(*layout(1, 1), f"train.lora.rank={rank}", f"train.lora.targets={targets}", "paths.export=again")
    run_convert(again, recipe.path("export"))
    adapter_of(again)
    assert (again.path("export") / FILE).read_bytes() == written


def test_an_adapter_of_another_dtype(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(*layout(2, 2))
    path = save_adapter(recipe, tmp_path / "adapter")
    run_convert(recipe, path)
    wanted = {name: value.bfloat16() for name, value in load_file(str(path / FILE)).items()}
    assert_same_bits(adapter_of(recipe, dtype="bf16"), wanted)


def test_what_is_written_beside_the_weights(make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_hf, tmp_path / "base")
    (tmp_path / "base/LICENSE").write_text("of the base", "utf-8")
    recipe = make_recipe(*layout(1, 2), "train.lora.targets=[q_proj, k_proj, v_proj]", f"paths.hf={tmp_path / 'base'}")
    run_convert(recipe)
    counts = run_export(recipe, recipe.path("mcore"), form=PEFT).counts
    assert counts == {
        "parameters": 2 * (3 * 4 * 32 + 4 * (32 + 16 + 16)), "dtype": "float32", "form": "peft",
        "lora": {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "k_proj", "v_proj"]},
    }  # fmt: skip
    target = recipe.path("export")
    assert {path.name for path in target.iterdir()} == {"adapter_config.json", FILE, MANIFEST, "README.md", "LICENSE"}
    manifest = json.loads((target / MANIFEST).read_text("utf-8"))
    assert manifest["inputs"]["hf.weights"] == hf_digests(recipe.path("hf"))["weights"]
    assert json.loads((target / "adapter_config.json").read_text("utf-8")) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(recipe.path("hf")),
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    front, text = parts_of((target / "README.md").read_text("utf-8"))
    assert (front["library_name"], front["tags"]) == ("peft", ["openpangu", "lora"])
    assert "1,280 parameters in float32 of LoRA adapters" in text
    assert 'PeftModel.from_pretrained(base, "export")' in text.replace("'", '"')
    assert "The rank is 4" in text
    assert table_of(text)["LoRA adapters"] == r"rank 4, alpha 6, on q\_proj, k\_proj, v\_proj"


def test_the_card_of_a_merged_export(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*layout(1, 1))
    run_convert(recipe)
    adapter_of(recipe, LLAMA)
    front, text = parts_of((recipe.path("export") / "README.md").read_text("utf-8"))
    assert (front["library_name"], front["tags"]) == ("transformers", ["openpangu", "lora"])
    assert table_of(text)["LoRA adapters"].startswith("rank 4, alpha 6, on ")
    assert "PeftModel" not in text


def test_new_adapters_change_nothing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*layout(2, 2))
    run_convert(recipe)
    base = {name: value + 0 for name, value in read_hf(recipe.path("hf"), recipe.model).items()}  # -0.0 + 0 is 0
    assert_same_bits(adapter_of(recipe, LLAMA), base)
    adapter = adapter_of(recipe)
    assert all(value.any() == (".lora_A." in name) for name, value in adapter.items())
    assert len(adapter) == 2 * 2 * len(ALL)
    run_convert(recipe, recipe.path("export"))
    assert_same_bits(adapter_of(recipe), adapter)


def test_without_adapters(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    message = refusal_of(run_export, recipe, recipe.path("mcore"), form=PEFT)
    assert message == f"{recipe.path('mcore')}: has no LoRA adapters -> export it with FORM=llama"
    assert not recipe.path("export").exists()


def test_adapters_beside_other_weights_than_the_bases(make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path) -> None:
    """As of a LoRA run on top of a full fine-tuning: its adapters are of no use on the original base."""
    tensors = load_file(str(tiny_hf / WEIGHTS))
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] += 1
    write_hf(tmp_path / "tuned", tiny_hf, tensors)
    recipe = make_recipe(*layout(2, 1))
    run_convert(recipe, tmp_path / "tuned")
    message = refusal_of(run_export, recipe, recipe.path("mcore"), form=PEFT)
    what = "its adapters are of other weights than those of paths.hf: model.layers.1.mlp.down_proj.weight[5, 7] is"
    assert message.startswith(f"{recipe.path('mcore')}: {what}")
    assert not recipe.path("export").exists()
    config = tmp_path / "tuned" / CONFIG
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")  # the export of a run has another one than its base
    adapter_of(make_recipe(*layout(2, 1), f"paths.hf={tmp_path / 'tuned'}"))
