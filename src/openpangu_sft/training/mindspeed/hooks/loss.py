"""The loss of fine-tuning in MindSpeed-LLM: at trained positions only, and weighted by tokens over the global batch.

Upstream divides the loss of each micro batch by its own trained tokens. With `train.loss: token` the gradients of sums
are accumulated, and divided by the trained tokens of the global batch once, after they have been reduced; as
--calculate-per-token-loss does in later versions of Megatron-LM.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from megatron.core import mpu, tensor_parallel
from megatron.training import get_args, get_num_microbatches
from torch import distributed
from torch.nn import functional

from openpangu_sft.model.chunked_loss import loss_sum
from openpangu_sft.tokenizer.tokenizer import IGNORED

SECONDS_BETWEEN_LINES = 2.0

Logged = tuple[torch.Tensor, dict[str, torch.Tensor]]

_sums: list[torch.Tensor] = []
"""Of each micro batch of this iteration, fp32 [2]: the sum of losses of this rank's slice, and its trained tokens."""
_logged: list[torch.Tensor] = []
"""What upstream averages over micro batches and logs; filled when the whole batch is known."""
_evaluated: Optional[list[torch.Tensor]] = None
"""As _sums, of an evaluation of ours."""


def report(**values: Any) -> None:
    """Prints values on a line that training/mindspeed/log.py reads; the last process does, as it prints iterations."""
    if distributed.get_rank() == distributed.get_world_size() - 1:
        print(f"openpangu-sft reports {json.dumps(values)}", flush=True)


class _Progress:
    """Reports how many micro batches of a slow iteration are done."""

    def __init__(self) -> None:
        self.done, self.printed = 0, time.monotonic()

    def report(self) -> None:
        """Called after the forward pass of each micro batch."""
        size, now = get_num_microbatches(), time.monotonic()
        self.done = self.done % size + 1
        if now - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = now
            report(micro_batches=[self.done, size])


_progress = _Progress()


def trained_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where labels, int64 [micro_batch, slice], are not -100, in the order of the hidden states: int64 [positions].

    Called before the layers: counting waits for the device, as upstream's get_batch does as well.
    """
    return (labels.t().reshape(-1) != IGNORED).nonzero().squeeze(1)


def output_loss(
    hidden: torch.Tensor, weight: Optional[torch.Tensor], labels: torch.Tensor, positions: torch.Tensor, layer: Any
) -> torch.Tensor:
    """The sum of the losses of a slice, in the place of the output layer and its cross-entropy: a scalar in fp32.

    Hidden states are [slice, micro_batch, hidden_size], with sequence parallelism this rank's part of the slice; labels
    int64 [micro_batch, slice]; positions from `trained_positions`. The layer is a ColumnParallelLinear, its weight
    [rows of this rank, hidden_size], or None where it has its own.
    """
    # Each rank has the gradient from its part of the vocabulary; the backward pass adds them up.
    spread = tensor_parallel.copy_to_tensor_model_parallel_region
    if layer.sequence_parallel:
        spread = tensor_parallel.gather_from_sequence_parallel_region
    # F.embedding takes rows: the gradient of index_select, index_copy_ of op-plugin 6.0.rc3, waits for every index.
    rows = functional.embedding(positions, spread(hidden).flatten(0, 1))
    targets = labels.t().reshape(-1)[positions]
    columns = layer.weight if weight is None else weight
    return loss_sum(rows, columns, targets, tensor_parallel.vocab_parallel_cross_entropy)


def micro_batch_loss(loss: torch.Tensor, mask: torch.Tensor) -> Logged:
    """What the schedule takes the gradient of, and what it logs.

    `loss` is from `output_loss`; the mask, int64 [micro_batch, slice], is 1 where there is a target.
    """
    sums = torch.stack([loss.detach(), mask.sum().float()])
    trains = torch.is_grad_enabled()
    if not trains and _evaluated is not None:
        _evaluated.append(sums)
        return loss, {}
    if trains:
        _progress.report()
    if trains and get_args().calculate_per_token_loss:
        logged = torch.zeros_like(sums[0])
        _sums.append(sums)
        _logged.append(logged)
        return loss * get_num_microbatches(), {"lm loss": logged}  # the schedule divides by that number
    context = mpu.get_context_parallel_world_size()
    if context > 1:
        distributed.all_reduce(sums, group=mpu.get_context_parallel_group())
    mean = sums[0] / sums[1]
    _require_number(mean)
    distributed.all_reduce(mean, group=mpu.get_data_parallel_group())
    return loss * context / sums[1], {"lm loss": mean / mpu.get_data_parallel_world_size()}


@contextlib.contextmanager
def evaluation() -> Iterator[list[torch.Tensor]]:
    """Inside, evaluated micro batches are collected: the sum of the losses and the number of targets of each, [2].

    Outside, upstream's own evaluation (--eval-iters) gets means.
    """
    global _evaluated
    _evaluated = []
    try:
        yield _evaluated
    finally:
        _evaluated = None


def weighing_tokens(finalize: Callable[[Any], None]) -> Callable[[Any], None]:
    """Megatron's finalize_model_grads, followed by the division by the trained tokens of the global batch."""

    def finalize_and_divide(model: Sequence[Any]) -> None:
        finalize(model)
        if not get_args().calculate_per_token_loss:
            return
        replicas = mpu.get_data_parallel_group(with_context_parallel=True)
        sums = torch.stack(_sums).sum(0) if _sums else torch.zeros(2, device="cuda")
        distributed.all_reduce(sums, group=replicas)
        if mpu.get_pipeline_model_parallel_world_size() > 1:  # only the last stage has losses
            last, group = mpu.get_pipeline_model_parallel_last_rank(), mpu.get_pipeline_model_parallel_group()
            distributed.broadcast(sums, last, group=group)
        mean = sums[0] / sums[1]
        _require_number(mean)
        for logged in _logged:
            logged.copy_(mean)
        _sums.clear()
        _logged.clear()
        scale = distributed.get_world_size(replicas) / sums[1]  # the reduction has divided by their number
        for chunk in model:
            for buffer in chunk.buffers:
                buffer.grad_data.mul_(scale)

    return finalize_and_divide


def _require_number(loss: torch.Tensor) -> None:
    """Raises ValueError for a loss that is not a number; upstream's check, which waits for the device."""
    if get_args().check_for_nan_in_loss_and_grad and loss.isnan():
        raise ValueError(f"rank {distributed.get_rank()}: found NaN in the loss")
