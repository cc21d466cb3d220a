"""The demo: prepares the example data, runs every stage in a process of its own, and shows the results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.conversations.conversation import Sample, parse_sample
from openpangu_sft.conversations.files import raw_files, read_records
from openpangu_sft.dataset.encode import Encoded, encode_samples
from openpangu_sft.dataset.preprocess import sample_files
from openpangu_sft.dataset.shard import is_validation
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.page import PAGE, loss_of, validation_loss_of
from openpangu_sft.report.run import read_run
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run.metrics import CURVE
from openpangu_sft.util.console import console, print_rows, say
from openpangu_sft.util.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"


def run_demo(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs the demo and prints its table; every stage is given `arguments`, which name the recipe.

    Raises `UserError` where a stage failed, or the tuned model does not give the trained answers.
    """
    times, rows = [time.monotonic()], []

    def note(stage: str, result: str) -> None:
        times.append(time.monotonic())
        rows.append([stage, f"{times[-1] - times[-2]:.1f}", result])

    prepare(recipe)
    note("(prepare)", "small random model")
    for stage, result_of in STAGES.items():
        _run(stage, arguments)
        note(stage, result_of(recipe))
    answers = _ask(recipe)
    note("chat", f"{len(answers)} answers, below")
    print_rows("make demo", ("stage", "seconds", "result"), rows)
    say(f"validation loss may rise: the demo memorises {_counts(recipe, 'dataset')['packed']} conversations")
    run, dataset, export = (recipe.path(name) for name in ("run", "dataset", "export"))
    made = {"dataset": dataset, "loss curve": run / CURVE, "report": run / PAGE, "checkpoint": export}
    for name, path in made.items():
        say(f"{name}: {min(str(path), os.path.relpath(path), key=len)}")
    for sample, answer in answers:
        question, trained = (message.content for message in sample.data)
        say(f"\nasked:    {question}\ntrained:  {trained}\nanswered: {answer}")
    wrong = [sample for sample, answer in answers if answer != sample.data[1].content]
    if wrong:
        raise UserError("the tuned model does not give the trained answer", remedy="raise train.iterations")
    say(f"\nall stages in {time.monotonic() - times[0]:.0f} s; to ask the model yourself:")
    recipe_file, sets = arguments[1], " ".join(arguments[3::2])
    say(f"    make chat RECIPE={recipe_file}" + (f' SET="{sets}"' if sets else ""))


def prepare(recipe: Recipe) -> None:
    from openpangu_sft.demo.base_model import make_base_model, texts_of  # imports torch

    run = recipe.path("run")
    if run.is_dir():
        read_manifest(run, "run", "choose another paths.cache")  # refuses to remove anything else
        shutil.rmtree(run)
    recipe.path("raw").mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for file in raw_files(EXAMPLES):
        shutil.copyfile(file.path, recipe.path("raw") / file.name)
        texts += [text for record in read_records(file.path) for text in texts_of(record.content)]
    make_base_model(recipe, texts)


def _run(stage: str, arguments: Sequence[str]) -> None:
    console.rule(f"make {stage}", align="left")
    finished = subprocess.run([sys.executable, "-m", "openpangu_sft", stage, *arguments], check=False)
    if finished.returncode:
        raise UserError(f"{stage} ended with exit code {finished.returncode}", remedy="see its message above")


def _ask(recipe: Recipe) -> list[tuple[Sample, str]]:
    """Asks the exported model the first plain question of every example file."""
    from openpangu_sft.model.chat import Chat

    chat = Chat(recipe, recipe.path("export"))
    samples = [_first_plain_question(file, recipe, chat.tokenizer) for file in sample_files(recipe.path("samples"))]
    return [(sample, chat.reply(sample.data[:1]).text) for sample in samples]


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


def _counts(recipe: Recipe, kind: str) -> dict[str, Any]:
    return read_manifest(recipe.path(kind), kind, "").counts


STAGES: dict[str, Callable[[Recipe], str]] = {
    "format": lambda recipe: f"{_counts(recipe, 'samples')['written']} samples",
    "preprocess": lambda recipe: f"{len(sample_files(recipe.path('samples')))} shards",
    "merge": lambda recipe: "{packs} packs, {tokens:,} tokens".format(**_counts(recipe, "dataset")),
    "convert": lambda recipe: f"{_counts(recipe, 'mcore')['parameters']:,} parameters",
    "sft": lambda recipe: f"loss {loss_of(read_run(recipe.path('run')))}",
    "evaluate": lambda recipe: f"validation loss {validation_loss_of(read_run(recipe.path('run')))}",
    "report": lambda recipe: PAGE,
    "export": lambda recipe: "Hugging Face checkpoint",
}
"""The stages in order, and the result of each in a few words."""
