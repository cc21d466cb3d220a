"""Lists of turns: who speaks, what, in which order, and whether it is trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from converting import answer, chat, convert, converter, refused, says, tool, user
from openpangu_sft.conversations.chat import ROLE_OF
from openpangu_sft.conversations.conversation import Message, Sample
from parameter_ids import named_by

A = says("assistant", "a")


def messages(*given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(given), **more}


# --- Roles and lists


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(messages(says("user", "q"), A), id="openai"),
        pytest.param(messages(says("User", "q"), says(" Assistant", "a")), id="capitals"),
        pytest.param(messages(says("human", "q"), says("model", "a")), id="model"),
        pytest.param({"messages": json.dumps([says("user", "q"), A])}, id="json-text"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, id="sharegpt"
        ),
        pytest.param(
            {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, id="user"
        ),
        pytest.param({"conversations": [says("user", "q"), A]}, id="openai-turns"),
        pytest.param({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, id="from-value"),
        pytest.param({"conversation": [says("user", "q"), A], "turn": 1}, id="conversation"),
        pytest.param(
            {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
            id="gemini",
        ),
        pytest.param(messages(says("user", "q", value=None, parts=None, text=None), A), id="nulls"),
        pytest.param(messages(says("prompter", "q"), says("chatbot", "a")), id="oasst-cohere"),
    ],
)
def test_names_of_lists_roles_and_contents(record: dict[str, Any]) -> None:
    sample = convert(record)
    assert (sample.meta_prompt, sample.data, sample.tools) == (("",), (user(), answer()), "")


@pytest.mark.parametrize("speaker", [name for name, role in ROLE_OF.items() if role in ("tool", "function")])
def test_names_of_tools(speaker: str) -> None:
    sample = convert(chat(A, says(speaker, "r"), A))
    assert sample.data[2] == Message("function" if speaker == "function" else "tool", "r")


@pytest.mark.parametrize(
    ("turn", "reason"),
    named_by(
        1,
        (1, "message 2 is a number, not an object with role and content"),
        (None, "message 2 is null, not an object"),
        ({}, "message 2 has no role: keys found are none; name its key in data.columns.role"),
        ({"speaker": "gpt", "value": "a"}, "message 2 has no role: keys found are speaker, value; name its key in"),
        (
            {"role": "gpt", "said": "a"},
            "message 2 has no content: keys found are role, said; name its key in data.colu",
        ),
        ({"role": "gpt", "content": "a", "speaker": "b"}, "unknown key speaker of message 2"),
        ({"role": None, "content": "a"}, "role of message 2 is null, not a text"),
        ({"role": 3, "content": "a"}, "role of message 2 is a number, not a text"),
        (says("narrator", "a"), "message 2 has an unknown role: 'narrator', known: system, "),
        (says("", "a"), "message 2 has an unknown role: ''"),
        ({"role": "user", "from": "gpt", "content": "a"}, "message 2 has role and from, which differ"),
        (says("assistant"), "message 2 has no content: keys found are role"),
        (says("assistant", None), "message 2 (assistant) has neither content nor tool calls"),
        (says("user", None), "message 2 has no content"),
        (says("tool", None), "message 2 has no content"),
        (says("assistant", 4), "content of message 2 is a number, not a text"),
        (says("assistant", {"text": "a"}), "content of message 2 is an object, not a text"),
        (says("assistant", "a", value="b"), "message 2 has content and value: keep one of them"),
        (says("assistant", ""), "message 2 (assistant) is empty: there is nothing to train on but its end"),
        (says("assistant", " \n"), "message 2 (assistant) is empty"),
        (says("assistant", "\ud800"), "message 2 holds half a character"),
    ),
)
def test_turns_that_are_refused(turn: object, reason: str) -> None:
    assert reason in refused({"messages": [says("user", "q"), turn]})


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_question_is_refused_in_all_formats(question: str) -> None:
    for record in (
        messages(says("user", question), A),
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]},
        {"prompt": question, "completion": "a"},
        {"contents": [{"role": "user", "parts": [{"text": question}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        {"meta_prompt": "", "data": [says("user", question), A]},
    ):
        assert "message 1 (user) is empty" in refused(record)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_refused_in_all_formats(empty: str) -> None:
    for record in (
        chat(says("assistant", empty)),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": empty}]},
        {"instruction": "q", "output": empty},
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": empty}]}]},
        {"meta_prompt": "", "data": [says("user", "q"), says("assistant", empty)]},
    ):
        assert "message 2 (assistant) is empty" in refused(record)
    assert "message 2 (assistant) is empty" in refused(chat(says("assistant", empty), says("user", "b"), A))


def test_a_refusal_is_the_answer() -> None:
    assert convert(chat(says("assistant", None, refusal="No."))).data[1] == answer("No.")
    assert convert(chat(says("assistant", "", refusal="No."))).data[1] == answer("No.")
    assert convert(chat(says("assistant", [{"type": "refusal", "refusal": "No."}]))).data[1] == answer("No.")
    assert convert(chat(says("assistant", "a", refusal=None, audio=None, annotations=[]))).data[1] == answer()
    assert "has both content and refusal" in refused(chat(says("assistant", "a", refusal="No.")))


def test_odd_texts_stay_as_they_are() -> None:
    odd = "C:\\new\r\nline\u2028two\u0000end\ufeff <s> </s> <unk> \"'😀\u00a0\u200b "
    assert convert(messages(says("user", odd), says("assistant", odd))).data == (user(odd), answer(odd))


# --- Weights


@pytest.mark.parametrize("key", ["weight", "loss", "loss_weight", "train"])
def test_weights(key: str) -> None:
    for value in (0, False, 0.0):
        sample = convert(messages(says("user", "q", **{key: value}), {**A, key: value}, says("user", "b"), A))
        assert sample.data == (user(), answer(trained=False), user("b"), answer())
    for value in (1, True, 1.0, None):
        assert convert(chat({**A, key: value})).data == (user(), answer())
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: 0}]
    assert "nothing to train on: every answer has weight 0" in refused({"conversations": turns})
    for wrong in (0.5, 2, -1, "0", "false", [], {}):
        assert f"{key} of message 2 is " in refused(chat({**A, key: wrong}))


def test_weights_of_calls_and_of_what_is_no_answer() -> None:
    call = says("function_call", {"name": "f", "arguments": {}}, weight=0)
    found = converter()
    sample = found(messages(says("user", "q", weight=1), call, says("tool", "r", loss=True), A))
    assert [message.trained for message in sample.data] == [True, False, True, True]
    assert found.rules.changes == {"weights of messages that are no answers ignored": 2}


def test_weights_that_contradict_each_other() -> None:
    reason = refused(chat({**A, "weight": 1, "loss": False, "train": None}))
    assert reason == "message 2 is to be trained on, and not: weight, loss"
    assert convert(chat({**A, "weight": 1, "loss": True, "train": None})).data[1].trained


# --- Parts


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([{"type": "text", "text": "a"}], id="openai"),
        pytest.param([{"type": "text", "value": "a"}], id="v1"),
        pytest.param([{"type": "output_text", "text": "a", "annotations": [{"url": "x"}]}], id="responses"),
        pytest.param([{"text": "a"}], id="gemini"),
        pytest.param(["a"], id="text"),
        pytest.param([{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": ""}], id="parquet"),
        pytest.param([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], id="anthropic"),
    ],
)
def test_text_parts(content: list[Any]) -> None:
    assert convert(chat(says("assistant", content))).data[1] == answer()
    assert convert(messages(says("user", content), A)).data[0] == user("a")


@pytest.mark.parametrize(
    ("part", "reason"),
    named_by(
        1,
        (1, "a part of message 2 is a number, not an object"),
        ({}, "text of a part of message 2 is null"),
        ({"type": "text"}, "text of a part of message 2 is null"),
        ({"type": "text", "text": ["a"]}, "text of a part of message 2 is a list"),
        ({"type": "text", "text": "a", "value": "b"}, "has text and value: keep one of them"),
        ({"type": "text", "text": "a", "thinking": "t"}, "unknown key thinking of a part of message 2"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 2 has content other than text: 'image_url'"),
        ({"type": "image"}, "message 2 has content other than text: 'image'"),
        ({"type": ["text"], "text": "a"}, "message 2 has content other than text: ['text']"),
        ({"inlineData": {"data": "x"}}, "key inlineData of a part of message 2: images, audio"),
        ({"type": "redacted_thinking", "data": "x"}, "content other than text: 'redacted_thinking'"),
        (
            {"type": "tool_result", "content": "r"},
            "(assistant) holds a tool's result: give it a message with role tool",
        ),
    ),
)
def test_parts_that_are_refused(part: object, reason: str) -> None:
    assert reason in refused(chat(says("assistant", [part])))


def test_texts_of_parts_are_joined_by_newlines_except_in_an_answer() -> None:
    parts = [{"type": "text", "text": text} for text in ("a", "", "b")]
    record = {"system": parts, "messages": [says("user", parts), says("assistant", parts)]}
    assert convert(record) == Sample(("a\nb",), (user("a\nb"), answer("ab")))
    record["messages"][:0] = [says("system", parts)]
    assert convert(record).meta_prompt == ("a\nb",)


RESULTS: list[Any] = [
    pytest.param(says("tool", {"tins": 12}), ['{"tins":12}'], id="object"),
    pytest.param(says("tool", [{"type": "hotel", "stars": 3}]), ['[{"type":"hotel","stars":3}]'], id="list"),
    pytest.param(says("tool", []), ["[]"], id="empty-list"),
    pytest.param(says("tool", ""), [""], id="empty"),
    pytest.param(says("tool", [{"type": "text", "text": "r"}]), ["r"], id="parts"),
    pytest.param(says("tool", "<tool_response>\n12\n</tool_response>"), ["12"], id="hermes"),
    pytest.param(
        says("tool", "<tool_response>1</tool_response>\n<tool_response>\n2</tool_response>"),
        ["1", "2"],
        id="hermes-two",
    ),
    pytest.param(says("tool", "see <tool_response>"), ["see <tool_response>"], id="text"),
    pytest.param(says("user", [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]), ["r"], id="anthropic"),
    pytest.param(
        says("user", [{"type": "tool_result", "content": [{"type": "text", "text": "r"}], "is_error": False}]),
        ["r"],
        id="anthropic-parts",
    ),
    pytest.param(
        says("user", [{"type": "tool_result", "content": text} for text in ("1", None, "3")]),
        ["1", "", "3"],
        id="anthropic-three",
    ),
    pytest.param(
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"x": 1}}}]}, ['{"x":1}'], id="gemini"
    ),
]


@pytest.mark.parametrize(("turn", "results"), RESULTS)
def test_results_of_tools(turn: dict[str, Any], results: list[str]) -> None:
    assert convert(chat(A, turn, A)).data == (user(), answer(), *map(tool, results), answer())


def test_geminis_function_role() -> None:
    turn = {"role": "function", "parts": [{"functionResponse": {"name": "f", "response": {"x": 1}}}]}
    assert convert(chat(A, turn, A)).data[2] == Message("function", '{"x":1}')


def test_results_that_are_refused() -> None:
    image = {"type": "tool_result", "content": [{"type": "image", "source": {"data": "x"}}]}
    assert "a tool's result in message 3 has content other than text: 'image'" in refused(
        chat(A, says("user", [image]), A)
    )
    assert "(system) has 'r': only an assistant's" in refused(
        messages(says("system", [{"type": "tool_result", "content": "r"}]), says("user", "q"), A)
    )
    assert "content of message 3 is a number" in refused(chat(A, says("tool", 12), A))
