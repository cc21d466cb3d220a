"""evaluation.json as somebody left it: read back as it was written, or refused with one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpangu_sft.cli.reports import _show
from openpangu_sft.evaluate.record import (
    EVALUATION,
    Evaluation,
    Question,
    Result,
    compared,
    read_evaluation,
    write_evaluation,
)
from openpangu_sft.evaluate.scores import RULES, Score
from openpangu_sft.evaluate.stage import _resumed
from openpangu_sft.report.page import _by_iteration
from openpangu_sft.util.errors import UserError
from refusals import refusal_of

GOOD = {
    "inputs": {"dataset": "5a", "prompts": "a5"},
    "settings": {"chat.temperature": 0.0, "train.precision": "fp32"},
    "held_out": {"packed": 3, "packs": 1, "tokens": 90, "trained_tokens": 40},
    "questions": [
        {"source": "p.txt:1", "turns": [["system", "s"], ["user", "q"]], "reference": "", "prompt": [1, 2]},
        {"source": "p.jsonl:2", "turns": [["user", "r"]], "reference": "x", "prompt": [1, 3], "score": "exact"},
    ],
    "results": [
        {"iteration": 0, "checkpoint": "/c", "files": [["a.pt", 1, 2]], "loss": 2.5, "answers": ["b", "c"]},
        {"iteration": 3, "checkpoint": "/r/3", "files": [["a.pt", 1, 3]], "loss": 1.5, "answers": []},
        {"iteration": 6, "checkpoint": "/r/6", "files": [["a.pt", 1, 4]], "loss": 1.25, "answers": ["d", ""]},
    ],
    "version": "0.5.0",
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def write(run: Path, content: object) -> None:
    (run / EVALUATION).write_text(json.dumps(content), "utf-8")


def used(evaluation: Evaluation, run: Path) -> None:
    """What make evaluate and make report take from it."""
    _show(evaluation, run)
    compared({"a": evaluation, "b": None})
    _by_iteration([evaluation.scores])


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in it with every key."""
    for key, inner in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


PLACES = len(list(places(GOOD)))


@given(st.integers(0, PLACES - 1), st.just(...) | JSON)
def test_whatever_stands_in_it_is_usable_or_refused(run: Path, place: int, value: Any) -> None:
    content = copy.deepcopy(GOOD)
    container, key = list(places(content))[place]
    if value is ...:
        del container[key]
    else:
        container[key] = value
    write(run, content)
    try:
        evaluation = read_evaluation(run)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{run / EVALUATION}: not an evaluation: "), message
        assert message.endswith(" -> remove it, run make evaluate again")
    else:
        assert evaluation
        used(evaluation, run)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["results", 0, "answers"], ["b"], "iteration 0 has 1 answers to 2 questions"),
        (["results", 2, "answers"], ["b", "c", "d"], "iteration 6 has 3 answers to 2 questions"),
        (["results", 0, "answers", 1], None, "results.0.answers.1: Input should be a valid string"),
        (["results", 0, "answers", 1], "\ud800", "Invalid JSON: "),
        (["results", 0, "loss"], "2.5", "results.0.loss: Input should be a valid number"),
        (["results", 0, "iteration"], "0", "results.0.iteration: Input should be a valid integer"),
        (["questions", 1, "turns", 0], ["user"], "questions.1.turns.0: List should have at least 2 items"),
        (["held_out"], {"packed": 3}, "held_out: packed or trained_tokens is missing"),
        (["questions", 1, "score"], "fuzzy", "questions.1.score: Input should be 'exact', 'contains' or 'choice'"),
        (["inputs"], [], "inputs: Input should be an object"),
    ],
)
def test_damage_is_named(run: Path, path: list[Any], value: Any, message: str) -> None:
    content: Any = copy.deepcopy(GOOD)
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    write(run, content)
    assert f"{EVALUATION}: not an evaluation: {message}" in refusal_of(read_evaluation, run)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"inputs": ' * 100_000],
    ids=["empty", "cut off", "list", "no keys", "not UTF-8", "nested lists", "nested objects"],
)
def test_what_is_no_evaluation(run: Path, content: bytes) -> None:
    (run / EVALUATION).write_bytes(content)
    assert "not an evaluation: " in refusal_of(read_evaluation, run)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(st.lists(texts, max_size=3), st.floats(allow_nan=False), st.data())
def test_it_is_read_as_it_was_written(run: Path, asked: list[str], loss: float, data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.sampled_from([None, *RULES]), min_size=len(asked), max_size=len(asked)))
    questions = [
        Question(f"p:{number}", [["user", text]], text, [number], score)
        for number, (text, score) in enumerate(zip(asked, scores))
    ]
    answers = data.draw(st.just([]) | st.lists(texts, min_size=len(asked), max_size=len(asked)))
    results = [Result(0, "/c", [["a", 1, 2]], loss, answers), Result(3, "/c", [], None, [])]
    evaluation = Evaluation({"dataset": "x"}, {"chat.top_p": 1.0, "chat.max_new_tokens": 4}, {}, questions, results)
    write_evaluation(run, evaluation)
    assert read_evaluation(run) == evaluation
    used(evaluation, run)


