"""LoRA in the transformers engine: against stock transformers with peft's adapters, and from the run to its export."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapters import base_model, peft_model
from checkpoint_files import Tensors, assert_same_bits
from conftest import example_texts
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.lora import FIRST_OF
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.dataset.index_file import PREFIX, read_rows
from openpangu_sft.dataset.segments import segment_bounds
from openpangu_sft.demo.base_model import make_base_model
from openpangu_sft.model.batches import training_order
from openpangu_sft.model.chat import Chat
from openpangu_sft.model.llama import build_model
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.portable.lora import build_lora
from openpangu_sft.training.portable.schedule import learning_rate
from openpangu_sft.training.run.metrics import read_metrics
from refusals import refusal_of
from training.conftest import Options
from training.test_stage import finish, losses, recipe_of, start, train

LORA = ["train.lora.rank=4", "train.lora.alpha=12"]
CPU = torch.device("cpu")


@pytest.fixture
def lora(options: Options, tmp_path: Path) -> Options:
    """Overrides for a LoRA run in the test's own directory; the checkpoint that it begins with is converted."""

    def make(*overrides: str) -> list[str]:
        wanted = [*options(*LORA, f"paths.mcore={tmp_path / 'mcore'}"), *overrides]
        run_convert(recipe_of(wanted))
        return wanted

    return make


def stored(root: Path, recipe: Recipe) -> Tensors:
    """Weights and adapters of a checkpoint, as they are in its files."""
    return tensors_of(open_mcore(root, recipe.model).weights.stored, recipe.model)


def with_peft(recipe: Recipe, tensors: Tensors) -> LlamaForCausalLM:
    """Stock transformers' model with peft's adapters, A shared as in Megatron's fused matrices."""
    base = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    model = build_model(recipe.path("hf"), base, "eager", CPU)
    adapter = recipe.train.lora.adapter
    assert adapter
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=[*adapter.targets], lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    parts = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if ".lora_" in name}
    for name, module in model.named_modules():
        above, _, projection = name.rpartition(".")
        if projection in adapter.targets:
            module.lora_A["default"].weight = parts[f"{above}.{FIRST_OF[projection]}.lora_A.weight"]
            module.lora_B["default"].weight = parts[f"{name}.lora_B.weight"]
    return model


def losses_with_peft(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a run, computed segment by segment, with torch's AdamW."""
    model, train = with_peft(recipe, stored(recipe.path("mcore"), recipe)), recipe.train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (train.adam_beta1, train.adam_beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, eps=train.adam_eps, weight_decay=train.weight_decay)
    fields = ("input_ids", "labels", "attention_mask")
    ids, labels, numbers = (read_rows(recipe.path("dataset"), PREFIX, field, 128).astype(np.int64) for field in fields)
    order = training_order(len(ids), train.iterations * train.global_batch_size, train.seed)
    found, norms = [], []
    for iteration in range(1, train.iterations + 1):
        packs = order[(iteration - 1) * train.global_batch_size : iteration * train.global_batch_size]
        optimizer.zero_grad()
        total, targets = torch.zeros(()), 0
        for pack in packs:
            for begin, end in segment_bounds(numbers[pack]):
                logits = model(torch.from_numpy(ids[None, pack, begin:end])).logits[0, :-1]
                wanted = torch.from_numpy(labels[pack, begin + 1 : end])
                total = total + functional.cross_entropy(logits, wanted, reduction="sum")
                targets += int((wanted != -100).sum())
        (total / targets).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, train.clip_grad).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, iteration)
        optimizer.step()
        found.append((total / targets).item())
    return found, norms


