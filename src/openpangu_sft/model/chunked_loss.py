"""The output layer and its cross-entropy at trained positions, a chunk of logits at a time; both engines use it.

Logits of a whole slice are vocabulary x tokens, three times: in the model's dtype, in fp32 and as their softmax. Here
they exist for CHUNK positions. A chunk's gradients are computed while its logits exist, in the forward pass, so nothing
of them is kept for the backward pass. The idea is Liger-Kernel's (fused linear cross-entropy).
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch.nn import functional

CHUNK = 2048
"""Positions whose logits exist at once: with 153,376 tokens of vocabulary, 10 bytes each, 2.9 GiB."""

Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits in fp32 [rows, columns] and targets [rows] to losses [rows]."""


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, over a whole vocabulary."""
    return functional.cross_entropy(logits, targets, reduction="none")


def loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: Losses = token_losses
) -> torch.Tensor:
    """The sum of the losses at trained positions: fp32, a scalar.

    Args:
        hidden: [rows, hidden_size], one row per trained position; its dtype is that of the products.
        weight: of the output layer, [columns, hidden_size]: the vocabulary, or this rank's part of it.
        targets: int64 [rows].
        losses: computes the losses of a chunk; over a part of the vocabulary, together with the other ranks.
    """
    if not torch.is_grad_enabled():  # inside of a Function that cannot be seen
        hidden, weight = hidden.detach(), weight.detach()
    total: torch.Tensor = _LossSum.apply(hidden, weight, targets, losses)  # type: ignore[no-untyped-call]
    return total


class _LossSum(torch.autograd.Function):
    """Computes the sum and its gradients; what the sum is divided by scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: Losses
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad)  # not in an evaluation
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        columns = weight.to(hidden.dtype)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed in fp32: in bf16, terms of later chunks would be rounded away.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in map(slice, range(0, len(targets), CHUNK), range(CHUNK, len(targets) + CHUNK, CHUNK)):
            logits = torch.matmul(hidden[rows], columns.t()).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                chunk = losses(logits.float(), targets[rows])
            total += chunk.detach().sum()
            if not wanted:
                continue
            (gradient,) = torch.autograd.grad(chunk, logits, torch.ones_like(chunk))
            del logits, chunk
            if for_hidden is not None:
                torch.matmul(gradient, columns, out=for_hidden[rows])
            if for_weight is not None:
                for_weight += torch.matmul(gradient.t(), hidden[rows])
            del gradient  # not kept beside the next chunk's logits
        ctx.save_for_backward(for_hidden, for_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        for_hidden, for_weight = ctx.saved_tensors
        if for_hidden is not None:  # multiplied in fp32: rounded to bf16, the scale would be off by up to 0.4 %
            for_hidden = (for_hidden.float() * scales[0]).to(for_hidden.dtype)
        if for_weight is not None:
            for_weight = for_weight.mul_(scales[0]).to(ctx.dtype)
        return for_hidden, for_weight, None, None
