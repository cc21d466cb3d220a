"""Records with a question and its answer in columns of their own, as turns.

Source of the formats: Stanford Alpaca (instruction, input, output), with system and history as in LLaMA-Factory; OpenAI
and TRL (prompt, completion); Dolly (instruction, context, response); ms-swift (query, response); question and answer;
xLAM (query, answers as a list of calls, tools).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.fields import json_or, keys_of, kind_of
from openpangu_sft.conversations.keys import EMPTY, BadSample

PROMPT = ("instruction", "prompt", "query", "question")
INPUT = ("input", "context")
ANSWER = ("output", "response", "completion", "answer", "answers")
KNOWN = frozenset((*PROMPT, *INPUT, *ANSWER, "history"))


def turns_of(record: Mapping[str, Any]) -> list[Any]:
    """The turns of a record: history, question, answer.

    Raises:
        BadSample: two columns for the same, none for the answer, or a value of another type.
    """
    prompt, extra, answer = (_one(record, names) for names in (PROMPT, INPUT, ANSWER))
    if not prompt and not extra:
        raise BadSample(f"has no question: {', '.join(PROMPT)} and {', '.join(INPUT)} are missing or empty")
    if not answer:
        raise BadSample(f"has no answer: keys found are {keys_of(record)}; name its column in data.columns.response")
    before, after = record.get(prompt or extra), record[answer]
    if isinstance(before, list) and not extra:
        asked = before
    else:
        texts = [_text(record, key) for key in (prompt, extra) if key]
        asked = [{"role": "user", "content": "\n".join(filter(None, texts))}]
    return [*_history(record.get("history")), *asked, *_answered(answer, after)]


def _one(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The one column of several with the same meaning; empty where there is none."""
    found = [key for key in names if record.get(key) is not None]
    if len(found) > 1:
        found = [key for key in found if record[key] not in EMPTY] or found[:1]
    if len(found) > 1:
        raise BadSample(f"has {' and '.join(found)}: say in data.columns which is which, or in data.ignore_keys")
    return found[0] if found else ""


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise BadSample(f"{key} is {kind_of(value)}, not a text")
    return value


def _answered(key: str, value: object) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
        return items
    if key == "answers" and (
        value.lstrip().startswith("[") if isinstance(value, str) else all("name" in _object(item) for item in items)
    ):
        return [{"role": "function_call", "content": value}]
    if not isinstance(value, str):
        more = ": give each record one answer" if isinstance(value, list) else ""
        raise BadSample(f"{key} is {kind_of(value)}, not a text{more}")
    return [{"role": "assistant", "content": value}]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _history(value: object) -> list[Any]:
    """Earlier rounds: pairs [user, assistant], or turns; a list or the JSON text of one."""
    if value is None or value == "":
        return []
    rounds = json_or(value, "history")
    if not isinstance(rounds, list):
        raise BadSample(f"history is {kind_of(rounds)}, not a list of [user, assistant] pairs")
    turns: list[Any] = []
    for number, pair in enumerate(rounds, 1):
        if isinstance(pair, dict):
            turns.append(pair)
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            raise BadSample(f"round {number} of history is not a pair of texts [user, assistant]")
    return turns
