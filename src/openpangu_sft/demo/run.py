"""The demo: prepares the example data, runs every stage in a process of its own, and shows the results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.conversations.conversation import Sample, parse_sample
from openpangu_sft.dataset.encode import Encoded, encode_samples
from openpangu_sft.dataset.preprocess import sample_files
from openpangu_sft.dataset.validation import is_validation
from openpangu_sft.evaluate.record import read_evaluation
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.stage import PAGE
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run.metrics import CURVE, read_metrics
from openpangu_sft.util.console import console, print_rows
from openpangu_sft.util.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"

STAGES = {
    "format": "samples",
    "preprocess": "shards",
    "merge": "dataset",
    "convert": "mcore",
    "sft": "run",
    "evaluate": "run",
    "report": "run",
    "export": "export",
}
"""The stages in order, and the path that each writes."""


def run_demo(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs the demo and prints its table; every stage is given `arguments`, which name the recipe.

    Raises:
        UserError: a stage failed, or the tuned model does not give the trained answers.
    """
    began = time.monotonic()
    prepare(recipe)
    rows = [["(prepare)", f"{time.monotonic() - began:.1f}", "small random model"]]
    for stage in STAGES:
        seconds = _run(stage, arguments)
        rows.append([stage, f"{seconds:.1f}", _made(recipe, stage)])
    answers, seconds = _ask(recipe)
    rows.append(["chat", f"{seconds:.1f}", f"{len(answers)} answers, below"])
    print_rows("make demo", ("stage", "seconds", "result"), rows)
    known = read_manifest(recipe.path("dataset"), "dataset", "").counts["packed"]
    say(f"validation loss may rise: the demo memorises {known} conversations")
    run = recipe.path("run")
    made = {"dataset": recipe.path("dataset"), "loss curve": run / CURVE, "report": run / PAGE}
    for name, path in {**made, "checkpoint": recipe.path("export")}.items():
        say(f"{name}: {_short(path)}")
    for sample, answer in answers:
        question, trained = (message.content for message in sample.data)
        say(f"\nasked:    {question}\ntrained:  {trained}\nanswered: {answer}")
    wrong = [sample for sample, answer in answers if answer != sample.data[1].content]
    if wrong:
        raise UserError("the tuned model does not give the trained answer", remedy="raise train.iterations")
    say(f"\nall stages in {time.monotonic() - began:.0f} s")


def say(text: str) -> None:
    """Prints to stderr as it is: no line is wrapped, no path broken."""
    print(text, file=sys.stderr)


def prepare(recipe: Recipe) -> None:
    from openpangu_sft.demo.base_model import make_base_model, texts_of  # imports torch

    run = recipe.path("run")
    if run.is_dir():
        read_manifest(run, "run", "choose another paths.cache")  # refuses to remove anything else
        shutil.rmtree(run)
    files = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".json", ".jsonl"))
    recipe.path("raw").mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, recipe.path("raw") / file.name)
    texts = [text for file in files for record in _records(file) for text in texts_of(record)]
    make_base_model(recipe, texts)


def _records(file: Path) -> Iterator[object]:
    text = file.read_text("utf-8")
    if file.suffix == ".json":
        yield json.loads(text)
    else:
        yield from map(json.loads, text.splitlines())


def _run(stage: str, arguments: Sequence[str]) -> float:
    """Runs a stage like its Make target; returns the seconds it took."""
    console.rule(f"make {stage}", align="left")
    began = time.monotonic()
    finished = subprocess.run([sys.executable, "-m", "openpangu_sft", stage, *arguments], check=False)
    if finished.returncode:
        raise UserError(f"{stage} ended with exit code {finished.returncode}", remedy="see its message above")
    return time.monotonic() - began


def _ask(recipe: Recipe) -> tuple[list[tuple[Sample, str]], float]:
    """Asks the exported model the first plain question of every example file."""
    from openpangu_sft.model.chat import Chat

    began = time.monotonic()
    chat = Chat(recipe, recipe.path("export"))
    samples = [_first_plain_question(file, recipe, chat.tokenizer) for file in sample_files(recipe.path("samples"))]
    return [(sample, chat.reply(sample.data[:1]).text) for sample in samples], time.monotonic() - began


def _first_plain_question(file: Path, recipe: Recipe, tokenizer: Tokenizer) -> Sample:
    """The first sample that was trained on and is one question with its answer."""
    data = recipe.data
    for sample in (parse_sample(json.loads(line)) for line in file.read_text("utf-8").splitlines()):
        if len(sample.data) == 2 and sample.meta_prompt == ("",) and not sample.tools:
            (encoded,) = encode_samples([sample], tokenizer, data)
            if isinstance(encoded, Encoded) and not is_validation(
                encoded, tokenizer.header, data.validation_share, data.seed
            ):
                return sample
    raise UserError("no sample here is a question with its answer", where=file, remedy="lower data.validation_share")


def _short(path: Path) -> str:
    """The path relative to the working directory, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _made(recipe: Recipe, stage: str) -> str:
    """The result of a stage, in a few words."""

    def counts(kind: str) -> dict[str, Any]:
        return read_manifest(recipe.path(STAGES[stage]), kind, "").counts

    if stage == "format":
        return f"{counts('samples')['written']} samples"
    if stage == "preprocess":
        return f"{len(sample_files(recipe.path('samples')))} shards"
    if stage == "merge":
        return f"{counts('dataset')['packs']} packs, {counts('dataset')['tokens']:,} tokens"
    if stage == "convert":
        return f"{counts('mcore')['parameters']:,} parameters"
    if stage == "sft":
        rows = read_metrics(recipe.path("run"))
        return f"{len(rows)} iterations, loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}"
    if stage == "evaluate":
        evaluation = read_evaluation(recipe.path("run"))
        losses = [result.loss for result in evaluation.results] if evaluation else []
        return f"validation loss {' -> '.join(f'{loss:.3f}' for loss in losses if loss is not None)}"
    return PAGE if stage == "report" else "Hugging Face checkpoint"
