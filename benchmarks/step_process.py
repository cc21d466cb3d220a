"""Runs MindSpeed-LLM's posttrain_gpt.py in one process of a run, and notes what an iteration costs.

The first iteration warms up. The others are timed; or, as counting takes time of its own, the second is counted (FLOPs,
bytes sent) and the third has its memory recorded.

Run as: step_process.py FOLDER timed|counted posttrain_gpt.py ARGUMENTS, under torchrun; writes FOLDER/<rank>.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable

import torch
import torch_npu
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

from benchmarks.standin_memory import INSIDE, MemoryRecord, npu_operators
from benchmarks.step_formula import SCALE
from openpangu_sft.model import chunked_loss
from openpangu_sft.plan.mindspeed_memory import MASK

FULL_TENSOR = {
    "allreduce": ("all-reduce", 0, 2),
    "allgather": ("all-gather", 0, 1),
    "_allgather_base": ("all-gather", 0, 1),
    "reduce_scatter": ("reduce-scatter", 1, 1),
    "_reduce_scatter_base": ("reduce-scatter", 1, 1),
    "alltoall_base": ("all-to-all", 1, 1),
    "broadcast": ("broadcast", 0, 1),
}
"""Methods of ProcessGroup: kind, which argument is the full tensor, and how often each of n devices has to send
(n - 1) / n of it, whatever the algorithm."""
UNCOUNTED = ("alltoall", "gather", "recv", "reduce", "scatter", "send")

IN_PLACE = {torch.ops.aten.addmm_: addmm_flop, torch.ops.aten.baddbmm_: baddbmm_flop}
"""Products that torch 2.1's counter does not know."""


class Iterations:
    """Wraps upstream's train_step, and notes each iteration by its number."""

    def __init__(self, mode: str, train_step: Callable[..., Any]) -> None:
        self.mode, self.train_step, self.done = mode, train_step, 0
        self.noted: dict[str, Any] = {"losses": [], "gradient_norms": [], "seconds": []}
        self.sent: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def __call__(self, *arguments: Any) -> Any:
        self.done += 1
        mode = "warm-up" if self.done == 1 else self.mode
        if mode == "counted":
            step = {2: self._count, 3: self._record_memory}[self.done]
        else:
            step = self._time if mode == "timed" else self.train_step
        result = step(*arguments)
        self.noted["losses"].append(float(result[0]["lm loss"]))
        self.noted["gradient_norms"].append(float(result[2]))
        return result

    def _time(self, *arguments: Any) -> Any:
        """Processor seconds of this process, all its threads together."""
        before = os.times()
        result = self.train_step(*arguments)
        after = os.times()
        self.noted["seconds"].append(after.user + after.system - before.user - before.system)
        return result

    def _count(self, *arguments: Any) -> Any:
        self.sent.clear()
        self.unknown.clear()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            result = self.train_step(*arguments)
        if self.unknown:
            raise NotImplementedError(f"what {', '.join(sorted(self.unknown))} of a process group sends is not counted")
        self.noted["flops"], self.noted["sent"] = counter.get_total_flops(), dict(self.sent)
        return result

    def _record_memory(self, *arguments: Any) -> Any:
        kept = npu_operators()
        before = {name: getattr(torch_npu, name) for name in kept}
        vars(torch_npu).update(kept)
        held = held_bytes()
        with MemoryRecord() as record:
            result = self.train_step(*arguments)
        vars(torch_npu).update(before)
        self.noted["held"], self.noted["peak"] = held, held + record.peak(without=MASK)
        return result

    def count_collectives(self) -> None:
        """Counts what every call of a process group sends."""
        from torch.distributed import ProcessGroup

        def wrap(name: str, kind: str, which: int, times: int) -> None:
            before = getattr(ProcessGroup, name)

            def call(group: Any, *arguments: Any, **options: Any) -> Any:
                size = sum(tensor.nbytes for tensor in tensors_in(arguments[which]))
                self.sent[kind] += times * size * (group.size() - 1) // group.size()
                with record_function(INSIDE):
                    return before(group, *arguments, **options)

            setattr(ProcessGroup, name, call)

        def note(name: str) -> None:
            before = getattr(ProcessGroup, name)

            def call(group: Any, *arguments: Any, **options: Any) -> Any:
                self.unknown.add(name)
                return before(group, *arguments, **options)

            setattr(ProcessGroup, name, call)

        for name, how in FULL_TENSOR.items():
            wrap(name, *how)
        for name in UNCOUNTED:
            note(name)


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """A tensor, or all in nested lists."""
    return [value] if isinstance(value, torch.Tensor) else [one for part in value for one in tensors_in(part)]


def held_bytes() -> int:
    """Bytes of all tensors between iterations, each storage once, without the layers' attention masks."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in storages.values() if size != MASK)


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    chunked_loss.CHUNK //= SCALE  # as all sizes of the small model

    from mindspeed_llm import megatron_adaptor  # noqa: F401  (puts MindSpeed's functions in place)
    from mindspeed_llm.training import training

    iterations = Iterations(mode, training.train_step)
    training.train_step = iterations
    iterations.count_collectives()
    from mindspeed_llm.tasks.post_train.launcher import AutoTrainer

    AutoTrainer().train()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(iterations.noted), "utf-8")


if __name__ == "__main__":
    main()
