"""The portable SFT engine: Hugging Face's model, Megatron's schedule and data order, on CPU or CUDA.

One process, or several as data-parallel replicas under torchrun.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.mcore import iteration_directory
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.model.batches import Batch, PackedDataset, micro_batches, training_order
from openpangu_sft.model.llama import SEGMENTS, PackLoss, build_model, pack_losses
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.portable.lora import build_lora
from openpangu_sft.training.portable.schedule import learning_rate, parameter_groups
from openpangu_sft.training.portable.state import load_engine_state, newest_checkpoint, save
from openpangu_sft.training.run import metrics
from openpangu_sft.training.run.launch import AT_ONCE, worker_rank
from openpangu_sft.training.run.provenance import record_start
from openpangu_sft.training.run.retention import nothing_to_do, prune, stops_early
from openpangu_sft.training.run.trackers import tracked
from openpangu_sft.util.console import progress, say
from openpangu_sft.util.errors import Interrupted, UserError
from openpangu_sft.util.signals import end_with_parent, on_signals


def train(recipe: Recipe, manifest: Manifest, command_line: Sequence[str], planned: int = 0) -> None:
    """Trains from the newest checkpoint of the run, or else the converted one, to train.iterations; see `run_sft`.

    Raises `UserError` where the loss is not finite, or the device does not exist or is full; `Interrupted` where
    SIGINT or SIGTERM arrived and the run can be resumed.
    """
    device, received = _device(recipe), list[int]()
    with _failures_named(received):
        if worker_rank() is not None:
            end_with_parent()  # torchrun's agent may be killed
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
            distributed.barrier()  # the first process has prepared the run's directory
        _Training(recipe, manifest, device, planned, received).run(command_line)


class _Training:
    """State of one process of a run."""

    def __init__(
        self, recipe: Recipe, manifest: Manifest, device: torch.device, planned: int, received: list[int]
    ) -> None:
        self.recipe, self.manifest, self.device, self.planned = recipe, manifest, device, planned
        self.received, self.step = received, metrics.Step()
        self.directory = recipe.path("run")
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.manual_seed(recipe.train.seed)
        self.iteration = newest_checkpoint(self.directory, is_main=self.rank == 0)
        state = load_engine_state(iteration_directory(self.directory, self.iteration)) if self.iteration else {}
        self.model = _model(recipe, state, device).train()
        settings, recompute = recipe.train, recipe.train.recompute
        recomputed = recompute.num_layers if recompute.granularity == "full" else 0
        for layer in self.model.model.layers[:recomputed]:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        groups, betas = parameter_groups(self.model, settings.weight_decay), (settings.adam_beta1, settings.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.pack_loss: torch.nn.Module = PackLoss(self.model)
        if distributed.is_initialized():
            frozen = [name for name, each in self.pack_loss.named_parameters() if not each.requires_grad]
            # These are the same in all processes; gloo could not even send bf16.
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.pack_loss, frozen)  # type: ignore[no-untyped-call]
            self.pack_loss = DistributedDataParallel(self.pack_loss)
        self.dataset = PackedDataset(recipe.path("dataset"), recipe.data.seq_length)
        self.reader = ThreadPoolExecutor(1)
        self.losses = metrics.validation_losses(self.directory, self.iteration)
        self.order = training_order(len(self.dataset), settings.iterations * settings.global_batch_size, settings.seed)

    def run(self, command_line: Sequence[str]) -> None:
        last, self.begun = self.recipe.train.iterations, self.iteration
        if words := nothing_to_do(self.recipe, self.iteration):
            if self.rank == 0:
                say(words)
            return
        if self.rank == 0:
            record_start(self.recipe, self.manifest, self.iteration, command_line)
            metrics.keep_until(self.directory, self.iteration)
            if self.iteration:
                say(f"resuming after iteration {self.iteration}")
        note, enough, interval = "", "", self.recipe.train.eval_interval
        with self._tracked() as track, on_signals(self._stop), self._progress() as advance:  # swanlab takes SIGINT
            while self.iteration < last:
                self.step.begin(note)
                row = self._step(advance)
                if interval and (self.iteration % interval == 0 or self.iteration == last):
                    row.validation = self.losses[self.iteration] = self._validate(advance)
                if self.rank == 0:
                    if row.validation is not None:
                        metrics.show_validation(self.losses)
                    metrics.append(self.directory, row)
                track(row)
                advance(1, note := str(row))
                stop, enough = self._any_process(self.received), stops_early(self.recipe, self.losses)
                if stop or enough or self.iteration % self.recipe.train.save_interval == 0 or self.iteration == last:
                    self._save(row.loss)
                if stop:
                    state = f"after iteration {self.iteration}, which is saved: run make sft again to resume"
                    raise Interrupted(stop, state)
                if enough:
                    break
        if enough and self.rank == 0:
            say(enough)

    def _stop(self, number: int) -> None:
        """A signal: the first one stops after this iteration, a second one within a micro batch."""
        self.received.append(number)
        if len(self.received) > 1:
            raise Interrupted(number, AT_ONCE)
        if self.rank == 0:
            say(self.step.stopping())

    def _step(self, advance: Callable[[int, str], None]) -> metrics.Row:
        """One iteration."""
        settings = self.recipe.train
        self.iteration += 1
        rate = learning_rate(settings, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sizes, replicas = (settings.global_batch_size, settings.micro_batch_size), self.recipe.parallel.data
        batches = micro_batches(self.order, self.iteration, *sizes, self.rank, replicas)
        everything = self.order[(self.iteration - 1) * sizes[0] : self.iteration * sizes[0]]
        trained = self.dataset.trained_tokens(everything) if settings.loss == "token" else 0
        total, tokens, bf16 = torch.zeros((), device=self.device), 0, settings.precision == "bf16"
        for number, (packs, batch) in enumerate(zip(batches, self._read(batches)), 1):
            tokens += batch.input_ids.numel() * replicas
            divisor = trained or self.dataset.trained_tokens(packs) * len(batches) * replicas
            waits = isinstance(self.pack_loss, DistributedDataParallel) and number < len(batches)
            with self.pack_loss.no_sync() if waits else contextlib.nullcontext():  # gradients are averaged once
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = self.pack_loss(batch) / divisor
                (loss * replicas).backward()  # DistributedDataParallel averages
            total += loss.detach()
            advance(0, self.step.update(number, len(batches)))
        if distributed.is_initialized():
            distributed.all_reduce(total)
        mean = total.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad).item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            what = f"loss {mean}, gradient norm {norm} at iteration {self.iteration}"
            raise UserError(what, where=self.directory, remedy="lower train.lr, or look at the packs of this iteration")
        self.optimizer.step()
        seconds = time.monotonic() - self.step.began
        row = metrics.Row(iteration=self.iteration, loss=mean, lr=rate, grad_norm=norm, tokens=tokens, seconds=seconds)
        if self.device.type == "cuda" and self.iteration == self.begun + metrics.MEASURED_AFTER:
            row.memory = metrics.measure()
        if self.rank == 0 and row.memory:
            row.memory.show(self.planned)
        return row

    def _validate(self, advance: Callable[[int, str], None]) -> float:
        """Loss on the validation split, as make evaluate computes it; each process takes a share of its packs."""
        packs = PackedDataset(self.recipe.path("dataset"), self.recipe.data.seq_length, VALIDATION)
        sums, mine = torch.zeros(2, dtype=torch.float64), range(self.rank, len(packs), self.recipe.parallel.data)
        bf16 = self.recipe.train.precision == "bf16"
        for done, found in enumerate(pack_losses(self.model, packs, mine, self.device, bf16), 1):
            sums += torch.tensor(found, dtype=torch.float64)
            advance(0, f"validation {done}/{len(mine)} packs")
        self.model.train()
        sums = sums.to(self.device)
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            what = f"validation loss {loss} after iteration {self.iteration}"
            raise UserError(what, where=self.directory, remedy="lower train.lr (RESUME=changed): it was not saved")
        return loss

    def _read(self, batches: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        """Micro batches; each is read while the one before it is computed."""
        reads = (self.reader.submit(self.dataset.batch, packs, self.device) for packs in batches)
        ahead = next(reads)
        for following in reads:
            yield ahead.result()
            ahead = following
        yield ahead.result()

    def _save(self, loss: float) -> None:
        train = self.recipe.train
        if self.rank == 0:
            save(self.recipe, self.manifest, self.model, self.optimizer, self.iteration, loss)
            prune(self.directory, train.keep_checkpoints, self.iteration, train.keep_best)
            metrics.draw_curve(self.directory)
        if distributed.is_initialized():
            distributed.barrier()

    def _tracked(self) -> contextlib.AbstractContextManager[Callable[[metrics.Row], None]]:
        return contextlib.nullcontext(lambda row: None) if self.rank else tracked(self.recipe, self.iteration)

    def _progress(self) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
        if self.rank == 0:
            return progress("training (iterations)", self.recipe.train.iterations, self.iteration)
        return contextlib.nullcontext(lambda units, note: None)

    def _any_process(self, received: list[int]) -> int:
        """A signal that any process has received, or 0: all processes stop after the same iteration."""
        number = torch.tensor(max(received, default=0), device=self.device)
        if distributed.is_initialized():
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)


def _model(recipe: Recipe, state: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """The model as the run begins, or resumes with the engine's state."""
    tensors, adapter = state.get("weights", {}), recipe.train.lora.adapter
    if adapter or not tensors:  # frozen weights are those that the run began with: checkpoints of bf16 round them
        source = recipe.path("run" if state and not tensors else "mcore")
        tensors = {**tensors_of(open_mcore(source, recipe.model).weights.stored, recipe.model), **tensors}
    if adapter:
        return build_lora(recipe, tensors, device)
    weights = {name: tensor.float() for name, tensor in tensors.items()}  # bf16 runs under autocast
    return build_model(recipe.path("hf"), weights, SEGMENTS, device)


def _device(recipe: Recipe) -> torch.device:
    wanted = recipe.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"]) if worker_rank() else 0
    if local_rank >= torch.cuda.device_count():
        what = f"train.device = {wanted}: {torch.cuda.device_count()} CUDA devices"
        remedy = "set train.device=cpu or lower parallel.devices_per_node"
        raise UserError(f"{what}, {recipe.parallel.devices_per_node} needed", remedy=remedy)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def _failures_named(received: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(str(error).partition(" If reserved")[0], remedy=metrics.LESS_MEMORY) from None
    except RuntimeError as error:
        if not any(name in str(error) for name in ("gloo", "NCCL")):
            raise
        if received:  # several signals at once may be one to this process, and two to another
            raise Interrupted(received[-1], AT_ONCE) from None
        what = "another process of this run is gone or does not answer"
        raise UserError(what, remedy="see its message, then run make sft again") from None
