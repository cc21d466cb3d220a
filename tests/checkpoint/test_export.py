"""Stage export: a Hugging Face checkpoint that stock transformers loads, with the run's weights in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from checkpoint_files import BITS, assert_same_bits, read_hf, set_config
from conftest import PATIENCE, ROOT, MakeRecipe
from openpangu_sft.artifacts.artifact import Manifest, read_manifest
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.model.llama import build_model
from openpangu_sft.recipe.model_config import read_config
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import FILES, tokenizer_digest
from openpangu_sft.training.portable.state import VERSIONS, save
from refusals import refusal_of

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def make_run(recipe: Recipe, iteration: int = 3, seed: int = 0) -> Tensors:
    """Leaves a checkpoint in paths.run as the engine does, with other weights than the base's, and returns those."""
    base = recipe.path("hf")
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    tensors = {
        name: (tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in read_hf(base, recipe.model).items()
    }
    model = build_model(base, dict(tensors), "eager", CPU)
    inputs = {"dataset": "d" * 64, **{f"hf.{name}": digest for name, digest in hf_digests(base).items()}}
    manifest = Manifest("run", settings={"train.lr": recipe.train.lr}, inputs=inputs)
    optimizer = torch.optim.AdamW(model.parameters())
    save(recipe, manifest, model, optimizer, iteration, 1.25)
    return tensors


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    input_ids = torch.arange(40).reshape(2, 20) * 31 % 1536
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits.detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stock_transformers_gives_the_same_logits(make_recipe: MakeRecipe, precision: str) -> None:
    recipe = make_recipe(f"train.precision={precision}")
    tensors = make_run(recipe)
    run_export(recipe)
    target = recipe.path("export")
    assert_same_bits(load_file(str(target / WEIGHTS)), tensors)
    loaded = AutoModelForCausalLM.from_pretrained(str(target), torch_dtype="auto", local_files_only=True)
    assert type(loaded) is LlamaForCausalLM
    wanted = logits(build_model(recipe.path("hf"), tensors, "eager", CPU))
    found = logits(loaded)
    assert found.dtype == wanted.dtype == tensors["model.norm.weight"].dtype
    assert torch.equal(found.view(BITS[found.dtype]), wanted.view(BITS[found.dtype]))
    base = logits(build_model(recipe.path("hf"), read_hf(recipe.path("hf"), recipe.model), "eager", CPU))
    assert not torch.allclose(found.float(), base, atol=0.1)  # the run's weights, not the base's


def test_untied_embeddings(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    shutil.copytree(tiny_hf, tmp_path / "untied")
    set_config(tmp_path / "untied", tie_word_embeddings=False)
    tensors = load_file(str(tiny_hf / WEIGHTS))
    save_file({**tensors, "lm_head.weight": torch.randn(1536, 32)}, str(tmp_path / "untied" / WEIGHTS))
    recipe = make_recipe(f"paths.hf={tmp_path / 'untied'}", "model.tie_word_embeddings=false")
    trained = make_run(recipe)
    run_export(recipe)
    assert read_config(recipe.path("export"))["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(str(recipe.path("export")), local_files_only=True)
    assert torch.equal(loaded.lm_head.weight, trained["lm_head.weight"])
    assert torch.equal(logits(loaded), logits(build_model(tmp_path / "untied", trained, "eager", CPU)))


def test_loads_in_a_process_without_this_package(make_recipe: MakeRecipe) -> None:
    """With both tokenizer classes, and no remote code."""
    recipe = make_recipe()
    make_run(recipe)
    run_export(recipe)
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
directory = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
for options in ({"use_fast": False}, {}):
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=2, do_sample=False)
    print(tokenizer.is_fast, ids["input_ids"][0].tolist(), answer.shape[1] - ids["input_ids"].shape[1])
assert not any(name.startswith("openpangu") for name in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(recipe.path("export"))],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    slow, fast = ran.stdout.splitlines()
    assert slow.startswith("False [1, ")
    assert fast.startswith("True [1, ")
    assert slow.endswith(("] 1", "] 2"))  # it answered
    assert fast.endswith(("] 1", "] 2"))


def test_config_says_llama_and_leaves_nothing_to_defaults(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe
) -> None:
    shutil.copytree(tiny_hf, tmp_path / "base")
    set_config(
        tmp_path / "base",
        auto_map={"AutoConfig": "configuration_openpangu.Config", "AutoModelForCausalLM": "modeling_openpangu.Model"},
        torch_dtype="bfloat16",
        transformers_version="4.53.2",
    )
    recipe = make_recipe(f"paths.hf={tmp_path / 'base'}", "train.precision=bf16")
    make_run(recipe)
    run_export(recipe)
    config = json.loads((recipe.path("export") / "config.json").read_text("utf-8"))
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": read_config(tiny_hf)["eos_token_id"],
        "pad_token_id": 0,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 4000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 1536,
    }


def test_tokenizer_files_are_the_bases_byte_for_byte(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    shutil.copytree(tiny_hf, tmp_path / "base")
    (tmp_path / "base/tokenization_openpangu.py").write_text("raise RuntimeError('not to be run')\n", "utf-8")
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (tmp_path / "base/README.md").write_text("of the base", "utf-8")
    (tmp_path / "base/modeling_openpangu.py").write_text("import torch_npu\n", "utf-8")
    recipe = make_recipe(f"paths.hf={tmp_path / 'base'}")
    make_run(recipe)
    run_export(recipe)
    copied = [name for name in FILES if (tiny_hf / name).is_file()]
    assert "tokenizer.model" in copied
    copied += ["chat_template.jinja", "generation_config.json"]
    for name in copied:
        assert (recipe.path("export") / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert {path.name for path in recipe.path("export").iterdir()} == {
        *copied, "chat_template_vllm.jinja", "config.json", WEIGHTS, "manifest.json", "README.md"
    }  # fmt: skip
    assert tokenizer_digest(recipe.path("export")) == tokenizer_digest(tiny_hf)


def test_manifest_says_what_made_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    make_run(recipe)
    manifest = run_export(recipe)
    checkpoint = read_manifest(recipe.path("run") / "iter_0000003", "checkpoint", "")
    assert manifest.inputs == {
        "mcore": checkpoint.digest,
        "dataset": "d" * 64,
        **{f"hf.{name}": digest for name, digest in hf_digests(recipe.path("hf")).items()},
    }
    assert manifest.counts == {
        "iteration": 3, "loss": 1.25, "versions": VERSIONS, "parameters": 64864, "dtype": "float32", "form": "llama",
        "fast_tokenizer": "gives the same ids",
    }  # fmt: skip
    assert manifest.settings == {"train.lr": recipe.train.lr}
    assert asdict(read_manifest(recipe.path("export"), "hf", "")) == asdict(manifest)


def test_the_newest_checkpoint_is_exported_and_a_second_export_replaces_the_first(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    make_run(recipe, 3, seed=1)
    run_export(recipe)
    newest = make_run(recipe, 6, seed=2)
    assert run_export(recipe).counts["iteration"] == 6
    assert_same_bits(load_file(str(recipe.path("export") / WEIGHTS)), newest)
    first = {path.name: path.read_bytes() for path in recipe.path("export").iterdir()}
    run_export(recipe)
    assert {path.name: path.read_bytes() for path in recipe.path("export").iterdir()} == first


# Refusals.


def refusal(recipe: Recipe) -> str:
    message = refusal_of(run_export, recipe)
    assert not recipe.path("export").exists()
    return message


def test_without_a_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    assert refusal(recipe) == f"{recipe.path('run')}: no such directory -> run make sft"


def test_a_run_without_a_checkpoint(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.path("run").mkdir()
    (recipe.path("run") / "manifest.json").write_text("{}", "utf-8")
    what = "neither a Hugging Face checkpoint (config.json) nor a Megatron-core one (latest_checkpointed_iteration.txt)"
    assert refusal(recipe) == f"{recipe.path('run')}: {what} -> run make sft"


def test_a_checkpoint_that_is_not_there_in_full(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    make_run(recipe)
    directory = recipe.path("run") / "iter_0000003"
    file = directory / "mp_rank_00/model_optim_rng.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{file}: {len(content) - 1} bytes, expected {len(content)}" in refusal(recipe)
    file.unlink()
    assert f"{file}: a file of this result is missing" in refusal(recipe)
    shutil.rmtree(directory)
    assert refusal(recipe).startswith(f"{directory}: iteration 3 is not there")


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_another_base(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, what: str) -> None:
    make_run(make_recipe())
    shutil.copytree(tiny_hf, tmp_path / "other")
    if what == "tokenizer":
        (tmp_path / "other/added_tokens.json").write_text("{}", "utf-8")
    else:
        set_config(tmp_path / "other", attention_dropout=0.5)
    recipe = make_recipe(f"paths.hf={tmp_path / 'other'}")
    message = refusal(recipe)
    assert message.endswith(f"began from a checkpoint with another {what} than paths.hf -> check paths.hf")


def test_the_bases_weights_are_not_needed(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    shutil.copytree(tiny_hf, tmp_path / "base")
    recipe = make_recipe(f"paths.hf={tmp_path / 'base'}")
    make_run(recipe)
    (tmp_path / "base" / WEIGHTS).unlink()
    run_export(recipe)


def test_a_base_of_another_size(make_recipe: MakeRecipe) -> None:
    make_run(make_recipe())
    message = refusal(make_recipe("model.num_layers=3"))
    assert "model.num_layers is 3 in the recipe, 2 in this checkpoint" in message


def test_export_never_replaces_the_base(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    """Both are of the kind hf. The recipe refuses equal paths; here one comes through a link."""
    shutil.copytree(tiny_hf, tmp_path / "base")
    before = (tmp_path / "base" / WEIGHTS).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    recipe = make_recipe(f"paths.hf={tmp_path / 'base'}", f"paths.export={tmp_path / 'link/base'}")
    make_run(recipe)
    assert "paths.hf and paths.export are the same" in refusal_of(run_export, recipe)
    assert (tmp_path / "base" / WEIGHTS).read_bytes() == before


def test_a_malicious_checkpoint_does_not_run(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """The author of a run can have rewritten its manifest too."""
    import os

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    recipe = make_recipe()
    make_run(recipe)
    file = recipe.path("run") / "iter_0000003/mp_rank_00/model_optim_rng.pt"
    torch.save({"model": Evil()}, file)
    manifest_file = recipe.path("run") / "iter_0000003/manifest.json"
    manifest = json.loads(manifest_file.read_text("utf-8"))
    manifest["files"]["mp_rank_00/model_optim_rng.pt"]["bytes"] = file.stat().st_size
    manifest_file.write_text(json.dumps(manifest), "utf-8")
    assert "asks for posix.system" in refusal(recipe)
    assert not (tmp_path / "ran").exists()


def test_slow_tokenizer_of_the_export_gives_the_bases_ids(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    make_run(recipe)
    run_export(recipe)
    texts = (ROOT / "examples/service_zh.jsonl").read_text("utf-8").splitlines()[:5]
    options = {"use_fast": False, "local_files_only": True}
    base, exported = (AutoTokenizer.from_pretrained(str(recipe.path(name)), **options) for name in ("hf", "export"))
    assert [exported(text)["input_ids"] for text in texts] == [base(text)["input_ids"] for text in texts]
