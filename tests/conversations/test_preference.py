"""Preference data: refused by name, or its chosen side."""

from __future__ import annotations

import json
from typing import Any

import pytest

from converting import answer, chat, convert, converter, refused, says, user
from openpangu_sft.conversations.convert import LeftOut
from parameter_ids import named_by

CHOSEN = "preference=chosen"
Q, A, B = says("user", "q"), says("assistant", "a"), says("assistant", "b")
TURN = {"from": "human", "value": "q"}

PAIRS: list[Any] = [
    pytest.param({"prompt": "q", "chosen": "a", "rejected": "b"}, id="trl-text"),
    pytest.param({"prompt": [Q], "chosen": [A], "rejected": [B]}, id="trl"),
    pytest.param({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, id="trl-prompt-repeated"),
    pytest.param({"chosen": [Q, A], "rejected": [Q, B]}, id="trl-implicit"),
    pytest.param({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "prompt_id": "x"}, id="ultrafeedback"),
    pytest.param({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, id="ultrafeedback-messages"),
    pytest.param({"messages": [Q, A], "rejected_response": "b"}, id="ms-swift"),
    pytest.param({"messages": [Q, A], "rejected_messages": [Q, B]}, id="ms-swift-messages"),
    pytest.param({"query": "q", "response": "a", "rejected_response": "b"}, id="ms-swift-old"),
    pytest.param(
        {
            "conversations": [TURN],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        id="llama-factory",
    ),
    pytest.param({"conversations": json.dumps([TURN]), "chosen": "a", "rejected": "b"}, id="json-text"),
    pytest.param({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, id="llama-factory-alpaca"),
    pytest.param({"input": "q", "chosen": "a", "rejected": "b"}, id="input"),
    pytest.param({"messages": "[]", "chosen": [Q, A], "rejected": [Q, B]}, id="empty-json-text"),
    pytest.param({"messages": [Q], "chosen_response": A, "rejected_responses": ["b", "c"]}, id="turn"),
]


@pytest.mark.parametrize("record", PAIRS)
def test_pairs(record: dict[str, Any]) -> None:
    reason = refused(record)
    assert reason.startswith("holds preference data (DPO: ")
    assert "set data.preference=chosen to train on the chosen side only" in reason
    assert all(key in reason for key in record if "chosen" in key or "rejected" in key)
    found = converter(CHOSEN)
    assert found(record).data == (user(), answer())
    assert found.rules.changes == {"rejected answers left out": 1}


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_labels(key: str) -> None:
    for value in (True, False):
        assert refused(chat(A, **{key: value})).startswith(f"holds preference data (KTO: {key})")
    assert convert(chat(A, **{key: True}), CHOSEN).data == (user(), answer())
    with pytest.raises(LeftOut, match=f"{key} is false"):
        convert(chat(A, **{key: False}), CHOSEN)
    unlabelled = converter()
    assert unlabelled(chat(A, **{key: None})).data == (user(), answer())
    assert unlabelled.rules.changes == {"empty labels taken for none": 1}


def test_numbers_are_labels_too() -> None:
    """Parquet and CSV readers give 0 and 1."""
    assert refused(chat(A, label=0)).startswith("holds preference data (KTO: label)")
    with pytest.raises(LeftOut, match="label is false"):
        convert(chat(A, label=0), CHOSEN)
    assert convert(chat(A, label=1), CHOSEN).data == (user(), answer())


def test_a_label_that_is_no_mark_is_not_dropped_with_the_sides() -> None:
    assert "unknown key label" in refused({"prompt": "q", "chosen": "a", "rejected": "b", "label": "rejected"}, CHOSEN)


def test_chosen_turns_as_json_text() -> None:
    turns = [Q, {**A, "content": "BAD", "loss": False}, Q, A]
    sample = convert({"prompt": "q", "chosen": json.dumps(turns), "rejected": "x"}, CHOSEN)
    assert [message.trained for message in sample.data if message.role == "assistant"] == [False, True]


def test_chosen_turns_that_contradict_the_messages() -> None:
    record = {"messages": [Q, {**A, "content": "old"}, Q], "chosen": [Q, A], "rejected": "x"}
    assert "differ later" in refused(record, CHOSEN)


@pytest.mark.parametrize("label", ["good", "false"])
def test_other_labels_are_unknown_keys(label: object) -> None:
    for settings in ((), (CHOSEN,)):
        assert "unknown key label" in refused(chat(A, label=label), *settings)


def test_labels_in_every_format() -> None:
    for record in (
        {"instruction": "q", "output": "a"},
        {"prompt": [Q], "completion": [A]},
        {"conversations": [TURN, {"from": "gpt", "value": "a"}]},
        {"meta_prompt": "", "data": [Q, A]},
    ):
        assert "KTO: label" in refused({**record, "label": False})
        assert convert({**record, "label": True}, CHOSEN).data == (user(), answer())


def test_empty_sides_are_no_preference_data() -> None:
    assert convert(chat(A, chosen=None, rejected="", rejected_messages=[])).data == (user(), answer())


def test_ignored_sides_are_no_preference_data() -> None:
    assert convert(chat(A, rejected="b"), "ignore_keys=[rejected]").data == (user(), answer())
    assert convert(chat(A, label=False), "ignore_keys=[label]").data == (user(), answer())


def test_named_sides() -> None:
    record = {"prompt": "q", "good": "a", "bad": "b"}
    assert "DPO: chosen, rejected" in refused(record, "columns={chosen: good, rejected: bad}")
    assert convert(record, "columns={chosen: good, rejected: bad}", CHOSEN).data == (user(), answer())


@pytest.mark.parametrize(
    ("record", "reason"),
    named_by(
        1,
        ({"prompt": "q", "chosen": "a", "chosen_response": "a"}, "has chosen and chosen_response: keep one of them"),
        ({"prompt": "q", "rejected": "b"}, "has no answer"),
        ({"prompt": "q", "chosen": "a", "output": "c"}, "has a chosen answer and output: keep one of them"),
        ({"chosen": "Human: q Assistant: a"}, "has no question: instruction, prompt, "),
        ({"prompt": "Human: q", "chosen": [Q, A]}, "has prompt, which its chosen turns do not hold"),
        ({"prompt": "q", "chosen": 4}, "content of message 2 is a number"),
        ({"prompt": "q", "chosen": ["a"]}, "response is a list, not a text"),
        ({"messages": [Q, A], "chosen": A}, "message 3 (assistant) follows assistant"),
        ({"messages": 5, "chosen": "a"}, "messages is a number, not a list"),
        ({"messages": {"role": "user"}, "chosen": "a"}, "messages is an object, not a list"),
        ({"messages": "q", "chosen": "a"}, "messages is a text that cannot be read"),
        ({"prompt": "q", "chosen": "a", "score_chosen": 9}, "unknown key score_chosen"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "has no answer"),
        ({"meta_prompt": "", "data": [Q], "chosen": [A]}, "fits more than one format"),
    ),
)
def test_chosen_sides_that_are_refused(record: dict[str, Any], reason: str) -> None:
    assert reason in refused(record, CHOSEN)
