"""LoRA in the transformers engine: frozen weights, and trained adapters beside them.

peft's own layer (0.7.1) casts its result to its input's dtype: under autocast, after an fp32 norm, that is fp32
instead of bf16, in twice the memory, and the losses are not those of full fine-tuning. Hence the few lines here.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from openpangu_sft.checkpoint.lora import FIRST_OF
from openpangu_sft.checkpoint.sharding import part_name
from openpangu_sft.model.llama import SEGMENTS, build_model
from openpangu_sft.model.tensors import TORCH_DTYPES, Tensors
from openpangu_sft.recipe.schema import Recipe


class LoraLinear(torch.nn.Linear):
    """A linear layer with an adapter: W x + b + alpha / rank * B A x."""

    lora_A: torch.nn.Linear
    lora_B: torch.nn.Linear
    scale: float

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., out features]."""
        return super().forward(hidden).add_(self.lora_B(self.lora_A(hidden)), alpha=self.scale)


def build_lora(recipe: Recipe, tensors: Tensors, device: torch.device) -> LlamaForCausalLM:
    """The model for packs, with adapters in fp32 as its only trainable parameters.

    In bf16 runs frozen matrices are held in bf16: autocast would cast them at every use. `tensors` are weights and
    adapters, by Hugging Face name and `sharding.part_name`.
    """
    adapter = recipe.train.lora.adapter
    assert adapter
    reduced = TORCH_DTYPES[recipe.train.precision]
    frozen, parts = {}, {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            outputs, inputs = tensor.shape
            parts[name] = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
            parts[name].weight = torch.nn.Parameter(tensor.float().to(device))
        else:
            frozen[name] = tensor.to(reduced if "_proj." in name or name == "lm_head.weight" else torch.float32)
    model = build_model(recipe.path("hf"), frozen, SEGMENTS, device).requires_grad_(False)
    for name, module in list(model.named_modules()):
        above, _, projection = name.rpartition(".")
        if projection in adapter.targets:
            module.__class__ = LoraLinear
            module.lora_A = parts[part_name(f"{above}.{FIRST_OF[projection]}.weight", "A")]
            module.lora_B = parts[part_name(f"{name}.weight", "B")]
            module.scale = adapter.alpha / adapter.rank
    return model
