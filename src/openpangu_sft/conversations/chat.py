"""A list of turns to the messages of a sample: who speaks, what, and whether it is trained on.

Source of the formats: OpenAI's chat completions and fine-tuning files (role, content, tool_calls, weight); ShareGPT as
in LLaMA-Factory (from, value; function_call and observation turns); Hermes (<tool_call> tags); DeepSeek
(reasoning_content); TRL (thinking); ms-swift (loss); axolotl (train, weight); Anthropic and Gemini (see `read_parts`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from openpangu_sft.conversations.calls import call_text, join_call_lists, joined_calls, split_tags
from openpangu_sft.conversations.conversation import Rules, Sample, is_trained, parse_sample
from openpangu_sft.conversations.fields import compact_json, json_or, keys_of, kind_of, optional_text
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.parts import Parts, read_parts

SPEAKER, CONTENT = ("role", "from"), ("content", "value", "parts", "text")
ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "ipython"), "tool"),
    "function": "function",
}
"""Roles by the names that speakers have, in small letters."""

_WEIGHTS = ("weight", "loss", "loss_weight", "train")
_THINKING = ("reasoning_content", "thinking", "reasoning")
_ANSWER = (*_THINKING, "tool_calls", "function_call", "refusal")
_KNOWN = frozenset((*SPEAKER, *CONTENT, *_WEIGHTS, *_ANSWER))
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


class Turn(NamedTuple):
    """One turn as a message of a sample; its role may also be system."""

    role: str
    content: str
    thinking: Optional[str] = None
    calls: str = ""
    trained: bool = True

    def to_json(self) -> dict[str, Any]:
        """The message in a samples file."""
        found: dict[str, Any] = self._asdict()
        if not found.pop("trained"):
            found["weight"] = 0
        return {key: value for key, value in found.items() if value or key in ("role", "content", "weight")}


def make_sample(prompts: Sequence[str], turns: Sequence[object], tools: str, rules: Rules) -> Sample:
    """The sample of a conversation.

    Args:
        prompts: system prompts from outside the turns.
        turns: objects, each with its speaker and content.
        tools: tool definitions as JSON text.

    Raises:
        BadSample: a turn that cannot be read, or an order of turns that breaks a rule of `parse_sample`.
    """
    messages: list[Turn] = []
    leading = [*prompts]
    first = 1
    for number, entry in enumerate(turns, 1):
        for turn in _turns(entry, f"message {number}", rules):
            if turn.role != "system":
                _append(messages, turn)
                continue
            if messages and not rules.lenient:
                what = f"message {number} is a system prompt inside the conversation: move it to the beginning"
                raise BadSample(f"{what}, or set data.turns=lenient")
            if messages:
                rules.changes["later system prompts moved to the beginning"] += 1
            else:
                first = number + 1
            if turn.content not in leading:
                leading.append(turn.content)
    if len(prompts) == 1 and len(leading) > 1 and first > 1 and any(leading[1:]):
        raise BadSample("has a system field and another system prompt as its first turn: keep one of them")
    record = {"meta_prompt": [text for text in leading if text] or [""], "data": [turn.to_json() for turn in messages]}
    try:
        return parse_sample({**record, "tools": tools}, rules)
    except BadSample as error:
        counted = f" (counted from turn {first} on, after the system prompt)" if first > 1 else ""
        raise BadSample(f"{error}{counted}") from None


def _append(messages: list[Turn], turn: Turn) -> None:
    """Adds a turn; calls that follow an answer or calls of the same speaker become one message with it."""
    last = messages[-1] if messages else None
    bare = turn.calls and not turn.content and not turn.thinking
    if last and last.role == turn.role == "assistant" and bare and last.trained == turn.trained:
        messages[-1] = last._replace(calls=join_call_lists(last.calls, turn.calls))
    else:
        messages.append(turn)


def _turns(entry: object, name: str, rules: Rules) -> Iterator[Turn]:
    """The messages that one turn is: one, but for Anthropic's, which holds tool results beside a user's text."""
    if not isinstance(entry, dict):
        raise BadSample(f"{name} is {kind_of(entry)}, not an object with role and content")
    turn = rules.keys.known(name, entry, _KNOWN)
    role = _role(turn, name)
    weights = {is_trained(turn[key], f"{key} of {name}") for key in _WEIGHTS if turn.get(key) is not None}
    if len(weights) > 1:
        raise BadSample(f"{name} is to be trained on, and not: {', '.join(key for key in _WEIGHTS if key in turn)}")
    content = _content(turn, name)
    if role == "function_call":
        yield Turn("assistant", "", None, _calls_of(content, name), weights != {False})
        return
    if role in ("tool", "function") and isinstance(content, (dict, list)) and not _typed(content):
        content = compact_json(content)
    parts = read_parts(content, name, rules.keys)
    if role == "assistant":
        yield _answer(turn, parts, name, weights != {False})
        return
    if extra := [key for key in _ANSWER if turn.get(key)] or parts.thinking or parts.calls:
        raise BadSample(f"{name} ({role}) has {reprlib.repr(extra[0])}: only an assistant's message may")
    if True in weights:
        rules.changes["weights of messages that are no answers ignored"] += 1
    yield from (Turn("tool", result) for result in parts.results)
    if parts.text is None and role != "system" and not parts.results:
        raise BadSample(f"{name} has no content")
    if parts.text is not None or not parts.results:
        text = parts.text or ""
        if role == "tool" and (wrapped := _RESPONSE.fullmatch(text)):
            text = wrapped[1]
        yield Turn(role, text)


def _role(turn: Mapping[str, Any], name: str) -> str:
    key = next((key for key in SPEAKER if turn.get(key) is not None), SPEAKER[0])
    speaker = turn.get(key)
    if not isinstance(speaker, str):
        found = kind_of(speaker) if key in turn else f"missing, keys found are {keys_of(turn)}"
        raise BadSample(f"{name} has no text in {key}: {found}")
    role = ROLE_OF.get(speaker.strip().lower())
    if role is None:
        raise BadSample(f"{name} has an unknown role: {reprlib.repr(speaker)}, known: {', '.join(ROLE_OF)}")
    return role


def _content(turn: Mapping[str, Any], name: str) -> Any:
    found = [key for key in CONTENT if turn.get(key) is not None]
    if len(found) > 1:
        raise BadSample(f"{name} has {' and '.join(found)}: keep one of them")
    if not found and not any(key in turn for key in (*CONTENT, *_ANSWER)):
        raise BadSample(f"{name} has no content: keys found are {keys_of(turn)}")
    return turn[found[0]] if found else None


def _typed(content: object) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _calls_of(content: object, name: str) -> str:
    if isinstance(content, str) and "<tool_call>" in content:
        return split_tags(content).calls
    calls = json_or(content, f"the call in {name}")
    if isinstance(calls, list) and not calls:
        raise BadSample(f"{name} has no call")
    return joined_calls([call_text(call) for call in (calls if isinstance(calls, list) else [calls])])


def _answer(turn: Mapping[str, Any], parts: Parts, name: str, trained: bool) -> Turn:
    try:
        tags = split_tags(parts.text or "")
        calls = [call_text(call) for call in _call_list(turn)] + parts.calls
    except BadSample as error:
        raise BadSample(f"{name}: {error}") from None
    if parts.results:
        raise BadSample(f"{name} (assistant) holds a tool's result: give it a message with role tool")
    thoughts = [optional_text(turn, key, name) for key in _THINKING] + ["\n".join(parts.thinking), tags.thinking]
    thinking = list(filter(None, dict.fromkeys(thoughts)))
    if len(thinking) > 1:
        raise BadSample(f"{name} has its thinking twice: keep one of {', '.join(_THINKING)}, parts and <think>")
    text = tags.text
    if parts.text is None or not text.strip():
        text = optional_text(turn, "refusal", name) or text
    elif turn.get("refusal"):
        raise BadSample(f"{name} has both content and refusal: keep one of them")
    everything = join_call_lists(joined_calls(calls), tags.calls)
    if parts.text is None and not text and not everything:
        raise BadSample(f"{name} (assistant) has neither content nor tool calls")
    return Turn("assistant", text, thinking[0] if thinking else None, everything, trained)


def _call_list(turn: Mapping[str, Any]) -> list[Any]:
    calls = json_or(turn.get("tool_calls"), "tool_calls") or []
    if not isinstance(calls, list):
        raise BadSample(f"tool_calls is {kind_of(calls)}, not a list")
    return calls + ([turn["function_call"]] if turn.get("function_call") else [])
