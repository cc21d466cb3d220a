"""Export in the llama form from a base with remote code: it loads anywhere without, and every id stays the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from transformers import AutoTokenizer

from checkpoint.test_export import CPU, make_run
from conftest import PATIENCE, SHARED, MakeRecipe, example_texts
from openpangu_sft.checkpoint import hf_export as forms
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf_export import SAME_IDS, VLLM_TEMPLATE, make_tokenizer_stock
from openpangu_sft.model.llama import build_model
from openpangu_sft.tokenizer.tokenizer import Tokenizer, load_hf
from pangu_base import TRUSTED, logits, make_pangu_base
from pangu_base import own_module_cache as own_module_cache  # a fixture
from refusals import refusal_of
from tokenizer.test_tokenizer import REMOTE_CODE, TEXT, sentencepiece_model
from tokenizer.test_tokenizer import odd_tokenizer as odd_tokenizer  # a fixture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    return make_pangu_base(tmp_path_factory.mktemp("pangu") / "openPangu", tiny_hf)


# What it is.

FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from pathlib import Path
directory, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto", trust_remote_code=False)
assert type(model).__name__ == "LlamaForCausalLM"
input_ids = torch.arange(40).reshape(2, 20) * 31 % 1536
with torch.no_grad():
    logits = model.eval()(input_ids=input_ids).logits
found = {}
for options in ({"use_fast": False}, {}):
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **options)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    found[type(tokenizer).__name__] = tokenizer(text)["input_ids"]
assert not any(name.startswith(("openpangu", "torch_npu", "transformers_modules")) for name in sys.modules)
torch.save({"logits": logits, "ids": found}, result)
"""


