"""The order of turns and system prompts: refused by default, repaired and counted where data.turns is lenient."""

from __future__ import annotations

from typing import Any

import pytest

from converting import answer, chat, convert, converter, refused, says, tool, user
from openpangu_sft.conversations.conversation import Message, reason_class
from parameter_ids import named_by

LENIENT = "turns=lenient"
A, B, Q, S = says("assistant", "a"), says("assistant", "b"), says("user", "q"), says("system", "s")
CALL = says("assistant", None, tool_calls=[{"name": "f", "arguments": {}}])
CALLS = '[{"name":"f","arguments":{}}]'
JOINED = "messages of one {} in a row joined"


@pytest.mark.parametrize(
    ("turns", "reason", "data", "changes"),
    [
        pytest.param(
            [Q, says("user", "r"), A],
            "message 2 (user) follows user: expected assistant; data.turns=lenient accepts it",
            [user("q\nr"), answer()],
            {JOINED.format("user"): 1},
            id="two-questions",
        ),
        pytest.param(
            [Q, A, B],
            "message 3 (assistant) follows assistant: expected user or tool or function; data.turns=lenient accepts it",
            [user(), answer("a\nb")],
            {JOINED.format("assistant"): 1},
            id="two-answers",
        ),
        pytest.param(
            [A, Q, B],
            "message 1 (assistant) comes first: expected user; data.turns=lenient accepts it",
            [answer(), user(), answer("b")],
            {"conversations that begin with the assistant kept": 1},
            id="greeting",
        ),
        pytest.param(
            [S, A],
            "message 2 (assistant) comes first: expected user; data.turns=lenient accepts it",
            [answer()],
            {"conversations that begin with the assistant kept": 1},
            id="system-and-answer",
        ),
        pytest.param(
            [Q, A, says("user", "r")],
            "the last message is the user's: a sample must end with an assistant message; data.turns=lenient drops "
            "what follows the last one",
            [user(), answer()],
            {"messages after the last answer dropped": 1},
            id="question-last",
        ),
        pytest.param(
            [Q, CALL, says("tool", "1"), says("tool", "2")],
            "the last message is the tool's: a sample must end with an assistant message; data.turns=lenient drops "
            "what follows the last one",
            [user(), answer("", calls=CALLS)],
            {"messages after the last answer dropped": 2},
            id="results-last",
        ),
        pytest.param(
            [Q, CALL, says("tool", "r"), says("user", "p"), A],
            "message 4 (user) follows tool: expected tool or function or assistant; data.turns=lenient accepts it",
            [user(), answer("", calls=CALLS), tool(), user("p"), answer()],
            {"questions directly after a tool's result kept": 1},
            id="question-after-result",
        ),
        pytest.param(
            [Q, A, S, says("user", "r"), B],
            "message 3 is a system prompt inside the conversation: move it to the beginning, or set data.turns=lenient",
            [user(), answer(), user("r"), answer("b")],
            {"later system prompts moved to the beginning": 1},
            id="later-system",
        ),
    ],
)
def test_an_order_that_can_be_repaired(
    turns: list[dict[str, Any]], reason: str, data: list[Message], changes: dict[str, int]
) -> None:
    assert refused({"messages": turns}) == reason
    lenient = converter(LENIENT)
    assert lenient({"messages": turns}).data == tuple(data)
    assert lenient.rules.changes == changes


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        pytest.param([says("tool", "r"), A], "message 1 (tool) comes first: expected user", id="tool-first"),
        pytest.param([Q, says("tool", "r"), A], "message 2 (tool) follows user: expected assistant", id="tool-second"),
        pytest.param([Q, {**A, "weight": 0}, B], "message 3 (assistant) follows assistant", id="weights-differ"),
        pytest.param([Q, A, {**B, "thinking": "t"}], "message 3 (assistant) follows assistant", id="thinking-inside"),
        pytest.param([Q, CALL, B], "message 3 (assistant) follows assistant", id="text-after-call"),
        pytest.param([S], "data has no messages", id="system-only"),
    ],
)
def test_an_order_that_cannot(turns: list[dict[str, Any]], reason: str) -> None:
    for settings in ((), (LENIENT,)):
        refusal = refused({"messages": turns}, *settings)
        assert reason in refusal
        assert "lenient" not in refusal


