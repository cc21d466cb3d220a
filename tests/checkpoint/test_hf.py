"""Reading Hugging Face checkpoints: the accepted forms, and one-line errors for everything else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from checkpoint_files import read_hf, set_config, write_hf
from conftest import MakeRecipe
from openpangu_sft.checkpoint.hf import INDEX, WEIGHTS, open_hf, weight_files
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.recipe.model_config import llama_config, model_of, read_config, require_model
from openpangu_sft.recipe.sections import Model
from parameter_ids import named_by
from refusals import refusal_of


@pytest.fixture
def copy(tmp_path: Path, tiny_hf: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny_hf, directory)
    return directory


@pytest.fixture
def sharded(tmp_path: Path, tiny_hf: Path) -> Path:
    """The same checkpoint with its weights in three shards."""
    write_hf(tmp_path / "sharded", tiny_hf, load_file(str(tiny_hf / WEIGHTS)), shards=3)
    return tmp_path / "sharded"


def _read(directory: Path, model: Model) -> None:
    require_model(directory, model)
    open_hf(directory, model)


def refusal(directory: Path, make_recipe: MakeRecipe) -> str:
    """The error message of reading configuration and weights; it has the directory."""
    model = make_recipe(f"paths.hf={directory}").model
    message = refusal_of(_read, directory, model)
    assert str(directory) in message
    return message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    named_by(
        0,
        ({"num_hidden_layers": 3}, "model.num_layers is 2 in the recipe, 3 in this checkpoint -> set model.num_layers"),
        ({"hidden_size": 64}, "model.hidden_size is 32 in the recipe, 64 in this checkpoint"),
        ({"intermediate_size": 49}, "model.ffn_hidden_size is 48 in the recipe, 49 in this checkpoint"),
        ({"num_attention_heads": 8}, "model.num_attention_heads is 4 in the recipe, 8 in this checkpoint"),
        ({"num_key_value_heads": 4}, "model.num_query_groups is 2 in the recipe, 4 in this checkpoint"),
        ({"num_key_value_heads": None}, "model.num_query_groups is 2 in the recipe, 4 in this checkpoint"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: Input should be greater than 0"),
        ({"intermediate_size": None}, "intermediate_size = None: Input should be a valid integer"),
        ({"bias": None}, "bias = None: Input should be a valid boolean"),
        ({"head_dim": 0}, "head_dim = 0: Input should be greater than 0"),
        ({"head_dim": 31}, "rotary embeddings need pairs -> take the published config.json"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, openPangu-Embedded has 1.0"),
        ({"num_key_value_heads": ...}, "model.num_query_groups is 2 in the recipe, 4 in this checkpoint"),
        ({"head_dim": 16}, "model.kv_channels is 8 in the recipe, 16 in this checkpoint"),
        ({"vocab_size": 1537}, "model.vocab_size is 1536 in the recipe, 1537 in this checkpoint"),
        ({"max_position_embeddings": 7}, "model.max_position_embeddings is 1024 in the recipe, 7 in this checkpoint"),
        ({"rope_theta": 10000.0}, "model.rotary_base is 4000000.0 in the recipe, 10000.0 in this checkpoint"),
        ({"rms_norm_eps": 1e-6}, "model.norm_epsilon is 1e-05 in the recipe, 1e-06 in this checkpoint"),
        ({"bias": False}, "model.add_qkv_bias is True in the recipe, False in this checkpoint"),
        ({"tie_word_embeddings": False}, "model.tie_word_embeddings is True in the recipe, False in this checkpoint"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not openPangu-Embedded"),
        ({"model_type": ...}, "model_type None is not openPangu-Embedded"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not openPangu-Embedded"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', openPangu-Embedded has 'silu'"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling is {'type': 'linear'}, openPangu-Embedded has the default",
        ),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "'factor': 2}, openPangu-Embedded has the default"),
        ({"rope_scaling": {"type": "default", "rope_type": "yarn"}}, "openPangu-Embedded has the default"),
        ({"rope_parameters": ["default"]}, "rope_parameters is ['default'], openPangu-Embedded has the default"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta is 4000000.0 and 10000.0 -> "),
        ({"mlp_bias": True}, "mlp_bias is True, openPangu-Embedded has False"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}, openPangu-Embedded has None"),
        ({"rope_theta": ...}, "key 'rope_theta' is missing"),
        ({"bias": ...}, "key 'bias' is missing"),
        ({"num_attention_heads": ...}, "key 'num_attention_heads' is missing"),
        ({"num_attention_heads": 0, "head_dim": ...}, "hidden_size 32 and num_attention_heads 0 give no head size"),
        ({"num_attention_heads": "4", "head_dim": ...}, "hidden_size 32 and num_attention_heads '4' give no head size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: Input should be greater than 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2': Input should be a valid integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': Input should be a valid boolean"),
        ({"rope_theta": "many"}, "rope_theta = 'many': Input should be a valid number"),
        ({"num_key_value_heads": 3}, "model.num_attention_heads 4 is not a multiple of model.num_query_groups 3"),
    ),
)
def test_a_config_of_another_model_is_refused(
    copy: Path, make_recipe: MakeRecipe, changes: dict[str, Any], complaint: str
) -> None:
    set_config(copy, **changes)
    message = refusal(copy, make_recipe)
    assert complaint in message
    assert "config.json: " in message


def test_all_differences_are_reported_at_once(copy: Path, make_recipe: MakeRecipe) -> None:
    set_config(copy, num_hidden_layers=34, rope_theta=16e6, tie_word_embeddings=...)
    assert refusal(copy, make_recipe) == (
        f"{copy / 'config.json'}: model.num_layers is 2 in the recipe, 34 in this checkpoint; model.rotary_base is "
        "4000000.0 in the recipe, 16000000.0 in this checkpoint; model.tie_word_embeddings is True in the recipe, not "
        "given here: the class's default is false -> set model.num_layers=34 model.rotary_base=16000000.0, or leave "
        "them out of the recipe"
    )
    set_config(copy, num_hidden_layers=2, rope_theta=4e6)
    assert refusal(copy, make_recipe).endswith("the class's default is false -> take the published config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default"}},
        {"rope_theta": ..., "rope_scaling": {"rope_type": "default", "rope_theta": 4000000.0}},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 4000000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 4000000.0}, "dtype": "float32", "torch_dtype": ...},
        {"mlp_bias": None},
    ],
)
def test_equivalent_configs_are_accepted(copy: Path, make_recipe: MakeRecipe, changes: dict[str, Any]) -> None:
    """llama_config gives the keys that stock transformers 4.53.2 reads."""
    published = read_config(copy)
    set_config(copy, **changes)
    config = require_model(copy, make_recipe().model)
    assert model_of(config, copy) == model_of(published, copy)
    assert llama_config(read_config(copy)) == llama_config(config) == llama_config(published)
    loaded = LlamaConfig(**llama_config(config))
    assert (loaded.rope_theta, loaded.rope_scaling, loaded.torch_dtype) == (4e6, None, torch.float32)


def test_num_key_value_heads_may_be_null_if_every_head_has_its_own(copy: Path, make_recipe: MakeRecipe) -> None:
    set_config(copy, num_key_value_heads=None)
    config = require_model(copy, make_recipe("model.num_query_groups=4").model)
    assert llama_config(config)["num_key_value_heads"] == 4


def test_a_llama_config_saved_by_transformers_5_is_accepted(copy: Path, make_recipe: MakeRecipe) -> None:
    """config.json is from LlamaConfig.save_pretrained of transformers 5.24.0."""
    saved = """{"attention_bias": true, "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16",
        "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 48, "max_position_embeddings": 1024, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": null,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 4000000.0,
        "rope_type": "default"}, "tie_word_embeddings": true, "transformers_version": "5.24.0", "use_cache": true,
        "vocab_size": 1536}"""
    (copy / "config.json").write_text(saved, "utf-8")
    loaded = LlamaConfig(**llama_config(require_model(copy, make_recipe().model)))
    assert (loaded.rope_theta, loaded.torch_dtype, hasattr(loaded, "rope_parameters")) == (4e6, torch.bfloat16, False)


def test_the_bias_key_of_the_other_model_type_is_ignored(copy: Path, make_recipe: MakeRecipe) -> None:
    set_config(copy, model_type="llama", attention_bias=True, bias=False)
    assert llama_config(require_model(copy, make_recipe().model))["attention_bias"] is True


def test_a_byte_order_mark_is_ignored(copy: Path, make_recipe: MakeRecipe) -> None:
    before = require_model(copy, make_recipe().model)
    (copy / "config.json").write_bytes(b"\xef\xbb\xbf" + (copy / "config.json").read_bytes())
    assert require_model(copy, make_recipe().model) == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b'{"hidden_size": 32,', "not valid JSON"),
        (b"[1]", "is not a JSON object"),
        (b"\xff\xfe{", "not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not valid JSON"),
        (None, "no Hugging Face checkpoint here (config.json)"),
    ],
    ids=["empty", "cut off", "list", "not UTF-8", "nested too deeply", "no file"],
)
def test_a_broken_config_is_refused(copy: Path, make_recipe: MakeRecipe, content: Any, complaint: str) -> None:
    if content is None:
        (copy / "config.json").unlink()
    else:
        (copy / "config.json").write_bytes(content)
    assert complaint in refusal(copy, make_recipe)


def test_kv_channels_default_to_hidden_size_per_head(tiny_hf: Path) -> None:
    """The published config.json of the 1B has no head_dim."""
    config = read_config(tiny_hf)
    for given in ({}, {"head_dim": None}):
        without = {key: value for key, value in config.items() if key != "head_dim"}
        assert model_of({**without, **given}, tiny_hf).kv_channels == 8
    assert model_of({**config, "head_dim": 4}, tiny_hf).kv_channels == 4


def test_the_published_config_and_its_llama_equivalent_describe_the_same_model(tiny_hf: Path) -> None:
    config = {**read_config(tiny_hf), "auto_map": {"AutoModelForCausalLM": "modeling.Pangu"}}
    llama = llama_config(config)
    assert model_of(llama, tiny_hf) == model_of(config, tiny_hf)
    assert llama_config(llama) == llama
    assert llama["architectures"] == ["LlamaForCausalLM"]
    assert llama["model_type"] == "llama"
    assert (llama["attention_bias"], llama["mlp_bias"], llama["tie_word_embeddings"]) == (True, False, True)
    assert not {"auto_map", "bias"} & set(llama)
    untied = llama_config({"model_type": "PanguEmbedded", "bias": False})
    assert untied["tie_word_embeddings"] is False  # explicit, although it is the default


def damage_weights(directory: Path, how: str) -> None:
    file = directory / WEIGHTS
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(
        {
            "empty": b"",
            "no header": content[:4],
            "header cut off": content[: header // 2],
            "data cut off": content[:-1],
            "no data": content[:header],
            "trailing data": content + b"\0",
            "header too long": (1 << 60).to_bytes(8, "little") + content[8:],
            "header not JSON": content[:8] + b"x" * (header - 8) + content[header:],
        }[how]
    )


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "no header",
        "header cut off",
        "data cut off",
        "no data",
        "trailing data",
        "header too long",
        "header not JSON",
    ],
)
def test_damaged_weights_are_refused(copy: Path, make_recipe: MakeRecipe, how: str) -> None:
    damage_weights(copy, how)
    message = refusal(copy, make_recipe)
    assert message.startswith(f"{copy / WEIGHTS}: damaged: ")
    assert message.endswith(" -> download it again")


def test_a_git_lfs_pointer_is_refused(copy: Path, make_recipe: MakeRecipe) -> None:
    (copy / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "utf-8")
    what = "is only a Git LFS pointer -> get the file itself (git lfs pull)"
    assert refusal(copy, make_recipe) == f"{copy / WEIGHTS}: {what}"


def test_only_bin_weights_are_refused(copy: Path, make_recipe: MakeRecipe) -> None:
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    message = refusal(copy, make_recipe)
    assert "only .bin weights, which transformers 4.53.2 refuses to load with torch 2.1" in message
    assert message.endswith(" -> take the safetensors files")


def test_no_weights_are_refused(copy: Path, make_recipe: MakeRecipe) -> None:
    (copy / WEIGHTS).unlink()
    assert "no weights here (model.safetensors)" in refusal(copy, make_recipe)


def test_shards_are_read_as_one(sharded: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    found, wanted = read_hf(sharded, make_recipe().model), load_file(str(tiny_hf / WEIGHTS))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [file.name for file in weight_files(sharded)] == [
        f"model-{shard:05d}-of-00003.safetensors" for shard in (1, 2, 3)
    ]


def test_a_missing_shard_is_refused(sharded: Path, make_recipe: MakeRecipe) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert refusal(sharded, make_recipe) == f"{shard}: shard is missing -> download the checkpoint again"


def test_a_truncated_shard_is_refused(sharded: Path, make_recipe: MakeRecipe) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert refusal(sharded, make_recipe).startswith(f"{shard}: damaged: ")


def test_a_tensor_in_two_shards_is_refused(sharded: Path, make_recipe: MakeRecipe) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    save_file({**load_file(str(shard)), "model.embed_tokens.weight": torch.zeros(1536, 32)}, str(shard))
    assert f"{shard}: tensor model.embed_tokens.weight is in another shard too" in refusal(sharded, make_recipe)


def test_two_sets_of_weights_are_refused(sharded: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    shutil.copyfile(tiny_hf / WEIGHTS, sharded / WEIGHTS)
    message = refusal(sharded, make_recipe)
    assert "there are two sets of weights, model.safetensors and model.safetensors.index.json" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    named_by(
        0,
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "weight_map names no files"),
        ('{"weight_map": {}}', "weight_map names no files"),
        ('{"weight_map": []}', "weight_map names no files"),
        ('{"weight_map": {"a": 1}}', "weight_map names no files"),
        ('{"weight_map": {"a": "../../model.safetensors"}}', "weight_map names no files"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map names no files"),
        ('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}', "weight_map names no files"),
    ),
)
def test_a_broken_index_is_refused(sharded: Path, make_recipe: MakeRecipe, content: str, complaint: str) -> None:
    (sharded / INDEX).write_text(content, "utf-8")
    message = refusal(sharded, make_recipe)
    assert message.startswith(f"{sharded / INDEX}: {complaint}")


def test_tensor_names_are_printed_without_control_characters(copy: Path, make_recipe: MakeRecipe) -> None:
    tensors = load_file(str(copy / WEIGHTS))
    save_file({**tensors, "evil\n\x1b[2J\r\u2028name": torch.zeros(1)}, str(copy / WEIGHTS))
    assert r"unexpected tensor evil \x1b[2J name" in refusal(copy, make_recipe)


def test_digests_cover_weights_config_and_tokenizer_only(copy: Path, tiny_hf: Path) -> None:
    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, digest in hf_digests(copy).items() if digest != before[name]}

    original = hf_digests(copy)
    assert original == hf_digests(tiny_hf)
    assert set(original) == {"weights", "config", "tokenizer"}
    (copy / "README.md").write_text("more", "utf-8")
    assert not changed(original)
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    assert changed(original) == {"weights"}
    set_config(copy, rope_theta=1.0)
    assert changed(original) == {"weights", "config"}
    (copy / "added_tokens.json").write_text("{}", "utf-8")
    assert changed(original) == {"weights", "config", "tokenizer"}
