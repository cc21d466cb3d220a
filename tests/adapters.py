"""LoRA adapters that stock peft makes and saves, merged by hand, and stock peft's model of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from checkpoint_files import Tensors, read_hf
from openpangu_sft.model.llama import build_model
from openpangu_sft.recipe.schema import Recipe

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
CPU = torch.device("cpu")


def base_model(recipe: Recipe) -> LlamaForCausalLM:
    """Stock transformers' model of paths.hf, in fp32."""
    tensors = {name: tensor.float() for name, tensor in read_hf(recipe.path("hf"), recipe.model).items()}
    return build_model(recipe.path("hf"), tensors, "eager", CPU)


def save_adapter(
    recipe: Recipe,
    directory: Path,
    targets: list[str] = ALL,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    rank: int = 4,
) -> Path:
    """An adapter as PEFT's save_pretrained leaves it, random; `shared`: with one A for q, k, v, and for gate, up."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=6, target_modules=targets)
    model = get_peft_model(base_model(recipe), config)
    generator = torch.Generator().manual_seed(len(targets) + rank)
    state = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    for name, value in state.items():
        value.copy_(torch.randn(value.shape, generator=generator) / 16)  # B A is like the weights in size
        kind = name.split(".")[-4]
        if shared and ".lora_A." in name and kind in FIRST:
            value.copy_(state[name.replace(kind, FIRST[kind])])
    model.to(dtype).save_pretrained(str(directory), safe_serialization=True)
    return directory


def merged_by_hand(base: Tensors, adapter: Path, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Tensors:
    """W + alpha / rank * B A in extended precision, rounded to fp32, then to a dtype; other tensors in that dtype."""
    parts = load_file(str(adapter / FILE))
    merged = {}
    for name, weight in base.items():
        a, b = (parts.get(PREFIX + name.replace("weight", f"lora_{part}.weight")) for part in "AB")
        if a is not None and b is not None:
            wide, left, right = (tensor.float().numpy().astype(np.longdouble) for tensor in (weight, b, a))
            product = wide + np.longdouble(scale) * (left @ right)
            weight = torch.from_numpy(product.astype(np.float32))
        merged[name] = weight.to(dtype)
    return merged


def peft_model(base: LlamaForCausalLM, adapter: Path) -> PeftModel:
    """Stock peft's model, in fp32."""
    return PeftModel.from_pretrained(base, str(adapter)).float().eval()
