"""Stage convert in every layout: against a checkpoint cut by hand, from layout to layout, and back to Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_files import assert_same_bits, hf_sizes, random_checkpoint, read_hf, read_mcore, set_config, write_hf
from conftest import SHARED, MakeRecipe
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.recipe.model_config import model_of
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of
from split_checkpoint import random_llama, rank_state, write_split

ENGINE = ("train.engine=mindspeed", "parallel.devices_per_node=24", "train.global_batch_size=24")
VOCAB = 1536
KINDS = ("normalization", "activation")

LAYOUTS = [
    pytest.param(1, [4], 16, id="tp1"),
    pytest.param(2, [4], 16, id="tp2"),
    pytest.param(4, [4], 16, id="tp4"),
    pytest.param(1, [2, 2], 16, id="pp2"),
    pytest.param(1, [1, 1, 1, 1], 16, id="pp4"),
    pytest.param(2, [2, 2], 16, id="tp2-pp2"),
    pytest.param(1, [3, 1], 16, id="pp2-uneven"),
    pytest.param(2, [1, 2, 1], 16, id="tp2-pp3-uneven"),
    pytest.param(1, [4], 1000, id="padded"),
    pytest.param(2, [2, 2], 1000, id="tp2-pp2-padded"),
    pytest.param(4, [4], 1000, id="tp4-a-rank-of-padding-only"),
]


@pytest.fixture
def make(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes of a model with four layers and four KV groups, so that TP may be 4."""

    def recipe(*overrides: str) -> Recipe:
        sizes = ["model.num_layers=4", "model.num_attention_heads=8", "model.num_query_groups=4"]
        return make_recipe(*sizes, *ENGINE, f"paths.hf={tmp_path / 'hf'}", *overrides)

    return recipe


def layout(tensor: int, layers: list[int], divisor: int, name: str = "mcore") -> list[str]:
    given = [f"parallel.tensor={tensor}", f"parallel.pipeline={len(layers)}", f"paths.mcore={name}"]
    if len(set(layers)) > 1:
        given.append(f"parallel.num_layer_list={layers}")
    return [*given, f"parallel.make_vocab_size_divisible_by={divisor}"]


def write_base(recipe: Recipe, tiny_hf: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    write_hf(recipe.path("hf"), tiny_hf, tensors, shards)
    set_config(recipe.path("hf"), **hf_sizes(recipe.model))


def all_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tensor", "layers", "divisor"), LAYOUTS)
def test_every_rank_is_what_is_cut_by_hand(
    make: MakeRecipe, tiny_hf: Path, tensor: int, layers: list[int], divisor: int, tied: bool
) -> None:
    recipe = make(*layout(tensor, layers, divisor), f"model.tie_word_embeddings={str(tied).lower()}")
    llama = random_llama(recipe.model)
    weights = {
        name: value.clone() for name, value in llama.state_dict().items() if not tied or name != "lm_head.weight"
    }
    write_base(recipe, tiny_hf, weights)
    run_convert(recipe)
    multiple = divisor * tensor
    padded = (VOCAB + multiple - 1) // multiple * multiple
    for stage in range(len(layers)):
        for rank in range(tensor):
            own = range(sum(layers[:stage]), sum(layers[: stage + 1]))
            expected = rank_state(llama.state_dict(), recipe.model, tensor, rank, own, padded)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if len(layers) > 1 else "")
            content = torch.load(recipe.path("mcore") / "iter_0000001" / name / "model_optim_rng.pt")
            assert content["args"].padded_vocab_size == padded
            assert set(content["model"]) == set(expected)
            for key, wanted in expected.items():
                found = content["model"][key]
                if wanted is None:
                    assert found is None
                    continue
                assert found.shape == wanted.shape, key
                if "embedding" in key or "output_layer" in key:
                    real = max(0, min(VOCAB - rank * len(found), len(found)))
                    last = llama.state_dict()[
                        "model.embed_tokens.weight" if "embedding" in key or tied else "lm_head.weight"
                    ][-1]
                    assert torch.equal(found[real:], last.expand(len(found) - real, -1))
                    found, wanted = found[:real], wanted[:real]
                assert torch.equal(found, wanted), key


@pytest.mark.parametrize(("tensor", "layers", "divisor"), LAYOUTS)
def test_from_any_layout_to_any_other_and_back(
    make: MakeRecipe, tiny_hf: Path, tensor: int, layers: list[int], divisor: int
) -> None:
    """The way makes no difference: the files are the same, byte for byte."""
    first = make(*layout(tensor, layers, divisor))
    tensors = random_checkpoint(first.model, lambda name: torch.bfloat16)
    write_base(first, tiny_hf, tensors, shards=3)
    run_convert(first)
    second = make(*layout(2, [3, 1], 48, "again"))
    run_convert(second, source=first.path("mcore"))
    direct = make(*layout(2, [3, 1], 48, "direct"))
    run_convert(direct)
    found, wanted = all_bytes(second.path("mcore")), all_bytes(direct.path("mcore"))
    for files in (found, wanted):
        del files["manifest.json"]  # says where it came from
    assert found == wanted
    for recipe in (first, second):
        run_export(recipe, source=recipe.path("mcore"))
        assert_same_bits(load_file(str(recipe.path("export") / WEIGHTS)), tensors)


