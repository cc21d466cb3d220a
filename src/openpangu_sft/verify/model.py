"""The GPT model of the real megatron-core 0.6.0 on a machine without CUDA.

Only for a process of its own, because the stand-ins would leak. They replace what needs a GPU or a compiled package:
Transformer Engine, apex's norm, CUDA's current device, copies and random state, and sums of bf16, which gloo lacks.
Everything else is Megatron-core's own code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, Optional

import packaging.version
import torch

from openpangu_sft.util.errors import UserError

Arguments = dict[str, Any]  # the arguments in a checkpoint that describe the model

_FEW = 3


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
    vars(torch.distributed).update(all_reduce=_wide_all_reduce(torch.distributed.all_reduce))

    import megatron.core
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    assert core.resolve() in Path(megatron.core.__file__).resolve().parents, megatron.core.__file__
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def _wide_all_reduce(original: Any) -> Any:
    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        wide = tensor.float()  # the tensor itself where it is fp32
        original(wide, *args, **kwargs)
        tensor.copy_(wide)

    return all_reduce


def stage_layers(given: Arguments) -> Optional[list[int]]:
    """Layers of each pipeline stage where they are uneven: MindSpeed-LLM's argument num_layer_list, as in "6,8,8,4".

    From the arguments and not from the tensors, as in training. Raises `UserError` where it does not fit the others.
    """
    text, total, stages = given["num_layer_list"], given["num_layers"], given["pipeline_model_parallel_size"]
    if not text:
        return None
    layers = [int(number) if number.strip().isdecimal() else 0 for number in str(text).split(",")]
    if 0 in layers or len(layers) != stages or sum(layers) != total:
        raise UserError(f"args.num_layer_list is {text!r} for {total} layers in {stages} stages")
    return layers


def build(given: Arguments, dtype: torch.dtype) -> torch.nn.Module:
    """This rank's part of the model, in evaluation mode, not initialised; `UserError` if it cannot be built."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(given["tensor_model_parallel_size"], given["pipeline_model_parallel_size"])
    if layers := stage_layers(given):  # as in MindSpeed-LLM; Megatron-core 0.6.0 has even pipelines only
        own = layers[parallel_state.get_pipeline_model_parallel_rank()]
        transformer_block.get_num_layers_to_build = lambda config: own
    # As in megatron/training/arguments.py: an argument that is no field of the configuration is ignored.
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    options = {name: value for name, value in given.items() if name in fields}
    options["num_query_groups"] = given["num_query_groups"] if given["group_query_attention"] else None
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    try:
        config = TransformerConfig(
            **options,
            layernorm_epsilon=given["norm_epsilon"],
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,  # with it attention's softmax is in fp32
        )
        model: torch.nn.Module = GPTModel(
            config,
            spec,
            vocab_size=given["padded_vocab_size"],
            max_sequence_length=given["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=not given["untie_embeddings_and_output_weights"],
            position_embedding_type="rope",
            rotary_percent=given["rotary_percent"],
            rotary_base=given["rotary_base"],
            seq_len_interpolation_factor=given["rotary_seq_len_interpolation_factor"],
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron-core builds no such model: {error}") from None
    return model.eval()


def load_strictly(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Loads as training does; `UserError` names the first tensors that are missing, unexpected or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        findings = [_few_names(line.strip()) for line in str(error).splitlines()[1:]]
        raise UserError("Megatron-core does not load it: " + _few(findings, "; ")) from None


def _few_names(line: str) -> str:
    """Shortens a line of torch, such as `Missing key(s) in state_dict: "…", "…"` with all layers."""
    head, quote, names = line.rstrip(". ").partition(': "')
    return head + ": " + _few(f'"{names}'.split(", "), ", ") if quote else head


def _few(parts: list[str], separator: str) -> str:
    rest = len(parts) - _FEW
    return separator.join(parts[:_FEW]) + (f" and {rest} more" if rest > 0 else "")
