"""Records with a question and its answer in columns of their own, as turns.

Source of the formats: Stanford Alpaca (instruction, input, output), with system and history as in LLaMA-Factory; OpenAI
and TRL (prompt, completion); Dolly (instruction, context, response); ms-swift (query, response); question and answer;
xLAM (query, answers as a list of calls, tools).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.fields import expect, filled, given, json_or, keys_of, optional_text, parse_json
from openpangu_sft.conversations.keys import BadSample

PROMPT = ("instruction", "prompt", "query", "question")
INPUT = ("input", "context")
ANSWER = ("output", "response", "completion", "answer", "answers")
KNOWN = frozenset((*PROMPT, *INPUT, *ANSWER, "history"))


def turns_of(record: Mapping[str, Any]) -> list[Any]:
    """Turns: history, question, answer; raises `BadSample` for two columns of one meaning, no answer, a wrong type."""
    prompt, extra, answer = (_one(record, names) for names in (PROMPT, INPUT, ANSWER))
    if not prompt and not extra:
        raise BadSample(f"has no question: {', '.join(PROMPT)} and {', '.join(INPUT)} are missing or empty")
    if not answer:
        raise BadSample(f"has no answer: keys found are {keys_of(record)}; name its column in data.columns.response")
    before, after = turns_or(record.get(prompt or extra)), turns_or(record[answer])
    if isinstance(before, list) and not extra:
        asked = before
    else:
        texts = [optional_text(record, key) for key in (prompt, extra) if key]
        asked = [{"role": "user", "content": "\n".join(filter(None, texts))}]
    return [*_history(record.get("history")), *asked, *_answered(answer, after)]


def turns_or(value: object) -> Any:
    """The turns whose JSON text a value is, as a cell of a CSV file may be; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(BadSample):
            turns = parse_json(value)
            if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns):
                return turns
    return value


def _one(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The one column of several with the same meaning; empty where there is none."""
    found = filled(record, names) or given(record, names)[:1]
    if len(found) > 1:
        raise BadSample(f"has {' and '.join(found)}: say in data.columns which is which, or in data.ignore_keys")
    return found[0] if found else ""


def _answered(key: str, value: object) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
        return items
    if isinstance(value, str):
        calls = value.lstrip().startswith("[")
    else:
        calls = all(isinstance(item, dict) and "name" in item for item in items)
    if calls and key == "answers":
        return [{"role": "function_call", "content": value}]
    wanted = "a text: give each record one answer" if isinstance(value, list) else "a text"
    return [{"role": "assistant", "content": expect(str, value, key, wanted)}]


def _history(value: object) -> list[Any]:
    """Earlier rounds: pairs [user, assistant], or turns; a list or the JSON text of one."""
    if value is None or value == "":
        return []
    rounds = expect(list, json_or(value, "history"), "history", "a list of [user, assistant] pairs")
    turns: list[Any] = []
    for number, pair in enumerate(rounds, 1):
        if isinstance(pair, dict):
            turns.append(pair)
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            raise BadSample(f"round {number} of history is not a pair of texts [user, assistant]")
    return turns
