"""One raw record, in any of the formats known, to a sample."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from openpangu_sft.conversations import chat, columns, preference
from openpangu_sft.conversations.calls import tools_text
from openpangu_sft.conversations.conversation import Rules, Sample, parse_sample
from openpangu_sft.conversations.fields import json_or, kind_of
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.parts import read_parts
from openpangu_sft.recipe.sections import Data

LISTS = {
    "openai": ("messages", "contents"),
    "sharegpt": ("conversations", "conversation"),
}
"""Keys of a list of turns, by data.source_format."""

SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
_OUTSIDE = frozenset((*SYSTEM, *TOOLS))
_IN_TURNS = ("role", "content")
_BLOBS = ("chat", "text", "dialog", "dialogue", "transcript")


class Converter:
    """Converts records; see the recipe's section data.

    Args:
        rules: how turns and keys are read, shared by the converters of several sources.

    Attributes:
        rules: with what was ignored and changed so far.
        unseen: columns of data.columns that no record had so far.
    """

    def __init__(self, data: Data, rules: Optional[Rules] = None) -> None:
        self._data = data
        self.rules = rules or Rules(data.ignore_keys, data.turns == "lenient")
        self.unseen = {theirs for ours, theirs in data.columns.items() if ours not in _IN_TURNS}

    def __call__(self, record: object) -> Sample:
        """The sample of one record, any JSON value; raises `BadSample` where there is none."""
        if not isinstance(record, dict):
            raise BadSample(f"is {kind_of(record)}, not an object")
        renamed = preference.chosen_side(self._renamed(record), self._data.preference, self.rules)
        if self._format(renamed) == "samples":
            return parse_sample(renamed, self.rules)
        return self._converted(renamed)

    def _renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with the user's columns under our names, without keys to be ignored."""
        ignored = record.keys() & set(self._data.ignore_keys)
        self.rules.keys.counts.update(ignored)
        names = {theirs: ours for ours, theirs in self._data.columns.items()}
        self.unseen -= record.keys()
        found = {names.get(key, key): value for key, value in record.items() if key not in ignored}
        if len(found) + len(ignored) < len(record):
            twice = next(key for key in record if key in names and names[key] in record)
            raise BadSample(
                f"has {twice} (data.columns.{names[twice]}) and {names[twice]}: ignore or rename one of them"
            )
        return found

    def _format(self, record: Mapping[str, Any]) -> str:
        """The format of a record, by its keys where data.source_format is auto."""
        lists = [name for name, names in LISTS.items() if any(_filled(record.get(key)) for key in names)]
        single = ["alpaca"] if any(_filled(record.get(key)) for key in (*columns.PROMPT, *columns.ANSWER)) else []
        found = [*(["samples"] if _filled(record.get("meta_prompt")) else []), *single, *lists]
        if self._data.source_format != "auto":
            return self._data.source_format
        if len(found) > 1:
            raise BadSample(f"fits more than one format: {', '.join(found)}; set data.source_format to the right one")
        if not found:
            raise BadSample(self._unknown(record))
        return found[0]

    def _unknown(self, record: Mapping[str, Any]) -> str:
        blob = next((key for key in _BLOBS if isinstance(record.get(key), str)), "")
        if blob:
            return f"holds a conversation as one text in {blob}: turns cannot be told apart, write them as messages"
        known = "messages, conversations, instruction + output, prompt + completion, meta_prompt + data"
        return (
            f"unknown format: a record is {reprlib.repr(record)}; known are {known}: name your columns in data.columns"
        )

    def _converted(self, record: Mapping[str, Any]) -> Sample:
        name = self._format(record)
        names = LISTS.get(name, ())
        key = next((key for key in names if record.get(key) is not None), names[0] if names else "")
        record = self.rules.keys.known("", record, {key, *_OUTSIDE} if key else columns.KNOWN | _OUTSIDE)
        turns = self._turns(record, key) if key else columns.turns_of(record)
        return chat.make_sample(self._prompts(record), turns, _tools(record), self.rules)

    def _turns(self, record: Mapping[str, Any], key: str) -> Sequence[object]:
        """The turns under a key, a list or the JSON text of one, with the user's names for role and content."""
        turns = json_or(record.get(key), key)
        if not isinstance(turns, list):
            raise BadSample(f"{key} is {kind_of(turns) if key in record else 'missing'}, not a list")
        if not turns:
            raise BadSample(f"{key} is empty")
        names = {theirs: ours for ours, theirs in self._data.columns.items() if ours in _IN_TURNS}
        if not names:
            return turns
        return [{names.get(k, k): v for k, v in turn.items()} if isinstance(turn, dict) else turn for turn in turns]

    def _prompts(self, record: Mapping[str, Any]) -> list[str]:
        """The system prompt beside the turns, if there is one."""
        found = [key for key in SYSTEM if record.get(key)]
        if len(found) > 1:
            raise BadSample(f"has {' and '.join(found)}: keep one of them")
        if not found:
            return []
        value = record[found[0]]
        if isinstance(value, dict):  # Gemini's: {"parts": [{"text": …}]}
            value = read_parts(value.get("parts"), found[0], self.rules.keys).text
        if not isinstance(value, str):
            raise BadSample(f"{found[0]} is {kind_of(value)}, not a text")
        return [value]


def _filled(value: object) -> bool:
    return value is not None and value != []


def _tools(record: Mapping[str, Any]) -> str:
    found = [(key, text) for key in TOOLS if (text := tools_text(_declared(record.get(key)), key))]
    if len(found) > 1:
        raise BadSample("has both tools and functions: keep one of them")
    return found[0][1] if found else ""


def _declared(tools: Any) -> Any:
    """Gemini's tools, [{"functionDeclarations": […]}], as a list of definitions; others as they are."""
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) and len(tool) == 1 for tool in tools):
        return [item for tool in tools for item in tool.get("functionDeclarations") or [tool]]
    return tools