def test_a_file_of_a_version_without_scores_is_read_as_unscored(run: Path) -> None:
    content: Any = copy.deepcopy(GOOD)
    del content["questions"][1]["score"]
    write(run, content)
    evaluation = read_evaluation(run)
    assert evaluation
    assert [question.score for question in evaluation.questions] == [None, None]
    assert evaluation.scores == {}


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([], ""),
        (["12"], "right"),
        (["13"], "wrong"),
        (["13", "12"], "became right"),
        (["12", "12", "13"], "became wrong"),
        (["13", "12", "11"], "wrong"),
        (["12", "13", "It is 12."], "right"),
        (["[unused16]12[unused17]13"], "wrong"),
        (["[unused16]12, so 1", "[unused16]13?[unused17]12"], "became right"),
        (['[unused11][{"name":"f","arguments":{"x":12}}][unused12]'], "wrong"),
        (['12[unused11][{"name":"f","arguments":{}}][unused12]'], "right"),
    ],
)
def test_only_the_text_of_answers_is_scored(answers: list[str], verdict: str) -> None:
    question = Question("p:1", [["user", "q"]], "12", [1], "contains")
    assert question.verdict(*answers) == verdict
    assert replace(question, score=None).verdict(*answers) == ""


def test_scores_count_the_scored_questions_of_checkpoints_that_were_asked() -> None:
    questions = [Question(f"p:{number}", [["user", "q"]], "B", [1], score) for number, score in enumerate(SCORED)]
    before = Result(0, "/c", [], None, ["", "B", "B", "A"])
    after = Result(6, "/c", [], None, ["B", "B", "A and B", "So it is B"])
    evaluation = Evaluation({}, {}, {}, questions, [before, Result(3, "/c", [], 1.0, []), after])
    assert evaluation.scores == {0: "2/3", 6: "3/3"}


SCORED: list[Optional[Score]] = [None, "exact", "contains", "choice"]


def test_a_file_may_ask_the_same_twice() -> None:
    twice = [Question(f"p:{number}", [["user", "q"]], "B", [1], "choice") for number in (1, 2)]
    evaluation = Evaluation({}, {}, {}, twice, [Result(0, "/c", [], None, ["A", "B"])])
    assert [
        (question.source, verdicts["run"], lines) for question, verdicts, lines in compared({"run": evaluation})
    ] == [
        ("p:1", "wrong", {"before training": "A"}),
        ("p:2", "right", {"before training": "B"}),
    ]


def test_what_has_changed_is_printed_first_and_thinking_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [("a", None), ("b", "exact"), ("c", "exact"), ("d", "exact"), ("e", "exact")]
    questions = [Question(f"p:{name}", [["user", f"q {name}"]], "12", [1], score) for name, score in asked]
    before = Result(0, "/c", [], None, ["12", "12", "12", "11", "9"])
    after = Result(6, "/c", [], None, ["12", "12", "13", "[unused16]1 + 11\n= 12[unused17]12", "9"])
    _show(Evaluation({}, {}, {}, questions, [before, after]), tmp_path)
    shown = capsys.readouterr().out
    assert [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")] == [
        [" before training ", " 2/4   "],
        [" iteration 6     ", " 2/4   "],
    ]
    headings = [line for line in shown.splitlines() if line.startswith("p:")]
    assert headings == ["p:d: became right", "p:c: became wrong", "p:e: wrong", "p:b: right", "p:a"]
    wanted = "p:d: became right\nuser: q d\nexpected: 12\nbefore training: 11\n"
    assert wanted + "iteration 6, thinking: 1 + 11\n= 12\niteration 6: 12\n\n" in shown
    assert "p:a\nuser: q a\nreference: 12\n" in shown


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        ({}, [["b", "c"], [], ["d", ""]]),
        ({"settings": {"chat.temperature": 1.0, "train.precision": "fp32"}}, [[], [], []]),
        ({"inputs": {"dataset": "5a"}, "questions": []}, [[], [], []]),
        ({"inputs": {"dataset": "5b", "prompts": "a5"}}, None),
        ({"settings": {"chat.temperature": 0.0, "train.precision": "bf16"}}, None),
        ({"version": "0.5.1"}, None),
    ],
)
def test_what_is_kept_of_an_earlier_evaluation(run: Path, other: dict[str, Any], kept: Any) -> None:
    write(run, GOOD)
    earlier = read_evaluation(run)
    assert earlier
    found = _resumed(earlier, replace(earlier, results=[], **other)).results
    assert [result.answers for result in found] == (kept or [])
    assert [result.loss for result in found] == ([result.loss for result in earlier.results] if kept else [])
