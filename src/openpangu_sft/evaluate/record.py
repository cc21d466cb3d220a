"""evaluation.json in a run: questions, and loss and answers of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import Field, TypeAdapter, ValidationError

from openpangu_sft import __version__
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.util.errors import UserError, first_complaint

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Args:
        source: prompts.txt:3, or validation sample 2.
        turns: role and content of each message, the system prompt (role system) first where there is one.
        reference: the answer there, or empty.
        prompt: token ids for the model, the assistant's header last.
    """

    source: str
    turns: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    reference: str
    prompt: list[int]


@dataclass(frozen=True)
class Result:
    """One checkpoint.

    Args:
        iteration: of the run; 0 is before training.
        checkpoint: its directory.
        files: name, size and time of its files, to see whether they have changed.
        loss: mean cross-entropy per trained token of the validation samples, in nats; None without a validation split.
        answers: one for each question; empty before they are asked.
    """

    iteration: int
    checkpoint: str
    files: list[list[Any]]
    loss: Optional[float]
    answers: list[str]


@dataclass
class Evaluation:
    """All results that can be compared.

    Args:
        inputs: sha256 of the dataset, and of the prompt file if there is one.
        settings: that loss or answers depend on.
        held_out: counts of the validation split, named so in the file; empty without one.
        questions: the same for every checkpoint.
        results: by iteration.
    """

    inputs: dict[str, str]
    settings: dict[str, Any]
    held_out: dict[str, int]
    questions: list[Question]
    results: list[Result] = field(default_factory=list)
    version: str = __version__

    @property
    def answered(self) -> list[Result]:
        """The results that have answers."""
        return [result for result in self.results if result.answers]

    def add(self, result: Result) -> None:
        """Adds a result, or replaces that of its iteration."""
        others = [other for other in self.results if other.iteration != result.iteration]
        self.results = sorted([*others, result], key=lambda one: one.iteration)


def read_evaluation(run: Path) -> Optional[Evaluation]:
    """The evaluation so far, if there is one; raises `UserError` if the file is damaged."""
    path = run / EVALUATION
    if not path.is_file():
        return None
    try:
        evaluation: Evaluation = TypeAdapter(Evaluation).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise _damaged(path, first_complaint(error)) from None
    if evaluation.held_out and not {"packed", "trained_tokens"} <= evaluation.held_out.keys():
        raise _damaged(path, "held_out: packed or trained_tokens is missing")
    for result in evaluation.results:
        if len(result.answers) not in (0, len(evaluation.questions)):
            what = f"{len(result.answers)} answers to {len(evaluation.questions)} questions"
            raise _damaged(path, f"iteration {result.iteration} has {what}")
    return evaluation


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"not an evaluation: {what}", where=path, remedy="remove it, run make evaluate again")


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Writes it into the run, whole or not at all."""
    write_durably(run / EVALUATION, json.dumps(asdict(evaluation), ensure_ascii=False, indent=1) + "\n")
