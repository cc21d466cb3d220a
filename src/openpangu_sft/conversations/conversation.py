"""A sample, which is one conversation, and the rules that it has to meet: none is silently dropped or altered.

Samples file (JSON lines; meta_prompt, data, role and content as in the published recipe, the rest optional):
{"meta_prompt": ["…"], "tools": "[…]", "data": [{"role": "user", "content": "…"},
 {"role": "assistant", "thinking": "…", "content": "…", "calls": "[{\"name\":…,\"arguments\":{…}}]", "weight": 0}, …]}
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from openpangu_sft.conversations.calls import calls_text, split_answer, tools_text
from openpangu_sft.conversations.fields import expect, filled, kind_of, optional_text
from openpangu_sft.conversations.keys import EMPTY, BadSample, Keys, naming_message
from openpangu_sft.recipe.data import Data

_RESULTS = ("tool", "function")
MESSAGE_ROLES = ("user", "assistant", *_RESULTS)
"""System prompts are no messages of a sample: they have a field of their own."""

# Roles that may follow a role; None is the beginning of the conversation.
_MAY_FOLLOW: dict[Optional[str], tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", *_RESULTS),
    **dict.fromkeys(_RESULTS, (*_RESULTS, "assistant")),
}
# What data.turns=lenient keeps, by the role before and the role: the template can render it. Names in the counts.
_KEPT: dict[tuple[Optional[str], str], str] = {
    (None, "assistant"): "conversations that begin with the assistant kept",
    **{(role, "user"): "questions directly after a tool's result kept" for role in _RESULTS},
}
_RECORD = frozenset(("meta_prompt", "data", "tools"))
_PLAIN = frozenset(("role", "content"))
_MESSAGE = _PLAIN | {"thinking", "calls", "weight"}


@dataclass(frozen=True)
class Message:
    """One message; only an assistant's has thinking and calls, or may be left untrained."""

    role: str  # one of `MESSAGE_ROLES`; system only before it is part of a sample
    content: str
    thinking: Optional[str] = None
    calls: str = ""  # the JSON text of a list of {"name", "arguments"}, empty for none
    trained: bool = True  # or only read

    def to_json(self) -> dict[str, Any]:
        """The message in a samples file."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            found["thinking"] = self.thinking
        if self.calls:
            found["calls"] = self.calls
        return found if self.trained else {**found, "weight": 0}


@dataclass(frozen=True)
class Sample:
    """One conversation: at least one system prompt (an empty text for none), then messages, the assistant's last."""

    meta_prompt: tuple[str, ...]
    data: tuple[Message, ...]
    tools: str = ""  # definitions as the JSON text of a list, empty for none

    def to_json(self) -> dict[str, Any]:
        """The record of a samples file."""
        found: dict[str, Any] = {"meta_prompt": list(self.meta_prompt)}
        if self.tools:
            found["tools"] = self.tools
        return {**found, "data": [message.to_json() for message in self.data]}

    def texts(self, first: int = 1) -> Iterator[tuple[str, str]]:
        """All of its texts after their names, in which messages are counted from `first` on."""
        yield from (("meta_prompt", prompt) for prompt in self.meta_prompt)
        yield "tools", self.tools
        for number, message in enumerate(self.data, first):
            yield f"message {number}", message.content
            if message.thinking or message.calls:
                yield f"thinking of message {number}", message.thinking or ""
                yield f"a call in message {number}", message.calls


class Rules:
    """How samples are read: by data.ignore_keys and data.turns, or strictly; and what was done to them on the way."""

    def __init__(self, data: Optional[Data] = None, trains: bool = True) -> None:
        self.keys = Keys(data.ignore_keys if data else ())
        self.trains = trains  # refuses a sample without an answer to train on
        self.lenient = data is not None and data.turns == "lenient"  # turns that the template can render are repaired
        self.changes: Counter[str] = Counter()  # repairs, by what was done


def parse_sample(record: object, rules: Optional[Rules] = None, first: int = 1) -> Sample:
    """The sample in one record of a samples file; raises `BadSample` for the first rule that it breaks.

    In reasons its messages are counted from `first` on.
    """
    rules = rules or Rules()
    known = rules.keys.known("", expect(dict, record, "", "an object with meta_prompt and data"), _RECORD, True)
    for key in ("meta_prompt", "data"):
        if key not in known:
            raise BadSample(f"{key} is missing" + (': write "meta_prompt": [""] for none' if key != "data" else ""))
    messages = _messages(known["data"], rules, first)
    sample = Sample(_meta_prompt(known["meta_prompt"]), messages, tools_text(known.get("tools")))
    for name, text in sample.texts(first):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape it; UTF-8 and tokenizers cannot represent it
            half = text[error.start]
            raise BadSample(f"{name} holds half a character: {half!a}, a surrogate without its pair") from None
    return sample


