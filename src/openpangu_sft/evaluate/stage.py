"""`make evaluate`: validation loss and answers of the initial weights and of a run's checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from openpangu_sft.artifacts.artifact import Manifest, only_one_run, read_manifest, require_settings, sha256_of
from openpangu_sft.checkpoint.mcore import iteration_directory
from openpangu_sft.checkpoint.mcore_reader import latest_iteration, open_mcore
from openpangu_sft.checkpoint.weights import Weights
from openpangu_sft.dataset.index_file import VALIDATION
from openpangu_sft.dataset.preprocess import data_settings
from openpangu_sft.evaluate.questions import questions_in, validation_questions
from openpangu_sft.evaluate.record import (
    EVALUATION,
    Evaluation,
    Result,
    checkpoint_name,
    read_evaluation,
    write_evaluation,
)
from openpangu_sft.model.batches import PackedDataset
from openpangu_sft.model.chat import Chat
from openpangu_sft.model.llama import SEGMENTS, build_model, inference_device, pack_losses
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run.retention import best_iteration, iterations
from openpangu_sft.util.console import console, progress
from openpangu_sft.util.errors import UserError, printable

if TYPE_CHECKING:
    from openpangu_sft.evaluate.benchmark import Benchmarks

ALL, BEST = "all", "best"
AGAIN = "run make preprocess and make merge again, and train on the result"


def run_evaluate(
    recipe: Recipe, prompts: Optional[Path] = None, wanted: Optional[str] = None, tasks: Sequence[str] = ()
) -> Evaluation:
    """Evaluates the initial weights and checkpoints of `paths.run`, and returns the run's evaluation.json.

    Earlier results are reused. Raises `UserError` where there is no run, its dataset has changed, or there is nothing
    to evaluate with.

    Args:
        prompts: a file of questions; default: some of the validation samples.
        wanted: the number of an iteration, best or all; default: the newest.
        tasks: benchmarks of lm-evaluation-harness; questions of an earlier evaluation stay with them.
    """
    benchmarks = _benchmarks(tasks) if tasks else None
    run = recipe.path("run")
    manifest = read_manifest(run, "run", "run make sft")
    newest = latest_iteration(run, "let make sft come to its first checkpoint")
    dataset = _dataset(recipe, manifest)
    evaluation = _prepare(recipe, dataset, prompts, bool(tasks))
    mcore = recipe.path("mcore")
    if read_manifest(mcore, "mcore", "run make convert").digest != manifest.inputs["mcore"]:
        raise UserError("is not what this run began with", where=mcore, remedy="check paths.mcore, or convert again")
    with only_one_run(run / EVALUATION):
        evaluation = _resumed(read_evaluation(run), evaluation, bool(tasks and not prompts))
        open_mcore(mcore, recipe.model)
        found = []
        for number in _iterations(run, wanted, newest):  # all are checked before the first evaluation, which takes long
            with _may_be_gone(run, number, wanted):
                open_mcore(run, recipe.model, number)
                found.append(number)
        _evaluate(recipe, evaluation, 0, benchmarks)
        for number in found:
            with _may_be_gone(run, number, wanted):
                _evaluate(recipe, evaluation, number, benchmarks)
    return evaluation


@contextlib.contextmanager
def _may_be_gone(run: Path, number: int, wanted: Optional[str]) -> Iterator[None]:
    """With all, skips a checkpoint that training has removed meanwhile (train.keep_checkpoints)."""
    try:
        yield
    except (UserError, OSError):
        if wanted != ALL or iteration_directory(run, number).is_dir():
            raise
        console.print(f"iteration {number} was removed meanwhile: left out")


def _dataset(recipe: Recipe, run: Manifest) -> Manifest:
    """The dataset of the run: the validation split of another one may have been trained on."""
    directory = recipe.path("dataset")
    dataset = read_manifest(directory, "dataset", AGAIN)
    require_settings(directory, dataset.settings, data_settings(recipe), AGAIN)
    if dataset.digest != run.inputs["dataset"]:
        what = "is not what this run was trained on: that may include the validation split here"
        raise UserError(what, where=directory, remedy="check paths.dataset and paths.run")
    return dataset


def _benchmarks(tasks: Sequence[str]) -> Benchmarks:
    if not find_spec("lm_eval"):
        raise UserError("lm-eval is not installed", where="BENCH", remedy="run make setup, or use the npu image")
    from openpangu_sft.evaluate.benchmark import Benchmarks  # imports the harness, and takes seconds

    return Benchmarks(tasks)


def _prepare(recipe: Recipe, dataset: Manifest, prompts: Optional[Path], other: bool) -> Evaluation:
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    validation = dataset.counts.get(VALIDATION, {})
    if not (validation or prompts or other):
        what = "there is no validation split (data.validation_share is 0), and no prompts are given"
        remedy = f"give PROMPTS=…; or set data.validation_share=0.05, {AGAIN}"
        raise UserError(what, where=recipe.path("dataset"), remedy=remedy)
    inputs = {"dataset": dataset.digest}
    if prompts is None:
        questions = validation_questions(recipe, tokenizer) if validation else []
    else:
        questions = questions_in(prompts, recipe, tokenizer)
        inputs["prompts"] = sha256_of(prompts)
    settings: dict[str, Any] = {f"chat.{key}": value for key, value in recipe.chat.model_dump().items()}
    settings["train.precision"] = recipe.train.precision
    return Evaluation(inputs, settings, validation, questions)


def _resumed(earlier: Optional[Evaluation], now: Evaluation, any_questions: bool = False) -> Evaluation:
    """The earlier evaluation if it is the same, else a new one with losses and benchmarks that still hold."""
    if earlier is None or earlier.version != now.version:
        return now
    same_chat, asked = earlier.settings == now.settings, (earlier.inputs, earlier.questions)
    old, new = ((one.inputs.get("dataset"), one.settings.get("train.precision")) for one in (earlier, now))
    if same_chat and (asked == (now.inputs, now.questions) or (any_questions and old == new)):
        return earlier
    if old == new:  # what the loss depends on
        kept = [replace(one, answers=[], benchmarks=one.benchmarks if same_chat else {}) for one in earlier.results]
        now.results = [one for one in kept if one.loss is not None or one.benchmarks]
    return now


def _iterations(run: Path, wanted: Optional[str], newest: int) -> list[int]:
    if wanted == ALL:
        return [number for number in iterations(run) if number <= newest]
    if wanted is None:
        return [newest]
    if wanted == BEST:
        if (best := best_iteration(run)) is None:
            what, remedy = "no checkpoint here was evaluated during training", "give a number, or all"
            raise UserError(what, where=run, remedy=remedy)
        return [best]
    if not wanted.isdecimal():
        raise UserError(f"ITERATION={wanted} is neither a number, {BEST} nor {ALL}", remedy=f"give one, say, {newest}")
    return [int(wanted)]


def _evaluate(recipe: Recipe, evaluation: Evaluation, number: int, benchmarks: Optional[Benchmarks]) -> None:
    """Evaluates what is missing of an iteration, 0 for the initial weights; writes the loss before asking questions."""
    run = recipe.path("run")
    root, iteration = (run, number) if number else (recipe.path("mcore"), None)
    opened = open_mcore(root, recipe.model, iteration)
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in opened.files]
    result = next((one for one in evaluation.results if (one.iteration, one.files) == (number, files)), None)
    if result is None:
        loss = validation_loss(recipe, opened.weights, number) if evaluation.held_out else None
        result = Result(number, printable(str(opened.directory)), files, loss, [])
        evaluation.add(result)
        write_evaluation(run, evaluation)
    missing = [name for name in benchmarks.names if name not in result.benchmarks] if benchmarks else []
    if not missing and len(result.answers) == len(evaluation.questions):
        return
    chat = Chat(recipe, root, iteration)
    if len(result.answers) < len(evaluation.questions):
        torch.manual_seed(recipe.train.seed)  # with chat.temperature the same answers come again
        result = replace(result, answers=[chat.complete(each.prompt).text for each in evaluation.questions])
        evaluation.add(result)
        write_evaluation(run, evaluation)
    for name in missing:
        assert benchmarks
        console.print(f"{checkpoint_name(number)}: {name}", soft_wrap=True)
        result = replace(result, benchmarks={**result.benchmarks, name: benchmarks.scores(name, chat)})
        evaluation.add(result)
        write_evaluation(run, evaluation)


def validation_loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
    """Mean cross-entropy over all trained tokens of the validation packs, in nats.

    Every token counts the same, so the loss does not depend on how samples fall into packs.
    """
    device = inference_device(recipe)
    # bf16 runs under autocast, as in training
    tensors = {name: tensor.float() for name, tensor in tensors_of(weights, recipe.model).items()}
    model = build_model(recipe.path("hf"), tensors, SEGMENTS, device)
    packs = PackedDataset(recipe.path("dataset"), recipe.data.seq_length, VALIDATION)
    total, targets, bf16 = 0.0, 0, recipe.train.precision == "bf16"
    with progress(f"{checkpoint_name(iteration)} (packs)", len(packs)) as advance:
        for loss, number in pack_losses(model, packs, range(len(packs)), device, bf16):
            total, targets = total + loss, targets + number
            advance(1, f"loss {total / targets:.4f}")
    return total / targets
