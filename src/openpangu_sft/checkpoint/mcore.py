"""Megatron-core checkpoints: directories as Megatron's --load and --save know them.

latest_checkpointed_iteration.txt
iter_0000001/mp_rank_TT/model_optim_rng.pt        TT: tensor rank; args, checkpoint_version, iteration, model
iter_0000001/mp_rank_TT_PPP/model_optim_rng.pt    with pipeline stages (megatron/training/checkpointing.py)
iter_0000001/mp_rank_*/distrib_optim.pt           training writes it first (--use-distributed-optimizer); not read here
release/mp_rank_*                                 instead of an iteration, where the first file says release
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.checkpoint.files.arrays import DType, Stored
from openpangu_sft.checkpoint.files.torch_write import write_torch_file
from openpangu_sft.checkpoint.files.writer import Advance, Entry, nothing
from openpangu_sft.checkpoint.sharding import Layout, extra_state_names
from openpangu_sft.recipe.lora import Adapter
from openpangu_sft.recipe.model_config import TRACKER
from openpangu_sft.recipe.sections import Model

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
RELEASE = "release"


def iteration_directory(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def rank_file(tp: int, pp: int, pipeline: int) -> str:
    """Path of a rank's file below the iteration's directory; a single pipeline stage has no number."""
    stage = f"_{pp:03d}" if pipeline > 1 else ""
    return f"mp_rank_{tp:02d}{stage}/{MODEL_FILE}"


def write_tracker(root: Path, iteration: int) -> None:
    """Names the newest iteration; to be called once its checkpoint is in place."""
    write_durably(root / TRACKER, str(iteration))


class Position(NamedTuple):
    """Where a training stands: the iteration to resume after, and the samples (packs) consumed so far."""

    iteration: int
    consumed_samples: int = 0


FIRST = Position(1)  # upstream's converter writes iter_0000001, and training with --finetune counts from 0 again


def write_rank(
    directory: Path,
    model: Model,
    layout: Layout,
    rank: tuple[int, int],
    tensors: Mapping[str, Stored],
    position: Position,
    advance: Advance = nothing,
    adapter: Optional[Adapter] = None,
) -> Entry:
    """Writes the file of one rank (tensor rank, pipeline rank) below the directory of an iteration, which exists.

    `tensors` are all of this rank's, by Megatron-core name, an adapter's included.
    """
    state: dict[str, Any] = dict(tensors)
    args = arguments(model, layout, next(iter(tensors.values())).dtype, position)
    if adapter:  # whose layers in Megatron do without extra states
        vars(args).update(lora_r=adapter.rank, lora_alpha=adapter.alpha, lora_target_modules=adapter.linears)
    else:
        state.update(dict.fromkeys(extra_state_names(layout, rank[1])))
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": position.iteration,
        "model": state,
        "num_floating_point_operations_so_far": 0,
    }
    path = directory / rank_file(*rank, layout.pipeline)
    path.parent.mkdir()
    return write_torch_file(content, path, advance)


def arguments(model: Model, layout: Layout, dtype: DType, position: Position) -> Namespace:
    """The arguments that megatron/training/checkpointing.py compares or adopts, and those that describe the model."""
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=layout.padded_vocab_size,
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
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        num_layer_list=None if layout.even else ",".join(map(str, layout.stages)),  # as MindSpeed-LLM's option has it
        iteration=position.iteration,
        consumed_train_samples=position.consumed_samples,
        consumed_valid_samples=0,
    )
