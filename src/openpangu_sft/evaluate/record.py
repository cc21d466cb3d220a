"""evaluation.json in a run: questions, loss and answers of its checkpoints, and what training has changed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import Field, TypeAdapter, ValidationError

from openpangu_sft import __version__
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.conversations.calls import answer_of
from openpangu_sft.evaluate.scores import RULES, Score
from openpangu_sft.util.errors import UserError, first_complaint

EVALUATION = "evaluation.json"
VERDICTS = ("became right", "became wrong", "wrong", "right", "")  # questions are shown in this order

Scores = dict[str, list[float]]  # of a benchmark: value and standard error, if it has one, by "task metric"


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    source: str  # prompts.txt:3, or validation sample 2
    turns: list[Annotated[list[str], Field(min_length=2, max_length=2)]]  # role, content; the system prompt is first
    reference: str  # the answer there, or empty
    prompt: list[int]  # token ids for the model, the assistant's header last
    score: Optional[Score] = None  # how answers are compared with the reference; None: not at all

    def verdict(self, *answers: str) -> str:
        """One of `VERDICTS` on the last of some generated answers, "became" unless on the first too; empty for none."""
        right = [RULES[self.score](self.reference, answer_of(one).text) for one in answers if self.score]
        return ("became " if right[0] != right[-1] else "") + ("right" if right[-1] else "wrong") if right else ""


@dataclass(frozen=True)
class Result:
    """One checkpoint."""

    iteration: int  # of the run; 0 is before training
    checkpoint: str  # its directory
    files: list[list[Any]]  # name, size and time of its files, to see whether they have changed
    loss: Optional[float]  # mean cross-entropy per trained validation token, in nats; None without a validation split
    answers: list[str]  # one for each question; empty before they are asked
    benchmarks: dict[str, Scores] = field(default_factory=dict)  # by name as given


@dataclass
class Evaluation:
    """All results that can be compared."""

    inputs: dict[str, str]  # sha256 of the dataset, and of the prompt file if there is one
    settings: dict[str, Any]  # that loss or answers depend on
    held_out: dict[str, int]  # counts of the validation split, named so in the file; empty without one
    questions: list[Question]  # the same for every checkpoint
    results: list[Result] = field(default_factory=list)  # by iteration
    version: str = __version__

    @property
    def answered(self) -> list[Result]:
        """The results that have answers."""
        return [result for result in self.results if result.answers]

    @property
    def scores(self) -> dict[int, str]:
        """Right answers of all that are scored, as 7/10, by iteration; empty without questions that have a score."""
        verdicts = {one.iteration: [*map(Question.verdict, self.questions, one.answers)] for one in self.answered}
        scored = sum(question.score is not None for question in self.questions)
        return {number: f"{found.count('right')}/{scored}" for number, found in verdicts.items() if scored}

    @property
    def benchmarks(self) -> dict[str, dict[int, str]]:
        """Value and standard error by task with metric, and iteration."""
        found: dict[str, dict[int, str]] = {}
        for one in self.results:
            for label, numbers in (each for scores in one.benchmarks.values() for each in scores.items()):
                found.setdefault(label, {})[one.iteration] = " ± ".join(f"{number:.4f}" for number in numbers)
        return found

    def add(self, result: Result) -> None:
        """Adds a result, or replaces that of its iteration."""
        others = [other for other in self.results if other.iteration != result.iteration]
        self.results = sorted([*others, result], key=lambda one: one.iteration)


def checkpoint_name(iteration: int) -> str:
    return f"iteration {iteration:,}" if iteration else "before training"


def perplexity(loss: float) -> str:
    """e to the power of a loss; empty where that says nothing."""
    return f"{math.exp(loss):,.2f}" if loss < 50 else ""


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


def compared(evaluations: dict[str, Optional[Evaluation]]) -> list[tuple[Question, dict[str, str], dict[str, str]]]:
    """The questions of the first evaluation that has answers, those with other verdicts after training first.

    Each has verdicts by the names of the evaluations, and lines: answers before and after, thinking apart, by whose.
    """
    found = []
    for question in next((one.questions for one in evaluations.values() if one and one.answered), []):
        given = {name: _ends(one, question) if one else {} for name, one in evaluations.items()}
        before = {answers[0] for answers in given.values() if 0 in answers}
        lines = {}  # where all began with the same answer, it is shown once
        for name, answers in given.items():
            for iteration, answer in answers.items():
                alone = len(given) == 1 or (not iteration and len(before) == 1)
                who = checkpoint_name(iteration) if alone else f"{name}, {checkpoint_name(iteration)}"
                thinking, text, calls = answer_of(answer)
                lines.update({f"{who}, thinking": thinking} if thinking else {})
                lines[who] = text + calls
        found.append((question, {name: question.verdict(*answers.values()) for name, answers in given.items()}, lines))
    return sorted(found, key=lambda each: min(map(VERDICTS.index, each[1].values())))


def _ends(evaluation: Evaluation, question: Question) -> dict[int, str]:
    """Answers of the first and the last checkpoint that were asked a question, by iteration."""
    places = [place for place, other in enumerate(evaluation.questions) if other.prompt == question.prompt]
    places.sort(key=lambda place: evaluation.questions[place] != question)  # a file may ask twice
    answered = [(one.iteration, one.answers[places[0]]) for one in evaluation.answered if places]
    return dict(answered[:: max(1, len(answered) - 1)])
