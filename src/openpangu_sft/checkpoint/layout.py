"""Where each row of each Megatron-core tensor stands in the Hugging Face checkpoint: one table for both directions.

Pure integers, no tensors. Shapes are [out features, in features] for weights and [out features] for biases and norms.

- `linear_qkv` is interleaved per KV group: the group's query heads, then its key head, then its value head
  (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors).
- `linear_fc1` is the gate, then the up projection (megatron/core/transformer/mlp.py, gated_linear_unit).
"""

from __future__ import annotations

from typing import NamedTuple

from openpangu_sft.recipe import Model

Shape = tuple[int, ...]


class Rows(NamedTuple):
    """A run of rows of one Hugging Face tensor."""

    name: str
    begin: int
    size: int


class McoreTensor(NamedTuple):
    """A Megatron-core tensor: its rows are these rows of Hugging Face tensors, in this order."""

    name: str
    shape: Shape
    rows: tuple[Rows, ...]


def mcore_tensors(model: Model) -> list[McoreTensor]:
    """All tensors of the Megatron-core checkpoint (TP 1, PP 1), in the model's order."""
    hidden, ffn, vocab = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    attention = model.num_attention_heads * model.kv_channels
    qkv = _qkv_rows(model)
    tensors = [_whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(model.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."

        def whole(mcore: str, hf: str, *shape: int, here: str = here, there: str = there) -> McoreTensor:
            return _whole(here + mcore, there + hf, shape)

        def joined(mcore: str, rows: list[Rows], *tail: int, here: str = here, there: str = there) -> McoreTensor:
            shape = (sum(part.size for part in rows), *tail)
            return McoreTensor(here + mcore, shape, tuple(part._replace(name=there + part.name) for part in rows))

        tensors.append(whole("input_layernorm.weight", "input_layernorm.weight", hidden))
        tensors.append(whole("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, attention))
        if model.add_dense_bias:
            tensors.append(whole("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hidden))
        tensors.append(joined("self_attention.linear_qkv.weight", _named(qkv, "weight"), hidden))
        if model.add_qkv_bias:
            tensors.append(joined("self_attention.linear_qkv.bias", _named(qkv, "bias")))
        tensors.append(whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden))
        fc1 = [Rows("mlp.gate_proj.weight", 0, ffn), Rows("mlp.up_proj.weight", 0, ffn)]
        tensors.append(joined("mlp.linear_fc1.weight", fc1, hidden))
        tensors.append(whole("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn))
    tensors.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not model.tie_word_embeddings:
        tensors.append(_whole("output_layer.weight", "lm_head.weight", (vocab, hidden)))
    return tensors


def extra_state_names(model: Model) -> list[str]:
    """Entries that Megatron-core's linear layers add to a checkpoint beside their tensors; their value is None."""
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    names = [f"decoder.layers.{layer}.{linear}._extra_state" for layer in range(model.num_layers) for linear in linears]
    return [*names, "output_layer._extra_state"]


def hf_shapes(model: Model) -> dict[str, Shape]:
    """Names and shapes of all tensors of the Hugging Face checkpoint."""
    shapes: dict[str, Shape] = {}
    for tensor in mcore_tensors(model):
        for part in tensor.rows:
            rows = max(part.begin + part.size, shapes.get(part.name, (0,))[0])
            shapes[part.name] = (rows, *tensor.shape[1:])
    return shapes


def parameter_count(model: Model) -> int:
    """Number of parameters, tied embeddings counted once."""
    total = 0
    for tensor in mcore_tensors(model):
        size = 1
        for extent in tensor.shape:
            size *= extent
        total += size
    return total


def _whole(mcore: str, hf: str, shape: Shape) -> McoreTensor:
    return McoreTensor(mcore, shape, (Rows(hf, 0, shape[0]),))


def _qkv_rows(model: Model) -> list[Rows]:
    head = model.kv_channels
    queries = head * model.num_attention_heads // model.num_query_groups
    rows: list[Rows] = []
    for group in range(model.num_query_groups):
        rows.append(Rows("q", group * queries, queries))
        rows.append(Rows("k", group * head, head))
        rows.append(Rows("v", group * head, head))
    return rows


def _named(rows: list[Rows], kind: str) -> list[Rows]:
    return [part._replace(name=f"self_attn.{part.name}_proj.{kind}") for part in rows]
