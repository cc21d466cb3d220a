"""openPangu's conversation format: samples to spans of text, each trained on or ignored.

    <s>[unused9]系统：…[unused10][unused9]用户：…[unused10][unused9]助手：…[unused10]

The spans are those that the published handler gives to the tokenizer one by one. Their borders matter: a tokenizer may
encode a text differently from its two halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple

from openpangu_sft.conversations.conversation import Message, Sample

START, END = "[unused9]", "[unused10]"
HEADERS = {"system": "系统：", "user": "用户：", "assistant": "助手：", "tool": "工具："}

TEMPLATE_DIGEST = hashlib.sha256(repr((START, END, sorted(HEADERS.items()))).encode()).hexdigest()
"""Recorded in manifests: data made with another template is refused."""


class TextSpan(NamedTuple):
    """A text that is encoded by itself.

    Args:
        text: what the tokenizer gets.
        trained: whether its tokens are targets.
        opens: whether the tokenizer puts its bos in front.
        role: of the message that it belongs to, one of `HEADERS`; empty where none is known.
    """

    text: str
    trained: bool
    opens: bool = False
    role: str = ""


Cut = Callable[[str], Sequence[str]]
"""Cuts a content into parts that are encoded by themselves, so that no token spans two of them; one part at least."""


def _whole(content: str) -> Sequence[str]:
    return (content,)


def sample_spans(sample: Sample, cut: Cut = _whole) -> Iterator[TextSpan]:
    """The spans of a whole sample: only the assistants' contents, each with its end token, are trained."""
    return prompt_spans(sample.meta_prompt, sample.data, cut=cut)


def prompt_spans(
    meta_prompt: tuple[str, ...], messages: tuple[Message, ...], reply: bool = False, cut: Cut = _whole
) -> Iterator[TextSpan]:
    """The spans of system prompts and messages; with `reply`, the assistant's header last, for generation."""
    system = [""]
    for prompt in meta_prompt:
        first, *others = cut(prompt)
        system[-1] += START + HEADERS["system"] + first
        system += others
        system[-1] += END
    yield from _spans(system, "system", trained=False, opens=True)
    for message in messages:
        header, texts = START + HEADERS[message.role], [*cut(message.content)]
        texts[-1] += END
        trained = message.role == "assistant"
        if trained:
            yield TextSpan(header, trained=False, role=message.role)
        else:
            texts[0] = header + texts[0]
        yield from _spans(texts, message.role, trained)
    if reply:
        yield TextSpan(START + HEADERS["assistant"], trained=False, role="assistant")


def _spans(texts: list[str], role: str, trained: bool, opens: bool = False) -> Iterator[TextSpan]:
    for number, text in enumerate(texts):
        yield TextSpan(text, trained, opens and not number, role)
