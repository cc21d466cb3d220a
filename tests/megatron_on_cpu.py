"""Runs the real megatron-core 0.6.0 on a machine without CUDA: a GPT model, or its indexed datasets.

Only ever in a process of its own, because the stand-ins would leak. Replaced is what needs a GPU or a compiled package:
Transformer Engine, apex's norm, CUDA's current device and random state. Everything else is Megatron-core's own code.

Run as: python tests/megatron_on_cpu.py gpt     FOLDER_WITH_MEGATRON CHECKPOINT PROMPTS RESULT
        python tests/megatron_on_cpu.py dataset FOLDER_WITH_MEGATRON PREFIX...
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import packaging.version
import torch


class RMSNorm(torch.nn.Module):
    """Root mean square norm, with the arguments and the parameter name that Megatron-core's layers expect."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises over the last dimension."""
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def stand_in(root: str) -> None:
    """Puts a folder that holds `megatron/core` first on the path, and stand-ins beside it."""
    sys.path.insert(0, root)
    # attention.py imports a name from setuptools that later versions do not have
    sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    sys.modules["pkg_resources"].packaging = packaging  # type: ignore[attr-defined]
    # Megatron-core's adapter to Transformer Engine; the local layer spec uses nothing of it but the final norm
    adapter = types.ModuleType("megatron.core.transformer.custom_layers.transformer_engine")
    unused = ("TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear", "SplitAlongDim")
    vars(adapter).update(dict.fromkeys([*unused, "get_cpu_offload_context"]), TENorm=RMSNorm)
    sys.modules[adapter.__name__] = adapter
    torch.cuda.current_device = lambda: torch.device("cpu")

    import megatron.core
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    assert Path(megatron.core.__file__).is_relative_to(root), megatron.core.__file__
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def build(args: Namespace) -> torch.nn.Module:
    """The model that a checkpoint's arguments describe, in evaluation mode, its parameters not initialised."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # As megatron/training/arguments.py has it: an argument that is no field of the configuration is ignored.
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    assert args.swiglu
    config = TransformerConfig(
        **given,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    model = GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )
    return model.eval()


@torch.no_grad()
def run_gpt(checkpoint: str, prompts: str, result: str) -> None:
    """Loads a checkpoint strictly, as training does, and computes logits in fp32.

    Args:
        checkpoint: a model_optim_rng.pt.
        prompts: a file of torch.save: for each prompt its token ids, int64 [tokens].
        result: is written: `refused`, why the checkpoint does not load; `keys` of the model; where it does load also
            `model`, what Megatron would save, and `logits`, for each prompt fp32 [tokens, vocabulary].
    """
    content = torch.load(checkpoint, map_location="cpu")
    model = build(content["args"])
    written: dict[str, Any] = {"refused": None, "keys": list(model.state_dict())}
    try:
        model.load_state_dict(content["model"], strict=True)
    except RuntimeError as error:
        written["refused"] = str(error)
    else:
        torch.save({"model": model.state_dict_for_save_checkpoint()}, result)
        written["model"] = torch.load(result)["model"]  # not the one that .float() changes
        model.float()
        written["logits"] = [logits(model, ids) for ids in torch.load(prompts)]
    torch.save(written, result)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one prompt under a causal mask (True where attention is not allowed)."""
    positions = torch.arange(len(ids))
    later = positions[None, :] > positions[:, None]
    return model(ids[None], positions[None], later[None, None])[0]


def run_datasets(*prefixes: str) -> None:
    """Reads indexed datasets; writes the rows of each to PREFIX.npy, and the dataset to PREFIX.copy.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))  # every row is a document
        np.save(prefix + ".npy", np.stack([dataset[number] for number in range(len(dataset))]))
        builder = IndexedDatasetBuilder(prefix + ".copy.bin", dtype=np.int32)
        for number in range(len(dataset)):
            builder.add_item(torch.tensor(dataset[number]))
            builder.end_document()
        builder.finalize(prefix + ".copy.idx")


if __name__ == "__main__":
    command, root, *arguments = sys.argv[1:]
    stand_in(root)
    {"gpt": run_gpt, "dataset": run_datasets}[command](*arguments)
