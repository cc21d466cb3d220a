"""Every form of a sample gives it back: OpenAI, ShareGPT, Hermes, Anthropic, Gemini, own tokens, columns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from any_sample import SPOKEN, samples
from converting import convert
from openpangu_sft.conversations.conversation import Message, Sample


def as_given(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))


def openai(sample: Sample) -> dict[str, Any]:
    def message(given: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"role": given.role, "content": given.content, "reasoning_content": given.thinking}
        listed = [
            {"id": "c", "type": "function", "function": {**call, "arguments": as_given(call["arguments"])}}
            for call in json.loads(given.calls or "[]")
        ]
        return {**found, "tool_calls": listed or None, **({} if given.trained else {"weight": 0})}

    prompts = [{"role": "system", "content": prompt} for prompt in sample.meta_prompt]
    tools = [{"type": "function", "function": tool} for tool in json.loads(sample.tools or "[]")]
    return {"messages": prompts + list(map(message, sample.data)), "tools": tools}


def sharegpt(sample: Sample) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"from": "system", "value": prompt} for prompt in sample.meta_prompt]
    for message in sample.data:
        speaker = {"user": "human", "assistant": "gpt", "tool": "observation"}[message.role]
        weight = {"user": None, "assistant": int(message.trained)}.get(message.role)
        thinking = f"<think>\n{message.thinking}\n</think>\n\n" if message.thinking else ""
        turns.append({"from": speaker, "value": thinking + message.content, "weight": weight})
        turns += [
            {"from": "function_call", "value": json.dumps(call), "weight": weight}
            for call in json.loads(message.calls or "[]")
        ]
    return {"conversations": turns, "tools": sample.tools}


def hermes(sample: Sample) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"from": "system", "value": prompt} for prompt in sample.meta_prompt]
    for message in sample.data:
        tags = "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in json.loads(message.calls or "[]"))
        value = f"<tool_response>{message.content}</tool_response>" if message.role == "tool" else message.content
        thinking = f"<think>{message.thinking}</think>" if message.thinking else ""
        turns.append({"from": message.role, "value": thinking + value + tags})
        if message.role == "assistant":
            turns[-1]["loss"] = message.trained
    return {"conversations": turns, "tools": sample.tools}


def anthropic(sample: Sample) -> dict[str, Any]:
    def parts(given: Message) -> list[dict[str, Any]]:
        if given.role == "tool":
            return [{"type": "tool_result", "tool_use_id": "t", "content": given.content}]
        thinking = [{"type": "thinking", "thinking": given.thinking, "signature": "s"}] if given.thinking else []
        uses = [
            {"type": "tool_use", "id": "t", "name": call["name"], "input": call["arguments"]}
            for call in json.loads(given.calls or "[]")
        ]
        return [*thinking, {"type": "text", "text": given.content}, *uses]

    messages = [
        {
            "role": "user" if message.role == "tool" else message.role,
            "content": parts(message),
            "weight": None if message.role == "tool" else int(message.trained),
        }
        for message in sample.data
    ]
    system = [{"type": "text", "text": prompt} for prompt in sample.meta_prompt]
    return {"system": system, "messages": messages, "tools": json.loads(sample.tools or "[]")}


def gemini(sample: Sample) -> dict[str, Any]:
    def parts(given: Message) -> list[dict[str, Any]]:
        if given.role == "tool":
            return [{"functionResponse": {"name": "f", "response": given.content}}]
        thinking = [{"text": given.thinking, "thought": True}] if given.thinking else []
        uses = [
            {"functionCall": {"name": call["name"], "args": call["arguments"]}}
            for call in json.loads(given.calls or "[]")
        ]
        return [*thinking, {"text": given.content}, *uses]

    contents = [
        {
            "role": "model" if message.role == "assistant" else "user",
            "parts": parts(message),
            "train": None if message.role == "tool" else message.trained,
        }
        for message in sample.data
    ]
    instruction = {"parts": [{"text": prompt} for prompt in sample.meta_prompt]}
    tools = [{"functionDeclarations": json.loads(sample.tools)}] if sample.tools else None
    return {"systemInstruction": instruction, "contents": contents, "tools": tools}


def own_tokens(sample: Sample) -> dict[str, Any]:
    def text(given: Message) -> str:
        thinking = f"[unused16]{given.thinking}[unused17]" if given.thinking else ""
        return thinking + given.content + (f"[unused11]{given.calls}[unused12]" if given.calls else "")

    data = [
        {"role": message.role, "content": text(message), **({} if message.trained else {"weight": 0})}
        for message in sample.data
    ]
    return {"meta_prompt": list(sample.meta_prompt), "data": data, "tools": sample.tools}


def as_text(sample: Sample) -> dict[str, Any]:
    record = openai(sample)
    return {key: json.dumps(value) for key, value in record.items()}


FORMS = {
    form.__name__: form for form in (openai, as_text, sharegpt, hermes, anthropic, gemini, own_tokens, Sample.to_json)
}


def comparable(sample: Sample) -> tuple[object, ...]:
    """The sample without what a form cannot keep: the wrapping of tools, and how system prompts are divided."""
    tools = [tool.get("function", tool) for tool in json.loads(sample.tools or "[]")]
    return "\n".join(sample.meta_prompt), sample.data, tools


@pytest.mark.parametrize("name", FORMS)
@given(sample=samples())
def test_every_form_of_a_sample_gives_it_back(name: str, sample: Sample) -> None:
    assert comparable(convert(FORMS[name](sample))) == comparable(sample)


@given(SPOKEN, st.lists(st.tuples(SPOKEN, SPOKEN).map(list), max_size=3), SPOKEN, SPOKEN, SPOKEN)
def test_every_simple_sample_comes_back_from_columns(
    system: str, history: list[list[str]], question: str, extra: str, answer: str
) -> None:
    rounds = [Message(*pair) for user, reply in history for pair in (("user", user), ("assistant", reply))]
    expected = (*rounds, Message("user", f"{question}\n{extra}"), Message("assistant", answer))
    for names in (("instruction", "input", "output"), ("query", "context", "response")):
        record = dict(zip(names, (question, extra, answer)), system=system, history=history)
        assert convert(record) == Sample((system,), expected)
