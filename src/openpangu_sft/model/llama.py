"""The model of stock transformers, with attention that never crosses from one segment of a pack into the next."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface, no_init_weights

from openpangu_sft.model.batches import Batch, PackedDataset
from openpangu_sft.model.chunked_loss import loss_sum
from openpangu_sft.model.layers import segment_attention, use_segments
from openpangu_sft.model.tensors import Tensors
from openpangu_sft.recipe.model_config import llama_config, read_config
from openpangu_sft.recipe.schema import Recipe

SEGMENTS = "segments"

AttentionInterface.register(SEGMENTS, segment_attention)  # known to transformers, which makes no mask for it


def inference_device(recipe: Recipe) -> torch.device:
    """The device for chat and evaluation, whatever engine trains: CUDA, or an NPU where torch_npu sees one, or the CPU;
    `train.device=cpu` selects the CPU.

    On an NPU stock transformers runs on torch_npu's kernels. This has never been run on one.
    """
    if recipe.train.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if recipe.train.engine == "mindspeed" and importlib.util.find_spec("torch_npu"):
        import torch_npu

        if torch_npu.npu.is_available():
            return torch.device("npu")
    return torch.device("cpu")


def build_model(config_directory: Path, tensors: Tensors, attention: str, device: torch.device) -> LlamaForCausalLM:
    """A model with given weights on a device.

    Args:
        config_directory: contains config.json, in openPangu's own form or Llama's.
        tensors: by Hugging Face name, without lm_head.weight where embeddings are tied. Their dtype is kept.
        attention: "segments" for packs, in fp32; "eager" for generation ("sdpa" requires torch 2.1.1).
    """
    config = LlamaConfig(**{**llama_config(read_config(config_directory)), "attn_implementation": attention})
    with no_init_weights():
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    if attention == SEGMENTS:
        use_segments(model.model)
    torch.nn.Module.to(model, device)
    return model


def tensors_of_model(model: LlamaForCausalLM, dtype: torch.dtype, trained_only: bool = False) -> Tensors:
    """The weights by Hugging Face name, cast and on the CPU; shared ones once, under their first name."""
    named = model.named_parameters()
    return {name: each.detach().to("cpu", dtype) for name, each in named if each.requires_grad or not trained_only}


@torch.no_grad()
def pack_losses(
    model: LlamaForCausalLM, dataset: PackedDataset, packs: Iterable[int], device: torch.device, bf16: bool
) -> Iterator[tuple[float, int]]:
    """Of each pack the sum of the cross-entropy over its trained tokens, in nats, and their number.

    `bf16`: under autocast, as in training.
    """
    pack_loss = PackLoss(model.eval())
    for pack in packs:
        batch = dataset.batch(np.array([pack]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = pack_loss(batch).item()
        yield loss, len(batch.rows)


class PackLoss(torch.nn.Module):
    """Sum of the cross-entropy over the trained tokens of a micro batch."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum, a scalar in fp32."""
        hidden = self.model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            rows=batch.rows,
            use_cache=False,
        ).last_hidden_state
        if torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled():
            hidden = hidden.bfloat16()
        return loss_sum(hidden, self.model.lm_head.weight, batch.targets)
