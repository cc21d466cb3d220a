"""make plan's numbers for the mindspeed engine, and what the real MindSpeed-LLM holds on the stand-in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_files import hf_sizes, set_config, write_hf
from conftest import PATIENCE, ROOT, MakeRecipe, conversation, write_samples
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.mcore import iteration_directory
from openpangu_sft.checkpoint.sharding import hf_shapes, layout_of
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.plan.memory import Part, loss_parts, total
from openpangu_sft.plan.mindspeed_memory import (
    communicators,
    layer_activations,
    mindspeed_memory,
    rank_parameters,
    shards,
)
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.start import link_data, plan
from openpangu_sft.training.run.retention import checkpoint_bytes
from upstream import require_compiler

SETTINGS = ["train.engine=mindspeed", "train.precision=bf16", "train.global_batch_size=4", "train.iterations=2"]
SETTINGS += ["train.lr_warmup_iterations=1", "train.save_interval=2", "parallel.devices_per_node=2"]
ONE_HEAD_A_GROUP = ["train.precision=fp32", "model.num_query_groups=4", "model.tie_word_embeddings=false"]
ONE_GROUP = "model.num_query_groups=1"
RECOMPUTE = "train.recompute.num_layers=2"
FULL = ["train.recompute.granularity=full", RECOMPUTE]
LORA = "train.lora.rank=4"


def prepared(recipe: Recipe, base: Path) -> Recipe:
    """With random weights of its own, its data and its checkpoint."""
    generator = torch.Generator().manual_seed(1)
    shapes = hf_shapes(recipe.model)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    write_hf(recipe.path("hf"), base, tensors)
    set_config(recipe.path("hf"), **hf_sizes(recipe.model))
    records = [conversation(f"问题 {number}", f"答案 {number} " * (number % 5 + 1)) for number in range(60)]
    write_samples(recipe.path("samples") / "a.jsonl", records)
    run_preprocess(recipe)
    run_merge(recipe)
    run_convert(recipe)
    return recipe


def measure(recipe: Recipe, sources: Path, folder: Path) -> list[dict[str, Any]]:
    """Trains, and gives what each process has noted."""
    require_compiler()
    run = recipe.path("run")
    run.mkdir()
    dataset = read_manifest(recipe.path("dataset"), "dataset", "")
    command = plan(recipe, sources, link_data(run, recipe.path("dataset"), dataset.digest), is_main=True)[0]
    program = next(place for place, word in enumerate(command.arguments) if word.endswith("posttrain_gpt.py"))
    folder.mkdir()
    arguments = [*command.arguments]
    arguments[program:program] = [str(ROOT / "tests/measure_upstream.py"), str(folder)]
    command.folder.mkdir(exist_ok=True)
    path = f"{sources.parent / 'tools'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **command.environment, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        arguments, cwd=command.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-12000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(recipe.parallel.world)]


def part(parts: Sequence[Part], name: str) -> int:
    (found,) = (one.size for one in parts if one.name == name)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="data-parallel"),
        pytest.param(ONE_HEAD_A_GROUP, id="fp32-untied-one-head-a-group"),
        pytest.param(["parallel.context=2", *FULL], id="context-parallel"),
        pytest.param([ONE_GROUP, "parallel.context=2"], id="kv-heads-repeated"),
        pytest.param(["parallel.tensor=2"], id="tensor-parallel"),
        pytest.param(["parallel.context=2", "train.recompute.activation=true"], id="activation-recomputed"),
        pytest.param(["parallel.pipeline=2"], id="pipeline"),
        pytest.param(["train.micro_batch_size=2"], id="micro-batch"),
        pytest.param([LORA, "train.recompute.activation=true"], id="lora-activation-recomputed"),
        pytest.param([LORA, "parallel.context=2", "train.lora.targets=[q_proj,k_proj,v_proj]"], id="lora-of-attention"),
        pytest.param([LORA, "parallel.tensor=2"], id="lora-tensor-parallel"),
        pytest.param([LORA, "parallel.pipeline=2", *FULL, "train.precision=fp32"], id="lora-pipeline-recomputed"),
    ],
)
def test_what_upstream_holds(
    upstream: Path, make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, overrides: list[str]
) -> None:
    recipe = prepared(make_recipe(*SETTINGS, f"paths.hf={tmp_path / 'own'}", *overrides), tiny_hf)
    state = 12 if recipe.train.precision == "bf16" else 8
    memory = mindspeed_memory(recipe)
    columns = layout_of(recipe.model, recipe.parallel).padded_vocab_size // recipe.parallel.tensor
    for rank, noted in enumerate(measure(recipe, upstream, tmp_path / "notes")):
        stage = rank // recipe.parallel.tensor % recipe.parallel.pipeline
        parameters, trained = (rank_parameters(recipe, stage, which) for which in (False, True))
        # buffers are filled up so that every bucket divides evenly: by less than one element a device and bucket
        padding = noted["gradients"] // 4 - trained
        assert 0 <= padding < noted["buckets"] * shards(recipe)
        assert noted["weights"] == (parameters + padding) * (2 if state == 12 else 4)
        assert abs(noted["optimizer"] - trained * state / shards(recipe)) <= state * shards(recipe)
        assert noted["layer"] == layer_activations(recipe)
        assert noted["groups"] == communicators(recipe)
        if stage == recipe.parallel.pipeline - 1:
            rows, most = noted["loss"]
            sizes = (2, 10) if state == 12 else (4, 8)
            planned = total(loss_parts(rows, columns, recipe.model.hidden_size, *sizes, trained < parameters))
            # the numbers of a token that the cross-entropy makes beside its logits are small: maximum, mask, target
            assert planned <= most < planned * 1.04
        if stage == memory.stage:
            assert part(memory.static, "weights") == parameters * (2 if state == 12 else 4)
            assert part(memory.static, "gradients") == trained * 4
            assert noted["optimizer"] == pytest.approx(part(memory.static, "optimizer state"), abs=state)
    files = [path for path in iteration_directory(recipe.path("run"), 2).rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    # beside the tensors: names, and the arguments of the run
    most = (72_000 if recipe.train.lora.rank else 62_000) * recipe.parallel.tensor * recipe.parallel.pipeline
    assert 0 < written - checkpoint_bytes(recipe) < most
