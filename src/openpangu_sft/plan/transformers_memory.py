"""Memory of a process of the portable engine (training/portable/): gradients, state and trained weights in fp32. Pure.

Nothing is sharded: every replica holds all of it. Counted from transformers' Llama with model/layers.py and torch 2.1's
operators, and compared with them on a CPU by tests/plan/test_transformers_memory.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from math import prod

from openpangu_sft.checkpoint.sharding import hf_shapes, parameter_count
from openpangu_sft.model.flops import recomputed_layers
from openpangu_sft.plan.memory import Memory, Part, Phase, kept_by_layers, loss_parts
from openpangu_sft.recipe.lora import LINEARS
from openpangu_sft.recipe.schema import Recipe


def transformers_memory(recipe: Recipe) -> Memory:
    """The same for every process."""
    trained = sum(_trained_sizes(recipe).values())
    static = [
        _held_weights(recipe),
        Part("gradients", trained * 4, f"{trained:,} of adapters x 4" if recipe.train.lora.rank else "x 4"),
        Part("optimizer state", trained * 8, "x 8: Adam's two moments"),
    ]
    if recipe.parallel.world > 1:
        static.append(Part("DDP's buckets", trained * 4, "x 4: gradients once more"))
    return Memory(tuple(static), tuple(_phases(recipe)), ())


def layer_activations(recipe: Recipe) -> int:
    """Bytes that one layer keeps for its backward pass, with its input, without bf16 copies of its weights.

    In fp32 q, k and v share one input, and so do gate and up; under autocast each linear has its own bf16 copy of it.
    """
    model, tokens, adapter = recipe.model, _tokens(recipe), recipe.train.lora.adapter
    heads, keys = (count * model.kv_channels for count in (model.num_attention_heads, model.num_query_groups))
    norms = 2 * (model.hidden_size * 4 + 4)
    kept = set(adapter.targets if adapter else chain(*LINEARS.values()))  # of frozen ones only by an adapter's A
    inputs = 2 * len(kept - {"o_proj", "down_proj"}) if _autocast(recipe) else 4 * len(kept & {"q_proj", "gate_proj"})
    width = 2 if _autocast(recipe) else 4
    attended = 4 if recipe.train.device == "cpu" else width  # model/layers.py: never in bf16 on a CPU
    # q, result, o_proj's input; k, v; one sum a head
    attention = heads * (2 * attended + width * ("o_proj" in kept)) + keys * 2 * attended
    attention += 4 * model.num_attention_heads
    mlp = (3 + ("down_proj" in kept)) * model.ffn_hidden_size * width  # gate, its silu, up, their product
    inner = len(kept) * adapter.rank * width if adapter else 0  # what A gives and B takes
    return tokens * (norms + inputs * model.hidden_size + attention + mlp + inner)


def layer_input(recipe: Recipe) -> int:
    """Bytes of a layer's input, in fp32 under autocast too."""
    return _tokens(recipe) * recipe.model.hidden_size * 4


def _phases(recipe: Recipe) -> Iterator[Phase]:
    model, tokens, autocast = recipe.model, _tokens(recipe), _autocast(recipe)
    width, frozen, trained_sizes = 2 if autocast else 4, recipe.train.lora.rank > 0, _trained_sizes(recipe)
    # autocast's bf16 copies of a layer's matrices; frozen ones are held in bf16
    matrix = re.compile(r"model\.layers\.0\..*_proj\..*weight").fullmatch
    copies = sum(size for name, size in trained_sizes.items() if matrix(name)) * 2 if autocast else 0
    again, vocabulary = recomputed_layers(recipe, model.num_layers), model.vocab_size * model.hidden_size
    # ids, labels and positions in int64; cosine and sine of every position
    batch = Part("batch", tokens * (3 * 8 + 2 * 4 * model.kv_channels), "ids, labels, positions and their angles")

    def kept(copied: int) -> Part:
        return kept_by_layers(model.num_layers, again, layer_input(recipe), layer_activations(recipe) + copied)

    trained = recipe.train.micro_batch_size * (recipe.data.seq_length - 1)  # at most: every token but a pack's first
    loss = [batch, kept(0), Part("kept by the last norm", trained * (model.hidden_size * 4 + 4), "its input")]
    # A logit and its log-softmax, with two gradients: of the log-softmax and of the logit; in bf16 all but the logit
    # are fp32.
    loss += loss_parts(trained, model.vocab_size, model.hidden_size, width, width + 3 * 4, frozen)
    if autocast:
        copied = model.num_layers * copies + vocabulary * 2 * (model.tie_word_embeddings or not frozen)
        loss.append(Part("weights in bf16", copied, "autocast's copies, x 2"))
    yield Phase("loss", tuple(loss))

    backward = [batch, kept(copies)]
    if again == model.num_layers:
        one = layer_activations(recipe) - layer_input(recipe) + copies
        backward.append(Part("one layer again", one, "what it keeps, computed from its input"))
    gradients = tokens * (2 * model.ffn_hidden_size * width + 4 * model.hidden_size)
    backward.append(Part("gradients in a layer", gradients, "at the product in the MLP, where they are widest"))
    if model.tie_word_embeddings and not frozen:
        backward.append(Part("output layer's gradient", vocabulary * 4, "x 4: waits for the embedding's"))
    yield Phase("backward", tuple(backward))

    # AdamW: on CUDA the roots of all second moments at once, on a CPU two copies of one tensor at a time
    roots = Part("roots", sum(trained_sizes.values()) * 4, "x 4: of all second moments (on CUDA)")
    if recipe.train.device == "cpu":
        roots = Part("roots", max(trained_sizes.values()) * 8, "of the largest tensor, twice")
    yield Phase("optimizer step", (roots,))


def _held_weights(recipe: Recipe) -> Part:
    """In fp32; frozen linear layers of bf16 runs in bf16."""
    parameters = parameter_count(recipe.model, recipe.train.lora.adapter)
    if not (recipe.train.lora.rank and _autocast(recipe)):
        return Part("weights", parameters * 4, f"{parameters:,} x 4 bytes: fp32, also in bf16 runs")
    shapes = hf_shapes(recipe.model).items()
    linear = sum(prod(shape) for name, shape in shapes if "_proj." in name or name.startswith("lm_head."))
    how = f"{linear:,} x 2 bytes: frozen linear layers; {parameters - linear:,} x 4"
    return Part("weights", parameters * 4 - linear * 2, how)


def _trained_sizes(recipe: Recipe) -> dict[str, int]:
    """Numbers of parameters by name."""
    shapes = hf_shapes(recipe.model, recipe.train.lora.adapter)
    return {name: prod(shape) for name, shape in shapes.items() if ".lora_" in name or not recipe.train.lora.rank}


def _tokens(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.data.seq_length


def _autocast(recipe: Recipe) -> bool:
    return recipe.train.precision == "bf16"
