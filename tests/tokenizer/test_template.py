"""The spans of a conversation, compared with a reimplementation of the published handler."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import conversation
from openpangu_sft.conversations.conversation import Message, Sample, parse_sample
from openpangu_sft.tokenizer import template
from openpangu_sft.tokenizer.template import TextSpan, prompt_spans, sample_spans

NAMES = {"user": "用户", "tool": "工具"}


def published_spans(record: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    """(text, trained, with bos) of every text that the published handler tokenizes, in order.

    All system prompts form one text, the only one with bos. A user or tool message is one text. An assistant message is
    two texts: its header, then its content and end token; only the second contributes to the loss.
    """
    texts = [("".join(f"[unused9]系统：{prompt}[unused10]" for prompt in record["meta_prompt"]), False, True)]
    for message in record["data"]:
        if message["role"] == "assistant":
            texts += [("[unused9]助手：", False, False), (f"{message['content']}[unused10]", True, False)]
        else:
            texts += [(f"[unused9]{NAMES[message['role']]}：{message['content']}[unused10]", False, False)]
    return texts


def test_a_single_turn_conversation() -> None:
    assert list(sample_spans(parse_sample(conversation("你好", "您好")))) == [
        TextSpan("[unused9]系统：[unused10]", trained=False, opens=True, role="system"),
        TextSpan("[unused9]用户：你好[unused10]", trained=False, opens=False, role="user"),
        TextSpan("[unused9]助手：", trained=False, opens=False, role="assistant"),
        TextSpan("您好[unused10]", trained=True, opens=False, role="assistant"),
    ]


SPOKEN = st.text(max_size=5).filter(str.strip)
TURN = st.tuples(SPOKEN, st.lists(st.text(max_size=3), max_size=2), SPOKEN)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=3), st.lists(TURN, min_size=1, max_size=3))
def test_spans_equal_those_of_the_published_handler(
    prompts: list[str], turns: list[tuple[str, list[str], str]]
) -> None:
    data = []
    for question, results, answer in turns:
        data += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if results:
            data += [{"role": "tool", "content": result} for result in results]
            data += [{"role": "assistant", "content": answer * 2}]
    record = {"meta_prompt": prompts, "data": data}
    assert [tuple(piece)[:3] for piece in sample_spans(parse_sample(record))] == published_spans(record)


@pytest.mark.parametrize("system", ["", "你是医生。"])
def test_the_generation_prompt_is_the_training_text_before_the_answer(system: str) -> None:
    context = (Message("user", "问"), Message("assistant", "答"), Message("tool", "{}"))
    record = {
        "meta_prompt": [system],
        "data": [message.to_json() for message in (*context, Message("assistant", "终"))],
    }
    trained = list(sample_spans(parse_sample(record)))
    assert list(prompt_spans((system,), context, reply=True)) == trained[:-1]
    assert trained[-1] == TextSpan("终[unused10]", trained=True, role="assistant")
    assert list(prompt_spans((system,), context)) == trained[:-2]


def test_the_text_equals_that_of_the_chat_template() -> None:
    """The chat template published with the openPangu weights renders the same text, without bos."""
    record = conversation("问", "答", "再问", "再答", system="系")
    text = "".join(piece.text for piece in sample_spans(parse_sample(record)))
    turns = [("系统", "系"), ("用户", "问"), ("助手", "答"), ("用户", "再问"), ("助手", "再答")]
    assert text == "".join(f"[unused9]{name}：{content}[unused10]" for name, content in turns)


def test_an_answer_is_thinking_text_and_calls() -> None:
    calls = '[{"name":"weather","arguments":{}}]'
    answers = [Message("assistant", "字", "想", calls), Message("assistant", "", "", calls), Message("assistant", "字")]
    texts = ["".join(span.text for span in prompt_spans(("",), [answer]) if span.trained) for answer in answers]
    assert texts == [
        f"[unused16]想[unused17]字[unused11]{calls}[unused12][unused10]",
        f"[unused16][unused17][unused11]{calls}[unused12][unused10]",
        "字[unused10]",
    ]
    [span] = [span for span in prompt_spans(("",), [Message("assistant", "字", trained=False)]) if "字" in span.text]
    assert span == TextSpan("字[unused10]", trained=False, role="assistant")


def test_the_tool_prompt_is_the_last_system_prompt() -> None:
    asked = [Message("user", "问"), Message("assistant", "", calls="[]"), Message("function", "晴")]
    texts = [tuple(span) for span in prompt_spans(("系",), asked, tool_prompt=["工[", "具]"])]
    assert texts[:2] == [
        ("[unused9]系统：系[unused10][unused9]系统：工[", False, True, "system"),
        ("具][unused10]", False, False, "system"),
    ]
    assert texts[-1] == ("[unused9]方法：晴[unused10]", False, False, "function")


def test_every_content_is_cut_and_nothing_else() -> None:
    """Each kind of text in its parts: what is written by the sample's author, not what is between."""

    def cut(text: str) -> list[str]:
        return [text[:1], text[1:]]

    sample = Sample(("ab",), (Message("user", "cd"), Message("assistant", "gh", "ef", "ij")))
    assert [span.text for span in sample_spans(sample, cut)] == [
        "[unused9]系统：a",
        "b[unused10]",
        "[unused9]用户：c",
        "d[unused10]",
        "[unused9]助手：",
        "[unused16]e",
        "f[unused17]g",
        "h[unused11]i",
        "j[unused12][unused10]",
    ]


def test_the_template_digest_is_unchanged() -> None:
    """A changed digest invalidates every dataset packed before."""
    assert template.TEMPLATE_DIGEST == DIGEST


DIGEST = "5b14f88bfd483edf9873b517e30b7a6edb97edf91c49a230a9f5db367b83cbc4"
