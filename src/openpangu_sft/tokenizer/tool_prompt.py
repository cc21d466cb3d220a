"""The system prompt that tells the model its tools.

Its wording follows public openPangu agents: the definitions as JSON inside <tools></tools>, and the request to answer
with JSON inside [unused11][unused12]. The model's repository has no official one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openpangu_sft.conversations.fields import compact_json, parse_json
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.tokenizer.template import Cut, whole
from openpangu_sft.util.errors import UserError

DEFAULT = """\
The tools you can call are described as JSON inside <tools></tools>:
<tools>
{{ tools | tojson }}
</tools>
To call tools, answer with a JSON list of objects inside [unused11][unused12], each with function name and arguments:
[unused11][{"name": <function name>, "arguments": <JSON object>}][unused12]"""

_MARK = "\ufdd0"
"""Where a definition is cut; Unicode keeps this character out of texts that are exchanged."""


class ToolPrompt:
    """Renders tool definitions by the recipe's template.

    Args:
        template: data.tool_prompt; None for the built-in wording.

    Raises:
        UserError: it is no Jinja template.
    """

    def __init__(self, template: Optional[str] = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = compact_json
        try:
            self._template = environment.from_string(DEFAULT if template is None else template)
        except TemplateError as error:
            what = f"is no Jinja template: {error}"
            raise UserError(what, where="data.tool_prompt", remedy="fix it, or leave the key out") from None
        self._rendered = lru_cache(maxsize=256)(self._render)

    def __call__(self, tools: str, cut: Cut = whole) -> list[str]:
        """The prompt in parts that are encoded by themselves; none where there are no tools.

        Control tokens of the template are ones; those in definitions are cut.

        Args:
            tools: definitions as the JSON text of a list.

        Raises:
            BadSample: the template fails on them.
        """
        if not tools:
            return []
        if len(cut(tools)) == 1:
            return [self._rendered(tools)]
        return self._render(compact_json(_marked(parse_json(tools), cut))).split(_MARK)

    def _render(self, tools: str) -> str:
        try:
            return self._template.render(tools=parse_json(tools))
        except (TemplateError, TypeError, ValueError) as error:
            raise BadSample(f"data.tool_prompt cannot render its tools: {error}") from None


def _marked(value: Any, cut: Cut) -> Any:
    if isinstance(value, str):
        return _MARK.join(cut(value.replace(_MARK, "")))
    if isinstance(value, dict):
        return {_marked(key, cut): _marked(item, cut) for key, item in value.items()}
    return [_marked(item, cut) for item in value] if isinstance(value, list) else value
