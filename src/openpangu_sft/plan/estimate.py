"""Estimates of a run: memory of its engine, work, epochs over a dataset, checkpoints on disk. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from openpangu_sft.plan.memory import GIB, Memory
from openpangu_sft.plan.mindspeed_memory import mindspeed_memory
from openpangu_sft.plan.transformers_memory import transformers_memory
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import checkpoint_bytes

MANY_EPOCHS = 10  # more draw a warning: long for fine-tuning, but a matter of opinion


class Course(NamedTuple):
    """How a run goes through a dataset."""

    iterations_per_epoch: float  # not rounded: an iteration may take its last packs from the next epoch
    epochs: float  # in all iterations
    tokens: float  # of all iterations, without padding
    trained_tokens: float  # those of them that are targets
    unseen: int  # packs that no iteration takes


class Disk(NamedTuple):
    """Checkpoints of a run."""

    checkpoint: int  # bytes of one
    written: int  # how many the run writes
    kept: int  # how many remain at its end
    most: int  # bytes of all that exist at once, while the last one is written


def on_this_cpu(recipe: Recipe) -> bool:
    """Whether training would compute on this machine's CPU."""
    train = recipe.train
    has_cuda = train.engine == "transformers" and Path("/dev/nvidiactl").exists()
    return train.device == "cpu" or (train.engine, train.device, has_cuda) == ("transformers", "auto", False)


def device_memory(recipe: Recipe) -> list[float]:
    """GiB to plan for: a process's share of this machine's memory where that is used, else those of current NPUs."""
    if not on_this_cpu(recipe):
        return [32.0, 64.0]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [round(total / recipe.parallel.devices_per_node / GIB, 1)]


def memory_of(recipe: Recipe, mib: Optional[int] = None) -> Memory:
    """Memory of the fullest device of a run, with HCCL's buffers of `mib` MiB, by default HCCL_BUFFSIZE."""
    return mindspeed_memory(recipe, mib) if recipe.train.engine == "mindspeed" else transformers_memory(recipe)


def course_of(recipe: Recipe, counts: dict[str, Any]) -> Course:
    """For a dataset with these counts: packs, tokens, trained_tokens."""
    packs, batch = counts["packs"], recipe.train.global_batch_size
    drawn = recipe.train.iterations * batch
    tokens, trained = (drawn * counts[name] / packs for name in ("tokens", "trained_tokens"))
    return Course(packs / batch, drawn / packs, tokens, trained, max(packs - drawn, 0))


def disk_of(recipe: Recipe) -> Disk:
    train = recipe.train
    written = -(-train.iterations // train.save_interval)  # the last iteration is saved in any case
    kept = min((train.keep_checkpoints or written) + train.keep_best, written)
    one = checkpoint_bytes(recipe)
    return Disk(one, written, kept, one * min(kept + 1, written))


def warnings(recipe: Recipe, counts: dict[str, Any]) -> Iterator[str]:
    """What a run would do that was perhaps not meant."""
    train, course = recipe.train, course_of(recipe, counts)
    if train.global_batch_size > counts["packs"]:
        what = f"train.global_batch_size {train.global_batch_size} is above the dataset's {counts['packs']} packs"
        yield f"{what}: one iteration takes packs more than once -> lower it"
    if course.unseen:
        yield f"{course.unseen:,} of {counts['packs']:,} packs are never seen -> for one epoch set train.epochs=1"
    if course.epochs > MANY_EPOCHS:
        what = f"every pack is seen {course.epochs:,.1f} times: much for fine-tuning"
        yield f'{what} -> for three epochs SET="train.epochs=3 train.lr_warmup_ratio=0.1"'
    if train.warmup > course.iterations_per_epoch > 1:
        yield f"the warm-up, {train.warmup} iterations, is longer than an epoch -> lower it"


def tokens_per_iteration(recipe: Recipe, counts: Optional[dict[str, Any]]) -> float:
    """Counted as the engine's tokens/s are: the portable engine counts padding, MindSpeed-LLM's log does not say where
    it is, so the data's mean is taken. Without a dataset's counts packs are taken as full.
    """
    mindspeed = recipe.train.engine == "mindspeed"
    mean = counts["tokens"] / counts["packs"] if counts and mindspeed else recipe.data.seq_length
    return recipe.train.global_batch_size * mean
