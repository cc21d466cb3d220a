"""evaluation.json in a run: what was asked, and loss and answers of its checkpoints. The report reads it too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from openpangu_sft import __version__
from openpangu_sft.artefact import write_durably
from openpangu_sft.errors import UserError

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Args:
        source: where it comes from: prompts.txt:3, or held-out sample 2.
        turns: role and content of each message, the system prompt (role system) first where there is one.
        reference: the answer that it had there; empty where it had none.
        prompt: token ids that are given to the model, the assistant's header last.
    """

    source: str
    turns: list[list[str]]
    reference: str
    prompt: list[int]


@dataclass(frozen=True)
class Result:
    """One checkpoint.

    Args:
        iteration: of the run; 0 is what training began with.
        checkpoint: its directory.
        files: name, size and time of its files: whether it is still the same.
        loss: mean cross-entropy per trained token of the held-out samples, in nats; None where none are held out.
        answers: one for each question.
        seconds: that it took.
    """

    iteration: int
    checkpoint: str
    files: list[list[Any]]
    loss: Optional[float]
    answers: list[str]
    seconds: float


@dataclass
class Evaluation:
    """All results that can be compared.

    Args:
        inputs: sha256 of the dataset, and of the prompt file or nothing.
        settings: that loss or answers depend on.
        held_out: counts of the held-out samples: packed, packs, tokens, trained_tokens; empty where there are none.
        questions: the same for every checkpoint.
        results: by iteration.
    """

    inputs: dict[str, str]
    settings: dict[str, Any]
    held_out: dict[str, int]
    questions: list[Question]
    results: list[Result] = field(default_factory=list)
    version: str = __version__

    def add(self, result: Result) -> None:
        """Takes a result in, in place of an earlier one of the iteration."""
        others = [other for other in self.results if other.iteration != result.iteration]
        self.results = sorted([*others, result], key=lambda one: one.iteration)


def find_result(results: Sequence[Result], iteration: int, files: list[list[Any]]) -> Optional[Result]:
    """The result of a checkpoint that is still the same."""
    return next((result for result in results if result.iteration == iteration and result.files == files), None)


def read_evaluation(run: Path) -> Optional[Evaluation]:
    """What was evaluated so far; None where nothing was.

    Raises:
        UserError: the file is damaged.
    """
    path = run / EVALUATION
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        content["questions"] = [Question(**entry) for entry in content["questions"]]
        content["results"] = [Result(**entry) for entry in content["results"]]
        return Evaluation(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"not an evaluation: {error}", where=path, remedy="remove it, run make evaluate again"
        ) from None


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Writes it into the run, whole or not at all."""
    write_durably(run / EVALUATION, json.dumps(asdict(evaluation), ensure_ascii=False, indent=1) + "\n")
