"""Optimizers by apex's names. In training MindSpeed replaces FusedAdam by its own AdamW, which is npu_apply_adam_w."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch_npu._unsupported import Unsupported


class FusedAdam(torch.optim.AdamW):
    """Adam with decoupled weight decay, with apex's defaults, which are torch's but for the weight decay: none.

    Source: apex's documentation of FusedAdam, `adam_w_mode=True`. Megatron-LM calls it with params, lr, weight_decay,
    betas and eps (megatron/core/optimizer/__init__.py); torch refuses apex's other options.
    """

    def __init__(self, params: Iterable[Any], *, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, weight_decay=weight_decay, **options)


FusedSGD = Unsupported("apex.optimizers.FusedSGD")