def test_questions_without_an_answer() -> None:
    assert "the last message is the user's" in refused({"messages": [Q]})
    assert "there is no assistant message" in refused({"messages": [Q, Q]}, LENIENT)


def test_joined_answers_keep_the_thinking_in_front_and_the_calls_at_the_end() -> None:
    first, last = {**A, "thinking": "t"}, {**CALL, "content": "b"}
    assert convert({"messages": [Q, first, last]}, LENIENT).data == (user(), answer("a\nb", "t", CALLS))


# --- System prompts


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [S, Q, A]},
        {"messages": [says("developer", "s"), Q, A]},
        {"system": "s", "messages": [Q, A]},
        {"system": "s", "messages": [S, Q, A]},
        {"system": "s", "messages": [says("system", ""), Q, A]},
        {"system": "", "system_prompt": None, "messages": [S, Q, A]},
        {"system_prompt": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"system": [{"type": "text", "text": "s", "cache_control": {}}], "messages": [Q, A]},
        {"systemInstruction": {"role": "system", "parts": [{"text": "s"}]}, "contents": [Q, A]},
        {"system_instruction": {"parts": {"text": "s"}}, "contents": [Q, A]},
        {"system": "s", "instruction": "q", "output": "a"},
        {"system": "s", "prompt": "q", "completion": "a", "history": []},
        {"prompt": [S, Q], "completion": [A]},
    ],
)
def test_a_system_prompt(record: dict[str, Any]) -> None:
    sample = convert(record)
    assert (sample.meta_prompt, sample.data) == (("s",), (user(), answer()))


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_no_system_prompt(nothing: object) -> None:
    for record in (
        chat(A, system=nothing),
        {"messages": [says("system", nothing or None), Q, A]},
        {"messages": [says("system"), Q, A]},  # from parquet
    ):
        assert convert(record).meta_prompt == ("",)


def test_several_system_prompts_stay_several() -> None:
    record = {"messages": [S, says("developer", "t"), says("system", ""), Q, A]}
    assert convert(record).meta_prompt == ("s", "t")
    later = [S, Q, A, says("system", "t"), Q, B]
    for record in ({"messages": later}, {"system": "s", "messages": later}, {"system": "s", "messages": later[1:]}):
        assert convert(record, LENIENT).meta_prompt == ("s", "t")


@pytest.mark.parametrize(
    ("record", "reason"),
    named_by(
        1,
        (chat(A, system="s", system_prompt="s"), "has system and system_prompt: keep one of them"),
        ({"system": "t", "messages": [S, Q, A]}, "has a system field and another system prompt as message 1"),
        (chat(A, system=1.5), "system is a number, not a text"),
        (chat(A, system=False), "system is a boolean, not a text"),
        (chat(A, system=["s"]), "system is a list, not a text"),
        (chat(A, system={"text": "s"}), "unknown key text of system"),
        (chat(A, system={"role": "system"}), "system is null, not a text"),
        (chat(A, system={"parts": [{"functionCall": {"name": "f"}}]}), "system is a list, not a text"),
        (chat(A, system=[{"type": "image"}]), "system has content other than text: 'image'"),
        (chat(A, system="\udfff"), "meta_prompt holds half a character"),
    ),
)
def test_system_prompts_that_are_refused(record: dict[str, Any], reason: str) -> None:
    assert reason in refused(record)


# --- Reasons


def test_reasons_are_grouped_without_what_differs() -> None:
    def group(*records: object) -> set[str]:
        return {reason_class(refused(record)) for record in records}

    shifted = [S, Q, Q]
    assert group(*({"messages": shifted[begin:]} for begin in (0, 1))) == {"message N (user) follows user"}
    assert len(group(*({"conversations": [{"from": name, "value": "a"}]} for name in ("x", "y: z", "it's 3")))) == 1
    assert group({"a": 1}, {"b": 2}, {}) == {"unknown format"}
    assert group(chat({**A, "mood": 1}), {"messages": [Q, A, Q, {**A, "mood": 2}]}) == {"unknown key mood of message N"}
    calls = [says("assistant", None, tool_calls=[{"name": name, "arguments": "{"}]) for name in ("f", "g")]
    assert group(*map(chat, calls)) == {"arguments of the call of … is a text that cannot be read"}
