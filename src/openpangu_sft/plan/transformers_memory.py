"""Memory of a process of the portable engine (training/portable/): gradients, state and trained weights in fp32. Pure.

Nothing is sharded: every replica holds all of it. Counted from transformers' Llama with model/layers.py and torch 2.1's
operators, and compared with them on a CPU by tests/plan/test_transformers_memory.py.
"""

from __future__ import annotations

from itertools import chain
from math import prod

from openpangu_sft.checkpoint.sharding import hf_shapes, parameter_count
from openpangu_sft.model.flops import recomputed_layers
from openpangu_sft.plan.memory import Memory, Part, Phase, kept_by_layers, loss_parts
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import LINEARS


def transformers_memory(recipe: Recipe) -> Memory:
    """The same for every process."""
    trained = sum(_trained_sizes(recipe).values())
    static = [
        held_weights(recipe),
        Part("gradients", trained * 4, f"{trained:,} of adapters x 4" if recipe.train.lora.rank else "x 4"),
        Part("optimizer state", trained * 8, "x 8: Adam's two moments"),
    ]
    if recipe.parallel.world > 1:
        static.append(Part("DDP's buckets", trained * 4, "x 4: gradients once more"))
    phases = (_loss(recipe), _backward(recipe), _step(recipe))
    return Memory(tuple(static), phases, ())


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


def _loss(recipe: Recipe) -> Phase:
    model, autocast = recipe.model, _autocast(recipe)
    # A logit and its log-softmax, with two gradients: of the log-softmax and of the logit; in bf16 all but the logit
    # are fp32.
    width = 2 if autocast else 4
    frozen = recipe.train.lora.rank > 0
    output = loss_parts(_trained(recipe), model.vocab_size, model.hidden_size, width, width + 3 * 4, frozen)
    parts = [_batch(recipe), _kept(recipe, all_copies=False), _final(recipe), *output]
    if autocast:
        copies = model.num_layers * _copies(recipe)
        if model.tie_word_embeddings or not frozen:
            copies += _vocabulary(recipe) * 2
        parts.append(Part("weights in bf16", copies, "autocast's copies, x 2"))
    return Phase("loss", tuple(parts))


def _backward(recipe: Recipe) -> Phase:
    model, tokens, width = recipe.model, _tokens(recipe), 2 if _autocast(recipe) else 4
    parts = [_batch(recipe), _kept(recipe)]
    if recomputed_layers(recipe, model.num_layers) == model.num_layers:
        again = layer_activations(recipe) - layer_input(recipe) + _copies(recipe)
        parts.append(Part("one layer again", again, "what it keeps, computed from its input"))
    gradients = tokens * (2 * model.ffn_hidden_size * width + 4 * model.hidden_size)
    parts.append(Part("gradients in a layer", gradients, "at the product in the MLP, where they are widest"))
    if model.tie_word_embeddings and not recipe.train.lora.rank:
        parts.append(Part("output layer's gradient", _vocabulary(recipe) * 4, "x 4: waits for the embedding's"))
    return Phase("backward", tuple(parts))


def _step(recipe: Recipe) -> Phase:
    """AdamW: on CUDA the roots of all second moments at once, on a CPU two copies of one tensor at a time."""
    if recipe.train.device == "cpu":
        largest = max(_trained_sizes(recipe).values())
        return Phase("optimizer step", (Part("roots", largest * 8, "of the largest tensor, twice"),))
    size = sum(_trained_sizes(recipe).values()) * 4
    return Phase("optimizer step", (Part("roots", size, "x 4: of all second moments (on CUDA)"),))


def _kept(recipe: Recipe, all_copies: bool = True) -> Part:
    layers, copies = recipe.model.num_layers, _copies(recipe) if all_copies else 0
    again = recomputed_layers(recipe, layers)
    return kept_by_layers(layers, again, layer_input(recipe), layer_activations(recipe) + copies)


def _final(recipe: Recipe) -> Part:
    """The last norm's input at trained positions."""
    return Part("kept by the last norm", _trained(recipe) * (recipe.model.hidden_size * 4 + 4), "its input")


def _batch(recipe: Recipe) -> Part:
    """Ids, labels and positions in int64; cosine and sine of every position."""
    size = _tokens(recipe) * (3 * 8 + 2 * 4 * recipe.model.kv_channels)
    return Part("batch", size, "ids, labels, positions and their angles")


def _copies(recipe: Recipe) -> int:
    """Bytes of autocast's bf16 copies of a layer's matrices; frozen ones are held in bf16."""
    trained = {name: size for name, size in _trained_sizes(recipe).items() if name.startswith("model.layers.0.")}
    sizes = (size for name, size in trained.items() if "_proj." in name and name.endswith("weight"))
    return sum(sizes) * 2 if _autocast(recipe) else 0


def held_weights(recipe: Recipe) -> Part:
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


def _vocabulary(recipe: Recipe) -> int:
    return recipe.model.vocab_size * recipe.model.hidden_size


def _tokens(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.data.seq_length


def _trained(recipe: Recipe) -> int:
    """Targets of a micro batch at most: every token but the first of a pack."""
    return recipe.train.micro_batch_size * (recipe.data.seq_length - 1)


def _autocast(recipe: Recipe) -> bool:
    return recipe.train.precision == "bf16"
