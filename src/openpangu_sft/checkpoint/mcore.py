"""Megatron-core checkpoints: directories as Megatron's --load and --save know them, TP 1 and PP 1.

latest_checkpointed_iteration.txt
iter_0000001/mp_rank_00/model_optim_rng.pt     args, checkpoint_version, iteration, model
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openpangu_sft.artefact import write_durably
from openpangu_sft.checkpoint.layout import Shape, extra_state_names, mcore_tensors
from openpangu_sft.checkpoint.safe_pickle import load_checkpoint_file
from openpangu_sft.errors import UserError, naming
from openpangu_sft.recipe import Model

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "mp_rank_00/model_optim_rng.pt"

Tensors = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights; anything else belongs to a quantized checkpoint."""


def iteration_directory(root: Path, iteration: int) -> Path:
    """Directory of one iteration's checkpoint."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path, remedy: str = "check the path") -> int:
    """The iteration that the tracker file names.

    Args:
        root: directory of the tracker file.
        remedy: what to do where there is none.

    Raises:
        UserError: no tracker file, or it names no number.
    """
    path = root / TRACKER
    if not path.is_file():
        raise UserError(f"no checkpoint here ({TRACKER})", where=root, remedy=remedy)
    text = path.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,12}", text):
        raise UserError(
            f"names iteration {text[:40]!r}, not a number", where=path, remedy="write the number of an iter_ directory"
        )
    return int(text)


def write_tracker(root: Path, iteration: int) -> None:
    """Names the newest iteration, after its checkpoint is in place."""
    write_durably(root / TRACKER, str(iteration))


def write_model(directory: Path, model: Model, tensors: Tensors, iteration: int, consumed_samples: int) -> None:
    """Writes `model_optim_rng.pt` below an iteration's directory.

    Args:
        directory: of the iteration; exists.
        model: sizes, for the arguments that Megatron reads back.
        tensors: by Megatron-core name, all of them.
        iteration: to continue after.
        consumed_samples: training samples (packs) seen so far.
    """
    state: dict[str, Any] = dict(tensors)
    state.update(dict.fromkeys(extra_state_names(model)))
    content = {
        "args": _arguments(model, next(iter(tensors.values())).dtype, iteration, consumed_samples),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": state,
        "num_floating_point_operations_so_far": 0,
    }
    path = directory / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_torch_file(content, path)


def write_torch_file(content: object, path: Path) -> None:
    """torch.save, except that a full disk is an OSError: torch makes a RuntimeError without errno of it."""
    with naming(path):
        try:
            with path.open("wb") as stream:
                torch.save(content, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_model(path: Path, model: Model) -> Tensors:
    """Reads the tensors of a `model_optim_rng.pt` and checks them against the sizes.

    Raises:
        UserError: damaged, or a tensor is missing, unexpected or of another shape.
    """
    content = load_checkpoint_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError("holds no model", where=path, remedy="give a Megatron-core checkpoint")
    found = {name: value.detach() for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
    expected = {tensor.name: tensor.shape for tensor in mcore_tensors(model)}
    require_tensors(found, expected, path, "was it converted with the model of this recipe?")
    return found


def require_tensors(found: Tensors, expected: Mapping[str, Shape], where: Path, remedy: str) -> None:
    """Refuses a checkpoint that has not just the tensors of the model.

    Raises:
        UserError: names the first tensor that is missing, unexpected, of another shape or of a dtype of no weights.
    """
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"tensor {name} is missing", where=where, remedy=remedy)
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"tensor {name} has shape {tuple(found[name].shape)}, expected {shape}", where=where, remedy=remedy
            )
    for name, tensor in found.items():
        if name not in expected:
            raise UserError(f"unexpected tensor {name}", where=where, remedy=remedy)
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"tensor {name} is {dtype_name(tensor.dtype)}, expected one of {', '.join(map(dtype_name, DTYPES))}",
                where=where,
                remedy="take a checkpoint that is not quantized",
            )


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json writes it: bfloat16, float32."""
    return str(dtype).replace("torch.", "")


def _arguments(model: Model, dtype: torch.dtype, iteration: int, consumed_samples: int) -> Namespace:
    """What megatron/training/checkpointing.py compares or takes over when it loads, and what describes the model."""
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=model.vocab_size,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        add_position_embedding=True,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        add_dense_bias=model.add_dense_bias,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        params_dtype=dtype,
        use_mcore_models=True,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        iteration=iteration,
        consumed_train_samples=consumed_samples,
        consumed_valid_samples=0,
    )
