"""The system prompt that tells the model its tools.

Its wording follows public openPangu agents: the definitions as JSON inside <tools></tools>, and the request to answer
with JSON inside [unused11][unused12]. The model's repository has no official one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Optional

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openpangu_sft.conversations.fields import compact_json, parse_json
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.tokenizer.template import Find, cut_inside
from openpangu_sft.util.errors import UserError

DEFAULT = """\
The tools you can call are described as JSON inside <tools></tools>:
<tools>
{{ tools | tojson }}
</tools>
To call tools, answer with a JSON list of objects inside [unused11][unused12], each with function name and arguments:
[unused11][{"name": <function name>, "arguments": <JSON object>}][unused12]"""

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Around what expressions of the template give; Unicode keeps these characters out of texts that are exchanged."""


class ToolPrompt:
    """Renders tool definitions by data.tool_prompt; None is the built-in wording.

    Raises `UserError` where it is no Jinja template, or names something else than tools.
    """

    def __init__(self, template: Optional[str] = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, finalize=lambda value: f"{_BEGIN}{value}{_END}"
        )
        environment.filters["tojson"] = compact_json
        source = DEFAULT if template is None else template
        try:
            self._template = environment.from_string(source)
            unknown = find_undeclared_variables(environment.parse(source)) - {"tools", *environment.globals}
            what = f"names {min(unknown)}, and a template is given only tools" if unknown else ""
        except TemplateError as error:
            what = f"is no Jinja template: {error}"
        if what:
            raise UserError(what, where="data.tool_prompt", remedy="fix it, or leave the key out")
        self._parts = lru_cache(maxsize=256)(self._cut)

    def __call__(self, tools: str, find: Optional[Find] = None) -> list[str]:
        """The prompt in parts that are encoded by themselves; none where there are no tools (JSON text of a list).

        Control tokens in the template's own text are ones. Any other that the prompt spells, even if the template
        puts it together, comes from the definitions: `find` cuts inside of it. Raises `BadSample` where it fails.
        """
        return list(self._parts(tools, find)) if tools else []

    def _cut(self, tools: str, find: Optional[Find]) -> list[str]:
        if _BEGIN in tools or _END in tools:
            raise BadSample("tools holds U+FDD0 or U+FDD1, which are no characters: take them out")
        try:
            rendered = self._template.render(tools=parse_json(tools))
        except Exception as error:  # of any type: it may call methods and do arithmetic
            raise BadSample(f"data.tool_prompt cannot render its tools: {error}") from None
        text, given = _without_marks(rendered)
        return cut_inside(text, find, given) if find else [text]


def _without_marks(rendered: str) -> tuple[str, bytes]:
    """A rendered text, and whether each character of it comes from an expression of the template (1) or not (0)."""
    text, given, depth = "", b"", 0
    for part in re.split(f"([{_BEGIN}{_END}])", rendered):
        if part in (_BEGIN, _END):
            depth += 1 if part == _BEGIN else -1
            if depth < 0:
                break
        else:
            text, given = text + part, given + bytes([depth > 0]) * len(part)
    if depth:  # a filter has cut a value of {% set %} or of a macro, so nothing tells it from the template's own text
        raise BadSample("data.tool_prompt changes what {% set %} or a macro gives: use expressions on tools only")
    return text, given
