"""Stage sft: checks its inputs and the run's directory, and starts the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, only_one_run, read_manifest, require_settings
from openpangu_sft.checkpoint.convert import mcore_settings
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.dataset.preprocess import data_settings
from openpangu_sft.recipe.model_config import require_model
from openpangu_sft.recipe.schema import Recipe, complaints
from openpangu_sft.training.mindspeed.start import run_mindspeed
from openpangu_sft.training.run.launch import launch, worker_rank
from openpangu_sft.training.run.trackers import require_trackers
from openpangu_sft.util.errors import UserError

FREE_TO_CHANGE = {"train.device", "train.save_interval", "train.recompute", "train.iterations", "train.epochs"}
FREE_TO_CHANGE |= {"train.eval_interval", "train.keep_best", "train.early_stop", "train.trackers", "parallel.data"}
FREE_TO_CHANGE |= {"train.keep_checkpoints", "train.device_tflops", "train.device_memory", "train.upstream_flags"}
"""Settings that may change when a run resumes: they do not affect the loss, or are meant to."""
SCHEDULE = {"train.lr", "train.min_lr", "train.lr_decay_style", "train.lr_wsd_decay_ratio"}
SCHEDULE |= {"train.lr_warmup_iterations", "train.lr_warmup_ratio"}
"""Settings that may change when the user says so."""


def run_sft(recipe: Recipe, command_line: Sequence[str], planned: int = 0, changed: bool = False) -> None:
    """Stage sft: `paths.dataset` and `paths.mcore` to `paths.run`; resumes a run that is there.

    `command_line` repeats this call in torchrun's processes; `planned` peak bytes of tensors on a device (0: unknown)
    are compared with those measured; `changed` lets a run go on with another learning rate or schedule. Raises
    `UserError` as `run_manifest`, or for a run with other settings, or a tracker that is not installed.
    """
    manifest = run_manifest(recipe)
    run = recipe.path("run")
    require_trackers(recipe)
    _check_run(recipe, manifest, changed)
    if recipe.train.engine == "mindspeed":
        run_mindspeed(recipe, manifest, command_line, planned)
        return
    rank = worker_rank()
    if recipe.parallel.world > 1 and rank is None:
        launch(recipe, command_line)
    from openpangu_sft.training.portable.loop import train  # imports torch and transformers, after the checks

    run.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if rank else only_one_run(run):
        train(recipe, manifest, command_line, planned)


def run_manifest(recipe: Recipe) -> Manifest:
    """The manifest of a run; raises `UserError` where an input is missing or was made with other settings."""
    dataset_path, mcore_path = recipe.path("dataset"), recipe.path("mcore")
    dataset = read_manifest(dataset_path, "dataset", "run make preprocess and make merge")
    for conflict in complaints(recipe):  # train.epochs are iterations now
        raise UserError(conflict.what, remedy=conflict.remedy)
    if recipe.train.eval_interval and not dataset.counts.get(VALIDATION):
        what = "has no validation split, and train.eval_interval asks for evaluations"
        remedy = "set data.validation_share=0.05, and run make preprocess and make merge again"
        raise UserError(what, where=dataset_path, remedy=remedy)
    mcore = read_manifest(mcore_path, "mcore", "run make convert")
    require_model(recipe.path("hf"), recipe.model)
    settings = data_settings(recipe)
    require_settings(dataset_path, dataset.settings, settings, "run make preprocess and make merge again")
    require_settings(mcore_path, mcore.settings, mcore_settings(recipe), "run make convert again")
    if mcore.inputs["tokenizer"] != settings["tokenizer"]:
        raise UserError("made from a checkpoint with another tokenizer", where=mcore_path, remedy="run make convert")
    train = {f"train.{key}": value for key, value in recipe.train.model_dump().items()}
    trained = parameter_count(recipe.model, recipe.train.lora.adapter, trained=True)
    return Manifest(
        "run",
        settings={**settings, **mcore_settings(recipe), **train, "parallel.data": recipe.parallel.data},
        inputs={"dataset": dataset.digest, "mcore": mcore.digest, **{f"hf.{k}": v for k, v in mcore.inputs.items()}},
        counts={**dataset.counts, "trained_parameters": trained},
    )


def _check_run(recipe: Recipe, manifest: Manifest, changed: bool) -> None:
    """Refuses a directory that holds anything but a run with the same inputs and settings, unless SCHEDULE changed."""
    run = recipe.path("run")
    if not run.is_dir() or all(path.name.startswith(".") for path in run.iterdir()):
        return
    if not (run / MANIFEST).is_file():
        raise UserError("is not empty and holds no run", where=run, remedy="choose another paths.run")
    remedy = "choose another paths.run for a new run"
    begun, free = read_manifest(run, "run", remedy), set(FREE_TO_CHANGE)
    if recipe.train.loss == "token":
        free |= {"train.micro_batch_size"}
    if changed:
        free |= SCHEDULE
    wanted = {key: value for key, value in manifest.settings.items() if key not in free}
    again = "set these values to resume (RESUME=changed takes another learning rate or schedule)"
    require_settings(run, begun.settings, wanted, f"{again}, or {remedy}")
    for name, digest in manifest.inputs.items():
        if begun.inputs.get(name) != digest:
            raise UserError(f"was started with other content of {name}", where=run, remedy=remedy)
