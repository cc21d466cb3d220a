"""make plan: formulas and what follows from them. Against real runs: test_transformers_memory.py and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import pytest

from conftest import ROOT
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.doctor.npu_smi import parse_info
from openpangu_sft.model.flops import flops_per_token, highest_rate, layer_parameters
from openpangu_sft.plan.estimate import (
    course_of,
    disk_of,
    memory_of,
    tokens_per_iteration,
    warnings,
)
from openpangu_sft.plan.memory import GIB, Memory, Part, Phase
from openpangu_sft.plan.mindspeed_memory import (
    HELD,
    communicators,
    layer_activations,
    mindspeed_memory,
    rank_parameters,
)
from openpangu_sft.plan.report import Report, as_json
from openpangu_sft.plan.transformers_memory import transformers_memory
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import checkpoint_bytes
from refusals import refusal_of

PORTABLE = ("train.engine=transformers", "parallel.context=1")
COUNTS = {"packs": 1000, "tokens": 1000 * 30000, "trained_tokens": 1000 * 10000}


def published(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/openpangu-1b.yaml", overrides)


def sizes(parts: tuple[Part, ...]) -> dict[str, int]:
    return {part.name: part.size for part in parts}


def test_parameters_of_the_published_model() -> None:
    assert parameter_count(published().model) == 1_155_912_192
    assert rank_parameters(published()) == 1_155_912_192
    assert layer_parameters(published()) * 26 + 153376 * 1536 + 1536 == 1_155_912_192


def test_memory_of_the_published_recipe() -> None:
    """Written out by hand from the flags: bf16 weights, fp32 gradients, 12 bytes of state over 8, DP x CP."""
    memory = mindspeed_memory(published())
    assert sizes(memory.static) == {
        "weights": 2 * 1_155_912_192,
        "gradients": 4 * 1_155_912_192,
        "optimizer state": 12 * 1_155_912_192 // 8,
        "attention masks": 26 * 2048 * 2048,
    }
    tokens = 32768 // 2
    assert memory.fullest.name == "loss"
    assert sizes(memory.fullest.parts) == {
        "kept by the layers": 26 * tokens * 1536 * 2,
        "kept by the last norm": tokens * (2 * 1536 * 2 + 4),
        "trained positions": 2 * tokens * 1536 * 2,
        "output layer's gradient": 153376 * 1536 * 4,
        "logits": 2048 * 153376 * (2 + 4 + 4),
    }
    (logits,) = (part for part in mindspeed_memory(published(), published=True).fullest.parts if part.name == "logits")
    assert logits.size == tokens * 153376 * (2 + 4 + 4)
    assert sizes(memory.outside) == {"HCCL buffers": 4 * 2 * 200 * 2**20, "the NPU itself": 3384 * 2**20}
    backward = sizes(memory.phases[1].parts)
    # of a token, in numbers of two bytes: both norms' input and output; linear_qkv's output; the query before and after
    # rotation, the result and that exchanged, 1536 each, key and value; gate, up and product
    numbers = 4 * 1536 + (1536 + 2 * 768) + 4 * 1536 + 2 * 768 + 3 * 6144
    layer = tokens * (numbers * 2 + 2 * 4 + 12 * 2 * 8 * 4 + 4 * 128 * 2)
    assert backward["one layer again"] == layer - tokens * 1536 * 2
    assert backward["gradients in a layer"] == tokens * (2 * 6144 + 1536) * 2
    assert backward["output layer's gradient"] == 153376 * 1536 * 2


ADAPTERS = 26 * 32 * ((1536 + 3072) + (1536 + 1536) + (1536 + 2 * 6144) + (6144 + 1536))
"""A and B of rank 32 beside linear_qkv, linear_proj, linear_fc1 and linear_fc2 of 26 layers."""


def test_memory_of_lora() -> None:
    """Written out by hand: gradients and state of adapters alone, and no gradient of the output layer."""
    memory = mindspeed_memory(published("train.lora.rank=32", "parallel.context=1", "train.recompute.granularity=none"))
    assert sizes(memory.static) == {
        "weights": 2 * (1_155_912_192 + ADAPTERS),
        "gradients": 4 * ADAPTERS,
        "optimizer state": 12 * ADAPTERS // 8,
        "attention masks": 26 * 2048 * 2048,
    }
    numbers = 4 * 1536 + (1536 + 2 * 768) + 3 * 1536 + 768 + 3 * 6144 + 4 * 32  # the last: what A gives, and B takes
    layer = 32768 * (numbers * 2 + 2 * 4 + 12 * 2 * 8 * 4 + 4 * 128 * 2)
    loss, backward = (sizes(phase.parts) for phase in memory.phases)
    assert loss == {
        "kept by the layers": 26 * layer,
        "kept by the last norm": 32768 * (2 * 1536 * 2 + 4),
        "trained positions": 2 * 32768 * 1536 * 2,
        "logits": 2048 * 153376 * (2 + 4 + 4),
    }
    assert backward == {"kept by the layers": 26 * layer, "outputs in a layer": 32768 * (3 * 6144 + 1536) * 2}


def test_a_layer_of_which_attention_alone_has_adapters_keeps_less() -> None:
    given = ("train.lora.rank=32", "train.recompute.granularity=none")
    recipe, attention = published(*given), published(*given, "train.lora.targets=[q_proj,k_proj,v_proj]")
    tokens = 32768 // 2
    # the inputs of linear_proj (as ulysses gives it), linear_fc1 and linear_fc2, and what their A give
    left_out = tokens * 2 * (1536 + 1536 + 6144 + 3 * 32)
    assert layer_activations(recipe) - layer_activations(attention) == left_out
    assert sizes(mindspeed_memory(attention).phases[1].parts)["gradients in a layer"] == tokens * (3 * 6144 + 1536) * 2


def test_work_of_lora() -> None:
    """4 for frozen weights, 6 for adapters; recomputed layers 2 more for both."""
    layers, output = 1_155_912_192 - 153376 * 1536 - 1536, 153376 * 1536
    recipe = published("train.lora.rank=32", "train.recompute.granularity=none")
    assert flops_per_token(recipe) == 4 * (layers + output) + 6 * ADAPTERS
    assert flops_per_token(recipe, trained=0.5) == 4 * layers + 2 * output + 6 * ADAPTERS
    again = published("train.lora.rank=32")
    assert flops_per_token(again) - flops_per_token(recipe) == 2 * (layers + ADAPTERS)
    done = 4 * 1_155_912_192 + 6 * ADAPTERS
    assert 1e5 / highest_rate(recipe) == pytest.approx(done * 1e5 / (8 * 313e12))


def test_a_checkpoint_of_lora() -> None:
    """The whole model, and state of adapters alone."""
    weights = 1_155_912_192 + ADAPTERS
    assert disk_of(published("train.lora.rank=32")).checkpoint == 2 * weights + 12 * ADAPTERS
    assert disk_of(published("train.lora.rank=32", *PORTABLE)).checkpoint == 2 * weights + 12 * ADAPTERS
    fp32 = ("train.lora.rank=32", "train.precision=fp32")
    assert disk_of(published(*fp32)).checkpoint == 4 * weights + 12 * ADAPTERS
    assert disk_of(published(*fp32, *PORTABLE)).checkpoint == 4 * weights + 8 * ADAPTERS


def test_where_a_chunk_of_logits_is_small_its_gradients_are_most() -> None:
    """The output layer's gradient of a chunk, in bf16 and cast to fp32."""
    memory = mindspeed_memory(published("data.seq_length=64", "parallel.context=1", "train.recompute.granularity=none"))
    (loss,) = (phase for phase in memory.phases if phase.name == "loss")
    assert sizes(loss.parts)["logits"] == 153376 * (64 * 2 + 1536 * (2 + 4))


