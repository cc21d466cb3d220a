"""Whatever the converter is given, nothing but a sample or a reason comes out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from any_sample import JSON
from converting import convert, converter
from openpangu_sft.conversations.chat import ROLE_OF
from openpangu_sft.conversations.conversation import parse_sample
from openpangu_sft.conversations.keys import BadSample

NAMES = """answers args arguments calls chosen completion content contents conversations data from function
functionCall functionDeclarations functionResponse function_call history id input instruction label loss messages
meta_prompt mood name output parts prompt query reasoning_content refusal rejected response role system
systemInstruction text thinking thought tool_calls tool_result tool_use tools type value weight""".split()  # noqa: SIM905
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[unused11]", "[unused12]", "[unused16]", "[unused17]"]
WORDS += ['[{"name":"f","arguments":{}}]', '{"name":"f"}', "[", "{}", "\ud800", "a", " "]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2),
    st.floats(),
    TEXTS,
    st.sampled_from([*NAMES, *ROLE_OF]),
    st.binary(max_size=2),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)),
    max_leaves=12,
)
CONTENTS = st.one_of(TEXTS, VALUES)
TURNS = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(sorted(ROLE_OF)), "content": CONTENTS},
        optional={
            "tool_calls": VALUES,
            "function_call": VALUES,
            "thinking": CONTENTS,
            "weight": st.sampled_from([0, 1, None, 0.5]),
            "parts": VALUES,
        },
    ),
    VALUES,
)
RECORDS = st.one_of(
    JSON,
    VALUES,
    st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUES, st.lists(TURNS, max_size=4), TEXTS), max_size=4),
    st.fixed_dictionaries(
        {"messages": st.lists(TURNS, max_size=5)},
        optional={"system": VALUES, "tools": VALUES, "chosen": st.one_of(TURNS, st.lists(TURNS, max_size=3))},
    ),
    st.fixed_dictionaries(
        {"prompt": st.one_of(TEXTS, st.lists(TURNS, max_size=2))},
        optional={"chosen": CONTENTS, "completion": CONTENTS, "history": VALUES, "input": VALUES},
    ),
)
SETTINGS = [
    (),
    ("turns=lenient", "preference=chosen"),
    ("source_format=alpaca",),
    ("source_format=openai", "columns={role: from, content: value}"),
    ("source_format=sharegpt", "ignore_keys=[mood,name]"),
    ("source_format=samples", "turns=lenient"),
    ("columns={messages: data, prompt: mood}",),
]


CALL: dict[str, Any] = {"name": "f", "arguments": {"x": 1}}
GOOD: list[dict[str, Any]] = [
    {"instruction": "q", "input": "r", "output": "a", "system": "s", "history": [["b", "c"]], "tools": [{"name": "f"}]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b", "label": True},
    {"query": "q", "answers": [CALL], "tools": "[]"},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": "<think>t</think>a",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": {"x": 1}},
            {"role": "assistant", "content": "b", "reasoning_content": "t", "weight": 1},
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "q"}]}]},
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "loss": False},
            {"from": "observation", "value": "<tool_response>1</tool_response>"},
            {"from": "gpt", "value": 'a<tool_call>{"name": "f"}</tool_call>'},
        ]
    },
    {
        "contents": [
            {"role": "user", "parts": [{"text": "q"}]},
            {"role": "model", "parts": [{"text": "t", "thought": True}, {"functionCall": {"name": "f", "args": {}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"x": 1}}}]},
            {"role": "model", "parts": [{"text": "a"}]},
        ],
        "systemInstruction": {"parts": [{"text": "s"}]},
        "tools": [{"functionDeclarations": [{"name": "f"}]}],
    },
    {
        "meta_prompt": ["s"],
        "data": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "thinking": "t", "content": "a", "calls": '[{"name":"f","arguments":{}}]'},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "[unused16]t[unused17]a[unused11][][unused12]", "weight": 1},
        ],
        "tools": '[{"name":"f"}]',
    },
]


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A good record with a value changed, added or left out in one or two places."""
    record = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 2))):
        place: Any = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if keys and isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            if not keys or (isinstance(place, dict) and draw(st.booleans())):
                place = place if isinstance(place, dict) else {}
                place[draw(st.sampled_from(NAMES))] = draw(CONTENTS)
            elif draw(st.booleans()):
                place[key] = draw(st.one_of(CONTENTS, TURNS))
            else:
                del place[key]
            break
    return record


@settings(max_examples=600)
@given(st.one_of(changed(), changed(), RECORDS), st.sampled_from(SETTINGS))
def test_any_value_gives_a_sample_or_a_reason(record: object, chosen: tuple[str, ...]) -> None:
    try:
        sample = convert(record, *chosen)
    except BadSample as error:
        reason = str(error)
        assert reason.encode("utf-8")
        assert len(reason.splitlines()) == 1
        return
    written = json.dumps(sample.to_json(), ensure_ascii=False).encode("utf-8")
    assert parse_sample(json.loads(written), converter("turns=lenient").rules) == sample


@pytest.mark.parametrize("record", GOOD, ids=lambda record: next(iter(record)))
def test_the_good_records_are_good(record: dict[str, Any]) -> None:
    assert convert(record, "preference=chosen")
