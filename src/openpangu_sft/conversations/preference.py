"""Preference data: recognised by its keys, refused, or its chosen side taken.

Source of the formats: TRL (prompt, chosen, rejected; label for KTO), LLaMA-Factory (chosen and rejected beside
conversations or instruction; kto_tag), ms-swift (rejected_response, rejected_messages; label).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations import columns
from openpangu_sft.conversations.chat import LISTS
from openpangu_sft.conversations.conversation import Rules
from openpangu_sft.conversations.fields import filled, json_or, one_of
from openpangu_sft.conversations.keys import EMPTY, BadSample

LABELS = ("label", "kto_tag")
CHOSEN = ("chosen", "chosen_response", "chosen_messages")
REJECTED = ("rejected", "rejected_response", "rejected_responses", "rejected_messages")
_LISTS = tuple(key for keys in LISTS.values() for key in keys)

BAD_EXAMPLE = "a bad example, left out by data.preference=chosen"


class LeftOut(BadSample):
    """A record that the user's settings leave out: counted with its reason, never a reason to stop."""


def chosen_side(record: dict[str, Any], wanted: str, rules: Rules) -> dict[str, Any]:
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