def test_work_of_computing_layers_again() -> None:
    """2 of 6 operations a parameter once more, for the layers' parameters; the norm at the end computes no product."""
    layers, output = 26 * layer_parameters(published()), 153376 * 1536
    assert flops_per_token(published()) == 8 * layers + 6 * output
    assert flops_per_token(published("train.recompute.granularity=none")) == 6 * (layers + output)
    assert flops_per_token(published(), trained=0.5) == 8 * layers + 3 * output


@pytest.mark.parametrize(
    ("stages", "layers", "again"),
    [("[20,6]", 10, 10 + 6), ("[20,6]", 3, 3 + 3), ("[20,6]", 26, 26), ("[13,13]", 13, 26), ("null", 14, 26)],
)
def test_work_of_computing_layers_of_each_stage_again(stages: str, layers: int, again: int) -> None:
    """Upstream counts them from the first layer of every stage, which may have fewer."""
    overrides = ["parallel.pipeline=2", "parallel.context=1", f"parallel.num_layer_list={stages}"]
    recipe = published(*overrides, f"train.recompute.num_layers={layers}")
    assert flops_per_token(recipe) == (26 * 6 + again * 2) * layer_parameters(recipe) + 6 * 153376 * 1536


def test_what_an_npu_holds_itself_is_counted_on_an_npu_alone() -> None:
    """torch_npu sees 60.96 GiB of 64 and 29.49 of 32 (docs/plan.md), and that is all that a run can have."""
    (held,) = (part.size for part in memory_of(published()).outside if part.name == "the NPU itself")
    assert held >= (64 - 60.96) * GIB
    assert held >= (32 - 29.49) * GIB
    assert memory_of(published(*PORTABLE)).outside == ()


