"""LoRA in the patched MindSpeed-LLM: its losses are our own engine's, and only adapters change.

Real torchrun processes on the stand-in for NPUs; runs where the sources are at hand (upstream.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_files import Tensors, assert_same_bits
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed import start
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.stage import run_sft
from posttrain import (
    ACTIVATION,
    OVERLAP,
    RECOMPUTE,
    RECOMPUTE_ONE,
    copy_dataset,
    figures,
    posttrain,
    several,
)
from training.mindspeed.conftest import ITERATIONS, Engine, MakeRun
from upstream import load_upstream, require_compiler

LORA = ["train.lora.rank=4", "train.lora.alpha=16", "train.lr=1e-2"]
PART = ["train.lora.rank=4", "train.lora.targets=[down_proj]", "train.lr=1e-2"]


@pytest.mark.parametrize(
    ("settings", "devices", "flags"),
    [
        pytest.param(LORA, [], "", id="one"),
        pytest.param(LORA, several(2), OVERLAP, id="data-parallel"),
        pytest.param(LORA, several(2, "parallel.context=2"), "", id="context-parallel"),
        pytest.param(LORA, several(2, "parallel.tensor=2"), RECOMPUTE_ONE, id="tensor-parallel"),
        pytest.param(
            LORA, several(2, "parallel.pipeline=2", "parallel.num_layer_list=[2,1]"), RECOMPUTE, id="pipeline"
        ),
        pytest.param(PART, [], ACTIVATION, id="one-target"),
    ],
)
def test_its_losses_are_those_of_our_engine(
    upstream: Path,
    make_run: MakeRun,
    engine: Engine,
    tmp_path: Path,
    settings: list[str],
    devices: list[str],
    flags: str,
) -> None:
    recipe = make_run(*settings, *devices)
    posttrain(upstream, recipe, copy_dataset(recipe, tmp_path), *flags.split())
    losses, norms = figures(recipe, "lm loss", "grad-norm")
    others = engine(*settings)
    assert len(losses) == ITERATIONS
    assert losses == pytest.approx(others[0], rel=1e-6)
    assert norms == pytest.approx(others[1], rel=1e-6)
    assert losses[-1] < losses[0] - 0.1


def test_a_tensor_that_is_missing_is_refused(upstream: Path, make_run: MakeRun, tmp_path: Path) -> None:
    recipe = make_run(*LORA)
    path = recipe.path("mcore") / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    content = load_upstream(path)
    del content["model"]["decoder.layers.1.self_attention.linear_proj.base_layer.bias"]
    torch.save(content, path)
    output = posttrain(upstream, recipe, copy_dataset(recipe, tmp_path), refused=True)
    assert 'Missing key(s) in state_dict: "decoder.layers.1.self_attention.linear_proj.base_layer.bias"' in output


def stored(root: Path, recipe: Recipe) -> Tensors:
    """Weights and adapters of a checkpoint, as they are in its files."""
    return tensors_of(open_mcore(root, recipe.model).weights.stored, recipe.model)


def test_a_resumed_run_is_the_one_without_a_break_and_only_adapters_change(
    upstream: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_compiler()
    monkeypatch.setattr(start, "SOURCES", upstream)
    settings = [*LORA, "train.precision=bf16", "train.device=cpu", "train.iterations=4", "train.save_interval=2"]
    settings += several(2, "parallel.tensor=2")
    recipe = make_run(*settings, dtype="bf16")
    run_sft(recipe, [])
    run, second = recipe.path("run"), make_run(*settings, f"paths.run={tmp_path / 'second'}", dtype="bf16")
    shutil.copytree(run, second.path("run"))
    shutil.rmtree(second.path("run") / "iter_0000004")
    (second.path("run") / "latest_checkpointed_iteration.txt").write_text("2")
    run_sft(second, [])
    assert [row["loss"] for row in read_metrics(second.path("run"))] == [row["loss"] for row in read_metrics(run)]
    found, begun = stored(run, recipe), stored(recipe.path("mcore"), recipe)
    assert_same_bits(stored(second.path("run"), recipe), found)
    adapters = {name for name in begun if ".lora_" in name}
    assert {name for name in begun if not torch.equal(found[name], begun[name])} == adapters
    rank = run / "iter_0000004/mp_rank_00"
    tensors = load_upstream(rank / "model_optim_rng.pt")["model"]
    (kept,) = load_upstream(rank / "distrib_optim.pt")["per_bucket_numel_unpadded"][0].values()
    assert kept == [sum(tensors[name].numel() for name in tensors if re.search(r"lora_.*weight$", name))]
