"""The device for chat and evaluation, whatever engine trains."""

from __future__ import annotations

import importlib.util

import torch

from openpangu_sft.recipe.schema import Recipe


def inference_device(recipe: Recipe) -> torch.device:
    """CUDA, or an NPU where torch_npu sees one, or the CPU; `train.device=cpu` selects the CPU.

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
