"""Between numpy arrays, as which checkpoints are read and written, and torch's tensors; only this imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from openpangu_sft.checkpoint.files.arrays import BF16, Array
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.checkpoint.weights import Weights, weights_of_arrays
from openpangu_sft.recipe.sections import Model

Tensors = dict[str, torch.Tensor]
Precision = Literal["fp32", "bf16"]
TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What models compute in, by the names that recipes use."""


def to_tensor(array: Array) -> torch.Tensor:
    """A copy on the CPU: nothing that the file's fate can change."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_array(tensor: torch.Tensor) -> Array:
    """A view of a tensor on the CPU."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(BF16)
    array: Array = tensor.numpy()
    return array


def tensors_in(content: Any) -> Any:
    """The content of a checkpoint file, its arrays as tensors, wherever they stand in dicts, lists and tuples."""
    if isinstance(content, np.ndarray):
        return to_tensor(content)
    if isinstance(content, dict):
        return {key: tensors_in(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(tensors_in(value) for value in content)
    return content


def tensors_of(weights: Weights, model: Model) -> Tensors:
    """All weights, by Hugging Face name."""
    return {name: to_tensor(weights.tensor(name, shape)) for name, shape in hf_shapes(model).items()}


def weights_of(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Weights of tensors on the CPU, by Hugging Face name; they share memory."""
    return weights_of_arrays({name: to_array(tensor) for name, tensor in tensors.items()})
