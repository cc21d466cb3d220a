"""One rank of the real megatron-core 0.6.0: loads its part of a checkpoint strictly, as training does; computes logits.

megatron.py starts a process for each of the TP x PP ranks, as stand-ins would leak. They replace what needs a GPU or a
compiled package: Transformer Engine, apex's norm, CUDA's current device, copies and random state, and sums of bf16,
which gloo lacks. Everything else is Megatron-core's own code.

Run as: python -m openpangu_sft.verify.rank SCRATCH RANK
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import packaging.version
import torch

from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.model.tensors import TORCH_DTYPES, as_tensor
from openpangu_sft.util.errors import UserError, explain_os_error
from openpangu_sft.verify.megatron import REFUSED


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, as Megatron-core's layers call it.

    Rounds where megatron/legacy/model/rms_norm.py does, MindSpeed-LLM's norm: it matters in bf16.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normal.type_as(hidden) * self.weight


def stand_in(core: Path) -> None:
    """Puts a folder that contains `megatron/core` first on the path, and installs the stand-ins."""
    sys.path.insert(0, str(core))
    # attention.py imports a name from setuptools that later versions do not have
    sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    vars(sys.modules["pkg_resources"]).update(packaging=packaging)
    # Megatron-core's adapter to Transformer Engine; the local layer spec uses nothing of it but the final norm
    adapter = types.ModuleType("megatron.core.transformer.custom_layers.transformer_engine")
    unused = ("TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear", "SplitAlongDim")
    vars(adapter).update(dict.fromkeys([*unused, "get_cpu_offload_context"]), TENorm=RMSNorm)
    sys.modules[adapter.__name__] = adapter
    vars(torch.cuda).update(current_device=lambda: torch.device("cpu"))
    torch.Tensor.cuda = lambda self: self  # type: ignore[assignment, method-assign, misc]
    original = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        wide = tensor.float()  # the tensor itself where it is fp32
        original(wide, *args, **kwargs)
        tensor.copy_(wide)

    vars(torch.distributed).update(all_reduce=all_reduce)

    import megatron.core
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    assert core.resolve() in Path(megatron.core.__file__).resolve().parents, megatron.core.__file__
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def build(given: dict[str, Any], stages: Sequence[int], dtype: torch.dtype) -> torch.nn.Module:
    """This rank's part of the model, in evaluation mode, not initialised.

    `given`: see mcore.arguments; `stages`: layers of each pipeline stage.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(given["tensor_model_parallel_size"], len(stages))
    # As in MindSpeed-LLM; Megatron-core 0.6.0 has even pipelines only
    own = stages[parallel_state.get_pipeline_model_parallel_rank()]
    transformer_block.get_num_layers_to_build = lambda config: own
    # As in megatron/training/arguments.py: an argument that is no field of the configuration is ignored.
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    options = {name: value for name, value in given.items() if name in fields}
    options.update(
        layernorm_epsilon=given["norm_epsilon"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,  # with it attention's softmax is in fp32
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    model: torch.nn.Module = GPTModel(
        TransformerConfig(**options),
        spec,
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not given["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=given["rotary_base"],
    )
    return model.eval()


def load_strictly(model: torch.nn.Module, state: dict[str, Any], where: Path) -> None:
    """Loads as training does; `UserError` names the tensors that are missing, unexpected or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        findings = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        what = f"Megatron-core does not load it: {findings}"
        raise UserError(what, where=where, remedy="make it again, with make convert") from None


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
    files, stages, dtype = list(map(Path, job["files"])), job["stages"], TORCH_DTYPES[job["precision"]]
    stand_in(Path(job["core"]))
    rounded = getattr(torch, job["rounded"])
    state: dict[str, Any] = load_checkpoint_file(files[rank])["model"]
    for name, value in state.items():
        state[name] = as_tensor(value).to(rounded) if isinstance(value, np.ndarray) else value
    rendezvous = f"file://{scratch / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(files))
    model = build(job["arguments"], stages, dtype)
    load_strictly(model, _without_adapters(state, model), files[rank])
    state.clear()  # the model has copies
    logits = [compute_logits(model, ids, dtype) for ids in job["prompts"]]
    if rank == len(files) - len(files) // len(stages):  # the first of the last stage
        np.savez(scratch / "result.npz", *[one[:, : job["vocab_size"]].numpy() for one in logits if one is not None])
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
