"""Samples: one conversation each, checked by rules that never let one be lost or changed without a word.

File format (jsonl, of the published recipe): {"meta_prompt": ["…"], "data": [{"role": "user", "content": "…"}, …]}
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any

ROLES = ("user", "assistant", "tool")

# What may follow a message. None stands for the beginning of the conversation.
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class BadSample(Exception):
    """A sample that must not be trained on as it is; the text says why and what to do."""


@dataclass(frozen=True)
class Message:
    """One turn. `role` is user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One conversation: one or more system prompts (empty for none), then messages that end with the assistant's."""

    meta_prompt: tuple[str, ...]
    data: tuple[Message, ...]

    def to_json(self) -> dict[str, Any]:
        """The sample as it stands in a samples file."""
        messages = [{"role": message.role, "content": message.content} for message in self.data]
        return {"meta_prompt": list(self.meta_prompt), "data": messages}


def parse_sample(record: object) -> Sample:
    """Checks one record of a samples file.

    Raises:
        BadSample: the first rule that it breaks.
    """
    if not isinstance(record, dict):
        raise BadSample(f"is {_kind(record)}, not an object with meta_prompt and data")
    for key in ("meta_prompt", "data"):
        if key not in record:
            raise BadSample(f"{key} is missing" + (': write "meta_prompt": [""] for none' if key != "data" else ""))
    return Sample(_meta_prompt(record["meta_prompt"]), _messages(record["data"]))


def reason_class(reason: str) -> str:
    """A reason without what differs from record to record, for counting: no numbers, no quoted text, no details."""
    general = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"\d+", "N", general.split(": ")[0]).split(" (counted")[0]


def _meta_prompt(value: object) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value  # the published recipe has both
    if not isinstance(prompts, list):
        raise BadSample(f"meta_prompt is {_kind(value)}, not a list of texts")
    if not prompts:  # the published handler would leave the header out that chat always writes
        raise BadSample('meta_prompt is an empty list: write [""] for no system prompt')
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise BadSample(f"meta_prompt {number} is {_kind(prompt)}, not a text")
        _require_characters(f"meta_prompt {number}", prompt)
    return tuple(prompts)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadSample(f"data is {_kind(value)}, not a list of messages")
    messages: list[Message] = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise BadSample(f"message {number} is {_kind(entry)}, not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(entry.get(key), str):
                found = _kind(entry[key]) if key in entry else "missing"
                raise BadSample(f"{key} of message {number} is {found}, not a text")
        role = entry["role"]
        _require_characters(f"content of message {number}", entry["content"])
        if role == "system":
            raise BadSample(f"message {number} has role system: move its content into meta_prompt")
        if role not in ROLES:
            raise BadSample(f"message {number} has unknown role {reprlib.repr(role)}: use {', '.join(ROLES)}")
        before = messages[-1].role if messages else None
        if role not in _MAY_FOLLOW[before]:
            place = f"follows {before}" if before else "comes first"
            expected = " or ".join(_MAY_FOLLOW[before])
            raise BadSample(f"message {number} ({role}) {place}: expected {expected}")
        messages.append(Message(role, entry["content"]))
    if not messages:
        raise BadSample("data has no messages")
    if messages[-1].role != "assistant":
        raise BadSample(f"the last message is the {messages[-1].role}'s: nothing after an answer can be trained")
    return tuple(messages)


def _require_characters(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape such a half, UTF-8 and tokenizers cannot hold it
        half = text[error.start]
        raise BadSample(f"{name} holds half a character: {half!a}, a surrogate without its pair") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
