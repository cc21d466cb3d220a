"""What upstream's processes report after an iteration: device memory once, and the loss on the validation split.

Upstream's own evaluation would take whole global batches of packs at random,
and average the means of micro batches: another number than that of `make evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args, get_timers
from torch import distributed

from openpangu_sft.dataset.index_file import FIELDS, VALIDATION, field_path, read_rows
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.training.mindspeed.flags import NEVER
from openpangu_sft.training.mindspeed.hooks.loss import evaluation, report
from openpangu_sft.training.mindspeed.hooks.segments import positions
from openpangu_sft.training.run.metrics import MEASURED_AFTER, measure


def after_iteration(
    iteration: int, model: Sequence[Any], optimizer: Any, forward_step: Callable[..., Any], config: Any
) -> None:
    """To be called by all processes after each iteration, before upstream logs it."""
    args = get_args()
    if iteration - args.iteration == MEASURED_AFTER:
        report(memory=measure().model_dump())
    last = iteration == args.train_iters and args.eval_interval < NEVER
    # always there with make sft, which has checked it; perhaps not where upstream is run by hand
    validation = field_path(Path(args.data_path[0]).parent, VALIDATION, "labels", "bin")
    if (iteration % args.eval_interval == 0 or last) and validation.is_file():
        timers = get_timers()
        timers("interval-time").stop()
        gathers = args.use_distributed_optimizer and args.overlap_param_gather
        if gathers:
            optimizer.disable_pre_hook()
        report(validation=_validation_loss(model, forward_step, config))
        if gathers:
            optimizer.enable_pre_hook()
        timers("interval-time").start(barrier=True)


@torch.no_grad()
def _validation_loss(model: Sequence[Any], forward_step: Callable[..., Any], config: Any) -> float:
    """Mean cross-entropy over all trained tokens of the validation packs, in nats; on the last pipeline stage."""
    args = get_args()
    fields = {name: read_rows(Path(args.data_path[0]).parent, VALIDATION, name, args.seq_length) for name in FIELDS}
    packs, replicas = len(fields["labels"]), mpu.get_data_parallel_world_size()
    micro_batches = -(-packs // (args.micro_batch_size * replicas))  # of each replica
    first = mpu.get_data_parallel_rank() * micro_batches * args.micro_batch_size

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for begin in range(first, first + micro_batches * args.micro_batch_size, args.micro_batch_size):
            wanted = np.arange(begin, begin + args.micro_batch_size)
            rows = {name: values[wanted % packs].astype(np.int64) for name, values in fields.items()}
            rows["labels"][wanted >= packs] = IGNORED  # fill the last micro batches
            rows["position_ids"] = np.stack([positions(row) for row in rows["attention_mask"]])
            yield {name: torch.from_numpy(values) for name, values in rows.items()}

    for chunk in model:
        chunk.eval()
    timers, config.timers = config.timers, None
    with evaluation() as found:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(),
            model=model,
            num_microbatches=micro_batches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=True,
        )
    config.timers = timers
    for chunk in model:
        chunk.train()
    sums = sum(found, torch.zeros(2, device="cuda"))
    distributed.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return float(sums[0] / sums[1])
