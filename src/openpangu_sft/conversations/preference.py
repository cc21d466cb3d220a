"""Preference data: recognised by its keys, refused, or its chosen side taken.

Source of the formats: TRL (prompt, chosen, rejected; label for KTO), LLaMA-Factory (chosen and rejected beside
conversations or instruction; kto_tag), ms-swift (rejected_response, rejected_messages; label).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.conversation import Rules
from openpangu_sft.conversations.fields import json_or
from openpangu_sft.conversations.keys import BadSample

LABELS = ("label", "kto_tag")
CHOSEN = ("chosen", "chosen_response", "chosen_messages")
REJECTED = ("rejected", "rejected_response", "rejected_responses", "rejected_messages")


class LeftOut(BadSample):
    """A record that the user's settings leave out: counted with its reason, never a reason to stop."""


def chosen_side(record: dict[str, Any], wanted: str, rules: Rules) -> dict[str, Any]:
    """The record as one of conversations: the preferred answer at its end, without keys of preference data.

    Args:
        wanted: data.preference: refuse or chosen.

    Raises:
        BadSample: it is preference data, and that is refused.
        LeftOut: it is marked as a bad example.
    """
    marks = [key for key in LABELS if isinstance(record.get(key), bool)]
    sides = [key for key in (*CHOSEN, *REJECTED) if record.get(key) not in (None, "", [])]
    if not marks and not sides:
        return record
    if wanted == "refuse":
        kind = "KTO" if marks else "DPO"
        what = f"holds preference data ({kind}: {', '.join(marks + sides)}), which supervised fine-tuning cannot use"
        raise BadSample(f"{what}: set data.preference=chosen to train on the chosen side only")
    if any(record[key] is False for key in marks):
        raise LeftOut(f"{marks[0]} is false: data.preference=chosen leaves bad examples out")
    found = {key: value for key, value in record.items() if key not in (*LABELS, *CHOSEN, *REJECTED)}
    if any(key in REJECTED for key in sides):
        rules.changes["rejected answers left out"] += 1
    chosen = [record[key] for key in CHOSEN if key in sides]
    if len(chosen) > 1:
        raise BadSample(f"has {' and '.join(key for key in CHOSEN if key in sides)}: keep one of them")
    return _with_answer(found, chosen[0]) if chosen else found


def _with_answer(record: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
    """The record with its preferred answer: a text, a turn, or turns, which may be the whole conversation."""
    turns = chosen if isinstance(chosen, list) else [chosen if isinstance(chosen, dict) else _assistant(chosen)]
    key = next((key for key in ("messages", "conversations") if record.get(key) is not None), "")
    if key:
        return {**record, key: [*(json_or(record[key], key) or []), *turns]}
    if isinstance(record.get("prompt"), list):
        return {**record, "completion": turns}
    if len(turns) == 1 and any(record.get(name) for name in ("prompt", "instruction", "query", "question")):
        return {**record, "response": chosen if isinstance(chosen, str) else turns}
    return {**{name: value for name, value in record.items() if name != "prompt"}, "messages": turns}


def _assistant(text: object) -> dict[str, object]:
    return {"role": "assistant", "content": text}