@pytest.mark.parametrize("recording", ["healthy.txt", "other_driver.txt", "newer_driver.txt", "a3.txt"])
def test_idle_npus_hold_no_more_than_is_counted(recording: str) -> None:
    chips = parse_info((ROOT / "tests/npu_smi" / recording).read_text("utf-8")).chips
    assert 0 < max(chip.used or 0 for chip in chips) << 20 <= HELD


def test_buffers_of_hccl_are_as_large_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "120")
    outside = {part.name: part for part in mindspeed_memory(published()).outside}
    assert outside["HCCL buffers"].size == 4 * 2 * 120 * 2**20
    assert "120 MiB" in outside["HCCL buffers"].how
    for wrong in ("0", "-1", "much", "1.5", ""):
        monkeypatch.setenv("HCCL_BUFFSIZE", wrong)
        assert refusal_of(memory_of, published()).startswith("HCCL_BUFFSIZE: ")
        assert memory_of(published(*PORTABLE))  # which has no HCCL


def test_verdict_leaves_a_tenth() -> None:
    def holding(gib: float) -> Memory:
        return Memory((Part("weights", int(gib * GIB), ""),), (Phase("loss", ()),), ())

    assert [holding(gib).verdict(10) for gib in (8.9, 9.1, 9.9, 10.1)] == ["yes", "tight", "tight", "no"]


def test_communicators() -> None:
    assert communicators(published("parallel.context=1")) == 3  # all, gradients, losses
    assert communicators(published("parallel.devices_per_node=1", "parallel.context=1")) == 0
    assert communicators(published("parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2")) == 6


def test_pipeline_stages_hold_as_many_micro_batches_as_are_under_way() -> None:
    recipe = published("parallel.pipeline=4", "parallel.num_layer_list=[2,8,8,8]", "parallel.context=1")
    memory = mindspeed_memory(recipe)
    assert memory.stage == 3  # the logits are there
    halves = ["parallel.pipeline=2", "parallel.context=1", "train.recompute.granularity=none", "model.vocab_size=1000"]
    kept = {}
    for batch in (4, 8, 128):  # packs of all four replicas: 1, 2 and 32 micro batches of each
        memory = mindspeed_memory(published(*halves, f"train.global_batch_size={batch}"))
        assert memory.stage == (1 if batch == 4 else 0)  # one micro batch: stage 1 holds as much, and the logits
        kept[batch] = sizes(memory.phases[0].parts)["kept by the layers"]
    assert kept[4] == 13 * layer_activations(published(*halves))
    assert kept[8] == kept[128] == 2 * kept[4]  # never more than there are, nor than stages behind it


