"""Export in openPangu's own form: the base's configuration and Python files, with the weights of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint.test_export import make_run
from checkpoint_files import assert_same_bits, set_config, write_hf
from conftest import MakeRecipe
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.hf_export import OPENPANGU
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import load_hf
from pangu_base import FOR_ANY_DEVICE, TRUSTED, logits, make_pangu_base
from pangu_base import own_module_cache as own_module_cache  # a fixture
from refusals import refusal_of


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(directory), torch_dtype="auto", local_files_only=True, **options)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_own_code_gives_the_logits_of_the_llama_form(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, precision: str, tied: bool
) -> None:
    base = make_pangu_base(tmp_path / f"openPangu-{precision}-{tied}", tiny_hf, modelling=FOR_ANY_DEVICE)
    if not tied:
        set_config(base, tie_word_embeddings=False)
        tensors = load_file(str(base / WEIGHTS))
        head = {"lm_head.weight": torch.randn(1536, 32, generator=torch.Generator().manual_seed(5))}
        write_hf(tmp_path / "untied" / base.name, base, {**tensors, **head}, shards=2)
        base = tmp_path / "untied" / base.name
    options = [f"paths.hf={base}", TRUSTED, f"train.precision={precision}"]
    options.append(f"model.tie_word_embeddings={str(tied).lower()}")
    recipe, other = make_recipe(*options), make_recipe(*options, "paths.export=llama")
    trained = make_run(recipe)
    assert "fast_tokenizer" not in run_export(recipe, form=OPENPANGU).counts
    run_export(other)
    own, llama = load(recipe.path("export"), trust_remote_code=True), load(other.path("export"))
    assert type(own).__name__ == "PanguEmbeddedForCausalLM"
    assert (own.lm_head.weight is own.model.embed_tokens.weight) == tied
    assert torch.equal(logits(own), logits(llama))
    assert (recipe.path("export") / WEIGHTS).read_bytes() == (other.path("export") / WEIGHTS).read_bytes()
    assert_same_bits(load_file(str(recipe.path("export") / WEIGHTS)), trained)


def test_everything_but_the_weights_is_the_bases(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    base = make_pangu_base(tmp_path / "openPangu-npu", tiny_hf)  # whose code cannot be imported here
    (base / "helper.py").write_bytes(b"# -*- coding: latin-1 -*-\r\n# \xe9\r\n")
    recipe = make_recipe(f"paths.hf={base}", "train.precision=bf16")  # nothing of it runs: no trust is needed
    make_run(recipe)
    run_export(recipe, form=OPENPANGU)
    target = recipe.path("export")
    written, original = json_of(target / "config.json"), json_of(base / "config.json")
    assert (written.pop("torch_dtype"), original.pop("torch_dtype")) == ("bfloat16", "float32")
    assert list(written.items()) == list(original.items())
    copied = {path.name for path in base.iterdir()} - {WEIGHTS, "config.json"}
    assert len([name for name in copied if name.endswith(".py")]) == 4
    for name in copied:
        assert (target / name).read_bytes() == (base / name).read_bytes()
    assert {path.name for path in target.iterdir()} == {*copied, WEIGHTS, "config.json", "manifest.json", "README.md"}
    text = "[unused9]用户： 你好[unused10]"
    own, exported = (load_hf(path, trust_remote_code=True) for path in (base, target))
    assert exported.encode(text) == own.encode(text)
    assert type(exported).__name__ == "PanguTokenizer"


def test_a_configuration_saved_by_transformers_5_is_exported_with_the_keys_that_its_code_reads(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    """The rope base is not that of the class's default, which it would be without rope_theta."""
    base = make_pangu_base(tmp_path / "openPangu-saved", tiny_hf, modelling=FOR_ANY_DEVICE)
    rope = {"rope_theta": 4000000.0, "rope_type": "default"}
    set_config(base, rope_theta=..., rope_parameters=rope, torch_dtype=..., dtype="bfloat16")
    options = [f"paths.hf={base}", TRUSTED]
    recipe, other = make_recipe(*options), make_recipe(*options, "paths.export=llama")
    make_run(recipe)
    run_export(recipe, form=OPENPANGU)
    run_export(other)
    for exported in (recipe.path("export"), other.path("export")):
        config = json_of(exported / "config.json")
        assert (config["rope_theta"], config["torch_dtype"]) == (4000000.0, "float32")
        assert not {"rope_parameters", "dtype"} & config.keys()
    own, llama = load(recipe.path("export"), trust_remote_code=True), load(other.path("export"))
    assert torch.equal(logits(own), logits(llama))


def test_the_published_configuration_of_the_larger_sibling(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    """No head_dim, untied, and the order of its keys; sizes are the tiny model's."""
    base = make_pangu_base(tmp_path / "openPangu-7B", tiny_hf)
    set_config(base, head_dim=..., tie_word_embeddings=False, rope_theta=16000000.0)
    tensors = load_file(str(base / WEIGHTS))
    write_hf(tmp_path / "7B", base, {**tensors, "lm_head.weight": torch.randn(1536, 32)})
    recipe = make_recipe(
        f"paths.hf={tmp_path / '7B'}", TRUSTED, "model.tie_word_embeddings=false", "model.rotary_base=16000000.0"
    )
    make_run(recipe)
    run_export(recipe, form=OPENPANGU)
    assert json_of(recipe.path("export") / "config.json") == json_of(tmp_path / "7B/config.json")
    run_export(recipe)
    llama = load(recipe.path("export"))
    assert (llama.config.head_dim, llama.config.rope_theta, llama.config.tie_word_embeddings) == (8, 16000000.0, False)


# Refusals.


def refusal(recipe: Recipe) -> str:
    message = refusal_of(run_export, recipe, form=OPENPANGU)
    assert not recipe.path("export").exists()
    return message


@pytest.mark.parametrize(
    ("lost", "named_in"),
    [
        ("modeling_openpangu_dense.py", "config.json"),
        ("configuration_openpangu_dense.py", "config.json"),
        ("tokenization_openpangu.py", "tokenizer_config.json"),
    ],
)
def test_a_missing_python_file_is_named(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, lost: str, named_in: str
) -> None:
    base = make_pangu_base(tmp_path / "openPangu", tiny_hf)
    (base / lost).unlink()
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    assert refusal(recipe) == f"{base / named_in}: names {lost}, which is not there -> download it again"
    if lost != "tokenization_openpangu.py":
        run_export(recipe)  # the llama form needs none of these


def test_a_base_in_the_llama_form_has_no_code_to_export(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    first = make_recipe()
    make_run(first)
    run_export(first)
    recipe = make_recipe(f"paths.hf={first.path('export')}", "paths.run=again", "paths.export=again_export")
    make_run(recipe)
    assert refusal(recipe) == (
        f"{first.path('export')}/config.json: model_type is llama: openPangu's own configuration and code are not here "
        "-> export with FORM=llama, or give the original as paths.hf"
    )
    run_export(recipe)  # an exported checkpoint is a base as good as any
    assert json_of(recipe.path("export") / "config.json") == json_of(first.path("export") / "config.json")
