"""One rank of the real megatron-core 0.6.0: loads its part of a checkpoint strictly, as training does; computes logits.

megatron.py starts one process for each of the TP x PP ranks.

Run as: python -m openpangu_sft.verify.rank SCRATCH RANK
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.model.tensors import TORCH_DTYPES, as_tensor
from openpangu_sft.util.errors import UserError, explain_os_error
from openpangu_sft.verify.megatron import REFUSED, file_of
from openpangu_sft.verify.model import Arguments, build, load_strictly, stand_in

_NEEDED = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels "
    "max_position_embeddings padded_vocab_size rotary_base norm_epsilon add_bias_linear "
    "untie_embeddings_and_output_weights"
)
_USUAL = {
    "add_qkv_bias": False,
    "add_dense_bias": False,
    "num_layer_list": None,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
}
"""With _NEEDED the arguments that describe the model; all others are about training."""
_AGAIN = "make it again, with make convert"
_KIND = {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope"}


def read_rank(path: Path, tensor: int, pipeline: int) -> tuple[Arguments, dict[str, Any]]:
    """The arguments that describe the model, and the state dict, of one rank's file.

    Raises `UserError` where it is damaged, not of a model like openPangu, or made for other TP and PP.
    """
    content = load_checkpoint_file(path)
    args, state = (content.get("args"), content.get("model")) if isinstance(content, dict) else (None, None)
    if not isinstance(args, Namespace) or not isinstance(state, dict):
        raise UserError("holds no args and model", where=path, remedy="give a Megatron-core checkpoint")
    expected = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, **_KIND}
    for name, value in expected.items():
        found = vars(args).get(name)
        if type(found) is not type(value) or found != value:
            raise UserError(f"args.{name} is {found!r}, expected {value!r}", where=path, remedy=_AGAIN)
    for name in _NEEDED.split():
        if name not in args:
            raise UserError(f"args.{name} is missing", where=path, remedy=_AGAIN)
    given = {name: vars(args).get(name, _USUAL.get(name)) for name in (*expected, *_NEEDED.split(), *_USUAL)}
    return given, {name: as_tensor(value) for name, value in state.items()}


def require_same(given: Arguments) -> None:
    """Different sizes would deadlock: `UserError` names the first argument that differs between ranks."""
    all_given: list[Arguments] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_given, given)
    for name, value in all_given[0].items():
        if given[name] != value:
            raise UserError(f"args.{name} is {given[name]!r}, but {value!r} in the first rank's file")


def compute_logits(model: Any, ids: list[int], dtype: torch.dtype) -> Optional[torch.Tensor]:
    """Logits of one prompt under a causal mask; all ranks call it together.

    fp32 [tokens, padded vocabulary] on ranks of the last pipeline stage, else None.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(len(ids))
    later = positions[None, :] > positions[:, None]  # True where attention is not allowed
    if not model.pre_process:
        hidden = torch.empty(len(ids), 1, model.config.hidden_size, dtype=dtype)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(torch.tensor([ids]), positions[None], later[None, None])
    if not model.post_process:
        torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    logits: torch.Tensor = gather_from_tensor_model_parallel_region(output.float())
    return logits[0]


def _without_adapters(state: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """The weights beside LoRA adapters, if any, by the model's own names; training loads these without extra states."""
    if not any(".lora_" in name for name in state):
        return state
    extra = dict.fromkeys(name for name in model.state_dict() if name.endswith("_extra_state"))
    return {**extra, **{name.replace(".base_layer.", "."): state[name] for name in state if ".lora_" not in name}}


@torch.no_grad()
def run(scratch: Path, rank: int) -> None:
    """Loads a rank's file and computes logits of all prompts, as scratch/job.json asks: see `megatron_logits`.

    One rank writes scratch/result.npz: for each prompt fp32 [tokens, vocab_size]. Raises `UserError` where the
    checkpoint is damaged, or is not one that training would load.
    """
    job = json.loads((scratch / "job.json").read_text("utf-8"))
    tensor, pipeline, vocab_size, dtype = job["tensor"], job["pipeline"], job["vocab_size"], TORCH_DTYPES[job["dtype"]]
    stand_in(Path(job["core"]))
    path = file_of(Path(job["checkpoint"]), rank, tensor, pipeline)
    given, state = read_rank(path, tensor, pipeline)
    rendezvous = f"file://{scratch / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=tensor * pipeline)
    try:
        require_same(given)
        if given["padded_vocab_size"] < vocab_size:
            raise UserError(f"args.padded_vocab_size is {given['padded_vocab_size']}, less than {vocab_size}")
        model = build(given, dtype)
        load_strictly(model, _without_adapters(state, model))
    except UserError as error:
        raise UserError(error.what, where=path, remedy=_AGAIN) from None
    state.clear()  # the model has copies
    logits = [compute_logits(model, ids, dtype) for ids in job["prompts"]]
    if rank == tensor * (pipeline - 1):
        np.savez(scratch / "result.npz", *[one[:, :vocab_size].numpy() for one in logits if one is not None])
    torch.distributed.barrier()  # no rank closes a connection that another still reads


def main() -> None:
    """Runs one rank. Where the checkpoint is at fault it exits with REFUSED, and its last line says why."""
    try:
        run(Path(sys.argv[1]), int(sys.argv[2]))
    except (UserError, OSError) as error:
        print(error if isinstance(error, UserError) else explain_os_error(error), file=sys.stderr, flush=True)
        os._exit(REFUSED)  # at once: the ranks that fail because their neighbour is gone must not be the first to end


if __name__ == "__main__":
    main()
