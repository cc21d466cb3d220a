"""ShareGPT: a list of turns, each with its speaker ("from") and text ("value").

Source of the format: the ShareGPT exports that Vicuna was trained on (human, gpt); system, tools, function_call and
observation as in LLaMA-Factory's datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openpangu_sft.conversations.conversation import BadSample, Sample
from openpangu_sft.conversations.fields import (
    make_sample,
    optional_text,
    required_list,
    tools_prompt,
    turn_role,
    turn_text,
)

ROLE_OF = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def convert(record: Mapping[str, Any]) -> Sample:
    """Converts {"conversations": [{"from", "value"}, …], "system"?, "tools"?}.

    Leading system turns become system prompts, followed by one for the tools (see `tools_prompt`). Other keys are
    ignored.

    Raises:
        BadSample: an unknown role, a value that is no text, two different system prompts, or unreadable tools.
    """
    turns = []
    for number, turn in enumerate(required_list(record, "conversations"), 1):
        speaker = turn_role(turn, f"turn {number}", "from", "value", ("system", *ROLE_OF))
        turns.append((speaker, turn_text(turn, f"turn {number}", "value")))
    leading = next((index for index, (speaker, _) in enumerate(turns) if speaker != "system"), len(turns))
    prompts = [value for _, value in turns[:leading]]
    system = optional_text(record, "system")
    if system and any(prompts) and prompts != [system]:
        raise BadSample("has a system field and another system prompt as its first turn: keep one of them")
    if system:
        prompts = [system]
    messages = []
    for number, (speaker, value) in enumerate(turns[leading:], leading + 1):
        if speaker == "system":
            raise BadSample(f"turn {number} is a system prompt inside the conversation: move it to the beginning")
        messages.append({"role": ROLE_OF[speaker], "content": value})
    return make_sample(prompts + tools_prompt(record), messages, leading + 1)
