"""Conversion between the numpy arrays of checkpoint files and torch tensors, so that checkpoint/ needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional

import numpy as np
import torch

from openpangu_sft.checkpoint.files.arrays import BF16, Array
from openpangu_sft.checkpoint.sharding import hf_shapes, whole
from openpangu_sft.checkpoint.weights import Weights, weights_of_arrays
from openpangu_sft.recipe.lora import Adapter
from openpangu_sft.recipe.sections import Model

Tensors = dict[str, torch.Tensor]
Precision = Literal["fp32", "bf16"]
TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precisions of computation, by the names that recipes use."""


def as_tensor(array: Array) -> torch.Tensor:
    """A view of an array as a tensor."""
    if array.dtype == BF16:  # ml_dtypes' has the bits of torch's, which does not know it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_tensor(array: Array) -> torch.Tensor:
    """A copy on the CPU, independent of the file that the array is mapped from."""
    return as_tensor(np.array(array))


def to_array(tensor: torch.Tensor) -> Array:
    """A view of a tensor that is on the CPU."""
    reduced = tensor.dtype == torch.bfloat16
    array: Array = (tensor.detach().contiguous().view(torch.int16) if reduced else tensor.detach()).numpy()
    return array.view(BF16) if reduced else array


def tensors_in(content: Any) -> Any:
    """The content of a checkpoint file, with copies of its arrays as tensors, in dicts, lists and tuples too."""
    if isinstance(content, np.ndarray):
        return to_tensor(content)
    if isinstance(content, dict):
        return {key: tensors_in(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(tensors_in(value) for value in content)
    return content


def tensors_of(weights: Weights, model: Model) -> Tensors:
    """All weights, and adapters if there are any, by Hugging Face name."""
    shapes = hf_shapes(model, weights.adapter)
    return {name: to_tensor(weights.read(whole(name, shape))) for name, shape in shapes.items()}


def weights_of(tensors: Mapping[str, torch.Tensor], adapter: Optional[Adapter] = None) -> Weights:
    """Weights of tensors on the CPU, by Hugging Face name; they share memory."""
    return weights_of_arrays({name: to_array(tensor) for name, tensor in tensors.items()}, adapter=adapter)
