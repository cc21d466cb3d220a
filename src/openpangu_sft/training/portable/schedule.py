"""Learning rate and weight decay, as Megatron-LM core_r0.6.0 computes them."""

from __future__ import annotations

import math
from typing import Any

import torch

from openpangu_sft.recipe.sections import Train


def learning_rate(train: Train, iteration: int) -> float:
    """The learning rate of an iteration (from 1).

    Linear warm-up from 0, then train.lr_decay_style (OptimizerParamScheduler.get_lr). Megatron steps the schedule after
    the optimizer: the first iteration of a warm-up runs at 0. WSD is that of later versions, linear: in core_r0.6.0
    it is a patch.
    """
    done, warmup, total = iteration - 1, train.warmup, train.iterations
    if warmup and done <= warmup:
        return train.lr * done / warmup
    if train.lr_decay_style == "constant":
        return train.lr
    if done > total:
        return train.min_lr
    progress = (done - warmup) / (total - warmup)
    share = {
        "cosine": 0.5 * (math.cos(math.pi * progress) + 1.0),
        "linear": 1.0 - progress,
        "WSD": min(1.0, (total - done) / (train.lr_wsd_decay_ratio * total)),
    }
    return train.min_lr + (train.lr - train.min_lr) * share[train.lr_decay_style]


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters: weight decay for matrices, none for biases and norms.

    As megatron/core/optimizer/__init__.py, _get_param_groups.
    """
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if name.endswith(".bias") or parameter.dim() == 1 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
