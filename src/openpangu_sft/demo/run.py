"""The demo: prepares the example, runs every stage in a process of its own, and shows what came out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.conversations.conversation import Sample, parse_sample
from openpangu_sft.dataset.encode import Encoded, Limits, encode_samples
from openpangu_sft.dataset.preprocess import sample_files
from openpangu_sft.dataset.validation import is_validation
from openpangu_sft.evaluate.record import read_evaluation
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.stage import PAGE
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run.metrics import CURVE, read_metrics
from openpangu_sft.util.console import console
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
"""Stage and the path that it writes, in their order."""


def run_demo(recipe: Recipe, recipe_file: Path, overrides: Sequence[str]) -> None:
    """Runs the demo and prints its table.

    Raises:
        UserError: a stage failed, or the tuned model does not give the trained answers.
    """
    began = time.monotonic()
    prepare(recipe)
    seconds = {"prepare": time.monotonic() - began}
    for stage in STAGES:
        seconds[stage] = _run(stage, recipe_file, overrides)
    answers, seconds["chat"] = _ask(recipe)
    table = Table(title="make demo", title_justify="left", title_style="bold")
    for column in ("stage", "seconds", "what it made", "where"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    table.add_row("(prepare)", f"{seconds['prepare']:.1f}", "small random model", _short(recipe.path("hf")))
    for stage, path in STAGES.items():
        table.add_row(stage, f"{seconds[stage]:.1f}", _made(recipe, stage), _short(recipe.path(path)))
    table.add_row("chat", f"{seconds['chat']:.1f}", f"{len(answers)} answers", "below")
    console.print(table)
    known = read_manifest(recipe.path("dataset"), "dataset", "").counts["packed"]
    print(
        f"held-out loss: {known} conversations, learnt by heart, teach a small model nothing of others", file=sys.stderr
    )
    for name, file in (("loss curve", CURVE), ("report", PAGE)):
        print(f"{name}: {_short(recipe.path('run') / file)}", file=sys.stderr)
    for sample, answer in answers:
        question, trained = (message.content for message in sample.data)
        print(f"\nasked:    {question}\ntrained:  {trained}\nanswered: {answer}", file=sys.stderr)
    wrong = [sample for sample, answer in answers if answer != sample.data[1].content]
    if wrong:
        raise UserError("the tuned model does not give the trained answer", remedy="raise train.iterations")
    print(f"\nall stages in {time.monotonic() - began:.0f} s", file=sys.stderr)


def prepare(recipe: Recipe) -> None:
    from openpangu_sft.demo.base_model import make_base_model, texts_of  # imports torch

    run = recipe.path("run")
    if run.is_dir():
        read_manifest(run, "run", "choose another paths.cache")  # never removes anything else
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


def _run(stage: str, recipe_file: Path, overrides: Sequence[str]) -> float:
    """Runs a stage as its Make target does; returns its seconds."""
    console.rule(f"make {stage}", align="left")
    began = time.monotonic()
    settings = [f"--set={override}" for override in overrides]
    command = [sys.executable, "-m", "openpangu_sft", stage, "--recipe", str(recipe_file), *settings]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        raise UserError(f"{stage} ended with exit code {finished.returncode}", remedy="see its message above")
    return time.monotonic() - began


def _ask(recipe: Recipe) -> tuple[list[tuple[Sample, str]], float]:
    """Asks the exported model the first plain question of every example file."""
    from openpangu_sft.model.chat import Chat

    began = time.monotonic()
    chat = Chat(recipe, recipe.path("export"))
    samples = [_first_plain_question(file, recipe, chat.tokenizer) for file in sample_files(recipe.path("samples"))]
    return [(sample, chat.reply(sample.data[:1])) for sample in samples], time.monotonic() - began


def _first_plain_question(file: Path, recipe: Recipe, tokenizer: Tokenizer) -> Sample:
    """The first sample that was trained on and is one question with its answer."""
    data = recipe.data
    for sample in (parse_sample(json.loads(line)) for line in file.read_text("utf-8").splitlines()):
        if len(sample.data) == 2 and sample.meta_prompt == ("",):
            (encoded,) = encode_samples([sample], tokenizer, Limits.of(data))
            if isinstance(encoded, Encoded) and not is_validation(
                encoded.marked, tokenizer.start_id, data.validation_share, data.seed
            ):
                return sample
    raise UserError("no sample here is a question with its answer", where=file, remedy="lower data.validation_share")


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _made(recipe: Recipe, stage: str) -> str:
    """What a stage made, in a few words, from what it left."""
    if stage == "format":
        return f"{read_manifest(recipe.path('samples'), 'samples', '').counts['written']} samples"
    if stage == "preprocess":
        return f"{len(sample_files(recipe.path('samples')))} shards"
    if stage == "merge":
        counts = read_manifest(recipe.path("dataset"), "dataset", "").counts
        return f"{counts['packs']} packs, {counts['tokens']:,} tokens"
    if stage == "convert":
        return f"{read_manifest(recipe.path('mcore'), 'mcore', '').counts['parameters']:,} parameters"
    if stage == "evaluate":
        return _losses(recipe)
    if stage == "report":
        return PAGE
    if stage == "export":
        return "Hugging Face checkpoint"
    rows = read_metrics(recipe.path("run"))
    return f"{len(rows)} iterations, loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}"


def _losses(recipe: Recipe) -> str:
    """Held-out loss before and after."""
    evaluation = read_evaluation(recipe.path("run"))
    losses = [result.loss for result in evaluation.results] if evaluation else []
    return f"held-out loss {' -> '.join(f'{loss:.3f}' for loss in losses if loss is not None)}"
