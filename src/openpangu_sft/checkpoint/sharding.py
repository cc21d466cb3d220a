"""Which blocks of Hugging Face tensors make up each Megatron-core tensor, for every TP x PP: one table.

Pure integers, no tensors. Shapes are [out features, in features] for weights and [out features] for biases and norms.
Conversion in every direction follows from it, as blocks are only moved and nothing is computed.

- `linear_qkv` is interleaved per KV group: the group's query heads, then its key head, then its value head
  (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors). A rank has whole groups.
- `linear_fc1` is the rank's part of the gate, then its part of the up projection (megatron/core/transformer/mlp.py).
- `linear_proj` and `linear_fc2` are cut by columns, everything else by rows (megatron/core/tensor_parallel/layers.py);
  norms and the bias of `linear_proj` are on every rank.
- A stage of the pipeline counts its layers from 0. The embedding is on the first, the output layer on the last; where
  they are tied and on different stages, the last has a copy.
- The vocabulary is padded to a multiple of TP times a divisor (megatron/training/tokenizer/tokenizer.py,
  _vocab_size_with_padding); padding rows repeat the last one (MindSpeed-LLM's saver.py, vocab_padding).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Optional

if TYPE_CHECKING:
    from openpangu_sft.checkpoint.files.arrays import Shape
    from openpangu_sft.recipe.lora import Adapter
    from openpangu_sft.recipe.sections import Model, Parallel


class Block(NamedTuple):
    """A rectangle of one Hugging Face tensor, from (row, column) on."""

    name: str
    row: int
    rows: int
    column: int = 0
    columns: Optional[int] = None  # None for a tensor of one dimension
    padding: bool = False  # a row that fills the vocabulary up: written, never read

    @property
    def shape(self) -> Shape:
        """[rows] or [rows, columns]."""
        return (self.rows,) if self.columns is None else (self.rows, self.columns)

    def within(self, outer: Block) -> tuple[slice, ...]:
        """The slices of `outer` that this block covers; empty where they do not overlap."""
        begin = max(self.row - outer.row, 0)
        rows = slice(begin, max(min(self.row + self.rows, outer.row + outer.rows) - outer.row, begin))
        if self.columns is None or outer.columns is None:
            return (rows,)
        begin = max(self.column - outer.column, 0)
        end = min(self.column + self.columns, outer.column + outer.columns) - outer.column
        return rows, slice(begin, max(end, begin))


class McoreTensor(NamedTuple):
    """A Megatron-core tensor of one rank: blocks of Hugging Face tensors, stacked by rows."""

    name: str
    shape: Shape
    blocks: tuple[Block, ...]


class Layout(NamedTuple):
    """How a Megatron-core checkpoint is spread over ranks."""

    tensor: int  # TP
    stages: tuple[int, ...]  # layers of each pipeline stage
    padded_vocab_size: int  # rows of the embedding over all ranks

    @property
    def pipeline(self) -> int:
        """PP."""
        return len(self.stages)

    @property
    def even(self) -> bool:
        """Whether all stages have the same number of layers, as Megatron-LM itself requires."""
        return len(set(self.stages)) == 1

    def ranks(self) -> Iterator[tuple[int, int]]:
        """(tensor rank, pipeline rank) of every rank."""
        return ((tp, pp) for pp in range(self.pipeline) for tp in range(self.tensor))

    def __str__(self) -> str:
        stages = "" if self.even else f" ({', '.join(map(str, self.stages))} layers)"
        return f"TP {self.tensor}, PP {self.pipeline}{stages}"


def layout_of(model: Model, parallel: Parallel) -> Layout:
    """The layout that a recipe asks for; recipe/schema.py has checked that it divides."""
    multiple = parallel.make_vocab_size_divisible_by * parallel.tensor
    padded = -(-model.vocab_size // multiple) * multiple
    stages = parallel.num_layer_list or [model.num_layers // parallel.pipeline] * parallel.pipeline
    return Layout(parallel.tensor, tuple(stages), padded)


def single(model: Model) -> Layout:
    """TP 1, PP 1, without padding."""
    return Layout(1, (model.num_layers,), model.vocab_size)


@lru_cache(maxsize=256)
def mcore_tensors(
    model: Model, layout: Layout, tp: int, pp: int, adapter: Optional[Adapter] = None
) -> tuple[McoreTensor, ...]:
    """All tensors of one rank, in the model's order; each adapted one is followed by its A and B."""
    tensors = _Rank(model, layout, tp, pp).tensors()
    return tuple(found for tensor in tensors for found in (_adapted(tensor, adapter) if adapter else (tensor,)))


def _adapted(tensor: McoreTensor, adapter: Adapter) -> Iterator[McoreTensor]:
    """Names are peft's: the linear layer becomes `base_layer`, beside `lora_A.default` and `lora_B.default`.

    Projections that are one matrix share A, which is found under the first one's name.
    """
    linear, _, kind = tensor.name.rpartition(".")
    if linear.rpartition(".")[2] not in adapter.linears:
        yield tensor
        return
    yield tensor._replace(name=f"{linear}.base_layer.{kind}")
    if kind == "weight":
        first = tensor.blocks[0]
        a = first._replace(name=part_name(first.name, "A"), row=0, rows=adapter.rank)
        b = [block._replace(name=part_name(block.name, "B"), column=0, columns=adapter.rank) for block in tensor.blocks]
        yield _stack(f"{linear}.lora_A.default.weight", [a])
        yield _stack(f"{linear}.lora_B.default.weight", b)


