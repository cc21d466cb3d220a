"""What one sample is trained as: one sequence, or one for each answer with thinking."""

from __future__ import annotations

from dataclasses import replace

from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.recipe.data import Data


def training_views(sample: Sample, data: Data) -> list[Sample]:
    """The samples to encode: data.thinking and data.train_on applied.

    A served model never sees its earlier thinking. So with data.thinking=last each answer with thinking ends a sample
    of its own, whose earlier answers have none; each answer is trained on once. Raises `BadSample` where none is left.
    """
    messages = sample.data
    if data.train_on == "last":
        messages = (*map(_context, messages[:-1]), messages[-1])
        if not messages[-1].trained:
            raise BadSample("nothing to train on: the last answer has weight 0, and data.train_on is last")
    if data.thinking == "all" or all(message.thinking is None for message in messages):
        return [sample if messages is sample.data else replace(sample, data=messages)]
    spoken = tuple(replace(message, thinking=None) for message in messages)
    if data.thinking == "drop":
        return [replace(sample, data=spoken)]
    views, begin = [], 0
    for number, message in enumerate(messages):
        if (message.thinking is not None and message.trained) or number + 1 == len(messages):
            end = message if message.trained else spoken[number]
            view = (*map(_context, spoken[:begin]), *spoken[begin:number], end)
            if any(answer.trained and answer.role == "assistant" for answer in view):
                views.append(replace(sample, data=view))
            begin = number + 1
    return views


def _context(message: Message) -> Message:
    return replace(message, trained=False)
