"""The loss of a checkpoint on the validation split, computed as in training."""

from __future__ import annotations

import numpy as np
import torch

from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.evaluate.record import checkpoint_name
from openpangu_sft.model.batches import PackedDataset
from openpangu_sft.model.device import inference_device
from openpangu_sft.model.llama import SEGMENTS, PackLoss, build_model
from openpangu_sft.model.tensors import Tensors
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import progress


def validation_loss(recipe: Recipe, tensors: Tensors, iteration: int) -> float:
    """Mean cross-entropy over all trained tokens of the validation packs, in nats.

    Every token counts the same, so the loss does not depend on how samples fall into packs. The tensors are the
    weights, by Hugging Face name.
    """
    device = inference_device(recipe)
    weights = {name: tensor.float() for name, tensor in tensors.items()}  # bf16 runs under autocast, as in training
    pack_loss = PackLoss(build_model(recipe.path("hf"), weights, SEGMENTS, device).eval())
    packs = PackedDataset(recipe.path("dataset"), recipe.data.seq_length, VALIDATION)
    total, targets = 0.0, 0
    with torch.no_grad(), progress(f"{checkpoint_name(iteration)} (packs)", len(packs)) as advance:
        for pack in range(len(packs)):
            batch = packs.batch(np.array([pack]), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
                total += pack_loss(batch).item()
            targets += len(batch.rows)
            advance(1, f"loss {total / targets:.4f}")
    return total / targets