def test_portable_engine_spreads_nothing() -> None:
    one = transformers_memory(published(*PORTABLE, "parallel.devices_per_node=1"))
    eight = transformers_memory(published(*PORTABLE))
    assert sizes(one.static)["optimizer state"] == sizes(eight.static)["optimizer state"] == 8 * 1_155_912_192
    assert eight.peak - one.peak == 4 * 1_155_912_192  # DDP's buckets


def test_epochs() -> None:
    course = course_of(published(), COUNTS)
    assert course.iterations_per_epoch == 1000 / 128
    assert course.epochs == 600 * 128 / 1000
    assert course.tokens == 600 * 128 * 30000
    assert course.trained_tokens == 600 * 128 * 10000
    assert course.unseen == 0


@pytest.mark.parametrize(
    ("overrides", "packs", "said"),
    [
        ([], 50, "train.global_batch_size 128 is above the dataset's 50 packs"),
        ([], 100_000, "23,200 of 100,000 packs are never seen -> for one epoch set train.epochs=1"),
        ([], 1280, 'every pack is seen 60.0 times: much for fine-tuning -> for three epochs SET="train.epochs=3 '),
        ([], 1280, "the warm-up, 200 iterations, is longer than an epoch"),
        (["train.lr_warmup_iterations=10", "train.iterations=600"], 128 * 300, None),
    ],
    ids=["large batch", "unseen", "many epochs", "warm-up", "none"],
)
def test_warnings(overrides: list[str], packs: int, said: Optional[str]) -> None:
    found = list(warnings(published(*overrides), {**COUNTS, "packs": packs}))
    if said is None:
        assert found == []
    else:
        assert any(line.startswith(said) and " -> " in line for line in found), found


def test_checkpoints_on_disk() -> None:
    disk = disk_of(published())
    assert disk == (checkpoint_bytes(published()), 6, 6, 6 * 14 * 1_155_912_192)
    halves = disk_of(published("parallel.pipeline=2", "parallel.context=1"))
    assert halves.checkpoint - disk.checkpoint == 14 * 153376 * 1536  # the last stage has the tied embedding too
    kept = disk_of(published("train.keep_checkpoints=2", "train.iterations=550"))
    assert (kept.written, kept.kept) == (6, 2)  # the last iteration is saved too
    assert kept.most == 3 * kept.checkpoint  # the oldest goes when the newest is there


def test_tokens_of_an_iteration_come_from_recipe_and_dataset() -> None:
    assert tokens_per_iteration(published(), None) == 128 * 32768
    assert tokens_per_iteration(published(), COUNTS) == 128 * 30000
    assert tokens_per_iteration(published(*PORTABLE), COUNTS) == 128 * 32768  # it counts padding


def test_report_without_a_dataset_and_as_json(tmp_path: Path) -> None:
    report = Report(published(f"paths.cache={tmp_path}"), [16, 64], 1e5)
    assert report.counts is None
    assert report.seconds == pytest.approx(600 * 128 * 32768 / 1e5)
    assert report.least_seconds < report.seconds
    shown = json.loads(json.dumps(as_json(report)))
    assert shown["parameters"] == shown["trained_parameters"] == 1_155_912_192
    assert shown["memory"]["fits"] == {"16": "no", "64": "yes"}
    assert shown["memory"]["needed"] == report.memory.needed
    assert shown["now"]["recompute"]["num_layers"] == 26
    assert shown["auto"]["64"][0]["context"] == 1
    assert shown["auto"]["64"][0]["work"] < shown["now"]["work"]
    assert shown["chosen"] is None
    assert not list(tmp_path.iterdir())
    adapters = Report(published(f"paths.cache={tmp_path}", "train.lora.rank=32"), [64])
    assert as_json(adapters)["parameters"] == 1_155_912_192
    assert as_json(adapters)["trained_parameters"] == ADAPTERS
