"""What export refuses of a tokenizer with code of its own, in one line and before any weights are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.test_export import make_run
from conftest import MakeRecipe
from openpangu_sft.checkpoint import export
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.recipe.schema import Recipe
from pangu_base import TRUSTED, make_pangu_base
from pangu_base import own_module_cache as own_module_cache  # a fixture
from refusals import refusal_of
from tokenizer.test_tokenizer import REMOTE_CODE


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], str]:
    def refused(recipe: Recipe) -> str:
        monkeypatch.setattr(export, "write_safetensors", lambda *_: pytest.fail("the weights were written"))
        message = refusal_of(run_export, recipe)
        assert len(message) < 600
        assert not recipe.path("export").exists()
        assert {path.name for path in recipe.path("export").parent.glob(".export*")} == {".export.lock"}
        return message

    return refused


ENDS_OTHERWISE = """
    @property
    def chat_template(self):
        return "{{ messages }}"

    @chat_template.setter
    def chat_template(self, value):
        pass
"""


CHANGES = {
    "small letters": (
        "encode(text, out",
        "encode(text.lower(), out",
        "gives other ids as LlamaTokenizer than with its",
    ),
    "one character": ("encode(text, out", 'encode(text.replace("你", "您"), out', "with its own code, for '"),
    "more at the end": (
        "token_ids_0 +",
        "token_ids_0 + [7] +",
        "gives other ids as LlamaTokenizer than with its own code",
    ),
    "another bos": (
        "return self.sp_model.bos_id()",
        "return 4",
        "has bos_token_id 1 as LlamaTokenizer, 4 with its own",
    ),
    "a template": ("    def _tokenize", ENDS_OTHERWISE + "\n    def _tokenize", "has chat_template '{% set"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_class_that_does_something_else_is_refused(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, refusal: Callable[[Recipe], str], change: str
) -> None:
    old, new, said = CHANGES[change]
    assert old in REMOTE_CODE
    name = f"openPangu-{change.replace(' ', '-')}"
    base = make_pangu_base(tmp_path / name, tiny_hf, tokenizer=REMOTE_CODE.replace(old, new))
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    message = refusal(recipe)
    assert message.startswith(f"{base / 'tokenizer_config.json'}: ")
    assert said in message
    assert message.endswith(" -> export with FORM=openpangu")


def test_what_only_the_code_knows_would_be_lost_with_it(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, refusal: Callable[[Recipe], str]
) -> None:
    code = REMOTE_CODE.replace("(bos_token=bos_token, **", '(bos_token=bos_token, eos_token="[unused10]", **')
    base = make_pangu_base(tmp_path / "openPangu-eos", tiny_hf, tokenizer=code, eos_token=...)
    (base / "special_tokens_map.json").unlink()
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    assert re.search("has eos_token_id 2 as LlamaTokenizer, [0-9]+ with its own code", refusal(recipe))


def test_remote_code_that_is_not_trusted(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, refusal: Callable[[Recipe], str]
) -> None:
    base = make_pangu_base(tmp_path / "openPangu-untrusted", tiny_hf)
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    message = refusal(recipe)
    assert message.startswith(f"{base}: the tokenizer does not load: ")
    assert message.endswith("-> read its tokenization_*.py, then set tokenizer.trust_remote_code=true")