def part_name(weight: str, part: str) -> str:
    """The name of A or B of a weight: …q_proj.lora_A.weight of …q_proj.weight."""
    return f"{weight.removesuffix('weight')}lora_{part}.weight"


def extra_state_names(layout: Layout, pp: int) -> list[str]:
    """Entries that Megatron-core's linear layers add to a rank's state dict; their value is None."""
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    names = [f"decoder.layers.{layer}.{name}._extra_state" for layer in range(layout.stages[pp]) for name in linears]
    return [*names, "output_layer._extra_state"] if pp == layout.pipeline - 1 else names


@lru_cache(maxsize=64)
def hf_shapes(model: Model, adapter: Optional[Adapter] = None) -> dict[str, Shape]:
    """Names and shapes of all tensors of the Hugging Face checkpoint, and of A and B. Shared: do not change it."""
    shapes: dict[str, Shape] = {}
    for tensor in mcore_tensors(model, single(model), 0, 0, adapter):
        for block in tensor.blocks:
            rows = max(block.row + block.rows, shapes.get(block.name, (0,))[0])
            shapes[block.name] = (rows, *block.shape[1:])
    return shapes


def whole(name: str, shape: Shape) -> Block:
    return Block(name, 0, shape[0], 0, shape[1] if len(shape) > 1 else None)


def parameter_count(model: Model, adapter: Optional[Adapter] = None, trained: bool = False) -> int:
    """Number of parameters, tied embeddings counted once; or of trained ones: with an adapter its own."""
    return rank_parameter_count(model, single(model), 0, 0, adapter, trained)


@lru_cache(maxsize=1024)
def rank_parameter_count(
    model: Model, layout: Layout, tp: int, pp: int, adapter: Optional[Adapter] = None, trained: bool = False
) -> int:
    """Number of parameters that one rank holds, padding of the vocabulary included; or trains: see above."""
    tensors = mcore_tensors(model, layout, tp, pp, adapter)
    return sum(prod(tensor.shape) for tensor in tensors if ".lora_" in tensor.name or not (trained and adapter))


class _Rank:
    def __init__(self, model: Model, layout: Layout, tp: int, pp: int) -> None:
        self.model, self.layout, self.tp, self.pp = model, layout, tp, pp

    def tensors(self) -> Iterator[McoreTensor]:
        model, layout = self.model, self.layout
        if self.pp == 0:
            yield self._vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
        offset = sum(layout.stages[: self.pp])
        for layer in range(layout.stages[self.pp]):
            yield from self._layer(f"decoder.layers.{layer}.", f"model.layers.{offset + layer}.")
        if self.pp == layout.pipeline - 1:
            yield _stack("decoder.final_layernorm.weight", [Block("model.norm.weight", 0, model.hidden_size)])
            if not (model.tie_word_embeddings and layout.pipeline == 1):
                head = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
                yield self._vocabulary("output_layer.weight", head)

    def _layer(self, here: str, there: str) -> Iterator[McoreTensor]:
        model, (ffn_begin, ffn) = self.model, self._share(self.model.ffn_hidden_size)
        hidden = model.hidden_size
        heads, attention = self._share(model.num_attention_heads * model.kv_channels)
        proj, qkv = here + "self_attention.linear_proj.", here + "self_attention.linear_qkv."
        yield _stack(here + "input_layernorm.weight", [Block(there + "input_layernorm.weight", 0, hidden)])
        yield _stack(proj + "weight", [Block(there + "self_attn.o_proj.weight", 0, hidden, heads, attention)])
        if model.add_dense_bias:
            yield _stack(proj + "bias", [Block(there + "self_attn.o_proj.bias", 0, hidden)])
        yield _stack(qkv + "weight", list(self._qkv(there, "weight", hidden)))
        if model.add_qkv_bias:
            yield _stack(qkv + "bias", list(self._qkv(there, "bias", None)))
        yield _stack(here + "pre_mlp_layernorm.weight", [Block(there + "post_attention_layernorm.weight", 0, hidden)])
        gate_up = [Block(f"{there}mlp.{name}_proj.weight", ffn_begin, ffn, 0, hidden) for name in ("gate", "up")]
        yield _stack(here + "mlp.linear_fc1.weight", gate_up)
        yield _stack(here + "mlp.linear_fc2.weight", [Block(there + "mlp.down_proj.weight", 0, hidden, ffn_begin, ffn)])

    def _qkv(self, there: str, kind: str, columns: Optional[int]) -> Iterator[Block]:
        model, (first, groups) = self.model, self._share(self.model.num_query_groups)
        head = model.kv_channels
        queries = head * model.num_attention_heads // model.num_query_groups
        for group in range(first, first + groups):
            for name, rows in (("q", queries), ("k", head), ("v", head)):
                yield Block(f"{there}self_attn.{name}_proj.{kind}", group * rows, rows, 0, columns)

    def _vocabulary(self, here: str, there: str) -> McoreTensor:
        hidden, size = self.model.hidden_size, self.model.vocab_size
        begin, rows = self._share(self.layout.padded_vocab_size)
        real = max(min(begin + rows, size) - begin, 0)
        blocks = [Block(there, begin, real, 0, hidden)] if real else []
        last_row = Block(there, size - 1, 1, 0, hidden, padding=True)
        return _stack(here, blocks + [last_row] * (rows - real))

    def _share(self, size: int) -> tuple[int, int]:
        """Begin and size of this tensor rank's part of `size`."""
        part = size // self.layout.tensor
        return self.tp * part, part


def _stack(name: str, blocks: list[Block]) -> McoreTensor:
    return McoreTensor(name, (sum(block.rows for block in blocks), *blocks[0].shape[1:]), tuple(blocks))
