"""Where a model answers and is evaluated: one device, whatever engine trains."""

from __future__ import annotations

import importlib.util

import torch

from openpangu_sft.recipe.schema import Recipe


def inference_device(recipe: Recipe) -> torch.device:
    """CUDA, or an NPU where torch_npu sees one, or the CPU; `train.device=cpu` asks for the CPU.

    On an NPU it is stock transformers that runs, by torch_npu's own kernels. This has never been run on one.
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