def reason_class(reason: str) -> str:
    """A reason without numbers, quoted texts and details, by which rejected records are counted."""
    general = re.sub(r"'[^']*'|\"[^\"]*\"", "…", re.sub(r"^message \d+: ", "", reason))
    return re.sub(r"\d+", "N", general.split(": ")[0])


def _meta_prompt(value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value  # the published recipe has both
    prompts = expect(list, listed, "meta_prompt", "a list of texts")
    if not prompts:  # the published handler would leave the header out that chat always writes
        raise BadSample('meta_prompt is an empty list: write [""] for no system prompt')
    for number, prompt in enumerate(prompts, 1):
        expect(str, prompt, f"meta_prompt {number}", "a text")
    return tuple(prompts)


def _messages(value: object, rules: Rules, first: int) -> tuple[Message, ...]:
    messages: list[Message] = []
    for number, entry in enumerate(expect(list, value, "data", "a list of messages"), first):
        message = _message(entry, number, rules.keys)
        before = messages[-1].role if messages else None
        if message.role in _MAY_FOLLOW[before]:
            messages.append(message)
        elif not (rules.lenient and _repaired(messages, message, rules.changes)):
            place = f"follows {before}" if before else "comes first"
            repairable = not rules.lenient and _repaired(messages, message, Counter())
            remedy = "; data.turns=lenient accepts it" if repairable else ""
            expected = " or ".join(_MAY_FOLLOW[before])
            raise BadSample(f"message {number} ({message.role}) {place}: expected {expected}{remedy}")
    while rules.lenient and messages and messages[-1].role != "assistant":
        messages.pop()
        rules.changes["messages after the last answer dropped"] += 1
    if not messages:
        raise BadSample("data has no messages" if not value else "there is no assistant message")
    if messages[-1].role != "assistant":
        what = f"the last message is the {messages[-1].role}'s: a sample must end with an assistant message"
        raise BadSample(f"{what}; data.turns=lenient drops what follows the last one")
    if rules.trains and not any(message.trained for message in messages if message.role == "assistant"):
        raise BadSample("nothing to train on: every answer has weight 0")
    return tuple(messages)


def _repaired(messages: list[Message], message: Message, changes: Counter[str]) -> bool:
    """Adds a message out of order as the template can render it; False where it cannot."""
    last = messages[-1] if messages else None
    if change := _KEPT.get((last.role if last else None, message.role)):
        messages.append(message)
    elif last and (last.role, last.trained, last.calls, None) == (message.role, message.trained, "", message.thinking):
        content = "\n".join(filter(None, (last.content, message.content)))
        messages[-1] = replace(last, content=content, calls=message.calls)
        change = f"messages of one {last.role} in a row joined"
    else:
        return False
    changes[change] += 1
    return True


def _message(entry: object, number: int, keys: Keys) -> Message:
    name = f"message {number}"
    found = keys.known(name, expect(dict, entry, name, "an object with role and content"), _MESSAGE, True)
    for key in ("role", "content"):
        if not isinstance(found.get(key), str):
            wrong = kind_of(found[key]) if key in found else "missing"
            raise BadSample(f"{key} of {name} is {wrong}, not a text")
    role, content = found["role"], found["content"]
    if role == "system":
        raise BadSample(f"{name} has role system: move its content into meta_prompt")
    if role not in MESSAGE_ROLES:
        raise BadSample(f"{name} has unknown role {reprlib.repr(role)}: use {', '.join(MESSAGE_ROLES)}")
    if role == "assistant":
        return _answer(found, content, name, keys)
    if len(found) > 2 and (extra := filled(found, [key for key in found if key not in _PLAIN])):
        raise BadSample(f"{name} ({role}) has {extra[0]}: only an assistant's message may")
    if role == "user" and not content.strip():
        raise BadSample(f"{name} (user) is empty")
    return Message(role, content)


def _answer(found: Mapping[str, Any], content: str, name: str, keys: Keys) -> Message:
    thinking, calls = optional_text(found, "thinking", name), ""
    trained = is_trained(found.get("weight"), f"weight of {name}")
    with naming_message(name):
        if thinking is None and found.get("calls") in EMPTY:
            thinking, content, calls = split_answer(content, keys)
        else:
            calls = calls_text(found.get("calls"), keys)
    if not content.strip() and not calls:
        raise BadSample(f"{name} (assistant) is empty: there is nothing to train on but its end")
    return Message("assistant", content, thinking, calls, trained)


def is_trained(value: object, name: str) -> bool:
    """Whether a message is trained on: weight, loss and the like are 0 or 1, missing is 1; else raises `BadSample`."""
    if value is None or (isinstance(value, (int, float)) and value in (0, 1)):
        return value is None or bool(value)
    raise BadSample(f"{name} is {reprlib.repr(value)}: tokens are trained on or not, so write 0 or 1")
