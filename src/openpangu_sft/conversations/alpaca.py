"""Alpaca: one instruction and its answer, with earlier rounds if any.

Source of the format: the Stanford Alpaca dataset (instruction, input, output); system, history, and the newline
between instruction and input as in LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.conversation import BadSample, Sample, kind_of
from openpangu_sft.conversations.fields import make_sample, optional_text


def convert(record: Mapping[str, Any]) -> Sample:
    """Converts {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], …]}.

    Other keys are ignored.

    Raises:
        BadSample: the question or the answer is empty, or a field has the wrong type.
    """
    if optional_text(record, "instruction") is None:
        raise BadSample("instruction is missing")
    parts = [text for key in ("instruction", "input") for text in [optional_text(record, key)] if text]
    if not parts:
        raise BadSample("instruction and input are both empty")
    output = optional_text(record, "output")
    if not output:
        raise BadSample("output is empty" if output == "" else "output is missing")
    messages = _history(record.get("history"))
    messages.append({"role": "user", "content": "\n".join(parts)})
    messages.append({"role": "assistant", "content": output})
    system = optional_text(record, "system")
    return make_sample([system] if system else [], messages)


def _history(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadSample(f"history is {kind_of(value)}, not a list of [user, assistant] pairs")
    messages: list[dict[str, Any]] = []
    for number, pair in enumerate(value, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadSample(f"round {number} of history is not a pair of texts [user, assistant]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages
