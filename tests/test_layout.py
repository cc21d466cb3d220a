"""The table of Hugging Face and Megatron-core tensors, against formulas and against stock transformers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from openpangu_sft.checkpoint.layout import extra_state_names, hf_shapes, mcore_tensors, parameter_count
from openpangu_sft.recipe import Model
from openpangu_sft.recipe_file import load_recipe

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


@pytest.fixture(scope="module")
def published() -> Model:
    """openPangu-Embedded-1B."""
    return load_recipe(ROOT / "recipes/openpangu-1b.yaml").model


@settings(deadline=None)
@given(models())
def test_every_hf_row_appears_exactly_once(model: Model) -> None:
    shapes = hf_shapes(model)
    seen: Counter[tuple[str, int]] = Counter()
    for tensor in mcore_tensors(model):
        assert sum(part.size for part in tensor.rows) == tensor.shape[0]
        for part in tensor.rows:
            assert shapes[part.name][1:] == tensor.shape[1:]
            seen.update((part.name, row) for row in range(part.begin, part.begin + part.size))
    assert seen == Counter((name, row) for name, shape in shapes.items() for row in range(shape[0]))


@settings(deadline=None)
@given(models())
def test_names_are_unique_and_both_sides_have_the_same_size(model: Model) -> None:
    names = [tensor.name for tensor in mcore_tensors(model)]
    assert len(names) == len(set(names))
    assert parameter_count(model) == sum(int(np.prod(shape)) for shape in hf_shapes(model).values())
    assert not set(names) & set(extra_state_names(model))


@settings(deadline=None, max_examples=25)
@given(models())
def test_hf_side_is_stock_llama(model: Model) -> None:
    """Names and shapes of the model class that exported checkpoints are loaded with."""
    model = model.model_copy(update={"add_dense_bias": model.add_qkv_bias})
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        vocab_size=model.vocab_size,
        attention_bias=model.add_qkv_bias,
        mlp_bias=False,
        tie_word_embeddings=model.tie_word_embeddings,
        pad_token_id=None,
    )
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

    tensors = {tensor.name: tensor for tensor in mcore_tensors(model)}
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
    shapes = {tensor.name: tensor.shape for tensor in mcore_tensors(published)}
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
    assert mcore_tensors(untied)[-1].name == "output_layer.weight"
    assert hf_shapes(untied)["lm_head.weight"] == (153376, 1536)


@pytest.mark.parametrize(("qkv", "dense"), [(False, False), (True, False), (False, True), (True, True)])
def test_each_bias_follows_its_own_switch(published: Model, qkv: bool, dense: bool) -> None:
    model = published.model_copy(update={"add_qkv_bias": qkv, "add_dense_bias": dense, "num_layers": 1})
    names = set(hf_shapes(model))
    assert [f"model.layers.0.self_attn.{name}_proj.bias" in names for name in "qkvo"] == [qkv, qkv, qkv, dense]
    assert not any("mlp" in name and "bias" in name for name in names)


def _row_labels(tensor: Any) -> list[str]:
    return [f"{part.name}:{row}" for part in tensor.rows for row in range(part.begin, part.begin + part.size)]
