"""One raw record, in any of the formats known, to a sample; of preference data its chosen side, or none.

Source of the latter's formats: TRL (prompt, chosen, rejected; label for KTO), LLaMA-Factory (chosen and rejected beside
conversations or instruction; kto_tag), ms-swift (rejected_response, rejected_messages; label).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from openpangu_sft.conversations import chat, columns
from openpangu_sft.conversations.calls import tools_text
from openpangu_sft.conversations.chat import LISTS
from openpangu_sft.conversations.conversation import Rules, Sample, parse_sample
from openpangu_sft.conversations.fields import expect, filled, given, json_or, keys_of, kind_of, one_of
from openpangu_sft.conversations.keys import EMPTY, BadSample
from openpangu_sft.conversations.parts import Parts, is_parts, read_parts
from openpangu_sft.recipe.data import Data

SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
_OUTSIDE = frozenset((*SYSTEM, *TOOLS))
_COLUMNS = columns.KNOWN | _OUTSIDE
_CONTENT = frozenset(("parts", "role"))
_IN_TURNS = ("role", "content")
_FORMATS = {"samples": ("meta_prompt",), "alpaca": (*columns.PROMPT, *columns.ANSWER), **LISTS}  # keys that tell them
_BLOBS = ("chat", "text", "dialog", "dialogue", "transcript")

LABELS = ("label", "kto_tag")
CHOSEN = ("chosen", "chosen_response", "chosen_messages")
REJECTED = ("rejected", "rejected_response", "rejected_responses", "rejected_messages")
_LISTS = tuple(key for keys in LISTS.values() for key in keys)
BAD_EXAMPLE = "a bad example, left out by data.preference=chosen"


class LeftOut(BadSample):
    """A record that the user's settings leave out: counted with its reason, never a reason to stop."""


class Converter:
    """Converts records by the recipe's section data; the converters of several sources share their rules."""

    def __init__(self, data: Data, rules: Optional[Rules] = None) -> None:
        self._data = data
        self._ignored = frozenset(data.ignore_keys)
        names = {theirs: ours for ours, theirs in data.columns.items()}
        self._in_turns = {theirs: ours for theirs, ours in names.items() if ours in _IN_TURNS}
        self._outside = {theirs: ours for theirs, ours in names.items() if ours not in _IN_TURNS}
        self.rules = rules or Rules(data)
        self.unseen = set(data.columns.values())  # columns that no record had so far

    def __call__(self, value: object) -> Sample:
        """The sample of one record, any JSON value; raises `BadSample` where there is none."""
        record = expect(dict, value, "", "an object")
        self.unseen -= record.keys()
        self.rules.keys.counts.update(filled(record, self._ignored & record.keys()))
        # keys to be ignored are named as the user's, so they go before the renaming
        renamed = _renamed(_without(record, *self._ignored), self._outside)
        plain = _chosen_side(renamed, self._data.preference, self.rules)
        name = self._format(plain)
        if name == "samples":
            return parse_sample(plain, self.rules)
        names = LISTS.get(name, ("",))
        key = next(iter(filled(plain, names)), names[0])
        known = self.rules.keys.known("", plain, {key, *_OUTSIDE} if key else _COLUMNS)
        turns = self._turns(known, key) if key else columns.turns_of(known)
        tools = {key: text for key in TOOLS if (text := tools_text(known.get(key), key))}
        return chat.make_sample(self._prompts(known), turns, one_of(tools, list(tools))[1] or "", self.rules)

    def _format(self, record: Mapping[str, Any]) -> str:
        if self._data.source_format != "auto":
            return self._data.source_format
        held = {name: filled(record, keys) for name, keys in _FORMATS.items()}
        held["samples"] = given(record, _FORMATS["samples"])  # of which an empty text says something
        found = [name for name, keys in held.items() if keys]
        if len(found) > 1:
            fits = " and ".join(f"{', '.join(held[name])} ({name})" for name in found)
            last = ",".join(held[found[-1]])
            raise BadSample(f"fits more than one format: {fits}; leave one out, e.g. data.ignore_keys=[{last}]")
        found = found or [name for name, keys in _FORMATS.items() if not record.keys().isdisjoint(keys)]  # but empty
        if found:
            return found[0]
        for key in _BLOBS:
            if isinstance(record.get(key), str):
                what = f"holds a conversation as one text in {key}: turns cannot be told apart"
                raise BadSample(f"{what}, write them as messages")
        known = "messages, conversations, instruction + output, prompt + completion, meta_prompt + data"
        what = f"unknown format: keys found are {keys_of(record)}; known are {known}"
        raise BadSample(f"{what}: name your columns in data.columns")

    def _turns(self, record: Mapping[str, Any], key: str) -> Sequence[object]:
        """The turns under a key, a list or the JSON text of one, with the user's names for role and content."""
        turns = json_or(record.get(key), key)
        if not isinstance(turns, list):
            raise BadSample(f"{key} is {kind_of(turns) if key in record else 'missing'}, not a list")
        if not turns:
            raise BadSample(f"{key} is empty")
        if self._in_turns:
            self.unseen = self.unseen.difference(*(turn for turn in turns if isinstance(turn, dict)))
        return [_renamed(turn, self._in_turns) if isinstance(turn, dict) else turn for turn in turns]

    def _prompts(self, record: Mapping[str, Any]) -> list[str]:
        key, value = one_of(record, filled(record, SYSTEM))
        if not key:
            return []
        listed = is_parts(value)  # Anthropic's
        if isinstance(value, dict):  # Gemini's: {"parts": [{"text": …}]}
            self.rules.keys.counts.update(filled(value, ("role",)))
            value = self.rules.keys.known(key, value, _CONTENT).get("parts")
            value = [value] if isinstance(value, dict) else value
            listed = isinstance(value, list)
        if listed:
            parts = read_parts(value, key, self.rules.keys)
            value = parts.text if parts == Parts(parts.text) else value
        return [expect(str, value, key, "a text")]


