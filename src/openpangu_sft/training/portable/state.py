"""Checkpoints of a run: Megatron-core's layout, plus the state that the portable engine needs to resume.

run/latest_checkpointed_iteration.txt
run/iter_0000080/manifest.json
run/iter_0000080/mp_rank_00/model_optim_rng.pt
run/iter_0000080/mp_rank_00/transformers_engine.pt    optimizer state; in bf16 also the trained weights in fp32
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest, read_manifest, staged_directory
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.checkpoint.mcore import Position, iteration_directory, write_rank, write_tracker
from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.checkpoint.weights import Resharder
from openpangu_sft.model.llama import tensors_of_model
from openpangu_sft.model.tensors import TORCH_DTYPES, tensors_in, weights_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import newest_whole
from openpangu_sft.util.errors import UserError, naming

ENGINE_FILE = "mp_rank_00/transformers_engine.pt"
VERSIONS = {"openpangu-sft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
"""Recorded in every checkpoint."""


def save(
    recipe: Recipe, made_by: Manifest, model: LlamaForCausalLM, optimizer: Optimizer, iteration: int, loss: float
) -> None:
    """Writes the checkpoint of an iteration of the run with this manifest, then the tracker file."""
    run, counts = recipe.path("run"), {"iteration": iteration, "loss": loss, "versions": VERSIONS}
    manifest = Manifest("checkpoint", made_by.settings, made_by.inputs, counts)
    dtype, layout = TORCH_DTYPES[recipe.train.precision], layout_of(recipe.model, recipe.parallel)
    adapter = recipe.train.lora.adapter
    position = Position(iteration, iteration * recipe.train.global_batch_size)
    with staged_directory(iteration_directory(run, iteration), manifest) as staging:
        tensors = Resharder(weights_of(tensors_of_model(model, dtype), adapter), recipe.model).mcore(layout, 0, 0)
        write_rank(staging, recipe.model, layout, (0, 0), tensors, position, adapter=adapter)
        state: dict[str, Any] = {"optimizer": optimizer.state_dict()}
        if dtype != torch.float32:
            state["weights"] = tensors_of_model(model, torch.float32, trained_only=True)
        _save(state, staging / ENGINE_FILE)
    write_tracker(run, iteration)


def newest_checkpoint(run: Path, is_main: bool) -> int:
    """The iteration of a run's newest complete checkpoint, 0 if there is none; see retention.newest_whole."""

    def is_whole(iteration: int) -> bool:
        with contextlib.suppress(UserError):
            read_manifest(iteration_directory(run, iteration), "checkpoint", "")
            return True
        return False

    return newest_whole(run, is_whole, is_main) or 0


def load_engine_state(directory: Path) -> dict[str, Any]:
    """The engine's state in a checkpoint; `UserError` where it is missing, as in the other engine's, or invalid."""
    path = directory / ENGINE_FILE
    if not path.is_file():
        raise UserError("no state of the transformers engine", where=directory, remedy="start a new run (paths.run)")
    state = tensors_in(load_checkpoint_file(path))
    if not isinstance(state, dict) or "optimizer" not in state:
        raise UserError("holds no optimizer state", where=path, remedy="resume from an earlier checkpoint")
    return state


def _save(content: object, path: Path) -> None:
    """torch.save; a full disk is an OSError: torch turns that into a RuntimeError without errno."""
    with naming(path):
        try:
            with path.open("wb") as stream:
                torch.save(content, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
