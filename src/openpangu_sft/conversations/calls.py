"""Tool calls, tool definitions and thinking as text: what is trained, and how it is recognised in answers.

Source of the format: the tool and reasoning parsers that openPangu's vendor publishes for vLLM: an answer is thinking
between [unused16] and [unused17], text, then one JSON list of {"name", "arguments"} between [unused11] and [unused12].
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Sequence
from typing import NamedTuple, Optional

from openpangu_sft.conversations.fields import WITH_DUPLICATES, compact_json, expect, given, json_or, kind_of, one_of
from openpangu_sft.conversations.keys import BadSample, Keys

THINKING = ("[unused16]", "[unused17]")
CALLS = ("[unused11]", "[unused12]")

_TAGS = re.compile("|".join(map(re.escape, (*THINKING, *CALLS))))
_ANSWER = re.compile(
    r"(?:\[unused16\](?P<thinking>.*?)\[unused17\])?(?P<text>.*?)(?:\[unused11\](?P<calls>.*?)\[unused12\])?", re.DOTALL
)
_THINK = re.compile(r"\s*<think>(?P<thinking>.*?)</think>\s*(?P<text>.*)", re.DOTALL)

_WRAPPER = frozenset(("function", "id", "type", "index"))
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALL = frozenset(("name", "id", "type", "index", *_ARGUMENTS))
_DECLARATIONS = ("functionDeclarations", "function_declarations")


class Answer(NamedTuple):
    """The parts of an assistant's message: thinking, None for none; text; calls as JSON text, empty for none."""

    thinking: Optional[str]
    text: str
    calls: str


def split_answer(content: str, keys: Optional[Keys] = None) -> Answer:
    """The parts of an answer that is written in the model's own tokens; all of it is text where it is not."""
    once = "[unused1" in content and max(map(content.count, (*THINKING, *CALLS))) == 1  # else it takes quadratic time
    found = _ANSWER.fullmatch(content) if once else None
    if found and (found["thinking"] is not None or found["calls"]):
        parts = Answer(found["thinking"], found["text"], found["calls"] or "")
        if found["calls"] != "" and not any(_TAGS.search(part or "") for part in parts):
            with contextlib.suppress(BadSample):  # no list of calls: text, to which data.control_tokens applies
                return parts._replace(calls=calls_text(parts.calls, keys))
    return Answer(None, content, "")


def answer_of(text: str) -> Answer:
    """The parts of a generated answer, which may be cut off inside of its thinking or its calls."""
    if not text.startswith(THINKING[0]):
        return split_answer(text)
    thinking, _, rest = text.removeprefix(THINKING[0]).partition(THINKING[1])
    return split_answer(rest)._replace(thinking=thinking)


def split_thinking(content: str) -> tuple[Optional[str], str]:
    """Thinking and text of an answer with <think> tags (DeepSeek-R1, Qwen3); raises `BadSample` for one out of place.

    Blanks around thinking and before the text go, as those models' templates render them; empty thinking is none.
    """
    found = _THINK.fullmatch(content) if "</think>" in content else None
    thinking, text = (found["thinking"].strip() or None, found["text"]) if found else (None, content)
    if "</think>" in text or text.lstrip().startswith("<think>"):
        remedy = "write thinking once, as <think>…</think>, before the text"
        raise BadSample(f"has <think> or </think> out of place: {remedy}")
    return thinking, text


def split_tags(content: str, keys: Optional[Keys] = None) -> Answer:
    """The parts of an answer with <think> and <tool_call> (Hermes) tags; raises `BadSample` for misplaced ones.

    Blanks before calls go.
    """
    thinking, text = split_thinking(content)
    if "<tool_call>" not in text:
        return Answer(thinking, text, "")
    text, tag, rest = text.partition("<tool_call>")
    *calls, after = map(str.strip, (tag + rest).split("</tool_call>"))
    if after or not all(call.startswith(tag) for call in calls):
        raise BadSample("has <tool_call> that is not closed, or text after it: put the text before the calls")
    calls = [call_text(json_or(call.removeprefix(tag), "a <tool_call>"), keys) for call in calls]
    return Answer(thinking, text.rstrip(), joined_calls(calls))


def call_text(call: object, keys: Optional[Keys] = None) -> str:
    """One call as JSON text: {"name":…,"arguments":{…}}; raises `BadSample` without name, or for wrong arguments.

    `call` has name and arguments (or parameters, input, args: an object, its JSON text, which is kept, or nothing), or
    it holds them under "function"; `keys` is the rule for other keys.
    """
    keys = keys or Keys()
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = keys.known("a call", call, _WRAPPER, required=True)["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise BadSample("a call names no function: expected name and arguments")
    call, name = keys.known("a call", call, _CALL, required=True), reprlib.repr(call["name"])
    _, arguments = one_of(call, given(call, _ARGUMENTS), f"the call of {name}")
    text = arguments.strip() if isinstance(arguments, str) else arguments
    if text in (None, "", "null"):
        text = "{}"
    parsed = json_or(text, f"arguments of the call of {name}", WITH_DUPLICATES)
    if not isinstance(parsed, dict):
        raise BadSample(f"arguments of the call of {name} is no object: {kind_of(parsed)}")
    text = text if isinstance(text, str) else compact_json(parsed)  # a text is kept: the model sees what the tool saw
    return f'{{"name":{compact_json(call["name"])},"arguments":{text}}}'


def joined_calls(calls: Sequence[str]) -> str:
    """One JSON list of calls; empty where there are none."""
    return f"[{','.join(calls)}]" if calls else ""


def calls_text(value: object, keys: Optional[Keys] = None) -> str:
    """The JSON text of a list of calls, kept if given in the vendor's form; raises `BadSample` for another value."""
    if value in (None, "", []):
        return ""
    calls = json_or(value, "calls", WITH_DUPLICATES)
    if not isinstance(calls, list) or not calls:
        raise BadSample(f"calls is {kind_of(calls) if calls != [] else 'an empty list'}, not a list of calls")
    texts = [call_text(call, keys) for call in calls]
    own = all(call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict) for call in calls)
    return value if own and isinstance(value, str) else joined_calls(texts)


def tools_text(value: object, name: str = "tools") -> str:
    """Tool definitions as the JSON text of a list, empty where there are none; raises `BadSample` for another value.

    The value is an object or a list of them; one may hold a list as functionDeclarations (Gemini).
    """
    tools = None if isinstance(value, str) and not value.strip() else json_or(value, name)
    if tools in (None, {}):
        return ""
    if isinstance(tools, dict):
        single = tools.keys() & {"name", "function", *_DECLARATIONS}
        tools = [tools] if single else [_named(key, tool) for key, tool in tools.items()]
    found: list[object] = []
    for entry in expect(list, tools, name, "a list of tool objects"):
        tool = json_or(entry, f"an entry of {name}")
        held = [tool[key] for key in _DECLARATIONS if isinstance(tool, dict) and tool.keys() == {key}]
        found += held[0] if held and isinstance(held[0], list) else [tool]
    if not all(isinstance(tool, dict) for tool in found):
        raise BadSample(f"{name} is a list of something else, not a list of tool objects")
    return compact_json(found) if found else ""


def _named(name: str, tool: object) -> object:
    """A definition that a mapping holds under its name."""
    return {"name": name, **tool} if isinstance(tool, dict) and not {"name", "function"} & tool.keys() else tool
