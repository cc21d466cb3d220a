"""Conversations that property tests draw: thinking, calls, tools, weights, and texts that spell control tokens."""

from __future__ import annotations

from hypothesis import strategies as st

from openpangu_sft.conversations.calls import call_text, joined_calls, tools_text
from openpangu_sft.conversations.conversation import Message, Sample

PLAIN = ["好", "a b", " ", "\n", "[", "{", '"', "助手：", "天气"]
TOKENS = ["unused9]", "[unused9]", "[unused10]", "[unused16]", "[unused11]", "</s>", "<s>", "[unused10][unused9]助手："]


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    """Short texts with something in them."""
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=4).map("".join).filter(str.strip)


def answers(pieces: list[str]) -> st.SearchStrategy[Message]:
    """Answers of every kind."""
    call = st.builds(lambda name, text: call_text({"name": name, "arguments": {text: [text]}}), *[texts(pieces)] * 2)
    thinking = st.none() | st.just("") | texts(pieces)
    calls = st.lists(call, max_size=2).map(joined_calls)
    return st.builds(Message, st.just("assistant"), texts(pieces), thinking, calls, st.booleans())


def samples(pieces: list[str]) -> st.SearchStrategy[Sample]:
    """Conversations of one to four questions, each with one answer, or two with a result of a tool between."""
    question = st.builds(Message, st.just("user"), texts(pieces))
    result = st.builds(Message, st.sampled_from(["tool", "function"]), texts(pieces))
    turn = st.tuples(question, answers(pieces)) | st.tuples(question, answers(pieces), result, answers(pieces))
    tools = st.lists(st.dictionaries(texts(pieces), texts(pieces), min_size=1, max_size=2), max_size=2).map(tools_text)
    data = st.lists(turn, min_size=1, max_size=4).map(lambda turns: tuple(each for turn in turns for each in turn))
    return st.builds(
        Sample, st.lists(texts(pieces) | st.just(""), min_size=1, max_size=2).map(tuple), data, tools
    ).filter(lambda sample: any(message.trained for message in sample.data if message.role == "assistant"))
