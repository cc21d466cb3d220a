"""What a run does with its data, and what in it looks like a mistake; its checkpoints and their disk. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import checkpoint_bytes

MANY_EPOCHS = 10
"""From here on a run is said to be long for fine-tuning. A matter of opinion; the run is not refused."""


class Course(NamedTuple):
    """How a run goes through a dataset.

    Args:
        iterations_per_epoch: not rounded: an iteration may take its last packs from the next epoch.
        epochs: that all iterations make.
        tokens: real ones, without padding, of all iterations.
        trained_tokens: those of them that are targets.
        unseen: packs that no iteration takes.
    """

    iterations_per_epoch: float
    epochs: float
    tokens: float
    trained_tokens: float
    unseen: int


class Disk(NamedTuple):
    """Checkpoints of a run.

    Args:
        checkpoint: bytes of one.
        written: how many the run writes.
        kept: how many are there at its end.
        most: bytes of all that are there at once, while the last one is written.
    """

    checkpoint: int
    written: int
    kept: int
    most: int


def course_of(recipe: Recipe, counts: dict[str, Any]) -> Course:
    """How a recipe goes through a dataset with these counts (packs, tokens, trained_tokens)."""
    packs, batch = counts["packs"], recipe.train.global_batch_size
    drawn = recipe.train.iterations * batch
    return Course(
        packs / batch,
        drawn / packs,
        drawn * counts["tokens"] / packs,
        drawn * counts["trained_tokens"] / packs,
        max(packs - drawn, 0),
    )


def disk_of(recipe: Recipe) -> Disk:
    """Disk that a recipe's checkpoints take."""
    train = recipe.train
    written = -(-train.iterations // train.save_interval)  # the last iteration is saved in any case
    kept = min(train.keep_checkpoints or written, written)
    one = engine_checkpoint_bytes(recipe)
    return Disk(one, written, kept, one * min(kept + 1, written))


def engine_checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint. The portable engine writes fp32 weights beside the model's only where that is bf16."""
    if recipe.train.engine == "mindspeed":
        return checkpoint_bytes(recipe)
    return parameter_count(recipe.model) * (2 + 12 if recipe.train.precision == "bf16" else 4 + 8)


def warnings(recipe: Recipe, counts: dict[str, Any]) -> Iterator[str]:
    """What a run does that was perhaps not meant."""
    train, course = recipe.train, course_of(recipe, counts)
    whole = max(1, round(course.iterations_per_epoch))
    if train.global_batch_size > counts["packs"]:
        yield (
            f"train.global_batch_size {train.global_batch_size} is above the dataset's {counts['packs']} packs: "
            "one iteration takes packs more than once -> lower it"
        )
    if course.unseen:
        yield (
            f"{course.unseen:,} of {counts['packs']:,} packs are never seen -> for one epoch set "
            f"train.iterations={-(-counts['packs'] // train.global_batch_size)}"
        )
    if course.epochs > MANY_EPOCHS:
        yield (
            f"every pack is seen {course.epochs:,.1f} times: much for fine-tuning -> for three epochs set "
            f"train.iterations={3 * whole}"
        )
    if train.lr_warmup_iterations > course.iterations_per_epoch > 1:
        yield f"the warm-up, {train.lr_warmup_iterations} iterations, is longer than an epoch -> lower it"
