"""A sample, which is one conversation, and the rules that it has to meet: none is silently dropped or altered.

Samples file (JSON lines, as in the published recipe):
{"meta_prompt": ["…"], "data": [{"role": "user", "content": "…"}, …]}
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_ROLES = ROLES[1:]
"""System prompts are no messages of a sample: they have a field of their own."""

# Roles that may follow a role; None is the beginning of the conversation.
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class BadSample(Exception):
    """A sample that must not be trained on as it is; the text says why, and the remedy."""


@dataclass(frozen=True)
class Message:
    """One message; its role is one of `MESSAGE_ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One conversation: at least one system prompt (an empty text for none), then messages, the assistant's last."""

    meta_prompt: tuple[str, ...]
    data: tuple[Message, ...]

    def to_json(self) -> dict[str, Any]:
        """The record of a samples file."""
        messages = [{"role": message.role, "content": message.content} for message in self.data]
        return {"meta_prompt": list(self.meta_prompt), "data": messages}


def parse_sample(record: object) -> Sample:
    """The sample in one record of a samples file; raises `BadSample` for the first rule that it breaks."""
    if not isinstance(record, dict):
        raise BadSample(f"is {kind_of(record)}, not an object with meta_prompt and data")
    for key in ("meta_prompt", "data"):
        if key not in record:
            raise BadSample(f"{key} is missing" + (': write "meta_prompt": [""] for none' if key != "data" else ""))
    return Sample(_meta_prompt(record["meta_prompt"]), _messages(record["data"]))


def reason_class(reason: str) -> str:
    """A reason without numbers, quoted texts and details, by which rejected records are counted."""
    general = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"\d+", "N", general.split(": ")[0]).split(" (counted")[0]


def _meta_prompt(value: object) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value  # the published recipe has both
    if not isinstance(prompts, list):
        raise BadSample(f"meta_prompt is {kind_of(value)}, not a list of texts")
    if not prompts:  # the published handler would leave the header out that chat always writes
        raise BadSample('meta_prompt is an empty list: write [""] for no system prompt')
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise BadSample(f"meta_prompt {number} is {kind_of(prompt)}, not a text")
        _require_characters(f"meta_prompt {number}", prompt)
    return tuple(prompts)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadSample(f"data is {kind_of(value)}, not a list of messages")
    messages: list[Message] = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise BadSample(f"message {number} is {kind_of(entry)}, not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(entry.get(key), str):
                found = kind_of(entry[key]) if key in entry else "missing"
                raise BadSample(f"{key} of message {number} is {found}, not a text")
        role = entry["role"]
        _require_characters(f"content of message {number}", entry["content"])
        if role == "system":
            raise BadSample(f"message {number} has role system: move its content into meta_prompt")
        if role not in MESSAGE_ROLES:
            raise BadSample(f"message {number} has unknown role {reprlib.repr(role)}: use {', '.join(MESSAGE_ROLES)}")
        before = messages[-1].role if messages else None
        if role not in _MAY_FOLLOW[before]:
            place = f"follows {before}" if before else "comes first"
            expected = " or ".join(_MAY_FOLLOW[before])
            raise BadSample(f"message {number} ({role}) {place}: expected {expected}")
        messages.append(Message(role, entry["content"]))
    if not messages:
        raise BadSample("data has no messages")
    if messages[-1].role != "assistant":
        raise BadSample(f"the last message is the {messages[-1].role}'s: a sample must end with an assistant message")
    return tuple(messages)


def _require_characters(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape it; UTF-8 and tokenizers cannot represent it
        half = text[error.start]
        raise BadSample(f"{name} holds half a character: {half!a}, a surrogate without its pair") from None


def kind_of(value: object) -> str:
    """The JSON type of a value, for messages; the Python type of what JSON does not have (from parquet)."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    names.update({int: "a number", float: "a number"})
    return names.get(type(value), f"a {type(value).__name__}")
