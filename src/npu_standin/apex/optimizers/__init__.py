"""Optimizers by apex's names. In training MindSpeed replaces FusedAdam by its own AdamW, which is npu_apply_adam_w."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.AdamW):
    """Adam with decoupled weight decay, with apex's defaults, which are not torch's: no weight decay unless asked for.

    Source: apex's documentation of FusedAdam, `adam_w_mode=True`. Megatron-LM calls it with params, lr, weight_decay,
    betas and eps (megatron/core/optimizer/__init__.py).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not bias_correction or not adam_w_mode or amsgrad:
            raise NotImplementedError("FusedAdam without bias_correction, without adam_w_mode, or with amsgrad")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class FusedSGD:
    """Only to be imported, as Megatron-LM does."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("FusedSGD is not in the stand-in for apex: openPangu is trained with Adam")
