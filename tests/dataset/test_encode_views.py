"""What a conversation with thinking is trained as: each answer once, as a served model meets it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations_drawn import PLAIN, samples
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.dataset.encode import training_views
from openpangu_sft.recipe.data import Data


def views(sample: Sample, **settings: Any) -> list[Sample]:
    return training_views(sample, Data(seed=1, workers=1, seq_length=64, **settings))


def made(*answers: Message) -> Sample:
    """A conversation with these answers."""
    return Sample(("",), tuple(each for answer in answers for each in (Message("user", "问"), answer)))


def shown(view: Sample) -> str:
    """The answers of a view: thinking in brackets, trained ones with a star."""
    return " ".join(
        ("" if answer.thinking is None else f"({answer.thinking})") + answer.content + "*" * answer.trained
        for answer in view.data
        if answer.role == "assistant"
    )


def said(text: str, thinking: Any = None, trained: bool = True) -> Message:
    return Message("assistant", text, thinking, trained=trained)


@pytest.mark.parametrize(
    ("answers", "last", "every", "drop"),
    [
        ([said("a"), said("b")], ["a* b*"], ["a* b*"], ["a* b*"]),
        ([said("a", "x"), said("b", "y")], ["(x)a*", "a (y)b*"], ["(x)a* (y)b*"], ["a* b*"]),
        ([said("a", "x"), said("b")], ["(x)a*", "a b*"], ["(x)a* b*"], ["a* b*"]),
        ([said("a"), said("b", "y"), said("c")], ["a* (y)b*", "a b c*"], ["a* (y)b* c*"], ["a* b* c*"]),
        ([said("a", ""), said("b", "")], ["()a*", "a ()b*"], ["()a* ()b*"], ["a* b*"]),
        ([said("a", "x", False), said("b", "y")], ["a (y)b*"], ["(x)a (y)b*"], ["a b*"]),
        ([said("a", "x"), said("b", "y", False)], ["(x)a*"], ["(x)a* (y)b"], ["a* b"]),
        ([said("a"), said("b", "y", False)], ["a* b"], ["a* (y)b"], ["a* b"]),
    ],
)
def test_the_three_settings(answers: list[Message], last: list[str], every: list[str], drop: list[str]) -> None:
    sample = made(*answers)
    found = [[*map(shown, views(sample, thinking=thinking))] for thinking in ("last", "all", "drop")]
    assert found == [last, every, drop]


def test_a_sample_without_thinking_is_itself() -> None:
    sample = made(said("a"), said("b"))
    assert views(sample)[0] is sample


def test_only_the_last_answer() -> None:
    sample = made(said("a", "x"), said("b", "y"))
    assert [*map(shown, views(sample, train_on="last"))] == ["a (y)b*"]
    assert [*map(shown, views(sample, train_on="last", thinking="all"))] == ["(x)a (y)b*"]
    assert [*map(shown, views(made(said("a", "x"), said("b")), train_on="last"))] == ["a b*"]
    with pytest.raises(BadSample, match=r"the last answer has weight 0, and data\.train_on is last"):
        views(made(said("a"), said("b", trained=False)), train_on="last")


@given(samples(PLAIN), st.sampled_from(["all", "last"]))
def test_each_trained_answer_is_trained_once_and_sees_no_earlier_thinking(sample: Sample, train_on: str) -> None:
    answers = [place for place, message in enumerate(sample.data) if message.role == "assistant"]
    wanted = [place for place in answers if sample.data[place].trained]
    if train_on == "last":
        wanted = [place for place in wanted if place == answers[-1]]
        if not wanted:
            return
    trained: list[int] = []
    for view in views(sample, train_on=train_on):
        assert (view.meta_prompt, view.tools) == (sample.meta_prompt, sample.tools)
        mine = [place for place, message in enumerate(view.data) if message.trained and message.role == "assistant"]
        assert mine, "nothing to train on: its row could have a loss of 0/0"
        for place, message in enumerate(view.data):
            known = sample.data[place]
            assert (message.role, message.content, message.calls) == (known.role, known.content, known.calls)
            ends = place + 1 == len(view.data)
            assert message.thinking == (known.thinking if ends and message.trained else None)
            if place in mine:
                assert message.thinking == known.thinking
        trained += mine
    assert sorted(trained) == wanted


@given(samples(PLAIN))
def test_all_and_drop_keep_one_sample(sample: Sample) -> None:
    assert views(sample, thinking="all") == [sample]
    assert views(sample, thinking="drop") == [
        replace(sample, data=tuple(replace(message, thinking=None) for message in sample.data))
    ]
