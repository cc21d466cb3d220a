"""Samples to what is trained of them, and that to tokens, each one encoded or refused with a reason.

Marked tokens: int32 [tokens]; id for a token that is trained on, ~id (below 0) for one that is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple, Union

import numpy as np
import numpy.typing as npt

from openpangu_sft.conversations.calls import CALLS, THINKING
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.dataset.index_file import BEGINS, ROLES, Roles
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import END, START, TextSpan, sample_spans, whole
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.tokenizer.tool_prompt import ToolPrompt

Marked = npt.NDArray[np.int32]

_NUMBERS = {role: number for number, role in enumerate(ROLES, 1)}

FORGED = "which could forge a turn: take it out, or set data.control_tokens=escape"


def input_ids_of(marked: Marked) -> npt.NDArray[np.int32]:
    """Token ids: int32, of the same shape."""
    return np.where(marked < 0, ~marked, marked)


def labels_of(marked: Marked) -> npt.NDArray[np.int32]:
    """The id where it is a target, else -100: int32, of the same shape. Not shifted."""
    return np.where(marked < 0, np.int32(IGNORED), marked)


class TooLong(BadSample):
    """A sample with more tokens than a pack."""


class Encoded(NamedTuple):
    """A sample's marked tokens, their roles (uint8, see index_file.py), and whether its last messages were cut off."""

    marked: Marked
    roles: Roles
    truncated: bool = False


def training_views(sample: Sample, data: Data) -> list[Sample]:
    """What one sample is trained as, data.thinking and data.train_on applied: one sequence, or one for each answer.

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


def encode_samples(
    samples: Sequence[Union[Sample, BadSample]], tokenizer: Tokenizer, data: Data
) -> list[Union[Encoded, BadSample]]:
    """Encodes a batch of samples; bad ones are passed on.

    Returns for each sample its tokens, or why it has none: a control token in its content, or longer than a pack.
    """
    tool_prompt = ToolPrompt(data.tool_prompt)
    outcomes: list[Union[range, BadSample]] = []
    spans: list[TextSpan] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            outcomes.append(sample)
            continue
        begin = len(spans)
        try:
            spans += _spans(sample, tokenizer, tool_prompt, data.control_tokens)
            outcomes.append(range(begin, len(spans)))
        except BadSample as reason:
            outcomes.append(reason)
    tokens = _Tokens(spans, tokenizer)
    return [entry if isinstance(entry, BadSample) else _outcome(tokens, entry, data) for entry in outcomes]


def _spans(sample: Sample, tokenizer: Tokenizer, tool_prompt: ToolPrompt, policy: str) -> list[TextSpan]:
    """The spans of a sample; raises `BadSample` for a control token in its content, or one that the tokenizer lacks."""
    if tokenizer.lacking:
        thinking = any(message.thinking is not None for message in sample.data)
        calls = any(message.calls for message in sample.data)
        needed = {*(THINKING if thinking else ()), *(CALLS if calls else ())}
        if missing := needed & tokenizer.lacking:
            raise BadSample(f"has thinking or calls, and {min(missing)} is no token of this tokenizer: check paths.hf")
    tools = tool_prompt(sample.tools, None if policy == "allow" else tokenizer.control_token)
    if policy == "refuse":
        for name, text in sample.texts():
            if found := tokenizer.control_token(text):
                raise BadSample(f"{name} holds the control token {found.group()}, {FORGED}")
        if len(tools) > 1:  # cut where the template has put one together
            raise BadSample(f"tools rendered by data.tool_prompt hold a control token, {FORGED}")
    return list(sample_spans(sample, tokenizer.inside_control_tokens if policy == "escape" else whole, tools))


class _Tokens:
    """The tokens of all spans of a batch, in arrays: there are thousands of spans and millions of tokens."""

    def __init__(self, spans: list[TextSpan], tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(spans)
        self.spans = spans
        lengths = list(map(len, ids))
        self.ends = list(accumulate(lengths, initial=0))  # where the tokens of each span end, after a leading 0
        values = np.fromiter(chain.from_iterable(ids), np.int32, self.ends[-1])
        self.marked = np.where(np.repeat([not span.trained for span in spans], lengths), ~values, values)
        numbers = np.array([_NUMBERS[span.role] for span in spans], np.uint8)
        self.roles = np.repeat(numbers, lengths) + (values == tokenizer.start_id).astype(np.uint8) * BEGINS
        self._tokenizer = tokenizer
        self._control = np.concatenate([[0], np.cumsum(tokenizer.is_control[values])])
        frame = [span.text.count(START) + span.text.count(END) for span in spans]
        self._frame = list(accumulate(frame, initial=0))  # start and end tokens that the spans before each one spell

    def forged(self, spans: range) -> str:
        """A control token that no span contains but the tokenizer made, for instance of full-width letters."""
        begin, end = self.ends[spans.start], self.ends[spans.stop]
        found = self._control[end] - self._control[begin]
        frame = self._frame[spans.stop] - self._frame[spans.start]
        if found == frame + len(self._tokenizer.opening):  # nothing but turns
            return ""
        expected = Counter(self._tokenizer.opening)
        expected.update(token for span in spans for token in self._tokenizer.control_ids(self.spans[span].text))
        if found == sum(expected.values()):
            return ""
        values = input_ids_of(self.marked[begin:end])
        made = Counter(values[self._tokenizer.is_control[values]].tolist()) - expected
        return str(self._tokenizer.hf.convert_ids_to_tokens(next(made.elements())))


def _outcome(tokens: _Tokens, spans: range, data: Data) -> Union[Encoded, BadSample]:
    begin, kept = tokens.ends[spans.start], spans
    count = tokens.ends[spans.stop] - begin
    if count > data.seq_length:
        above = f"above data.seq_length {data.seq_length}: shorten it"
        if data.too_long != "truncate":
            return TooLong(f"{count} tokens, {above}, or set data.too_long")
        numbered = enumerate(tokens.spans[spans.start : spans.stop], spans.start + 1)
        answers = [stop for stop, span in numbered if span.trained and span.text.endswith(END)]
        fitting = [stop for stop in answers if tokens.ends[stop] - begin <= data.seq_length]
        if not fitting:
            return TooLong(f"{tokens.ends[answers[0]] - begin} tokens to the end of its first answer, {above}")
        kept = range(spans.start, fitting[-1])
    if data.control_tokens != "allow" and (token := tokens.forged(kept)):
        return BadSample(f"the tokenizer makes {token} of some text in it, which could forge a turn: take it out")
    inside = slice(begin, tokens.ends[kept.stop])
    return Encoded(tokens.marked[inside], tokens.roles[inside], truncated=kept != spans)
