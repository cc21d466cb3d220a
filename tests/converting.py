"""Converts single records as the stage `format` does, and writes messages briefly."""

from __future__ import annotations

import functools
from typing import Any, Optional

import pytest

from conftest import ROOT
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.load import load_recipe


@functools.cache
def _data(settings: tuple[str, ...]) -> Data:
    return load_recipe(ROOT / "recipes/demo.yaml", [f"data.{setting}" for setting in settings]).data


def converter(*settings: str) -> Converter:
    """A new converter, with settings of the recipe's section data: "turns=lenient"."""
    return Converter(_data(settings))


def convert(record: object, *settings: str) -> Sample:
    """The sample of one record."""
    return converter(*settings)(record)


def refused(record: object, *settings: str) -> str:
    """Why there is no sample: one short line, which any file can hold."""
    with pytest.raises(BadSample) as caught:
        convert(record, *settings)
    reason = str(caught.value)
    assert reason.encode("utf-8")
    assert len(reason.splitlines()) == 1
    assert len(reason) < 700
    return reason


def says(role: str, content: Any = ..., **more: Any) -> dict[str, Any]:
    """A message in OpenAI's form; content is left out if it is not given."""
    return {"role": role, **({} if content is ... else {"content": content}), **more}


def chat(*answers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A record in OpenAI's form: a question, and what follows it."""
    return {"messages": [says("user", "q"), *answers], **more}


def user(content: str = "q") -> Message:
    return Message("user", content)


def tool(content: str = "r") -> Message:
    return Message("tool", content)


def answer(content: str = "a", thinking: Optional[str] = None, calls: str = "", trained: bool = True) -> Message:
    return Message("assistant", content, thinking, calls, trained)
