"""Answers on the screen as they are generated, and tools from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from openpangu_sft.conversations.calls import Answer, call_text, tools_text
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.model.chat import Parts
from openpangu_sft.util.errors import TEXT, UserError, printable


class AnswerPrinter:
    """Prints an answer token by token: thinking to stderr, text and calls to stdout."""

    def __init__(self) -> None:
        self._parts, self._part, self._calls = Parts(), "text", ""

    def __call__(self, text: str) -> None:
        """Takes the text of the next token."""
        before, (self._part, text) = self._part, self._parts(text)
        if self._part != before and "thinking" in (self._part, before):
            print("thinking: " if self._part == "thinking" else "\n", end="", file=sys.stderr, flush=True)
        if self._part == "calls":
            self._calls += text
        else:
            file = sys.stderr if self._part == "thinking" else sys.stdout
            print(printable(text, TEXT), end="", file=file, flush=True)

    def end(self, answer: Answer) -> None:
        """Ends the line and prints the calls, one on a line, or what the model wrote in their place."""
        if self._part == "thinking":  # cut off by chat.max_new_tokens
            print(file=sys.stderr)
        if answer.text or not self._calls:
            print(flush=True)
        for call in map(json.loads, map(call_text, json.loads(answer.calls or "[]"))):
            print(printable(f"call: {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}"), flush=True)
        if self._calls and not answer.calls:
            print(f"no valid call: {printable(self._calls)}", flush=True)
        self._parts, self._part, self._calls = Parts(), "text", ""


def read_tools(path: Path) -> str:
    """Tool definitions in a file, as the JSON text of a list; raises `UserError` where it has none, or other things."""
    remedy = "write a JSON list of tool definitions"
    try:
        tools = tools_text(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"cannot be read: {error}", where=path, remedy="give a JSON file of tools") from None
    except BadSample as error:
        raise UserError(str(error), where=path, remedy=remedy) from None
    if not tools:
        raise UserError("holds no tools", where=path, remedy=remedy)
    return tools