def _renamed(record: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    if not names:
        return record
    found: dict[str, Any] = {}
    for key, value in record.items():
        ours = names.get(key, key)
        if found.get(ours) is not None and value is not None:
            theirs = next(name for name in names if names[name] == ours)
            raise BadSample(f"has {theirs} (data.columns.{ours}) and {ours}: ignore or rename one of them")
        found[ours] = found.get(ours) if value is None else value
    return found


def _chosen_side(record: dict[str, Any], wanted: str, rules: Rules) -> dict[str, Any]:
    """The record as one of conversations: the preferred answer at its end, without keys of preference data.

    Raises `BadSample` where data.preference, `wanted`, refuses such data, `LeftOut` where it is a bad example.
    """
    marks = [key for key in LABELS if record.get(key) in (0, 1)]  # another value is no mark, but an unknown key
    rules.changes.update("empty labels taken for none" for key in LABELS if key in record and record[key] in EMPTY)
    sides = filled(record, (*CHOSEN, *REJECTED))
    if not marks and not sides:
        return record
    if wanted == "refuse":
        kind = "KTO" if marks else "DPO"
        what = f"holds preference data ({kind}: {', '.join(marks + sides)}), which supervised fine-tuning cannot use"
        raise BadSample(f"{what}: set data.preference=chosen to train on the chosen side only")
    if not all(record[key] for key in marks):
        raise LeftOut(f"{BAD_EXAMPLE}: {marks[0]} is false")
    found = _without(record, *marks, *CHOSEN, *REJECTED)
    if filled(record, REJECTED):
        rules.changes["rejected answers left out"] += 1
    side, chosen = one_of(record, filled(record, CHOSEN))
    return _with_answer(found, chosen) if side else found


def _with_answer(record: dict[str, Any], chosen: Any) -> dict[str, Any]:
    """The record with its preferred answer: a text, a turn, or turns, which may be the whole conversation."""
    if answers := filled(record, columns.ANSWER):
        raise BadSample(f"has a chosen answer and {', '.join(answers)}: keep one of them")
    chosen = columns.turns_or(chosen)
    turn = chosen if isinstance(chosen, dict) else {"role": "assistant", "content": chosen}
    turns = chosen if isinstance(chosen, list) else [turn]
    place = next(iter(filled(record, (*_LISTS, "prompt"))), "")
    asked = json_or(record[place], place) if place in _LISTS else columns.turns_or(record.get(place))
    if isinstance(asked, list):
        whole = len(turns) > 1 and turns[:1] == asked[:1]
        if whole and turns[: len(asked)] != asked:
            raise BadSample(f"{place} and the chosen turns begin alike and differ later: keep one of them")
        name = "messages" if place == "prompt" else place
        return {**_without(record, place), name: turns if whole else [*asked, *turns]}
    if place in _LISTS:
        return record  # no list of turns: the converter says so
    asking = filled(record, (*columns.PROMPT, *columns.INPUT))
    if len(turns) == 1 and (asking or isinstance(chosen, str)):
        return {**record, "response": chosen if isinstance(chosen, str) else turns}
    if asking and not any(isinstance(turn, dict) and record[asking[0]] in turn.values() for turn in turns):
        raise BadSample(f"has {asking[0]}, which its chosen turns do not hold: leave it out with data.ignore_keys")
    return {**_without(record, *asking[:1]), "messages": turns}


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}