def test_it_loads_in_a_fresh_process_without_code(base: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(f"paths.hf={base}", TRUSTED, "train.precision=bf16")
    tensors = make_run(recipe)
    assert run_export(recipe).counts["fast_tokenizer"] == SAME_IDS
    target = recipe.path("export")
    assert not list(target.rglob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((target / name).read_text("utf-8"))
    ran = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(target), str(tmp_path / "result")],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = torch.load(tmp_path / "result")
    wanted = logits(build_model(base, tensors, "eager", CPU))
    assert torch.equal(result["logits"].view(wanted.dtype), wanted)
    own = load_hf(base, trust_remote_code=True)
    text = own.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert result["ids"] == dict.fromkeys(["LlamaTokenizer", "LlamaTokenizerFast"], own(text)["input_ids"])
    stock, of_vllm = load_hf(target, trust_remote_code=False), (target / VLLM_TEMPLATE).read_text("utf-8")
    chat = stock.apply_chat_template([{"role": "user", "content": "你好"}], chat_template=of_vllm, tokenize=False)
    assert stock(chat, add_special_tokens=False)["input_ids"] == own(text)["input_ids"]  # as vLLM encodes a chat


def test_what_changes_in_the_tokenizers_configuration(base: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    run_export(recipe)
    before, after = (
        json.loads((path / "tokenizer_config.json").read_text("utf-8")) for path in (base, recipe.path("export"))
    )
    del before["auto_map"]
    assert after == {**before, "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False}
    for name in ("tokenizer.model", "special_tokens_map.json"):
        assert (recipe.path("export") / name).read_bytes() == (base / name).read_bytes()


# Equal ids for any text.


@pytest.fixture(scope="module")
def tokenizers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The original class, and what transformers makes of the exported files."""
    stock = tmp_path_factory.mktemp("stock")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(base / name, stock / name)
    assert make_tokenizer_stock(stock, base, trust_remote_code=True) == SAME_IDS
    slow, fast = (AutoTokenizer.from_pretrained(str(stock), use_fast=use_fast) for use_fast in (False, True))
    return {"own": load_hf(base, trust_remote_code=True), "slow": slow, "fast": fast}


def assert_same(tokenizers: dict[str, Any], text: str) -> None:
    for special in (False, True):
        wanted = tokenizers["own"].encode(text, add_special_tokens=special)
        for name in ("slow", "fast"):
            assert tokenizers[name].encode(text, add_special_tokens=special) == wanted, (name, text)


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example("[unused9]系统：[unused10][unused9]用户： a[unused10]")
@example("[unused9][unused10] [unused[unused10]<s></s>\0")
@example("▁a ▁ a")
@example("<0x41> <unk>")
def test_any_text_has_the_ids_of_the_original_class(tokenizers: dict[str, Any], text: str) -> None:
    assert_same(tokenizers, text)


def test_the_examples_have_the_ids_of_the_original_class(tokenizers: dict[str, Any]) -> None:
    for text in example_texts():
        assert_same(tokenizers, f"[unused9]用户：{text}[unused10][unused9]助手：")


def test_everything_else_that_the_original_class_has(tokenizers: dict[str, Any]) -> None:
    own = tokenizers.pop("own")
    for tokenizer in tokenizers.values():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
            assert getattr(tokenizer, name) == getattr(own, name)
        assert set(tokenizer.all_special_ids) == set(own.all_special_ids)
        for text in (" leading", "你好 a", "a\n b", "\u3000x", " .  n't"):  # the original drops the first character
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizers["own"] = own


def test_with_the_published_key_the_fast_class_gives_other_ids(base: Path, tmp_path: Path) -> None:
    """Why add_prefix_space is changed: AutoTokenizer and vLLM take the fast class unless they are told otherwise."""
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    del config["auto_map"]
    assert config["add_prefix_space"] is True
    shutil.copyfile(base / "tokenizer.model", tmp_path / "tokenizer.model")
    config["tokenizer_class"] = "LlamaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    slow, fast = (AutoTokenizer.from_pretrained(str(tmp_path), use_fast=use_fast) for use_fast in (False, True))
    text = "[unused9]用户：a[unused10]"
    assert load_hf(base, trust_remote_code=True).encode(text) == slow.encode(text) != fast.encode(text)


def test_openpangus_own_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size, its added tokens, and the published configuration of its larger sibling."""
    monkeypatch.setattr(Tokenizer, "first_disagreement", lambda *_: "")  # takes seconds with the stand-in's vocabulary
    published = SHARED / "data/openpangu_7b"
    if not published.is_dir():
        pytest.skip(f"{published} is not there: files of openPangu-Embedded-7B, which are not part of this project")
    own, stock = tmp_path / "openPangu-own", tmp_path / "stock"
    own.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(published / name, own / name)
    (own / "tokenizer.model").write_bytes(sentencepiece_model())
    shutil.copytree(own, stock)
    (own / "tokenization_openpangu.py").write_text(REMOTE_CODE, "utf-8")
    opened: list[Any] = []
    monkeypatch.setattr(forms, "load_hf", lambda *how, **more: opened.append(load_hf(*how, **more)))
    make_tokenizer_stock(stock, own, trust_remote_code=True)
    for tokenizer in (load_hf(stock, trust_remote_code=False), *opened):
        golden = [1, 45887, 70914, 89246, 45892, 45887, 62205, 89246]
        assert tokenizer.encode("[unused9]系统：[unused10][unused9]用户：") == golden
        assert tokenizer.encode("[unused9]助手：", add_special_tokens=False) == [45887, 74458, 89246]
        assert tokenizer.eos_token_id == 45892
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
        assert chat == "[unused9]系统：[unused10][unused9]用户：你好[unused10]"


def test_where_the_fast_class_differs_the_card_says_so(
    odd_tokenizer: Tokenizer, tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    """A model that normalises and puts a space before each text; the fast class knows nothing of the former."""
    base = make_pangu_base(tmp_path / "openPangu-odd", tiny_hf)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(odd_tokenizer.directory / name, base / name)
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    config.update(auto_map={"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]})
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    found = run_export(recipe).counts["fast_tokenizer"]
    assert found.startswith("gives other ids, for instance for '")
    exported = recipe.path("export")
    assert json.loads((exported / "tokenizer_config.json").read_text("utf-8"))["add_prefix_space"] is True
    own, stock = load_hf(base, trust_remote_code=True), load_hf(exported, trust_remote_code=False)
    for text in ("the cat", "[unused9]the cat [unused10]", "一二三"):
        assert stock.encode(text) == own.encode(text)
    card = (exported / "README.md").read_text("utf-8")
    assert "with `use_fast=False`, as training did, and start vLLM with `--tokenizer-mode slow`" in card
    assert "vllm serve export --tokenizer-mode slow\n" in card
    assert "Both need transformers 4" in card


def test_code_named_in_a_list(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    code: Any = ["tokenization_openpangu.PanguTokenizer", None]
    base = make_pangu_base(tmp_path / "openPangu-list", tiny_hf, auto_map=code)
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    run_export(recipe)
    exported = load_hf(recipe.path("export"), trust_remote_code=False)
    assert type(exported).__name__ == "LlamaTokenizer"
    assert "auto_map" not in (recipe.path("export") / "tokenizer_config.json").read_text("utf-8")


def test_code_named_in_the_models_configuration_is_refused(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    """transformers follows that file, and others that it names, only where tokenizer_class is missing."""
    base = make_pangu_base(tmp_path / "openPangu-config", tiny_hf, auto_map=..., tokenizer_class=...)
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    assert "tokenizer_class is None: no tokenizer" in refusal_of(run_export, recipe)


def test_a_stock_class_beside_code_that_is_not_run(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """A tokenizer that preprocess loads without trust is exported without asking for it."""
    base = make_pangu_base(
        tmp_path / "openPangu-stock", tiny_hf, tokenizer="raise RuntimeError", tokenizer_class="LlamaTokenizer"
    )
    recipe = make_recipe(f"paths.hf={base}")
    make_run(recipe)
    run_export(recipe)
    before, after = (
        json.loads((path / "tokenizer_config.json").read_text("utf-8")) for path in (base, recipe.path("export"))
    )
    del before["auto_map"]
    assert after == before
