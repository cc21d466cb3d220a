"""Runs MindSpeed-LLM's posttrain_gpt.py in one process of a run, and measures the memory it holds.

Run as: measure_upstream.py FOLDER posttrain_gpt.py ARGUMENTS, under torchrun; writes FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch_npu

FOLDER = Path(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path[:0] = [str(Path(sys.argv[0]).parent), str(Path(__file__).parents[1])]

from benchmarks.standin_memory import MemoryRecord, npu_operators  # noqa: E402

noted: dict[str, Any] = {"layer": 0, "loss": [0, 0], "groups": []}


class Kept:
    """Storages saved for a backward pass, each once, without weights; some are freed again, to be recomputed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights and tensor.dtype != torch.bool:  # the mask is counted separately
            self.storages[storage.data_ptr()] = storage
        return tensor


def main() -> None:
    from mindspeed_llm import megatron_adaptor  # noqa: F401  (puts MindSpeed's functions in place)

    vars(torch_npu).update(npu_operators())

    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer import transformer_layer
    from mindspeed_llm.core.models.gpt import gpt_model

    replicas, optimizers = [], []
    remember(distributed_data_parallel.DistributedDataParallel, replicas)
    remember(distrib_optimizer.DistributedOptimizer, optimizers)
    note_layers(transformer_layer.TransformerLayer)
    note_groups()
    note_loss(gpt_model)
    from mindspeed_llm.tasks.post_train.launcher import AutoTrainer

    AutoTrainer().train()
    buffers = [buffer for replica in replicas for buffer in replica.buffers]
    storages = [parameter.untyped_storage() for replica in replicas for parameter in replica.parameters()]
    noted["weights"] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    noted["gradients"] = sum(buffer.grad_data.nbytes for buffer in buffers)
    noted["buckets"] = sum(len(buffer.buckets) for buffer in buffers)
    noted["optimizer"] = sum(map(state_bytes, optimizers))
    noted["groups"] = len(set(noted["groups"]))
    (FOLDER / f"{os.environ['RANK']}.json").write_text(json.dumps(noted))


def remember(kind: Any, made: list[Any]) -> None:
    """Collects what is made of a class."""
    before = kind.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        made.append(self)

    kind.__init__ = init


def note_layers(kind: Any) -> None:
    """What a layer keeps, in a forward pass that keeps anything: under recompute, the one of the backward pass."""
    before = kind.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return before(self, *arguments, **options)
        with Kept(self) as kept:
            result = before(self, *arguments, **options)
        noted["layer"] = max(noted["layer"], kept.size)
        return result

    kind.forward = forward


def note_loss(module: Any) -> None:
    """Trained positions of a slice, and the most that output layer and loss allocate for them; of the largest one."""
    before = module.output_loss

    def loss(hidden: torch.Tensor, weight: Any, labels: torch.Tensor, positions: torch.Tensor, layer: Any) -> Any:
        with MemoryRecord() as record:
            result = before(hidden, weight, labels, positions, layer)
        noted["loss"] = max(noted["loss"], [len(positions), record.peak()])
        return result

    module.output_loss = loss


def note_groups() -> None:
    """Groups of several processes that exchange anything over the NPUs' backend: each is a communicator of HCCL."""
    from torch.distributed import ProcessGroup, get_backend

    def wrap(name: str) -> None:
        before = getattr(ProcessGroup, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.size() > 1 and get_backend(self) != "gloo":
                noted["groups"].append(id(self))
            return before(self, *arguments, **options)

        setattr(ProcessGroup, name, call)

    for name in vars(ProcessGroup):
        if name in ("allreduce", "broadcast", "allgather", "reduce", "send", "recv", "barrier", "alltoall_base") or (
            name.startswith(("_allgather_base", "_reduce_scatter_base", "reduce_scatter", "alltoall"))
        ):
            wrap(name)


def state_bytes(optimizer: Any) -> int:
    """fp32 copies of the weights, and what Adam keeps of each. Views of the model's own weights are not copies."""
    copies = [tensor for group in optimizer.shard_fp32_from_float16_groups for tensor in group]
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*copies, *moments] if isinstance(tensor, torch.Tensor))


if __name__ == "__main__":
    main()
