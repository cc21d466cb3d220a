"""make plan: what holds for any recipe."""

from __future__ import annotations

import json
from typing import Any, Optional

from hypothesis import given, settings
from hypothesis import strategies as st

from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.model.flops import flops_per_token, highest_rate, idle
from openpangu_sft.plan.choose import all_splits, choice_of, ranking
from openpangu_sft.plan.estimate import disk_of, memory_of
from openpangu_sft.plan.memory import total
from openpangu_sft.plan.mindspeed_memory import mindspeed_memory, shards
from openpangu_sft.recipe.schema import Recipe
from plan.test_estimate import published, sizes

TARGETS = [["all-linear"], ["q_proj", "k_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj", "up_proj"]]
NONE = {"train.recompute.granularity": "none"}


def other(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A recipe with other values by key."""
    content = recipe.model_dump()
    for key, value in values.items():
        *above, name = key.split(".")
        section = content
        for each in above:
            section = section[each]
        section[name] = value
    return Recipe.model_validate(content)


def recomputing(recipe: Recipe, layers: int) -> Recipe:
    granularity = "full" if layers else "none"
    return other(recipe, {"train.recompute.granularity": granularity, "train.recompute.num_layers": layers})


@st.composite
def recipes(draw: Any, engine: Optional[str] = None) -> Recipe:
    """Valid recipes of one engine or of any, of all kinds of sizes; valid with twice the context parallel too."""

    def power(most: int) -> int:
        return 2 ** int(draw(st.integers(0, most)))

    engine = engine or draw(st.sampled_from(["mindspeed", "transformers"]))
    split = engine == "mindspeed"
    tensor, context, pipeline = (power(most) if split else 1 for most in (2, 2, 1))
    data, micro = power(2), power(1)
    groups = tensor * power(1)
    layers = pipeline * draw(st.integers(1, 6))
    again = draw(st.integers(0, layers))
    content = published().model_dump()
    content["model"] |= {
        "num_layers": layers,
        "hidden_size": 16 * draw(st.integers(1, 64)),
        "ffn_hidden_size": 64 * draw(st.integers(1, 64)),
        "num_query_groups": groups,
        "num_attention_heads": groups * context * 2 * power(1),
        "kv_channels": 2 * draw(st.integers(1, 64)),
        "vocab_size": draw(st.integers(100, 200_000)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    content["data"]["seq_length"] = 2 ** draw(st.integers(6, 15))
    content["parallel"] |= {"tensor": tensor, "pipeline": pipeline, "context": context}
    content["parallel"]["devices_per_node"] = tensor * pipeline * context * data
    content["train"] |= {
        "engine": engine,
        "precision": draw(st.sampled_from(["bf16", "fp32"])),
        "micro_batch_size": micro,
        "global_batch_size": 2 * micro * data * draw(st.integers(1, 3)),
        "lora": {"rank": draw(st.integers(0, 2)), "targets": draw(st.sampled_from(TARGETS))},
        "recompute": {"granularity": "full" if again else "none", "method": "block", "num_layers": again},
    }
    return Recipe.model_validate(content)


@settings(max_examples=100, deadline=None)
@given(recipes())
def test_any_recipe_has_parts_of_a_size(recipe: Recipe) -> None:
    memory = memory_of(recipe)
    parts = [*memory.static, *memory.outside, *(part for phase in memory.phases for part in phase.parts)]
    assert all(isinstance(part.size, int) and part.size > 0 for part in parts if part.name != "HCCL buffers")
    assert (
        memory.needed >= memory.peak >= total(memory.static) >= parameter_count(recipe.model) // recipe.parallel.world
    )
    once, most = flops_per_token(other(recipe, NONE)), 3 / 2 if recipe.train.lora.rank else 4 / 3
    assert once <= flops_per_token(recipe) < most * once
    assert idle(recipe) >= 1
    assert idle(recipe) == 1 or recipe.parallel.pipeline > 1
    assert 0 < highest_rate(recipe) < float("inf")
    full = other(recipe, {"train.lora.rank": 0})
    assert disk_of(full).checkpoint >= parameter_count(recipe.model) * 12
    if recipe.train.lora.rank:
        assert total(memory.static) < total(memory_of(full).static)
        assert disk_of(recipe).checkpoint < disk_of(full).checkpoint
        assert once < flops_per_token(other(full, NONE))
    json.dumps([part._asdict() for part in parts])


def of_twice_the_batch(recipe: Recipe) -> Recipe:
    """Twice the global batch, so that a micro batch of twice the size comes as often as the other did.

    With the same global batch half as many would be on their way in a pipeline, and what is kept once for each of
    them, whatever its size (cos and sin), would be kept half as often.
    """
    content = recipe.model_dump()
    content["train"]["global_batch_size"] *= 2
    return Recipe.model_validate(content)


def wider_by_two(recipe: Recipe) -> Recipe:
    """Twice the devices, all of them data parallel, and twice the global batch."""
    content = of_twice_the_batch(recipe).model_dump()
    content["parallel"]["nodes"] *= 2
    return Recipe.model_validate(content)


@settings(max_examples=100, deadline=None)
@given(recipes(), st.integers(0, 11))
def test_what_lessens_memory_lessens_it(recipe: Recipe, layers: int) -> None:
    layers %= recipe.model.num_layers
    now = memory_of(recipe)
    more, fewer = (choice_of(recomputing(recipe, number)) for number in (layers + 1, layers))
    assert more.memory.needed <= fewer.memory.needed
    assert more.work >= fewer.work
    assert more.sent >= fewer.sent
    twice = other(of_twice_the_batch(recipe), {"train.micro_batch_size": recipe.train.micro_batch_size * 2})
    assert memory_of(twice).peak >= now.peak


@settings(max_examples=100, deadline=None)
@given(recipes("mindspeed"))
def test_context_parallel_never_adds_activations_and_data_parallel_no_weights(recipe: Recipe) -> None:
    now = mindspeed_memory(recipe)
    sliced_recipe = other(wider_by_two(recipe), {"parallel.context": recipe.parallel.context * 2})
    sliced = memory_of(sliced_recipe)
    assert sliced.peak <= now.peak
    if sliced.stage == now.stage:  # another stage of a pipeline may be the fullest one
        for before, after in zip(now.phases, sliced.phases):
            assert after.size <= before.size
    wider = wider_by_two(recipe)
    assert (wider.parallel.data, shards(wider)) == (2 * recipe.parallel.data, 2 * shards(recipe))
    before, after = sizes(now.static), sizes(mindspeed_memory(wider).static)
    for name, size in before.items():
        assert after[name] < size if name == "optimizer state" else after[name] == size


@settings(max_examples=25, deadline=None)
@given(recipes(), st.sampled_from([2, 8, 32, 64]))
def test_what_auto_takes_is_the_least_work_that_fits(recipe: Recipe, gib: float) -> None:
    splits = all_splits(recipe)
    best = ranking(splits, True, gib)[0]
    every = [choice_of(recomputing(split, layers)) for split in splits for layers in range(split.model.num_layers + 1)]
    fitting = [choice for choice in every if choice.fits(gib)]
    assert best.fits(gib) or not fitting
    assert all(best.work <= choice.work for choice in fitting)
    if not best.fits(gib):
        assert best.memory.needed <= min(choice.memory.needed for choice in every)