@pytest.mark.parametrize("targets", ["[all-linear]", "[o_proj,up_proj,gate_proj]"])
def test_losses_are_those_of_stock_transformers_with_peft(lora: Options, targets: str) -> None:
    overrides = lora(f"train.lora.targets={targets}")
    expected, norms = losses_with_peft(recipe_of(overrides))
    rows = read_metrics(train(overrides))
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
    assert expected[-1] < expected[0] - 0.01  # adapters have an effect


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_new_adapters_change_no_loss(
    lora: Options, options: Options, tmp_path: Path, precision: str, tied: bool
) -> None:
    same = [f"train.precision={precision}", "train.lr_warmup_iterations=0", "train.iterations=2"]
    if not tied:
        same += ["model.tie_word_embeddings=false", f"paths.hf={tmp_path / 'hf'}", f"paths.mcore={tmp_path / 'mcore'}"]
        make_base_model(recipe_of(options(*same)), example_texts())
        run_convert(recipe_of(options(*same)))
    full = losses(train([*options(*same), f"paths.run={tmp_path / 'full'}"]))
    adapted = losses(train(lora(*same)))
    assert adapted[0] == full[0]
    assert adapted[1] != full[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_one_without_a_break(lora: Options, tmp_path: Path, precision: str) -> None:
    overrides = lora(f"train.precision={precision}")  # in bf16 from fp32 weights, which its checkpoints round
    undisturbed, second = train(overrides), tmp_path / "second"
    shutil.copytree(undisturbed, second)
    shutil.rmtree(second / "iter_0000006")
    (second / "latest_checkpointed_iteration.txt").write_text("3")
    assert losses(train([*overrides, f"paths.run={second}"])) == losses(undisturbed)
    assert_same_bits(*(stored(run, recipe_of(overrides)) for run in (second, undisturbed)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_the_untouched_weights_and_the_state_of_adapters_alone(
    lora: Options, precision: str
) -> None:
    overrides = lora(f"train.precision={precision}")
    recipe, run = recipe_of(overrides), train(overrides)
    begun, found = stored(recipe.path("mcore"), recipe), stored(run, recipe)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    adapters = {name for name in begun if ".lora_" in name}
    assert {name for name in begun if not torch.equal(found[name], begun[name].to(dtype))} == adapters
    state = torch.load(run / "iter_0000006/mp_rank_00/transformers_engine.pt")
    kept = sorted(values["exp_avg"].shape for values in state["optimizer"]["state"].values())
    assert kept == sorted(begun[name].shape for name in adapters)
    if precision == "fp32":
        assert set(state) == {"optimizer"}
    else:
        assert {name: tensor.bfloat16().tolist() for name, tensor in state["weights"].items()} == {
            name: found[name].tolist() for name in adapters
        }
        assert all(tensor.dtype == torch.float32 for tensor in state["weights"].values())


@pytest.mark.parametrize("extra", [[], ["train.precision=bf16"]])
def test_two_processes_give_the_losses_of_one(lora: Options, tmp_path: Path, extra: list[str]) -> None:
    overrides = lora("train.global_batch_size=4", *extra)
    alone = losses(train([*overrides, f"paths.run={tmp_path / 'alone'}"]))
    finish(start([*overrides, "parallel.devices_per_node=2"]))
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def test_recomputing_activations_changes_no_loss(lora: Options, tmp_path: Path) -> None:
    overrides = lora()
    recompute = ["train.recompute.granularity=full", "train.recompute.num_layers=1", f"paths.run={tmp_path / 'again'}"]
    assert losses(train([*overrides, *recompute])) == losses(train(overrides))


def test_export_and_chat_have_the_logits_of_the_trained_model(lora: Options, tmp_path: Path) -> None:
    overrides = [*lora(), f"paths.export={tmp_path / 'export'}"]
    recipe, run = recipe_of(overrides), train(overrides)
    run_export(recipe)
    run_export(recipe_of([*overrides, f"paths.export={tmp_path / 'adapter'}"]), form="peft")
    ids = (torch.arange(20) * 31 % 1536)[None]
    with torch.no_grad():
        trained = build_lora(recipe, stored(run, recipe), CPU)
        hidden = trained.model(ids, segments=[[(0, 20)]], use_cache=False).last_hidden_state
        expected = trained.lm_head(hidden)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()(ids).logits
        adapted = peft_model(base_model(recipe), tmp_path / "adapter")(ids).logits
        talking = Chat(recipe, run).model(ids).logits
        first = Chat(recipe, recipe.path("mcore")).model(ids).logits
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(talking, exported, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapted, exported, rtol=0, atol=1e-6)
    assert not torch.allclose(first, expected, atol=1e-3)


def test_a_full_run_and_one_with_adapters_do_not_continue_each_other(lora: Options, options: Options) -> None:
    assert "train.lora = " in refusal_of(train, [*options(*LORA)])  # onto a checkpoint without adapters
    overrides = lora()
    train(overrides)
    said = refusal_of(train, options())
    assert "train.lora = {'rank': 4, 'alpha': 12, 'targets': ['q_proj', " in said
    assert "choose another paths.run" in said
