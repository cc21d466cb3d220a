"""A list of turns to the messages of a sample: who speaks, what, and whether it is trained on.

Source of the formats: OpenAI's chat completions and fine-tuning files (role, content, tool_calls, weight); ShareGPT as
in LLaMA-Factory (from, value; function_call and observation turns); Hermes (<tool_call> tags); DeepSeek
(reasoning_content); TRL (thinking); ms-swift (loss); axolotl (train, weight); Anthropic and Gemini (see `read_parts`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openpangu_sft.conversations.calls import call_text, joined_calls, split_tags, split_thinking
from openpangu_sft.conversations.conversation import Message, Rules, Sample, is_trained, parse_sample
from openpangu_sft.conversations.fields import expect, filled, given, json_or, keys_of, one_of, optional_text
from openpangu_sft.conversations.keys import EMPTY, BadSample, Keys, naming_message
from openpangu_sft.conversations.parts import Parts, is_parts, read_parts

LISTS = {"openai": ("messages", "contents"), "sharegpt": ("conversations", "conversation")}
"""Keys of a list of turns, by data.source_format."""

SPEAKER, CONTENT = ("role", "from"), ("content", "value", "parts", "text")
ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("tool", "observation", "tool_response", "tool_result", "function_response", "ipython"), "tool"),
    "function": "function",
}
"""Roles by the names that speakers have, in small letters."""

_WEIGHTS = ("weight", "loss", "loss_weight", "train")
_THINKING = ("reasoning_content", "thinking", "reasoning")
_ANSWER = (*_THINKING, "tool_calls", "function_call", "refusal")
_SAYS = (*CONTENT, *_ANSWER)
_KNOWN = frozenset((*SPEAKER, *_WEIGHTS, *_SAYS))
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def make_sample(prompts: Sequence[str], turns: Sequence[object], tools: str, rules: Rules) -> Sample:
    """The sample of system prompts from outside the turns, turns with speaker and content, and tools as JSON text.

    Raises `BadSample` for a turn that cannot be read, or one that breaks a rule of `parse_sample`.
    """
    messages: list[Message] = []
    leading, first = [*prompts], 1
    for number, entry in enumerate(turns, 1):
        for turn in _turns(entry, f"message {number}", rules):
            if turn.role != "system":
                _append(messages, turn)
                continue
            if not messages:
                first = number + 1
                if prompts and turn.content and turn.content not in prompts:
                    what = f"has a system field and another system prompt as message {number}"
                    raise BadSample(f"{what}: keep one of them")
            elif rules.lenient:
                rules.changes["later system prompts moved to the beginning"] += 1
            else:
                what = f"message {number} is a system prompt inside the conversation: move it to the beginning"
                raise BadSample(f"{what}, or set data.turns=lenient")
            leading.append(turn.content)
    meta_prompt = [*filter(None, dict.fromkeys(leading))] or [""]
    data = [message.to_json() for message in messages]
    return parse_sample({"meta_prompt": meta_prompt, "data": data, "tools": tools}, rules, first)


def _append(messages: list[Message], turn: Message) -> None:
    """Adds a turn; calls that follow an answer or calls of the same speaker become one message with it."""
    bare = turn.calls and not turn.content and not turn.thinking
    if bare and messages and (messages[-1].role, messages[-1].trained) == (turn.role, turn.trained):
        last = messages.pop()
        turn = replace(last, calls=f"{last.calls[:-1]},{turn.calls[1:]}" if last.calls else turn.calls)
    messages.append(turn)


def _turns(value: object, name: str, rules: Rules) -> Iterator[Message]:
    """The messages that one turn is: one, unless it holds several results of tools, or (Anthropic) text beside them."""
    entry = expect(dict, value, name, "an object with role and content")
    _require_any(entry, SPEAKER, "role", name)
    role = _role(entry, name)
    if role != "system":  # whose content may be null, which parquet leaves out
        _require_any(entry, _SAYS, "content", name)
    turn = rules.keys.known(name, entry, _KNOWN)
    weights = {is_trained(turn[key], f"{key} of {name}") for key in given(turn, _WEIGHTS)}
    if len(weights) > 1:
        raise BadSample(f"{name} is to be trained on, and not: {', '.join(given(turn, _WEIGHTS))}")
    trained = weights != {False}
    _, content = one_of(turn, given(turn, CONTENT), name)
    results = role in ("tool", "function")
    if results and isinstance(content, (dict, list)) and turn.get("parts") is None and not is_parts(content):
        content = [{"type": "tool_result", "content": content}]
    if role == "function_call":
        if extra := filled(turn, ("refusal", "tool_calls", "function_call")):
            raise BadSample(f"{name} has {extra[0]} beside a call: keep one of them")
        with naming_message(name):
            parts, role = _calling(content, rules.keys), "assistant"
    else:
        parts = read_parts(content, name, rules.keys, "" if role == "assistant" else "\n")
    if role == "assistant":
        yield _answer(turn, parts, name, trained, rules.keys)
        return
    if extra := filled(turn, _ANSWER) or parts.thinking or parts.calls or (parts.results if role == "system" else []):
        raise BadSample(f"{name} ({role}) has {reprlib.repr(extra[0])}: only an assistant's message may")
    if True in weights:
        rules.changes["weights of messages that are no answers ignored"] += 1
    yield from (Message("function" if role == "function" else "tool", result) for result in parts.results)
    if parts.text is None and role != "system" and not parts.results:
        raise BadSample(f"{name} has no content")
    text = parts.text or ""
    if results and "<tool_response>" in text and not _RESPONSE.sub("", text):
        yield from (Message(role, result) for result in _RESPONSE.findall(text))
    elif parts.text is not None or not parts.results:
        yield Message(role, text)


def _require_any(turn: Mapping[str, Any], names: Sequence[str], ours: str, name: str) -> None:
    if not any(key in turn for key in names):
        raise BadSample(f"{name} has no {ours}: keys found are {keys_of(turn)}; name its key in data.columns.{ours}")


def _role(turn: Mapping[str, Any], name: str) -> str:
    keys, roles = given(turn, SPEAKER) or SPEAKER[:1], set()
    for key in keys:
        speaker = expect(str, turn.get(key), f"{key} of {name}", "a text")
        role = ROLE_OF.get(speaker.strip().lower())
        if role is None:
            raise BadSample(f"{name} has an unknown role: {reprlib.repr(speaker)}, known: {', '.join(ROLE_OF)}")
        roles.add(role)
    if len(roles) > 1:
        raise BadSample(f"{name} has {' and '.join(keys)}, which differ: keep one of them")
    return roles.pop()


def _calling(content: object, keys: Keys) -> Parts:
    """A content that is calls: an object, a list, the JSON text of either, or <tool_call> tags; thinking before it."""
    thinking, content = split_thinking(content) if isinstance(content, str) else (None, content)
    if isinstance(content, str) and "<tool_call>" in content:
        return Parts(content, thinking=[thinking or ""])
    calls = json_or(content, "the call")
    if calls in EMPTY:
        raise BadSample("has no call")
    texts = [call_text(call, keys) for call in (calls if isinstance(calls, list) else [calls])]
    return Parts(thinking=[thinking or ""], calls=texts)


def _answer(turn: Mapping[str, Any], parts: Parts, name: str, trained: bool, keys: Keys) -> Message:
    if parts.results:
        raise BadSample(f"{name} (assistant) holds a tool's result: give it a message with role tool")
    with naming_message(name):
        tags = split_tags(parts.text or "", keys)
        read = {key: json_or(turn[key], key) for key in filled(turn, ("function_call", "tool_calls"))}
        listed = read.pop("tool_calls", None)
        listed = [] if listed is None else expect(list, listed, "tool_calls", "a list")
        written = [joined_calls([call_text(call, keys) for call in calls]) for calls in (listed, read.values())]
    calls = list(filter(None, dict.fromkeys([*written, joined_calls(parts.calls), tags.calls])))
    if len(calls) > 1:
        raise BadSample(f"{name} has its calls twice: keep one of tool_calls, function_call, parts and <tool_call>")
    refusal = optional_text(turn, "refusal", name)
    if refusal and tags.text.strip():
        raise BadSample(f"{name} has both content and refusal: keep one of them")
    if parts.text is None and not refusal and not calls:
        raise BadSample(f"{name} (assistant) has neither content nor tool calls")
    thoughts = [*(optional_text(turn, key, name) for key in _THINKING), "\n".join(parts.thinking), tags.thinking]
    thinking = [text for text in thoughts if text and text.strip()]
    if len({text.strip() for text in thinking}) > 1:
        raise BadSample(f"{name} has its thinking twice: keep one of {', '.join(_THINKING)}, parts and <think>")
    only = thinking[0] if thinking else None
    return Message("assistant", refusal or tags.text, only, calls[0] if calls else "", trained)
