"""Samples and JSON values drawn at random, for property tests."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from openpangu_sft.conversations.conversation import Message, Sample

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=8)
"""Texts without tags and tokens that mean something in an answer."""
SPOKEN = TEXT.filter(str.strip)
"""Texts that are not blank, as questions and answers must be."""

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(st.characters(), max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
_FINITE = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)
OBJECTS = st.dictionaries(TEXT, _FINITE, max_size=2)


@st.composite
def calls(draw: st.DrawFn) -> str:
    """Calls as the JSON text of a list."""
    names = draw(st.lists(TEXT.filter(bool), min_size=1, max_size=2))
    found = [{"name": name, "arguments": draw(OBJECTS)} for name in names]
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any sample that keeps the rules."""
    messages: list[Message] = []

    def answer(**more: Any) -> Message:
        thinking = draw(st.none() | SPOKEN.map(str.strip))
        return Message("assistant", draw(SPOKEN.map(str.strip)), thinking, **more)

    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(SPOKEN)))
        for _ in range(draw(st.integers(0, 2))):
            messages.append(answer(calls=draw(calls()), trained=draw(st.booleans())))
            messages += [Message("tool", draw(TEXT).strip()) for _ in range(draw(st.integers(1, 2)))]
        messages.append(answer(trained=draw(st.booleans())))
    messages.append(Message("user", draw(SPOKEN)))
    messages.append(answer())
    tools = [{"name": name, "parameters": {}} for name in draw(st.lists(TEXT, max_size=2))]
    text = json.dumps(tools, ensure_ascii=False, separators=(",", ":")) if tools else ""
    prompts = draw(st.lists(SPOKEN, unique=True, max_size=2)) or [""]
    return Sample(tuple(prompts), tuple(messages), text)
