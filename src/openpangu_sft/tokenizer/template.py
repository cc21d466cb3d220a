"""openPangu's conversation format: samples to spans of text, each trained on or ignored.

    <s>[unused9]系统：…[unused10][unused9]用户：…[unused10][unused9]助手：…[unused10]

An answer is [unused16]thinking[unused17]text[unused11][{"name":…,"arguments":…}][unused12], of which only the text has
to be there. The spans are those that the published handler gives to the tokenizer one by one. Their borders matter: a
tokenizer may encode a text differently from its two halves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple, Optional

from openpangu_sft.conversations.calls import CALLS, THINKING
from openpangu_sft.conversations.conversation import Message, Sample

START, END = "[unused9]", "[unused10]"
HEADERS = {"system": "系统：", "user": "用户：", "assistant": "助手：", "tool": "工具：", "function": "方法："}

_SINCE_THE_FIRST_VERSION = sorted(item for item in HEADERS.items() if item[0] != "function")
TEMPLATE_DIGEST = hashlib.sha256(repr((START, END, _SINCE_THE_FIRST_VERSION)).encode()).hexdigest()
"""Recorded in manifests: data made with another template is refused. What was added since changes no older data."""


class TextSpan(NamedTuple):
    """A text that is encoded by itself."""

    text: str
    trained: bool  # whether its tokens are targets
    opens: bool = False  # whether the tokenizer puts its bos in front
    role: str = ""  # of the message that it belongs to, one of `HEADERS`; empty where none is known


_REPLY = TextSpan(START + HEADERS["assistant"], trained=False, role="assistant")

Cut = Callable[[str], Sequence[str]]
"""Cuts a content into parts that are encoded by themselves, so that no token spans two of them; one part at least."""


Find = Callable[[str, int], Optional[re.Match[str]]]
"""Finds the first control token in a text from a position on, as `Tokenizer.control_token` does."""


def whole(content: str) -> Sequence[str]:
    return (content,)


def cut_inside(text: str, find: Find, given: Sequence[int] = ()) -> list[str]:
    """Cuts a text inside each of its control tokens, which leaves ordinary characters.

    With `given`, one number for each character, only tokens with a character of which it is not 0.
    """
    parts, begin, searched = [], 0, 0
    while found := find(text, searched):
        searched = found.end()
        if not given or any(given[found.start() : searched]):
            searched = found.start() + 1
            parts.append(text[begin:searched])
            begin = searched
    return [*parts, text[begin:]]


def sample_spans(sample: Sample, cut: Cut = whole, tool_prompt: Sequence[str] = ()) -> Iterator[TextSpan]:
    """The spans of a whole sample; see `prompt_spans`."""
    return prompt_spans(sample.meta_prompt, sample.data, cut=cut, tool_prompt=tool_prompt)


def prompt_spans(
    meta_prompt: Sequence[str],
    messages: Sequence[Message],
    reply: bool = False,
    cut: Cut = whole,
    tool_prompt: Sequence[str] = (),
) -> Iterator[TextSpan]:
    """The spans of system prompts and messages: only the assistants' contents, each with its end token, are trained.

    With `reply` the assistant's header comes last, for generation. `tool_prompt` is one more system prompt, in parts
    that are cut already; empty ones are left out then.
    """
    prompts = [cut(prompt) for prompt in meta_prompt if prompt or not tool_prompt]
    prompts += [tool_prompt] if tool_prompt else []
    pieces = [piece for prompt in prompts for piece in ((START + HEADERS["system"],), prompt, (END,))]
    yield from _spans(pieces, "system", trained=False, opens=True)
    for message in messages:
        if message.role == "assistant":
            yield _REPLY
            yield from _spans([*_answer(message, cut), (END,)], message.role, message.trained)
        else:
            pieces = [(START + HEADERS[message.role],), cut(message.content), (END,)]
            yield from _spans(pieces, message.role, trained=False)
    if reply:
        yield _REPLY


def _answer(message: Message, cut: Cut) -> Iterator[Sequence[str]]:
    if message.thinking is not None:
        yield from (THINKING[:1], cut(message.thinking), THINKING[1:])
    yield cut(message.content)
    if message.calls:
        yield from (CALLS[:1], cut(message.calls), CALLS[1:])


def _spans(pieces: Sequence[Sequence[str]], role: str, trained: bool, opens: bool = False) -> Iterator[TextSpan]:
    """Spans that are cut only inside of pieces: the last part of a piece and the first of the next are one text."""
    text = ""
    for first, *others in pieces:
        text += first
        for other in others:
            yield TextSpan(text, trained, opens, role)
            text, opens = other, False
    yield TextSpan(text, trained, opens, role)
