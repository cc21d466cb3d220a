"""The table of Hugging Face and Megatron-core tensors, against formulas and against stock transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_files import hf_sizes
from conftest import ROOT
from openpangu_sft.checkpoint.sharding import (
    Layout,
    McoreTensor,
    extra_state_names,
    hf_shapes,
    layout_of,
    mcore_tensors,
    parameter_count,
    single,
)
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.sections import Model

FIXED: dict[str, Any] = {"max_position_embeddings": 64, "rotary_base": 10000.0, "norm_epsilon": 1e-5}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Small models of any proportions; hidden_size need not be heads x kv_channels."""
    groups = draw(st.integers(1, 4))
    return Model(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 12)),
        ffn_hidden_size=draw(st.integers(1, 12)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 20)),
        add_qkv_bias=draw(st.booleans()),
        add_dense_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        **FIXED,
    )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def layouts(draw: st.DrawFn, model: Model) -> Layout:
    """Any layout of a model that divides, with any padding of the vocabulary and any split of the layers."""
    tensor = draw(st.sampled_from([t for t in divisors(model.num_query_groups) if model.ffn_hidden_size % t == 0]))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, model.num_layers - 1)), max_size=model.num_layers - 1)))
    edges = [0, *(cut for cut in cuts if cut < model.num_layers), model.num_layers]
    multiple = tensor * draw(st.integers(1, 5))
    padded = -(-model.vocab_size // multiple) * multiple
    return Layout(tensor, tuple(end - begin for begin, end in zip(edges, edges[1:])), padded)


@pytest.fixture(scope="module")
def published() -> Model:
    """openPangu-Embedded-1B."""
    return load_recipe(ROOT / "recipes/openpangu-1b.yaml").model


def all_tensors(model: Model, layout: Layout) -> list[McoreTensor]:
    return [tensor for rank in layout.ranks() for tensor in mcore_tensors(model, layout, *rank)]


@settings(deadline=None)
@given(st.data())
def test_every_hf_element_is_on_some_rank_and_on_one_only_where_it_is_cut(data: st.DataObject) -> None:
    model = data.draw(models())
    layout = data.draw(layouts(model))
    shapes = hf_shapes(model)
    seen = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    padding = 0
    for tensor in all_tensors(model, layout):
        assert tensor.shape == (sum(block.rows for block in tensor.blocks), *tensor.blocks[0].shape[1:])
        for block in tensor.blocks:
            whole = seen[block.name]
            place = (slice(block.row, block.row + block.rows), slice(block.column, block.column + (block.columns or 0)))
            assert block.row + block.rows <= len(whole)
            if block.padding:
                padding += block.rows
                assert block.row == model.vocab_size - 1
            else:
                whole[place[: whole.ndim]] += 1
    for name, counts in seen.items():
        everywhere = "norm" in name or name.endswith("o_proj.bias")
        copies = layout.tensor if everywhere else 1
        if name == "model.embed_tokens.weight" and model.tie_word_embeddings and layout.pipeline > 1:
            copies = 2
        assert (counts == copies).all(), name
    vocabularies = 1 + (layout.pipeline > 1 or not model.tie_word_embeddings)
    assert padding == vocabularies * (layout.padded_vocab_size - model.vocab_size)


@settings(deadline=None)
@given(st.data())
def test_names_are_unique_in_a_rank_and_all_tensor_ranks_have_the_same(data: st.DataObject) -> None:
    model = data.draw(models())
    layout = data.draw(layouts(model))
    for pp in range(layout.pipeline):
        ranks = [mcore_tensors(model, layout, tp, pp) for tp in range(layout.tensor)]
        names = [tensor.name for tensor in ranks[0]]
        assert len(names) == len(set(names))
        assert not set(names) & set(extra_state_names(layout, pp))
        for other in ranks[1:]:
            assert [(tensor.name, tensor.shape) for tensor in other] == [(t.name, t.shape) for t in ranks[0]]
    assert parameter_count(model) == sum(int(np.prod(shape)) for shape in hf_shapes(model).values())


@settings(deadline=None, max_examples=25)
@given(models())
def test_hf_side_is_stock_llama(model: Model) -> None:
    """Names and shapes of the model class that exported checkpoints are loaded with."""
    model = model.model_copy(update={"add_dense_bias": model.add_qkv_bias})
    config = LlamaConfig(**hf_sizes(model), attention_bias=model.add_qkv_bias, mlp_bias=False, pad_token_id=None)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    stock = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if model.tie_word_embeddings:
        del stock["lm_head.weight"]
    assert hf_shapes(model) == stock


@settings(deadline=None)
@given(models())
def test_qkv_is_interleaved_per_group_and_fc1_is_gate_then_up(model: Model) -> None:
    """The row order by reshaping whole arrays, as SelfAttention.get_query_key_value_tensors takes them apart."""
    groups, head = model.num_query_groups, model.kv_channels

    def labels(name: str, rows: int) -> np.ndarray[Any, Any]:
        return np.array([f"{name}:{row}" for row in range(rows)])

    def by_group(name: str, rows: int) -> np.ndarray[Any, Any]:
        return labels(name, rows).reshape(groups, -1, head)

    tensors = {tensor.name: tensor for tensor in mcore_tensors(model, single(model), 0, 0)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for kind in ["weight", "bias"] if model.add_qkv_bias else ["weight"]:
            parts = [
                by_group(f"{prefix}self_attn.{name}_proj.{kind}", heads * head)
                for name, heads in (("q", model.num_attention_heads), ("k", groups), ("v", groups))
            ]
            wanted = np.concatenate(parts, axis=1).reshape(-1)
            assert _row_labels(tensors[f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}"]) == list(wanted)
        halves = [labels(f"{prefix}mlp.{name}_proj.weight", model.ffn_hidden_size) for name in ("gate", "up")]
        assert _row_labels(tensors[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]) == list(np.concatenate(halves))


def test_sizes_of_the_1b(published: Model) -> None:
    shapes = {tensor.name: tensor.shape for tensor in mcore_tensors(published, single(published), 0, 0)}
    assert parameter_count(published) == 1_155_912_192
    layer = "decoder.layers.25."
    assert {name.replace(layer, ""): shape for name, shape in shapes.items() if name.startswith(layer)} == {
        "input_layernorm.weight": (1536,),
        "self_attention.linear_proj.weight": (1536, 1536),
        "self_attention.linear_proj.bias": (1536,),
        "self_attention.linear_qkv.weight": (3072, 1536),
        "self_attention.linear_qkv.bias": (3072,),
        "pre_mlp_layernorm.weight": (1536,),
        "mlp.linear_fc1.weight": (12288, 1536),
        "mlp.linear_fc2.weight": (1536, 6144),
    }
    rest = {name: shape for name, shape in shapes.items() if not name.startswith("decoder.layers.")}
    assert rest == {"embedding.word_embeddings.weight": (153376, 1536), "decoder.final_layernorm.weight": (1536,)}
    assert len(shapes) == 26 * 8 + 2


def test_untied_1b_has_an_output_layer(published: Model) -> None:
    untied = published.model_copy(update={"tie_word_embeddings": False})
    assert parameter_count(untied) == 1_155_912_192 + 153376 * 1536
    assert mcore_tensors(untied, single(untied), 0, 0)[-1].name == "output_layer.weight"
    assert hf_shapes(untied)["lm_head.weight"] == (153376, 1536)


@pytest.mark.parametrize(("qkv", "dense"), [(False, False), (True, False), (False, True), (True, True)])
def test_each_bias_follows_its_own_switch(published: Model, qkv: bool, dense: bool) -> None:
    model = published.model_copy(update={"add_qkv_bias": qkv, "add_dense_bias": dense, "num_layers": 1})
    names = set(hf_shapes(model))
    assert [f"model.layers.0.self_attn.{name}_proj.bias" in names for name in "qkvo"] == [qkv, qkv, qkv, dense]
    assert not any("mlp" in name and "bias" in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ((), Layout(1, (26,), 153376)),
        (("parallel.tensor=2",), Layout(2, (26,), 153376)),
        (("parallel.tensor=3", "parallel.devices_per_node=6"), Layout(3, (26,), 153408)),
        (("parallel.tensor=6", "parallel.devices_per_node=12"), Layout(6, (26,), 153408)),
        (("parallel.pipeline=2",), Layout(1, (13, 13), 153376)),
        (("parallel.pipeline=2", "parallel.num_layer_list=[14, 12]"), Layout(1, (14, 12), 153376)),
        (("parallel.make_vocab_size_divisible_by=128",), Layout(1, (26,), 153472)),
    ],
)
def test_layouts_that_a_recipe_asks_for(overrides: tuple[str, ...], layout: Layout) -> None:
    """Padding: the smallest multiple of divisor x TP, computed by hand."""
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml", ["train.global_batch_size=120", *overrides])
    assert layout_of(recipe.model, recipe.parallel) == layout


def test_layouts_in_words() -> None:
    assert str(Layout(2, (13, 13), 1)) == "TP 2, PP 2"
    assert str(Layout(1, (14, 12), 1)) == "TP 1, PP 2 (14, 12 layers)"


def _row_labels(tensor: McoreTensor) -> list[str]:
    return [f"{block.name}:{row}" for block in tensor.blocks for row in range(block.row, block.row + block.rows)]
