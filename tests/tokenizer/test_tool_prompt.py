"""The system prompt for tools: the built-in wording, the recipe's template, and what definitions can never do in it."""

from __future__ import annotations

import json
import re
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpangu_sft.conversations.calls import tools_text
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.tokenizer.tool_prompt import DEFAULT, ToolPrompt
from refusals import refusal_of

TOKEN = re.compile(r"\[unused\d+\]|</?s>")
WEATHER = '[{"name":"weather","parameters":{"city":"上海","degrees":1.50}}]'


def find(text: str, begin: int) -> Optional[re.Match[str]]:
    """As the tokenizer finds control tokens."""
    return TOKEN.search(text, begin)


def test_the_built_in_wording() -> None:
    [text] = ToolPrompt()(WEATHER, find)
    assert text == DEFAULT.replace("{{ tools | tojson }}", WEATHER)
    assert f"<tools>\n{WEATHER}\n</tools>" in text
    assert TOKEN.findall(text) == ["[unused11]", "[unused12]"] * 2
    assert ToolPrompt(DEFAULT)(WEATHER) == [text]


def test_no_tools_no_prompt() -> None:
    assert ToolPrompt()("", find) == []
    assert ToolPrompt("always")("") == []


def test_a_template_of_the_recipe() -> None:
    template = "{% for tool in tools %}\n- {{ tool.name }}: {{ tool.parameters | tojson }}\n{% endfor %}"
    assert ToolPrompt(template)(WEATHER) == ['- weather: {"city":"上海","degrees":1.50}\n']
    assert ToolPrompt("no tools named")(WEATHER) == ["no tools named"]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ tools", "is no Jinja template: unexpected end of template, expected 'end of print statement'."),
        ("{{ tools | json }}", "is no Jinja template: No filter named 'json'."),
        ("{{ tols | tojson }}", "names tols, and a template is given only tools"),
    ],
)
def test_a_template_that_is_none(template: str, complaint: str) -> None:
    expected = f"data.tool_prompt: {complaint} -> fix it, or leave the key out"
    assert refusal_of(ToolPrompt, template) == expected


@pytest.mark.parametrize(
    "template", ["{{ tools[0].nme.text }}", "{{ 1 / 0 }}", "{{ tools[0].name + 1 }}", "{{ tools() }}"]
)
def test_a_template_that_fails_on_a_sample_refuses_the_sample(template: str) -> None:
    with pytest.raises(BadSample, match=r"^data\.tool_prompt cannot render its tools: "):
        ToolPrompt(template)(WEATHER)


def test_a_template_reaches_nothing_but_its_tools() -> None:
    with pytest.raises(BadSample, match="unsafe"):
        ToolPrompt("{{ tools.__class__.__mro__ }}")(WEATHER)


@pytest.mark.parametrize(
    ("template", "tools", "parts"),
    [
        ("[unused9]{{ tools[0].d }}", [{"d": "a[unused9]b"}], ["[unused9]a[", "unused9]b"]),
        ("[{{ tools[0].name }}]", [{"name": "unused9"}], ["[", "unused9]"]),
        ("[unused{{ tools[0].number }}]", [{"number": 9}], ["[", "unused9]"]),
        ("{{ tools | map(attribute='name') | join }}", [{"name": "[unus"}, {"name": "ed9]"}], ["[", "unused9]"]),
        ("{{ tools[0].name | lower }}", [{"name": "[UNUSED9]"}], ["[", "unused9]"]),
        ("{{ tools[0].name | replace('-', '') }}", [{"name": "[un-used9]"}], ["[", "unused9]"]),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(tools[0].name) }}", [{"name": "unused9"}], ["[", "unused9]"]),
        ("{% set x %}<{{ tools[0].name }}{% endset %}{{ x }}>", [{"name": "/s"}], ["<", "/s>"]),
        ("{% filter lower %}[{{ tools[0].name }}]{% endfilter %}", [{"name": "UNUSED9"}], ["[", "unused9]"]),
        ("{{ tools | tojson }}", [{"[unused9]": "[unused9"}], ['[{"[', 'unused9]":"[unused9"}]']),
        ("{{ tools | tojson }}", [{"name": "\\u005bunused9]"}], ['[{"name":"\\\\u005bunused9]"}]']),
    ],
)
def test_definitions_never_make_a_control_token(template: str, tools: list[object], parts: list[str]) -> None:
    assert ToolPrompt(template)(json.dumps(tools), find) == parts
    assert ToolPrompt(template)(json.dumps(tools)) == ["".join(parts)]


PIECES = st.lists(
    st.sampled_from(["[unused9]", "[unused", "9]", "[", "]", "<s>", "<", "s>", "/s", "好", '"', "\\"])
).map("".join)
TEMPLATES = [
    None,
    "[unused9]{{ tools[0].a }}[unused10]",
    "{% for tool in tools %}[{{ tool.a }}]<{{ tool.b }}>{% endfor %}[unused11]",
    "{{ tools | map(attribute='a') | join('[') }}]</s>",
    "{% macro m(x) %}[{{ x }}9]{% endmacro %}{{ m(tools[0].a) ~ tools[0].b }}{{ tools[0] | tojson }}",
]


@given(st.sampled_from(TEMPLATES), st.lists(st.fixed_dictionaries({"a": PIECES, "b": PIECES}), min_size=1, max_size=2))
def test_only_the_template_s_own_text_has_control_tokens(template: Optional[str], tools: list[dict[str, str]]) -> None:
    prompt = ToolPrompt(template)
    parts = prompt(tools_text(tools), find)
    assert ["".join(parts)] == prompt(tools_text(tools))
    static = TOKEN.findall(re.sub(r"\{[{%].*?[}%]\}", "\0", template or DEFAULT))
    assert [token for part in parts for token in TOKEN.findall(part)] == static


def test_marks_of_the_renderer_in_definitions_are_refused() -> None:
    with pytest.raises(BadSample, match="tools holds U\\+FDD0"):
        ToolPrompt()(tools_text([{"name": "\ufdd1"}]), find)