def test_checkpoints_cut_by_others_are_read(make: MakeRecipe, tiny_hf: Path) -> None:
    """With noise in the padding, as after training."""
    recipe = make()
    llama = random_llama(recipe.model)
    weights = {name: value.clone() for name, value in llama.state_dict().items() if name != "lm_head.weight"}
    write_base(recipe, tiny_hf, weights)
    root = recipe.path("cache") / "theirs"
    write_split(llama, recipe.model, root / "iter_0000700", 2, [1, 3], 1600)
    (root / "latest_checkpointed_iteration.txt").write_text("700\n")
    assert_same_bits(read_mcore(root, recipe.model), weights)
    manifest = run_export(recipe, source=root)
    assert_same_bits(read_hf(recipe.path("export"), recipe.model), weights)
    assert set(manifest.inputs) == {"mcore"}
    run_convert(recipe, source=root)
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), weights)


def test_the_untied_7b(make_recipe: MakeRecipe, tmp_path: Path, tiny_hf: Path) -> None:
    """The sibling's own configuration, but for depth and width, in TP 8."""
    published = SHARED / "data/openpangu_7b/config.json"
    if not published.is_file():
        pytest.skip("the 7B's config.json is not beside the repository (shared/data)")
    config = json.loads(published.read_text("utf-8"))
    model = model_of(config, published)
    assert (model.tie_word_embeddings, model.kv_channels, model.num_query_groups) == (False, 128, 8)
    assert {"lm_head.weight", "model.layers.33.self_attn.o_proj.bias"} <= set(hf_shapes(model))
    small = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "head_dim": 4, "vocab_size": 1600}
    model = model_of({**config, **small}, published)
    sets = [f"model.{key}={str(value).lower()}" for key, value in model.model_dump().items() if key not in KINDS]
    recipe = make_recipe(
        *sets,
        *ENGINE,
        "parallel.devices_per_node=16",
        "train.global_batch_size=16",
        *layout(8, [2, 1], 16),
        f"paths.hf={tmp_path / 'hf'}",
    )
    assert recipe.model == model
    tensors = random_checkpoint(model, lambda name: torch.bfloat16)
    write_hf(recipe.path("hf"), tiny_hf, tensors, shards=4)
    set_config(recipe.path("hf"), **{**config, **small})
    run_convert(recipe)
    assert len(list(recipe.path("mcore").rglob("*.pt"))) == 16
    run_export(recipe, source=recipe.path("mcore"))
    assert_same_bits(load_file(str(recipe.path("export") / WEIGHTS)), tensors)


# Another dtype.


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_change_of_dtype_rounds_as_torch_does_and_says_what_is_lost(
    make: MakeRecipe, tiny_hf: Path, capsys: pytest.CaptureFixture[str], dtype: str, torch_dtype: torch.dtype
) -> None:
    recipe = make(*layout(2, [2, 2], 16))
    weights = {
        name: value.clone() for name, value in random_llama(recipe.model).state_dict().items() if "lm_head" not in name
    }
    weights["model.norm.weight"][0] = 1e6  # beyond fp16
    write_base(recipe, tiny_hf, weights)
    manifest = run_convert(recipe, dtype=dtype)
    wanted = {name: value.to(torch_dtype) for name, value in weights.items()}
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), wanted)
    message = " ".join(capsys.readouterr().err.split())
    overflow = "warning: in float16 values became infinite in model.norm.weight"
    assert ("became infinite" in message) == (overflow in message) == (dtype == "fp16")
    assert manifest.counts["dtype"] == str(torch_dtype).replace("torch.", "")
    back = make(*layout(2, [2, 2], 16))
    run_export(back, source=recipe.path("mcore"), dtype="fp32")
    assert "infinite" not in capsys.readouterr().err  # what was infinite before has not become so
    assert_same_bits(
        load_file(str(back.path("export") / WEIGHTS)), {name: value.float() for name, value in wanted.items()}
    )


def test_mixed_dtypes_can_be_made_one(make: MakeRecipe, tiny_hf: Path) -> None:
    recipe = make()
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = random_checkpoint(recipe.model, lambda key: torch.float32 if key == name else torch.bfloat16)
    tensors[name] = tensors[name].nan_to_num(0, 0, 0)  # rounding may change the bits of a NaN
    write_base(recipe, tiny_hf, tensors)
    message = refusal_of(run_convert, recipe)
    assert "would join tensors of different dtypes" in message
    assert message.endswith(" -> ask for one dtype with DTYPE=bf16")
    run_convert(recipe, dtype="bf16")
    wanted = {key: value.bfloat16() for key, value in tensors.items()}
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), wanted)
