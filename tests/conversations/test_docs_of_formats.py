"""docs/data.md lists the keys, roles and formats that the code knows, and its examples of settings are valid."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from conftest import ROOT
from openpangu_sft.conversations import chat, columns, convert
from openpangu_sft.conversations.keys import HARMLESS
from openpangu_sft.recipe.load import load_recipe

TEXT = (ROOT / "docs/data.md").read_text("utf-8")
NAMES = {
    *(key for keys in chat.LISTS.values() for key in keys),
    *(*convert.SYSTEM, *convert.TOOLS, *columns.KNOWN, *convert.LABELS),
    *(*chat.ROLE_OF, *chat.SPEAKER, *chat.CONTENT, *chat._WEIGHTS, *chat._ANSWER),
}
EXAMPLES = re.findall(r"(?:^    .*\n)+", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_known_key_or_role_is_listed(name: str) -> None:
    assert f"`{name}`" in TEXT


def test_harmless_keys_are_listed() -> None:
    _, _, after = TEXT.partition("Harmless are:\n\n")
    listed = after.partition("\n\n")[0].split()
    assert listed == sorted(HARMLESS)


@pytest.mark.parametrize("example", [text for text in EXAMPLES if text.startswith("    data:\n")])
def test_an_example_of_settings_is_valid(example: str) -> None:
    section = YAML(typ="safe").load(example)["data"]
    overrides = [f"data.{key}={value!r}" for key, value in section.items()]
    assert load_recipe(ROOT / "recipes/demo.yaml", overrides).data
