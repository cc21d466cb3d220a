"""One training run of the training benchmark: `python -m benchmarks.train_once ENGINE KEY=VALUE…`; prints JSON.

TRL and the Trainer are given the engine's own packs, in its order: each row without its padding, and labels. With one
thread processor seconds are counted, on which other programs have little influence, else those of the clock.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import ROOT
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.dataset.index_file import PREFIX, read_rows
from openpangu_sft.model.batches import training_order
from openpangu_sft.model.llama import build_model
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run import metrics
from openpangu_sft.training.stage import run_sft

OURS, TRL, TRAINER = ENGINES = "this engine", "TRL", "Trainer"
WARM_UP, PROFILED = 2, 2
"""The first iterations, not counted; the last ones, profiled instead of timed."""
MATRICES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention")
"""Operators that multiply matrices, by the beginning of their names."""


class Steps(NamedTuple):
    """Seconds of each timed iteration, the share of matrix products in the profiled ones, and the mean loss of all."""

    seconds: list[float]
    matrices: float
    loss: float


class Clock:
    """Notes the end of each iteration; profiles the last ones."""

    def __init__(self, iterations: int) -> None:
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.timed, self.ends = iterations - PROFILED, [self.now()]
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def tick(self) -> None:
        self.ends.append(self.now())
        if len(self.ends) == self.timed + 1:
            self.profiler.start()  # type: ignore[no-untyped-call]
        elif len(self.ends) == self.timed + PROFILED + 1:
            self.profiler.stop()  # type: ignore[no-untyped-call]

    def steps(self, loss: float) -> Steps:
        ends = self.ends[WARM_UP : self.timed + 1]
        rows = self.profiler.key_averages()
        matrices = sum(row.self_cpu_time_total for row in rows if row.key.startswith(MATRICES))
        share = matrices / sum(row.self_cpu_time_total for row in rows)
        return Steps([end - begin for begin, end in zip(ends, ends[1:])], share, loss)


def train_here(recipe: Recipe) -> Steps:
    """Stage sft of this project, timed where it notes an iteration."""
    clock, append = Clock(recipe.train.iterations), metrics.append

    def noted(run: Path, row: metrics.Row) -> None:
        append(run, row)
        clock.tick()

    with mock.patch.object(metrics, "append", noted):
        run_sft(recipe, [])
    rows = metrics.read_metrics(recipe.path("run"))
    return clock.steps(math.fsum(row["loss"] for row in rows) / len(rows))


def train_there(recipe: Recipe, engine: str) -> Steps:
    """SFTTrainer or Trainer with stock transformers' model, the recipe's batch sizes and optimizer settings."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments  # type: ignore[attr-defined]
    from transformers.utils import is_torch_sdpa_available  # type: ignore[attr-defined]

    settings, clock = recipe.train, Clock(recipe.train.iterations)
    if engine == TRL:
        import trl  # type: ignore[import-not-found]

        base, arguments = trl.SFTTrainer, trl.SFTConfig
        own = {"packing": True, "max_length": recipe.data.seq_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        base, arguments, own = Trainer, TrainingArguments, {}

    class InOrder(base):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    arguments = arguments(
        output_dir=str(recipe.path("run")),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.global_batch_size // settings.micro_batch_size,
        max_steps=settings.iterations,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.lr_warmup_iterations,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_eps,
        max_grad_norm=settings.clip_grad,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,  # TRL's default is True
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **own,
    )
    attention = "sdpa" if is_torch_sdpa_available() else "eager"  # what transformers chooses
    weights = tensors_of(open_mcore(recipe.path("mcore"), recipe.model).weights, recipe.model)
    trainer = InOrder(
        model=build_model(recipe.path("hf"), weights, attention, torch.device("cpu")),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(packs(recipe)),
        processing_class=Tokenizer(recipe.path("hf"), trust_remote_code=False).hf,
        callbacks=[Tick()],
    )
    return clock.steps(trainer.train().training_loss)


def demo_recipe(settings: Sequence[str]) -> Recipe:
    """The demo's recipe with other settings."""
    return load_recipe(ROOT / "recipes/demo.yaml", settings)


def packs(recipe: Recipe) -> list[dict[str, list[int]]]:
    """Rows of the dataset in the order of training, without padding."""
    directory, length, settings = recipe.path("dataset"), recipe.data.seq_length, recipe.train
    names = ("input_ids", "attention_mask", "labels")
    ids, numbers, labels = (read_rows(directory, PREFIX, name, length) for name in names)
    samples = settings.iterations * settings.global_batch_size
    rows = []
    for pack in training_order(len(ids), samples, settings.seed)[:samples]:
        used = int(np.count_nonzero(numbers[pack]))
        rows.append({"input_ids": ids[pack, :used].tolist(), "labels": labels[pack, :used].tolist()})
    return rows


def main(engine: str, settings: Sequence[str]) -> None:
    """Trains, and prints what was measured in the last line."""
    recipe = demo_recipe(settings)
    steps = train_here(recipe) if engine == OURS else train_there(recipe, engine)
    print(json.dumps(steps._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
